"""`HPSTrainer`: TRL's DPOTrainer with the preference losses of the paper. The one file that imports the parent.

What changes: the loss (`_compute_loss`); the data, which are lists of responses as token ids that the plan has chosen,
so that the parent's tokenisation and its dropping of long examples are left out; and how responses stand in the rows of
a forward pass (alignment/shared_prefix.py), unless each is to have a row of its own as in the parent. The reference
(the adapter switched off, or a frozen copy), the fused LM head of separate rows, LoRA, DeepSpeed, saving and resuming
are the parent's. tests/test_trainer.py pins what is relied upon of TRL 1.16.0.
"""

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from alignment.losses import implicit_reward, preference_loss, response_scores, simpo_reward
from alignment.shared_prefix import add_response_head, shared_log_probs, shared_rows
from hps.recipe import Loss

COLUMNS = ("prompt_ids", "response_ids", "rewards", "weights", "dispreferred_count", "gamma", "reference")
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
    there, rewards less the list's highest; `log_weights` (lists, terms, n); `dispreferred_count` (lists, terms);
    `gamma` (lists,); `tokens` (lists,), of its responses, each with the prompt; `reference` (lists, n),
    log-probabilities in nats where the examples have them.

    With `shared`, `rows` are those of `shared_rows`. Else the R responses of all lists are the rows of its `input_ids`,
    `attention_mask`, `completion_mask`, (R, tokens), padded at their right: first every list's first response, then
    every second one, and so on (with pairs that is the parent's order).
    """

    pad_token_id: int
    shared: bool = False
    row_tokens: int | None = None

    def __call__(self, examples: list[dict]) -> dict:
        sizes = torch.tensor([len(example["response_ids"]) for example in examples])
        mask = torch.arange(int(sizes.max())) < sizes[:, None]
        lengths = torch.ones(mask.shape).masked_scatter(
            mask, _flat(len(ids) for e in examples for ids in e["response_ids"])
        )
        terms = max(len(example["weights"]) for example in examples)
        # The logarithm in float64: a weight that float32 cannot hold may still count against a large reward.
        weights = torch.zeros(len(examples), terms, mask.shape[1], dtype=torch.float64)
        for place, example in enumerate(examples):
            for number, values in enumerate(example["weights"]):
                weights[place, number, : len(values)] = torch.tensor(values, dtype=torch.float64)
        batch = {
            "rows": self.rows(examples),
            "tokens": torch.tensor(
                [len(e["prompt_ids"]) * len(e["response_ids"]) + sum(map(len, e["response_ids"])) for e in examples]
            ),
            "mask": mask,
            "lengths": lengths,
            # Less the highest: losses see differences alone, and float32 rounds them off where all rewards are large.
            "rewards": torch.zeros(mask.shape).masked_scatter(
                mask, _flat(reward - max(e["rewards"]) for e in examples for reward in e["rewards"])
            ),
            "log_weights": weights.log().float(),
            "dispreferred_count": torch.tensor([e["dispreferred_count"] for e in examples], dtype=torch.float32),
            "gamma": torch.tensor([example["gamma"] for example in examples], dtype=torch.float32),
        }
        if examples[0].get("reference") is not None:
            given = _flat(value for example in examples for value in example["reference"])
            batch["reference"] = torch.zeros(mask.shape).masked_scatter(mask, given)
        return batch

    def rows(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """The rows of a forward pass alone."""
        if self.shared:
            prompts, responses = ([example[name] for example in examples] for name in ("prompt_ids", "response_ids"))
            return shared_rows(prompts, responses, self.pad_token_id, self.row_tokens)
        rows = [
            (example["prompt_ids"], example["response_ids"][place])
            for place in range(max(len(example["response_ids"]) for example in examples))
            for example in examples
            if place < len(example["response_ids"])
        ]
        return {
            "input_ids": _padded([prompt + response for prompt, response in rows], self.pad_token_id),
            "attention_mask": _padded([[1] * (len(prompt) + len(response)) for prompt, response in rows], 0),
            "completion_mask": _padded([[0] * len(prompt) + [1] * len(response) for prompt, response in rows], 0),
        }


def _flat(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float32)


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


@dataclass
class RowsWithReference(Sequence[dict]):
    """Rows, each with the log-probabilities of its responses under the reference, nats."""

    rows: Sequence[dict]
    log_probs: Sequence[Sequence[float]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {**self.rows[index], "reference": list(self.log_probs[index])}


class HPSTrainer(DPOTrainer):
    """Any family under BT, PL or HPS, trained in the order of the plan.

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

    def __init__(self, *args, loss: Loss, train_dataset: Sequence[dict] = (), **kwargs):
        config = kwargs["args"]
        _refuse_unsupported(config)
        config.beta = loss.beta
        self.loss, self.rows = loss, train_dataset
        # The parent takes no other kind of sequence; it gets the rows themselves back from `_prepare_dataset`.
        numbers = Dataset.from_dict({"row": range(len(train_dataset))})
        super().__init__(*args, train_dataset=numbers, **kwargs)
        if loss.family == "simpo":
            self.ref_model = None  # the parent made a frozen copy; SimPO compares with none
        # Behind the parent's own head, which the arguments of separate rows still reach; the parent has wrapped the
        # reference by DeepSpeed already.
        add_response_head(self.model.get_base_model() if self.is_adapted else self.model)
        if self.ref_model is not None:
            add_response_head(self.accelerator.unwrap_model(self.ref_model))

    @property
    def is_adapted(self) -> bool:
        """The policy is an adapter on the reference."""
        return hasattr(self.model, "peft_config")

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """The plan's rows hold token ids already."""
        return self.rows

    def _set_signature_columns_if_needed(self):
        self._signature_columns = list(COLUMNS)

    def _compute_loss(self, model, inputs, return_outputs):
        """Mean loss of the lists in the batch; log-probabilities are summed over the response's tokens."""
        policy = self._log_probs(model, inputs)
        reference = inputs.get("reference")
        if reference is None and self.loss.family != "simpo":
            with self.as_reference():
                reference = self._log_probs(self.ref_model or model, inputs)
        losses = preference_loss(
            self.loss,
            response_scores(self.loss, policy, reference, inputs["lengths"]),
            inputs["rewards"],
            inputs["mask"],
            inputs["log_weights"],
            inputs["dispreferred_count"],
        )
        self._record(inputs, policy.detach(), reference)
        loss = losses.mean()
        return (loss, {"policy": policy}) if return_outputs else loss

    def _log_probs(self, model, inputs) -> torch.Tensor:
        """Log-probabilities of the responses under a model, (lists, n), 0 on padding, nats."""
        rows, mask = inputs["rows"], inputs["mask"]
        if "scored" in rows:  # list by list
            flat = shared_log_probs(model, rows)
            return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)
        return self._by_list(self._separate_log_probs(model, rows), mask)

    @staticmethod
    def _separate_log_probs(model, rows) -> torch.Tensor:
        labels = rows["input_ids"].masked_fill(rows["completion_mask"] == 0, -100)
        outputs = model(
            input_ids=rows["input_ids"],
            attention_mask=rows["attention_mask"],
            use_cache=False,
            labels=labels,
            fused_lm_head=True,
        )
        return outputs.log_probs.sum(dim=1)

    @staticmethod
    def _by_list(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(R,) values in the order of separate rows to (lists, n), 0 on padding."""
        return torch.zeros(mask.T.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask.T, flat).T

    @contextmanager
    def as_reference(self):
        """Inside it a forward pass of `ref_model`, or without one of the policy, is the reference's."""
        adapter = self.accelerator.unwrap_model(self.model).disable_adapter() if self.is_adapted else nullcontext()
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            yield

    def reference_log_probs(self, example: dict) -> list[float]:
        """Log-probabilities of an example's responses under the reference, nats; before the training."""
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        model.to(self.accelerator.device).eval()
        rows = self._prepare_inputs(self.data_collator.rows([example]))
        with self.as_reference():
            shared = "scored" in rows
            return (shared_log_probs(model, rows) if shared else self._separate_log_probs(model, rows)).tolist()

    def set_reference(self, log_probs: Sequence[Sequence[float]]) -> None:
        """Give each row the log-probabilities of its responses under the reference, which is then let go."""
        self.train_dataset = RowsWithReference(self.rows, log_probs)
        self.ref_model = None

    def _record(self, inputs, policy, reference) -> None:
        """Put the step's figures where the parent's `log` averages them over the accumulation steps.

        `rejected` is the mean over the dispreferred by their weights in the loss (all alike in a list of pl).
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        lengths = inputs["lengths"]
        if self.loss.family == "simpo":
            rewards = simpo_reward(policy, lengths, self.loss.simpo_beta)
        else:
            rewards = implicit_reward(policy, reference, self.loss.beta)
        share = inputs["log_weights"][:, 0].exp()
        if self.loss.preference == "pl":
            share = inputs["mask"].float()
            share[:, 0] = 0
            share = share / share.sum(dim=1, keepdim=True)
        figures = {"rewards/accuracies": (share * (rewards[:, :1] > rewards)).sum(dim=1)}
        if self.loss.preference == "hps":
            figures["gamma"] = inputs["gamma"]
        for name, values in (("rewards", rewards), ("logps", policy), ("lengths", lengths)):
            figures[f"{name}/chosen"] = values[:, 0]
            figures[f"{name}/rejected"] = (share * values).sum(dim=1)
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        stacked = torch.stack([value.float().mean() for value in figures.values()])
        means = self.accelerator.gather(stacked.unsqueeze(0)).mean(dim=0)
        for name, value in zip(figures, means.tolist(), strict=True):
            metrics[name].append(value)
        tokens = self.accelerator.gather(inputs["tokens"].sum()).sum().item()
        self._total_train_tokens += tokens
        metrics["num_tokens"] = [self._total_train_tokens]


def _refuse_unsupported(config: DPOConfig) -> None:
    for name, accepted in NOT_HONOURED.items():
        value = getattr(config, name)
        if value != accepted:
            raise ValueError(f"HPSTrainer does not honour `{name}={value}`; leave it at {accepted!r}")
    if config.train_sampling_strategy != "sequential":
        raise ValueError("HPSTrainer trains in the order of the plan; set `train_sampling_strategy='sequential'`")
