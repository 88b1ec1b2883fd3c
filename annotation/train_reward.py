"""Train the small reward models of the quickstart (Bradley-Terry).

`proxy` learns the true reward of the testbed (VADER's sentiment) from the model's own answers. `train` and `eval` show
the method and judge no model: 120 written pairs teach a 135M model's first layers little about quality. `train` ranks
the candidates, `eval` is another one, with other layers, contrast pairs and seed, for evaluation (the paper also
evaluates with a reward model that it did not train with).

Reads   proxy: data/testbed/{reviews,chats}_{reward,test}.jsonl, samples.jsonl.gz (the model's answers)
        train, eval: data/quickstart/{dialogue,safety}_{train,test}.jsonl (prompts with two responses, best first)
Writes  annotation/embedded/<name>/: LoRA adapter with the head (safetensors), `reward.json`;
        annotation/embedded/reports/<name>.json: accuracies on the test split
Run     python -m annotation.train_reward proxy    # or `train`, `eval`; then `bash setup.sh train` merges them
"""

import argparse
import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from annotation.rewards import sentiment
from hps.chat import conversation_token_ids, load_tokenizer
from hps.errors import run_main
from pipeline.files import write_json
from pipeline.recipe import REPOSITORY, Model
from pipeline.records import read_jsonl, read_prompts
from tools.embedded import ADAPTERS, LANGUAGE_MODEL, MODELS, REWARD_NAMES, merge_reward_model, reward_backbone

SETS = ("dialogue", "safety")
DATA = REPOSITORY / "data" / "quickstart"
TESTBED = REPOSITORY / "data" / "testbed"
# Beside the adapters' folders, not inside: a new report does not change the model.
REPORTS = ADAPTERS / "reports"


@dataclass(frozen=True)
class Settings:
    """`layers` of the language model kept, `contrasts` of each kind made from a written pair.

    `batch` counts pairs; for the proxy prompts, each with all its answers.
    """

    layers: int
    seed: int
    contrasts: int = 1
    epochs: int = 2
    batch: int = 8
    learning_rate: float = 3e-4
    lora_r: int = 8


SETTINGS = {
    "train": Settings(layers=10, seed=1),
    "eval": Settings(layers=8, seed=2),
    "proxy": Settings(layers=4, seed=3, batch=2, learning_rate=1e-3, lora_r=16),
}
# Pairs by the size of their true difference: name, more than, at most.
SIZES = (("0-0.25", 0, 0.25), ("0.25-0.5", 0.25, 0.5), ("0.5-1", 0.5, 1), (">1", 1, 2), (">0.5", 0.5, 2), ("all", 0, 2))
REPORT_PROMPTS = 150  # test prompts of each set in the proxy's report


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt; `cut` says that the worse one is cut off, so that it has no end of turn."""

    kind: str
    messages: list
    better: str
    worse: str
    cut: bool = False


def written_pairs(split: str) -> list[Pair]:
    """The pairs of a split as written, both sets."""
    return [
        Pair("written", record["prompt"], *record["responses"])
        for name in SETS
        for _, record in read_prompts(DATA / f"{name}_{split}.jsonl")
    ]


def contrast_pairs(pairs: list[Pair], count: int, seed: int) -> list[Pair]:
    """Pairs whose worse response is bad for a reason that needs no judgement.

    For each written pair `count` times: an answer to another prompt, and one of four broken texts (words shuffled, the
    beginning over and over, words left out, cut in the middle). The better response is the written better or worse one
    in turn: either is preferable to those.
    """
    rng = random.Random(seed)
    contrasts = []
    for pair in pairs:
        for repeat in range(count):
            better = pair.better if (len(contrasts) // 2 + repeat) % 2 == 0 else pair.worse
            other = rng.choice([p for p in pairs if p.messages != pair.messages])
            contrasts.append(Pair("other prompt", pair.messages, better, rng.choice([other.better, other.worse])))
            contrasts.append(_broken(pair.messages, better, rng))
    return contrasts


def _broken(messages: list, text: str, rng: random.Random) -> Pair:
    words = text.split()
    kind = rng.choice(["shuffled", "repeated", "gaps", "cut"])
    if kind == "shuffled":
        worse = " ".join(rng.sample(words, len(words)))
    elif kind == "repeated":
        start = " ".join(words[: rng.randint(3, 6)])
        worse = " ".join([start] * max(2, len(words) // 5))
    elif kind == "gaps":
        worse = " ".join(word for word in words if rng.random() > 0.35) or words[0]
    else:
        worse = " ".join(words[: max(1, int(len(words) * rng.uniform(0.3, 0.8)))])
    return Pair("broken", messages, text, worse, cut=kind == "cut")


def pair_ids(tokenizer, pair: Pair) -> dict:
    """The two conversations' token ids, made as annotation/reward_model.py makes them."""
    return {
        "chosen_ids": conversation_token_ids(tokenizer, pair.messages, pair.better, truncated=False),
        "rejected_ids": conversation_token_ids(tokenizer, pair.messages, pair.worse, truncated=pair.cut),
    }


