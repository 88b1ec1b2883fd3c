"""Hard Preference Sampling as a library: independent of recipes, stages and files.

methods, losses         families of losses and their formulas
settings, combinations  settings of the method, and those that contradict each other
records                 types of ranked records and of the plan's rows
negatives, planning     weights of the negatives (Eq. 9), gamma, draws, and what each step trains on
chat, tokens            messages to token ids
shared_prefix           rows in which a prompt is computed once for all its responses
attention               who sees whom in them
response_head           log-probabilities from the forward pass on them
trial                   which models can, found by trying
row_costs               whether that is faster on a GPU, estimated
preferences, inspection rows of any preference data set as token ids, and what is wrong with them
first_step              s and the loss before the first update, and how far settings can move a margin
inspect_data            the command that prints both
dataset, rows           data sets of the library `datasets` as ranked prompts, and the plan's rows as token ids
trainer, reference      training on a plan, and log-probabilities under the reference
errors                  one line for what is wrong, where, and the remedy

`from hps import HPSTrainer, HPSConfig` is for scripts (docs/trainer.md).
"""

from typing import Any

__all__ = ["HPSConfig", "HPSTrainer"]


def __getattr__(name: str) -> Any:
    """The two names of the trainer, loaded when they are asked for: the inference environment has no TRL."""
    if name not in __all__:
        raise AttributeError(f"module 'hps' has no attribute {name!r}")
    from hps import trainer

    return getattr(trainer, name)
