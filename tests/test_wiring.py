"""From the recipe and the ranked file to one step: what the log says and the optimizer does, against plain arithmetic.

The loss of a method, the rewards that it logs and the gradient are written out here in float64, from the logits of the
library's own forward pass, a response at a time. tests/faults/mutations.py breaks the wiring and looks whether these
tests see it.
"""

import json
import math

import pytest
import torch
from conftest import ranked_records, tiny_config
from torch.func import functional_call
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from alignment import train
from alignment.checks import check_attention
from alignment.plan import plan, run_settings
from alignment.reference import add_reference, cache_folder
from alignment.train import build_trainer, training_config
from hps import shared_prefix
from hps.attention import block_mask
from hps.chat import load_tokenizer, prompt_token_ids, response_token_ids
from hps.errors import InputError
from hps.methods import constants
from hps.row_costs import RowCosts
from hps.settings import LATER
from hps.shared_prefix import SEPARATE, Layout
from hps.trainer import HPSTrainer, PlanCollator
from pipeline.files import write_lines
from pipeline.recipe import OF_ROUNDS, REPOSITORY, Recipe
from pipeline.records import read_ranked

BETA, GAMMA = 0.3, 0.7


def trainer_of(recipe: Recipe) -> HPSTrainer:
    plan(recipe)
    return build_trainer(recipe, load_tokenizer(recipe.models.policy.path), training_config(recipe, 1))


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory) -> str:
    """A tiny model with dropout in its configuration: neither policy nor reference may use it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wiring") / "policy"
    LlamaForCausalLM(tiny_config(tokenizer, attention_dropout=0.3)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def uneven(ranked_recipe, policy):
    """The recipe of one step of four lists of 3, 4, 5 and 3 responses, in two micro-batches."""

    def load(*settings: str) -> Recipe:
        recipe = ranked_recipe(
            f"models.policy.path={policy}",
            f"loss.beta={BETA}",
            f"schedule.gamma_start={GAMMA}",
            "schedule.epochs=1",
            *settings,
        )
        names = ("responses", "rewards", "sources", "token_counts", "truncated")
        records = [
            {**record, **{name: record[name][: 3 + number % 3] for name in names}}
            for number, record in enumerate(ranked_records(4))
        ]
        write_lines(recipe.ranked("train"), (json.dumps(record) + "\n" for record in records))
        return recipe

    return load


# ---- one step by hand ----


def hps(scores, rewards):
    """Eq. 10: `-log(exp(s_1) / (exp(s_1) + sum_i q_i exp(s_i)))`, log q = log softmax(gamma r) of Eq. 9."""
    log_q = log_softmax(GAMMA * rewards[1:], dim=0)
    return -logsigmoid(scores[0] - torch.logsumexp(scores[1:] + log_q, dim=0))


def two_terms(scores, rewards):
    """Appendix E: y_2, too, against all that rank below it, with lambda 0.5."""
    return hps(scores, rewards) + 0.5 * hps(scores[1:], rewards[1:])


def exo(scores, rewards):
    """`KL(softmax(rho) || softmax(r / beta_r))` over the list, beta_r = 2."""
    policy = log_softmax(scores, dim=0)
    return (policy.exp() * (policy - log_softmax(rewards / 2, dim=0))).sum()


def lipo(scores, rewards):
    """LiPO-lambda: `sum |G_i - G_j| |1/D(tau_i) - 1/D(tau_j)| log(1 + exp(rho_j - rho_i))` over r_i > r_j."""
    n = len(scores)
    psi = [sum(torch.sigmoid(rewards[i] - rewards[j]) for j in range(n) if j != i) / (n - 1) for i in range(n)]
    places = [1 / math.log(2 + int((scores > score).sum())) for score in scores]
    return sum(
        abs(2 ** psi[i] - 2 ** psi[j]) * abs(places[i] - places[j]) * -logsigmoid(scores[i] - scores[j])
        for i in range(n)
        for j in range(i + 1, n)
    )


def rebel(scores, rewards):
    """`sum_i q_i (rho_1 - rho_i - (r_1 - r_i))^2` over the dispreferred."""
    q = torch.softmax(GAMMA * rewards[1:], dim=0)
    return (q * (scores[0] - scores[1:] - (rewards[0] - rewards[1:])) ** 2).sum()


def pair(scores, rewards):
    """The best against the worst, with SimPO's margin of 0.1."""
    return -logsigmoid(scores[0] - scores[1] - 0.1)


