"""Data sets that reproduce reports of the field, each with a clean twin that passes in silence."""

import json
import math
import re
from itertools import chain
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ranked_records, tiny_config
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from hps import inspect_data
from hps.chat import load_tokenizer, prompt_token_ids, response_token_ids
from hps.dataset import RankedPrompts
from hps.errors import InputError
from hps.first_step import as_pair, load_model, rates, start
from hps.inspection import Inspection, Template
from hps.preferences import LABELLED, on_hub, read_records, read_row
from pipeline.records import check_prompt

PLACES = ("Ghent", "Lima", "Oslo", "Quito", "Riga", "Turku", "Bonn", "Cork")
SHORT, LONG = "It is lovely.", "It is a town with old streets, and I would go there again."


def question(place: str) -> list[dict]:
    return [{"role": "user", "content": f"What is {place} like?"}]


def answered(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def pairs() -> list[dict]:
    """Conversational pairs of TRL; the preferred answer is the longer one in every other row."""
    sides = [(f"{LONG} {place}", SHORT) if n % 2 else (SHORT, f"{LONG} {place}") for n, place in enumerate(PLACES)]
    return [
        {"prompt": question(place), "chosen": answered(chosen), "rejected": answered(rejected)}
        for place, (chosen, rejected) in zip(PLACES, sides, strict=True)
    ]


def templated(tokenizer, bos: str = "", tail: str = "") -> list[dict]:
    """The same pairs as text, with the template's turns in it."""
    rows = []
    for pair in pairs():
        text = tokenizer.apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
        end = "<|eot_id|>" if tokenizer.bos_token else "<|im_end|>"
        sides = {side: bos + pair[side][0]["content"] + end + tail for side in ("chosen", "rejected")}
        rows.append({"prompt": text, **sides})
    return rows


@pytest.fixture(scope="module")
def folders(tokenizer, llama3_tokenizer, tmp_path_factory) -> SimpleNamespace:
    """Folders of the tokenizers; `zephyr` is the first with another template."""
    root = tmp_path_factory.mktemp("tokenizers")
    tokenizer.save_pretrained(root / "chatml")
    llama3_tokenizer.save_pretrained(root / "llama3")
    names = ("chatml", "llama3", "zephyr", "smollm2", "no_bos")
    folders = SimpleNamespace(**{name: str(root / name) for name in names})
    other = load_tokenizer(folders.chatml)
    other.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    other.save_pretrained(folders.zephyr)
    return folders


@pytest.fixture
def look(write_lines, folders):
    """Inspect records with a tokenizer; the names of the findings, or everything."""

    def run(records: list[dict], tokenizer: str = "chatml", *options: str):
        path = write_lines(records)
        model = getattr(folders, tokenizer)
        return inspect_data.inspect(
            inspect_data.arguments().parse_args([str(path), model, "--tokens-only", *map(str, options)])
        )

    return run


@pytest.fixture
def names(look):
    return lambda *given: list(look(*given)[1].findings)


# ---- the reports ----


@pytest.mark.parametrize("style", ["chatml", "llama3"])
def test_clean_pairs_are_silent(names, style):
    assert names(pairs(), style) == []


def test_two_bos_in_front(look, llama3_tokenizer):
    """SimPO#21: texts have the template's BOS, and the tokenizer adds one."""
    figures, inspection = look(templated(llama3_tokenizer), "llama3")
    found = inspection.findings.pop("bos repeated")
    assert (found.severity, found.count) == ("fault", 8) and found.first.endswith("data.jsonl:1")
    assert figures["bos_in_front"] == {2: 8} and figures["bos_of_the_template"] == 1
    assert list(inspection.findings) == ["ends repeated"]  # TRL appends <|end_of_text|> behind <|eot_id|>


def clean_texts(tokenizer) -> list[dict]:
    """Templated text whose BOS and last end are the tokenizer's and the trainer's."""
    bos, end = (tokenizer.bos_token or ""), "<|eot_id|>" if tokenizer.bos_token else "<|im_end|>"
    return [
        {"prompt": row["prompt"].removeprefix(bos), **{s: row[s].removesuffix(end) for s in ("chosen", "rejected")}}
        for row in templated(tokenizer)
    ]


def test_templated_texts_without_them_are_silent(names, tokenizer, llama3_tokenizer):
    assert names(clean_texts(llama3_tokenizer), "llama3") == []
    assert names(clean_texts(tokenizer), "chatml") == [] and names(templated(tokenizer), "chatml") == []


def test_a_bos_in_front_of_answers(names, llama3_tokenizer):
    """SimPO#51 (its trainer strips it now): answers that were templated by themselves begin with a BOS."""
    rows = [{**row, "chosen": "<|begin_of_text|>" + row["chosen"]} for row in clean_texts(llama3_tokenizer)]
    assert names(rows, "llama3") == ["bos inside"]


def test_no_bos_at_all(names, llama3_tokenizer, folders):
    """SimPO#51: the other release of the tokenizer adds none."""
    rows = []
    for row in clean_texts(llama3_tokenizer):
        prompt, *sides = (llama3_tokenizer(row[n], add_special_tokens=False).input_ids for n in row)
        end = [llama3_tokenizer.eos_token_id]
        rows.append({"prompt_ids": prompt, "chosen_ids": sides[0] + end, "rejected_ids": sides[1] + end})
    assert names(rows, "llama3") == ["bos missing"]
    for row in rows:
        row["prompt_ids"].insert(0, llama3_tokenizer.bos_token_id)
    assert names(rows, "llama3") == []


def test_a_bos_that_the_template_alone_writes(names, tokenizer, folders):
    """SmolLM2's BOS is ChatML's `<|im_start|>`, and its tokenizer never adds it: plain texts lack the template."""
    tokenizer = load_tokenizer(folders.chatml)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(folders.smollm2)
    rows = [{"prompt": f"Name {place}: ", "chosen": SHORT, "rejected": LONG} for place in PLACES[:4]]
    assert names(rows, "smollm2") == names(rows, "chatml") == ["header missing"]
    assert names(pairs(), "smollm2") == names(clean_texts(load_tokenizer(folders.chatml)), "smollm2") == []


def test_a_tokenizer_that_adds_no_bos(names, llama3_tokenizer, folders):
    """SimPO#51, as texts: the template's BOS was cut from them, and this release of the tokenizer adds none."""
    tokenizer = load_tokenizer(folders.llama3)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    tokenizer.save_pretrained(folders.no_bos)
    rows = clean_texts(llama3_tokenizer)
    assert names(rows, "no_bos") == ["bos missing"]
    whole = [{**row, "prompt": "<|begin_of_text|>" + row["prompt"]} for row in rows]
    assert names(whole, "no_bos") == names(pairs(), "no_bos") == []


@pytest.mark.parametrize("said", ["", " ", "<|im_end|>"])
def test_texts_and_token_ids_without_words(names, tokenizer, said):
    """TRL appends the EOS to a text, so an empty answer has a token all the same."""
    rows = clean_texts(tokenizer)
    rows[2]["rejected"] = said
    assert names(rows) == ["empty"]
    rows = labelled(tokenizer, pad=False)
    rows[2] = {name: ids[-1:] if name.startswith("rejected") else ids for name, ids in rows[2].items()}
    assert "empty" in names(rows)


def test_a_header_in_the_answers(names, tokenizer):
    """SimPO#17: the trained model begins its answers with a header."""
    rows = [{**row, "chosen": "<|im_start|>assistant\n" + row["chosen"]} for row in templated(tokenizer)]
    assert names(rows) == ["header trained"]


def test_evaluated_with_another_template(look, folders):
    """SimPO#24: the checkpoint has another template than its base model; the twin is evaluated with its own."""
    figures, inspection = look(pairs(), "chatml", "--evaluated-with", folders.zephyr)
    assert list(inspection.findings) == ["evaluation"]
    assert figures["template"] != figures["template_of_the_evaluation"]
    figures, inspection = look(pairs(), "chatml", "--evaluated-with", folders.chatml)
    assert not inspection.findings and figures["template"] == figures["template_of_the_evaluation"]


def test_texts_in_the_form_of_another_template(look):
    """SimPO#24 the other way round: the data has Mistral's turns, the model's template is ChatML."""
    rows = [
        {**row, "prompt": f"[INST] {row['prompt'][0]['content']} [/INST]", "chosen": SHORT, "rejected": LONG + place}
        for place, row in zip(PLACES, pairs(), strict=True)
    ]
    inspection = look(rows)[1]
    assert "`[INST]`" in inspection.findings["foreign template"].first
    assert set(inspection.findings) == {"foreign template", "header missing"}


def test_the_batch_is_not_what_devices_make(look):
    """handbook#44: 8 GPUs with 8 rows each are 64, and the paper says 32."""
    asked = ("--batch", 32, "--devices", 8)
    figures, inspection = look(pairs(), "chatml", *asked, "--device-batch", 8)
    assert list(inspection.findings) == ["batch"] and "8 x 8 x 1 = 64" in inspection.findings["batch"].what
    figures, inspection = look(pairs(), "chatml", *asked, "--device-batch", 4, "--epochs", 3)
    assert not inspection.findings and (figures["batch"], figures["steps"]) == (32, 3)


def test_an_earlier_report_names_what_differs(look, tmp_path):
    """handbook#44, #124: the same rows in another order, or in another batch; SimPO#51: other ids."""

    def against(figures, records, *options, tokenizer="chatml"):
        (tmp_path / "earlier.json").write_text(json.dumps({"figures": figures}))
        return list(look(records, tokenizer, *options, "--same-as", tmp_path / "earlier.json")[1].findings)

    first, _ = look(pairs(), "chatml", "--batch", 4)
    assert against(first, pairs(), "--batch", 4) == []
    assert against(first, pairs()[::-1], "--batch", 4) == ["other order"]
    assert against(first, pairs(), "--batch", 2) == ["other batch", "other steps"]
    assert against(first, pairs()[:-1] + pairs()[:1], "--batch", 4) == ["repeated", "other data"]
    assert against(first, pairs(), "--batch", 4, tokenizer="llama3") == ["other template", "other data"]
    with pytest.raises(InputError, match=r"nothing\.json: no report of an inspection; give what --json wrote"):
        look(pairs(), "chatml", "--same-as", tmp_path / "nothing.json")


def labelled(tokenizer, pad: bool, end: bool = True) -> list[dict]:
    """Whole sequences with labels, 30 padding tokens behind the preferred answer; `pad` trains on them."""
    rows = []
    for pair in pairs():
        prompt, row = prompt_token_ids(tokenizer, pair["prompt"]), {}
        for side in ("chosen", "rejected"):
            answer = response_token_ids(tokenizer, pair["prompt"], pair[side][0]["content"], False)
            trained = answer if end else [*answer[:-1], -100]
            fill = [tokenizer.pad_token_id] * 30 * (side == "chosen")
            row[f"{side}_input_ids"] = prompt + answer + fill
            row[f"{side}_labels"] = [-100] * len(prompt) + trained + (fill if pad else [-100] * len(fill))
        rows.append(row)
    return rows


def test_padding_between_packed_sequences_is_trained(names, tokenizer):
    """open-instruct#1900: the padding in front of the first rejected sequence counts as a part of it."""
    assert names(labelled(tokenizer, pad=True)) == ["padding trained"]
    assert names(labelled(tokenizer, pad=False)) == []


def test_a_first_loss_that_is_not_ln_2(look):
    """open-instruct#1900: the first loss is six times ln 2."""
    inspection = look(pairs(), "chatml", "--first-loss", 4.159)[1]
    assert list(inspection.findings) == ["first loss"] and "is 6.0 ln 2" in inspection.findings["first loss"].what
    assert list(look(pairs(), "chatml", "--first-loss", "nan")[1].findings) == ["first loss"]
    assert not look(pairs(), "chatml", "--first-loss", 0.6931)[1].findings


def test_the_end_of_the_turn_is_masked(names, tokenizer):
    """trl#1239, #2382: the model never stops."""
    assert names(labelled(tokenizer, pad=False, end=False)) == ["no end"]


def test_a_row_counts_once(look, tokenizer):
    """Both answers of every row are without an end."""
    found = look(labelled(tokenizer, pad=False, end=False))[1].findings["no end"]
    assert found.count == 8 and found.first.endswith(":1") and found.last.endswith(":8")


def test_two_ends_of_a_turn(names, tokenizer):
    """ChatML's turn ends with a line end, behind which TRL does not see the EOS and appends another."""
    assert names(templated(tokenizer, tail="\n")) == ["ends repeated"]


def test_prompts_of_a_pair_differ(names, tokenizer):
    rows = labelled(tokenizer, pad=False)
    rows[2]["rejected_input_ids"] = list(rows[2]["rejected_input_ids"])
    rows[2]["rejected_input_ids"][3] += 1
    assert names(rows) == ["prompts differ"]


# ---- pairs ----


def changed(at: int, **fields) -> list[dict]:
    return [{**row, **fields} if number == at else row for number, row in enumerate(pairs())]


def turned(row: dict) -> dict:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def scored(at: int, chosen: float, rejected: float) -> list[dict]:
    rows = [{**row, "score_chosen": 2.0, "score_rejected": 1.0} for row in pairs()]
    rows[at] |= {"score_chosen": chosen, "score_rejected": rejected}
    return rows


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (changed(3, rejected=pairs()[3]["chosen"]), "equal"),
        ([*pairs()[:4], *pairs()[:4]], "repeated"),
        ([*pairs(), turned(pairs()[0])], "contradiction"),
        (scored(5, 1.0, 1.0), "tie"),
        (scored(5, 1.0, 1.5), "reversed"),
        (changed(2, prompt=[{"role": "user", "content": "\n\nHuman: Hi\n\nAssistant:"}]), "foreign template"),
        (changed(2, chosen=answered("It says <|im_end|> there.")), "special tokens"),
        (changed(2, prompt=[{"role": "robot", "content": "Hi"}]), "unreadable"),
        (changed(2, chosen=[]), "unreadable"),
        (scored(2, "1", "5"), "unreadable"),
        (scored(2, math.nan, 1.0), "unreadable"),
        (scored(2, 10**400, 1), "unreadable"),
        (changed(2, rewards=[0, 5]), "unreadable"),
        (changed(2, rejected=answered(pairs()[2]["chosen"][0]["content"] + " ")), "equal text"),
        (changed(2, rejected=answered("")), "empty"),
        (changed(2, rejected=answered(" \n")), "empty"),
        (changed(2, rejected=[{"role": "assistant", "content": "  "}], truncated=[False, True]), "empty"),
    ],
)  # fmt: skip
def test_a_row_is_named(look, rows, name):
    """Clean rows and one with a fault; with the scores of the others all is silent."""
    inspection = look(rows)[1]
    assert list(inspection.findings) == [name]
    line = inspection.findings[name].line(inspection.rows)
    place = {"equal": 4, "repeated": 5, "contradiction": 9, "tie": 6, "reversed": 6}.get(name, 3)
    assert f"data.jsonl:{place}" in line and f"{inspection.findings[name].count} of {len(rows)} rows: " in line


