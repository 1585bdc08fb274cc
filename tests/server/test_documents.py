"""docs/measurements.md lists every setting of every kind as the editor and the API have it."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path

import pytest

from errata.server.conversion.measuring import SETTINGS

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
PROTO = (ROOT / "proto" / "errata" / "v1" / "measurement.proto").read_text(encoding="utf-8")

_FIELD = re.compile(r"((?:  //.*\n)+)  (?:optional|repeated) \w+ (\w+) = \d+;")
_DEFAULT = re.compile(r"\s*Optional(?:; default:?\s*(.*?))?\.(\s.*)?$", re.DOTALL)


def comments(kind: str) -> dict[str, tuple[str, str]]:
    """What the API says of each setting of a kind, and of its default."""
    (message,) = re.findall(rf"\n +(\w+) {kind} = \d+;", PROTO)
    body = PROTO.partition(f"message {message} {{\n")[2].partition("\n}")[0] + "\n"
    found = {}
    for comment, name in _FIELD.findall(body):
        said = " ".join(line.strip().removeprefix("//").strip() for line in comment.splitlines())
        default = _DEFAULT.search(said)
        assert default, (kind, name)
        found[name] = _DEFAULT.sub("", said).rstrip("."), (default[1] or "").strip()
    return found


def default_of(field: "Field[object]", said: str) -> str:
    """A setting's default: the editor's own value; in words where that stands for something else."""
    value = field.default
    assert value is not MISSING
    if value is None or value == () or isinstance(value, bool):
        return said or "none"
    if isinstance(value, (tuple, Enum)):
        values = value if isinstance(value, tuple) else (value,)
        return ", ".join(str(each.value if isinstance(each, Enum) else each) for each in values)
    return f"{value:g}" if isinstance(value, float) else str(value)


def rows() -> Iterator[str]:
    """The table that the document has to show."""
    for kind, made in SETTINGS.items():
        said = comments(kind)
        for field in fields(made):  # type: ignore[arg-type]  # every settings type is a dataclass
            meaning, default = said[field.name]
            yield f"| `{kind}` | `{field.name}` | {default_of(field, default)} | {meaning} |"


def test_every_setting_is_documented_with_its_default() -> None:
    listed = re.findall(r"^\| `\w+` \| `\w+` \|.*$", DOCUMENT, re.MULTILINE)
    assert listed == list(rows())


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_api_tells_the_defaults_that_the_editor_has(kind: str) -> None:
    for field in fields(SETTINGS[kind]):  # type: ignore[arg-type]  # every settings type is a dataclass
        said = comments(kind)[field.name][1]
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert float(said) == field.default, field.name


def test_every_kind_is_in_the_table_of_kinds() -> None:
    assert re.findall(r"^\| `(\w+)` \| [^`|]+ \|[^|]*\|$", DOCUMENT, re.MULTILINE) == list(SETTINGS)
