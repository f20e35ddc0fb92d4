"""How a command of this package starts and ends."""

import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from . import console
from .errors import ConversionWarning, MQAError

STOPPED = 128 + signal.SIGTERM  # the exit code of a job that is told to stop


def run_command(command: Callable[[], Any]) -> None:
    """Run a command: errors meant for a person are printed as one message, with exit code 1."""
    # A job that is told to stop cleans up like one that is interrupted by hand.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    show = warnings.showwarning

    def show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, ConversionWarning):
            console.warn(str(message))
        else:
            show(message, category, *where)

    warnings.showwarning = show_warning  # type: ignore[assignment]
    try:
        command()
    except MQAError as error:
        if console.verbosity() >= console.VERBOSE:
            traceback.print_exc()
        console.stderr().print(f"error: {' '.join(str(error).splitlines())}", style="red")
        sys.exit(1)
