"""Break the wiring in a copy of the repository, a place at a time, and look whether the tests see it.

Run     .venv-train/bin/python -m tests.faults.mutations [--only WORD ...] [--tests PATH ...]

Each mutation replaces one piece of code, as somebody might by mistake. The tests named with it must pass on the code as
it is and fail on the mutated code; that is printed as a table. The exit status is 1 when a mutation is not caught. A
mutation whose code is no longer there, or there twice, stops the program: write it for the code of today.

`--tests` runs other tests than the named ones: so one finds out what only the named ones catch.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = (
    "alignment",
    "annotation",
    "configs",
    "data",
    "evaluation",
    "generation",
    "hps",
    "pipeline",
    "report",
    "tests",
    "tools",
)
FILES = ("pyproject.toml",)
# What every test imports, once for all of them: a process for each mutation is forked from one that has it.
PRELOAD = ["pytest", "torch", "transformers", "peft", "datasets", "trl.trainer.dpo_trainer", "trl.experimental.cpo"]


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file`; one of `tests` (pytest's node ids, from tests/) must fail."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, root: Path) -> str:
        """The mutated text. ValueError: `old` is not there exactly once."""
        text = (root / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has the code of the mutation `{self.what}` {count} times, not once")
        return text.replace(self.old, self.new)


STEP = "test_wiring.py::test_a_step_is_its_formula"
UPDATE = "test_wiring.py::test_an_update_is_adamw_with_decay_and_clipping"
RATES = "test_wiring.py::test_learning_rate_of_every_step"
SEED = "test_wiring.py::test_the_seed_makes_the_adapter"
CACHE = "test_wiring.py::test_a_reference_of_another_precision_is_another"
KEPT = "test_margins.py::test_every_kept_policy_against_the_reference_by_hand"
REWARDS = "test_annotation.py::test_rewards_are_the_models_in_the_precision_asked_for"
CLAIMED = "test_wiring.py::test_whatever_decides_the_weights_is_claimed"
FIGURES = "test_margins.py::test_whatever_decides_the_figures_is_claimed"
RANKING = "test_annotation.py::test_whatever_decides_the_ranking_is_claimed"
RESAMPLED = "test_margins.py::test_figures_are_resampled_as_the_recipe_says"
BF16 = "test_shared_prefix.py::test_log_probabilities_of_a_bf16_model_are_float32"
ROUND = "test_rounds.py::test_a_round_starts_at_the_policy_of_the_one_before"
ROUND_FIRST, ROUND_PREVIOUS = f"{ROUND}[true-first]", f"{ROUND}[true-previous]"
UNION = "test_rounds.py::test_candidates_of_all_rounds_or_of_one"
BEFORE, IN_STEP = f"{STEP}[hps-before]", f"{STEP}[hps-in step]"

TRAIN, TRAINER = "alignment/train.py", "hps/trainer.py"
LOSSES = "hps/losses.py"
CHECKS = "alignment/checks.py"
SHARED, ATTENTION, HEAD, TRIAL = (f"hps/{name}.py" for name in ("shared_prefix", "attention", "response_head", "trial"))
HELD_OUT = "evaluation/held_out.py"
SCORE, ANNOTATE, PLAN, MARGINS = (
    "annotation/reward_model.py",
    "annotation/annotate.py",
    "alignment/plan.py",
    "evaluation/margins.py",
)


def dropped(what: str, file: str, line: str, *tests: str) -> Mutation:
    """A line that is not there."""
    return Mutation(what, file, f"{line}\n", "", tests)


MUTATIONS = [
    # ---- KL ----
    Mutation(
        "KL(reference || policy)",
        HELD_OUT,
        "kl_div(q, p, log_target",
        "kl_div(p, q, log_target",
        ("test_margins.py::test_divergence_by_hand",),
    ),
    Mutation(
        "compare() takes the KL of the reference from the policy",
        HELD_OUT,
        "kl.append(divergence(p, q))",
        "kl.append(divergence(q, p))",
        (KEPT,),
    ),
    # ---- recipe -> trainer -> optimizer ----
    dropped("weight decay is not passed on", TRAIN, "        weight_decay=optimizer.weight_decay,", UPDATE),
    dropped("clipping is not passed on", TRAIN, "        max_grad_norm=optimizer.max_grad_norm,", UPDATE),
    dropped("warm-up is not passed on", TRAIN, "        warmup_steps=optimizer.warmup_steps,", RATES),
    Mutation(
        "the scheduler is always cosine",
        TRAIN,
        'lr_scheduler_type="constant_with_warmup" if optimizer.scheduler == "constant" else optimizer.scheduler',
        'lr_scheduler_type="cosine"',
        (RATES,),
    ),
    Mutation(
        "a constant rate without warm-up",
        TRAIN,
        '"constant_with_warmup" if optimizer.scheduler == "constant" else optimizer.scheduler',
        "optimizer.scheduler",
        (f"{RATES}[constant-shares2]",),
    ),
    dropped("the learning rate is not passed on", TRAIN, "        learning_rate=optimizer.learning_rate,", RATES),
    dropped("LoRA's alpha is not passed on", CHECKS, "        lora_alpha=lora.alpha,", BEFORE),
    dropped("LoRA's rank is not passed on", CHECKS, "        r=lora.r,", BEFORE),
    dropped("LoRA's targets are not passed on", CHECKS, "        target_modules=lora.targets,", BEFORE),
    dropped(
        "the seed is not passed on",
        TRAIN,
        "        seed=recipe.round_seed,",
        "test_wiring.py::test_the_seed_makes_the_adapter",
    ),
    dropped(
        "gradient checkpointing is not passed on",
        TRAIN,
        "        gradient_checkpointing=checkpointing(recipe, world_size),",
        BEFORE,
    ),
    dropped(
        "row_tokens is not passed on", TRAIN, "        row_tokens=training.row_tokens,", f"{STEP}[hps-checkpointing]"
    ),
    Mutation(
        "prompts are never shared",
        TRAINER,
        "return cls(pad_token_id, layout, budget,",
        "return cls(pad_token_id, replace(layout, shared=0), budget,",
        (BEFORE,),
    ),
    Mutation(
        "the model's own dropout stays on",
        TRAIN,
        "config=without_dropout(load_config(model)),",
        "config=load_config(model),",
        (BEFORE,),
    ),
    Mutation("another optimizer", TRAIN, 'optim="adamw_torch"', 'optim="sgd"', (UPDATE,)),
    dropped(
        "the epochs of the plan count twice", TRAINER, "        args.num_train_epochs = 1", f"{RATES}[linear-shares0]"
    ),
    dropped(
        "gradients are not accumulated",
        TRAIN,
        "        gradient_accumulation_steps=accumulation_steps(recipe, world_size),",
        BEFORE,
    ),
    # ---- plan -> rows -> loss ----
    Mutation(
        "the logits of the head stay in bf16",
        HEAD,
        "logits if logits.dtype == torch.float64 else logits.float()",
        "logits",
        (BF16,),
    ),
    Mutation(
        "logged `rejected` is not weighted",
        TRAINER,
        '(share * values).sum(dim=1)\n        figures["rewards/margins"]',
        '(inputs["mask"] * values)[:, 1:].mean(dim=1)\n        figures["rewards/margins"]',
        (BEFORE,),
    ),
    Mutation(
        "logged s is the implicit reward",
        TRAINER,
        "s = rewards / self.loss.beta",
        "s = rewards",
        (BEFORE,),
    ),
    Mutation(
        "the reference with the adapter on",
        TRAINER,
        '            adapter = use_adapter(model, "ref" if "ref" in model.peft_config else None)\n',
        "",
        (BEFORE, IN_STEP),
    ),
    Mutation(
        "the reference of full fine-tuning is the policy",
        TRAINER,
        "self.accelerator.unwrap_model(self.ref_model or self.model)",
        "self.accelerator.unwrap_model(self.model)",
        (f"{STEP}[hps-full]",),
    ),
    Mutation(
        "the policy of full fine-tuning is compared with itself in the step",
        TRAINER,
        "self._log_probs(self.ref_model or model, inputs)",
        "self._log_probs(model, inputs)",
        (f"{STEP}[hps-full in step]",),
    ),
    Mutation(
        "rows of the reference shifted by one",
        TRAINER,
        '"reference": list(self.log_probs[index])',
        '"reference": list(self.log_probs[index - 1])',
        (BEFORE,),
    ),
    Mutation(
        "a mean over tokens instead of lists",
        TRAINER,
        "loss = losses.mean()",
        'loss = (losses * inputs["tokens"]).sum() / inputs["tokens"].sum()',
        (BEFORE, IN_STEP),
    ),
    Mutation("the sum of the losses", TRAINER, "loss = losses.mean()", "loss = losses.sum()", (BEFORE, IN_STEP)),
    Mutation(
        "SimPO computes a reference",
        TRAINER,
        "if reference is None and self.compares:",
        "if reference is None:",
        ("test_trainer.py::test_simpo_asks_no_reference",),
    ),
    Mutation(
        "the loss sees no annotated rewards",
        TRAINER,
        "        losses = preference_loss(self.loss, scores, *lists)",
        "        losses = preference_loss(self.loss, scores, torch.zeros_like(lists[0]), *lists[1:])",
        (f"{STEP}[exo-pl-before]",),
    ),
    Mutation(
        "the loss sees padding as responses",
        TRAINER,
        "        losses = preference_loss(self.loss, scores, *lists)",
        "        losses = preference_loss(self.loss, scores, lists[0], torch.ones_like(lists[1]), *lists[2:])",
        (f"{STEP}[exo-pl-before]",),
    ),
    Mutation(
        "the NLL term is summed over the tokens",
        LOSSES,
        "return -policy_logps[:, 0] / lengths[:, 0]",
        "return -policy_logps[:, 0]",
        ("test_trainer.py::test_the_nll_of_y_1_is_added_per_token[dpo-1]",),
    ),
    Mutation(
        "the residual of REBEL has no reward",
        LOSSES,
        "gaps = annotated[:, place, None] - annotated",
        "gaps = torch.zeros_like(annotated)",
        (f"{STEP}[rebel-before]",),
    ),
    Mutation(
        "LiPO ranks by the list instead of the scores",
        LOSSES,
        "order = scores.detach().masked_fill",
        "order = annotated.masked_fill",
        (f"{STEP}[lipo-before]",),
    ),
    # ---- what is found again ----
    dropped("the reference's key lacks the dtype", TRAINER, '        "dtype": str(reference.dtype),', CACHE),
    dropped(
        "the reference's key lacks the attention",
        TRAINER,
        '        "attention": reference.config._attn_implementation,',
        CACHE,
    ),
    dropped(
        "the reference's key lacks the layout",
        TRAINER,
        '        "layout": asdict(collator.layout),',
        CACHE,
    ),
    dropped("the reference's key lacks what CUDA alone has", TRAINER, "        **more,", CACHE),
    Mutation(
        "a run does not claim its optimizer and LoRA",
        PLAN,
        'for name in ("schedule", "lora", "optimizer")}',
        'for name in ("schedule",)}',
        (CLAIMED,),
    ),
    dropped(
        "a later round trains from the first policy", TRAIN, "        fill_adapter(trainer.model, start)", ROUND_FIRST
    ),
    Mutation(
        "the moving reference is the first policy",
        TRAIN,
        "trainer.adapted_reference = moves",
        "trainer.adapted_reference = False",
        (ROUND_PREVIOUS,),
    ),
    Mutation(
        "candidates of earlier rounds are left out",
        "generation/generate.py",
        "given = earlier or [",
        "given = [",
        (UNION,),
    ),
    dropped("a run does not claim its seed", PLAN, '        "seed": recipe.seed,', CLAIMED),
    dropped("a run does not claim its ranking", PLAN, '        "ranked": file_hash(recipe.ranked("train")),', CLAIMED),
    dropped("a run does not claim its policy", PLAN, '        "policy": model_hash(recipe.models.policy),', CLAIMED),
    dropped(
        "held-out figures do not claim the reference",
        MARGINS,
        '        "reference": model_hash(recipe.models.policy),',
        FIGURES,
    ),
    dropped(
        "held-out figures do not claim the ranking",
        MARGINS,
        '        "ranked": file_hash(tested.ranked("test")),',
        FIGURES,
    ),
    dropped(
        "held-out figures do not claim the kept steps",
        MARGINS,
        '        "steps": [step for step, _ in kept_checkpoints(recipe)],',
        FIGURES,
    ),
    dropped(
        "held-out figures do not claim the length",
        MARGINS,
        '        "max_length": recipe.schedule.max_length,',
        FIGURES,
    ),
    Mutation(
        "a ranking does not claim its precision",
        "annotation/scorers.py",
        '{"dtype": recipe.annotation.dtype, "model"',
        '{"model"',
        (RANKING,),
    ),
    # ---- reward -> rank -> plan ----
    Mutation(
        "the bias of a reward head is dropped",
        SCORE,
        "OwnHead(self.model, self.model.forward, output)(states[:, 0]).squeeze(-1)",
        "(states[:, 0] @ self.model.score.weight.float().T).squeeze(-1)",
        ("test_reward_model.py::test_the_bias_of_the_head_counts",),
    ),
    Mutation(
        "what a class does to its logits is left out",
        HEAD,
        "self.forward(input_ids=ids, use_cache=False).logits.reshape(len(states), -1)",
        "self.model.get_output_embeddings()(states)",
        ("test_shared_prefix.py::test_layout_and_values_are_the_classs[logits divided]",),
    ),
    Mutation(
        "windows are not looked for",
        TRIAL,
        "if not SHORT < number < longest or",
        "if True or",
        ("test_shared_prefix.py::test_layout_and_values_are_the_classs[a window of 1024]",),
    ),
    Mutation(
        "flex attention lets a response see the one before it",
        ATTENTION,
        "return (other <= token) & ((own[row, token] <= other) | before)",
        "return (other <= token) & ((start[row, token] <= other) | before)",
        ("test_shared_prefix.py::test_flex_attentions_values_are_those_of_separate_rows[llama-dtype0]",),
    ),
    Mutation(
        "flex attention skips squares that are seen in part",
        ATTENTION,
        "*_listed(some & ~whole), *_listed(whole)",
        "*_listed(some & ~some), *_listed(whole)",
        ("test_shared_prefix.py::test_flex_attentions_mask_is_the_dense_one",),
    ),
    Mutation(
        "separate rows under flex attention have a mask of their own",
        ATTENTION,
        'if getattr(attention_mask, "causal", False):',
        "if False:",
        ("test_shared_prefix.py::test_separate_rows_under_flex_attention_have_sdpa",),
    ),
    Mutation(
        "generation under flex attention gets the rows' masks",
        ATTENTION,
        "or attention_mask.mask_mod.__module__ != __name__:",
        "or False:",
        ("test_shared_prefix.py::test_generation_goes_on_after_rows_under_flex_attention",),
    ),
    Mutation(
        "fp32 has the costs of half precision",
        TRAINER,
        "if cuda and estimate and half and layout.shared:",
        "if cuda and estimate and layout.shared:",
        ("test_wiring.py::test_rows_on_cuda",),
    ),
    Mutation(
        "a reference of other rows is found again",
        TRAINER,
        '"costs": collator.costs and asdict(collator.costs)',
        '"costs": None',
        ("test_wiring.py::test_a_reference_of_another_precision_is_another",),
    ),
    Mutation(
        "a response sees what its prompt is padded with",
        ATTENTION,
        "own.new_zeros(len(steps), more)",
        "own.new_ones(len(steps), more)",
        ("test_shared_prefix.py::test_longer_rows_and_blocks_hold_the_same[llama]",),
    ),
    Mutation(
        "rows are shared whatever they cost",
        SHARED,
        "if longest <= layout.shared and not apart:",
        "if longest <= layout.shared:",
        ("test_shared_prefix.py::test_the_cost_divides_the_rows",),
    ),
    Mutation(
        "missing weights are not refused",
        "pipeline/weights.py",
        '("missing", "mismatched", "unexpected")',
        '("mismatched", "unexpected")',
        ("test_weights.py::test_weights_that_are_not_the_models_are_refused",),
    ),
    Mutation(
        "annotation ends truncated responses",
        "annotation/scorers.py",
        'record["responses"], record["truncated"], record["prompt_id"]',
        'record["responses"], [False] * len(record["responses"]), record["prompt_id"]',
        (REWARDS,),
    ),
    Mutation(
        "annotation.dtype is not passed on",
        "annotation/scorers.py",
        "load_reward_model(scorer, settings.dtype,",
        'load_reward_model(scorer, "auto",',
        (REWARDS,),
    ),
    # ---- comparisons ----
    Mutation(
        "the seeds are not in the interval",
        "evaluation/components.py",
        "parts.append((variance / len(table), freedom))",
        "pass",
        ("test_components.py::test_an_interval_by_hand",),
    ),
    Mutation(
        "the uncertainty of KL is not in the interval",
        "evaluation/frontiers.py",
        " - slope * ((1 - share) * moved[..., 0] + share * moved[..., 1])",
        "",
        ("test_frontiers.py::test_the_spread_of_a_reading_is_its_derivative",),
    ),
    Mutation(
        "runs are paired by their place, not by their seed",
        "evaluation/frontiers.py",
        "theirs[[others.index(seed) for seed in seeds]]",
        "theirs",
        ("test_frontiers.py::test_differences_are_paired_over_seeds_and_prompts",),
    ),
    # ---- margins ----
    dropped("every kept policy is the last one", HELD_OUT, '            self.policy.set_adapter(f"step-{step}")', KEPT),
    Mutation(
        "the last policy is one on the way",
        HELD_OUT,
        "            self.policy.set_adapter(FINAL)",
        "            pass",
        (KEPT,),
    ),
    Mutation(
        "evaluation.prompts is for the written pairs alone",
        MARGINS,
        "if recipe.evaluation.prompts is not None and",
        "if False and",
        ("test_margins.py::test_pairs_of_the_first_prompts_alone",),
    ),
    Mutation(
        "s of both responses of a pair is that of the preferred",
        MARGINS,
        'f"s_{place + 1}": ratios[:, place]',
        'f"s_{place + 1}": ratios[:, 0]',
        ("test_margins.py::test_margins_by_hand",),
    ),
    Mutation(
        "a warning of displacement counts prompts of several epochs",
        "hps/displacement.py",
        "max(LAST, epochs)",
        "LAST",
        ("test_displacement.py::test_no_prompt_counts_twice",),
    ),
    Mutation(
        "the bootstrap has a seed of its own",
        MARGINS,
        "bootstrap(values, recipe.evaluation.bootstrap, recipe.seed)",
        "bootstrap(values, recipe.evaluation.bootstrap, 0)",
        (RESAMPLED,),
    ),
    Mutation(
        "evaluation.bootstrap is not passed on",
        MARGINS,
        "bootstrap(values, recipe.evaluation.bootstrap, recipe.seed)",
        "bootstrap(values, 1000, recipe.seed)",
        (RESAMPLED,),
    ),
    Mutation(
        "held-out responses are longer than those of the training",
        HELD_OUT,
        "self.limit = recipe.schedule.max_length",
        "self.limit = 10**6",
        ("test_margins.py::test_responses_are_cut_where_training_cut_them",),
    ),
    Mutation(
        "the log ratio of the answers is that of the reference",
        "evaluation/divergence.py",
        "[after - before for after, before in",
        "[before - after for after, before in",
        ("test_margins.py::test_divergence_of_answers_by_hand",),
    ),
    Mutation(
        "the divergence along the training is that of the trained policy",
        "evaluation/divergence.py",
        "recipe=recipe, along=False, step=step",
        "recipe=recipe, along=False",
        ("test_margins.py::test_divergence_along_the_training_is_that_of_the_policy_kept_there",),
    ),
    Mutation(
        "the trained policy answers for those along the training",
        "generation/sample_answers.py",
        "self.recipe.checkpoint_folder(self.step)",
        "self.recipe.checkpoint_folder()",
        ("test_answers.py::test_policies_along_the_training_answer_too",),
    ),
    Mutation(
        "answers before and after are turned round",
        "evaluation/before_after.py",
        "(recipe.tested().sft_folder(), recipe.evaluated_folder())",
        "(recipe.evaluated_folder(), recipe.tested().sft_folder())",
        ("test_metrics.py::test_what_training_changed",),
    ),
]


class Failures:
    """A plugin of pytest: which tests failed."""

    def __init__(self):
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.names.append(report.nodeid)


def run_tests(folder: Path, tests: list[str], said) -> None:
    """In a process of its own: run tests of a copy, send the exit status and what failed."""
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    import pytest

    failures = Failures()
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # No cache of compiled files: a mutation may have the size and the second of the file before it.
    sys.dont_write_bytecode = True
    status = pytest.main(["-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)], plugins=[failures])
    import alignment

    assert Path(alignment.__file__).is_relative_to(folder), "the tests have run on another copy"
    said.send((int(status), failures.names))


class Copy:
    """A copy of the repository that tests run on."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in SOURCES:
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in FILES:
            shutil.copy(ROOT / name, folder / name)
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOAD)

    def failed(self, tests: list[str]) -> list[str]:
        """The tests that failed. RuntimeError: pytest could not run them."""
        ours, theirs = self.processes.Pipe()
        process = self.processes.Process(target=run_tests, args=(self.folder, tests, theirs))
        process.start()
        theirs.close()
        try:
            status, names = ours.recv()
        except EOFError:
            status, names = -1, []
        process.join()
        if status not in (0, 1):
            output = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the tests could not be run:\n{output[-3000:]}")
        return names

    def failed_with(self, mutation: Mutation, tests: list[str]) -> list[str]:
        path = self.folder / mutation.file
        before = path.read_text(encoding="utf-8")
        path.write_text(mutation.applied(self.folder), encoding="utf-8")
        try:
            return self.failed(tests)
        finally:
            path.write_text(before, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="mutations with a word in their name")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="tests to run instead of the named ones")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if any(word in mutation.what for word in options.only)]
    for mutation in MUTATIONS:
        mutation.applied(ROOT)
    # The tests hold on a CPU; a tiny model gains nothing from a second thread.
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder).resolve())
        wanted = options.tests or sorted({test for mutation in chosen for test in mutation.tests})
        if names := copy.failed(wanted):
            sys.exit(f"these fail without a mutation: {', '.join(names)}")
        print(f"{len(wanted)} tests or files pass without a mutation", flush=True)
        survived = 0
        for mutation in chosen:
            start = time.monotonic()
            names = copy.failed_with(mutation, options.tests or list(mutation.tests))
            by = ", ".join(name.rpartition("/")[2] for name in names[:2]) + (" ..." if names[2:] else "")
            print(f"{mutation.what:55s} {by or 'SURVIVED':s}  ({time.monotonic() - start:.0f} s)", flush=True)
            survived += not names
    print(f"{len(chosen)} mutations: {len(chosen) - survived} caught, {survived} survived")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
