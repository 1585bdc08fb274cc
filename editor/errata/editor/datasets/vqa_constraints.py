"""VQA-Constraints (Basu et al., NeurIPS 2024): its CSVs, joined to answers and images that the user has.

A file has five columns: an index without a header, `question`, an entity under a name of the part's own (`subject`,
`director`), `main_entity`, which is always the constraint's span, and `image_url`. It holds no answers and no images.
Its index is not that of the data it was made from: the known facts of Meng et al. (2022) fit by question and entity.
"""

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from errata.editor.datasets.answers import Answers
from errata.editor.datasets.records import IMAGE_SUFFIXES, DatasetError, Kind, Problem, Record, Span, faults, starts
from errata.editor.errors import InvalidInputError

_COLUMNS = "an index without a header, question, an entity under its own name, main_entity, image_url"


@dataclass(frozen=True, slots=True, kw_only=True)
class VqaConstraints:
    """The questions of a file, and a line for each row that was left out, with its place and the reason."""

    records: tuple[Record, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the file, and the line that it starts on."""

    line: int
    index: str
    question: str
    entity: str
    constraint: str
    image_url: str


class _SkippedError(Exception):
    """Why a row is left out."""


def read_vqa_constraints(
    path: Path, *, images: Path, answers: Path | None = None, substitute: str | None = None, chat: bool = True
) -> VqaConstraints:
    """The questions of a CSV whose images are in the folder `images` and whose answers, if given, in `answers`.

    An image is the file named as the last part of the row's `image_url`, with any suffix of an image. `answers` is
    what `Answers` reads; a question fits as it stands and with the entity in its constraint's place. Without it the
    records have no answer. `substitute` is the word that corrupts the constraints. `chat` is False for questions that
    the answer completes.

    Raises DatasetError for wrong columns or rows, InvalidInputError for a file or a folder that cannot be read.
    """
    entity, rows = _read(path)
    pictures = _pictures(images)
    known = Answers(answers, entity=entity) if answers else None
    records, skipped = [], []
    for row in rows:
        place = f"{path.name}:{row.line}"
        try:
            record = _record(row, pictures, substitute)
            answer = _answer(row, record, known)
            records.append(replace(record, answer=answer, chat=chat, place=place))
        except _SkippedError as reason:
            skipped.append(f"{place}: {reason}")
    return VqaConstraints(records=tuple(records), skipped=tuple(skipped))


def _read(path: Path) -> tuple[str, list[_Row]]:
    """What the file calls its entities, and its rows."""
    rows: list[_Row] = []
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            entity = _entity_column(next(reader, []), path)
            line = reader.line_num
            for cells in reader:
                start, line = line + 1, reader.line_num
                if cells:
                    rows.append(_row(cells, path, start))
    except csv.Error as error:
        raise _error(path, line + 1, f"it is no CSV ({error}); write quotes inside a cell twice") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{str(path)!r} cannot be read ({error}); give a CSV in UTF-8", field="path") from error
    if not rows:
        raise _error(path, 1, "there are no rows")
    return entity, rows


def _entity_column(header: Sequence[str], path: Path) -> str:
    names = [name.strip() for name in header]
    if len(names) != 5 or [names[i] for i in (0, 1, 3, 4)] != ["", "question", "main_entity", "image_url"]:
        raise _error(path, 1, f"the columns are {', '.join(map(repr, names)) or 'none'}; there have to be {_COLUMNS}")
    return names[2]


def _row(cells: Sequence[str], path: Path, line: int) -> _Row:
    if len(cells) != 5:
        raise _error(path, line, f"it has {len(cells)} cells and has to have 5: {_COLUMNS}")
    return _Row(line, *(cell.strip() for cell in cells))


def _pictures(folder: Path) -> dict[str, list[Path]]:
    """The images of a folder by their names, with and without suffix."""
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InvalidInputError(
            f"the images' folder {str(folder)!r} cannot be read ({error.strerror}); check the path", field="images"
        ) from error
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        # Not Path.stem: the name "A photo of Audible.com" has no suffix.
        suffix = next((each for each in IMAGE_SUFFIXES if path.name.lower().endswith(each)), None)
        if suffix and path.is_file():
            found[normalize("NFC", path.name)].append(path)
            found[normalize("NFC", path.name[: -len(suffix)])].append(path)
    return found


def _record(row: _Row, pictures: dict[str, list[Path]], substitute: str | None) -> Record:
    span = Span(text=_as_written(row.constraint, row.question), kind=Kind.VISUAL, substitute=substitute)
    name = normalize("NFC", PurePosixPath(row.image_url).name)
    images = pictures.get(name, [])
    if not images:
        raise _SkippedError(f"there is no image {name!r}")
    if len(images) > 1:
        raise _SkippedError(f"{len(images)} images are named {name!r}: {', '.join(path.name for path in images)}")
    record = Record(text=row.question, constraints=(span,), images=tuple(images), id=row.index)
    if wrong := next(faults(record), None):
        raise _SkippedError(f"{wrong[0]}: {wrong[1]}")
    return record


def _as_written(constraint: str, question: str) -> str:
    """The constraint in the question's own letters: some rows differ in case."""
    at = question.casefold().find(constraint.casefold())
    if starts(constraint, question) or at < 0:
        return constraint
    return question[at : at + len(constraint)]


def _answer(row: _Row, record: Record, known: Answers | None) -> str | None:
    if known is None:
        return None
    # "This application," is a constraint with its comma; what it stands for has none.
    named = row.question.replace(record.constraints[0].text.rstrip(",.;:?!"), row.entity, 1)
    found = known.find(index=row.index, entity=row.entity, questions=(row.question, named))
    if not found:
        raise _SkippedError(f"there is no answer to {row.question!r} about {row.entity!r}")
    if len(found) > 1:
        raise _SkippedError(f"the answers about {row.entity!r} disagree: {', '.join(map(repr, found))}")
    return found[0]


def _error(path: Path, line: int, message: str) -> DatasetError:
    return DatasetError((Problem(file=path.name, line=line, field="", message=message),))
