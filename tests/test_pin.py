"""Pinning and prefetching of hub models, and that every recipe of the repository loads.

The hub is a double at the library's boundary (`HfApi.model_info`, `snapshot_download`): there is no network in tests,
and refusals of the hub (restricted, unknown, unreachable) cannot be produced otherwise.
"""

import json
import types
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from conftest import REPOSITORY
from huggingface_hub import errors

from hps.errors import InputError
from pipeline.hub import write_revisions
from pipeline.recipe import load_recipe
from tools import pin, prefetch

RECIPES = [REPOSITORY / "configs" / f"{name}.yaml" for name in ("quickstart", "hh_rlhf", "pku_safe")]
A, B, C = "a" * 40, "b" * 40, "1" * 40
HUB = {("org/gen", None): A, ("org/pol", "v1"): B, ("org/pol", None): B, ("org/rew", None): C, ("org/gen", "main"): A}
REST = "data: {train: {path: t, responses: 1}, test: {path: t, responses: 1}}\n"

FLOW = """# head
output: runs/x   # kept
models:
  generator: {path: org/gen}  # the generator
  policy: {path: "org/pol", revision: v1}
  reward: { path: org/rew , revision: null }
"""
FLOW_PINNED = f"""# head
output: runs/x   # kept
models:
  generator: {{revision: "{A}", path: org/gen}}  # the generator
  policy: {{path: "org/pol", revision: "{B}"}}
  reward: {{ path: org/rew , revision: "{C}" }}
"""
BLOCK = """output: runs/x
models:
  generator:
    path: org/gen   # newest

  policy:
    revision:   # open
    path: 'org/pol'
  reward:
      # deeper
      path: >-
        org/rew
"""
BLOCK_PINNED = f"""output: runs/x
models:
  generator:
    revision: "{A}"
    path: org/gen   # newest

  policy:
    revision: "{B}"   # open
    path: 'org/pol'
  reward:
      # deeper
      revision: "{C}"
      path: >-
        org/rew
"""


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub"))


@pytest.fixture
def hub(monkeypatch):
    """The double; returns the calls made. Unknown names and revisions are refused as the hub refuses them."""
    calls = []

    def model_info(self, repo_id, *, revision=None, **_):
        calls.append((repo_id, revision))
        if all(name != repo_id for name, _ in HUB):
            raise errors.RepositoryNotFoundError("404 Client Error.\nsecond line", response=response(404))
        if (repo_id, revision) not in HUB:
            raise errors.RevisionNotFoundError("404 Client Error.", response=response(404))
        return types.SimpleNamespace(sha=HUB[repo_id, revision])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return calls


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes((text + REST).encode())
        return path

    return write


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_repository_loads(path):
    recipe = load_recipe(path)
    assert recipe.generation.max_prompt_tokens < recipe.schedule.max_length


