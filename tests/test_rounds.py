"""Rounds: where they are, what they take over from the round before, which are left to do, and their table."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ranked_records
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_train import interrupt, log_of, run, weights_of, without_rate
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from alignment.checks import lora_config
from alignment.memory import check_moving_reference, responses_per_prompt
from alignment.plan import plan, run_settings
from alignment.rows import TokenRows
from alignment.train import train
from evaluation.reproduce import waves, with_a_run, with_earlier_rounds
from evaluation.results import Evaluated, ranked_by, result_key
from evaluation.rounds import is_done, plan_lines, rounds_of, summarize
from generation import generate
from generation.generate import SplitWriter
from hps.chat import load_tokenizer
from hps.errors import InputError
from pipeline.engine import Sample
from pipeline.files import file_hash, write_json
from pipeline.preflight import gene_plan, run_plan
from pipeline.prompts import load_prompts
from pipeline.recipe import Recipe, load_recipe
from pipeline.stage import claim, write_manifest
from pipeline.weights import fill_adapter

# ---- the recipes ----


def test_where_rounds_are_and_what_writes_their_candidates(tiny_recipe, tiny_model, tiny_reward, tmp_path):
    """The first is where gene.sh and run.sh leave it. The policy of the round before is the generator: with LoRA the
    model that its adapter is put on, else its checkpoint."""
    output, first = tmp_path / "runs", f"models.generator.path={tiny_reward}"
    one, two, three = (load_recipe(tiny_recipe, [first, f"round={number}"]) for number in (1, 2, 3))
    assert one == load_recipe(tiny_recipe, [first])
    assert [each.run_folder() for each in (one, two)] == [output / "dpo-hps", output / "dpo-hps" / "round-2"]
    assert [each.name for each in (one, two)] == ["dpo-hps", "dpo-hps-round-2"]
    assert one.candidates("train") == output / "candidates" / "train.jsonl"
    assert two.candidates("train") == output / "dpo-hps" / "round-2" / "candidates" / "train.jsonl"
    assert two.ranked("test") == output / "dpo-hps" / "round-2" / "ranked" / "test.jsonl"
    assert {each.sft_folder() for each in (one, two, three)} == {output / "sft"}
    starts = [None, output / "dpo-hps" / "checkpoint", output / "dpo-hps" / "round-2" / "checkpoint"]
    assert [each.start() for each in (one, two, three)] == starts
    assert [each.models.generator.path for each in (one, two)] == [str(tiny_reward), str(tiny_model)]
    assert {each.first_generator.path for each in (one, two, three)} == {str(tiny_reward)}
    whole = load_recipe(tiny_recipe, ["round=2", "lora.enabled=false"])
    assert whole.models.generator.path == str(starts[1])
    assert [each.round_seed for each in (one, two, three)] == [7, 1_000_010, 2_000_013]
    assert load_recipe(tiny_recipe, ["round=2", f"seed={2**31 - 1}"]).round_seed == 1_000_002


def test_the_first_round_has_the_claims_and_the_key_of_a_run_without_rounds(ranked_recipe, tiny_recipe):
    plain, first = ranked_recipe(), ranked_recipe("schedule.rounds=3", "schedule.round_candidates=all")
    assert run_settings(first) == run_settings(plain) and result_key(first) == result_key(plain)
    assert generate.stage_settings(first) == generate.stage_settings(plain)
    assert set(run_settings(plain)) == {
        *("loss", "schedule", "lora", "optimizer", "seed", "kept_checkpoints", "policy", "ranked")
    }
    assert not {"rounds", "round_reference", "round_candidates"} & {*run_settings(plain)["schedule"]}
    assert set(generate.stage_settings(plain)) == {"generation", "seed", "model", "data"}


def test_what_a_later_round_asks_for_at_once(tiny_recipe):
    for override, responses in (("new", 4 + 2), ("all", 3 * 4 + 2)):
        settings = ["round=3", f"schedule.round_candidates={override}", "loss.estimator=exact"]
        assert responses_per_prompt(load_recipe(tiny_recipe, settings)) == responses
    stage_3 = ["training.deepspeed=configs/deepspeed/zero3.json", "schedule.round_reference=previous"]
    with pytest.raises(
        InputError, match="is ZeRO-3, in step: the reference is the adapter that the first step changes"
    ):
        check_moving_reference(load_recipe(tiny_recipe, ["schedule.rounds=2", *stage_3]))
    for others in (["round=2", stage_3[0]], ["round=2", *stage_3, "lora.enabled=false"], stage_3):
        check_moving_reference(load_recipe(tiny_recipe, others))


# ---- what a round takes over ----


@pytest.fixture
def first_round(ranked_recipe):
    """A finished first round without training: an adapter of random numbers, or a model with other weights."""

    def make(*overrides: str) -> Recipe:
        recipe = ranked_recipe(*overrides)
        model = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path)
        torch.manual_seed(5)
        if recipe.lora.enabled:
            model = get_peft_model(model, lora_config(recipe))
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.copy_(0.1 * torch.randn(value.shape))
                elif "layers.0.mlp" in name and value.requires_grad:
                    value.mul_(1.1)
        model.save_pretrained(recipe.checkpoint_folder())
        load_tokenizer(recipe.models.policy.path).save_pretrained(recipe.checkpoint_folder())
        claim(recipe.run_folder(), run_settings(recipe))
        (recipe.run_folder() / "manifest.json").write_text("{}")
        return recipe

    return make


def test_a_later_round_is_claimed_for_its_start(first_round, ranked_recipe):
    """Another policy to start from, or another reference, is another training."""
    second = ranked_recipe("round=2")
    for refuses in (
        run_settings,
        generate.stage_settings,
        *(partial(each, dry_run=False) for each in (gene_plan, run_plan)),
    ):
        with pytest.raises(InputError, match="round 1 is not finished; run `bash rounds.sh`"):
            refuses(second)
    missing, generator, *_ = gene_plan(second, True)
    assert missing.startswith("round: MISSING: ") and generator == f"generator: with the policy in {second.start()}"
    first = first_round()
    before = run_settings(second)
    assert before["round"] == 2 and before["start"]["path"] == str(first.checkpoint_folder())
    assert generate.stage_settings(second)["start"] == before["start"]
    claim(second.run_folder(), before)
    with pytest.raises(InputError, match="reference was first, is now previous"):
        claim(second.run_folder(), run_settings(ranked_recipe("round=2", "schedule.round_reference=previous")))
    config = first.checkpoint_folder() / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(InputError, match=r"start\.weights was"):
        claim(second.run_folder(), run_settings(second))


def sampled(recipe: Recipe, tokenizer, samples: list[Sample]) -> tuple[SplitWriter, dict]:
    """The writer of a round, and the record that it makes of a prompt."""
    writer = SplitWriter(recipe, "train", *load_prompts(recipe, "train"), tokenizer)
    (name,) = (name for name, _ in writer.pending())
    writer.write(name, samples)
    writer.close()
    return writer, json.loads(writer.path.read_text())


def test_candidates_of_all_rounds_or_of_one(tiny_recipe, tokenizer, write_lines):
    """Given x and y in each round. Kept: what earlier rounds wrote comes first, once, with its length and its cut."""
    record = {"prompt_id": "p", "prompt": [{"role": "user", "content": "Hi"}], "responses": ["x", "y"]}
    data = f"data.train.path={write_lines([record])}"

    def load(*overrides: str) -> Recipe:
        return load_recipe(tiny_recipe, [data, *overrides])

    writer, first = sampled(load(), tokenizer, [Sample("one", 5, True), Sample("two", 1, False)])
    assert writer.adapter is None and first["responses"] == ["x", "y", "one", "two"]
    texts = [Sample("two", 1, False), Sample("three", 1, False)]
    writer, new = sampled(load("round=2"), tokenizer, texts)
    assert writer.adapter == str(load().checkpoint_folder()) and new["responses"] == ["x", "y", "two", "three"]
    shutil.rmtree(writer.path.parent)
    writer, kept = sampled(load("round=2", "schedule.round_candidates=all"), tokenizer, texts)
    assert kept["responses"] == ["x", "y", "one", "two", "three"]
    assert kept["sources"] == ["given_1", "given_2", "generated", "generated", "generated"]
    assert kept["token_counts"][2:] == [5, 1, 1] and kept["truncated"] == [False, False, True, False, False]
    assert [json.loads(line)["text"] for line in writer.ledger_path.read_text().splitlines()] == ["two"]
    _, third = sampled(load("round=3", "schedule.round_candidates=all"), tokenizer, [Sample("four", 1, False)])
    assert third["responses"] == ["x", "y", "one", "two", "three", "four"]
    whole, _ = sampled(load("round=2", "lora.enabled=false", "run=whole"), tokenizer, texts)
    assert whole.adapter is None


def test_kept_candidates_are_claimed(tiny_recipe, write_lines, first_round):
    first = first_round()
    kept = load_recipe(tiny_recipe, ["round=2", "schedule.round_candidates=all"])
    with pytest.raises(InputError, match="cannot read the file"):
        generate.stage_settings(kept)
    for split in ("train", "test"):
        path = first.candidates(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ranked_records(1)[0]) + "\n")
    before = generate.stage_settings(kept)
    assert set(before["earlier"]) == {"train", "test"}
    first.candidates("test").write_text("")
    assert generate.stage_settings(kept)["earlier"] != before["earlier"]


# ---- training ----


def log_probability(model, row: dict, response: list[int]) -> float:
    """Of one response after its prompt, one row, no padding; nats."""
    with torch.no_grad():
        logits = model(torch.tensor([row["prompt_ids"] + response])).logits[0].double()
    found = log_softmax(logits, dim=-1)
    return sum(found[len(row["prompt_ids"]) - 1 + place, token].item() for place, token in enumerate(response))


CASES = [("true", "first"), ("true", "previous"), ("false", "first"), ("false", "previous")]


@pytest.mark.parametrize(
    ("lora", "reference"), [*CASES[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[2:])]
)
def test_a_round_starts_at_the_policy_of_the_one_before(first_round, ranked_recipe, lora, reference):
    """With a learning rate of 0 the checkpoint is the one before. The logged reward of y_1 is
    beta (log pi_1(y_1) - log pi_ref(y_1)): 0 where the reference is pi_1, too, and then the loss is log 2."""
    settings = [f"lora.enabled={lora}", "schedule.epochs=1", "schedule.gamma_stages=1", "optimizer.learning_rate=0"]
    first = first_round(*settings)
    settings += ["round=2", f"schedule.round_reference={reference}"]
    second = run(ranked_recipe(*settings))
    before, after = weights_of(first), weights_of(second)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    line = log_of(second)[0]
    if reference == "previous":
        assert line["s/largest_at_start"] < 1e-3 and line["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert line["rewards/chosen"] == pytest.approx(0, abs=1e-4)
        # In a file of the round, not of the run, which the first round's would be.
        files = {path.name for path in (Path(second.output) / "reference").glob("*/*.jsonl")}
        assert files == {"dpo-hps-round-2-0.jsonl"}
        return
    base, start = (AutoModelForCausalLM.from_pretrained(second.models.policy.path) for _ in range(2))
    folder = first.checkpoint_folder()
    start = PeftModel.from_pretrained(start, folder) if lora == "true" else AutoModelForCausalLM.from_pretrained(folder)
    start.eval()
    rows = [row for row in TokenRows(second, load_tokenizer(second.models.policy.path))][:4]
    expected = [
        0.1 * (log_probability(start, row, row["response_ids"][0]) - log_probability(base, row, row["response_ids"][0]))
        for row in rows
    ]
    assert max(map(abs, expected)) > 1e-2 and "s/largest_at_start" not in line
    assert line["rewards/chosen"] == pytest.approx(sum(expected) / 4, abs=1e-4)


@pytest.mark.slow
def test_a_moving_reference_stays_where_the_round_began(first_round, ranked_recipe):
    """Interrupted after updates and without the reference's values on disk: the same bits as in one go."""
    first_round()
    settings = ("round=2", "schedule.round_reference=previous")
    whole = run(ranked_recipe(*settings))
    shutil.copytree(whole.output, kept := f"{whole.output}-kept")
    shutil.rmtree(whole.run_folder() / "steps")
    for name in ("manifest.json", "log.jsonl"):
        (whole.run_folder() / name).unlink()
    shutil.rmtree(whole.checkpoint_folder())
    plan(whole)
    interrupt(whole, step=3)
    shutil.rmtree(f"{whole.output}/reference")
    train(whole)
    other = whole.model_copy(update={"output": kept})
    assert without_rate(log_of(whole)) == without_rate(log_of(other))
    one, two = weights_of(whole), weights_of(other)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], value) for name, value in load_file_of(whole).items())


