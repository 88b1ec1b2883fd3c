"""Before a long run: check recipe, data and models without loading a model, and print the resolved plan.

Reads   the recipe, the data files, the models' `config.json`
Run     python -m pipeline.preflight gene configs/quickstart.yaml --dry-run
        python -m pipeline.preflight run configs/hh_rlhf.yaml --dry-run
        python -m pipeline.preflight evaluate configs/hh_rlhf.yaml --dry-run

Bad input ends with one line and exit status 2. With `--dry-run` what does not exist yet is marked as missing and the
plan is printed all the same.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from alignment.checks import check_attention, check_wandb, try_lora
from alignment.memory import (
    architecture,
    check_moving_reference,
    count_weights,
    memory_lines,
    read_onto_device,
    responses_per_prompt,
)
from hps.chat import check_records, load_tokenizer
from hps.errors import InputError, naming, run_main
from hps.methods import FAMILIES
from hps.planning import data_warning
from hps.settings import rule_without_gamma, stages_without_steps
from pipeline import models
from pipeline.cli import parse
from pipeline.functions import FunctionScorer, announce, located, shown
from pipeline.hub import REFUSALS as HUB_REFUSALS
from pipeline.hub import hub_bytes
from pipeline.identity import check_model
from pipeline.machine import (
    NEED_COMPILER,
    check_compiler,
    compiler_problem,
    device,
    free_disk,
    free_memory,
    room_line,
)
from pipeline.models import check_fits
from pipeline.prompts import check_disjoint, evaluated_prompts, load_prompts, unread_lines
from pipeline.recipe import SCORERS, SPLITS, Model, Recipe, as_yaml
from pipeline.records import read_ranked
from pipeline.rounds import require_start
from pipeline.stage import CLAIM, require_finished
from pipeline.workers import accumulation_steps, check_gpus, check_meeting_point, node_count, process_count

USAGE = "python -m pipeline.preflight gene|run|evaluate [RECIPE | key=value ...] [--dry-run]"
STAGES = {"gene": ("generator", "reward"), "run": ("policy",), "evaluate": ("policy", "evaluator")}
BYTES_OF_A_TOKEN = 5  # of a text in a file, with its share of the record
BYTES_OF_AN_ID = 8  # of a token's number in a file
TRIED = 8  # prompts of a split on which a function is tried before a model loads


def attempt(lines: list[str], dry_run: bool, title: str, check: Callable, *arguments) -> Any:
    """Run a check. In a dry run what is missing becomes a line of the plan instead of an error; None is returned."""
    absent = ("No such file", "there is no", "not finished", *HUB_REFUSALS)
    try:
        return check(*arguments)
    except InputError as error:
        if not dry_run or not any(words in str(error) for words in absent):
            raise
        lines.append(f"{title}: MISSING: {error}")


def model_lines(role: str, model: Model, dry_run: bool, downloads: dict[str, int]) -> list[str]:
    """Where a model is. InputError: it is missing, or a reward model with the wrong number of labels.

    Args:
        downloads: gets the bytes of a model that the hub's cache lacks.
    """
    check_model(model, f"models.{role}")
    local = Path(model.path).is_dir()
    kind = "local folder" if local else f"hub, revision {model.revision or 'open'}"
    if not local:
        size = hub_bytes(model, f"`models.{role}.path`: {model.path}")
        downloads[model.path] = size or 0
        kind += "; not looked up, the hub cannot be reached" if size is None else f", {size / 1e9:.1f} GB to download"
    if role in SCORERS and (local or not dry_run):
        models.check_labels(model, role)
    elif role in SCORERS:
        kind += "; its number of labels is not checked in a dry run"
    return [f"{role}: {model.path}: {kind}"]


def gene_plan(recipe: Recipe, dry_run: bool) -> list[str]:
    """What gene.sh will do, a line each."""
    if not dry_run:
        check_gpus("generation.tensor_parallel", recipe.generation.tensor_parallel)
    lines, found = [], {}
    attempt(lines, dry_run, "round", require_start, recipe)
    if recipe.start():
        lines.append(f"generator: with the policy in {recipe.start()}")
    if (recipe.ranked("train").parent / CLAIM).exists():
        from annotation.annotate import require_folder

        attempt(lines, dry_run, "ranking", require_folder, recipe)
    for split in SPLITS:
        settings = getattr(recipe.data, split)
        loaded = attempt(lines, dry_run, f"{split}: {settings.path}", load_prompts, recipe, split)
        if loaded is None:
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
    import torch

    schedule = recipe.schedule
    check_moving_reference(recipe)  # a missing or broken file of DeepSpeed is found here, too
    processes = process_count(recipe)
    accumulation = accumulation_steps(recipe, processes)
    lines, prompts, sources = [], None, {split: [] for split in SPLITS}
    attempt(lines, dry_run, "round", require_start, recipe)
    for split in SPLITS:
        count = attempt(lines, dry_run, "ranked", count_ranked, recipe, split)
        if count is not None:
            lines.append(f"ranked: {recipe.ranked(split)}: {count} prompts")
            sources[split].append(read_ranked(recipe.ranked(split)))
        if split == "train" and count is not None:
            prompts = count
            records = (record for _, record in read_ranked(recipe.ranked(split)))
            if warning := data_warning(records, recipe.loss, schedule, recipe.round_seed):
                lines.append(f"training: WARNING: {warning}")
        elif loaded := attempt(lines, dry_run, split, load_prompts, recipe, split):
            sources[split].append(loaded[0].placed())
            prompts = len(loaded[0]) if split == "train" else prompts
    check_disjoint(*(chain(*sources[split]) for split in SPLITS))
    if recipe.lora.enabled and dry_run and not Path(recipe.models.policy.path).is_dir():
        lines.append("policy: `lora.target_modules` is not checked in a dry run, which loads nothing from the hub")
    elif recipe.lora.enabled:
        try_lora(recipe)
    share = f"{processes} process(es) x {schedule.device_batch} prompt(s) at a time x {accumulation}"
    batch = f"global batch {schedule.global_batch}: {share}"
    if prompts:
        steps = -(-prompts * schedule.epochs // schedule.global_batch)
        most = responses_per_prompt(recipe) * steps * schedule.global_batch * schedule.max_length
        lines.append(f"training: at most {steps} steps of {schedule.epochs} epochs and {most:,} tokens; {batch}")
        if recipe.loss.reads_gamma and (warning := stages_without_steps(steps, schedule)):
            lines.append(f"training: WARNING: {warning}")
        if rule := rule_without_gamma(recipe.loss):
            lines.append(f"training: {rule}")
    else:
        lines.append(f"training: {schedule.epochs} epochs; {batch}; steps are known once the prompts are there")
    if dry_run or torch.cuda.is_available():
        lines += [line for line in memory_lines(recipe, processes) if dry_run or "WARNING" in line]
    lines += host_lines(recipe, processes)
    run = recipe.run_folder()
    outputs = [run / name for name in ("plan.jsonl", "log.jsonl", "checkpoint", "evaluation/margins.json")]
    return [*lines, f"outputs: {', '.join(map(str, outputs))}"]


def evaluate_plan(recipe: Recipe, dry_run: bool) -> list[str]:
    """What evaluate.sh will do, a line each."""
    run, settings = recipe.run_folder(), recipe.evaluation
    lines = []
    if recipe.judge.local and not dry_run:
        check_gpus("judge.tensor_parallel", recipe.judge.tensor_parallel)
    attempt(lines, dry_run, "run", require_finished, run, "the run is", "bash run.sh")
    if loaded := attempt(lines, dry_run, "test", evaluated_prompts, recipe):
        if recipe.ranked("train").exists():
            check_disjoint(read_ranked(recipe.ranked("train")), loaded[0].placed())
        answers = len(loaded[0]) * settings.samples
        along = len(loaded[0]) * settings.samples_along * settings.checkpoints
        points = f", {along} of {settings.checkpoints} policies along it" if along else ""
        tokens = (2 * answers + along) * recipe.generation.max_new_tokens
        lines.append(
            f"test: {recipe.tested().data.test.path}: {len(loaded[0])} prompts, {answers} answers of the run{points} "
            f"and {answers} of the model before training, at most {tokens:,} tokens"
        )
    judge = recipe.models.judge.path if recipe.judge.enabled else "off (`judge.enabled`)"
    if recipe.judge.enabled and not recipe.judge.local:
        judge += f" at {recipe.judge.endpoint}"
    outputs = [folder / "metrics.json" for folder in (recipe.evaluated_folder(), recipe.tested().sft_folder())]
    return [*lines, f"judge: {judge}", f"outputs: {', '.join(map(str, outputs))}"]


def machine_lines(stage: str, recipe: Recipe, dry_run: bool) -> list[str]:
    """What a driver runs on, and how much its folder can take.

    Raises:
        InputError: there are cards that torch cannot use; vLLM or flex attention could not compile its kernels; the
            nodes cannot meet.
    """
    lines = [f"device: {device(cluster=stage != 'run')}"]
    if stage != "run":
        check_compiler("vLLM")
    elif recipe.training.attention == "flex":
        check_compiler("`training.attention: flex`")
    elif recipe.training.may_be_flex and recipe.lora.enabled and (problem := compiler_problem()):
        lines.append(f"WARNING: attention: sdpa, and not flex attention, because {problem}; {NEED_COMPILER}")
    if stage == "run" and not dry_run:
        check_meeting_point()
    written, free = bytes_written(stage, recipe), free_disk(Path(recipe.output))
    return [*lines, room_line("disk, at most", written, free, f"below {recipe.output}")]


def bytes_written(stage: str, recipe: Recipe) -> float:
    """Bytes that a driver can write at most: BYTES_OF_A_TOKEN for new texts, BYTES_OF_AN_ID for the rows of a training.

    A checkpoint has 16 for each trained weight; candidates and ranking both repeat the prompts file. 0 for what is not
    known yet.
    """
    if stage == "run":
        config, _ = architecture(recipe)
        try:
            weights, trained = (0, 0) if config is None else count_weights(config, recipe)
        except ValueError:
            return 0
        # Two to resume from, with AdamW's moments and the fp32 copy, and another while one is being replaced.
        kept = 4 * trained * (recipe.evaluation.checkpoints + 1) if recipe.lora.enabled else 2 * weights
        rows = 0
        with suppress(InputError):
            rows = len(load_prompts(recipe, "train")[0]) * recipe.schedule.epochs * responses_per_prompt(recipe)
        ids = rows * recipe.schedule.max_length * BYTES_OF_AN_ID
        return 16 * trained * 3 + kept + (2 * weights if recipe.training.merge else 0) + ids
    counted, samples, copied = 0, recipe.evaluation.samples, 0
    if stage == "evaluate":
        with suppress(InputError):
            counted = 2 * samples * len(evaluated_prompts(recipe)[0])
    else:
        for split in SPLITS:
            with suppress(InputError):  # the plan says what is missing
                counted += 2 * getattr(recipe.data, split).responses * len(load_prompts(recipe, split)[0])
                copied += 2 * Path(getattr(recipe.data, split).path).stat().st_size
    return float(counted * recipe.generation.max_new_tokens * BYTES_OF_A_TOKEN + copied)


def host_lines(recipe: Recipe, processes: int) -> list[str]:
    """Memory of this machine while its processes load the policy, each a copy of its own before it is on its card.

    Without LoRA the reference is a second model. None where the files are read onto the cards.
    """
    if read_onto_device(recipe):
        return []
    config, _ = architecture(recipe)
    if config is None:
        return []
    try:
        weights, _ = count_weights(config, recipe)
    except ValueError:  # `memory_lines` says why
        return []
    copies = 2 if not recipe.lora.enabled and FAMILIES[recipe.loss.family].reference else 1
    each = copies * (2 if recipe.lora.enabled else 4) * weights  # with LoRA under ZeRO-3 in bf16, otherwise in fp32
    here = processes // node_count()
    return [room_line(f"host memory, {here} process(es) that load", here * each, free_memory(), "here")]


def count_ranked(recipe: Recipe, split: str) -> int:
    """Number of prompts of a ranked file; every line is checked."""
    from alignment.rows import require_ranking

    require_ranking(recipe, split)
    return sum(1 for _ in read_ranked(recipe.ranked(split)))


def prompt_files(stage: str, recipe: Recipe) -> list[Iterator[tuple[str, Any]]]:
    """The records that a driver's models read, file by file, with their `path:line`."""
    if stage == "evaluate":
        return [evaluated_prompts(recipe)[0].placed()]
    if stage == "run":
        return [read_ranked(recipe.ranked(split)) for split in SPLITS]
    return [load_prompts(recipe, split)[0].placed() for split in SPLITS]


