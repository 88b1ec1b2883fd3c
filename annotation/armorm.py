"""RLHFlow/ArmoRM-Llama3-8B-v0.1 (arXiv 2406.12845): 19 objectives, weighed by a gate that reads the prompt.

Current transformers cannot import the published code, and we never run code from the hub, so this is our class for the
published weights. h is the last hidden state of a plain Llama (after the final norm):

    r     = W h(last token of the conversation)               W = regression_layer.weight, 19 x hidden
    g     = logit_scale * softmax(MLP(h(gate)) / temperature)  gating.layers.*, ReLU between the layers
    score = sum_i r_i (g T^t)_i                                T = reward_transform_matrix, 19 x 19

`gate` is the token that ends the turn before the last assistant's header: the published code looks for the last
occurrence of 128009 128006 78191 128007 271 ("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n") and takes
its first position. Here the pattern comes from the tokenizer's template and begins at the same token. With a template
that opens a turn only when asked to, that is the end of the prompt for every response, truncated or not.

Everything after h is kept and computed in float32 for any `dtype` (regression_layer.weight is published that way); the
published example casts everything to bfloat16.
"""

import math
from itertools import pairwise

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from annotation.reward_model import ConversationScorer
from hps.chat import common_end, prompt_token_ids
from hps.errors import InputError
from hps.response_head import run
from hps.trial import prove
from pipeline.recipe import Model
from pipeline.weights import load_config, load_weights


class Gate(nn.Module):
    """The weights of the objectives for a prompt, from one hidden state."""

    def __init__(self, config: LlamaConfig, objectives: int):
        super().__init__()
        hidden = [getattr(config, "gating_hidden_dim", 1024)] * getattr(config, "gating_n_hidden", 3)
        widths = [config.hidden_size, *hidden, objectives]
        self.layers = nn.ModuleList(nn.Linear(wide, narrow) for wide, narrow in pairwise(widths))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = getattr(config, "gating_temperature", 10)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            state = layer(state).relu()
        return self.logit_scale * (self.layers[-1](state) / self.temperature).softmax(-1)


class GatedLlama(LlamaPreTrainedModel):
    """The modules, under the names of the published weights. A config's missing values get the published defaults."""

    _keep_in_fp32_modules_strict = {"regression_layer", "reward_transform_matrix", "gating"}

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        objectives = getattr(config, "num_objectives", 19)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(objectives), requires_grad=False)
        self.gating = Gate(config, objectives)
        self.post_init()


class ArmoRM(ConversationScorer):
    """The gated score of a conversation, and its objectives; for the arguments see `ConversationScorer`.

    Raises:
        InputError: the model is missing, is not a Llama, or its weights do not fit the class.
    """

    def __init__(self, model: Model, dtype: str = "auto", batch_tokens: int = 16384):
        super().__init__(model, dtype, batch_tokens)
        self.model = _load(model, self.dtype, self.device).eval()
        self.layout = prove(self.model.base_model, math.inf, own_state, trial_states)
        self.header = _header(self.tokenizer)

    @torch.inference_mode()
    def _details(self, rows: list[list[int]]) -> list[dict]:
        states, _ = self.states(rows, [[self.gate_position(row), len(row) - 1] for row in rows])
        gates = self.model.gating(states[:, 0])
        objectives = self.model.regression_layer(states[:, 1])
        scores = (objectives * (gates @ self.model.reward_transform_matrix.T)).sum(-1)
        means = objectives.mean(-1)  # the reward of the released code of HPS
        columns = zip(scores.tolist(), objectives.tolist(), means.tolist(), strict=True)
        return [{"score": score, "objectives": each, "objectives_mean": mean} for score, each, mean in columns]

    def gate_position(self, row: list[int]) -> int:
        """Where the gate reads: the end of the turn before the last assistant's header (see the module's docstring)."""
        size = len(self.header)
        for start in range(len(row) - size, -1, -1):
            if row[start : start + size] == self.header:
                return start
        problem = "the conversation has no assistant's header"
        raise InputError(problem, remedy="check the chat template of the reward model")


def own_state(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The last hidden state of a conversation by the class's forward pass, (hidden size,)."""
    return model(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, -1]


def trial_states(model, rows: dict[str, torch.Tensor], gathers: bool) -> torch.Tensor:
    """The same for all conversations in rows of hps.shared_prefix: (conversations, hidden size)."""
    return run(model, model, "last_hidden_state", rows)[0][rows["starts"][:, 1] + rows["sizes"] - 1]


def _header(tokenizer) -> list[int]:
    """The tokens between a user's text and the answer, without the last one.

    The last token is white space, which may merge with white space at the start of an answer.
    """
    header = common_end(*(prompt_token_ids(tokenizer, [{"role": "user", "content": letter}]) for letter in "ab"))
    if len(header) < 2:
        problem = "the chat template writes nothing between the user's text and the answer"
        remedy = "give the tokenizer that was published with the reward model"
        raise InputError(problem, where=str(tokenizer.name_or_path), remedy=remedy)
    return header[:-1]


def _load(model: Model, dtype: torch.dtype, device: torch.device) -> GatedLlama:
    config = load_config(model)
    if not isinstance(config, LlamaConfig):
        problem = f"`model_type` is {config.model_type}"
        raise InputError(problem, where=model.path, remedy="an ArmoRM must be a llama model")
    return load_weights(GatedLlama, model, exact=True, config=config, dtype=dtype, device_map={"": device})
