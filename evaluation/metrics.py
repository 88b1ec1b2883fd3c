"""Everything measured of a run, per prompt and with intervals: BLEU, reward, divergence, lengths, margins.

Reads   `<output>/<run>/`: `answers/test.jsonl`, `scores/scores.jsonl`, `divergence/divergence.jsonl`,
        `evaluation/margins.json`; `<output>/sft/`: answers and scores of the model before training; `data.test.path`
Writes  `<output>/<run>/metrics.jsonl` (a line a prompt) and `metrics.json` (means with intervals); with --sft the same
        under `<output>/sft/`, of the model before training
Run     python -m evaluation.metrics configs/quickstart.yaml [--sft]

A figure is the best of a prompt's answers (`_best`, the paper's) or their mean (`_mean`). docs/evaluation.md describes
every one. Intervals: 95 %, percentile bootstrap over prompts. The stage takes seconds and is done anew at each call.
"""

import json
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
from sacrebleu.metrics import BLEU

from evaluation.statistics import LEVEL, bootstrap, percentile_interval
from hps.cli import parse
from hps.errors import InputError, run_main
from hps.preflight import evaluated_prompts
from hps.recipe import SFT, Recipe
from hps.records import read_answers, read_jsonl, write_atomic, write_json

REPEATED = 4  # words of a sequence that counts as repeated


class Bleu:
    """BLEU as shares (0 to 1), by sacrebleu; its signature says how."""

    def __init__(self):
        self._sentence = BLEU(effective_order=True)
        self._corpus = BLEU()
        self._plain = BLEU(tokenize="none", smooth_method="none", effective_order=False)

    def sentence(self, answer: str, reference: str) -> float:
        """BLEU of one answer; orders that it is too short for are left out (effective order)."""
        return self._sentence.sentence_score(answer, [reference]).score / 100

    def characters(self, answer: str, reference: str) -> float:
        """The released code's figure: its token-level function is given strings, so that characters are its tokens."""
        # As a corpus of one: `sentence_score` would advise, at each call, the setting that the released code has not.
        return self._plain.corpus_score([_spelled(answer)], [[_spelled(reference)]]).score / 100

    def corpus(self, prompts: list[list[tuple[str, str]]], samples: int, seed: int) -> dict:
        """Corpus BLEU of all pairs of answer and reference, with a bootstrap interval over the prompts.

        Args:
            prompts: for each prompt its pairs. The answers to a prompt are drawn together: they are not independent.
        """
        counts = np.array([np.sum([self._counts(*pair) for pair in pairs], axis=0) for pairs in prompts])
        rng = np.random.default_rng(seed)
        drawn = [counts[rng.integers(0, len(counts), len(counts))].sum(axis=0) for _ in range(samples)]
        mean = self._score(counts.sum(axis=0))
        return {
            "mean": round(mean, 4),
            "interval": percentile_interval(np.array([self._score(each) for each in drawn])),
        }

    def _counts(self, answer: str, reference: str) -> list[int]:
        """What corpus BLEU adds up: matches and n-grams of each order, lengths."""
        found = self._corpus.corpus_score([answer], [[reference]])
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    def _score(self, counts: np.ndarray) -> float:
        orders = (len(counts) - 2) // 2
        matches, totals = counts[:orders].tolist(), counts[orders : 2 * orders].tolist()
        lengths = {"sys_len": int(counts[-2]), "ref_len": int(counts[-1])}
        smoothing = {"smooth_method": self._corpus.smooth_method, "smooth_value": self._corpus.smooth_value}
        return BLEU.compute_bleu(matches, totals, **lengths, **smoothing).score / 100

    def signatures(self) -> dict:
        """How the figures were computed, of those that were: sacrebleu writes the number of references, too."""
        names = {"sentence": self._sentence, "corpus": self._corpus, "characters": self._plain}
        return {name: str(metric.get_signature()) for name, metric in names.items() if hasattr(metric, "num_refs")}


