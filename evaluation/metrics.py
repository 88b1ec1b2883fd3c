"""Everything measured of a run, per prompt and with intervals: BLEU, reward, divergence, lengths, margins.

Reads   `<output>/<run>/`: `answers/test.jsonl`, `scores/scores.jsonl`, `divergence/divergence.jsonl`,
        `evaluation/margins.json`; `<output>/sft/`: answers and scores of the model before training; of both, with
        `evaluation.proxy`, `proxy_scores/scores.jsonl`; with `evaluation.samples_along` answers, scores and divergence
        in `<output>/<run>/along/step-N/`; `data.test.path`
Writes  `<output>/<run>/metrics.jsonl` (a line a prompt), `metrics.json` (means with intervals), `metrics.manifest.json`
        (last); the same under `<output>/sft/`, of the model before training
Run     python -m evaluation.metrics configs/quickstart.yaml

A figure is the best of a prompt's answers (`_best`, the paper's) or their mean (`_mean`). docs/results.md describes
every one. Intervals: 95 %, percentile bootstrap over prompts. The stage takes seconds and runs again at each call.
"""

import json
import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from evaluation.intervals import LEVEL, bootstrap, estimate, few, figure, interval
from evaluation.text_figures import Bleu, distinct, forget_texts, repetition, tokenizer_of
from hps.errors import InputError, run_main, shorten
from pipeline.cli import parse
from pipeline.files import write_json, write_lines
from pipeline.models import SAME_FUNCTION, SAME_MODEL, same_model
from pipeline.prompts import evaluated_prompts
from pipeline.recipe import SFT, Recipe
from pipeline.records import Answers, Check, Indexed, check_answers, read_answers, read_json
from pipeline.run_records import AGAIN, SCORES, Score, Scores, answered_steps, check_divergence, check_scores
from pipeline.stage import remade, require_finished

EVALUATE = "bash evaluate.sh"


def answer_figures(answers: Answers, rewards: list[Score]) -> dict[str, float]:
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


def answer_columns(recipe: Recipe, folder: Path, sft: bool = False) -> dict[str, list]:
    """The values of every answer in a folder of evaluate.sh, as columns.

    Returns:
        `prompt_id`; `reward`, `tokens`, `repetition`, with `evaluation.proxy` `proxy`, and `kl` (nats; not of the model
        before training): of each prompt a list with a number for each answer.
    """
    answered = Answered(folder)
    proxy = Answered(folder, "reward") if recipe.evaluation.proxy else None
    moved = None if sft else _by_prompt(folder / "divergence" / "divergence.jsonl", check_divergence)
    columns: dict[str, list] = defaultdict(list)
    for name in evaluated_prompts(recipe)[0]:
        if name not in answered.answers:
            continue
        record, scores = answered.of(name)
        columns["prompt_id"].append(name)
        columns["reward"].append([each["score"] for each in scores["answers"]])
        if proxy is not None:
            columns["proxy"].append([each["score"] for each in proxy.of(name)[1]["answers"]])
        columns["tokens"].append(record["token_counts"])
        columns["repetition"].append([repetition(text) for text in record["responses"]])
        if moved is not None:
            kl = _line(moved, name, folder / "divergence")["kl"]
            if len(kl) != len(record["responses"]):
                problem = f"`kl` has {len(kl)} entries for {len(record['responses'])} answers"
                raise InputError(problem, where=moved.where(name), remedy=AGAIN)
            columns["kl"].append(kl)
    return dict(columns)


def figures_along(recipe: Recipe) -> list[dict]:
    """At each answered step before the end: `step`, and means with intervals of what `answer_columns` has."""
    samples, seed, found = recipe.evaluation.bootstrap, recipe.seed, []
    for step in answered_steps(recipe)[:-1]:
        columns = answer_columns(recipe, recipe.evaluated_folder(step))
        del columns["prompt_id"]
        means = {name: np.array([statistics.mean(each) for each in values]) for name, values in columns.items()}
        found.append({"step": step, **{name: bootstrap(values, samples, seed) for name, values in means.items()}})
    return found


