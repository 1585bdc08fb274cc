"""A question of a data set as it stands on disk: texts and paths, nothing decoded. Knows no file format.

What is wrong with a record is found here, in the terms of the fields that every format shares.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from pathlib import Path

from errata.editor.errors import InvalidInputError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of files that are taken for images, in lower case."""


class Kind(StrEnum):
    """What a constraint refers to (Basu et al. 2024, §3): the picture, or something named in words."""

    VISUAL = "visual"
    TEXTUAL = "textual"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: the file, its line counted from 1, the field (dotted; empty for all of the line)."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (f"{self.file}:{self.line}", self.field, self.message) if part)


class DatasetError(InvalidInputError):
    """A data set that cannot be read. One line for each of its `problems`, of which there is at least one."""

    reason = "INVALID_DATASET"

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        first = problems[0]
        place = f"{first.file}:{first.line}: {first.field}".rstrip(": ")
        # Its own place leads the first line, as the field of any invalid input does.
        super().__init__("\n".join([first.message, *map(str, problems[1:])]), field=place)
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A constraint and how it is corrupted: by the word `substitute`, or by other images in the question's place.

    `text` is copied from the question letter by letter; `occurrence` counts from 0 where it is there more than once.
    """

    text: str
    kind: Kind
    occurrence: int | None = None
    substitute: str | None = None
    other_images: tuple[Path, ...] = ()

    @property
    def corrupted(self) -> bool:
        """Whether it says how to corrupt it."""
        return self.substitute is not None or bool(self.other_images)

    def place(self, text: str) -> tuple[int, int] | None:
        """Its start and end in a question, in characters; None where it has no one place there."""
        found = starts(self.text, text)
        if (self.occurrence is None and len(found) > 1) or not 0 <= (self.occurrence or 0) < len(found):
            return None
        start = found[self.occurrence or 0]
        return start, start + len(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A question: its text, its constraints, and what may be known besides.

    `images` and `other_images` are paths that can be opened from here. `box` is left, top, right and bottom as shares
    of the image's width and height. `chat` is whether the model's chat template is put around the text; a text that
    the answer completes goes without. `place` is where the record comes from, `questions.jsonl:3`.
    """

    text: str
    constraints: tuple[Span, ...]
    images: tuple[Path, ...] = ()
    answer: str | None = None
    box: tuple[float, float, float, float] | None = None
    chat: bool = True
    id: str = ""
    place: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every image it needs, each once."""
        others = (path for span in self.constraints for path in span.other_images)
        return tuple(dict.fromkeys([*self.images, *others]))


def missing_images(record: Record) -> str | None:
    """Which of a record's images are not there, in words; None where all are."""
    missing = [path for path in record.files if not path.is_file()]
    return f"there is no image {', '.join(map(repr, (path.name for path in missing)))}" if missing else None


def starts(needle: str, text: str) -> list[int]:
    """Where `needle` occurs in `text`, letter by letter; occurrences may overlap."""
    return [i for i in range(len(text)) if text.startswith(needle, i)] if needle.strip() else []


def faults(record: Record) -> Iterator[tuple[str, str]]:
    """The field and the message of all that is wrong with a record, but for files that are missing."""
    if not record.text.strip():
        yield "text", "it is empty; give the question"
    if not record.constraints:
        yield "constraints", "there is none; give the span that the question is about"
    for i, span in enumerate(record.constraints):
        yield from ((f"constraints[{i}].{field}", message) for field, message in _span_faults(span, record))
    for (i, a), (j, b) in combinations(enumerate(record.constraints), 2):
        if _overlap(a.place(record.text), b.place(record.text)):
            yield f"constraints[{j}]", f"it overlaps constraints[{i}]; give each part of the question to one of them"
    visual = [i for i, span in enumerate(record.constraints) if span.kind is Kind.VISUAL]
    if len(visual) > 1:
        yield f"constraints[{visual[1]}].kind", "a question has one visual constraint at most; make this one textual"
    if 0 < sum(span.corrupted for span in record.constraints) < len(record.constraints):
        yield "constraints", "some say how they are corrupted and some do not; give all of them a substitute, or none"
    yield from _box_faults(record)


def _span_faults(span: Span, record: Record) -> Iterator[tuple[str, str]]:
    if span.kind is Kind.VISUAL and not record.images:
        yield "kind", "a visual constraint refers to an image and the question has none; give images"
    if span.other_images and span.substitute is not None:
        yield "other_images", "it has a substitute as well; give one of them"
    if span.other_images and span.kind is Kind.TEXTUAL:
        yield "other_images", "other images corrupt a visual constraint only; give a substitute"
    elif span.other_images and len(span.other_images) != len(record.images):
        yield "other_images", f"{len(span.other_images)} would stand for {len(record.images)} image(s); give as many"
    found = starts(span.text, record.text)
    if not found:
        yield "text", f"{span.text!r} does not occur in {record.text!r}; {_hint(span.text, record.text)}"
    elif span.occurrence is None and len(found) > 1:
        yield "occurrence", f"{span.text!r} occurs {len(found)} times; say which one: 0 … {len(found) - 1}"
    elif span.place(record.text) is None:
        yield "occurrence", f"{span.text!r} occurs {len(found)} time(s), counted from 0; give one of them"


def _overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    return a is not None and b is not None and a[0] < b[1] and b[0] < a[1]


def _hint(needle: str, text: str) -> str:
    at = text.casefold().find(needle.casefold()) if needle.strip() else -1
    return f"did you mean {text[at : at + len(needle)]!r}?" if at >= 0 else "copy it from the text"


def _box_faults(record: Record) -> Iterator[tuple[str, str]]:
    if record.box is None:
        return
    if not record.images:
        yield "box", "a box is a part of an image and the question has none; give images"
    left, top, right, bottom = record.box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        yield "box", "it does not lie in the image; give left, top, right and bottom as shares of its size, 0 to 1"
