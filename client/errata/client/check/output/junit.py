"""A report as JUnit XML: one test case a probe, one a threshold.

A failing probe that its thresholds put up with is a skipped one, so that the file fails where the check does.
"""

import re
from xml.etree import ElementTree

from errata.client.check.judging import Outcome, Report, Verdict
from errata.client.check.output.words import explained, question, threshold

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, not even escaped."""


def junit(report: Report) -> str:
    """The whole file."""
    missed = sum(not share.met for share in report.shares)
    tolerated = sum(o.verdict is Verdict.TOLERATED for o in report.outcomes)
    suite = ElementTree.Element(
        "testsuite",
        name=_plain(f"errata check {report.checks.path}"),
        tests=str(len(report.outcomes) + len(report.shares)),
        failures=str(len(report.failed) + missed),
        errors="0",
        skipped=str(tolerated),
    )
    _properties(suite, report)
    for outcome in report.outcomes:
        _probe(suite, report, outcome)
    for share in report.shares:
        case = ElementTree.SubElement(suite, "testcase", classname="threshold", name=_plain(share.tag))
        if not share.met:
            ElementTree.SubElement(case, "failure", message=_plain(threshold(share)))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _properties(suite: ElementTree.Element, report: Report) -> None:
    named = {"version": report.version.name, "base_sha256": report.version.base_sha256}
    if report.baseline:
        named["baseline"] = report.baseline.name
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in named.items():
        ElementTree.SubElement(properties, "property", name=name, value=_plain(value))


def _probe(suite: ElementTree.Element, report: Report, outcome: Outcome) -> None:
    probe = outcome.probe
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=_plain(report.version.name),
        name=_plain(probe.id),
        file=_plain(report.checks.path.as_posix()),
        line=str(probe.line),
    )
    if outcome.verdict is Verdict.PASSED:
        return
    kind = "failure" if outcome.verdict is Verdict.FAILED else "skipped"
    failure = ElementTree.SubElement(case, kind, message=_plain(explained(outcome)))
    failure.text = _plain(f"{report.checks.path}:{probe.line}\n{question(probe)}\n{explained(outcome)}")


def _plain(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
