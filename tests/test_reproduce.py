"""evaluation/reproduce.py and results.py: what is found again, what is run, and what a failure leaves of the others.

The scripts are replaced by one that writes what they write: their own tests are elsewhere.
"""

import itertools
import json
import os
import signal
import subprocess
import time
from collections import defaultdict
from functools import cache

import pytest
from conftest import REPOSITORY, ranked_records

from alignment.train import evaluation_steps
from evaluation import matrix, pilot, reproduce, results, tables
from evaluation.cost import judge_seconds
from evaluation.matrix import load_matrix
from evaluation.results import Evaluated, find, result_key
from hps.errors import InputError
from pipeline.files import write_json
from pipeline.records import read_prompts
from pipeline.run_records import answered_steps
from pipeline.stage import hold

pytestmark = pytest.mark.slow

STEPS = 24  # of a training, for the policies that it keeps
FIGURES = {"reward_best": 1.0, "reward_mean": 0.5, "bleu_best": 0.2, "kl_sampled": 0.3, "tokens_mean_change": 1.0}


def write_answers(asked: dict, folder, sft: bool, step: int | None) -> None:
    """Two answers to each prompt, with scores and divergence; the second reward is the step."""
    lines = {
        "answers/test.jsonl": {"responses": ["yes", "no"], "token_counts": [3, 4], "truncated": [False, True]},
        "scores/scores.jsonl": {"answers": [{"score": 0.123456}, {"score": float(step or 0)}], "given": []},
        "divergence/divergence.jsonl": {"kl": [1.23456, 2.0], "log_ratio": [0.0, 0.0], "tokens": [3, 4]},
    }
    for name, line in lines.items():
        if sft and name.startswith("divergence"):
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        prompts = [{"prompt_id": key, "prompt": prompt} for key, prompt in asked.items()]
        named = prompts if name.startswith("answers") else [{"prompt_id": each["prompt_id"]} for each in prompts]
        path.write_text("".join(json.dumps({**each, **line}) + "\n" for each in named))
        (path.parent / "manifest.json").write_text("{}")


def write_evaluation(recipe, folder, sft: bool, means: dict | None = None) -> None:
    """What evaluate.sh leaves of a run, with made up figures; `means`: those of metrics.json."""
    prompts = list(read_prompts(recipe.tested().data.test.path))[: recipe.evaluation.prompts]
    asked = {record["prompt_id"]: record["prompt"] for _, record in prompts}
    means = means or {}
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt_id": name, **FIGURES}) + "\n" for name in asked]
    (folder / "metrics.jsonl").write_text("".join(lines))
    write_json(folder / "metrics.json", {"figures": means, "bleu_signatures": {}, "left_out": {}, "sets": {}})
    for step in [None] if sft else answered_steps(recipe):
        write_answers(asked, folder if sft else recipe.evaluated_folder(step), sft, step)
    if sft:
        return
    figures = {"policy": [-1.0, -2.0], "kl": [0.5]}
    pair = {
        "responses": ["a", "bc"],
        "tokens": [1, 2],
        "truncated": [False, False],
        "reference": [-2.0, -2.0],
        **figures,
    }
    pair["along"] = [{"step": 5, **figures}]
    (folder / "evaluation").mkdir(exist_ok=True)
    with (folder / "evaluation" / "pairs.jsonl").open("w") as file:
        for kind in ("written", "ranked"):
            lines = [{"set": kind, "prompt_id": name, "prompt": prompt, **pair} for name, prompt in asked.items()]
            file.writelines(json.dumps(line) + "\n" for line in lines)


