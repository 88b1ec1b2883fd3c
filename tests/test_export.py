"""tools/export.py: pairs that TRL tokenises as our plan does, and answers in the form of two benchmarks."""

import json
import shutil

import pytest

from alignment.plan import plan
from alignment.rows import TokenRows, ranked_prompts
from annotation.import_data import open_data
from annotation.layouts import LAYOUTS, check_row
from hps.chat import load_tokenizer
from hps.errors import InputError
from hps.planning import Plan
from pipeline.files import Appender
from pipeline.records import read_jsonl
from pipeline.stage import claim
from tools.export import export, main

ONE_EPOCH = ("schedule.epochs=1", "schedule.global_batch=4", "schedule.gamma_stages=1")


def exported(recipe, path, what: str = "pairs", **arguments) -> list[dict]:
    named = {"split": "train", "before": False, "number": 0, "name": None, **arguments}
    export(what, path, recipe, **named)
    return [row for _, row in read_jsonl(path)]


@pytest.mark.parametrize(
    "settings",
    [
        ("loss.preference=bt",),
        ("loss.negatives=worst",),
        ("loss.negatives=below_mean",),
        ("loss.negatives=uniform", "loss.samples=3"),
        ("schedule.gamma_start=5",),
    ],
    ids=str,
)
def test_pairs_are_those_of_the_plan(ranked_recipe, tmp_path, settings):
    """y_1 and the negatives of each row, as often as they were drawn, in the plan's order."""
    recipe = ranked_recipe(*ONE_EPOCH, *settings)
    rows = exported(recipe, tmp_path / "pairs.jsonl")
    plan(recipe)
    records, expected = ranked_prompts(recipe), []
    for _, row in read_jsonl(recipe.run_folder() / "plan.jsonl"):
        texts = records[row["prompt_id"]]["responses"]
        for index, weight, reward in zip(row["dispreferred"], row["weights"], row["rewards"][1:], strict=True):
            pair = (row["prompt_id"], texts[row["preferred"]], texts[index], row["rewards"][0], reward)
            expected += [pair] * round(weight * recipe.loss.samples)
    assert len(expected) == 8 * recipe.loss.samples  # of 8 prompts
    assert [
        (
            row["prompt_id"],
            row["chosen"][0]["content"],
            row["rejected"][0]["content"],
            row["score_chosen"],
            row["score_rejected"],
        )
        for row in rows
    ] == expected


def test_pairs_of_a_later_round_are_those_of_its_plan(ranked_recipe, tmp_path):
    """Its seed is another one."""
    settings = (*ONE_EPOCH, "loss.negatives=uniform")
    first, second = ranked_recipe(*settings), ranked_recipe(*settings, "round=2")
    rows = exported(second, tmp_path / "pairs.jsonl")
    records = ranked_prompts(second)
    made = Plan(records, second.loss, second.schedule, second.round_seed, records.where).rows()
    expected = [(row["prompt_id"], records[row["prompt_id"]]["responses"][row["dispreferred"][0]]) for row in made]
    assert [(row["prompt_id"], row["rejected"][0]["content"]) for row in rows] == expected
    assert rows != exported(first, tmp_path / "first.jsonl")


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([[0, -1, -2], [0, -1]], "no scores: the rewards of all prompts are"),
        ([[0, -1, -1], [0, -1]], "no scores: the rewards of all prompts are"),
        ([[0, -2], [0, -1]], "no scores: the rewards of all prompts are"),  # the second of three was dropped
        ([[0, -1, -2], [0.5, -1]], "warning: the scores of 1 of 2 prompts are 0, -1, -2"),
        ([[1, 0], [0, -2.5]], None),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rewards_that_only_encode_an_order_are_no_scores(rewards, said, suffix, ranked_recipe, tmp_path, capsys):
    recipe = ranked_recipe(*ONE_EPOCH, "loss.preference=bt", prompts=2)
    path = recipe.ranked("train")
    records = [record for _, record in read_jsonl(path)]
    for record, own in zip(records, rewards, strict=True):
        record.update({name: record[name][: len(own)] for name in ("responses", "token_counts", "truncated")})
        places = range(1, len(own) + 1) if own != [0, -2] else (1, 3)
        record.update(rewards=own, sources=[f"given_{place}" for place in places])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    export("pairs", tmp_path / f"pairs{suffix}", recipe, "train", False, 0, None)
    printed = capsys.readouterr().out
    told = any(words in printed for words in ("no scores", "warning: the scores"))
    assert told == (said is not None) and (said or "") in printed
    rows = [row for _, row in open_data(str(tmp_path / f"pairs{suffix}"), "train", None, None)[0]]
    found = sorted((row["score_chosen"], row["score_rejected"]) for row in rows if "score_chosen" in row)
    scored = said is None or said.startswith("warning")
    assert found == (sorted((own[0], own[-1]) for own in rewards) if scored else [])