def nearest(rewards):
    """Place of the response whose reward is nearest to the mean of the list's minus one deviation."""
    return 1 + (rewards[1:] - (rewards.mean() - rewards.std(correction=0))).abs().argmin()


def below_mean(scores, rewards):
    """Eq. 8 with this response alone: its weight is 1, the factor stays N."""
    return -logsigmoid(scores[0] - scores[nearest(rewards)] - math.log(len(rewards) - 1))


def share_of_nearest(rewards):
    return torch.eye(len(rewards))[nearest(rewards)]


def shares_of_q(rewards):
    return torch.cat([torch.zeros(1), torch.softmax(GAMMA * rewards[1:], dim=0)])


def equal_shares(rewards):
    return torch.tensor([0.0, *[1 / (len(rewards) - 1)] * (len(rewards) - 1)])


# By method: settings, loss of a list, shares of the responses in what is logged as `rejected`.
METHODS = {
    "hps": (["loss.estimator=exact"], hps, shares_of_q),
    "appendix E": (
        ["loss.estimator=exact", "loss.positives=2", "loss.appendix_e_lambda=0.5"],
        two_terms,
        shares_of_q,
    ),
    "below mean": (
        ["loss.negatives=below_mean", "loss.negative_deviations=1", "loss.factor_n=true", "loss.estimator=exact"],
        below_mean,
        share_of_nearest,
    ),
    "lipo": (["loss.preference=lipo", "loss.list_size=null"], lipo, equal_shares),
    "rebel": (["loss.family=rebel", "loss.estimator=exact"], rebel, shares_of_q),
    "exo-pl": (
        ["loss.family=exo", "loss.preference=pl", "loss.list_size=null", "loss.exo_beta_r=2"],
        exo,
        equal_shares,
    ),
    "simpo-bt": (
        ["loss.family=simpo", "loss.preference=bt", "loss.simpo_beta=3", "loss.simpo_margin=0.1"],
        pair,
        equal_shares,
    ),
}
LORA = ["lora.r=2", "lora.alpha=6", "lora.target_modules=[k_proj,down_proj]"]
WAYS = {
    "before": ["training.reference=precomputed", *LORA],
    "in step": ["training.reference=in_step", *LORA],
    "separate rows": ["training.shared_prefix=false", *LORA],
    "checkpointing": ["training.gradient_checkpointing=true", "training.row_tokens=2000", *LORA],
    "full": ["lora.enabled=false"],
    "full in step": ["lora.enabled=false", "training.reference=in_step"],
}


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("hps", "before"),
        ("hps", "in step"),
        ("lipo", "before"),
        ("rebel", "before"),
        *[pytest.param("hps", way, marks=pytest.mark.slow) for way in list(WAYS)[2:]],
        *[
            pytest.param(method, "before", marks=pytest.mark.slow)
            for method in METHODS
            if method not in ("hps", "lipo", "rebel")
        ],
    ],
)
def test_a_step_is_its_formula(uneven, method, way):
    """The policy differs from the reference before the step, the lists in their lengths."""
    settings, loss, shares = METHODS[method]
    recipe = uneven(*settings, *WAYS[way])
    trainer = trainer_of(recipe)
    move_away(trainer)
    trained = {name: value.detach().double() for name, value in trainer.model.named_parameters() if value.requires_grad}
    if trainer.is_adapted:
        assert {name.split(".")[-4] for name in trained} == set(recipe.lora.target_modules)
    trainer._check_start = lambda *given: None  # it would refuse such a policy
    add_reference(recipe, trainer)
    rows = rows_of_passes(trainer)
    trainer.train()
    line, *_ = trainer.state.log_history
    expected = by_hand(recipe, trained, loss, shares)
    assert abs(expected["rewards/margins"]) > 0.1 and trainer.state.global_step == 1
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    assert {name for name in line if name.startswith("s_per_token/")} == {n for n in expected if n.startswith("s_per_")}
    assert line.get("gamma") == (pytest.approx(GAMMA) if method in ("hps", "appendix E", "rebel") else None)
    assert rows == ROWS.get(way, [2, 2])


