"""What the tests have workers do. Workers import it, so it is a module of its own, and a small one."""

import os
from contextlib import suppress
from pathlib import Path
from select import select

from ray.exceptions import OutOfMemoryError

from errata.editor.errors import InvalidInputError


class Unsendable:
    """An answer on whose way the worker is ended for its memory."""

    def __reduce__(self) -> str:
        raise OutOfMemoryError("the node is running out of memory")


def nothing() -> None:
    return None


class Looked:
    """Opens the GPUs that its worker saw when it was sent there, before anything of it could be imported."""

    def __init__(self, seen: str = "all") -> None:
        self._seen = seen

    def __reduce__(self) -> tuple[object, ...]:
        return _looked, ()

    def __call__(self) -> str:
        return self._seen


def _looked() -> Looked:
    return Looked(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))


def opens_twice(marks: Path) -> None:
    """Opens for two workers, and for none after them."""
    for n in range(2):
        try:
            return (marks / f"opened {n}").touch(exist_ok=False)
        except FileExistsError:
            continue
    raise InvalidInputError("there is no third", field="marks")


def refuses() -> None:
    raise InvalidInputError("there is nothing here; look elsewhere", field="source")


def refuses_before_another_opens(marks: Path) -> None:
    """Refuses in the first worker; opens in the second, once the first is gone."""
    try:
        (marks / "first").symlink_to(str(os.getpid()))
    except FileExistsError:
        with suppress(ProcessLookupError):
            select([os.pidfd_open(int(str((marks / "first").readlink())))], [], [], 60)
    else:
        refuses()


def once_deadly(_held: str | None, marks: Path) -> int:
    """Kills the first worker that takes it."""
    try:
        (marks / "killed").touch(exist_ok=False)
    except FileExistsError:
        return os.getpid()
    os._exit(1)


def as_told(held: str | None, told: str) -> object:
    """Answers, refuses, fails, or kills its worker."""
    if told == "die":
        os._exit(1)
    if told == "grow":
        return Unsendable()
    if told == "fail":
        raise RuntimeError("CUDA error: an illegal access")
    if told == "look":
        return held
    if told == "refuse":
        raise InvalidInputError("no", field="told")
    return told
