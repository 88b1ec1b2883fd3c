"""`HPSTrainer`: TRL's DPOTrainer with the preference losses of the paper. The one file that imports the parent.

What changes: the loss (`_compute_loss`); the data, which are lists of responses that the plan chose, as token ids, so
the parent neither tokenises nor drops long examples; and the forward pass (hps/shared_prefix.py), in which responses
share their prompt where the model allows it, and the LM head sees only their tokens. The reference (the adapter
switched off, or a frozen copy), LoRA, DeepSpeed, saving and resuming are the parent's. tests/test_trainer.py pins what
we rely on in TRL 1.16.0.

A script gives a data set, from which the plan is made here (docs/trainer.md). The stages of this repository give the
rows of a plan that is in a file.
"""

import copy
import hashlib
import json
import math
import re
import warnings
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import PeftModel
from pydantic import ValidationError
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, PreTrainedModel, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import create_model_from_path, use_adapter

from hps.chat import check_tokenizer, load_tokenizer
from hps.combinations import read, refused
from hps.dataset import RankedPrompts
from hps.displacement import of_training, still
from hps.errors import InputError, shorten
from hps.losses import FORMULAS, implicit_reward, nll_loss, preference_loss
from hps.methods import FAMILIES
from hps.negatives import gamma_stages
from hps.planning import Plan, data_warning, plan_lines
from hps.records import PlanRow
from hps.reference import Values, micro_batch, unknown_values
from hps.response_head import add_response_head, response_log_probs
from hps.row_costs import RowCosts
from hps.rows import CheckedRows
from hps.settings import Loss, Schedule, own_settings
from hps.shared_prefix import ONE_ROW, SEPARATE, Layout, make_rows
from hps.trial import prove

COLUMNS = ("row", "prompt_ids", "response_ids", "rewards", "weights", "dispreferred_count", "gamma", "reference")
# Settings of the parent that this loss does not honour, with the only value that is accepted.
NOT_HONOURED = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
    "precompute_ref_batch_size": None,
    "sync_ref_model": False,
    "router_aux_loss_coef": 0.0,
    "max_steps": -1,
    "padding_free": False,
    "truncation_mode": "keep_start",
    "pad_token": None,
    "pad_to_multiple_of": None,
    "auto_find_batch_size": False,
    "neftune_noise_alpha": None,
}
# Names that the parent has for settings of `Schedule`. Its global batch is the product of three.
OF_PARENT = {
    "epochs": "num_train_epochs",
    "device_batch": "per_device_train_batch_size",
    "max_length": "max_length",
    "global_batch": "",
}
PLAN_HASH = "hps_plan.sha256"  # of a script's checkpoint
PAPER = {
    "title": "Hard Preference Sampling for Human Preference Alignment",
    "id": "2502.14400",
    "citation": """@inproceedings{zou2025hps,
    title     = {{Hard Preference Sampling for Human Preference Alignment}},
    author    = {Xiandong Zou and Wanyu Lin and Yuchen Li and Pan Zhou},
    booktitle = {International Conference on Machine Learning},
    year      = {2025},
}""",
}


def sources(loss: Loss) -> dict[str, str]:
    """The papers of a loss, by what is theirs; arXiv numbers."""
    found = [
        (True, loss.family.upper(), FAMILIES[loss.family].source),
        (loss.is_sdpo, "S-DPO", "2406.09215"),
        (loss.preference == "hps" and not loss.is_sdpo, "HPS", PAPER["id"]),
        (loss.preference == "lipo", "LiPO-lambda", "2402.01878"),
        (loss.label_smoothing > 0 and loss.smoothing == "rdpo", "rDPO", "2403.00409"),
        (loss.dpo_per_token, "length normalisation", "2411.15124"),
        (loss.nll > 0, "the NLL term", "2404.19733"),
    ]
    return {name: source for given, name, source in found if given and source}


def _method_fields() -> list[tuple[str, Any, Any]]:
    """The settings of loss and schedule as fields of a dataclass, but for those that the parent has."""
    parents = {each.name for each in fields(DPOConfig)} | OF_PARENT.keys()
    return [
        (name, setting.annotation, field(default=setting.default, metadata={"help": setting.description}))
        for section in (Loss, Schedule)
        for name, setting in section.model_fields.items()
        if name not in parents
    ]


_WithMethod: Any = make_dataclass("_WithMethod", _method_fields(), bases=(DPOConfig,))


