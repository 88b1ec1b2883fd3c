"""The embedded data: structure, and neither length nor words may tell the better response (data/check.py)."""

import copy
import importlib.util

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.train  # scikit-learn is in the training environment


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("data_check", REPOSITORY / "data" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(check):
    return {(name, split): check.load(f"{name}_{split}") for name in check.SETS for split in ("train", "test")}


def test_the_files_keep_their_rules(check, files):
    assert check.structure_problems(files) == []


@pytest.mark.parametrize("names", [("dialogue",), ("safety",), ("dialogue", "safety")], ids="+".join)
def test_neither_length_nor_words_tell_the_better_response(check, files, names):
    assert check.BOUND == 0.65
    train, test = ([pair for name in names for pair in check.pairs(files[name, split])] for split in ("train", "test"))
    rows = check.measure(train, test)
    assert [row["rule"] for row in rows] == [
        "length in characters",
        "length in words",
        "unigrams",
        "unigrams + bigrams",
    ]
    assert all(row["share"] <= check.BOUND for row in rows), rows


def test_length_shares_by_hand(check):
    pairs = [("aaa", "a"), ("bbb", "b"), ("c", "ccc"), ("d", "d")]  # longer twice, shorter once, equal once
    found = check.length_shares(pairs, len)
    assert (found["longer"], found["equal"], found["shorter"]) == (2, 1, 1)
    assert found["share_longer"] == found["share"] == 2.5 / 4
    reverse = check.length_shares([(worse, better) for better, worse in pairs], len)
    assert (reverse["share_longer"], reverse["share"]) == (1.5 / 4, 2.5 / 4)


def test_words_that_give_the_answer_away_are_found(check):
    train = [(f"good word{number}", f"bad word{number}") for number in range(6)]
    test = [("a good one", "a bad one"), ("good", "bad"), ("bad", "good"), ("new", "other")]
    assert check.word_accuracy(train, test, (1, 1), 1.0) == (2, 1)  # two right, one wrong, one without known words
    shares = {row["rule"]: row["share"] for row in check.measure(train, test)}
    assert shares["unigrams"] == 2.5 / 4


def test_broken_rules_are_named(check, files):
    broken = copy.deepcopy(files)
    test = broken["safety", "test"]
    test[0]["topic"] = broken["dialogue", "train"][0]["topic"].upper()
    test[1]["prompt"] = broken["safety", "train"][0]["prompt"]
    test[2]["prompt"] = test[2]["prompt"] * 2
    test[3]["responses"] = ["one"]
    test.pop()
    problems = "\n".join(check.structure_problems(broken))
    for part in ("safety_test: 59 lines", "domain in both", "prompt stands 2", ":3: roles", ":4: not two different"):
        assert part in problems
    assert len(problems.splitlines()) == 5
