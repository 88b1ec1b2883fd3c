"""What a data set's rows would train, row by row: counts, and findings with severity, first row and remedy.

`hps.inspect_data` is the command. docs/inspector.md says which report each finding comes from.
"""

import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

from hps.chat import (
    FOREIGN,
    assistant_header,
    control_ids,
    end_of_turn_ids,
    prompt_token_ids,
    special_tokens_in,
)
from hps.errors import InputError, printable, shorten, without_values
from hps.planning import equal_to
from hps.preferences import LABELLED, SCORE_COLUMNS, TOKEN_COLUMNS, Row
from hps.records import COLUMNS, NOT_TEXT

TOKENS = tuple(chain(*TOKEN_COLUMNS, *LABELLED))
CUT = 0.05  # share of cut answers that is worth a line
LONGER = 0.15  # so far from a half is the share of pairs whose preferred answer is longer, before it is worth a line
ERRORS = 3  # standard errors of a fair coin that this must be, too
CAUSES = 5  # of unreadable rows, each with a finding of its own
PROBE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 times 4?"}]

FAULT, WARNING = "fault", "warning"
# name: severity, what a row has; remedy
# fmt: off
CHECKS = {
    "unreadable": (FAULT, "cannot be read",
        "correct the rows, or take them out"),
    "unreadable otherwise": (FAULT, "cannot be read for other reasons",
        "correct the rows above first"),
    "bos repeated": (FAULT, "more BOS in front than the template writes",
        "take it out of the texts, or tokenise them with `add_special_tokens=False`"),
    "bos missing": (FAULT, "no BOS in front, and the template writes one",
        "give messages; in texts write it where the tokenizer does not put it in front"),
    "bos inside": (FAULT, "a BOS in the trained span",
        "take it out of the answers: one that was templated by itself begins with it"),
    "header trained": (FAULT, "a turn is opened in the trained span",
        "let answers begin behind the assistant's header, and end with their turn"),
    "header missing": (WARNING, "no assistant's header in front of the answers",
        "give messages, so that training and evaluation ask alike"),
    "foreign template": (FAULT, "turns of another template, as text",
        "give messages, so that the model's own template is applied"),
    "special tokens": (WARNING, "texts spell special tokens, which trainers that tokenise a text make real",
        "take them out of the texts; here they become ordinary text"),
    "no end": (FAULT, "nothing ends an answer, so the model does not learn to stop",
        "append the end-of-turn token, and do not mask it"),
    "ends repeated": (WARNING, "several ends of the turn behind an answer",
        "append one; a trainer that looks for it at the very end of a text does not see it in front of a line end"),
    "padding trained": (FAULT, "padding in the trained span",
        "label it -100, and cut it before sequences are joined"),
    "prompts differ": (FAULT, "the two answers follow different prompts",
        "give both sides one prompt"),
    "no room": (FAULT, "the prompt fills --max-length, so nothing of an answer is left",
        "raise the limit, or take the rows out"),
    "empty": (FAULT, "an answer without words: it has no tokens, or nothing but white space and its end",
        "take the rows out"),
    "equal": (FAULT, "preferred and dispreferred are the same tokens, which gives no gradient",
        "take the rows out"),
    "equal when cut": (FAULT, "the answers are the same tokens once they are cut",
        "raise --max-length"),
    "equal text": (WARNING, "the answers are one text, white space aside, so this trainer leaves the row out",
        "take the rows out"),
    "preferred twice": (WARNING, "the text of the preferred answer is there again, and is not compared with it",
        "take it out of the lists"),
    "reversed": (FAULT, "the rejected answer has the higher score",
        "look which column is which"),
    "tie": (WARNING, "all scores are equal: no preference",
        "take the rows out"),
    "repeated": (WARNING, "the same row came before",
        "keep one, unless it shall count twice"),
    "not read": (FAULT, "a column that changes the prompt and is not read here, which this trainer refuses",
        "take it out if the prompts are right without it"),
    "unscored": (FAULT, "no scores, beside rows that have them, which this trainer refuses",
        "give all rows scores, or take them out of all"),
    "named twice": (FAULT, "the `prompt_id` came before, which this trainer refuses",
        "give each row its own, or take the column out"),
    "contradiction": (WARNING, "the same answers came before in another order",
        "keep one of the orders"),
}
# fmt: on