def check_templates(stage: str, recipe: Recipe, roles: list[str]) -> None:
    """Load the models' tokenizers; refuse prompts with roles that a template refuses. The judge has its own prompt."""
    for role in roles:
        model: Model = getattr(recipe.models, role)
        tokenizer = load_tokenizer(model.path, model.revision)
        for file in prompt_files(stage, recipe) if role != "judge" else ():
            check_records(tokenizer, file)


def try_function(stage: str, recipe: Recipe, role: str) -> None:
    """Run a function on the first prompts of a driver, each with a given response or a short one."""
    writer = getattr(recipe.models, models.WRITERS[role])
    scorer = FunctionScorer(getattr(recipe.models, role).function, f"models.{role}.function", writer)
    for file in prompt_files(stage, recipe):
        for where, record in islice(file, TRIED):
            with naming(f"{where}: prompt {record['prompt_id']}"):
                scorer.score(record["prompt"], record["responses"][:1] or ["Yes."], [False], record["prompt_id"])


def scorer_lines(stage: str, recipe: Recipe) -> list[str]:
    """What is unusual in how a recipe ranks and evaluates."""
    lines = []
    if stage == "gene" and (noise := recipe.annotation.noise):
        lines.append(f"reward: Gaussian noise of standard deviation {noise:g} is added to the ranking rewards")
    if stage != "run" and models.same_model(recipe.models.reward, recipe.models.evaluator):
        lines.append(models.SAME_FUNCTION if recipe.models.reward.function else f"WARNING: {models.SAME_MODEL}")
    return lines


