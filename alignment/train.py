"""Train the policy on the plan.

Reads   `<output>/<run>/plan.jsonl`, `<output>/ranked/train.jsonl`
Writes  `<output>/<run>/`: `steps/checkpoint-N` (to resume), `log.jsonl` and `curves.png`, `checkpoints/step-N` (for the
        evaluation along the training), `checkpoint/` (adapter or weights, and tokenizer), `manifest.json` (last)
Run     python -m alignment.train configs/quickstart.yaml                          # one process
        torchrun --nproc_per_node 8 -m alignment.train configs/hh_rlhf.yaml        # what run.sh does on 8 GPUs

Interrupted training is continued from the last complete checkpoint by the same command, and on a CPU ends with the
same weights, bit by bit, as one that was not interrupted.
"""

import importlib.util
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig

from alignment.curves import draw_curves
from alignment.launch import accumulation_steps
from alignment.plan import ranked_prompts, read_plan, run_settings, weights_of
from alignment.reference import add_reference
from alignment.shared_prefix import why_separate
from alignment.trainer import HPSTrainer, PlanCollator
from hps.chat import load_tokenizer, naming, prompt_token_ids, response_token_ids
from hps.cli import parse
from hps.errors import InputError, run_main
from hps.manifest import check_model, claim, file_hash, finish, hold
from hps.recipe import Recipe
from hps.records import parse_json, shorten, write_atomic
from hps.weights import load_weights

COMPLETE = "complete"  # a checkpoint's last file


class TokenRows(Sequence[dict]):
    """The plan's rows as token ids, in training order, each made when it is asked for.

    Every row is made once at the beginning, so that a bad one is found before a model loads. `cut` are the responses of
    the plan that lose their end to `schedule.max_length`.

    Raises:
        InputError: a prompt leaves no room for a response within `schedule.max_length`, or a response is empty.
    """

    def __init__(self, recipe: Recipe, tokenizer):
        self._plan, self._ranked = read_plan(recipe), ranked_prompts(recipe)
        self._tokenizer, self._limit = tokenizer, recipe.schedule.max_length
        self.cut = sum(row["cut"] for row in self)

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> dict:
        row = self._plan[index]
        record, where = self._ranked[row["prompt_id"]], self._ranked.where(row["prompt_id"])
        with naming(where):
            prompt = prompt_token_ids(self._tokenizer, record["prompt"])
        room = self._limit - len(prompt)
        if room <= 0:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, `schedule.max_length` is {self._limit}: nothing of a response "
                "is left",
                where=where,
                remedy="raise `schedule.max_length`, or lower `generation.max_prompt_tokens`",
            )
        second = row.get("second")
        terms = [row, second] if second else [row]
        # y_1, with Appendix E y_2, then whatever else a term holds, by reward: each response passes the model once.
        first = [term["preferred"] for term in terms]
        members = [*first, *sorted({index for term in terms for index in term["dispreferred"]} - set(first))]
        responses = self._responses(record, members, where)
        rewards = dict(zip([row["preferred"], *row["dispreferred"]], row["rewards"], strict=True))
        return {
            "prompt_ids": prompt,
            "response_ids": [ids[:room] for ids in responses],
            "rewards": [rewards.get(index, 0.0) for index in members],
            "weights": [weights_of(term, members) for term in terms],
            "dispreferred_count": [term["dispreferred_count"] for term in terms],
            "cut": sum(len(ids) > room for ids in responses),
            "gamma": row["gamma"] or 0.0,
        }

    def _responses(self, record: dict, members: list[int], where: str) -> list[list[int]]:
        prompt, texts, truncated = (record[name] for name in ("prompt", "responses", "truncated"))
        with naming(where):
            ids = [response_token_ids(self._tokenizer, prompt, texts[index], truncated[index]) for index in members]
        if not all(ids):
            raise InputError(
                "a response has no tokens", where=where, remedy="take empty responses out of the ranked file"
            )
        return ids


