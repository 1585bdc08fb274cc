"""Reference contexts: prompts whose keys stand for what an edit must not change, from Atlas or from a JSONL file."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from errata.editor.atlas import facts
from errata.editor.checkpoints import ATLAS
from errata.editor.errors import InvalidInputError, ModelError
from errata.editor.images import open_image
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context
from errata.server.settings import ModelSettings


class ReferenceLine(BaseModel):
    """One line of the file. `images` are paths relative to it; `subject` is what the constraint means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    constraint: str
    occurrence: int | None = None
    images: tuple[str, ...] = ()
    subject: str | None = None


def has_references(settings: ModelSettings) -> bool:
    """Whether a model so configured has references of its own."""
    return settings.references is not None or settings.source == ATLAS


def references_of(settings: ModelSettings) -> tuple[Context, ...]:
    """The model's references: the configured file's, else Atlas's own for Atlas, else none.

    Raises ModelError, which names the line, for a file that cannot be used.
    """
    if settings.references is not None:
        return read_references(settings.references)
    return facts.references() if settings.source == ATLAS else ()


def read_references(path: Path) -> tuple[Context, ...]:
    """The contexts of a JSONL file, one `ReferenceLine` a line; blank lines are skipped. Raises ModelError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"the references {str(path)!r} cannot be read: {error}; give a JSONL file") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_context(ReferenceLine.model_validate_json(line), path.parent))
            except (ValidationError, InvalidInputError) as error:
                raise ModelError(f"line {number} of the references {str(path)!r} cannot be used: {error}") from error
    if not found:
        raise ModelError(f"the references {str(path)!r} hold no line; give at least one context")
    return tuple(found)


def _context(line: ReferenceLine, folder: Path) -> Context:
    images = tuple(open_image(folder / image, field=f"images[{i}]") for i, image in enumerate(line.images))
    constraint = Constraint(text=line.constraint, occurrence=line.occurrence)
    constraint.span(line.text)
    return Context(prompt=Prompt(text=line.text, images=images), constraint=constraint, subject=line.subject)
