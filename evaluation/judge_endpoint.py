"""A judge on another server that speaks OpenAI's protocol: vLLM, llama.cpp, a provider.

The server is `judge.endpoint`, its model `models.judge.path`. A key is read from JUDGE_API_KEY and from nothing else,
because a recipe names the server that gets it. The client waits and asks again where a server is busy or lost. A server
that refuses `response_format` is asked without it, one that refuses `max_tokens` with `max_completion_tokens`.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from hps.errors import InputError
from pipeline.recipe import Recipe

KEY = "JUDGE_API_KEY"
RETRIES = 8  # of a request, after waits that double up to 8 seconds, or as long as the server says
SECONDS = 600  # for one answer
TOO_LONG = ("context_length_exceeded", "maximum context length", "context size")  # of OpenAI, vLLM, llama.cpp
REFUSED = (400, 422)  # of a setting that the server does not take; 422: servers made with FastAPI
FORMAT, LENGTH = "response_format", "max_tokens"
SETTINGS = (
    f"`{FORMAT}` is left out and `{LENGTH}` renamed only where the answer names them; change what else it names "
    "(`judge.temperature`, `judge.max_new_tokens`), or choose another server or model"
)
OF_FORMAT = (FORMAT, "json_schema", "json schema")  # words of a refusal of the format


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
        LENGTH: recipe.judge.max_new_tokens,
        FORMAT: form,
    }
    server = _Server(client, settings)
    first, *others = requests.items()
    with client, ThreadPoolExecutor(recipe.judge.requests) as pool:
        yield _ask(server, *first)  # alone: it shows what the server takes
        futures = [pool.submit(_ask, server, *request) for request in others]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class _Server:
    """A client and the settings that its server takes; other settings replace them whole, for all threads."""

    client: Any
    settings: dict


def _others(settings: dict, said: str) -> dict | None:
    """What to send instead of settings of which the server refused one; None: it refused something else."""
    if FORMAT in settings and any(words in said.lower() for words in OF_FORMAT):
        return {name: value for name, value in settings.items() if name != FORMAT}  # the rubric asks for JSON, too
    if LENGTH in settings and LENGTH in said:
        return {"max_completion_tokens" if name == LENGTH else name: value for name, value in settings.items()}
    return None


def _ask(server: _Server, key: str, messages: list[dict]) -> dict:
    """One request; a thread's work."""
    import openai

    client, settings = server.client, server.settings
    try:
        answer = client.chat.completions.create(messages=messages, **settings)
    except openai.APIConnectionError as error:
        problem = f"the judge's server cannot be reached ({_said(error.__cause__ or error)})"
        raise InputError(problem, where=str(client.base_url), remedy="start it, or correct `judge.endpoint`") from None
    except openai.APIStatusError as error:
        whole = f"{error.message} {error.body}"
        # The client's message has the server's words only where they are in OpenAI's form.
        said = _said(error.message if " - " in error.message or not error.body else whole)
        if any(words in whole for words in TOO_LONG):
            return {"key": key, "too_long": said}
        if error.status_code in REFUSED and (others := _others(settings, whole)):
            print(f"judge: asking with {', '.join(others)} only, because the server answered: {said}")
            server.settings = others
            return _ask(server, key, messages)
        problem = f"the judge's server answered {error.status_code} ({said})"
        remedies = {401: f"set {KEY}", 403: f"set {KEY}", 404: "correct `models.judge.path` or `judge.endpoint`"}
        remedies |= dict.fromkeys(REFUSED, f"it got {', '.join(settings)}: {SETTINGS}")
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
