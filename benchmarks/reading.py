"""Reading of ranked files with every check, beside `json.loads` alone and beside another version of this code.

Run     .venv-train/bin/python benchmarks/reading.py [--against FOLDER] [--records N] [--times N] [--json FILE]

FOLDER is a checkout of the other version (`git worktree add FOLDER COMMIT`). Each reading is a process of its own, in
turns; what is compared are the processor's seconds, medians.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import finish, machine, options, show
from stages import text

from pipeline.recipe import REPOSITORY

RESPONSES = 100
PROGRAM = """
import json, sys, time
from pipeline.records import read_ranked
path, first, plain = sys.argv[1:]
list(read_ranked(first))  # what is made once
start = time.process_time()
for _ in map(json.loads, open(path)) if plain == "json.loads" else read_ranked(path):
    pass
print(time.process_time() - start)
"""


def ranked(number: int) -> str:
    """A line with 100 responses of about 110 characters."""
    record = {
        "prompt_id": str(number),
        "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "responses": [text(place) for place in range(RESPONSES)],
        "sources": ["generated"] * RESPONSES,
        "token_counts": [26] * RESPONSES,
        "truncated": [False] * RESPONSES,
        "rewards": sorted((random.gauss(0, 1) for _ in range(RESPONSES)), reverse=True),
    }
    return json.dumps(record) + "\n"


def seconds(name: str, folder: Path, *files: Path) -> float:
    command = [sys.executable, "-c", PROGRAM, *files, name]
    return float(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--against", type=Path, default=REPOSITORY, metavar="FOLDER")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=3, help="readings of each")
    arguments = parser.parse_args()
    folders = {"json.loads": REPOSITORY, "read_ranked": REPOSITORY, "the other version": arguments.against}
    found: dict[str, list[float]] = {name: [] for name in folders}
    with tempfile.TemporaryDirectory() as scratch:
        many, one = Path(scratch) / "many.jsonl", Path(scratch) / "one.jsonl"
        for path, count in ((many, arguments.records), (one, 1)):
            with path.open("w", encoding="utf-8") as file:
                file.writelines(map(ranked, range(count)))
        for _ in range(arguments.times):
            for name, folder in folders.items():
                found[name].append(seconds(name, folder, many, one))
    middle = {name: statistics.median(values) for name, values in found.items()}
    rows = [[name, value, value / middle["the other version"]] for name, value in middle.items()]
    title = f"Reading {arguments.records} ranked records of {RESPONSES} responses"
    show(title, ["", "s", "times the other version"], rows)
    finish(arguments, {"machine": machine(), "seconds": middle})


if __name__ == "__main__":
    main()
