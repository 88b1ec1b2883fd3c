"""Speed of training and scoring, side by side with what others do; each part is a function below.

Run     .venv-train/bin/python benchmarks/speed.py pairs lists methods loop scoring held_out busy [--times N]

Both sides take turns in one process with the same token ids; for training (the small model) also with the same initial
LoRA weights and optimiser settings. Where two programs compute the same, their losses or scores must agree to 1e-4 in
every step, or this ends with an error. Times are medians of at least five steps (collating, forward, backward,
optimiser); a first step is left out.
"""

import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise

import torch
from datasets import Dataset
from measure import medians, options, show
from peft import get_peft_model
from shapes import plan_row
from stages import peak_kb
from trl import DPOTrainer

from alignment.reference import add_reference
from alignment.train import load_policy, lora_config, training_config
from annotation.reward_model import RewardModel
from evaluation.held_out import HeldOut
from hps.chat import load_tokenizer
from hps.shared_prefix import SHARED
from hps.trainer import HPSTrainer, PlanCollator
from pipeline.recipe import REPOSITORY, Recipe, load_recipe
from pipeline.records import read_prompts

SHAPES = [(170, 50), (60, 100)]  # tokens of the prompt, of each response
PROMPTS = 2  # of a step
RESPONSE = 70  # tokens of a response that is scored
SCORED = [(150, 16), (150, 100), (600, 50)]  # tokens of the prompt, responses
SETTINGS = ["optimizer.learning_rate=1e-3", "optimizer.scheduler=constant", "schedule.max_length=2048"]


def recipe_of(folder: str, *settings: str) -> Recipe:
    given = [f"output={folder}", f"schedule.global_batch={PROMPTS}", f"schedule.device_batch={PROMPTS}", *SETTINGS]
    return load_recipe(REPOSITORY / "configs/quickstart.yaml", [*given, *settings])


def tokens_of() -> list[int]:
    """The embedded prompts and answers as one stream of tokens: real text to cut prompts and responses from."""
    tokenizer, texts = load_tokenizer(recipe_of("runs").models.policy.path), []
    for _, record in read_prompts(REPOSITORY / "data/quickstart/safety_train.jsonl"):
        texts += [record["prompt"][-1]["content"], *record["responses"]]
    return tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"]


def examples_of(prompt: int, response: int, count: int, steps: int) -> list[dict]:
    """`steps * PROMPTS` rows as `alignment.train.TokenRows` makes them, every length exact."""
    stream, rng, rows = tokens_of(), random.Random(0), []

    def piece(size: int) -> list[int]:
        start = rng.randrange(len(stream) - size)
        return stream[start : start + size]

    for row in range(steps * PROMPTS):
        rewards = sorted((rng.gauss(0, 1) for _ in range(count)), reverse=True)
        rows.append(plan_row(row, piece(prompt), [piece(response) for _ in range(count)], rewards))
    return rows


class Steps:
    """One trainer and its next step, of so many prompts."""

    def __init__(self, trainer, examples: list[dict], prompts: int = PROMPTS):
        torch.manual_seed(0)
        for name, weight in trainer.model.named_parameters():
            if "lora_A" in name:  # the same for all, whatever was drawn before
                drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                weight.data.copy_(0.02 * drawn)  # drawn on the CPU, wherever the model is
        if trainer.args.gradient_checkpointing:  # `train` would do that
            trainer.model.activation_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        self.trainer, self.examples, self.prompts, self.losses = trainer, examples, prompts, []

    def __call__(self) -> None:
        start = len(self.losses) * self.prompts
        batch = self.trainer.data_collator(self.examples[start : start + self.prompts])
        loss = self.trainer.training_step(self.trainer.model, batch)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.trainer.state.global_step += 1  # the policy is compared with the reference before the first step alone
        self.losses.append(loss.item())


def ours(rows: list[dict], *settings: str) -> Steps:
    """Our trainer as `alignment.train` builds it, on these rows."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(folder, *settings)
        tokenizer = load_tokenizer(recipe.models.policy.path)
        layout = SHARED if recipe.training.shared_prefix else replace(SHARED, shared=0)
        trainer = HPSTrainer(
            model=load_policy(recipe),
            args=training_config(recipe, 1),
            train_dataset=rows,
            data_collator=PlanCollator(tokenizer.pad_token_id, layout),
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
        )
        add_reference(recipe, trainer)
        return Steps(trainer, list(trainer.train_dataset))


class TokenDPO(DPOTrainer):
    """The parent, given token ids."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset


def trl(rows: list[dict], precomputed: bool) -> Steps:
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(folder, "loss.preference=bt")
        config = training_config(recipe, 1)
        config.num_train_epochs, config.precompute_ref_log_probs = 1, precomputed
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        pairs = [dict(zip(names, (row["prompt_ids"], *row["response_ids"]), strict=True)) for row in rows]
        tokenizer = load_tokenizer(recipe.models.policy.path)
        trainer = TokenDPO(
            model=load_policy(recipe),
            args=config,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
        )
        return Steps(trainer, trainer.train_dataset.to_list())