def ranked_by_trainer(records, tokenizer):
    """What the trainer makes of the same rows, missing columns being null."""
    columns = dict.fromkeys(chain(*records))
    return RankedPrompts(Dataset.from_list([{**columns, **record} for record in records]), tokenizer)


def lists(*fields: dict) -> list[dict]:
    return [
        {"prompt": question(place), "responses": [SHORT, LONG], **each}
        for place, each in zip(PLACES, fields, strict=False)
    ]


@pytest.mark.parametrize(
    ("rows", "name", "words"),
    [
        (changed(2, tools=[{"type": "function"}]), "not read", "1 of 8 rows: .*first: .*:3, `tools`"),
        (changed(2, images=["a.png"]), "not read", "1 of 8 rows: .*first: .*:3, `images`"),
        (changed(2, chat_template_kwargs={"thinking": True}), "not read", "first: .*:3, `chat_template_kwargs`"),
        ([{**row, "tools": "[1]", "images": ["b"]} for row in pairs()], "not read", "8 of .*:1, `tools`, `images`"),
        (scored(2, None, None), "unscored", "1 of 8 rows: no scores, .*first: .*:3"),
        ([*scored(0, 2, 1)[:4], *pairs()[4:]], "unscored", "4 of 8 rows: .*first: .*:5"),
        (lists({"rewards": [2, 1]}, {"rewards": None}, {"rewards": [3, 1]}), "unscored", "1 of 3 rows: .*:2"),
        ([{**row, "prompt_id": f"p{n % 6}"} for n, row in enumerate(pairs())], "named twice", '2 of 8 .*:7, "p0"'),
        ([{**row, "prompt_id": n % 6} for n, row in enumerate(pairs())], "named twice", "2 of 8 .*:7, 0"),
        ([{**row, "prompt_id": n + 0.5} for n, row in enumerate(pairs())], "unreadable", "`prompt_id` is 0.5; give te"),
        (lists({"reward": [3, 1]}), "unreadable", "unknown field `reward`; write `rewards`"),
    ],
)
def test_what_the_trainer_refuses_is_a_fault(look, tokenizer, rows, name, words):
    inspection = look(rows)[1]
    assert list(inspection.findings) == [name] and inspection.findings.faults
    assert re.search(words, inspection.findings[name].line(inspection.rows))
    with pytest.raises(InputError):
        ranked_by_trainer(rows, tokenizer)