class Scripts:
    """In the place of `Driver.call`: remembers the calls, writes what evaluate.sh writes, fails where it is told to."""

    def __init__(self):
        self.calls: list[tuple[str, str]] = []
        self.broken: set[tuple[str, str]] = set()
        self.kill_at: tuple[str, str] | None = None
        self.arguments: dict[str, list[list[str]]] = defaultdict(list)  # by script
        self.means = lambda recipe, sft: {}  # figures of metrics.json
        self.ranked = ranked_records(2)  # of the training

    def __call__(self, driver, script, arguments, recipe, name):
        self.calls.append((script, recipe.run))
        log = reproduce.Path(recipe.output) / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("first line\nerror: it broke\n\n")
        if (script, recipe.run) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if (script, recipe.run) in self.broken:
            raise subprocess.CalledProcessError(2, script)
        self.arguments[script].append(arguments)
        if script in ("gene.sh", "run.sh") and not (ranked := recipe.ranked("train")).exists():
            ranked.parent.mkdir(parents=True, exist_ok=True)
            ranked.write_text("".join(json.dumps(record) + "\n" for record in self.ranked))
            (ranked.parent / "manifest.json").write_text("{}")
        if script == "run.sh" and recipe.evaluation.samples_along:
            for step in evaluation_steps(STEPS, recipe.evaluation.checkpoints):
                recipe.checkpoint_folder(step).mkdir(parents=True, exist_ok=True)
        if script == "evaluate.sh":
            write_evaluation(recipe, recipe.evaluated_folder(), False, self.means(recipe, False))
            write_evaluation(recipe, recipe.tested().sft_folder(), True, self.means(recipe, True))
        return 1.5

    def of(self, script: str) -> list[str]:
        return [run for called, run in self.calls if called == script]


@pytest.fixture
def every_seed(tmp_path, monkeypatch):
    """Reproduce tables into a folder of its own."""
    replaced = Scripts()
    (tmp_path / "results" / "testbed").mkdir(parents=True)
    for module in (reproduce, results, tables):
        monkeypatch.setattr(module, "REPOSITORY", tmp_path)
    for name in ("configs", "data", "models"):
        (tmp_path / name).symlink_to(reproduce.Path(__file__).resolve().parent.parent / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.Driver, "call", lambda *arguments: replaced(*arguments))
    return replaced


@cache
def first_seeds(scale: str) -> list[matrix.Run]:
    """The runs of a scale with the first seed of each method."""
    found = load_matrix(scale)
    for grid in found["grids"]:
        grid["values"]["seed"] = grid["values"].get("seed", [42])[:1]
    return matrix.expand(found)


@pytest.fixture
def scripts(every_seed, monkeypatch):
    """The same with one seed, which is quicker."""
    monkeypatch.setattr(matrix, "all_runs", first_seeds)
    return every_seed


def test_every_run_once_then_found_again(scripts, tmp_path):
    assert reproduce.reproduce("8", "testbed", None) == 0
    assert len(scripts.of("run.sh")) == len(scripts.of("evaluate.sh")) == 6
    assert len(scripts.of("gene.sh")) == 1
    assert len(scripts.of(".venv-infer/bin/python -m generation.sample_answers")) == 1
    folder = tmp_path / "results" / "testbed"
    assert len(list((folder / "runs" / "reviews").glob("*.json"))) == 7  # with the model before training
    table = json.loads((folder / "table8.json").read_text())
    assert len(table["parts"][0]["rows"]) == 7 and table["failed"] == {}
    seconds = json.loads((folder / "runs" / "reviews" / "dpo-bt.json").read_text())["seconds"]
    assert seconds == {"run.sh": 1.5, "evaluate.sh": 1.5}
    del scripts.calls[:]
    assert reproduce.reproduce("8", "testbed", None) == 0
    assert scripts.calls == []
    reproduce.reproduce("6", "testbed", None)  # shares two trainings with Table 8
    assert len(scripts.of("run.sh")) == 4


def test_a_table_of_two_rankings_is_refused(scripts):
    """Responses may have been sampled in other batches. Neither rounding nor the order of the lines matters."""
    path = reproduce.Path("runs/reviews/ranked/train.jsonl")
    assert reproduce.reproduce("8", "testbed", "beta0.25") == 0
    scripts.ranked = [{**record, "rewards": [each + 1e-6 for each in record["rewards"]]} for record in scripts.ranked]
    scripts.ranked.reverse()
    path.unlink()
    assert reproduce.reproduce("8", "testbed", "beta1.0") == 0
    trained = scripts.of("run.sh")
    scripts.ranked[0]["responses"].reverse()
    path.unlink()
    problem = "dpo-bt-beta0.25.json: trained on other responses, or on another order of them, than runs/reviews"
    for _ in range(2):  # the ranking is made by the first
        with pytest.raises(InputError, match=problem):
            reproduce.reproduce("8", "testbed", None)
    assert scripts.of("run.sh") == trained and path.exists()
    assert reproduce.plan("8", "testbed")[0].startswith("REFUSED: ")
    (path.parent / "manifest.json").unlink()  # killed in the ranking: the same command continues
    assert not reproduce.plan("8", "testbed")[0].startswith("REFUSED: ")