@dataclass
class HPSConfig(_WithMethod):
    """TRL's DPOConfig with every setting of `hps.settings.Loss` and `Schedule` as a field (docs/recipe.md has them).

    `Schedule`'s epochs are `num_train_epochs`; its global batch is `per_device_train_batch_size` times
    `gradient_accumulation_steps` times the number of processes.

    Raises:
        InputError: settings of the method that are out of bounds, contradict one another or would do nothing.
    """

    max_length: int | None = field(
        default=2048, metadata={"help": "Tokens of prompt and response; a longer response is cut."}
    )
    train_sampling_strategy: str = field(
        default="sequential", metadata={"help": "The plan is the order; nothing else is accepted."}
    )
    router_aux_loss_coef: float | None = field(default=0.0, metadata={"help": "Not honoured."})
    shared_prefix: bool = field(
        default=True, metadata={"help": "Compute a prompt once for its responses, where the model allows it."}
    )
    row_tokens: int | None = field(
        default=None, metadata={"help": "Fill rows of this many tokens with several prompts; None: a row a prompt."}
    )

    def __post_init__(self):
        if self.bf16 is None and not self.fp16 and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False  # the parent's default is True; a CPU is slower with it
        super().__post_init__()
        for name, reason, remedy in refused(self.loss, self.schedule):
            raise InputError(_flat(f"`{name}`: {reason}"), remedy=_flat(remedy))

    def to_dict(self) -> dict[str, Any]:
        """The parent's, which hides every field that ends with `_token`; here these are settings of a method."""
        kept = {name: getattr(self, name) for name in Loss.model_fields if name.endswith("_token")}
        return {**super().to_dict(), **kept}

    @property
    def loss(self) -> Loss:
        """The settings of the loss."""
        return _section(Loss, {name: getattr(self, name) for name in Loss.model_fields})

    @property
    def schedule(self) -> Schedule:
        """What each step trains on."""
        named = {
            name: getattr(self, OF_PARENT.get(name, name)) for name in Schedule.model_fields if name != "global_batch"
        }
        size = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size
        return _section(Schedule, {**named, "global_batch": size})


def _section(kind: Any, values: dict[str, Any]) -> Any:
    """Settings with their bounds, named as HPSConfig has them."""
    try:
        found = kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        problem = f"`{OF_PARENT.get(name) or name}` is {first['input']!r}: {first['msg']}"
        raise InputError(problem, where="HPSConfig") from None
    if kind is Loss and found.family not in FAMILIES:
        raise InputError(
            f"`family` is {found.family!r}", where="HPSConfig", remedy=f"give one of {', '.join(FAMILIES)}"
        )
    return found


def _flat(text: str) -> str:
    """A message about `loss.family` and the like with the names of HPSConfig."""
    for name, parents in {**OF_PARENT, "global_batch": "gradient_accumulation_steps"}.items():
        text = text.replace(f"schedule.{name}", parents)
    return re.sub(r"\b(loss|schedule|optimizer)\.(?=[a-z])", "", text)


@contextmanager
def _named_as_here() -> Generator[None]:
    """Messages with the names of HPSConfig."""
    try:
        yield
    except InputError as error:
        raise InputError(_flat(str(error))) from None


