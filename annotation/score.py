"""The reward model: the one owner of its input and of its scores.

Prompt and response are one conversation, templated once (`hps.chat.conversation_token_ids`). The released code
templates the prompt with the assistant's header and templates the reply again: header and BOS stand twice.

The responses of a prompt share the computation of the prompt: its keys and values are computed once and copied for the
responses. Scores are float32.
"""

import math
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForSequenceClassification

from hps.chat import conversation_token_ids, load_tokenizer
from hps.errors import InputError
from hps.prefix import chunks, common_prefix, compute_prefix, tail_states
from hps.recipe import Model

# Shared-prefix and plain scores of the probe may differ by this share of the score's size (fp32: about 1e-6 seen).
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class RewardModel:
    """A sequence classifier with one label.

    Args:
        model: folder or hub name, with revision.
        dtype: of the weights; `auto` is bfloat16 on CUDA and float32 on a CPU.
        batch_tokens: bound on (tokens of the prompt + tokens of the longest response) x responses in one forward pass.

    Raises:
        InputError: the model is missing or has more labels than one.
    """

    def __init__(self, model: Model, dtype: str = "auto", batch_tokens: int = 16384):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_tokens = batch_tokens
        self.tokenizer = load_tokenizer(model.path, model.revision)
        config = _config(model)
        if dtype == "auto":
            dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(
            model.path, revision=model.revision, config=config, dtype=getattr(torch, dtype)
        )
        self.model.to(self.device).eval()
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.shares_prompt = self._probe()

    def conversations(self, messages: list[dict], responses: list[str], truncated: list[bool]) -> list[list[int]]:
        """Token ids of each response's conversation; a truncated response has no end-of-turn token."""
        return [
            conversation_token_ids(self.tokenizer, messages, response, cut)
            for response, cut in zip(responses, truncated, strict=True)
        ]

    def score(self, messages: list[dict], responses: list[str], truncated: list[bool]) -> list[float]:
        """Scores of the responses to one prompt, in their order.

        Raises:
            InputError: a score is not finite; the message gives the response's number.
        """
        rows = self.conversations(messages, responses, truncated)
        scores = self.score_rows(rows) if self.shares_prompt else self.score_rows_plain(rows)
        for number, score in enumerate(scores, 1):
            if not math.isfinite(score):
                raise InputError(
                    f"the reward model's score of response {number} is {score}",
                    remedy="check the reward model, or try `annotation.dtype=float32`",
                )
        return scores

    @torch.inference_mode()
    def score_rows(self, rows: list[list[int]]) -> list[float]:
        """Scores of token rows that begin alike: the common beginning is computed once."""
        shared = common_prefix(rows)
        prefix = compute_prefix(self.model.base_model, rows[0][:shared], self.device)
        scores: list[float] = []
        for chunk in chunks(rows, self.batch_tokens):
            scores += self._score_tails(prefix, shared, [row[shared:] for row in chunk])
        return scores

    @torch.inference_mode()
    def score_rows_plain(self, rows: list[list[int]]) -> list[float]:
        """Scores of token rows by the library's own forward pass, a row at a time.

        For models that cannot share, and to check sharing. Without a padding token the library takes a row's last
        token; with one it takes the last that differs from it, the wrong one where a model pads with its end of turn.
        """
        pad, self.model.config.pad_token_id = self.model.config.pad_token_id, None
        try:
            return [float(self.model(torch.tensor([row], device=self.device)).logits[0, 0]) for row in rows]
        finally:
            self.model.config.pad_token_id = pad

    def _score_tails(self, prefix, before: int, tails: list[list[int]]) -> list[float]:
        pad = self.tokenizer.pad_token_id
        hidden = tail_states(self.model.base_model, prefix, before, tails, pad, self.device)
        last = hidden[torch.arange(len(tails)), torch.tensor([len(tail) - 1 for tail in tails])]
        head = self.model.score
        bias = None if head.bias is None else head.bias.float()
        return linear(last.float(), head.weight.float(), bias).squeeze(-1).tolist()

    def _probe(self) -> bool:
        """Whether sharing the prompt gives the library's scores here: tried, not guessed from the architecture."""
        rows = self.conversations(
            [{"role": "user", "content": "Name a colour."}], ["Blue.", "A warm red, I think."], [False] * 2
        )
        plain = self.score_rows_plain(rows)
        try:
            shared = self.score_rows(rows)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            print(f"annotation: this reward model cannot share the prompt ({error}); one response at a time instead")
            return False
        tolerance = PROBE_TOLERANCE[self.model.dtype]
        same = all(abs(a - b) <= tolerance * max(1.0, abs(a)) for a, b in zip(plain, shared, strict=True))
        if not same:
            print(f"annotation: sharing the prompt changes this model's scores ({plain}, {shared}); not shared")
        return same


def _config(model: Model):
    try:
        config = AutoConfig.from_pretrained(model.path, revision=model.revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no model there ({str(error).splitlines()[0]})", where=model.path, remedy="check `models.reward.path`"
        ) from None
    if config.num_labels != 1:
        raise InputError(
            f"the reward model has {config.num_labels} labels",
            where=model.path,
            remedy="`models.reward` must be a sequence classifier with one label",
        )
    return config
