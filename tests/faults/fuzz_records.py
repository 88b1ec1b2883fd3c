"""Read damaged record files with every public reader: clear errors only, never a traceback, never a valid line lost.

Run     .venv-train/bin/python -m tests.faults.fuzz_records --files 50000 --seed 0

Each file is valid at first (prompts, candidates, ranked, answers, ledger, the judge's verdicts, the released code's
ranked files as lines or as one list, and what training and evaluation write: plan rows, log, held-out pairs, scores,
divergence), then one to three damages are done to it: to its bytes, to its lines, or to the fields of a record. File N
of a seed is always the same: `--first N --files 1` makes it again.

A file is at fault, and the exit status 1, for

- another exception than InputError, in reading or in what follows it (writing the record, planning, importing,
  indexing, taking means, re-opening with Appender), or a message that does not begin with file and refused line;
- a valid line that is lost: not given before the error, changed, or refused in the file although it is valid alone;
- a line that the damage has made invalid for certain, and that is read: another role, a blank content, an answer as the
  last turn, unsorted rewards, one response, a field of a type that it cannot have, ...;
- a file that was read and that the next stage refuses, but for the reasons of KNOWN, which are counted.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from annotation.import_data import convert, ranked_by
from annotation.layouts import check_row
from evaluation.judge import CRITERIA, GRID, check_verdict, read_verdicts
from evaluation.margins import margins, read_columns
from evaluation.metrics import answer_figures, change_figures
from hps.chat import load_tokenizer
from hps.errors import InputError
from hps.planning import Plan, weights_of
from hps.records import PlanRow
from hps.settings import Loss, Schedule
from pipeline.files import Appender, done_ids
from pipeline.recipe import REPOSITORY, Recipe
from pipeline.records import (
    Check,
    Indexed,
    Lines,
    check_prompt,
    read_answers,
    read_candidates,
    read_jsonl,
    read_ledger,
    read_prompts,
    read_ranked,
    read_rows,
)
from pipeline.run_records import (
    SETS,
    Pair,
    check_divergence,
    check_log_line,
    check_pair,
    check_plan_row,
    check_scores,
)
from report.run_pictures import PANELS, series

Reader = Callable[[Path], Iterable[tuple[str, dict]]]
WORDS = (
    *("tea", "Größe", "a b", "x\r\ny", "\ttab", 'say "no"', "back\\slash", "\\ud800 spelled out", "{[", "]}", "NaN"),
    *("🙂", "👩‍👩‍👧‍👦", "🇩🇪", "שלום", "مرحبا", "\u202eabc\u202c", "漢字", "e\u0301", "\U0010ffff"),
    *("\u2028", "\u2029", "\x85", "\x00", "\ufeff"),
)
EXTRAS = (None, True, 0, -1, 1e308, 5e-324, 10**300, -(10**4000), "", "🙂", [], {}, [[["deep"]]], {"a": {"b": [1]}})
WRONG = (None, True, 7, -1.5, "text", [], {}, [None], [7], [[]], {"role": "user"}, "", [""])
# What a field cannot be; a list is as long as the record has responses.
NO_LIST = (None, True, 7, "text", {})
TWICE = [{"step": 1, "policy": [0.0, 0.0], "kl": [0.0]}] * 2
MIXED = [{"score": 1.0, "objectives_mean": 1.0}, {"score": 1.0}]
NO_WHOLE = (None, True, -1, 1.5, "1", [], {})
IMPOSSIBLE = {
    "prompt": (None, True, 7, "text", {}, [], [None], [7], [[]], [{"role": "user"}], [{"content": "text"}]),
    "responses": (*NO_LIST, [None], [7], [["text"]], ["text", 7]),
    "sources": (True, 7, "text", {}, [None], [7]),
    "token_counts": (*NO_LIST, [-1], [1.5], ["1"], [True], [None], [10**400]),
    "truncated": (*NO_LIST, [0], [1], ["false"], [None]),
    "rewards": (*NO_LIST, ["1"], [True], [None], [1e39], [[1.0]]),
    "prompt_id": (True, 7, "", [], {}),
    "reason": (None, True, 7, [], {}),
    "key": (None, True, 7, [], {}),
    "scores": (*NO_LIST, [], {"correctness": 5}, dict.fromkeys(CRITERIA, 0.25), dict.fromkeys(CRITERIA, True)),
    **dict.fromkeys(("step", "epoch", "preferred", "dispreferred_count"), NO_WHOLE),
    "dispreferred": (*NO_LIST, [], [None], [-1], [1.5], ["1"]),
    "weights": (True, 7, "text", {}, [None], ["1"], [1e39]),
    "gamma": (True, "text", [], {}, 1e39),
    "loss": (True, "text", "NaN", [], {}, 10**400),
    "set": (None, True, 7, "", "text", [], {}),
    **dict.fromkeys(("tokens", "log_ratio", "policy", "reference"), (*NO_LIST, [], [None, 1], ["1", "2"], [1e39, 0])),
    "kl": (*NO_LIST, [], [None], ["1"], [1e39]),
    "along": (None, True, 7, "text", {}, [None], [{"step": 1}], [{"step": 1, "policy": [0.0], "kl": 0.0}], TWICE),
    "answers": (
        *NO_LIST,
        [None],
        [7],
        [{}],
        [{"score": None}],
        [{"score": "1"}],
        [{"score": True}],
        MIXED,
        MIXED[::-1],
    ),
    "given": (*NO_LIST, [None], [7], [{}], [{"score": 1e39}]),
    **dict.fromkeys(("before", "after"), (None, True, 7, [], {})),
}
# What the next stage may say of a file that was read: `prompt_id`s are a matter of the whole file.
KNOWN = re.compile(r"names two different prompts|no prompt can be trained on|was measured at the steps")


@dataclass(frozen=True)
class Format:
    """How a valid record is made, its reader, the fields that it cannot be without, and what uses what was read."""

    make: Callable[[random.Random, int], dict]
    read: Reader
    required: tuple[str, ...]
    follow: Callable[[Path, list[tuple[str, dict]]], None]
    listed: bool = False


@dataclass
class Damaged:
    """A file's lines (rows of a list), and what is known of them: `good` are valid, `bad` are not."""

    lines: list[bytes]
    good: set[bytes]
    bad: set[bytes] = field(default_factory=set)
    done: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What became of the files; `faults` are `(file number, format, kind, description)`."""

    files: Counter = field(default_factory=Counter)
    whole: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    records: Counter = field(default_factory=Counter)
    messages: Counter = field(default_factory=Counter)
    known: Counter = field(default_factory=Counter)
    damages: Counter = field(default_factory=Counter)
    faults: list[tuple[int, str, str, str]] = field(default_factory=list)


# ---- valid records ----


def text_of(rng: random.Random) -> str:
    """A text that is not blank."""
    return "w" + " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))


def prompt_of(rng: random.Random, number: int) -> dict:
    """A prompts record; the number makes it another one than its neighbours."""
    roles = rng.choice((["user"], ["system", "user"], ["user", "assistant", "user"]))
    messages = [{"role": role, "content": f"{text_of(rng)} {number}"} for role in roles]
    record: dict = {"prompt": messages}
    if rng.random() < 0.5:
        record["responses"] = [text_of(rng) for _ in range(rng.randint(0, 3))]
    if rng.random() < 0.5:
        record["prompt_id"] = f"{text_of(rng)} {number}"
    if rng.random() < 0.3:
        record["topic"] = rng.choice(EXTRAS)
    return record


def answers_of(rng: random.Random, number: int) -> dict:
    count = rng.randint(1, 4)
    return {
        **prompt_of(rng, number),
        "responses": [text_of(rng) for _ in range(count)],
        "token_counts": [rng.choice((0, 1, 9, 2048)) for _ in range(count)],
        "truncated": [rng.random() < 0.2 for _ in range(count)],
    }


def candidates_of(rng: random.Random, number: int) -> dict:
    record = answers_of(rng, number)
    return {**record, "sources": [rng.choice(("given_1", "generated")) for _ in record["responses"]]}


def ranked_of(rng: random.Random, number: int) -> dict:
    record = candidates_of(rng, number)
    if len(record["responses"]) < 2:
        parallel = ("responses", "token_counts", "truncated", "sources")
        record |= {name: record[name] * 2 for name in parallel}
    values = (rng.choice((rng.gauss(0, 3), 0, -0.0, 2, 1e30, -1e30, 5e-324)) for _ in record["responses"])
    return {**record, "rewards": sorted(values, reverse=True)}


def ledger_of(rng: random.Random, number: int) -> dict:
    facts = {"refused": True} if rng.random() < 0.5 else {"source": "generated", "text": text_of(rng)}
    return {"prompt_id": f"{text_of(rng)} {number}", "reason": "empty response", **facts}


def verdict_of(rng: random.Random, number: int) -> dict:
    """A verdict of the judge, or what became of it."""
    if rng.random() < 0.3:
        return {"key": f"{number:064x}", "error": "no scores in the output", "output": text_of(rng)}
    return {"key": f"{number:064x}", "scores": {name: rng.choice(GRID) for name in CRITERIA}}


def plan_row_of(rng: random.Random, number: int) -> dict:
    """A row of a plan: with weights, of a list (none), or with the second term of Appendix E."""

    def term(preferred: int) -> dict:
        drawn = rng.sample(range(preferred + 1, preferred + 9), rng.randint(1, 4))
        weights = None if rng.random() < 0.3 else [1 / len(drawn)] * len(drawn)
        rewards = [rng.gauss(0, 3) for _ in range(len(drawn) + 1)]
        facts = {"preferred": preferred, "dispreferred": drawn, "weights": weights, "rewards": rewards}
        return facts | {"dispreferred_count": 8}

    row = {
        "step": number,
        "epoch": 0,
        "gamma": rng.choice((None, -5.0, 0, 2.5)),
        "prompt_id": f"{text_of(rng)} {number}",
    }
    return row | term(0) | ({"second": term(1)} if rng.random() < 0.3 else {})


def log_of(rng: random.Random, number: int) -> dict:
    names = ("gamma", "rewards/chosen", "rewards/accuracies", "logps/rejected", "lengths/chosen", "num_tokens")
    names += ("s/chosen", "s/rejected", "s_per_token/chosen", "s_per_token/rejected")
    figures = {name: rng.choice((rng.gauss(0, 3), 0, "nan", "-inf", None)) for name in names if rng.random() < 0.8}
    return {"step": number + 1, "loss": rng.random(), **figures}


def pair_of(rng: random.Random, number: int) -> dict:
    """A held-out pair, with what was measured along the training: at the same steps for all."""

    def moved() -> dict:
        return {"policy": [-rng.random(), -100.0 * rng.random()], "kl": [rng.random()]}

    return {
        "set": rng.choice(SETS),
        "prompt": prompt_of(rng, number)["prompt"],
        "prompt_id": f"{text_of(rng)} {number}",
        "responses": [text_of(rng), text_of(rng)],
        "truncated": [False, rng.random() < 0.5],
        "tokens": [rng.randint(1, 99), rng.randint(1, 99)],
        "reference": [-1.0, -2.5],
        **moved(),
        "along": [{"step": step, **moved()} for step in (2, 4)],
    }


def scores_of(rng: random.Random, number: int) -> dict:
    def scored(count: int) -> list[dict]:
        values = (rng.choice((rng.gauss(0, 3), 0, -1e30)) for _ in range(count))
        return [{"score": value, **({"objectives_mean": rng.random()} if several else {})} for value in values]

    several = rng.random() < 0.3  # objectives, of ArmoRM

    return {
        "prompt_id": f"{text_of(rng)} {number}",
        "answers": scored(rng.randint(1, 5)),
        "given": scored(rng.randint(0, 2)),
    }


def divergence_of(rng: random.Random, number: int) -> dict:
    count = rng.randint(1, 5)
    ratios = {name: [rng.gauss(0, 1) for _ in range(count)] for name in ("kl", "log_ratio")}
    return {"prompt_id": f"{text_of(rng)} {number}", **ratios, "tokens": [rng.randint(0, 99) for _ in range(count)]}


def released_of(rng: random.Random, number: int) -> dict:
    """A row of the released code's files: chat messages or one of the two templates, rewards in any order."""
    record = ranked_of(rng, number)
    chosen = {name: record[name] for name in ("prompt", "responses", "rewards")}
    rng.shuffle(chosen["rewards"])
    if rng.random() < 0.5:
        chosen["sources"] = record["sources"]
    forms = {
        "<|im_start|>{role}\n{content}<|im_end|>\n": "<|im_start|>assistant\n",
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>": "",
    }
    if rng.random() < 0.7:
        form, ending = rng.choice(list(forms.items()))
        turns = (
            form.replace("{role}", turn["role"]).replace("{content}", turn["content"]) for turn in record["prompt"]
        )
        chosen["prompt"] = "".join(turns) + ending
    return chosen


