"""Record formats: what is refused and where, and stable names."""

import codecs
import gzip
import json
import os
import subprocess
import tracemalloc

import pytest

from hps.errors import InputError
from pipeline.records import (
    Indexed,
    check_candidates,
    check_prompt,
    check_ranked,
    prompt_id,
    read_candidates,
    read_jsonl,
    read_prompts,
    read_ranked,
    read_rows,
    unread_fields,
)

USER = {"role": "user", "content": "Hello"}
PROMPT = {"prompt": [USER], "responses": ["Hi.", "Go away."]}
CANDIDATES = {**PROMPT, "sources": ["given_1", "generated"], "token_counts": [2, 3], "truncated": [False, True]}
RANKED = {**CANDIDATES, "rewards": [1.5, -2]}


def without(record: dict, field: str) -> dict:
    return {name: value for name, value in record.items() if name != field}


# ---- what is refused ----

BAD_PROMPTS = {
    "broken JSON": ('{"prompt": [}', "broken JSON at column 13"),
    "cut off": ('{"prompt"', "broken JSON"),
    "no object": ("[1, 2]", "expected a JSON object, found [1, 2]"),
    "half a surrogate pair": ('{"prompt": "\\ud800"}', "half a character"),
    "endless number": ("1" * 5000, "unreadable JSON"),
    "endless nesting": ("[" * 100_000, "unreadable JSON"),
    "no prompt": ({}, "`prompt` is missing"),
    "empty prompt": ({"prompt": []}, "`prompt` is []"),
    "prompt is a string": ({"prompt": "Hello"}, '`prompt` is "Hello"'),
    "no role": ({"prompt": [USER, {"content": "x"}]}, "`prompt[1].role` is missing"),
    "message is a string": ({"prompt": ["x"]}, '`prompt[0]` is "x": should be a valid dictionary'),
    "unknown role": ({"prompt": [{"role": "human", "content": "x"}]}, '`prompt[0].role` is "human"'),
    "no content": ({"prompt": [{"role": "user"}]}, "`prompt[0].content` is missing"),
    "blank content": ({"prompt": [{"role": "user", "content": " \n"}]}, "`prompt[0].content` is"),
    "assistant last": (
        {"prompt": [USER, {"role": "assistant", "content": "x"}]},
        "should end with the user's turn, not the assistant's",
    ),
    "responses no list": ({**PROMPT, "responses": "Hi."}, '`responses` is "Hi."'),
    "response no string": ({**PROMPT, "responses": ["Hi.", 3]}, "`responses[1]` is 3"),
    "prompt_id no string": ({**PROMPT, "prompt_id": 7}, "`prompt_id` is 7"),
    "prompt_id empty": ({**PROMPT, "prompt_id": ""}, '`prompt_id` is ""'),
}
BAD_CANDIDATES = {
    "no sources": (without(CANDIDATES, "sources"), "`sources` is missing"),
    "one source": ({**CANDIDATES, "sources": ["generated"]}, "2 `responses` but 1 `sources`"),
    "three counts": ({**CANDIDATES, "token_counts": [1, 2, 3]}, "2 `responses` but 3 `token_counts`"),
    "negative count": ({**CANDIDATES, "token_counts": [1, -2]}, "`token_counts[1]` is -2"),
    "count a fraction": ({**CANDIDATES, "token_counts": [1, 2.5]}, "`token_counts[1]` is 2.5"),
    "count a truth value": ({**CANDIDATES, "token_counts": [1, True]}, "`token_counts[1]` is true"),
    "no truncated": (without(CANDIDATES, "truncated"), "`truncated` is missing"),
    "truncated a number": ({**CANDIDATES, "truncated": [False, 0]}, "`truncated[1]` is 0"),
}
BAD_RANKED = {
    "no responses": (without(RANKED, "responses"), "`responses` is missing"),
    "no rewards": (without(RANKED, "rewards"), "`rewards` is missing"),
    "one reward": ({**RANKED, "rewards": [1.0]}, "2 `responses` but 1 `rewards`"),
    "three rewards": ({**RANKED, "rewards": [3, 2, 1]}, "2 `responses` but 3 `rewards`"),
    "NaN": (json.dumps({**RANKED, "rewards": [1.0, float("nan")]}), "`rewards[1]` is NaN"),
    "Infinity": (json.dumps({**RANKED, "rewards": [float("inf"), 1.0]}), "`rewards[0]` is Infinity"),
    "-Infinity": (json.dumps({**RANKED, "rewards": [1.0, float("-inf")]}), "`rewards[1]` is -Infinity"),
    "too large": ({**RANKED, "rewards": [3e38, -3e38]}, "`rewards[0]` is 3e+38"),
    "beyond a float": ({**RANKED, "rewards": [10**400, 0]}, "`rewards[0]` is 1000"),
    "text": ({**RANKED, "rewards": ["2", "1"]}, '`rewards[0]` is "2"'),
    "truth value": ({**RANKED, "rewards": [True, False]}, "`rewards[0]` is true"),
    "unsorted": ({**RANKED, "rewards": [-2, 1.5]}, "`rewards` are not sorted"),
    "single": ({**RANKED, **{name: RANKED[name][:1] for name in ("responses", "sources", "token_counts", "truncated")},
                "rewards": [1]}, "`responses` has 1 entry"),
}  # fmt: skip
REFUSED = [
    pytest.param(read, good, bad, message, id=f"{read.__name__}-{name}")
    for read, good, table in (
        (read_prompts, PROMPT, BAD_PROMPTS),
        (read_candidates, CANDIDATES, BAD_CANDIDATES),
        (read_ranked, RANKED, BAD_RANKED),
    )
    for name, (bad, message) in table.items()
]


