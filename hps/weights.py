"""Loading of configurations and weights: safetensors alone, and no code that comes with a model.

A pickle (`.bin`, `.pt`) can run code when it is loaded, and so can a model that brings Python files. Neither is loaded
from anywhere, whatever a recipe says.
"""

from pathlib import Path
from typing import Any

from hps.errors import InputError
from hps.recipe import Model

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


def refuse_pickles(folder: Path, field: str) -> None:
    """Refuse a folder whose weights are there, but not as safetensors.

    Raises:
        InputError: there are files of PICKLES and no safetensors.
    """
    names = sorted(
        path.name for path in folder.iterdir() if path.suffix in PICKLES and path.name != "training_args.bin"
    )
    if names and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"`{field}.path`: the weights ({names[0]}) are pickled, and a pickle can run code when it is loaded",
            where=str(folder),
            remedy="give a copy of the model with safetensors (`save_pretrained` of transformers writes it)",
        )


def load_config(model: Model) -> Any:
    """The configuration of a folder or hub name. InputError when there is none, or it needs code of its own."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _refusal(model, error) from None


def load_weights(kind: type, model: Model, **settings) -> Any:
    """`kind.from_pretrained` of a folder or hub name, with its revision.

    Raises:
        InputError: there are no weights as safetensors, or the model needs code of its own.
    """
    try:
        return kind.from_pretrained(
            model.path, revision=model.revision, use_safetensors=True, trust_remote_code=False, **settings
        )
    except (OSError, ValueError) as error:
        raise _refusal(model, error) from None


def _refusal(model: Model, error: Exception) -> InputError:
    text = str(error).strip().splitlines()[0]
    if "trust_remote_code" in str(error):
        return InputError(
            "the model brings Python code of its own, which is never run",
            where=model.path,
            remedy="use a model that transformers knows",
        )
    if "safetensors" in str(error):
        return InputError(
            f"no weights as safetensors there ({text})",
            where=model.path,
            remedy="give a copy of the model with safetensors",
        )
    return InputError(
        f"no model there ({text})",
        where=model.path,
        remedy="check the model's path in the recipe; fill the hub's cache with `python -m hps.prefetch`",
    )
