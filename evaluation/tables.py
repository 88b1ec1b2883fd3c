"""The tables of the paper: the evaluations that each needs, its rows, and the comparisons of rows.

evaluation.cells computes a row's figures, evaluation.frontiers compares rows, evaluation.render formats a table, and
evaluation.reproduce writes the files.
"""

from pathlib import Path
from typing import Any

from evaluation.cells import FINAL, SFT, Cell, against, cell_figures, same_prompts, spread, without_changes
from evaluation.frontiers import along, at_one_kl, compare, displaced, win_rates
from evaluation.matrix import load_matrix, method_name, select
from evaluation.paper import length_term_flags, paper_rows, paper_wins, percentage_flags
from evaluation.results import Evaluated
from pipeline.recipe import REPOSITORY, Recipe, load_recipe

TITLES = {
    "2": "Table 2: fine-tuning, fifteen methods",
    "4": "Table 4: win rate of DPO-HPS",
    "5": "Table 5: transfer to the data set that was not trained on",
    "6": "Table 6: responses of a prompt",
    "7": "Table 7: responses of a prompt, transfer",
    "8": "Table 8: beta",
    "ablation": "Ablation: the factor N and gamma (not in the paper)",
    "gamma": "Ablation: gamma and its schedule (not in the paper)",
    "negatives": "Ablation: the rule of the negative (not in the paper)",
    "noise": "Ablation: noise of the rewards that rank, and gamma (not in the paper)",
    "factor_n": "Ablation: the factor N of Eq. 8 (not in the paper)",
    "list_size": "Ablation: responses of a list, at equal compute (not in the paper)",
    "methods": "Methods that the paper does not have",
    "proxy": "Ablation: ranked by a learned reward model (not in the paper)",
    "rounds": "Rounds against one round of as many samples and steps (not in the paper)",
}
JUDGED = "4"
TRANSFER = ("5", "7")
# Columns of a table; those of the paper's tables come first at its scale.
PAPERS = ("kl", "bleu", "reward", "rm_dpo", "rm_r_dpo")
OWN = (
    *("reward_mean", "change", "change_at_kl", "kl_sampled", "win_rate", "tokens", "repetition", "distinct_1"),
    *("distinct_2", "proxy_change"),
)
SETS = {"hh_rlhf": "HH-RLHF", "pku_safe": "PKU-SafeRLHF"}
SMALL = {
    "reviews": "reviews, one turn (in the place of PKU-SafeRLHF)",
    "chats": "chats, several turns (in the place of HH-RLHF)",
}
IN_PLACE_OF = {"reviews": "pku_safe", "chats": "hh_rlhf"}
SAME_QUANTITY = ("rm_dpo", "rm_r_dpo", "kl")  # at another scale than the paper's; its rewards and texts are others
# Values of a trait that others are compared with: the baselines, and the paper's choice. Without one, the first row's.
AGAINST = (
    *("BT", "DPO-BT", "the worst (BT)", "DPO-HPS", "PL", "gamma -5 to 5", "Eq. 9 (gamma -5 to 5)"),
    "round 1, K = 24",  # as many samples and steps as three rounds
)
RULES = {
    "worst": "the worst",
    "uniform": "uniform",
    "hardest": "the hardest",
    "below_mean": "{:g} deviations below the mean",
}
PAPERS_DATA = {"6": "hh_rlhf", "7": "pku_safe", "8": "hh_rlhf"}  # where the paper shows one data set alone
SAME_N = {
    "6": "The paper's rows are those of HH-RLHF where it has the same n.",
    "7": "The paper's rows are those where it has the same n.",
    "8": "The paper's rows are those of HH-RLHF.",
}
Results = list[tuple[Evaluated, dict | None]]  # None: not run yet


def stem(table: str) -> str:
    """The name of a table's files and of its argument on the command line."""
    return f"table{table}" if table.isdigit() else table


def needed(table: str, scale: str) -> list[Evaluated]:
    """The evaluations that a table shows: of the model before training and of the runs."""
    matrix = load_matrix(scale)
    found: list[Evaluated] = []
    for run in select(scale, int(table) if table.isdigit() else table):
        on, overrides = run.data, run.overrides
        if table in TRANSFER:
            (on,) = (name for name in matrix["recipes"] if name != run.data)
            overrides = [*overrides, f"evaluation.on={matrix['recipes'][on]}"]
        recipe = load_recipe(REPOSITORY / run.path, overrides)
        if not any(evaluation.sft and evaluation.on == on for evaluation in found):
            found.append(Evaluated(recipe, on, on, sft=True))
        found.append(Evaluated(recipe, run.data, on, arguments=[run.path, *run.overrides]))
    return found