def test_a_table_whose_results_are_of_two_rankings_is_refused(scripts, tmp_path):
    """Also where nothing is to do, and no ranking is here."""
    assert reproduce.reproduce("8", "testbed", None) == 0
    path = tmp_path / "results" / "testbed" / "runs" / "reviews" / "dpo-hps.json"
    result = json.loads(path.read_text())
    write_json(path, {**result, "ranking": None})  # from before the field
    (tmp_path / "runs" / "reviews" / "ranked" / "train.jsonl").unlink()
    assert reproduce.reproduce("8", "testbed", None) == 0
    write_json(path, {**result, "ranking": "another"})
    with pytest.raises(
        InputError, match="trained on other responses, or on another order of them, than .*dpo-hps.json"
    ):
        reproduce.reproduce("8", "testbed", None)


def test_a_failed_run_is_listed_and_the_others_go_on(scripts, tmp_path, capsys):
    scripts.broken = {("run.sh", "dpo-bt-beta0.25"), ("evaluate.sh", "dpo-hps")}
    assert reproduce.reproduce("8", "testbed", None) == 2
    table = json.loads((tmp_path / "results" / "testbed" / "table8.json").read_text())
    assert (
        set(table["failed"]) == {"reviews/dpo-bt-beta0.25", "reviews/dpo-hps"} and len(table["parts"][0]["rows"]) == 5
    )
    assert "run.sh ended with status 2, see " in table["failed"]["reviews/dpo-bt-beta0.25"]
    assert table["failed"]["reviews/dpo-hps"].endswith("evaluate-dpo-hps.log: error: it broke")
    assert "dpo-bt-beta0.25" not in scripts.of("evaluate.sh")
    assert "FAILED reviews/dpo-hps: evaluate.sh ended with status 2" in capsys.readouterr().err
    scripts.broken, scripts.calls[:] = set(), []
    assert reproduce.reproduce("8", "testbed", None) == 0  # the two that failed, alone
    assert sorted(scripts.of("run.sh")) == ["dpo-bt-beta0.25", "dpo-hps"]


def test_without_a_ranking_nothing_trains(scripts):
    scripts.broken = {("gene.sh", "dpo-hps")}
    assert reproduce.reproduce("8", "testbed", None) == 7  # with the model before training
    assert scripts.of("run.sh") == []


def test_answers_with_one_engine_may_fail(scripts):
    scripts.broken = {(".venv-infer/bin/python -m generation.sample_answers", "dpo-bt")}
    assert reproduce.reproduce("8", "testbed", None) == 0


def test_only_some_runs(scripts):
    reproduce.reproduce("8", "testbed", "beta0.25")
    assert scripts.of("run.sh") == ["dpo-bt-beta0.25", "dpo-hps-beta0.25"]


def test_transfer_is_evaluated_on_the_other_set(scripts, tmp_path):
    """Table 7 trains on reviews and is tested on chats: both need a ranking, results are kept apart."""
    assert reproduce.reproduce("7", "testbed", None) == 0
    assert len(scripts.of("gene.sh")) == 2
    folder = tmp_path / "results" / "testbed" / "runs"
    assert len(list((folder / "reviews-on-chats").glob("*.json"))) == 6
    assert [path.name for path in (folder / "chats").glob("*.json")] == ["sft.json"]
    assert (tmp_path / "runs" / "reviews" / "dpo-bt" / "on" / "chats" / "metrics.json").exists()


def test_dry_run_counts_what_is_missing(scripts):
    before = reproduce.plan("8", "testbed")
    assert "6 runs to train and evaluate" in before and "reviews: dpo-bt: to do" in before
    assert any(line.startswith("assumed (configs/matrix.yaml, `cost`; ") for line in before)
    assert scripts.calls == []
    reproduce.reproduce("8", "testbed", "beta")
    assert "2 runs to train and evaluate" in reproduce.plan("8", "testbed")


@pytest.fixture
def papers_data(scripts, tmp_path):
    """Small files in the place of the paper's data."""
    quickstart = tmp_path / "data" / "quickstart"
    files = {split: (quickstart / f"safety_{split}.jsonl").read_text() for split in ("train", "test")}
    (tmp_path / "data").unlink()  # a link
    for name, split in itertools.product(("hh_rlhf", "pku_safe"), files):
        path = tmp_path / "data" / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[split])


