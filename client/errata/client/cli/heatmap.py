"""A causal trace as a picture: in the terminal, as a page that needs nothing else, as a PNG (with Pillow).

Rows are tokens (of one question) or roles (of several), columns are layers, one panel a component; colours are shares
of the total effect. Colours are told apart in grey, too: the higher the effect, the darker.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from errata.client.cli.plain import clean
from errata.client.cli.problems import MissingExtraError
from errata.client.results import CausalTrace, CausalTraceResult, EffectGrid

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

    Font = FreeTypeFont | ImageFont

_SHADES = " ░▒▓█"
_LABEL = 20
_PNG_LABEL, _PNG_CELL, _PNG_LINE, _PNG_LETTER = 170, 36, 26, 7
"""Pixels: the column of names, a cell's width, a line's height, a letter at the least."""
_LIGHT, _DARK = (247, 251, 255), (8, 48, 107)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One component's effects, rows × layers, as shares of the total effect; NaN where there is none."""

    component: str
    rows: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What there is to draw."""

    title: str
    caption: str
    panels: tuple[Panel, ...]


def picture(trace: CausalTrace) -> Picture:
    """What there is to draw of a trace that succeeded: the tokens of one question, or the roles of several."""
    result = trace.result
    assert result is not None
    if len(result.traces) == 1:
        [only] = result.traces
        rows = tuple(_row(token, i in only.constraint) for i, token in enumerate(only.tokens))
        title, grids = f"{only.question} → {only.answer}", only.grids
    else:
        rows, grids = result.roles, result.grids
        title = f"Mean over {trace.questions - len(result.skipped)} questions"
    panels = (_panel(grid, rows, result.total_effect) for grid in grids)
    return Picture(title=clean(title), caption=_caption(trace, result), panels=tuple(panels))


def drawn(shown: Picture, width: int, colour: bool) -> RenderableType:
    """The picture in `width` columns; without colour, in shades where numbers do not fit."""
    parts: list[RenderableType] = [Text(shown.title, style="bold", overflow="fold")]
    for panel in shown.panels:
        parts += [Text(), *_panel_lines(panel, width, colour)]
    return Group(*parts, Text(), Text(shown.caption, overflow="fold"))


def page(shown: Picture) -> str:
    """The picture as one page of HTML that loads nothing."""
    tables = "\n".join(map(_table, shown.panels))
    title, caption = html.escape(shown.title), html.escape(shown.caption)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
caption {{ text-align: left; font-weight: 600 }}
td {{ width: 2.6em; height: 1.7em; text-align: center; font-size: 12px }}
th {{ font-weight: normal; padding: 0 .6em; text-align: right; white-space: pre }}
thead th {{ text-align: center; color: #555 }}
</style>
<h1>{title}</h1>
{tables}
<p>{caption}</p>
</html>
"""


def require_pillow() -> None:
    """Raises MissingExtraError where a PNG could not be drawn."""
    if find_spec("PIL") is None:
        raise MissingExtraError("--png needs Pillow; pip install pillow, or use --html")


