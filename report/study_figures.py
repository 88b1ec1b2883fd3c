"""Figures of a human study, and the table and the page that show them.

Reads   ratings un-blinded by `report.study`: (raters, prompts, models, criteria); `results/paper.json`
Writes  nothing itself: `report.study import` writes what is made here

Intervals are percentile intervals of a bootstrap that resamples both raters and prompts (Owen 2007, "The pigeonhole
bootstrap"): other raters may be stricter, and other prompts harder. A resample has the same raters for all its prompts;
prompts are drawn within their data set. The difference of two models is taken within each resample, so what both share
cancels.
"""

import itertools
import re

import numpy as np

from evaluation.intervals import estimate, figure, signed, with_interval
from evaluation.paper import paper_marks
from evaluation.render import markdown_table
from report.page import render
from report.pictures import IN_RED, NAME, Pictures, forest, forest_height, named, picture

RESAMPLES = 10_000
TOGETHER = "All prompts"
DIGITS = 2  # as the marks
AT_A_TIME = 500  # resamples, to bound the memory


def resampled_means(values: np.ndarray, sets: list[list[int]], samples: int, seed: int) -> np.ndarray:
    """Means over raters and prompts on resamples of both: (samples, ...).

    Args:
        values: (raters, prompts, ...).
        sets: the places of each data set's prompts; together all prompts.
    """
    rng = np.random.default_rng(seed)
    raters, prompts = values.shape[:2]
    flat = values.reshape(raters, -1)
    found = []
    for start in range(0, samples, AT_A_TIME):
        count = min(AT_A_TIME, samples - start)
        by_prompt = _drawn(rng, raters, count) @ flat / raters
        weights = np.empty((count, prompts))
        for places in sets:
            weights[:, places] = _drawn(rng, len(places), count)
        found.append(np.einsum("sp,spk->sk", weights, by_prompt.reshape(count, prompts, -1)) / prompts)
    return np.concatenate(found).reshape(samples, *values.shape[2:])


def _drawn(rng: np.random.Generator, things: int, samples: int) -> np.ndarray:
    """How often each of `things` is drawn in as many draws with replacement: (samples, things)."""
    return rng.multinomial(things, np.full(things, 1 / things), size=samples)


def agreement(ratings: np.ndarray) -> float | None:
    """Krippendorff's alpha on an interval scale (by NLTK), from (raters, units); None for one rater or all equal."""
    from nltk.metrics.agreement import AnnotationTask
    from nltk.metrics.distance import interval_distance

    # Averages of the same marks in another order differ in their last bit.
    rounded = ratings.round(4)
    if len(ratings) < 2 or rounded.min() == rounded.max():
        return None
    marks = [(rater, unit, float(mark)) for rater, row in enumerate(rounded) for unit, mark in enumerate(row)]
    return round(float(AnnotationTask(marks, distance=interval_distance).alpha()), 4)


def part(ratings: np.ndarray, sets: list[list[int]], key: dict) -> dict:
    """Means, paired differences of every two models, and agreement, over some of the prompts."""
    names = [*key["criteria"], "average"]
    values = np.concatenate([ratings, ratings.mean(axis=3, keepdims=True)], axis=3)
    means, drawn = values.mean(axis=(0, 1)), resampled_means(values, sets, RESAMPLES, key["seed"])

    def entries(mean: np.ndarray, resamples: np.ndarray) -> dict:
        return {name: with_interval(mean[place], resamples[:, place]) for place, name in enumerate(names)}

    models = list(enumerate(key["models"]))
    return {
        "means": {model: entries(means[place], drawn[:, place]) for place, model in models},
        "differences": [
            {"models": [a, b], **entries(means[i] - means[j], drawn[:, i] - drawn[:, j])}
            for (i, a), (j, b) in itertools.combinations(models, 2)
        ],
        "agreement": {
            name: agreement(values[:, :, :, place].reshape(len(values), -1)) for place, name in enumerate(names)
        },
    }


def figures(ratings: np.ndarray, key: dict) -> dict:
    """`together`, `sets` (each data set, where there are several), and `paper`.

    Args:
        ratings: (raters, prompts, models, criteria), the prompts in the order of the key.
    """
    places = itertools.count()
    sets = {name: list(itertools.islice(places, len(prompts))) for name, prompts in key["sets"].items()}
    together = part(ratings, list(sets.values()), key)
    averages = {model: means["average"]["mean"] for model, means in together["means"].items()}
    several = sets if len(sets) > 1 else {}
    return {
        "together": together,
        "sets": {name: part(ratings[:, at], [list(range(len(at)))], key) for name, at in several.items()},
        "paper": beside_the_paper(averages),
    }


def beside_the_paper(means: dict[str, float]) -> dict[str, dict]:
    """For models named as in the paper: name and mean of its row, and our difference from it."""
    paper = {name.casefold(): {"name": name, "mean": mean} for name, mean in paper_marks().items()}
    found = {model: paper[model.casefold()] for model in means if model.casefold() in paper}
    return {model: row | {"difference": round(means[model] - row["mean"], 4)} for model, row in found.items()}


def _parts(result: dict) -> list[tuple[str, dict]]:
    """Title and figures of all prompts together, and of each data set where there are several."""
    return [(TOGETHER, result["together"]), *result["sets"].items()]


