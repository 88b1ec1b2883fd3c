"""Held-out figures of a checkpoint: margins and accuracies before and after, with intervals.

Reads   `data.test.path` (the two given responses of each prompt), `<output>/ranked/test.jsonl` (best against worst),
        `<output>/<run>/checkpoint`
Writes  `<output>/<run>/evaluation/`: `pairs.jsonl` (log-probabilities of every pair), `answers.jsonl` (some test
        prompts answered before and after), `metrics.json`, `manifest.json` (last)
Run     python -m evaluation.margins configs/quickstart.yaml

`s = log pi_theta - log pi_ref`, summed over the response's tokens, in nats. RM_DPO is `s_1 - s_2` (no beta), RM_R-DPO
is `RM_DPO - 0.01 (|y_1| - |y_2|)`, lengths in tokens (paper, section 6). Intervals: percentile bootstrap over prompts.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from hps.chat import end_of_turn_ids, load_tokenizer, prompt_token_ids, response_token_ids
from hps.cli import parse, progress
from hps.errors import InputError, run_main
from hps.manifest import claim, file_hash, finish, hold, model_hash
from hps.prefix import compute_prefix, padded, tail_states
from hps.preflight import load_prompts
from hps.recipe import Model, Recipe
from hps.records import Appender, read_jsonl, read_prompts, read_ranked, write_json

LENGTH_PENALTY = 0.01  # of RM_R-DPO, nats per token
LEVEL = 0.95


def held_out_pairs(recipe: Recipe) -> tuple[list[dict], dict[str, int]]:
    """Pairs in the order of preference, and how many prompts were left out, by reason.

    `written`: the first two given responses. `ranked`: best and worst by reward.
    """
    pairs, left_out = [], Counter()
    prompts, repeated = load_prompts(recipe, "test")
    left_out["written: repeated prompt"] += len(repeated)
    for record in prompts.values():
        responses = [text.strip() for text in record["responses"][:2]]
        if len([text for text in responses if text]) < 2:
            left_out["written: fewer than two given responses"] += 1
        else:
            pairs.append({"set": "written", **_pair(record, responses, [False, False])})
    for _, record in read_ranked(recipe.ranked("test")):
        if record["rewards"][0] == record["rewards"][-1]:
            left_out["ranked: all rewards tie"] += 1
            continue
        ends = {name: [record[name][index] for index in (0, -1)] for name in ("rewards", "sources")}
        responses, truncated = ([record[name][index] for index in (0, -1)] for name in ("responses", "truncated"))
        pairs.append({"set": "ranked", **_pair(record, responses, truncated), **ends})
    return pairs, left_out


def _pair(record: dict, responses: list[str], truncated: list[bool]) -> dict:
    return {
        "prompt_id": record["prompt_id"],
        "prompt": record["prompt"],
        "responses": responses,
        "truncated": truncated,
    }


class HeldOut:
    """The policy after training and the reference, both able to give log-probabilities and answers.

    With LoRA one model serves: the reference is the model with its adapter switched off.
    """

    def __init__(self, recipe: Recipe):
        checkpoint = recipe.run_folder() / "checkpoint"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.limit = recipe.schedule.max_length
        self.tokenizer = load_tokenizer(str(checkpoint))
        # Full fine-tuning at a small learning rate moves few weights by as much as a bf16 rounds off.
        exact = self.device.type == "cpu" or not recipe.lora.enabled
        dtype = torch.float32 if exact else torch.bfloat16
        self.reference = _load(recipe.models.policy, self.device, dtype)
        if recipe.lora.enabled:
            from peft import PeftModel

            self.reference = PeftModel.from_pretrained(self.reference, checkpoint).eval()
            self.policy = self.reference
        else:
            self.policy = _load(Model(path=str(checkpoint)), self.device, dtype)

    @torch.inference_mode()
    def log_probs(self, model: Any, prompt: list[int], responses: list[list[int]]) -> list[float]:
        """Summed log-probabilities of the responses' tokens, nats."""
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        backbone, head = causal.base_model, causal.get_output_embeddings()
        # The prompt's last token predicts the response's first, so it belongs to the tails.
        prefix = compute_prefix(backbone, prompt[:-1], self.device)
        tails = [prompt[-1:] + response for response in responses]
        hidden = tail_states(backbone, prefix, len(prompt) - 1, tails, self.tokenizer.pad_token_id, self.device)
        targets = padded(responses, -100, self.device)
        wanted = targets != -100
        logits = head(hidden[:, :-1][wanted]).float()
        picked = torch.zeros(targets.shape, device=self.device)
        picked[wanted] = -torch.nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
        return picked.sum(dim=1).tolist()

    def that_fit(self, pairs: list[dict]) -> tuple[list[dict], Counter]:
        """The pairs whose prompt leaves room for a response, and how many do not."""
        fit, long = [], Counter()
        for pair in pairs:
            if len(prompt_token_ids(self.tokenizer, pair["prompt"])) < self.limit:
                fit.append(pair)
            else:
                long[f"{pair['set']}: prompt fills schedule.max_length"] += 1
        return fit, long

    def pair_figures(self, pair: dict) -> dict:
        """`tokens`, and log-probabilities of both responses under `policy` and `reference`."""
        prompt = prompt_token_ids(self.tokenizer, pair["prompt"])
        responses = [
            response_token_ids(self.tokenizer, pair["prompt"], text, cut)[: self.limit - len(prompt)]
            for text, cut in zip(pair["responses"], pair["truncated"], strict=True)
        ]
        policy = self.log_probs(self.policy, prompt, responses)
        with self.as_reference():
            reference = self.log_probs(self.reference, prompt, responses)
        return {"tokens": [len(response) for response in responses], "policy": policy, "reference": reference}

    def as_reference(self):
        """Inside it `self.reference` is the model before training."""
        return self.reference.disable_adapter() if self.reference is self.policy else nullcontext()

    @torch.inference_mode()
    def answer(self, model: Any, messages: list[dict], tokens: int) -> str:
        """The model's greedy answer."""
        ids = torch.tensor([prompt_token_ids(self.tokenizer, messages)], device=self.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=sorted(end_of_turn_ids(self.tokenizer)),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def answers(self, messages: list[dict], tokens: int) -> dict:
        """Answers of the model before and after training."""
        after = self.answer(self.policy, messages, tokens)
        with self.as_reference():
            before = self.answer(self.reference, messages, tokens)
        return {"before": before, "after": after}


def _load(model: Model, device: torch.device, dtype: torch.dtype):
    loaded = AutoModelForCausalLM.from_pretrained(model.path, revision=model.revision, dtype=dtype)
    return loaded.to(device).eval()


def margins(pairs: list[dict]) -> dict[str, np.ndarray]:
    """Per-pair figures, each (pairs,), from `tokens`, `policy`, `reference` of both responses."""
    tokens, policy, reference = (np.array([pair[name] for pair in pairs]) for name in ("tokens", "policy", "reference"))
    ratios = policy - reference
    margin = ratios[:, 0] - ratios[:, 1]
    figures = {
        "rm_dpo": margin,
        "rm_r_dpo": margin - LENGTH_PENALTY * (tokens[:, 0] - tokens[:, 1]),
        "rm_dpo_accuracy": _right(ratios[:, 0], ratios[:, 1]),
    }
    for when, logps in (("before", reference), ("after", policy)):
        figures[f"accuracy_{when}"] = _right(logps[:, 0], logps[:, 1])
        each = logps / tokens
        figures[f"accuracy_per_token_{when}"] = _right(each[:, 0], each[:, 1])
    return figures


def _right(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    return (better > worse).astype(float)


def bootstrap(values: np.ndarray, samples: int, seed: int) -> dict:
    """Mean of (n,) values and the percentile bootstrap interval of the mean, over prompts."""
    rng = np.random.default_rng(seed)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(samples)])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": round(float(values.mean()), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def evaluate(recipe: Recipe) -> None:
    """Run the stage; see the module's docstring."""
    if not (recipe.run_folder() / "manifest.json").exists():
        raise InputError(
            "the run is not finished", where=str(recipe.run_folder()), remedy="run `bash run.sh` with this recipe"
        )
    folder = recipe.run_folder() / "evaluation"
    settings = evaluation_settings(recipe)
    with hold(folder):
        if claim(folder, settings):
            print(f"evaluation: finished before, {folder}")
        else:
            _evaluate(recipe, folder, settings)


