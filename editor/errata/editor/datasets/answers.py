"""A user's answers to the questions of a data set that holds none, joined by question, entity or index."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from unicodedata import normalize

from errata.editor.datasets.records import DatasetError, Problem
from errata.editor.errors import InvalidInputError

# Columns and their names elsewhere, as in the known facts of Meng et al. (2022).
_ALIASES = {"": "index", "prompt": "question", "subject": "entity", "attribute": "answer"}


class Answers:
    """The answers of a CSV with a header, or of JSON: a list of objects, or one object of answers by their keys.

    Columns are `answer` and one or both of `question` and `entity`, all of which must fit, or else `index`. The keys
    of an object are questions, entities or indices. `entity` is what the questions call the entity's column.
    Letters' case and spaces do not matter.

    Raises DatasetError and InvalidInputError for a file that holds no such answers.
    """

    def __init__(self, path: Path, *, entity: str = "entity") -> None:
        self._keys, rows = _read(path, _ALIASES | {entity: "entity"})
        self._known: defaultdict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
        for row in rows:
            if answer := row["answer"].strip():
                self._known[tuple(_folded(row[key]) for key in self._keys)][_folded(answer)] = answer

    def find(self, *, index: str, entity: str, questions: Iterable[str]) -> tuple[str, ...]:
        """The different answers to a question in any of these wordings: one, or none, or several that disagree."""
        found: dict[str, str] = {}
        for question in questions:
            by = {"index": index, "entity": entity, "question": question}
            if self._keys == ("key",):
                # The narrowest kind of key that there is decides.
                known = (self._known.get((_folded(by[kind]),)) for kind in ("question", "entity", "index"))
                found |= next((each for each in known if each), {})
            else:
                found |= self._known.get(tuple(_folded(by[key]) for key in self._keys), {})
        return tuple(found.values())


def _folded(text: str) -> str:
    return " ".join(normalize("NFC", text).casefold().split())


def _read(path: Path, names: Mapping[str, str]) -> tuple[tuple[str, ...], list[dict[str, str]]]:
    """The columns to join by, and the rows under our names."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(
            f"{str(path)!r} cannot be read ({error}); give CSV or JSON, UTF-8", field="answers"
        ) from error
    rows = _json(path, text) if path.suffix.lower() == ".json" else _csv(path, text)
    if rows and set(rows[0][1]) == {"key", "answer"}:
        return ("key",), [row for _, row in rows]
    keys: tuple[str, ...] = ()
    renamed = []
    for line, row in rows:
        named = {names.get(name.strip().casefold(), name.strip().casefold()): value for name, value in row.items()}
        keys = keys or _join_keys(named, path, line)
        if missing := [key for key in (*keys, "answer") if key not in named]:
            raise _error(path, line, f"it has no {' and no '.join(missing)}; its columns are {', '.join(named)}")
        renamed.append(named)
    return keys, renamed


def _join_keys(row: Mapping[str, str], path: Path, line: int) -> tuple[str, ...]:
    # An index beside a question is a row's number in its own file: it says nothing about the question.
    keys = tuple(key for key in ("question", "entity") if key in row) or tuple(key for key in ("index",) if key in row)
    if not keys:
        raise _error(path, line, f"there is no column question, entity or index; its columns are {', '.join(row)}")
    return keys


def _csv(path: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise _error(
                    path, reader.line_num, f"it has not the {len(reader.fieldnames or ())} cells of the header"
                )
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise _error(path, reader.line_num, f"it is no CSV ({error})") from error
    if not rows:
        raise _error(path, 1, "there are no answers; write a header and one answer a line")
    return rows


def _json(path: Path, text: str) -> list[tuple[int, dict[str, str]]]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _error(path, getattr(error, "lineno", 1), f"it is no JSON ({error})") from error
    if isinstance(data, dict):
        data = [{"key": key, "answer": value} for key, value in data.items()]
    if not isinstance(data, list) or not data or not all(isinstance(row, dict) for row in data):
        raise _error(path, 1, "give a list of objects, or one object of answers by question, entity or index")
    wanted = {*_ALIASES, *_ALIASES.values(), "key"}
    for i, row in enumerate(data):
        if odd := [k for k, v in row.items() if k.casefold() in wanted and not isinstance(v, str | int)]:
            raise _error(path, 1, f"{odd[0]!r} of entry {i}, counted from 0, is neither a text nor a number")
    return [(1, {key: str(value) for key, value in row.items()}) for row in data]


def _error(path: Path, line: int, message: str) -> DatasetError:
    return DatasetError((Problem(file=path.name, line=line, field="", message=message),))
