"""hps/shared_prefix.py: rows that share a prompt give what rows of their own give."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_check import differences
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)
from transformers.integrations.flex_attention import WrappedFlexAttention

from hps import attention, response_head, shared_prefix, trial
from hps.attention import attention_mask, block_mask, blocks
from hps.response_head import add_response_head, response_log_probs, token_log_probs
from hps.row_costs import RowCosts
from hps.shared_prefix import SHARED, Layout, balanced, fill_rows, make_rows, on_grid, separate_rows, shared_rows
from hps.trial import prove, take_flex

SHAPE = {
    "vocab_size": 90,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
}
PROMPTS = [[3, 14, 15, 9, 26, 5], [35, 8], [9, 7, 9, 3]]
RESPONSES = [[[2, 38], [46, 2, 6, 43, 3], [8]], [[32, 7]], [[9, 5, 1], [4, 4, 4, 4]]]


def model_of(config, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)
    add_response_head(model)
    return model


def exact_norms(model) -> None:
    """RMSNorm in the model's precision: the library's rounds to fp32, and in the backward pass of a shared prompt it
    rounds the sum of the responses' gradients instead of each."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape[0], child.variance_epsilon, dtype=child.weight.dtype)
                norm.weight = child.weight
                setattr(module, name, norm)


def by_hand(model, prompts, responses) -> torch.Tensor:
    """Summed log-probabilities from the model's own logits, a row for each response."""
    values = []
    for prompt, each in zip(prompts, responses, strict=True):
        for response in each:
            logps = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].log_softmax(dim=-1)
            picked = [logps[len(prompt) - 1 + place, token] for place, token in enumerate(response)]
            values.append(torch.stack(picked).sum())
    return torch.stack(values)


