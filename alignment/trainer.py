"""`HPSTrainer`: TRL's DPOTrainer with the preference losses of the paper. The one file that imports the parent.

What changes, and nothing else: the loss (`_compute_loss`), the data (token ids come from the plan, so the parent's
tokenisation and its dropping of long examples are left out) and three more columns. The log-probabilities, the
reference (the adapter switched off, or a frozen copy), the fused LM head, LoRA, DeepSpeed, saving and resuming are the
parent's. tests/test_trainer.py pins what is relied upon of TRL 1.16.0.
"""

from dataclasses import dataclass

import torch
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from alignment.losses import implicit_reward, preference_loss
from hps.recipe import Loss

EXTRA_COLUMNS = ("gamma", "dispreferred_count")
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
class PlanCollator(DataCollatorForPreference):
    """The parent's collator (chosen half first); also passes on `gamma` and `dispreferred_count`, both (pairs,)."""

    def torch_call(self, examples: list[dict]) -> dict:
        batch = super().torch_call(examples)
        for name in EXTRA_COLUMNS:
            batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        return batch


class HPSTrainer(DPOTrainer):
    """DPO under BT or HPS, trained in the order of the plan.

    Args:
        loss: the recipe's `loss` section; the only home of beta and label smoothing.
        args: a DPOConfig with `train_sampling_strategy="sequential"`, because the plan is the order.
        train_dataset: rows of `prompt_ids`, `chosen_ids`, `rejected_ids`, `gamma`, `dispreferred_count`.
        others: as for DPOTrainer.

    Raises:
        ValueError: a setting of the parent that this loss does not honour, or a sampler that would shuffle the plan.
    """

    _tag_names = ["trl", "hps"]

    def __init__(self, *args, loss: Loss, **kwargs):
        config = kwargs["args"]
        _refuse_unsupported(config)
        config.beta = loss.beta
        self.loss = loss
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """The plan's rows hold token ids already."""
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in EXTRA_COLUMNS if name not in self._signature_columns]

    def _compute_loss(self, model, inputs, return_outputs):
        """Mean loss of the pairs in the batch; (pairs,) log-probabilities are summed over the response's tokens."""
        extra = {name: inputs[name] for name in EXTRA_COLUMNS}
        inputs = {name: value for name, value in inputs.items() if name not in EXTRA_COLUMNS}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            labels=labels,
            fused_lm_head=True,
        )
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
        reference = self.compute_ref_log_probs(self.ref_model or model, inputs)
        rewards = [
            implicit_reward(policy, ref, self.loss.beta)
            for policy, ref in zip((chosen, rejected), reference, strict=True)
        ]
        losses = preference_loss(
            self.loss.preference,
            *rewards,
            extra["dispreferred_count"],
            self.loss.factor_n,
            self.loss.label_smoothing,
        )
        self._record(inputs, extra, (chosen, rejected), rewards)
        loss = losses.mean()
        return (loss, outputs) if return_outputs else loss

    def _record(self, inputs, extra, logps, rewards) -> None:
        """Put the step's figures where the parent's `log` averages them over the accumulation steps."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        lengths = inputs["completion_mask"].sum(dim=1).float().chunk(2)
        figures = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
            "lengths/chosen": lengths[0],
            "lengths/rejected": lengths[1],
            "gamma": extra["gamma"],
        }
        stacked = torch.stack([value.detach().float().mean() for value in figures.values()])
        means = self.accelerator.gather(stacked.unsqueeze(0)).mean(dim=0)
        for name, value in zip(figures, means.tolist(), strict=True):
            metrics[name].append(value)
        tokens = self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
        self._total_train_tokens += tokens
        metrics["num_tokens"] = [self._total_train_tokens]


def _refuse_unsupported(config: DPOConfig) -> None:
    for name, accepted in NOT_HONOURED.items():
        value = getattr(config, name)
        if value != accepted:
            raise ValueError(f"HPSTrainer does not honour `{name}={value}`; leave it at {accepted!r}")
    if config.train_sampling_strategy != "sequential":
        raise ValueError("HPSTrainer trains in the order of the plan; set `train_sampling_strategy='sequential'`")
