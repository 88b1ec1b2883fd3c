"""Pinned and found versions of the packages that decide what runs on a GPU: the head of `bash test.sh gpu`.

Run     python -m tests.pins
"""

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "flash-attn", "triton", "vllm", "ray")


def pinned(name: str) -> str:
    """The version in the CUDA requirement files, of both where they differ; `-` where a package comes with another."""
    found = []
    for file in ("requirements-train.txt", "requirements-infer.txt"):
        text = (ROOT / file).read_text(encoding="utf-8")
        found += re.findall(rf"^{re.escape(name)}==(\S+)", text, re.M)
    return " or ".join(dict.fromkeys(found)) or "-"


def found(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed: unchecked"


def main() -> None:
    print(f"{sys.executable}, Python {platform.python_version()}")
    for name in NAMES:
        has, wants = found(name), pinned(name)
        same = has.partition("+")[0] in wants.split(" or ") or wants == "-" or "unchecked" in has
        print(f"  {name:14s} pinned {wants:20s} found {has}{'' if same else '   (another version)'}")


if __name__ == "__main__":
    main()
