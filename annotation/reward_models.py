"""Load a reward model, of whichever class its configuration names."""

from annotation.armorm import ArmoRM
from annotation.score import ConversationScorer, RewardModel
from hps.preflight import ARMORM
from hps.recipe import Model
from hps.weights import load_config


def load_reward_model(model: Model, dtype: str = "auto", batch_tokens: int = 16384) -> ConversationScorer:
    """The reward model of a folder or hub name; the arguments are those of `ConversationScorer`."""
    kind = ArmoRM if ARMORM in (load_config(model).architectures or []) else RewardModel
    return kind(model, dtype, batch_tokens)
