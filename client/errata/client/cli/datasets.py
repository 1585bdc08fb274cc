"""Data sets of questions on this machine: whether they can be used. What knows the formats is found by entry point."""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.console import RenderableType

from errata.client.cli.output import facts, indented, line
from errata.client.cli.problems import NO, MissingExtraError, UsageError
from errata.client.cli.session import Session

GROUP = "errata.datasets"
"""The entry points that read data sets: `Validate`s by the name `validate`."""

_SHOWN = 20


class Action(StrEnum):
    """What is done with a data set."""

    VALIDATE = "validate"


class Validation(Protocol):
    """What a data set holds; `problems` stop it from being read, `skipped` are questions that would be left out."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Questions, images and the like."""

    @property
    def problems(self) -> Sequence[object]:
        """One a line of the file."""

    @property
    def skipped(self) -> Sequence[str]:
        """One a question."""

    @property
    def complete(self) -> bool:
        """Whether nothing is wrong or left out."""


Validate = Callable[..., Validation]
"""Takes a path, and `images=` and `answers=`, paths or None."""


def dataset(
    session: Session,
    action: Annotated[Action, typer.Argument(metavar="validate", help="Says what is wrong with it, line by line.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="JSONL, its folder, or a CSV of VQA-Constraints.")],
    images: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A CSV's images.")] = None,
    answers: Annotated[Path | None, typer.Option(metavar="FILE", help="A CSV's answers.")] = None,
) -> None:
    """Check a data set of questions before it is measured; asks no server.

    Exits 1 where it cannot be read, or a question would be left out. The format: docs/datasets.md.
    """
    if (path.suffix.lower() == ".csv") != (images is not None) or (answers is not None and images is None):
        raise UsageError("a CSV of VQA-Constraints needs --images FOLDER; other data sets name their own images")
    found = _validated(path, images, answers)
    problems = [str(problem) for problem in found.problems]
    result = {"counts": dict(found.counts), "problems": problems, "skipped": list(found.skipped)}
    session.output.show(result, *_said(found, problems))
    if not found.complete:
        raise typer.Exit(NO)


def _validated(path: Path, images: Path | None, answers: Path | None) -> Validation:
    validate = _validator()
    try:
        return validate(path, images=images, answers=answers)
    except Exception as error:
        # Of a package that this one does not import: what it raises on purpose has a reason.
        if hasattr(error, "reason"):
            raise UsageError(str(error)) from error
        raise


def _said(found: Validation, problems: Sequence[str]) -> list[RenderableType]:
    parts: list[RenderableType] = [facts((name, str(count)) for name, count in found.counts.items() if count)]
    for title, lines in (("wrong", problems), ("left out", found.skipped)):
        if lines:
            more = len(lines) - _SHOWN
            rest = [f"and {more} more (--json has them all)"] if more > 0 else []
            parts += [line(f"{title}: {len(lines)}", "bold"), indented([*lines[:_SHOWN], *rest])]
    return parts if len(parts) > 1 else [*parts, line("nothing is wrong with it")]


def _validator() -> Validate:
    for found in entry_points(group=GROUP, name=Action.VALIDATE.value):
        loaded: Validate = found.load()
        return loaded
    raise MissingExtraError(
        f"no reader of data sets is installed (entry points {GROUP!r}); pip install 'errata[server]'"
    )
