"""What a stage runs on: its devices by name, and what on this machine would end a long run or make it a wrong one.

`check_cuda` refuses to compute on the CPU beside cards that torch cannot use. The rest is for the preflight: a C
compiler and Python's headers, memory of the host, disk.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from hps.errors import InputError

ROOT = Path("/")
DRIVER = "proc/driver/nvidia"
# CUDA's minor versions are compatible: the oldest driver for each major version of the wheels.
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
ROOM = 0.9  # of a disk or memory: what is estimated to be written may take this share of what is free


def cards() -> int:
    """NVIDIA cards that the kernel shows, whether torch can use them or not; 0 if CUDA_VISIBLE_DEVICES hides them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return 0
    found = [path for path in (ROOT / "dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    if not found and (ROOT / "dev/dxg").exists() and shutil.which("nvidia-smi"):  # WSL has no file for each card
        return 1
    return len(found)


def driver_version() -> str | None:
    """The NVIDIA kernel driver's version: `580.159.04`."""
    for name in ("sys/module/nvidia/version", f"{DRIVER}/version"):
        if (ROOT / name).exists():
            words = (ROOT / name).read_text(encoding="utf-8", errors="replace").split()
            return next((word for word in words if word[0].isdigit() and "." in word), None)
    return None


def check_cuda() -> None:
    """Refuse a machine with NVIDIA cards of which torch can use none: the stage would run on the CPU without a word.

    Raises:
        InputError: an old driver, wheels for the CPU, or a device file that cannot be opened.
    """
    import torch

    if torch.cuda.is_available() or not (found := cards()):
        return
    hide = "or set CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU"
    problem = f"this machine has {found} NVIDIA card(s), and torch {torch.__version__} cannot use them"
    if torch.version.cuda is None:
        remedy = f"build the environments for CUDA (`bash setup.sh infer cuda`, `bash setup.sh train cuda`), {hide}"
        raise InputError(f"{problem}: it is built for the CPU", where="environment", remedy=remedy)
    driver, needed = driver_version(), OLDEST_DRIVER.get(torch.version.cuda.partition(".")[0])
    known = f"driver {driver}" if driver else "a driver of unknown version"
    wanted = f"needs {needed} or newer" if needed else "may need a newer one"
    text = f"{problem}: {known}, and CUDA {torch.version.cuda} {wanted}"
    raise InputError(text, where="environment", remedy=f"see `nvidia-smi`; update the driver, {hide}")


def card_name() -> str:
    """Of the first card, without starting CUDA: a stage's driver must not take memory of the card."""
    for path in sorted((ROOT / DRIVER).glob("gpus/*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return "GPU"


def device(cluster: bool = False) -> str:
    """What a stage that is started now computes on, for its first line.

    Args:
        cluster: the stage's workers run on the cluster that `RAY_ADDRESS` names, if it does.

    Raises:
        InputError: as `check_cuda`.
    """
    import torch

    if cluster and (address := os.environ.get("RAY_ADDRESS")):
        return f"the Ray cluster {address}"
    check_cuda()
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {card_name()}"
    return f"the CPU ({len(os.sched_getaffinity(0))} cores)"


def device_count() -> int:
    """Cards that this process can use, at least 1; torch is not loaded for that: without it none is used."""
    torch = sys.modules.get("torch")
    return max(1, torch.cuda.device_count()) if torch and torch.cuda.is_available() else 1


# ---- for the preflight ----

NEED_COMPILER = "install them (Debian and Ubuntu: apt install gcc python3-dev)"


def compiler_problem() -> str | None:
    """Why Triton could not compile its launcher in C, which it needs on a GPU; None: it could."""
    import torch

    if not torch.cuda.is_available():
        return None
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not shutil.which(compiler):
        return "no C compiler (gcc or clang) is on the PATH, and `CC` names none"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.exists():
        return f"there is no {headers}"
    return None


def check_compiler(needed_by: str) -> None:
    """Refuse a GPU machine on which Triton cannot compile. InputError: as `compiler_problem` says."""
    if problem := compiler_problem():
        raise InputError(f"{needed_by} compiles GPU kernels, and {problem}", where="environment", remedy=NEED_COMPILER)


def free_memory() -> int:
    """Bytes of the host's memory that a new process can have, within the limit of a container."""
    fields = dict(line.split(":") for line in (ROOT / "proc/meminfo").read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = ROOT / "sys/fs/cgroup"
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


def free_disk(folder: Path) -> int:
    """Bytes that can be written below a folder, which need not exist yet."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(there).free


def room_line(what: str, needed: float, free: int, where: str) -> str:
    """A line of the plan: what is needed beside what is free, with a warning where it is too much."""
    size = f"{needed / 1e9:.1f}" if needed >= 0.1e9 else "under 0.1"
    text = f"{what}: {size} GB, {free / 1e9:.1f} GB free {where}"
    return text if needed <= ROOM * free else f"{text}: WARNING: this may not be enough"