@pytest.mark.parametrize(
    ("what", "name", "remedy"),
    [
        ("lists", "nope.csv", r"\.jsonl or \.parquet"),
        ("pairs", "nope", r"\.jsonl or \.parquet"),
        ("arena_hard", "nope.parquet", r"\.jsonl"),
        ("alpaca_eval", "nope.jsonl", r"\.json"),
    ],
)
def test_other_endings_are_refused(ranked_recipe, tmp_path, what, name, remedy):
    """A CSV would have had lines of JSON in it."""
    with pytest.raises(InputError, match=f"{name}: `{what}` is not written as .*; end the name with {remedy}$"):
        export(what, tmp_path / name, ranked_recipe(), "train", False, 0, None)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("what", ["lists", "pairs"])
def test_a_ranking_that_is_not_finished_is_refused(ranked_recipe, tmp_path, what):
    recipe = ranked_recipe("loss.preference=bt")
    claim(recipe.ranked("train").parent, {})
    with pytest.raises(InputError, match="the ranking is not finished; run `bash gene.sh`"):
        export(what, tmp_path / "out.jsonl", recipe, "train", False, 0, None)
    recipe.ranked("train").unlink()
    with pytest.raises(InputError, match=r"train.jsonl: there is no ranked file; run `bash gene.sh`"):
        export(what, tmp_path / "out.jsonl", recipe, "train", False, 0, None)


def test_rows_that_fill_the_last_step_are_left_out(ranked_recipe, tmp_path, capsys):
    """8 prompts in steps of 6: an epoch has each pair once; scores are the ranked file's also when standardised."""
    settings = ("loss.preference=bt", "schedule.epochs=1", "schedule.global_batch=6")
    recipe = ranked_recipe(*settings, "schedule.standardize_rewards=true")
    rows = exported(recipe, tmp_path / "pairs.jsonl")
    assert len(rows) == len({row["prompt_id"] for row in rows}) == 8
    assert "4 rows that fill up the last step of the plan are left out" in capsys.readouterr().out
    for row in rows:
        rewards = ranked_prompts(recipe)[row["prompt_id"]]["rewards"]
        assert (row["score_chosen"], row["score_rejected"]) == (rewards[0], rewards[-1])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_people_chose_goes_out_without_scores(suffix, ranked_recipe, tmp_path, capsys):
    """A reward may rank y_1 below the negative, which our import would refuse."""
    recipe = ranked_recipe(*ONE_EPOCH, "loss.preference=bt", "schedule.best=human")
    path = recipe.ranked("train")
    records = [record for _, record in read_jsonl(path)]
    for record in records:
        record["sources"] = ["generated", *(f"given_{place}" for place in range(1, len(record["sources"])))]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    export("pairs", tmp_path / f"pairs{suffix}", recipe, "train", False, 0, None)
    assert "no scores: `schedule.best` is human" in capsys.readouterr().out
    rows, layout, _ = open_data(str(tmp_path / f"pairs{suffix}"), "train", None, None)
    found = [check_row(row, where, LAYOUTS[layout]) for where, row in rows]
    assert [row["rewards"] for row in found] == [[0, -1]] * 8
    second = {record["responses"][1].strip() for record in records}
    assert {row["responses"][0] for row in found} == second


