"""Properties of record reading, plan and losses for arbitrary input, and the program that fuzzes record files."""

import itertools
import json
import math
import random
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_plan
from faults.fuzz_records import FORMATS, fuzz
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_losses import FAMILIES, METHODS, brute_force_pair, loss_of, one_hot
from torch.nn.functional import pad

from annotation.layouts import check_row, parse_prompt
from hps.errors import InputError
from hps.losses import FORMULAS, preference_loss
from hps.negatives import gamma_stages, hardness_weights
from hps.planning import equal_to, training_list, usable
from hps.records import LARGEST_REWARD, MOST
from hps.settings import Loss, Schedule
from pipeline import records
from pipeline.files import Appender, done_ids, write_lines
from pipeline.prompts import load_prompts
from pipeline.recipe import Data, Generation, Recipe, Split
from pipeline.records import (
    Indexed,
    check_prompt,
    check_ranked,
    prompt_id,
    read_answers,
    read_candidates,
    read_jsonl,
    read_ledger,
    read_prompts,
    read_ranked,
    read_rows,
)

pytestmark = pytest.mark.full  # thousands of examples; tests/test_losses.py has the formulas by hand for the quick run

READERS = (read_jsonl, read_prompts, read_candidates, read_ranked, read_answers, read_ledger, read_rows)