# ---- readers, and what follows them ----


def released(path: Path) -> Iterator[tuple[str, dict]]:
    """The import's reading: rows, each checked; the row as the file has it is what is given."""
    for where, row in read_rows(path):
        check_row(row, where)
        yield where, row


def checked(check: Check) -> Reader:
    """The reading of lines that have no reader of their own."""
    return lambda path: read_jsonl(path, check)


def index(path: Path, read: list[tuple[str, dict]]) -> None:
    """Every record by its name is the one of the stream; a repeated name is refused or counted."""
    first = {}
    for _, record in read:
        first.setdefault(record["prompt_id"], record)
    try:
        found = Indexed(path, check_prompt)
    except InputError as error:
        repeated = any(record["prompt"] != first[record["prompt_id"]]["prompt"] for _, record in read)
        assert repeated, f"Indexed refuses the file of a stream: {error}"
        raise
    assert list(found) == list(first), "Indexed has other names than the stream"
    assert all(found[name] == record for name, record in first.items()), "Indexed gives another record"
    assert len(found) + len(found.repeated) == len(read), "Indexed does not count what is repeated"


def plan(_: Path, read: list[tuple[str, dict]]) -> None:
    """Both schedules' plans of the ranked records, with every number that enters them finite.

    Only where all rewards tie, or all responses are one, there is none.
    """
    for settings in ({"standardize_rewards": False}, {"standardize_rewards": True}):
        schedule = Schedule(epochs=1, global_batch=2, **settings)
        recipe = Recipe.model_construct(output="nowhere", loss=Loss(estimator="exact"), schedule=schedule)
        try:
            made = Plan({record["prompt_id"]: record for _, record in read}, recipe.loss, recipe.schedule, recipe.seed)
        except InputError as error:
            assert all(_without_preference(record) for _, record in read), f"no plan: {error}"
            raise
        json.dumps([list(made.rows()), made.facts()], allow_nan=False)


