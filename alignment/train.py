"""Train the policy on the plan.

Reads   `<output>/<run>/plan.jsonl`, `<output>/ranked/train.jsonl`
Writes  `<output>/<run>/`: `steps/checkpoint-N` (to resume), `log.jsonl`, `checkpoints/step-N` (for the
        evaluation along the training), `checkpoint/` (adapter or weights, and tokenizer), `manifest.json` (last)
Run     python -m alignment.train configs/quickstart.yaml                          # one process
        torchrun --nproc_per_node 8 -m alignment.train configs/hh_rlhf.yaml        # what run.sh does on 8 GPUs

Interrupted training is continued from the last complete checkpoint by the same command, and on a CPU ends with the
same weights, bit by bit, as one that was not interrupted.
"""

import importlib.util
import math
import os
import shutil
import socket
import time
import uuid
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

from alignment.checks import check_attention, check_wandb, lora_config, try_lora
from alignment.memory import check_moving_reference, checkpointing, read_onto_device
from alignment.plan import run_settings
from alignment.reference import add_reference
from alignment.rows import TokenRows, drop_rows, kept_rows
from hps.chat import load_tokenizer
from hps.errors import InputError, run_main
from hps.shared_prefix import Layout
from hps.trainer import (
    OF_PARENT,
    HPSConfig,
    HPSTrainer,
    PlanCollator,
    not_finite,
    rows_apart,
    tokens_before,
    without_dropout,
)
from hps.trial import prove, take_flex
from pipeline.cli import parse
from pipeline.files import Appender, file_hash, json_line, whole_folder, write_lines
from pipeline.identity import check_model
from pipeline.machine import device
from pipeline.models import check_fits
from pipeline.recipe import OF_ROUNDS, Model, Recipe
from pipeline.records import read_jsonl
from pipeline.run_records import check_log_line
from pipeline.stage import CLAIM, Work, begin, hold
from pipeline.weights import fill_adapter, load_config, load_weights
from pipeline.workers import accumulation_steps

COMPLETE = "complete"  # a checkpoint's last file


def training_config(recipe: Recipe, world_size: int, bf16: bool | None = None) -> HPSConfig:
    """The parent's settings for this recipe. The global batch is the recipe's on any number of processes.

    Args:
        bf16: compute in it; None: on CUDA.

    Raises:
        InputError: the global batch cannot be divided among the processes.
    """
    schedule, optimizer, training = recipe.schedule, recipe.optimizer, recipe.training
    cuda = torch.cuda.is_available()
    trackers = [name for name in ("wandb", "tensorboard") if getattr(training, name)]
    method = {**recipe.loss.model_dump(), **schedule.model_dump(exclude={*OF_PARENT, *OF_ROUNDS})}
    return HPSConfig(
        **method,
        output_dir=str(recipe.run_folder() / "steps"),
        run_name=f"{Path(recipe.output).name}-{recipe.name}",
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.device_batch,
        gradient_accumulation_steps=accumulation_steps(recipe, world_size),
        learning_rate=optimizer.learning_rate,
        # `constant` of transformers ignores the warm-up.
        lr_scheduler_type="constant_with_warmup" if optimizer.scheduler == "constant" else optimizer.scheduler,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        optim="adamw_torch",
        seed=recipe.round_seed,
        max_length=schedule.max_length,
        shared_prefix=training.shared_prefix,
        row_tokens=training.row_tokens,
        bf16=cuda if bf16 is None else bf16,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        gradient_checkpointing=checkpointing(recipe, world_size),
        deepspeed=training.deepspeed,
        logging_steps=1,
        logging_first_step=True,
        save_steps=training.save_steps,
        save_total_limit=2,
        logging_nan_inf_filter=False,  # a NaN loss is to be seen
        report_to=trackers,
        disable_tqdm=True,  # `RunFiles` prints a line a step
        disable_dropout=False,  # the parent's would be LoRA's too; the model's own is off (`without_dropout`)
    )


def attention(recipe: Recipe) -> str | None:
    """The attention implementation that the recipe names.

    `auto` is sdpa (or eager) if prompts are shared, because the mask needs it, else flash attention where installed.
    On CUDA `settled` may give the model another, once its class is known.
    """
    if (named := recipe.training.attention) != "auto":
        return "flex_attention" if named == "flex" else named
    return "flash_attention_2" if flash_attention() and not recipe.training.shared_prefix else None