@pytest.mark.parametrize(("read", "good", "bad", "message"), REFUSED)
def test_bad_lines_are_refused_with_file_and_line(read, good, bad, message, write_lines):
    """The good first line passes; a blank line is passed over and counted: the bad one is line 3."""
    path = write_lines([good, "", bad])
    lines = read(path)
    next(lines)
    with pytest.raises(InputError) as error:
        next(lines)
    assert str(error.value).startswith(f"{path}:3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_other_encodings_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: cannot read the file \(No such file or directory\)"):
        list(read_prompts(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="Is a directory"):
        list(read_prompts(tmp_path))
    (tmp_path / "latin.jsonl").write_bytes('{}\n{"prompt": "Größe"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl:2: byte 15 of the line is not UTF-8"):
        list(read_jsonl(tmp_path / "latin.jsonl"))


# ---- what is accepted ----


def test_good_lines_pass_unchanged_and_named(write_lines):
    """The name: printf '[["user","Hello"]]' | sha256sum | cut -c1-16"""
    name = "b0ae8b0f316e2f14"
    for read, record in (
        (read_prompts, {**PROMPT, "truncated": [True, False]}),
        (read_candidates, CANDIDATES),
        (read_ranked, RANKED),
    ):
        assert [line for _, line in read(write_lines([record]))] == [{**record, "prompt_id": name}]
        assert [line for _, line in read(write_lines([{**record, "prompt_id": "mine"}]))] == [
            {**record, "prompt_id": "mine"}
        ]


def test_given_responses_are_whole_unless_the_line_says_otherwise(write_lines):
    path = write_lines([PROMPT, {**PROMPT, "truncated": None}, {"prompt": [USER]}])
    assert [record["truncated"] for _, record in read_prompts(path)] == [[False, False], [False, False], []]
    with pytest.raises(
        InputError, match="2 `responses` but 1 `truncated`; the lists of a record must be of equal length"
    ):
        list(read_prompts(write_lines([{**PROMPT, "truncated": [True]}])))
    with pytest.raises(InputError, match="`truncated` is true: should be a valid list"):
        list(read_prompts(write_lines([{**PROMPT, "truncated": True}])))


def test_equal_rewards_and_whole_numbers_are_sorted():
    assert check_ranked({**RANKED, "rewards": [2, 2.0]}, "here")["rewards"] == [2, 2.0]


def test_prompts_without_responses_and_the_limit(write_lines):
    path = write_lines([{"prompt": [USER]}, PROMPT, "broken"])
    assert [record["responses"] for _, record in read_prompts(path, limit=2)] == [[], ["Hi.", "Go away."]]


def test_line_separators_of_unicode_do_not_end_a_line(write_lines):
    path = write_lines([json.dumps({**PROMPT, "responses": ["a\u2028b", "c\x85d"]}, ensure_ascii=False)])
    assert next(read_prompts(path))[1]["responses"] == ["a\u2028b", "c\x85d"]


# ---- other forms of a file ----


@pytest.mark.parametrize("form", ["BOM", "gzip", "gzip with BOM"])
def test_a_byte_order_mark_and_gzip_change_nothing(form, tmp_path):
    """Lines are read in any order, and a bad one is named by its own line."""
    texts, cuts = ["a", "\N{GREEK SMALL LETTER ALPHA}"], [False, True]
    lines = [{**PROMPT, "prompt_id": name, "responses": texts, "truncated": cuts} for name in "abc"]
    text = "\n" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + '\n{"prompt": []}\n'
    raw = text.encode("utf-8-sig" if "BOM" in form else "utf-8")
    path = tmp_path / "data"
    path.write_bytes(gzip.compress(raw) if "gzip" in form else raw)
    assert [record for _, record in read_prompts(path, limit=3)] == lines
    found = Indexed(path, check_prompt, limit=3)
    assert [found[name] for name in "cab"] == [lines[2], lines[0], lines[1]] and found.where("c") == f"{path}:4"
    for read in (list, lambda prompts: None):
        with pytest.raises(InputError, match=r"data:5: `prompt` is \[\]"):
            read(read_prompts(path)), Indexed(path, check_prompt)


def test_a_damaged_gzip_file_is_named(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PROMPT).encode() * 100)[:-20])
    for read in (lambda: list(read_prompts(path)), lambda: Indexed(path, check_prompt), lambda: list(read_rows(path))):
        with pytest.raises(InputError, match=r"data\.jsonl\.gz: damaged gzip file"):
            read()


