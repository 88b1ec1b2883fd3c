"""Files that survive a kill at any byte: whole ones, those that grow by lines, and the results of a stage."""

import errno
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hps.errors import InputError
from pipeline.files import Appender, Results, done_ids, value_hash, whole_folder, write_atomic, write_json
from pipeline.records import read_jsonl

text = st.text(max_size=20)


@settings(max_examples=50, deadline=None)  # every record waits for the disk
@given(st.lists(st.dictionaries(text, text | st.lists(text, max_size=3), max_size=4), max_size=4))
def test_records_of_any_strings_round_trip(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("round-trip") / "data.jsonl"
    with Appender(path) as appender:
        for record in records:
            appender.append(record)
    assert [record for _, record in read_jsonl(path)] == records


def test_a_kill_at_any_byte_of_the_last_line_keeps_the_complete_ones(tmp_path):
    """Every cut of the last of three lines, multi-byte characters included; what is appended then is whole."""
    path = tmp_path / "data.jsonl"
    records = [{"prompt_id": name, "text": "Größe\u2028 🙂"} for name in "abc"]
    with Appender(path) as appender:
        for record in records:
            appender.append(record)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for size in range(last, len(whole)):
        path.write_bytes(whole[:size])
        Appender(path).close()
        assert path.read_bytes() == whole[:last], size
    with Appender(path) as appender:
        appender.append(records[2])
    assert path.read_bytes() == whole


def test_a_partial_line_longer_than_a_block_is_cut(tmp_path):
    """The end is searched in blocks of 65536 bytes: partial lines around one and two blocks, with and without a
    complete line in front."""
    path = tmp_path / "data.jsonl"
    for head in (b"", b'{"a": 1}\n'):
        for size in (65535, 65536, 65537, 131072, 140000):
            path.write_bytes(head + b"x" * size)
            Appender(path).close()
            assert path.read_bytes() == head


def test_nothing_is_cut_from_complete_and_new_files(tmp_path):
    path = tmp_path / "new" / "data.jsonl"
    Appender(path).close()
    assert path.read_bytes() == b""
    path.write_bytes(b"{}\n")
    Appender(path).close()
    assert path.read_bytes() == b"{}\n"


def test_garbage_in_the_middle_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt_id": "a"}\n{"prompt_i\n{"prompt_id": "b"}\n{"pro')
    Appender(path).close()
    with pytest.raises(InputError, match=r"data\.jsonl:2: broken JSON"):
        done_ids(path)


def test_numbers_that_are_no_json_are_not_written(tmp_path):
    with Appender(tmp_path / "data.jsonl") as appender, pytest.raises(ValueError, match="not JSON compliant"):
        appender.append({"reward": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", {"reward": float("inf")})
    assert (tmp_path / "data.jsonl").read_bytes() == b""
    assert not (tmp_path / "value.json").exists()


def test_done_ids(write_lines, tmp_path):
    path = write_lines([{"prompt_id": "a"}, {"prompt_id": "b"}, {"prompt_id": "a"}])
    assert done_ids(path) == {"a", "b"}
    assert done_ids(tmp_path / "none.jsonl") == set()
    with pytest.raises(InputError, match="line.jsonl:1: `prompt_id` is missing"):
        done_ids(write_lines([{"other": "line"}], "line.jsonl"))


def test_results_go_on_where_they_were_stopped(tmp_path):
    """`a` has a record, `b` is refused. A kill left a ledger line of `c` and half its record: `c` is done again,
    and that line goes."""
    path, ledger = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "ledger.jsonl"
    dropped = {"prompt_id": "a", "reason": "empty response"}
    repeated = {"prompt_id": "c", "reason": "repeated prompt", "place": "prompts.jsonl:9"}
    with Results(path, ledger, [repeated]) as results:
        results.add({"prompt_id": "a"}, [dropped])
        results.refuse("b", "prompt too long", tokens=7)
        assert results.done == {"a", "b"}
    with ledger.open("a") as file:
        file.write('{"prompt_id": "c", "reason": "empty response"}\n{"prompt_id": "c", "rea')
    with path.open("a") as file:
        file.write('{"prompt_id": "c"}')  # whole but for its newline
    with Results(path, ledger, [repeated]) as results:
        assert results.done == {"a", "b"}
        results.add({"prompt_id": "c"})
        assert results.done == {"a", "b", "c"}
    assert [line for _, line in read_jsonl(path)] == [{"prompt_id": "a"}, {"prompt_id": "c"}]
    refused = {"prompt_id": "b", "reason": "prompt too long", "refused": True, "tokens": 7}
    assert [line for _, line in read_jsonl(ledger)] == [repeated, dropped, refused]


def test_a_folder_appears_whole(tmp_path):
    """An error in the block leaves the old folder; what a kill left beside it is removed by the next start."""
    target = tmp_path / "model"
    with whole_folder(target) as partial:
        (partial / "weights").write_text("old")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), whole_folder(target) as partial:
        (partial / "weights").write_text("new")
        1 / 0  # noqa: B018
    assert (target / "weights").read_text() == "old" and list(tmp_path.iterdir()) == [target]
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "left").write_text("")
    with whole_folder(target):
        pass
    assert list(target.iterdir()) == [] and list(tmp_path.iterdir()) == [target]


def test_the_hash_of_a_value_does_not_depend_on_its_spelling():
    """printf '{"a":1,"b":"\303\244"}' | sha256sum"""
    assert value_hash({"b": "ä", "a": 1}) == value_hash(json.loads('{"a": 1, "b": "\\u00e4"}'))
    assert value_hash({"b": "ä", "a": 1}) == "f5300ffcfd6fd3fc2de46d700be90d43fd799cd9eb69da4737201006143d48a1"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("fault", [lambda *_: 1 / 0, lambda *_: os.kill(os.getpid(), 9)], ids=["error", "SIGKILL"])
def test_write_atomic_leaves_the_old_file_when_the_writer_dies(tmp_path, step, fault):
    """A child process dies when the text goes to the disk, or when all of it is there."""
    path = tmp_path / "value.txt"
    write_atomic(path, "old")
    child = os.fork()
    if child == 0:
        setattr(os, step, fault)
        try:
            write_atomic(path, "new")
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status != 0
    assert path.read_text() == "old"
    write_atomic(path, "new")
    assert path.read_text() == "new"


def test_a_failed_write_says_where(tmp_path, monkeypatch):
    """As on a full disk, where the error of the system names no file; the file before stays, nothing else is left."""
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as raised:
        write_json(path, {"a": 2})
    assert raised.value.filename == str(path)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]
