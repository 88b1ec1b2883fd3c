"""Write the two testbed sets: prompts whose answers have a reward that is known exactly (VADER's sentiment).

`reviews` are single turns, `chats` have several. Templates and a list of things make the prompts. A thing belongs to
one split and (except for one of `reward`) has no word that VADER scores: no prompt asks for praise or blame. Test
prompts have two of four answers sampled from SmolLM2-135M-Instruct: the one with the highest sentiment, then the one
with the lowest.

Reads   `data/testbed/words.yaml`: things and templates; `samples.jsonl.gz`: the model's answers to the reward and the
        test prompts and to the first training prompts
Writes  `data/testbed/{reviews,chats}_{train,test,reward,lists}.jsonl` (prompts; `topic` is the thing; test:
        `responses`, `truncated` in parallel, `difference` of their sentiments; lists: the first training prompts with
        all their answers, `responses` and `truncated`)
Run     .venv-train/bin/python data/testbed.py           # the same files, byte for byte; no model is needed

Only new samples need the model, by the ordinary generation stage:

    .venv-train/bin/python data/testbed.py prompts    # into runs/testbed
    .venv-infer/bin/python -m generation.generate data/testbed/recipe.yaml
    .venv-train/bin/python data/testbed.py pack       # its candidates become samples.jsonl.gz
"""

import argparse
import gzip
import json
import random
from functools import cache
from itertools import chain, cycle, product
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev

import yaml

from annotation.train_reward import truth
from hps.errors import InputError, run_main
from pipeline.files import json_line, write_atomic, write_lines
from pipeline.recipe import REPOSITORY
from pipeline.records import prompt_id, read_candidates, read_jsonl

SEED = 19
LISTS = 96  # training prompts of each set that have answers
SETS = ("reviews", "chats")
FOLDER = Path(__file__).resolve().parent / "testbed"
SAMPLES = "samples.jsonl.gz"
STAGE = REPOSITORY / "runs" / "testbed"  # `output` of its recipe.yaml
SPLITS = {"train": 11, "test": 7, "reward": 7}  # things of each kind
PROMPTS = {"train": 440, "test": 310, "reward": 140}  # of each set; of the test prompts the first TEST are kept ...
TEST = 300
LEAST = 0.05  # ... whose two answers differ by as much in sentiment


@cache
def words() -> dict:
    """`things` by kind, and the templates of every turn."""
    return yaml.safe_load((FOLDER / "words.yaml").read_text(encoding="utf-8"))


def splits() -> dict[str, list[str]]:
    """The things of each split, the same number of every kind."""
    rng, found = random.Random(SEED), {split: [] for split in SPLITS}
    for kind in words()["things"].values():
        things = list(kind)
        rng.shuffle(things)
        for split, count in SPLITS.items():
            found[split] += things[:count]
            things = things[count:]
    return found