def traits(table: str, recipe: Recipe) -> tuple[str, ...]:
    """What a run's row differs in from others; runs that differ only in the seed share it."""
    loss, method = recipe.loss, method_name(recipe)
    start, end = recipe.schedule.gamma_start, recipe.schedule.gamma_end
    gamma = f"gamma {start:g}" if start == end else f"gamma {start:g} to {end:g}"
    size = f"n = {recipe.schedule.subsample or 'all'}"
    ranked = Path(recipe.models.reward.path or str(recipe.models.reward.function)).name
    rows = {
        "6": (method, size),
        "7": (method, size),
        "8": (method, f"beta = {loss.beta:g}"),
        "gamma": (gamma if loss.preference == "hps" else method,),
        "negatives": (rule(recipe, gamma),),
        "noise": (f"noise {recipe.annotation.noise:g}", gamma if loss.preference == "hps" else method),
        "list_size": (f"{method}, list of {loss.list_size or 'all'}" if loss.takes_lists else method,),
        "methods": (", ".join(options(recipe)),),
        "proxy": (method, f"ranked by {ranked}"),
        "rounds": (method, f"round {recipe.round}, K = {recipe.data.train.responses}"),
        **dict.fromkeys(("factor_n", "ablation"), (f"N {'on' if loss.factor_n else 'off'}", gamma)),
    }
    return rows.get(table, (loss.family.upper(), loss.preference.upper()))


def options(recipe: Recipe) -> list[str]:
    """A run's method and the options of its loss, by the names that people know."""
    loss = recipe.loss
    found = {
        "S-DPO" if loss.is_sdpo else method_name(recipe): True,
        f"{'rDPO' if loss.smoothing == 'rdpo' else 'cDPO'} {loss.label_smoothing:g}": loss.label_smoothing,
        f"NLL {loss.nll:g}": loss.nll,
        f"per token, beta {loss.beta:g}": loss.dpo_per_token,
    }
    return [name for name, given in found.items() if given]


def rule(recipe: Recipe, gamma: str) -> str:
    """The rule of the negative. BT and gamma 0 stand for those with the same plan (configs/matrix.yaml)."""
    if recipe.loss.preference == "bt":
        return "the worst (BT)"
    if recipe.loss.negatives != "softmax":
        return RULES[recipe.loss.negatives].format(recipe.loss.negative_deviations)
    return "uniform (gamma 0)" if gamma == "gamma 0" else f"Eq. 9 ({gamma})"


def label(table: str, recipe: Recipe) -> str:
    """The label of a run's row: its traits, or its method if those are family and preference model."""
    found, method = traits(table, recipe), method_name(recipe)
    return method if "-".join(found) == method else ", ".join(found)


def cells_of(table: str, results: Results, on: str) -> list[Cell]:
    """The rows of one data set in the order of the matrix, the model before training first.

    Without a result of that model runs have no changes, because each has them against a sample of its own folder.
    """
    before = next((result for evaluation, result in results if result and evaluation.sft and evaluation.on == on), None)
    grouped: dict[str, Cell] = {}
    for evaluation, result in from_first_round(results):
        if result is not None and evaluation.on == on:
            if not evaluation.sft:
                result = against(result, before) if before else without_changes(result)
            name = SFT if evaluation.sft else label(table, evaluation.recipe)
            differs = () if evaluation.sft else traits(table, evaluation.recipe)
            grouped.setdefault(name, Cell(name, [], traits=differs)).results.append(result)
    return list(grouped.values())


