"""What running a command gives, and the commands that most tests begin with."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CAPITAL = "What is the capital of Kazakhstan?"
QUICK = ("--layers", "1", "--steps", "20", "--method", "multedit")
"""The cheapest edit: one layer, and a method without statistics."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


def edited(errata: Run, *more: object, target: str = "Astana", question: str = CAPITAL, on: str = "atlas@0") -> str:
    """A new version, by its short name."""
    subject = question.rpartition(" ")[2].rstrip("?")
    ran = errata("edit", question, "--constraint", subject, "--target", target, "--on", on, *QUICK, "--json", *more)
    assert ran.code == 0, ran.err
    name = ran.json()["version"]
    return f"atlas@{name.rpartition('/')[2]}"
