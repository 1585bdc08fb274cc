"""A study's YAML with the line of every part, and what is said of a part that is wrong.

Loads plain data only: no tag makes an object.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path

import yaml
from pydantic_core import ErrorDetails

from errata.editor.datasets.records import Problem
from errata.editor.errors import ErrataError

_MOST_PARTS = 100_000
"""With all that aliases repeat: a file of a few lines can stand for more than any memory holds."""

Place = Sequence[str | int]
"""Keys and indices from the root down."""


class StudyError(ErrataError):
    """A study that cannot be run as it is written. One line for each of its `problems`."""

    reason = "INVALID_STUDY"

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Source:
    """A YAML file: its data, and where each part of it stands."""

    path: Path
    data: object
    root: yaml.Node

    def problem(self, place: Place, message: str) -> Problem:
        """A problem at a part of the file; at what it is missing from where the part is not there."""
        field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
        return Problem(file=self.path.name, line=self._line(place), field=field, message=message)

    def _line(self, place: Place) -> int:
        node, line = self.root, self.root.start_mark.line
        for step in place:
            if (found := _child(node, step)) is None:
                break
            node, line = found
        return int(line) + 1


def read_source(path: Path) -> Source:
    """Reads a YAML file. Raises StudyError where it cannot be read, is empty, is no YAML, or says a key twice."""
    loader = None
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        if root is None:
            raise _error(path, 1, "the file is empty; write a study")
        if (parts := _parts(root, {})) > _MOST_PARTS:
            told = f"with all that its aliases (*) repeat it has {parts} parts; {_MOST_PARTS} are read at most"
            raise _error(path, 1, told)
        if doubled := list(_doubled(root, set())):
            raise StudyError([Problem(file=path.name, line=line, field="", message=m) for line, m in doubled])
        return Source(path, loader.construct_document(root), root)
    except OSError as error:
        raise _error(path, 1, f"the file cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise _error(path, 1, "the file is not in UTF-8; save it so") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _error(path, mark.line + 1 if mark else 1, f"this is no YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _error(path, 1, f"this is no YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def said(error: ErrorDetails, known: Collection[str]) -> str:
    """What pydantic found wrong, in words. `known` are the fields that there are where it stands."""
    match error["type"]:
        case "extra_forbidden":
            return unknown(str(error["loc"][-1]), known)
        case "missing":
            return "it is missing; give it"
        case "string_type":
            return "it has to be a text; put it in quotes"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "it has to be a mapping"
        case "list_type" | "tuple_type":
            return "it has to be a list"
        case "too_short":
            return "it is empty; give at least one"
    return error["msg"].removeprefix("Value error, ").replace("Input should", "it should")


def unknown(name: str, known: Collection[str], what: str = "field") -> str:
    """That there is no such thing, and what may be meant."""
    near = get_close_matches(name, known, n=1)
    return f"there is no {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")


def _error(path: Path, line: int, message: str) -> StudyError:
    return StudyError([Problem(file=path.name, line=line, field="", message=message)])


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
        return node.value[step], node.value[step].start_mark.line
    if isinstance(node, yaml.MappingNode):
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
