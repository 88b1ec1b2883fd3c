"""The embedded data: structure, and neither length nor words may tell the better response (tests/check_data.py).

The testbed (data/testbed.py): its files are what its program writes, with splits apart and responses in true order.
"""

import copy
import importlib.util

import check_data as check
import pytest
from conftest import REPOSITORY

from annotation.train_reward import truth
from hps.errors import InputError
from pipeline.records import prompt_id, read_prompts, unread_fields

pytestmark = pytest.mark.train  # scikit-learn is in the training environment


def load(name):
    spec = importlib.util.spec_from_file_location(f"data_{name}", REPOSITORY / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files():
    return check.load()


def test_the_files_keep_their_rules(files):
    assert check.structure_problems(files) == []


def test_neither_length_nor_words_tell_the_better_response(files):
    assert check.BOUND == 0.65
    rows = check.measure(*(check.pairs(files[split]) for split in check.SPLITS))
    assert [row["rule"] for row in rows] == [
        "length in characters",
        "length in words",
        "unigrams",
        "unigrams + bigrams",
    ]
    assert all(row["share"] <= check.BOUND for row in rows), rows


def test_length_shares_by_hand():
    pairs = [("aaa", "a"), ("bbb", "b"), ("c", "ccc"), ("d", "d")]  # longer twice, shorter once, equal once
    found = check.length_shares(pairs, len)
    assert (found["longer"], found["equal"], found["shorter"]) == (2, 1, 1)
    assert found["share_longer"] == found["share"] == 2.5 / 4
    reverse = check.length_shares([(worse, better) for better, worse in pairs], len)
    assert (reverse["share_longer"], reverse["share"]) == (1.5 / 4, 2.5 / 4)


def test_words_that_give_the_answer_away_are_found():
    train = [(f"good word{number}", f"bad word{number}") for number in range(6)]
    test = [("a good one", "a bad one"), ("good", "bad"), ("bad", "good"), ("new", "other")]
    assert check.word_accuracy(train, test, (1, 1), 1.0) == (2, 1)  # two right, one wrong, one without known words
    shares = {row["rule"]: row["share"] for row in check.measure(train, test)}
    assert shares["unigrams"] == 2.5 / 4


def test_broken_rules_are_named(files):
    broken = copy.deepcopy(files)
    test = broken["test"]
    test[0]["topic"] = broken["train"][0]["topic"].upper()
    test[1]["prompt"] = broken["train"][0]["prompt"]
    test[2]["prompt"] = test[2]["prompt"] * 2
    test[3]["responses"] = ["one"]
    test.pop()
    problems = "\n".join(check.structure_problems(broken))
    for part in ("safety_test: 59 lines", "domain in both", "prompt stands 2", ":3: roles", ":4: not two different"):
        assert part in problems
    assert len(problems.splitlines()) == 5


# ---- the testbed ----


@pytest.fixture(scope="module")
def testbed():
    return load("testbed")


@pytest.fixture(scope="module")
def sets(testbed):
    """Records of the committed files, by set and split."""
    names = [(name, split) for name in testbed.SETS for split in testbed.SPLITS]
    return {key: [record for _, record in read_prompts(testbed.FOLDER / f"{'_'.join(key)}.jsonl")] for key in names}


def test_the_testbed_is_what_its_program_writes(testbed):
    made = testbed.files(testbed.read_samples())
    assert sorted(made) == sorted(path.name for path in testbed.FOLDER.glob("*.jsonl"))
    for name, text in made.items():
        assert text == (testbed.FOLDER / name).read_text(), name


def test_testbed_splits_share_no_thing_and_no_prompt(testbed, sets):
    for field in ("topic", "prompt_id"):
        found = {split: set() for split in testbed.SPLITS}
        for (_, split), records in sets.items():
            found[split] |= {record[field] for record in records}
        assert not set.intersection(*found.values())
        assert sum(map(len, found.values())) == len(set.union(*found.values()))
    for (name, split), records in sets.items():
        assert len({record["prompt_id"] for record in records}) == len(records)
        assert len(records) >= {"train": 400, "test": 300, "reward": 140}[split]
        assert all(len(record["prompt"]) == 1 or name == "chats" for record in records)
        assert not any(unread_fields(record) for record in records)


def test_a_thing_has_no_sentiment(testbed):
    things = [thing for split in testbed.splits().values() for thing in split]
    assert len(things) == len(set(things)) == sum(testbed.SPLITS.values()) * len(testbed.words()["things"])
    # VADER scores "novel", seen only after sampling; no policy is trained or tested on prompts of the reward split.
    assert [thing for thing, score in zip(things, truth(things), strict=True) if score != 0] == ["the thick novel"]
    assert "the thick novel" in testbed.splits()["reward"]


def test_testbed_responses_are_in_the_order_of_the_truth(testbed, sets):
    for name in testbed.SETS:
        for record in sets[name, "test"]:
            better, worse = truth(record["responses"])
            assert better - worse == pytest.approx(record["difference"], abs=1e-9)
            assert record["difference"] >= testbed.LEAST and len(record["truncated"]) == 2


def test_lists_are_the_first_training_prompts_with_all_their_answers(testbed, sets):
    samples = testbed.read_samples()
    for name in testbed.SETS:
        records = [record for _, record in read_prompts(testbed.FOLDER / f"{name}_lists.jsonl")]
        first = sets[name, "train"][: testbed.LISTS]
        assert [record["prompt"] for record in records] == [record["prompt"] for record in first]
        for record in records:
            sampled = samples[record["prompt_id"]]
            each = [list(zip(found["responses"], found["truncated"], strict=True)) for found in (record, sampled)]
            assert sorted(each[0]) == sorted(each[1]) and len(each[0]) == 8
            rewards = truth(record["responses"])
            assert rewards == sorted(rewards, reverse=True)


def test_too_few_answers_that_differ_are_refused(testbed):
    records = testbed.prompts("reviews", "test")
    alike = {"responses": ["A table.", "A chair."], "truncated": [False, True]}
    with pytest.raises(InputError, match=r"0 of 310 test prompts have answers that differ by 0.05, 300 are needed"):
        testbed.sampled(records, {prompt_id(record["prompt"]): alike for record in records})
