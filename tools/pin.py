"""Write the current commits of the hub models into a recipe, so that a later run reads the same weights.

Reads   a recipe: `path` and `revision` of `models.*`; the hub
Writes  the same file: `revision: "<commit>"` beside each hub name, with the profile's names where the recipe has no
        `models` section; every other byte stays as it was
Run     python -m tools.pin configs/hh_rlhf.yaml

A model without a revision gets the newest commit of its repository, a branch or tag the commit it points to; a full
commit hash and a local folder are left alone. Nothing is written unless everything can be resolved.
"""

import argparse
import copy
import re
from pathlib import Path

import yaml

from hps.errors import InputError, run_main
from pipeline.files import write_atomic
from pipeline.identity import check_model
from pipeline.recipe import DEFAULT_RECIPE, Model, Recipe, load_recipe

COMMIT = re.compile(r"[0-9a-f]{40}")


def roles(recipe: Recipe) -> tuple[str, ...]:
    """The models that the recipe's scripts load; the judge, the largest, only where it is asked for."""
    return ("generator", "policy", "reward", "evaluator", *(["judge"] if recipe.judge.enabled else []))


def hub_models(recipe: Recipe) -> dict[str, Model]:
    """The recipe's models that are hub names, by role; InputError for a local path where nothing is."""
    models = {role: model for role in roles(recipe) if not (model := getattr(recipe.models, role)).function}
    for role, model in models.items():
        check_model(model, f"models.{role}")
    return {role: model for role, model in models.items() if not Path(model.path).is_dir()}


def hub_error(error: Exception, role: str, model: Model) -> InputError:
    """The hub's refusal as one line. Call it with what `hub_error_types` names."""
    from huggingface_hub import errors

    name = f"{model.path}, revision {model.revision}" if model.revision else model.path
    problem, remedy = f"{type(error).__name__}: {str(error)[:200]}", "try again when the hub can be reached"
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        problem, remedy = "the hub is needed and offline", "run it where there is a network, without HF_HUB_OFFLINE"
    elif isinstance(error, errors.GatedRepoError):
        problem, remedy = "access is restricted", "ask for access on the model's page, then `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        problem, remedy = "the hub has no such revision", "give a branch, a tag, a commit, or leave it out"
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        problem, remedy = "the hub has no such model, or it is private", "correct the name, or `hf auth login`"
    return InputError(problem, where=f"`models.{role}` ({name})", remedy=remedy)


def hub_error_types() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for a bad name, a refusal, or no connection."""
    from huggingface_hub import errors

    return (OSError, errors.HTTPError, errors.HFValidationError)


def resolve(role: str, model: Model) -> str:
    """The full commit hash that a hub model's revision (or newest state) stands for."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().model_info(model.path, revision=model.revision, timeout=30).sha
    except hub_error_types() as error:
        raise hub_error(error, role, model) from None
    if not commit or not COMMIT.fullmatch(commit):
        raise InputError(f"the hub gave `{commit}` as commit of {model.path}", where=f"`models.{role}`")
    return commit


def add_models(text: str, recipe: Recipe) -> str:
    """The recipe's text with the models of its profile written out at the end, if it has no `models` section."""
    if "models" in (yaml.safe_load(text) or {}):
        return text
    newline = "\r\n" if "\r\n" in text else "\n"
    models = (f"  {role}: {{path: {getattr(recipe.models, role).path}}}" for role in roles(recipe))
    lines = ["", "models:", *models, ""]
    return text + ("" if text.endswith("\n") else newline) + newline.join(lines)


