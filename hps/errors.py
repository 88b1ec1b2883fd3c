"""The one error for bad input, and the wrapper that turns it into one line and exit status 2."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """Something the user gave is wrong. The message names file, line, field, value and remedy, in one line."""

    def __init__(self, problem: str, *, where: str | None = None, remedy: str | None = None):
        text = f"{where}: {problem}" if where else problem
        if remedy:
            text += f"; {remedy}"
        super().__init__(" ".join(text.split()))


def run_main(main: Callable[[], None]) -> None:
    """Run a stage's `main`; an `InputError` becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; finished work is on disk, the same command continues it", file=sys.stderr)
        sys.exit(130)
