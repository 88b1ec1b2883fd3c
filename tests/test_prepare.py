"""Preparation of the published data sets (data/prepare.py), on small hand-made files of their formats.

The hub is a double at the library's boundary (`snapshot_download`, `HfApi.dataset_info`): tests have no network.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import yaml
from conftest import REPOSITORY
from huggingface_hub import errors

from hps.errors import InputError
from pipeline.prompts import load_prompts
from pipeline.recipe import load_recipe
from pipeline.records import read_jsonl, read_prompts

A, B = "a" * 40, "1" * 40
CURATED = {"hh_rlhf": ("yqcca/HH-RLHF", "online_hh.json"), "pku_safe": ("yqcca/PKU-Safety", "pkusafe.json")}
HARMLESS, HELPFUL = "harmless-base/test.jsonl.gz", "helpful-base/test.jsonl.gz"
ALPACA = [f"data/{name}/test.jsonl" for name in ("Alpaca-7B", "Alpaca2-7B", "Alpaca3-8B")]
ONLINE, SAMPLED = "helpful-online/test.jsonl.gz", "helpful-rejection-sampled/test.jsonl.gz"


# Of the tests' own, because the repository's may be pinned.
SOURCES = f"""# sources
hh_rlhf:
  train: {{repo: yqcca/HH-RLHF, revision: null, files: [online_hh.json]}}
  test:
    repo: Anthropic/hh-rlhf
    revision: null  # open
    files: [{", ".join([HARMLESS, HELPFUL, ONLINE, SAMPLED])}]