def insert_revisions(text: str, commits: dict[str, str], path: str) -> str:
    """The recipe's text with `models.<role>.revision` set; nothing else changes.

    Args:
        text: the YAML file.
        commits: commit hash by role.
        path: the file's name, for errors.

    Raises:
        InputError: a way of writing that this cannot edit safely (the result is loaded again and compared).
    """
    models = _child(yaml.compose(text, Loader=yaml.SafeLoader), "models")
    edits = set()  # a set, because two roles may be one node (YAML alias)
    for role, commit in commits.items():
        node = _child(models, role)
        if _child(node, "path") is None:
            raise _unsafe(role, path)
        edits.add(_edit(node, commit, text))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _child(node, name: str):
    """The value of a key in a mapping node, or None."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == name), None)


def _edit(node: yaml.MappingNode, commit: str, text: str) -> tuple[int, int, str]:
    """`(start, end, new text)` that sets the revision in one model's mapping, beside its `path`."""
    new = f'"{commit}"'  # quoted: digits alone would be a number
    old = _child(node, "revision")
    if old is not None:
        start, end = old.start_mark.index, old.end_mark.index
        return start, end, new if start < end else f" {new}"
    key, value = next(pair for pair in node.value if pair[0].value == "path")
    if node.flow_style:
        return value.end_mark.index, value.end_mark.index, f", revision: {new}"
    line_end = text.find("\n", value.end_mark.index)
    newline = "\r\n" if "\r\n" in text else "\n"
    start = key.start_mark.index  # in front of `path`: right for every way of writing its value
    if value.start_mark.line == value.end_mark.line and value.style not in ("|", ">") and line_end >= 0:
        start = line_end + 1  # behind it, the usual order, and behind a comment
        return start, start, " " * key.start_mark.column + f"revision: {new}{newline}"
    return start, start, f"revision: {new}{newline}" + " " * key.start_mark.column


def _unsafe(role: str, path: str) -> InputError:
    return InputError(
        f"`models.{role}` is written in a way that cannot be edited safely",
        where=path,
        remedy=f"write it as `{role}: {{path: owner/name}}`, or set its `revision` by hand",
    )


def check_edit(before: str, after: str, commits: dict[str, str], path: str) -> None:
    """Refuse an edit that changed more, or less, than the revisions."""
    expected = copy.deepcopy(yaml.safe_load(before))
    for role, commit in commits.items():
        expected["models"][role]["revision"] = commit
    try:
        found = yaml.safe_load(after)
    except yaml.YAMLError:
        found = None
    if found != expected:
        raise _unsafe("|".join(commits), path)


def pin(path: str) -> None:
    """Pin a recipe; see the module's docstring."""
    recipe = load_recipe(path)
    models, written = hub_models(recipe), written_roles(path, recipe)
    commits, known = {}, {}
    for role, model in models.items():
        if role in written and not COMMIT.fullmatch(model.revision or ""):
            key = (model.path, model.revision)
            known[key] = commits[role] = known.get(key) or resolve(role, model)
    if commits:
        file = Path(path).resolve()  # a link stays a link
        before = add_models(file.read_bytes().decode("utf-8"), recipe)  # bytes: line ends stay as they are
        after = insert_revisions(before, commits, path)
        check_edit(before, after, commits, path)
        write_atomic(file, after)
    for role in roles(recipe):
        if role in written:
            function = getattr(recipe.models, role).function
            outcome = f"the function {function}" if function else _outcome(models.get(role), commits.get(role))
            print(f"pin: {role}: {outcome}")
        else:
            print(f"pin: {role}: {getattr(recipe.models, role).path}, a default; write it into the recipe to pin it")


def written_roles(path: str, recipe: Recipe) -> tuple[str, ...]:
    """The models that the recipe's own `models` section names; without one all, because they are written into it."""
    models = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get("models")
    return tuple(role for role in roles(recipe) if models is None or role in models)


def _outcome(model: Model | None, commit: str | None) -> str:
    if model is None:
        return "a local folder, left alone"
    if commit is None:
        return f"{model.path} is pinned already to {model.revision}"
    return f"{model.path}, {model.revision or 'newest'} -> {commit}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", default=DEFAULT_RECIPE, help="default: %(default)s")
    pin(parser.parse_args().recipe)


if __name__ == "__main__":
    run_main(main)