def sections(result: dict) -> list[dict]:
    """The texts of table and page: means, differences and agreement, for all prompts and for each data set."""
    found = []
    for title, each in _parts(result):
        names = list(each["agreement"])
        rows = [[model, *(estimate(means[name], DIGITS) for name in names)] for model, means in each["means"].items()]
        head = ["model", *names]
        alphas = [figure(alpha, DIGITS) for alpha in each["agreement"].values()]
        foot = ["Krippendorff's alpha", *alphas]
        if each is result["together"]:  # the paper gives no figures by data set
            head, foot = [*head, "paper", "difference"], [*foot, "", ""]
            for row in rows:
                paper = result["paper"].get(row[0])
                row += [figure(paper["mean"], DIGITS), signed(paper["difference"], DIGITS)] if paper else ["–", "–"]
        differences = [
            [" − ".join(entry["models"]), *(estimate(entry[name], DIGITS, signed) for name in names)]
            for entry in each["differences"]
        ]
        found.append({"title": title, "head": head, "rows": [*rows, foot]})
        found[-1]["differences"] = {"head": ["difference", *names], "rows": differences}
    return found


def remarks(result: dict) -> list[str]:
    """What a reader must know about the figures."""
    pairs = len(result["together"]["differences"])
    counts = " + ".join(str(count) for count in result["prompts"].values())
    found = [
        f"Raters: {result['raters']}; prompts: {counts}; models: {len(result['together']['means'])}. "
        "Criteria from 1.00 (worst) to 5.00 (best).",
        "Mean [95 % interval] over raters and prompts: a bootstrap that resamples both, prompts within their data set.",
        "A difference of two models is taken within each resample. Where its interval includes zero, the study does "
        f"not tell the two apart. Pairs compared: {pairs}; no interval is widened for their number.",
    ]
    if result["raters"] == 1:
        found.append("With one rater the intervals are over prompts only and say nothing about other raters.")
    elif result["raters"] < 10:
        found.append(
            "With fewer than 10 raters the intervals are too short: those of 5 contain the truth in about 87 of 100."
        )
    if result["missing_raters"]:
        found.append(f"Not in yet: raters {', '.join(map(str, result['missing_raters']))}.")
    return [*found, _paper_remark(result)]


def _paper_remark(result: dict) -> str:
    names = paper_marks()
    matched = {paper["name"] for paper in result["paper"].values()}
    left = [f"{name} {mean:.2f}" for name, mean in names.items() if name not in matched]
    return (
        "Column «paper»: the mean of the four criteria in the paper's Table 3 (15 + 15 prompts, 20 raters, no "
        f"intervals), for models named as its rows are ({', '.join(names)}; capitals do not matter). «difference»: our "
        "average minus it. Other models, prompts and raters than the paper's are in that difference, too."
        + (f" Rows of the paper without a model here: {', '.join(left)}." if left else "")
    )


def table(result: dict) -> str:
    """The figures as Markdown."""
    lines = [f"# Human study {result['study']}", ""]
    for remark in remarks(result):
        lines += [remark, ""]
    for section in sections(result):
        lines += [f"## {_cell(section['title'])}", "", *_rows(section), "", *_rows(section["differences"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(grid: dict) -> list[str]:
    return markdown_table(grid["head"], [[_cell(row[0]), *row[1:]] for row in grid["rows"]])


def _cell(text: str) -> str:
    """A name as inert Markdown: markup, links and line ends become entities."""
    return re.sub(r"[^\w .,+=/()'−-]|_|(?<=www)\.", lambda found: f"&#{ord(found[0])};", text, flags=re.IGNORECASE)


def pictures(title: str, each: dict, paper: dict[str, dict]) -> list[Pictures]:
    """Means and differences of a part, a panel for the average and one for each criterion.

    Args:
        paper: the paper's mean by model, of the average; empty where it has none.
    """
    *criteria, average = each["agreement"]
    means, differences = [], []
    for name in (average, *criteria):
        rows = [(model, entries[name]) for model, entries in each["means"].items()]
        text = f"{title}, {name}: {'; '.join(f'{model} {estimate(entry, DIGITS)}' for model, entry in rows)}."
        if name == average and paper:
            rows = [(m, e | ({"paper": paper[m]["mean"]} if m in paper else {})) for m, e in rows]
            theirs = [f"{model} {figure(found['mean'], DIGITS)}" for model, found in paper.items()]
            text += f" The paper: {'; '.join(theirs)}."
        means.append(picture(text, forest, name, rows, zero=False, height=forest_height(rows)))
        rows = [(entry["models"], entry[name]) for entry in each["differences"]]
        said = "; ".join(f"{' − '.join(models)} {estimate(entry, DIGITS, signed)}" for models, entry in rows)
        rows = [(" − ".join(named(model, NAME // 2 - 2) for model in models), entry) for models, entry in rows]
        text = f"{title}, differences, {name}: {said}."
        differences.append(picture(text, forest, f"{name}, difference", rows, height=forest_height(rows)))
    caption = f"Dot: mean; line: 95 % interval.{IN_RED if paper else ''}"
    caption += " Each picture has its own scale, not the marks' 1 to 5."
    return [
        Pictures(means, caption),
        Pictures(differences, "Differences: if the line includes zero, the study does not separate the two models."),
    ]


def results_page(result: dict) -> str:
    """The figures as a page."""
    shown = sections(result)
    for section, (title, each) in zip(shown, _parts(result), strict=True):
        section["pictures"] = pictures(title, each, result["paper"] if each is result["together"] else {})
    return render("study_results", f"Human study {result['study']}", {}, remarks=remarks(result), sections=shown)