def settled(recipe: Recipe, config: HPSConfig, model) -> Layout:
    """How the model computes the rows of the plan; on CUDA `auto` may give it another attention.

    Flex attention if all prompts are shared, in a micro-batch's one row (no `row_tokens`), and an adapter trains: full
    fine-tuning under autocast was not measured with it. Flash attention if none is shared.
    """
    longest, training = recipe.schedule.max_length, recipe.training
    layout = prove(model, longest)
    if training.attention != "auto" or not training.shared_prefix:
        return layout
    if not layout.shared and flash_attention():
        model.set_attn_implementation("flash_attention_2")
    elif layout.shared and config.device.type == "cuda" and training.may_be_flex and recipe.lora.enabled:
        before = model.config._attn_implementation
        found = take_flex(model, layout, longest, config.device, torch.bfloat16 if config.bf16 else model.dtype)
        taken = set(gather_object([model.config._attn_implementation]))
        if len(taken) == 1:  # of all processes
            return found
        model.set_attn_implementation(before)
    return layout


def flash_attention() -> bool:
    """Whether the package flash-attn is there and of use; a warning where it is broken."""
    if not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None:
        return False
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # built for another torch: of several classes
        text = " ".join(str(error).split())[:200]
        print(f"training: WARNING: flash-attn is not used: it cannot be imported ({text})")
        return False
    return True


def load_policy(recipe: Recipe, bf16: bool | None = None, model: Model | None = None):
    """The policy before training, which is also the reference, without dropout: s must be 0 at the start.

    Full fine-tuning keeps its weights in fp32 even where it computes in bf16, because a learning rate of 5e-7 moves few
    weights by more than bf16's rounding. DeepSpeed's bf16 trains in bf16 and keeps fp32 as the optimizer's copy. The
    frozen copy is loaded and cast the same way: with other roundings s would not start at 0.

    Args:
        bf16: training computes in it (`HPSConfig.bf16`); None: on CUDA.
        model: None: `models.policy`.
    """
    model = model or recipe.models.policy
    bf16 = torch.cuda.is_available() if bf16 is None else bf16
    place = PartialState(cpu=not torch.cuda.is_available()).device
    loaded = load_weights(
        AutoModelForCausalLM,
        model,
        config=without_dropout(load_config(model)),
        dtype=torch.bfloat16 if bf16 and recipe.lora.enabled else torch.float32,
        attn_implementation=attention(recipe),
        device_map={"": place} if read_onto_device(recipe) else None,
    )
    if hasattr(loaded, "hf_device_map"):  # with it the parent warns that the model is on several devices
        del loaded.hf_device_map
    return loaded


class RunFiles(TrainerCallback):
    """Marks complete checkpoints and writes `log.jsonl`, a line a step, with the rate of training.

    Raises:
        InputError: a gradient is not finite (the trainer checks the loss). Raised before the step is logged, and on
            every process, since the norm is over all of them.
    """

    def __init__(self, folder: Path, rows: TokenRows, global_batch: int):
        self.path = folder / "log.jsonl"
        self._rows, self._batch = rows, global_batch
        self._tokens = 0.0
        self._clock = None

    def on_train_begin(self, args, state, control, **_):
        self._clock = time.monotonic()
        self._tokens = tokens_before(state)
        if state.is_world_process_zero:  # remove lines of steps that will be repeated
            write_lines(self.path, map(json_line, logged(self.path, state.global_step)))

    def on_log(self, args, state, control, logs=None, **_):
        if not math.isfinite((logs or {}).get("grad_norm", 0.0)):
            first, last = (state.global_step - 1) * self._batch, min(state.global_step * self._batch, len(self._rows))
            places = self._rows.places(range(first, min(first + 4, last)))
            rest = f" and the {last - first - 4} lines after them" if last - first > 4 else ""
            raise not_finite("gradient's norm", state.global_step, places + rest)
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        now, tokens = time.monotonic(), logs.get("num_tokens", 0.0)
        seconds = now - self._clock
        rate = (tokens - self._tokens) / max(seconds, 1e-9)
        self._tokens, self._clock = tokens, now
        figures = {name: _number(value) for name, value in logs.items()}
        line = {"step": state.global_step, **figures, "tokens_per_second": round(rate, 1)}
        with Appender(self.path) as file:
            file.append(line)
        print(step_line(line, state.max_steps, seconds), flush=True)

    def on_save(self, args, state, control, **_):
        PartialState().wait_for_everyone()  # the other processes write their random states (and shards) too
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class KeptCheckpoints(TrainerCallback):
    """Keeps the adapter at the points of `evaluation_steps`, in `<run>/checkpoints/step-N`."""

    def __init__(self, trainer: HPSTrainer, tokenizer, folder: Path, points: int):
        self.trainer, self.tokenizer, self.folder, self.points = trainer, tokenizer, folder, points

    def on_step_end(self, args, state, control, **_):
        if state.global_step in evaluation_steps(state.max_steps, self.points):
            save(self.trainer, self.tokenizer, self.folder / f"step-{state.global_step}")