def _without_preference(record: dict) -> bool:
    texts = {(text.strip(), cut) for text, cut in zip(record["responses"], record["truncated"], strict=True)}
    return record["rewards"][0] == record["rewards"][-1] or len(texts) == 1


def summed(_: Path, read: list[tuple[str, dict]]) -> None:
    """What the summaries do with the lists of a record."""
    for _, record in read:
        assert sum(record["token_counts"]) >= 0 <= sum(record["truncated"]), "negative counts"
        lists = [record[name] for name in ("responses", "token_counts", "truncated")]
        assert len(set(map(len, lists))) == 1, "lists of unequal length"


def names(path: Path, read: list[tuple[str, dict]]) -> None:
    assert done_ids(path) == {record["prompt_id"] for _, record in read}, "done_ids has other names than the stream"


def cached(path: Path, read: list[tuple[str, dict]]) -> None:
    """The judge's reader, which cuts off a last line without its end, has every other line, the last of a key."""
    whole = path.read_bytes()
    lines = [line for _, line in read][: sum(1 for raw in whole.split(b"\n")[:-1] if raw.strip())]
    assert read_verdicts(path) == {line["key"]: line for line in lines}, "read_verdicts has other verdicts"


@cache
def embedded_tokenizer():
    return load_tokenizer(str(REPOSITORY / "models" / "smollm2-135m-instruct"))