@dataclass
class PlanCollator:
    """Lists of responses, of unequal lengths, as one batch.

    Tensors per list: `mask` (lists, n), False where a list is shorter; `lengths` and `rewards` (lists, n), 1 and 0
    there, rewards minus the list's highest; `log_weights` (lists, terms, n); `dispreferred_count` (lists, terms);
    `gamma` (lists,); `row` (lists,) of the plan; `tokens` (lists,), of its responses, each with the prompt; `reference`
    (lists, n), log-probabilities in nats where the examples have them. Floating-point tensors have torch's default
    dtype: float32, in some tests float64.

    `rows` are those of `hps.shared_prefix.make_rows`, for a model of this `layout`.
    """

    pad_token_id: int
    layout: Layout = SEPARATE
    row_tokens: int | None = None
    gridded: bool = False
    costs: RowCosts | None = None

    @classmethod
    def of(
        cls, layout: Layout, shape: Any, pad_token_id: int, config: HPSConfig, adapter: bool, estimate: bool = True
    ) -> "PlanCollator":
        """As the settings ask for it.

        Args:
            layout: that the class of models is proven to allow (`hps.trial.prove`).
            shape: the model's configuration.
            adapter: an adapter trains, not the model's weights.
            estimate: on CUDA, in half precision, prompts are shared only where that is estimated to be faster.
        """
        costs, budget, cuda = None, config.row_tokens, torch.cuda.is_available() and not config.use_cpu
        if not config.shared_prefix:
            layout = replace(layout, shared=0, reason="`shared_prefix` is false")
        if flex := shape._attn_implementation == "flex_attention":
            budget = ONE_ROW  # it computes nothing between the prompts of a row
        half = config.bf16 or config.fp16 or shape.dtype in (torch.bfloat16, torch.float16)
        if cuda and estimate and half and layout.shared:
            with suppress(AttributeError, TypeError):  # no sizes of Llama's kind of layers: prompts are shared
                costs = RowCosts.of(shape.get_text_config(), adapter, bool(config.gradient_checkpointing), flex)
        return cls(pad_token_id, layout, budget, cuda, costs)

    def __call__(self, examples: list[dict]) -> dict:
        lengths = [[len(ids) for ids in example["response_ids"]] for example in examples]
        # The logarithm in float64: a weight too small for float32 may still count against a large reward.
        weights = _padded([term for example in examples for term in example["weights"]], dtype=torch.float64)
        batch = {
            "rows": self.rows(examples),
            "row": torch.tensor([example["row"] for example in examples]),
            "tokens": torch.tensor([sum(len(e["prompt_ids"]) + len(y) for y in e["response_ids"]) for e in examples]),
            "mask": torch.arange(weights.shape[1]) < torch.tensor(list(map(len, lengths)))[:, None],
            "lengths": _padded(lengths, 1.0),
            # Minus the highest: losses see differences alone, and float32 rounds them off where all rewards are large.
            "rewards": _padded([[reward - max(e["rewards"]) for reward in e["rewards"]] for e in examples]),
            "log_weights": weights.view(len(examples), -1, weights.shape[1]).log().to(torch.get_default_dtype()),
            "dispreferred_count": _padded([example["dispreferred_count"] for example in examples]),
            "gamma": torch.tensor([float(example["gamma"]) for example in examples]),
        }
        if examples[0].get("reference") is not None:
            batch["reference"] = _padded([example["reference"] for example in examples])
        return batch

    def rows(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """The rows of a forward pass alone."""
        prompts, responses = ([example[name] for example in examples] for name in ("prompt_ids", "response_ids"))
        how = self.pad_token_id, self.row_tokens, self.gridded, self.costs
        return make_rows(self.layout, prompts, responses, *how)


def _padded(lists: Sequence[Sequence[float]], value: float = 0.0, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Lists of unequal lengths as rows of one tensor, of torch's default dtype."""
    rows = [torch.tensor(each, dtype=dtype or torch.get_default_dtype()) for each in lists]
    return pad_sequence(rows, batch_first=True, padding_value=value)


@dataclass
class RowsWithReference(Sequence[dict]):
    """Rows, each with the log-probabilities of its responses under the reference, nats."""

    rows: Sequence[dict]
    log_probs: Sequence[Sequence[float]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:  # ty: ignore[incompatible-method-override] (no slices)
        return {**self.rows[index], "reference": list(self.log_probs[index])}


Computed = tuple[str, Sequence[float]]  # key of a micro-batch, and log-probabilities of its responses
Through = Callable[[Iterator[Computed], int], Iterator[Computed]]


class HPSTrainer(DPOTrainer):
    """Any family under any preference model that it has, trained in the order of the plan.

    Args:
        model: a name or folder, which is loaded with `args.model_init_kwargs`, or a model.
        args: the settings, None: the defaults; the trainer works on a copy. `num_train_epochs` is 1 in it: the plan
            holds all epochs.
        data_collator: None: `PlanCollator.of` this model.
        train_dataset: a data set (`hps.dataset`), of which the plan is made; or the rows of a plan (`hps.rows`).
        eval_dataset: the same, or several by name. Its plan has one epoch, with the gamma of the last stage.
        processing_class: the tokenizer; None: the model's.
        others: as for DPOTrainer.

    Attributes:
        plan: the rows of the plan that was made here, in training order; None where it was given.
        facts: what is known of it: counts, and diagnostics of each stage.

    Raises:
        ValueError: a setting of the parent that this loss does not honour, or a sampler that would shuffle the plan.
        InputError: a row of the data, or the tokenizer, cannot be used.
    """

    _tag_names = ["trl", "hps"]
    args: Any
    model: Any
    data_collator: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: HPSConfig | None = None,
        data_collator: PlanCollator | None = None,
        train_dataset: Dataset | Sequence[dict] | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **others,
    ):
        if args is not None and not isinstance(args, HPSConfig):
            problem = f"`args` is of the type {type(args).__name__}"
            raise InputError(problem, remedy="give HPSConfig: it is DPOConfig with the settings of the method")
        args = copy.copy(args or HPSConfig())
        _refuse_unsupported(args, others)
        _check_data(train_dataset, "train_dataset")
        if eval_dataset is not None:
            for data in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
                _check_data(data, "eval_dataset")
        self.loss, self.schedule = args.loss, args.schedule
        self.compares = FAMILIES[self.loss.family].reference  # the policy with the reference
        self.tokens: float | None = None  # that have passed the policy; known with the first step
        self.start: float | None = None  # the largest |s| before the first update, nats; None when resumed
        self.starts_as_reference = ref_model is None  # s is 0 before the first update
        self.adapted_reference = False  # the reference is the adapter as it is before the first update, not its base
        self.plan: Sequence[PlanRow] | None = None
        self.facts: dict[str, Any] | None = None
        self._has_heads = self._start_is_said = False
        self._name = "S-DPO" if self.loss.is_sdpo else f"{self.loss.family}-{self.loss.preference}".upper()
        ours = self.loss.preference == "hps" and FAMILIES[self.loss.family].in_paper and not self.loss.is_sdpo
        self._paper = PAPER if ours else {}
        revision = (args.model_init_kwargs or {}).get("revision")
        if processing_class is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            processing_class = load_tokenizer(name, revision)
        elif isinstance(train_dataset, Dataset):
            check_tokenizer(processing_class, processing_class.name_or_path)
        # Before a model loads: a bad row is found here.
        self.rows: Any = train_dataset
        notes: list[str] = []
        if isinstance(train_dataset, Dataset):
            with _named_as_here():
                self.rows, made, notes = self._planned(train_dataset, processing_class, self.schedule, args)
            self.plan, self.facts = self.rows.plan, made.facts()
            self._data = _described(train_dataset)
        model, ref_model = self._models(model, ref_model, args, others)
        if data_collator is None:
            base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
            adapter = base is not model or others.get("peft_config") is not None
            layout = prove(base, self.schedule.max_length)
            data_collator = PlanCollator.of(layout, base.config, processing_class.pad_token_id, args, adapter)
            if data_collator.layout.shared < self.schedule.max_length:
                warnings.warn(rows_apart(data_collator.layout), stacklevel=2)
        _refuse_epochs(args, len(self.rows) // self.schedule.global_batch)
        args.num_train_epochs = 1
        # The parent takes no other kind of sequence; it gets the rows themselves back from `_prepare_dataset`.
        numbers = Dataset.from_dict({"row": range(len(self.rows))})
        super().__init__(
            model, ref_model, args, data_collator, numbers, eval_dataset, processing_class=processing_class, **others
        )
        if not self.compares:
            self.ref_model = None  # the parent made a frozen copy
        self._add_heads()
        if self.facts is not None:
            lines = [_flat(line) for line in plan_lines(self.facts, self.loss, self.schedule)]
            lines.append(f"{self.rows.cut} responses are cut at max_length={args.max_length}")
            lines += notes
            self.accelerator.print("\n".join(f"plan: {line}" for line in lines))

    def _models(self, model: Any, ref_model: Any, args: HPSConfig, others: dict[str, Any]) -> tuple[Any, Any]:
        """Policy and frozen copy; a name is loaded without dropout, and what the parent would use for it is taken out
        of `args` and `others`."""
        if not isinstance(model, str):
            if not self.compares and (found := dropouts(model.config)):
                problem = f"the model's configuration has {', '.join(found)}, and without a reference nothing shows it"
                raise InputError(problem, remedy="give the model's name, or set them to 0 before it is loaded")
            return model, ref_model
        load = partial(_load, model, args, others.pop("quantization_config", None))
        policy = load()
        copies = self.compares and not args.precompute_ref_log_probs and others.get("peft_config") is None
        if copies and ref_model is None:
            ref_model = load()  # the parent would load it with the model's own dropout
        args.model_init_kwargs = None
        return policy, ref_model

    def _planned(
        self, dataset: Dataset, tokenizer: Any, schedule: Schedule, args: Any
    ) -> tuple[CheckedRows, Plan, list[str]]:
        """The rows of a data set's plan; the plan, whose rows were made; the notes of its prompts."""
        prompts = RankedPrompts(dataset, tokenizer, args.dataset_num_proc)
        made = Plan(prompts, self.loss, schedule, args.seed, prompts.where)
        rows = CheckedRows(list(made.rows()), prompts, tokenizer, schedule.max_length, prompts.where)
        used = (prompts[name] for name in made.prompts)
        if warning := data_warning(used, self.loss, schedule, args.seed):
            warnings.warn(warning, stacklevel=3)
        return rows, made, prompts.notes

    def train(self, resume_from_checkpoint=None, *given, **more):
        """The parent's; it warns at the end if good responses became less probable, or if the policy did not move.

        Both are read from the log (`hps.displacement`). The policy moved if the mean s of the last steps is above what
        `rounding` lets it be in the precision of the training.

        Raises:
            InputError: the checkpoint is of other data, or of another plan or loss.
        """
        if self.plan is not None and resume_from_checkpoint:
            folder = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(self.args.output_dir)
            path = Path(folder or "") / PLAN_HASH
            if path.is_file() and path.read_text() != self._plan_hash():
                problem = "the checkpoint is of other data, or of another plan, loss or seed"
                raise InputError(problem, where=str(folder), remedy="give the settings and data that it began with")
        try:
            result = super().train(resume_from_checkpoint, *given, **more)
        finally:  # a second call goes on with the policy as it is, and counts its steps from 0
            self.starts_as_reference = self.starts_as_reference and not self.state.global_step
        lines = self.state.log_history, self.schedule.epochs, self.schedule.global_batch
        if warning := of_training(*lines) or still(*lines, self._most):  # what has fallen has moved
            self.accelerator.print(f"training: WARNING: {warning}", flush=True)
        return result

    def _most(self, tokens: float, log_prob: float) -> float:
        """`rounding` of one response."""
        return rounding(self._computed(), torch.tensor(tokens), torch.tensor(log_prob)).item()

    def _computed(self) -> torch.dtype:
        """What a forward pass computes in."""
        if self.accelerator.native_amp:
            return torch.get_autocast_dtype(self.accelerator.device.type)
        return _dtype(self.model)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.plan is not None and self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / PLAN_HASH).write_text(self._plan_hash())

    def _plan_hash(self) -> str:
        """Of what decides the training beside the optimizer: the plan, its rows' token ids and the loss."""
        settings = own_settings(self.loss.model_dump()), self.args.seed, list(self.plan or []), self.rows.hash
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def save_plan(self, path: str | Path) -> None:
        """Write the plan that was made here, a JSON line a row (docs/formats.md)."""
        if self.plan is None:
            raise ValueError("the plan was given to this trainer; there is none of its own to save")
        if self.is_world_process_zero():
            Path(path).write_text("".join(json.dumps(row) + "\n" for row in self.plan), encoding="utf-8")

    def _add_heads(self) -> None:
        """Put our head in the place of the parent's; the parent has wrapped the reference by DeepSpeed already."""
        if self._has_heads:
            return
        gathers = self.data_collator.layout.gathers
        add_response_head(self.model.get_base_model() if self.is_adapted else self.model, gathers)
        if self.ref_model is not None:
            add_response_head(self.accelerator.unwrap_model(self.ref_model), gathers)
        self._has_heads = True

    @property
    def is_adapted(self) -> bool:
        """The policy is an adapter on the reference."""
        return hasattr(self.model, "peft_config")

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """The plan's rows are token ids already; those of an evaluation are made here."""
        if dataset_name == "train":
            return self.rows
        _check_data(dataset, "eval_dataset")
        if not isinstance(dataset, Dataset):
            return dataset
        gamma = gamma_stages(self.schedule)[-1]
        last = {"epochs": 1, "global_batch": 1, "gamma_start": gamma, "gamma_end": gamma}
        return self._planned(dataset, processing_class, self.schedule.model_copy(update=last), args)[0]

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """With `precompute_ref_log_probs`: the rows with the reference's log-probabilities, in memory.

        The parent calls it before the training, and for what is evaluated.
        """
        if not self.compares:
            return dataset
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            problem = "ZeRO-3 spreads the reference's weights over the processes before the training"
            raise ValueError(f"{problem}; set `precompute_ref_log_probs=False`")
        self._add_heads()
        values, _ = self.reference_values(dataset, batch_size)
        return RowsWithReference(dataset, values)

    def _prepare_input(self, data):
        """To the device, as it is.

        The parent casts floating-point tensors to DeepSpeed's precision. Here these are log-probabilities, rewards,
        weights and lengths: in bf16 a reference of 130 nats is off by up to half a nat.
        """
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss alone: there are no logits of whole rows."""
        return super().prediction_step(model, inputs, True, ignore_keys)

    def predict(self, test_dataset, *given, **more):
        """The parent's; what it has for an evaluation are prepared rows.

        Raises:
            InputError: a data set, of which only the loss could be told.
        """
        if isinstance(test_dataset, Dataset):
            problem = "`predict` has no logits to return for a data set"
            raise InputError(problem, remedy='for its loss call `evaluate(dataset, metric_key_prefix="test")`')
        _check_data(test_dataset, "test_dataset")
        return super().predict(test_dataset, *given, **more)

    def _set_signature_columns_if_needed(self):
        self._signature_columns = list(COLUMNS)

    def _compute_loss(self, model, inputs, return_outputs):
        """Mean loss of the lists in the batch; log-probabilities are summed over the response's tokens."""
        policy = self._log_probs(model, inputs)
        reference = inputs.get("reference")
        if reference is None and self.compares:
            with self.as_reference():
                reference = self._log_probs(self.ref_model or model, inputs)
        if self.state.global_step == 0 and self.starts_as_reference and reference is not None:
            self._check_start(policy.detach(), reference, inputs["lengths"])
        scores = FORMULAS[self.loss.family].score(self.loss, policy, reference, inputs["lengths"])
        lists = [inputs[name] for name in ("rewards", "mask", "log_weights", "dispreferred_count")]
        losses = preference_loss(self.loss, scores, *lists)
        if self.loss.nll > 0:
            losses = losses + self.loss.nll * nll_loss(policy, inputs["lengths"])
        # The logged rewards are rho of Eq. 3, also where a family's score is something else.
        rewards = implicit_reward(policy, reference, self.loss.beta) if self.compares else scores
        self._record(inputs, policy.detach(), rewards.detach(), losses.detach())
        loss = losses.mean()
        return (loss, {"policy": policy}) if return_outputs else loss

    def _log_probs(self, model, inputs) -> torch.Tensor:
        """Log-probabilities of the responses under a model, (lists, n), 0 on padding, nats."""
        flat, mask = response_log_probs(model, inputs["rows"]), inputs["mask"]
        return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)

    @contextmanager
    def as_reference(self):
        """Inside it a forward pass of `ref_model`, or without one of the policy, is the reference's.

        That of an `adapted_reference` only before the first update.
        """
        adapter = nullcontext()
        if self.is_adapted and not self.adapted_reference:
            model = self.accelerator.unwrap_model(self.model)
            # The parent keeps a copy of an adapter that was given with the model.
            adapter = use_adapter(model, "ref" if "ref" in model.peft_config else None)
        settings: Any = self.args.gradient_checkpointing_kwargs
        checkpointing = disable_gradient_checkpointing(self.model, settings)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            yield

    def reference_log_probs(self, examples: list[dict]) -> list[float]:
        """Log-probabilities of the responses of a micro-batch under the reference, nats; before the training.

        The same pass as in the step (`_compute_loss`), so that both give the same bits.
        """
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        model.to(self.accelerator.device).eval()
        inputs = self._prepare_inputs(self.data_collator(examples))
        with self.as_reference():
            return self._log_probs(model, inputs)[inputs["mask"]].tolist()

    def reference_values(
        self, rows: Sequence[dict], size: int, known: Iterable[Computed] = (), through: Through | None = None
    ) -> tuple[Values, int]:
        """Log-probabilities of rows under the reference, before the training, and how many micro-batches were computed.

        The processes share the micro-batches.

        Args:
            size: rows of a micro-batch.
            known: of other micro-batches, too; read by the first process and sent to the others, so that all find the
                same.
            through: wraps this process's results, called with their count; it may write them to disk.

        Raises:
            InputError: a log-probability is not finite.
        """
        values = unknown_values(rows, size, self.accelerator)
        if self.accelerator.is_main_process:
            values.add(known)
        (values.known,) = broadcast_object_list([values.known])
        todo = values.missing()
        mine = todo[self.accelerator.process_index :: self.accelerator.num_processes]
        found: Iterator[Computed] = self.computed_values(rows, values, mine)
        if through and mine:
            found = through(found, len(mine))
        for computed in gather_object([[(key, array("d", log_probs)) for key, log_probs in found]]):
            values.add(computed)
        return values, len(todo)

    def computed_values(self, rows: Sequence[dict], values: Values, numbers: Iterable[int]) -> Iterator[Computed]:
        """`(batch_key, log-probabilities)` of micro-batches, each computed on demand. InputError as above."""
        for number in numbers:
            log_probs = self.reference_log_probs(micro_batch(rows, values.size, number))
            if not all(map(math.isfinite, log_probs)):
                problem = f"the policy gives a response the log-probability {log_probs} before training"
                raise InputError(problem, remedy="check the model's weights")
            yield values.keys[number], log_probs

    def computation(self) -> dict[str, Any]:
        """Everything beside the reference's files and the token ids that decides the last bits of its figures."""
        state, collator = self.accelerator, self.data_collator
        reference = state.unwrap_model(self.ref_model or self.model)
        cuda = state.device.type == "cuda"
        # What only CUDA has is left out elsewhere, so that earlier values are still found.
        more = {"gridded": True, "costs": collator.costs and asdict(collator.costs)} if collator.gridded else {}
        return {
            "dtype": str(reference.dtype),
            "autocast": state.mixed_precision if state.native_amp else None,
            "attention": reference.config._attn_implementation,
            "layout": asdict(collator.layout),
            "row_tokens": collator.row_tokens,
            "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
            "versions": [version(name) for name in ("torch", "transformers")],
            **more,
        }

    def set_reference(self, log_probs: Sequence[Sequence[float]]) -> None:
        """Give each row the log-probabilities of its responses under the reference, which is then let go."""
        self.train_dataset = RowsWithReference(self.rows, log_probs)
        self.ref_model = None

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """The parent's, with what was trained: method, schedule and data."""
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            with (Path(self.args.output_dir) / "README.md").open("a", encoding="utf-8") as file:
                file.write(self._method_section())

    def _method_section(self) -> str:
        settings = read(self.loss, self.schedule)
        settings |= {name: getattr(self.args, name) for name in ("learning_rate", "seed")}
        settings["lr_scheduler_type"] = self.args.lr_scheduler_type.value
        if self.is_adapted:
            adapter = self.model.peft_config[self.model.active_adapter].to_dict()
            settings |= {name: adapter[name] for name in ("r", "lora_alpha", "target_modules") if name in adapter}
            if isinstance(modules := adapter.get("target_modules"), (list, set)):
                settings["target_modules"] = ", ".join(sorted(modules))
        table = "".join(f"| `{name}` | {value} |\n" for name, value in settings.items())
        data = f"{len(self.rows)} rows"
        if self.facts:
            data = f"{self._data}; {plan_lines(self.facts, self.loss, self.schedule)[0]}"
        papers = "".join(f"- {name}: arXiv {source}\n" for name, source in sources(self.loss).items())
        return f"\n\n## Method\n\n{papers}\n| setting | value |\n|---|---|\n{table}\nData: {data}.\n"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Under ZeRO-1 and 2 an adapter alone, which every process holds whole; else as the parent does.

        There the parent would first clone all weights in every process's memory.
        """
        deepspeed = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if deepspeed and self.is_adapted and deepspeed.zero_stage < 3:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _check_start(self, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> None:
        """Keep the largest |s| before the first update, where policy and reference are one model.

        Args:
            policy, reference: (lists, n), log-probabilities, 0 on padding, nats.
            lengths: (lists, n), tokens.

        Raises:
            InputError: it is more than rounding explains. Raised on every process, so none hangs.
        """
        computed = self._computed()
        s = (policy - reference).abs()
        worst = torch.stack([s.max(), (s / rounding(computed, lengths, reference)).max()])
        # The largest of all processes; a NaN is passed on.
        largest, share = self.accelerator.gather(worst.unsqueeze(0)).amax(dim=0).tolist()
        self.start = max(self.start or 0.0, largest)
        if not share <= 1:
            start = f"before the first update policy and reference differ by |s| = {largest:.3g} nats for a response"
            remedy = "delete the stored reference, set every dropout in the policy's config.json to 0, or give "
            remedy += "`training.reference=in_step` (`precompute_ref_log_probs=False` in a script); if it stays, the "
            remedy += "policy's values are not finite or repeatable"
            raise InputError(f"{start}, {share:.3g} times what rounding in {computed} explains", remedy=remedy)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's; the first line has `s/largest_at_start`, too."""
        if self.start is not None and not self._start_is_said and self.model.training:
            self._start_is_said = True
            self.accelerator.print(f"training: s at step 0: largest |s| = {self.start:.3g} nats", flush=True)
            logs = {**logs, "s/largest_at_start": self.start}
        super().log(logs, start_time)

    def _record(self, inputs, policy, rewards, losses) -> None:
        """Put the step's figures where the parent's `log` averages them over the accumulation steps.

        `rejected` is the mean over the dispreferred by their weights in the loss (all alike in a list). With a
        reference `s` is log pi_theta - log pi_ref, nats, and `s_per_token` the same divided by the response's tokens.

        Raises:
            InputError: a loss is not finite; raised on every process, so none hangs.
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        lengths = inputs["lengths"]
        share = inputs["log_weights"][:, 0].exp()
        if self.loss.takes_lists:
            share = inputs["mask"].to(share.dtype)
            share[:, 0] = 0
            share = share / share.sum(dim=1, keepdim=True)
        figures = {"rewards/accuracies": (share * (rewards[:, :1] > rewards)).sum(dim=1)}
        if self.loss.reads_gamma:
            figures["gamma"] = inputs["gamma"]
        s = rewards / self.loss.beta
        ratios = (("s", s), ("s_per_token", s / lengths)) if self.compares else ()
        for name, values in (("rewards", rewards), ("logps", policy), ("lengths", lengths), *ratios):
            figures[f"{name}/chosen"] = values[:, 0]
            figures[f"{name}/rejected"] = (share * values).sum(dim=1)
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        # -1, or a row of the plan whose loss is not finite. It shares the gather of the figures, so it costs nothing.
        broken = torch.where(losses.isfinite(), -1, inputs["row"]).max()
        dtype = torch.get_default_dtype()
        stacked = torch.stack([*(value.to(dtype).mean() for value in figures.values()), broken.to(dtype)])
        gathered = self.accelerator.gather(stacked.unsqueeze(0))
        *means, broken = torch.cat([gathered[:, :-1].mean(dim=0), gathered[:, -1:].amax(dim=0)]).tolist()
        if broken >= 0:
            place = self.rows.places([int(broken)]) if self.model.training else f"row {int(broken)} of the evaluation"
            raise not_finite("loss", self.state.global_step + 1, place)
        for name, value in zip(figures, means, strict=True):
            metrics[name].append(value)
        if self.model.training:
            if self.tokens is None:
                self.tokens = tokens_before(self.state)
            self.tokens += self.accelerator.gather(inputs["tokens"].sum()).sum().item()
            metrics["num_tokens"] = [self.tokens]


def tokens_before(state: TrainerState) -> float:
    """Tokens that passed the policy up to a checkpoint; 0 at the start."""
    return next((line["num_tokens"] for line in reversed(state.log_history) if "num_tokens" in line), 0.0)


def _described(dataset: Dataset) -> str:
    """A data set for the model card. One that was read from files knows their format, not their names."""
    name, form = dataset.info.dataset_name, dataset.info.builder_name
    if name is None or name == form:
        name = f"a data set ({form})" if form else "a data set"
    return f"{name}, {len(dataset)} rows, fingerprint {dataset._fingerprint}"


def rows_apart(layout: Layout) -> str:
    """What to say of conversations that do not share a prompt."""
    above = f" of more than {layout.shared} tokens" if layout.shared else ""
    return f"conversations{above} have rows of their own: {layout.reason}"


def dropouts(config: Any) -> list[str]:
    """Fields of a model's configuration that drop something, as `name=value`."""
    parts = (vars(config), vars(config.get_text_config()))
    named = {name: value for part in parts for name, value in part.items() if "drop" in name}
    return sorted(f"{name}={value}" for name, value in named.items() if isinstance(value, float) and value)


def without_dropout(config: Any) -> Any:
    """The configuration with every dropout at 0: the policy and the reference must be equal before the first step.

    The parent's `disable_dropout` reaches modules alone, LoRA's among them. Many models (llama, opt, starcoder2) apply
    dropout as a function, with a probability of their configuration.
    """
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _load(name: str, args: HPSConfig, quantization: Any) -> PreTrainedModel:
    """A model without dropout, as the parent would load it."""
    given = {"device_map": None, "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization is not None:
        given["quantization_config"] = quantization
    if args.disable_dropout:
        same = {key: given[key] for key in ("revision", "trust_remote_code") if key in given}
        given["config"] = without_dropout(AutoConfig.from_pretrained(name, **same))
    return create_model_from_path(name, **given)


def not_finite(what: str, step: int, places: str) -> InputError:
    """The error that ends a training before it spoils the weights."""
    remedy = "look at these rewards and texts, or lower `optimizer.learning_rate`; the last checkpoint is kept"
    return InputError(f"step {step}: the {what} is not finite, with {places}", remedy=remedy)


def rounding(dtype: torch.dtype, tokens: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Most that rounding lets s = log pi_theta - log pi_ref be where both are one model; nats.

    A token's log-probability is a difference of logits of up to some 30 nats, rounded by `eps` of their size, and the
    layers before add as much: 64 eps. Errors of a response's tokens are independent, so they grow with the square root
    of their number. The sum over the tokens is taken in fp32, at 8 eps of its size. (The same responses in another
    layout of rows differed by a third of this bound.)

    Args:
        dtype: that the model computes in.
        tokens: of each response.
        log_probs: of each response.
    """
    summed = 8 * torch.finfo(torch.float32).eps * log_probs.abs()
    return 64 * torch.finfo(dtype).eps * tokens.sqrt() + summed


def _dtype(model) -> torch.dtype:
    """Of the weights that pass every token; an adapter's may be another."""
    return next(model.parameters()).dtype


def _refuse_unsupported(config: HPSConfig, others: Mapping[str, Any]) -> None:
    for name, accepted in NOT_HONOURED.items():
        value = getattr(config, name)
        if value != accepted:
            raise ValueError(f"HPSTrainer does not honour `{name}={value}`; leave it at {accepted!r}")
    if config.train_sampling_strategy != "sequential":
        raise ValueError("HPSTrainer trains in the order of the plan; set `train_sampling_strategy='sequential'`")
    if config.accelerator_config.split_batches:
        raise ValueError("HPSTrainer does not honour `accelerator_config.split_batches`; leave it out")
    if config.fsdp:
        raise ValueError("HPSTrainer was not tried with FSDP; leave out `fsdp`, and use DeepSpeed")
    if others.get("compute_metrics") is not None:
        raise ValueError("HPSTrainer returns no logits; leave out `compute_metrics`")


def _refuse_epochs(config: HPSConfig, steps: int) -> None:
    """The plan holds all epochs, so for the parent the training has one."""
    named = [name for name in ("save_strategy", "eval_strategy") if getattr(config, name) == "epoch"]
    if named and (epochs := config.num_train_epochs) > 1:
        each = {"save_strategy": "save_steps", "eval_strategy": "eval_steps"}[named[0]]
        remedy = f"set `{named[0]}='steps'` and `{each}={max(1, round(steps / epochs))}`"
        raise ValueError(f"`{named[0]}` is 'epoch', and the plan holds all {epochs:g} epochs as one; {remedy}")


def _check_data(data: Any, name: str) -> None:
    """Refuse what is neither a data set nor the rows of a plan."""
    if not isinstance(data, (Dataset, Sequence)) or isinstance(data, str):
        kind, remedy = type(data).__name__, "give a `Dataset`"
        if isinstance(data, dict) and data:  # a DatasetDict
            names = [f'dataset["{split}"]' for split in data]
            remedy = f"give {' or '.join(names)}"
        raise ValueError(f"`{name}` is of the type {kind}, but the plan needs all prompts; {remedy}")
    _check_rows(data, name)


def _check_rows(data: Any, name: str) -> None:
    """Refuse a list of preference data: a sequence is taken for the rows of a plan, as token ids."""
    if not isinstance(data, (list, tuple)) or not data or (isinstance(data[0], Mapping) and "response_ids" in data[0]):
        return
    found = shorten(sorted(data[0])) if isinstance(data[0], Mapping) else f"a {type(data[0]).__name__}"
    problem = f"`{name}` is a {type(data).__name__} whose elements are not the token ids of a plan's rows: {found}"
    raise InputError(problem, remedy="give datasets.Dataset.from_list(rows)")