def gradients(model, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a weighted sum, so that responses do not cancel."""
    weights = torch.arange(1, len(values) + 1, dtype=values.dtype) * torch.tensor([1, -1] * len(values))[: len(values)]
    model.zero_grad()
    (weights * values).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("budget", [None, 22, 1000], ids=["longest", "two prompts", "one row"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_rows_of_their_own_in_float64(name, lora, checkpointing, budget):
    """Log-probabilities and the gradient of every weight to 1e-9."""
    model = model_of(ARCHITECTURES[name])
    exact_norms(model)
    if lora:
        from peft import LoraConfig, get_peft_model

        modules = ["query_key_value"] if name == "gpt_neox" else ["q_proj", "v_proj"]
        # B is 0 at first, and A would have no gradient.
        model = get_peft_model(model, LoraConfig(r=4, target_modules=modules, init_lora_weights=False)).double()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model.train()
    shared = response_log_probs(model, shared_rows(PROMPTS, RESPONSES, pad=0, budget=budget))
    found = gradients(model, shared)
    expected = by_hand(model, PROMPTS, RESPONSES)
    assert_close(shared, expected, rtol=0, atol=1e-9)
    wanted = gradients(model, expected)
    assert found.keys() == wanted.keys() and all("lora_" in key for key in found) == lora
    for key, value in wanted.items():
        assert value.abs().max() > 0
        assert_close(found[key], value, rtol=0, atol=1e-9 * max(1.0, float(value.abs().max())), msg=key)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_rows_of_their_own_in_float32(name):
    """Values to 1e-5, the gradient's norm to 1e-4, both relative."""
    model = model_of(ARCHITECTURES[name], torch.float32)
    shared = response_log_probs(model, shared_rows(PROMPTS, RESPONSES, pad=0))
    found = gradients(model, shared)
    expected = by_hand(model, PROMPTS, RESPONSES)
    assert_close(shared, expected, rtol=1e-5, atol=0)
    norms = [
        torch.stack([value.norm() for value in each.values()]).norm() for each in (found, gradients(model, expected))
    ]
    assert_close(*norms, rtol=1e-4, atol=0)


def test_neither_padding_nor_neighbours_count():
    """Other tokens in the padding and in the other prompts and responses leave a response's value as it is."""
    model = model_of(ARCHITECTURES["llama"])
    rows = shared_rows(PROMPTS, RESPONSES, pad=0)
    with torch.no_grad():
        before = response_log_probs(model, rows)
        other = {**rows, "input_ids": rows["input_ids"].clone()}
        mine = (rows["segments"] == torch.tensor([0, 0])).all(dim=-1) | (rows["segments"] == torch.tensor([0, 2])).all(
            dim=-1
        )
        other["input_ids"][~mine] = 77
        after = response_log_probs(model, other)
    assert_close(after[1], before[1], rtol=0, atol=1e-12)
    assert (after[[0, 3, 4]] - before[[0, 3, 4]]).abs().min() > 1e-3


def test_rows_by_hand():
    """Prompt [1, 2] with [3, 4] and [5], prompt [6] with [7]: two in a row of five and padding, or one of seven."""
    rows = shared_rows([[1, 2], [6]], [[[3, 4], [5]], [[7]]], pad=0)
    assert rows["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert rows["segments"][0].tolist() == [[0, 0], [0, 0], [0, 1], [0, 1], [0, 2]]
    assert rows["segments"][1].tolist() == [[1, 0], [1, 1], [-1, -1], [-1, -1], [-1, -1]]
    assert rows["scored"].tolist() == [1, 2, 1, 5]
    assert rows["targets"].tolist() == [3, 4, 5, 7]
    assert rows["sizes"].tolist() == [2, 1, 1]
    assert attention_mask(rows["segments"])[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    one = shared_rows([[1, 2], [6]], [[[3, 4], [5]], [[7]]], pad=0, budget=7)
    assert one["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert one["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert one["scored"].tolist() == [1, 2, 1, 5]
    assert not attention_mask(one["segments"])[0, 0, 5:, :5].any()


@pytest.mark.parametrize("budget", [None, 12], ids=["by default", "by the setting"])
def test_a_long_list_is_split_over_rows(budget, monkeypatch):
    """At most 12 tokens: the first list as 6 + 2 and 6 + 5 + 1, and the second (2 + 2) fills up the former."""
    monkeypatch.setattr(shared_prefix, "ROW_TOKENS", 10**6 if budget else 12)
    assert list(shared_prefix.portions(6, [2, 5, 1], 12, shared=True)) == [[0], [1, 2]]
    assert list(shared_prefix.portions(6, [20, 1, 1], 12, shared=True)) == [[0], [1, 2]]
    rows = shared_rows(PROMPTS, RESPONSES, pad=0, budget=budget)
    assert rows["input_ids"].shape == (3, 12)
    assert rows["sizes"].tolist() == [len(response) for each in RESPONSES for response in each]
    model = model_of(ARCHITECTURES["llama"])
    with torch.no_grad():
        assert_close(response_log_probs(model, rows), by_hand(model, PROMPTS, RESPONSES), rtol=0, atol=1e-9)


def test_a_split_list_is_balanced():
    """8 x 300 tokens after a prompt of 170 take two rows of at most 2,048: of four each, not of six and two."""
    assert balanced(170, [300] * 8, 2048) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert shared_rows([[1] * 170], [[[2] * 300] * 8], pad=0)["input_ids"].shape == (2, 1370)
    assert balanced(170, [300] * 6, 2048) == [[0, 1, 2, 3, 4, 5]]
    assert balanced(6, [20, 1, 1], 12) == [[0], [1, 2]]


@settings(deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 90))
def test_balanced_rows_are_the_best_of_all(prompt, responses, budget):
    """Of all ways to cut the list that keep to the budget: the fewest rows, then the shortest longest."""

    def tokens(part):
        return prompt + sum(responses[index] for index in part)

    ways = []
    for cuts in range(2 ** (len(responses) - 1)):
        parts = [[0]]
        for index in range(1, len(responses)):
            if cuts >> (index - 1) & 1:
                parts.append([index])
            else:
                parts[-1].append(index)
        if all(tokens(part) <= budget or len(part) == 1 for part in parts):
            ways.append((len(parts), max(map(tokens, parts))))
    found = balanced(prompt, responses, budget)
    assert [index for part in found for index in part] == list(range(len(responses)))
    assert (len(found), max(map(tokens, found))) == min(ways)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.none() | st.integers(1, 120))
def test_rows_are_filled_within_the_budget(sizes, budget):
    rows = fill_rows(sizes, budget)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    limit = max(budget or 0, max(sizes))
    totals = [sum(sizes[index] for index in row) for row in rows]
    assert max(totals) <= limit
    # First fit leaves at most one row half empty.
    assert sum(total <= limit / 2 for total in totals) <= 1


@pytest.mark.parametrize(("trains", "calls"), [(True, 14), (False, 7)], ids=["trains", "frozen"])
def test_the_head_never_makes_more_logits_than_its_chunk(monkeypatch, trains, calls):
    """70 tokens x 90 logits in chunks of 10 tokens: forward and backward as in one piece."""
    monkeypatch.setattr(response_head, "CHUNK_LOGITS", 900)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(16, 90).double(), torch.randn(70, 16, dtype=torch.float64, requires_grad=True)
    head.requires_grad_(trains)
    targets = torch.randint(90, (70,))
    sizes = []
    head.register_forward_hook(lambda module, given, logits: sizes.append(logits.shape[0]))
    values = token_log_probs(head, hidden, targets)
    (grad,) = torch.autograd.grad(values.square().sum(), hidden)
    assert sizes == [10] * calls  # a head that trains makes them again in the backward pass
    whole = head(hidden).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
    assert_close(values, whole)
    assert_close(grad, torch.autograd.grad(whole.square().sum(), hidden)[0])


def test_the_heads_chunk_grows_with_the_card(monkeypatch):
    """80 GiB: 2^30 x 80 / 256 / 4 logits, 654 tokens of 128,256; never below the CPU's 2^24."""
    for gib, logits in ((80, 83_886_080), (24, 25_165_824), (8, 2**24)):
        card = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        assert response_head.chunk_logits(torch.device("cuda", 0)) == logits
    assert 83_886_080 // 128_256 == 654
    assert response_head.chunk_logits(torch.device("cpu")) == 2**24


@pytest.mark.parametrize("trains", ["nothing", "all but the head", "all"])
def test_log_probabilities_of_a_bf16_model_are_float32(trains):
    """From logits that bf16 holds exactly, multiples of 1/4 below 16: rounding comes with the soft-max alone, and in
    bf16 it would be up to 0.03 in a value of -10."""
    model = model_of(LlamaConfig(**SHAPE), torch.bfloat16).requires_grad_(trains != "nothing")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():  # a token's hidden state is its embedding, of ones and minus ones
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                value.zero_()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.copy_(torch.randint(2, embedding.shape, generator=generator) * 2 - 1)
        head.zero_()[:, :4] = torch.randint(-15, 16, (90, 4), generator=generator) / 4
        model.get_output_embeddings().requires_grad_(trains == "all")
        logits = embedding.double() @ head.double().T
        picked = logits.log_softmax(dim=-1)
        expected = [
            sum(picked[before, token].item() for before, token in zip([prompt[-1], *response], response, strict=False))
            for prompt, each in zip(PROMPTS, RESPONSES, strict=True)
            for response in each
        ]
        assert torch.equal(model(torch.tensor([PROMPTS[0]])).logits[0].double(), logits[PROMPTS[0]])
    found = response_log_probs(model, shared_rows(PROMPTS, RESPONSES, pad=0))
    assert found.dtype == torch.float32 and found.requires_grad == (trains != "nothing")
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_without_its_arguments_the_forward_pass_is_the_models_own():
    config = ARCHITECTURES["llama"]
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).double()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(plain(ids).logits, model_of(config)(ids).logits)


# ---- which models can ----

ANY = math.inf
# name: configuration, and how its class may compute conversations of up to 2,048 tokens.
CLASSES = {
    "llama": (ARCHITECTURES["llama"], (ANY, ANY, True, "")),
    "tied": (ARCHITECTURES["qwen2"], (ANY, ANY, True, "")),
    "another head": (ARCHITECTURES["gpt_neox"], (ANY, ANY, True, "")),
    "learnt positions": (GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=90), (ANY, ANY, True, "")),
    "logits scaled by the class": (CohereConfig(**SHAPE, num_key_value_heads=4), (ANY, ANY, True, "")),
    "logits divided": (GraniteConfig(**SHAPE, num_key_value_heads=2, logits_scaling=8.0), (ANY, ANY, True, "")),
    "a window of 1024": (
        MistralConfig(**SHAPE, num_key_value_heads=4, sliding_window=1024),
        (1024, ANY, True, "`sliding_window` of its configuration is 1024"),
    ),
    "a window of the longest": (
        MistralConfig(**SHAPE, num_key_value_heads=4, sliding_window=2048),
        (ANY, ANY, True, ""),
    ),
    # Logits are capped, and its eager attention makes NaN of padding that sees nothing within the window.
    "windows in some layers, capped logits": (
        Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=16, sliding_window=32),
        (32, 32, True, "`sliding_window` of its configuration is 32"),
    ),
    "rotary embedding of the row": (
        LlamaConfig(
            **SHAPE,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        ),
        (1024, 1024, True, "`max_position_embeddings` of its configuration is 1024"),
    ),
    # The convolutions reach from one response into the next, whatever the mask says.
    "convolutions": (
        Lfm2Config(**SHAPE, num_key_value_heads=4, layer_types=["full_attention", "full_attention", "conv"]),
        (0, ANY, True, "its responses see more than the mask says"),
    ),
    "recurrent": (
        MambaConfig(vocab_size=90, hidden_size=64, num_hidden_layers=2),
        (0, ANY, True, "its responses see more than the mask says"),
    ),
    # The class does not call its `base_model`.
    "a decoder of its own": (
        OPTConfig(
            vocab_size=90,
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=64,
        ),
        (ANY, ANY, False, ""),
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_layout_and_values_are_the_classs(name):
    """The layout; then values in its rows against `model(...)`, of conversations on both sides of the shortest limit.

    They have 9 to 50 tokens; the shortest window is of 32.
    """
    config, expected = CLASSES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    layout = prove(model, 2048)
    assert layout == Layout(*expected)
    add_response_head(model, layout.gathers)
    prompts = [list(range(3, 8)), list(range(20, 50))]
    responses = [[[5, 7, 9, 11], [60, 61, 62, 63, 64, 65]], [list(range(60, 80)), [3, 4, 5]]]
    with torch.no_grad():
        wanted = by_hand(model, prompts, responses)
        for rows in (
            make_rows(layout, prompts, responses, pad=0),
            make_rows(replace(layout, shared=0), prompts, responses, pad=0),
            separate_rows(prompts, responses, pad=0, alone=True),
        ):
            assert_close(response_log_probs(model, rows), wanted, rtol=1e-6, atol=1e-6)


def test_a_limit_divides_the_rows():
    """Up to 6 tokens shared, up to 8 padded, above one by one."""
    layout = Layout(shared=6, padded=8, gathers=True, reason="")
    kinds = {6: "segments", 7: "attention_mask", 8: "attention_mask", 9: "lengths"}
    for length, kind in kinds.items():
        assert kind in make_rows(layout, [[1, 2]], [[[3], [4] * (length - 2)]], pad=0)


def test_the_cost_divides_the_rows():
    """A token costs 100, a causal pair 1, a masked one 8: a prompt of 2 with 3 + 3 tokens takes 800 + 2 + 240 together
    and 2 x (500 + 12.5) apart, with 2 + 2 tokens 600 + 2 + 128 and 2 x (400 + 8)."""
    costs = RowCosts(token=100.0, causal=1.0, masked=8.0, apart=0.0, together=0.0, prompt=0.0, flex=False)
    for layout, size, kind in (
        (Layout(ANY, ANY, True, ""), 2, "segments"),
        (Layout(ANY, ANY, True, ""), 3, "attention_mask"),
        (Layout(ANY, 4, True, ""), 3, "segments"),  # apart it would be row by row
    ):
        assert kind in make_rows(layout, [[1, 2]], [[[3] * size] * 2], pad=0, costs=costs)
        assert "segments" in make_rows(layout, [[1, 2]], [[[3] * size] * 2], pad=0)


def test_separate_rows_by_hand():
    """Prompt [1, 2] with [3, 4] and [5], in rows of four."""
    rows = separate_rows([[1, 2]], [[[3, 4], [5]]], pad=0)
    assert rows["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 5, 0]]
    assert rows["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert rows["scored"].tolist() == [1, 2, 5]
    assert rows["targets"].tolist() == [3, 4, 5]
    assert rows["starts"].tolist() == [[0, 2], [4, 6]]
    assert separate_rows([[1, 2]], [[[3, 4], [5]]], pad=0, alone=True)["lengths"].tolist() == [4, 3]


def test_our_tiny_model_shares(tokenizer):
    assert prove(model_of(tiny_config(tokenizer), torch.float32), 384) == Layout(ANY, ANY, True, "")


def test_the_trial_leaves_model_and_seed_alone():
    model = model_of(ARCHITECTURES["llama"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    prove(model, 2048)
    assert torch.equal(torch.rand(1), expected)
    assert model.config.num_hidden_layers == 3 and model.config.vocab_size == 90
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_attention_that_takes_no_mask_has_rows_of_their_own():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES["llama"]), attn_implementation="sdpa")
    model.config._attn_implementation_internal = "flash_attention_2"
    reason = "its attention is flash_attention_2, and the mask needs sdpa, eager, flex_attention"
    assert prove(model, 2048) == Layout(0, ANY, True, reason)
    assert model.config._attn_implementation == "flash_attention_2"


def test_eager_attention_shares():
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES["llama"]), attn_implementation="eager")
    assert prove(model, 2048).shared == ANY


# ---- lengths on a grid, as on CUDA ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_longer_rows_and_blocks_hold_the_same(name, monkeypatch):
    """Values and gradients in float64, with the rows, the prompts and the responses padded, and half of it alone."""
    model = model_of(ARCHITECTURES[name])
    exact_norms(model)
    expected = by_hand(model, PROMPTS, RESPONSES)
    wanted = gradients(model, expected)
    for rows in (True, False):
        for inside in (True, False):
            monkeypatch.setattr(attention, "blocks", lambda rows, gridded, inside=inside: blocks(rows, inside))
            made = shared_rows(PROMPTS, RESPONSES, pad=0, budget=22, gridded=rows)
            assert made["input_ids"].shape[1] == (32 if rows else 18)
            found = response_log_probs(model, made)
            assert_close(found, expected, rtol=0, atol=1e-9)
            for key, value in gradients(model, found).items():
                assert_close(value, wanted[key], rtol=0, atol=1e-9 * max(1.0, float(wanted[key].abs().max())), msg=key)


def test_blocks_by_hand():
    """Prompt [1, 2] with [3, 4] and [5], as it is and on the grid: 16 places for the prompt, 16 for each response."""
    rows = shared_rows([[1, 2]], [[[3, 4], [5]]], pad=0)
    (block,), (wide,) = blocks(rows), blocks(rows, gridded=True)
    for found in (block, wide):
        assert (found.row, found.start, found.end) == (0, 0, 2)
        assert found.filled.tolist() == [2, 3, 4]
        assert found.places[:, :2].tolist() == [[2, 3], [4, 0]]
    assert (block.more, wide.more) == (0, 14)
    assert (block.taken.tolist(), wide.taken.tolist()) == ([0, 1, 2], [0, 1, 16])
    assert block.visible[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert wide.places.shape == (2, 16) and wide.visible.shape == (2, 1, 16, 32)
    assert wide.visible[0, 0, 1].nonzero()[:, 0].tolist() == [0, 1, 16, 17]


def test_separate_rows_need_no_mask(monkeypatch):
    """Padding at the right is seen by no token before it. Where there is CUDA, the trial tries it, too."""
    model = model_of(ARCHITECTURES["llama"])
    rows = separate_rows(PROMPTS, RESPONSES, pad=0, gridded=True)
    assert rows["input_ids"].shape == (6, 16)
    with torch.no_grad():
        expected = by_hand(model, PROMPTS, RESPONSES)
        for change in ({}, {"attention_mask": None}):
            assert_close(response_log_probs(model, rows | change), expected, rtol=0, atol=1e-9)
    monkeypatch.setattr(trial, "_PROVEN", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert prove(model, 2048) == Layout(ANY, ANY, True, "")


# ---- flex attention; its gradients are compared on CUDA alone (`bash test.sh gpu`) ----


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 150), st.lists(st.integers(1, 150), min_size=1, max_size=5)), min_size=1, max_size=3
    ),
    st.none() | st.integers(1, 600),
)
def test_flex_attentions_mask_is_the_dense_one(lengths, budget):
    """Token by token, and what it skips or takes as a whole is nowhere, or everywhere, visible."""
    prompts = [[1] * prompt for prompt, _ in lengths]
    responses = [[[2] * size for size in sizes] for _, sizes in lengths]
    rows = shared_rows(prompts, responses, pad=0, budget=budget)
    dense = attention_mask(rows["segments"])[:, 0]
    mask = block_mask(rows["segments"], rows["position_ids"])
    number, width, length = len(dense), dense.shape[1], mask.shape[-1]
    assert length % 128 == 0 and width <= length
    wanted = torch.eye(length, dtype=torch.bool).repeat(number, 1, 1)
    wanted[:, :width, :width] = dense
    row, place = torch.arange(number)[:, None, None], torch.arange(length)
    assert torch.equal(mask.mask_mod(row, 0, place[:, None], place), wanted)
    squares = wanted.unflatten(2, (-1, 128)).unflatten(1, (-1, 128))
    some, whole = squares.any(dim=4).any(dim=2), squares.all(dim=4).all(dim=2)
    for expected, counts, columns in (
        (some & ~whole, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        listed = [
            [sorted(line[:count].tolist()) for line, count in zip(lines, each, strict=True)]
            for lines, each in zip(columns[:, 0], counts[:, 0], strict=True)
        ]
        assert listed == [[line.nonzero()[:, 0].tolist() for line in each] for each in expected]


def test_a_response_alone_has_a_causal_mask():
    """Prompt and response of 300 tokens in lines of 128 + 128 + 44: the first sees half of itself; the second the first
    as a whole and half of itself. What fills the third up sees itself alone, so that no square of it is whole."""
    rows = shared_rows([[1] * 200], [[[2] * 100]], pad=0)
    mask = block_mask(rows["segments"], rows["position_ids"])
    assert mask.shape == (1, 1, 384, 384)
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 3]]]
    assert mask.kv_indices[0, 0, :, 0].tolist() == [0, 1, 0]
    assert mask.full_kv_num_blocks.tolist() == [[[0, 1, 0]]]


