"""A judge on another server that speaks OpenAI's protocol: vLLM, llama.cpp, a provider.

The server is `judge.endpoint`, its model `models.judge.path`. A key is read from JUDGE_API_KEY and from nothing else,
because a recipe names the server that gets it. The client waits and asks again where a server is busy or lost.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from hps.errors import InputError
from pipeline.recipe import Recipe

KEY = "JUDGE_API_KEY"
RETRIES = 8  # of a request, after waits that double up to 8 seconds, or as long as the server says
SECONDS = 600  # for one answer
TOO_LONG = ("context_length_exceeded", "maximum context length", "context size")  # of OpenAI, vLLM, llama.cpp


def ask(recipe: Recipe, requests: Mapping[str, list[dict]], schema: dict) -> Iterator[dict]:
    """Yield `key` and `samples` (one, with `text` and `truncated`) of each request, as they come; or `key` and
    `too_long`, what the server says of a request that is too long for it.

    Args:
        requests: chat messages by key.
        schema: JSON schema that every answer must follow.

    Raises:
        InputError: the server refuses the key or the request, has no such model, or cannot be reached.
    """
    from openai import OpenAI

    endpoint = recipe.judge.endpoint
    client = OpenAI(base_url=endpoint, api_key=os.environ.get(KEY) or "none", max_retries=RETRIES, timeout=SECONDS)
    client.organization = client.project = None  # it takes OpenAI's own from the environment
    form = {"type": "json_schema", "json_schema": {"name": "scores", "schema": schema, "strict": True}}
    settings = {
        "model": recipe.models.judge.path,
        "temperature": recipe.judge.temperature,
        "max_tokens": recipe.judge.max_new_tokens,
        "response_format": form,
    }
    with client, ThreadPoolExecutor(recipe.judge.requests) as pool:
        futures = [pool.submit(_ask, client, settings, *request) for request in requests.items()]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _ask(client: Any, settings: dict, key: str, messages: list[dict]) -> dict:
    """One request; a thread's work."""
    import openai

    try:
        answer = client.chat.completions.create(messages=messages, **settings)
    except openai.APIConnectionError as error:
        problem = f"the judge's server cannot be reached ({_said(error.__cause__ or error)})"
        raise InputError(problem, where=str(client.base_url), remedy="start it, or correct `judge.endpoint`") from None
    except openai.APIStatusError as error:
        if any(words in f"{error.code} {error.message}" for words in TOO_LONG):
            return {"key": key, "too_long": _said(error)}
        problem = f"the judge's server answered {error.status_code} ({_said(error)})"
        remedies = {401: f"set {KEY}", 403: f"set {KEY}", 404: "correct `models.judge.path` or `judge.endpoint`"}
        remedy = remedies.get(error.status_code, "what was judged is kept: the same command continues")
        raise InputError(problem, where=str(client.base_url), remedy=remedy) from None
    except (openai.APIError, ValueError) as error:
        raise _foreign(_said(error), client) from None
    if not getattr(answer, "choices", None):
        raise _foreign(_said(answer), client)
    choice = answer.choices[0]
    sample = {"text": choice.message.content or "", "truncated": choice.finish_reason == "length"}
    return {"key": key, "samples": [sample]}


def _foreign(said: str, client: Any) -> InputError:
    problem = f"what answers there does not speak OpenAI's protocol ({said})"
    return InputError(problem, where=str(client.base_url), remedy="correct `judge.endpoint`; most end with /v1")


def _said(message: object) -> str:
    return " ".join(str(message).split())[:200]