def _spelled(text: str) -> str:
    """Characters as tokens, white space spelled out."""
    return " ".join(f"U+{ord(letter):04X}" if letter.isspace() else letter for letter in text)


def distinct(answers: list[str], size: int) -> float | None:
    """Distinct n-grams of words as a share of all, over the answers to a prompt (Li et al. 2016); None without any."""
    grams = [gram for answer in answers for gram in _grams(answer, size)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(answer: str) -> float:
    """Share of an answer's 4-word sequences that stood in it before."""
    grams = _grams(answer, REPEATED)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(text: str, size: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def answer_figures(answers: dict, rewards: list[dict]) -> dict[str, float]:
    """Figures of the answers to one prompt that need no reference text."""
    texts = answers["responses"]
    figures: dict[str, float] = {}
    for name, key in (("reward", "score"), ("reward_objectives", "objectives_mean")):
        if key in rewards[0]:
            values = [reward[key] for reward in rewards]
            figures |= {f"{name}_best": max(values), f"{name}_mean": statistics.mean(values)}
    diversity = {f"distinct_{size}": distinct(texts, size) for size in (1, 2)}
    return {
        **figures,
        "tokens_mean": statistics.mean(answers["token_counts"]),
        "truncated_share": statistics.mean(answers["truncated"]),
        **{name: share for name, share in diversity.items() if share is not None},
        "repetition": statistics.mean(map(repetition, texts)),
    }


def bleu_figures(answers: dict, rewards: list[dict], given: list[str], given_rewards: list[dict], bleu: Bleu) -> dict:
    """BLEU of the answers against the preferred one; the released code's takes the evaluator's choice on both sides."""
    values = [bleu.sentence(text, given[0]) for text in answers["responses"]]
    chosen, reference = (
        texts[max(range(len(texts)), key=lambda index: details[index]["score"])]
        for texts, details in ((answers["responses"], rewards), (given, given_rewards))
    )
    return {
        "bleu_best": max(values),
        "bleu_mean": statistics.mean(values),
        "bleu_characters_released": bleu.characters(chosen, reference),
    }


def prompt_figures(recipe: Recipe, sft: bool, bleu: Bleu) -> tuple[list[dict], dict]:
    """A record of figures for each prompt, and what was left out of which figure, by reason."""
    base = _folder_figures(evaluated(recipe, sft=True))
    folder = evaluated(recipe, sft)
    mine = base if sft else _folder_figures(folder)
    moved = {} if sft else _by_prompt(folder / "divergence" / "divergence.jsonl")
    records, left_out = [], Counter()
    for name, prompt in evaluated_prompts(recipe)[0].items():
        if name not in mine:
            left_out["prompt without answers (the ledger beside them says why)"] += 1
            continue
        answers, scores = mine[name]
        figures = answer_figures(answers, scores["answers"])
        given = [text.strip() for text in prompt["responses"]]
        if given and given[0]:
            figures |= bleu_figures(answers, scores["answers"], given, base[name][1]["given"], bleu)
        else:
            left_out["BLEU: prompt without a given response"] += 1
        if not sft:
            before = answer_figures(base[name][0], base[name][1]["answers"])
            for change in ("reward_best", "reward_mean", "tokens_mean"):
                figures[f"{change}_change"] = figures[change] - before[change]
            figures["kl_sampled"] = statistics.mean(moved[name]["kl"])
            figures["log_ratio_sampled"] = statistics.mean(moved[name]["log_ratio"])
        records.append({"prompt_id": name, **{key: round(value, 6) for key, value in figures.items()}})
    return records, left_out


def evaluated(recipe: Recipe, sft: bool) -> Path:
    """The folder of the run's evaluation, or of the model's before training."""
    return recipe.tested().sft_folder() if sft else recipe.evaluated_folder()


def _folder_figures(folder: Path) -> dict[str, tuple[dict, dict]]:
    """Answers and their scores, by prompt."""
    _finished(folder / "answers")
    _finished(folder / "scores")
    scores = _by_prompt(folder / "scores" / "scores.jsonl")
    answers = (record for _, record in read_answers(folder / "answers" / "test.jsonl"))
    return {record["prompt_id"]: (record, scores[record["prompt_id"]]) for record in answers}


def _finished(folder: Path) -> None:
    if not (folder / "manifest.json").exists():
        raise InputError("this is not finished", where=str(folder), remedy="run `bash evaluate.sh` with this recipe")


def _by_prompt(path: Path) -> dict[str, dict]:
    _finished(path.parent)
    return {record["prompt_id"]: record for _, record in read_jsonl(path)}


def corpus_bleu(recipe: Recipe, sft: bool, bleu: Bleu) -> dict:
    """Corpus BLEU of the answers that are best by sentence BLEU, and of all answers."""
    folder = evaluated(recipe, sft)
    prompts, _ = evaluated_prompts(recipe)
    best, every = [], []
    for _, record in read_answers(folder / "answers" / "test.jsonl"):
        given = prompts[record["prompt_id"]]["responses"]
        if given and given[0].strip():
            pairs = [(text, given[0].strip()) for text in record["responses"]]
            best.append([max(pairs, key=lambda pair: bleu.sentence(*pair))])
            every.append(pairs)
    if not best:
        return {}
    samples, seed = recipe.evaluation.bootstrap, recipe.seed
    return {
        "bleu_corpus_best": bleu.corpus(best, samples, seed),
        "bleu_corpus_all": bleu.corpus(every, samples, seed),
    }


def aggregate(records: list[dict], recipe: Recipe) -> dict:
    """Means with intervals of every figure, over the prompts that have it."""
    names = dict.fromkeys(name for record in records for name in record if name != "prompt_id")
    columns = {name: np.array([record[name] for record in records if name in record]) for name in names}
    return {
        name: {**bootstrap(values, recipe.evaluation.bootstrap, recipe.seed), "prompts": len(values)}
        for name, values in columns.items()
    }


def evaluate(recipe: Recipe, sft: bool) -> dict:
    """Run the stage; see the module's docstring."""
    folder = evaluated(recipe, sft)
    if not sft:
        _finished(folder / "evaluation")
    bleu = Bleu()
    records, left_out = prompt_figures(recipe, sft, bleu)
    if not records:
        raise InputError("no prompt has answers", where=str(folder), remedy="see answers/ledger.jsonl in it")
    metrics = {
        "run": SFT if sft else recipe.run,
        "prompts": len(records),
        "samples": recipe.evaluation.samples,
        "temperature": recipe.generation.temperature,
        "bootstrap": recipe.evaluation.bootstrap,
        "level": LEVEL,
        "left_out": left_out,
        "figures": {**aggregate(records, recipe), **corpus_bleu(recipe, sft, bleu)},
        "bleu_signatures": bleu.signatures(),
    }
    if not sft:
        margins = folder / "evaluation" / "margins.json"
        metrics["sets"] = json.loads(margins.read_text(encoding="utf-8"))["sets"]
    write_atomic(folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_json(folder / "metrics.json", metrics)
    return metrics


def print_metrics(metrics: dict, path: Path) -> None:
    """The figures on the screen."""
    print(
        f"metrics: {metrics['run']}: {metrics['samples']} answers to {metrics['prompts']} prompts; mean "
        f"[95 % interval] -> {path}"
    )
    for reason, count in metrics["left_out"].items():
        print(f"metrics: left out: {count} x {reason}")
    for name, value in metrics["figures"].items():
        low, high = value["interval"]
        print(f"  {name:26s} {value['mean']:9.4f}  [{low:.4f}, {high:.4f}]")


def main() -> None:
    recipe, options = parse(__doc__, dry_run=False, sft="figures of the model before training")
    metrics = evaluate(recipe, options.sft)
    print_metrics(metrics, evaluated(recipe, options.sft) / "metrics.json")


if __name__ == "__main__":
    run_main(main)
