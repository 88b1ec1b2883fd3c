"""Whether responses should share their prompt in a row under sdpa: the time of both ways on a GPU, estimated.

A shared prompt saves the products with the weights, which grow with the tokens. Under sdpa its responses read copies of
the prompt through a mask, and attention with one is slower than flash attention on separate rows. Long responses to a
short prompt can therefore cost more together. Flex attention, a recipe's default on CUDA, needs no such estimate.
"""

from dataclasses import dataclass

# TFLOP/s in bf16 on Hopper; only their ratios count.
WEIGHTS = 500.0  # products with a model's weights; assumed
CAUSAL = (400.0, 280.0)  # flash attention, forward and backward; assumed
# sdpa's memory-efficient kernel, which takes a mask, and the copies made for it: fitted to five steps of an 8B shape on
# an H200 (docs/operations.md, "Speed").
MASKED = (50.0, 30.0)


@dataclass(frozen=True)
class RowCosts:
    """Seconds of a layer in a training step, up to a common factor.

    Attributes:
        token: of its weights, for a token.
        causal, masked: of attention, for a pair of tokens that is computed.
    """

    token: float
    causal: float
    masked: float

    @classmethod
    def of(cls, config, adapter: bool, checkpointing: bool) -> "RowCosts":
        """For a model's configuration, with Llama's kind of layers.

        Args:
            adapter: the weights are frozen, and only the gradient of their input is computed.
            checkpointing: the forward pass is computed twice.
        """
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = head * config.num_attention_heads
        keys = head * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        weights = config.hidden_size * (2 * width + 2 * keys + 3 * config.intermediate_size)
        forward, backward = 1 + checkpointing, 1 if adapter else 2
        # Two products of a score and a value forward, five backward; a multiplication and an addition each.
        causal, masked = (4 * width * (forward / rates[0] + 2.5 / rates[1]) for rates in (CAUSAL, MASKED))
        return cls(2 * weights * (forward + backward) / WEIGHTS, causal, masked)

    def shared(self, prompts: list[int], responses: list[list[int]]) -> float:
        """Of rows with shared prompts.

        Args:
            prompts, responses: tokens of each prompt, and of each of its responses.
        """
        total = 0.0
        for prompt, sizes in zip(prompts, responses, strict=True):
            # `block_attention`: the prompt alone, then all responses, padded to the longest, with every key.
            masked = len(sizes) * max(sizes) * (prompt + max(sizes))
            total += self.token * (prompt + sum(sizes)) + self.causal * prompt**2 / 2 + self.masked * masked
        return total

    def separate(self, prompts: list[int], responses: list[list[int]]) -> float:
        """Of a row for each response, padded to the longest; the arguments are those of `shared`."""
        lengths = [prompt + size for prompt, sizes in zip(prompts, responses, strict=True) for size in sizes]
        return len(lengths) * (self.token * max(lengths) + self.causal * max(lengths) ** 2 / 2)
