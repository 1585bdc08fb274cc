"""Checks of single fields. Each raises MalformedError that names the field, the limit and what was given."""

import math
import re
from collections.abc import Mapping, Sized
from enum import Enum
from typing import TypeVar

from errata.server.errors import MalformedError

T = TypeVar("T")

_PAGE, _LARGEST_PAGE = 50, 1000
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LONGEST = 200_000
"""Characters of any text: tokenizing it is a few tenths of a second, and no question needs as many."""
# PostgreSQL stores no NUL, and no prompt means a bell, nor an escape in its one-character form.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_LINE_BREAK = re.compile(r"[\n\r\u0085\u2028\u2029]")


def joined(field: str, part: str) -> str:
    """`part` of `field`; of the call itself where `field` is empty."""
    return f"{field}.{part}" if field else part


def present(is_present: bool, field: str) -> None:
    """Refuses a required message that was left out."""
    if not is_present:
        raise MalformedError(f"{field} is missing; it is required", field=field, reason="MISSING_FIELD")


def text(value: str, field: str, *, most: int = _LONGEST, one_line: bool = False) -> str:
    """A text that says something, of at most `most` characters."""
    if not value.strip():
        raise MalformedError(f"{field} is blank; give a text", field=field, reason="MISSING_FIELD")
    return note(value, field, most=most, one_line=one_line)


def note(value: str, field: str, *, most: int = _LONGEST, one_line: bool = False) -> str:
    """A text that may be empty."""
    if len(value) > most:
        raise MalformedError(
            f"{field} has {len(value)} characters; give at most {most}", field=field, reason="OUT_OF_RANGE"
        )
    if found := _CONTROL.search(value) or (one_line and _LINE_BREAK.search(value)) or None:
        raise MalformedError(
            f"{field} holds {found[0]!a} at {found.start()}; leave out control characters"
            + (" and line breaks" if one_line else ""),
            field=field,
            reason="MALFORMED_TEXT",
        )
    return value


def number(value: float, field: str, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """A finite number from `low` to `high`; with `above`, more than `low`. NaN and infinity are refused."""
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        first = f"more than {low:g}" if above else f"at least {low:g}"
        limits = first if high == math.inf else f"{first} and at most {high:g}"
        raise MalformedError(f"{field} is {value:g}; give {limits}", field=field, reason="OUT_OF_RANGE")
    return value


def whole(value: int, field: str, low: int, high: int = 2**31 - 1) -> int:
    """A whole number from `low` to `high`."""
    number(value, field, low, high if high < 2**31 - 1 else math.inf)
    return value


def count(values: Sized, field: str, low: int, high: int) -> None:
    """A list of `low` to `high` entries."""
    if len(values) < low:
        raise MalformedError(f"{field} is empty; give {low}-{high}", field=field, reason="MISSING_FIELD")
    if len(values) > high:
        raise MalformedError(f"{field} has {len(values)} entries; give at most {high}", field=field, reason="TOO_MANY")


def member(table: Mapping[T, Enum], value: T, field: str) -> T:
    """A value of an enum that this release knows."""
    if value not in table:
        reason = "OUT_OF_RANGE" if value else "MISSING_FIELD"
        known = ", ".join(m.name for m in table.values())
        raise MalformedError(f"{field} is {value}; give one of {known}", field=field, reason=reason)
    return value


def request_id(value: str, field: str = "request_id") -> str | None:
    """What makes a repeated call safe; None where none was given."""
    if not value or _REQUEST_ID.fullmatch(value):
        return value or None
    raise MalformedError(
        f'{field} is {value[:100]!a}; give a UUID or any 1-64 of letters, digits, "-" and "_"',
        field=field,
        reason="OUT_OF_RANGE",
    )


def page_size(value: int, field: str = "page_size") -> int:
    """Entries of a page: 1-1000, and 50 for 0."""
    return whole(value, field, 0, _LARGEST_PAGE) or _PAGE
