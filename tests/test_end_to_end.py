"""Both scripts from beginning to end: tiny models with random weights, the real engine, the real trainer."""

import json
import os
import random
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import REPOSITORY, write_tiny_recipe
from safetensors.numpy import load_file

from evaluation import matrix, reproduce, tables
from pipeline.records import read_answers, read_candidates, read_jsonl, read_ranked
from tools.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.train]

LOAD_IN_VLLM = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
merged, base, adapter, prompt = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
def answer(path, lora=None, **extra):
    engine = LLM(path, dtype="float32", enforce_eager=True, max_model_len=256, kv_cache_memory_bytes=2**28, **extra)
    return list(engine.generate({"prompt_token_ids": prompt}, greedy, lora_request=lora)[0].outputs[0].token_ids)
print(json.dumps([answer(merged), answer(base, LoRARequest("hps", 1, adapter), enable_lora=True, max_lora_rank=8)]))
"""


def script(name: str, *arguments) -> subprocess.CompletedProcess:
    command = ["bash", name, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, tiny_reward):
    """Recipe and output folder of one run of the three scripts."""
    folder = tmp_path_factory.mktemp("end-to-end")
    recipe = write_tiny_recipe(folder, tiny_model, tiny_reward)
    for name in ("gene.sh", "run.sh", "evaluate.sh"):
        done = script(name, recipe, "training.merge=true")
        assert done.returncode == 0, done.stdout + done.stderr
    return recipe, folder / "runs"


def test_every_prompt_is_ranked(finished):
    _, output = finished
    for split, prompts, most in (("train", 8, 6), ("test", 4, 4)):
        records = [record for _, record in read_ranked(output / "ranked" / f"{split}.jsonl")]
        assert len({record["prompt_id"] for record in records}) == prompts
        for record in records:
            assert {"given_1", "given_2"} <= set(record["sources"])
            assert 2 <= len(record["responses"]) <= most
    assert json.loads((output / "candidates" / "manifest.json").read_text())["versions"]["transformers"]


def test_training_left_its_files(finished):
    _, output = finished
    run = output / "dpo-hps"
    for name in ("plan.jsonl", "plan.json", "log.jsonl", "manifest.json"):
        assert (run / name).stat().st_size > 0, name
    plan = [row for _, row in read_jsonl(run / "plan.jsonl")]
    log = [line for _, line in read_jsonl(run / "log.jsonl")]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert [line["gamma"] for line in log] == [-5.0, -5.0, 5.0, 5.0]
    assert len(plan) == 16 and {row["step"] for row in plan} == {0, 1, 2, 3}
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["recipe"]["seed"] == 7 and "checkpoint/adapter_model.safetensors" in manifest["outputs"]


def test_held_out_figures(finished):
    _, output = finished
    metrics = json.loads((output / "dpo-hps" / "evaluation" / "margins.json").read_text())
    for name, most in (("written", 4), ("ranked", 4)):
        figures = metrics["sets"][name]
        assert 1 <= figures["pairs"] <= most
        low, high = figures["rm_dpo"]["interval"]
        assert low <= figures["rm_dpo"]["mean"] <= high
        assert 0 <= figures["accuracy_per_token_after"]["mean"] <= 1


def test_evaluation(finished):
    """Answers, rewards, divergence and margins of every test prompt, of the run and of the model before training."""
    _, output = finished
    metrics = json.loads((output / "dpo-hps" / "metrics.json").read_text())
    before = json.loads((output / "sft" / "metrics.json").read_text())
    assert metrics["prompts"] == before["prompts"] == 4 and metrics["samples"] == 3
    figures = metrics["figures"]
    assert figures["kl_sampled"]["mean"] > 1e-3 and "kl_sampled" not in before["figures"]
    change = figures["reward_best"]["mean"] - before["figures"]["reward_best"]["mean"]
    assert figures["reward_best_change"]["mean"] == pytest.approx(change, abs=1e-3)
    assert figures["bleu_best"]["mean"] >= figures["bleu_mean"]["mean"] >= 0
    assert [point["step"] for point in metrics["sets"]["written"]["along"]] == [2]
    answers = [record for _, record in read_answers(output / "dpo-hps" / "answers" / "test.jsonl")]
    assert len(answers) == 4 and {len(record["responses"]) for record in answers} == {3}


@pytest.mark.full
def test_a_table_of_two_runs(tmp_path, tiny_model, tiny_reward, monkeypatch):
    """reproduce.sh's own work on two runs: one ranking, one engine, results with every answer, and the table.

    The true reward ranks and evaluates, as on the testbed; what else the table shows is tested elsewhere.
    """
    path = write_tiny_recipe(tmp_path, tiny_model, tiny_reward)
    truth = "  {role}: {{function: sentiment}}"
    text = path.read_text().replace("samples: 3", "samples: 3, samples_along: 2")
    for role in ("reward", "evaluator"):
        text = text.replace(f"  {role}: {{path: {tiny_reward}}}", truth.format(role=role))
    path.write_text(text)
    scale = os.path.relpath(tmp_path / "results", REPOSITORY / "results")
    grids = [{"tables": [2], "data": ["pku_safe"], "values": {"loss.preference": ["bt", "hps"]}}]
    tiny = {"recipes": {"pku_safe": str(path)}, "grids": grids}
    for module in (reproduce, tables):
        monkeypatch.setattr(module, "load_matrix", lambda name: tiny)
    monkeypatch.setattr(matrix, "all_runs", lambda name: matrix.expand(tiny))
    assert reproduce.reproduce("2", scale, None) == 0
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results/runs/pku_safe").glob("*.json")}
    assert found.keys() == {"sft", "dpo-bt", "dpo-hps"}
    names = found["sft"]["answers"]["final"]["prompt_id"]
    for run in ("dpo-bt", "dpo-hps"):
        answers = found[run]["answers"]
        assert list(answers) == ["2", "final"]
        for point, count in (("2", 2), ("final", 3)):
            columns = answers[point]
            assert columns["prompt_id"] == names and len(names) == 4
            for name in ("reward", "tokens", "repetition", "kl"):
                assert [len(row) for row in columns[name]] == [count] * 4
            assert min(value for row in columns["kl"] for value in row) >= 0
            assert max(value for row in columns["kl"] for value in row) > 1e-3
        means = [np.mean(columns["kl"]) for columns in answers.values()]
        metrics = json.loads((tmp_path / "runs" / run / "metrics.json").read_text())
        assert metrics["figures"]["kl_sampled"]["mean"] == pytest.approx(means[1], rel=1e-3)
        assert metrics["along"][0]["kl"]["mean"] == pytest.approx(means[0], rel=1e-3)
    assert found["dpo-bt"]["answers"] != found["dpo-hps"]["answers"]
    (part,) = json.loads((tmp_path / "results" / "table2.json").read_text())["parts"]
    (compared,) = part["compared"]
    assert compared["label"] == "DPO-HPS minus DPO-BT" and compared["at_kl"]["change"]["verdict"] == "one seed"
    for row in part["rows"][1:]:
        answers = found[row["label"].lower()]["answers"]
        for point in row["along"]:
            assert point["kl"]["mean"] == pytest.approx(np.mean(answers[point["point"]]["kl"]), abs=1e-4)
    assert all((tmp_path / "results" / f"table2.{suffix}").stat().st_size for suffix in ("md", "tex", "png", "html"))
    assert len(list((tmp_path / "runs" / "logs").glob("answers.log"))) == 1
    assert verify(tmp_path / "runs") == 0


@pytest.mark.full
def test_two_rounds(tmp_path, tiny_model, tiny_reward):
    """The second round samples from the first one's policy, keeps its candidates, trains on, and is measured from the
    model before training, which answers once. A finished round starts no driver; one that lacks its end goes on."""
    recipe = write_tiny_recipe(tmp_path, tiny_model, tiny_reward)
    settings = ["schedule.rounds=2", "schedule.round_candidates=all", "schedule.round_reference=previous"]
    output, first = tmp_path / "runs", tmp_path / "runs" / "dpo-hps"
    second = first / "round-2"
    done = script("rounds.sh", recipe, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("rounds:")] == [
        "rounds: round 1",
        "rounds: round 2",
    ]
    for split, prompts in (("train", 8), ("test", 4)):
        before, after = (
            {record["prompt_id"]: record["responses"] for _, record in read_candidates(folder / f"{split}.jsonl")}
            for folder in (output / "candidates", second / "candidates")
        )
        assert before.keys() == after.keys() and len(after) == prompts
        assert all(after[name][: len(texts)] == texts for name, texts in before.items())
        assert sum(map(len, after.values())) > sum(map(len, before.values()))
    log = [line for _, line in read_jsonl(second / "log.jsonl")]
    assert [line["step"] for line in log] == [1, 2, 3, 4] and log[0]["s/largest_at_start"] < 1e-3
    one, two = (load_file(folder / "checkpoint" / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys() and any(not np.array_equal(one[name], two[name]) for name in one)
    rows = json.loads((first / "rounds.json").read_text())["rounds"]
    assert [row["round"] for row in rows] == [1, 2] and min(row["kl"]["mean"] for row in rows) > 1e-3
    assert (first / "rounds.md").read_text() in done.stdout
    assert (output / "sft" / "answers" / "manifest.json").exists() and not (second / "sft").exists()
    assert verify(output) == 0

    files = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    remade = {path for path in files if path.name.startswith("rounds.")}
    again = script("rounds.sh", recipe, *settings)
    assert again.returncode == 0 and "rounds: round" not in again.stdout, again.stdout + again.stderr
    assert all(path in remade or path.stat().st_mtime_ns == then for path, then in files.items())
    (second / "metrics.manifest.json").unlink()
    again = script("rounds.sh", recipe, *settings)
    assert again.returncode == 0 and "rounds: round 2" in again.stdout and "rounds: round 1" not in again.stdout
    assert "training: finished before" in again.stdout and "answers: finished before" in again.stdout


@pytest.mark.full
def test_rounds_killed_in_the_second_continue_there(tmp_path, tiny_model, tiny_reward):
    """The first round's files stay as they are, and the second has every prompt once."""
    recipe = write_tiny_recipe(tmp_path, tiny_model, tiny_reward)
    recipe.write_text(recipe.read_text().replace("max_sequences: 16", "max_sequences: 4"))
    first = tmp_path / "runs" / "dpo-hps"
    candidates = first / "round-2" / "candidates" / "train.jsonl"

    def second_begins():
        deadline = time.monotonic() + 900
        while not candidates.exists() or not candidates.stat().st_size:
            assert time.monotonic() < deadline, "the second round wrote no candidate"
            time.sleep(0.05)

    kill(["rounds.sh", recipe, "schedule.rounds=2"], second_begins)
    files = {path: path.stat().st_mtime_ns for path in first.glob("*") if path.is_file()}
    written = candidates.read_bytes().rpartition(b"\n")[0]
    done = script("rounds.sh", recipe, "schedule.rounds=2")
    assert done.returncode == 0 and "rounds: round 1" not in done.stdout, done.stdout + done.stderr
    assert candidates.read_bytes().startswith(written)
    names = [record["prompt_id"] for _, record in read_jsonl(candidates)]
    assert len(names) == len(set(names)) == 8
    assert files == {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.full
def test_a_second_start_does_nothing_again(finished):
    recipe, output = finished
    # The metrics are computed anew from the files at each call, and must come out equal.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.jsonl") if path.name != "metrics.jsonl"}
    metrics = {path: path.read_bytes() for path in output.rglob("metrics.json*")}
    starts = {"gene.sh": "generation: finished before", "run.sh": "training: finished before"}
    starts["evaluate.sh"] = "answers: finished before"
    for name, words in starts.items():
        done = script(name, recipe, "training.merge=true")
        assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(metrics) == 4 and metrics == {path: path.read_bytes() for path in metrics}


def test_checkpoint_loads_in_vllm(finished, tiny_model):
    """Adapter and merged weights answer in vLLM as the merged weights do in transformers (greedy, token by token)."""
    import torch
    from transformers import AutoModelForCausalLM

    _, output = finished
    run = output / "dpo-hps"
    prompt = [5, 9, 17, 33, 65]
    model = AutoModelForCausalLM.from_pretrained(run / "merged")
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
    )[0, len(prompt) :].tolist()
    command = [REPOSITORY / ".venv-infer/bin/python", "-c", LOAD_IN_VLLM]
    arguments = [run / "merged", tiny_model, run / "checkpoint", json.dumps(prompt)]
    done = subprocess.run([*map(str, command + arguments)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, expected]


def kill(arguments: list, moment) -> None:
    """Start a driver, wait for `moment()`, SIGKILL the script and everything that it started."""
    command = ["bash", *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        moment()
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.full
def test_gene_killed_twice_has_every_prompt_once(tmp_path, tiny_model, tiny_reward):
    """Once while candidates are being written, once at a moment drawn from the time that the rest takes."""
    recipe = write_tiny_recipe(tmp_path, tiny_model, tiny_reward)
    recipe.write_text(recipe.read_text().replace("max_sequences: 16", "max_sequences: 4"))
    candidates = tmp_path / "runs" / "candidates" / "train.jsonl"

    def candidates_begin():
        deadline = time.monotonic() + 300
        while not candidates.exists() or not candidates.stat().st_size:
            assert time.monotonic() < deadline, "no candidate was written"
            time.sleep(0.05)

    kill(["gene.sh", recipe], candidates_begin)
    first = candidates.read_bytes().rpartition(b"\n")[0]
    pause = random.uniform(5, 35)
    print(f"second kill after {pause:.1f} s")
    kill(["gene.sh", recipe], lambda: time.sleep(pause))
    done = script("gene.sh", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    assert candidates.read_bytes().startswith(first)
    for split, prompts in (("train", 8), ("test", 4)):
        for stage in ("candidates", "ranked"):
            names = [record["prompt_id"] for _, record in read_jsonl(tmp_path / "runs" / stage / f"{split}.jsonl")]
            assert len(names) == len(set(names)) == prompts, (stage, split)


@pytest.mark.parametrize(
    "name", ["gene.sh", "run.sh", "evaluate.sh", "rounds.sh", "reproduce.sh", "quickstart.sh", "setup.sh", "test.sh"]
)
def test_help(name):
    done = script(name, "--help")
    assert done.returncode == 0 and f"bash {name}" in done.stdout


def test_dry_run_of_the_exact_world():
    done = script("reproduce.sh", "theory", "--dry-run")
    assert done.returncode == 0 and "plan: Theorem 3, the margin: 20 seeds" in done.stdout, done.stderr


def test_dry_run_of_rounds():
    """What each round is, and the dry run of the first one that is not done."""
    done = script("rounds.sh", "configs/hh_rlhf.yaml", "schedule.rounds=3", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "plan: round 3: to do: candidates by the policy in runs/hh_rlhf/dpo-hps/round-2/checkpoint" in done.stdout
    assert "rounds: round 1" in done.stdout and "rounds: round 2" not in done.stdout
    assert "plan: run: not yet:" in done.stdout and "run `bash run.sh`" not in done.stdout


@pytest.mark.parametrize("name", ["gene.sh", "run.sh", "evaluate.sh"])
def test_dry_run_of_the_paper_marks_what_is_missing(name):
    done = script(name, "configs/hh_rlhf.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "MISSING" in done.stdout
    assert {"gene.sh": "outputs: ", "run.sh": "global batch 64", "evaluate.sh": "the run is not finished"}[
        name
    ] in done.stdout
