"""What identifies a model in a claim: the bytes of a folder, the commit of a hub model, the file of a function."""

from collections.abc import Iterator
from pathlib import Path

from hps.chat import model_tokens
from hps.errors import InputError
from pipeline.files import file_hash, value_hash
from pipeline.functions import check_function, function_hash
from pipeline.recipe import Model
from pipeline.weights import INDEX, PICKLES, refuse_pickles

WEIGHTS = ("config.json", "adapter_config.json", INDEX)  # beside .safetensors and .bin
UNREAD = (".md", ".png", ".jpg", ".svg", ".pdf", ".py")  # no model and no tokenizer is loaded from these

IDENTITIES = ({"path", "weights"}, {"hub", "revision"}, {"function", "sha256"})  # fields of each kind of `model_hash`


def model_hash(model: Model) -> dict:
    """What identifies a model: hashes of a local folder's weights and tokenizer, or name and commit on the hub; for a
    function in its place the hash of its file (`pipeline.functions.function_hash`).

    `tokenizer` covers every other file of the folder except pickles and texts for people, because the files that a
    tokenizer reads have many names. `tokens` is a hash of the ids that probe texts get.
    """
    if model.function:
        return function_hash(model.function)
    folder = Path(model.path)
    if not folder.is_dir():
        commit = _hub_commit(model)
        return {"hub": model.path, "revision": commit, "tokens": model_tokens(model.path, commit)}
    files = [p for p in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")) if p.is_file()]
    files = sorted(p for p in files if not p.name.startswith(".") and p.suffix not in UNREAD)
    weights = [p for p in files if p.suffix in (".safetensors", ".bin") or p.name in WEIGHTS]
    tokenizer = [p for p in files if p not in weights and p.suffix not in PICKLES]
    hashes = {"weights": _combined(weights), "tokenizer": _combined(tokenizer), "tokens": model_tokens(model.path)}
    return {"path": model.path, **hashes}


def identified(settings, role: str = "") -> Iterator[tuple[str, dict]]:
    """Every model or function in a stage's settings: its name there, and its `model_hash`."""
    if isinstance(settings, dict):
        if any(fields <= settings.keys() for fields in IDENTITIES):
            yield role, settings
        else:
            for key, value in settings.items():
                yield from identified(value, key)


def _combined(files: list[Path]) -> str:
    return value_hash([[p.name, file_hash(p)] for p in files])


def _hub_commit(model: Model) -> str:
    """The commit of a hub model. Its config.json is fetched for that: a claim must not change once it is cached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(model.path, "config.json", revision=model.revision)).parent.name
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        problem = f"no such model in the hub's cache, and it cannot be fetched ({str(error).splitlines()[0]})"
        remedy = "check name and network, or fill the cache with `python -m tools.prefetch`"
        raise InputError(problem, where=model.path, remedy=remedy) from None


def check_model(model: Model, field: str) -> None:
    """Refuse a local path without a model, or with pickled weights; hub names (`owner/name`) pass.

    A function must be in its file, and the file must be one that may run (`pipeline.functions.check_function`).
    """
    if model.function:
        check_function(model.function, f"{field}.function")
        return
    path = Path(model.path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"`{field}.path`: no config.json in {path}", remedy="give the folder of a saved model")
        refuse_pickles(path, field)
        return
    looks_like_hub = model.path.count("/") == 1 and not model.path.startswith((".", "/", "~", "models/", "runs/"))
    if not looks_like_hub:
        problem = f"`{field}.path`: there is no model folder {path}"
        raise InputError(problem, remedy="run `bash setup.sh infer` for the embedded models, or correct the path")
