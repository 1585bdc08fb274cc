"""What every form of output says alike. Pure."""

from errata.client.check.checks import Probe
from errata.client.check.judging import Change, Outcome, Report, TagShare, Verdict


def state(outcome: Outcome) -> str:
    """A probe's state in a word: "broken", "fixed", "failing", "passed"."""
    if outcome.change in (Change.BROKEN, Change.FIXED):
        return outcome.change.value
    return "passed" if outcome.verdict is Verdict.PASSED else "failing"


def explained(outcome: Outcome) -> str:
    """What is wrong with an answer, and whether that is put up with."""
    said = "; ".join(outcome.faults)
    return f"{said} (its tags' thresholds are met)" if outcome.verdict is Verdict.TOLERATED else said


def threshold(share: TagShare) -> str:
    """A threshold and what was reached of it."""
    return f"{share.tag}: {share.share:.3f} of {share.probes} probes, at least {share.least:g} wanted"


def compared(report: Report) -> str:
    """What was asked, and what it was held against."""
    return f"{report.version.name} against {report.baseline.name}" if report.baseline else report.version.name


def verdict(report: Report) -> str:
    """The whole check in a line; "regressed" where a probe fails that the baseline passes, else "failing"."""
    tolerated = sum(o.verdict is Verdict.TOLERATED for o in report.outcomes)
    parts = [f"{len(report.failed)} of {len(report.outcomes)} probes fail"] if report.failed else []
    parts += [f"{tolerated} of {len(report.outcomes)} fail within their thresholds"] if tolerated else []
    parts += [threshold(share) for share in report.shares if not share.met]
    said = "; ".join(parts) or f"all {len(report.outcomes)} probes hold"
    regressed = any(o.change is Change.BROKEN for o in report.failed)
    return f"{'passed' if report.passed else 'regressed' if regressed else 'failing'}: {said}"


def question(probe: Probe) -> str:
    """The question, with its pictures' names."""
    images = ", ".join(image.name for image in probe.question.images)
    return f"{probe.question.prompt} [{images}]" if images else probe.question.prompt