def roles_of(stage: str, recipe: Recipe) -> list[str]:
    """The models that a driver uses."""
    asked = {"judge": recipe.judge.local, "reward": recipe.evaluation.proxy}
    return [*STAGES[stage], *(role for role, wanted in asked.items() if stage == "evaluate" and wanted)]


def preflight(stage: str, recipe: Recipe, dry_run: bool) -> None:
    """Check one driver's inputs; print the plan, and with `dry_run` the whole resolved recipe."""
    lines, roles = [], roles_of(stage, recipe)
    functions = [role for role in roles if getattr(recipe.models, role).function]
    announce(recipe, *functions)
    for role in functions:
        check_model(scorer := getattr(recipe.models, role), f"models.{role}")
        path, name = located(scorer.function)
        lines.append(f"{role}: function {name} of {shown(path)}")
    roles = [role for role in roles if role not in functions]
    downloads: dict[str, int] = {}
    for role in roles:
        model: Model = getattr(recipe.models, role)
        lines += attempt(lines, dry_run, f"{role}: {model.path}", model_lines, role, model, dry_run, downloads) or []
    if total := sum(downloads.values()):
        cache = Path(constants.HF_HUB_CACHE)
        lines.append(room_line("disk, to download", total, free_disk(cache), f"below {shown(cache)}"))
    lines += machine_lines(stage, recipe, dry_run)
    plan = {"gene": gene_plan, "run": run_plan, "evaluate": evaluate_plan}[stage]
    lines += [*scorer_lines(stage, recipe), *plan(recipe, dry_run)]
    for role in roles:
        if not dry_run or (Path(getattr(recipe.models, role).path) / "config.json").exists():
            check_fits(stage, recipe, role, tokenizer=not dry_run)
    if dry_run:
        print(as_yaml(recipe))
    else:
        check_templates(stage, recipe, roles)
        for role in roles:
            models.check_local_weights(role, getattr(recipe.models, role))
        for role in functions:
            try_function(stage, recipe, role)
        if stage == "run":
            check_attention(recipe)
            check_wandb(recipe)
    for line in lines:
        print(f"plan: {line}")


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        parse(__doc__, usage=USAGE)  # prints the help and exits
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        raise InputError(f"the first argument must be one of {', '.join(STAGES)}", where="command line")
    stage = sys.argv.pop(1)
    recipe, options = parse(__doc__, usage=USAGE)
    preflight(stage, recipe, options.dry_run)


if __name__ == "__main__":
    run_main(main)