def _evaluate(recipe: Recipe, folder: Path, settings: dict) -> None:
    wanted, left_out = held_out_pairs(recipe)
    scorer = HeldOut(recipe)
    pairs, long = scorer.that_fit(wanted)
    left_out.update(long)
    pairs = _scored_pairs(pairs, scorer, folder / "pairs.jsonl")
    _write_answers(recipe, scorer, folder / "answers.jsonl")
    metrics: dict[str, Any] = {
        "bootstrap": recipe.evaluation.bootstrap,
        "level": LEVEL,
        "left_out": +left_out,
        "sets": {},
    }
    for name in ("written", "ranked"):
        chosen = [pair for pair in pairs if pair["set"] == name]
        if chosen:
            figures = {
                figure: bootstrap(values, recipe.evaluation.bootstrap, recipe.seed)
                for figure, values in margins(chosen).items()
            }
            metrics["sets"][name] = {"pairs": len(chosen), **figures}
    write_json(folder / "metrics.json", metrics)
    print_metrics(metrics, folder)
    outputs = [folder / name for name in ("pairs.jsonl", "answers.jsonl", "metrics.json")]
    finish(folder, recipe, settings, outputs)


def evaluation_settings(recipe: Recipe) -> dict:
    """What decides the figures; a change of any of it needs another `run`, or the folder deleted."""
    return {
        "evaluation": asdict(recipe.evaluation),
        "max_length": recipe.schedule.max_length,
        "seed": recipe.seed,
        "checkpoint": model_hash(Model(path=str(recipe.run_folder() / "checkpoint"))),
        "reference": model_hash(recipe.models.policy),
        "data": {**asdict(recipe.data.test), "sha256": file_hash(recipe.data.test.path)},
        "ranked": file_hash(recipe.ranked("test")),
    }