def test_lengths_on_a_grid():
    """Two from a power of two to the next, multiples of 128; sixteen, multiples of 16."""
    assert [on_grid(length, 2, 128) for length in (1, 128, 129, 257, 385, 513, 769, 1025, 1537, 2049)] == [
        *(128, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
    ]
    assert [on_grid(length, 16, 16) for length in (1, 17, 220, 272, 273, 513, 1025, 4000)] == [
        *(16, 32, 224, 272, 288, 544, 1088, 4096)
    ]
    for length in range(1, 5000):
        assert length <= on_grid(length, 16, 16) <= max(length + 15, length * 17 / 16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flex_attentions_values_are_those_of_separate_rows(name, dtype):
    """In one row, and in several; the prompts and responses take more than a square."""
    model = model_of(ARCHITECTURES[name], dtype)
    generator = torch.Generator().manual_seed(3)
    prompts, responses = (
        [torch.randint(90, (size,), generator=generator).tolist() for size in (70, 5)],
        [
            [torch.randint(90, (size,), generator=generator).tolist() for size in sizes]
            for sizes in ((90, 3, 40), (20, 31))
        ],
    )
    with torch.no_grad():
        expected = by_hand(model, prompts, responses)
        model.set_attn_implementation("flex_attention")
        assert model.config._attn_implementation == "flex_attention"
        for budget in (None, 10**9):
            found = response_log_probs(model, shared_rows(prompts, responses, pad=0, budget=budget))
            assert_close(found, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


def test_separate_rows_under_flex_attention_have_sdpa(monkeypatch):
    """Values and gradients, under gradient checkpointing too."""
    model = model_of(ARCHITECTURES["llama"])
    rows = separate_rows(PROMPTS, RESPONSES, pad=0)
    weights = torch.linspace(-1, 1, len(rows["sizes"]), dtype=torch.float64)
    expected = by_hand(model, PROMPTS, RESPONSES)
    gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    model.set_attn_implementation("flex_attention")
    assert prove(model, 2048) == Layout(ANY, ANY, True, "")
    monkeypatch.setattr(attention, "flex_attention_forward", None)
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found = response_log_probs(model, rows)
        assert_close(found, expected, rtol=1e-12, atol=0)
        assert_close(torch.autograd.grad((found * weights).sum(), list(model.parameters())), gradients)


def test_generation_goes_on_after_rows_under_flex_attention():
    """Its masks are not ours: as many keys as the cache has, and one query."""
    model = small_llama()
    model.set_attn_implementation("flex_attention")
    tokens = torch.tensor([[3, 14, 15, 9]])

    def generated() -> list[int]:
        options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
        with torch.compiler.set_stance("force_eager"):  # compiling takes minutes here
            return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0].tolist()

    before = generated()
    assert prove(model, 2048).shared == ANY
    assert generated() == before


@pytest.mark.slow
def test_scores_that_sdpa_does_not_cap_are_not_padded_under_flex_attention():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config = Gemma2Config(vocab_size=90, num_key_value_heads=2, **sizes)
    layouts = {}
    for cap in (None, 50.0):
        config.attn_logit_softcapping = cap
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="flex_attention")
        layouts[cap] = prove(model, 2048)
    assert layouts[None].padded == ANY and layouts[50.0].padded == 0
    assert layouts[None].shared == layouts[50.0].shared == ANY


@pytest.mark.parametrize(("attention", "close"), [("sdpa", 1e-9), ("eager", 1e-4)])  # eager's soft-max is in float32
def test_the_check_for_cuda_finds_right_what_is_right(attention, close):
    model = model_of(ARCHITECTURES["llama"])
    exact_norms(model)
    found = differences(model, attention, PROMPTS, RESPONSES)
    assert found["values"] < close and found["gradients"] < close
    assert model.config._attn_implementation == "sdpa"


def causal(tokens: int) -> torch.Tensor:
    """A mask by which each response sees the one before it."""
    return torch.ones(1, 1, tokens, tokens).tril().bool()


def test_the_check_for_cuda_finds_wrong_what_is_wrong(monkeypatch):
    monkeypatch.setattr(attention, "attention_mask", lambda segments: causal(segments.shape[1]))
    found = differences(model_of(ARCHITECTURES["llama"]), "eager", PROMPTS[:1], RESPONSES[:1])
    assert found["values"] > 1e-2 and found["gradients"] > 1e-2


@pytest.mark.slow
def test_flex_attention_has_a_kernel_for_each_length(monkeypatch):
    """Not for each layer, mask or number of responses; what dynamo would hand to a compiler is counted."""
    compiled = []

    def count(graph, examples):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(flex_attention, backend=count)
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: function)
    monkeypatch.setattr(attention, "uncompiled", nullcontext)
    model = model_of(ARCHITECTURES["llama"])
    model.set_attn_implementation("flex_attention")
    found = []
    with torch.no_grad():
        for prompt, sizes in (
            (70, (60, 20)),
            (90, (60, 30)),
            (30, (20,)),
            (100, (20, 30, 90)),
            (60, (40, 10)),
            (9, (9,)),
        ):
            response_log_probs(model, shared_rows([[1] * prompt], [[[2] * size for size in sizes]], pad=0))
            found.append(len(compiled))
    torch.compiler.reset()
    assert found == [1, 1, 2, 2, 2, 2]  # 256, 256, 128, 256, 128, 128


