"""Load a scorer (a reward model of one of the classes here, or a function) and run it on all devices."""

from collections.abc import Iterable, Iterator

from annotation.armorm import ArmoRM
from annotation.canary import canary_folder, check_canaries
from annotation.reward_model import ConversationScorer, RewardModel, TooLong
from hps.chat import check_records, load_tokenizer
from hps.errors import InputError
from pipeline.functions import FunctionScorer
from pipeline.identity import model_hash
from pipeline.models import ARMORM, WRITERS, check_labels
from pipeline.recipe import Model, Recipe
from pipeline.weights import load_config
from pipeline.workers import run_workers

SPELLED = 8  # records whose responses are tokenised before the model loads; the others when they are scored


def load_reward_model(model: Model, dtype: str = "auto", batch_tokens: int = 16384) -> ConversationScorer:
    """The reward model of a folder or hub name; the arguments are those of `ConversationScorer`."""
    kind = ArmoRM if ARMORM in (load_config(model).architectures or []) else RewardModel
    return kind(model, dtype, batch_tokens)


def scorer_settings(recipe: Recipe, role: str, writer: Model) -> dict:
    """What decides a score, for the claim. A function counts in the tokens of the model that wrote the responses."""
    scorer = getattr(recipe.models, role)
    if scorer.function:
        return {"dtype": None, "model": model_hash(scorer), "tokenizer": model_hash(writer)}
    return {"dtype": recipe.annotation.dtype, "model": model_hash(scorer)}


class ScoreWorker:
    """The worker: one scorer. Records go in, the details of their responses' scores come out.

    Items in: `key`, `where` and `record` (`prompt_id`, `prompt`, `responses`, `truncated`). Items out: `key`, `record`
    and `details`; or `error`, with `too_long` for a conversation beyond the model's context.

    Args:
        role: of the scorer in the recipe. A reward model scores the canaries first (annotation/canary.py).
        writer: the model whose responses are scored.
    """

    def __init__(self, recipe: Recipe, role: str, writer: Model):
        scorer, settings = getattr(recipe.models, role), recipe.annotation
        if scorer.function:
            self.model: ConversationScorer | FunctionScorer = FunctionScorer(
                scorer.function, f"models.{role}.function", writer
            )
        else:
            check_labels(scorer, role)
            self.model = load_reward_model(scorer, settings.dtype, settings.batch_tokens)
            check_canaries(self.model, canary_folder(recipe), scorer)

    def stream(self, items: Iterator[dict]) -> Iterator[dict]:
        for item in items:
            record = item["record"]
            result = {"key": item["key"], "record": record}
            try:
                result["details"] = self.model.score_details(
                    record["prompt"], record["responses"], record["truncated"], record["prompt_id"]
                )
            except InputError as error:
                result["error"] = f"{item['where']}: prompt {record['prompt_id']}: {error}"
                result["too_long"] = error.facts if isinstance(error, TooLong) else None
            yield result


def run_scorers(
    recipe: Recipe,
    role: str,
    records: Iterable[tuple[str, dict]],
    items: Iterator[dict],
    count: int,
    writer: Model | None = None,
) -> Iterator[dict]:
    """Run `count` items through `ScoreWorker` on all devices; without items no model loads.

    A function runs in this process, or in `annotation.workers` processes, and takes no GPU.

    Args:
        records: with their places; a tokenizer that cannot encode them is refused before a model loads.
        writer: the model whose responses are scored; default: the one that the role is for.
    """
    if not count:
        return iter(())
    model, writer = getattr(recipe.models, role), writer or getattr(recipe.models, WRITERS[role])
    reader = writer if model.function else model
    check_records(load_tokenizer(reader.path, reader.revision), records, spelled=SPELLED)
    arguments = {"recipe": recipe, "role": role, "writer": writer}
    if model.function and recipe.annotation.workers is None:
        return ScoreWorker(**arguments).stream(items)
    gpus = 0 if model.function else 1
    return run_workers(ScoreWorker, arguments, items, recipe.annotation.workers, count, gpus_each=gpus)