def examples(count: int):
    """Settings of a test: the same examples every time, without a limit of time for one."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """One file that the examples overwrite."""
    return tmp_path_factory.mktemp("fuzz") / "data.jsonl"


# ---- records: strategies ----

texts = st.text(max_size=20) | st.sampled_from(["🙂", "👩‍👩‍👧", "שלום", "\u202eabc", "a\u2028b\x85c", "\x00", "\ufeff"])
filled = texts.filter(str.strip)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**300), 10**300)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from([["user"], ["system", "user"], ["user", "assistant", "user"]])
conversations = st.builds(
    lambda roles, contents: [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)],
    roles,
    st.lists(filled, min_size=3, max_size=3),
)
rewards = (
    st.floats(-LARGEST_REWARD, LARGEST_REWARD) | st.integers(-(10**30), 10**30) | st.sampled_from([0, -0.0, 1, 2.5])
)


@st.composite
def ranked(draw, least: int = 2) -> dict:
    """A ranked record with an extra field; without its rewards a candidates or an answers record."""
    count = draw(st.integers(least, 6))
    lists = {
        "responses": texts,
        "sources": st.sampled_from(["given_1", "given_2", "generated"]),
        "token_counts": st.integers(0, 10**6),
        "truncated": st.booleans(),
        "rewards": rewards,
    }
    columns = {name: draw(st.lists(one, min_size=count, max_size=count)) for name, one in lists.items()}
    columns["rewards"] = sorted(columns["rewards"], reverse=True)
    named = {"prompt_id": draw(filled), "prompt": draw(conversations)}
    return {**named, **columns, f"extra {draw(texts)}": draw(values)}


def dumped(record: object, ascii_only: bool) -> bytes:
    return json.dumps(record, ensure_ascii=ascii_only).encode()


# ---- records: readers ----

json_lines = st.builds(dumped, values | ranked(), st.booleans())
damaged_lines = st.lists(st.binary(max_size=30) | json_lines, max_size=5).map(b"\n".join)


def assert_clear(error: InputError, path: Path) -> None:
    place = r":\d+: (row \d+: )?.|: damaged gzip file"  # which has no lines
    assert re.match(re.escape(str(path)) + f"({place})", str(error)), str(error)
    assert "\n" not in str(error)
    str(error).encode("utf-8")


@pytest.mark.parametrize("read", READERS)
@examples(150)
@given(data=st.binary(max_size=60) | damaged_lines | damaged_lines.map(lambda lines: b"[" + lines))
def test_any_bytes_give_records_or_a_clear_error(path, read, data):
    path.write_bytes(data)
    try:
        for where, record in read(path):
            assert where.startswith(f"{path}:") and isinstance(record, dict)
            if read is read_rows:
                check_row(record, where)
    except InputError as error:
        assert_clear(error, path)


@examples(150)
@example(
    data=b"".join(b'{"prompt": [{"role": "user", "content": "%d"}], "prompt_id": "a"}\n' % n for n in (1, 2)) + b"-"
)
@given(data=damaged_lines)
def test_any_bytes_are_indexed_or_give_the_error_of_the_stream(path, data):
    """By its name a record is what the stream gives; only two prompts of one name are an error of the index alone. The
    error that is named comes first in the file."""
    path.write_bytes(data)

    def outcome(function):
        try:
            return function(), None
        except InputError as error:
            return None, str(error)

    def line(error: str) -> int:
        return int(error.removeprefix(f"{path}:").partition(":")[0])

    stream, expected = outcome(lambda: [record for _, record in read_prompts(path)])
    found, error = outcome(lambda: Indexed(path, check_prompt))
    if error is None:
        assert {name: found[name] for name in found} == {record["prompt_id"]: record for record in reversed(stream)}
    elif error != expected:
        assert "names two different prompts" in error
        assert expected is None or line(error) < line(expected)


@examples(100)
@given(record=ranked(), ascii_only=st.booleans(), read=st.sampled_from([read_candidates, read_ranked, read_answers]))
def test_valid_records_of_any_text_are_read_back_equal(path, record, ascii_only, read):
    """Prompts too; blank lines and carriage returns between them change nothing."""
    other = {**record, "prompt_id": record["prompt_id"] + "2"}
    path.write_bytes(dumped(record, ascii_only) + b"\r\n\n \n" + dumped(other, ascii_only))
    assert list(read(path)) == [(f"{path}:1", record), (f"{path}:4", other)]
    assert [found for _, found in read_prompts(path)] == [record, other]
    found = Indexed(path, check_prompt)
    assert dict(found) == {record["prompt_id"]: record, other["prompt_id"]: other}


@examples(100)
@given(record=ranked(), garbage=st.binary(min_size=1, max_size=40), place=st.integers(0, 3))
def test_valid_lines_in_front_of_a_damaged_one_are_given_first(path, record, garbage, place):
    path.write_bytes((json.dumps(record) + "\n").encode() * place + b"{" + garbage + b"\n")
    lines = read_ranked(path)
    assert [next(lines)[1] for _ in range(place)] == [record] * place
    with pytest.raises(InputError) as error:
        list(lines)
    assert str(error.value).startswith(f"{path}:{place + 1}: ")


@examples(60)
@given(records=st.lists(ranked(), min_size=1, max_size=4), data=st.data())
def test_a_file_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(path, records, data):
    lines = [dumped(record, False) + b"\n" for record in records]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    with Appender(path) as appender:
        appender.append({"prompt_id": "next"})
    ends = np.cumsum([len(line) for line in lines])
    kept = records[: int((ends <= cut).sum())]
    assert [record for _, record in read_jsonl(path)] == [*kept, {"prompt_id": "next"}]
    assert done_ids(path) == {record["prompt_id"] for record in kept} | {"next"}


# ---- records: the import ----


@examples(60)
@given(rows=st.lists(ranked(), min_size=1, max_size=3), ascii_only=st.booleans(), named=st.booleans())
def test_a_list_and_lines_of_the_release_are_the_same_rows(path, rows, ascii_only, named):
    rows = [{**row, "prompt_id": row["prompt_id"] if named else None} for row in rows]
    path.write_bytes(b"\n [" + b",\n".join(dumped(row, ascii_only) for row in rows) + b"]\n")
    listed = list(read_rows(path))
    path.write_bytes(b"\n".join(dumped(row, ascii_only) for row in rows))
    assert [row for _, row in listed] == rows == [row for _, row in read_rows(path)]
    for where, row in listed:
        checked = check_row(row, where)
        assert checked["prompt_id"] == (row["prompt_id"] if named else prompt_id(row["prompt"]))
        assert checked["responses"] == [text.strip() for text in row["responses"]]


markup = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
)


@examples(200)
@given(parts=st.lists(markup | texts | st.sampled_from(["user", "assistant", "\n", "\n\n"]), max_size=12))
def test_any_templated_string_is_parsed_or_refused(parts):
    try:
        messages = parse_prompt("".join(parts), "f:1")
    except InputError as error:
        assert str(error).startswith("f:1: ")
    else:
        assert all(set(message) == {"role", "content"} for message in messages)


@examples(100)
@given(messages=conversations, header=st.booleans())
def test_templates_of_any_text_come_back(messages, header):
    forms = {
        "<|im_start|>{role}\n{content}<|im_end|>\n": "<|im_start|>assistant\n",
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>": (
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    }
    for form, ending in forms.items():
        text = "".join(form.format(**message) for message in messages) + ending * header
        assert parse_prompt(text, "here") == messages


# ---- records: what fuzzing found ----

USER = [{"role": "user", "content": "Hello"}]
DEEP = "[" * 500 + "]" * 500
FOUND = {
    "NaN in an extra field": ('{"topic": [NaN], "prompt": %s}', "1: `topic` contains NaN; give finite numbers"),
    "infinity in an extra field": ('{"topic": {"a": 1e400}, "prompt": %s}', "1: `topic` contains Infinity"),
    "deep nesting": ('{"topic": ' + DEEP + ', "prompt": %s}', "1: values are nested more than 100 deep; flatten them"),
}


@pytest.mark.parametrize(("line", "message"), FOUND.values(), ids=FOUND)
def test_what_no_later_file_could_hold_is_refused(write_lines, line, message):
    """They passed, and the next stage's Appender fell over them, or Python's stack at another depth."""
    path = write_lines([line % json.dumps(USER)])
    with pytest.raises(InputError, match=re.escape(f"{path}:{message}")):
        list(read_prompts(path))


ROW = {"prompt": USER, "responses": ["a", "b"], "rewards": [1, 2]}
FOUND_IN_LISTS = {
    "half a character": (b'[{"a": 1}, {"a": "\\ud800"}]', r":1: row 2: '\ud800' is half a character"),
    "deep nesting": (f'[{{"a": {DEEP}}}]'.encode(), ":1: row 1: values are nested more than 100 deep"),
    "endless nesting": (b"[\n" + b"[" * 100_000, ":1: unreadable JSON"),
    "endless number": (b"[" + b"1" * 5000 + b"]", ":1: unreadable JSON"),
    "not UTF-8": (b'[{},\n{"a": "\xff"}]', ":2: byte 8 of the line is not UTF-8"),
    "cut off": (b'[{},\n{"a": 1},\n', ":2: broken JSON at column 10"),
}


@pytest.mark.parametrize(("data", "message"), FOUND_IN_LISTS.values(), ids=FOUND_IN_LISTS)
def test_damaged_lists_of_the_release_are_refused_with_their_place(path, data, message):
    path.write_bytes(data)
    with pytest.raises(InputError, match=re.escape(f"{path}{message}")):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_id": []}, "`prompt_id` is []"),
        ({"prompt_id": 7}, "`prompt_id` is 7"),
        ({"sources": ""}, '`sources` is ""'),
        ({"sources": [1, 2]}, "`sources[0]` is 1"),
        ({"prompt": [{**USER[0], "weight": math.inf}]}, "`prompt` contains Infinity"),
    ],
)
def test_rows_of_the_release_with_wrong_fields_are_refused(changes, message):
    with pytest.raises(InputError, match=re.escape(f"f:1: {message}")):
        check_row({**ROW, **changes}, "f:1")


def test_rows_of_the_release_whose_name_is_null_are_no_repeated_prompt():
    """The second one would have been refused as a repetition of the first."""
    other = [{"role": "user", "content": "Goodbye"}]
    found = [check_row({**ROW, "prompt": prompt, "prompt_id": None}, "f:1") for prompt in (USER, other)]
    assert [row["prompt_id"] for row in found] == [prompt_id(USER), prompt_id(other)]


def test_rewards_and_counts_are_numbers_that_training_can_hold():
    """Beyond single precision weights were NaN; a count of 400 digits ended the plan's diagnostics. Of rewards that
    differ by too little the standard deviation is 0."""
    record = {
        "prompt": USER,
        "responses": ["a", "b"],
        "rewards": [LARGEST_REWARD, -LARGEST_REWARD],
        "sources": ["generated"] * 2,
        "token_counts": [1, 1],
        "truncated": [False] * 2,
    }
    for rewards, standardized in itertools.product((record["rewards"], [5e-324, 0]), (False, True)):
        schedule = Schedule(epochs=1, global_batch=1, standardize_rewards=standardized)
        recipe = Recipe.model_construct(output="nowhere", loss=Loss(estimator="exact"), schedule=schedule)
        rows, facts = make_plan([check_ranked({**record, "rewards": rewards}, "f:1")], recipe)
        json.dumps([rows, facts], allow_nan=False)
    with pytest.raises(InputError, match=r"f:1: `rewards\[0\]` is 2e\+38: .*; give a finite number within 1.7e\+38"):
        check_ranked({**record, "rewards": [2e38, 0]}, "f:1")
    with pytest.raises(InputError, match=r"f:1: `token_counts\[0\]` is 1000"):
        check_ranked({**record, "token_counts": [10**400, 1]}, "f:1")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"reason": "x"}, "`prompt_id` is missing; remove the line, so that its prompt is done again"),
        ({"prompt_id": [], "reason": "x"}, "`prompt_id` is []"),
        ({"prompt_id": "a"}, "`reason` is missing; remove the line"),
        ({"prompt_id": "a", "reason": "x", "tokens": math.nan}, "`tokens` contains NaN"),
    ],
)
def test_damaged_ledgers_are_refused(write_lines, line, message):
    path = write_lines([{"prompt_id": "b", "reason": "empty response"}, line])
    with pytest.raises(InputError, match=re.escape(f"{path}:2: {message}")):
        list(read_ledger(path))


def test_a_name_that_is_no_string_is_refused_where_names_are_gathered(write_lines):
    path = write_lines([{"prompt_id": "a"}, {"prompt_id": {}}])
    with pytest.raises(InputError, match=r":2: `prompt_id` is \{\}: .*; remove the line"):
        done_ids(path)


@pytest.mark.parametrize(("field", "value"), [("token_counts", ["1"]), ("truncated", [0]), ("token_counts", [-1])])
def test_answers_have_counts_and_flags(write_lines, field, value):
    record = {"prompt": USER, "responses": ["a"], "token_counts": [1], "truncated": [False]}
    with pytest.raises(InputError, match=rf":1: `{field}\[0\]` is "):
        list(read_answers(write_lines([{**record, field: value}])))


# ---- files of raters ----

STUDY = {
    "study": "s",
    "raters": 2,
    "seed": 3,
    "models": ["sft", "mine"],
    "criteria": ["correctness", "safety"],
    "sets": {"x": ["p", "q 🙂"]},
}
RATINGS = {
    "study": "s",
    "rater": 2,
    "ratings": [
        {"prompt_id": name, "answer": answer, "criterion": criterion, "value": 1 + answer + len(name) / 10}
        for name in STUDY["sets"]["x"]
        for answer in range(2)
        for criterion in STUDY["criteria"]
    ],
}


def places(value, at=()):
    """The place of everything in a JSON value."""
    yield at
    if isinstance(value, (list, dict)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*at, key))


def changed(value, at: tuple, new):
    """A copy of a JSON value with another one in its place."""
    if not at:
        return new
    copied = value.copy()
    copied[at[0]] = changed(value[at[0]], at[1:], new)
    return copied


numbers_and_marks = st.sampled_from([True, 1.0, "1", "p", "s", 5.001, 0.999, math.nan, math.inf, -1, 2, [], {}])


@examples(400)
@given(at=st.sampled_from(list(places(RATINGS))), new=numbers_and_marks | values, cut=st.none() | st.integers(0, 900))
def test_a_damaged_file_of_a_rater_gives_its_ratings_or_a_clear_error(path, at, new, cut):
    from report.study import read_ratings

    whole = json.dumps(RATINGS).encode()
    damaged = json.dumps(changed(RATINGS, at, new)).encode()[:cut]
    path.write_bytes(damaged)
    try:
        rater, found = read_ratings(path, STUDY)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error) and damaged != whole
    else:
        assert rater in (1, 2) and ((found >= 1) & (found <= 5)).all()
        # Nothing else could be another one and the file be whole: a mark, the rater, a field that nobody reads.
        assert damaged == whole or at == () or at[-1] in ("value", "rater")


# ---- records: large and repeated prompts ----


def recipe_for(path: Path) -> Recipe:
    return Recipe.model_construct(
        output="nowhere", data=Data.model_construct(train=Split(path=str(path), responses=4)), generation=Generation()
    )


def test_a_prompt_of_10_mb_is_one_record(path):
    """Quotes and letters of several bytes; the time is the processor's, about 1 s."""
    record = {"prompt": [{"role": "user", "content": 'größe "🙂" ' * 700_000}], "responses": ["a", "b"]}
    path.write_text((json.dumps(record, ensure_ascii=False) + "\n") * 2, encoding="utf-8")
    assert path.stat().st_size > 2 * 10_000_000
    start = time.process_time()
    prompts, repeated = load_prompts(recipe_for(path), "train")
    (name,) = prompts
    assert prompts[name]["prompt"] == record["prompt"] and len(repeated) == 1
    path.write_bytes(path.read_bytes()[:12_000_000])
    Appender(path).close()
    assert [found["prompt"] for _, found in read_prompts(path)] == [record["prompt"]]
    assert time.process_time() - start < 10
    path.write_text(json.dumps({**record, "responses": record["prompt"]}))
    with pytest.raises(InputError) as error:
        load_prompts(recipe_for(path), "train")
    assert len(str(error.value)) < 1000


