"""What a model must be for its role, found out from its configuration and tokenizer before it loads."""

from pathlib import Path
from typing import Any

from hps.chat import load_tokenizer, prompt_token_ids
from hps.errors import InputError
from pipeline.files import file_hash
from pipeline.functions import identity
from pipeline.recipe import SCORERS, SPLITS, Model, Recipe, get
from pipeline.weights import check_weights, context_length, load_config

SAMPLED = ("generation.max_prompt_tokens", "generation.max_new_tokens")
# The tokens that a model of a driver has to read: each a sum of settings.
LENGTHS = {
    ("gene", "generator"): [SAMPLED],
    ("gene", "reward"): [SAMPLED],
    ("run", "policy"): [("schedule.max_length",)],
    ("evaluate", "policy"): [SAMPLED],
    ("evaluate", "evaluator"): [SAMPLED],
    ("evaluate", "reward"): [SAMPLED],
    ("evaluate", "judge"): [("judge.max_prompt_tokens", "judge.max_new_tokens")],
}
WRITERS = {"reward": "generator", "evaluator": "policy"}  # whose responses they score
ARMORM = "LlamaForRewardModelWithGating"  # its labels are its objectives; annotation/armorm.py makes one score of them
SAME_MODEL = "`models.evaluator` is `models.reward`: the policy was trained to please the model that judges it"
SAME_FUNCTION = "ranked and evaluated by the same function: this is the true reward of the experiment"


def check_labels(model: Model, role: str = "reward") -> None:
    """Refuse a reward model with more labels than one, unless it is an ArmoRM.

    Of a hub model only the configuration is fetched.
    """
    config = load_config(model)
    if config.num_labels != 1 and ARMORM not in (config.architectures or []):
        problem = f"`models.{role}`: the model has {config.num_labels} labels"
        raise InputError(problem, where=model.path, remedy="give a sequence classifier with one label, or ArmoRM")


def check_fits(stage: str, recipe: Recipe, role: str, tokenizer: bool = True) -> None:
    """Refuse a model whose positions end before the tokens that a driver gives it, or whose tokenizer has ids that the
    model does not know.

    Args:
        tokenizer: load and check it, too.
    """
    model: Model = getattr(recipe.models, role)
    if model.function:
        return
    length = context_length(config := load_config(model))
    if stage != "gene" or any(getattr(recipe.data, split).responses for split in SPLITS):
        for keys in LENGTHS[stage, role]:
            needed = sum(get(recipe, key) for key in keys)
            if needed > length:
                problem = f"`models.{role}` has positions for {length:g} tokens, and {' + '.join(keys)} is {needed}"
                remedy = "lower the setting, or use a model with a longer context"
                raise InputError(problem, where=model.path, remedy=remedy)
    if tokenizer:
        check_vocabulary(load_tokenizer(model.path, model.revision), config.get_text_config().vocab_size, model.path)


def check_vocabulary(tokenizer: Any, rows: int, where: str) -> None:
    """Refuse ids that may be fed to a model and have no row in its embedding.

    Special tokens that no template writes are not fed: in a text they are ordinary text (`hps.chat.inert`).
    """
    fed = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    fed.update(prompt_token_ids(tokenizer, [{"role": "user", "content": "a"}]))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    if beyond := [(n, token) for n, token in known if n >= rows and (n in fed or n not in special)]:
        names = ", ".join(f"`{token}` ({number})" for number, token in beyond[:3])
        problem = f"{len(beyond)} token(s) of the tokenizer have no row in the model's embedding of {rows}: {names}"
        remedy = "add rows by `resize_token_embeddings`, or remove the tokens (padding can be the end token)"
        raise InputError(problem, where=where, remedy=remedy)


def same_model(one: Model, other: Model) -> bool:
    """Whether two models have the same weights: by their files where both are folders, else by name and revision.

    Functions are the same by name and file.
    """
    if one.function or other.function:
        return bool(one.function and other.function) and identity(one.function) == identity(other.function)
    folders = [Path(model.path) for model in (one, other)]
    if not all(folder.is_dir() for folder in folders):
        return one.path == other.path and (one.revision == other.revision or None in (one.revision, other.revision))
    files = [{path.name: path for path in folder.glob("*.safetensors")} for folder in folders]
    sizes = [{name: path.stat().st_size for name, path in found.items()} for found in files]
    # The sizes first: hashing two models of 8B takes a minute.
    return sizes[0] == sizes[1] and all(file_hash(files[0][name]) == file_hash(files[1][name]) for name in files[0])


def check_local_weights(role: str, model: Model) -> None:
    """Refuse a folder whose files are not the weights of the class that the role asks for.

    Of a hub model, whose files may not be here yet, the same is asked when it is loaded, and so it is of an ArmoRM.
    """
    scores, files = role in SCORERS, Path(model.path).glob("*.safetensors")
    if any(files) and not (scores and ARMORM in (load_config(model).architectures or [])):
        check_weights(model, scores)