def from_first_round(results: Results) -> Results:
    """The results, with the ends of the rounds before as the first points of a later round's curves.

    A later round starts where the one before ended, and KL and rewards are from the first policy in every round. Pairs
    have such points where they are the same in every round: no responses to the test prompts are sampled.
    """
    found = {each.recipe.evaluated_folder(): result for each, result in results if result and not each.sft}

    def continued(evaluation: Evaluated, result: dict) -> dict:
        before = None if evaluation.sft else evaluation.recipe.before()
        while before and (earlier := found.get(before.evaluated_folder())):
            name = f"round {before.round}"
            answers = {name: earlier["answers"][FINAL], **result["answers"]}
            pairs = result["pairs"]
            if before.data.test.responses == 0:
                pairs = {
                    kind: {**own, "points": {name: earlier["pairs"][kind]["points"][FINAL], **own["points"]}}
                    for kind, own in pairs.items()
                }
            result, before = {**result, "answers": answers, "pairs": pairs}, before.before()
        return result

    return [(evaluation, result and continued(evaluation, result)) for evaluation, result in results]


def papers_row(cell: Cell, scale: str, rows: dict[str, dict]) -> dict:
    """The paper's figures that stand beside a row; its own scale has all, another the quantities that are the same."""
    if scale != "paper":
        return {name: rows.get(cell.label, {}).get(name) for name in SAME_QUANTITY}
    return rows.get(cell.label.replace("n = all", "n = 100"), {})  # the paper samples 100


def _method_and_size(cell: Cell) -> tuple[bool, str, float]:
    """The model before training, then a method's rows in the order of n."""
    name, _, size = cell.label.partition(", n = ")
    return name != SFT, name, float((size or "0").replace("all", "inf"))


def pairs_of(cells: list[Cell]) -> list[tuple[Cell, Cell]]:
    """Rows that differ in one trait, the second with a value of `AGAINST` or else the first row's."""
    found: dict[frozenset, tuple[Cell, Cell]] = {}
    for place in range(max((len(cell.traits) for cell in cells), default=0)):
        rows: dict[tuple, list[Cell]] = {}
        for cell in cells:
            rows.setdefault((*cell.traits[:place], None, *cell.traits[place + 1 :]), []).append(cell)
        for alike in rows.values():
            known = [cell for value in AGAINST for cell in alike if cell.traits[place] == value]
            for other in known or alike[:1]:
                for one in alike:
                    if one is not other:
                        found.setdefault(frozenset((one.label, other.label)), (one, other))
    order = [cell.label for cell in cells]
    return sorted(found.values(), key=lambda pair: order.index(pair[0].label))


def part(table: str, scale: str, results: Results, on: str) -> tuple[dict, list[str], dict[str, str]]:
    """One data set's rows with their comparisons, the flags on the paper's rows, and the rows left out."""
    cells, odd = same_prompts(cells_of(table, results, on))
    data = PAPERS_DATA.get(table, IN_PLACE_OF.get(on, on))
    paper = paper_rows(table, data)
    flags = length_term_flags(paper, f"Table {table}, {SETS[data]}") if data in SETS else []
    found = win_part(cells) if table == JUDGED else compared_part(table, scale, cells, paper)
    return {"data": on, "title": (SETS | SMALL).get(on, on), **found}, flags, odd


def win_part(cells: list[Cell]) -> dict:
    """Of Table 4 the win rates by the reward."""
    return {"columns": ["win_rate", "won", "lost", "tied"], "rows": win_rates(won_by(cells)), "compared": []}


def compared_part(table: str, scale: str, cells: list[Cell], paper: dict[str, dict]) -> dict:
    """The rows of a data set, and their comparisons. `paper`: the paper's rows."""
    if table in ("6", "7"):
        cells.sort(key=_method_and_size)
    sft = next((cell.results[0] for cell in cells if cell.label == SFT), None)
    trained = [cell for cell in cells if cell.label != SFT]
    common, points = at_one_kl(trained, sft), along(trained, sft)
    rows = []
    for cell in cells:
        cell.paper = papers_row(cell, scale, paper)
        figures = cell_figures(cell, trained)
        if common is not None and cell.label in common[1]:
            figures["change_at_kl"] = common[1][cell.label]
        rows.append(
            {
                "label": cell.label,
                "traits": list(cell.traits),
                "figures": figures,
                "spread": spread(cell),
                "along": points.get(cell.label, []),
                "displaced": displaced(cell),
            }
        )
    return {
        "columns": [*(PAPERS if scale == "paper" else ()), *OWN],
        "rows": rows,
        "kl": common and common[0],
        "compared": compare(pairs_of(trained), sft),
    }