def test_a_thousand_identical_prompts_are_one_and_all_others_are_in_the_ledger(path, tmp_path):
    """With names given or not, of 20 kB each: the first line's responses stand, no line is unaccounted for."""
    lines = [{"prompt": [{"role": "user", "content": "x" * 20_000}], "responses": [str(n), "b"]} for n in range(1000)]
    write_lines(path, (json.dumps(line) + "\n" for line in lines))
    start = time.process_time()
    prompts, repeated = load_prompts(recipe_for(path), "train")
    assert time.process_time() - start < 10
    (name,) = prompts
    assert prompts[name]["responses"] == ["0", "b"]
    assert [line["place"] for line in repeated] == [f"{path}:{number}" for number in range(2, 1001)]
    write_lines(tmp_path / "ledger.jsonl", (json.dumps(line) + "\n" for line in repeated))
    reasons = Counter((line["prompt_id"], line["reason"]) for _, line in read_ledger(tmp_path / "ledger.jsonl"))
    assert reasons == {(name, "repeated prompt"): 999}


# ---- plan ----


@st.composite
def plans(draw) -> tuple[list[dict], Recipe]:
    """Ranked records of different names, many of them tied, and any settings that the recipe allows together."""
    records = draw(st.lists(ranked(), min_size=1, max_size=6, unique_by=lambda record: record["prompt_id"]))
    for record in records:
        if draw(st.booleans()):  # ties, which arbitrary numbers seldom are
            few = st.sampled_from([3.0, 1.0, 0.0])
            count = len(record["responses"])
            record["rewards"] = sorted(draw(st.lists(few, min_size=count, max_size=count)), reverse=True)
    preference = draw(st.sampled_from(["bt", "pl", "hps"]))
    loss = Loss(preference=preference, list_size=draw(st.sampled_from([None, 2, 3, 5])))
    if preference == "hps":
        estimator = draw(st.sampled_from(["exact", "sampled"]))
        changed = {
            "estimator": estimator,
            "samples": 1 if estimator == "exact" else draw(st.integers(1, 3)),
            "positives": draw(st.integers(1, 2)),
            "appendix_e_reading": draw(st.sampled_from(["printed", "intended"])),
            "negatives": draw(st.sampled_from(["softmax", "worst", "uniform", "hardest", "below_mean"])),
            "negative_deviations": draw(st.floats(-4, 4)),
        }
        loss = loss.model_copy(update=changed)
    schedule = Schedule(
        gamma_start=draw(st.floats(-20, 20)),
        gamma_end=draw(st.floats(-20, 20)),
        gamma_stages=draw(st.integers(1, 6)),
        gamma_ends=draw(st.sampled_from(["inclusive", "exclusive"])),
        best=draw(st.sampled_from(["reward", "human"])),
        ties=draw(st.sampled_from(["keep", "exclude"])),
        subsample=draw(st.sampled_from([None, 1 + loss.positives, 4])),
        standardize_rewards=draw(st.booleans()),
        epochs=draw(st.integers(1, 3)),
        global_batch=draw(st.integers(1, 5)),
    )
    recipe = Recipe.model_construct(output="nowhere", seed=draw(st.integers(0, 2**31)), loss=loss, schedule=schedule)
    return [check_ranked(record, "f:1") for record in records], recipe


