"""Findings as people read them: figures for a paper (PNG, SVG) and one self-contained HTML page.

The same findings give the same bytes. What models and callers say is escaped, never read as a formula, and neither
runs nor loads anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from errata.editor.measurements.findings import Findings, HeatMap, LinePlot, Number, Overlay, Plot, Scatter
from errata.editor.measurements.plots import draw, drawn
from errata.editor.report.pictures import data_uri
from errata.editor.report.style import png, svg
from errata.editor.report.wording import MISSING, counted, plain

__all__ = ["captioned", "draw", "environment", "page", "png", "section", "svg"]

_DPI = 220
_KINDS = {
    LinePlot: "Line plot",
    HeatMap: "Heat map",
    Scatter: "Scatter plot",
    Overlay: "Image with its patches' values",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plate:
    """A figure, its text for those who do not see it, and its caption."""

    uri: str
    alt: str
    title: str
    caption: str


def captioned(findings: Findings) -> tuple[Plot, ...]:
    """The plots with captions that also state sample counts and settings, for figures that go about on their own."""
    return tuple(replace(plot, caption=_caption(findings, plot)) for plot in findings.plots)


def page(findings: Sequence[Findings], *, title: str = "Measurements") -> str:
    """All of these on one page that loads nothing and runs nothing: numbers, figures, tables, what was left out."""
    sections = [(each, _plates(each)) for each in findings]
    return environment().get_template("page.html.j2").render(title=title, sections=sections, counted=counted)


def section(findings: Findings, *, anchor: str) -> str:
    """One measurement's part of a page, in HTML; `anchor` is what links to it name."""
    template = environment().get_template("section.html.j2")
    return template.render(each=findings, plates=_plates(findings), anchor=anchor, counted=counted)


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


def _plates(findings: Findings) -> list[_Plate]:
    return [_plate(findings, plot) for plot in findings.plots]


def _plate(findings: Findings, plot: Plot) -> _Plate:
    # The title and the caption stand beside the figure, where they can be selected and read aloud.
    figure, notes = drawn(replace(plot, title=""), caption=False)
    return _Plate(
        uri=data_uri(png(figure, _DPI), "png"),
        alt=f"{_KINDS[type(plot)]}: {plain(plot.title)}",
        title=plot.title,
        caption="; ".join([_caption(findings, plot), *notes]),
    )


def _caption(findings: Findings, plot: Plot) -> str:
    told = [plot.caption.rstrip(". ")] if plot.caption else []
    if "n = " not in plot.caption:
        told.append(f"n = {counted(findings.n, 'question')}")
    if findings.skipped:
        told.append(f"{len(findings.skipped):,} left out")
    told += [f"{name}: {value}" for name, value in findings.settings.items()]
    return "; ".join(told)


def _number(value: float) -> str:
    """To three digits, with a real minus."""
    if not math.isfinite(value):
        return MISSING if math.isnan(value) else f"{value:+.0f}".replace("inf", "∞").replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def _interval(number: Number) -> str:
    if number.low is None or number.high is None:
        return MISSING
    return f"{_number(number.low)} to {_number(number.high)}"