@pytest.mark.parametrize(
    "rows",
    [
        changed(2, tools=[]),
        changed(2, tools=None, images=None),
        [{**row, "score_chosen": None, "score_rejected": None} for row in pairs()],
        scored(0, 2.0, 1.0),
        lists({"rewards": [2, 1]}, {"rewards": [3, 1]}),
        lists({}, {}),
        [{**row, "prompt_id": f"p{n}"} for n, row in enumerate(pairs())],
        changed(2, prompt_id="p"),
        [{**row, "prompt_id": n, "response": "x", "reward": 0.5} for n, row in enumerate(pairs())],
    ],
)
def test_their_twins_are_silent(names, rows):
    assert names(rows) == []


def test_token_ids_have_what_their_trainer_read(names, tokenizer):
    rows = [{**row, "tools": "[1]", "prompt_id": "p"} for row in labelled(tokenizer, pad=False)]
    rows[0] |= {"score_chosen": 2.0, "score_rejected": 1.0}
    assert names(rows) == []


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"rewards": [3, 2, 1]}, None),
        ({"ranking": [2, 0, 1]}, "unreadable"),
        ({"ranking": [0, 1, 2], "rewards": [3, 2, 1]}, None),
        ({"scores": [9.5, 9.4, 1.0]}, "unreadable"),
        ({"scores": [9.5, 9.4, 1.0], "rewards": [3, 2, 1]}, None),
        ({"note": [2, 0], "topic": "towns"}, None),
        ({"responses": [SHORT, f"{SHORT} ", LONG]}, "preferred twice"),
        ({"responses": [SHORT, f"{SHORT} ", LONG], "rewards": [1, 2, 3]}, None),
        ({"responses": [SHORT, f"{SHORT} ", f"\n{SHORT}"]}, "equal text"),
        ({"rewards": [10**400, 2, 1]}, "unreadable"),
        ({"rewards": [math.inf, 2, 1]}, "unreadable"),
        ({"rewards": [True, 2, 1]}, "unreadable"),
    ],
)
def test_a_list_is_named(look, fields, name):
    """What the trainer refuses, leaves out or does not read."""
    figures, inspection = look([{"prompt": question("Ghent"), "responses": [SHORT, LONG, "No."], **fields}])
    assert list(inspection.findings) == ([name] if name else [])
    assert all("data.jsonl:1" in found.first for found in inspection.findings.values())
    unread = [column for column in fields if column not in ("responses", "rewards") and name != "unreadable"]
    assert [line.partition(": ")[2] for line in inspect_data.report(figures, inspection) if "are not read" in line] == (
        [", ".join(unread)] if unread else []
    )