# Rows of the forward passes of the two micro-batches, where it is not a row a list. In step the reference has a pass of
# its own; each response has a row of its own; both lists fill one long row, and the backward pass makes it again.
ROWS = {"in step": [2, 2, 2, 2], "separate rows": [7, 8], "checkpointing": [1, 1, 1, 1]}


def rows_of_passes(trainer: HPSTrainer) -> list[int]:
    """Filled while it trains: rows of each pass of the policy's first layer, the gradient's own included."""
    rows: list[int] = []
    model = trainer.model.get_base_model() if trainer.is_adapted else trainer.model
    norm = model.model.layers[0].input_layernorm  # inside what gradient checkpointing does again
    norm.register_forward_pre_hook(lambda module, given: rows.append(given[0].shape[0]))
    return rows


def move_away(trainer: HPSTrainer) -> None:
    """Random numbers in place of LoRA's B, which is 0, or another factor on the weights of a layer."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_B" in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            elif "layers.0.mlp" in name and value.requires_grad:
                value.mul_(1.2)


def by_hand(recipe: Recipe, trained: dict, loss, shares) -> dict:
    """What the log must say, and the norm of the gradient with respect to the weights that train."""
    tokenizer = load_tokenizer(recipe.models.policy.path)
    model = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path).double().eval()
    before = {name: value.detach() for name, value in model.named_parameters()}
    leaves = {name: value.requires_grad_() for name, value in trained.items()}
    lists, total = [], 0
    for _, record in read_ranked(recipe.ranked("train")):
        places = [0, -1] if recipe.loss.preference == "bt" else range(len(record["rewards"]))
        prompt = prompt_token_ids(tokenizer, record["prompt"])
        responses = [
            response_token_ids(tokenizer, record["prompt"], record["responses"][place], record["truncated"][place])
            for place in places
        ]
        rewards = torch.tensor([record["rewards"][place] for place in places], dtype=torch.float64)
        policy = log_probs(model, after(before, leaves, recipe), prompt, responses)
        lengths = torch.tensor([len(ids) for ids in responses])
        if recipe.loss.family == "simpo":
            scores = recipe.loss.simpo_beta * policy / lengths
        else:
            scores = BETA * (policy - log_probs(model, before, prompt, responses))
        total = total + loss(scores, rewards) / 4
        found = figures(scores.detach(), policy.detach(), lengths, shares(rewards), len(prompt))
        if recipe.loss.family != "simpo":
            found |= log_ratios(scores.detach(), lengths, shares(rewards))
        lists.append(found)
    gradient = torch.autograd.grad(total, list(leaves.values()))
    means = {name: sum(each[name] for each in lists) / 4 for name in lists[0]}
    means["num_tokens"] *= 4
    return {"loss": total.item(), "grad_norm": math.sqrt(sum(g.square().sum().item() for g in gradient)), **means}


def figures(scores, policy, lengths, share, prompt: int) -> dict:
    found = {
        "rewards/accuracies": (share * (scores[0] > scores)).sum().item(),
        "num_tokens": prompt * len(lengths) + lengths.sum().item(),
    }
    for name, values in (("rewards", scores), ("logps", policy), ("lengths", lengths)):
        found |= {f"{name}/chosen": values[0].item(), f"{name}/rejected": (share * values).sum().item()}
    return {**found, "rewards/margins": found["rewards/chosen"] - found["rewards/rejected"]}


def log_ratios(scores, lengths, share) -> dict:
    """s of the preferred and of the dispreferred, nats; a loss without a reference logs none."""
    found = {}
    for name, values in (("s", scores / BETA), ("s_per_token", scores / BETA / lengths)):
        found |= {f"{name}/chosen": values[0].item(), f"{name}/rejected": (share * values).sum().item()}
    return found


def after(before: dict, leaves: dict, recipe: Recipe) -> dict:
    """The policy's weights: those that train themselves, or `W + alpha / r B A`."""
    changed = dict(before)
    for name, value in leaves.items():
        place = name.removeprefix("base_model.model.")
        if "lora_B" in name:
            a = leaves[name.replace("lora_B", "lora_A")]
            assert a.shape[0] == recipe.lora.r
            place = place.replace(".lora_B.default", "")
            changed[place] = before[place] + recipe.lora.alpha / recipe.lora.r * value @ a
        elif "lora_" not in name:
            changed[place] = value
    return changed