def check_term(row: dict, rewards: list, allowed: set[int], positive: int, preference: str) -> None:
    """One preferred response, others that it may be preferred to, weights that sum to 1, and N."""
    assert row["preferred"] == positive
    drawn = row["dispreferred"]
    assert drawn and len(set(drawn)) == len(drawn) and set(drawn) <= allowed and positive not in drawn
    assert row["dispreferred_count"] == len(allowed)
    assert len(row["rewards"]) == len(drawn) + 1
    if preference == "pl":
        assert row["weights"] is None and [rewards[i] for i in drawn] == sorted(rewards[i] for i in drawn)[::-1]
    else:
        assert len(row["weights"]) == len(drawn) and min(row["weights"]) >= 0
        assert math.fsum(row["weights"]) == pytest.approx(1, abs=1e-12)


def check_row_of_plan(row: dict, record: dict, recipe: Recipe) -> None:
    loss, schedule, rewards = recipe.loss, recipe.schedule, record["rewards"]
    first = 0 if schedule.best == "reward" else record["sources"].index("given_1")
    (preferred, *others), _ = training_list(record, recipe.loss, recipe.schedule, recipe.seed)
    different = set(range(len(rewards))) - equal_to(record, first)
    assert preferred == first and set(others) <= different
    most = len(different) if schedule.subsample is None else min(len(different), schedule.subsample - 1)
    if schedule.ties == "keep":
        assert len(others) == most
    elif schedule.subsample is None:
        assert len(others) == sum(rewards[index] != rewards[first] for index in different)
    allowed = set(others)
    if loss.positives == 2:
        second = max(others, key=lambda index: (rewards[index], -index))
        below = allowed - equal_to(record, second)
        below = {i for i in below if schedule.ties == "keep" or rewards[i] != rewards[second]}
        check_term(row["second"], rewards, below, second, loss.preference)
        allowed -= {second} if loss.appendix_e_reading == "intended" else set()
    check_term(row, rewards, allowed, first, loss.preference)
    if loss.preference == "bt":
        assert rewards[row["dispreferred"][0]] == min(rewards[i] for i in allowed)


