"""Fill the hub cache with a recipe's models, for clusters whose machines have no network.

Reads   a recipe: `models.*`; the hub
Writes  the hub's cache (`HF_HOME` says where): weights as safetensors, configuration, tokenizer; no pickles
Run     python -m tools.prefetch configs/hh_rlhf.yaml [key=value ...]

The same command continues interrupted downloads. With HF_HUB_OFFLINE=1 it downloads nothing and says whether the cache
has the models.
"""

from pathlib import Path

from hps.errors import InputError, run_main
from pipeline.cli import parse
from pipeline.hub import asking
from pipeline.recipe import Model, Recipe
from pipeline.weights import INDEX, check_index
from tools.pin import hub_models, named, roles

# A pickle runs code when it is loaded: .bin, .pt and .pth stay on the hub.
PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def fetch(role: str, model: Model) -> Path:
    """Download one model's snapshot; return its folder in the cache. InputError when it has no safetensors weights."""
    from huggingface_hub import snapshot_download

    with asking("model", named(role, model)):
        folder = Path(snapshot_download(model.path, revision=model.revision, allow_patterns=PATTERNS))
    if not any(folder.glob("*.safetensors")):
        problem = "the repository has no weights as safetensors, and pickles are not fetched"
        remedy = "use a revision or a copy of the model with safetensors"
        raise InputError(problem, where=named(role, model), remedy=remedy)
    if (folder / INDEX).exists():
        check_index(folder / INDEX)
    return folder


def size(folder: Path) -> int:
    """Bytes of a snapshot (the cache's links followed)."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def prefetch(recipe: Recipe, path: str) -> None:
    """Fetch every hub model of a recipe; see the module's docstring."""
    models, fetched = hub_models(recipe), {}
    for role in roles(recipe):
        model, given = models.get(role), getattr(recipe.models, role)
        if model is None:
            kind = f"the function {given.function}" if given.function else f"{given.path} is a local folder"
            print(f"prefetch: {role}: {kind}")
            continue
        if model.revision is None:
            print(
                f"prefetch: warning: {role}: the revision of {model.path} is open, a later download may differ; "
                f"`python -m tools.pin {path}` writes it into the recipe"
            )
        key = (model.path, model.revision)
        folder = fetched[key] = fetched.get(key) or fetch(role, model)
        print(f"prefetch: {role}: {model.path}: {size(folder) / 1e9:.2f} GB in {folder}", flush=True)
    if models:
        print("prefetch: done; where there is no network, set HF_HUB_OFFLINE=1 for the scripts")


def main() -> None:
    recipe, options = parse(__doc__, dry_run=False)
    prefetch(recipe, next((word for word in options.arguments if "=" not in word), "RECIPE"))


if __name__ == "__main__":
    run_main(main)