@pytest.mark.parametrize("name", ["hh_rlhf", "pku_safe"])
def test_settings_of_the_paper(name):
    recipe = load_recipe(REPOSITORY / "configs" / f"{name}.yaml")
    assert (recipe.lora.r, recipe.lora.alpha, recipe.loss.beta, recipe.optimizer.learning_rate) == (8, 16, 0.1, 5e-7)
    assert (recipe.schedule.global_batch, recipe.schedule.device_batch, recipe.schedule.epochs) == (64, 1, 2)
    assert (recipe.data.train.responses, recipe.data.test.responses, recipe.generation.temperature) == (100, 5, 0.9)
    assert (recipe.loss.preference, recipe.loss.factor_n, recipe.schedule.gamma_stages) == ("hps", False, 5)
    assert (REPOSITORY / recipe.training.deepspeed).exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_files_leave_the_trainer_its_settings_and_do_not_offload(stage):
    settings = json.loads((REPOSITORY / f"configs/deepspeed/zero{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["bf16"] == {"enabled": "auto"} and settings["gradient_clipping"] == "auto"
    assert "offload" not in json.dumps(settings)
    # DeepSpeed derives it; given, ZeRO-3 on a CPU checks it before the processes know of each other and fails.
    assert "train_batch_size" not in settings


@pytest.mark.parametrize(("before", "after"), [(FLOW, FLOW_PINNED), (BLOCK, BLOCK_PINNED)], ids=["flow", "block"])
def test_only_the_revisions_change(before, after, hub, recipe_file, capsys):
    path = recipe_file(before)
    pin.pin(str(path))
    assert path.read_bytes().decode() == after + REST
    models = load_recipe(path).models
    assert (models.generator.revision, models.policy.revision, models.reward.revision) == (A, B, C)
    assert f"generator: org/gen, newest -> {A}" in capsys.readouterr().out
    hub.clear()
    pin.pin(str(path))  # pinned: left alone, the hub is not asked
    assert hub == [] and path.read_bytes().decode() == after + REST


def test_a_recipe_that_names_no_models_is_left_alone(hub, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text := "output: runs/x\n" + REST)
    pin.pin(str(path))
    assert path.read_text() == text and hub == []
    assert capsys.readouterr().out.count("a default; write it into the recipe to pin it") == 4


def test_line_ends_and_a_missing_last_newline_are_kept(hub, tmp_path):
    text = "output: x\n" + REST + "models:\n  generator: {path: org/gen}\n  policy:\n    path: org/pol\n"
    text = (text + "  reward:\n    path: org/rew").replace("\n", "\r\n")
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode())
    pin.pin(str(path))
    written = path.read_bytes().decode()
    assert written.count("\r\n") == written.count("\n") == text.count("\n") + 2
    assert [line for line in written.splitlines() if "revision" not in line] == [
        line for line in text.splitlines() if "{path: org/gen}" not in line
    ]


def test_one_model_in_several_roles_is_asked_once_and_an_alias_is_edited_once(hub, recipe_file):
    text = "output: x\nmodels:\n  generator: &m {path: org/gen}\n  policy: *m\n  reward: {path: org/gen}\n"
    path = recipe_file(text)
    pin.pin(str(path))
    assert hub == [("org/gen", None)]
    assert path.read_text().count(A) == 2
    assert load_recipe(path).models.policy.revision == A


def test_merge_keys_are_pinned(hub, recipe_file):
    text = "output: x\nmodels:\n  generator: &m {path: org/gen}\n  policy: {<<: *m}\n  reward: {path: org/rew}\n"
    path = recipe_file(text)
    pin.pin(str(path))
    pinned = text.replace("{path: org/gen}", f'{{revision: "{A}", path: org/gen}}')
    pinned = pinned.replace("{<<: *m}", f'{{revision: "{A}", <<: *m}}')
    assert path.read_text() == pinned.replace("{path: org/rew}", f'{{revision: "{C}", path: org/rew}}') + REST


def test_what_cannot_be_edited_is_refused_and_nothing_is_written(tmp_path):
    """The models come by a merge key."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text := "base: &m {policy: {path: org/pol}}\nmodels: {<<: *m}\n")
    with pytest.raises(InputError, match="recipe.yaml: one of `models.policy` is written in a way that cannot be edit"):
        write_revisions(path, {("models", "policy"): A})
    assert path.read_text() == text


def test_local_folders_are_left_alone(hub, recipe_file, tiny_model, capsys):
    text = f"output: x\nmodels:\n  generator: {{path: {tiny_model}}}\n  policy: {{path: {tiny_model}}}\n"
    path = recipe_file(text + f"  reward: {{path: {tiny_model}}}\n")
    before = path.read_bytes()
    pin.pin(str(path))
    assert path.read_bytes() == before and hub == []
    assert capsys.readouterr().out.count("a local folder, left alone") == 3


def offline(*_, **__):
    raise errors.OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.")


def gated(*_, **__):
    raise errors.GatedRepoError("403", response=response(403))


def unreachable(*_, **__):
    raise httpx2.ConnectError("[Errno -2] Name or service not known")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            offline,
            "HF_HUB_OFFLINE is set; run it where there is a network, without HF_HUB_OFFLINE",
        ),
        (gated, "access is restricted"),
        (unreachable, "Name or service not known; try again when the hub can be reached"),
    ],
)
def test_refusals_are_one_line_and_nothing_is_written(fault, message, hub, recipe_file, monkeypatch):
    path = recipe_file(FLOW)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fault)
    with pytest.raises(InputError, match=message) as caught:
        pin.pin(str(path))
    assert str(caught.value).startswith("`models.generator` (org/gen): ")
    assert path.read_text() == FLOW + REST


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("org/rew", "org/none", r"`models.reward` \(org/none\): the hub has no such model"),
        ("v1", "v9", r"`models.policy` \(org/pol, revision v9\): the hub has no such revision"),
    ],
)
def test_unknown_names_write_nothing(old, new, message, hub, recipe_file):
    path = recipe_file(FLOW.replace(old, new))
    before = path.read_bytes()
    with pytest.raises(InputError, match=message):
        pin.pin(str(path))
    assert path.read_bytes() == before


def test_a_link_to_a_recipe_stays_a_link(hub, recipe_file, tmp_path):
    link = tmp_path / "link.yaml"
    link.symlink_to(recipe_file(FLOW))
    pin.pin(str(link))
    assert link.is_symlink() and A in link.read_text()


@pytest.mark.slow
def test_the_command_honours_offline_mode(run_module, recipe_file):
    import os

    path = recipe_file(FLOW)
    result = run_module("tools.pin", path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "without HF_HUB_OFFLINE" in result.stderr
    assert path.read_text() == FLOW + REST


@pytest.fixture
def snapshots(monkeypatch, tmp_path):
    """snapshot_download's double: makes a folder with the files of the repository that the patterns let through."""
    from huggingface_hub.utils import filter_repo_objects

    calls = []
    files = {
        "org/gen": ["model.safetensors", "config.json", "tokenizer.model", "merges.txt", "pytorch_model.bin", "x.pth"],
        "org/pol": ["model.safetensors", "config.json", "chat_template.jinja", "training_args.bin", "README.md"],
        "org/rew": ["pytorch_model.bin", "config.json"],
    }

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        calls.append((repo_id, revision))
        folder = tmp_path / repo_id.replace("/", "--")
        folder.mkdir(exist_ok=True)
        for name in filter_repo_objects(files[repo_id], allow_patterns=allow_patterns):
            (folder / name).write_bytes(b"x" * 1000)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_prefetch_takes_pinned_revisions_and_no_pickles(snapshots, recipe_file, tmp_path, capsys):
    text = f"output: x\nmodels:\n  generator: {{path: org/gen, revision: {A}}}\n  policy: {{path: org/pol}}\n"
    text += f"  evaluator: {{path: org/gen, revision: {A}}}\n"
    recipe = load_recipe(recipe_file(text + f"  reward: {{path: org/gen, revision: {A}}}\n"))
    prefetch.prefetch(recipe, "recipe.yaml")
    assert snapshots == [("org/gen", A), ("org/pol", None)]  # one model in three roles is fetched once
    fetched = {path.name for folder in tmp_path.glob("org--*") for path in folder.iterdir()}
    assert fetched == {"model.safetensors", "config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"}
    assert prefetch.size(tmp_path / "org--gen") == 4000
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "warning" in line] == [
        "prefetch: warning: policy: the revision of org/pol is open, a later download may differ; "
        "`python -m tools.pin recipe.yaml` writes it into the recipe"
    ]
    assert "HF_HUB_OFFLINE=1" in lines[-1]