def log_probs(model, weights: dict, prompt: list[int], responses: list[list[int]]) -> torch.Tensor:
    """(responses,), summed over the tokens, nats."""
    values = []
    for response in responses:
        logits = functional_call(model, weights, (torch.tensor([prompt + response]),)).logits[0, len(prompt) - 1 : -1]
        values.append(logits.log_softmax(dim=-1).gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(values)


# ---- the optimizer ----


def test_an_update_is_adamw_with_decay_and_clipping(ranked_recipe):
    """One step at lr 0.01. LoRA's B is 0 at first, so that A has no gradient: it only decays, to 1 - 0.01 x 0.3.

    The first moments are 0.1 g, and the clipped g has the norm 0.05. B moves by lr against the sign of its gradient.
    """
    recipe = ranked_recipe(
        "optimizer.weight_decay=0.3", "optimizer.max_grad_norm=0.05", "schedule.epochs=1", "schedule.global_batch=8"
    )
    trainer = trainer_of(recipe)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 1
    optimizer, parameters = trainer.optimizer.optimizer, dict(trainer.model.named_parameters())
    moments = {name: optimizer.state[parameters[name]]["exp_avg"] for name in before}
    assert torch.cat([value.flatten() for value in moments.values()]).norm().item() == pytest.approx(0.005, rel=1e-4)
    for name, value in before.items():
        if "lora_A" in name:
            torch.testing.assert_close(parameters[name].detach(), 0.997 * value, rtol=1e-6, atol=0)
        else:
            large = moments[name].abs() > 1e-7
            torch.testing.assert_close(parameters[name][large], -0.01 * moments[name][large].sign(), rtol=2e-2, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "shares"),
    [
        ("linear", [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [0, 1 / 2, 1, (1 + math.cos(math.pi / 4)) / 2, 1 / 2, (1 - math.cos(math.pi / 4)) / 2]),
        ("constant", [0, 1 / 2, 1, 1, 1, 1]),
    ],
)
def test_learning_rate_of_every_step(ranked_recipe, scheduler, shares):
    """Two steps of warm-up, then four as the scheduler says; the whole training is its length."""
    recipe = ranked_recipe(
        f"optimizer.scheduler={scheduler}",
        "optimizer.warmup_steps=2",
        "optimizer.learning_rate=1e-4",
        "schedule.epochs=6",
        "schedule.global_batch=2",
        "loss.preference=bt",
        "training.reference=in_step",
        prompts=2,
    )
    trainer = trainer_of(recipe)
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history[:-1]]
    assert rates == pytest.approx([1e-4 * share for share in shares], rel=1e-6)


def test_the_seed_makes_the_adapter(ranked_recipe):
    """The random half of LoRA: the same for the same seed, another for another."""
    first, again, other = (
        trainer_of(ranked_recipe(f"seed={seed}", f"run={name}"))
        for seed, name in ((7, "first"), (7, "again"), (8, "other"))
    )
    for name, value in first.model.named_parameters():
        if "lora_A" in name:
            assert torch.equal(again.model.get_parameter(name), value)
            assert not torch.equal(other.model.get_parameter(name), value)


# ---- attention ----


