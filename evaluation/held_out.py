"""The models of the evaluation: the policy after training and along it, and the reference, on given texts.

Log-probabilities and divergences in nats. A prompt is computed once for its responses.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM

from hps.chat import load_tokenizer, prompt_token_ids, response_token_ids
from hps.shared_prefix import Layout, make_rows, prove, scored_logits
from pipeline.recipe import Model, Recipe
from pipeline.run_records import kept_checkpoints
from pipeline.weights import ADAPTER, check_adapter, load_adapter, load_weights, refuse_pickles

FINAL = "final"  # the policy at the end of the training
NULL = 1e-3  # share of the way from reference to policy at which `rounding_floor` measures
FLOOR_TEXTS = 4  # prompts that it measures


class HeldOut:
    """The policies of a run and the reference: log-probabilities and divergences.

    With LoRA there is one model. The reference is the model with its adapter off; a policy along the training is
    another adapter. Full fine-tuning keeps nothing along the training (alignment.train.KeptCheckpoints).

    Both run in fp32 on every device. s and the divergence are small differences of large numbers: in bf16 an adapter
    with almost no effect shows half a nat of s.

    Args:
        along: also load the policies along the training.
        dtype: of the weights and of everything computed.
        step: the policy that was kept there takes the place of the trained one.
    """

    def __init__(self, recipe: Recipe, along: bool = True, dtype: torch.dtype = torch.float32, step: int | None = None):
        checkpoint = recipe.checkpoint_folder(step)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.limit = recipe.schedule.max_length
        self.tokenizer = load_tokenizer(str(checkpoint))
        self.dtype = str(dtype).removeprefix("torch.")
        self.reference = _load(recipe.models.policy, self.device, dtype)
        self.steps: list[int] = []
        if recipe.lora.enabled:
            self.reference = load_adapter(self.reference, checkpoint, FINAL).eval()
            self.policy = self.reference
            for step, folder in kept_checkpoints(recipe) if along else []:
                refuse_pickles(folder, None, ADAPTER)
                self.reference.load_adapter(folder, adapter_name=f"step-{step}")
                check_adapter(self.reference, folder, f"step-{step}")
                self.steps.append(step)
        else:
            self.policy = _load(Model(path=str(checkpoint)), self.device, dtype)
        self.layout: Layout = prove(_causal(self.reference), self.limit)

    def as_reference(self):
        """Context in which `self.reference` is the model before training."""
        return self.reference.disable_adapter() if self.reference is self.policy else nullcontext()

    @contextmanager
    def moved(self, share: float) -> Iterator[None]:
        """Inside it, the final policy is at this share of its way from the reference; afterwards it is restored bit for
        bit."""
        if self.reference is self.policy:
            with rescale_adapter_scale(self.policy, share):
                yield
            return
        weights = [weight.data for weight in self.policy.parameters()]
        kept = [weight.to("cpu", copy=True) for weight in weights]
        try:
            for weight, origin in zip(weights, self.reference.parameters(), strict=True):
                weight.copy_(torch.lerp(origin.data, weight, share))
            yield
        finally:
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)

    def along(self) -> Iterator[int]:
        """Yield the steps at which the policy was kept, with `self.policy` set to that step's policy."""
        for step in self.steps:
            self.policy.set_adapter(f"step-{step}")
            yield step
        if self.steps:
            self.policy.set_adapter(FINAL)

    def token_ids(self, messages: list[dict], responses: list[str], truncated: list[bool]) -> tuple[list[int], list]:
        """Token ids of the prompt and of the responses, cut at the limit as in training."""
        prompt = prompt_token_ids(self.tokenizer, messages)
        ids = [
            response_token_ids(self.tokenizer, messages, text, cut)[: self.limit - len(prompt)]
            for text, cut in zip(responses, truncated, strict=True)
        ]
        return prompt, ids

    def compare(self, prompt: list[int], responses: list[list[int]], diverging: int) -> dict:
        """Log-probabilities and divergences of the responses.

        Args:
            diverging: number of responses, from the first, whose divergence is computed.

        Returns:
            `reference`, `policy`: summed log-probability of each response; `kl`: for the first responses the sum over
            their positions of KL(policy || reference) over the whole vocabulary; `along`: `policy` and `kl` at every
            step at which the policy was kept.
        """
        with self.as_reference():
            before = self._log_probs(self.reference, prompt, responses)
            reference = [_picked(*pair) for pair in zip(before, responses, strict=True)]
        del before[diverging:]
        along = [{"step": step, **self._policy(prompt, responses, before)} for step in self.along()]
        return {"reference": reference, **self._policy(prompt, responses, before), "along": along}

    def _policy(self, prompt: list[int], responses: list[list[int]], before: list[torch.Tensor]) -> dict:
        after = self._log_probs(self.policy, prompt, responses)
        return {
            "policy": [_picked(*pair) for pair in zip(after, responses, strict=True)],
            "kl": [divergence(*pair) for pair in zip(after, before, strict=False)],
        }

    @torch.inference_mode()
    def _log_probs(self, model: Any, prompt: list[int], responses: list[list[int]]) -> list[torch.Tensor]:
        """Of each response the log-probabilities at its tokens, (tokens, vocabulary), float32."""
        network = _causal(model)
        rows = make_rows(self.layout, [prompt], [responses], self.tokenizer.pad_token_id)
        rows = {name: value.to(self.device) for name, value in rows.items()}
        states, head = scored_logits(network, network.forward, rows, self.layout.gathers)
        return [head(part).float().log_softmax(dim=-1) for part in states.split(rows["sizes"].tolist())]