def test_dry_run_of_the_judged_table(papers_data):
    """What runs, and no other: DPO of the first seed; judged, though results of the runs may stand."""
    lines = reproduce.plan("4", "paper")
    assert [line for line in lines if line.endswith("to do")] == [
        f"{data}: {n}: to do" for data in ("hh_rlhf", "pku_safe") for n in ("dpo-hps", "dpo-pl", "dpo-bt")
    ]
    assert any(line.endswith(" h  judging") for line in lines)


def test_hours_by_hand():
    """One verdict: 2 x 100 weights x (10 + 20 + 30) tokens at 1000 operations a second are 12 s, and 5 tokens at 10 a
    second 0.5 s; 24 prompts of two models on 2 devices."""
    cost = {
        **{"judge_weights": 100, "rubric_tokens": 10, "prompt_tokens": 20, "response_tokens": 30, "verdict_tokens": 5},
        **{"scoring_operations_per_second": 1000, "judge_tokens_per_second": 10, "devices": 2},
    }
    assert judge_seconds([evaluation("evaluation.prompts=24")], cost) == pytest.approx(24 * 2 * 12.5 / 2)


def test_two_data_sets_do_not_hide_each_other(scripts, monkeypatch):
    """The same method fails on both sets: two failures, and every run has its own seconds."""
    both = load_matrix("testbed")
    both["grids"] = [{"tables": [2], "data": list(both["recipes"]), "values": {"loss.preference": ["bt", "hps"]}}]
    for module in (reproduce, tables):
        monkeypatch.setattr(module, "load_matrix", lambda scale: both)
    monkeypatch.setattr(matrix, "all_runs", lambda scale: matrix.expand(both))
    scripts.broken = {("run.sh", "dpo-bt")}
    assert reproduce.reproduce("2", "testbed", None) == 2
    table = json.loads((reproduce.REPOSITORY / "results" / "testbed" / "table2.json").read_text())
    assert set(table["failed"]) == {"chats/dpo-bt", "reviews/dpo-bt"}


def test_only_what_no_run_is_called(scripts):
    with pytest.raises(InputError, match="no run's name contains `beta7`; the runs are reviews/sft, reviews/dpo-bt"):
        reproduce.reproduce("8", "testbed", "beta7")


@pytest.mark.parametrize("text", ['{"run": "x"}', '{"run": "x", "ke', "[]"])
def test_a_damaged_result_is_named(scripts, text):
    reproduce.reproduce("8", "testbed", "beta0.25")
    (run,) = (e for e in tables.needed("8", "testbed") if e.name == "dpo-bt-beta0.25")
    run.path("testbed").write_text(text)
    with pytest.raises(InputError, match="dpo-bt-beta0.25.json: this is not a result file .*; take it from git again"):
        find(run, "testbed")


@pytest.mark.parametrize("at", [("run.sh", "dpo-hps"), ("evaluate.sh", "dpo-bt-beta0.25")])
def test_killed_it_continues(scripts, at):
    """SIGKILL in a training and in an evaluation: what has its result is not touched again, the table is whole."""
    child = os.fork()
    if child == 0:
        scripts.kill_at = at
        reproduce.reproduce("8", "testbed", None)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    folder = reproduce.REPOSITORY / "results" / "testbed"
    finished = {path: path.stat().st_mtime_ns for path in (folder / "runs" / "reviews").glob("*.json")}
    assert bool(finished) == (at[0] == "evaluate.sh") and not (folder / "table8.json").exists()
    assert reproduce.reproduce("8", "testbed", None) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(scripts.of("evaluate.sh")) == 6 - len([path for path in finished if path.stem != "sft"])
    assert len(json.loads((folder / "table8.json").read_text())["parts"][0]["rows"]) == 7


