"""The models of the evaluation: the policy after training and along it, and the reference, on given texts.

Log-probabilities and divergences in nats. A prompt is computed once for its responses, and prompts of like length pass
the models together. `CompareWorker` does it on all GPUs of this machine (pipeline/workers.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForCausalLM

from hps.chat import load_tokenizer, prompt_token_ids, response_token_ids
from hps.errors import InputError
from hps.response_head import scored_logits
from hps.shared_prefix import ROW_TOKENS, Layout, make_rows
from hps.trial import prove
from pipeline.recipe import Model, Recipe
from pipeline.run_records import kept_checkpoints
from pipeline.weights import ADAPTER, check_adapter, load_adapter, load_weights, refuse_pickles
from pipeline.workers import run_workers

FINAL = "final"  # the policy at the end of the training
NULL = 1e-3  # share of the way from reference to policy at which `rounding_floor` measures
FLOOR, FLOOR_TEXTS = "floor", 4  # its key among the items, and the texts that it measures
# Tokens of a forward pass, or one prompt with its responses. On a CPU their activations fit the caches; on a GPU the
# reference's log-probabilities stay while the policies are computed: up to 0.5 MB a token of Llama 3's vocabulary.
BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
WINDOW = 32  # prompts from which batches of like length are made


class Reader:
    """Token ids of what the policies of a run are evaluated on.

    Args:
        step: the policy that was kept there takes the place of the trained one.
    """

    def __init__(self, recipe: Recipe, step: int | None = None):
        self.tokenizer = load_tokenizer(str(recipe.checkpoint_folder(step)))
        self.limit = recipe.schedule.max_length

    def token_ids(self, messages: list[dict], responses: list[str], truncated: list[bool]) -> tuple[list[int], list]:
        """Token ids of the prompt and of the responses, cut at the limit as in training."""
        prompt = prompt_token_ids(self.tokenizer, messages)
        ids = [
            response_token_ids(self.tokenizer, messages, text, cut)[: max(0, self.limit - len(prompt))]
            for text, cut in zip(responses, truncated, strict=True)
        ]
        return prompt, ids


class HeldOut(Reader):
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
        super().__init__(recipe, step)
        checkpoint = recipe.checkpoint_folder(step)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_tokens = BATCH_TOKENS[self.device.type]
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

    def compare(self, prompt: list[int], responses: list[list[int]], diverging: int) -> dict:
        """`compare_all` of one text."""
        (found,) = self.compare_all([{"prompt": prompt, "responses": responses, "diverging": diverging}])
        return found

    @torch.inference_mode()
    def compare_all(self, texts: Sequence[dict]) -> list[dict]:
        """Log-probabilities and divergences of texts, which pass each policy together.

        Args:
            texts: `prompt` and `responses`, token ids, at least one response; `diverging`, the number of responses,
                from the first, whose divergence is computed.

        Returns:
            For each text `reference`, `policy`: summed log-probability of each response; `kl`: for the first responses
            the sum over their positions of KL(policy || reference) over the whole vocabulary; `along`: `policy` and
            `kl` at every step at which the policy was kept.
        """
        prompts, responses = ([text[name] for text in texts] for name in ("prompt", "responses"))
        # Attention that is computed over a whole row (eager) pays for long rows.
        shares = self.reference.config._attn_implementation == "sdpa"
        budget = max(self.batch_tokens, ROW_TOKENS) if shares else None
        gridded = self.device.type == "cuda"
        rows = make_rows(self.layout, prompts, responses, self.tokenizer.pad_token_id, budget, gridded)
        rows = {name: value.to(self.device) for name, value in rows.items()}
        diverges = [at < text["diverging"] for text in texts for at in range(len(text["responses"]))]
        picked, before = [], []
        with self.as_reference():
            for wanted, (log_probs, targets) in zip(diverges, self._log_probs(self.reference, rows), strict=True):
                picked.append(_picked(log_probs, targets))
                before.append(log_probs if wanted else None)
        along = [(step, _by_text(texts, self._policy(rows, before))) for step in self.along()]
        ends = _by_text(texts, {"reference": _numbers(picked), **self._policy(rows, before)})
        kept = [[{"step": step, **found[place]} for step, found in along] for place in range(len(texts))]
        return [{**end, "along": each} for end, each in zip(ends, kept, strict=True)]

    def _policy(self, rows: dict[str, torch.Tensor], before: list[torch.Tensor | None]) -> dict[str, list[float]]:
        picked, kl = [], []
        for q, (p, targets) in zip(before, self._log_probs(self.policy, rows), strict=True):
            picked.append(_picked(p, targets))
            if q is not None:
                kl.append(divergence(p, q))
        return {"policy": _numbers(picked), "kl": _numbers(kl)}

    def _log_probs(self, model: Any, rows: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each response, one at a time, the log-probabilities at its tokens, (tokens, vocabulary), float32; and its
        tokens."""
        network, sizes = _causal(model), rows["sizes"].tolist()
        states, head = scored_logits(network, network.forward, rows, self.layout.gathers)
        for part, targets in zip(states.split(sizes), rows["targets"].split(sizes), strict=True):
            yield head(part).float().log_softmax(dim=-1), targets

    def batches(self, texts: Sequence[dict]) -> Iterator[list[dict]]:
        """The texts in batches of like length for `compare_all`, longest first: `batch_tokens` at most, or one text."""
        batch: list[dict] = []
        for text in sorted(texts, key=lambda text: self._tokens([text]), reverse=True):
            if batch and self._tokens([*batch, text]) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(text)
        if batch:
            yield batch

    def _tokens(self, texts: Sequence[dict]) -> int:
        """Tokens that pass a model."""
        lengths = [len(text["prompt"]) + len(response) for text in texts for response in text["responses"]]
        if max(lengths) > self.layout.shared:
            return len(lengths) * max(lengths)
        return sum(lengths) - sum(len(text["prompt"]) * (len(text["responses"]) - 1) for text in texts)


