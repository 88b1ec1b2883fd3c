"""annotation/layouts.py: small files of exactly the published forms come in, and go out and in again unchanged.

The rows are our own texts in the schemas of TRL's documentation (dataset formats), openbmb/UltraFeedback, NeMo-RL's
guide to DPO and LLaMA-Factory's data/README.md.
"""

import json

import pytest

from alignment.plan import plan
from annotation.import_data import convert as convert_rows
from annotation.import_data import import_prompts, import_ranked, main, open_data, ranked_by
from annotation.layouts import LAYOUTS, check_row, layout_of
from hps.errors import InputError
from pipeline.recipe import load_recipe
from pipeline.records import read_jsonl, read_prompts, read_ranked
from tools.export import LIST_COLUMNS, export, write_table


def user(*contents: str) -> list[dict]:
    """Messages of alternating turns, the user's first."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


SYSTEM = {"role": "system", "content": "Be brief."}
TEA, PAIR = user("What is tea?"), {"responses": ["A drink.", "A car."], "rewards": [0, -1]}
TALK = user("What is tea?", "A drink.", "Hot?")
RATED = {
    "source": "ours",
    "instruction": "What is tea?\n",
    "models": ["a", "b", "c", "d"],
    "completions": [
        {
            "model": model,
            "response": text,
            "custom_system_prompt": "Be kind.",
            "annotations": {"helpfulness": {"Rating": str(rating), "Rationale": "so"}},
            "fine-grained_score": fine,
            "overall_score": overall,
        }
        for model, text, rating, fine, overall in (
            ("a", "A drink.", 4, 4.25, 7.0),
            ("b", "A car.", 1, 1.0, 8.5),
            ("c", "A hot drink.", 5, 5.0, 9.0),
            ("d", "Tea.", 4, 4.25, 3.0),
        )
    ],
}
LIST = ["A hot drink.", "A drink.", "Tea.", "A car."]
RANKS = {
    "context": TALK,
    "completions": [
        {"rank": rank, "completion": said(text)} for rank, text in ((2, "No."), (0, "Yes, hot."), (1, "Yes."))
    ],
}
REWARDS = {
    "context": TEA,
    "completions": [
        {"rank": rank, "completion": said(text), "reward": reward}
        for rank, text, reward in ((1, "A car.", 0.0), (0, "A drink.", 10.0))
    ],
}
# A file of each form: its layout, its rows, and prompt, responses and rewards of the ranked record that each becomes.
FORMS = {
    "trl-standard": (
        "pair",
        [{"prompt": "What is tea?", "chosen": " A drink.", "rejected": " A car."}],
        [(TEA, PAIR["responses"], [0, -1])],
    ),
    "trl-standard-implicit": (
        "pair",
        [
            {"chosen": "The sky is blue.", "rejected": "The sky is black."},
            {"chosen": "Tea? A drink.", "rejected": "Tea? No"},
        ],
        [(user("The sky is"), ["blue.", "black."], [0, -1]), (user("Tea?"), ["A drink.", "No"], [0, -1])],
    ),
    "trl-conversational": (
        "pair",
        [{"prompt": [SYSTEM, *TALK], "chosen": said("Yes."), "rejected": said("No.")}],
        [([SYSTEM, *TALK], ["Yes.", "No."], [0, -1])],
    ),
    "trl-conversational-implicit": (
        "pair",
        [{"chosen": TALK + said("Yes."), "rejected": TALK + said("No.")}],
        [(TALK, ["Yes.", "No."], [0, -1])],
    ),
    "ultrafeedback-binarized": (
        "pair",
        [
            {
                "prompt": "What is tea?",
                "prompt_id": "of theirs",
                "chosen": TEA + said("A drink."),
                "rejected": TEA + said("A car."),
                "messages": TEA + said("A drink."),
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            }
        ],
        [(TEA, PAIR["responses"], [8.5, 3.0])],
    ),
    "ratings of a pair": (
        "pair",
        [{"prompt": TEA, "chosen": "A drink.", "rejected": "A car.", "chosen_rating": 5, "rejected_rating": 2.5}],
        [(TEA, PAIR["responses"], [5, 2.5])],
    ),
    "a system beside texts": (
        "pair",
        [
            {"system": "Be brief.", "prompt": "What is tea?", "chosen": "A drink.", "rejected": "A car."},
            {"system": "", "prompt": "What is tea?", "chosen": "A drink.", "rejected": "A car."},
        ],
        [([SYSTEM, *TEA], PAIR["responses"], [0, -1]), (TEA, PAIR["responses"], [0, -1])],
    ),
    "a system beside a list": (
        "ordered",
        [{"system": "Be brief.", "prompt": [SYSTEM, *TALK], "responses": LIST}],
        [([SYSTEM, *TALK], LIST, [0, -1, -2, -3])],
    ),
    "a system beside rewards": (
        "ranked",
        [{"system": "Be brief.", "prompt": TEA, **PAIR}],
        [([SYSTEM, *TEA], PAIR["responses"], [0, -1])],
    ),
    "distilabel": (
        "pair",
        [{"instruction": "Tea?", "prompt": "What is tea?", "chosen": TEA + said("A drink."), "rejected": "A car."}],
        [(TEA, PAIR["responses"], [0, -1])],
    ),
    "several rejected": (
        "pair",
        [{"prompt": "What is tea?", "chosen": "A drink.", "rejected": ["A car.", "A town."]}],
        [(TEA, ["A drink.", "A car.", "A town."], [0, -1, -1])],
    ),
    "several rejected with scores": (
        "pair",
        [
            {
                "prompt": TEA,
                "chosen": said("A drink."),
                "rejected": [said("A car."), said("A town.")],
                "reward_chosen": 3.0,
                "reward_rejected": [1.0, 2.0],
            }
        ],
        [(TEA, ["A drink.", "A town.", "A car."], [3, 2, 1])],
    ),
    "messages as responses": (
        "ordered",
        [{"prompt": TEA, "responses": [said("A drink."), said("A car.")]}],
        [(TEA, PAIR["responses"], [0, -1])],
    ),
    "messages as responses with rewards": (
        "ranked",
        [{"prompt": TEA, "responses": [said("A car.")[0], said("A drink.")[0]], "rewards": [0, 1]}],
        [(TEA, PAIR["responses"], [1, 0])],
    ),
    "hh-rlhf": (
        "pair",
        [
            {
                "chosen": "\n\nHuman: What is tea?\n\nAssistant: A drink.\n\nHuman: Hot?\n\nAssistant: Yes.",
                "rejected": "\n\nHuman: What is tea?\n\nAssistant: A drink.\n\nHuman: Hot?\n\nAssistant: No.",
            },
            {"prompt": "\n\nHuman: What is tea?\n\nAssistant:", "chosen": " A drink.", "rejected": " A car."},
        ],
        [(TALK, ["Yes.", "No."], [0, -1]), (TEA, PAIR["responses"], [0, -1])],
    ),
    "ultrafeedback": ("ultrafeedback", [RATED], [(TEA, LIST, [5.0, 4.25, 4.25, 1.0])]),
    "nemo-rl-ranks": ("nemo_rl", [RANKS], [(TALK, ["Yes, hot.", "Yes.", "No."], [0, -1, -2])]),
    "nemo-rl-rewards": ("nemo_rl", [REWARDS], [(TEA, PAIR["responses"], [10.0, 0.0])]),
    "llama-factory-alpaca": (
        "alpaca",
        [
            {
                "instruction": "Is it hot?",
                "input": "The tea.",
                "system": "Be brief.",
                "history": [["What is tea?", "A drink."]],
                "chosen": "Yes.",
                "rejected": "No.",
            },
            {"instruction": "What is tea?", "input": "", "chosen": "A drink.", "rejected": "A car."},
        ],
        [
            ([SYSTEM, *user("What is tea?", "A drink.", "Is it hot?\nThe tea.")], ["Yes.", "No."], [0, -1]),
            (TEA, PAIR["responses"], [0, -1]),
        ],
    ),
    "llama-factory-sharegpt": (
        "sharegpt",
        [
            {
                "conversations": [
                    {"from": "human", "value": "What is tea?"},
                    {"from": "gpt", "value": "A drink."},
                    {"from": "human", "value": "Hot?"},
                ],
                "system": "Be brief.",
                "chosen": {"from": "gpt", "value": "Yes."},
                "rejected": {"from": "gpt", "value": "No."},
            }
        ],
        [([SYSTEM, *TALK], ["Yes.", "No."], [0, -1])],
    ),
    "llama-factory-messages": (
        "messages",
        [{"messages": [SYSTEM, *TALK], "chosen": said("Yes.")[0], "rejected": said("No.")[0]}],
        [([SYSTEM, *TALK], ["Yes.", "No."], [0, -1])],
    ),
    "conversations beside messages": (
        "messages",
        [{"messages": TALK + said("Yes."), "chosen": TALK + said("Yes."), "rejected": TALK + said("No.")}],
        [(TALK, ["Yes.", "No."], [0, -1])],
    ),
    "ordered": (
        "ordered",
        [{"prompt": TALK, "responses": LIST}, {"prompt": TEA, "responses": PAIR["responses"]}],
        [(TALK, LIST, [0, -1, -2, -3]), (TEA, PAIR["responses"], [0, -1])],
    ),
    "released": (
        "ranked",
        [
            {
                "prompt": "<|im_start|>user\nWhat is tea?<|im_end|>\n<|im_start|>assistant\n",
                "responses": ["A car.", "A drink."],
                "rewards": [-3.5, 2.0],
            }
        ],
        [(TEA, ["A drink.", "A car."], [2.0, -3.5])],
    ),
}
FORM_NAMES = pytest.mark.parametrize("form", FORMS)


def write_parquet(path, rows: list[dict]):
    import pyarrow as pa
    from pyarrow.parquet import write_table

    names = {name: None for row in rows for name in row}
    write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    return path


@pytest.fixture
def written(tmp_path, write_lines):
    """Write a form's file as JSON Lines, as a JSON list or as Parquet; return its path."""

    def write(form: str, suffix: str = ".jsonl"):
        _, rows, _ = FORMS[form]
        path = tmp_path / f"{form}{suffix}"
        if suffix == ".parquet":
            return write_parquet(path, rows)
        if suffix == ".json":
            path.write_text(json.dumps(rows, indent=1))
            return path
        return write_lines(rows, path.name)

    return write


