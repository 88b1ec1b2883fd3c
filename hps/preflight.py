"""Look before a long run: check recipe, data and models without loading a model, and print the resolved plan.

Reads   the recipe, the data files, the models' `config.json`
Run     python -m hps.preflight gene configs/quickstart.yaml --dry-run
        python -m hps.preflight run configs/hh_rlhf.yaml --dry-run
        python -m hps.preflight evaluate configs/hh_rlhf.yaml --dry-run

Bad input ends with one line and exit status 2. With `--dry-run` what does not exist yet is marked as missing and the
plan is printed all the same.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from hps.chat import load_tokenizer, prompt_token_ids
from hps.cli import parse
from hps.errors import InputError, run_main
from hps.manifest import check_model
from hps.memory import deepspeed_stage, memory_lines, responses_per_prompt
from hps.recipe import SPLITS, Model, Recipe, as_yaml, get, stages_without_steps
from hps.records import Indexed, check_prompt, read_ranked
from hps.weights import load_config
from hps.workers import accumulation_steps, check_gpus, process_count

USAGE = "python -m hps.preflight gene|run|evaluate [RECIPE | key=value ...] [--dry-run]"
STAGES = {"gene": ("generator", "reward"), "run": ("policy",), "evaluate": ("policy", "evaluator")}
SAMPLED = ("generation.max_prompt_tokens", "generation.max_new_tokens")
# The tokens that a model of a driver has to read: each a sum of settings.
LENGTHS = {
    ("gene", "generator"): [SAMPLED],
    ("gene", "reward"): [SAMPLED],
    ("run", "policy"): [("schedule.max_length",), ("generation.max_prompt_tokens", "evaluation.answer_tokens")],
    ("evaluate", "policy"): [SAMPLED],
    ("evaluate", "evaluator"): [SAMPLED],
    ("evaluate", "judge"): [("judge.max_prompt_tokens", "judge.max_new_tokens")],
}
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
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"broken JSON ({error})", where=str(path), remedy="give the folder of a saved model"
            ) from None
        labels = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
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


def attempt(check, *arguments, dry_run: bool):
    """Run a check; in a dry run what is missing becomes a remark instead of an error."""
    try:
        return check(*arguments), None
    except InputError as error:
        if dry_run and ("No such file" in str(error) or "there is no" in str(error)):
            return None, f"MISSING: {error}"
        raise


def gene_plan(recipe: Recipe, dry_run: bool) -> list[str]:
    """What gene.sh will do, a line each."""
    if not dry_run:
        check_gpus("generation.tensor_parallel", recipe.generation.tensor_parallel)
    lines = []
    for split in SPLITS:
        settings = getattr(recipe.data, split)
        loaded, remark = attempt(load_prompts, recipe, split, dry_run=dry_run)
        if loaded is None:
            lines.append(f"{split}: {settings.path}: {remark}")
            continue
        prompts = loaded[0]
        given = sum(len(record["responses"]) for record in prompts.values()) * recipe.generation.keep_given
        generated = len(prompts) * settings.responses
        lines.append(
            f"{split}: {settings.path}: {len(prompts)} prompts, {given} given and {generated} generated responses, "
            f"at most {generated * recipe.generation.max_new_tokens:,} new tokens "
            f"and {len(prompts) * recipe.generation.max_prompt_tokens:,} prompt tokens; "
            f"`data.{split}.limit`: {settings.limit or 'none'}"
        )
    outputs = [str(path) for split in SPLITS for path in (recipe.candidates(split), recipe.ranked(split))]
    return [*lines, f"outputs: {', '.join(outputs)}"]


def run_plan(recipe: Recipe, dry_run: bool) -> list[str]:
    """What run.sh will do, a line each."""
    schedule = recipe.schedule
    deepspeed_stage(recipe)  # a missing or broken file is found here
    if not dry_run:
        check_wandb(recipe)
    processes = process_count(recipe)
    accumulation = accumulation_steps(recipe, processes)
    lines = []
    for split in SPLITS:
        count, remark = attempt(count_ranked, recipe, split, dry_run=dry_run)
        lines.append(f"ranked: {remark or f'{recipe.ranked(split)}: {count} prompts'}")
        if split == "train" and count is not None:
            prompts = count
            continue
        loaded, remark = attempt(load_prompts, recipe, split, dry_run=dry_run)
        if remark:
            lines.append(f"{split}: {remark}")
        if split == "train":
            prompts = len(loaded[0]) if loaded else None
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
    if not (run / "manifest.json").exists():
        problem = InputError(
            "there is no finished run", where=str(run), remedy="run `bash run.sh` with this recipe first"
        )
        if not dry_run:
            raise problem
        lines.append(f"run: MISSING: {problem}")
    loaded, remark = attempt(evaluated_prompts, recipe, dry_run=dry_run)
    if loaded is None:
        lines.append(f"test: {remark}")
    else:
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

    settings = wandb.setup().settings
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


def preflight(stage: str, recipe: Recipe, dry_run: bool) -> None:
    """Check one driver's inputs; print the plan, and with `dry_run` the whole resolved recipe."""
    lines, roles = [], (*STAGES[stage], *(["judge"] if stage == "evaluate" and recipe.judge.enabled else []))
    for role in roles:
        model: Model = getattr(recipe.models, role)
        _, remark = attempt(check_model, model, f"models.{role}", dry_run=dry_run)
        kind = remark or ("local folder" if Path(model.path).is_dir() else f"hub, revision {model.revision or 'open'}")
        lines.append(f"{role}: {model.path}: {kind}")
        if role in ("reward", "evaluator") and not remark:
            if dry_run and not Path(model.path).is_dir():
                lines.append(f"{role}: its number of labels is not checked in a dry run, which asks the hub nothing")
            else:
                check_labels(model, role)
    lines += {"gene": gene_plan, "run": run_plan, "evaluate": evaluate_plan}[stage](recipe, dry_run)
    for role in roles:
        if not dry_run or (Path(getattr(recipe.models, role).path) / "config.json").exists():
            check_fits(stage, recipe, role, tokenizer=not dry_run)
    if dry_run:
        print(as_yaml(recipe))
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
