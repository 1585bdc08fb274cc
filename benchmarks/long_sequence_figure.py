"""The figure of long sequences: what becomes of the model along the way, from the figures as they are stored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = (
    ("efficacy", "efficacy, all edits so far"),
    ("efficacy, first half", "efficacy, the half edited first"),
    ("phrasings", "unseen phrasings"),
    ("other subjects", "specificity, other subjects"),
    ("same subject", "specificity, same subject"),
    ("drift", "drift, nats"),
)
COLOURS = {"multedit": "#c44e52", "memit": "#4c72b0", "alphaedit": "#55a868"}


def draw(found: Mapping[str, Any], stem: Path) -> None:
    """Every sequence's course, and every batch as a point, as PNG and SVG."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for cell in found.values():
            _line(axes, cell, name)
        axes.set(xscale="log", title=title, xlabel="edits")
        if name == "drift":
            axes.set_yscale("log")
        else:
            axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    for suffix in ("png", "svg"):
        figure.savefig(stem.with_suffix(f".{suffix}"), dpi=120)


def _line(axes: Axes, cell: Mapping[str, Any], name: str) -> None:
    method, held = cell["method"], cell["held"]
    label = f"{method}, batch" if cell["batch"] else method + (f", holds the newest {held}" if held else "")
    style = "x" if cell["batch"] else "o-" if held else "o--"
    points = [(row["edits"], row[name]) for row in cell["along"]]
    axes.plot(*zip(*points, strict=True), style, color=COLOURS[method], label=label, markersize=4)