def test_a_script_that_outlives_its_driver_keeps_the_lock(tmp_path, monkeypatch):
    """The driver alone is killed: its script still works in the run's folder, and a new driver says so."""
    monkeypatch.setattr(reproduce, "REPOSITORY", tmp_path)
    script, started = tmp_path / "long.sh", tmp_path / "started"
    script.write_text(f"touch {started}; read -r -t 30 < {tmp_path / 'go'}\n")
    os.mkfifo(tmp_path / "go")
    child = os.fork()
    if child == 0:
        with hold(tmp_path / "results") as lock:
            recipe = evaluation(f"output={tmp_path / 'runs'}").recipe
            reproduce.Driver("testbed", lock).call(str(script), [], recipe, "x")
        os._exit(0)
    while not started.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.raises(InputError, match="another run is working"), hold(tmp_path / "results"):
        pass
    (tmp_path / "go").write_text("\n")  # the script ends, and with it the lock
    for _ in range(500):
        try:
            with hold(tmp_path / "results"):
                return
        except InputError:
            time.sleep(0.01)
    pytest.fail("the lock outlived the script")


def test_dry_run_at_the_papers_scale_without_data(scripts):
    lines = reproduce.plan("2", "paper")
    assert "30 runs to train and evaluate" in lines
    assert any("MISSING: " in line and "hh_rlhf/test.jsonl" in line for line in lines)


def test_win_rates_are_found_again(scripts, papers_data, tmp_path, monkeypatch):
    """Table 4 judges three runs of each data set, then finds the win rates; another judge judges again."""
    outcome = {"percent": 40.0, "interval": [30.0, 50.0]}
    rates = {"win": outcome, "lose": outcome, "tie": {"percent": 20.0, "interval": [10.0, 30.0]}, "flags": ["a flag"]}
    asked = []

    def win_rates(recipe, against):
        asked.append([recipe.run, *(folder.name for folder in against)])
        return {"against": {str(folder): rates for folder in against}}

    monkeypatch.setattr(results, "win_rates", win_rates)
    assert reproduce.reproduce("4", "paper", None) == 0
    assert asked == [["dpo-hps", "sft", "dpo-pl", "dpo-bt"]] * 2
    assert scripts.of("run.sh") == ["dpo-hps", "dpo-pl", "dpo-bt"] * 2
    table = json.loads((tmp_path / "results" / "paper" / "table4.json").read_text())
    _, part = table["parts"]
    assert [row["label"] for row in part["rows"]] == ["against SFT", "against DPO-PL", "against DPO-BT"]
    win = {"mean": 40.0, "interval": [30.0, 50.0], "paper": 67.1, "difference": -27.1}
    assert part["rows"][0]["figures"]["win"] == win
    text = (tmp_path / "results" / "paper" / "table4.md").read_text()
    assert "| against SFT | 40.000 [30.000, 50.000] | 67.1 | -27.100 |" in text and "- against SFT: a flag" in text
    del scripts.calls[:]
    assert reproduce.reproduce("4", "paper", None) == 0
    assert scripts.calls == [] and len(asked) == 2


# ---- the testbed ----


def result_of(tmp_path, run: str) -> dict:
    (path,) = (tmp_path / "results" / "testbed" / "runs").glob(f"*/{run}.json")
    return json.loads(path.read_text())


def test_results_hold_every_answer_at_every_point(scripts, tmp_path):
    """Rewards and divergence to four digits, at the kept steps and at the end; the model before has no KL."""
    sft, *runs = tables.needed("6", "testbed")
    (run,) = (run for run in runs if run.name == "dpo-hps-subsample3")
    reproduce.Driver("testbed", 0).work([sft, run])
    found = result_of(tmp_path, "dpo-hps-subsample3")["answers"]
    kept = evaluation_steps(STEPS, run.recipe.evaluation.checkpoints)
    assert list(found) == [*map(str, kept), "final"] and len(found) > 2
    count = run.recipe.data.test.limit
    for point, columns in found.items():
        assert len(columns["prompt_id"]) == count and columns["tokens"] == [[3, 4]] * count
        assert columns["reward"] == [[0.1235, float(point) if point != "final" else 0.0]] * count
        assert columns["kl"] == [[1.235, 2.0]] * count and columns["repetition"] == [[0.0, 0.0]] * count
    before = result_of(tmp_path, "sft")["answers"]
    assert list(before) == ["final"] and "kl" not in before["final"]


def test_an_answers_setting_is_part_of_a_result_only_when_it_is_on():
    (run,) = (each for each in tables.needed("6", "testbed") if each.name == "dpo-hps-subsample3")
    assert result_key(run.recipe)["evaluation"]["samples_along"] == 2
    off = evaluation("evaluation.samples_along=0").recipe
    assert "samples_along" not in result_key(off)["evaluation"]


