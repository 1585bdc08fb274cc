"""Our format of data sets: a folder with `questions.jsonl`, one question a line, and the images that it names.

Images are paths relative to the file, and stay in its folder. Reading finds everything that is wrong before it
complains, with file, line and field. docs/datasets.md shows a data set.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from errata.editor.datasets.records import IMAGE_SUFFIXES, DatasetError, Kind, Problem, Record, Span, faults
from errata.editor.errors import InvalidInputError

FILE = "questions.jsonl"
"""The file of a data set that is given as a folder."""

_Text = Annotated[str, Field(pattern=r"\S", max_length=20_000)]
_Path = Annotated[str, Field(min_length=1, max_length=1_000)]


class SpanEntry(BaseModel):
    """One constraint of a line."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    text: _Text
    kind: Kind
    occurrence: int | None = None
    substitute: _Text | None = None
    other_images: tuple[_Path, ...] = ()


class LineEntry(BaseModel):
    """One line."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Annotated[str, Field(max_length=200)] = ""
    text: _Text
    images: tuple[_Path, ...] = ()
    constraints: tuple[SpanEntry, ...] = Field(min_length=1)
    answer: _Text | None = None
    box: tuple[float, float, float, float] | None = None
    chat: bool = True


def read_lines(path: Path) -> tuple[Record, ...]:
    """The questions of a data set, given as its file or its folder; whether their images exist is not looked at.

    Raises DatasetError with every problem of the file, InvalidInputError where there is none to read.
    """
    records, problems = parse_lines(path)
    if problems:
        raise DatasetError(problems)
    return records


def parse_lines(path: Path) -> tuple[tuple[Record, ...], tuple[Problem, ...]]:
    """The questions that can be read, and all that is wrong with the others and with the file."""
    file = path / FILE if path.is_dir() else path
    records: list[Record] = []
    problems: list[Problem] = []
    first: dict[str, int] = {}
    root = file.parent.resolve()
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        found = _parse(line, file, root, number)
        if isinstance(found, Record):
            if found.id and (other := first.setdefault(found.id, number)) != number:
                message = f"line {other} has the id {found.id!r} already; give this one another"
                problems.append(Problem(file=file.name, line=number, field="id", message=message))
            records.append(found)
        else:
            problems += found
    if not records and not problems:
        problems = [Problem(file=file.name, line=1, field="", message="the file is empty; write one question a line")]
    return tuple(records), tuple(problems)


def write_lines(folder: Path, records: Iterable[Record]) -> Path:
    """Writes a data set into a new or empty folder, its images beside it in `images/`, and returns its file.

    Images that are one file stay one. Raises DatasetError for a record that could not be read back,
    InvalidInputError where the folder holds something or an image is missing; it then stays as it was.
    """
    records = tuple(records)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInputError(f"{str(folder)!r} is not empty; give a folder that is new", field="folder")
    wrong = [_problem(r.place or f"records[{i}]", i + 1, *fault) for i, r in enumerate(records) for fault in faults(r)]
    if wrong:
        raise DatasetError(tuple(wrong))
    names = _names(path for record in records for path in record.files)
    if missing := [str(path) for path in names if not path.is_file()]:
        raise InvalidInputError(f"there is no image {missing[0]!r} ({len(missing)} missing in all)", field="records")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".") as there:
        partial = Path(there) / "set"  # made by us: the folder around it is for its maker alone to read
        (partial / "images").mkdir(parents=True)
        for source, name in names.items():
            shutil.copyfile(source, partial / name)
        lines = [json.dumps(_entry(record, names), ensure_ascii=False) + "\n" for record in records]
        (partial / FILE).write_text("".join(lines), encoding="utf-8")
        partial.replace(folder)
    return folder / FILE


def _lines(file: Path) -> Iterator[str]:
    try:
        # Of all line ends only these: a text may hold U+2028 and its like.
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InvalidInputError(
            f"{str(file)!r} cannot be read ({error.strerror}); check the path", field="path"
        ) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DatasetError((_problem(file.name, line, "", "it is no UTF-8; save the file as UTF-8"),)) from error
    yield from text.split("\n")


def _parse(line: str, file: Path, root: Path, number: int) -> Record | list[Problem]:
    try:
        entry = LineEntry.model_validate_json(line)
    except ValidationError as error:
        return [_problem(file.name, number, _dotted(e["loc"]), _said(e)) for e in error.errors(include_url=False)]
    wrong = [*_doubled(line), *_path_faults(entry, root)]
    record = _record(entry, file, number)
    wrong += faults(record)
    return [_problem(file.name, number, *each) for each in wrong] or record


def _record(entry: LineEntry, file: Path, number: int) -> Record:
    spans = (
        Span(
            text=span.text,
            kind=span.kind,
            occurrence=span.occurrence,
            substitute=span.substitute,
            other_images=tuple(file.parent / name for name in span.other_images),
        )
        for span in entry.constraints
    )
    return Record(
        text=entry.text,
        constraints=tuple(spans),
        images=tuple(file.parent / name for name in entry.images),
        answer=entry.answer,
        box=entry.box,
        chat=entry.chat,
        id=entry.id,
        place=f"{file.name}:{number}",
    )


def _doubled(line: str) -> list[tuple[str, str]]:
    """Fields that an object has twice: readers of JSON take the last one and say nothing."""
    twice: dict[str, str] = {}

    def note(pairs: list[tuple[str, object]]) -> None:
        for name, n in Counter(name for name, _ in pairs).items():
            if n > 1:
                twice[name] = "it is there more than once; give it once"

    json.loads(line, object_pairs_hook=note)
    return list(twice.items())


def _path_faults(entry: LineEntry, root: Path) -> Iterator[tuple[str, str]]:
    given = [(f"images[{i}]", name) for i, name in enumerate(entry.images)]
    for i, span in enumerate(entry.constraints):
        given += [(f"constraints[{i}].other_images[{j}]", name) for j, name in enumerate(span.other_images)]
    return ((field, message) for field, name in given if (message := _path_fault(name, root)))


def _path_fault(name: str, root: Path) -> str | None:
    """Why a path may not be opened, links followed; None where it stays in the folder."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name.isprintable() or "\\" in name:
        return f"the path {name!r} has a character that no path here may have; write it with / and printable letters"
    if posix.is_absolute() or windows.drive or ".." in posix.parts:
        return f"the path {name!r} leads out of the data set's folder; give one relative to the file, without .."
    if not (root / name).resolve().is_relative_to(root):
        return f"the path {name!r} is a link out of the data set's folder; copy the image into it"
    return None