def training_config(recipe: Recipe, world_size: int) -> DPOConfig:
    """The parent's settings for this recipe; the global batch is the recipe's whatever the number of processes.

    Raises:
        InputError: the global batch cannot be divided among the processes.
    """
    schedule, optimizer, training = recipe.schedule, recipe.optimizer, recipe.training
    cuda = torch.cuda.is_available()
    trackers = [name for name in ("wandb", "tensorboard") if getattr(training, name)]
    return DPOConfig(
        output_dir=str(recipe.run_folder() / "steps"),
        run_name=f"{Path(recipe.output).name}-{recipe.run}",
        num_train_epochs=1,  # the plan holds all epochs
        train_sampling_strategy="sequential",
        per_device_train_batch_size=schedule.device_batch,
        gradient_accumulation_steps=accumulation_steps(recipe, world_size),
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type=optimizer.scheduler,
        warmup_steps=optimizer.warmup_steps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        optim="adamw_torch",
        seed=recipe.seed,
        max_length=None,
        router_aux_loss_coef=0.0,
        bf16=cuda,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        gradient_checkpointing=training.gradient_checkpointing,
        deepspeed=training.deepspeed,
        logging_steps=1,
        logging_first_step=True,
        save_steps=training.save_steps,
        save_total_limit=2,
        logging_nan_inf_filter=False,  # a NaN loss is to be seen
        report_to=trackers,
        # The parent switches every dropout off, LoRA's too.
        disable_dropout=recipe.lora.dropout == 0,
    )


def attention(recipe: Recipe) -> str:
    """The attention implementation: as the recipe says.

    `auto` is sdpa where prompts are shared, whose mask needs it, else flash attention where it is installed.
    """
    if recipe.training.attention != "auto":
        return recipe.training.attention
    if recipe.training.shared_prefix:
        return "sdpa"
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
    return "flash_attention_2" if flash else "sdpa"


def load_policy(recipe: Recipe, trained: bool = False):
    """The policy before training, bf16 on CUDA and fp32 on a CPU.

    Args:
        trained: these very weights will be trained (full fine-tuning). Then they are loaded in fp32 on CUDA too: a
            learning rate of 5e-7 moves few weights by as much as a bf16 rounds off. Under bf16 autocast they stay so;
            DeepSpeed's bf16 keeps them as the optimizer's copy and trains in bf16.
    """
    return load_weights(
        AutoModelForCausalLM,
        recipe.models.policy,
        dtype=torch.bfloat16 if torch.cuda.is_available() and not trained else torch.float32,
        attn_implementation=attention(recipe),
    )


def lora_config(recipe: Recipe):
    """PEFT's LoRA settings, or None for full fine-tuning."""
    from peft import LoraConfig

    lora = recipe.lora
    if not lora.enabled:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
    )