@pytest.mark.parametrize("style", ["tokenizer", "llama3_tokenizer"])
def test_trl_tokenises_the_pairs_as_our_plan(style, ranked_recipe, tiny_model, tmp_path, request, capsys):
    """The same prompt and response ids. Behind a response TRL also has what the template writes after its end of turn,
    and it ends a response that the length limit cut."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    recipe = ranked_recipe(*ONE_EPOCH, "loss.preference=pl")
    with pytest.raises(
        InputError, match="`loss.preference` is `pl`, whose rows are not pairs; give loss.preference=bt"
    ):
        exported(recipe, tmp_path / "none.jsonl")
    recipe = ranked_recipe(*ONE_EPOCH, "loss.negatives=uniform", "schedule.max_length=900")
    exported(recipe, tmp_path / "pairs.jsonl")
    request.getfixturevalue(style).save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    data = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(len(tokenizer))
    settings = DPOConfig(output_dir=str(tmp_path / "trl"), report_to="none", max_length=None, use_cpu=True)
    trainer = DPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
    plan(recipe)
    ours, records, cut = TokenRows(recipe, tokenizer), ranked_prompts(recipe), 0
    lines = [row for _, row in read_jsonl(recipe.run_folder() / "plan.jsonl")]
    assert len(trainer.train_dataset) == len(ours) == 8
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>" if style == "llama3_tokenizer" else "<|im_end|>")
    behind = [] if style == "llama3_tokenizer" else tokenizer("\n", add_special_tokens=False)["input_ids"]
    for theirs, row, line in zip(trainer.train_dataset, ours, lines, strict=True):
        assert theirs["prompt_ids"] == row["prompt_ids"]
        for ids, mine, index in zip(
            (theirs["chosen_ids"], theirs["rejected_ids"]),
            row["response_ids"],
            (line["preferred"], *line["dispreferred"]),
            strict=True,
        ):
            truncated = records[line["prompt_id"]]["truncated"][index]
            assert ids == [*mine, *([eot] if truncated else []), *behind]
            cut += truncated
    if cut:
        assert f"warning: {cut} of them have a response that the length limit cut" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "field"), [("loss.estimator=exact", "estimator"), ("loss.positives=2", "positives")]
)
def test_what_is_not_a_pair_is_refused(ranked_recipe, tmp_path, setting, field):
    with pytest.raises(InputError, match=f"`loss.{field}` is .*, whose rows are not pairs"):
        exported(ranked_recipe(setting), tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()


# ---- answers ----


@pytest.fixture
def answered_recipe(ranked_recipe):
    """Answers of the model before and after training to one question, and optionally to a talk of three turns."""

    def make(talk: bool = False):
        recipe = ranked_recipe()
        prompts = [[{"role": "user", "content": "What is tea?"}]]
        if talk:
            turns = (("user", "What is tea?"), ("assistant", "A drink."), ("user", "Hot?"))
            prompts.append([{"role": role, "content": text} for role, text in turns])
        for side, folder in (("after", recipe.run_folder()), ("before", recipe.sft_folder())):
            with Appender(folder / "answers" / "test.jsonl") as file:
                for number, prompt in enumerate(prompts):
                    texts = [f"{side} {number}", f"{side} {number}, again"]
                    facts = {"token_counts": [2, 3], "truncated": [False, False]}
                    file.append({"prompt_id": f"q{number}", "prompt": prompt, "responses": texts, **facts})
            (folder / "answers" / "manifest.json").write_text("{}")
        return recipe

    return make


def test_answers_for_alpaca_eval(answered_recipe, tmp_path):
    recipe, path = answered_recipe(), tmp_path / "outputs.json"
    export("alpaca_eval", path, recipe, "train", False, 1, None)
    expected = {"instruction": "What is tea?", "output": "after 0, again", "generator": "dpo-hps"}
    assert json.loads(path.read_text()) == [expected]
    export("alpaca_eval", tmp_path / "before.json", recipe, "train", True, 0, "base")
    expected = {"instruction": "What is tea?", "output": "before 0", "generator": "base"}
    assert json.loads((tmp_path / "before.json").read_text()) == [expected]
    later = recipe.model_copy(update={"round": 2})
    shutil.copytree(recipe.run_folder() / "answers", later.run_folder() / "answers")
    export("alpaca_eval", tmp_path / "later.json", later, "train", False, 0, None)
    assert json.loads((tmp_path / "later.json").read_text())[0]["generator"] == "dpo-hps-round-2"
    with pytest.raises(InputError, match="outputs.json: there is a file already"):
        export("alpaca_eval", path, recipe, "train", False, 0, None)
    with pytest.raises(InputError, match=r"test.jsonl:1: there are 2 `responses`, and `--answer` is 2"):
        export("alpaca_eval", tmp_path / "none.json", recipe, "train", False, 2, None)


def test_alpaca_eval_has_no_conversations(answered_recipe, tmp_path):
    with pytest.raises(InputError, match=r"test.jsonl:2: `prompt` has 3 messages"):
        export("alpaca_eval", tmp_path / "outputs.json", answered_recipe(talk=True), "train", False, 0, None)


def test_answers_for_arena_hard(answered_recipe, tmp_path):
    recipe = answered_recipe(talk=True)
    first, second = exported(recipe, tmp_path / "model.jsonl", "arena_hard", name="hps")
    assert (first["uid"], second["uid"], first["model"]) == ("q0", "q1", "hps")
    question = {"role": "user", "content": "What is tea?"}
    assert first["messages"] == [question, {"role": "assistant", "content": {"answer": "after 0"}}]
    assert len(second["messages"]) == 4 and first["ans_id"] != second["ans_id"]
    written = (recipe.run_folder() / "answers" / "test.jsonl").stat().st_mtime
    assert first["tstamp"] == pytest.approx(written, abs=1e-3)


def test_answers_that_are_not_there_are_named(ranked_recipe, tmp_path):
    with pytest.raises(InputError, match="bash evaluate.sh"):
        export("arena_hard", tmp_path / "model.jsonl", ranked_recipe(), "train", False, 0, None)


def test_the_command_takes_options_between_its_arguments(answered_recipe, tiny_recipe, tmp_path, monkeypatch, capsys):
    answered_recipe()
    for what, out, *options in (
        ("pairs", "a.jsonl", str(tiny_recipe), "loss.negatives=worst", "schedule.epochs=1"),
        ("lists", "b.parquet", str(tiny_recipe), "--split", "test"),
        ("arena_hard", "c.jsonl", "--before", str(tiny_recipe), "--name", "base", "--answer", "1"),
    ):
        monkeypatch.setattr("sys.argv", ["export", what, str(tmp_path / out), *options])
        main()
    said = capsys.readouterr().out
    assert "export: pairs: 8 rows" in said and "export: lists: 4 rows" in said and "arena_hard: 1 rows" in said
    ((_, line),) = read_jsonl(tmp_path / "c.jsonl")
    assert (line["model"], line["messages"][-1]["content"]) == ("base", {"answer": "before 0, again"})