def test_flex_attention_shares():
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(ARCHITECTURES["llama"]), attn_implementation="flex_attention"
    )
    assert prove(model, 2048).shared == ANY


def small_llama() -> AutoModelForCausalLM:
    """Groups of two heads."""
    return AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES["llama"]), attn_implementation="sdpa")


def test_flex_attention_is_taken_where_it_is_right(monkeypatch):
    """On a CPU its forward pass alone is compared; `test.sh gpu` compares the kernels, with their gradients."""
    model, where = small_llama(), (torch.device("cpu"), torch.float32)
    layout = prove(model, 2048)
    assert take_flex(model, layout, 2048, *where) == layout
    assert model.config._attn_implementation == "flex_attention"
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(trial, "attention_mask", lambda segments: causal(segments.shape[1]))
    with pytest.warns(UserWarning, match="flex attention is not used: its kernels compute something else here"):
        assert take_flex(model, layout, 2048, *where) == layout
    assert model.config._attn_implementation == "sdpa"


def test_a_class_without_flex_attention_keeps_its_own(monkeypatch):
    model = small_llama()
    monkeypatch.setattr(type(model), "_supports_flex_attn", False)
    with pytest.warns(UserWarning, match="flex attention is not used: ValueError"):
        assert take_flex(model, SHARED, 2048, torch.device("cpu"), torch.float32) == SHARED
    assert model.config._attn_implementation == "sdpa"