def imported(path: Path, read: list[tuple[str, dict]]) -> None:
    """The import writes only what the reader of ranked files reads, and counts every row."""
    counts, ledger = Counter(), []
    ranked = list(convert(read_rows(path), ranked_by(embedded_tokenizer()), counts, ledger))
    assert counts["read"] == len(read) == counts["written"] + counts["rejected"], f"the import counts {counts}"
    copy = path.with_suffix(".ranked")
    copy.write_text("".join(json.dumps(line) + "\n" for line in ranked), encoding="utf-8")
    assert sum(1 for _ in read_ranked(copy)) == counts["written"], "the import's own file has other rows"
    copy.write_text("".join(json.dumps(line) + "\n" for line in ledger), encoding="utf-8")
    assert sum(1 for _ in read_jsonl(copy)) >= counts["rejected"], "the import's ledger lacks rows"


def trained(path: Path, read: list[tuple[str, dict]]) -> None:
    """The rows by their place are those of the stream; of each term the weights belong to the drawn."""
    rows = Lines(path, check_plan_row)
    assert list(rows) == [row for _, row in read], "Lines has other rows than the stream"
    for row in rows:
        for term in (row, row.get("second", row)):
            members = [term["preferred"], *term["dispreferred"]]
            assert all(map(math.isfinite, weights_of(term, members))), "a weight is not finite"


def drawn(_: Path, read: list[tuple[str, dict]]) -> None:
    """What the curves do with the log: steps and numbers of every panel."""
    lines = [line for _, line in read]
    for _, names in PANELS:
        for name in names:
            steps, values = series(lines, name)
            assert len(steps) == len(values) <= len(lines), "steps without values"


def measured(path: Path, read: list[tuple[str, dict]]) -> None:
    """Figures of every set, at each step and at the end; pairs that were measured at other steps are refused."""
    steps: dict[str, list] = defaultdict(list)
    for _, pair in read:
        steps[pair["set"]].append([kept["step"] for kept in pair.get("along", [])])
    try:
        sets = read_columns(read)
    except InputError as error:
        assert any(each != found[0] for found in steps.values() for each in found), f"no figures: {error}"
        raise
    for pairs in sets.values():
        for step in (*pairs.steps, None):
            assert len(margins(pairs, step)["rm_dpo"]) == len(pairs), "a pair has no margin"


def scored(_: Path, read: list[tuple[str, dict]]) -> None:
    """Figures of answers with these scores."""
    for _, line in read:
        if count := len(line["answers"]):
            texts = {"responses": ["a b"] * count, "token_counts": [2] * count, "truncated": [False] * count}
            json.dumps(answer_figures(texts, line["answers"]), allow_nan=False)


def moved(_: Path, read: list[tuple[str, dict]]) -> None:
    """What training changed for a prompt, with these divergences."""
    still = dict.fromkeys(("reward_best", "reward_mean", "tokens_mean"), 0.0)
    for _, line in read:
        json.dumps(change_figures(still, still, line), allow_nan=False)