def test_flex_attention_computes_a_micro_batch_in_one_row(uneven, monkeypatch):
    """One row as long as both prompts and their responses, and the reference's values as with sdpa."""
    lengths = []

    def seen(segments, positions):
        lengths.append(positions.shape)
        return block_mask(segments, positions)

    monkeypatch.setattr("hps.attention.block_mask", seen)
    found = {}
    for attention in ("sdpa", "flex"):
        trainer = trainer_of(uneven(f"training.attention={attention}", f"run={attention}", "schedule.device_batch=2"))
        found[attention] = trainer.reference_log_probs([trainer.rows[0], trainer.rows[1]])
    assert found["flex"] == pytest.approx(found["sdpa"], rel=1e-5)
    rows = [trainer.rows[0], trainer.rows[1]]
    tokens = sum(len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in rows)
    assert lengths[-1] == (1, tokens)


def test_flex_attention_is_refused_where_it_cannot_train(ranked_recipe):
    with pytest.raises(InputError, match="torch trains with it on CUDA alone; here is no CUDA device; use training.at"):
        check_attention(ranked_recipe("training.attention=flex"))
    with pytest.raises(InputError, match="a micro-batch is one row; use training.row_tokens=null"):
        check_attention(ranked_recipe("training.attention=flex", "training.row_tokens=4096"))
    check_attention(ranked_recipe("training.row_tokens=4096"))
    recipe = ranked_recipe("training.attention=flex", "training.shared_prefix=false")
    with pytest.raises(InputError, match="is `flex`, and some .* share a prompt: `shared_prefix` is false; "):
        trainer_of(recipe)


def test_rows_on_cuda(ranked_recipe, monkeypatch):
    """On a grid; in half precision, where `auto` chooses, by their cost. On a CPU neither."""
    shape = AutoConfig.from_pretrained(REPOSITORY / "configs/shapes/llama-3-8b.json")
    costs, of_flex = (RowCosts.of(shape, adapter=True, checkpointing=True, flex=flex) for flex in (False, True))
    layout = Layout(math.inf, math.inf, True, "")
    settings = ["training.gradient_checkpointing=true"]
    recipes = [ranked_recipe(f"training.attention={named}", *settings) for named in ("auto", "sdpa", "flex", "auto")]
    configs = [training_config(recipe, 1) for recipe in recipes]

    def made() -> list[PlanCollator]:
        found = []
        for recipe, config, named in zip(recipes, configs, ("sdpa", "sdpa", *["flex_attention"] * 2), strict=True):
            shape._attn_implementation = named
            found.append(PlanCollator.of(layout, shape, 0, config, True, recipe.training.attention == "auto"))
        return found

    in_one = PlanCollator(0, layout, shared_prefix.ONE_ROW)
    assert made() == [PlanCollator(0, layout), PlanCollator(0, layout), in_one, in_one]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for config in configs:
        config.use_cpu = False
    assert [each.costs for each in made()] == [None] * 4  # fp32 has no flash attention
    for config in configs:
        config.bf16 = True
    assert made() == [
        PlanCollator(0, layout, None, gridded=True, costs=costs),
        PlanCollator(0, layout, None, gridded=True),
        PlanCollator(0, layout, shared_prefix.ONE_ROW, gridded=True),
        PlanCollator(0, layout, shared_prefix.ONE_ROW, gridded=True, costs=of_flex),
    ]
    example = {"prompt_ids": [1] * 170, "response_ids": [[2] * 1000] * 2}
    by_cost, shared, flex, flex_by_cost = made()
    assert by_cost.rows([example])["input_ids"].shape == (2, 1216)  # 1,170 on the grid
    assert shared.rows([example])["input_ids"].shape == (2, 1216)  # 2,170 are split
    example = {"prompt_ids": [1] * 170, "response_ids": [[2] * 300] * 2}
    assert by_cost.rows([example])["input_ids"].shape == (2, 480)
    assert flex.rows([example])["input_ids"].shape == (1, 800)  # 770 on the grid
    assert flex_by_cost.rows([example])["input_ids"].shape == (2, 480)  # launching takes longer than 770 tokens
    assert flex_by_cost.rows([example] * 4)["input_ids"].shape == (1, 3200)  # 3,080 on the grid
    example = {"prompt_ids": [1] * 600, "response_ids": [[2] * 300] * 8}
    assert by_cost.rows([example])["input_ids"].shape == (2, 1856)  # 1,800 on the grid; apart there would be 8 rows


