"""Messages and progress bars, on standard error; standard output is for results."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

QUIET, NORMAL, VERBOSE = range(3)
_level = NORMAL


def set_verbosity(level: int) -> None:
    """Set what is printed: `QUIET` (only warnings and errors), `NORMAL`, or `VERBOSE` (also derived options and
    tracebacks).
    """
    global _level
    _level = level


def verbosity() -> int:
    return _level


def first_rank() -> bool:
    """Whether this process prints and writes results for all that share its job."""
    return os.environ.get("RANK", "0") == "0"


def stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def say(text: str, level: int = NORMAL) -> None:
    """Print a line, unless the verbosity is below `level`."""
    if _level >= level:
        stderr().print(text)


def warn(text: str) -> None:
    """Print a warning, whatever the verbosity."""
    stderr().print(f"warning: {text}", style="yellow")


def progress_bar(*columns: "ProgressColumn", transient: bool = False) -> "Progress":
    """A progress bar with these columns, shown unless the verbosity is `QUIET`; `transient` removes it at the end.

    In a notebook it needs ipywidgets, without which rich would show a warning in place of each bar.
    """
    from rich.progress import Progress

    console = stderr()
    shown = _level >= NORMAL and not (console.is_jupyter and find_spec("ipywidgets") is None)
    return Progress(*columns, console=console, transient=transient, disable=not shown)
