"""tools/verify.py: everything that differs from what a manifest says is found and named."""

import json
import shutil

import pytest

from hps.errors import InputError
from pipeline.files import file_hash
from pipeline.identity import model_hash
from pipeline.recipe import Model, load_recipe
from pipeline.stage import LAYOUT, Work, claim, hold, write_manifest
from tools.verify import verify

TEXT = b'{"a": 1}\n{"b": 22}\n{"c": 333}\n'


@pytest.fixture
def finished(tmp_path, tiny_recipe, tiny_model):
    """A finished stage with an input, two outputs and a local model, and one that is not finished."""
    folder, given = tmp_path / "out" / "stage", tmp_path / "given.jsonl"
    given.write_bytes(TEXT)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = {"data": {"sha256": file_hash(given)}, "model": model_hash(Model(path=str(model)))}
    claim(folder, settings)
    (folder / "deep").mkdir()
    outputs = [folder / "data.jsonl", folder / "deep" / "weights"]
    for path in outputs:
        path.write_bytes(TEXT)
    Work(folder, load_recipe(tiny_recipe), settings).finish(outputs, [given])
    claim(tmp_path / "out" / "begun", {})
    return folder


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_what_is_whole_passes(finished, capsys):
    assert verify(finished.parent) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("begun: not finished; the same command continues it")
    # The manifest, two outputs, an input, a model.
    assert lines[1].endswith("stage: 5 checked, 0 wrong")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("data.jsonl", "data.jsonl: has changed since the stage wrote it"),
        ("deep/weights", "deep/weights: has changed since the stage wrote it"),
        ("../../given.jsonl", "given.jsonl: an input, has changed since the stage read it"),
        ("../../model/model.safetensors", "model: a model, its weights changed since the stage read it"),
        ("../../model/tokenizer.json", "model: a model, its tokenizer changed since the stage read it"),
        ("manifest.json", "the manifest itself (recipe, settings, hashes) has changed"),
    ],
)
def test_a_flipped_byte_is_found_wherever_it_is(finished, capsys, file, said):
    path = (finished / file).resolve()
    place = 12
    if file == "manifest.json":
        place = path.read_bytes().index(b'"seed": 7') + len(b'"seed": 7') - 1
    flip(path, place)
    assert verify(finished) == 1
    assert said in capsys.readouterr().out


def test_what_is_missing(finished, capsys):
    (finished / "data.jsonl").unlink()
    (finished / "../../given.jsonl").resolve().unlink()
    shutil.rmtree((finished / "../../model").resolve())
    assert verify(finished) == 1
    printed = capsys.readouterr().out
    assert "data.jsonl: is missing" in printed
    assert "given.jsonl: an input, is missing" in printed and "model: a model, is missing" in printed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ":1: broken JSON"),
        ("\x00", ":1: broken JSON"),
        ("[]", ": expected a JSON object, found []"),
        ('{"sha256": 1}', ": another version of this repository wrote this: layout without a number"),
        (json.dumps({"layout": LAYOUT, "sha256": "0", "settings": []}), ": the manifest itself"),
        (json.dumps({"layout": LAYOUT}), ": the manifest itself"),
    ],
)
def test_a_damaged_manifest_is_one_line(finished, capsys, text, said):
    (finished / "manifest.json").write_text(text)
    assert verify(finished) == 1
    assert f"manifest.json{said}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps({"layout": LAYOUT, "settings": {"other": 1}}), "is not what the manifest says"),
        (json.dumps({"other": 1}), "another version of this repository wrote this"),
        ("{", "broken JSON"),
        (None, "cannot read the file"),
    ],
)
def test_a_changed_claim(finished, capsys, text, said):
    claimed = finished / "claim.json"
    claimed.unlink() if text is None else claimed.write_text(text)
    assert verify(finished) == 1
    printed = capsys.readouterr().out
    assert "WRONG  " in printed and "claim.json:" in printed and said in printed


def test_a_folder_without_stages_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no claim\.json or manifest\.json"):
        verify(tmp_path)


def test_an_input_that_changed_meanwhile_ends_the_stage(tmp_path, tiny_recipe):
    """The folder was claimed for another file than the one that stands there at the end."""
    given, folder = tmp_path / "given.jsonl", tmp_path / "stage"
    given.write_bytes(TEXT)
    claim(folder, {"data": file_hash(given)})
    given.write_bytes(TEXT + TEXT)
    with pytest.raises(InputError, match=r"given\.jsonl: the file changed while this stage worked on it"):
        Work(folder, load_recipe(tiny_recipe), {"data": file_hash(given)}).finish([], [given])
    assert not (folder / "manifest.json").exists()