def bleu_figures(
    answers: Answers, rewards: list[Score], given: list[str], given_rewards: list[Score], bleu: Bleu
) -> dict:
    """BLEU against the preferred response; the released code compares the evaluator's choices of both sides."""
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
    """Yield the figures of each prompt; count what was left out by reason."""
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
    """What training changed for one prompt."""
    changes = {f"{name}_change": after[name] - before[name] for name in ("reward_best", "reward_mean", "tokens_mean")}
    return changes | {f"{name}_sampled": statistics.mean(moved[name]) for name in ("kl", "log_ratio")}


def win_rate(after: list[Score], before: list[Score]) -> float:
    """Share of pairs (answer after, answer before) in which the first has the higher reward; a tie counts half."""
    pairs = [(ours["score"], theirs["score"]) for ours in after for theirs in before]
    return statistics.mean((ours > theirs) + (ours == theirs) / 2 for ours, theirs in pairs)


def evaluated(recipe: Recipe, sft: bool) -> Path:
    """The folder of the run's evaluation, or of the evaluation of the model before training."""
    return recipe.tested().sft_folder() if sft else recipe.evaluated_folder()


def _folders(recipe: Recipe, sft: bool) -> list[Path]:
    """The evaluation's folder and, if it is another one, that of the model before training."""
    return list(dict.fromkeys((evaluated(recipe, sft), evaluated(recipe, sft=True))))


