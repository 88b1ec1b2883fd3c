"""Measure how far the embedded data give the better response away by its length or by its words.

Reads   `data/quickstart/safety_{train,test}.jsonl`
Writes  nothing; prints a table, and ends with status 1 when a share passes the bound or the files break a rule
Run     .venv-train/bin/python -m tests.check_data

Length: the share of test pairs in which the longer response is the better one, and that of the better of the two rules
"longer" and "shorter". Words: logistic regression on the difference of the two responses' word counts, trained on the
training split; the setting with the highest accuracy on the test pairs counts. A pair that a rule cannot decide (equal
lengths, no known word) counts one half.
"""

import argparse
import json
import sys
from collections import Counter

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from hps.errors import run_main
from pipeline.recipe import REPOSITORY
from pipeline.records import canonical, read_prompts

FOLDER = REPOSITORY / "data" / "quickstart"
SPLITS = ("train", "test")
BOUND = 0.65
LINES = 60
NGRAMS = {"unigrams": (1, 1), "unigrams + bigrams": (1, 2)}
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # C of the logistic regression, fixed in advance
WORD = r"(?u)\b\w+\b"

Pairs = list[tuple[str, str]]  # better response, worse response


def load() -> dict[str, list[dict]]:
    """Records of the files, by split."""
    return {split: [record for _, record in read_prompts(FOLDER / f"safety_{split}.jsonl")] for split in SPLITS}


def pairs(records: list[dict]) -> Pairs:
    return [tuple(record["responses"]) for record in records]


def length_shares(test: Pairs, length) -> dict:
    """Pairs in which the better response is longer, equally long, shorter; the share of the better rule."""
    signs = Counter(int(np.sign(length(better) - length(worse))) for better, worse in test)
    longer = signs[1] + signs[0] / 2
    counts = {"longer": signs[1], "equal": signs[0], "shorter": signs[-1], "pairs": len(test)}
    return {**counts, "share_longer": longer / len(test), "share": max(longer, len(test) - longer) / len(test)}


def word_accuracy(train: Pairs, test: Pairs, ngrams: tuple[int, int], strength: float) -> tuple[int, int]:
    """`(right, undecided)` test pairs of a classifier on differences of word counts; each pair is seen both ways."""
    counter = CountVectorizer(ngram_range=ngrams, token_pattern=WORD)
    counter.fit([text for pair in train for text in pair])

    def differences(of: Pairs):
        return counter.transform([pair[0] for pair in of]) - counter.transform([pair[1] for pair in of])

    inputs = differences(train).toarray()
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=2000)
    model.fit(np.concatenate([inputs, -inputs]), [1] * len(inputs) + [0] * len(inputs))
    scores = model.decision_function(differences(test).toarray())
    return int((scores > 0).sum()), int((scores == 0).sum())


def measure(train: Pairs, test: Pairs) -> list[dict]:
    """A row for each rule: `rule`, `share` (what the bound is on), `counts` (text)."""
    rows = []
    for unit, length in (("characters", len), ("words", lambda text: len(text.split()))):
        found = length_shares(test, length)
        counts = "longer {longer}, equal {equal}, shorter {shorter} of {pairs}; longer is better: {share_longer:.1%}"
        rows.append({"rule": f"length in {unit}", "share": found["share"], "counts": counts.format(**found)})
    for name, ngrams in NGRAMS.items():
        results = {strength: word_accuracy(train, test, ngrams, strength) for strength in STRENGTHS}
        shares = {strength: (right + half / 2) / len(test) for strength, (right, half) in results.items()}
        best = max(STRENGTHS, key=lambda strength: shares[strength])
        counts = f"{results[best][0]} right, {results[best][1]} undecided of {len(test)}, C = {best:g}; by C: "
        counts += ", ".join(str(results[strength][0]) for strength in STRENGTHS)
        rows.append({"rule": name, "share": shares[best], "counts": counts})
    return rows


def domain(record: dict) -> str:
    return record["topic"].partition(":")[0].strip().casefold()


def structure_problems(files: dict[str, list[dict]]) -> list[str]:
    """Broken rules of the files, by split, as text; empty when all hold."""
    problems = []
    for split, records in files.items():
        place = f"safety_{split}"
        if len(records) != LINES:
            problems.append(f"{place}: {len(records)} lines, not {LINES}")
        for number, record in enumerate(records, 1):
            problems += [f"{place}:{number}: {problem}" for problem in record_problems(record)]
    prompts = Counter(canonical(record["prompt"]) for records in files.values() for record in records)
    problems += [f"prompt stands {count} times: {text[:80]}" for text, count in prompts.items() if count > 1]
    train, test = ({domain(record) for record in files[split]} for split in SPLITS)
    problems += [f"domain in both splits: {shared}" for shared in sorted(train & test)]
    return problems


def record_problems(record: dict) -> list[str]:
    """What is wrong with one record: responses, order of roles, topic."""
    problems = []
    responses = record["responses"]
    if len(responses) != 2 or responses[0].strip() == responses[-1].strip() or not all(map(str.strip, responses)):
        problems.append(f"not two different responses: {json.dumps(responses)[:80]}")
    roles = [message["role"] for message in record["prompt"]]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        problems.append(f"roles do not alternate: {roles}")
    if not domain(record):
        problems.append("no domain in front of the colon of `topic`")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    files = load()
    problems = structure_problems(files)
    print(f"{'rule':22} {'share':>7}  counts")
    for row in measure(*(pairs(files[split]) for split in SPLITS)):
        print(f"{row['rule']:22} {row['share']:7.1%}  {row['counts']}")
        if row["share"] > BOUND:
            problems.append(f"{row['rule']}: {row['share']:.1%} is more than {BOUND:.0%}")
    for problem in problems:
        print(f"problem: {problem}")
    print(f"bound {BOUND:.0%}: {'broken' if problems else 'kept'}; {len(problems)} problems")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run_main(main)