def test_noise_has_a_ranking_of_its_own_and_shares_the_rest(every_seed):
    """gene.sh runs once for all seeds of a ranking, without their seed; candidates and SFT answers are shared."""
    runs = [Evaluated(run.recipe, run.data, run.data, arguments=[run.path, *run.overrides]) for run in
            matrix.select("testbed", "noise")]  # fmt: skip
    assert len(runs) == 20 and len({run.recipe.output for run in runs}) == 1
    driver = reproduce.Driver("testbed", 0)
    assert driver.rank(runs, matrix.recipes_of(load_matrix("testbed"))) == runs
    noisy = ["annotation.noise=0.4", "ranking=ranked-noise"]
    assert every_seed.arguments["gene.sh"] == [["configs/reviews.yaml"], ["configs/reviews.yaml", *noisy]]
    assert {run.recipe.ranked("train").parent.name for run in runs} == {"ranked", "ranked-noise"}
    every_seed.broken = {("gene.sh", "dpo-hps")}
    assert driver.rank(runs, {}) == [] and len(driver.failed) == 20


def test_only_some_data(every_seed):
    """The title has the data set, and the model before training of another set is not evaluated."""
    lines = reproduce.plan("2", "testbed", "reviews/dpo")
    assert "15 runs to train and evaluate" in lines and not any(line.startswith("chats") for line in lines)
    assert "6 runs to train and evaluate" in reproduce.plan("2", "testbed", "chats/")


def test_table_4_needs_no_judge_where_the_evaluator_is_the_truth(every_seed):
    lines = reproduce.plan("4", "testbed", "reviews/")
    assert "15 runs to train and evaluate" in lines and not any("judg" in line for line in lines[:-1])
    assert not reproduce.is_judged("4", tables.needed("4", "testbed"))
    assert reproduce.is_judged("4", tables.needed("4", "paper"))


FIGURES_OF_A_RATE = {  # reward, tokens, repetition
    **{0.0003: (0.5, 20, 0.0), 0.001: (0.7, 18, 0.05), 0.003: (0.9, 4, 0.6)},
    "before": (0.3, 20, 0.0),
}


def made_up(recipe, sft: bool) -> dict:
    """BT goes too far at the highest rate; HPS has equal rewards at the two lower rates."""
    rate, preference = recipe.optimizer.learning_rate, recipe.loss.preference
    reward, tokens, repetition = FIGURES_OF_A_RATE["before" if sft else rate]
    if preference == "hps" and not sft:
        reward = min(reward, 0.5)
    values = {"reward_mean": reward, "tokens_mean": tokens, "repetition": repetition, "distinct_2": 0.9}
    return {name: {"mean": value, "interval": [value, value]} for name, value in (values | {"kl_sampled": 2.0}).items()}


def test_pilot_chooses_the_highest_reward_that_has_not_gone_too_far(scripts, tmp_path, capsys):
    scripts.means = made_up
    assert reproduce.reproduce("pilot", "testbed", "/dpo") == 0
    found = json.loads((tmp_path / "results" / "testbed" / "pilot.json").read_text())
    (asked,) = scripts.arguments["gene.sh"]
    assert asked[:2] == ["configs/reviews.yaml", "output=runs/reviews_pilot"] and "seed=41" not in asked
    assert len(found["missing"]) == 24 and found["before"]["reward_mean"]["mean"] == 0.3
    methods = {name: (entry["chosen"], entry["at_the_edge"]) for name, entry in found["methods"].items()}
    assert methods == {"DPO-BT": (0.001, False), "DPO-HPS": (0.0003, True)}
    reasons = [each["too_far"] for each in found["methods"]["DPO-BT"]["rates"]]
    assert reasons == [None, None, "repetition 0.600"]
    text = (tmp_path / "results" / "testbed" / "pilot.md").read_text()
    assert "| DPO-BT | 0.001 | 0.700 [0.700, 0.700] | 2.00 | 18.0 | 0.050 | **chosen** |" in text
    used = found["methods"]["DPO-HPS"]["in_the_matrix"]
    assert used == pilot.matrix_rate("testbed", "DPO-HPS")
    assert f"DPO-HPS: chosen 0.0003, in configs/matrix.yaml {used:g}" in text
    assert "reproduce: DPO-BT: learning rate 0.001, in configs/matrix.yaml" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("repetition", "tokens", "kl", "why"),
    [
        *((0.15, 20, 12, None), (0.16, 20, 1, "repetition 0.160"), (0.0, 10, 1, None), (0.0, 30, 1, None)),
        *((0.0, 9.9, 1, "length 0.49 of that before training"), (0.0, 30.5, 1, "length 1.52 of that before training")),
        (0.0, 20, 12.1, "KL 12.1"),
    ],
)
def test_bounds_of_a_rate(repetition, tokens, kl, why):
    before = {"repetition": {"mean": 0.05}, "tokens_mean": {"mean": 20.0}}
    figures = {"repetition": repetition, "tokens_mean": tokens, "kl_sampled": kl}
    assert pilot.too_far({name: {"mean": value} for name, value in figures.items()}, before) == why


