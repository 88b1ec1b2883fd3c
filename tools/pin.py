"""Write the current commits of the hub models into a recipe, so that a later run reads the same weights.

Reads   a recipe: `path` and `revision` of `models.*`; the hub
Writes  the same file: `revision: "<commit>"` beside each hub name that it gives; every other byte stays as it was
Run     python -m tools.pin configs/hh_rlhf.yaml

A model without a revision gets the newest commit of its repository, a branch or tag the commit it points to; a full
commit hash and a local folder are left alone. Nothing is written unless everything can be resolved.
"""

import argparse
from pathlib import Path

import yaml

from hps.errors import run_main
from pipeline.identity import check_model
from pipeline.recipe import DEFAULT_RECIPE, Model, Recipe, load_recipe
from tools.hub import COMMIT, commit_of, write_revisions


def roles(recipe: Recipe) -> tuple[str, ...]:
    """The models that the recipe's scripts load; the judge, the largest, only where it is asked for."""
    return ("generator", "policy", "reward", "evaluator", *(["judge"] if recipe.judge.enabled else []))


def hub_models(recipe: Recipe) -> dict[str, Model]:
    """The recipe's models that are hub names, by role; InputError for a local path where nothing is."""
    models = {role: model for role in roles(recipe) if not (model := getattr(recipe.models, role)).function}
    for role, model in models.items():
        check_model(model, f"models.{role}")
    return {role: model for role, model in models.items() if not Path(model.path).is_dir()}


def named(role: str, model: Model) -> str:
    """A hub model, for the reader."""
    return f"`models.{role}` ({model.path}{f', revision {model.revision}' if model.revision else ''})"


def pin(path: str) -> None:
    """Pin a recipe; see the module's docstring."""
    recipe = load_recipe(path)
    models, written = hub_models(recipe), written_roles(path, recipe)
    commits, known = {}, {}
    for role, model in models.items():
        if role in written and not COMMIT.fullmatch(model.revision or ""):
            key = (model.path, model.revision)
            known[key] = commits[role] = known.get(key) or commit_of("model", *key, named(role, model))
    if commits:
        write_revisions(path, {("models", role): commit for role, commit in commits.items()})
    for role in roles(recipe):
        if role in written:
            function = getattr(recipe.models, role).function
            outcome = f"the function {function}" if function else _outcome(models.get(role), commits.get(role))
            print(f"pin: {role}: {outcome}")
        else:
            print(f"pin: {role}: {getattr(recipe.models, role).path}, a default; write it into the recipe to pin it")


def written_roles(path: str, recipe: Recipe) -> tuple[str, ...]:
    """The models that the recipe's own `models` section names."""
    models = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get("models") or ()
    return tuple(role for role in roles(recipe) if role in models)


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
