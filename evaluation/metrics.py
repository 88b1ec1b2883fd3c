"""Everything measured of a run, per prompt and with intervals: BLEU, reward, divergence, lengths, margins.

Reads   `<output>/<run>/`: `answers/test.jsonl`, `scores/scores.jsonl`, `divergence/divergence.jsonl`,
        `evaluation/margins.json`; `<output>/sft/`: answers and scores of the model before training; of both, with
        `evaluation.proxy`, `proxy_scores/scores.jsonl`; `data.test.path`
Writes  `<output>/<run>/metrics.jsonl` (a line a prompt), `metrics.json` (means with intervals), `metrics.manifest.json`
        (last); the same under `<output>/sft/`, of the model before training
Run     python -m evaluation.metrics configs/quickstart.yaml

A figure is the best of a prompt's answers (`_best`, the paper's) or their mean (`_mean`). docs/evaluation.md describes
every one. Intervals: 95 %, percentile bootstrap over prompts. The stage takes seconds and is done anew at each call.
"""

import json
import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import regex
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_char import TokenizerChar
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from evaluation.intervals import LEVEL, bootstrap, few, figure, interval, percentile_interval
from hps.errors import InputError, run_main
from pipeline.cli import parse
from pipeline.files import write_json, write_lines
from pipeline.preflight import SAME_FUNCTION, SAME_MODEL, evaluated_prompts, same_model
from pipeline.recipe import SFT, Recipe
from pipeline.records import Check, Indexed, check_answers, read_answers, read_json, shorten
from pipeline.run_records import AGAIN, SCORES, check_divergence, check_scores
from pipeline.stage import remade, require_finished

EVALUATE = "bash evaluate.sh"
REPEATED = 4  # words of a sequence that counts as repeated
# Letters of scripts that put no spaces between words: Unicode's line breaking (UAX #14) asks a dictionary there
# (Thai, Lao, Khmer, Burmese, ...) or breaks anywhere (Chinese, Japanese, Yi). Tibetan has a mark of its own.
UNSPACED = regex.compile(r"[[\p{lb=SA}\p{lb=ID}\p{lb=CJ}\p{Script=Tibetan}]&&[\p{L}\p{M}]]", regex.V1)
LETTER = regex.compile(r"[\p{L}\p{M}]")
WORDS, CHINESE, CHARACTERS = "13a", "zh", "char"  # sacrebleu's tokenizers


def tokenizer_of(reference: str) -> str:
    """sacrebleu's tokenizer for the script of most letters of a text.

    `zh` splits Chinese characters, `char` everything: Japanese words (`ja-mecab`) would need a dictionary.
    """
    unspaced = UNSPACED.findall(reference)
    if 2 * len(unspaced) <= len(LETTER.findall(reference)):
        return WORDS
    return CHINESE if all(regex.match(r"\p{Script=Han}", letter) for letter in unspaced) else CHARACTERS


