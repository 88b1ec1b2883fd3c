"""Seconds of a training step on a GPU against TRL and against separate rows; random weights, no network.

Run     .venv-train/bin/python benchmarks/gpu.py pairs lists [--shapes Llama-3-8B Llama-3.2-1B] [--times N]
        .venv-train/bin/python benchmarks/gpu.py pairs lists --texts 170+300 600+300x8   # a pair, a list of 8
        .venv-train/bin/python benchmarks/gpu.py pairs lists --tiny      # the program itself, on a CPU

Pairs are measured against TRL's trainer with its best settings: the reference computed before, its own head, flash
attention where installed. Without flash attention a ratio is labelled so, because TRL would be faster with it. Lists,
which TRL does not know, are measured against our own separate rows. The sides run one after the other, each with the
card for itself, on the same token ids with the same initial LoRA weights. The first step, in which kernels are compiled
and attention plans built, is shown apart, and so is the peak of the card's memory. `of the card` is the share of what
the card does in bf16 products of 8192 x 8192, measured here too: a step's operations (4 a weight and token: the forward
pass and the backward pass without the gradients of frozen weights) count every token that has to be computed once the
prompt is shared.

All responses of a case have one length: nothing is padded, which favours TRL and separate rows. The last line of a case
also compares what sharing saves with what `hps/row_costs.py` expects.

Aims for `auto`, what a recipe gets: pairs at 170/300 at least 1.2 times TRL, lists of 8 at least 2.5 times separate
rows, nothing below 1.0.
"""

import argparse
import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from datasets import Dataset
from measure import options, show
from shapes import EIGHT, ONE, TINY, Lengths, plan_row, random_model, shape
from speed import Steps, TokenDPO, compare_losses, recipe_of
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from alignment.checks import lora_config
from alignment.train import attention, settled, training_config
from hps.row_costs import RowCosts
from hps.trainer import HPSTrainer, PlanCollator

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PROMPTS, RESPONSES, LISTS = (170, 600, 1500), (50, 300, 1000), (8, 100)  # tokens, tokens, responses
TINY_PROMPTS, TINY_RESPONSES, TINY_LISTS = (9, 20), (5,), (3,)
torch.backends.cuda.enable_cudnn_sdp(False)  # as in training (hps.trial.prove)
# The last is what a recipe gets: on CUDA flex attention, where sharing is estimated to be faster.
WAYS = {
    "separate rows": ["training.shared_prefix=false"],
    "separate rows, sdpa": ["training.shared_prefix=false", "training.attention=sdpa"],
    "shared prompt, sdpa": ["training.attention=sdpa"],
    **({"shared prompt, flex": ["training.attention=flex"]} if CUDA else {}),
    "auto": ["training.attention=auto"],
}
AIMS = {("pairs", 170, 300): 1.2, ("lists", 8): 2.5}
CHECKPOINTED = (8192, 60)  # tokens of a step above which all sides use gradient checkpointing; of the tiny shape


