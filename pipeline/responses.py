"""The rules for the responses to one prompt: which of them stay, and their order by reward."""

from collections.abc import Callable, Hashable, Iterable, Mapping

from pipeline.records import PARALLEL, WITHOUT_NOISE


def distinct(
    prompt_id: str,
    responses: Iterable[dict],
    refused: Callable[[str], list[str]] = lambda text: [],
    spelled: Callable[[str], Hashable] = lambda text: text,
) -> tuple[list[dict], list[dict]]:
    """Drop empty responses and those with refused tokens; of equal ones keep the first.

    Args:
        responses: each has `text`, `source`, and what the caller needs; a `reward` goes into the ledger, too.
        refused: the special tokens for which a response is dropped.
        spelled: responses are equal when this is equal.

    Returns:
        The responses that stay, and ledger lines for the others.
    """
    kept: dict[Hashable, dict] = {}
    ledger = []
    for response in responses:
        text = response["text"]
        facts = {name: response[name] for name in ("source", "reward") if name in response}
        if not text.strip():
            line = {"reason": "empty response", **facts}
        elif tokens := refused(text):
            line = {"reason": "special tokens in a response", **facts, "tokens": tokens, "text": text}
        elif (spelling := spelled(text)) in kept:
            line = {"reason": "duplicate response", **facts, "kept": kept[spelling]["source"], "text": text}
        else:
            kept[spelling] = response
            continue
        ledger.append({"prompt_id": prompt_id, **line})
    return list(kept.values()), ledger


FIELDS = ("text", "source", "tokens", "truncated")  # of a response: entries of the `PARALLEL` lists


def candidates(prompt: dict, kept: list[dict]) -> dict:
    """The candidates record of a prompt and the responses that `distinct` kept, with `tokens` and `truncated`."""
    lists = {name: [response[field] for response in kept] for name, field in zip(PARALLEL, FIELDS, strict=True)}
    return {"prompt_id": prompt["prompt_id"], "prompt": prompt["prompt"], **lists}


def responses_of(record: Mapping) -> list[dict]:
    """The responses of a candidates record: what `candidates` made it of."""
    entries = zip(*(record[name] for name in PARALLEL), strict=True)
    return [dict(zip(FIELDS, entry, strict=True)) for entry in entries]


def rank(record: dict, rewards: list[float]) -> dict:
    """The record with `rewards`, its parallel lists sorted by reward, best first; ties keep their order."""
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    ranked = {name: [record[name][index] for index in order] for name in (*PARALLEL, WITHOUT_NOISE) if name in record}
    return {**record, **ranked, "rewards": [rewards[index] for index in order]}