@examples(400)
@given(plans(), st.randoms(use_true_random=False))
def test_any_plan_has_every_usable_prompt_once_an_epoch(case, rng):
    """And one row more only to fill the last step; counts add up; the order of the file does not matter."""
    records, recipe = case
    schedule = recipe.schedule
    named = {record["prompt_id"]: record for record in records}
    kept, left_out = usable(named, recipe.loss, recipe.schedule, recipe.seed)
    assert len(kept) + sum(left_out.values()) == len(records)
    if not kept:
        with pytest.raises(InputError, match="no prompt can be trained on"):
            make_plan(records, recipe)
        return
    rows, facts = make_plan(records, recipe)
    by_name = {name: named[name] for name in kept}
    for epoch in range(schedule.epochs):
        names = [row["prompt_id"] for row in rows if row["epoch"] == epoch]
        assert sorted(names) == sorted(by_name)
    fill = [row for row in rows if row["epoch"] == schedule.epochs]
    assert rows[len(rows) - len(fill) :] == fill and len(fill) == facts["rows_to_fill_the_last_step"]
    assert len(fill) < schedule.global_batch and len(rows) == len(kept) * schedule.epochs + len(fill)
    assert {row["prompt_id"] for row in fill} <= set(by_name)
    assert [row["step"] for row in rows] == [number // schedule.global_batch for number in range(len(rows))]
    assert len(rows) == facts["steps"] * schedule.global_batch and facts["left_out"] == left_out
    for row in rows:
        check_row_of_plan(row, by_name[row["prompt_id"]], recipe)
    json.dumps([rows, facts], allow_nan=False)
    rng.shuffle(records)
    assert make_plan(records, recipe) == (rows, facts)


@examples(300)
@given(st.lists(st.floats(-MOST, MOST) | st.floats(-5, 5), min_size=1, max_size=8), st.floats(-50, 50))
def test_weights_rise_with_the_reward_for_positive_gamma_and_fall_for_negative(rewards, gamma):
    weights = hardness_weights(np.array(rewards), gamma)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1, abs=1e-12)
    ordered = weights[np.argsort(rewards, kind="stable")] * (1 if gamma >= 0 else -1)
    assert (np.diff(ordered) >= 0).all()
    if gamma == 0:
        assert (weights == weights[0]).all()
    gap = abs(gamma) * (max(rewards) - min(rewards))
    assert (gap > 1e-9) <= (weights.max() > weights.min())


@examples(100)
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.integers(1, 30), st.sampled_from(["inclusive", "exclusive"]))
def test_gamma_runs_from_its_start_to_its_end_and_never_back(start, end, count, ends):
    stages = gamma_stages(Schedule(gamma_start=start, gamma_end=end, gamma_stages=count, gamma_ends=ends))
    assert len(stages) == count and stages[0] == start
    assert (np.diff(stages) * np.sign(end - start) >= -1e-9).all()
    if ends == "inclusive" and count > 1:
        assert stages[-1] == pytest.approx(end)


# ---- losses ----