pku_safe:
  train:
    repo: yqcca/PKU-Safety
    revision:   # open
    files: [pkusafe.json]
  test: {{repo: PKU-Alignment/PKU-SafeRLHF, revision: null, files: [{", ".join(ALPACA)}]}}
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("data_prepare", REPOSITORY / "data" / "prepare.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    loaded.SOURCES = tmp_path_factory.mktemp("sources") / "sources.yaml"
    loaded.SOURCES.write_text(SOURCES)
    return loaded


def user(*contents: str) -> list[dict]:
    """Messages of alternating turns, the user's first."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def given(*contents: str, responses=("good", "bad")) -> dict:
    return {"prompt": user(*contents), "responses": list(responses)}


def talk(*contents: str) -> str:
    """A transcript of alternating turns in the original's spelling."""
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {text}" for n, text in enumerate(contents))


def pair(*prompt: str, chosen: str = "good", rejected: str = "bad") -> dict:
    return {"chosen": talk(*prompt, chosen), "rejected": talk(*prompt, rejected)}


def question(prompt: str = "Q", better=0, safer=1, **changes) -> dict:
    record = {"prompt": prompt, "response_0": "zero", "response_1": "one", "is_response_0_safe": True}
    return {**record, "better_response_id": better, "safer_response_id": safer, **changes}


def put(path: Path, content) -> Path:
    """Write text, or records as JSON Lines, packed if the name ends with .gz."""
    text = content if isinstance(content, str) else "".join(json.dumps(record) + "\n" for record in content)
    data = text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def place(module, tmp_path):
    """Lay a set's files out as --from wants them and prepare it; files that are not given get no rows."""

    def run(name: str, train, tests: dict, **options) -> tuple[dict, Path]:
        folder, output = tmp_path / "raw", tmp_path / name
        sources = module.load_sources(module.SOURCES)[name]
        put(folder / CURATED[name][0] / CURATED[name][1], train)
        for file in sources["test"].files:
            put(folder / sources["test"].repo / file, tests.get(file, ""))
        return module.prepare(name, sources, output, folder=folder, **options), output

    return run


def lines(path: Path) -> list[dict]:
    return [record for _, record in read_jsonl(path)]


def test_the_sources_of_the_repository(module):
    sources = module.load_sources(REPOSITORY / "data" / "sources.yaml")
    assert {name: (splits["train"].repo, *splits["train"].files) for name, splits in sources.items()} == CURATED
    assert sources["hh_rlhf"]["test"].repo == "Anthropic/hh-rlhf"
    assert sources["hh_rlhf"]["test"].files == [HARMLESS, HELPFUL, ONLINE, SAMPLED]
    assert sources["pku_safe"]["test"].repo == "PKU-Alignment/PKU-SafeRLHF"
    assert sources["pku_safe"]["test"].files == ALPACA


@pytest.mark.parametrize("name", CURATED)
def test_the_recipes_read_what_is_written(module, name):
    recipe = load_recipe(REPOSITORY / "configs" / f"{name}.yaml")
    for split in module.SPLITS:
        assert REPOSITORY / getattr(recipe.data, split).path == module.DATA / name / f"{split}.jsonl"


def test_dialogues_by_hand(place, capsys):
    """Both splits, every count, and everything that the files say."""
    train = [given("Hello,  World"), given("a", "b", "c", responses=("x", "y")), given("hello, world"), given("d ")]
    harmless = [
        pair("1", "2", "3\nlines", chosen="4", rejected="5"),
        pair("HELLO,\nworld"),  # in training but for case and white space
        pair("new", chosen="same", rejected="same"),
    ]
    helpful = [pair("New"), pair("nEw", chosen="other")]
    facts, output = place("hh_rlhf", train, {HARMLESS: harmless, HELPFUL: helpful})

    repo = "yqcca/HH-RLHF/online_hh.json"
    assert lines(output / "train.jsonl") == [
        {"prompt": user("Hello,  World"), "responses": ["good", "bad"], "source": f"{repo}:1: row 1"},
        {"prompt": user("a", "b", "c"), "responses": ["x", "y"], "source": f"{repo}:2: row 2"},
        {"prompt": user("hello, world"), "responses": ["good", "bad"], "source": f"{repo}:3: row 3"},
        {"prompt": user("d"), "responses": ["good", "bad"], "source": f"{repo}:4: row 4"},
    ]
    first, second = f"Anthropic/hh-rlhf/{HARMLESS}", f"Anthropic/hh-rlhf/{HELPFUL}"
    assert lines(output / "test.jsonl") == [
        {"prompt": user("1", "2", "3\nlines"), "responses": ["4", "5"], "source": f"{first}:1: row 1"},
        {"prompt": user("New"), "responses": ["good", "bad"], "source": f"{second}:1: row 1"},
    ]
    same = {"same_as": f"{repo}:1: row 1"}
    again = {"same_as": f"{second}:1: row 1"}
    assert lines(output / "rejected.jsonl") == [
        {"split": "test", "file": first, "line": 2, "row": 2, "reason": "prompt in training", **same},
        {"split": "test", "file": first, "line": 3, "row": 3, "reason": "equal responses"},
        {"split": "test", "file": second, "line": 2, "row": 2, "reason": "repeated prompt", **again},
    ]
    reasons = {"equal responses": 1, "prompt in training": 1, "repeated prompt": 1}
    written, test = facts["splits"]["train"], facts["splits"]["test"]
    assert (written["read"], written["written"], written["rejected"], written["reasons"]) == (4, 4, 0, {})
    assert written["repeated_prompts_kept"] == 1
    assert (test["read"], test["written"], test["rejected"], test["reasons"]) == (5, 2, 3, reasons)
    told = capsys.readouterr().out
    assert "train: 4 rows read = 4 written + 0 rejected; nothing rejected, repeated prompts kept: 1" in told
    assert "test: 5 rows read = 2 written + 3 rejected; equal responses: 1, prompt in training: 1, repeated" in told
    assert "commit not known" in told


def test_prepare_json_names_inputs_and_outputs(place, tmp_path):
    facts, output = place("pku_safe", [given("t")], {ALPACA[0]: [question()]})
    assert json.loads((output / "prepare.json").read_text()) == facts
    assert (facts["set"], facts["preference"]) == ("pku_safe", "better")
    source = facts["splits"]["train"]
    assert (source["repo"], source["revision"], source["commit"]) == ("yqcca/PKU-Safety", None, None)
    raw = (tmp_path / "raw/yqcca/PKU-Safety/pkusafe.json").read_bytes()
    assert source["files"] == {"pkusafe.json": hashlib.sha256(raw).hexdigest()}
    assert list(facts["splits"]["test"]["files"]) == ALPACA
    assert set(facts["outputs"]) == {"train.jsonl", "test.jsonl", "rejected.jsonl"}
    for file, digest in facts["outputs"].items():
        assert hashlib.sha256((output / file).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("", "", "does not begin with a Human turn"),
        ("no turns at all", talk("a", "b"), "does not begin with a Human turn"),
        ("Hi\n\nHuman: a\n\nAssistant: b", talk("a", "c"), "does not begin with a Human turn"),
        ("\n\nAssistant: a\n\nHuman: b\n\nAssistant: c", talk("a", "b"), "does not begin with a Human turn"),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", talk("a", "c"), "turns do not alternate"),
        (talk("a", "b") + "\n\nAssistant: c", talk("a", "c"), "turns do not alternate"),
        (talk("a"), talk("a", "b"), "ends without an answer"),
        (talk("a", "b", "c"), talk("a", "b", "c"), "ends without an answer"),
        (talk("a", "b"), talk("a", " \n"), "ends without an answer"),
        (talk("a", "b", "", "d"), talk("a", "b", "", "e"), "empty turn"),
        (talk("a", "b"), talk("other", "c"), "do not share the prompt"),
        (talk("a", "b", "c", "d"), talk("a", "b"), "do not share the prompt"),
        (talk("a", "b "), talk("a", " b\r\n"), "equal responses"),
        # The answer has a line that looks like a turn: nothing tells it from one.
        (talk("a", "she said\n\nHuman: hello"), talk("a", "b"), "ends without an answer"),
        (talk("a", "x\n\nHuman: y\n\nAssistant: z"), talk("a", "b"), "do not share the prompt"),
    ],
)
def test_transcripts_that_are_rejected(module, chosen, rejected, reason):
    row = module.Row("f", Path("f"), 1, 1, {"chosen": chosen, "rejected": rejected})
    with pytest.raises(module.Rejected) as caught:
        module.transcripts(row)
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("transcript", "contents"),
    [
        (talk("a", "b"), ["a", "b"]),
        (talk("a", "b", "c", "d", "e", "f"), ["a", "b", "c", "d", "e", "f"]),
        ("Human: a\n\nAssistant: b", ["a", "b"]),  # at the very beginning
        ("\n\nHuman:a\n\nAssistant:\nb", ["a", "b"]),  # without the blank
        (talk("a\n\n\nb", "c\n\nd"), ["a\n\n\nb", "c\n\nd"]),  # empty lines inside a turn
        (talk("a\nHuman: b", "Assistant: c\nAssistant: d"), ["a\nHuman: b", "Assistant: c\nAssistant: d"]),
        (talk("a\n\nHumans: b", "c\n\nhuman: d"), ["a\n\nHumans: b", "c\n\nhuman: d"]),
        (talk("a\n\nThe Human: b", "c"), ["a\n\nThe Human: b", "c"]),
        (talk("a\nb", "c").replace("\n", "\r\n"), ["a\nb", "c"]),  # Windows
        (talk("é 😀", "日本\u2028語"), ["é 😀", "日本\u2028語"]),
    ],
)
def test_turns_by_hand(module, transcript, contents):
    assert module.turns(transcript) == user(*contents)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (given("a", responses=["one"]), "not two responses"),
        (given("a", responses=["one", "two", "three"]), "not two responses"),
        (given("a", responses=["one", " \n"]), "empty response"),
        (given("a", responses=["one", "one\r\n"]), "equal responses"),
        (given("a", "b"), "prompt does not end with the user's turn"),
        ({**given(), "prompt": []}, "prompt does not end with the user's turn"),
        (given("a", " ", "c"), "empty turn"),
        ({**given("a"), "prompt": [{"role": "tool", "content": "a"}]}, "a role other than system, user, assistant"),
        (given("half \ud83d of it"), "half a character"),
    ],
)
def test_curated_rows_that_are_rejected(place, record, reason):
    facts, output = place("pku_safe", [given("t"), record], {ALPACA[0]: [question()]})
    assert facts["splits"]["train"]["reasons"] == {reason: 1}
    (line,) = lines(output / "rejected.jsonl")
    assert (line["split"], line["line"], line["reason"]) == ("train", 2, reason)


