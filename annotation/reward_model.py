"""The reward models: the only owner of their input and of their scores.

Prompt and response are one conversation, templated once (`hps.chat.conversation_token_ids`), with the response as it
was sampled. The released code templates the prompt with the assistant's header and then templates the reply again, so
header and BOS come twice.

The responses of a prompt share its computation if the model's class allows it (hps/trial.py). The head is the
class's forward pass, in float32.

`RewardModel` (a sequence classifier) and `annotation.armorm.ArmoRM` are `ConversationScorer`s; annotation.scorers loads
either.
"""

import math
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from hps.chat import conversation_token_ids, load_tokenizer
from hps.errors import InputError
from hps.response_head import OwnHead, run
from hps.shared_prefix import Layout, common_prefix, make_rows, portions
from hps.trial import prove
from pipeline.models import check_labels
from pipeline.recipe import Model
from pipeline.weights import context_length, load_config, load_weights

# Tokens of a forward pass whose activations fit a processor's caches; more are slower.
CACHED_TOKENS = 1024
# Scores from another kernel or batch may differ by this share of their size (seen in fp32: about 1e-6).
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class TooLong(InputError):
    """A conversation is longer than the reward model's context.

    Args:
        tokens, limit: of the conversation, and of the context.
    """

    def __init__(self, tokens: int, limit: float):
        super().__init__(
            f"a conversation has {tokens} tokens, and the reward model has positions for {limit:g}",
            remedy="lower `generation.max_prompt_tokens` or `generation.max_new_tokens`, or use another reward model",
        )
        self.facts = {"tokens": tokens, "limit": limit}


class ConversationScorer:
    """Common to all reward models: the input, the shared prompt, and the check that scores are finite.

    A subclass sets `model`, a transformers model with a `base_model`, and `layout` (hps.shared_prefix), and defines
    `_details`.

    Args:
        model: folder or hub name, with revision.
        dtype: of the weights; `auto` is bfloat16 on CUDA and float32 on a CPU.
        batch_tokens: bound on the tokens of one forward pass.
    """

    model: Any
    layout: Layout

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

    def score_details(
        self, messages: list[dict], responses: list[str], truncated: list[bool], prompt_id: str | None = None
    ) -> list[dict]:
        """For each response its `score` and the model's other figures; equal token rows have one score.

        Args:
            prompt_id: for functions in place of a model (pipeline/functions.py); a model ignores it.

        Raises:
            TooLong: a conversation does not fit into the model's context.
            InputError: a score is not finite; the message gives the response's number.
        """
        rows = [tuple(row) for row in self.conversations(messages, responses, truncated)]
        if (longest := max(map(len, rows))) > (limit := longest_conversation(self.model)):
            raise TooLong(longest, limit)
        # Two copies of a row could differ by rounding and be ranked by it. By length: what passes together is padded to
        # the longest, separate rows as a whole, responses after one prompt in attention.
        distinct = sorted(dict.fromkeys(rows), key=len)
        details = self._details([list(row) for row in distinct])
        if not all(math.isfinite(each["score"]) for each in details):
            # In a shared row one NaN spreads to the other responses, because zero times NaN is NaN.
            details = [self._details([list(row)])[0] for row in distinct]
        scored = dict(zip(distinct, details, strict=True))
        found = [scored[row] for row in rows]
        for number, details in enumerate(found, 1):
            if not math.isfinite(details["score"]):
                problem = f"the reward model's score of response {number} is {details['score']}"
                raise InputError(problem, remedy="check the reward model, or try `annotation.dtype=float32`")
        return found

    def _details(self, rows: list[list[int]]) -> list[dict]:
        raise NotImplementedError

    @torch.inference_mode()
    def states(self, rows: list[list[int]], places: list[list[int]]) -> tuple[torch.Tensor, Any]:
        """Hidden states of token rows with a common beginning, which is computed once if the class allows it.

        Args:
            places: for each row the wanted positions, the same number in every row.

        Returns:
            (rows, positions, hidden size), float32; and the backbone's last output, for `OwnHead`.
        """
        shared = max(1, common_prefix(rows))  # a prompt has a token at least
        prompt, tails = rows[0][:shared], [row[shared:] for row in rows]
        if len({row[0] for row in rows}) > 1:
            raise ValueError("rows must begin with the same token")
        budget, pad = self.batch_tokens, self.tokenizer.pad_token_id
        together = max(map(len, rows)) <= self.layout.shared
        if self.device.type == "cpu":
            budget = min(budget, max(CACHED_TOKENS, 4 * shared))
        found, wanted, output = [], iter(places), None
        for part in portions(len(prompt), list(map(len, tails)), budget, together):
            texts = [prompt], [[tails[index] for index in part]]
            made = make_rows(self.layout, *texts, pad, budget, gridded=self.device.type == "cuda")
            made = {name: value.to(self.device) for name, value in made.items()}
            flat, output = run(self.model, self.model.base_model, "last_hidden_state", made)
            for (begin, start), positions in zip(made["starts"].tolist(), wanted, strict=False):
                at = [begin + place if place < shared else start + place - shared for place in positions]
                found.append(flat[at].float())
        return torch.stack(found), output