PARALLEL = ("prompt", "responses", "token_counts", "truncated")
RELEASED = ("prompt", "responses", "rewards")
FORMATS = {
    "prompts": Format(prompt_of, read_prompts, ("prompt",), index),
    "candidates": Format(candidates_of, read_candidates, (*PARALLEL, "sources"), summed),
    "ranked": Format(ranked_of, read_ranked, (*PARALLEL, "sources", "rewards"), plan),
    "answers": Format(answers_of, read_answers, PARALLEL, summed),
    "ledger": Format(ledger_of, read_ledger, ("prompt_id", "reason"), names),
    "verdicts": Format(verdict_of, checked(check_verdict), ("key",), cached),
    "plan rows": Format(plan_row_of, checked(check_plan_row), tuple(sorted(PlanRow.__required_keys__)), trained),
    "log": Format(log_of, checked(check_log_line), ("step",), drawn),
    "pairs": Format(pair_of, checked(check_pair), tuple(sorted(Pair.__required_keys__)), measured),
    "scores": Format(scores_of, checked(check_scores), ("prompt_id", "answers", "given"), scored),
    "divergence": Format(divergence_of, checked(check_divergence), ("prompt_id", "kl", "log_ratio", "tokens"), moved),
    "released lines": Format(released_of, released, RELEASED, imported),
    "released list": Format(released_of, released, RELEASED, imported, listed=True),
}


# ---- damage ----


def dump(rng: random.Random, record: dict) -> bytes:
    return json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8")


def flip(rng: random.Random, line: bytes) -> bytes:
    changed = bytearray(line)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def inserted(*values: bytes) -> Callable[[random.Random, bytes], bytes]:
    def insert(rng: random.Random, line: bytes) -> bytes:
        place = rng.randint(0, len(line))
        return line[:place] + rng.choice(values) + line[place:]

    return insert


def nested(rng: random.Random, line: bytes) -> bytes:
    """An extra field, nested up to and beyond what Python's stack holds; the depths around its limit more often."""
    depth = rng.choice((2, 50, 20_000, rng.randint(850, 1000), rng.randint(960, 1000)))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inner = opening * depth + (b"" if opening == b"[" else b"1") + closing * depth
    return line.rstrip()[:-1] + b', "' + rng.choice((b"topic", b"prompt", b"responses")) + b'": ' + inner + b"}"


def huge(rng: random.Random, line: bytes) -> bytes:
    """A number in the line becomes a huge one."""
    places = [match.span() for match in re.finditer(rb"(?<![\w.\\])-?\d+(\.\d+)?(?![\w.])", line)]
    start, end = rng.choice(places or [(len(line) - 1, len(line) - 1)])
    return line[:start] + rng.choice((b"9" * 400, b"1e400", b"-1e400", b"9" * 5000, b"1e308", b"1e39")) + line[end:]


