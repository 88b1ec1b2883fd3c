"""This page shows what "hard" means on your data: a ranked file, with a slider for gamma.

Reads   a ranked file (`prompt`, `responses`, `rewards`, `sources`, `token_counts`, `truncated`)
Writes  `<name>.explorer.html` beside it
Run     python -m report.explore runs/quickstart/ranked/train.jsonl

The page shows a prompt's preferred response (y_1, here the highest reward), the dispreferred ones with their weights
q_i = exp(gamma r_i) / sum_k exp(gamma r_k) (Eq. 9), and a draw from them. The draw's uniform number is fixed until the
next draw, so moving gamma shows its effect alone. Settings of a recipe that change a prompt's list (`schedule.best`,
`subsample`, `ties`, `standardize_rewards`) are not applied. The number of prompts and bytes is bounded, and the page
says what is left out.
"""

import argparse
from pathlib import Path

from hps.errors import InputError, run_main
from pipeline.records import Lines, read_ranked
from report.page import fitting, render, write_page

FIELDS = ("prompt_id", "prompt", "responses", "rewards", "sources", "token_counts", "truncated")
MOST_BYTES = 4_000_000  # of a page's data


def explorer(path: Path, most: int, seed: int = 0) -> str:
    """The page of a ranked file. InputError: a line is invalid, or there is none."""
    records = fitting(({f: record[f] for f in FIELDS} for _, record in read_ranked(path)), most, MOST_BYTES)
    if not records:
        raise InputError("the file has no prompts", where=str(path), remedy="give a ranked file that is not empty")
    left = len(Lines(path)) - len(records)
    title = f"Ranked responses: {path.parent.parent.name}/{path.stem}"
    data = {"records": records, "seed": seed}
    return render("explore", title, data, path=str(path), count=len(records), left=left, full=len(records) < most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="a ranked file")
    parser.add_argument("--prompts", type=int, default=200, help="at most so many, from the first (default 200)")
    options = parser.parse_args()
    if options.prompts < 1:
        raise InputError(f"`--prompts` is {options.prompts}", where="command line", remedy="give 1 or more")
    path = Path(options.file)
    write_page(path.with_name(f"{path.stem}.explorer.html"), explorer(path, options.prompts))


if __name__ == "__main__":
    run_main(main)