@dataclass
class Finding:
    """One line: what, in how many rows, and where first and last."""

    severity: str
    what: str
    remedy: str
    count: int = 0
    first: str = ""
    last: str = ""

    def line(self, rows: int) -> str:
        where = f"{self.count} of {rows} rows: " if self.first else ""
        first = f" (first: {self.first})" if self.first else ""
        return printable(f"{self.severity}: {where}{self.what}{first}; {self.remedy}")


class Findings(dict[str, Finding]):
    """Findings by name, in the order in which they came."""

    def add(self, name: str, where: str) -> None:
        """A row with a fault of `CHECKS`; both of its answers may have it."""
        found = self.setdefault(name, Finding(*CHECKS[name]))
        found.count += found.last != where
        found.first, found.last = found.first or where, where

    def say(self, name: str, severity: str, what: str, remedy: str) -> None:
        """A finding of the whole data set."""
        self[name] = Finding(severity, what, remedy)

    @property
    def faults(self) -> bool:
        return any(found.severity == FAULT for found in self.values())


class Template:
    """What a tokenizer's chat template writes around texts, to be looked for in ids that were made elsewhere."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.bos, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        self.ends = end_of_turn_ids(tokenizer)
        self.silent = control_ids(tokenizer) | self.ends | {self.pad}
        self.control = control_ids(tokenizer) - self.ends
        probe = prompt_token_ids(tokenizer, PROBE[1:])
        self.leading = self.run(probe)
        self.adds_bos = self.run(tokenizer(PROBE[1]["content"])["input_ids"]) > 0
        self.header = tokenizer.decode(assistant_header(tokenizer)).strip()
        self.text = tokenizer.decode(probe)
        self.foreign = [mark for mark in FOREIGN if mark not in self.text]

    def run(self, ids: list[int]) -> int:
        """BOS tokens in front."""
        return next((place for place, token in enumerate(ids) if token != self.bos), len(ids))

    def says(self, answer: list[int]) -> bool:
        """Whether an answer has anything beside white space and control tokens, its end among them."""
        return bool(self.tokenizer.decode([token for token in answer if token not in self.silent]).strip())

    def opens(self, prompt: list[int]) -> bool:
        """Whether the last turn of the prompt is the assistant's."""
        _, header, behind = self.tokenizer.decode(prompt).rpartition(self.header)
        return bool(header) and not special_tokens_in(self.tokenizer, behind)

    def mark(self, texts: tuple[str, ...]) -> str | None:
        """The first mark of another template in the texts."""
        return next((mark for mark in self.foreign if any(mark in text for text in texts)), None)