def compare_losses(found: dict[str, list[float]]) -> None:
    """All of these train the same: every step's loss to 1e-4."""
    (first, expected), *others = found.items()
    for name, losses in others:
        worst = max(abs(a - b) for a, b in zip(expected, losses, strict=True))
        if not worst <= 1e-4:
            sys.exit(f"{name} does not train as {first}: losses differ by {worst:.1e}")


def pairs(times: int) -> None:
    """TRL's pair loss and ours, the reference computed before and in step; what head and sharing save, apart."""
    for prompt, response in SHAPES:
        rows = examples_of(prompt, response, 2, times + 1)
        bt, separate, in_step = "loss.preference=bt", "training.shared_prefix=false", "training.reference=in_step"
        tasks = {
            "TRL, precomputed": trl(rows, True),
            "ours, separate rows": ours(rows, bt, separate),
            "ours, precomputed": ours(rows, bt),
            "TRL, in step": trl(rows, False),
            "ours, in step": ours(rows, bt, in_step),
        }
        seconds = medians(tasks, times)
        compare_losses({name: task.losses for name, task in tasks.items()})
        base = {name: seconds["TRL, in step" if "in step" in name else "TRL, precomputed"] for name in seconds}
        table = [{"": name, "s / step": s, "times TRL": base[name] / s} for name, s in seconds.items()]
        show(f"Pairs, prompt {prompt}, responses {response} tokens, {PROMPTS} prompts a step", table)


def lists(times: int) -> None:
    """Lists of 8 in shared rows against rows of their own: time, and peak memory in processes of their own."""
    prompt, response = SHAPES[0]
    rows = examples_of(prompt, response, 8, times + 1)
    settings = ["loss.preference=pl", "loss.list_size=8"]
    tasks = {
        "separate rows": ours(rows, *settings, "training.shared_prefix=false"),
        "shared prompt": ours(rows, *settings),
    }
    seconds, peak = medians(tasks, times), {name: peak_memory(name) for name in tasks}
    compare_losses({name: task.losses for name, task in tasks.items()})
    table = [
        {
            "": name,
            "s / step": seconds[name],
            "times separate": seconds["separate rows"] / seconds[name],
            "peak, GB": peak[name],
            "of separate": peak[name] / peak["separate rows"],
        }
        for name in tasks
    ]
    show(f"Lists of 8, prompt {prompt}, responses {response} tokens, {PROMPTS} prompts a step", table)


def peak_memory(name: str) -> float:
    """Peak resident memory of a process that takes two steps on lists of 8, in GB."""
    command = [sys.executable, __file__, "peak", name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) / 1e6


def print_peak(name: str) -> None:
    """The child of `peak_memory`: its peak in kB."""
    rows = examples_of(*SHAPES[0], 8, 2)
    shared = f"training.shared_prefix={str(name == 'shared prompt').lower()}"
    # SimPO computes no reference beforehand, whose peak would count; its step has the same forward and backward pass.
    steps = ours(rows, "loss.family=simpo", "loss.preference=pl", "loss.list_size=8", shared)
    for _ in range(2):
        steps()
    print(peak_kb())


def methods(times: int) -> None:
    """HPS against BT on the same pairs; PL over n, and on lists of 8 all pairs and LiPO-lambda, against HPS."""
    prompt, response = SHAPES[0]
    rows = examples_of(prompt, response, 2, times + 1)
    tasks = {name: ours(rows, f"loss.preference={name}") for name in ("bt", "hps")}
    for name, n in (*(("pl", n) for n in (4, 8, 16, 32)), ("pairs", 8), ("lipo", 8)):
        many = examples_of(prompt, response, n, times + 1)
        tasks[f"{name}, n = {n}"] = ours(many, f"loss.preference={name}", f"loss.list_size={n}")
    seconds = medians(tasks, times)
    table = [{"": name, "s / step": s, "times hps": s / seconds["hps"]} for name, s in seconds.items()]
    show(f"Methods, prompt {prompt}, responses {response} tokens, {PROMPTS} prompts a step", table)


