"""tools/verify.py and the fingerprints of the manifest: one flipped byte is named, everything that differs is found."""

import json
import random
import shutil

import pytest

from hps.errors import InputError
from pipeline.files import file_hash
from pipeline.identity import model_hash
from pipeline.recipe import Model, load_recipe
from pipeline.stage import claim, fingerprint, finish, hold, write_manifest
from tools.verify import difference, verify

TEXT = b'{"a": 1}\n{"b": 22}\n{"c": 333}\n'


def test_sums_by_hand(tmp_path):
    """Bytes 3, 0, 5: 3 + 0 + 5 = 8; 1 * 3 + 2 * 0 + 3 * 5 = 18."""
    path = tmp_path / "file"
    path.write_bytes(bytes([3, 0, 5]))
    found = fingerprint(path)
    assert found == {"sha256": file_hash(path), "bytes": 3, "sums": [8, 18]}
    path.write_bytes(b"")
    assert fingerprint(path) == {"sha256": file_hash(path), "bytes": 0, "sums": [0, 0]}


def test_sums_go_on_over_blocks(tmp_path):
    """Three MiB and a bit, against a plain loop over the bytes that are not zero."""
    content, rng = bytearray(3 * (1 << 20) + 77), random.Random(0)
    places = rng.sample(range(len(content)), 500)
    for place in places:
        content[place] = rng.randrange(1, 256)
    (tmp_path / "file").write_bytes(content)
    expected = [sum(content[place] for place in places), sum(content[place] * (place + 1) for place in places)]
    assert fingerprint(tmp_path / "file")["sums"] == expected


@pytest.mark.parametrize("size", [30, (2 << 20) + 5])
def test_every_flipped_byte_is_named(tmp_path, size):
    path, rng = tmp_path / "file", random.Random(size)
    content = bytearray((TEXT * (size // len(TEXT) + 1))[:size])
    path.write_bytes(content)
    expected = fingerprint(path)
    assert difference(path, expected) is None
    places = range(size) if size < 100 else [0, (1 << 20) - 1, 1 << 20, size - 1, *rng.sample(range(size), 5)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        line = content[:place].count(b"\n") + 1
        assert difference(path, expected) == (
            f"byte {place + 1} (line {line}) was 0x{content[place]:02x} and is 0x{changed[place]:02x}; "
            "every other byte is as it was"
        )


def test_more_damage_is_not_taken_for_one_byte(tmp_path):
    """Two bytes swapped, two changed so that the sums point at a third place, one byte less."""
    path = tmp_path / "file"
    path.write_bytes(TEXT)
    expected = fingerprint(path)
    swapped, moved = bytearray(TEXT), bytearray(TEXT)
    swapped[1], swapped[2] = swapped[2], swapped[1]
    moved[10] += 1
    moved[14] += 1
    for changed in (swapped, moved):
        path.write_bytes(changed)
        assert difference(path, expected) == "differs in more than one byte"
    path.write_bytes(TEXT[:-1])
    assert difference(path, expected) == f"has {len(TEXT) - 1} bytes, had {len(TEXT)}"


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
    finish(folder, load_recipe(tiny_recipe), settings, outputs, [given])
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
        ("data.jsonl", "data.jsonl: byte 13 (line 2) was 0x22 and is 0x23"),
        ("deep/weights", "deep/weights: byte 13 (line 2)"),
        ("../../given.jsonl", "an input, byte 13 (line 2)"),
        ("../../model/model.safetensors", "a model, weights differ"),
        ("../../model/tokenizer.json", "a model, tokenizer differ"),
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
    assert "data.jsonl: is not there" in printed
    assert "given.jsonl: an input, is not there" in printed and "model: a model, is not there" in printed


@pytest.mark.parametrize("text", ["", "[]", '{"sha256": 1}', '{"sha256": "0", "settings": [], "inputs": {}}', "\x00"])
def test_a_damaged_manifest_is_one_line(finished, capsys, text):
    (finished / "manifest.json").write_text(text)
    assert verify(finished) == 1
    assert "manifest.json: no readable manifest" in capsys.readouterr().out


@pytest.mark.parametrize("text", [json.dumps({"other": 1}), "{"])
def test_a_changed_claim(finished, capsys, text):
    (finished / "claim.json").write_text(text)
    assert verify(finished) == 1
    assert "claim.json: is not what the manifest says" in capsys.readouterr().out


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
        finish(folder, load_recipe(tiny_recipe), {"data": file_hash(given)}, [], [given])
    assert not (folder / "manifest.json").exists()


def assert_every_flip_is_named(stage, files: list[str], capsys) -> None:
    """Flip the tenth byte of each file below a folder, look, and put it back."""
    for name in files:
        path = stage / name
        whole = path.read_bytes()
        flip(path, 9)
        assert verify(stage) == 1, name
        assert f"WRONG  {path}: byte 10 (line " in capsys.readouterr().out
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
    assert_every_flip_is_named(trained.run_folder(), [*files[1:], *merged], capsys)
    flip(trained.run_folder() / files[0], 9)  # it is an input of the merged weights, too
    assert verify(trained.run_folder()) == 2
    assert "checkpoint: a model, weights differ" in capsys.readouterr().out


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
    with pytest.raises(InputError, match=r"merged: the folder holds results of other settings: checkpoint\.weights"):
        merge(trained)


@pytest.mark.slow
def test_held_out_figures(trained, capsys):
    from evaluation.margins import evaluate

    evaluate(trained)
    folder = trained.run_folder() / "evaluation"
    assert_every_flip_is_named(folder, ["pairs.jsonl", "answers.jsonl", "margins.json"], capsys)


def test_a_manifest_of_its_own_needs_no_claim(finished, tiny_recipe, capsys):
    """Figures that are made anew at each call stand in a folder with others."""
    path = finished / "figures.json"
    path.write_bytes(TEXT)
    write_manifest(finished / "figures.manifest.json", load_recipe(tiny_recipe), {}, [path], {})
    assert verify(finished) == 0
    assert f"{finished / 'figures'}: 2 checked, 0 wrong" in capsys.readouterr().out
    assert_every_flip_is_named(finished, ["figures.json"], capsys)


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
    assert damaged.returncode == 1 and "byte 4 (line 1)" in damaged.stdout and not damaged.stderr
