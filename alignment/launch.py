"""Start training on the devices of this machine.

Reads   the recipe's `training.processes` and `training.deepspeed`
Run     python -m alignment.launch configs/hh_rlhf.yaml

One process without DeepSpeed runs as it is; everything else is started by torchrun. (`accelerate launch` on a CPU
applies no DeepSpeed settings and trains with plain DDP.)
"""

import os
import sys

from hps.cli import parse
from hps.errors import run_main
from hps.recipe import Recipe


def process_count(recipe: Recipe) -> int:
    """As the recipe says, else one for every GPU, else one."""
    if recipe.training.processes is not None:
        return recipe.training.processes
    import torch

    return max(1, torch.cuda.device_count())


def command(recipe: Recipe, arguments: list[str]) -> list[str]:
    """The command line that trains."""
    processes = process_count(recipe)
    launcher = [sys.executable]
    if processes > 1 or recipe.training.deepspeed:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, "-m", "alignment.train", *arguments]


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    words = command(recipe, sys.argv[1:])
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.execv(words[0], words)


if __name__ == "__main__":
    run_main(main)
