"""Canaries: a reward model that scores otherwise than before stops before the run, and the message says why."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from annotation.annotate import annotate
from annotation.canary import CANARIES, canary_folder, check_canaries, record_path
from annotation.reward_model import RewardModel
from hps.errors import InputError
from pipeline.files import write_json
from pipeline.identity import model_hash
from pipeline.recipe import Model, load_recipe
from pipeline.stage import versions


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A tiny model gains nothing from more, and is many times slower with them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tiny_reward, tmp_path) -> Model:
    """A copy of the tiny reward model, to be changed."""
    return Model(path=str(shutil.copytree(tiny_reward, tmp_path / "models" / "reward")))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "canaries"


def check(model: Model, folder) -> None:
    check_canaries(RewardModel(model, "float32"), folder, model)


def recorded(folder):
    (path,) = folder.iterdir()
    return path


def change_record(path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    write_json(path, record)


def refused(model: Model, folder) -> str:
    with pytest.raises(InputError) as caught:
        check(model, folder)
    return str(caught.value)


# ---- what is recorded ----


def test_the_first_run_records_and_the_second_passes(model, folder):
    check(model, folder)
    path = recorded(folder)
    text = path.read_text()
    record = json.loads(text)
    assert path.name.endswith(".json")
    assert "models-reward-" in path.name
    assert record["model"] == {"path": model.path, "revision": None, "dtype": "float32", "device": "cpu"}
    assert (record["hash"], record["versions"]) == (model_hash(model), versions())
    assert list(record["canaries"]) == list(CANARIES)
    reward = RewardModel(model, "float32")
    for name, (messages, response) in CANARIES.items():
        assert record["canaries"][name]["score"] == pytest.approx(reward.score(messages, [response], [False])[0])
    assert len({line["tokens"] for line in record["canaries"].values()}) == len(CANARIES)
    check(model, folder)
    assert path.read_text() == text


def test_records_differ_by_revision_and_dtype(model, folder):
    float32, bfloat16 = (RewardModel(model, dtype) for dtype in ("float32", "bfloat16"))
    paths = {
        record_path(float32, folder, model),
        record_path(bfloat16, folder, model),
        record_path(float32, folder, Model(path=model.path, revision="main")),
        record_path(float32, folder, Model(path=model.path + "2")),
    }
    assert len(paths) == 4
    long = record_path(float32, folder, Model(path="/a" * 500))
    assert len(long.name) < 100


# ---- what is found ----


def test_another_chat_template_is_found(model, folder):
    check(model, folder)
    path = recorded(folder)
    template = f"{model.path}/chat_template.jinja"
    with open(template) as file:
        text = file.read()
    with open(template, "w") as file:
        file.write("{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}" + text)
    message = refused(model, folder)
    assert message.startswith(f"{path}: the reward model {model.path} scores the canary 'one turn' ")
    before = json.loads(path.read_text())["canaries"]["one turn"]["score"]
    assert f"recorded is {before:.6g}; its token ids changed: the chat template or the tokenizer" in message
    assert message.endswith("if you meant the change, delete the named file; else undo it")
    path.unlink()
    check(model, folder)
    check(model, folder)


def test_other_weights_are_found(model, folder):
    check(model, folder)
    network = AutoModelForSequenceClassification.from_pretrained(model.path)
    network.score.weight.data *= 1.1
    network.save_pretrained(model.path)
    assert "its token ids did not change, the model's files did" in refused(model, folder)


def test_other_versions_are_found(model, folder):
    """Same tokens, same files, another score: what is left is the software."""
    check(model, folder)

    def older(record):
        record["canaries"]["several turns"]["score"] += 1
        record["versions"]["torch"] = "1.0"

    change_record(recorded(folder), older)
    message = refused(model, folder)
    assert "scores the canary 'several turns' " in message
    assert f"neither its token ids nor the model's files changed; versions: torch was 1.0, is {torch.__version__}" in (
        message
    )


def test_changed_token_ids_are_refused_at_equal_scores(model, folder):
    """A template may change what this model does not see in these conversations."""
    check(model, folder)
    change_record(recorded(folder), lambda record: record["canaries"]["German, emoji"].update(tokens="0" * 64))
    message = refused(model, folder)
    assert "the canary 'German, emoji' " in message
    assert "its token ids changed" in message


@pytest.mark.parametrize(("times", "passes"), [(0.5, True), (2, False)])
def test_the_tolerance_of_float32(model, folder, times, passes):
    """1e-3 of the score's size, and of 1 for smaller ones."""
    check(model, folder)

    def shift(record):
        line = record["canaries"]["one turn"]
        line["score"] += times * 1e-3 * max(1, abs(line["score"]))

    change_record(recorded(folder), shift)
    if passes:
        check(model, folder)
    else:
        assert "the canary 'one turn' " in refused(model, folder)


def drops_a_canary(record):
    del record["canaries"]["one turn"]


def words_for_a_score(record):
    record["canaries"]["one turn"]["score"] = "high"


@pytest.mark.parametrize("fault", ["", "{", "[]", "null", '{"canaries": 1}', drops_a_canary, words_for_a_score])
def test_a_corrupt_record_is_refused(model, folder, fault):
    check(model, folder)
    path = recorded(folder)
    if isinstance(fault, str):
        path.write_text(fault)
    else:
        change_record(path, fault)
    message = refused(model, folder)
    assert message.startswith(str(path)) and message.endswith("delete the file; the next run records the scores again")


def test_a_folder_that_cannot_be_made(model, folder):
    folder.parent.mkdir()
    folder.write_text("a file")
    with pytest.raises(InputError, match="cannot make or write the folder"):
        check(model, folder)


# ---- the ranking looks at them ----


def candidates(recipe) -> None:
    record = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "responses": ["Hello.", "No."],
        "sources": ["generated"] * 2,
        "token_counts": [1, 1],
        "truncated": [False] * 2,
    }
    for split in ("train", "test"):
        recipe.candidates(split).parent.mkdir(parents=True, exist_ok=True)
        recipe.candidates(split).write_text(json.dumps(record) + "\n")
    write_json(recipe.candidates("train").parent / "manifest.json", {})


def test_the_ranking_records_them_beside_its_output(tiny_recipe):
    recipe = load_recipe(tiny_recipe)
    candidates(recipe)
    annotate(recipe)
    path = recorded(tiny_recipe.parent / "canaries")
    assert path.parent == canary_folder(recipe)
    assert json.loads(path.read_text())["model"]["path"] == recipe.models.reward.path


@pytest.mark.slow
def test_another_score_ends_the_ranking_in_one_line(tiny_recipe, run_module):
    recipe = load_recipe(tiny_recipe)
    candidates(recipe)
    annotate(recipe)
    path = recorded(canary_folder(recipe))
    change_record(path, lambda record: record["canaries"]["one turn"].update(score=99.0))
    override = f"output={tiny_recipe.parent / 'other'}"
    candidates(load_recipe(tiny_recipe, [override]))
    done = run_module("annotation.annotate", tiny_recipe, override)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {path}: the reward model ")
    assert "Traceback" not in done.stderr
