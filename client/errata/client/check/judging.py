"""What the answers mean: which probes hold, what changed against the baseline, which thresholds are met. Pure."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from errata.client.check.checks import Checks, Match, Probe

_ROUNDING = 1e-9
"""Shares are sums of weights over a sum of weights; so much of one is not a regression."""


class Verdict(StrEnum):
    """How a probe ended. TOLERATED: it fails, and its tags' thresholds are met all the same."""

    PASSED = "passed"
    TOLERATED = "tolerated"
    FAILED = "failed"


class Change(StrEnum):
    """What became of a probe since the baseline; UNKNOWN without one."""

    NONE = "none"
    BROKEN = "broken"
    FIXED = "fixed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A version that was asked. `delta_sha256` is empty for a base; both hashes are where they are not known."""

    name: str
    base_sha256: str = ""
    delta_sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A probe, the version's answer and the baseline's (None: there is none). `faults` are empty where it holds."""

    probe: Probe
    answer: str
    before: str | None
    faults: tuple[str, ...]
    verdict: Verdict
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class TagShare:
    """The weighted share, 0-1, of a tag's `probes` that hold, and the least that it has to be."""

    tag: str
    probes: int
    share: float
    least: float

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.share >= self.least - _ROUNDING


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole check. `notes` are what a reader should know and no regression."""

    checks: Checks
    version: Subject
    baseline: Subject | None
    outcomes: tuple[Outcome, ...]
    shares: tuple[TagShare, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing regressed. Where a threshold is not met, at least one of its probes has FAILED."""
        return not self.failed

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The probes that count against the version."""
        return tuple(o for o in self.outcomes if o.verdict is Verdict.FAILED)


def judge(
    checks: Checks, answers: Mapping[str, str], before: Mapping[str, str]
) -> tuple[tuple[Outcome, ...], tuple[TagShare, ...]]:
    """The outcome of each probe, and of each threshold. Answers are by the probes' ids; `before` may lack some."""
    faults = {p.id: _faults(p, answers[p.id], before.get(p.id)) for p in checks.probes}
    shares = tuple(_share(checks.probes, tag, least, faults) for tag, least in checks.thresholds.items())
    met = {share.tag: share.met for share in shares}
    outcomes = tuple(
        Outcome(
            probe=p,
            answer=answers[p.id],
            before=before.get(p.id),
            faults=faults[p.id],
            verdict=_verdict(faults[p.id], [met[tag] for tag in p.tags if tag in met]),
            change=_change(p, faults[p.id], before.get(p.id)),
        )
        for p in checks.probes
    )
    return outcomes, shares


def same_answer(a: str, b: str) -> bool:
    """Whether two answers are the same but for case, outer spaces and a closing full stop."""
    return _folded(a) == _folded(b)


def says(answer: str, text: str) -> bool:
    """Whether an answer has a text in it as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(_folded(text))}(?!\w)", _folded(answer)) is not None


def _folded(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def _faults(probe: Probe, answer: str, before: str | None) -> tuple[str, ...]:
    found = []
    agrees = same_answer if probe.match is Match.EXACT else says
    if probe.expected and not any(agrees(answer, each) for each in probe.expected):
        found.append(f"expected {' or '.join(map(repr, probe.expected))}, got {answer!r}")
    if said := [each for each in probe.must_not if says(answer, each)]:
        found.append(f"must not say {' or '.join(map(repr, said))}, got {answer!r}")
    if probe.unchanged and before is not None and not same_answer(answer, before):
        found.append(f"was {before!r}, now {answer!r}")
    return tuple(found)


def _share(probes: Sequence[Probe], tag: str, least: float, faults: Mapping[str, tuple[str, ...]]) -> TagShare:
    tagged = [p for p in probes if tag in p.tags]
    held = math.fsum(p.weight for p in tagged if not faults[p.id])
    return TagShare(tag=tag, probes=len(tagged), share=held / math.fsum(p.weight for p in tagged), least=least)


def _verdict(faults: tuple[str, ...], thresholds: Sequence[bool]) -> Verdict:
    if not faults:
        return Verdict.PASSED
    return Verdict.TOLERATED if thresholds and all(thresholds) else Verdict.FAILED


def _change(probe: Probe, faults: tuple[str, ...], before: str | None) -> Change:
    if before is None:
        return Change.UNKNOWN
    held = not _faults(probe, before, before)
    if held == (not faults):
        return Change.NONE
    return Change.BROKEN if held else Change.FIXED
