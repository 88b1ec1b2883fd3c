"""The command line that all stages share: `[RECIPE] [key=value ...] [--dry-run]`."""

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hps.errors import run_main
from pipeline.machine import device
from pipeline.recipe import DEFAULT_RECIPE, Recipe, load_recipe, split_arguments


def parse(
    description: str, dry_run: bool = True, usage: str | None = None, **flags: str
) -> tuple[Recipe, argparse.Namespace]:
    """Read the command line of a stage and load its recipe; `flags` are its own `--name`s with their help.

    Args:
        usage: for a command with an argument before these.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, usage=usage, formatter_class=layout)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE | key=value", help=f"default: {DEFAULT_RECIPE}")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print the resolved plan, run nothing")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    options = parser.parse_intermixed_args()
    path, overrides = split_arguments(options.arguments)
    return load_recipe(path, overrides), options


def run_stage(
    work: Callable[[Recipe], object], description: str, title: str | None = None, cluster: bool = False
) -> None:
    """The program of a stage whose command line is a recipe: `hps.errors.run_main` of its work.

    Args:
        title: of a stage that computes on a device; its first line names the device.
        cluster: as for `pipeline.machine.device`.
    """

    def main() -> None:
        recipe, _ = parse(description, dry_run=False)
        if title:
            announce_device(title, cluster)
        work(recipe)

    run_main(main)


def announce_device(title: str, cluster: bool = False) -> None:
    """Print what a stage computes on; arguments and InputError as of `pipeline.machine.device`."""
    print(f"{title}: on {device(cluster)}", flush=True)


def progress(items: Iterable, total: int, title: str, unit: str, done: int = 0) -> Iterator[Any]:
    """Pass items on and show count, rate and remaining time (`done` were finished by an earlier run)."""
    from tqdm import tqdm

    yield from tqdm(items, total=total, initial=done, desc=title, unit=unit, mininterval=2.0, smoothing=0.05)