def rounding_floor(scorer: HeldOut, texts: Iterable[tuple[list[int], list[list[int]]]]) -> dict | None:
    """The size of rounding errors in the figures: smaller values mean nothing.

    The policy is moved to `NULL` of its way from the reference. The divergence grows with the square of the way, so it
    should be 1e-6 of what it was; the rest is rounding. s grows linearly, so the policy is also moved by -`NULL`: the
    true parts of the two s cancel in their mean. Scaling an adapter to 0 would show nothing, because x + 0 is exact.
    Figures that are exactly 0 (an untrained adapter, bf16 weights that such a small move does not change) are not a
    measurement.

    Args:
        texts: token ids of a prompt and of its responses.

    Returns:
        `responses`; `tokens`, their mean length; `kl`, mean divergence, and `s`, largest |s|, in nats. None if
        nothing was measured.
    """
    texts = list(texts)
    kl, s = [], []
    for share in (NULL, -NULL):
        with scorer.moved(share):
            found = [scorer.compare(prompt, responses, diverging=len(responses)) for prompt, responses in texts]
        policy, reference, diverged = (
            torch.tensor([value for each in found for value in each[name]], dtype=torch.float64)
            for name in ("policy", "reference", "kl")
        )
        kl.append(diverged)
        s.append(policy - reference)
    if not texts or not (torch.stack(s).any() or torch.cat(kl).any()):
        return None
    lengths = [len(response) for _, responses in texts for response in responses]
    return {
        "responses": len(lengths),
        "tokens": round(sum(lengths) / len(lengths), 1),
        "kl": float(f"{torch.cat(kl).mean():.3g}"),
        "s": float(f"{(s[0] + s[1]).abs().max() / 2:.3g}"),
    }


def _load(model: Model, device: torch.device, dtype: torch.dtype):
    return load_weights(AutoModelForCausalLM, model, dtype=dtype).to(device).eval()


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Sum over the positions of KL(p || q), from (tokens, vocabulary) log-probabilities; nats."""
    total = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
    return max(total, 0.0)  # rounding can make it negative


def _picked(log_probs: torch.Tensor, response: list[int]) -> float:
    targets = torch.tensor(response, device=log_probs.device)
    return float(log_probs.gather(1, targets[:, None]).sum())