# ---- what makes a result the recipe's ----


def evaluation(*overrides: str) -> Evaluated:
    from pipeline.recipe import load_recipe

    return Evaluated(load_recipe("configs/reviews.yaml", list(overrides)), "reviews", "reviews")


CHANGES = [
    *("loss.beta=0.2", "seed=1", "optimizer.learning_rate=1e-4"),
    *("models.policy.revision=a", "models.evaluator={path: models/reward-proxy}", "evaluation.samples=5"),
]


def test_committed_results_are_found():
    """A new field of the recipe must not make its default another result: hours would be done again."""
    names = {str(name) for run in matrix.all_runs("testbed") for name in run.tables} - {matrix.PILOT}
    needed = [run for name in names for run in tables.needed(name, "testbed")]
    found = {run.path("testbed") for run in needed if find(run, "testbed")}
    assert all(find(run, "testbed") for run in needed if run.sft and run.on == "reviews")  # it is one for all tables
    runs = REPOSITORY / "results" / "testbed" / "runs"
    # The pilot's are of an earlier sample of answers (docs/results.md).
    assert found == {path for path in runs.glob("*/*.json") if path.parent.name != "reviews_pilot"} and len(found) > 30


@pytest.mark.parametrize("override", CHANGES)
def test_a_changed_setting_is_another_result(scripts, override):
    assert result_key(evaluation(override).recipe) != result_key(evaluation().recipe)


@pytest.mark.parametrize("override", ["generation.workers=2", "run=dpo-hps", "training.processes=1", "output=x"])
def test_devices_and_folders_are_not_part_of_a_result(scripts, override):
    assert result_key(evaluation(override).recipe) == result_key(evaluation().recipe)


def test_a_changed_data_file_is_another_result(scripts, tmp_path):
    other = tmp_path / "train.jsonl"
    other.write_text(reproduce.Path("data/testbed/reviews_lists.jsonl").read_text() + "\n")
    changed = evaluation(f"data.train.path={other}").recipe
    assert result_key(changed)["train"] != result_key(evaluation().recipe)["train"]


def test_a_result_of_other_settings_is_not_found(scripts):
    reproduce.reproduce("8", "testbed", "beta0.25")
    (run,) = (e for e in tables.needed("8", "testbed") if e.name == "dpo-bt-beta0.25")
    assert find(run, "testbed")["run"] == "dpo-bt-beta0.25"
    run.recipe.seed = 7
    assert find(run, "testbed") is None


def test_a_result_without_answers_is_done_again(scripts):
    """A file of the form that had means by prompt alone is none."""
    reproduce.reproduce("8", "testbed", "beta0.25")
    (run,) = (e for e in tables.needed("8", "testbed") if e.name == "dpo-bt-beta0.25")
    made = find(run, "testbed")
    write_json(run.path("testbed"), {name: value for name, value in made.items() if name != "answers"})
    assert find(run, "testbed") is None
    assert "reviews: dpo-bt-beta0.25: to do" in reproduce.plan("8", "testbed")
    del scripts.calls[:]
    reproduce.reproduce("8", "testbed", "beta0.25")
    assert scripts.of("run.sh") == ["dpo-bt-beta0.25"] and find(run, "testbed")["answers"] == made["answers"]


def test_table_three_is_a_human_study(monkeypatch):
    monkeypatch.setattr("sys.argv", ["reproduce", "table3"])
    with pytest.raises(InputError, match="there is no table `table3` to reproduce; give one of 2, 4, 5, 6, 7, 8"):
        reproduce.main()