@pytest.mark.parametrize(
    ("rankings", "name"),
    [
        ([{"rewards": [3, 2, 1]}, {"rewards": [3, 1, 2]}], "contradiction"),
        ([{"rewards": [3, 2, 1]}, {"rewards": [9, 5, 1]}], "repeated"),
        ([{"rewards": [3, 1, 1]}, {"rewards": [3, 1, 1], "responses": [SHORT, "No.", LONG]}], "repeated"),
        ([{}, {"responses": [SHORT, "No.", LONG]}], "contradiction"),
        ([{"rewards": [3, 2, 1]}, {"rewards": [3, 1, 2], "responses": [SHORT, "No.", LONG]}], "repeated"),
    ],
)
def test_orders_below_the_preferred_answer(names, rankings, name):
    """The same answers twice: the order of all of them is the preference, not the first one alone."""
    assert names([{"prompt": question("Ghent"), "responses": [SHORT, LONG, "No."], **each} for each in rankings]) == [
        name
    ]


def test_scores_that_agree_are_silent(names):
    assert names(scored(0, 3.0, 1.0)) == []


def test_lengths_that_tell_the_preferred_answer(look):
    rows = [{"prompt": question(f"{place} {n}"), "chosen": answered(LONG + place), "rejected": answered(SHORT)}
            for n in range(3) for place in PLACES]  # fmt: skip
    figures, inspection = look(rows)
    assert figures["preferred_longer"] == 24 and "in 24 of 24 rows" in inspection.findings["length"].what
    assert not look(rows[:7])[1].findings  # seven heads of a fair coin: within three standard errors