def load_file_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The weights that a round started from."""
    return load_file(recipe.start() / "adapter_model.safetensors")


def test_a_start_of_other_settings_is_refused(first_round, ranked_recipe):
    """By the settings, and by the file where another one was put there."""
    first = first_round()
    with pytest.raises(InputError, match="lora.alpha was 8, is now 16"):
        plan(ranked_recipe("round=2", "lora.alpha=16"))
    second = ranked_recipe("round=2", "schedule.epochs=2")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(second.models.policy.path), lora_config(second))
    fill_adapter(model, first.checkpoint_folder())
    path = first.checkpoint_folder() / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(InputError, match="weights of the adapter are missing"):
        fill_adapter(model, first.checkpoint_folder())


# ---- what is left to do, and the table ----

MEANS = {"mean": 0.5, "interval": [0.25, 0.75]}


@pytest.fixture
def evaluated(ranked_recipe, tiny_recipe):
    """Two rounds with the files that drivers leave: reward r, KL 2 r by round r; the change of round 2 is 0.25."""
    rounds = rounds_of(str(tiny_recipe), ["schedule.rounds=2"])
    for recipe in rounds:
        folder, number = recipe.run_folder(), recipe.round
        folder.mkdir(parents=True)
        ranked_recipe(f"round={number}")
        write_json(recipe.ranked("train").parent / "summary.json", {"train": {"mean": 0.1 * number, "best": number}})
        write_json(folder / "plan.json", {"steps": 4})
        names = ("reward_mean", "reward_mean_change", "reward_win_rate", "kl_sampled", "tokens_mean")
        figures = {name: {"mean": float(number), "interval": [0.0, 9.0]} for name in names}
        figures["kl_sampled"] = {"mean": 2.0 * number, "interval": [0.0, 9.0]}
        write_json(folder / "metrics.json", {"prompts": 2, "figures": figures})
        lines = [{"prompt_id": name, "reward_mean": 1 + 0.25 * number} for name in ("a", "b", f"only {number}")]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        inputs = {str(path): file_hash(path) for path in (recipe.ranked("train"), recipe.data.test.path)}
        for name in ("manifest.json", "metrics.manifest.json"):
            write_manifest(folder / name, recipe, {}, [], inputs)
        (folder / "report.html").write_text("the page")
    before = {"figures": {"reward_mean": MEANS, "tokens_mean": MEANS}}
    write_json(rounds[0].sft_folder() / "metrics.json", before)
    return rounds


def test_the_table_has_reward_and_kl_by_round(evaluated):
    text = summarize(evaluated)
    assert (evaluated[0].run_folder() / "rounds.md").read_text() == text
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert [row["round"] for row in cells] == ["before", "1", "2"]
    assert [row["KL from the first policy"] for row in cells] == ["–", "2.000 [0.000, 9.000]", "4.000 [0.000, 9.000]"]
    assert [row["reward of the answers"].split()[0] for row in cells] == ["0.500", "1.000", "2.000"]
    # the prompts a and b, which both rounds answered: 1.5 - 1.25 in each
    assert [row["change from the round before"] for row in cells] == ["–", "–", "+0.250 [+0.250, +0.250]"]
    assert [row["best of a prompt"] for row in cells] == ["–", "1", "2"]
    assert "[1](report.html), [2](round-2/report.html)" in text
    found = json.loads((evaluated[0].run_folder() / "rounds.json").read_text())
    assert [row["kl"]["mean"] for row in found["rounds"]] == [2, 4]


def remove_metrics(recipe: Recipe) -> None:
    (recipe.run_folder() / "metrics.manifest.json").unlink()


def page_of_training(recipe: Recipe) -> None:
    """The page is older than the metrics: evaluate.sh was killed in between."""
    path = recipe.run_folder() / "metrics.manifest.json"
    path.write_bytes(path.read_bytes())


def other_ranking(recipe: Recipe) -> None:
    recipe.ranked("train").write_text("")


def input_is_gone(recipe: Recipe) -> None:
    recipe.ranked("train").unlink()


@pytest.mark.parametrize("change", [remove_metrics, page_of_training, other_ranking, input_is_gone])
def test_a_finished_round_is_left_out_until_something_changes(evaluated, change):
    assert [is_done(recipe) for recipe in evaluated] == [True, True]
    change(evaluated[1])
    assert [is_done(recipe) for recipe in evaluated] == [True, False]


def test_other_settings_are_for_the_drivers_to_refuse(evaluated, tiny_recipe):
    """More rounds are no other setting of those that are finished."""
    more = rounds_of(str(tiny_recipe), ["schedule.rounds=3"])
    assert [is_done(recipe) for recipe in more] == [True, True, False]
    assert [line.split(":")[1] for line in plan_lines(more)] == [" finished", " finished", " to do"]
    others = rounds_of(str(tiny_recipe), ["schedule.rounds=2", "optimizer.learning_rate=1e-3"])
    assert [is_done(recipe) for recipe in others] == [False, False]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [([], "`schedule.rounds` is 1; give schedule.rounds=3"), (["schedule.rounds=2", "round=2"], "`round` is 2; leave")],
)
def test_rounds_that_rounds_sh_does_not_do(tiny_recipe, overrides, message):
    with pytest.raises(InputError, match=message):
        rounds_of(str(tiny_recipe), overrides)


@pytest.mark.parametrize("setting", ["schedule.rounds=2", "round=2"])
def test_rounds_that_sample_nothing_are_refused(tiny_recipe, setting):
    """Each would train on the same responses."""
    load_recipe(tiny_recipe, ["data.train.responses=0"])
    with pytest.raises(InputError, match=f"`{setting}`: .*`data.train.responses` is 0, .*; raise the second"):
        load_recipe(tiny_recipe, ["data.train.responses=0", setting])


# ---- reproduce.sh ----


def evaluations_of(path, *settings: str) -> list[Evaluated]:
    """The model before training and three rounds of a run, as a table names them."""
    lines = [[str(path), "run=a", *settings, *([f"round={number}"] if number > 1 else [])] for number in (1, 2, 3)]
    runs = [Evaluated(load_recipe(line[0], line[1:]), "data", "data", arguments=line) for line in lines]
    return [Evaluated(runs[0].recipe, "data", "data", sft=True), *runs]


def test_rounds_of_a_table_come_one_after_the_other(tiny_recipe):
    """The third alone is missing in results/. Without checkpoints here the first two are done again before it; the
    second's is enough."""
    sft, first, second, third = evaluations = evaluations_of(tiny_recipe)
    assert [each.title for each in evaluations] == ["data/sft", "data/a", "data/a-round-2", "data/a-round-3"]
    assert waves(with_earlier_rounds([third], evaluations)) == [[first], [second], [third]]
    assert waves(with_earlier_rounds([sft, first], evaluations)) == [[sft, first]]
    second.recipe.run_folder().mkdir(parents=True)
    (second.recipe.run_folder() / "manifest.json").write_text("{}")
    assert waves(with_earlier_rounds([third], evaluations)) == [[third]]


def test_the_model_before_training_is_evaluated_with_a_run_of_its_own_output(tiny_recipe, tmp_path):
    """A run in another output leaves no answers of the model before training in this one."""
    sft, first, *_ = evaluations_of(tiny_recipe)
    _, other, *_ = evaluations_of(tiny_recipe, f"output={tmp_path / 'other'}")
    assert with_a_run([sft, other], [sft, first, other]) == [sft, other, first]
    assert with_a_run([sft, first], [sft, first, other]) == [sft, first]


def test_a_later_round_has_a_ranking_and_a_key_of_its_own(tiny_recipe, ranked_recipe):
    """Runs of several seeds share the first ranking. The key has the generator of the first round."""
    _, first, second, _ = evaluations_of(tiny_recipe, "seed=8")
    assert ranked_by(first.arguments) == [str(tiny_recipe)]
    assert ranked_by(second.arguments) == [str(tiny_recipe), "run=a", "seed=8", "round=2"]
    one, two = result_key(first.recipe), result_key(second.recipe)
    assert two.pop("round") == {"number": 2, "round_reference": "first", "round_candidates": "new"} and one == two
