"""evaluation/cost.py: hours by hand, the file of rates, and rates of a finished run by hand."""

import json

import pytest
import yaml
from conftest import REPOSITORY

from alignment.memory import count_weights
from evaluation import cost
from evaluation.matrix import load_matrix
from hps.errors import InputError
from pipeline.recipe import load_recipe
from pipeline.stage import MANIFEST, Work, read_manifest, write_manifest

RATES = {
    **{"devices": 2, "weights": 100, "scorer_weights": 50, "prompt_tokens": 10},
    **{"response_tokens": 5, "adapter_tokens_per_second": 4, "tokens_per_second": 8, "start_seconds": 3},
    **{
        "training_operations_per_second": 1000,
        "scoring_operations_per_second": 500,
        "evaluation_operations_per_second": 400,
    },
    **{"record_seconds": 0.25, "prompts": {"train": 7, "test": 3}},
}
QUICKSTART = REPOSITORY / "configs" / "quickstart.yaml"


def recipe_of(*settings: str):
    return load_recipe(QUICKSTART, ["data.train.path=none.jsonl", "data.test.path=none.jsonl", *settings])


def test_hours_of_a_run_by_hand():
    """7 training prompts of 6 responses in 2 epochs, 3 test prompts; answers at the end and at two points before."""
    settings = ["evaluation.checkpoints=2", "evaluation.samples=4", "evaluation.samples_along=1"]
    found = cost.run_seconds(recipe_of(*settings), RATES)
    # 6 passes of 100 weights over a prompt of 10 and a pair of 5 tokens, at 1000 operations a second on 2 devices
    assert found["training"] == 7 * 2 * 6 * 100 * 20 / 2000
    # of files that are not there two responses are given, and 6 are sampled
    assert found["preparing"] == 7 * (6 + 2) * (2 + 2 * 2) * 0.25
    # the written pair of each test prompt by reference, policy and two adapters: passes of 2 x 100 operations a token
    assert found["held-out pairs"] == 3 * 4 * 200 * (10 + 2 * 5) / (400 * 2)
    assert found["answers"] == 3 * (4 + 2) * 5 / (4 * 2)
    # policy and reference: the prompt at the end and at two points, with 4 + 2 answers
    assert found["divergence"] == 3 * 2 * 200 * (3 * 10 + 6 * 5) / (400 * 2)
    assert found["their scores"] == 0  # a function
    assert found["starting"] == 8 * 3
    without = cost.run_seconds(recipe_of("loss.family=simpo", "loss.preference=bt"), RATES)
    assert without["training"] == 7 * 2 * 4 * 100 * 20 / 2000  # no reference


def test_hours_with_a_model_that_scores_and_all_weights_by_hand():
    settings = ["lora.enabled=false", "models.evaluator={path: x/y}", "data.test.responses=2", "evaluation.samples=4"]
    settings += ["evaluation.checkpoints=0", "evaluation.proxy=false"]
    found = cost.run_seconds(recipe_of(*settings), RATES)
    assert found["training"] == 7 * 2 * 8 * 100 * 20 / 2000
    assert found["held-out pairs"] == 2 * 3 * 2 * 200 * 20 / (400 * 2)  # the written and the ranked pair
    assert found["answers"] == 3 * 4 * 5 / (8 * 2)
    assert found["their scores"] == 3 * 2 * 50 * (10 + 4 * 5) / (500 * 2)


def test_hours_of_the_ranking_by_hand():
    """Given responses are scored and not sampled."""
    assert cost.ranking_seconds(recipe_of(), RATES) == {
        "candidates": 7 * 6 * 5 / (8 * 2),
        "ranking": 2 * 50 * ((7 + 3) * 10 + (7 * 8 + 3 * 2) * 5) / (500 * 2),
    }
    lists = [f"data.train.path={REPOSITORY}/data/testbed/reviews_lists.jsonl", "data.train.limit=4"]
    assert cost.ranking_seconds(recipe_of(*lists, "data.train.responses=3"), RATES) == {
        "candidates": 4 * 3 * 5 / (8 * 2),
        "ranking": 2 * 50 * ((4 + 3) * 10 + (4 * (8 + 3) + 3 * 2) * 5) / (500 * 2),
    }
    function = cost.ranking_seconds(recipe_of("models.reward.function=sentiment"), RATES)
    assert function["ranking"] == 0


def test_the_sum_and_the_device_hours():
    lines = cost.lines_of({"one": 3600.0, "two": 1800.0}, [], RATES)
    assert lines[:3] == ["    1.00 h  one", "    0.50 h  two", "    1.50 h  together, 3.0 h x device, 0.0 GiB of disk"]


@pytest.mark.parametrize("scale", ["paper", "testbed"])
def test_every_scale_has_every_rate(scale):
    found = load_matrix(scale)["cost"]
    assert found.keys() == load_matrix("paper")["cost"].keys()
    assert cost.run_seconds(recipe_of(), found).keys() == cost.run_seconds(recipe_of(), RATES).keys()


