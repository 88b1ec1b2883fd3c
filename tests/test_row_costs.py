"""hps/row_costs.py: which rows are cheaper on a GPU, by hand for Llama 3 8B."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from hps.row_costs import RowCosts
from pipeline.recipe import REPOSITORY

CONFIG = AutoConfig.from_pretrained(REPOSITORY / "configs/shapes/llama-3-8b.json")


def test_costs_by_hand():
    """A layer of Llama 3 8B has 4096 x (4096 + 4096 + 1024 + 1024 + 3 x 14336) = 218,103,808 weights in its products.

    LoRA with checkpointing: 3 passes of 2 operations each at 500. A pair of tokens: 4 x 4096 operations forward, twice
    at 400, and 2.5 times as many backward at 280; with a mask at 50 and 30.
    """
    costs = RowCosts.of(CONFIG, adapter=True, checkpointing=True)
    assert costs.token == pytest.approx(218_103_808 * 6 / 500)
    assert costs.causal == pytest.approx(16384 * (2 / 400 + 2.5 / 280))
    assert costs.masked == pytest.approx(16384 * (2 / 50 + 2.5 / 30))
    full = RowCosts.of(CONFIG, adapter=False, checkpointing=False)
    assert full.token == pytest.approx(218_103_808 * 6 / 500)  # one forward, two backward
    assert full.causal == pytest.approx(16384 * (1 / 400 + 2.5 / 280))
    # Responses of 3 and 1 tokens to a prompt of 2: 6 tokens, 2 causal pairs, 2 x 3 x 5 masked ones; or two rows of 5.
    small = RowCosts(token=1000.0, causal=10.0, masked=1.0)
    assert small.shared([2], [[3, 1]]) == 6000 + 20 + 30
    assert small.separate([2], [[3, 1]]) == 2 * (5000 + 125)
    assert small.separate([2, 1], [[3, 1], [7]]) == 3 * (8000 + 320)


def test_an_architecture_without_groups():
    config = SimpleNamespace(hidden_size=64, num_attention_heads=4, intermediate_size=96)
    assert RowCosts.of(config, True, False).token == pytest.approx(64 * (4 * 64 + 3 * 96) * 4 / 500)


@pytest.mark.parametrize(
    ("prompt", "count", "times"), [(170, 2, 2_510_600 / 2_588_400), (600, 8, 19_583_200 / 12_257_400)]
)
def test_a_pair_behind_a_short_prompt_is_cheaper_apart(prompt, count, times):
    """Responses of 300 tokens, in thousands: a token 2,617.2, a causal pair 0.2282, a masked one 2.0207.

    Two behind 170: 770 x 2,617.2 + 14,450 x 0.2282 + 282,000 x 2.0207 = 2,588,400 against 940 x 2,617.2 + 220,900 x
    0.2282 = 2,510,600. Eight behind 600: 3,000, 180,000 and 2,160,000 make 12,257,400, and 7,200 and 3,240,000 make
    19,583,200.
    """
    costs = RowCosts.of(CONFIG, adapter=True, checkpointing=True)
    lists = [prompt], [[300] * count]
    assert costs.separate(*lists) / costs.shared(*lists) == pytest.approx(times, rel=1e-3)
