"""The reward models: the one owner of their input and of their scores.

Prompt and response are one conversation, templated once (`hps.chat.conversation_token_ids`), with the response as it
was sampled. The released code templates the prompt with the assistant's header and templates the reply again: header
and BOS are there twice.

The responses of a prompt share the computation of the prompt: its keys and values are computed once and copied for the
responses. Scores are float32.

`RewardModel` (a sequence classifier) and `annotation.armorm.ArmoRM` are a `ConversationScorer`;
annotation.reward_models loads either.
"""

import math
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import AutoModelForSequenceClassification

from hps.chat import conversation_token_ids, load_tokenizer
from hps.errors import InputError
from hps.prefix import chunks, common_prefix, prefix_states, tail_states
from hps.recipe import Model
from hps.weights import load_config, load_weights

# Shared-prefix and plain scores of the probe may differ by this share of the score's size (fp32: about 1e-6 seen).
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class ConversationScorer:
    """What every reward model here has in common: its input, the shared prompt, and that scores are finite.

    A subclass sets `model`, a transformers model with a `base_model`, and gives `_details`.

    Args:
        model: folder or hub name, with revision.
        dtype: of the weights; `auto` is bfloat16 on CUDA and float32 on a CPU.
        batch_tokens: bound on (tokens of the prompt + tokens of the longest response) x responses in one forward pass.
    """

    model: Any

    def __init__(self, model: Model, dtype: str = "auto", batch_tokens: int = 16384):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_tokens = batch_tokens
        self.tokenizer = load_tokenizer(model.path, model.revision)
        if dtype == "auto":
            dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, dtype)

    def conversations(self, messages: list[dict], responses: list[str], truncated: list[bool]) -> list[list[int]]:
        """Token ids of each response's conversation; a truncated response has no end-of-turn token."""
        return [
            conversation_token_ids(self.tokenizer, messages, response, cut)
            for response, cut in zip(responses, truncated, strict=True)
        ]

    def score(self, messages: list[dict], responses: list[str], truncated: list[bool]) -> list[float]:
        """Scores of the responses to one prompt, in their order. InputError: as `score_details`."""
        return [details["score"] for details in self.score_details(messages, responses, truncated)]

    def score_details(self, messages: list[dict], responses: list[str], truncated: list[bool]) -> list[dict]:
        """For each response its `score`, and what else the model says of it.

        Raises:
            InputError: a score is not finite; the message gives the response's number.
        """
        found = self._details(self.conversations(messages, responses, truncated))
        for number, details in enumerate(found, 1):
            if not math.isfinite(details["score"]):
                raise InputError(
                    f"the reward model's score of response {number} is {details['score']}",
                    remedy="check the reward model, or try `annotation.dtype=float32`",
                )
        return found

    def _details(self, rows: list[list[int]]) -> list[dict]:
        raise NotImplementedError

    @torch.inference_mode()
    def states(self, rows: list[list[int]], places: list[list[int]]) -> torch.Tensor:
        """Hidden states of token rows that begin alike: the common beginning is computed once.

        Args:
            places: for each row the positions that are wanted, equally many.

        Returns:
            (rows, positions, hidden size), float32.
        """
        backbone, pad = self.model.base_model, self.tokenizer.pad_token_id
        shared = common_prefix(rows)
        prefix, before = prefix_states(backbone, rows[0][:shared], self.device)
        wanted, found = iter(places), []
        for chunk in chunks(rows, self.batch_tokens):
            hidden = tail_states(backbone, prefix, shared, [row[shared:] for row in chunk], pad, self.device)
            for tail, positions in zip(hidden, wanted, strict=False):  # the next chunk goes on in `wanted`
                states = [before[place] if place < shared else tail[place - shared] for place in positions]
                found.append(torch.stack(states).float())
        return torch.stack(found)


class RewardModel(ConversationScorer):
    """A sequence classifier with one label; for the arguments see `ConversationScorer`.

    Raises:
        InputError: the model is missing or has more labels than one.
    """

    def __init__(self, model: Model, dtype: str = "auto", batch_tokens: int = 16384):
        super().__init__(model, dtype, batch_tokens)
        config = _one_label(load_config(model), model)
        self.model = load_weights(AutoModelForSequenceClassification, model, config=config, dtype=self.dtype)
        self.model.to(self.device).eval()
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.shares_prompt = self._probe()

    def _details(self, rows: list[list[int]]) -> list[dict]:
        scores = self.score_rows(rows) if self.shares_prompt else self.score_rows_plain(rows)
        return [{"score": score} for score in scores]

    @torch.inference_mode()
    def score_rows(self, rows: list[list[int]]) -> list[float]:
        """Scores of token rows that begin alike: the common beginning is computed once."""
        last = self.states(rows, [[len(row) - 1] for row in rows])[:, 0]
        head = self.model.score
        bias = None if head.bias is None else head.bias.float()
        return linear(last, head.weight.float(), bias).squeeze(-1).tolist()

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
        tolerance = PROBE_TOLERANCE[self.dtype]
        same = all(abs(a - b) <= tolerance * max(1.0, abs(a)) for a, b in zip(plain, shared, strict=True))
        if not same:
            print(f"annotation: sharing the prompt changes this model's scores ({plain}, {shared}); not shared")
        return same


def _one_label(config, model: Model):
    if config.num_labels != 1:
        raise InputError(
            f"the reward model has {config.num_labels} labels",
            where=model.path,
            remedy="`models.reward` must be a sequence classifier with one label (or ArmoRM), as `models.evaluator`",
        )
    return config