def prompts(name: str, split: str) -> list[dict]:
    """The prompts of a set and split; no two prompts of a thing have the same template for their last message."""
    rng, things = random.Random(f"{SEED} {name} {split}"), splits()[split]
    templates = words()["reviews" if name == "reviews" else "questions"]
    grid = [(thing, last) for thing in things for last in rng.sample(templates, -(-PROMPTS[split] // len(things)))]
    rng.shuffle(grid)
    return [{"topic": thing, "prompt": _messages(name, thing, last, rng)} for thing, last in grid[: PROMPTS[split]]]


def _messages(name: str, thing: str, last: str, rng: random.Random) -> list[dict]:
    turns = [last]
    if name == "chats":
        middle = rng.choice(words()["middles"]) if rng.random() < 0.5 else ()
        turns = [rng.choice(words()["openings"]), *middle, rng.choice(words()["replies"]), last]
    roles = cycle(("user", "assistant"))
    return [{"role": role, "content": text.format(thing=thing)} for role, text in zip(roles, turns, strict=False)]


def sampled(records: list[dict], samples: dict[str, dict]) -> list[dict]:
    """The first `TEST` of the test prompts whose best and worst answer differ by `LEAST`, with these two answers."""
    found = []
    for record in records:
        sample = samples[prompt_id(record["prompt"])]
        rows = sorted(zip(truth(sample["responses"]), sample["responses"], sample["truncated"], strict=True))
        (low, worse, worse_cut), (high, better, better_cut) = rows[0], rows[-1]
        if round(high - low, 4) >= LEAST:
            pair = {"responses": [better, worse], "truncated": [better_cut, worse_cut]}
            found.append({**record, **pair, "difference": round(high - low, 4)})
    if len(found) < TEST:
        problem = f"{len(found)} of {len(records)} test prompts have answers that differ by {LEAST}, {TEST} are needed"
        remedy = "raise PROMPTS['test'] in data/testbed.py and sample again"
        raise InputError(problem, where=str(FOLDER / SAMPLES), remedy=remedy)
    return found[:TEST]


def lists(records: list[dict], samples: dict[str, dict]) -> list[dict]:
    """The first `LISTS` training prompts, each with all its answers, the one with the highest sentiment first."""
    found = []
    for record in records[:LISTS]:
        sample = samples[prompt_id(record["prompt"])]
        rows = zip(truth(sample["responses"]), sample["responses"], sample["truncated"], strict=True)
        _, texts, cuts = zip(*sorted(rows, key=lambda row: -row[0]), strict=True)
        found.append({**record, "responses": list(texts), "truncated": list(cuts)})
    return found


def read_samples(folder: Path = FOLDER) -> dict[str, dict]:
    """The model's answers by `prompt_id`: `responses` and `truncated`."""
    return {record["prompt_id"]: record for _, record in read_jsonl(folder / SAMPLES)}


def files(samples: dict[str, dict]) -> dict[str, str]:
    """Name and text of the eight files, from the templates and the samples."""
    made = {}
    for name, split in product(SETS, SPLITS):
        records = prompts(name, split)
        chosen = sampled(records, samples) if split == "test" else records
        made[f"{name}_{split}.jsonl"] = "".join(map(json_line, chosen))
        if split == "train":
            made[f"{name}_lists.jsonl"] = "".join(map(json_line, lists(records, samples)))
    return made


def pack(folder: Path) -> None:
    """Keep the fields of the stage's candidates that are used here."""
    fields = ("prompt_id", "responses", "truncated")
    kept = []
    for split in ("train", "test"):
        found = (record for _, record in read_candidates(folder / "candidates" / f"{split}.jsonl"))
        kept += [{field: record[field] for field in fields} for record in sorted(found, key=itemgetter("prompt_id"))]
    (FOLDER / SAMPLES).write_bytes(gzip.compress("".join(map(json_line, kept)).encode(), mtime=0))


def measure(name: str, split: str, samples: dict[str, dict]) -> dict:
    """For the answers to the prompts of a set and split: how many there are, and their true rewards."""
    records = prompts(name, split)[: LISTS if split == "train" else None]
    found = [samples[prompt_id(record["prompt"])] for record in records]
    rewards = [truth(each["responses"]) for each in found]
    flat = [reward for each in rewards for reward in each]
    return {
        "prompts": len(found),
        "answers": len(flat),
        "mean": round(mean(flat), 3),
        "sd within a prompt": round(mean(stdev(each) for each in rewards), 3),
        "below 0": round(mean(reward < 0 for reward in flat), 3),
        "exactly 0": round(mean(reward == 0 for reward in flat), 3),
        "cut": round(mean(cut for each in found for cut in each["truncated"]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["files", "prompts", "pack"], default="files")
    what = parser.parse_args().what
    if what == "prompts":
        for file, splits in {"many": {"reward": None, "train": LISTS}, "few": {"test": None}}.items():
            parts = (prompts(name, split)[:count] for split, count in splits.items() for name in SETS)
            write_lines(STAGE / f"{file}.jsonl", map(json_line, chain.from_iterable(parts)))
        return
    if what == "pack":
        pack(STAGE)
    samples = read_samples()
    for name, text in files(samples).items():
        write_atomic(FOLDER / name, text)
        print(f"testbed: {name}: {len(text.splitlines())} prompts")
    for name, split in product(SETS, SPLITS):
        print(f"testbed: answers, {name}, {split}: {json.dumps(measure(name, split, samples))}")


if __name__ == "__main__":
    run_main(main)
