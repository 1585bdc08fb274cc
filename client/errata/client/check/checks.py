"""A file of checks as the rest takes it: probes with their places, and thresholds. Pure; `format.py` reads files."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path


class Match(StrEnum):
    """How an answer is held against what is expected: it is that, or has it in it as whole words."""

    EXACT = "exact"
    CONTAINS = "contains"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked. `raw` goes without the model's chat template; `max_new_tokens` bounds the answer."""

    prompt: str
    images: tuple[Path, ...] = ()
    raw: bool = False
    max_new_tokens: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One question and what its answer has to be; every expectation that is given has to hold.

    `expected`: one of these. `must_not`: none of these, as whole words. `unchanged`: as the baseline answers. `weight`
    is what it counts in the shares of its tags. `line` is where it stands in its file, counted from 1.
    """

    id: str
    question: Question
    expected: tuple[str, ...] = ()
    match: Match = Match.EXACT
    must_not: tuple[str, ...] = ()
    unchanged: bool = False
    tags: tuple[str, ...] = ()
    weight: float = 1.0
    line: int

    @property
    def wanted(self) -> str:
        """What it expects, in words."""
        said = [" or ".join(self.expected)] if self.expected else []
        said += ["as before"] if self.unchanged else []
        said += [f"not {' or '.join(self.must_not)}"] if self.must_not else []
        return ", ".join(said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """A file of checks.

    `thresholds` are least weighted shares, 0-1, by tag. A probe with such a tag may fail as long as the share of each
    of its thresholds is reached; any other probe has to pass. `baseline` is the file of answers that it names.
    """

    path: Path
    probes: tuple[Probe, ...]
    thresholds: Mapping[str, float] = field(default_factory=dict, hash=False)
    baseline: Path | None = None

    def judged_with(self, ids: Collection[str]) -> "Checks":
        """The checks that a verdict on these probes needs: themselves, and all that share a threshold with them."""
        shared = {t for p in self.probes if p.id in ids for t in p.tags if t in self.thresholds}
        needed = tuple(p for p in self.probes if p.id in ids or shared & set(p.tags))
        return replace(self, probes=needed, thresholds={t: s for t, s in self.thresholds.items() if t in shared})
