"""Ask a run: a typed prompt is answered by the model before training and by the trained policy, side by side.

Reads   RUN, the folder of a finished training: its manifest (whose recipe names the model), its checkpoint
Run     python -m tools.chat runs/quickstart/dpo-hps [--tokens 64] [--greedy]

Each line is a prompt of its own. Both answers are sampled as the recipe says (`generation.temperature`, `top_p`), with
the same random numbers, in fp32. End with Ctrl-D.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from evaluation.summary import columns
from hps.chat import end_of_turn_ids, prompt_token_ids, sampled_text
from hps.errors import InputError, positive, run_main
from pipeline.recipe import Recipe
from pipeline.stage import MANIFEST, read_manifest, require_finished


def recipe_of(run: Path) -> Recipe:
    """The recipe of a finished training, wherever its folder is now. InputError: the folder is none."""
    require_finished(run, "the run is", "bash run.sh")
    try:
        recipe = Recipe.model_validate(read_manifest(run / MANIFEST)["recipe"])
    except ValueError as error:
        problem = f"no recipe of this version ({' '.join(str(error).split())[:200]})"
        raise InputError(problem, where=str(run / MANIFEST), remedy="give the folder of a run") from None
    if not (run / "checkpoint").is_dir():
        raise InputError("there is no checkpoint", where=str(run), remedy="give the folder of a run, not of a stage")
    # Round 1, because this folder itself is the run's; the folder of a later round is below one.
    return recipe.model_copy(update={"output": str(run.resolve().parent), "run": run.resolve().name, "round": 1})


class Both:
    """The model before training and the trained policy.

    Args:
        tokens: the most of an answer; None: as the recipe says.
        greedy: take the most probable token each time.
    """

    def __init__(self, recipe: Recipe, tokens: int | None = None, greedy: bool = False):
        from transformers import GenerationConfig

        from evaluation.held_out import HeldOut

        self.models, self.seed = HeldOut(recipe, along=False), recipe.seed
        self.tokenizer = self.models.tokenizer
        self.ends = sorted(end_of_turn_ids(self.tokenizer))
        sampling = recipe.generation
        drawn = sampling.temperature > 0 and not greedy
        # All that a model's own generation_config.json may say otherwise.
        self.settings = GenerationConfig(
            do_sample=drawn,
            temperature=sampling.temperature if drawn else 1.0,
            top_p=sampling.top_p if drawn else 1.0,
            top_k=0,
            repetition_penalty=1.0,
            max_new_tokens=tokens or sampling.max_new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def answer(self, prompt: str, number: int) -> tuple[str, str]:
        """The answers before and after training to a prompt; `number` chooses the random numbers."""
        ids = prompt_token_ids(self.tokenizer, [{"role": "user", "content": prompt}])
        with self.models.as_reference():
            before = self._sample(self.models.reference, ids, number)
        return before, self._sample(self.models.policy, ids, number)

    def _sample(self, model, ids: list[int], number: int) -> str:
        import torch

        torch.manual_seed(self.seed + number)
        inputs = torch.tensor([ids], device=self.models.device)
        with torch.inference_mode():
            found = model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=self.settings
            )
        new = found[0, len(ids) :].tolist()
        return sampled_text(self.tokenizer, new, truncated=new[-1] not in self.ends).strip()


def chat(both: Both, prompts: Iterable[str], width: int) -> Iterator[str]:
    """The lines to print for each prompt that is not blank."""
    for number, prompt in enumerate(filter(None, map(str.strip, prompts))):
        before, after = both.answer(prompt, number)
        yield from columns("BEFORE TRAINING", "AFTER", width)
        yield from columns(before, after, width)
        yield ""


def typed() -> Iterator[str]:
    """Lines from the terminal, with a mark in front of each; or from a pipe, without."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished training")
    parser.add_argument(
        "--tokens", type=positive(int), metavar="N", help="the most of an answer; default: the recipe's"
    )
    parser.add_argument("--greedy", action="store_true", help="the most probable token each time")
    options = parser.parse_args()
    both = Both(recipe_of(options.run), options.tokens, options.greedy)
    for line in chat(both, typed(), shutil.get_terminal_size((120, 24)).columns):
        print(line, flush=True)


if __name__ == "__main__":
    run_main(main)
