"""Figures of measurements in one style. matplotlib is imported on use."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MQAError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOTE = {"frameon": False, "fontsize": 8}  # of a legend


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def panels(number: int, width: float, height: float) -> tuple["Figure", list[Any]]:
    """A figure with `number` axes side by side, each of this size in inches.

    Raises:
        MQAError: if matplotlib is not installed.
    """
    if not can_draw():
        raise MQAError("figures need matplotlib: pip install 'mqa-hf[benchmark]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * number, height), layout="constrained")
    axes = list(figure.subplots(1, number, squeeze=False)[0]) if number else []
    for one in axes:
        one.grid(alpha=0.3, which="both")
    return figure, axes


def describe(axes: Any, x: str, y: str, title: str | None = None, legend: bool = True) -> None:
    """Label the axes and add a title and a legend."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if title is not None:
        axes.set_title(title, fontsize=10)
    if legend:
        axes.legend(**NOTE)


def save(figure: "Figure", path: Path) -> None:
    """Save as PNG; raises MQAError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
    except OSError as error:
        raise MQAError(f"the figure {path} cannot be written: {error}") from error