def imported(path, tokenizer, **arguments) -> tuple[str, list[dict], dict, list[dict]]:
    """Layout, ranked records, counts and ledger of a file."""
    from collections import Counter

    counts, ledger = Counter(), []
    rows, layout, _ = open_data(str(path), "train", None, arguments.pop("layout", None))
    records = list(convert_rows(rows, ranked_by(tokenizer), counts, ledger, LAYOUTS[layout], **arguments))
    return layout, records, counts, ledger


@FORM_NAMES
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_file_of_each_form_is_read(form, suffix, written, tokenizer):
    layout, _, expected = FORMS[form]
    found, records, counts, ledger = imported(written(form, suffix), tokenizer)
    assert found == layout and not ledger and counts["written"] == counts["read"] == len(expected)
    assert [(each["prompt"], each["responses"], each["rewards"]) for each in records] == expected
    for record in records:
        places = [f"given_{place}" for place in range(1, len(record["responses"]) + 1)]
        assert record["sources"] == (["generated"] * 2 if layout == "ranked" else places)
        assert not any(record["truncated"])


@pytest.mark.slow
@FORM_NAMES
def test_what_came_in_goes_out_and_comes_in_again(form, written, tiny_recipe, tmp_path):
    """As JSON Lines and as Parquet; and the plan trains on it, y_1 being the best."""
    recipe = load_recipe(tiny_recipe, ["schedule.ties=exclude"])
    import_ranked(str(written(form)), recipe)
    for suffix in (".jsonl", ".parquet"):
        out = tmp_path / f"out{suffix}"
        export("lists", out, recipe, "train", False, 0, None)
        again = load_recipe(tiny_recipe, [f"output={tmp_path / suffix[1:]}"])
        import_ranked(str(out), again)
        written_again, first = (list(read_ranked(each.ranked("train"))) for each in (again, recipe))
        assert [record for _, record in written_again] == [record for _, record in first]
    plan(recipe)
    _, _, expected = FORMS[form]
    best = {responses[0] for _, responses, _ in expected}
    records = {record["prompt_id"]: record for _, record in read_ranked(recipe.ranked("train"))}
    rows = [row for _, row in read_jsonl(recipe.run_folder() / "plan.jsonl")]
    assert {records[row["prompt_id"]]["responses"][row["preferred"]] for row in rows} == best


