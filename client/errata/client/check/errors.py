"""Why a check could not run. Knows files and lines, nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from errata.client.errors import ErrataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: what, and as far as it is known where. `line` counts from 1; `field` is dotted."""

    message: str
    path: Path | None = None
    line: int | None = None
    field: str = ""

    def __str__(self) -> str:
        file = str(self.path) if self.path else ""
        place = f"{file}:{self.line}" if file and self.line else file
        return ": ".join(part for part in (place, self.field, self.message) if part)


class CheckError(ErrataError):
    """A check that could not run. One line for each of its `problems`, of which there is at least one."""

    default_reason = "CHECK_NOT_RUN"

    def __init__(self, problems: Sequence[Problem], *, reason: str = "") -> None:
        super().__init__("\n".join(map(str, problems)), reason=reason)
        self.problems = tuple(problems)

    @classmethod
    def of(
        cls, message: str, *, path: Path | None = None, line: int | None = None, field: str = "", reason: str = ""
    ) -> "CheckError":
        """The error of one problem. `reason` is that of the error behind it."""
        return cls([Problem(message=message, path=path, line=line, field=field)], reason=reason)