def step_line(line: dict, steps: int, seconds: float) -> str:
    """A line of the log for the screen."""
    names = {"loss": "loss", "gamma": "gamma", "rewards/margins": "margin"}
    figures = [f"{title} {float(line[name]):.4g}" for name, title in names.items() if name in line]
    return f"training: step {line['step']} of {steps}: {', '.join(figures)}, {seconds:.1f} s"


def evaluation_steps(steps: int, points: int) -> list[int]:
    """Evenly spread steps before the last one, after which the policy is kept for the evaluation."""
    return sorted({round(steps * point / (points + 1)) for point in range(1, points + 1)} - {0, steps})


def logged(path: Path, last: int) -> list[dict]:
    """The lines of `log.jsonl` up to a step; a line that a kill left half written is cut off."""
    Appender(path).close()
    return [line for _, line in read_jsonl(path, check_log_line) if line["step"] <= last]


def _number(value):
    """JSON has no NaN: write it as text, so that it stays visible."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def last_checkpoint(steps: Path) -> str | None:
    """The newest complete checkpoint. Half-written ones, left by a kill, are removed."""
    complete = {}
    for folder in steps.glob("checkpoint-*"):
        if (folder / COMPLETE).exists():
            complete[int(folder.name.partition("-")[2])] = folder
        else:
            shutil.rmtree(folder)
    return str(complete[max(complete)]) if complete else None


def save(trainer: HPSTrainer, tokenizer, target: Path) -> None:
    """Save adapter (or weights) and tokenizer as a `whole_folder`. Every process takes part."""
    state = PartialState()
    with whole_folder(target) if state.is_main_process else nullcontext() as partial:
        (folder,) = broadcast_object_list([partial])
        trainer.save_model(str(folder))  # ZeRO-3 gathers the shards of all processes here
        state.wait_for_everyone()
        if partial:
            tokenizer.save_pretrained(partial)
            (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the manifest says what this is
    state.wait_for_everyone()


def build_trainer(recipe: Recipe, tokenizer, config: HPSConfig) -> HPSTrainer:
    """The trainer on the plan's rows; without the reference's log-probabilities (`alignment.reference`)."""
    # `setdefault`: a user's own settings win. The id lets a continued run extend the same record.
    os.environ.setdefault("WANDB_PROJECT", "hps")
    os.environ.setdefault("WANDB_RUN_ID", file_hash(recipe.run_folder() / CLAIM)[:16])
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ["WANDB_DIR"] = str(recipe.run_folder())
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(recipe.run_folder() / "tensorboard")
    rows = kept_rows(recipe) or TokenRows(recipe, tokenizer)  # before a model loads: a bad row is found here
    start, moves = recipe.start(), recipe.schedule.round_reference == "previous"
    whole = Model(path=str(start)) if start and not recipe.lora.enabled else None
    model = load_policy(recipe, config.bf16, whole)
    automatic = recipe.training.attention == "auto"
    layout = settled(recipe, config, model)
    collator = PlanCollator.of(layout, model.config, tokenizer.pad_token_id, config, recipe.lora.enabled, automatic)
    layout = collator.layout
    if layout.shared < recipe.schedule.max_length:
        if recipe.training.attention == "flex":
            problem = f"`training.attention` is `flex`, and some conversations cannot share a prompt: {layout.reason}"
            raise InputError(problem, remedy="use training.attention=auto")
        PartialState().print(f"training: {rows_apart(layout)}")
    # The parent would load the frozen copy by its name alone, without the revision.
    reference = None if recipe.lora.enabled else load_policy(recipe, config.bf16, whole if moves else None)
    if reference is not None:
        reference.set_attn_implementation(model.config._attn_implementation)
    trainer = HPSTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer,
        peft_config=lora_config(recipe),
        callbacks=[RunFiles(recipe.run_folder(), rows, recipe.schedule.global_batch)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints each step as a dictionary
    trainer.starts_as_reference = not start  # the frozen copy is the policy
    if start:
        # LoRA's dropout is off in the reference's pass and acts in the first step's, where B is no longer 0.
        trainer.starts_as_reference = moves and not recipe.lora.dropout
    if start and recipe.lora.enabled:
        fill_adapter(trainer.model, start)
        trainer.adapted_reference = moves
    if recipe.lora.enabled:  # in full fine-tuning each would be a whole model
        folder, points = recipe.run_folder() / "checkpoints", recipe.evaluation.checkpoints
        trainer.add_callback(KeptCheckpoints(trainer, tokenizer, folder, points))
    return trainer


def leave_out_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling a C++ extension when it starts on a CPU; its collectives are gloo's either way.

    The extension (`deepspeed_shm_comm`) serves inference. The first start compiles it silently for minutes. A process
    that is killed meanwhile leaves a lock in torch's cache, and every later start waits for it for ever. DeepSpeed does
    without an extension that it takes for incompatible; tests/test_distributed.py pins that.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_shared(folder: Path, state: PartialState) -> None:
    """Refuse a folder that the processes do not share.

    Nodes with separate disks and a plan on each would train, but each would keep only its own processes' shards of a
    checkpoint, and no checkpoint could be continued.

    Raises:
        InputError: some do not see what the first process writes. Raised on every process, so none hangs.
    """
    if state.num_processes == 1:
        return
    host = socket.gethostname()
    # A new name each time: a network file system may remember that a file was missing.
    said = [host, f".shared-{uuid.uuid4().hex}"]
    if state.is_main_process:
        (folder / said[1]).touch()
    first, name = broadcast_object_list(said)
    blind = gather_object([] if (folder / name).exists() else [f"{host}, process {state.process_index}"])
    if state.is_main_process:  # all have looked
        (folder / name).unlink()
    if blind:
        problem = f"these do not see the folder of the first node ({first}): {'; '.join(blind)}"
        remedy = "use a file system that all nodes share, under the same path"
        raise InputError(problem, where=str(folder), remedy=remedy)


def train(recipe: Recipe) -> None:
    """Run the stage; see the module's docstring."""
    on = device()
    check_model(recipe.models.policy, "models.policy")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
        if recipe.training.deepspeed:
            leave_out_shared_memory_op()
    folder = recipe.run_folder()
    # It makes the process group, so the Trainer's own timeout would come too late. One process may download or write
    # a whole model while the others wait.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))
    state.print(f"training: on {on}", flush=True)
    with hold(folder) if state.is_main_process else nullcontext():
        check_shared(folder, state)
        # Every process claims: all find the same, so none hangs.
        if work := begin("training" if state.is_main_process else None, folder, recipe, run_settings(recipe)):
            _train(recipe, work, state)


