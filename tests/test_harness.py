"""lm-evaluation-harness loads what is written: the merged weights alone, and the adapter on its policy.

The harness is the real one, from pip's index, in an environment of its own below a temporary folder. That sees the
training environment's torch, transformers and PEFT, and gets the harness and whatever else it needs. This repository
cannot be imported there.

    python -m pytest tests/test_harness.py      # two minutes of one core; pip needs its index
"""

import json
import math
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DATA, REPOSITORY, tiny_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from alignment.merge import merge
from alignment.plan import plan
from alignment.train import train
from hps.chat import load_tokenizer, prompt_token_ids, response_token_ids
from pipeline.records import read_prompts

HARNESS = "lm_eval[hf]==0.4.13"
PAIRS = 6
# Nats, between float32 in the harness and float64 here. The training moves every response by a hundred times that.
ROUNDING = 1e-3


@pytest.fixture(scope="module")
def harness_python(tmp_path_factory) -> Path:
    """The interpreter of a new environment with the harness in it."""
    folder = tmp_path_factory.mktemp("harness") / "venv"
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    (packages,) = folder.glob("lib/python3*/site-packages")
    # pip takes what this path has as installed and cannot change it: to pip it is outside of the environment.
    (packages / "training.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [python, "-I", "-m", "pip", "install", "--quiet", HARNESS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return python


def preferences() -> list[dict]:
    return [record for _, record in read_prompts(DATA / "safety_test.jsonl", PAIRS)]


@pytest.fixture
def task(tmp_path) -> Path:
    """A folder with the task `pairs`: which of two responses is more probable, the preferred one being right.

    The preferred response is the second in every other question, so a harness that mixed up the two would be found.
    """
    folder = tmp_path / "task"
    folder.mkdir()
    lines = []
    for number, record in enumerate(preferences()):
        (turn,) = record["prompt"]
        best = number % 2
        choices = record["responses"][::-1] if best else record["responses"]
        lines.append({"question": turn["content"], "choices": choices, "best": best})
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    definition = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "best",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "pairs.yaml").write_text(yaml.safe_dump(definition))
    return folder


def harness(python: Path, task: Path, name: str, model: str) -> tuple[float, list[dict]]:
    """Accuracy and logged samples of the harness for a model, offline (tests/conftest.py)."""
    output = task.parent / name
    command = [python, "-I", "-m", "lm_eval", "run", "--model", "hf", "--model_args", model]
    command += ["--tasks", "pairs", "--include_path", task, "--apply_chat_template", "--device", "cpu"]
    command += ["--log_samples", "--output_path", output]
    environment = os.environ | {"HF_HOME": str(task.parent / "cache")}
    done = subprocess.run(
        [*map(str, command)], cwd=task.parent, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_pairs_*.jsonl")
    accuracy = json.loads(results.read_text())["results"]["pairs"]["acc,none"]
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return accuracy, sorted(lines, key=lambda line: line["doc_id"])


def by_hand(folder: Path, tokenizer) -> list[list[float]]:
    """For each pair the log-probabilities of both responses, in nats, in float64.

    The harness counts white space at the end of a prompt as part of the answer, so the line break that ends the
    assistant's header is in both. The end of the turn is in neither.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for record in preferences():
        prompt = prompt_token_ids(tokenizer, record["prompt"])
        assert tokenizer.decode(prompt[-1:]) == "\n"
        pair = []
        for response in record["responses"]:
            ids = torch.tensor([prompt + response_token_ids(tokenizer, record["prompt"], response, truncated=True)])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(dim=-1)
            picked = logps.gather(1, ids[0, 1:, None])[:, 0]
            pair.append(picked[len(prompt) - 2 :].sum().item())
        found.append(pair)
    return found


@pytest.mark.full
def test_the_harness_loads_merged_weights_and_adapter(harness_python, task, ranked_recipe, tmp_path):
    """Before and after training its log-probabilities are those by hand, with the embedded model's template."""
    policy = tmp_path / "policy"
    tokenizer = load_tokenizer(str(REPOSITORY / "models" / "smollm2-135m-instruct"))
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    recipe = ranked_recipe(f"models.policy.path={policy}", "training.merge=true")
    for stage in (plan, train, merge):
        stage(recipe)
    run = recipe.run_folder()

    prompts = [tokenizer.decode(prompt_token_ids(tokenizer, record["prompt"])) for record in preferences()]
    before, after = by_hand(policy, tokenizer), by_hand(run / "merged", tokenizer)
    moved = [abs(b - a) for old, new in zip(before, after, strict=True) for b, a in zip(old, new, strict=True)]
    assert min(moved) > 100 * ROUNDING
    for name, model, expected in (
        ("before", f"pretrained={policy}", before),
        ("merged", f"pretrained={run / 'merged'}", after),
        ("adapter", f"pretrained={policy},peft={run / 'checkpoint'}", after),
    ):
        accuracy, samples = harness(harness_python, task, name, model)
        assert [line["arguments"]["gen_args_0"]["arg_0"] for line in samples] == prompts, name
        logged = [[float(value) for value, _ in line["filtered_resps"]] for line in samples]
        in_order = [pair[::-1] if number % 2 else pair for number, pair in enumerate(logged)]
        apart = [abs(b - a) for old, new in zip(expected, in_order, strict=True) for b, a in zip(old, new, strict=True)]
        print(f"{name}: accuracy {accuracy:.3f}, at most {max(apart):.1e} nats apart; moved {min(moved):.3f} or more")
        assert max(apart) < ROUNDING, name
        assert math.isclose(accuracy, sum(best > other for best, other in expected) / PAIRS), name
