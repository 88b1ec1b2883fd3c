"""The plan's rows as token ids, as the trainer takes them."""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hps.chat import prompt_token_ids, response_token_ids
from hps.errors import InputError, naming, shorten
from hps.planning import weights_of
from hps.records import PlanRow, Ranked


class PlanRows(Sequence[dict]):
    """The plan's rows as token ids, in training order. A row is made each time it is read.

    Args:
        plan: rows of `hps.planning.Plan`.
        ranked: the ranked prompts by `prompt_id`.
        limit: tokens of prompt and response together; what is longer is cut.
        where: the place of a prompt, by its id, for messages.
        where_row: the same of a row of the plan, by its index.

    Raises:
        InputError: a prompt leaves no room for a response within the limit, or a response is empty.
    """

    def __init__(
        self,
        plan: Sequence[PlanRow],
        ranked: Mapping[str, Ranked],
        tokenizer: Any,
        limit: int,
        where: Callable[[str], str] = "prompt {}".format,
        where_row: Callable[[int], str] = "row {} of the plan".format,
    ):
        self.plan, self.ranked, self._tokenizer, self._limit = plan, ranked, tokenizer, limit
        self._where, self._where_row = where, where_row

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict:  # ty: ignore[incompatible-method-override] (no slices)
        row = self.plan[index]
        record = self.ranked[row["prompt_id"]]
        terms = [row, row["second"]] if "second" in row else [row]
        # y_1, with Appendix E y_2, then the terms' other responses by reward: each response passes the model once.
        first = [term["preferred"] for term in terms]
        members = [*first, *sorted({index for term in terms for index in term["dispreferred"]} - set(first))]
        with naming(self._where(row["prompt_id"])):
            prompt, responses = self._tokens(record, members)
        room = self._limit - len(prompt)
        ids = [ids[:room] for ids in responses]
        rewards = dict(zip([row["preferred"], *row["dispreferred"]], row["rewards"], strict=True))
        return {
            "row": index,
            "prompt_ids": prompt,
            "response_ids": ids,
            "rewards": [rewards.get(index, 0.0) for index in members],
            "weights": [weights_of(term, members) for term in terms],
            "dispreferred_count": [term["dispreferred_count"] for term in terms],
            "cut": sum(len(response) > room for response in responses),
            "equal": ids[0] in ids[1:],
            "gamma": row["gamma"] or 0.0,
        }

    def places(self, rows: Iterable[int]) -> str:
        """Rows of the plan for a message: the place of each, its prompt, and where that is."""
        named = [(self._where_row(row), self.plan[row]["prompt_id"]) for row in rows]
        return ", ".join(f"{place} (prompt `{name}`, {self._where(name)})" for place, name in named)

    def _tokens(self, record: Ranked, members: list[int]) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt, and of its responses before they are cut."""
        prompt = prompt_token_ids(self._tokenizer, record["prompt"])
        if len(prompt) >= self._limit:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, `schedule.max_length` is {self._limit}: no room is left for a "
                "response",
                remedy="raise it, or take the prompt out",
            )
        texts, truncated = record["responses"], record["truncated"]
        if empty := [index for index in members if not texts[index].strip()]:
            problem = f"`responses[{empty[0]}]` is {shorten(texts[empty[0]])}"
            raise InputError(problem, remedy="take empty responses out of the data")
        responses = [
            response_token_ids(self._tokenizer, record["prompt"], texts[index], truncated[index]) for index in members
        ]
        return prompt, responses


class CheckedRows(PlanRows):
    """The plan's rows, each made once at the start, so that a bad one is found before a model loads.

    `cut` counts the responses that the limit shortens. `equal` counts the rows in which a dispreferred response has the
    same tokens as the preferred one, because of that cut or of the tokenizer. `hash` is of all their token ids.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cut = self.equal = 0
        ids = hashlib.sha256()
        for row in self:
            self.cut += row["cut"]
            self.equal += row["equal"]
            for part in (row["prompt_ids"], *row["response_ids"]):
                ids.update(array("q", [len(part), *part]))
        self.hash = ids.hexdigest()
