"""`HPSTrainer`: TRL's DPOTrainer with the preference losses of the paper. The one file that imports the parent.

What changes: the loss (`_compute_loss`); the data, which are lists of responses that the plan chose, as token ids, so
the parent neither tokenises nor drops long examples; and the forward pass (hps/shared_prefix.py), in which responses
share their prompt where the model allows it, and the LM head sees only their tokens. The reference (the adapter
switched off, or a frozen copy), LoRA, DeepSpeed, saving and resuming are the parent's. tests/test_trainer.py pins what
we rely on in TRL 1.16.0.
"""

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from hps.errors import InputError
from hps.losses import FORMULAS, implicit_reward, nll_loss, preference_loss
from hps.methods import FAMILIES
from hps.row_costs import RowCosts
from hps.settings import Loss
from hps.shared_prefix import SEPARATE, Layout, add_response_head, make_rows, response_log_probs

COLUMNS = ("row", "prompt_ids", "response_ids", "rewards", "weights", "dispreferred_count", "gamma", "reference")
# Settings of the parent that this loss does not honour, with the only value that is accepted.
NOT_HONOURED = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
    "precompute_ref_log_probs": False,
    "sync_ref_model": False,
    "router_aux_loss_coef": 0.0,
    "max_length": None,
}


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


class HPSTrainer(DPOTrainer):
    """Any family under any preference model that it has, trained in the order of the plan.

    Args:
        loss: the recipe's `loss` section; the only home of beta and label smoothing.
        args: a DPOConfig with `train_sampling_strategy="sequential"`, because the plan is the order.
        train_dataset: a sequence of rows of `COLUMNS` (`alignment.train.TokenRows`); they may be made when they are
            asked for. It stays in `rows`.
        others: as for DPOTrainer.

    Raises:
        ValueError: a setting of the parent that this loss does not honour, or a sampler that would shuffle the plan.
    """

    _tag_names = ["trl", "hps"]
    model: Any
    data_collator: Any

    def __init__(self, *args, loss: Loss, train_dataset: Sequence[dict] = (), **kwargs):
        config = kwargs["args"]
        _refuse_unsupported(config)
        config.beta = loss.beta
        self.loss = loss
        self.rows: Any = train_dataset
        self.compares = FAMILIES[loss.family].reference  # the policy with the reference
        self.tokens = 0  # that have passed the policy; a continued training sets what it had
        self.start: float | None = None  # the largest |s| before the first update, nats; None when resumed
        self.starts_as_reference = True  # s is 0 before the first update
        self.adapted_reference = False  # the reference is the adapter as it is before the first update, not its base
        # The parent takes no other kind of sequence; it gets the rows themselves back from `_prepare_dataset`.
        numbers = Dataset.from_dict({"row": range(len(train_dataset))})
        super().__init__(*args, train_dataset=numbers, **kwargs)
        if not self.compares:
            self.ref_model = None  # the parent made a frozen copy
        # The parent has wrapped the reference by DeepSpeed already.
        gathers = self.data_collator.layout.gathers
        add_response_head(self.model.get_base_model() if self.is_adapted else self.model, gathers)
        if self.ref_model is not None:
            add_response_head(self.accelerator.unwrap_model(self.ref_model), gathers)

    @property
    def is_adapted(self) -> bool:
        """The policy is an adapter on the reference."""
        return hasattr(self.model, "peft_config")

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """The plan's rows are token ids already."""
        return self.rows

    def _prepare_input(self, data):
        """To the device, as it is.

        The parent casts floating-point tensors to DeepSpeed's precision. Here these are log-probabilities, rewards,
        weights and lengths: in bf16 a reference of 130 nats is off by up to half a nat.
        """
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

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
        off = self.is_adapted and not self.adapted_reference
        adapter = self.accelerator.unwrap_model(self.model).disable_adapter() if off else nullcontext()
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

    def set_reference(self, log_probs: Sequence[Sequence[float]]) -> None:
        """Give each row the log-probabilities of its responses under the reference, which is then let go."""
        self.train_dataset = RowsWithReference(self.rows, log_probs)
        self.ref_model = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's; but of an adapter under ZeRO-1 and 2, where the parent clones all weights in every process's
        memory, and an adapter is all that is saved. Every process holds it whole."""
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
        device = policy.device.type
        computed = torch.get_autocast_dtype(device) if self.accelerator.native_amp else _dtype(self.model)
        s = (policy - reference).abs()
        worst = torch.stack([s.max(), (s / rounding(computed, lengths, reference)).max()])
        # The largest of all processes; a NaN is passed on.
        largest, share = self.accelerator.gather(worst.unsqueeze(0)).amax(dim=0).tolist()
        self.start = max(self.start or 0.0, largest)
        if not share <= 1:
            start = f"before the first update policy and reference differ by |s| = {largest:.3g} nats for a response"
            remedy = "delete `<output>/reference`, set every dropout in the policy's config.json to 0, or give "
            remedy += "`training.reference=in_step`; if it stays, the policy's values are not finite or repeatable"
            raise InputError(f"{start}, {share:.3g} times what rounding in {computed} explains", remedy=remedy)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's; the first step's line has `s/largest_at_start`, too."""
        if self.start is not None and self.state.global_step == 1:
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
            raise not_finite("loss", self.state.global_step + 1, self.rows.places([int(broken)]))
        for name, value in zip(figures, means, strict=True):
            metrics[name].append(value)
        self.tokens += self.accelerator.gather(inputs["tokens"].sum()).sum().item()
        metrics["num_tokens"] = [self.tokens]


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


def _refuse_unsupported(config: DPOConfig) -> None:
    for name, accepted in NOT_HONOURED.items():
        value = getattr(config, name)
        if value != accepted:
            raise ValueError(f"HPSTrainer does not honour `{name}={value}`; leave it at {accepted!r}")
    if config.train_sampling_strategy != "sequential":
        raise ValueError("HPSTrainer trains in the order of the plan; set `train_sampling_strategy='sequential'`")
