"""Start training on this machine's devices, alone or together with other machines.

Reads   the recipe's `training.processes` (of each machine) and `training.deepspeed`; torchrun's environment variables
        `PET_NNODES`, `PET_RDZV_ENDPOINT`, `PET_RDZV_ID`, the same on every machine (cluster/train.sbatch)
Run     python -m alignment.launch configs/hh_rlhf.yaml

One process without DeepSpeed starts directly; torchrun starts everything else. (`accelerate launch` on a CPU ignores
DeepSpeed settings and trains with plain DDP.)
"""

import os
import socket
import sys

from hps.errors import InputError, run_main
from pipeline.cli import parse
from pipeline.machine import check_cuda
from pipeline.workers import accumulation_steps, node_count, process_count


def torchrun(arguments: list[str]) -> None:
    """Run torchrun. A failed child's exit status (2 for bad input) becomes ours, instead of torchrun's 1.

    Ctrl-C, and the SIGTERM with which a cluster takes its nodes back, reach the processes through torchrun. They are
    not errors of the program.
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
    check_cuda()  # torchrun would otherwise start a process on the CPU for every card
    processes = process_count(recipe)
    accumulation_steps(recipe, processes)  # one clear error here instead of one per process
    training = ["-m", "alignment.train", *sys.argv[1:]]
    import torch

    # Without a launcher the trainer would use every visible GPU through nn.DataParallel.
    if processes == 1 and not recipe.training.deepspeed and torch.cuda.device_count() <= 1:
        os.execv(sys.executable, [sys.executable, *training])
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    nodes = node_count()
    if nodes > 1:  # torchrun takes the rest of the rendezvous from the environment
        plan = recipe.run_folder() / "plan.jsonl"
        if not plan.exists():
            problem = f"this node ({socket.gethostname()}) does not see the plan"
            remedy = "make it first (`python -m alignment.plan`, on one node) on a file system that all nodes share"
            raise InputError(problem, where=str(plan), remedy=remedy)
        os.environ.setdefault("PET_RDZV_BACKEND", "c10d")
    rendezvous = [] if nodes > 1 else ["--standalone"]
    torchrun([*rendezvous, "--nproc_per_node", str(processes // nodes), *training])


if __name__ == "__main__":
    run_main(main)
