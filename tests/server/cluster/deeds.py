"""What the tests have workers do. Workers import it, so it is a module of its own, and a small one."""

import os
from pathlib import Path

from errata.editor.errors import InvalidInputError


def nothing() -> None:
    return None


def refuses() -> None:
    raise InvalidInputError("there is nothing here; look elsewhere", field="source")


def once_deadly(_held: None, marks: Path) -> int:
    """Kills the first worker that takes it."""
    mark = marks / "killed"
    if not mark.exists():
        mark.touch()
        os._exit(1)
    return os.getpid()


def as_told(_held: None, told: str) -> str:
    """Answers, refuses, or kills its worker."""
    if told == "die":
        os._exit(1)
    if told == "refuse":
        raise InvalidInputError("no", field="told")
    return told