def test_a_pipe_is_refused(tmp_path):
    """It would be read twice: to wait for ever, or to miss what the first reading took."""
    os.mkfifo(tmp_path / "data.jsonl")
    with pytest.raises(InputError, match=r"data\.jsonl: a pipe can be read once only"):
        list(read_prompts(tmp_path / "data.jsonl"))


@pytest.mark.parametrize("form", ["plain", "BOM", "gzip"])
def test_a_json_array_is_named_with_a_command_that_helps(form, tmp_path):
    """The command is run as it is printed; the new file has the array's records."""
    path = tmp_path / "my data.jsonl"
    content = json.dumps([PROMPT, {"prompt": [USER]}], indent=1).encode()
    path.write_bytes({"plain": content, "BOM": codecs.BOM_UTF8 + content, "gzip": gzip.compress(content)}[form])
    with pytest.raises(InputError, match="my data.jsonl:1: expected a JSON object, found a JSON array") as error:
        list(read_prompts(path))
    command = str(error.value).partition("write one object a line: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert [record["responses"] for _, record in read_prompts(tmp_path / "my data.lines.jsonl")] == [
        PROMPT["responses"],
        [],
    ]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"prompt": [{"role": "user", "content": "x"}], "responses": ["a"], "responses": ["b"]}', "responses"),
        ('{"prompt": [{"role": "user", "content": "x", "content": "y"}]}', "content"),
        ('{"prompt": [{"role": "user", "content": "x"}], "meta": {"a": {"n": 1, "n": 1}}}', "n"),
    ],
)
def test_a_repeated_key_is_refused_at_any_depth(line, key, write_lines):
    path = write_lines([PROMPT, line])
    with pytest.raises(InputError, match=f'data.jsonl:2: the key "{key}" appears twice in one object'):
        list(read_prompts(path))