def assert_every_change_is_found(stage, files: list[str], capsys) -> None:
    """Flip the tenth byte of each file below a folder, look, and put it back."""
    for name in files:
        path = stage / name
        whole = path.read_bytes()
        flip(path, 9)
        assert verify(stage) == 1, name
        assert f"WRONG  {path}: has changed since the stage wrote it" in capsys.readouterr().out
        path.write_bytes(whole)
    assert verify(stage) == 0


@pytest.fixture
def trained(ranked_recipe):
    """A finished training of a tiny model with a kept checkpoint and merged weights."""
    pytest.importorskip("trl")
    from alignment.merge import merge
    from alignment.plan import plan
    from alignment.train import train

    recipe = ranked_recipe("training.merge=true", "schedule.epochs=1")
    for stage in (plan, train, merge):
        stage(recipe)
    return recipe


@pytest.mark.slow
def test_kept_checkpoints_and_merged_weights(trained, capsys):
    (kept,) = (trained.run_folder() / "checkpoints").iterdir()
    files = ["checkpoint/adapter_model.safetensors", f"checkpoints/{kept.name}/adapter_model.safetensors", "log.jsonl"]
    merged = [f"merged/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")]
    assert_every_change_is_found(trained.run_folder(), [*files[1:], *merged], capsys)
    flip(trained.run_folder() / files[0], 9)  # it is an input of the merged weights, too
    assert verify(trained.run_folder()) == 2
    assert "checkpoint: a model, its weights changed" in capsys.readouterr().out


@pytest.mark.slow
def test_merged_weights_are_written_once(trained, capsys):
    """Another process at work is refused; what stands is looked at, and what an earlier version left is made again."""
    from alignment.merge import merge

    target = trained.run_folder() / "merged"
    written = (target / "model.safetensors").stat().st_mtime_ns
    with hold(trained.run_folder()), pytest.raises(InputError, match="another run is working in this folder"):
        merge(trained)
    merge(trained)
    assert "finished before" in capsys.readouterr().out
    assert (target / "model.safetensors").stat().st_mtime_ns == written
    (target / "manifest.json").unlink()
    (trained.run_folder() / ".merged.partial").mkdir()
    merge(trained)
    assert (target / "model.safetensors").stat().st_mtime_ns > written
    assert not (trained.run_folder() / ".merged.partial").exists() and verify(target) == 0
    flip(trained.run_folder() / "checkpoint" / "adapter_model.safetensors", -1)
    with pytest.raises(InputError, match=r"merged: the folder has results of other settings: checkpoint\.weights"):
        merge(trained)


@pytest.mark.slow
def test_held_out_figures(trained, capsys):
    from evaluation.margins import evaluate

    evaluate(trained)
    folder = trained.run_folder() / "evaluation"
    assert_every_change_is_found(folder, ["pairs.jsonl", "margins.json"], capsys)


def test_a_manifest_of_its_own_needs_no_claim(finished, tiny_recipe, capsys):
    """Figures that are made anew at each call stand in a folder with others."""
    path = finished / "figures.json"
    path.write_bytes(TEXT)
    write_manifest(finished / "figures.manifest.json", load_recipe(tiny_recipe), {}, [path], {})
    assert verify(finished) == 0
    assert f"{finished / 'figures'}: 2 checked, 0 wrong" in capsys.readouterr().out
    assert_every_change_is_found(finished, ["figures.json"], capsys)


@pytest.mark.parametrize("name", ["metrics.json", "win_rate.json", "judge/0123456789abcdef.jsonl"])
def test_figures_without_their_manifest_are_not_finished(finished, tiny_recipe, capsys, name):
    """A stage that nobody claims removes its manifest before it works: killed then, it is said."""
    path = finished / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(TEXT)
    assert verify(finished) == 0
    assert f"{path.with_suffix('')}: not finished" in capsys.readouterr().out
    write_manifest(path.with_suffix(".manifest.json"), load_recipe(tiny_recipe), {}, [path], {})
    assert verify(finished) == 0
    assert "not finished" not in capsys.readouterr().out


def test_the_program(finished, run_module):
    whole = run_module("tools.verify", finished)
    assert whole.returncode == 0 and "0 wrong" in whole.stdout
    flip(finished / "data.jsonl", 3)
    damaged = run_module("tools.verify", finished)
    assert damaged.returncode == 1 and "data.jsonl: has changed" in damaged.stdout and not damaged.stderr
    assert damaged.stdout.splitlines()[-1].startswith("1 wrong: this code did not change them; put the old files back")