def test_pairs_come_out_as_they_came_in(tiny_recipe, tmp_path, write_lines):
    """Without scores, which nobody gave; and come in again as the same records."""
    rows = FORMS["trl-conversational"][1] + [{"prompt": TEA, "chosen": said("A drink."), "rejected": said("A car.")}]
    recipe = load_recipe(tiny_recipe, ["loss.preference=bt", "schedule.epochs=1", "schedule.global_batch=2"])
    import_ranked(str(write_lines(rows)), recipe)
    export("pairs", tmp_path / "pairs.parquet", recipe, "train", False, 0, None)
    back = [row for _, row in open_data(str(tmp_path / "pairs.parquet"), "train", None, None)[0]]
    ours = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in back]
    assert sorted(ours, key=str) == sorted(rows, key=str)
    assert not any(name.startswith("score_") for row in back for name in row)
    again = load_recipe(tiny_recipe, [f"output={tmp_path / 'again'}"])
    import_ranked(str(tmp_path / "pairs.parquet"), again)
    ours, theirs = ([record for _, record in read_ranked(each.ranked("train"))] for each in (recipe, again))
    assert sorted(ours, key=str) == sorted(theirs, key=str)


def test_the_other_score_of_ultrafeedback_is_asked_for(written, tokenizer):
    _, (record,), counts, _ = imported(written("ultrafeedback"), tokenizer, layout="ultrafeedback_overall")
    assert record["responses"] == ["A hot drink.", "A car.", "A drink.", "Tea."]
    assert record["rewards"] == [9.0, 8.5, 7.0, 3.0]
    assert counts["not read: `models`"] == counts["not read: `source`"] == 1


