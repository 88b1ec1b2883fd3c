"""Loading of configurations and weights: safetensors alone, and no code that comes with a model.

A pickle (`.bin`, `.pt`) can run code when it is loaded, and so can a model that brings Python files. Neither is loaded
from anywhere, and no recipe can change that.
"""

import json
import math
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from hps.errors import InputError, refusal
from pipeline.recipe import Model

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"  # what transformers and PEFT look for first
INDEX = "model.safetensors.index.json"
# What transformers raises for a config.json that it cannot use; the last is the hub client's.
UNUSABLE = (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError, StrictDataclassError)
_FACTOR = re.compile(r"base_model\.model\.(?!lm_head)(.+)\.lora_([AB])\.weight")
# Settings of PEFT under which an adapter is more than `alpha / r B A`.
_NOT_PLAIN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")
_SHARD = re.compile(r"[^/\\]+\.safetensors")  # a file of the folder itself
_SAVE = "give a copy of the model with safetensors (`save_pretrained` of transformers writes it)"


def refuse_pickles(folder: Path, field: str | None, weights: str = MODEL) -> None:
    """Refuse a folder from which a library could load something else than its own safetensors.

    The names must be exact: beside any other `.safetensors` the libraries still take a pickle.

    Args:
        field: the model's place in the recipe, for the message; None where it is not known.
        weights: MODEL or ADAPTER.

    Raises:
        InputError: there are files of PICKLES and not `weights` (nor an index of shards); the index names something
            else than safetensors of the folder; a model's folder also has an adapter, which would be loaded
            with it, from the place that its `adapter_config.json` names.
    """
    named = f"`{field}.path`: " if field else ""
    index = folder / INDEX if weights == MODEL else None
    if index and index.exists():
        check_index(index)
    if weights == MODEL and (folder / "adapter_config.json").exists():
        problem = f"{named}there is an adapter in the model's folder, and it would be loaded with the model"
        remedy = "give the folder of a whole model (`training.merge=true` writes one)"
        raise InputError(problem, where=str(folder / "adapter_config.json"), remedy=remedy)
    names = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES and p.name != "training_args.bin")
    if names and not (folder / weights).exists() and not (index and index.exists()):
        problem = f"{named}the weights ({names[0]}) are pickled, and a pickle can run code when it is loaded"
        raise InputError(problem, where=str(folder), remedy=_SAVE)


def check_index(path: Path) -> None:
    """Refuse an index of shards that names something else than safetensors beside it.

    transformers loads whatever it names, even a pickle or a file of another folder.
    """
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"no index of weights ({type(error).__name__})", where=str(path), remedy=_SAVE) from None
    for shard in shards:
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            problem = f"`weight_map` names {json.dumps(shard)[:60]}, which is not a safetensors file of the folder"
            raise InputError(problem, where=str(path), remedy=_SAVE)


def load_config(model: Model) -> Any:
    """The configuration of a folder or hub name.

    Raises:
        InputError: there is none, it needs its own code, or it names a file of weights.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
    except UNUSABLE as error:
        raise refusal(model.path, error) from None
    # It may name a pickle, or an index that we do not see.
    if getattr(config, "transformers_weights", None) is not None:
        problem = "`transformers_weights` in config.json names the file of the weights"
        raise InputError(problem, where=model.path, remedy=_SAVE)
    return config


def context_length(config: Any) -> float:
    """Tokens for which a model has positions; infinite where nothing ends (recurrent layers, ALiBi).

    A scaling that was trained with (YaRN, LongRoPE, Llama 3) is in the configuration's own length. The two that are
    switched on afterwards multiply it.
    """
    config = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # MPT has the second
    length = min((value for name in names if isinstance(value := getattr(config, name, None), int)), default=math.inf)
    rope = getattr(config, "rope_parameters", None) or {}
    return length * (rope.get("factor") or 1) if rope.get("rope_type") in ("linear", "dynamic") else length


def load_weights(kind: Any, model: Model, exact: bool = False, **settings) -> Any:
    """`kind.from_pretrained` of a folder or hub name, with its revision.

    Args:
        exact: refuse unexpected weights, too: a reward model's head has many names.
        settings: of `from_pretrained`.

    Raises:
        InputError: there are no weights as safetensors, they are not where `refuse_pickles` wants them, the model needs
            its own code, or weights are missing, for which transformers would draw random numbers.
    """
    from safetensors import SafetensorError

    load_config(model)
    without_bars()
    try:
        _check_files(model)
        loaded, info = kind.from_pretrained(
            model.path,
            revision=model.revision,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # named below, with the rest
            output_loading_info=True,
            **settings,
        )
    except SafetensorError as error:
        raise InputError(f"damaged weights ({error})", where=model.path, remedy="copy the model again") from None
    except UNUSABLE as error:
        raise refusal(model.path, error) from None
    _check_keys(info, model.path, kind.__name__, exact)
    return loaded


def without_bars() -> None:
    """Turn off transformers' progress bars in this process; those of downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    downloads = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


