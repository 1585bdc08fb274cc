"""Facts that a text model is known to complete, as questions: files like Known 1000 (Meng et al. 2022, §2)."""

import json
from pathlib import Path

from errata.editor.errors import InvalidInputError
from errata.editor.measurements.questions import Question
from errata.editor.prompts import Constraint, Prompt


def read_known(path: Path) -> list[Question]:
    """Questions of a JSON file that lists objects with `prompt`, `subject` and `attribute`, as Known 1000 does.

    A prompt is a text to complete, its subject the constraint, its attribute the answer. Raises InvalidInputError that
    says which entry cannot be used.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path.name} cannot be read as JSON ({error}); give a list", field="path") from None
    if not isinstance(entries, list) or not entries:
        raise InvalidInputError(f"{path.name} holds no list of facts; give one", field="path")
    return [_known(entry, f"path[{i}]") for i, entry in enumerate(entries)]


def _known(entry: object, field: str) -> Question:
    parts = {}
    for name in ("prompt", "subject", "attribute"):
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise InvalidInputError(f"{name!r} is no text; give prompt, subject and attribute", field=field)
        parts[name] = value
    prompt, subject = parts["prompt"].strip(), parts["subject"].strip()
    # Where the subject is said twice the first time is meant: templates begin with it.
    constraint = Constraint(text=subject, occurrence=0 if prompt.count(subject) > 1 else None)
    try:
        constraint.span(prompt)
    except InvalidInputError as error:
        raise error.within(field) from None
    return Question(
        prompt=Prompt(text=prompt, chat=False), constraints=(constraint,), answer=parts["attribute"].strip()
    )