def test_the_length_limit(look, tokenizer):
    """A limit that cuts the longer answers, one that leaves equal tokens, and one that leaves nothing."""
    room = len(prompt_token_ids(tokenizer, question("Turku")))
    figures, inspection = look(pairs(), "chatml", "--max-length", room + 12)
    assert figures["cut_answers"] == 8 and list(inspection.findings) == ["cut"]
    assert "equal when cut" in look(pairs(), "chatml", "--max-length", room + 2)[1].findings
    assert "no room" in look(pairs(), "chatml", "--max-length", 5)[1].findings


def test_lists_take_the_highest_reward_as_preferred(look, write_lines, folders):
    records = ranked_records(4)
    figures, inspection = look(records)
    assert not inspection.findings and figures["answers"] == 20 and figures["rows_with_scores"] == 4
    assert figures["ends_of_an_answer"] == {0: 4, 1: 16}  # the fourth of each is truncated
    turned = {name: records[0][name][::-1] for name in ("responses", "rewards", "truncated")}
    row = read_row(load_tokenizer(folders.chatml), {**records[0], **turned}, "here")
    assert row.best == 4 and as_pair(row, 2048) == (row.prompt, [row.responses[4], row.responses[0]])
    tie = {**records[1], "rewards": [1.0] * 5}
    assert list(look([*records[:1], tie])[1].findings) == ["tie"]


# ---- reading ----