def test_system_messages_and_whole_characters_are_kept(place):
    record = given("é 😀\u2028")
    record["prompt"].insert(0, {"role": "system", "content": "Be kind."})
    _, output = place("pku_safe", [record], {ALPACA[0]: [question()]})
    assert lines(output / "train.jsonl")[0]["prompt"] == [record["prompt"][0], {"role": "user", "content": "é 😀"}]


@pytest.mark.parametrize(
    ("preference", "expected"),
    [("better", [["zero", "one"], ["one", "zero"]]), ("safer", [["one", "zero"], ["zero", "one"]])],
)
def test_the_preference_orders_the_responses(place, preference, expected):
    rows = [question("p"), question("q", better=1, safer=0)]
    facts, output = place("pku_safe", [given("t")], {ALPACA[2]: rows}, preference=preference)
    assert [record["responses"] for record in lines(output / "test.jsonl")] == expected
    assert facts["preference"] == preference


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"better_response_id": 2}, "`better_response_id` is neither 0 nor 1"),
        ({"better_response_id": -1}, "`better_response_id` is neither 0 nor 1"),
        ({"better_response_id": None}, "`better_response_id` is neither 0 nor 1"),
        ({"better_response_id": True}, "`better_response_id` is neither 0 nor 1"),
        ({"better_response_id": "1"}, "`better_response_id` is neither 0 nor 1"),
        ({"prompt": " "}, "empty turn"),
        ({"response_1": ""}, "empty response"),
        ({"response_1": "zero "}, "equal responses"),
        ({"prompt": "T"}, "prompt in training"),
        ({"prompt": "KEPT"}, "repeated prompt"),
    ],
)
def test_questions_that_are_rejected(place, changes, reason):
    rows = [question("kept"), question(**changes)]
    facts, output = place("pku_safe", [given("t")], {ALPACA[1]: rows})
    counts = facts["splits"]["test"]
    assert (counts["read"], counts["written"], counts["rejected"]) == (2, 1, 1)
    assert {name: count for name, count in counts["reasons"].items() if count} == {reason: 1}
    assert {"prompt in training", "repeated prompt"} <= set(counts["reasons"])  # said even when there are none
    assert lines(output / "rejected.jsonl")[0]["file"] == f"PKU-Alignment/PKU-SafeRLHF/{ALPACA[1]}"


