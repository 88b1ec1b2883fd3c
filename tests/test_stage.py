"""What stands beside outputs: a folder belongs to one set of settings, models are known by their bytes."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from hps.errors import InputError
from pipeline.files import file_hash
from pipeline.identity import check_model, model_hash
from pipeline.recipe import Model, load_recipe
from pipeline.stage import (
    LAYOUT,
    Work,
    claim,
    git_commit,
    hold,
    read_manifest,
    require_finished,
    stage,
    versions,
)

SETTINGS = {"seed": 7, "model": {"path": "models/a", "weights": "00ff"}, "responses": [6, 2]}


def test_a_folder_is_claimed_continued_and_finished(tmp_path, tiny_recipe):
    folder, recipe = tmp_path / "deep" / "folder", load_recipe(tiny_recipe)
    assert claim(folder, SETTINGS) is False
    assert claim(folder, SETTINGS) is False
    output = folder / "data.jsonl"
    output.write_bytes(b"abc")
    Work(folder, recipe, SETTINGS).finish([output], steps=3)
    assert claim(folder, SETTINGS) is True
    manifest = json.loads((folder / "manifest.json").read_text())
    # printf abc | sha256sum
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["outputs"] == {"data.jsonl": abc}
    assert manifest["settings"] == SETTINGS
    assert manifest["recipe"]["seed"] == 7
    assert manifest["versions"] == versions()
    assert manifest["git_commit"] == git_commit()
    assert manifest["steps"] == 3


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({**SETTINGS, "seed": 8}, "seed was 7, is now 8"),
        ({**SETTINGS, "model": {"path": "models/a", "weights": "11"}}, "model.weights was 00ff, is now 11"),
        ({**SETTINGS, "responses": [6, 3]}, "responses was [6, 2], is now [6, 3]"),
        ({**SETTINGS, "new": 1}, "new was None, is now 1"),
        ({"seed": 7, "model": SETTINGS["model"]}, "responses was [6, 2], is now None"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, changed, difference):
    claim(tmp_path, SETTINGS)
    with pytest.raises(InputError, match="results of other settings") as error:
        claim(tmp_path, changed)
    assert difference in str(error.value)
    assert claim(tmp_path, SETTINGS) is False


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make or write the folder"):
        claim(tmp_path / "file" / "folder", SETTINGS)


@pytest.fixture
def copied(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def flip(path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "part"),
    [("model.safetensors", "weights"), ("config.json", "weights"), ("tokenizer.json", "tokenizer"),
     ("tokenizer_config.json", "tokenizer"), ("chat_template.jinja", "tokenizer"), ("chat_template.json", "tokenizer"),
     ("vocab.json", "tokenizer"), ("spiece.model", "tokenizer"), ("generation_config.json", "tokenizer"),
     ("additional_chat_templates/tool.jinja", "tokenizer"), ("model.safetensors.index.json", "weights")],
)  # fmt: skip
def test_one_flipped_bit_changes_the_hash_of_its_part(copied, file, part):
    """A broken tokenizer.json gives no tokens, either."""
    path, model = copied / file, Model(path=str(copied))
    path.parent.mkdir(exist_ok=True)
    path.touch()
    path.write_bytes(path.read_bytes() or b"{}")
    (copied / "README.md").write_text("for people")
    before = model_hash(model)
    flip(path)
    flip(copied / "README.md")
    after = model_hash(model)
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {"tokens"} == {part} and ("tokens" in changed) == (file == "tokenizer.json")


def test_a_tokenizer_must_give_the_ids_of_the_stage_before(copied, tmp_path, monkeypatch):
    """Files that are the same and ids that are not: another release of the library, in another environment."""
    model = {"model": model_hash(Model(path=str(copied)))}
    for first, second in (("out/candidates", "out/run"), ("out/run", "out/run/answers")):
        claim(tmp_path / first, model)
        claim(tmp_path / second, model)
    ours = {"policy": {**model["model"], "tokens": "0" * 64}}
    for folder in ("out/other", "out/run/evaluation"):
        with pytest.raises(InputError, match="claim.json: a tokenizer gives other ids here than in the environment"):
            claim(tmp_path / folder, ours)
    claim(tmp_path / "out" / "third", {"policy": {**ours["policy"], "tokenizer": "another"}})


def test_hashes_do_not_depend_on_the_place(copied, tiny_model):
    ours, theirs = model_hash(Model(path=str(copied))), model_hash(Model(path=str(tiny_model)))
    assert {**ours, "path": ""} == {**theirs, "path": ""}
    assert file_hash(copied / "config.json") == file_hash(tiny_model / "config.json")


def test_a_hub_model_is_known_by_name_and_commit(monkeypatch, tmp_path, tiny_model):
    """The hub's cache as its client lays it out; an open revision resolves to the commit, before and after."""
    commit = "a" * 40
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    shutil.copy(tiny_model / "tokenizer.json", snapshot)
    tokens = model_hash(Model(path=str(tiny_model)))["tokens"]
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (None, "main", commit):
        found = model_hash(Model(path="owner/name", revision=revision))
        assert found == {"hub": "owner/name", "revision": commit, "tokens": tokens}
    with pytest.raises(InputError, match="^nobody/none: no such model in the hub's cache"):
        model_hash(Model(path="nobody/none"))