def test_flash_attention_is_for_classes_that_cannot_share(ranked_recipe, monkeypatch):
    chosen = []
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda model, name: chosen.append(name))
    for installed, attention, shared in ((True, "auto", 0), (True, "sdpa", 0), (True, "auto", 9), (False, "auto", 0)):
        monkeypatch.setattr(train, "flash_attention", lambda installed=installed: installed)
        monkeypatch.setattr(train, "prove", lambda *_, shared=shared: Layout(shared, math.inf, True, "its windows"))
        trainer_of(ranked_recipe(f"training.attention={attention}"))
        assert chosen == ["flash_attention_2"]


def test_a_broken_flash_attention_is_a_warning(monkeypatch, tmp_path, capsys):
    """The package and the card are doubles: it was built for another torch."""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not train.flash_attention()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not train.flash_attention()
    assert "flash-attn is not used: it cannot be imported (undefined symbol: _ZN3c10)" in capsys.readouterr().out


# ---- what is found again ----


def test_a_reference_of_another_precision_is_another(ranked_recipe):
    """Model, precision, attention and layout of the rows each lead to a folder of their own."""
    recipe = ranked_recipe()
    trainer = trainer_of(recipe)
    folders = [cache_folder(recipe, trainer)]
    trainer.model.set_attn_implementation("eager")
    folders.append(cache_folder(recipe, trainer))
    trainer.data_collator.layout = SEPARATE
    folders.append(cache_folder(recipe, trainer))
    trainer.model.to(torch.bfloat16)
    folders.append(cache_folder(recipe, trainer))
    recipe.models.policy.path = recipe.models.reward.path
    folders.append(cache_folder(recipe, trainer))
    trainer.data_collator.gridded = True
    folders.append(cache_folder(recipe, trainer))
    trainer.data_collator.costs = RowCosts(3.0, 2.0, 1.0, 0.0, 0.0, 0.0, False)
    folders.append(cache_folder(recipe, trainer))
    assert len(set(folders)) == 7
    assert cache_folder(recipe, trainer) == folders[-1]


def test_whatever_decides_the_weights_is_claimed(ranked_recipe):
    """Every field of loss, schedule, LoRA and optimizer; seed, kept checkpoints, policy and ranked file.

    Of the loss, another family, and what this family reads: the others' constants decide nothing. Later settings are
    claimed where they are not at their defaults, so that earlier claims still match.
    """
    recipe = ranked_recipe()
    before = run_settings(recipe)
    assert {name for name in vars(recipe.loss) if name not in before["loss"]} == {*constants(), *LATER}
    fields = [(recipe.loss, name) for name in before["loss"] if name != "family"]
    fields += [
        (section, name)
        for section in (recipe.schedule, recipe.lora, recipe.optimizer)
        for name in vars(section)
        if name not in OF_ROUNDS  # they decide nothing in the first round (tests/test_rounds.py)
    ]
    fields += [(recipe, "seed"), (recipe.evaluation, "checkpoints")]
    for section, name in fields:
        value = getattr(section, name)
        setattr(section, name, 3.25)
        assert run_settings(recipe) != before, name
        setattr(section, name, value)
    recipe.loss.family = "exo"
    assert run_settings(recipe)["loss"] == before["loss"] | {"family": "exo", "exo_epsilon": 1e-3, "exo_beta_r": 1.0}
    recipe.loss.family = "dpo"
    recipe.loss.negatives, recipe.loss.negative_deviations = "below_mean", 1.0
    assert run_settings(recipe)["loss"] == before["loss"] | {"negatives": "below_mean", "negative_deviations": 1.0}
    recipe.loss.negatives, recipe.loss.negative_deviations = "softmax", 2.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.models.policy, "path", recipe.models.reward.path)
        assert run_settings(recipe) != before
    assert run_settings(recipe) == before
    write_lines(recipe.ranked("train"), ["{}\n"])
    assert run_settings(recipe) != before
