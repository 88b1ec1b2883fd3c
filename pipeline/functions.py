"""Rewards that are Python functions: which file they are in, what identifies them, and their scores.

A recipe names one for the ranking, for the evaluation, or for both (`models.reward.function`,
`models.evaluator.function`). It has the signature of TRL's online trainers:

    def short(prompts, completions, completion_ids, **kwargs) -> list[float]

The lists have an entry for each response to one prompt: the prompt's messages, the response as
`[{"role": "assistant", "content": text}]`, its token ids by the tokenizer of the model that wrote it; in `kwargs` also
`truncated` and `prompt_id`.

A function's file imports the standard library, installed packages and `annotation.rewards`, and nothing else of this
repository or beside it: so the hash of the file and the versions of the packages identify the reward.
"""

import ast
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import packages_distributions, version
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any

from hps.chat import load_tokenizer, response_token_ids
from hps.errors import InputError
from hps.records import LARGEST_REWARD
from pipeline.recipe import REPOSITORY, SHIPPED, Model, Recipe

SHIPPED_MODULE = SHIPPED.removesuffix(".py").replace("/", ".")
SIGNATURE = "def NAME(prompts, completions, **kwargs)"


def located(function: str) -> tuple[Path, str]:
    """The file and the name of a function as a loaded recipe has it."""
    file, _, name = function.rpartition(":")
    return REPOSITORY / (file or SHIPPED), name


def shown(path: Path) -> str:
    """A file's name for the reader: below this repository without the way to it."""
    return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)


def announce(recipe: Recipe, *roles: str) -> None:
    """Say which functions of a recipe will run, and of which files, before anything of them does."""
    for role in roles:
        if function := getattr(recipe.models, role).function:
            path, name = located(function)
            print(f"{role} function: {name} of {shown(path)}", flush=True)


def function_files(model: Model) -> list[Path]:
    """The file of a function of the user's, among a stage's inputs; the shipped ones change with the repository."""
    return [located(model.function)[0]] if model.function and ":" in model.function else []


def scorer_name(path: str | None, function: str | None) -> str:
    """What scored, for the reader: a model by its path, or a function without the way to its file."""
    return path or f"the function {str(function).rpartition('/')[2]}"


def identity(function: str) -> dict:
    """Name and file's hash: the same function, wherever the file is."""
    path, name = located(function)
    title = name if path == REPOSITORY / SHIPPED else f"{path.name}:{name}"
    return {"function": title, "sha256": sha256(_read(path)).hexdigest()}


def function_hash(function: str) -> dict:
    """`identity`, and `packages`: versions of what the file imports (of `annotation.rewards` its hash).

    Raises:
        InputError: as `check_function`.
    """
    path, _ = located(function)
    return {**identity(function), "packages": dict(sorted(_imported(_parse(path), path)))}


