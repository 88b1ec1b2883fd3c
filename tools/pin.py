"""Write the current commits of the hub models into a recipe, so that a later run reads the same weights.

Reads   a recipe: `path` and `revision` of `models.*`; the hub
Writes  the same file: `revision: "<commit>"` beside each hub name that it gives; every other byte stays as it was
Run     python -m tools.pin configs/hh_rlhf.yaml

A model without a revision gets the newest commit of its repository; a branch or tag gets the commit it points to. Full
commit hashes and local folders stay as they are. Nothing is written unless everything can be resolved.
"""

import argparse
from pathlib import Path

import yaml

from hps.errors import run_main
from pipeline.hub import COMMIT, commit_of, write_revisions
from pipeline.identity import check_model
from pipeline.recipe import DEFAULT_RECIPE, Model, Recipe, load_recipe


def roles(recipe: Recipe) -> tuple[str, ...]:
    """The models that the recipe's scripts load; the judge, the largest, only if it is one of them."""
    return ("generator", "policy", "reward", "evaluator", *(["judge"] if recipe.judge.local else []))


def hub_models(recipe: Recipe) -> dict[str, Model]:
    """The recipe's models that are hub names, by role. InputError: a local path does not exist."""
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
    models = hub_models(recipe)
    written = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get("models") or ()
    commits, known = {}, {}
    for role, model in models.items():
        if role in written and not COMMIT.fullmatch(model.revision or ""):
            key = (model.path, model.revision)
            known[key] = commits[role] = known.get(key) or commit_of("model", *key, named(role, model))
    if commits:
        write_revisions(path, {("models", role): commit for role, commit in commits.items()})
    for role in roles(recipe):
        model = getattr(recipe.models, role)
        if role not in written:
            outcome = f"{model.path}, a default; write it into the recipe to pin it"
        elif role in commits:
            outcome = f"{model.path}, {model.revision or 'newest'} -> {commits[role]}"
        elif role in models:
            outcome = f"{model.path} is pinned already to {model.revision}"
        else:
            outcome = f"the function {model.function}" if model.function else "a local folder, left alone"
        print(f"pin: {role}: {outcome}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", default=DEFAULT_RECIPE, help="default: %(default)s")
    pin(parser.parse_args().recipe)


if __name__ == "__main__":
    run_main(main)
