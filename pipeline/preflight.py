"""Look before a long run: check recipe, data and models without loading a model, and print the resolved plan.

Reads   the recipe, the data files, the models' `config.json`
Run     python -m pipeline.preflight gene configs/quickstart.yaml --dry-run
        python -m pipeline.preflight run configs/hh_rlhf.yaml --dry-run
        python -m pipeline.preflight evaluate configs/hh_rlhf.yaml --dry-run

Bad input ends with one line and exit status 2. With `--dry-run` what does not exist yet is marked as missing and the
plan is printed all the same.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from alignment.memory import deepspeed_stage, memory_lines, responses_per_prompt
from hps.chat import check_records, load_tokenizer, naming, prompt_token_ids
from hps.errors import InputError, run_main
from hps.settings import stages_without_steps
from pipeline.cli import parse
from pipeline.files import file_hash
from pipeline.functions import FunctionScorer, announce, identity, located, shown
from pipeline.identity import check_model
from pipeline.recipe import SCORERS, SPLITS, Model, Recipe, as_yaml, get
from pipeline.records import Indexed, check_prompt, prompt_id, read_json, read_jsonl, read_ranked, unread_fields
from pipeline.stage import require_finished
from pipeline.weights import UNUSABLE, check_weights, context_length, load_config, refusal
from pipeline.workers import accumulation_steps, check_gpus, process_count

USAGE = "python -m pipeline.preflight gene|run|evaluate [RECIPE | key=value ...] [--dry-run]"
STAGES = {"gene": ("generator", "reward"), "run": ("policy",), "evaluate": ("policy", "evaluator")}
SAMPLED = ("generation.max_prompt_tokens", "generation.max_new_tokens")
# The tokens that a model of a driver has to read: each a sum of settings.
LENGTHS = {
    ("gene", "generator"): [SAMPLED],
    ("gene", "reward"): [SAMPLED],
    ("run", "policy"): [("schedule.max_length",), ("generation.max_prompt_tokens", "evaluation.answer_tokens")],
    ("evaluate", "policy"): [SAMPLED],
    ("evaluate", "evaluator"): [SAMPLED],
    ("evaluate", "reward"): [SAMPLED],
    ("evaluate", "judge"): [("judge.max_prompt_tokens", "judge.max_new_tokens")],
}
SAME_MODEL = (
    "`models.evaluator` is `models.reward`: answers are judged by the model that ranked the candidates, and the policy "
    "was trained to please it"
)
SAME_FUNCTION = "ranked and evaluated by the same function: this is the true reward of the experiment"
WRITERS = {"reward": "generator", "evaluator": "policy"}  # whose responses they score
TRIED = 8  # prompts of a split on which a function is tried before a model loads
ARMORM = "LlamaForRewardModelWithGating"  # its labels are its objectives; annotation/armorm.py makes one score of them


def check_labels(model: Model, role: str = "reward") -> None:
    """Refuse a reward model with more labels than one, unless it is an ArmoRM.

    Of a hub model only the configuration is fetched.
    """
    path = Path(model.path) / "config.json"
    if not Path(model.path).is_dir():
        config = load_config(model)
        labels, architectures = config.num_labels, config.architectures
    else:
        config = read_json(path, "give the folder of a saved model")
        labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
        architectures = config.get("architectures")
    if labels != 1 and ARMORM not in (architectures or []):
        raise InputError(
            f"`models.{role}`: the model has {labels} labels",
            where=str(path),
            remedy="give a sequence classifier with one label, or ArmoRM",
        )


def check_fits(stage: str, recipe: Recipe, role: str, tokenizer: bool = True) -> None:
    """Refuse a model whose positions end before the tokens that a driver gives it, or whose tokenizer has ids that the
    model does not know.

    Args:
        tokenizer: load and check it, too.
    """
    model: Model = getattr(recipe.models, role)
    if model.function:
        return
    config = load_config(model)
    length = context_length(config)
    if stage != "gene" or any(getattr(recipe.data, split).responses for split in SPLITS):
        for keys in LENGTHS[stage, role]:
            needed = sum(get(recipe, key) for key in keys)
            asked = "evaluation.answer_tokens" not in keys or recipe.evaluation.answers
            if asked and needed > length:
                raise InputError(
                    f"`models.{role}` has positions for {length:g} tokens, and {' + '.join(keys)} is {needed}",
                    where=model.path,
                    remedy="lower the setting, or use a model with a longer context",
                )
    if tokenizer:
        check_vocabulary(load_tokenizer(model.path, model.revision), config.get_text_config().vocab_size, model.path)


def check_vocabulary(tokenizer: Any, rows: int, where: str) -> None:
    """Refuse ids that may be fed to a model and have no row in its embedding.

    Special tokens that no template writes are not fed: in a text they are ordinary text (`hps.chat.inert`).
    """
    fed = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    fed.update(prompt_token_ids(tokenizer, [{"role": "user", "content": "a"}]))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = {
        number: token
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and (number in fed or number not in special)
    }
    if beyond:
        names = ", ".join(f"`{token}` ({number})" for number, token in sorted(beyond.items())[:3])
        raise InputError(
            f"{len(beyond)} token(s) of the tokenizer have no row in the model's embedding of {rows}: {names}",
            where=where,
            remedy="take them out of the tokenizer (padding: give `pad_token` of tokenizer_config.json the end "
            "token), or add rows by `resize_token_embeddings` and save the model",
        )


def load_prompts(recipe: Recipe, split: str) -> tuple[Indexed, list[dict]]:
    """Check a split; return the prompts by id, and ledger lines for repeated ones.

    A prompt that stands twice is one prompt, with the given responses of the first. The same `prompt_id` on different
    conversations is an error.
    """
    settings = getattr(recipe.data, split)

    def check(record: dict, where: str) -> dict:
        record = check_prompt(record, where)
        _check_enough(record, settings.responses, recipe.generation.keep_given, where)
        return record

    if not Path(settings.path).exists():
        raise InputError(
            "cannot read the file (No such file or directory)",
            where=settings.path,
            remedy=f"correct `data.{split}.path`; `.venv-train/bin/python data/prepare.py` writes the published sets "
            "(data/README.md)",
        )
    prompts = Indexed(settings.path, check, settings.limit)
    if not prompts:
        raise InputError("the file has no prompts", where=settings.path, remedy=f"correct `data.{split}.path`")
    repeated = [{"prompt_id": n, "reason": "repeated prompt", "place": place} for place, n in prompts.repeated]
    return prompts, repeated


def evaluated_prompts(recipe: Recipe) -> tuple[Indexed, list[dict]]:
    """The test prompts that are evaluated, by id, and ledger lines for repeated ones."""
    prompts, repeated = load_prompts(recipe.tested(), "test")
    return prompts.first(recipe.evaluation.prompts), repeated


def _check_enough(record: dict, generated: int, keep_given: bool, where: str) -> None:
    given = len(record["responses"]) if keep_given else 0
    if given + generated < 2:
        raise InputError(
            f"the prompt would have a single response ({given} given, {generated} generated)"
            if given + generated
            else "the prompt would have no response",
            where=where,
            remedy="raise `data.<split>.responses`, or give more responses",
        )


def unread_lines(recipe: Recipe, split: str) -> list[str]:
    """What the prompts of a split have that no stage reads, a line each."""
    settings = getattr(recipe.data, split)
    found = Counter()
    for _, record in islice(read_jsonl(settings.path), settings.limit):
        found.update(unread_fields(record))
    return [f"{split}: {settings.path}: `{name}` of {count} lines is not read" for name, count in found.items()]


def check_disjoint(train: Iterable[tuple[str, dict]], test: Iterable[tuple[str, dict]]) -> None:
    """Refuse prompts, with their places, that are in training and among those of the evaluation, too.

    Two conversations that differ only in white space are the same.
    """
    places: dict[str, str] = {}
    for where, record in train:
        places.setdefault(_conversation(record), where)
    both = {where: places[name] for where, record in test if (name := _conversation(record)) in places}
    if both:
        first = "; ".join(f"{test_place} is {train_place}" for test_place, train_place in list(both.items())[:3])
        raise InputError(
            f"{len(both)} test prompt(s) are in training, too, so held-out figures would be wrong: {first}",
            remedy="remove them from one of the two files",
        )


def _conversation(record: dict) -> str:
    return prompt_id([{**message, "content": " ".join(message["content"].split())} for message in record["prompt"]])


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


def try_lora(recipe: Recipe) -> None:
    """Try the recipe's LoRA on the policy's architecture, without weights.

    Raises:
        InputError: an entry of `lora.target_modules` names no module (PEFT is content when one of several is found);
            PEFT cannot adapt one, or it is the LM head, which TRL refuses.
    """
    import torch
    from peft import LoraConfig, LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    policy, targets = recipe.models.policy, recipe.lora.targets
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(policy), trust_remote_code=False)
    except UNUSABLE as error:
        raise refusal(policy.path, error) from None
    parts = dict(model.named_modules())
    linear = {name.rpartition(".")[2] for name, part in parts.items() if isinstance(part, (torch.nn.Linear, Conv1D))}
    remedy = f"give some of its linear layers: {', '.join(sorted(linear))}"
    for target in [] if targets == "all-linear" else targets:
        if not any(f".{name}".endswith(f".{target}") for name in parts):
            problem = f"`lora.target_modules`: the policy has no module `{target}`"
            raise InputError(problem, where=policy.path, remedy=remedy)
    try:
        LoraModel(model, LoraConfig(r=recipe.lora.r, target_modules=targets), "default")
    except ValueError as error:
        raise InputError(f"`lora.target_modules`: {str(error).splitlines()[0]}", where=policy.path) from None
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise InputError(
            "`lora.target_modules`: the LM head cannot be adapted", where=policy.path, remedy="leave it out"
        )


def attempt(check, *arguments, dry_run: bool):
    """Run a check; in a dry run what is missing becomes a remark instead of an error."""
    try:
        return check(*arguments), None
    except InputError as error:
        if dry_run and any(words in str(error) for words in ("No such file", "there is no", "not finished")):
            return None, f"MISSING: {error}"
        raise


def gene_plan(recipe: Recipe, dry_run: bool) -> list[str]:
    """What gene.sh will do, a line each."""
    if not dry_run:
        check_gpus("generation.tensor_parallel", recipe.generation.tensor_parallel)
    lines, found = [], {}
    for split in SPLITS:
        settings = getattr(recipe.data, split)
        loaded, remark = attempt(load_prompts, recipe, split, dry_run=dry_run)
        if loaded is None:
            lines.append(f"{split}: {settings.path}: {remark}")
            continue
        prompts = found[split] = loaded[0]
        given = sum(len(record["responses"]) for record in prompts.values()) * recipe.generation.keep_given
        generated = len(prompts) * settings.responses
        lines.append(
            f"{split}: {settings.path}: {len(prompts)} prompts, {given} given and {generated} generated responses, "
            f"at most {generated * recipe.generation.max_new_tokens:,} new tokens "
            f"and {len(prompts) * recipe.generation.max_prompt_tokens:,} prompt tokens; "
            f"`data.{split}.limit`: {settings.limit or 'none'}"
        )
        lines += unread_lines(recipe, split)
    if len(found) == len(SPLITS):
        check_disjoint(*(found[split].placed() for split in SPLITS))
    outputs = [str(path) for split in SPLITS for path in (recipe.candidates(split), recipe.ranked(split))]
    return [*lines, f"outputs: {', '.join(outputs)}"]


def run_plan(recipe: Recipe, dry_run: bool) -> list[str]:
    """What run.sh will do, a line each."""
    schedule = recipe.schedule
    deepspeed_stage(recipe)  # a missing or broken file is found here
    processes = process_count(recipe)
    accumulation = accumulation_steps(recipe, processes)
    lines, sources = [], {split: [] for split in SPLITS}
    for split in SPLITS:
        count, remark = attempt(count_ranked, recipe, split, dry_run=dry_run)
        lines.append(f"ranked: {remark or f'{recipe.ranked(split)}: {count} prompts'}")
        if count is not None:
            sources[split].append(read_ranked(recipe.ranked(split)))
        if split == "train" and count is not None:
            prompts = count
            continue
        loaded, remark = attempt(load_prompts, recipe, split, dry_run=dry_run)
        if loaded:
            sources[split].append(loaded[0].placed())
        if remark:
            lines.append(f"{split}: {remark}")
        if split == "train":
            prompts = len(loaded[0]) if loaded else None
    check_disjoint(*(chain(*sources[split]) for split in SPLITS))
    if recipe.lora.enabled and dry_run and not Path(recipe.models.policy.path).is_dir():
        lines.append("policy: `lora.target_modules` is not checked in a dry run, which asks the hub nothing")
    elif recipe.lora.enabled:
        try_lora(recipe)
    batch = (
        f"global batch {schedule.global_batch}: {processes} process(es) x {schedule.device_batch} prompt(s) at a time "
        f"x {accumulation}"
    )
    if prompts:
        steps = -(-prompts * schedule.epochs // schedule.global_batch)
        most = responses_per_prompt(recipe) * steps * schedule.global_batch * schedule.max_length
        lines.append(f"training: at most {steps} steps of {schedule.epochs} epochs and {most:,} tokens; {batch}")
        if recipe.loss.preference == "hps" and (warning := stages_without_steps(steps, schedule)):
            lines.append(f"training: WARNING: {warning}")
    else:
        lines.append(f"training: {schedule.epochs} epochs; {batch}; steps are known once the prompts are there")
    if dry_run:
        lines += memory_lines(recipe, processes)
    run = recipe.run_folder()
    outputs = [run / name for name in ("plan.jsonl", "log.jsonl", "checkpoint", "evaluation/margins.json")]
    return [*lines, f"outputs: {', '.join(map(str, outputs))}"]


def evaluate_plan(recipe: Recipe, dry_run: bool) -> list[str]:
    """What evaluate.sh will do, a line each."""
    run, settings = recipe.run_folder(), recipe.evaluation
    lines = []
    if recipe.judge.enabled and not dry_run:
        check_gpus("judge.tensor_parallel", recipe.judge.tensor_parallel)
    _, remark = attempt(require_finished, run, "the run is", "bash run.sh", dry_run=dry_run)
    if remark:
        lines.append(f"run: {remark}")
    loaded, remark = attempt(evaluated_prompts, recipe, dry_run=dry_run)
    if loaded is None:
        lines.append(f"test: {remark}")
    else:
        if recipe.ranked("train").exists():
            check_disjoint(read_ranked(recipe.ranked("train")), loaded[0].placed())
        answers = len(loaded[0]) * settings.samples
        lines.append(
            f"test: {recipe.tested().data.test.path}: {len(loaded[0])} prompts, {answers} answers of the run and "
            f"{answers} of the model before training, at most {2 * answers * recipe.generation.max_new_tokens:,} tokens"
        )
    judge = recipe.models.judge.path if recipe.judge.enabled else "off (`judge.enabled`)"
    outputs = [folder / "metrics.json" for folder in (recipe.evaluated_folder(), recipe.tested().sft_folder())]
    return [*lines, f"judge: {judge}", f"outputs: {', '.join(map(str, outputs))}"]


def count_ranked(recipe: Recipe, split: str) -> int:
    """Number of prompts of a ranked file; every line is checked."""
    if not recipe.ranked(split).exists():
        raise InputError(
            "there is no ranked file",
            where=str(recipe.ranked(split)),
            remedy="run `bash gene.sh` with this recipe first",
        )
    return sum(1 for _ in read_ranked(recipe.ranked(split)))


def check_wandb(recipe: Recipe) -> None:
    """Refuse `training.wandb` without a key for it; wandb itself would ask after the model has been loaded."""
    if not recipe.training.wandb:
        return
    import wandb
    from wandb.errors import Error
    from wandb.sdk.lib import wbauth

    try:
        settings = wandb.setup().settings
    except ValueError as error:  # of a WANDB_... variable
        raise InputError(f"`training.wandb`: {error}", where="environment") from None
    wandb.teardown()  # it would keep settings that the training has yet to make
    if settings.mode != "online":
        return
    try:
        key = wbauth.authenticate_session(host=settings.base_url, source="", prompt=False, update_session=False)
    except Error as error:
        raise InputError(f"`training.wandb`: {str(error).splitlines()[0]}", where="environment") from None
    if key is None:
        raise InputError(
            f"`training.wandb` is true, and there is no key for {settings.base_url}",
            where="environment",
            remedy="run `.venv-train/bin/wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline",
        )


def check_local_weights(role: str, model: Model) -> None:
    """Refuse a folder whose files are not the weights of the class that the role asks for.

    Of a hub model, whose files may not be here yet, the same is asked when it is loaded, and so it is of an ArmoRM.
    """
    scores, files = role in SCORERS, Path(model.path).glob("*.safetensors")
    if any(files) and not (scores and ARMORM in (load_config(model).architectures or [])):
        check_weights(model, scores)


def check_templates(stage: str, recipe: Recipe, roles: list[str]) -> None:
    """Load the models' tokenizers; refuse prompts whose roles one of the templates refuses.

    The judge reads a message of its own.
    """
    for role in roles:
        model: Model = getattr(recipe.models, role)
        tokenizer = load_tokenizer(model.path, model.revision)
        if stage == "gene":
            files = [load_prompts(recipe, split)[0].placed() for split in SPLITS]
        elif stage == "run":
            files = [read_ranked(recipe.ranked(split)) for split in SPLITS]
        else:
            files = [] if role == "judge" else [evaluated_prompts(recipe)[0].placed()]
        for file in files:
            check_records(tokenizer, file)


def try_function(stage: str, recipe: Recipe, role: str) -> None:
    """Run a function on the first prompts of a driver, each with a given response or a short one."""
    writer = getattr(recipe.models, WRITERS[role])
    scorer = FunctionScorer(getattr(recipe.models, role).function, f"models.{role}.function", writer)
    files = [load_prompts(recipe, split)[0] for split in SPLITS] if stage == "gene" else [evaluated_prompts(recipe)[0]]
    for prompts in files:
        for where, record in islice(prompts.placed(), TRIED):
            with naming(f"{where}: prompt {record['prompt_id']}"):
                scorer.score(record["prompt"], record["responses"][:1] or ["Yes."], [False], record["prompt_id"])


def scorer_lines(stage: str, recipe: Recipe) -> list[str]:
    """What stands out of how a recipe ranks and evaluates."""
    lines, models = [], recipe.models
    if stage == "gene" and recipe.annotation.noise:
        deviation = recipe.annotation.noise
        lines.append(f"reward: Gaussian noise of standard deviation {deviation:g} is added to the ranking rewards")
    if stage != "run" and same_model(models.reward, models.evaluator):
        lines.append(SAME_FUNCTION if models.reward.function else f"WARNING: {SAME_MODEL}")
    return lines


def roles_of(stage: str, recipe: Recipe) -> list[str]:
    """The models that a driver uses."""
    asked = {"judge": recipe.judge.enabled, "reward": recipe.evaluation.proxy}
    return [*STAGES[stage], *(role for role, wanted in asked.items() if stage == "evaluate" and wanted)]


def preflight(stage: str, recipe: Recipe, dry_run: bool) -> None:
    """Check one driver's inputs; print the plan, and with `dry_run` the whole resolved recipe."""
    lines, roles = [], roles_of(stage, recipe)
    functions = [role for role in roles if getattr(recipe.models, role).function]
    announce(recipe, *functions)
    for role in functions:
        check_model(getattr(recipe.models, role), f"models.{role}")
        path, name = located(getattr(recipe.models, role).function)
        lines.append(f"{role}: function {name} of {shown(path)}")
    roles = [role for role in roles if role not in functions]
    for role in roles:
        model: Model = getattr(recipe.models, role)
        _, remark = attempt(check_model, model, f"models.{role}", dry_run=dry_run)
        kind = remark or ("local folder" if Path(model.path).is_dir() else f"hub, revision {model.revision or 'open'}")
        lines.append(f"{role}: {model.path}: {kind}")
        if role in SCORERS and not remark:
            if dry_run and not Path(model.path).is_dir():
                lines.append(f"{role}: its number of labels is not checked in a dry run, which asks the hub nothing")
            else:
                check_labels(model, role)
    lines += scorer_lines(stage, recipe)
    lines += {"gene": gene_plan, "run": run_plan, "evaluate": evaluate_plan}[stage](recipe, dry_run)
    for role in roles:
        if not dry_run or (Path(getattr(recipe.models, role).path) / "config.json").exists():
            check_fits(stage, recipe, role, tokenizer=not dry_run)
    if dry_run:
        print(as_yaml(recipe))
    else:
        check_templates(stage, recipe, roles)
        for role in roles:
            check_local_weights(role, getattr(recipe.models, role))
        for role in functions:
            try_function(stage, recipe, role)
        if stage == "run":
            check_wandb(recipe)
    for line in lines:
        print(f"plan: {line}")


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        parse(__doc__, usage=USAGE)  # says it, and ends
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        raise InputError(f"the first argument must be one of {', '.join(STAGES)}", where="command line")
    stage = sys.argv.pop(1)
    recipe, options = parse(__doc__, usage=USAGE)
    preflight(stage, recipe, options.dry_run)


if __name__ == "__main__":
    run_main(main)