def tokenizer() -> PreTrainedTokenizerFast:
    """What a trainer asks of one: ids that fill up and end."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def flash() -> str | None:
    """The attention of separate rows on a card, where it is installed."""
    return "flash_attention_2" if CUDA and importlib.util.find_spec("flash_attn") else None


class Case:
    """One shape of model and of texts; a step is a micro-batch of prompts with their responses.

    Args:
        name: of the model's shape.
        count: responses of a prompt.
        prompts: of a micro-batch.
    """

    def __init__(self, name: str, prompt: int, response: int, count: int, times: int, prompts: int = 1):
        self.name, self.prompt, self.response, self.count = name, prompt, response, count
        self.prompts = prompts
        texts = Lengths(prompt, (response,) * count).texts(shape(name).vocab_size, (times + 1) * prompts)
        rewards = [float(-place) for place in range(count)]
        self.rows = [plan_row(number, *each, rewards) for number, each in enumerate(zip(*texts, strict=True))]
        self.computed = prompts * (prompt + count * response)
        self.checkpointed = prompts * count * (prompt + response) > CHECKPOINTED[name == TINY]
        self.settings = [f"schedule.global_batch={prompts}", f"schedule.device_batch={prompts}"]
        self.settings.append("schedule.max_length=4096")
        self.settings.append(f"training.gradient_checkpointing={str(self.checkpointed).lower()}")
        self.dtype = torch.bfloat16 if CUDA else torch.float32

    def model(self, attention: str | None):
        return random_model(shape(self.name), DEVICE, self.dtype, attention or "sdpa")

    def ours(self, *settings: str) -> Steps:
        """Our trainer with these settings of the recipe, the reference computed before."""
        preference = ["loss.preference=bt"] if self.count == 2 else ["loss.preference=pl", "loss.list_size=null"]
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_of(folder, *self.settings, *preference, *settings)
            model = self.model(attention(recipe))
            config, automatic = training_config(recipe, 1), recipe.training.attention == "auto"
            layout = settled(recipe, config, model)
            trainer = HPSTrainer(
                model=model,
                args=config,
                train_dataset=self.rows,
                data_collator=PlanCollator.of(layout, model.config, 0, config, recipe.lora.enabled, automatic),
                processing_class=tokenizer(),
                peft_config=lora_config(recipe),
            )
            trainer.set_reference(trainer.reference_values(self.rows, self.prompts)[0])
            return Steps(trainer, list(trainer.train_dataset), self.prompts)

    def trl(self) -> Steps:
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_of(folder, *self.settings, "loss.preference=bt")
            config = training_config(recipe, 1)
            config.num_train_epochs, config.precompute_ref_log_probs = 1, True
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            pairs = [dict(zip(names, (row["prompt_ids"], *row["response_ids"]), strict=True)) for row in self.rows]
            trainer = TokenDPO(
                model=self.model(flash()),
                args=config,
                train_dataset=Dataset.from_list(pairs),
                processing_class=tokenizer(),
                peft_config=lora_config(recipe),
            )
            return Steps(trainer, trainer.train_dataset.to_list(), self.prompts)

    def measured(self, make: Callable[[], Steps], times: int) -> tuple[dict, list[float]]:
        """Figures of one way, and its losses. `Steps` reads each loss, which waits for the card."""
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        try:
            task, seconds = make(), []
            for _ in range(times + 1):
                start = time.perf_counter()
                task()
                seconds.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            return {}, []
        weights = sum(weight.numel() for weight in task.trainer.model.parameters())
        step = statistics.median(seconds[1:])
        peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else float("nan")
        figures = {"first (s)": seconds[0], "s / step": step, "GB": peak, "op/s": 4 * weights * self.computed / step}
        return figures, task.losses


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def products() -> float:
    """Operations a second of this device in its largest products."""
    size, dtype = (8192, torch.bfloat16) if CUDA else (512, torch.float32)
    one, other = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        (one @ other).sum().item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def compared(case: Case, ways: dict[str, Callable[[], Steps]], times: int, peak: float) -> list[dict]:
    """A line of the table for each way; `times`: the speed relative to the first. In fp32 all must train as it does."""
    where = {"model": case.name, "texts": f"{case.prompts} x ({case.prompt} + {case.count} x {case.response})"}
    lines, losses = [], {}
    for name, make in ways.items():
        figures, losses[name] = case.measured(make, times)
        free()
        lines.append({**where, "way": name, **figures, "": "" if figures else "does not fit"})
    base = lines[0].get("s / step")
    for line in lines:
        if "s / step" in line:
            line["times"] = base / line["s / step"] if base else float("nan")
            line["of the card"] = line.pop("op/s") / peak
    some = {name: each for name, each in losses.items() if each}
    if len(some) > 1 and case.dtype == torch.float32:  # bf16 rounds each way differently, by more than a mistake might
        compare_losses(some)
    return lines


def verdict(kind: str, case: Case, lines: list[dict]) -> str:
    """Whether the aim of a case is met by the last way. Against a baseline without flash attention it cannot be."""
    aim = AIMS.get((kind, case.prompt, case.response), AIMS.get((kind, case.count), 1.0))
    ratio = lines[-1].get("times")
    if ratio is None or ratio != ratio:
        return "not measured"
    if not flash():
        return f"{ratio:.2f}, not counted: the other side has no flash attention here"
    return f"{ratio:.2f}, {'met' if ratio >= aim else 'MISSED'} (at least {aim})"


def sharing(case: Case, lines: list[dict]) -> str:
    """Seconds of separate over shared rows, measured and by `hps/row_costs.py`."""
    nan = float("nan")
    seconds = {line["way"]: line.get("s / step", nan) for line in lines}
    texts, found = ([case.prompt] * case.prompts, [[case.response] * case.count] * case.prompts), []
    for name in ("sdpa", "flex"):
        costs = RowCosts.of(shape(case.name), adapter=True, checkpointing=case.checkpointed, flex=name == "flex")
        measured = seconds.get("ours, separate rows, sdpa", nan) / seconds.get(f"ours, shared prompt, {name}", nan)
        found.append(f"{name} {measured:.2f}, estimated {costs.separate(*texts) / costs.shared(*texts):.2f}")
    return "separate over shared rows: " + "; ".join(found)


def run(kind: str, shapes: list[str], texts: list[tuple[int, int, int]], arguments: argparse.Namespace) -> None:
    times, prompts, tiny = arguments.times, arguments.prompts, arguments.tiny
    table, verdicts, peak = [], [], products()
    for name, (prompt, response, count) in product(shapes, texts):
        case = Case(name, prompt, response, count, times, prompts)
        base = {f"TRL, {flash() or 'sdpa'}": case.trl} if kind == "pairs" else {}
        ways = {f"ours, {title}": partial(case.ours, *WAYS[title]) for title in arguments.ways}
        lines = compared(case, base | ways, times, peak)
        table += lines
        verdicts.append(f"{kind} {name} {lines[0]['texts']}: {verdict(kind, case, lines)}; {sharing(case, lines)}")
        for line in (*lines, verdicts[-1]):  # a run that is stopped has said what it knows
            print(line, flush=True)
    show(
        f"{kind}, gradient checkpointing above {CHECKPOINTED[tiny]} tokens, products at {peak / 1e12:.3f} TFLOP/s",
        table,
    )


def lengths(text: str) -> tuple[int, int, int]:
    """Of `170+300x8`: tokens of the prompt and of a response, and responses; 2 where none are named."""
    prompt, _, rest = text.partition("+")
    response, _, count = rest.partition("x")
    return int(prompt), int(response), int(count or 2)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("parts", nargs="+", choices=["pairs", "lists"])
    parser.add_argument("--shapes", nargs="+", choices=[EIGHT, ONE], default=[EIGHT, ONE])
    parser.add_argument("--texts", nargs="+", type=lengths, help="some lengths: PROMPT+RESPONSE[xCOUNT]")
    parser.add_argument("--prompts", type=int, default=1, help="prompts of a micro-batch (default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of ours; the last one has the aim")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, on the CPU too: whether the program runs")
    arguments = parser.parse_args()
    if not (CUDA or arguments.tiny):
        parser.error("there is no GPU that torch can use; --tiny tries the program on the CPU")
    prompts, responses = (TINY_PROMPTS, TINY_RESPONSES) if arguments.tiny else (PROMPTS, RESPONSES)
    for kind in arguments.parts:
        counts = (2,) if kind == "pairs" else TINY_LISTS if arguments.tiny else LISTS
        asked = [each for each in arguments.texts or () if (kind == "pairs") == (each[2] == 2)]
        texts = asked if arguments.texts else list(product(prompts, responses, counts))
        shapes = [TINY] if arguments.tiny else arguments.shapes
        if texts:
            run(kind, shapes, texts, arguments)


if __name__ == "__main__":
    main()
