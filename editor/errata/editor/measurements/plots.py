"""The plots of a finding as figures, each as wide as one column of a paper (3.5 in).

Every kind of plot takes whatever a measurement may find: one layer or a hundred, values that are missing or negative,
labels of any length in any script. Values that a figure leaves out, it says.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from errata.editor.measurements.canvas import WIDTH, colour_bar, framed, make_room, no_values, shown
from errata.editor.measurements.findings import HeatMap, LinePlot, Overlay, Plot, Scatter
from errata.editor.measurements.heat_maps import heat_map
from errata.editor.measurements.line_plots import line_plot
from errata.editor.report.style import COLOURS, COLUMN, GREY, MARKERS, RULE, head, scale
from errata.editor.report.wording import counted


def draw(plot: Plot, *, caption: bool = True) -> Figure:
    """The plot's figure. `caption` writes the plot's caption, and what its marks mean, at its foot."""
    return drawn(plot, caption=caption)[0]


def drawn(plot: Plot, *, caption: bool = True) -> tuple[Figure, list[str]]:
    """The plot's figure, and what its marks mean and what it leaves out, for a caption of one's own."""
    match plot:
        case LinePlot():
            figure, notes = line_plot(plot)
        case HeatMap():
            figure, notes = heat_map(plot)
        case Scatter():
            figure, notes = _scatter(plot)
        case Overlay():
            figure, notes = _overlay(plot)
    said = ";  ".join(part for part in (plot.caption.rstrip(". "), *notes) if part)
    # A line ends neither before nor after the sign of a sample count.
    told = shown(said, 600).replace("n = ", "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}") if caption else ""
    head(figure, shown(plot.title, 160), told, COLUMN)
    make_room(figure)
    # Laid out once, here: laid out again at each file's resolution, files of one figure would differ.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    if isinstance(plot, Scatter):
        # Where a label fits is known only now.
        _label_points(figure.axes[0], plot)
    return figure, notes


def _scatter(plot: Scatter) -> tuple[Figure, list[str]]:
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = figure.add_subplot()
    there = np.isfinite(plot.x) & np.isfinite(plot.y)
    many = int(there.sum()) > 60
    axes.plot(
        plot.x[there], plot.y[there], color=COLOURS[0], linestyle="", marker=MARKERS[0], markersize=2.5 if many else 4,
        alpha=0.5 if many else 0.9, markeredgewidth=0,
    )  # fmt: skip
    axes.margins(0.08)
    axes.grid(color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    framed(axes, plot.x_label, plot.y_label)
    if not there.any():
        no_values(axes)
    missing = len(there) - int(there.sum())
    return figure, [f"{counted(missing, 'point')} without a value left out"] if missing else []


def _label_points(axes: Axes, plot: Scatter) -> None:
    """Labels each point where there is room beside it; a label that would hide another is left out."""
    points = axes.transData.transform(np.column_stack([plot.x, plot.y]))
    taken = [Bbox([(x - 4, y - 4), (x + 4, y + 4)]) for x, y in points if np.isfinite([x, y]).all()]
    frame_box = axes.get_window_extent()
    for label, x, y, at in zip(plot.labels, plot.x, plot.y, points, strict=False):
        if not label or not np.isfinite(at).all():
            continue
        for dx, dy in ((4, 3), (-4, 3), (4, -3), (-4, -3)):
            text = _beside(axes, shown(label, 24), (x, y), dx, dy)
            box = text.get_window_extent()
            inside = frame_box.x0 <= box.x0 and box.x1 <= frame_box.x1 and box.y1 <= frame_box.y1 + 6
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()


def _beside(axes: Axes, label: str, point: tuple[float, float], dx: int, dy: int) -> Annotation:
    text = axes.annotate(
        label, point, xytext=(dx, dy), textcoords="offset points", fontsize=COLUMN.tick - 0.5, color=GREY,
        ha="left" if dx > 0 else "right", va="bottom" if dy > 0 else "top", parse_math=False,
    )  # fmt: skip
    text.set_in_layout(False)
    return text


def _overlay(plot: Overlay) -> tuple[Figure, list[str]]:
    """The image, and beside it the image in grey under its patches' colours."""
    image = plot.image.convert("RGB")
    image.thumbnail((800, 800))
    side = (WIDTH - 0.2) / 2 * min(2.0, image.height / image.width)
    figure = Figure(figsize=(WIDTH, side + 0.65), layout="constrained")
    norm, colours, extend = scale(plot.patches, least=1e-6)
    plain_axes, axes = figure.subplots(1, 2)
    plain_axes.imshow(image)
    # Pale, so that the colours are those of the bar.
    grey = 128 + np.asarray(image.convert("L"), dtype=np.float64) / 2
    extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    axes.imshow(plot.patches, norm=norm, cmap=colours, alpha=0.7, extent=extent, interpolation="nearest")
    for each in (plain_axes, axes):
        each.set(xticks=[], yticks=[])
        each.spines[:].set(color=GREY, linewidth=0.5)
    colour_bar(figure, [plain_axes, axes], ScalarMappable(norm, colours), plot.unit, extend)
    return figure, ["patches without a colour have no value"] if np.isnan(plot.patches).any() else []