def test_a_second_run_on_a_folder_is_refused(tmp_path):
    """The holder is another process; when it ends, however it ends, the folder is free."""
    code = (
        "import pathlib, sys, time\nfrom pipeline.stage import hold\n"
        "with hold(pathlib.Path(sys.argv[1])):\n    print(1, flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(InputError, match="another run is working in this folder"), hold(tmp_path):
            pass
        other.kill()
    with hold(tmp_path):
        pass
    with hold(tmp_path):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("[enforce fail at inline_container.cc:672] PytorchStreamWriter failed writing file data/0"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 706304 vs 706192"),
    ],
    ids=["disk", "quota", "torch", "end of torch's archive"],
)
def test_a_full_disk_is_one_line_with_the_folder(tmp_path, error):
    with pytest.raises(InputError, match=f"^{tmp_path}: the disk is full; make room"), hold(tmp_path):
        raise error


def test_other_errors_leave_a_held_folder_as_they_are(tmp_path):
    for error in (OSError(errno.EIO, "Input/output error"), ValueError("no"), InputError("no", where="here")):
        with pytest.raises(type(error)) as raised, hold(tmp_path):
            raise error
        assert raised.value is error


def test_local_models_must_be_there(tiny_model, tmp_path):
    check_model(Model(path=str(tiny_model)), "models.policy")
    check_model(Model(path="owner/name"), "models.policy")
    for path in ("models/none", "./none", str(tmp_path / "none"), "none", "a/b/c"):
        with pytest.raises(InputError, match=r"`models\.reward\.path`: there is no model folder"):
            check_model(Model(path=path), "models.reward")
    with pytest.raises(InputError, match=r"`models\.reward\.path`: no config\.json"):
        check_model(Model(path=str(tmp_path)), "models.reward")


def test_a_stage_works_once(tmp_path, tiny_recipe, capsys):
    """It holds the lock in its block, and says in one line that it was finished before."""
    recipe, folder = load_recipe(tiny_recipe), tmp_path / "scores"
    with pytest.raises(InputError, match="scores: the scores are not finished; run `bash evaluate.sh` with"):
        require_finished(folder, "the scores are", "bash evaluate.sh")
    with stage("scores", folder, recipe, SETTINGS) as work:
        with pytest.raises(InputError, match="another run is working in this folder"), hold(folder):
            pass
        (folder / "scores.jsonl").write_text("{}")
        assert capsys.readouterr().out == ""
        work.finish([folder / "scores.jsonl"])
    require_finished(folder, "the scores are", "bash evaluate.sh")
    with stage("scores", folder, recipe, SETTINGS) as work:
        assert work is None
    assert capsys.readouterr().out == f"scores: finished before, {folder}\n"


@pytest.mark.parametrize("before", [SETTINGS, {"layout": LAYOUT - 1, "settings": SETTINGS}])
def test_a_folder_of_another_layout_is_refused(tmp_path, tiny_recipe, before):
    """The first layout had no number. A manifest is refused as well, also where the claim was deleted."""
    (tmp_path / "claim.json").write_text(json.dumps(before))
    found = before.get("layout", "without a number")
    message = f"another version of this repository wrote this: layout {found}, this version has layout {LAYOUT}; delete"
    with pytest.raises(InputError, match=f"claim.json: {message}"):
        claim(tmp_path, SETTINGS)
    manifest = {name: value for name, value in before.items() if name == "layout"}
    manifest |= {"settings": {}, "inputs": {}, "outputs": {}, "sha256": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"manifest.json: {message}"):
        read_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b"", b"[1]"])
def test_a_damaged_claim_is_one_clear_error(tmp_path, content):
    (tmp_path / "claim.json").write_bytes(content)
    with pytest.raises(InputError, match=r"claim\.json.*(broken JSON|UTF-8|expected a JSON object)"):
        claim(tmp_path, {"a": 1})
