"""Records of a data set as questions to measure: their images decoded, what cannot be asked left out and listed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from errata.editor.datasets.records import Kind, Record, Span, missing_images
from errata.editor.errors import ErrataError, InvalidInputError
from errata.editor.images import open_image
from errata.editor.measurements.questions import Box, Question
from errata.editor.prompts import Constraint, Prompt
from errata.editor.trace import Corruption, OtherImage, Substitution


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Questions, and a line for each record that was left out, with its place and the reason."""

    questions: tuple[Question, ...]
    skipped: tuple[str, ...]


def load(records: Iterable[Record], *, limit: int | None = None, skipped: Sequence[str] = ()) -> Loaded:
    """The first `limit` questions that can be asked; all of them where it is None.

    Their decoded images are held in memory together. `skipped` are lines for what was left out before.
    Raises InvalidInputError where nothing is left.
    """
    told = list(skipped)
    questions = tuple(islice(_askable(records, told), limit))
    if not questions:
        reasons = f": {told[0]}" + (f", and {len(told) - 1} more" if len(told) > 1 else "") if told else ""
        raise InvalidInputError(f"the data set has no question that can be asked{reasons}", field="questions")
    return Loaded(questions=questions, skipped=tuple(told))


def question(record: Record) -> Question:
    """One record's question. Raises ImageError for an image that cannot be used."""
    # "Where it has a visual one that is the first" (Question).
    spans = sorted(record.constraints, key=lambda span: span.kind is not Kind.VISUAL)
    images = tuple(open_image(path, field=f"images[{i}]") for i, path in enumerate(record.images))
    return Question(
        prompt=Prompt(text=record.text, images=images, chat=record.chat),
        constraints=tuple(Constraint(text=span.text, occurrence=span.occurrence) for span in spans),
        corruptions=tuple(_corruption(span) for span in spans) if spans[0].corrupted else (),
        answer=record.answer,
        kinds=tuple(span.kind for span in spans),
        box=Box(left=record.box[0], top=record.box[1], right=record.box[2], bottom=record.box[3])
        if record.box
        else None,
    )


def _askable(records: Iterable[Record], told: list[str]) -> Iterable[Question]:
    for record in records:
        if missing := missing_images(record):
            told.append(f"{record.place}: {missing}")
            continue
        try:
            yield question(record)
        except ErrataError as error:
            told.append(f"{record.place}: {error}")


def _corruption(span: Span) -> Corruption:
    if span.other_images:
        return OtherImage(images=tuple(open_image(path, field="other_images") for path in span.other_images))
    assert span.substitute is not None
    return Substitution(word=span.substitute)