BYTES = {
    "bit flips": flip,
    "cut at a byte": lambda rng, line: line[: rng.randrange(len(line))],
    "garbage": inserted(b"\x01\x02garbage", b'"', b"}{", b",", b"]", b"\\", b"\\u12", b"\n", b"\r", b"\x0b", b" "),
    "NUL": inserted(b"\x00", b"\x00" * 4096),
    "deep nesting": nested,
    "BOM": lambda _, line: b"\xef\xbb\xbf" + line,  # not counted as text where a line begins
    "huge number": huge,
}
SURELY_BAD = {
    "not UTF-8": inserted(b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", "ß".encode("latin-1") + b" "),
    "UTF-16": lambda _, line: line.decode("utf-8").encode("utf-16"),
}
SURELY_GOOD = {
    "CRLF": lambda _, line: line + b"\r",
    "white space": lambda _, line: b" \t" + line + b"  ",
}


def missing(rng: random.Random, record: dict, form: Format) -> bool:
    del record[rng.choice(form.required)]
    return False


def impossible(rng: random.Random, record: dict, form: Format) -> bool | None:
    """One of the fields that the format knows, of a type that it cannot have."""
    known = [name for name in record if name in IMPOSSIBLE]
    name = rng.choice([*known, "prompt_id"] if "prompt" in record else known)
    value = rng.choice(IMPOSSIBLE[name])
    parallel = name in ("sources", "token_counts", "truncated", "rewards")
    if parallel and isinstance(value, list) and value:
        value = value * len(record.get("responses", record[name]))
    record[name] = value
    return False


def messages_of(record: dict) -> list[dict] | None:
    """The chat messages of a record; a row of the release may have a string."""
    return record["prompt"] if isinstance(record.get("prompt"), list) else None


def bad_role(rng: random.Random, record: dict, _: Format) -> bool | None:
    messages = messages_of(record)
    if messages is None:
        return None
    message = rng.choice(messages)
    if rng.random() < 0.2:
        del message["role"]
    else:
        message["role"] = rng.choice(("tool", "", "User", None, 7, [], {}))
    return False


def blank_content(rng: random.Random, record: dict, _: Format) -> bool | None:
    messages = messages_of(record)
    if messages is None:
        return None
    rng.choice(messages)["content"] = rng.choice(("", "  \n", "\u2003", None, 7, [], [{"type": "text", "text": "a"}]))
    return False


def answer_last(rng: random.Random, record: dict, _: Format) -> bool | None:
    messages = messages_of(record)
    if messages is None:
        return None
    messages.append({"role": rng.choice(("assistant", "system")), "content": text_of(rng)})
    return False


def unsorted(rng: random.Random, record: dict, form: Format) -> bool | None:
    """Only the release's rows may have them."""
    if "rewards" not in form.required or "sources" not in form.required:
        return None
    record["rewards"] = sorted((rng.random() + number for number, _ in enumerate(record["rewards"])))
    return False


def one_response(rng: random.Random, record: dict, form: Format) -> bool | None:
    """Of a ranking, which needs two; of answers none. The import drops such rows by itself."""
    ranked = "rewards" in form.required and "sources" in form.required
    answers = "truncated" in form.required and "sources" not in form.required
    if not ranked and not answers:
        return None
    for name in form.required:
        if name != "prompt":
            record[name] = record[name][:1] if ranked else []
    return False


def wrong_type(rng: random.Random, record: dict, form: Format) -> bool | None:
    record[rng.choice(list(record))] = rng.choice(WRONG)
    return None


def extra(rng: random.Random, record: dict, _: Format) -> bool:
    record["extra field 🙂"] = rng.choice(EXTRAS)
    return True


def not_finite(rng: random.Random, record: dict, form: Format) -> bool | None:
    """NaN or an infinity for a reward, in an extra field, or in one of a message."""
    value = rng.choice((float("nan"), float("inf"), float("-inf")))
    place = rng.choice(("rewards", "topic", "prompt"))
    if place == "rewards" and "rewards" in form.required:
        record["rewards"] = [value, *record["rewards"][1:]]
        return False
    if place == "prompt" and isinstance(record.get("prompt"), list):
        record["prompt"][0]["weight"] = value
    else:
        record["topic"] = [value]
    return None


def unequal(rng: random.Random, record: dict, form: Format) -> bool | None:
    lists = [name for name in form.required if name != "prompt" and isinstance(record.get(name), list)]
    if len(lists) < 2 or "given" in form.required:  # answers and given responses are counted apart
        return None
    name = rng.choice(lists)
    record[name] = record[name][:-1] if rng.random() < 0.5 else record[name] * 2
    return False


def other_text(rng: random.Random, record: dict, form: Format) -> bool:
    """Emoji, right-to-left text, line separators in a text."""
    if "responses" not in form.required:
        record["reason" if "reason" in form.required else "remark"] = "🙂 שלום"
    else:
        count = next(len(record[name]) for name in ("rewards", "truncated") if name in record)
        record["responses"] = ["👩‍👩‍👧‍👦\u2028\u202eabc " + text_of(rng) for _ in range(count)]
    return True


def half_character(rng: random.Random, record: dict, form: Format) -> bool:
    half = rng.choice(("\ud800", "x\udfff", "\ud83d \ude42"))
    place = rng.choice(("key", "extra", "text"))
    if place == "text" and isinstance(record.get("responses"), list) and record["responses"]:
        record["responses"] = [half, *record["responses"][1:]]
    elif place == "key":
        record[half] = 1
    else:
        record["topic"] = {"deep": [half]}
    return False


FIELDS = {
    "missing field": missing,
    "wrong type": wrong_type,
    "impossible type": impossible,
    "bad role": bad_role,
    "blank content": blank_content,
    "answer last": answer_last,
    "unsorted rewards": unsorted,
    "one response": one_response,
    "extra field": extra,
    "NaN or Infinity": not_finite,
    "unequal lengths": unequal,
    "emoji and right-to-left": other_text,
    "half a character": half_character,
}
LINES = ("line doubled", "lines swapped", "blank line")
# Impossible types more often: they are many, fields times values.
DAMAGES = (*BYTES, *SURELY_BAD, *SURELY_GOOD, *FIELDS, *LINES, "none", *["impossible type"] * 4)


def damage(rng: random.Random, form: Format, name: str, file: Damaged) -> None:
    """Do one damage to one of the lines; one that is damaged already is changed in its bytes only."""
    file.done.append(name)
    place = rng.randrange(len(file.lines))
    line = file.lines[place]
    if name in BYTES and line:
        file.lines[place] = BYTES[name](rng, line)
    elif name in SURELY_BAD and line in file.good:
        file.lines[place] = SURELY_BAD[name](rng, line)
        file.bad.add(file.lines[place])
    elif name in SURELY_GOOD:
        file.lines[place] = SURELY_GOOD[name](rng, line)
    elif name in FIELDS and line in file.good:
        record = json.loads(line)
        valid = FIELDS[name](rng, record, form)
        # A half character has no other spelling than an escape.
        file.lines[place] = json.dumps(record).encode() if name == "half a character" else dump(rng, record)
        if valid is not None:
            (file.good if valid else file.bad).add(file.lines[place])
    elif name == "line doubled":
        file.lines.insert(rng.randint(0, len(file.lines)), line)
    elif name == "lines swapped":
        rng.shuffle(file.lines)
    elif name == "blank line":
        file.lines.insert(place, rng.choice((b"", b"  ", b"\r")))


def make_file(rng: random.Random, form: Format) -> tuple[bytes, Damaged]:
    """The bytes of a damaged file of 1 to 6 records."""
    lines = [dump(rng, form.make(rng, number)) for number in range(rng.randint(1, 6))]
    file = Damaged(lines, set(lines))
    for name in rng.choices(DAMAGES, k=rng.choice((1, 1, 1, 2, 3))):
        damage(rng, form, name, file)
    if form.listed:
        return b"[" + rng.choice((b",", b",\n", b"\n , \n")).join(file.lines) + b"\n]" + rng.choice((b"", b"\n")), file
    ending = rng.choice((b"\n", b"\n", b""))
    return b"\n".join(file.lines) + ending, file


# ---- judgement ----


def own_value(line: bytes) -> object:
    """A line by Python's own reader, or None; an object with a key twice has no value."""

    def once(pairs: list[tuple[str, object]]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        return None


def bare(line: bytes) -> bytes:
    """A line without the white space of JSON around it."""
    return line.strip(b" \t\r\n")


def known(lines: set[bytes]) -> set[bytes]:
    return set(map(bare, lines))


def expected_of(data: bytes, file: Damaged, form: Format) -> tuple[list[tuple[int, bytes]], str]:
    """Number and bytes of every line (row of a list), and a pattern of what an error has between path and number."""
    if not form.listed:
        return [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()], ":"
    rows = own_value(data)
    # So many brackets are nested: whether the whole or a row is refused depends on the stack.
    if not isinstance(rows, list) or data.count(b"[") + data.count(b"{") > 800:
        return [], ":"
    by_value = {json.dumps(own_value(line)): line for line in file.lines}
    return [(n, by_value.get(json.dumps(row), b"")) for n, row in enumerate(rows, 1)], r":\d+: row "


def run_reader(read: Reader, path: Path) -> tuple[list[tuple[str, dict]], str | None, str | None]:
    """What a reader gave, its clear error, and any other exception."""
    found: list[tuple[str, dict]] = []
    try:
        for pair in read(path):
            found.append(pair)
    except InputError as error:
        return found, str(error), None
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return found, None, f"{type(error).__name__}: {error}"
    return found, None, None


def judge(form: Format, path: Path, data: bytes, file: Damaged) -> tuple[int, str | None, list[tuple[str, str]]]:
    """Read one file: number of records, the clear error, and the faults as `(kind, description)`."""
    path.write_bytes(data)
    found, message, exception = run_reader(form.read, path)
    if exception:
        return len(found), None, [("exception", exception)]
    lines, mark = expected_of(data, file, form)
    faults = list(lost(path, lines, mark, found, message, file))
    if message and lines and len(found) < len(lines) and not lines[len(found)][1].startswith(b"\xef\xbb\xbf"):
        faults += alone(form, path, lines[len(found)][1], message)
    if not form.listed:
        faults += reopened(path, data)
        path.write_bytes(data)
    if not message and found:
        faults += followed(form, path, found)
    return len(found), message, faults


def lost(
    path: Path, lines: list, mark: str, found: list, message: str | None, file: Damaged
) -> Iterator[tuple[str, str]]:
    """Lines that should have been given and were not, were changed, or should have been refused."""
    good, bad = known(file.good), known(file.bad)
    for (where, record), (number, line) in zip(found, lines, strict=False):
        own = own_value(line) if line else {}
        if not re.fullmatch(f"{re.escape(str(path))}{mark}{number}(: row \\d+)?", where):
            yield "lost", f"{where} instead of line {number}"
        elif not isinstance(own, dict) or not holds(record, own):
            yield "lost", f"line {number} was changed"
        elif bare(line) in bad - good:
            yield "accepted", f"line {number}, which is broken, was read"
    if not message:
        if len(found) != len(lines):
            yield "lost", f"{len(lines)} lines, {len(found)} records and no error"
        return
    number, line = lines[len(found)] if len(found) < len(lines) else (0, b"")
    if lines and not re.match(f"{re.escape(str(path))}{mark}{number}: ", message):
        yield "message", f"the error should name {number}: {message}"
    elif not re.match(re.escape(str(path)) + r":\d+: ", message):
        yield "message", f"no line in the error: {message}"
    if bare(line) in good:
        yield "lost", f"line {number} is valid and was refused: {message}"


def holds(record: dict, own: dict) -> bool:
    """Whether a record has the line's fields, unchanged; a `prompt_id` that was null is filled in."""
    fields = [name for name in own if name != "prompt_id" or own[name] is not None]
    return json.dumps({name: record.get(name) for name in fields}) == json.dumps({name: own[name] for name in fields})


def alone(form: Format, path: Path, line: bytes, message: str) -> Iterator[tuple[str, str]]:
    """A line that is refused in a file must be refused in a file of its own."""
    if form.listed:
        return
    single = path.with_suffix(".single")
    single.write_bytes(line + b"\n")
    found, error, exception = run_reader(form.read, single)
    if found or not error:
        yield "lost", f"valid on its own, refused in the file: {message} {exception or ''}"


def reopened(path: Path, data: bytes) -> Iterator[tuple[str, str]]:
    """Appender keeps every whole line, drops what stands behind the last newline, and goes on."""
    with Appender(path) as appender:
        appender.append({"prompt_id": "last"})
    if path.read_bytes() != data[: data.rfind(b"\n") + 1] + b'{"prompt_id": "last"}\n':
        yield "lost", "Appender changed whole lines"


def followed(form: Format, path: Path, found: list[tuple[str, dict]]) -> Iterator[tuple[str, str]]:
    """What was read can be written again, and the next stage takes it; `known` refusals are told as such."""
    try:
        if form.read is not released:  # of its rows the import writes a part, see `imported`
            json.dumps([record for _, record in found], ensure_ascii=False, allow_nan=False).encode("utf-8")
        form.follow(path, found)
    except InputError as error:
        yield ("known", str(error)) if KNOWN.search(str(error)) else ("lost", f"the next stage refuses it: {error}")
    except AssertionError as error:
        yield "lost", str(error)
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        yield "exception", f"after reading: {type(error).__name__}: {error}"


def kind_of(message: str, path: Path) -> str:
    """An error message without its place, values and remedy."""
    text = re.sub(re.escape(str(path)) + r"(:\d+)?(: row \d+)?: ", "", message)
    text = re.sub(r"\d+", "#", re.split(r" is | has |;| \(|, found", text + ";")[0])
    return "half a character" if text.startswith("'") else text


def fuzz(files: int, seed: int, folder: Path, formats: dict[str, Format] = FORMATS, first: int = 0) -> Report:
    """Make, damage and read files; the first one at fault is kept as `<folder>/offending.jsonl`."""
    report, path, titles = Report(), folder / "data.jsonl", list(formats)
    for number in range(first, first + files):
        rng = random.Random(f"{seed}/{number}")
        title = titles[number % len(titles)]
        data, file = make_file(rng, formats[title])
        read, message, faults = judge(formats[title], path, data, file)
        report.files[title] += 1
        report.records[title] += read
        report.known.update(kind_of(text, path) for kind, text in faults if kind == "known")
        faults = [(kind, text) for kind, text in faults if kind != "known"]
        report.damages.update(set(file.done))
        if message:
            report.refused[title] += 1
            report.messages[kind_of(message, path)] += 1
        elif not any(kind == "exception" for kind, _ in faults):
            report.whole[title] += 1
        if faults and not report.faults:
            (folder / "offending.jsonl").write_bytes(data)
        report.faults += [(number, title, kind, f"{text[:300]} ({', '.join(file.done)})") for kind, text in faults]
    return report


def print_report(report: Report) -> None:
    """The tables: formats, kinds of messages, damages."""
    counters = (report.files, report.records, report.whole, report.refused)
    faults = [
        Counter(title for _, title, kind, _ in report.faults if kind == wanted)
        for wanted in ("exception", "lost", "accepted", "message")
    ]
    heads = ("files", "records", "read whole", "clear error", "exceptions", "valid lost", "broken read", "no place")
    print(f"{'format':16}" + "".join(f"{head:>12}" for head in heads))
    for title in report.files:
        print(f"{title:16}" + "".join(f"{counter[title]:12}" for counter in (*counters, *faults)))
    print(f"{'all':16}" + "".join(f"{counter.total():12}" for counter in (*counters, *faults)))
    print("\nclear errors by kind")
    for kind, count in report.messages.most_common():
        print(f"{count:8}  {kind}")
    print(f"\n{report.known.total()} files that were read and are refused by the next stage, for known reasons")
    for kind, count in report.known.most_common():
        print(f"{count:8}  {kind}")
    print("\nfiles by damage")
    for name, count in report.damages.most_common():
        print(f"{count:8}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    report = fuzz(options.files, options.seed, folder, first=options.first)
    print_report(report)
    if not report.faults:
        shutil.rmtree(folder)
        return
    print(f"\n{len(report.faults)} faults; the first file is kept: {folder / 'offending.jsonl'}")
    for number, title, kind, text in report.faults[:20]:
        print(f"--seed {options.seed} --first {number} --files 1: {title}: {kind}: {text}")
    sys.exit(1)


if __name__ == "__main__":
    main()