@st.composite
def lists(draw, limit: float = 30.0, method=None) -> tuple[Loss, dict]:
    """A method with any constants, and a list of any scores and rewards, with weights on some of the dispreferred."""
    family, preference = draw(st.sampled_from(METHODS)) if method is None else method
    size = draw(st.integers(2, 6))
    changed = {
        "beta": draw(st.floats(0.01, 2)),
        "exo_epsilon": draw(st.floats(1e-6, 0.49)),
        "simpo_margin": draw(st.floats(0, 2)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.3]))
        if FAMILIES[family].smoothing == "label_smoothing" and preference != "pl"
        else 0.0,
        "factor_n": draw(st.booleans()) and preference == "hps" and FAMILIES[family].factor_n,
    }
    loss = loss_of(family, preference).model_copy(update=changed)
    scores, annotated = (
        torch.tensor(draw(st.lists(st.floats(-limit, limit), min_size=size, max_size=size)), dtype=torch.float64)
        for _ in range(2)
    )
    weights = torch.tensor(draw(st.lists(st.floats(0, 1), min_size=size, max_size=size)), dtype=torch.float64)
    weights[0] = 0
    assume(weights.sum() > 1e-3)
    return loss, {
        "scores": scores[None],
        "annotated": annotated.sort(descending=True).values[None],
        "mask": torch.ones(1, size, dtype=torch.bool),
        "log_weights": (weights / weights.sum()).log()[None, None],
        "dispreferred_count": torch.tensor([[size - 1.0]], dtype=torch.float64),
    }