def loop(times: int) -> None:
    """`trainer.train()` itself: the share of a step that is neither forward, backward nor optimiser."""
    trainer, calls = ours(examples_of(*SHAPES[0], 2, times + 2)).trainer, []
    trainer.optimizer = None
    trainer.create_optimizer()

    def watch(owner, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            calls.append((start, time.perf_counter() - start))
            return result

        setattr(owner, name, watched)

    watch(trainer, "_log_probs")  # the forward pass
    watch(trainer.accelerator, "backward")
    watch(trainer.optimizer, "step")
    with tempfile.TemporaryDirectory() as folder:
        trainer.args.output_dir, trainer.args.save_strategy = folder, "no"
        trainer.train()
    steps = list(zip(*[iter(calls)] * 3, strict=True))  # three calls a step; the first step is left out
    whole = [after[0][0] - step[0][0] for step, after in pairwise(steps)][1:]
    inside = [sum(seconds for _, seconds in step) for step in steps[1:-1]]
    share = statistics.median(1 - part / all_ for part, all_ in zip(inside, whole, strict=True))
    show("The training loop", [{"": "outside forward, backward, optimiser", "share of a step": share}])


def scoring(times: int) -> None:
    """Annotation against scoring one response at a time, as the released code does; the same token rows both ways.

    The ratio of tokens computed is what the ratio of times would be if every token cost the same.
    """
    recipe = load_recipe(REPOSITORY / "configs/quickstart.yaml")
    model = RewardModel(recipe.models.reward, recipe.annotation.dtype, recipe.annotation.batch_tokens)
    stream, rng = tokens_of(), random.Random(0)
    table = []
    for prompt, count in SCORED:
        starts = [rng.randrange(len(stream) - RESPONSE) for _ in range(count)]
        rows = [stream[:prompt] + stream[start : start + RESPONSE] for start in starts]
        scores: dict[str, list[float]] = {}
        tasks = {
            "one at a time": lambda rows=rows, scores=scores: scores.update(plain=model.score_rows_plain(rows)),
            "annotation": lambda rows=rows, scores=scores: scores.update(shared=model.score_rows(rows)),
        }
        seconds = medians(tasks, times)
        worst = max(abs(a - b) for a, b in zip(scores["plain"], scores["shared"], strict=True))
        if not worst <= 1e-4:
            sys.exit(f"scores of the two ways differ by {worst:.1e}")
        ratios = {
            "times faster": seconds["one at a time"] / seconds["annotation"],
            "times fewer tokens": count * (prompt + RESPONSE) / (prompt + count * RESPONSE),
        }
        table.append({"": f"{count} responses, prompt {prompt}", **seconds, **ratios})
    show(f"Scoring, responses of {RESPONSE} tokens, seconds", table)


def held_out(times: int) -> None:
    """Held-out pairs in batches of like length against one at a time, with two policies along the training."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(folder)
        policy = get_peft_model(load_policy(recipe), lora_config(recipe))
        for place, step in enumerate((1, 2, None)):
            torch.manual_seed(place)
            for name, weight in policy.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.02)
            policy.save_pretrained(recipe.checkpoint_folder(step))
        load_tokenizer(recipe.models.policy.path).save_pretrained(recipe.checkpoint_folder())
        scorer = HeldOut(recipe)
    table = []
    for prompt, response in SHAPES:
        rows = examples_of(prompt, response, 2, 4)
        texts = [{"prompt": row["prompt_ids"], "responses": row["response_ids"], "diverging": 1} for row in rows]
        found: dict[str, list[dict]] = {}

        def alone(texts=texts, found=found) -> None:
            found["alone"] = [figures for text in texts for figures in scorer.compare_all([text])]

        def together(texts=texts, found=found) -> None:
            found["together"] = [figures for batch in scorer.batches(texts) for figures in scorer.compare_all(batch)]

        seconds = medians({"one at a time": alone, "batches": together}, times)
        each = zip(found["alone"], found["together"], strict=True)
        worst = max(abs(a - b) for one, other in each for a, b in zip(one["policy"], other["policy"], strict=True))
        if not worst <= 1e-3:
            sys.exit(f"log-probabilities of the two ways differ by {worst:.1e}")
        ratio = {"times faster": seconds["one at a time"] / seconds["batches"], "largest difference": worst}
        table.append({"": f"{len(texts)} pairs, {prompt}/{response}", **seconds, **ratio})
    show("Held-out pairs, three policies and the reference, seconds", table)


def passes(seconds: float = 6.0) -> float:
    """Passes a second through 30 layers' products of 270 tokens: small products, as in a layer of the small model."""
    torch.manual_seed(0)
    first = torch.randn(270, 576)
    layers = [(torch.randn(576, 1536), torch.randn(1536, 576)) for _ in range(30)]
    done, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        hidden = first
        for up, down in layers:
            hidden = torch.nn.functional.silu(hidden @ up) @ down
            hidden = hidden / hidden.norm(dim=-1, keepdim=True)
        done += 1
    return done / (time.monotonic() - start)


def busy(times: int) -> None:
    """What a busy core beside ours costs, and what the OpenMP setting of the drivers does about it (environment.sh).

    Threads spin while they wait for each other at the end of every product. When another process takes a core, one
    thread waits for its turn there, and the others burn their cores until then. The busy process is an empty loop.
    OpenMP reads its settings once: put one (`GOMP_SPINCOUNT=10000`) in front of the command.
    """
    rates = []
    for _ in range(times):  # in turns: a slow spell hits both
        rates.append([passes()])
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
            try:
                rates[-1].append(passes())
            finally:
                other.kill()
    alone, beside = map(statistics.median, zip(*rates, strict=True))
    row = {"alone": alone, "beside a busy process": beside, "times slower": alone / beside}
    show("Passes a second", [row])


PARTS = {
    "pairs": pairs,
    "lists": lists,
    "methods": methods,
    "loop": loop,
    "scoring": scoring,
    "held_out": held_out,
    "busy": busy,
}


def main() -> None:
    if sys.argv[1:2] == ["peak"]:
        print_peak(sys.argv[2])
        return
    parser = options(__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    arguments = parser.parse_args()
    for name in arguments.parts:
        PARTS[name](arguments.times)


if __name__ == "__main__":
    main()