def won_by(cells: list[Cell]) -> list[tuple[Cell, Cell]]:
    """Each method and each that stands before it, the model before training first and HPS last."""
    ordered = sorted(cells, key=lambda cell: (cell.label != SFT, cell.traits[1:] == ("HPS",)))
    return [(one, other) for place, one in reversed(list(enumerate(ordered))) for other in ordered[:place]]


def judged_part(data: str, judged: dict) -> dict:
    """Win, lose and tie of DPO-HPS against each model, ours and the paper's, in percent of the prompts."""
    rows = []
    for name, result in judged["against"].items():
        figures = {}
        for outcome, printed in paper_wins(data)[name].items():
            ours = {"mean": result[outcome]["percent"], "interval": result[outcome]["interval"]}
            figures[outcome] = {**ours, "paper": printed, "difference": round(ours["mean"] - printed, 3)}
        rows.append({"label": f"against {name}", "figures": figures, "flags": result["flags"]})
    return {"data": data, "title": SETS[data], "columns": ["win", "lose", "tie"], "rows": rows, "compared": []}


def remarks(table: str, scale: str, comparisons: int) -> list[str]:
    """What a reader must know before the figures."""
    many = (
        f"Each of the {comparisons} comparisons is made at 5 % by itself: without any true difference about "
        f"{comparisons / 20:.2g} of them would be decided, of each figure. "
    )
    lines = [
        f"Written by `bash reproduce.sh {stem(table)} --scale {scale}`. Mean [95 % interval]. The intervals contain "
        "prompts, the draw of the answers, and seeds. ‡: one seed, so without seeds. §: few seeds, whose spread is "
        "that of all methods of the table. †: at a KL below the first point that was measured, on the straight line "
        "from 0 to it. Reward: the evaluator's, mean of the answers to a prompt. Change: against the model before "
        "training. KL: nats, on the policy's own answers. Win rate: share of pairs, of two policies' answers to a "
        "prompt, that the first wins by the reward.",
        "",
        "`decided`: the interval excludes no difference. `detectable`: the smallest true difference that would have "
        f"been decided in 80 % of repetitions. {many if comparisons > 1 else ''}docs/results.md says how methods are "
        "compared, and why at equal KL.",
    ]
    if scale != "paper" and table in ("2", "5", *SAME_N):
        lines += [
            "",
            "**Another scale than the paper's:** another model, other data. The paper's margins and KL stand beside "
            "ours to compare signs and orders of methods, not values; its rewards and BLEU measure something else. "
            + SAME_N.get(table, ""),
        ]
    return lines


def assemble(
    table: str, scale: str, results: Results, failed: dict[str, str], judged: dict[str, dict] | None = None
) -> dict:
    """The content of a table's JSON file.

    Args:
        failed: evaluations that failed, and why.
        judged: of Table 4, the win rates by data set.

    Returns:
        `title`, `scale`, `remarks`; `parts`, one a data set, with `title`, `columns`, `rows` of `label` and `figures`;
        `flags` on the paper's figures; `failed`: what is not in the table, and why. Parts have `compared`
        (evaluation.frontiers.compare) and, but for Table 4, `kl` (that all methods reached) and in their rows `spread`
        and `along`.
    """
    missing = {evaluation.title: "not run yet" for evaluation, result in results if result is None}
    found: dict[str, Any] = {"title": TITLES[table], "scale": scale, "remarks": [], "parts": [], "flags": []}
    found["failed"] = missing | failed
    if judged is not None:
        written = f"Written by `bash reproduce.sh {stem(table)} --scale {scale}`"
        found["remarks"] = [f"{written}. Percent of the prompts [95 % interval, bootstrap over prompts]."]
        found["parts"] = [judged_part(data, judged[data]) for data in judged]
        for data, title in SETS.items():
            found["flags"] += percentage_flags(paper_wins(data), f"Table 4, {title}")
        return found
    for on in dict.fromkeys(evaluation.on for evaluation, result in results if result is not None):
        each, flags, odd = part(table, scale, results, on)
        found["parts"].append(each)
        found["flags"] += flags
        found["failed"] |= {f"{on}: {name}": why for name, why in odd.items()}
    comparisons = sum(len(each["rows" if table == JUDGED else "compared"]) for each in found["parts"])
    found["remarks"] = remarks(table, scale, comparisons)
    return found