# ---- fields that nobody reads ----

CHOSEN = {"chosen": "Hi.", "rejected": "Go away."}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "field", ["respones", "response", "Responses", "reponses", "response_0", "promptId", "prompt-id"]
)
def test_a_misspelt_field_is_refused(field):
    with pytest.raises(InputError, match=f"here: unknown field `{field}`; write `(responses|prompt_id)`"):
        check_prompt({"prompt": [USER], field: ["Hi.", "Go away."]}, "here")


def test_a_pair_lacks_no_responses():
    assert check_prompt({"prompt": [USER], **CHOSEN, "response": "Hi."}, "here")["responses"] == ["Hi.", "Go away."]


@pytest.mark.parametrize(
    "fields",
    [
        {"rewards": [0.5, 2.0]},
        {"human_scores": [1, 3]},
        {"better_response_id": 1},
        {"isPreferred": "b"},
        {"winner": "model_b"},
        {"label": 1},
        {"rejected_score": 3},
        {"ranks": [2, 1]},
        {"human_ranking": [1, 0]},
    ],
)
def test_a_preference_that_would_be_ignored_is_refused(fields):
    with pytest.raises(InputError, match="here: `.*` seems to say which response is better, and it is not read"):
        check_prompt({**PROMPT, **fields}, "here")


def test_fields_that_users_carry_along_pass_and_are_named():
    carried = {
        "source": "x",
        "topic": "y",
        "label": "greeting",
        "id": 7,
        "tags": ["a", "b"],
        "prompt_length": 3,
        "meta": {"better": 1},
        "rank": [1, 2],
        "scores": [9.5, 9.4],
        "response_lengths": [3, 9],
        "flagged": [False, True],
        "best_of_n": 8,
    }
    record = {**PROMPT, **carried, "prompt": [{**USER, "name": "Ann"}]}
    assert check_prompt(record, "here")["responses"] == PROMPT["responses"]
    assert unread_fields(record) == [*list(carried)[2:], "prompt[].name"]
    assert unread_fields({**PROMPT, "prompt_id": "a"}) == unread_fields({"prompt": [USER], **CHOSEN}) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [USER], **CHOSEN},
        {"prompt": [USER], "chosen": [said("Hi.")], "rejected": [said("Go away.")]},
        {"prompt": [USER], "chosen": [USER, said("Hi.")], "rejected": [USER, said("Go away.")]},
        {"chosen": [USER, said("Hi.")], "rejected": [USER, said("Go away.")]},
        {"prompt": "Hello", "chosen": [USER, said("Hi.")], "rejected": [USER, said("Go away.")]},
        {"prompt": [USER], **CHOSEN, "score_chosen": 9, "score_rejected": 1},
        {"prompt": [USER], "chosen": [{**said("Hi."), "tool_calls": None}], "rejected": "Go away."},
    ],
)
def test_trls_pairs_are_two_given_responses(fields):
    """Explicit and implicit prompts, texts and messages, further columns, nulls that a table makes of missing keys."""
    found = check_prompt(fields, "here")
    assert found["prompt"] == [USER] and found["responses"] == ["Hi.", "Go away."]
    assert found["prompt_id"] == prompt_id([USER]) and not {"chosen", "rejected"} & set(found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": [USER], "chosen": "Hi."}, "`rejected` is missing"),
        ({**PROMPT, **CHOSEN}, "both `responses` and `chosen` are given"),
        ({"prompt": "Hello", **CHOSEN}, '`prompt` is "Hello": should be a valid list; give chat messages'),
        (CHOSEN, "`prompt` is missing; "),
        ({"prompt": [USER], "chosen": [USER], "rejected": "x"}, "the last message of `chosen` is"),
        ({"prompt": [USER], "chosen": 3, "rejected": "x"}, "`chosen` is 3; give a text, or chat messages that end"),
        (
            {"prompt": [USER], "chosen": [said("a"), said("b")], "rejected": "x"},
            "the conversation of `chosen` does not",
        ),
        (
            {"chosen": [USER, said("Hi.")], "rejected": [USER, USER, said("x")]},
            "the conversation of `rejected` does not begin with the prompt",
        ),
        (
            {"prompt": "Bye", "chosen": [USER, said("Hi.")], "rejected": [USER, said("x")]},
            "the conversation of `chosen` does not begin with the prompt",
        ),
    ],
)
def test_pairs_that_could_mean_two_things_are_refused(fields, message):
    with pytest.raises(InputError) as error:
        check_prompt(fields, "here")
    assert str(error.value).startswith("here: ") and message in str(error.value)


