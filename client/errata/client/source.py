"""YAML with the line of every part, and what is said of a part that is wrong.

Loads plain data only: no tag makes an object.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Self

import yaml
from pydantic_core import ErrorDetails

from errata.client.errors import ErrataError

_MOST_PARTS = 1_000_000
"""A file of a few lines can stand for more than any memory holds."""

Place = Sequence[str | int]
"""Keys and indices from the root down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: what, and as far as it is known where. `line` counts from 1; `field` is dotted."""

    message: str
    path: Path | None = None
    line: int | None = None
    field: str = ""

    def __str__(self) -> str:
        file = str(self.path) if self.path else ""
        place = f"{file}:{self.line}" if file and self.line else file
        return ": ".join(part for part in (place, self.field, self.message) if part)


class SourceError(ErrataError):
    """A file that cannot be read. One line for each of its `problems`, of which there is at least one."""

    default_reason = "UNREADABLE_FILE"

    def __init__(self, problems: Sequence[Problem], *, reason: str = "") -> None:
        super().__init__("\n".join(map(str, problems)), reason=reason)
        self.problems = tuple(problems)

    @classmethod
    def of(
        cls, message: str, *, path: Path | None = None, line: int | None = None, field: str = "", reason: str = ""
    ) -> Self:
        """The error of one problem. `reason` is that of the error behind it."""
        return cls([Problem(message=message, path=path, line=line, field=field)], reason=reason)


@dataclass(frozen=True, slots=True)
class Source:
    """A YAML file: its data, and where each part of it stands."""

    path: Path
    data: object
    root: yaml.Node

    def line(self, place: Place) -> int:
        """The line of a part, counted from 1; of a part that is missing, the line of what it is missing from."""
        node, line = self.root, self.root.start_mark.line
        for step in place:
            if (found := _child(node, step)) is None:
                break
            node, line = found
        return int(line) + 1

    def problem(self, place: Place, message: str) -> Problem:
        """A problem at a part of the file."""
        return Problem(message=message, path=self.path, line=self.line(place), field=dotted(place))


def dotted(place: Place) -> str:
    """A place as errors write it: "probes[2].prompt"."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")


def as_list(given: object) -> object:
    """A text alone as a list of one; all else as it is."""
    return [given] if isinstance(given, str) else given


def said(error: ErrorDetails, known: Collection[str]) -> str:
    """What pydantic found wrong, in words. `known` are the fields that there are where it stands."""
    match error["type"]:
        case "extra_forbidden":
            near = get_close_matches(str(error["loc"][-1]), known, n=1)
            return "there is no such field; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
        case "missing":
            return "it is missing; give it"
        case "string_type":
            return "it has to be a text; put it in quotes (YAML reads yes, no, null, numbers and dates as other things)"
        case "string_pattern_mismatch":
            return "it is empty, or has spaces where none may be; write it anew"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "it has to be a mapping of fields to values"
        case "list_type" | "tuple_type":
            return "it has to be a list"
        case "too_short":
            return "it is empty; give at least one"
    return error["msg"][0].lower() + error["msg"][1:]


def read_source(path: Path) -> Source:
    """Reads a YAML file. Raises SourceError where it cannot be read, is empty, is no YAML, or says a key twice."""
    text = _text(path)
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"this is no YAML: it holds the character #x{error.character:04x}"
        raise SourceError.of(message, path=path, line=line) from None
    try:
        root = loader.get_single_node()
        if root is None:
            raise SourceError.of("the file is empty; write at least one entry", path=path, line=1)
        if (parts := _parts(root, {})) > _MOST_PARTS:
            message = f"with all that its aliases (*) repeat it has {parts} parts; {_MOST_PARTS} are read at most"
            raise SourceError.of(message, path=path)
        if doubled := list(_doubled(root, set())):
            raise SourceError([Problem(message=m, path=path, line=line) for line, m in doubled])
        return Source(path, loader.construct_document(root), root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = mark.line + 1 if mark else None
        raise SourceError.of(f"this is no YAML: {error.problem}", path=path, line=at) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date such as 2020-13-45 is a ValueError
        raise SourceError.of(f"this is no YAML: {error}", path=path) from None
    finally:
        loader.dispose()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise SourceError.of("the file is not in UTF-8; save it so", path=path) from None
    except IsADirectoryError:
        raise SourceError.of("it is a folder; name a file in it", path=path) from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SourceError.of(f"the file cannot be read: {reason}; check the path", path=path) from None


def _parts(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many parts a node has, each counted as often as aliases and merges (`<<`) repeat it."""
    if id(node) not in counted:
        counted[id(node)] = 0  # what holds itself
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        items = chain.from_iterable(below) if isinstance(node, yaml.MappingNode) else below
        counted[id(node)] = 1 + sum(_parts(each, counted) for each in items)
    return counted[id(node)]


def _child(node: yaml.Node, step: str | int) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return item, item.start_mark.line
    if isinstance(node, yaml.MappingNode):
        # The last one: a key that was merged in (`<<`) stands before the mapping's own.
        found = [(value, key.start_mark.line) for key, value in node.value if key.value == str(step)]
        return found[-1] if found else None
    return None


def _doubled(node: yaml.Node, seen: set[int]) -> Iterator[tuple[int, str]]:
    """Keys that a mapping has twice, which YAML's own loader would pass over: their lines, and what to say."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _doubled(item, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                yield key.start_mark.line + 1, f"the key {key.value!r} stands here twice; keep one"
            keys.add(str(key.value))
            yield from _doubled(value, seen)