def test_forms_of_a_data_set(tmp_path, write_lines, tokenizer):
    """Every form has the same rows; JSON Lines name the line, with blank ones counted."""
    path = write_lines([json.dumps(pairs()[0]), "", *map(json.dumps, pairs()[1:])])
    rows = [(where, read_row(tokenizer, record, where)) for where, record in read_records(str(path))]
    assert [where for where, _ in rows[:2]] == [f"{path}:1", f"{path}:3"]
    data = Dataset.from_list(pairs())
    data.to_parquet(tmp_path / "rows.parquet")
    data.to_json(tmp_path / "rows.json")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("rows.parquet", "rows.json", "saved", "splits"):
        found = list(read_records(str(tmp_path / name)))
        assert [where for where, _ in found[:1]] == [f"{tmp_path / name}, row 0"]
        again = [read_row(tokenizer, record, where) for where, record in found]
        assert [(row.prompt, row.responses) for row in again] == [(row.prompt, row.responses) for _, row in rows]
    assert len(list(read_records(str(tmp_path / "splits"), split="test"))) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "none: No such file or directory; correct the path; a data set on the hub is `owner/name`"),
        ("folder", "folder: no data set that can be loaded there"),
        ("data.txt", "is no form of a data set"),
    ],
)
def test_a_data_set_that_cannot_be_loaded(tmp_path, name, words):
    (tmp_path / "data.txt").write_text("a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=words):
        list(read_records(str(tmp_path / name)))


def test_a_mistyped_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.append(name) or [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("nothing.jsonl", "data/nothing.jsonl", "nothing.json.gz", "data/a.parquet", "a/b/c", "nothing"):
        with pytest.raises(InputError, match=f"{name}: No such file"):
            list(read_records(name))
    assert asked == []
    assert list(read_records("owner/data-2.0")) == [] and asked == ["owner/data-2.0"]
    (tmp_path / "owner" / "data-2.0").mkdir(parents=True)
    assert not on_hub("owner/data-2.0")  # a folder is nearer than the hub


def test_a_split_that_is_not_there(tmp_path, write_lines):
    data = Dataset.from_list(pairs())
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(pairs(), split="test").save_to_disk(tmp_path / "tests")
    DatasetDict({"train": data, "validation": data}).save_to_disk(tmp_path / "splits")
    for name in (tmp_path / "saved", tmp_path / "rows.parquet", write_lines(pairs())):
        with pytest.raises(InputError, match=f"{name}: --split is `test`, and this is one table without splits; leave"):
            list(read_records(str(name), split="test"))
        assert len(list(read_records(str(name)))) == 8
    with pytest.raises(InputError, match="--split is `test`, and there is none .*; give one of train, validation"):
        list(read_records(str(tmp_path / "splits"), split="test"))
    for split in ("train", "test"):  # the default, and its own
        assert len(list(read_records(str(tmp_path / "tests"), split=split))) == 8


@pytest.mark.parametrize("row", [8, -1])
def test_a_row_that_is_not_there(look, row):
    with pytest.raises(InputError, match=rf"data\.jsonl: --row is {row}, of 8 rows; give a row from 0 to 7"):
        look(pairs(), "chatml", "--row", row)
    assert look(pairs(), "chatml", "--row", 7)[1].row.where.endswith(":8")
    lines = list(inspect_data.report(*look(changed(2, chosen=3), "chatml", "--row", 2)))
    assert "row 2 cannot be read, so it is not shown" in lines


def test_each_cause_of_unreadable_rows_is_shown(look):
    """One example with its count; values and places do not tell causes apart, and the sixth cause goes to a rest."""
    long = "x" * 80
    faults: list[tuple] = [
        *(("prompt", [{"role": "robot", "content": text}]) for text in ("a", long)),
        *(("prompt", [{"role": "user", "content": text}]) for text in ("", " ", "")),
        ("prompt", []),
        *(("score_chosen", score) for score in (1, 2)),
        *(("chosen", [{"role": "user", "content": text}]) for text in ("a", long)),
        ("rejected", []),
        ("rejected", {}),
    ]
    rows = [{**pairs()[0], name: value} for name, value in faults]
    inspection = look([*pairs(), *rows])[1]
    assert [(name, found.count) for name, found in inspection.findings.items()] == [
        ("unreadable", 2),
        ("unreadable 2", 3),
        ("unreadable 3", 1),
        ("unreadable 4", 2),
        ("unreadable 5", 2),
        ("unreadable otherwise", 2),
    ]
    lines = [found.line(inspection.rows) for found in inspection.findings.values()]
    assert re.match(r"fault: 3 of 20 rows: cannot be read \(first: .*:11: `prompt\[0\].content` is ", lines[1])
    assert re.match(r"fault: 2 of 20 rows: cannot be read for other reasons \(first: .*:19: `rejected` is ", lines[5])


def test_lines_that_are_not_json(write_lines):
    with pytest.raises(InputError, match=r"data\.jsonl:2: no JSON"):
        list(read_records(str(write_lines([json.dumps(pairs()[0]), "{"]))))
    with pytest.raises(InputError, match=r"data\.jsonl:1: expected a JSON object, found \[1\]"):
        list(read_records(str(write_lines(["[1]"]))))


ASKED = {"prompt": question("Ghent")}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, "no two answers: the columns are "),
        (
            {"instruction": "Hi", "completions": []},
            "the columns are those of UltraFeedback: .* of the repository converts",
        ),
        ({"context": ASKED["prompt"], "completions": []}, "the columns are those of NeMo-RL: context, completions; "),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "`chosen` is an object, as in LLaMA-Factory's ShareGPT"),
        (
            {"messages": question("Ghent"), "chosen": answered("a")[0], "rejected": answered("b")[0]},
            "`chosen` is an object, as in LLaMA-Factory's ShareGPT form; .* of the repository converts",
        ),
        ({"instruction": "Hi", "chosen": "a", "rejected": "b"}, "there is no `prompt`, and `instruction` is "),
        ({"question": "Who?", "chosen": "The one", "rejected": "The two"}, "there is no `prompt`, and `question` is"),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": "b", "chosen-rating": 2},
            "`rejected-rating` is null; give both",
        ),
        ({"prompt": "Hi", "chosen": 3, "rejected": "a"}, "`chosen` is 3"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "`prompt` is 3: "),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, r"`prompt\[0\].content` is "),
        ({**ASKED, "responses": ["a", "b"], "rewards": [1.0]}, r"`rewards` is \[1.0\]; give 2 finite numbers"),
        ({**ASKED, "responses": ["a", "b"], "rewards": [1.0, math.nan]}, r"`rewards` is \[1.0, NaN\]"),
        ({**ASKED, "responses": ["a", "b"], "truncated": [True]}, r"`truncated` is \[true\]"),
        ({**ASKED, "responses": ["a"]}, "no two answers: the columns are prompt, responses"),
        ({"prompt_ids": "12", "chosen_ids": [1], "rejected_ids": [2]}, '`prompt_ids` is "12"; give a list of whole'),
        (
            {"prompt_ids": [1], "chosen_ids": [-5], "rejected_ids": [2]},
            "the token id -5 is not of this tokenizer",
        ),
        ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [10**9]}, "the token id 1000000000 is not of this"),
        (dict.fromkeys(chain(*LABELLED), [1, -100]) | {"chosen_labels": [-100]}, "2 ids and 1 labels, of which 0 are"),
    ],
)
def test_rows_that_cannot_be_read(tokenizer, record, words):
    with pytest.raises(InputError, match=f"here: {words}") as caught:
        read_row(tokenizer, record, "here")
    assert "docs/" not in str(caught.value)  # a wheel has none


def test_several_rejected_are_read_as_the_trainer_does(tokenizer):
    """A text as prompt is one turn; the order of the rejected says nothing without scores."""
    record = {"prompt": "Name a town.", "chosen": "Ghent", "rejected": ["Lima", "Oslo"]}
    row = read_row(tokenizer, record, "here")
    asked = [{"role": "user", "content": "Name a town."}]
    assert row == read_row(tokenizer, {**record, "prompt": asked, "rejected": [answered("Lima"), "Oslo"]}, "here")
    assert (row.kind, row.best, row.rewards, len(row.responses)) == ("messages", 0, None, 3)
    scored = read_row(tokenizer, {**record, "score_chosen": 1, "score_rejected": [3, 0]}, "here")
    found = Inspection(Template(tokenizer), 512)
    for each in (row, read_row(tokenizer, {**record, "rejected": ["Oslo", "Lima"]}, "here"), scored):
        found.add(each, record)
    assert {"repeated", "reversed"} <= found.findings.keys() and found.findings["repeated"].count == 1
    messages = read_row(tokenizer, {"prompt": asked, "responses": [answered("Ghent"), answered("Lima")[0]]}, "here")
    assert messages.responses == row.responses[:2]