# ---- the name of a prompt ----


def test_prompt_id_is_the_hash_of_roles_and_contents():
    """printf '[["system","Be brief."],["user","Größe?"]]' | sha256sum | cut -c1-16"""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe?"}]
    assert prompt_id(messages) == "a85e631511835656"
    assert prompt_id([{"content": "Be brief.", "role": "system", "weight": 1}, messages[1]]) == prompt_id(messages)
    assert prompt_id(messages[1:]) != prompt_id(messages)


def test_roles_and_contents_cannot_be_confused():
    """One message that contains the spelling of two is another prompt than the two."""
    two = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    one = [{"role": "user", "content": 'a"],["user","b'}]
    assert prompt_id(one) != prompt_id(two)


def test_extra_fields_do_not_change_the_name_and_are_kept():
    record = check_candidates({**CANDIDATES, "topic": "greetings"}, "here")
    assert record["prompt_id"] == check_candidates(CANDIDATES, "here")["prompt_id"]
    assert record["topic"] == "greetings"


# ---- records by their names ----


def prompt_of(number: int, text: str = "") -> dict:
    return {"prompt": [{"role": "user", "content": f"größer {number}"}], "prompt_id": f"p{number}", "topic": text}


def test_records_are_read_from_their_places(write_lines):
    """Blank lines and letters of several bytes between them; in the order of the file."""
    path = write_lines([prompt_of(1), "", prompt_of(2, "ß" * 1000), prompt_of(3)])
    found = Indexed(path, check_prompt)
    assert list(found) == ["p1", "p2", "p3"] and len(found) == 3 and "p4" not in found
    assert found["p3"]["prompt"] == prompt_of(3)["prompt"] and found["p2"]["topic"] == "ß" * 1000
    assert found.where("p3") == f"{path}:4" and found["p1"]["responses"] == []
    assert list(Indexed(path, check_prompt, limit=2)) == ["p1", "p2"]


def test_a_repeated_record_is_the_first_one(write_lines):
    path = write_lines([prompt_of(1, "first"), prompt_of(1, "second")])
    found = Indexed(path, check_prompt)
    assert found["p1"]["topic"] == "first" and found.repeated == [(f"{path}:2", "p1")]


def test_one_name_on_two_prompts(write_lines):
    path = write_lines([prompt_of(1), {**prompt_of(2), "prompt_id": "p1"}])
    with pytest.raises(InputError, match=":2: `prompt_id` `p1` names two different prompts; make the ids unique"):
        Indexed(path, check_prompt)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(write_lines):
    """Of 2,000 records of 10 kB the index keeps less than 1 MB."""
    path = write_lines([prompt_of(number, "x" * 10_000) for number in range(2000)])
    tracemalloc.start()
    found = Indexed(path, check_prompt)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 2000 and kept < 1e6