class CompareWorker:
    """The worker: one `HeldOut`. Texts go in, their figures come out.

    Items in: `key`, and a text of `HeldOut.compare_all`, which may be without responses; or `key` and `texts` for
    `rounding_floor`. Items out: `key`, and the figures; or `key`, `dtype` and `floor`.

    Args:
        others: as for `HeldOut`.
    """

    def __init__(self, recipe: Recipe, along: bool = True, step: int | None = None):
        self.scorer = HeldOut(recipe, along=along, step=step)

    def stream(self, items: Iterator[dict | None]) -> Iterator[dict]:
        held: list[dict] = []
        for item in items:
            if item is not None and "texts" in item:
                floor = rounding_floor(self.scorer, item["texts"])
                yield {"key": item["key"], "dtype": self.scorer.dtype, "floor": floor}
            elif item is not None:
                held.append(item)
            if item is None or len(held) == WINDOW:
                yield from self._figures(held)
                held = []
        yield from self._figures(held)

    def _figures(self, items: list[dict]) -> Iterator[dict]:
        for item in items:
            if not item["responses"]:
                yield {"key": item["key"], "reference": [], "policy": [], "kl": [], "along": []}
        for batch in self.scorer.batches([item for item in items if item["responses"]]):
            for item, found in zip(batch, self.scorer.compare_all(batch), strict=True):
                yield {"key": item["key"], **found}


def run_comparisons(items: Iterable[dict], count: int, where: Path, **arguments: Any) -> Iterator[dict]:
    """Run at most `count` items through `CompareWorker` on all devices of this machine; without any no model loads.

    Args:
        where: what the items are from, for messages.
        arguments: of the worker.

    Raises:
        InputError: an item ended two workers. Without it a figure would be over other prompts.
    """
    if not count:
        return
    # A cluster (`RAY_ADDRESS`) has the environment of the engine; this is the environment of the training.
    for result in run_workers(CompareWorker, arguments, items, None, count, window=WINDOW, cluster=False):
        if "lost" in result:
            problem = f"{result['key']} ended its worker twice: {result['lost']}"
            raise InputError(problem, where=str(where), remedy="the same command continues; see the device's memory")
        yield result


def rounding_floor(scorer: HeldOut, texts: Sequence[dict]) -> dict | None:
    """The size of rounding errors in the figures: smaller values mean nothing.

    The policy is moved to `NULL` of its way from the reference. The divergence grows with the square of the way, so it
    should be 1e-6 of what it was; the rest is rounding. s grows linearly, so the policy is also moved by -`NULL`: the
    true parts of the two s cancel in their mean. Scaling an adapter to 0 would show nothing, because x + 0 is exact.
    Figures that are exactly 0 (an untrained adapter, bf16 weights that such a small move does not change) are not a
    measurement.

    Args:
        texts: as for `HeldOut.compare_all`, without `diverging`.

    Returns:
        `responses`; `tokens`, their mean length; `kl`, mean divergence, and `s`, largest |s|, in nats. None if
        nothing was measured.
    """
    kl, s = [], []
    for share in (NULL, -NULL):
        with scorer.moved(share):
            found = [scorer.compare(text["prompt"], text["responses"], len(text["responses"])) for text in texts]
        policy, reference, diverged = (
            torch.tensor([value for each in found for value in each[name]], dtype=torch.float64)
            for name in ("policy", "reference", "kl")
        )
        kl.append(diverged)
        s.append(policy - reference)
    if not texts or not (torch.stack(s).any() or torch.cat(kl).any()):
        return None
    lengths = [len(response) for text in texts for response in text["responses"]]
    return {
        "responses": len(lengths),
        "tokens": round(sum(lengths) / len(lengths), 1),
        "kl": float(f"{torch.cat(kl).mean():.3g}"),
        "s": float(f"{(s[0] + s[1]).abs().max() / 2:.3g}"),
    }


def _load(model: Model, device: torch.device, dtype: torch.dtype):
    return load_weights(AutoModelForCausalLM, model, dtype=dtype, device_map={"": device}).eval()


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Sum over the positions of KL(p || q), from (tokens, vocabulary) log-probabilities; (), nats."""
    total = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    return total.clamp(min=0)  # rounding can make it negative


def _picked(log_probs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return log_probs.gather(1, targets[:, None]).sum()


def _numbers(values: list[torch.Tensor]) -> list[float]:
    """Scalars as numbers, copied from the device at once."""
    return torch.stack(values).tolist() if values else []


def _by_text(texts: Sequence[dict], figures: dict[str, list[float]]) -> list[dict[str, list[float]]]:
    """The figures of all responses, one after the other, as those of each text."""
    left, found = {name: iter(values) for name, values in figures.items()}, []
    for text in texts:
        responses = len(text["responses"])
        counts = {name: min(text["diverging"], responses) if name == "kl" else responses for name in figures}
        found.append({name: list(islice(left[name], count)) for name, count in counts.items()})
    return found