def test_rows_of_any_order_get_the_layout_of_the_more_particular_fields():
    assert [layout_of(rows[0], "f:1") for _, rows, _ in FORMS.values()] == [layout for layout, _, _ in FORMS.values()]
    with pytest.raises(
        InputError, match=r'f:1: the fields are of no layout that is read: \["answer", "question"\]; re'
    ):
        layout_of({"question": "?", "answer": "!", "chosen": None}, "f:1")


GIVEN = {
    "ranked": {"responses": ["a", "b"], "rewards": [1, 0]},
    "pair": {"chosen": "a", "rejected": "b"},
    "ordered": {"responses": ["a", "b"]},
}


@pytest.mark.parametrize(("layout", "given"), GIVEN.items())
def test_a_text_is_a_message_of_the_user(layout, given):
    found = check_row({"prompt": " What is tea?\n", **given}, "f:1", LAYOUTS[layout])
    assert found["prompt"] == TEA and found["responses"] == ["a", "b"]
    assert found["sources"] == (["generated"] * 2 if layout == "ranked" else ["given_1", "given_2"])


@pytest.mark.parametrize(("layout", "given"), GIVEN.items())
def test_a_templated_text_becomes_its_turns_in_every_layout(layout, given):
    """Another template's than those that are known is refused."""
    text = "<|im_start|>user\nWhat is tea?<|im_end|>\n<|im_start|>assistant\n"
    assert check_row({"prompt": text, **given}, "f:1", LAYOUTS[layout])["prompt"] == TEA
    with pytest.raises(InputError, match="f:1: `prompt` is neither chat messages nor a string of Llama-3's template"):
        check_row({"prompt": "[INST] What is tea? [/INST]", **given}, "f:1", LAYOUTS[layout])


