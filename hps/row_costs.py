"""Whether responses should share their prompt in a row: the time of both ways on a GPU, estimated.

A shared prompt saves the products with the weights, which grow with the tokens. But shared rows need more kernels than
flash attention on separate rows, and a micro-batch of few tokens takes as long as their launching: there sharing loses.
Under sdpa the responses also read copies of the prompt through a mask, which is slow where they are long.
"""

from dataclasses import dataclass

# TFLOP/s in bf16, and seconds of launching a layer's kernels in a step (forward and backward). WEIGHTS, MASKED and the
# launches are fitted to the steps of an 8B shape on an H200 in docs/operations.md, "Speed"; CAUSAL is assumed.
WEIGHTS = 370.0  # products with a model's weights
CAUSAL = (400.0, 280.0)  # flash and flex attention, forward and backward
MASKED = (50.0, 30.0)  # sdpa's memory-efficient kernel, which takes a mask, and the copies made for it
APART, FLEX = 3.3e-3, 5.3e-3
SDPA = (5.3e-3, 1.6e-3)  # and for each prompt, which has kernels of its own


@dataclass(frozen=True)
class RowCosts:
    """Seconds of a layer in a training step.

    Attributes:
        token: of its weights, for a token.
        causal, masked: of attention, for a pair of tokens that is computed.
        apart, together, prompt: of launching kernels for separate rows, for shared ones, for each prompt of these.
        flex: shared rows have flex attention, else sdpa.
    """

    token: float
    causal: float
    masked: float
    apart: float
    together: float
    prompt: float
    flex: bool

    @classmethod
    def of(cls, config, adapter: bool, checkpointing: bool, flex: bool) -> "RowCosts":
        """For a model's configuration, with Llama's kind of layers.

        Args:
            adapter: the weights are frozen, and only the gradient of their input is computed.
            checkpointing: the forward pass is computed twice.
            flex: as the attribute.
        """
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = head * config.num_attention_heads
        keys = head * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        weights = config.hidden_size * (2 * width + 2 * keys + 3 * config.intermediate_size)
        forward, backward = 1 + checkpointing, 1 if adapter else 2
        # Two products of a score and a value forward, five backward; a multiplication and an addition each.
        causal, masked = (4e-12 * width * (forward / rates[0] + 2.5 / rates[1]) for rates in (CAUSAL, MASKED))
        passes = forward + backward
        launches = (passes / 2 * seconds for seconds in (APART, *((FLEX, 0.0) if flex else SDPA)))
        return cls(2e-12 * weights * passes / WEIGHTS, causal, masked, *launches, flex)

    def shared(self, prompts: list[int], responses: list[list[int]]) -> float:
        """Seconds that a layer takes if responses share the row of their prompt.

        Args:
            prompts, responses: tokens of each prompt, and of each of its responses.
        """
        total = 0.0
        for prompt, sizes in zip(prompts, responses, strict=True):
            total += self.token * (prompt + sum(sizes)) + self.causal * prompt**2 / 2
            if self.flex:
                total += self.causal * sum(size * (prompt + size / 2) for size in sizes)
            else:  # `block_attention`: all responses, padded to the longest, with every key
                total += self.masked * len(sizes) * max(sizes) * (prompt + max(sizes))
        return _with_launches(total, self.together + self.prompt * len(prompts))

    def separate(self, prompts: list[int], responses: list[list[int]]) -> float:
        """The same with a row for each response, padded to the longest."""
        lengths = [prompt + size for prompt, sizes in zip(prompts, responses, strict=True) for size in sizes]
        total = len(lengths) * (self.token * max(lengths) + self.causal * max(lengths) ** 2 / 2)
        return _with_launches(total, self.apart)


def _with_launches(computing: float, launching: float) -> float:
    """The card computes while the CPU launches: the longer of both, and somewhat more where they are nearly equal.

    With the exponent 3 the estimates are off by 7 % at most for separate rows and flex attention, by 22 % for sdpa.
    """
    return (computing**3 + launching**3) ** (1 / 3)
