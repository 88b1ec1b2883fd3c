"""Train `proxy`, the small reward model of the quickstart: it learns the testbed's true reward (VADER's sentiment).

Reads   data/testbed/{reviews,chats}_{reward,test}.jsonl, samples.jsonl.gz (the model's answers)
Writes  annotation/embedded/proxy/: LoRA adapter with the head (safetensors), `reward.json`;
        annotation/embedded/reports/proxy.json: accuracies on the test split
Run     python -m annotation.train_reward [--report]    # then `bash setup.sh train` merges it
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

from scipy.stats import binomtest, spearmanr

from annotation.rewards import sentiment
from hps.chat import conversation_token_ids, load_tokenizer
from hps.errors import run_main
from pipeline.files import write_json
from pipeline.recipe import REPOSITORY, Model
from pipeline.records import read_jsonl, read_prompts
from tools.embedded import ADAPTERS, LANGUAGE_MODEL, MODELS, merge_reward_model, reward_backbone

TESTBED = REPOSITORY / "data" / "testbed"


@dataclass(frozen=True)
class Settings:
    """`layers` of the language model are kept; a batch counts prompts, each with all its answers."""

    layers: int = 4
    seed: int = 3
    epochs: int = 2
    batch: int = 2
    learning_rate: float = 1e-3
    lora_r: int = 16


# Pairs by the size of their true difference: name, more than, at most.
SIZES = (("0-0.25", 0, 0.25), ("0.25-0.5", 0.25, 0.5), ("0.5-1", 0.5, 1), (">1", 1, 2), (">0.5", 0.5, 2), ("all", 0, 2))
REPORT_PROMPTS = 150  # test prompts of each set in the report


def accuracy(hits: list[bool]) -> dict:
    """How many pairs, the share that is right, and Wilson's interval."""
    found = binomtest(sum(hits), len(hits))
    low, high = found.proportion_ci(method="wilson")
    return {"pairs": len(hits), "accuracy": round(found.statistic, 4), "interval": [round(low, 4), round(high, 4)]}


def save(model, output: Path, settings: Settings) -> None:
    """Write adapter, head and `reward.json`."""
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    (output / "README.md").unlink(missing_ok=True)
    adapter = json.loads((output / "adapter_config.json").read_text())
    write_json(output / "adapter_config.json", {**adapter, "base_model_name_or_path": LANGUAGE_MODEL})
    write_json(output / "reward.json", {"base": LANGUAGE_MODEL, "layers": settings.layers})


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


def train(settings: Settings, output: Path) -> None:
    """Train on the answers to the reward prompts, and on all their beginnings.

    An answer that is cut anywhere is also an answer and has its own true reward. The backbone is causal, so one pass
    gives the scores of all beginnings; the answers to a prompt share the prompt's computation.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import get_cosine_schedule_with_warmup

    from hps.response_head import run
    from hps.shared_prefix import common_prefix, shared_rows

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
    rank = settings.lora_r
    lora = LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=["score"]
    )
    wrapped = get_peft_model(reward_backbone(base, settings.layers, settings.seed), lora)
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


def report(folder: Path) -> dict:
    """How well the merged model ranks the answers to test prompts, by the size of the true difference."""
    import numpy as np

    from annotation.reward_model import RewardModel

    model = RewardModel(Model(path=str(folder)), dtype="float32")
    pairs, correlations = [], []
    for messages, answers, cut, rewards in sampled("test", REPORT_PROMPTS):
        scores = model.score(messages, answers, cut)
        pairs += [
            (abs(rewards[i] - rewards[j]), (scores[i] > scores[j]) == (rewards[i] > rewards[j]))
            for i, j in combinations(range(len(answers)), 2)
            if rewards[i] != rewards[j]
        ]
        if len(set(rewards)) > 1:
            correlations.append(spearmanr(scores, rewards).statistic)
    sizes = {name: [right for gap, right in pairs if low < gap <= high] for name, low, high in SIZES}
    mean, error = np.mean(correlations), 1.96 * np.std(correlations, ddof=1) / math.sqrt(len(correlations))
    return {
        "pairs by true difference": {name: accuracy(hits) for name, hits in sizes.items() if hits},
        "rank correlation within a prompt": {
            "prompts": len(correlations),
            "mean": round(float(mean), 4),
            "interval": [round(float(bound), 4) for bound in (mean - error, mean + error)],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure the adapter that is there, train nothing")
    output, settings = ADAPTERS / "proxy", Settings()
    if not parser.parse_args().report:
        shutil.rmtree(output, ignore_errors=True)
        train(settings, output)
    with tempfile.TemporaryDirectory() as scratch:
        merge_reward_model(output, MODELS / LANGUAGE_MODEL, settings.layers, Path(scratch))
        figures = report(Path(scratch))
    write_json(ADAPTERS / "reports" / "proxy.json", figures)  # beside the adapter: a new report changes no model
    print(f"reward model proxy, on the test split: {json.dumps(figures, indent=1)}")


if __name__ == "__main__":
    run_main(main)