class RewardModel(ConversationScorer):
    """A sequence classifier with one label; for the arguments see `ConversationScorer`.

    Raises:
        InputError: the model is missing or has more labels than one.
    """

    def __init__(self, model: Model, dtype: str = "auto", batch_tokens: int = 16384):
        super().__init__(model, dtype, batch_tokens)
        check_labels(model)
        kind, config = AutoModelForSequenceClassification, load_config(model)
        place = {"": self.device}  # read from the files to the device: no copy of the whole model in host memory
        self.model = load_weights(kind, model, exact=True, config=config, dtype=self.dtype, device_map=place).eval()
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.layout = prove(self.model, math.inf, own_score, trial_scores)
        _in_float32_behind_the_backbone(self.model)

    def _details(self, rows: list[list[int]]) -> list[dict]:
        return [{"score": score} for score in self.score_rows(rows)]

    @torch.inference_mode()
    def score_rows(self, rows: list[list[int]]) -> list[float]:
        """Scores of token rows with a common beginning, in the cheapest way that is correct for the class."""
        if not self.layout.gathers:
            return self.score_rows_plain(rows)
        states, output = self.states(rows, [[len(row) - 1] for row in rows])
        return OwnHead(self.model, self.model.forward, output)(states[:, 0]).squeeze(-1).tolist()

    @torch.inference_mode()
    def score_rows_plain(self, rows: list[list[int]]) -> list[float]:
        """Scores of token rows by the library's forward pass, a row at a time.

        For classes whose head cannot take hidden states, and to check the others. Without a padding token the library
        scores a row's last token. With one it scores the last token that differs from it, which is wrong if a model
        pads with its end of turn.
        """
        pad, self.model.config.pad_token_id = self.model.config.pad_token_id, None
        try:
            return [float(own_score(self.model, row, [])) for row in rows]
        finally:
            self.model.config.pad_token_id = pad


def longest_conversation(model: Any) -> float:
    """Tokens that a model has positions for; RoBERTa's begin after the padding token's position."""
    tables = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Embedding)}
    behind = [
        table.num_embeddings - table.padding_idx - 1
        for name, table in tables.items()
        if "position" in name and table.padding_idx is not None
    ]
    return min([context_length(model.config), *behind])


def own_score(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The score of a conversation by the class's forward pass, ()."""
    return model(input_ids=torch.tensor([prompt + response], device=model.device)).logits[0, 0]


def trial_scores(model: Any, rows: dict[str, torch.Tensor], gathers: bool) -> torch.Tensor:
    """The same for all conversations in rows of hps.shared_prefix, computed our way: (conversations,)."""
    if not gathers:
        raise ValueError("the class's head needs whole rows")
    flat, output = run(model, model.base_model, "last_hidden_state", rows)
    return OwnHead(model, model.forward, output)(flat[rows["starts"][:, 1] + rows["sizes"] - 1])[:, 0]


def _in_float32_behind_the_backbone(model: Any) -> None:
    """In bf16 a score has 8 bits, so close responses would tie."""
    backbone = model.base_model
    for module in model.children():
        if module is not backbone:
            module.float()
    backbone.register_forward_hook(
        lambda module, given, output: type(output)(**{**output, "last_hidden_state": output.last_hidden_state.float()})
    )