@dataclass
class Inspection:
    """All rows of a data set, one after the other; their figures and findings.

    Args:
        limit: tokens of prompt and answer.
        shown: the row whose ids are kept.
        probes: rows to keep for the first step.
    """

    template: Template
    limit: int
    shown: int = 0
    probes: int = 0
    findings: Findings = field(default_factory=Findings)
    row: Row | None = None
    kept: list[Row] = field(default_factory=list)
    rows: int = 0
    cut: int = 0
    by_text: int = 0
    scored: int = 0
    kinds: Counter = field(default_factory=Counter)
    leading: Counter = field(default_factory=Counter)
    ends: Counter = field(default_factory=Counter)
    unread: dict[str, None] = field(default_factory=dict)
    headers: int = 0
    answers: int = 0
    lengths: dict[str, array] = field(default_factory=lambda: {n: array("q") for n in ("prompt", "best", "others")})
    _pairs: dict[bytes, bytes] = field(default_factory=dict)
    _causes: dict[str, str] = field(default_factory=dict)
    _names: set[bytes] = field(default_factory=set)
    _set: int = 0
    _order: Any = field(default_factory=hashlib.sha256)

    def add(self, row: Row, record: Mapping[str, Any]) -> None:
        """Look at a row, and at the columns of its record that nothing reads."""
        if self.rows == self.shown:
            self.row = row
        self.rows += 1
        self.kinds[row.kind] += 1
        self._prompt(row)
        for place, answer in enumerate(row.responses):
            self._answer(row, answer, bool(row.truncated) and row.truncated[place])
        self._texts(row)
        self._preference(row)
        self._identity(row)
        self._columns(row, record)
        if len(self.kept) < self.probes and 0 < len(row.prompt) < self.limit and all(row.responses):
            self.kept.append(row)

    def refuse(self, error: InputError, where: str) -> None:
        """A row that cannot be read: a finding for each of the first causes, and one for all others."""
        self.rows += 1
        cause, number = without_values(str(error)), len(self._causes) + 1
        if cause not in self._causes and number <= CAUSES:
            self._causes[cause] = f"unreadable {number}" if number > 1 else "unreadable"
        name = self._causes.get(cause, "unreadable otherwise")
        check = CHECKS.get(name, CHECKS["unreadable"])
        found = self.findings.setdefault(name, Finding(*check, first=str(error)))
        found.count, found.last = found.count + 1, where

    def _prompt(self, row: Row) -> None:
        template, run = self.template, self.template.run(row.prompt)
        self.leading[run] += 1
        opens = template.opens(row.prompt)
        self.headers += opens
        if run > template.leading:
            self.findings.add("bos repeated", row.where)
        elif run < template.leading and (opens or template.adds_bos):
            # Otherwise only the template writes it (SmolLM2 opens turns with it), and the header's finding says so.
            self.findings.add("bos missing", row.where)
        if not opens:
            self.findings.add("header missing", row.where)
        if not row.same_prompt:
            self.findings.add("prompts differ", row.where)
        self.by_text += row.by_text is not None and row.by_text != row.prompt

    def _answer(self, row: Row, answer: list[int], truncated: bool) -> None:
        template, room = self.template, self.limit - len(row.prompt)
        self.answers += 1
        self.cut += len(answer) > room
        if not template.says(answer):
            self.findings.add("empty", row.where)
        if not answer:
            return
        ends = sum(token in template.ends for token in answer)
        # Where a token both ends and pads, one may stand behind the template's own end.
        pads = max(0, ends - 2) if template.pad in template.ends else answer.count(template.pad)
        self.ends[ends] += 1
        if pads:
            self.findings.add("padding trained", row.where)
        elif not ends and not truncated:
            self.findings.add("no end", row.where)
        inside = set(answer) & template.control - {template.pad}
        if template.bos in inside:
            self.findings.add("bos inside", row.where)
        if inside - {template.bos}:
            self.findings.add("header trained", row.where)
        elif ends > 1:
            self.findings.add("ends repeated", row.where)

    def _texts(self, row: Row) -> None:
        if mark := self.template.mark(row.texts):
            self.findings.add("foreign template", f"{row.where}, `{mark.strip()}`")
        if row.kind == "messages" and any(special_tokens_in(self.template.tokenizer, text) for text in row.texts):
            self.findings.add("special tokens", row.where)

    def _preference(self, row: Row) -> None:
        best, others = row.responses[row.best], [ids for at, ids in enumerate(row.responses) if at != row.best]
        room, alike = self.limit - len(row.prompt), _alike(row)
        if room <= 0:
            self.findings.add("no room", row.where)
        if all(ids == best for ids in others):
            self.findings.add("equal", row.where)
        elif alike == len(row.responses):
            self.findings.add("equal text", row.where)
        elif alike > 1:
            self.findings.add("preferred twice", row.where)
        elif room > 0 and all(ids[:room] == best[:room] for ids in others):
            self.findings.add("equal when cut", row.where)
        self.lengths["prompt"].append(len(row.prompt))
        self.lengths["best"].append(len(best) * len(others))
        self.lengths["others"].append(sum(map(len, others)))
        if row.rewards:
            self.scored += 1
            if min(row.rewards) == max(row.rewards):
                self.findings.add("tie", row.where)
            elif row.rewards[row.best] < max(row.rewards):
                self.findings.add("reversed", row.where)
        elif row.kind != "token ids":
            self.findings.add("unscored", row.where)  # `judge` takes it back if no row has scores

    def _columns(self, row: Row, record: Mapping[str, Any]) -> None:
        read = TOKENS if row.kind == "token ids" else COLUMNS
        self.unread |= dict.fromkeys(name for name in record if name not in (*read, *SCORE_COLUMNS))
        if row.kind == "token ids":  # made of everything that its trainer reads
            return
        if changing := [f"`{name}`" for name in NOT_TEXT if record.get(name)]:
            self.findings.add("not read", f"{row.where}, {', '.join(changing)}")
        if (name := record.get("prompt_id")) is not None:
            known = len(self._names)
            self._names.add(_hash(str(name)))
            if len(self._names) == known:
                self.findings.add("named twice", f"{row.where}, {shorten(name)}")

    def _identity(self, row: Row) -> None:
        """Hashes of rows: the set is a sum, so it does not depend on the order."""
        best, others = row.responses[row.best], [ids for at, ids in enumerate(row.responses) if at != row.best]
        # What is ranked alike has no order: groups of the others by falling reward.
        ranks = row.rewards or [-min(place, 1) if row.alike else -place for place in range(len(row.responses))]
        order = sorted(
            (-rank, ids) for at, (rank, ids) in enumerate(zip(ranks, row.responses, strict=True)) if at != row.best
        )
        groups = [[ids for _, ids in group] for _, group in groupby(order, key=lambda each: each[0])]
        name, way = _hash([row.prompt, sorted(row.responses)]), _hash([best, groups])
        known = len(self._pairs)
        if self._pairs.setdefault(name, way) != way:
            self.findings.add("contradiction", row.where)
        elif len(self._pairs) == known:
            self.findings.add("repeated", row.where)
        digest = _hash([row.prompt, best, others])
        self._set = (self._set + int.from_bytes(digest, "big")) % 2**256
        self._order.update(digest)

    def figures(self) -> dict:
        """What was counted, and hashes of the data and its order."""
        count = max(1, sum(self.kinds.values()))
        longer = sum(a > b for a, b in zip(self.lengths["best"], self.lengths["others"], strict=True))
        shorter = sum(a < b for a, b in zip(self.lengths["best"], self.lengths["others"], strict=True))
        return {
            "rows": self.rows,
            "kinds": dict(self.kinds),
            "answers": self.answers,
            "rows_with_scores": self.scored,
            "bos_in_front": dict(sorted(self.leading.items())),
            "bos_of_the_template": self.template.leading,
            "ends_of_an_answer": dict(sorted(self.ends.items())),
            "prompts_with_the_header": self.headers,
            "prompts_that_differ_by_text": self.by_text,
            "prompt_tokens": round(sum(self.lengths["prompt"]) / count, 1),
            "preferred_longer": longer,
            "preferred_shorter": shorter,
            "cut_answers": self.cut,
            "columns_not_read": list(self.unread),
            "data": f"{self._set:064x}"[:16],
            "order": self._order.hexdigest()[:16],
        }

    def judge(self) -> None:
        """Findings that only the whole data set shows."""
        if not self.scored:
            self.findings.pop("unscored", None)
        found = self.figures()
        if self.cut > CUT * max(1, self.answers):
            what = f"{self.cut} of {self.answers} answers are longer than --max-length {self.limit} and lose their end"
            self.findings.say("cut", WARNING, what, "raise the limit")
        longer, shorter = found["preferred_longer"], found["preferred_shorter"]
        compared = longer + shorter
        share = longer / compared if compared else 0.5
        if abs(share - 0.5) > max(LONGER, ERRORS * 0.5 / math.sqrt(max(1, compared))):
            what = f"the preferred answer is the longer one in {longer} of {compared} rows: length predicts preference"
            remedy = "compare answers of like length, or use a loss that takes the length out (SimPO, R-DPO)"
            self.findings.say("length", WARNING, what, remedy)


def _alike(row: Row) -> int:
    """How many answers are the preferred one, as the plan has it; of token ids, what has its tokens."""
    if not row.texts:
        return row.responses.count(row.responses[row.best])
    count = len(row.responses)
    found: Any = {"responses": row.texts[:count], "truncated": row.truncated}
    return len(equal_to(found, row.best))


def _hash(value: object) -> bytes:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).digest()


def template_hash(tokenizer: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of the chat template."""
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()[:16]
