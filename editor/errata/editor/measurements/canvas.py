"""What all figures of findings share: their width, the text that fits on it, the scale of colours."""

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from errata.editor.report.style import COLUMN, GREY, drawable, frame
from errata.editor.report.wording import plain

WIDTH = 3.5
"""Of every figure, in inches: one column of a paper."""

CHARACTER = 0.0077
"""Width of a character in inches for each point of its size, a little more than the mean of DejaVu Sans."""


def make_room(figure: Figure) -> None:
    """As much higher as title, caption and folded labels are: the plot keeps its size."""
    lines = sum(text.count("\n") + 1 for text in (figure.get_suptitle(), figure.get_supxlabel()) if text)
    lines += sum(text.count("\n") for text in {axes.get_xlabel() for axes in figure.axes})
    figure.set_figheight(figure.get_figheight() + 0.13 * lines)


def shown(text: str, limit: int = 60) -> str:
    """A text as it may be drawn, cut to `limit` characters."""
    return drawable(plain(text, limit))


def folded(text: str, width: int) -> str:
    """On as many lines as it takes, at most three."""
    words, lines = shown(text, 3 * width).split(), [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def framed(axes: Axes, x_label: str, y_label: str) -> None:
    """Both labels, and no box around the plot."""
    frame(axes, folded(y_label, 28), COLUMN)
    axes.set_xlabel(folded(x_label, 46), fontsize=COLUMN.label, parse_math=False)


def no_values(axes: Axes) -> None:
    """Says in an empty plot that it is one."""
    axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color=GREY,
              fontsize=COLUMN.label)  # fmt: skip


def colour_bar(figure: Figure, axes: list[Axes], colours: ScalarMappable, unit: str, extend: str) -> None:
    """The scale of colours, below: beside the panels it would take their width."""
    bar = figure.colorbar(
        colours,
        ax=axes,
        location="bottom",
        extend=extend,
        fraction=0.06,
        pad=0.12 / figure.get_figheight(),
        aspect=34,
        shrink=0.9,
    )
    bar.set_label(folded(unit, 46), fontsize=COLUMN.label, parse_math=False)
    bar.ax.tick_params(labelsize=COLUMN.tick, length=2)
    bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("-", "−")))
    bar.outline.set_visible(False)
