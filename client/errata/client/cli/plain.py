"""Results as plain data for `--json`, and as texts for people. Pure."""

import dataclasses
import math
from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path

from errata.client.names import last_part, model_part
from errata.client.results import JsonValue, MetricScore

_CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)))
"""What could move a terminal's cursor, change its colours, or turn text round; tabs and line breaks stay."""


def plain(value: object) -> JsonValue:
    """A result as JSON has it: dataclasses as objects, times in ISO 8601, NaN and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    match value:
        case Enum():
            return plain(value.value)
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case datetime():
            return value.isoformat()
        case Path():
            return str(value)
        case Mapping():
            return {str(key): plain(each) for key, each in value.items()}
        case list() | tuple():
            return [plain(each) for each in value]
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def clean(text: str) -> str:
    """A text that a terminal can be given, whoever wrote it."""
    return text.translate(_CONTROL)


def short(name: str) -> str:
    """The short form of a version's or alias's full name, "atlas@3"; any other name as it is.

    >>> short("models/atlas/versions/3"), short("models/atlas/edits/0197")
    ('atlas@3', 'models/atlas/edits/0197')
    """
    if "/versions/" in name or "/aliases/" in name:
        return f"{model_part(name)}@{last_part(name)}"
    return name.removeprefix("models/") if name.count("/") == 1 else name


def size(count: int) -> str:
    """Bytes in the unit that suits them; empty for none.

    >>> size(722 * 1024), size(0)
    ('722 KiB', '')
    """
    if not count:
        return ""
    if count < 1024:
        return f"{count} B"
    kibi = count / 1024
    return f"{kibi:.0f} KiB" if kibi < 10_000 else f"{kibi / 1024:.0f} MiB"


def when(time: datetime | None) -> str:
    """A time in this machine's time zone, to the minute."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M") if time else ""


def label(name: str) -> str:
    """A metric's or kind's name in words: "other subjects"."""
    return name.replace("_", " ")


def figures(scores: tuple[MetricScore, ...]) -> str:
    """Scores in one line: "efficacy 1.00, other subjects 0.98"."""
    return ", ".join(f"{label(each.metric)} {each.after:.2f}" for each in scores if each.n)
