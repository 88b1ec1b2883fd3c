"""Llama shapes with random weights and rows of random tokens: a GPU is checked and measured without a download."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

EIGHT, ONE = "Llama-3-8B", "Llama-3.2-1B"
TINY = "tiny"  # for the CPU, where the programs themselves are tested
SIZES = {
    EIGHT: dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    ONE: dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32),
    TINY: dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4),
}
VOCABULARY = {EIGHT: 128256, ONE: 128256, TINY: 600}
TIED = {ONE}


def shape(name: str, layers: int | None = None) -> LlamaConfig:
    """The configuration of a shape, with fewer layers where that is asked."""
    sizes = {**SIZES[name], **({"num_hidden_layers": layers} if layers else {})}
    heads = sizes["num_attention_heads"] // 4 if name == EIGHT else 8 if name == ONE else 2
    return LlamaConfig(
        **sizes,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY[name],
        tie_word_embeddings=name in TIED,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2 if name == TINY else 0.02,  # so that its attention prefers some tokens, too
    )


def random_model(config: LlamaConfig, device: str, dtype: torch.dtype, attention: str = "sdpa"):
    """A model with random weights, made on its device; equal seeds give equal weights on one device."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def plan_row(number: int, prompt: list[int], responses: list[list[int]], rewards: list[float]) -> dict:
    """A row as `alignment.train.TokenRows` makes it: y_1 first, all weight on the last response."""
    count = len(responses)
    texts = {"prompt_ids": prompt, "response_ids": responses, "rewards": rewards}
    numbers = {"weights": [[0.0] * (count - 1) + [1.0]], "dispreferred_count": [count - 1], "gamma": 0.0, "cut": 0}
    return {"row": number, **texts, **numbers}


def with_adapter(model):
    """The recipe's LoRA (rank 8 on q and v), both factors random: with B = 0 half of the gradients would be 0."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    )
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return adapted


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of each of its responses."""

    prompt: int
    responses: tuple[int, ...]

    def texts(self, vocabulary: int, prompts: int = 1, seed: int = 0) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Random ids of prompts, and of their responses."""
        generator = torch.Generator().manual_seed(seed)

        def ids(count: int) -> list[int]:
            return torch.randint(2, vocabulary, (count,), generator=generator).tolist()

        return [ids(self.prompt) for _ in range(prompts)], [[*map(ids, self.responses)] for _ in range(prompts)]