def check_function(function: str, field: str) -> int:
    """Look for a function in its file without running it; return its line.

    Raises:
        InputError: the file is not Python, has no such function, or imports what is forbidden or missing.
    """
    path, name = located(function)
    tree = _parse(path)
    list(_imported(tree, path))  # refuses what may not be imported
    found = {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in found:
        public = ", ".join(each for each in found if not each.startswith("_"))
        problem = f"`{field}`: the file has no `def {name}` at the left margin"
        remedy = f"it has: {public}" if public else f"define one: {SIGNATURE}"
        raise InputError(problem, where=shown(path), remedy=remedy)
    return found[name]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        problem = f"cannot read the function's file ({error.strerror})"
        raise InputError(problem, where=shown(path), remedy="put the file back") from None


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(_read(path), str(path))
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # a null byte; nested too deep
        line = getattr(error, "lineno", None) or 1
        problem = f"this is not Python ({getattr(error, 'msg', '') or str(error) or 'nested too deeply'})"
        raise InputError(problem, where=f"{shown(path)}:{line}", remedy="correct it") from None


def _imported(tree: ast.Module, path: Path) -> Iterator[tuple[str, str]]:
    """Every package that a file imports, anywhere in it, with its version."""
    for line, name in _import_names(tree):
        top = name.partition(".")[0]
        if name == SHIPPED_MODULE:
            shipped = REPOSITORY / SHIPPED
            yield SHIPPED_MODULE, sha256(_read(shipped)).hexdigest()
            yield from _imported(_parse(shipped), shipped)
        elif top in sys.stdlib_module_names:
            continue
        elif top and top in _distributions() and not (REPOSITORY / top).is_dir():
            yield from ((package, version(package)) for package in _distributions()[top])
        else:
            problem = f"the file imports `{name}`, which is not an installed package"
            remedy = f"install it in this environment, or move its code here (only {SHIPPED_MODULE} may be imported)"
            raise InputError(problem, where=f"{shown(path)}:{line}", remedy=remedy)


def _import_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each module that is imported; a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


@cache  # a look at every package takes half a second
def _distributions() -> dict[str, list[str]]:
    return {name: sorted(set(packages)) for name, packages in packages_distributions().items()}


class FunctionScorer:
    """A function in the place of a reward model, with the same `score` and `score_details`.

    Args:
        function: as a loaded recipe has it.
        field: of the recipe, for errors.
        tokenizer: the model that writes the responses; `completion_ids` are by its tokenizer.

    Raises:
        InputError: as `check_function`; the file raises when it is loaded.
    """

    def __init__(self, function: str, field: str, tokenizer: Model):
        self.path, self.name = located(function)
        self.title = f"`{field}` `{self.name}`"
        self.line = check_function(function, field)
        self.function = self._load()
        self.tokenizer = load_tokenizer(tokenizer.path, tokenizer.revision)
        self.tried = False

    def _load(self) -> Callable:
        """The function, of the bytes that are hashed: a compiled file of an earlier version is not looked at."""
        module = ModuleType(f"hps_function_{self.path.stem}")
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module  # dataclasses look there
        try:
            exec(compile(_read(self.path), str(self.path), "exec"), module.__dict__)
            return getattr(module, self.name)
        except (Exception, SystemExit) as error:
            raise self._refusal(error, f"the file of {self.title} raised") from None

    def score(
        self, messages: Sequence[Mapping], responses: list[str], truncated: list[bool], prompt_id: str | None = None
    ) -> list[float]:
        """Scores of the responses to one prompt, in their order. InputError: as `score_details`."""
        return [details["score"] for details in self.score_details(messages, responses, truncated, prompt_id)]

    def score_details(
        self, messages: Sequence[Mapping], responses: list[str], truncated: list[bool], prompt_id: str | None = None
    ) -> list[dict]:
        """For each response its `score`.

        Raises:
            InputError: the function raises; it does not return a list with one finite number for each response; equal
                responses get different scores, or the first prompt gets other scores at a second call.
        """
        answers = list(zip(responses, truncated, strict=True))
        scores = self._call(messages, prompt_id, answers)
        again = scores if self.tried else self._call(messages, prompt_id, answers)
        self.tried, first = True, {}
        for number, answer in enumerate(answers):
            seen = first.setdefault(answer, number)
            for other, when in ((again[number], "at a second call"), (scores[seen], f"as response {seen + 1}")):
                if other != scores[number]:
                    problem = f"gives response {number + 1} the score {scores[number]}, and {other} {when}"
                    remedy = "equal responses must get equal scores: draw nothing at random, and keep no state"
                    raise self._refuse(problem, remedy)
        return [{"score": score} for score in scores]

    def _call(self, messages: Sequence[Mapping], prompt_id: str | None, answers: list[tuple[str, bool]]) -> list[float]:
        """Checked scores of responses, each with whether it is truncated."""

        def run(part: list[tuple[str, bool]]) -> Any:  # new arguments for each call: the function may change them
            return self.function(
                prompts=[[dict(message) for message in messages] for _ in part],
                completions=[[{"role": "assistant", "content": text}] for text, _ in part],
                completion_ids=[response_token_ids(self.tokenizer, messages, *answer) for answer in part],
                truncated=[cut for _, cut in part],
                prompt_id=[prompt_id] * len(part),
            )

        try:
            found = run(answers)
        except (Exception, SystemExit) as error:
            culprit = next((f" on response {n}" for n, answer in enumerate(answers, 1) if _raises(run, [answer])), "")
            raise self._refusal(error, f"{self.title} raised{culprit}") from None
        if type(found) is not list:
            raise self._refuse(f"returns {type(found).__name__}", "return a list of floats")
        if len(found) != len(answers):
            problem = f"returns {len(found)} scores for {len(answers)} responses"
            raise self._refuse(problem, "return one for each of `completions`")
        return [self._number(value, number) for number, value in enumerate(found, 1)]

    def _number(self, value: Any, number: int) -> float:
        """A score as a float; scalars of numpy and torch are numbers, too."""
        plain = value
        if callable(getattr(value, "item", None)):
            with suppress(Exception):  # an array of several numbers; a class of the user's
                plain = value.item()
        if isinstance(plain, bool) or not isinstance(plain, (int, float)):
            raise self._refuse(f"gives response {number} {_short(value)}", "return a float for each response")
        if not abs(plain) <= LARGEST_REWARD:
            remedy = f"return finite numbers within {LARGEST_REWARD:.1e}"
            raise self._refuse(f"gives response {number} the score {_short(plain)}", remedy)
        return float(plain)

    def _refuse(self, problem: str, remedy: str) -> InputError:
        return InputError(f"{self.title} {problem}", where=f"{shown(self.path)}:{self.line}", remedy=remedy)

    def _refusal(self, error: BaseException, problem: str) -> InputError:
        """An exception of the function, with the last line of its file that was at work."""
        lines = [number for frame, number in walk_tb(error.__traceback__) if frame.f_code.co_filename == str(self.path)]
        line = lines[-1] if lines else self.line
        text = _shown(error, str)[:300]
        remedy = f"correct the function ({SIGNATURE})" if isinstance(error, TypeError) else "correct the function"
        problem = f"{problem} {type(error).__name__}: {text}".rstrip(": ")
        return InputError(problem, where=f"{shown(self.path)}:{line}", remedy=remedy)


def _raises(run: Callable, *arguments: Any) -> bool:
    try:
        run(*arguments)
    except (Exception, SystemExit):
        return True
    return False


def _shown(value: Any, write: Callable[[Any], str]) -> str:
    """A value of the user's code in one line; its class where the value cannot be written."""
    try:
        return " ".join(write(value).split())
    except Exception:
        return f"a {type(value).__name__}"


def _short(value: Any) -> str:
    text = _shown(value, repr)
    return text if len(text) <= 60 else text[:57] + "..."