def wilson(successes: int, count: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval of a proportion."""
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return [round(centre - half, 4), round(centre + half, 4)]


def report(folder: Path, seed: int) -> dict:
    """Accuracy of a merged reward model on the test split, by kind of pair, with intervals."""
    from annotation.reward_model import RewardModel

    model = RewardModel(Model(path=str(folder)), dtype="float32")
    written = written_pairs("test")
    right: dict[str, list[bool]] = {}
    for pair in written + contrast_pairs(written, 1, seed + 1000):
        better, worse = model.score(pair.messages, [pair.better, pair.worse], [False, pair.cut])
        right.setdefault(pair.kind, []).append(better > worse)
    return {kind: accuracy(hits) for kind, hits in right.items()}


def accuracy(hits: list[bool]) -> dict:
    """How many pairs, the share that is right, and Wilson's interval."""
    share = round(sum(hits) / len(hits), 4)
    return {"pairs": len(hits), "accuracy": share, "interval": wilson(sum(hits), len(hits))}


def train(name: str, settings: Settings, output: Path) -> None:
    """Train one reward model and write adapter and settings into `output`."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    base = MODELS / LANGUAGE_MODEL
    tokenizer = load_tokenizer(str(base))
    written = written_pairs("train")
    pairs = written + contrast_pairs(written, settings.contrasts, settings.seed)
    print(f"reward model {name}: {len(written)} written pairs, {len(pairs) - len(written)} contrast pairs", flush=True)
    model = reward_backbone(base, settings.layers, settings.seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                output_dir=scratch,
                num_train_epochs=settings.epochs,
                per_device_train_batch_size=settings.batch,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine",
                seed=settings.seed,
                data_seed=settings.seed,
                logging_steps=5,
                save_strategy="no",
                report_to=[],
                gradient_checkpointing=False,
                bf16=False,
            ),
            train_dataset=Dataset.from_list([pair_ids(tokenizer, pair) for pair in pairs]),
            processing_class=tokenizer,
            peft_config=lora(settings),
        )
        trainer.train()
    save(trainer.model, output, settings)


def save(model, output: Path, settings: Settings) -> None:
    """Write adapter, head and `reward.json`."""
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    (output / "README.md").unlink(missing_ok=True)
    adapter = json.loads((output / "adapter_config.json").read_text())
    write_json(output / "adapter_config.json", {**adapter, "base_model_name_or_path": LANGUAGE_MODEL})
    write_json(output / "reward.json", {"base": LANGUAGE_MODEL, "layers": settings.layers})


def lora(settings: Settings):
    from peft import LoraConfig

    return LoraConfig(
        task_type="SEQ_CLS",
        r=settings.lora_r,
        lora_alpha=2 * settings.lora_r,
        target_modules="all-linear",
        modules_to_save=["score"],
    )


# ---- the proxy of the true reward ----


def truth(texts: list[str]) -> list[float]:
    """The true reward of each text: VADER's compound score, from -1 to 1."""
    return sentiment([], [[{"role": "assistant", "content": text}] for text in texts])


def sampled(split: str, most: int | None = None) -> Iterator[tuple[list, list[str], list[bool], list[float]]]:
    """Of each testbed prompt its messages, the model's answers, which of them are cut, and their true rewards."""
    samples = {record["prompt_id"]: record for _, record in read_jsonl(TESTBED / "samples.jsonl.gz")}
    for name in ("reviews", "chats"):
        for _, record in read_prompts(TESTBED / f"{name}_{split}.jsonl", most):
            answers = samples[record["prompt_id"]]
            yield record["prompt"], answers["responses"], answers["truncated"], truth(answers["responses"])


def pairwise_loss(scores, rewards):
    """Bradley-Terry: the mean of -log sigmoid(better score - worse score) over all pairs with different true rewards.

    Args:
        scores, rewards: (answers,), of the answers to one prompt.
    """
    from torch.nn.functional import softplus

    better = rewards[:, None] > rewards[None, :]
    return softplus(scores[None, :] - scores[:, None])[better].mean()


def train_proxy(settings: Settings, output: Path) -> None:
    """Train on the answers to the reward prompts, and on all their beginnings.

    An answer that is cut anywhere is an answer too, with a true reward of its own. The backbone is causal, so one pass
    gives the scores of all beginnings; the answers to a prompt share its computation as well.
    """
    import torch
    from peft import get_peft_model
    from transformers import get_cosine_schedule_with_warmup

    from hps.shared_prefix import common_prefix, run, shared_rows

    base = MODELS / LANGUAGE_MODEL
    tokenizer = load_tokenizer(str(base))
    groups = []
    for messages, answers, cut, _ in sampled("reward"):
        rows = [conversation_token_ids(tokenizer, messages, *each) for each in zip(answers, cut, strict=True)]
        shared = common_prefix(rows)
        tails = [row[shared:] for row in rows]
        parts = [tail[: end + 1] for tail in tails for end in range(len(tail))]
        rewards = truth(tokenizer.batch_decode(parts, skip_special_tokens=True))
        if len(set(rewards)) > 1:
            groups.append((rows[0][:shared], tails, torch.tensor(rewards)))
    torch.manual_seed(settings.seed)
    wrapped = get_peft_model(reward_backbone(base, settings.layers, settings.seed), lora(settings))
    model, rng = wrapped.get_base_model(), random.Random(settings.seed)
    weights = [weight for weight in wrapped.parameters() if weight.requires_grad]
    steps = settings.epochs * (len(groups) // settings.batch)
    optimizer = torch.optim.AdamW(weights, settings.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    order = [group for _ in range(settings.epochs) for group in rng.sample(groups, len(groups))]
    print(f"reward model proxy: {len(groups)} prompts, {steps} steps of {settings.batch}", flush=True)
    for step in range(steps):
        prompts, answers, rewards = zip(*order[step * settings.batch :][: settings.batch], strict=True)
        rows = shared_rows(prompts, answers, tokenizer.pad_token_id)
        states, _ = run(model, model.base_model, "last_hidden_state", rows)
        places = [
            torch.arange(start, start + size) for (_, start), size in zip(rows["starts"], rows["sizes"], strict=True)
        ]
        scores = model.score(states[torch.cat(places)])[:, 0]
        losses = map(pairwise_loss, scores.split(list(map(len, rewards))), rewards)
        loss = sum(losses) / len(prompts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    save(wrapped, output, settings)


def report_proxy(folder: Path) -> dict:
    """How well the merged model ranks the answers to test prompts, by the size of the true difference."""
    import numpy as np
    from scipy.stats import spearmanr

    from annotation.reward_model import RewardModel

    model = RewardModel(Model(path=str(folder)), dtype="float32")
    pairs, correlations = [], []
    for messages, answers, cut, rewards in sampled("test", REPORT_PROMPTS):
        scores = model.score(messages, answers, cut)
        found = [
            (abs(rewards[i] - rewards[j]), (scores[i] > scores[j]) == (rewards[i] > rewards[j]))
            for i, j in combinations(range(len(answers)), 2)
            if rewards[i] != rewards[j]
        ]
        pairs += found
        if len(set(rewards)) > 1:
            correlations.append(spearmanr(scores, rewards).statistic)
    figures = {}
    for name, low, high in SIZES:
        if hits := [right for difference, right in pairs if low < difference <= high]:
            figures[name] = accuracy(hits)
    error = 1.96 * np.std(correlations, ddof=1) / math.sqrt(len(correlations))
    mean = float(np.mean(correlations))
    rank = {"prompts": len(correlations), "mean": round(mean, 4)}
    return {
        "pairs by true difference": figures,
        "rank correlation within a prompt": {
            **rank,
            "interval": [round(float(bound), 4) for bound in (mean - error, mean + error)],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=REWARD_NAMES)
    parser.add_argument("--report", action="store_true", help="measure the adapter that is there, train nothing")
    options = parser.parse_args()
    output, settings = ADAPTERS / options.name, SETTINGS[options.name]
    if not options.report:
        shutil.rmtree(output, ignore_errors=True)
        train_proxy(settings, output) if options.name == "proxy" else train(options.name, settings, output)
    with tempfile.TemporaryDirectory() as scratch:
        merge_reward_model(output, MODELS / LANGUAGE_MODEL, settings.layers, Path(scratch))
        figures = report_proxy(Path(scratch)) if options.name == "proxy" else report(Path(scratch), settings.seed)
    write_json(REPORTS / f"{options.name}.json", figures)
    print(f"reward model {options.name}, on the test split: {json.dumps(figures, indent=1)}")


if __name__ == "__main__":
    run_main(main)