def test_a_rejected_training_row_does_not_remove_its_prompt_from_the_test(place):
    facts, output = place("pku_safe", [given("t"), given("q", responses=["x"])], {ALPACA[0]: [question("q")]})
    assert [record["prompt"] for record in lines(output / "test.jsonl")] == [user("q")]


@pytest.mark.parametrize("form", ["one line", "indented", "lines", "windows", "byte order mark"])
def test_arrays_and_lines_are_the_same_rows(place, form):
    rows = [given("a [1] {"), given('b "]"'), given("c", responses=["x"]), given("d")]
    one, two, three, four = map(json.dumps, rows)
    indented = json.dumps(rows[1], indent=1)
    assert indented.count("\n") == 11  # so the third row, which is rejected, begins on line 15
    joined = "\n".join([one, two, three, four])
    text, line = {
        "one line": (json.dumps(rows), 1),
        "indented": (f"\n[{one},\n{indented},\n{three}\n, {four}]\n", 15),
        "lines": (joined.replace("\n", "\n\n"), 5),
        "windows": (joined.replace("\n", "\r\n") + "\r\n", 3),
        "byte order mark": ("\ufeff" + joined, 3),
    }[form]
    _, output = place("pku_safe", text, {ALPACA[0]: [question()]})
    contents = [record["prompt"][0]["content"] for record in lines(output / "train.jsonl")]
    assert contents == ["a [1] {", 'b "]"', "d"]
    (rejected,) = lines(output / "rejected.jsonl")
    assert (rejected["row"], rejected["line"], rejected["reason"]) == (3, line, "not two responses")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ('{"prompt": \n', "pkusafe.json:1: broken JSON"),
        (json.dumps(given("a")) + "\n{,}", "pkusafe.json:2: broken JSON at column 2"),
        ('[\n{"a": 1},\n{,}]', "pkusafe.json:3: broken JSON at column 2"),
        ("[{}", "pkusafe.json:1: broken JSON"),
        ("[]\n[]", "pkusafe.json:2: broken JSON"),
        ("[" * 100000, "pkusafe.json:1: unreadable JSON"),
        ("[3]", "pkusafe.json:1: row 1: expected a JSON object, found 3"),
        ([{"responses": ["a", "b"]}], "row 1: `prompt` is missing"),
        ([{**given(), "prompt": "text"}], 'row 1: `prompt` is "text": should be a valid list'),
        ([{**given(), "prompt": [{"role": "user"}]}], "row 1: `prompt[0].content` is missing"),
        (
            [given("a"), {**given("b"), "responses": [1, 2]}],
            "pkusafe.json:2: row 2: `responses[0]` is 1: should be a valid string",
        ),
        ("", "dataset yqcca/PKU-Safety: no row of train can be used (0 rows read = 0 written + 0 rejected"),
        ([given()], "no row of train can be used (1 rows read = 0 written + 1 rejected; prompt does not end"),
    ],
)
def test_files_of_another_format_stop_with_their_place_and_write_nothing(place, tmp_path, train, message):
    with pytest.raises(InputError) as caught:
        place("pku_safe", train, {ALPACA[0]: [question()]})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "pku_safe").exists()


