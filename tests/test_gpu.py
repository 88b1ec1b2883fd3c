"""The CUDA path on a card, without weights to download and without a network: `bash test.sh gpu`.

Checks of numbers run at two places. Marked `gpu`: the shape of an 8B Llama with random weights in bf16 on the card
(fewer layers where its memory asks for that). Unmarked: a tiny shape on the CPU, so that the ordinary tests know that
the checks themselves work. What a check measures is printed; `bash test.sh gpu` shows it.

Accuracy is compared, not bounded by a constant: our rows may be as far from fp32 as the model's own forward pass in
bf16 is, times `FACTOR`. This file needs torch, transformers and PEFT; what needs more is skipped, with its reason.
"""

import gc
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import REPOSITORY

from benchmarks.shapes import EIGHT, ONE, TINY, Lengths, random_model, shape, with_adapter
from hps.response_head import add_response_head
from hps.shared_prefix import separate_rows, shared_rows
from hps.trial import flex_is_right
from pipeline import machine
from tests import pins

FACTOR = 1.5  # two ways to round differ by the kernels' order of additions, a wrong mask or position by 10 and more
GB = 10**9


@dataclass(frozen=True)
class Place:
    """Where numbers are checked: the device, a shape, lengths that end within and between the kernels' tiles."""

    device: str
    name: str
    lengths: Lengths
    dtype: torch.dtype = torch.bfloat16

    def layers(self) -> int | None:
        """All, or as many as leave half of the card's memory beside their weights in fp32."""
        if self.device == "cpu":
            return None
        config = shape(self.name)
        half = torch.cuda.get_device_properties(0).total_memory / 2
        ends = 8 * config.vocab_size * config.hidden_size
        layer = 4 * (2.5 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
        return max(1, min(config.num_hidden_layers, int((half - ends) / layer)))

    def model(self, attention: str = "sdpa"):
        return random_model(shape(self.name, self.layers()), self.device, self.dtype, attention)

    def rows(self, make, lengths: Lengths | None = None) -> dict[str, torch.Tensor]:
        """Rows as the trainer makes them on this device."""
        texts = (lengths or self.lengths).texts(shape(self.name).vocab_size)
        found = make(*texts, pad=0, gridded=self.device == "cuda")
        return {name: value.to(self.device) for name, value in found.items()}


PLACES = [
    pytest.param(Place("cpu", TINY, Lengths(9, (5, 12, 1, 7))), id="cpu"),
    pytest.param(Place("cuda", EIGHT, Lengths(170, (40, 129, 1, 100))), id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture
def no_card():
    machine.check_cuda()  # cards that torch cannot use are a failure, not a reason to skip
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use: not checked here; run `bash test.sh gpu` on a machine with one")


@pytest.fixture(params=PLACES)
def place(request):
    if request.param.device == "cuda":
        request.getfixturevalue("no_card")
    yield request.param
    for name in ("last_type", "last_value", "last_exc", "last_traceback"):  # of a check that failed: it holds the model
        vars(sys).pop(name, None)
    gc.collect()
    if request.param.device == "cuda":
        torch.cuda.empty_cache()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root of the mean square."""
    return (found.double() - exact.double()).square().mean().sqrt().item()


# ---- the machine ----


def test_pinned_and_found_versions(capsys):
    pins.main()
    printed = capsys.readouterr().out
    assert "pinned 2.13.0" in printed and pins.pinned("transformers") == "5.23.0 or 5.19.0"
    assert pins.found("no-such-package").endswith("unchecked")
    print(printed)


@pytest.mark.gpu
def test_driver_compiler_and_card(no_card):
    assert machine.compiler_problem() is None
    card = torch.cuda.get_device_properties(0)
    print(f"{machine.device()}, {card.name}, {card.total_memory / GB:.1f} GB, driver {machine.driver_version()}")
    print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {torch.cuda.nccl.version()}")
    assert torch.cuda.is_bf16_supported(including_emulation=False)


@pytest.mark.gpu
def test_a_kernel_is_compiled(no_card):
    """By Triton, which needs a C compiler and Python.h for its launcher."""
    pytest.importorskip("triton")
    values = torch.randn(1000, device="cuda")
    compiled = torch.compile(lambda x: torch.nn.functional.silu(x) * x.cos() + 1)
    torch.testing.assert_close(compiled(values), torch.nn.functional.silu(values) * values.cos() + 1)


# ---- values and gradients ----


def class_log_probs(model, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of each scored token by `model(...)` itself, on separate rows."""
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
    return logits.flatten(0, 1)[rows["scored"]].float().log_softmax(dim=-1).gather(1, rows["targets"][:, None])[:, 0]


ATTENTIONS = ["sdpa", "eager", "flex_attention", "flash_attention_2"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_log_probabilities_in_bf16_against_fp32(place, attention):
    """Shared and separate rows are as near to fp32 as `model(...)` is; flash attention has no shared ones."""
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
        if place.device == "cpu":
            pytest.skip("flash attention does not run on a CPU")
    model = place.model(attention)
    rows = {"separate": place.rows(separate_rows)}
    if attention != "flash_attention_2":
        rows["shared"] = place.rows(shared_rows)
    own = class_log_probs(model, rows["separate"])
    add_response_head(model)
    found = {name: model(**each).log_probs for name, each in rows.items()}
    model.float()
    model.set_attn_implementation("sdpa")  # flash attention knows no fp32
    exact = class_log_probs(model, rows["separate"])
    errors = {name: error(values, exact) for name, values in {"model(...)": own, **found}.items()}
    print(
        f"{attention}:",
        ", ".join(f"{name}: {value:.3g} nats a token" for name, value in errors.items()),
        f"({model.config.num_hidden_layers} layers)",
    )
    assert exact.std() > 0.1 and errors["model(...)"] > 0
    for name in found:
        assert errors[name] <= FACTOR * errors["model(...)"], name
        torch.testing.assert_close(model(**rows[name]).log_probs, exact, rtol=1e-3, atol=2e-3)


def neighbours_seen(rows: dict) -> dict:
    """Rows in which a response sees those before it."""
    prompt = rows["segments"][..., 0]
    return {**rows, "segments": torch.stack([prompt, prompt.clamp(max=0)], dim=-1)}


def positions_off(rows: dict) -> dict:
    """Rows whose positions run on from response to response."""
    return {**rows, "position_ids": torch.arange(rows["input_ids"].shape[1], device=rows["input_ids"].device)[None]}


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [neighbours_seen, positions_off])
@torch.no_grad()
def test_a_mistake_in_the_rows_would_be_seen(place, spoil):
    """The bound of these checks is narrow enough: it refuses a wrong mask and wrong positions."""
    model = place.model("eager")  # sdpa goes by blocks, which know no such mistake
    separate, shared = place.rows(separate_rows), place.rows(shared_rows)
    own = class_log_probs(model, separate)
    add_response_head(model)
    wrong = model(**spoil(shared)).log_probs
    exact = class_log_probs(model.float(), separate)
    print(f"{spoil.__name__}: error {error(wrong, exact):.3g}, of model(...) {error(own, exact):.3g}")
    assert error(wrong, exact) > 2 * FACTOR * error(own, exact)


@torch.no_grad()
def test_an_untrained_adapter_diverges_by_rounding_alone(place):
    """The KL floor: the same weights before and behind a LoRA whose B is 0, in bf16 and by the same rows, are equal;
    by other rows the divergence is what rounding makes of 0. In fp32, as it is measured, that is a thousandth."""
    from peft import LoraConfig, get_peft_model

    model = place.model()
    rows, alone = (
        place.rows(separate_rows),
        place.rows(separate_rows, Lengths(place.lengths.prompt, place.lengths.responses[:1])),
    )

    def logits(these: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: these[name] for name in ("input_ids", "attention_mask")}
        count = place.lengths.responses[0]  # of the first response, which both have
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[these["scored"][:count]].float()

    def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
        return torch.nn.functional.kl_div(one, other, log_target=True, reduction="sum").item()

    before = logits(rows).log_softmax(dim=-1)
    other = logits(alone).log_softmax(dim=-1)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    after = adapted(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
    after = after.flatten(0, 1)[rows["scored"][: place.lengths.responses[0]]].float().log_softmax(dim=-1)
    model.float()
    exact = [logits(each).log_softmax(dim=-1) for each in (rows, alone)]
    floor = [divergence(after, before), divergence(other, before), divergence(*exact)]
    print(
        f"KL floor over {len(before)} tokens: {floor[0]:.3g} nats in the same rows, {floor[1]:.3g} in other rows, "
        f"{floor[2]:.3g} there in fp32"
    )
    assert abs(floor[0]) <= 1e-6 * len(before) and floor[1] <= 0.005 * len(before)
    assert abs(floor[2]) <= 1e-3 * floor[1] + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_of_shared_and_separate_rows(place, attention):
    """Of a LoRA on q and v: as near to fp32 as `model(...)` is. Flash attention, which takes no mask, has separate rows
    alone."""
    if attention.startswith("fl") and place.device == "cpu":
        pytest.skip(f"{attention} has no backward pass on a CPU")
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    adapted = with_adapter(place.model(attention))
    base = adapted.get_base_model()
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    separate = place.rows(separate_rows)
    weights = torch.linspace(-1, 1, len(separate["targets"]), device=place.device)

    def gradient(values: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad((values * weights).sum(), trained)
        return torch.cat([each.flatten().float() for each in found])

    own = gradient(class_log_probs(base, separate))
    add_response_head(base)
    found = {"separate": gradient(base(**separate).log_probs)}
    if attention != "flash_attention_2":
        found["shared"] = gradient(base(**place.rows(shared_rows)).log_probs)
    adapted.float()
    base.set_attn_implementation("sdpa")  # flash attention knows no fp32
    exact = gradient(base(**separate).log_probs)
    scale = exact.square().mean().sqrt().item()
    errors = {name: error(values, exact) / scale for name, values in {"model(...)": own, **found}.items()}
    print(
        f"{attention}, relative error of gradients:", ", ".join(f"{name} {value:.3g}" for name, value in errors.items())
    )
    assert scale > 0
    for name in found:
        assert errors[name] <= FACTOR * errors["model(...)"], name


@pytest.mark.gpu
@pytest.mark.parametrize("name", [EIGHT, ONE])
def test_flex_attention_becomes_the_default(no_card, name):
    """What `training.attention: auto` asks before it takes flex attention, for heads of 128 and of 64."""
    assert flex_is_right(shape(name), torch.device("cuda"), torch.bfloat16)


# ---- memory ----


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_a_step_against_the_formula(place, checkpointing):
    """A pair of 2 x 1,024 tokens under LoRA: the peak is at most the formula of the dry run and 2.5 GB, which it leaves
    out (the tiles of the head, fragments). On the CPU, which counts no peak, the step alone."""
    pytest.importorskip("pydantic", reason="alignment.memory reads recipes by pydantic")
    from alignment.memory import activations, states

    tokens = 1024 if place.device == "cuda" else 12
    lengths = Lengths(tokens // 4, (tokens - tokens // 4,) * 2)
    adapted = with_adapter(place.model())
    base, config = adapted.get_base_model(), adapted.get_base_model().config
    add_response_head(base)
    if checkpointing:
        adapted.enable_input_require_grads()
        base.gradient_checkpointing_enable({"use_reentrant": False})
    base.train()
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad])
    rows = place.rows(separate_rows, lengths)
    sizes = [(weight.numel(), weight.requires_grad) for weight in adapted.parameters()]
    everything, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        loss = -base(**rows).log_probs.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert math.isfinite(loss.item())
    formula = sum(states(everything, trained, 1, 1, False).values()) + activations(config, 2 * tokens, checkpointing)
    if place.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        print(f"gradient checkpointing {checkpointing}: {peak / GB:.2f} GB measured, {formula / GB:.2f} by the formula")
        assert 2 * everything < peak <= formula + 2.5 * GB and formula <= 1.3 * peak


# ---- the real stage ----


@pytest.mark.gpu
def test_a_training_is_resumed_on_the_card(no_card, ranked_recipe):
    """The real stage in bf16 on a tiny model: stopped after step 3, continued from step 2. On a card additions have no
    fixed order, so the weights are as near to the whole run's as those of another whole run are, times 10, or apart by
    a hundredth of what training moved the most."""
    pytest.importorskip("trl")
    if torch.cuda.device_count() > 1:
        pytest.skip("several GPUs are visible, and one process would use them all: CUDA_VISIBLE_DEVICES=0")
    test_train = pytest.importorskip("test_train")
    one, two, broken = (ranked_recipe(f"run={name}") for name in ("one", "two", "broken"))
    for recipe in (one, two):
        test_train.run(recipe)
    test_train.plan(broken)
    test_train.interrupt(broken, step=3)
    test_train.train(broken)
    weights = [test_train.weights_of(recipe) for recipe in (one, two, broken)]
    noise, apart = (
        max((weights[0][name].float() - other[name].float()).abs().max().item() for name in weights[0])
        for other in weights[1:]
    )
    moved = max(value.float().abs().max().item() for name, value in weights[0].items() if "lora_B" in name)  # from 0
    print(f"largest difference of a weight: two whole runs {noise:.3g}, resumed {apart:.3g}; moved {moved:.3g}")
    assert apart <= max(10 * noise, 0.01 * moved)


@pytest.mark.gpu
def test_all_cards_train_as_one(no_card, ranked_recipe, tiny_recipe, run_module):
    """ZeRO-2 by torchrun over the cards against one process on the first. One trains bf16 adapters, the other fp32 ones
    under autocast: the losses of the first two steps agree to 1 %, later ones to 15 %."""
    cards = 2 ** int(math.log2(min(4, torch.cuda.device_count())))
    if cards == 1:
        pytest.skip("one GPU: several processes are not checked here")
    for package in ("trl", "deepspeed"):
        pytest.importorskip(package)
    losses = []
    for processes in (1, cards):
        settings = ["schedule.device_batch=1", f"run=on{processes}", f"training.processes={processes}"]
        if processes > 1:
            settings.append(f"training.deepspeed={REPOSITORY / 'configs/deepspeed/zero2.json'}")
        test_train = pytest.importorskip("test_train")
        recipe = ranked_recipe(*settings)
        test_train.plan(recipe)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(visible.split(",")[:processes])}
        done = run_module("alignment.launch", tiny_recipe, *settings, env={**os.environ, **seen})
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{processes} process(es), {'DeepSpeed ZeRO-2' if processes > 1 else 'no DeepSpeed'}" in done.stdout
        losses.append([line["loss"] for line in test_train.log_of(recipe)])
    print(f"losses of one process and of {cards}: {losses}")
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=0.15)
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=0.01)


@pytest.mark.gpu
def test_vllm_samples_on_the_card(no_card, tiny_model, tokenizer):
    """The engine as the stages use it: every prompt comes back once, with its samples. How many are the same when they
    are sampled again is printed: on a card that depends on how the engine batches."""
    pytest.importorskip("vllm")
    from hps.chat import end_of_turn_ids, prompt_token_ids
    from pipeline.engine import Engine
    from pipeline.recipe import Generation, Model

    settings = Generation(max_prompt_tokens=64, max_new_tokens=16, max_sequences=64, gpu_memory_utilization=0.3)
    ids = prompt_token_ids(tokenizer, [{"role": "user", "content": "Hello"}])
    engine = Engine(Model(path=str(tiny_model)), settings, end_of_turn_ids(tokenizer), 0)
    prompts = [(str(number), ids, 8) for number in range(16)]
    first, again = dict(engine.stream(prompts)), dict(engine.stream(prompts))
    assert first.keys() == {str(number) for number in range(16)}
    assert all(len(samples) == 8 for samples in first.values())
    same = sum(first[key] == again[key] for key in first)
    print(f"{same} of 16 prompts have the same samples when they are sampled again")


@pytest.mark.slow
def test_without_a_card_the_checks_are_skipped_with_a_reason():
    """`bash test.sh gpu` on this machine: nothing fails, and the reason is on the screen."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "pytest", "-q", "-rs", "-m", "gpu", __file__, "-p", "no:cacheprovider", "-k", "kernel or bf16"]
    done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no GPU that torch can use" in done.stdout and "5 skipped" in done.stdout


@pytest.mark.full
@pytest.mark.slow
def test_the_benchmark_runs():
    """benchmarks/gpu.py at a tiny shape: all ways train alike (else it ends with an error), every ratio is there."""
    pytest.importorskip("trl")
    command = [sys.executable, "benchmarks/gpu.py", "pairs", "lists", "--tiny", "--times", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("not counted: the other side has no flash attention here") == 4
    assert done.stdout.count("'way': 'ours, auto'") == 4 and "does not fit" not in done.stdout