@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "Yes.", "rejected": "No."},
        {"chosen": answered("Yes."), "rejected": answered("No.")},
        {"chosen": "Yes.", "rejected": ["No.", "Never."]},
        {"responses": ["Yes.", "No."]},
    ],
    ids=["texts", "messages", "several", "list"],
)
@pytest.mark.parametrize("text", [True, False])
def test_a_system_beside_the_prompt_leads_it(tokenizer, answers, text):
    """Intel/orca_dpo_pairs: inspector, trainer and the reader of prompts files agree."""
    asked = question("Ghent")
    told = [{"role": "system", "content": "Be brief."}, *asked]
    row = {"system": "Be brief.", "prompt": asked[0]["content"] if text else asked, **answers}
    found, expected = (read_row(tokenizer, each, "here") for each in (row, {**answers, "prompt": told}))
    assert (found.kind, found.prompt) == ("messages", prompt_token_ids(tokenizer, told))
    assert found == expected
    prompts = ranked_by_trainer([row], tokenizer)
    assert prompts["row-000000000"]["prompt"] == told and not prompts.notes
    assert check_prompt(row, "here")["prompt"] == told
    blank = read_row(tokenizer, {**row, "system": " "}, "here")
    assert blank == read_row(tokenizer, {"prompt": asked, **answers}, "here")
    for change, words in (
        ({"system": 7}, "`system` is 7; give a text"),
        ({"prompt": [{"role": "system", "content": "Be kind."}, *asked]}, "`prompt` has another system message"),
        ({"prompt": "<|im_start|>user\nHi<|im_end|>\n"}, "`prompt` beside `system` has a chat template already"),
    ):
        with pytest.raises(InputError, match=words):
            read_row(tokenizer, {**row, **change}, "here")


def test_texts_beside_a_null_system_are_read_as_those_beside_a_system(tokenizer, tmp_path):
    path, row = tmp_path / "pairs.jsonl", {"prompt": "Where is Ghent?", "chosen": "In Belgium.", "rejected": "Here."}
    path.write_text("".join(json.dumps({"system": system, **row}) + "\n" for system in ("Be brief.", None)))
    assert [read_row(tokenizer, found, where).kind for where, found in read_records(str(path))] == ["messages"] * 2


def test_implicit_prompts(tokenizer):
    """TRL's two forms without `prompt`: conversations, and texts that begin alike."""
    pair = pairs()[0]
    whole = {side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")}
    expected = read_row(tokenizer, pair, "here")
    assert read_row(tokenizer, whole, "here") == expected
    row = read_row(tokenizer, {"chosen": "Name a town: Ghent", "rejected": "Name a town: Lima"}, "here")
    assert tokenizer.decode(row.prompt) == "Name a town:" and row.kind == "text"
    assert [tokenizer.decode(ids) for ids in row.responses] == [" Ghent<|im_end|>", " Lima<|im_end|>"]


@pytest.mark.parametrize("style", ["chatml", "llama3"])
def test_ids_are_those_of_trl(style, folders):
    """What TRL 1.16 trains on: of texts always, of messages where it keeps the template's line end behind the turn."""
    tokenizer = load_tokenizer(getattr(folders, style))
    prepare = DPOTrainer._prepare_dataset
    trainer, config = SimpleNamespace(_tokenizer=tokenizer), DPOConfig(use_cpu=True, max_length=None, bf16=False)
    texts = [{"prompt": "Name a town: ", "chosen": "Ghent", "rejected": "Lima or Oslo"}, *clean_texts(tokenizer)]
    for rows, tail in ((texts, 0), (pairs(), style == "chatml")):
        theirs = prepare(trainer, Dataset.from_list(rows), tokenizer, config, "train")
        for record, expected in zip(rows, theirs, strict=True):
            row = read_row(tokenizer, record, "here")
            ids = [expected[name][: len(expected[name]) - tail] for name in ("chosen_ids", "rejected_ids")]
            assert (row.prompt, row.responses) == (expected["prompt_ids"], ids)


# ---- the first step ----


@pytest.fixture(scope="module")
def some_pairs(tokenizer):
    return [as_pair(read_row(tokenizer, record, "here"), 2048) for record in pairs()[:3]]


def test_the_start_by_hand(tiny_model, some_pairs, tokenizer):
    """s = 0, loss ln 2, and the 1-norm of the gradient of the mean margin by plain autograd."""
    found = start(load_model(str(tiny_model)), some_pairs, 0.1, tokenizer.pad_token_id, None, True)
    assert found.s < 1e-3 and found.share < 1 and found.loss == pytest.approx(math.log(2), abs=1e-4)
    model = load_model(str(tiny_model)).double()
    margin = 0.0
    for prompt, answers in some_pairs:
        for sign, answer in zip((1, -1), answers, strict=True):
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            margin += sign * logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum() / 3
    margin.backward()
    norm = sum(weight.grad.abs().sum().item() for weight in model.parameters())
    assert found.gradient == pytest.approx(norm, rel=1e-3)
    assert found.trainable == sum(weight.numel() for weight in model.parameters())


def test_an_adapter_moves_by_its_second_half(tiny_model, some_pairs, tokenizer):
    """At the start B is 0, so A has no gradient; alpha scales that of B."""
    pad = tokenizer.pad_token_id
    norms = []
    for alpha in (8, 16):
        found = start(load_model(str(tiny_model)), some_pairs, 0.1, pad, (4, alpha), True)
        norms.append(found.gradient)
        assert found.share < 1 and found.trainable < 100_000
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-3)