class Answered:
    """The answers in a folder of evaluate.sh with their scores, by prompt.

    Args:
        role: of the model that scored them, `evaluator` or `reward`.

    Raises:
        InputError: answers or scores are not finished, or a line is damaged; a requested prompt has no scores, or not
            one for each text.
    """

    def __init__(self, folder: Path, role: str = "evaluator"):
        require_finished(folder / "answers", "the answers are", EVALUATE)
        self.answers = Indexed(folder / "answers" / "test.jsonl", check_answers)
        self._folder, self._scored = folder, folder / SCORES[role]
        self.scores = _by_prompt(self._scored / "scores.jsonl", check_scores)

    def of(self, name: str) -> tuple[Answers, Scores]:
        """The record of a prompt's answers, and the line of their scores."""
        answers = _line(self.answers, name, self._folder / "answers")
        return answers, self._scores(name, "answers", len(answers["responses"]))

    def given(self, name: str, count: int) -> list[Score]:
        """The scores of a prompt's `count` given responses."""
        return self._scores(name, "given", count)["given"]

    def _scores(self, name: str, field: str, count: int) -> Scores:
        line = _line(self.scores, name, self._scored)
        if len(line[field]) != count:
            problem = f"`{field}` has {len(line[field])} scores for {count} texts"
            raise InputError(problem, where=self.scores.where(name), remedy=AGAIN)
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
        tokenizers: number of prompts by tokenizer. With several there is no corpus BLEU, because counts of words and
            of characters do not add up.
    """
    if len(tokenizers) != 1:
        return {}
    every = bleu.counts(_with_reference(recipe, sft))
    best = bleu.counts([max(pairs, key=lambda pair: bleu.sentence(*pair))] for pairs in _with_reference(recipe, sft))
    counts = {"bleu_corpus_best": best, "bleu_corpus_all": every}
    return {name: bleu.corpus(each, recipe.evaluation.bootstrap, recipe.seed) for name, each in counts.items()}


def _with_reference(recipe: Recipe, sft: bool) -> Iterator[list[tuple[str, str]]]:
    """Yield the pairs of answer and preferred response for each prompt that has one."""
    prompts, _ = evaluated_prompts(recipe)
    for _, record in read_answers(evaluated(recipe, sft) / "answers" / "test.jsonl"):
        given = prompts[record["prompt_id"]]["responses"]
        if given and given[0].strip():
            yield [(text, given[0].strip()) for text in record["responses"]]


def evaluate(recipe: Recipe, sft: bool) -> dict:
    """Run the stage; see the module's docstring."""
    folder = evaluated(recipe, sft)
    if not sft:
        require_finished(folder / "evaluation", "the held-out figures are", EVALUATE)
    bleu, left_out = Bleu(), Counter()
    columns: dict[str, array] = defaultdict(lambda: array("d"))  # 8 bytes a figure

    def lines() -> Iterator[str]:
        for record in prompt_figures(recipe, sft, bleu, left_out):
            for name, value in record.items():
                if name != "prompt_id":
                    columns[name].append(value)
            yield json.dumps(record) + "\n"
        if not columns:
            raise InputError("no prompt has answers", where=str(folder), remedy="see answers/ledger.jsonl in it")

    # Number of prompts by the tokenizer of sacrebleu that their BLEU needs.
    tokenizers = Counter(tokenizer_of(pairs[0][1]) for pairs in _with_reference(recipe, sft))
    if len(tokenizers) > 1:
        left_out[f"corpus BLEU: prompts need different tokenizers ({', '.join(sorted(tokenizers))})"] += 1
    outputs = [folder / name for name in ("metrics.jsonl", "metrics.json")]
    with remade(outputs[1], recipe, {"seed": recipe.seed}, outputs, _inputs(recipe, sft)):
        write_lines(outputs[0], lines())
        samples, seed = recipe.evaluation.bootstrap, recipe.seed
        figures = {
            name: {**bootstrap(np.array(values), samples, seed), "prompts": len(values)}
            for name, values in columns.items()
        }
        metrics = {
            "run": SFT if sft else recipe.name,
            "prompts": len(columns["tokens_mean"]),
            "samples": recipe.evaluation.samples,
            "temperature": recipe.generation.temperature,
            "bootstrap": samples,
            "level": LEVEL,
            "left_out": left_out,
            "figures": figures | corpus_bleu(recipe, sft, bleu, tokenizers),
            "bleu_tokenizers": tokenizers,
            "bleu_signatures": bleu.signatures(),
            "evaluator_is_reward": same_model(recipe.models.reward, recipe.models.evaluator),
        }
        if not sft:
            metrics["sets"] = read_json(folder / "evaluation" / "margins.json")["sets"]
            if recipe.evaluation.samples_along:
                metrics["along"] = figures_along(recipe)
        write_json(outputs[1], metrics)
    return metrics


def _inputs(recipe: Recipe, sft: bool) -> list[str | Path]:
    """The files that the figures are computed from."""
    names = ["answers/test.jsonl", "scores/scores.jsonl"]
    names += ["proxy_scores/scores.jsonl"] * recipe.evaluation.proxy
    paths = [each / name for each in _folders(recipe, sft) for name in names]
    if not sft:
        paths += [evaluated(recipe, sft) / name for name in ("divergence/divergence.jsonl", "evaluation/margins.json")]
        for step in answered_steps(recipe)[:-1]:
            paths += [recipe.evaluated_folder(step) / name for name in (*names, "divergence/divergence.jsonl")]
    return [recipe.tested().data.test.path, *sorted(paths)]


def print_metrics(metrics: dict, path: Path, function: bool = False) -> None:
    """Print the figures; `function`: the evaluator is a reward function."""
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
    for point in metrics.get("along", []):
        shown = ", ".join(f"{name} {estimate(point[name], 4)}" for name in ("reward", "kl", "tokens"))
        print(f"  at step {point['step']}: {shown}")


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    function = recipe.models.evaluator.function is not None
    for sft in (True, False):
        print_metrics(evaluate(recipe, sft), evaluated(recipe, sft) / "metrics.json", function)


if __name__ == "__main__":
    run_main(main)
