"""What a measurement found, in the one form that every figure, page, table and message is made from.

A measurement keeps its own numbers in a type of its own; `findings()` of that type says them as numbers with their
intervals, plots and tables. Knows nothing about models; draws nothing (`drawing` does).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One number of `n` samples. `low` and `high` bound its 95 % interval, None where it has none."""

    name: str
    value: float
    unit: str
    n: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a plot, with the bounds of its 95 % interval where it has one. NaN where there is no value."""

    label: str
    values: Float[NDArray[np.float64], " points"]
    low: Float[NDArray[np.float64], " points"] | None = None
    high: Float[NDArray[np.float64], " points"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinePlot:
    """Lines over one axis: layers, window sizes, false-positive rates. Labels hold their units."""

    name: str
    title: str
    x_label: str
    y_label: str
    x: Float[NDArray[np.float64], " points"]
    lines: tuple[Line, ...]
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One panel of a heat map. NaN where there is no value."""

    label: str
    values: Float[NDArray[np.float64], "rows columns"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Grids over the same rows and columns, on one colour scale."""

    name: str
    title: str
    x_label: str
    y_label: str
    unit: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    grids: tuple[Grid, ...]
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """Points with a label each (empty for none)."""

    name: str
    title: str
    x_label: str
    y_label: str
    x: Float[NDArray[np.float64], " points"]
    y: Float[NDArray[np.float64], " points"]
    labels: tuple[str, ...]
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """An image with a value for each of its patches, laid over it."""

    name: str
    title: str
    unit: str
    image: Image.Image = field(repr=False)
    patches: Float[NDArray[np.float64], "rows columns"]
    caption: str = ""


Plot = LinePlot | HeatMap | Scatter | Overlay


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as they are to be read."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything one measurement found.

    `kind` is the measurement's name, `settings` what it was made with, as text; `n` the questions it is of and
    `skipped` a line for each that was left out, with the reason. Names are unique within plots and tables, and are
    letters, digits and "_".
    """

    kind: str
    title: str
    settings: Mapping[str, str]
    n: int
    numbers: tuple[Number, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    skipped: tuple[str, ...] = ()


def described(settings: "DataclassInstance") -> dict[str, str]:
    """A measurement's settings as text."""
    return {f.name: _described(getattr(settings, f.name)) for f in fields(settings)}


def _described(value: object) -> str:
    if value is None or value == ():
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