def test_test_files_of_another_format_stop_too(place):
    record = question()
    del record["better_response_id"]
    with pytest.raises(InputError, match=r"Alpaca-7B/test.jsonl:1: row 1: `better_response_id` is missing"):
        place("pku_safe", [given("t")], {ALPACA[0]: [record]})
    with pytest.raises(InputError, match=r"Alpaca-7B/test.jsonl:1: row 1: `response_1` is 5: .*; the file has another"):
        place("pku_safe", [given("t")], {ALPACA[0]: [question(response_1=5)]})
    with pytest.raises(InputError, match=r"harmless-base/test.jsonl.gz:1: row 1: `rejected` is missing"):
        place("hh_rlhf", [given("t")], {HARMLESS: [{"chosen": talk("a", "b")}]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(b"x" * 1000, mtime=0)[:-10], "damaged gzip file"),
        (b"no gzip", "f.gz:1: broken JSON"),
        (gzip.compress(b'{"a": 1}\n"\xff"', mtime=0), "f.gz:2: byte 2 of the line is not UTF-8"),
    ],
)
def test_broken_bytes_are_named(module, tmp_path, data, message):
    path = tmp_path / "f.gz"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(module.read_rows(path, "f.gz"))


def test_a_missing_local_file_is_named(module, tmp_path):
    sources = module.load_sources(module.SOURCES)["hh_rlhf"]
    with pytest.raises(InputError, match=r"raw/yqcca/HH-RLHF/online_hh.json: there is no such file; lay the folder"):
        module.prepare("hh_rlhf", sources, tmp_path / "out", folder=tmp_path / "raw")