def test_what_the_trainer_takes_is_taken():
    """A number as the name of a prompt, and columns of a pair that resemble those of a list."""
    row = {"prompt": "What is tea?", "prompt_id": 7, **GIVEN["ranked"]}
    assert check_row(row, "f:1", LAYOUTS["ranked"])["prompt_id"] == "7"
    with pytest.raises(InputError, match="f:1: `prompt_id` is 7.5; give texts or whole numbers, or take it out"):
        check_row({**row, "prompt_id": 7.5}, "f:1", LAYOUTS["ranked"])
    row = {"prompt": "What is tea?", **GIVEN["pair"]}
    assert check_row({**row, "response": "x", "reward": 0.5}, "f:1", LAYOUTS["pair"]) == check_row(
        row, "f:1", LAYOUTS["pair"]
    )


def test_given_responses_may_be_truncated():
    row = {"prompt": "What is tea?", "responses": ["a", "b"]}
    for cuts in (None, [False, True]):
        found = check_row({**row, "truncated": cuts}, "f:1", LAYOUTS["ordered"])
        assert found["truncated"] == (cuts or [False, False])


def changed(form: str, **changes) -> tuple[dict, str]:
    layout, rows, _ = FORMS[form]
    return {**rows[0], **changes}, layout


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed("trl-standard", rejected=None), "`rejected` is missing"),
        (changed("trl-standard", chosen=7), "`chosen` is 7"),
        (changed("several rejected", rejected=["A car.", None]), r"`rejected\[1\]` is null"),
        (changed("several rejected with scores", reward_rejected=[1.0]), r"`reward_rejected` is \[1.0\]; give both a"),
        (changed("ordered", label=1), "`label` seems to say which response is better, and it is not read"),
        (changed("trl-standard-implicit", question="Why?"), "there is no `prompt`, and `question` is "),
        (changed("ordered", responses="x"), r'`responses` is "x"'),
        (changed("ordered", prompt=7), "`prompt` is 7"),
        (changed("ordered", reward=[1, 2, 3, 4]), "`reward` seems to say which response is better, and it is not read"),
        (changed("ordered", scores=[9.5, 9.4, 3, 1]), "`scores` seems to say .*; name it `rewards`, or remove it"),
        (changed("ordered", ranks=[3, 2, 1, 0]), "`ranks` seems to say which response is better, and it is not read"),
        (
            changed("trl-standard", rewards=[0, 5]),
            r"`rewards` is \[0, 5\] beside `chosen` and `rejected`, and it is not",
        ),
        (changed("llama-factory-alpaca", rewards=[0, 5]), r"`rewards` is \[0, 5\] beside `chosen` and `rejected`"),
        (changed("trl-standard", promt="x", prompt=None), "unknown field `promt`; write `prompt`"),
        (changed("trl-standard", prompt="  "), r"`prompt\[0\].content` is \"\": should be a text that is not blank"),
        (changed("trl-standard-implicit", rejected="No."), "there is no `prompt`, and `chosen` and `rejected` do not"),
        (changed("trl-conversational", system="Be kind."), "`system` is .*, and `prompt` has another system message"),
        (changed("ordered", system=7), "`system` is 7; give a text"),
        (changed("trl-conversational", prompt=None), "the column `prompt` is missing; give `prompt`"),
        (changed("trl-conversational", chosen=TALK), "last message of `chosen` is .*Hot"),
        (changed("trl-conversational-implicit", rejected=TEA + said("No.")), "conversation of `rejected` does not beg"),
        (changed("ultrafeedback-binarized", score_chosen=1), "`chosen` has the score 1 and `rejected` 3"),
        (changed("ultrafeedback-binarized", score_chosen="high"), r'`score_chosen` is "high"'),
        (changed("ultrafeedback-binarized", score_rejected=None), "`score_rejected` is null; give both a number"),
        (
            changed("ultrafeedback-binarized", score_chosen=None, score_rejected=None),
            "`score_chosen` is null; give both responses a score, or take the column out",
        ),
        (changed("ultrafeedback-binarized", score_chosen=10**400), "`score_chosen` is 1000"),
        (changed("released", rewards=[10**400, 1]), r"`rewards\[0\]` is 1000"),
        (changed("hh-rlhf", rejected="\n\nHuman: Milk?\n\nAssistant: No."), "transcripts do not share the prompt"),
        (changed("hh-rlhf", rejected="\n\nHuman: What is tea?"), "transcript ends without an answer"),
        (
            changed("ultrafeedback", completions=[{"response": "x"}]),
            r"`completions\[0\].fine-grained_score` is missing",
        ),
        (changed("ultrafeedback", instruction=None), "`instruction` is missing"),
        (changed("nemo-rl-ranks", completions=[{"rank": "0", "completion": []}]), r'`completions\[0\].rank` is "0"'),
        (
            changed("nemo-rl-ranks", completions=[{"rank": 0, "completion": TEA}]),
            r"`completions\[0\].completion` is \[",
        ),
        (changed("nemo-rl-ranks", context=TEA + said("Tea.")), "`prompt` is .*should end with the user's turn"),
        (
            changed(
                "nemo-rl-rewards",
                completions=[{**each, "rank": 0} for each in REWARDS["completions"][:1]] * 1
                + [{"rank": 1, "completion": said("x")}],
            ),
            r"`completions\[1\].reward` is missing",
        ),
        (
            changed("nemo-rl-rewards", completions=[{**e, "rank": 1 - e["rank"]} for e in REWARDS["completions"]]),
            r"`completions\[0\]` and `completions\[1\]`: the lower `rank` has the lower `reward`; rank 0 is the best",
        ),
        (changed("llama-factory-alpaca", history=[["only one"]]), r"`history\[0\]` is \[\"only one\"\]"),
        *(
            (changed(form, **{field: ["x"]}), f"`{field}` is .*only text is read")
            for form, field in [
                ("llama-factory-alpaca", "images"),
                ("trl-conversational", "tools"),
                ("nemo-rl-ranks", "tools"),
                ("ordered", "image"),
            ]
        ),
        (
            changed("llama-factory-sharegpt", chosen={"from": "human", "value": "x"}),
            '`chosen.from` is "human"; it must',
        ),
        (
            changed("llama-factory-sharegpt", conversations=[{"from": "observation", "value": "x"}]),
            r"`conversations\[0\].from` is \"observation\"; it must be one of human, gpt, system",
        ),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row, message):
    record, layout = row
    with pytest.raises(InputError, match=rf"^data.jsonl:3: row 3: .*{message}"):
        check_row(record, "data.jsonl:3: row 3", LAYOUTS[layout])


