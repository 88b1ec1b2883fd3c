"""A page on which a ranked file can be looked at: what «hard» means, for a gamma moved by a slider.

Reads   a ranked file (`prompt`, `responses`, `rewards`, `sources`, `token_counts`, `truncated`)
Writes  an HTML file, beside the ranked file if not told otherwise
Run     python -m report.explore runs/quickstart/ranked/train.jsonl

Of each prompt the preferred response (y_1, the highest reward) and the dispreferred ones with their weights
q_i = exp(gamma r_i) / sum_k exp(gamma r_k) (Eq. 9), and a draw from them. A page holds a bounded number of prompts and
says how many it leaves out.
"""

import argparse
from itertools import islice
from pathlib import Path

from hps.errors import InputError, run_main
from hps.records import read_ranked
from report.page import render, write_page

FIELDS = ("prompt_id", "prompt", "responses", "rewards", "sources", "token_counts", "truncated")


def explorer(path: Path, most: int, seed: int) -> str:
    """The page of a ranked file. InputError: a line is invalid, or there is none."""
    lines = (record for _, record in read_ranked(path))
    records = [{field: record[field] for field in FIELDS} for record in islice(lines, most)]
    if not records:
        raise InputError("the file has no prompts", where=str(path), remedy="give a ranked file that is not empty")
    left = sum(1 for _ in lines)
    data = {"records": records, "seed": seed}
    title = f"Ranked responses: {path.parent.parent.name}/{path.stem}"
    return render("explore", title, data, path=str(path), count=len(records), left=left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="a ranked file")
    parser.add_argument("--prompts", type=int, default=200, help="at most so many, from the first (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--to", metavar="HTML", help="default: beside the file")
    options = parser.parse_args()
    path = Path(options.file)
    target = Path(options.to) if options.to else path.with_name(f"{path.stem}.explorer.html")
    write_page(target, explorer(path, options.prompts, options.seed))


if __name__ == "__main__":
    run_main(main)
