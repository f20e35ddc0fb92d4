"""How a checkpoint looks in charts and tables: colour, and marker and dashes for print in black and white."""

from dataclasses import dataclass
from typing import Any

from .report_data import Results

INK = "#123456"  # stands in charts for the colour of the page's text
# For light and for dark backgrounds, with a contrast of at least 3:1 to both backgrounds of the page in that mode.
COLOURS = (
    ("#5f6774", "#b4bac4"),
    ("#c0392b", "#ff8a80"),
    ("#00796b", "#4fd1bd"),
    ("#b45309", "#f5b041"),
    ("#2563b0", "#8ab4f8"),
    ("#7b3fc4", "#c9a3ff"),
    ("#4d7c0f", "#a3d65c"),
    ("#be3a86", "#f79ac8"),
)
MARKERS = (("o", "●"), ("s", "■"), ("D", "◆"), ("^", "▲"), ("v", "▼"), ("<", "◄"), (">", "►"), ("*", "★"))
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 3)), (0, (1, 3)))


@dataclass(frozen=True)
class Series:
    """The look of a checkpoint, or of another timed model.

    Attributes:
        number: index of its colour.
        marker: its marker in matplotlib.
        glyph: the marker as text.
        dashes: line style in matplotlib.
    """

    number: int
    marker: str
    glyph: str
    dashes: Any

    @property
    def colour(self) -> str:
        """The colour on a light background."""
        return COLOURS[self.number][0]


def series_of(results: Results, name: str) -> Series:
    """The look of a checkpoint, or of another timed model. After eight, colours repeat with other markers."""
    names = results.names
    names += sorted({timing.label for timing in results.timings} - set(names))
    index = names.index(name)
    number = index % len(COLOURS)
    shift = (index + index // len(COLOURS)) % len(MARKERS)
    return Series(number, *MARKERS[shift], DASHES[shift])


def in_page_colours(svg: str) -> str:
    """The same picture in the colours of a page: `currentColor`, and `--series-0` and so on."""
    for number, (light, _) in enumerate(COLOURS):
        svg = svg.replace(light, f"var(--series-{number})")
    return svg.replace(INK, "currentColor")
