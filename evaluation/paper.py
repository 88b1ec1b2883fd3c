"""The figures of the paper's tables, and where they contradict each other.

Reads   `results/paper.json` (every figure of the paper's tables)
"""

import json
from collections import Counter

from pipeline.recipe import REPOSITORY

PAPER = REPOSITORY / "results" / "paper.json"
EQUAL = 0.0015  # rounding error of a difference of two figures with three decimals
METHODS = {"2": "table2_fine_tuning", "5": "table5_transfer"}
# Tables that vary one setting: key in the file, the setting's name in a label and in the file.
VARIED = {
    "6": ("table6_responses_fine_tuning_hh_rlhf", "n", "responses"),
    "7": ("table7_responses_transfer_hh_to_pku", "n", "responses"),
    "8": ("table8_beta_fine_tuning_hh_rlhf", "beta", "beta"),
}


def load_paper(table: str):
    return json.loads(PAPER.read_text(encoding="utf-8"))[table]


def paper_rows(number: str, data: str) -> dict[str, dict]:
    """The rows of a table of the paper for one data set, by label; none for the ablation."""
    if number in METHODS:
        return {method: values[data] for method, values in load_paper(METHODS[number]).items()}
    if number not in VARIED:
        return {}
    table, name, field = VARIED[number]
    methods = ("DPO-BT", "DPO-HPS")
    return {f"{method}, {name} = {row[field]:g}": row[method] for row in load_paper(table) for method in methods}


def paper_wins(data: str) -> dict[str, dict]:
    """Table 4: win, lose and tie of DPO-HPS (percent) against each model."""
    return load_paper("table4_win_rate_percent_of_DPO-HPS_against")[data]


def paper_marks() -> dict[str, float]:
    """Table 3: the mean of the human raters' four criteria by model."""
    return load_paper("table3_human_quality")


def length_term_flags(rows: dict[str, dict], title: str) -> list[str]:
    """Rows whose RM_R-DPO - RM_DPO is not the table's common one.

    It is -0.01 times the mean difference of the test pairs' lengths, so it is the same for every method.
    """
    gaps = {
        label: round(row["rm_r_dpo"] - row["rm_dpo"], 3)
        for label, row in rows.items()
        if row.get("rm_dpo") is not None and row.get("rm_r_dpo") is not None
    }
    if not gaps:
        return []
    common = Counter(gaps.values()).most_common(1)[0][0]
    odd = {label: gap for label, gap in gaps.items() if abs(gap - common) > EQUAL}
    count = len(gaps) - len(odd)
    if count < 3:
        return [
            f"{title}: RM_R-DPO - RM_DPO, which depends on the test pairs' lengths alone, has no common value in the "
            f"paper ({min(gaps.values()):.3f} to {max(gaps.values()):.3f} over {len(gaps)} rows)"
        ]
    return [
        f"{title}: {label}: RM_R-DPO - RM_DPO is {gap:.3f} in the paper, {common:.3f}, to a rounding, in {count} of "
        f"{len(gaps)} rows; it depends on the test pairs' lengths alone"
        for label, gap in odd.items()
    ]


def percentage_flags(rows: dict[str, dict], title: str) -> list[str]:
    """Win, lose and tie that do not add up to 100 %."""
    sums = {label: sum(row[name] for name in ("win", "lose", "tie")) for label, row in rows.items()}
    return [
        f"{title}: {label}: the paper's percentages add up to {total:.3f}"
        for label, total in sums.items()
        if abs(total - 100) > EQUAL
    ]