def test_prefetch_refuses_a_model_without_safetensors(snapshots, recipe_file):
    text = "output: x\nmodels: {generator: {path: org/gen}, policy: {path: org/gen}, reward: {path: org/rew}}\n"
    with pytest.raises(InputError, match=r"`models.reward` \(org/rew\): the repository has no weights as safetensors"):
        prefetch.prefetch(load_recipe(recipe_file(text)), "recipe.yaml")


def test_prefetch_reports_local_folders(snapshots, recipe_file, tiny_model, capsys):
    roles = ("generator", "policy", "reward", "evaluator", "judge")
    models = ", ".join(f"{role}: {{path: {tiny_model}}}" for role in roles)
    path = recipe_file(f"output: x\nmodels: {{{models}}}\n")
    prefetch.prefetch(load_recipe(path), "recipe.yaml")
    assert snapshots == [] and capsys.readouterr().out.count("is a local folder") == 4
    prefetch.prefetch(load_recipe(path, ["judge.enabled=true"]), "recipe.yaml")  # the judge only where it is asked for
    assert snapshots == [] and capsys.readouterr().out.count("is a local folder") == 5


def test_a_default_that_the_recipe_does_not_name_is_left_open(hub, recipe_file, capsys):
    """FLOW names three models: the evaluator stays the default, and pin says so."""
    path = recipe_file(FLOW)
    pin.pin(str(path))
    assert path.read_text().startswith(FLOW_PINNED)
    assert "pin: evaluator: RLHFlow/ArmoRM-Llama3-8B-v0.1, a default; write it" in capsys.readouterr().out
