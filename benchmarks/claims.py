"""The README's table of speed, from the figures as they are stored: `python benchmarks/bench.py --table`."""

from collections.abc import Iterator, Mapping
from typing import Any

from measure import spread

COMMAND = "`make bench`"

GROUPS = ("tracing", "noise", "values", "solving", "probes", "mixed", "versions")
"""In the table's order; `growth` is a figure."""


def table(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of the table: a row for each case and each way that it is set against."""
    rows = [row for group in GROUPS for result in groups.get(group, {}).values() for row in _rows(result)]
    head = ["| what | against | faster by | goal | peak memory | command |", "|---|---|---|---|---|---|"]
    return head + rows


def _rows(result: Mapping[str, Any]) -> Iterator[str]:
    ours, *others = result["ways"]
    for way in others:
        ratios = [theirs / mine for theirs, mine in zip(way["seconds"], ours["seconds"], strict=True)]
        goal = f"{way['goal']:g}" if way["goal"] else ""
        memory = f"{_megabytes(ours)} / {_megabytes(way)} MB" if ours["peak_bytes"] else ""
        yield f"| {result['name']} | {way['name']} | {_spread(ratios)} | {goal} | {memory} | {COMMAND} |"


def _spread(ratios: list[float]) -> str:
    """The median with its quartiles, where there is more than one."""
    low, middle, high = (f"{x:.3g}×" for x in spread(ratios))
    return middle if len(ratios) == 1 else f"{middle} ({low}–{high})"


def _megabytes(way: Mapping[str, Any]) -> str:
    return f"{way['peak_bytes'] / 1e6:,.0f}"
