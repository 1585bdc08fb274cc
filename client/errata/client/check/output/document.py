"""A report as one JSON document, for other programs. Its fields stay as they are within a release's major version."""

from errata.client.check.judging import Outcome, Report, Subject
from errata.client.check.output.words import state
from errata.client.results import JsonValue


def document(report: Report) -> JsonValue:
    """The report; shares are 0-1, `before` is null without a baseline's answer."""
    return {
        "passed": report.passed,
        "checks": str(report.checks.path),
        "version": _subject(report.version),
        "baseline": _subject(report.baseline) if report.baseline else None,
        "probes": [_probe(outcome) for outcome in report.outcomes],
        "thresholds": [
            {"tag": s.tag, "probes": s.probes, "share": s.share, "least": s.least, "met": s.met} for s in report.shares
        ],
        "notes": list(report.notes),
    }


def _subject(subject: Subject) -> JsonValue:
    return {"name": subject.name, "base_sha256": subject.base_sha256, "delta_sha256": subject.delta_sha256}


def _probe(outcome: Outcome) -> JsonValue:
    probe = outcome.probe
    return {
        "id": probe.id,
        "line": probe.line,
        "prompt": probe.question.prompt,
        "images": [str(image) for image in probe.question.images],
        "tags": list(probe.tags),
        "weight": probe.weight,
        "answer": outcome.answer,
        "before": outcome.before,
        "verdict": outcome.verdict.value,
        "state": state(outcome),
        "faults": list(outcome.faults),
    }
