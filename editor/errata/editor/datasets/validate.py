"""Whether a data set can be used, without decoding an image or loading a model: what `errata dataset validate` says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from errata.editor.datasets.lines import parse_lines
from errata.editor.datasets.records import DatasetError, Kind, Problem, Record, missing_images
from errata.editor.datasets.vqa_constraints import read_vqa_constraints
from errata.editor.errors import InvalidInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What a data set holds, and what is wrong with it.

    `problems` are errors of the file, which stop it from being read. `skipped` are a line for each question that
    would be left out of a measurement: a missing image, a missing answer. `counts` are of the questions that remain.
    """

    path: Path
    counts: dict[str, int]
    problems: tuple[Problem, ...]
    skipped: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Whether it can be read and holds a question that can be asked."""
        return not self.problems and self.counts["questions"] > 0

    @property
    def complete(self) -> bool:
        """Whether it is usable and nothing of it would be left out."""
        return self.usable and not self.skipped


def validate(path: Path, *, images: Path | None = None, answers: Path | None = None) -> Validation:
    """Looks at a data set of our format (a file or its folder), or a CSV of VQA-Constraints with its `images`.

    Raises InvalidInputError where there is nothing to look at; what is wrong inside is told in the result.
    """
    if path.suffix.lower() == ".csv":
        return _vqa_constraints(path, images, answers)
    if images is not None or answers is not None:
        raise InvalidInputError(
            "images and answers are joined to a CSV of VQA-Constraints only; this data set names its own",
            field="images",
        )
    try:
        records, problems = parse_lines(path)
    except DatasetError as error:
        records, problems = (), error.problems
    missing = [(record, missing_images(record)) for record in records]
    return Validation(
        path=path,
        counts=_counts([record for record, said in missing if not said]),
        problems=problems,
        skipped=tuple(f"{record.place}: {said}" for record, said in missing if said),
    )


def _vqa_constraints(path: Path, images: Path | None, answers: Path | None) -> Validation:
    if images is None:
        raise InvalidInputError("a CSV of VQA-Constraints holds no images; give their folder", field="images")
    try:
        found = read_vqa_constraints(path, images=images, answers=answers)
    except DatasetError as error:
        return Validation(path=path, counts=_counts(()), problems=error.problems, skipped=())
    return Validation(path=path, counts=_counts(found.records), problems=(), skipped=found.skipped)


def _counts(records: Sequence[Record]) -> dict[str, int]:
    kinds = [{span.kind for span in record.constraints} for record in records]
    return {
        "questions": len(records),
        "images": len({path for record in records for path in record.files}),
        "with a visual constraint only": sum(kind == {Kind.VISUAL} for kind in kinds),
        "with textual constraints only": sum(kind == {Kind.TEXTUAL} for kind in kinds),
        "with both": sum(len(kind) == 2 for kind in kinds),
        "with an answer": sum(record.answer is not None for record in records),
        "with a corruption": sum(record.constraints[0].corrupted for record in records),
        "with a box": sum(record.box is not None for record in records),
    }
