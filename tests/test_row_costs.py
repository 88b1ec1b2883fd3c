"""hps/row_costs.py: which rows are cheaper on a GPU, by hand for Llama 3 8B, and against measured steps."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from hps.row_costs import RowCosts
from pipeline.recipe import REPOSITORY

CONFIG = AutoConfig.from_pretrained(REPOSITORY / "configs/shapes/llama-3-8b.json")


def test_costs_by_hand():
    """A layer of Llama 3 8B has 4096 x (4096 + 4096 + 1024 + 1024 + 3 x 14336) = 218,103,808 weights in its products.

    LoRA with checkpointing: 3 passes of 2 operations each at 370 TFLOP/s. A pair of tokens: 4 x 4096 operations
    forward, twice at 400, and 2.5 times as many backward at 280; with a mask at 50 and 30.
    """
    costs = RowCosts.of(CONFIG, adapter=True, checkpointing=True, flex=False)
    assert costs.token == pytest.approx(218_103_808 * 6 / 370e12)
    assert costs.causal == pytest.approx(16384e-12 * (2 / 400 + 2.5 / 280))
    assert costs.masked == pytest.approx(16384e-12 * (2 / 50 + 2.5 / 30))
    assert (costs.apart, costs.together, costs.prompt) == pytest.approx((1.5 * 3.3e-3, 1.5 * 5.3e-3, 1.5 * 1.6e-3))
    full = RowCosts.of(CONFIG, adapter=False, checkpointing=False, flex=True)
    assert full.token == pytest.approx(218_103_808 * 6 / 370e12)  # one forward, two backward
    assert full.causal == pytest.approx(16384e-12 * (1 / 400 + 2.5 / 280))
    assert (full.together, full.prompt) == pytest.approx((1.5 * 5.3e-3, 0))


def test_rows_by_hand():
    """Responses of 3 and 1 tokens to a prompt of 2: 6 tokens and 2 causal pairs; under sdpa 2 x 3 x 5 masked ones,
    under flex attention 3 x 3.5 + 2.5 causal ones; or two rows of 5."""
    costs = dict(token=1000.0, causal=10.0, masked=1.0, apart=0.0, together=0.0, prompt=0.0)
    small = RowCosts(**costs, flex=False)
    assert small.shared([2], [[3, 1]]) == pytest.approx(6000 + 20 + 30)
    assert RowCosts(**costs, flex=True).shared([2], [[3, 1]]) == pytest.approx(6000 + 20 + 130)
    assert small.separate([2], [[3, 1]]) == pytest.approx(2 * (5000 + 125))
    assert small.separate([2, 1], [[3, 1], [7]]) == pytest.approx(3 * (8000 + 320))
    # 3^3 + 4^3 + 5^3 = 6^3
    launched = RowCosts(0.5, 0.0, 0.0, apart=(4**3 + 5**3) ** (1 / 3), together=5.0, prompt=2.0, flex=False)
    assert launched.separate([2], [[1, 1]]) == pytest.approx(6.0)
    assert launched.shared([2, 2], [[1], [1]]) == pytest.approx((3**3 + 9**3) ** (1 / 3))


def test_an_architecture_without_groups():
    config = SimpleNamespace(hidden_size=64, num_attention_heads=4, intermediate_size=96)
    assert RowCosts.of(config, True, False, False).token == pytest.approx(64 * (4 * 64 + 3 * 96) * 4 / 370e12)


# Seconds of a step of the 8B shape on an H200, LoRA without gradient checkpointing, by benchmarks/gpu.py. The constants
# are fitted to the first seven; the last three were measured afterwards (docs/operations.md, "Speed").
MEASURED = [
    # prompts, prompt, responses: separate rows, sdpa, flex
    (1, 170, [300] * 2, 0.110, 0.221, 0.170),
    (4, 170, [300] * 2, 0.290, 0.351, 0.278),
    (8, 170, [300] * 2, 0.576, 0.775, 0.509),
    (1, 170, [300] * 8, 0.294, 0.309, 0.247),
    (1, 170, [1000] * 2, None, 0.276, 0.209),
    (1, 1500, [300] * 2, None, 0.361, 0.202),
    (1, 600, [300] * 8, None, 0.382, 0.259),
    (8, 170, [300] * 2, 0.556, None, 0.495),
    (1, 170, [300] * 8, 0.287, None, 0.245),
    (1, 600, [300] * 8, 0.541, None, 0.258),
]


@pytest.mark.parametrize("step", MEASURED)
def test_estimates_are_near_what_was_measured(step):
    prompts, prompt, responses, apart, sdpa, flex = step
    texts = [prompt] * prompts, [responses] * prompts
    costs = {flex: RowCosts.of(CONFIG, adapter=True, checkpointing=False, flex=flex) for flex in (False, True)}
    assert 32 * costs[True].shared(*texts) == pytest.approx(flex, rel=0.07)
    if apart:
        assert 32 * costs[True].separate(*texts) == pytest.approx(apart, rel=0.07)
        assert (costs[True].separate(*texts) > costs[True].shared(*texts)) == (apart > flex)
    if sdpa:
        assert 32 * costs[False].shared(*texts) == pytest.approx(sdpa, rel=0.23)
    if apart and sdpa:
        assert (costs[False].separate(*texts) > costs[False].shared(*texts)) == (apart > sdpa)