def _problem(file: str, line: int, field: str, message: str) -> Problem:
    return Problem(file=file, line=line, field=field, message=message)


def _dotted(place: Sequence[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")


def _said(error: ErrorDetails) -> str:
    """What pydantic found wrong, in words."""
    known = SpanEntry.model_fields if "constraints" in error["loc"] else LineEntry.model_fields
    match error["type"]:
        case "json_invalid":
            return f"it is no JSON ({error['ctx']['error']}); write one object a line"
        case "extra_forbidden":
            near = get_close_matches(str(error["loc"][-1]), known, n=1)
            return "there is no such field; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
        case "missing":
            return "it is missing; give it"
        case "string_pattern_mismatch":
            return "it is empty; give a text"
        case "too_short":
            return "it is empty; give at least one"
        case "model_type" | "dict_type":
            return "it has to be an object of fields and values"
    return error["msg"][0].lower() + error["msg"][1:]


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """A name of its own in `images/` for each file: its own name where no other has taken it."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in dict.fromkeys(paths):
        suffix = path.suffix.lower() if path.suffix.lower() in IMAGE_SUFFIXES else ""
        stem = path.name[: len(path.name) - len(suffix)]
        stem = "".join(c if c.isalnum() or c in " ._-()" else "_" for c in stem).strip() or "image"
        name, n = f"{stem}{suffix}", 2
        while name.casefold() in taken:  # Folded: some disks know no difference.
            name, n = f"{stem} ({n}){suffix}", n + 1
        taken.add(name.casefold())
        names[path] = f"images/{name}"
    return names


def _entry(record: Record, names: dict[Path, str]) -> dict[str, object]:
    """A line's fields, those that say nothing left out."""
    entry = LineEntry(
        id=record.id,
        text=record.text,
        images=tuple(names[path] for path in record.images),
        constraints=tuple(
            SpanEntry(
                text=span.text,
                kind=span.kind,
                occurrence=span.occurrence,
                substitute=span.substitute,
                other_images=tuple(names[path] for path in span.other_images),
            )
            for span in record.constraints
        ),
        answer=record.answer,
        box=record.box,
        chat=record.chat,
    )
    return entry.model_dump(mode="json", exclude_defaults=True)
