"""Start training on the devices of this machine, alone or together with other machines.

Reads   the recipe's `training.processes` (of each machine) and `training.deepspeed`; torchrun's `PET_NNODES`,
        `PET_RDZV_ENDPOINT`, `PET_RDZV_ID` of the environment, on every machine the same (cluster/train.sbatch)
Run     python -m alignment.launch configs/hh_rlhf.yaml

One process without DeepSpeed runs as it is; everything else is started by torchrun. (`accelerate launch` on a CPU
applies no DeepSpeed settings and trains with plain DDP.)
"""

import os
import socket
import sys

from hps.errors import InputError, run_main
from pipeline.cli import parse
from pipeline.recipe import Recipe
from pipeline.workers import accumulation_steps, node_count, process_count


def torchrun(arguments: list[str]) -> None:
    """Run torchrun here; a failed child ends this process with its exit status (2 for bad input), not with 1.

    Ctrl-C, and the SIGTERM with which a cluster takes its nodes back, reach the processes through torchrun; they are
    no error of the program.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    try:
        run(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except SignalException as stopped:
        print("interrupted; the same command continues from the last complete checkpoint", file=sys.stderr)
        sys.exit(128 + stopped.sigval)


def main() -> None:
    recipe, _ = parse(__doc__, dry_run=False)
    processes = process_count(recipe)
    accumulation_steps(recipe, processes)  # one clear error here instead of one from every process
    training = ["-m", "alignment.train", *sys.argv[1:]]
    import torch

    # Without a launcher the trainer would take every GPU that it sees, by nn.DataParallel.
    if processes == 1 and not recipe.training.deepspeed and torch.cuda.device_count() <= 1:
        os.execv(sys.executable, [sys.executable, *training])
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    nodes = node_count()
    if nodes > 1:  # the rest of the rendezvous torchrun takes from the environment
        _check_shared(recipe)
        os.environ.setdefault("PET_RDZV_BACKEND", "c10d")
    meeting = [] if nodes > 1 else ["--standalone"]
    torchrun([*meeting, "--nproc_per_node", str(processes // nodes), *training])


def _check_shared(recipe: Recipe) -> None:
    plan = recipe.run_folder() / "plan.jsonl"
    if not plan.exists():
        raise InputError(
            f"this node ({socket.gethostname()}) does not see the plan",
            where=str(plan),
            remedy="make it first (`python -m alignment.plan`, on one node) on a file system that all nodes share",
        )


if __name__ == "__main__":
    run_main(main)
