"""The one style of all figures: colours, sizes of text, scales, and what may be written.

Made with matplotlib's objects alone: no pyplot, so calls may run in any thread. Colours are told apart by colour-blind
readers and in grey; markers tell lines apart without them. Nothing that people or models say is read as a formula.
"""

import io
from dataclasses import dataclass
from functools import cache
from textwrap import fill
from threading import Lock

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from errata.editor.report.wording import plain

# Okabe & Ito's colours, their yellow darkened: it cannot be seen on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A6A00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY, RULE = "#555555", "#dddddd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of text in points."""

    title: float
    label: float
    tick: float


PAGE = Sizes(title=11, label=10, tick=9)
"""For figures as wide as a page."""

COLUMN = Sizes(title=8.5, label=8, tick=7)
"""For figures as wide as one column of a paper, 3.5 in."""

# matplotlib knows the salt of an SVG's ids only as a setting of the process.
_SALT = Lock()


def png(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file, its text as outlines; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with _SALT, rc_context({"svg.hashsalt": "errata", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", dpi=300, facecolor="white", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def head(figure: Figure, title: str, caption: str, sizes: Sizes = PAGE) -> None:
    """A title, and at the foot, smaller, what the figure must say wherever it is pasted."""
    width = figure.get_size_inches()[0]
    title, caption = fill(title, int(104 * width / sizes.title)), fill(caption, int(135 * width / sizes.tick))
    figure.suptitle(title, x=0.01, ha="left", fontsize=sizes.title, fontweight="bold", parse_math=False)
    if caption:
        figure.supxlabel(caption, x=0.01, ha="left", fontsize=sizes.tick, color=GREY, parse_math=False)


def frame(axes: Axes, y_label: str, sizes: Sizes = PAGE) -> None:
    """The label of the ordinate, and no box around the plot."""
    axes.set_ylabel(y_label, fontsize=sizes.label, parse_math=False)
    axes.tick_params(labelsize=sizes.tick)
    axes.spines[["top", "right"]].set_visible(False)


def whole_numbers(axes: Axes, label: str, sizes: Sizes = PAGE) -> None:
    """An abscissa of layers, steps or the like, with its label."""
    axes.set_xlabel(label, fontsize=sizes.label, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def scale(values: NDArray[np.float64], *, least: float = 0.01) -> tuple[Normalize, str, str]:
    """Colours for these values: their range, the map's name, and the end at which the bar is open.

    From 0 up, perceptually uniform; around 0 and diverging where values are well below it. The range reaches at
    least to `least`: a map of nothing must not look like a map of something.
    """
    finite = values[np.isfinite(values)]
    high, low = max(least, finite.max(initial=0.0)), finite.min(initial=0.0)
    if low < -0.1 * high:
        bound = max(high, -low)
        return Normalize(-bound, bound), "RdBu_r", "neither"
    return Normalize(0, high), "viridis", "min" if low < -0.01 * high else "neither"


def token(text: str, limit: int = 22) -> str:
    """A token as a label."""
    return drawable(plain(text, limit)).strip() or "␣"


def drawable(text: str) -> str:
    """The text with what the font cannot draw replaced; matplotlib would warn and draw boxes."""
    return "".join(c if ord(c) in _known() else "\N{REPLACEMENT CHARACTER}" for c in text)


@cache
def _known() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap())