def test_dropout_of_the_configuration(tokenizer, some_pairs, tmp_path, write_lines):
    """NeMo-Aligner#227: policy and reference differ before the first update; Llama's dropout is no module."""
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer, attention_dropout=0.3)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = inspect_data.arguments().parse_args([str(write_lines(pairs())), str(tmp_path / "model")])
    _, inspection = inspect_data.inspect(options)
    assert list(inspection.findings) == ["start"]
    assert inspection.findings["start"].remedy == "set to 0 in config.json: attention_dropout=0.3"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (("--lora", 4, 8, "--learning-rate", 5e-7, "--batch", 2), ["stuck"]),  # handbook#68: LoRA at the rate of all
        (("--learning-rate", 1e-8, "--batch", 8), ["stuck"]),  # Online-RLHF#17: the loss stays at 0.69
        (("--learning-rate", 1e-1, "--batch", 2), ["jump"]),
        (("--lora", 4, 8, "--learning-rate", 1e-3, "--batch", 2), []),
    ],
    ids=["lora", "all", "jump", "clean"],
)
def test_settings_that_move_nothing(tiny_model, write_lines, settings, found):
    given = [str(write_lines(pairs())), str(tiny_model), *map(str, settings)]
    figures, inspection = inspect_data.inspect(inspect_data.arguments().parse_args(given))
    assert list(inspection.findings) == found, figures["first_step"]


def test_sums_of_rates():
    """Online-RLHF#3: at a batch of 32 the way is four times that of 128 at the same rate."""
    assert rates("constant", 4) == 4
    assert rates("linear", 4) == pytest.approx(1 + 0.75 + 0.5 + 0.25)
    assert rates("cosine", 4) == pytest.approx(1 + 0.8535533906 + 0.5 + 0.1464466094)
    assert rates("cosine", 400) / rates("cosine", 100) == pytest.approx(4, rel=0.02)


def test_an_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="this is an adapter; give the model before training"):
        load_model(str(tmp_path))


# ---- the command ----


def test_the_screen(write_lines, folders, capsys, monkeypatch, tokenizer):
    """Row 1 by hand, and the status of a fault."""
    path = write_lines([*pairs(), {"prompt": question("Rome")}])
    monkeypatch.setattr("sys.argv", ["inspect", str(path), folders.chatml, "--tokens-only", "--row", "1"])
    with pytest.raises(SystemExit) as end:
        inspect_data.main()
    printed = capsys.readouterr().out
    assert end.value.code == 1
    assert f"fault: 1 of 9 rows: cannot be read (first: {path}:9: no two answers: the columns are prompt" in printed
    row = read_row(tokenizer, pairs()[1], "here")
    shown = " ".join(" ".join(line.split()) for line in printed.splitlines())
    spans = [f">> {' '.join(f'{i}:{tokenizer.convert_ids_to_tokens(i)}' for i in ids)} <<" for ids in row.responses]
    assert all(span in shown for span in spans)


def test_the_difference_of_a_prompt_by_text_is_shown(look, capsys):
    """A Llama-3 tokenizer adds a second BOS to a templated text; the data is clean all the same."""
    figures, inspection = look(pairs(), "llama3")
    lines = list(inspect_data.report(figures, inspection))
    assert any("8 prompts have other ids in trainers that write the template as text" in line for line in lines)
    assert any("0:<|begin_of_text|> 0:<|begin_of_text|>" in line for line in lines) and not inspection.findings
    figures, inspection = look(pairs())
    assert figures["prompts_that_differ_by_text"] == 0


@pytest.mark.parametrize("given", [("--batch", "0"), ("--learning-rate", "-1"), ("--lora", "8", "0")])
def test_numbers_that_are_not_above_0(given, capsys):
    with pytest.raises(SystemExit):
        inspect_data.arguments().parse_args(["data.jsonl", "model", *given])
    assert "is not above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--learning-rate", "1e-12"), "--learning-rate needs a batch (--batch)"),
        (("--learning-rate", "1e-12", "--batch", "8", "--tokens-only"), "--learning-rate needs the model, which --tok"),
        (("--lora", "8", "16", "--tokens-only"), "--lora needs the model"),
        (("--scheduler", "linear"), "--scheduler needs --learning-rate"),
        (("--epochs", "2"), "--epochs needs a batch"),
        (("--pairs", "2", "--tokens-only"), "--pairs needs the model"),
        (("--beta", "0.3", "--tokens-only"), "--beta needs the model"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(given, words, capsys):
    with pytest.raises(SystemExit):
        inspect_data.parsed(inspect_data.arguments(), ["data.jsonl", "model", *given])
    assert words in capsys.readouterr().err
    given = ["data.jsonl", "model", "--learning-rate", "1e-5", "--lora", "8", "16", "--devices", "2", "--epochs", "2"]
    inspect_data.parsed(inspect_data.arguments(), given)


def test_json(write_lines, folders, capsys, monkeypatch):
    path = write_lines(changed(3, rejected=pairs()[3]["chosen"]))
    monkeypatch.setattr("sys.argv", ["inspect", str(path), folders.chatml, "--tokens-only", "--json", "--limit", "4"])
    with pytest.raises(SystemExit):
        inspect_data.main()
    written = json.loads(capsys.readouterr().out)
    assert written["figures"]["rows"] == 4 and len(written["figures"]["order"]) == 16
    assert written["findings"]["equal"]["count"] == 1 and written["findings"]["equal"]["severity"] == "fault"