def test_rates_of_a_file_win(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text("# a card\ntokens_per_second: 9\n")
    assert cost.with_rates(RATES, str(path)) == {**RATES, "tokens_per_second": 9}
    assert cost.with_rates(RATES, None) == RATES
    faults = {
        "tokens: 3": "no formula knows the rate `tokens`; known: devices, weights",
        "tokens_per_second: 0": "`tokens_per_second` is 0; give a number above 0",
        "tokens_per_second: yes": "`tokens_per_second` is True",
        "tokens_per_second: fast": "`tokens_per_second` is fast",
        "prompts: 3": "`prompts` is 3; give {train",
        "prompts: {train: 0, test: 1}": r"`prompts` is {'train': 0, 'test': 1}; give a number above 0",
        "- 1": "this is not a mapping of rates",
        "{": "no rates can be read",
    }
    for text, message in faults.items():
        path.write_text(text)
        with pytest.raises(InputError, match=f"{path}: {message}"):
            cost.with_rates(RATES, str(path))
    with pytest.raises(InputError, match="no rates can be read"):
        cost.with_rates(RATES, str(tmp_path / "none"))


def test_a_stage_says_how_long_it_took(tmp_path):
    recipe = recipe_of()
    work = Work(tmp_path, recipe, {})
    (tmp_path / "claim.json").write_text("{}")
    object.__setattr__(work, "started", work.started - 60)
    work.finish([], [])
    manifest = read_manifest(tmp_path / MANIFEST)
    assert manifest["devices"] == 1 and 60 <= manifest["seconds_of_last_start"] < 70
    assert cost.took(tmp_path) == (manifest["seconds_of_last_start"], 1)
    write_manifest(tmp_path / MANIFEST, recipe, {}, [], {})
    with pytest.raises(InputError, match="the manifest does not say how long"):
        cost.took(tmp_path)


def test_rates_of_a_finished_run_by_hand(ranked_recipe, tiny_model):
    """8 training and 4 test prompts of two given and three generated responses."""
    recipe = ranked_recipe("data.train.responses=3", "evaluation.checkpoints=1")
    run = recipe.run_folder()
    seconds = {recipe.candidates("train").parent: 10, recipe.ranked("train").parent: 4, run: 99}
    seconds |= {run / "evaluation": 6, run / "answers": 5}
    for folder, each in seconds.items():
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"seconds_of_last_start": each, "devices": 2, "tokens_of_last_start": 70}
        write_manifest(folder / MANIFEST, recipe, {}, [], {}, **facts)
    # The third step compiles a kernel.
    steps = zip([100.0, 1100.0, 2600.0, 3100.0], [1.0, 500.0, 20.0, 500.0], strict=True)
    lines = [
        {"step": at, "num_tokens": tokens, "tokens_per_second": rate} for at, (tokens, rate) in enumerate(steps, 1)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "evaluation" / "pairs.jsonl").write_text("{}\n" * 4)
    rates, missing = cost.measured(recipe)
    assert missing == []
    from transformers import AutoConfig

    whole, trained = count_weights(AutoConfig.from_pretrained(tiny_model), recipe)
    assert (rates["weights"], rates["adapter_weights"], rates["devices"]) == (whole, trained, 2)
    ranked = [json.loads(line) for split in ("train", "test") for line in recipe.ranked(split).open()]
    assert rates["tokens_per_second"] == 70 / 10 / 2
    assert rates["adapter_tokens_per_second"] == 70 / 5 / 2
    pair = 3 * 2 * whole * (rates["prompt_tokens"] + 2 * rates["response_tokens"])
    assert rates["evaluation_operations_per_second"] == pytest.approx(4 * pair / 6 / 2)
    # 3000 tokens at 500 a second, 3 steps of 4 pairs: 250 a row, of a pair, so the prompt counts twice. The log's
    # seconds are those of forward and backward, 4 passes, but where the reference is in each step.
    response = 250 / 2 - rates["prompt_tokens"]
    operations = 12 * 4 * whole * (rates["prompt_tokens"] + 2 * response)
    assert rates["training_operations_per_second"] == pytest.approx(operations / 6 / 2)
    found = cost._training(ranked_recipe("data.train.responses=3", "training.reference=in_step"), rates)
    assert found["training_operations_per_second"] == pytest.approx(operations * 6 / 4 / 6 / 2)
    texts = sum(sum(record["token_counts"]) for record in ranked) + 12 * rates["prompt_tokens"]
    assert rates["scoring_operations_per_second"] == pytest.approx(2 * rates["scorer_weights"] * texts / 4 / 2)
    assert cost.with_rates(RATES | {"adapter_weights": 1}, None).keys() >= rates.keys()


def test_what_is_not_finished_is_named(ranked_recipe):
    rates, missing = cost.measured(ranked_recipe())
    assert rates.keys() == {"weights", "adapter_weights", "prompt_tokens", "response_tokens"}
    assert [line.partition(":")[0] for line in missing] == list(cost.MEASURED)[1:]
    assert all("not finished" in line for line in missing)


def test_the_rates_of_the_repository_are_read():
    for path in (REPOSITORY / "configs" / "rates").glob("*.yaml"):
        assert cost.with_rates(load_matrix("paper")["cost"], str(path)) != load_matrix("paper")["cost"]
        assert "not measured" in path.read_text()
        assert yaml.safe_load(path.read_text())["weights"] > 0
