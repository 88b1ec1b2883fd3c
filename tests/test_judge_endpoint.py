"""evaluation/judge_endpoint.py against a server on this machine that speaks the protocol, by the real client."""

import json
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_judge import PROMPTS, SAME, lines_of, overrides_of, write_answers

from evaluation import judge as stage
from evaluation import judge_endpoint
from evaluation.judge import CRITERIA, GRID, judge_message
from hps.errors import InputError
from pipeline.preflight import roles_of
from pipeline.recipe import load_recipe
from tools.pin import roles

pytestmark = pytest.mark.infer  # the client comes with vLLM

WANTED = 2 * PROMPTS - SAME
SECRETS = {"OPENAI_API_KEY": "sk-theirs", "OPENAI_ADMIN_KEY": "ad-theirs", "OPENAI_ORG_ID": "org-theirs"}


class Server(ThreadingHTTPServer):
    """Answers `POST /v1/chat/completions` with scores that depend on the request; first with the given failures."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.asked: list[tuple[dict, dict]] = []
        self.failures: list[tuple[int, dict]] = []  # status and body of the next answers
        self.after = 0  # answers before the failures
        self.content = None  # instead of scores
        self.page = None  # instead of JSON
        self.refused: dict[str, tuple[int, dict]] = {}  # status and body where a request has this setting
        self.at_once = self.most = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.at_once += 1
            server.most = max(server.most, server.at_once)
            number = len(server.asked)
            server.asked.append(({name.lower(): value for name, value in self.headers.items()}, body))
            failed = server.failures.pop(0) if number >= server.after and server.failures else None
        time.sleep(0.02)
        with server.lock:
            server.at_once -= 1
        failed = failed or next((answer for name, answer in server.refused.items() if name in body), None)
        if self.path != "/v1/chat/completions":
            failed = (404, {"error": {"message": "no such path"}})
        status, answer = failed or (200, self.scores(body))
        text = json.dumps(answer).encode() if server.page is None else server.page
        with suppress(BrokenPipeError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if server.page is None else "text/html")
            self.send_header("Content-Length", str(len(text)))
            self.send_header("Retry-After", "0.01")
            self.end_headers()
            self.wfile.write(text)

    def scores(self, body: dict) -> dict:
        answer = body["messages"][0]["content"]
        scores = {name: GRID[(len(answer) + place) % len(GRID)] for place, name in enumerate(CRITERIA)}
        content = json.dumps(scores) if self.server.content is None else self.server.content[0]
        finish = "stop" if self.server.content is None else self.server.content[1]
        message = {"role": "assistant", "content": content}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        }

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JUDGE_API_KEY", "ours")
    for name in ("sample", "load_tokenizer", "check_gpus", "check_model", "announce_device"):
        monkeypatch.setattr(stage, name, lambda *_, **__: pytest.fail("no model is loaded here"))
    found = Server()
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture
def recipe_with(tiny_recipe, server):
    def load(*further: str):
        own = ["models.judge.path=judge-of-theirs", f"judge.endpoint={server.url}", *further]
        recipe = load_recipe(tiny_recipe, [*overrides_of("x"), *own])
        if not Path(recipe.tested().output).exists():
            write_answers(recipe)
        return recipe

    return load


def refusal(message: str, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}


def test_every_answer_is_judged_once_and_the_server_learns_no_more(recipe_with, server):
    recipe = recipe_with("run=secret-run", "judge.requests=3", "judge.temperature=0.5")
    stage.judge(recipe)
    lines = {line["key"]: line for line in lines_of(recipe)}
    wanted = stage.wanted_verdicts(recipe)
    assert lines.keys() == wanted.keys() and len(lines) == WANTED == len(server.asked)
    expected = Counter(json.dumps(judge_message(*texts)) for texts in wanted.values())
    assert Counter(json.dumps(body["messages"]) for _, body in server.asked) == expected
    for headers, body in server.asked:
        assert body.pop("messages") and headers["authorization"] == "Bearer ours"
        form = {"name": "scores", "schema": stage.SCHEMA, "strict": True}
        settings = {"model": "judge-of-theirs", "temperature": 0.5, "max_tokens": 100}
        assert body == {**settings, "response_format": {"type": "json_schema", "json_schema": form}}
        assert not any(secret in str(headers) for secret in ("secret-run", *SECRETS.values()))
    for key, (messages, answer) in wanted.items():
        length = len(judge_message(messages, answer)[0]["content"])
        assert lines[key]["scores"] == {name: GRID[(length + n) % len(GRID)] for n, name in enumerate(CRITERIA)}
    assert server.most <= 3
    written = [path.read_text() for path in stage.cache_path(recipe).parent.iterdir() if path.is_file()]
    assert not any("ours" in text.replace("judge-of-theirs", "") for text in written)  # the key is nowhere


def test_what_was_judged_is_never_asked_again(recipe_with, server, capsys):
    """Also after the server refused in the middle: what came before is kept."""
    server.after, server.failures = 4, [(401, refusal("no such key"))] * 99
    with pytest.raises(
        InputError, match=r"/v1/: the judge's server answered 401 \(.*no such key.*\); set JUDGE_API_KEY"
    ):
        stage.judge(recipe_with("judge.requests=1"))
    kept = stage.cache_path(recipe_with()).read_bytes()
    assert kept.count(b"\n") == 4
    server.failures = []
    server.asked.clear()
    stage.judge(recipe_with())
    assert len(server.asked) == WANTED - 4 and stage.cache_path(recipe_with()).read_bytes().startswith(kept)
    server.asked.clear()
    stage.judge(recipe_with("judge.requests=2"))
    assert not server.asked and f"0 verdicts to give, {WANTED} of {WANTED} given before" in capsys.readouterr().out


def test_a_busy_server_is_asked_again(recipe_with, server):
    server.failures = [(429, refusal("slow down")), (500, {}), (503, {}), (429, {})]
    stage.judge(recipe_with("judge.requests=1"))
    assert len(server.asked) == WANTED + 4
    assert all("scores" in line for line in lines_of(recipe_with()))


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("This model's maximum context length is 10 tokens", None),
        ("too long", "context_length_exceeded"),
        ("the request exceeds the available context size", None),
    ],
)
def test_a_request_too_long_for_the_server_is_recorded(recipe_with, server, capsys, message, code):
    server.failures = [(400, refusal(message, code))] * 2
    stage.judge(recipe_with())
    errors = [line for line in lines_of(recipe_with()) if "error" in line]
    assert [line["error"] for line in errors] == [stage.TOO_LONG_THERE] * 2 and message in errors[0]["output"]
    assert f"left out: 2 x {stage.TOO_LONG_THERE}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "error"),
    [(("I cannot.", "stop"), stage.NO_SCORES), (('{"corr', "length"), stage.CUT), ((None, "stop"), stage.NO_SCORES)],
)
def test_answers_without_scores_are_recorded(recipe_with, server, content, error):
    server.content = content
    stage.judge(recipe_with())
    assert {(line["error"], line["output"]) for line in lines_of(recipe_with())} == {(error, content[0] or "")}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, r"answered 404 .*; correct `models.judge.path` or `judge.endpoint`"),
        (
            400,
            r"answered 400 .*no json_schema.*; it got model, temperature, max_tokens: `response_format` is .*`max_to",
        ),
        (503, r"answered 503 .*; what was judged is kept: the same command continues"),
    ],
)
def test_a_refusal_ends_the_judge_with_one_line(recipe_with, server, monkeypatch, status, message):
    monkeypatch.setattr(judge_endpoint, "RETRIES", 0)
    server.failures = [(status, refusal("no json_schema"))] * 99
    with pytest.raises(InputError, match=message):
        stage.judge(recipe_with())


NO_FORMAT = [  # what servers say
    (400, refusal("'response_format.type' must be 'json_object' or 'text'")),
    (400, refusal("no json_schema")),
    (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "response_format"]}]}),
]
NO_LENGTH = (400, refusal("'max_tokens' is not supported. Use 'max_completion_tokens'.", "unsupported_parameter"))


@pytest.mark.parametrize("refused", NO_FORMAT)
@pytest.mark.parametrize("refuses_length", [False, True])
def test_what_a_server_does_not_take_is_asked_for_otherwise(recipe_with, server, capsys, refused, refuses_length):
    """It is refused once in a run, and the verdicts are where those of any server are."""
    server.refused = {"response_format": refused, **({"max_tokens": NO_LENGTH} if refuses_length else {})}
    path = stage.cache_path(recipe_with())
    stage.judge(recipe_with())
    assert len(server.asked) == WANTED + 1 + refuses_length
    length = "max_completion_tokens" if refuses_length else "max_tokens"
    for _, body in server.asked[1 + refuses_length :]:
        assert body.pop("messages") and body == {"model": "judge-of-theirs", "temperature": 0.0, length: 100}
    assert capsys.readouterr().out.count("because the server answered") == 1 + refuses_length
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == WANTED and all("scores" in line for line in lines)
    server.content = ("I cannot.", "stop")  # nothing makes the answers JSON then
    stage.judge(recipe_with("judge.max_new_tokens=99"))
    assert {line["error"] for line in lines_of(recipe_with("judge.max_new_tokens=99"))} == {stage.NO_SCORES}


def test_a_length_that_a_server_does_not_take_keeps_the_format(recipe_with, server):
    server.refused = {"max_tokens": NO_LENGTH}
    stage.judge(recipe_with())
    assert len(server.asked) == WANTED + 1
    assert all({"response_format", "max_completion_tokens"} < body.keys() for _, body in server.asked[1:])


def test_another_refusal_changes_nothing_of_the_request(recipe_with, server):
    server.refused = {"temperature": (400, refusal("'temperature' does not support 0"))}
    with pytest.raises(InputError, match=r"answered 400 .*does not support 0.*; .*response_format.*judge.temperature"):
        stage.judge(recipe_with())
    assert len(server.asked) == 1


@pytest.mark.parametrize("page", [b"<html>Welcome</html>", b"{}"])
def test_a_server_of_another_kind_is_named(recipe_with, server, page):
    server.page = page
    with pytest.raises(InputError, match="does not speak OpenAI's protocol .*; most end with /v1"):
        stage.judge(recipe_with())


def test_a_server_that_is_not_there_is_named(recipe_with, monkeypatch):
    monkeypatch.setattr(judge_endpoint, "RETRIES", 0)
    with pytest.raises(InputError, match=r"127.0.0.1:9/v1/: the judge's server cannot be reached \(.*\); start it"):
        stage.judge(recipe_with("judge.endpoint=http://127.0.0.1:9/v1"))


def test_another_server_or_model_is_another_judge(recipe_with, server):
    one = stage.cache_path(recipe_with())
    assert stage.cache_path(recipe_with("judge.requests=2", "judge.max_prompt_tokens=5", "seed=9")) == one
    for change in ("judge.endpoint=http://127.0.0.1:9/v1", "models.judge.path=y", "judge.max_new_tokens=99"):
        assert stage.cache_path(recipe_with(change)) != one


def test_no_model_is_looked_for_here(recipe_with):
    recipe = recipe_with()
    assert "judge" not in roles_of("evaluate", recipe) and "judge" not in roles(recipe)


@pytest.mark.parametrize("url", ["localhost:8000", "http://name:word@host/v1", "ftp://host"])
def test_what_is_no_address_is_refused(recipe_with, url):
    with pytest.raises(InputError, match="`judge.endpoint` is"):
        recipe_with(f"judge.endpoint={url}")