class Bleu:
    """BLEU as shares (0 to 1), by sacrebleu; its signatures say how. The reference's script decides the tokenizer."""

    def __init__(self):
        tokenizers = (WORDS, CHINESE, CHARACTERS)
        self._sentence = {name: BLEU(tokenize=name, effective_order=True) for name in tokenizers}
        self._corpus = {name: BLEU(tokenize=name) for name in tokenizers}
        self._plain = BLEU(tokenize="none", smooth_method="none", effective_order=False)

    def sentence(self, answer: str, reference: str) -> float:
        """BLEU of one answer; orders that it is too short for are left out (effective order)."""
        return self._sentence[tokenizer_of(reference)].sentence_score(answer, [reference]).score / 100

    def characters(self, answer: str, reference: str) -> float:
        """The released code's figure: its token-level function is given strings, so that characters are its tokens."""
        # As a corpus of one: `sentence_score` would advise, at each call, the setting that the released code has not.
        return self._plain.corpus_score([_spelled(answer)], [[_spelled(reference)]]).score / 100

    def counts(self, prompts: Iterable[list[tuple[str, str]]]) -> np.ndarray:
        """What corpus BLEU adds up, (prompts, numbers), from the pairs of answer and reference of each prompt."""
        return np.array([self._prompt_counts(pairs) for pairs in prompts])

    def _prompt_counts(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        forget_texts()
        return np.sum([self._counts(*pair) for pair in pairs], axis=0)

    def corpus(self, counts: np.ndarray, samples: int, seed: int) -> dict:
        """Corpus BLEU with a bootstrap interval over the prompts.

        The answers to a prompt are drawn together: they are not independent.
        """
        rng = np.random.default_rng(seed)
        drawn = [counts[rng.integers(0, len(counts), len(counts))].sum(axis=0) for _ in range(samples)]
        mean = self._score(counts.sum(axis=0))
        return {
            "mean": round(mean, 4),
            "interval": percentile_interval(np.array([self._score(each) for each in drawn])),
        }

    def _counts(self, answer: str, reference: str) -> list[int]:
        """Of one answer: matches and n-grams of each order, lengths."""
        found = self._corpus[tokenizer_of(reference)].corpus_score([answer], [[reference]])
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    def _score(self, counts: np.ndarray) -> float:
        orders = (len(counts) - 2) // 2
        matches, totals = counts[:orders].tolist(), counts[orders : 2 * orders].tolist()
        lengths = {"sys_len": int(counts[-2]), "ref_len": int(counts[-1])}
        corpus = self._corpus[WORDS]
        smoothing = {"smooth_method": corpus.smooth_method, "smooth_value": corpus.smooth_value}
        return BLEU.compute_bleu(matches, totals, **lengths, **smoothing).score / 100

    def signatures(self) -> dict:
        """How the figures were computed, of those that were: sacrebleu writes the number of references, too."""
        metrics = {"sentence": self._sentence[WORDS], "corpus": self._corpus[WORDS], "characters": self._plain}
        for kind, by_tokenizer in (("sentence", self._sentence), ("corpus", self._corpus)):
            metrics |= {f"{kind}, {name}": by_tokenizer[name] for name in (CHINESE, CHARACTERS)}
        return {name: str(metric.get_signature()) for name, metric in metrics.items() if hasattr(metric, "num_refs")}


def forget_texts() -> None:
    """Empty sacrebleu's caches. They hold the last 65,536 texts and their tokens; only a prompt's own are of use."""
    for tokenizer in (Tokenizer13a, TokenizerRegexp, TokenizerZh, TokenizerChar):
        tokenizer.__call__.cache_clear()


def _spelled(text: str) -> str:
    """Characters as tokens, white space spelled out."""
    return " ".join(f"U+{ord(letter):04X}" if letter.isspace() else letter for letter in text)


def distinct(answers: list[str], size: int) -> float | None:
    """Distinct n-grams of words as a share of all, over the answers to a prompt (Li et al. 2016); None without any."""
    grams = [gram for answer in answers for gram in _grams(answer, size)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(answer: str) -> float:
    """Share of an answer's sequences of four words that stood in it before; of `_words`, that is."""
    grams = _grams(answer, REPEATED)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(text: str, size: int) -> list[tuple[str, ...]]:
    words = _words(text)
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def _words(text: str) -> list[str]:
    """Words between white space, in lower case; where a script has no spaces, characters."""
    return UNSPACED.sub(r" \g<0> ", text.lower()).split()


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
    forget_texts()
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


def prompt_figures(recipe: Recipe, sft: bool, bleu: Bleu, left_out: Counter) -> Iterator[dict]:
    """A record of figures for each prompt, as it is asked for; what was left out of which figure is counted."""
    base = Answered(evaluated(recipe, sft=True))
    folder = evaluated(recipe, sft)
    mine = base if sft else Answered(folder)
    moved = {} if sft else _by_prompt(folder / "divergence" / "divergence.jsonl", check_divergence)
    proxies = [Answered(each, "reward") for each in _folders(recipe, sft)] if recipe.evaluation.proxy else []
    for name, prompt in evaluated_prompts(recipe)[0].items():
        if name not in mine.answers:
            left_out["prompt without answers (the ledger beside them says why)"] += 1
            continue
        if name not in base.answers:
            left_out["prompt that the model before training has not answered (its ledger says why)"] += 1
            continue
        answers, scores = mine.of(name)
        figures = answer_figures(answers, scores["answers"])
        given = [text.strip() for text in prompt["responses"]]
        if given and given[0]:
            figures |= bleu_figures(answers, scores["answers"], given, base.given(name, len(given)), bleu)
        else:
            left_out["BLEU: prompt without a given response"] += 1
        if not sft:
            answers_before, scores_before = base.of(name)
            before = answer_figures(answers_before, scores_before["answers"])
            figures |= change_figures(figures, before, _line(moved, name, folder / "divergence"))
            figures["reward_win_rate"] = win_rate(scores["answers"], scores_before["answers"])
        if proxies:
            by_proxy = [statistics.mean(each["score"] for each in proxy.of(name)[1]["answers"]) for proxy in proxies]
            figures["proxy_mean"] = by_proxy[0]
            if not sft:
                figures["proxy_mean_change"] = by_proxy[0] - by_proxy[1]
        yield {"prompt_id": name, **{key: round(value, 6) for key, value in figures.items()}}


def change_figures(after: dict, before: dict, moved: dict) -> dict[str, float]:
    """What training changed for one prompt, from figures of the answers and a line of the divergence."""
    changes = {f"{name}_change": after[name] - before[name] for name in ("reward_best", "reward_mean", "tokens_mean")}
    return {
        **changes,
        "kl_sampled": statistics.mean(moved["kl"]),
        "log_ratio_sampled": statistics.mean(moved["log_ratio"]),
    }


def win_rate(after: list[dict], before: list[dict]) -> float:
    """Share of all pairs (an answer after, one before) in which the one after has the higher reward; a tie is half."""
    pairs = [(ours["score"], theirs["score"]) for ours in after for theirs in before]
    return statistics.mean((ours > theirs) + (ours == theirs) / 2 for ours, theirs in pairs)


def evaluated(recipe: Recipe, sft: bool) -> Path:
    """The folder of the run's evaluation, or of the model's before training."""
    return recipe.tested().sft_folder() if sft else recipe.evaluated_folder()


def _folders(recipe: Recipe, sft: bool) -> list[Path]:
    """The evaluation's folder, and that of the model before training where it is another one."""
    return list(dict.fromkeys((evaluated(recipe, sft), evaluated(recipe, sft=True))))


class Answered:
    """The answers of a folder of evaluate.sh and their scores, by prompt; those of one prompt belong together.

    Args:
        role: of what scored them, `evaluator` or `reward`.

    Raises:
        InputError: answers or scores are not finished, or a line is damaged; of a prompt that is asked for, there are
            no scores, or not as many as texts.
    """

    def __init__(self, folder: Path, role: str = "evaluator"):
        require_finished(folder / "answers", "the answers are", EVALUATE)
        self.answers = Indexed(folder / "answers" / "test.jsonl", check_answers)
        self._folder, self._scored = folder, folder / SCORES[role]
        self.scores = _by_prompt(self._scored / "scores.jsonl", check_scores)

    def of(self, name: str) -> tuple[dict, dict]:
        """The record of a prompt's answers, and the line of their scores."""
        answers = _line(self.answers, name, self._folder / "answers")
        return answers, self._scores(name, "answers", len(answers["responses"]))

    def given(self, name: str, count: int) -> list[dict]:
        """The scores of a prompt's given responses, of which there are so many."""
        return self._scores(name, "given", count)["given"]

    def _scores(self, name: str, field: str, count: int) -> dict:
        line = _line(self.scores, name, self._scored)
        if len(line[field]) != count:
            raise InputError(
                f"`{field}` has {len(line[field])} scores for {count} texts",
                where=self.scores.where(name),
                remedy=AGAIN,
            )
        return line


def _line(lines: Mapping[str, dict], name: str, folder: Path) -> dict:
    """The line of a prompt. InputError: there is none."""
    if name not in lines:
        raise InputError(f"there is no line of prompt {shorten(name)}", where=str(folder), remedy=AGAIN)
    return lines[name]


def _by_prompt(path: Path, check: Check) -> Indexed:
    require_finished(path.parent, f"the stage `{path.parent.name}` is", EVALUATE)
    return Indexed(path, check)


def corpus_bleu(recipe: Recipe, sft: bool, bleu: Bleu, tokenizers: Counter) -> dict:
    """Corpus BLEU of the answers that are best by sentence BLEU, and of all answers.

    Args:
        tokenizers: how many prompts need which. Counts of words and of characters do not add up: with several there is
            no such figure.
    """
    if len(tokenizers) != 1:
        return {}
    every = bleu.counts(_with_reference(recipe, sft))
    best = bleu.counts([max(pairs, key=lambda pair: bleu.sentence(*pair))] for pairs in _with_reference(recipe, sft))
    samples, seed = recipe.evaluation.bootstrap, recipe.seed
    return {
        "bleu_corpus_best": bleu.corpus(best, samples, seed),
        "bleu_corpus_all": bleu.corpus(every, samples, seed),
    }


def bleu_tokenizers(recipe: Recipe, sft: bool) -> Counter:
    """How many prompts' BLEU needs which of sacrebleu's tokenizers."""
    return Counter(tokenizer_of(pairs[0][1]) for pairs in _with_reference(recipe, sft))


def _with_reference(recipe: Recipe, sft: bool) -> Iterator[list[tuple[str, str]]]:
    """The pairs of answer and preferred response, of each prompt that has one."""
    prompts, _ = evaluated_prompts(recipe)
    for _, record in read_answers(evaluated(recipe, sft) / "answers" / "test.jsonl"):
        given = prompts[record["prompt_id"]]["responses"]
        if given and given[0].strip():
            yield [(text, given[0].strip()) for text in record["responses"]]


class Figures:
    """Columns of the prompts' figures: 8 bytes each."""

    def __init__(self):
        self.prompts = 0
        self.columns: dict[str, array] = {}

    def add(self, record: dict) -> None:
        self.prompts += 1
        for name, value in record.items():
            if name != "prompt_id":
                self.columns.setdefault(name, array("d")).append(value)

    def aggregate(self, recipe: Recipe) -> dict:
        """Means with intervals of every figure, over the prompts that have it."""
        return {
            name: {**bootstrap(np.array(values), recipe.evaluation.bootstrap, recipe.seed), "prompts": len(values)}
            for name, values in self.columns.items()
        }


def evaluate(recipe: Recipe, sft: bool) -> dict:
    """Run the stage; see the module's docstring."""
    folder = evaluated(recipe, sft)
    if not sft:
        require_finished(folder / "evaluation", "the held-out figures are", EVALUATE)
    bleu, left_out, figures = Bleu(), Counter(), Figures()

    def lines() -> Iterator[str]:
        for record in prompt_figures(recipe, sft, bleu, left_out):
            figures.add(record)
            yield json.dumps(record) + "\n"
        if not figures.prompts:
            raise InputError("no prompt has answers", where=str(folder), remedy="see answers/ledger.jsonl in it")

    tokenizers = bleu_tokenizers(recipe, sft)
    if len(tokenizers) > 1:
        left_out[f"corpus BLEU: prompts need different tokenizers ({', '.join(sorted(tokenizers))})"] += 1
    outputs = [folder / name for name in ("metrics.jsonl", "metrics.json")]
    with remade(outputs[1], recipe, {"seed": recipe.seed}, outputs, _inputs(recipe, sft)):
        write_lines(outputs[0], lines())
        metrics = _metrics(recipe, sft, figures, bleu, tokenizers, left_out)
        write_json(outputs[1], metrics)
    return metrics


def _metrics(recipe: Recipe, sft: bool, figures: Figures, bleu: Bleu, tokenizers: Counter, left_out: Counter) -> dict:
    """What `metrics.json` holds."""
    metrics = {
        "run": SFT if sft else recipe.run,
        "prompts": figures.prompts,
        "samples": recipe.evaluation.samples,
        "temperature": recipe.generation.temperature,
        "bootstrap": recipe.evaluation.bootstrap,
        "level": LEVEL,
        "left_out": left_out,
        "figures": {**figures.aggregate(recipe), **corpus_bleu(recipe, sft, bleu, tokenizers)},
        "bleu_tokenizers": tokenizers,
        "bleu_signatures": bleu.signatures(),
        "evaluator_is_reward": same_model(recipe.models.reward, recipe.models.evaluator),
    }
    if not sft:
        metrics["sets"] = read_json(evaluated(recipe, sft) / "evaluation" / "margins.json")["sets"]
    return metrics


def _inputs(recipe: Recipe, sft: bool) -> list[str | Path]:
    """The files that the figures are made of."""
    names = ["answers/test.jsonl", "scores/scores.jsonl"]
    names += ["proxy_scores/scores.jsonl"] * recipe.evaluation.proxy
    paths = [each / name for each in _folders(recipe, sft) for name in names]
    if not sft:
        paths += [evaluated(recipe, sft) / name for name in ("divergence/divergence.jsonl", "evaluation/margins.json")]
    return [recipe.tested().data.test.path, *sorted(paths)]


def print_metrics(metrics: dict, path: Path, function: bool = False) -> None:
    """The figures on the screen; `function`: the evaluator is one."""
    print(
        f"metrics: {metrics['run']}: {metrics['samples']} answers to {metrics['prompts']} prompts; mean "
        f"[95 % interval]{few(metrics['prompts'])} -> {path}"
    )
    if metrics["evaluator_is_reward"]:
        print(f"metrics: {SAME_FUNCTION if function else f'WARNING: {SAME_MODEL}'}")
    for reason, count in metrics["left_out"].items():
        print(f"metrics: left out: {count} x {reason}")
    for name, value in metrics["figures"].items():
        print(f"  {name:26s} {figure(value['mean'], 4):>9s}  {interval(value, 4)}")


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    function = recipe.models.evaluator.function is not None
    for sft in (True, False):
        print_metrics(evaluate(recipe, sft), evaluated(recipe, sft) / "metrics.json", function)


if __name__ == "__main__":
    run_main(main)