def test_with_skip_such_rows_are_in_the_ledger(tokenizer, write_lines):
    good, bad = FORMS["trl-standard"][1][0], {"prompt": "x", "chosen": "y", "rejected": 3}
    path = write_lines([good, bad])
    with pytest.raises(InputError, match=r"data.jsonl:2: row 2: `rejected` is 3"):
        imported(path, tokenizer)
    _, records, counts, (line,) = imported(path, tokenizer, skip=True)
    assert len(records) == 1 and (counts["read"], counts["written"], counts["rejected"]) == (2, 1, 1)
    assert line["reason"] == "unreadable row" and line["refused"]
    assert line["error"].startswith(f"{path}:2: row 2: `rejected` is 3; give a text")


def test_prompts_that_are_the_beginning_of_their_answers_are_counted(tokenizer, write_lines, capsys):
    """Nothing shows where such a prompt ends: a word of both answers belongs to it. The first one is shown."""
    texts = [("What is tea? A drink", "What is tea? A leaf"), ("Tea? Yes", "Tea? No")]
    rows = [{"chosen": a, "rejected": b} for a, b in texts]
    rows.append({"chosen": "Milk? Yes", "rejected": ["Milk? No", "Milk? Cheese"]})
    path = write_lines([*rows, FORMS["hh-rlhf"][1][0], FORMS["trl-standard"][1][0]])
    _, records, counts, _ = imported(path, tokenizer)
    assert [record["prompt"] for record in records[:3]] == [user("What is tea? A"), user("Tea?"), user("Milk?")]
    assert records[2]["responses"] == ["Yes", "No", "Cheese"]
    words = "prompt taken from the common beginning of chosen and rejected"
    assert counts[words] == 3 and counts["written"] == 5
    out = capsys.readouterr().out
    assert out == f'import: {path}:1: row 1: {words}: "What is tea? A"; the answer is "drink"\n'


