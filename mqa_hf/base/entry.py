"""Start and end of a command: signals, warnings and errors."""

import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from . import console
from .errors import ConversionWarning, MQAError

STOPPED = 128 + signal.SIGTERM  # exit code of a terminated job


def run_command(command: Callable[[], Any]) -> None:
    """Run a command; an MQAError is printed as one line, with exit code 1."""
    # A terminated job cleans up like an interrupted one.
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