def gradient(loss: Loss, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient in the scores of the one list."""
    scores = batch["scores"].clone().requires_grad_()
    value = preference_loss(loss, **{**batch, "scores": scores})[0]
    return value.detach(), torch.autograd.grad(value, scores)[0][0]


@examples(300)
@given(lists(limit=1e6))
def test_any_finite_scores_give_a_finite_loss_and_gradient(case):
    value, slope = gradient(*case)
    assert value.isfinite() and slope.isfinite().all()
    assert value >= -1e-9  # every one is a negative logarithm, a divergence or a square


def single(batch: dict) -> dict:
    return {name: value if name == "mask" else value.float() for name, value in batch.items()}


@examples(300)
@given(lists(limit=1e6))
def test_in_single_precision_too(case):
    """As training computes it. The value is that of double precision, up to what the scores lose by rounding."""
    loss, batch = case
    value, slope = gradient(loss, single(batch))
    assert value.dtype == torch.float32 and value.isfinite() and slope.isfinite().all()
    rounded = {name: value if name == "mask" else value.double() for name, value in single(batch).items()}
    exact, _ = gradient(loss, rounded)
    largest = float(batch["scores"].abs().max())
    size = 1 + float(exact.abs()) + largest * (1 + loss.beta)
    if loss.family == "rebel":  # the square of a residual that is smaller than what it is a difference of
        size += float(exact.abs()) ** 0.5 * (largest + float(batch["annotated"].abs().max()))
    assert abs(float(value) - float(exact)) <= 1e-5 * size


def padded(batches: list[dict], filler: list[float]) -> dict:
    """One batch of lists of unequal length; behind each list anything in scores and rewards, and no weight."""
    size = max(batch["scores"].shape[1] for batch in batches)

    def rows(name: str, fill) -> torch.Tensor:
        parts = [batch[name] for batch in batches]
        return torch.cat([pad(part, (0, size - part.shape[-1]), value=fill) for part in parts])

    columns = {"mask": rows("mask", False), "log_weights": rows("log_weights", -math.inf)}
    for name, value in zip(("scores", "annotated"), filler, strict=True):
        columns[name] = rows(name, 0.0).where(columns["mask"], torch.tensor(value, dtype=torch.float64))
    return {**columns, "dispreferred_count": torch.cat([batch["dispreferred_count"] for batch in batches])}


@examples(300)
@given(
    st.sampled_from(METHODS).flatmap(lambda method: st.lists(lists(method=method), min_size=1, max_size=4)),
    st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=2),
)
def test_lists_of_a_batch_do_not_see_each_other(cases, filler):
    """The loss and the gradient of each are those that it has alone, whatever stands behind the mask."""
    loss, batches = cases[0][0], [batch for _, batch in cases]
    together = padded(batches, filler)
    scores = together["scores"].requires_grad_()
    values = preference_loss(loss, **together)
    slopes = torch.autograd.grad(values.sum(), scores)[0]
    for row, batch in enumerate(batches):
        value, slope = gradient(loss, batch)
        torch.testing.assert_close(values[row].detach(), value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slopes[row, : len(slope)], slope, rtol=1e-12, atol=1e-12)
        assert (slopes[row, len(slope) :] == 0).all()


@examples(300)
@given(lists(), st.floats(-30, 30))
def test_losses_of_differences_do_not_change_with_a_shift(case, shift):
    """Eq. 4-10 and 15-17 see differences alone, so their slopes sum to 0; SPPO and NCA see each score.

    LiPO's ranks do, too, but a shift may round two scores to one.
    """
    loss, batch = case
    assume(loss.family not in ("sppo", "nca") and loss.preference != "lipo")
    value, slope = gradient(loss, batch)
    moved, _ = gradient(loss, {**batch, "scores": batch["scores"] + shift})
    torch.testing.assert_close(moved, value, rtol=1e-9, atol=1e-9)
    assert abs(slope.sum()) <= 1e-9 * (1 + slope.abs().sum())


@examples(200)
@given(lists(), st.randoms(use_true_random=False))
def test_hps_does_not_see_the_order_of_the_dispreferred(case, rng):
    loss, batch = case
    loss = loss.model_copy(update={"preference": "hps"})
    size = batch["scores"].shape[1]
    order = [0, *rng.sample(range(1, size), size - 1)]
    moved = {**batch, **{name: batch[name][..., order] for name in ("scores", "annotated", "log_weights")}}
    torch.testing.assert_close(preference_loss(loss, **moved), preference_loss(loss, **batch), rtol=1e-12, atol=1e-12)


@examples(300)
@given(lists(limit=15.0))
def test_exact_hps_is_its_equation_in_a_loop(case):
    """dpo and simpo: `-log(exp(rho_1) / (exp(rho_1) + [N] sum_i q_i exp(rho_i)))`; the others: the mean of pairs."""
    loss, batch = case
    loss = loss.model_copy(update={"preference": "hps"})
    assume(loss.family not in ("ipo", "sppo", "nca") or not loss.factor_n)
    value = preference_loss(loss, **batch).item()
    best, *others = batch["scores"][0].tolist()
    q = batch["log_weights"][0, 0, 1:].exp().tolist()
    n = len(others) if loss.factor_n else 1
    if loss.family in ("dpo", "simpo"):
        right = math.exp(best - (loss.simpo_margin if loss.family == "simpo" else 0))
        mixture = n * math.fsum(w * math.exp(x) for w, x in zip(q, others, strict=True))
        e, total = loss.label_smoothing, right + mixture
        expected = -(1 - e) * math.log(right / total) - e * math.log(mixture / total)
    else:
        gaps = (batch["annotated"][0, 0] - batch["annotated"][0, 1:]).tolist()
        pairs = [brute_force_pair(loss, best, x + math.log(n), g) for x, g in zip(others, gaps, strict=True)]
        expected = math.fsum(w * pair for w, pair in zip(q, pairs, strict=True))
    assert value == pytest.approx(expected, rel=1e-8, abs=1e-8)


@examples(200)
@given(lists(), st.data())
def test_all_weight_on_one_response_is_the_pair_loss(case, data):
    """With the factor its score is higher by log N."""
    loss, batch = case
    scores, size = batch["scores"], batch["scores"].shape[1]
    place = data.draw(st.integers(1, size - 1))
    worst = scores[:, place] + (math.log(size - 1) if loss.factor_n else 0)
    given = {**batch, "log_weights": one_hot(size, place)[None]}
    value = preference_loss(loss.model_copy(update={"preference": "hps"}), **given)
    gap = batch["annotated"][:, 0] - batch["annotated"][:, place]
    expected = FORMULAS[loss.family].pair(loss, scores[:, 0], worst, gap)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@examples(300)
@given(lists(method=("dpo", "hps")) | lists(method=("simpo", "hps")) | lists(method=("dpo", "bt")) | lists())
def test_raising_the_preferred_score_never_raises_the_loss_of_dpo_and_simpo(case):
    """Under BT, PL and HPS: -1 < dL/d rho_1 <= 0, for -log of a share that grows with rho_1. Without smoothing,
    whose flipped labels pull back. Raising a response of weight 0 changes nothing, another never lowers the loss."""
    loss, batch = case
    assume(loss.family in ("dpo", "simpo") and loss.preference in ("bt", "pl", "hps"))
    _, slope = gradient(loss.model_copy(update={"label_smoothing": 0.0}), batch)
    assert -1 - 1e-12 <= slope[0] <= 0
    if loss.preference != "pl":
        assert (slope[1:] >= 0).all()
        assert (slope[1:][batch["log_weights"][0, 0, 1:].isinf()] == 0).all()


RISING = ("dpo", "simpo", "slic", "ipo", "exo", "sppo", "nca", "rebel", "rpo")  # where their slope is known


@examples(300)
@given(st.sampled_from(RISING), st.floats(-30, 30), st.floats(-30, 30), st.floats(0.01, 2), st.floats(1e-6, 0.49))
def test_the_pair_losses_rise_and_fall_where_their_equations_say(family, best, worst, beta, epsilon):
    """In the preferred score: IPO falls up to a difference of 1 / (2 tau), EXO up to log((1 - eps) / eps), SPPO up to
    1 / (2 beta), NCA up to log 2, REBEL and RPO up to the gap, and rise beyond; dpo and simpo fall everywhere, slic
    up to delta, where it ends."""
    loss = Loss(family=family, beta=beta, exo_epsilon=epsilon)
    pair = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (best, worst)]
    gap = torch.tensor(0.7, dtype=torch.float64)
    slope = torch.autograd.grad(FORMULAS[family].pair(loss, *pair, gap), pair)[0].item()
    beyond = {
        "ipo": best - worst - 1 / (2 * beta),
        "exo": best - worst - math.log((1 - epsilon) / epsilon),
        "sppo": best - 1 / (2 * beta),
        "nca": best - math.log(2),
        "rebel": best - worst - 0.7,
        "rpo": best - worst - 0.7,
    }.get(family, -1.0)
    assume(abs(beyond) > 1e-6)
    assert slope * beyond >= 0
    if abs(best - worst) < 20:
        assert slope != 0 or family == "nca" or (family == "slic" and best - worst >= 1)


# ---- the program that fuzzes record files ----


@pytest.fixture
def quick_disk(monkeypatch):
    """Thousands of small files: nobody waits for the disk."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def test_fuzzed_record_files_give_clear_errors_only(quick_disk, tmp_path):
    """Another seed than the program's own run of 50,000 files."""
    report = fuzz(5000, 1, tmp_path)
    assert report.faults == []
    assert report.files.total() == 5000 == report.whole.total() + report.refused.total()
    assert min(report.whole.values()) > 50 < min(report.refused.values())


def swallowing(read):
    """A reader that ends at the first damaged line as if the file ended there."""

    def reader(path):
        try:
            yield from read(path)
        except InputError:
            return

    return reader


def nameless(read):
    """A reader whose errors do not say where."""

    def reader(path):
        try:
            yield from read(path)
        except InputError:
            raise InputError("something is wrong") from None

    return reader


def crashing(read):
    def reader(path):
        for where, record in read(path):
            yield where, {**record, "length": len(record["topic"])} if "topic" in record else record

    return reader


def lossy(read):
    def reader(path):
        yield from list(read(path))[1:]

    return reader


def eager(read):
    """A reader that reads all lines before it gives the first."""
    return lambda path: iter(list(read(path)))


def stripping(read):
    return lambda path: ((where, {**record, "prompt": record["prompt"][-1:]}) for where, record in read(path))


def lenient(path):
    """No UTF-8, no matter."""
    for number, line in enumerate(path.read_bytes().decode("utf-8", errors="replace").split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", check_prompt(json.loads(line.removeprefix("\ufeff")), f"{path}:{number}")
            except (ValueError, RecursionError):
                raise InputError("broken", where=f"{path}:{number}") from None


def forgiving(check, word: str):
    """A check that lets one kind of fault pass."""

    def checked(record, where, *further):
        try:
            return check(record, where, *further)
        except InputError as error:
            if word not in str(error):
                raise
            return record

    return checked


# What is passed over: the check, words of its message, and the formats that must show it.
FORGIVEN = {
    "roles": ("checked", "'assistant'", "prompts candidates ranked answers"),
    "no role": ("checked", ".role` is missing", "prompts answers"),
    "contents": ("checked", ".content` is", "prompts candidates ranked answers"),
    "last turn": ("checked", "should end with", "prompts candidates ranked answers"),
    "no messages": ("checked", "`prompt` is", "prompts"),
    "unsorted rewards": ("check_ranked", "not sorted", "ranked"),
    "one response": ("check_ranked", "preferences need", "ranked"),
    "rewards": ("checked", "`rewards[", "ranked"),
    "counts": ("checked", "`token_counts[", "candidates answers"),
    "flags": ("checked", "`truncated[", "candidates answers"),
    "strings": ("checked", "`responses[", "prompts candidates"),
    "lengths": ("check_parallel", "of equal length", "candidates answers"),
    "not finite": ("check_finite", "contains", "prompts ledger"),
    "names": ("checked", "`prompt_id` is", "prompts ledger"),
}


@pytest.mark.parametrize(
    ("function", "word", "title"),
    [(name, word, title) for name, word, titles in FORGIVEN.values() for title in titles.split()],
)
def test_the_fuzzer_finds_a_reader_that_lets_a_fault_pass(quick_disk, tmp_path, monkeypatch, function, word, title):
    monkeypatch.setattr(records, function, forgiving(getattr(records, function), word))
    report = fuzz(400, 0, tmp_path, {title: FORMATS[title]})
    assert {"accepted", "exception", "lost"} & {fault[2] for fault in report.faults}


@pytest.mark.parametrize("title", FORMATS)
def test_the_fuzzer_finds_a_stage_that_refuses_what_was_read(quick_disk, tmp_path, title):
    """Every file that is read must be taken; only what `KNOWN` says may be refused, and it is counted."""

    def refusing(*_):
        raise InputError("no")

    report = fuzz(60, 0, tmp_path, {title: replace(FORMATS[title], follow=refusing)})
    assert "the next stage refuses it: no" in " ".join(fault[3] for fault in report.faults)


def test_the_plan_refuses_only_rankings_that_tie(quick_disk, tmp_path, monkeypatch):
    report = fuzz(400, 0, tmp_path, {"ranked": FORMATS["ranked"]})
    assert not report.faults and report.known.total() > 0
    monkeypatch.setattr("hps.planning.training_list", lambda *_: ([], "all rewards tie"))
    report = fuzz(40, 0, tmp_path, {"ranked": FORMATS["ranked"]})
    assert "no plan: " in " ".join(fault[3] for fault in report.faults)


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (swallowing(read_prompts), "lost"),
        (nameless(read_prompts), "message"),
        (crashing(read_prompts), "exception"),
        (lossy(read_prompts), "lost"),
        (eager(read_prompts), "message"),
        (stripping(read_prompts), "lost"),
        (lenient, "accepted"),
    ],
)
def test_the_fuzzer_finds_a_broken_reader(quick_disk, tmp_path, broken, kind):
    report = fuzz(150, 0, tmp_path, {"prompts": replace(FORMATS["prompts"], read=broken)})
    assert kind in {fault[2] for fault in report.faults}
    number = report.faults[0][0]
    kept = (tmp_path / "offending.jsonl").read_bytes()
    again = fuzz(1, 0, tmp_path, {"prompts": replace(FORMATS["prompts"], read=broken)}, first=number)
    assert again.faults and (tmp_path / "offending.jsonl").read_bytes() == kept


def test_the_fuzzer_finds_an_appender_that_cuts_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(Appender, "_cut_partial_line", lambda self: self.path.write_bytes(b""))
    report = fuzz(20, 0, tmp_path)
    assert "Appender changed whole lines" in " ".join(fault[3] for fault in report.faults)


def test_files_of_one_seed_are_the_same(quick_disk, tmp_path):
    first, second = (fuzz(40, random.Random(5).randrange(99), tmp_path) for _ in range(2))
    assert first == second and first != fuzz(40, 100, tmp_path)