def _train(recipe: Recipe, work: Work, state: PartialState) -> None:
    folder = work.folder
    check_attention(recipe)
    check_moving_reference(recipe)
    check_wandb(recipe)
    check_fits("run", recipe, "policy")
    if recipe.lora.enabled:
        try_lora(recipe)  # before the arguments: with ZeRO-3's, transformers would shard the model that is tried
    tokenizer = load_tokenizer(recipe.models.policy.path, recipe.models.policy.revision)
    trainer = build_trainer(recipe, tokenizer, training_config(recipe, state.num_processes))
    _announce(recipe, trainer)
    add_reference(recipe, trainer)
    # One process looks and removes: over a network others may still see what is gone and would resume elsewhere.
    [resume] = broadcast_object_list([last_checkpoint(folder / "steps") if state.is_main_process else None])
    if resume:
        state.print(f"training: continued from {resume}")
    result = trainer.train(resume_from_checkpoint=resume)
    save(trainer, tokenizer, folder / "checkpoint")
    if state.is_main_process:
        outputs = [folder / name for name in ("plan.jsonl", "plan.json", "log.jsonl")]
        for saved in ("checkpoint", "checkpoints/step-*"):
            outputs += sorted(path for path in folder.glob(f"{saved}/*") if path.is_file())
        seconds = round(result.metrics["train_runtime"], 1)
        facts = {"seconds_of_last_start": seconds, "cut_responses": trainer.rows.cut, "equal_rows": trainer.rows.equal}
        facts["devices"] = state.num_processes
        work.finish(outputs, [recipe.ranked("train")], **facts)
        drop_rows(recipe)
        print(f"training: {trainer.state.global_step} steps, {folder / 'checkpoint'}")


def _announce(recipe: Recipe, trainer: HPSTrainer) -> None:
    """Say what really runs. A DeepSpeed that was asked for and is not on is an error."""
    state = trainer.accelerator.state
    if recipe.training.deepspeed and not trainer.is_deepspeed_enabled:
        raise InputError("`training.deepspeed` is set, but DeepSpeed is not on", remedy="launch by run.sh (torchrun)")
    plugin = state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    how = f"DeepSpeed ZeRO-{plugin.zero_stage}" if plugin else "no DeepSpeed"
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    say = trainer.accelerator.print
    say(
        f"training: {recipe.loss.family}-{recipe.loss.preference}, {state.num_processes} process(es), {how}, "
        f"attention {trainer.model.config._attn_implementation}, "
        f"{'shared prompts' if trainer.data_collator.layout.shared else 'separate rows'}"
        f"{' where that is estimated to be faster' if trainer.data_collator.costs else ''}, "
        f"{trainable:,} weights train",
        flush=True,
    )
    limit = recipe.schedule.max_length
    say(f"training: {trainer.rows.cut} responses are cut at schedule.max_length={limit}")
    if equal := trainer.rows.equal:
        say(f"training: WARNING: in {equal} rows a dispreferred response has the tokens of the preferred")


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    train(recipe)


if __name__ == "__main__":
    run_main(main, by_torchrun=True)
