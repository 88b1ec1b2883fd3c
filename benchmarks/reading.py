"""Reading of ranked files with every check, against Python's own `json.loads` and against another version of this code.

Run     .venv-train/bin/python benchmarks/reading.py [--against FOLDER] [--records 20000] [--json FILE]

FOLDER is a checkout of the other version (`git worktree add FOLDER COMMIT`). Each reading is a process of its own, in
turns; the seconds are those of the processor, medians.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import finish, machine, options, show

from pipeline.recipe import REPOSITORY

RESPONSES = 100
TIMED = """
import sys, time
{start}
start = time.process_time()
assert sum(1 for _ in {records}) == int(sys.argv[2])
print(time.process_time() - start)
"""
PLAIN = TIMED.format(start="import json", records="map(json.loads, open(sys.argv[1]))")
CHECKED = TIMED.format(
    start="from pipeline.records import read_ranked\nlist(read_ranked(sys.argv[3]))",  # what is made once
    records="read_ranked(sys.argv[1])",
)


def ranked(rng: random.Random, number: int) -> dict:
    """A record of 100 responses of about 110 characters."""
    words = ["it", "is", "safe", "to", "keep", "a", "plant", "near", "the", "open", "window"]
    return {
        "prompt_id": str(number),
        "prompt": [{"role": "user", "content": f"Question {number}?"}],
        "responses": [" ".join(rng.choices(words, k=25)) for _ in range(RESPONSES)],
        "sources": ["given_1", "given_2", *["generated"] * (RESPONSES - 2)],
        "token_counts": [26] * RESPONSES,
        "truncated": [False] * RESPONSES,
        "rewards": sorted((rng.gauss(0, 1) for _ in range(RESPONSES)), reverse=True),
    }


def seconds(program: str, folder: Path, *words: object) -> float:
    command = [sys.executable, "-c", program, *map(str, words)]
    return float(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="a checkout of another version")
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=3, help="readings of each")
    arguments = parser.parse_args()
    programs = {"json.loads": (PLAIN, REPOSITORY), "read_ranked": (CHECKED, REPOSITORY)}
    if arguments.against:
        programs["read_ranked, other version"] = (CHECKED, arguments.against.resolve())
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path, first = Path(folder) / "ranked.jsonl", Path(folder) / "first.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(ranked(rng, number)) + "\n" for number in range(arguments.records))
        first.write_text(json.dumps(ranked(rng, 0)) + "\n", encoding="utf-8")
        found = {
            name: statistics.median(
                seconds(program, where, path, arguments.records, first) for _ in range(arguments.times)
            )
            for name, (program, where) in programs.items()
        }
    title = f"Reading {arguments.records} ranked records of {RESPONSES} responses"
    ratio = {name: found["read_ranked"] / value for name, value in found.items()}
    show(title, ["", "s", "read_ranked takes so many times"], [[name, found[name], ratio[name]] for name in found])
    finish(arguments, {"machine": machine(), "seconds": found, "ratio": ratio})


if __name__ == "__main__":
    main()
