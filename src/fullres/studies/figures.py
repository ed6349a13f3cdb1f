"""What the plots of the studies share: colours, axes, and figures without a window system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from fullres.errors import FullresError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, RED, BLUE = "#7f7f7f", "#c8553d", "#2b6ca3"
COLOURS = {"training": GREY, "global": RED, "local": BLUE}
"""The same for the same thing in every plot; apart for colour-blind eyes and in print."""


def check_matplotlib() -> None:
    """Fail before the work begins, not after.

    Raises:
        FullresError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise FullresError(
            "the picture of a study needs matplotlib: pip install 'fullres[study]'"
        ) from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, bound to no window.

    Raises:
        FullresError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def plain(axes: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    """Titles and labels, and no more lines than are needed."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    return axes


def paired_bars(axes: Axes, labels: Sequence[str], bars: Mapping[str, Sequence[float]]) -> None:
    """Horizontal bars in groups, one group a label from top to bottom, one bar a key."""
    thickness = 0.8 / len(bars)
    for place, (name, values) in enumerate(bars.items()):
        heights = [row + (place - (len(bars) - 1) / 2) * thickness for row in range(len(labels))]
        axes.barh(heights, values, thickness, color=COLOURS[name], label=name)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.legend(fontsize=8, frameon=False)


def shortened(label: str, most: int = 40) -> str:
    """A label with its middle left out where it is too long for an axis.

    >>> shortened("encoders.0.0.sca.0", most=11)
    'encod…sca.0'
    """
    if len(label) <= most:
        return label
    half = (most - 1) // 2
    return f"{label[:half]}…{label[-half:]}"


def at_least(axes: Axes, axis: Literal["x", "y"], span: float) -> None:
    """Widen an axis that would show less than `span`, so that rounding does not look like much."""
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    if high - low < span:
        middle = (low + high) / 2
        limits = (middle - span / 2, middle + span / 2)
        axes.set(**{f"{axis}lim": limits})


LEAST_SPAN = {"psnr": 0.2}
"""Least span of an axis, by metric."""