def test_a_prompt_that_comes_again_is_kept_under_another_name(tokenizer, write_lines):
    pairs = [("A drink.", "A car."), ("A drink.", "Tea."), ("A drink.", "A car.")]
    path = write_lines([{"prompt": "What is tea?", "chosen": a, "rejected": b} for a, b in pairs])
    _, records, counts, (line,) = imported(path, tokenizer)
    first, second = (record["prompt_id"] for record in records)
    assert second == f"{first}-2" and records[1]["responses"] == ["A drink.", "Tea."]
    assert counts["repeated prompts, kept under another name"] == 1
    assert (line["reason"], line["first"][-5:]) == ("repeated row", "row 1") and line["place"].endswith("row 3")


@pytest.mark.parametrize("form", ["nemo-rl-ranks", "ultrafeedback"])
def test_of_equal_responses_the_best_is_kept(form, tokenizer, write_lines):
    row, layout = json.loads(json.dumps(FORMS[form][1][0])), FORMS[form][0]
    first, *_ = completions = row["completions"]  # neither is best in the file's order
    best = max(completions, key=lambda each: each.get("fine-grained_score", -each.get("rank", 0)))
    name = "completion" if form == "nemo-rl-ranks" else "response"
    first[name] = best[name]
    _, (record,), _, (line,) = imported(write_lines([row]), tokenizer, layout=layout)
    assert record["responses"][0] == FORMS[form][2][0][1][0] and record["rewards"][0] == FORMS[form][2][0][2][0]
    assert record["sources"][0] == "given_1" == line["kept"]


def test_a_table_of_comma_separated_values_is_read(tokenizer, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected,score_chosen,score_rejected\nWhat is tea?,A drink.,"A car, red.",2,0.5\n')
    layout, (record,), _, _ = imported(path, tokenizer)
    assert (layout, record["prompt"], record["responses"]) == ("pair", TEA, ["A drink.", "A car, red."])
    assert record["rewards"] == [2.0, 0.5]


def test_rewards_before_the_noise_come_in_again(tokenizer, write_lines):
    row = {"prompt": TEA, "prompt_id": "x", "responses": ["a", "b", "c", "b"], "rewards": [1.0, 3.0, 2.0, 0.0]}
    _, (record,), counts, _ = imported(write_lines([{**row, "rewards_without_noise": [4, 2, 7, 9]}]), tokenizer)
    assert record["responses"] == ["b", "c", "a"] and record["rewards_without_noise"] == [2, 7, 4]
    assert not [name for name in counts if name.startswith("not read")]


def test_prompts_have_the_responses_best_first(write_lines, tmp_path):
    rows, layout, _ = open_data(str(write_lines([RATED, RATED])), "train", None, None)
    target = tmp_path / "prompts" / "train.jsonl"
    counts = import_prompts(rows, target, LAYOUTS[layout])
    ((_, prompt),) = read_prompts(target)
    assert (prompt["prompt"], prompt["responses"]) == (TEA, LIST)
    assert (counts["written"], counts["rejected"], counts["repeated row"]) == (1, 1, 1)
    (line,) = [line for _, line in read_jsonl(target.with_suffix(".ledger.jsonl"))]
    assert line["place"].endswith("row 2")
    with pytest.raises(InputError, match="there is a file already"):
        import_prompts(rows, target, LAYOUTS[layout])


def test_a_repeated_prompt_of_a_prompts_file_keeps_its_name(write_lines, tmp_path):
    """It is refused, so nothing is there under another name."""
    rows = [{"prompt": "q", "chosen": "a", "rejected": rejected} for rejected in ("b", "c", "b")]
    path, target = write_lines(rows), tmp_path / "prompts.jsonl"
    counts = import_prompts(open_data(str(path), "train", None, None)[0], target, LAYOUTS["pair"])
    reasons = {"repeated prompt": 1, "repeated row": 1}
    assert +counts == {"read": 3, "written": 1, "rejected": 2} | reasons
    ((_, prompt),) = read_prompts(target)
    ledger = [line for _, line in read_jsonl(target.with_suffix(".ledger.jsonl"))]
    assert [(line["prompt_id"], line["reason"]) for line in ledger] == [(prompt["prompt_id"], each) for each in reasons]
    assert {line["first"] for line in ledger} == {f"{path}:1: row 1"}


def test_a_renamed_row_that_is_refused_is_not_counted_as_kept(tokenizer, write_lines):
    rows = [{"prompt": "q", "chosen": "a", "rejected": rejected} for rejected in ("b", "a")]
    _, records, counts, _ = imported(write_lines(rows), tokenizer)
    assert len(records) == 1 and not counts["repeated prompts, kept under another name"]


def test_saved_data_sets_and_their_splits_are_read(tokenizer, tmp_path):
    from datasets import Dataset, DatasetDict

    layout, rows, expected = FORMS["nemo-rl-ranks"]
    Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "two")
    (tmp_path / "three").mkdir()
    write_parquet(tmp_path / "three" / "train.parquet", rows)
    for name in ("one", "two", "three"):
        found, records, _, _ = imported(tmp_path / name, tokenizer)
        assert found == layout and [record["responses"] for record in records] == [expected[0][1]]
    with pytest.raises(InputError, match="two: --part is `test`, and there is none of that name; give one of train"):
        open_data(str(tmp_path / "two"), "test", None, None)
    for name in ("one", "three/train.parquet"):
        with pytest.raises(InputError, match=f"{name}: --part is `test`, and this is one table without splits"):
            open_data(str(tmp_path / name), "test", None, None)