def test_a_second_run_writes_the_same_bytes(place):
    arguments = ("hh_rlhf", [given("t"), given("u", "v")], {HARMLESS: [pair("a"), pair("t")]})
    _, output = place(*arguments)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert set(before) == {"train.jsonl", "test.jsonl", "rejected.jsonl", "prepare.json"}
    place(*arguments)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_an_interrupted_run_leaves_no_prepare_json_and_can_be_repeated(module, place, monkeypatch):
    arguments = ("pku_safe", [given("t")], {ALPACA[0]: [question()]})
    _, output = place(*arguments)

    def stop(path, text, known=module.write_atomic):
        if Path(path).name == "test.jsonl":
            raise KeyboardInterrupt
        known(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", stop)
        with pytest.raises(KeyboardInterrupt):
            place(*arguments)
    assert not (output / "prepare.json").exists()
    place(*arguments)
    assert (output / "prepare.json").exists()


def test_somebody_elses_files_are_not_overwritten(place, tmp_path):
    path = put(tmp_path / "pku_safe" / "train.jsonl", [given("mine")])
    with pytest.raises(InputError, match="train.jsonl: there is a file that data/prepare.py did not write; move it"):
        place("pku_safe", [given("t")], {ALPACA[0]: [question()]})
    assert lines(path) == [given("mine")]


def test_the_pipeline_loads_what_is_written(place):
    train = [given("t"), given("t"), given("T", "b", "c")]
    _, output = place("hh_rlhf", train, {HARMLESS: [pair("a"), pair("a", "b", "c")]})
    files = {split: output / f"{split}.jsonl" for split in ("train", "test")}
    assert [len(list(read_prompts(path))) for path in files.values()] == [3, 2]
    overrides = [f"data.{split}.path={path}" for split, path in files.items()]
    recipe = load_recipe(REPOSITORY / "configs" / "hh_rlhf.yaml", overrides)
    prompts, repeated = load_prompts(recipe, "train")
    assert (len(prompts), len(repeated)) == (2, 1)  # generation merges what is kept here
    prompts, repeated = load_prompts(recipe, "test")
    assert (len(prompts), len(repeated)) == (2, 0)


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """snapshot_download's double: files of `raw`, laid out as the cache has them; returns the calls made."""
    calls, newest = [], iter([A, "c" * 40, *[B] * 9])

    def download(repo_id, *, repo_type=None, revision=None, allow_patterns=None):
        calls.append((repo_id, repo_type, revision, allow_patterns))
        raw, cache = tmp_path / "raw" / repo_id, tmp_path / "hub" / f"datasets--{repo_id.replace('/', '--')}"
        folder = cache / "snapshots" / (revision or next(newest))
        for file in allow_patterns:
            if (raw / file).exists():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes((raw / file).read_bytes())
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_downloads_ask_for_repo_type_and_files_of_one_revision(module, hub, place, tmp_path, capsys):
    place("hh_rlhf", [given("t")], {HARMLESS: [pair("a")]})
    sources = module.load_sources(module.SOURCES)["hh_rlhf"]
    capsys.readouterr()
    facts = module.prepare("hh_rlhf", sources, tmp_path / "out")
    assert hub == [
        ("yqcca/HH-RLHF", "dataset", None, ["online_hh.json"]),
        ("Anthropic/hh-rlhf", "dataset", None, [HARMLESS, HELPFUL, ONLINE, SAMPLED]),
    ]
    assert [facts["splits"][split]["commit"] for split in ("train", "test")] == [A, "c" * 40]
    remark = f"train: yqcca/HH-RLHF: commit {A} (newest; `data/prepare.py pin` fixes it)"
    assert remark in capsys.readouterr().out


def test_a_file_that_the_repository_lacks_is_named(module, hub, place, tmp_path):
    place("pku_safe", [given("t")], {ALPACA[0]: [question()]})
    (tmp_path / "raw" / "PKU-Alignment/PKU-SafeRLHF" / ALPACA[1]).unlink()
    with pytest.raises(InputError, match=rf"{ALPACA[1]}: there is no such file; correct `files` in data/sources.yaml"):
        module.prepare("pku_safe", module.load_sources(module.SOURCES)["pku_safe"], tmp_path / "out")


def test_pinned_revisions_are_asked_for(module, hub, place, tmp_path, capsys):
    place("pku_safe", [given("t")], {ALPACA[0]: [question()]})
    sources = module.load_sources(module.SOURCES)["pku_safe"]
    pinned = {split: source.model_copy(update={"revision": B}) for split, source in sources.items()}
    capsys.readouterr()
    facts = module.prepare("pku_safe", pinned, tmp_path / "out")
    assert [call[1:3] for call in hub] == [("dataset", B)] * 2
    assert facts["splits"]["test"]["commit"] == facts["splits"]["test"]["revision"] == B
    assert "fixes it" not in capsys.readouterr().out


REFUSALS = [
    (
        errors.OfflineModeIsEnabled("offline"),
        "the hub cannot be reached, or HF_HUB_OFFLINE is set; run it where there is a network",
    ),
    (
        errors.LocalEntryNotFoundError("not cached"),
        "the hub cannot be reached, or HF_HUB_OFFLINE is set; run it where there is a network",
    ),
    (httpx2.ConnectError("Name or service not known"), "ConnectError: Name or service not known; try again when"),
    (errors.GatedRepoError("403", response=response(403)), "access is restricted; ask for access"),
    (errors.RepositoryNotFoundError("404", response=response(404)), "the hub has no such dataset"),
    (errors.RevisionNotFoundError("404", response=response(404)), "the hub has no such revision"),
]


@pytest.mark.parametrize(("error", "message"), REFUSALS, ids=lambda value: type(value).__name__)
def test_refusals_of_the_hub_are_one_line(module, monkeypatch, tmp_path, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError) as caught:
        module.prepare("hh_rlhf", module.load_sources(module.SOURCES)["hh_rlhf"], tmp_path / "out")
    text = str(caught.value)
    assert text.startswith("dataset yqcca/HH-RLHF: ") and message in text and "\n" not in text
    assert not (tmp_path / "out").exists()


@pytest.fixture
def offline(tmp_path):
    """Run a copy of the script, which writes beside itself; no network, a hub cache of the test's own."""

    def run(*arguments):
        put(tmp_path / "data" / "prepare.py", (REPOSITORY / "data" / "prepare.py").read_text())
        put(tmp_path / "data" / "sources.yaml", SOURCES)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
        command = [sys.executable, str(tmp_path / "data" / "prepare.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=120)

    return run


def test_the_command_without_a_network_is_one_line(offline, tmp_path):
    result = offline("hh_rlhf")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "HF_HUB_OFFLINE is set" in result.stderr and "--from FOLDER" in result.stderr
    assert not (tmp_path / "data" / "hh_rlhf").exists()


def test_the_commit_is_read_off_the_hubs_own_cache(offline, tmp_path):
    """No double here: the library finds the files in a cache of its layout, nested ones too."""
    files = {CURATED["pku_safe"]: [given("t")], **{("PKU-Alignment/PKU-SafeRLHF", file): [] for file in ALPACA}}
    files["PKU-Alignment/PKU-SafeRLHF", ALPACA[1]] = [question()]
    for (repo, file), records in files.items():
        folder = tmp_path / "cache" / "hub" / f"datasets--{repo.replace('/', '--')}"
        commit = A if repo.startswith("yqcca") else B
        put(folder / "refs" / "main", commit)
        put(folder / "snapshots" / commit / file, records)
    result = offline("pku_safe")
    assert result.returncode == 0, result.stderr
    splits = json.loads((tmp_path / "data" / "pku_safe" / "prepare.json").read_text())["splits"]
    assert [splits[split]["commit"] for split in ("train", "test")] == [A, B]


@pytest.fixture
def command(module, monkeypatch, tmp_path):
    """The command line, with its folder of data elsewhere."""
    sources = tmp_path / "sources.yaml"
    sources.write_bytes(module.SOURCES.read_bytes())
    monkeypatch.setattr(module, "DATA", tmp_path / "data")
    monkeypatch.setattr(module, "SOURCES", sources)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        module.main()

    return run


def test_the_command_line(command, place, tmp_path):
    place("hh_rlhf", [given("t")], {HARMLESS: [pair("a")]})
    place("pku_safe", [given("t")], {ALPACA[0]: [question()]})
    command("hh_rlhf", "pku_safe", "--from", tmp_path / "raw", "--preference", "safer")
    found = {name: json.loads((tmp_path / "data" / name / "prepare.json").read_text()) for name in CURATED}
    assert [found[name]["preference"] for name in CURATED] == [None, "safer"]
    with pytest.raises(InputError, match="`pin` cannot be combined"):
        command("pin", "hh_rlhf")
    with pytest.raises(SystemExit):
        command("other")


@pytest.fixture
def commits(monkeypatch):
    """dataset_info's double: a commit of its own for every repository; returns the calls made."""
    calls = []

    def dataset_info(self, repo_id, *, revision=None, **_):
        calls.append((repo_id, revision))
        return types.SimpleNamespace(sha=f"{len(calls)}" * 40)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return calls


def test_pin_changes_the_revisions_alone(module, command, commits, capsys):
    command("pin")
    assert commits == [
        ("yqcca/HH-RLHF", None),
        ("Anthropic/hh-rlhf", None),
        ("yqcca/PKU-Safety", None),
        ("PKU-Alignment/PKU-SafeRLHF", None),
    ]
    commit = {number: f'revision: "{number * 40}"' for number in "1234"}
    expected = SOURCES.replace("revision: null, files: [online", f"{commit['1']}, files: [online")
    expected = expected.replace("revision: null  # open", f"{commit['2']}  # open")
    expected = expected.replace("revision:   # open", f"{commit['3']}   # open")
    expected = expected.replace("revision: null, files: [data", f"{commit['4']}, files: [data")
    assert module.SOURCES.read_text() == expected
    assert f"pin: hh_rlhf.train: yqcca/HH-RLHF: newest -> {'1' * 40}" in capsys.readouterr().out
    assert module.load_sources(module.SOURCES)["pku_safe"]["test"].revision == "4" * 40
    command("pin")  # pinned: left alone, the hub is not asked
    assert len(commits) == 4 and module.SOURCES.read_text() == expected


def test_pin_resolves_branches_and_keeps_line_ends(module, command, commits):
    text = SOURCES.replace("revision: null  # open", "revision: main").replace("\n", "\r\n")
    module.SOURCES.write_bytes(text.encode())
    command("pin")
    written = module.SOURCES.read_bytes().decode()
    assert f'revision: "{"2" * 40}"\r\n' in written
    assert written.count("\n") == written.count("\r\n") == SOURCES.count("\n")
    assert commits[1] == ("Anthropic/hh-rlhf", "main")


def test_pin_refuses_what_it_cannot_edit(module, command, commits):
    shared = {"repo": "a/b", "revision": None, "files": ["f"]}
    text = yaml.safe_dump({name: {"train": shared, "test": shared} for name in CURATED})
    assert "*" in text  # one mapping in four places
    module.SOURCES.write_text(text)
    with pytest.raises(InputError, match="sources.yaml: one of .* is written in a way that cannot be edited safely"):
        command("pin")
    assert module.SOURCES.read_text() == text


@pytest.mark.parametrize(("error", "message"), REFUSALS, ids=lambda value: type(value).__name__)
def test_pin_without_the_hub_writes_nothing(module, command, monkeypatch, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(InputError) as caught:
        command("pin")
    assert str(caught.value).startswith("dataset yqcca/HH-RLHF: ") and message in str(caught.value)
    assert module.SOURCES.read_text() == SOURCES


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pku_safe:", "other:", "`pku_safe` is missing"),
        ("  train:", "  dev:", "`hh_rlhf.train` is missing"),
        ("repo: yqcca/HH-RLHF", "name: yqcca/HH-RLHF", "`hh_rlhf.train.repo` is missing"),
        ("repo: yqcca/HH-RLHF", "repo: HH-RLHF", '`hh_rlhf.train.repo` is "HH-RLHF": string should match pattern'),
        ("revision: null", "revision: 12", "`hh_rlhf.train.revision` is 12: should be a valid string"),
        ("[online_hh.json]", "online_hh.json", '`hh_rlhf.train.files` is "online_hh.json": should be a valid list'),
        ("[online_hh.json]", "[]", "`hh_rlhf.train.files` is []: list should have at least 1 item"),
        ("revision: null", "revision: null, branch: main", '`hh_rlhf.train.branch` is "main": extra inputs'),
        ("hh_rlhf:", "hh_rlhf: [", "cannot read the sources"),
    ],
)
def test_broken_sources_are_named(module, tmp_path, old, new, message):
    path = tmp_path / "sources.yaml"
    path.write_text(SOURCES.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        module.load_sources(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
