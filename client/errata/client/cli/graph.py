"""The tree of versions as lines and branches beside them, like `git log --graph`. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from errata.client.results import Version


@dataclass(frozen=True, slots=True)
class Strokes:
    """The characters to draw with."""

    version: str
    rejected: str
    through: str
    fork: str
    end: str
    join: str
    across: str
    cross: str


UNICODE = Strokes("●", "○", "│", "├", "╯", "┴", "─", "┼")
ASCII = Strokes("*", "x", "|", "|", "/", "/", "_", "|")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A version, what stands left of its first line and of those below it, and what closes branches above it."""

    version: Version
    closing: str
    first: str
    below: str


def rows(versions: Sequence[Version], strokes: Strokes, rejected: frozenset[str] = frozenset()) -> list[Row]:
    """The versions, children before their parents, and the branches beside them. `rejected` are names."""
    awaited: list[str | None] = []
    found = []
    for version in versions:
        mine = [i for i, name in enumerate(awaited) if name == version.name]
        closing = _closing(awaited, mine, strokes)
        for i in mine[1:]:
            awaited[i] = None
        column = mine[0] if mine else _free(awaited)
        mark = strokes.rejected if version.name in rejected else strokes.version
        awaited[column] = version.name
        first = _line([mark if i == column else _through(name, strokes) for i, name in enumerate(awaited)])
        awaited[column] = version.parent or None
        while awaited and awaited[-1] is None:
            awaited.pop()
        below = _line([_through(name, strokes) for name in awaited])
        found.append(Row(version=version, closing=closing, first=first, below=below))
    return found


def _closing(awaited: Sequence[str | None], mine: Sequence[int], strokes: Strokes) -> str:
    """The line that leads all branches of a version back to its column; empty where it has only one."""
    if len(mine) < 2:
        return ""
    start, end = mine[0], mine[-1]
    line = ""
    for i, name in enumerate(awaited):
        inside = start < i < end
        if i == start:
            stroke = strokes.fork
        elif i in mine:
            stroke = strokes.end if i == end else strokes.join
        elif inside:
            stroke = strokes.cross if name else strokes.across
        else:
            stroke = _through(name, strokes)
        line += stroke + (strokes.across if start <= i < end else " ")
    return line.rstrip()


def _free(awaited: list[str | None]) -> int:
    if None in awaited:
        return awaited.index(None)
    awaited.append(None)
    return len(awaited) - 1


def _through(name: str | None, strokes: Strokes) -> str:
    return strokes.through if name else " "


def _line(strokes: Sequence[str]) -> str:
    return " ".join(strokes).rstrip()