def test_damaged_and_missing_tables_are_one_line(tmp_path, write_lines):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="x.parquet: cannot read it as tables"):
        open_data(str(path), "train", None, None)
    with pytest.raises(InputError, match="cannot read the file"):
        open_data("no/such.parquet", "train", None, None)
    with pytest.raises(InputError, match="there are no rows"):
        open_data(str(write_lines([])), "train", None, None)


def test_a_data_set_of_the_hub_is_read_at_its_commit(monkeypatch, tokenizer):
    """The library is a double at its boundary: tests have no network."""
    import datasets

    from annotation import import_data

    asked = []

    def load(name, **arguments):
        asked.append((name, arguments))
        return FORMS["ultrafeedback"][1]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(import_data, "commit_of", lambda kind, name, revision, where: f"commit of {revision}")
    rows, layout, facts = open_data("openbmb/UltraFeedback", "train", "v1", None)
    assert [where for where, _ in rows] == ["openbmb/UltraFeedback: row 1"] and layout == "ultrafeedback"
    assert asked == [("openbmb/UltraFeedback", {"split": "train", "revision": "commit of v1", "streaming": True})]
    assert facts == {"file": "openbmb/UltraFeedback", "revision": "commit of v1", "layout": "ultrafeedback"}


def test_nothing_is_left_of_a_table_that_broke(tmp_path):
    def rows():
        yield {"prompt": TEA, "responses": ["a"], "rewards": [1.0]}
        raise InputError("broken")

    for name in ("x.parquet", "x.jsonl"):
        with pytest.raises(InputError, match="broken"):
            write_table(tmp_path / name, rows(), LIST_COLUMNS)
    assert not list(tmp_path.iterdir())


def test_the_command_takes_options_between_its_arguments(tiny_recipe, written, tmp_path, monkeypatch, capsys):
    path, target, output = str(written("ultrafeedback")), str(tmp_path / "p.jsonl"), f"output={tmp_path / 'there'}"
    monkeypatch.setattr("sys.argv", ["import_data", path, "--prompts", target])
    main()
    out = capsys.readouterr().out
    assert f"{path}: ultrafeedback: 1 rows read = 1 written + 0 rejected; not read: `source`: 1" in out
    arguments = [str(tiny_recipe), "--layout", "ultrafeedback_overall", "--split", "test", "--skip", output]
    monkeypatch.setattr("sys.argv", ["import_data", path, *arguments])
    main()
    ((_, record),) = read_ranked(tmp_path / "there" / "ranked" / "test.jsonl")
    assert record["rewards"] == [9.0, 8.5, 7.0, 3.0]
    manifest = json.loads((tmp_path / "there" / "ranked" / "manifest.json").read_text())
    assert manifest["imported"]["test"]["layout"] == "ultrafeedback_overall"
