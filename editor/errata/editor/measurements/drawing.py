"""Findings as people read them: figures for a paper (PNG, SVG) and one self-contained HTML page.

The same findings give the same bytes. What models and callers say is escaped, never read as a formula, and neither
runs nor loads anything.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from errata.editor.measurements.findings import Findings, HeatMap, LinePlot, Number, Overlay, Plot, Scatter
from errata.editor.measurements.plots import draw, drawn
from errata.editor.report.pictures import data_uri
from errata.editor.report.style import png, svg
from errata.editor.report.wording import MISSING, counted, plain

__all__ = ["Plate", "captioned", "draw", "environment", "page", "plate", "png", "section", "svg"]

_DPI = 220
_KINDS = {
    LinePlot: "Line plot",
    HeatMap: "Heat map",
    Scatter: "Scatter plot",
    Overlay: "Image with its patches' values",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plate:
    """A drawn plot: files that go about on their own, and the same figure as a page shows it.

    `png` and `svg` hold title and caption; the figure at `uri` does not: there they stand beside it, where they can be
    selected and read aloud. `alt` is its text for those who do not see it.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes = field(repr=False)
    svg: bytes = field(repr=False)
    uri: str = field(repr=False)


def captioned(findings: Findings) -> tuple[Plot, ...]:
    """The plots with captions that also state sample counts and settings, for figures that go about on their own."""
    return tuple(replace(plot, caption=_caption(findings, plot)) for plot in findings.plots)


def plate(findings: Findings, plot: Plot) -> Plate:
    """One of the findings' plots, drawn once for all its uses."""
    figure, notes = drawn(replace(plot, caption=_caption(findings, plot)))
    image = png(figure, _DPI)
    return Plate(
        name=plot.name,
        title=plot.title,
        caption="; ".join([_caption(findings, plot), *notes]),
        alt=f"{_KINDS[type(plot)]}: {plain(plot.title)}",
        png=image,
        svg=svg(figure),
        uri=data_uri(_bare(figure, image), "png"),
    )


def page(
    findings: Sequence[Findings], *, title: str = "Measurements", plates: Sequence[Sequence[Plate]] | None = None
) -> str:
    """All of these on one page that loads nothing and runs nothing: numbers, figures, tables, what was left out.

    `plates` are their plots where they are drawn already.
    """
    drawn_plates = plates if plates is not None else [_plates(each) for each in findings]
    sections = list(zip(findings, drawn_plates, strict=True))
    return environment().get_template("page.html.j2").render(title=title, sections=sections, counted=counted)


def section(findings: Findings, *, anchor: str, plates: Sequence[Plate] | None = None) -> str:
    """One measurement's part of a page, in HTML; `anchor` is what links to it name, `plates` are its plots as drawn."""
    template = environment().get_template("section.html.j2")
    shown = plates if plates is not None else _plates(findings)
    return template.render(each=findings, plates=shown, anchor=anchor, alone=False, counted=counted)


def environment() -> Environment:
    """Where pages of measurements come from: `plates.css.j2` and `report.css.j2` are their style."""
    made = Environment(
        loader=ChoiceLoader(
            [PackageLoader("errata.editor.measurements", "."), PackageLoader("errata.editor.report", ".")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"plain": plain, "number": _number, "interval": _interval}
    return made


def _plates(findings: Findings) -> list[Plate]:
    return [plate(findings, plot) for plot in findings.plots]


def _bare(figure: Figure, image: bytes) -> bytes:
    """The figure's image without the title at its head and the caption at its foot."""
    whole, height = Image.open(io.BytesIO(image)), figure.bbox.height
    boxes = {text: text.get_window_extent() for text in figure.texts if text.get_text()}
    top = max((height - box.y0 for text, box in boxes.items() if box.y0 > height / 2), default=0.0)
    foot = max((box.y1 for text, box in boxes.items() if box.y0 <= height / 2), default=0.0)
    scale = whole.height / height
    out = io.BytesIO()
    whole.crop((0, round(top * scale), whole.width, round((height - foot) * scale))).save(out, "PNG")
    return out.getvalue()


def _caption(findings: Findings, plot: Plot) -> str:
    told = [plot.caption.rstrip(". ")] if plot.caption else []
    if "n = " not in plot.caption:
        told.append(f"n = {counted(findings.n, 'question')}")
    if findings.skipped:
        told.append(f"{len(findings.skipped):,} left out")
    told += [f"{name}: {value}" for name, value in findings.settings.items()]
    return "; ".join(told)


def _number(value: float) -> str:
    """To three digits, with a real minus; all digits before the point where there are more."""
    if not math.isfinite(value):
        return MISSING if math.isnan(value) else f"{value:+.0f}".replace("inf", "∞").replace("-", "−")
    return (f"{value:,.0f}" if 999.5 <= abs(value) < 1e9 else f"{value:.3g}").replace("-", "−")


def _interval(number: Number) -> str:
    if number.low is None or number.high is None:
        return MISSING
    return f"{_number(number.low)} to {_number(number.high)}"