def save_png(shown: Picture, path: Path) -> None:
    """Draws the picture into a PNG, with Pillow. Raises OSError where it cannot be written."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    layers = max(len(panel.shares[0]) for panel in shown.panels)
    width = max(_PNG_LABEL + layers * _PNG_CELL + 20, 640)
    head, foot = (wrap(text.replace("→", "to"), width // _PNG_LETTER) for text in (shown.title, shown.caption))
    lines = len(head) + len(foot) + 2 + sum(len(panel.rows) + 3 for panel in shown.panels)
    image = Image.new("RGB", (width, lines * _PNG_LINE), "white")
    draw = ImageDraw.Draw(image)
    y = _png_text(draw, font, head, _PNG_LINE // 2)
    for panel in shown.panels:
        y = _png_panel(draw, font, panel, y + _PNG_LINE // 2)
    _png_text(draw, font, foot, y + _PNG_LINE // 2)
    image.save(path, "PNG")


def _png_text(draw: "ImageDraw", font: "Font", lines: Sequence[str], y: int) -> int:
    for line in lines:
        draw.text((10, y), line, "black", font)
        y += _PNG_LINE
    return y


def _png_panel(draw: "ImageDraw", font: "Font", panel: Panel, y: int) -> int:
    draw.text((10, y), f"{panel.component}, by layer", "black", font)
    y += _PNG_LINE
    for layer in range(len(panel.shares[0])):
        draw.text((_PNG_LABEL + layer * _PNG_CELL + _PNG_CELL // 2, y), str(layer), "#555555", font, anchor="ma")
    for name, shares in zip(panel.rows, panel.shares, strict=True):
        y += _PNG_LINE
        draw.text((_PNG_LABEL - 8, y + 5), _cut(name, _LABEL), "black", font, anchor="ra")
        for layer, share in enumerate(shares):
            if not math.isnan(share):
                x = _PNG_LABEL + layer * _PNG_CELL
                draw.rectangle((x, y, x + _PNG_CELL - 2, y + _PNG_LINE - 2), _colour(share))
                draw.text((x + _PNG_CELL // 2 - 1, y + 5), _number(share), _ink(share), font, anchor="ma")
    return y + _PNG_LINE


def _row(token: str, constraint: bool) -> str:
    return repr(clean(token).strip())[1:-1] + (" *" if constraint else "")


def _panel(grid: EffectGrid, rows: tuple[str, ...], total: float) -> Panel:
    """One component, turned so that layers are columns. A row without any effect is left out."""
    columns = zip(rows, zip(*grid.effects, strict=True), strict=True)
    shares = [(name, tuple(effect / total for effect in effects)) for name, effects in columns]
    kept = [each for each in shares if not all(map(math.isnan, each[1]))]
    name = {"mlp": "MLP", "attention": "Attention", "layer": "Whole layer"}.get(grid.component, grid.component)
    return Panel(component=name, rows=tuple(n for n, _ in kept), shares=tuple(s for _, s in kept))


def _caption(trace: CausalTrace, result: CausalTraceResult) -> str:
    total = f"share of the total effect {result.total_effect:.2f} ({result.clean:.2f} → {result.corrupted:.2f})"
    skipped = f"; {len(result.skipped)} left out, their corruption does not corrupt" if result.skipped else ""
    marked = "; * constraint" if len(result.traces) == 1 else ""
    return f"{total}; window {trace.window}{marked}{skipped}"


def _panel_lines(panel: Panel, width: int, colour: bool) -> list[Text]:
    layers = len(panel.shares[0])
    # Every layer is to be seen, if only as one column.
    label = min(max(map(len, panel.rows)), _LABEL, max(min(width // 3, width - 1 - layers), 6))
    cell = next((w for w in (5, 4, 2) if label + 1 + layers * w <= width), 1)
    head = Text(f"{'':{label}} ")
    for layer in range(layers):
        step = 1 if cell > 2 else (5 if cell == 2 else 10)
        head.append(f"{layer:>{cell}}" if layer % step == 0 and len(str(layer)) <= cell else " " * cell, "dim")
    lines = [Text(panel.component + ", by layer", "italic"), head]
    for name, shares in zip(panel.rows, panel.shares, strict=True):
        text = Text(f"{_cut(name, label):>{label}} ", no_wrap=True)
        for share in shares:
            text.append_text(_cell(share, cell, colour))
        lines.append(text)
    return lines


def _cell(share: float, width: int, colour: bool) -> Text:
    if math.isnan(share):
        return Text(" " * width)
    shown = _number(share) if width > 2 else ("" if colour else _SHADES[round(_clipped(share) * 4)] * width)
    style = Style(color=_rgb(_ink_rgb(share)), bgcolor=_rgb(_colour(share))) if colour else Style.null()
    return Text(f"{shown:>{width}}", style)


def _table(panel: Panel) -> str:
    head = "".join(f"<th>{layer}</th>" for layer in range(len(panel.shares[0])))
    rows = "\n".join(
        f"<tr><th>{html.escape(name)}</th>{''.join(map(_html_cell, shares))}</tr>"
        for name, shares in zip(panel.rows, panel.shares, strict=True)
    )
    caption = f"{html.escape(panel.component)}, by layer"
    return f"<table><caption>{caption}</caption><thead><tr><th></th>{head}</tr></thead>\n{rows}\n</table>"


def _html_cell(share: float) -> str:
    if math.isnan(share):
        return "<td></td>"
    return f'<td style="background:{_rgb(_colour(share))};color:{_ink(share)}">{_number(share)}</td>'


def _number(share: float) -> str:
    return f"{share:.2f}".replace("-0.00", "0.00")


def _clipped(share: float) -> float:
    return min(max(share, 0.0), 1.0)


def _colour(share: float) -> tuple[int, int, int]:
    at = _clipped(share)
    red, green, blue = (round(low + (high - low) * at) for low, high in zip(_LIGHT, _DARK, strict=True))
    return red, green, blue


def _ink(share: float) -> str:
    return "#ffffff" if _clipped(share) > 0.5 else "#222222"


def _ink_rgb(share: float) -> tuple[int, int, int]:
    return (255, 255, 255) if _clipped(share) > 0.5 else (34, 34, 34)


def _rgb(colour: Sequence[int]) -> str:
    return "rgb({},{},{})".format(*colour)


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
