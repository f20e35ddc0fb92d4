"""Names beside the points of a chart, placed so that they cover no point, no interval and no other name."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from .report_series import INK

RADII = (9, 16, 26, 38, 52)  # points between a point and its name, near ones first
ANGLES = (30, -30, 150, -150, 90, -90, 0, 180, 60, -60, 120, -120)
MARKER = 5.0  # half the size of a marker and a margin, in points
LEADER = 12  # distance in points from which a line connects a name to its point
Point = tuple[float, float, float, float]  # x and y, and the lower and upper end of the interval of y


def label_points(
    axes: Any, points: Sequence[tuple[str, Point]], line: Sequence[tuple[float, float]], size: float
) -> bool:
    """Write names beside points, and fix the layout of the figure.

    Args:
        axes: axes with everything else drawn.
        points: names and points.
        line: a line that names cover only if there is no other place.
        size: size of the text, in points.

    Returns:
        Whether there was room for all names; otherwise none is written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = axes.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    scale, inside = figure.dpi / 72, axes.get_window_extent(renderer)
    taken, chosen = [point_box(axes, point, MARKER * scale) for _, point in points], []
    corners = axes.transData.transform(list(line))
    drawn = [a + (b - a) * i / 100 for a, b in itertools.pairwise(corners) for i in range(101)]
    for (name, (x, y, _, _)), own in list(zip(points, taken)):
        text = axes.text(0, 0, name, fontsize=size)
        extent, middle = text.get_window_extent(renderer), axes.transData.transform((x, y))
        text.remove()
        others = [box for box in taken if box is not own]
        free = [
            (place, radius)
            for place, radius in places(middle, extent.width, extent.height, scale)
            if holds(inside, place)
            and not any(place.overlaps(box) for box in taken)
            and (radius < LEADER or not any(crosses(middle, place, box) for box in others))
        ]
        if not free:
            return False
        clear = [found for found in free if not any(found[0].contains(*at) for at in drawn)]
        place, radius = (clear or free)[0]
        taken.append(place)
        chosen.append((name, (x, y), ((place.x0 - middle[0]) / scale, (place.y0 - middle[1]) / scale), radius))
    figure.set_layout_engine("none")  # otherwise the names would move the axes
    for name, at, offset, radius in chosen:
        arrow = {"arrowstyle": "-", "lw": 0.6, "color": INK, "shrinkA": 0, "shrinkB": 5}
        axes.annotate(
            name,
            at,
            offset,  # in points, so that the figure can be drawn at any resolution
            textcoords="offset points",
            fontsize=size,
            color=INK,
            va="bottom",
            arrowprops=arrow if radius >= LEADER else None,
        )
    return True


def point_box(axes: Any, point: Point, room: float) -> Any:
    """The box of a point and its interval in pixels, with a margin of `room`."""
    from matplotlib.transforms import Bbox

    x, y, low, high = point
    ends = axes.transData.transform([(x, low), (x, y), (x, high)])
    return Bbox([ends.min(axis=0) - room, ends.max(axis=0) + room])


def places(point: Any, width: float, height: float, scale: float) -> Iterator[tuple[Any, float]]:
    """Places for a text around a point, near ones first: boxes in pixels, and their distances in points."""
    from matplotlib.transforms import Bbox

    for radius in RADII:
        for angle in ANGLES:
            x, y = (round(of(math.radians(angle)), 6) for of in (math.cos, math.sin))
            beside = 0 if x > 0 else width if x < 0 else width / 2
            above = 0 if y > 0 else height if y < 0 else height / 2
            corner = point[0] + x * radius * scale - beside, point[1] + y * radius * scale - above
            yield Bbox.from_bounds(*corner, width, height), radius


def holds(outer: Any, inner: Any) -> bool:
    """Whether a box is within another."""
    return bool(outer.contains(inner.x0, inner.y0) and outer.contains(inner.x1, inner.y1))


def crosses(point: Any, place: Any, box: Any) -> bool:
    """Whether the line from a point to the middle of its name goes through a box."""
    x, y = (place.x0 + place.x1) / 2, (place.y0 + place.y1) / 2
    steps = (i / 40 for i in range(1, 41))
    return any(box.contains(point[0] + (x - point[0]) * s, point[1] + (y - point[1]) * s) for s in steps)