class RunFiles(TrainerCallback):
    """Marks complete checkpoints and keeps `log.jsonl`, a line a step, with the rate of training."""

    def __init__(self, folder: Path):
        self.path = folder / "log.jsonl"
        self._tokens = 0.0
        self._clock = None

    def on_train_begin(self, args, state, control, **_):
        self._clock = time.monotonic()
        if state.is_world_process_zero:  # lines of steps that are to be done again go
            lines = logged(self.path, state.global_step)
            self._tokens = lines[-1]["num_tokens"] if lines else 0.0
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        now, tokens = time.monotonic(), logs.get("num_tokens", 0.0)
        rate = (tokens - self._tokens) / max(now - self._clock, 1e-9)
        self._tokens, self._clock = tokens, now
        line = {
            "step": state.global_step,
            **{k: _number(v) for k, v in logs.items()},
            "tokens_per_second": round(rate, 1),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_save(self, args, state, control, **_):
        PartialState().wait_for_everyone()  # the other processes write their random states (and shards) too
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


class KeptCheckpoints(TrainerCallback):
    """Keeps the adapter at the points of `evaluation_steps`, in `<run>/checkpoints/step-N`.

    Not with full fine-tuning, where each would be a whole model.
    """

    def __init__(self, recipe: Recipe, tokenizer):
        self.folder, self.points, self.tokenizer = (
            recipe.run_folder() / "checkpoints",
            recipe.evaluation.checkpoints,
            tokenizer,
        )
        self.points = self.points if recipe.lora.enabled else 0
        self.trainer: HPSTrainer | None = None  # known once it is built

    def on_step_end(self, args, state, control, **_):
        if state.global_step in evaluation_steps(state.max_steps, self.points):
            save(self.trainer, self.tokenizer, self.folder / f"step-{state.global_step}")


def evaluation_steps(steps: int, points: int) -> list[int]:
    """Steps, evenly spread and short of the last one, after which the policy is kept for the evaluation."""
    return sorted({round(steps * point / (points + 1)) for point in range(1, points + 1)} - {0, steps})


def logged(path: Path, last: int) -> list[dict]:
    """The lines of `log.jsonl` up to a step, without one that a kill left half written (it has no newline)."""
    raw = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    lines = [parse_json(line, path, number) for number, line in enumerate(raw, 1)]
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not isinstance(line.get("step"), int) or "num_tokens" not in line:
            raise InputError(
                f"a line of the log without `step` and `num_tokens`: {shorten(line)}",
                where=f"{path}:{number}",
                remedy="delete the run's folder and train again, or put the old line back",
            )
    return [line for line in lines if line["step"] <= last]


def _number(value):
    """JSON has no NaN: it stands as text, so that it is seen and not lost."""
    return value if not isinstance(value, float) or value - value == 0 else str(value)


def last_checkpoint(steps: Path) -> str | None:
    """The newest complete checkpoint; ones that a kill left half written are removed."""
    complete = {}
    for folder in steps.glob("checkpoint-*"):
        if (folder / COMPLETE).exists():
            complete[int(folder.name.partition("-")[2])] = folder
        else:
            shutil.rmtree(folder)
    return str(complete[max(complete)]) if complete else None


def save(trainer: HPSTrainer, tokenizer, target: Path) -> None:
    """Save adapter (or weights) and tokenizer under a temporary name, then rename. Every process takes part."""
    partial = target.with_name(f".{target.name}.partial")
    state = PartialState()
    if state.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        target.parent.mkdir(exist_ok=True)
    state.wait_for_everyone()
    trainer.save_model(str(partial))  # ZeRO-3 gathers the shards of all processes here
    state.wait_for_everyone()
    if state.is_main_process:
        tokenizer.save_pretrained(partial)
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty template; the manifest says what this is
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
    state.wait_for_everyone()


def build_trainer(recipe: Recipe, tokenizer, config: DPOConfig) -> HPSTrainer:
    """The trainer on the plan's rows; without the reference's log-probabilities (`alignment.reference`)."""
    # `setdefault`: a user's own settings win. The id makes a continued run go on in the same record.
    os.environ.setdefault("WANDB_PROJECT", "hps")
    os.environ.setdefault("WANDB_RUN_ID", file_hash(recipe.run_folder() / "claim.json")[:16])
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ["WANDB_DIR"] = str(recipe.run_folder())
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(recipe.run_folder() / "tensorboard")
    rows = TokenRows(recipe, tokenizer)  # before a model loads: a bad row is found here
    model = load_policy(recipe, trained=not recipe.lora.enabled)
    shared = recipe.training.shared_prefix
    if shared and (reason := why_separate(model, recipe.schedule.max_length)):
        PartialState().print(f"training: prompts are computed once for each response, not shared: {reason}")
        shared = False
    kept = KeptCheckpoints(recipe, tokenizer)
    trainer = HPSTrainer(
        model=model,
        # The parent would load the frozen copy by its name alone, without the revision.
        ref_model=None if recipe.lora.enabled else load_policy(recipe),
        args=config,
        loss=recipe.loss,
        train_dataset=rows,
        data_collator=PlanCollator(tokenizer.pad_token_id, shared, recipe.training.row_tokens),
        processing_class=tokenizer,
        peft_config=lora_config(recipe),
        callbacks=[RunFiles(recipe.run_folder()), kept],
    )
    kept.trainer = trainer
    return trainer


def leave_out_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling a C++ extension when it starts on a CPU; its collectives are gloo's either way.

    The extension (`deepspeed_shm_comm`) serves inference. It is compiled at the first start, for minutes and without a
    word, and a process that is killed meanwhile leaves a lock in torch's cache at which every later start waits for
    ever. Where DeepSpeed holds an extension for incompatible it does without; tests/test_distributed.py pins that.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_shared(folder: Path, state: PartialState) -> None:
    """Refuse a folder that is not one and the same for all processes.

    Nodes with a plan each, on disks of their own, would train; but every node would keep its own processes' shards of a
    checkpoint, and none could be continued.

    Raises:
        InputError: some do not see what the first process writes; by every process, so that none waits for another.
    """
    if state.num_processes == 1:
        return
    host = socket.gethostname()
    # A name that nobody asked for before: a network file system may remember that a file was not there.
    said = [host, f".shared-{uuid.uuid4().hex}"]
    if state.is_main_process:
        (folder / said[1]).touch()
    first, name = broadcast_object_list(said)
    blind = gather_object([] if (folder / name).exists() else [f"{host}, process {state.process_index}"])
    if state.is_main_process:  # all have looked
        (folder / name).unlink()
    if blind:
        raise InputError(
            f"these do not see the folder of the first node ({first}): {'; '.join(blind)}",
            where=str(folder),
            remedy="use a file system that all nodes share, under the same path",
        )


def train(recipe: Recipe) -> None:
    """Run the stage; see the module's docstring."""
    check_model(recipe.models.policy, "models.policy")
    if recipe.training.deepspeed and not torch.cuda.is_available():
        leave_out_shared_memory_op()
    folder = recipe.run_folder()
    state = PartialState(cpu=not torch.cuda.is_available())
    with hold(folder) if state.is_main_process else nullcontext():
        check_shared(folder, state)
        # By every process: all find the same, and none waits for one that failed.
        if claim(folder, run_settings(recipe)):
            state.print(f"training: finished before, {folder}")
        else:
            _train(recipe, folder, state)


def _train(recipe: Recipe, folder: Path, state: PartialState) -> None:
    tokenizer = load_tokenizer(recipe.models.policy.path, recipe.models.policy.revision)
    trainer = build_trainer(recipe, tokenizer, training_config(recipe, state.num_processes))
    _announce(recipe, trainer)
    add_reference(recipe, trainer)
    # One process looks and removes: over a network others may still see what is gone, and would resume elsewhere.
    [resume] = broadcast_object_list([last_checkpoint(folder / "steps") if state.is_main_process else None])
    if resume:
        state.print(f"training: continued from {resume}")
        before = logged(folder / "log.jsonl", int(resume.rpartition("-")[2]))
        trainer._total_train_tokens = before[-1]["num_tokens"] if before else 0  # the parent starts at 0 again
    result = trainer.train(resume_from_checkpoint=resume)
    save(trainer, tokenizer, folder / "checkpoint")
    if state.is_main_process:
        draw_curves(folder / "log.jsonl", folder / "curves.png")
        outputs = [folder / name for name in ("plan.jsonl", "plan.json", "log.jsonl")]
        for saved in ("checkpoint", "checkpoints/step-*"):
            outputs += sorted(path for path in folder.glob(f"{saved}/*") if path.is_file())
        seconds = round(result.metrics["train_runtime"], 1)
        facts = {"seconds_of_last_start": seconds, "cut_responses": trainer.rows.cut}
        finish(folder, recipe, run_settings(recipe), outputs, [recipe.ranked("train")], **facts)
        print(f"training: {trainer.state.global_step} steps, {folder / 'checkpoint'}")


def _announce(recipe: Recipe, trainer: HPSTrainer) -> None:
    """Say what really runs: a DeepSpeed that was asked for and is not on is an error, not a slower run."""
    state = trainer.accelerator.state
    if recipe.training.deepspeed and not trainer.is_deepspeed_enabled:
        raise InputError("`training.deepspeed` is set, but DeepSpeed is not on", remedy="launch by run.sh (torchrun)")
    plugin = state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    how = f"DeepSpeed ZeRO-{plugin.zero_stage}" if plugin else "no DeepSpeed"
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.accelerator.print(
        f"training: {recipe.loss.family}-{recipe.loss.preference}, {state.num_processes} process(es), {how}, "
        f"attention {attention(recipe)}, {'shared prompts' if trainer.data_collator.shared else 'separate rows'}, "
        f"{trainable:,} weights train",
        flush=True,
    )
    limit = recipe.schedule.max_length
    trainer.accelerator.print(f"training: {trainer.rows.cut} responses are cut at schedule.max_length={limit}")


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    train(recipe)


if __name__ == "__main__":
    run_main(main)