def _scored_pairs(wanted: list[dict], scorer: HeldOut, path: Path) -> list[dict]:
    done = {(line["set"], line["prompt_id"]): line for _, line in _existing(path)}
    todo = [pair for pair in wanted if (pair["set"], pair["prompt_id"]) not in done]
    with Appender(path) as file:
        for pair in progress(todo, len(wanted), "held-out pairs", " pairs", len(wanted) - len(todo)):
            file.append({**pair, **scorer.pair_figures(pair)})
    return [line for _, line in read_jsonl(path)]


def _existing(path: Path):
    Appender(path).close()  # cuts off what a kill left half written
    return read_jsonl(path)


def _write_answers(recipe: Recipe, scorer: HeldOut, path: Path) -> None:
    settings = recipe.evaluation
    prompts = [record for _, record in read_prompts(recipe.data.test.path, recipe.data.test.limit)][: settings.answers]
    path.unlink(missing_ok=True)
    with Appender(path) as file:
        for record in progress(prompts, len(prompts), "answers before and after", " prompts"):
            answers = scorer.answers(record["prompt"], settings.answer_tokens)
            file.append({"prompt_id": record["prompt_id"], "prompt": record["prompt"], **answers})


def print_metrics(metrics: dict, folder: Path) -> None:
    """The figures on the screen, a line each."""
    if metrics["left_out"]:
        print(f"held-out, left out: {dict(metrics['left_out'])}")
    for name, figures in metrics["sets"].items():
        title = {"written": "written test pairs", "ranked": "reward-ranked candidates of test prompts"}[name]
        print(f"held-out, {title}: {figures['pairs']} pairs; mean [95 % interval] -> {folder / 'metrics.json'}")
        for figure, value in figures.items():
            if figure != "pairs":
                low, high = value["interval"]
                print(f"  {figure:26s} {value['mean']:8.3f}  [{low:.3f}, {high:.3f}]")


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    evaluate(recipe)


if __name__ == "__main__":
    run_main(main)