def check_weights(model: Model, scores: bool = False) -> None:
    """Refuse a folder or hub name whose files are not a model's weights. Names and shapes alone are compared.

    For models that another library loads, and to know it early.

    Args:
        scores: of a reward model (a sequence classifier), else of a language model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    load_weights(kind, model, exact=scores, device_map="meta")


def _check_keys(info: dict, path: str, kind: str, exact: bool) -> None:
    for fault in ("missing", "mismatched", "unexpected"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[f"{fault}_keys"])
        if not keys:
            continue
        name = "of another shape" if fault == "mismatched" else fault
        problem = f"weights {name} for {kind}: {_first(keys)}"
        if fault == "unexpected" and not exact:
            warnings.warn(f"{path}: {problem}; they are left out", stacklevel=3)
            continue
        remedy = "give files of a model of this class with their config.json (missing weights would be random)"
        raise InputError(problem, where=path, remedy=remedy)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_files(model: Model) -> None:
    """`refuse_pickles` of a folder; of a hub model what decides it, the index and an adapter, is fetched first."""
    from transformers.utils import cached_file

    if Path(model.path).is_dir():
        refuse_pickles(Path(model.path), None)
        return
    fetch = partial(cached_file, model.path, revision=model.revision, _raise_exceptions_for_missing_entries=False)
    if index := fetch(INDEX):
        check_index(Path(index))
    if fetch("adapter_config.json"):
        raise InputError("the repository has an adapter", where=model.path, remedy="give a whole model")


def load_adapter(base: Any, folder: Path, name: str = "default") -> Any:
    """A model with the LoRA adapter of a folder on it. InputError when the file is not safetensors."""
    from peft import PeftModel

    refuse_pickles(folder, None, ADAPTER)
    loaded = PeftModel.from_pretrained(base, folder, adapter_name=name)
    check_adapter(loaded, folder, name)
    return loaded


def fill_adapter(model: Any, folder: Path) -> None:
    """Put the weights of an adapter's folder into the adapter of a model that has one with the same settings."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    refuse_pickles(folder, None, ADAPTER)
    check_adapter(model, folder, "default")
    set_peft_model_state_dict(model, load_file(folder / ADAPTER))


def mergeable(folder: Path) -> bool:
    """Whether an adapter only adds `alpha / r B A` to weights that are nobody else's (a head may be the embedding)."""
    from safetensors import safe_open

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(folder / ADAPTER, framework="pt") as file:
        return not any(config.get(name) for name in _NOT_PLAIN) and all(map(_FACTOR.fullmatch, file.keys()))


def adapter_deltas(folder: Path) -> dict[str, Any]:
    """What a `mergeable` adapter adds to the model's weights, by name: `alpha / r B A` in float32, as in PEFT."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    factors: dict[str, dict[str, Any]] = {}
    for name, factor in load_file(folder / ADAPTER).items():
        if found := _FACTOR.fullmatch(name):
            factors.setdefault(f"{found[1]}.weight", {})[found[2]] = factor.float()
    scale = config["lora_alpha"] / config["r"]
    return {name: factor["B"] @ factor["A"] * scale for name, factor in factors.items()}


def check_adapter(model: Any, folder: Path, name: str) -> None:
    """Refuse an adapter whose file is not what the model took: PEFT leaves weights out and only warns.

    Args:
        model: with the adapter of the folder loaded, under `name`.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / ADAPTER, framework="pt") as file:
        there = set(file.keys())
    wanted = set(get_peft_model_state_dict(model, adapter_name=name))
    if different := sorted(there ^ wanted):
        fault = "missing" if different[0] in wanted else "without a place in the model"
        problem = f"weights of the adapter are {fault}: {_first(different)}"
        raise InputError(problem, where=str(folder / ADAPTER), remedy="give the adapter of this model")
