"""One check from the probes to the report. Writes nothing."""

from errata.client.check.answering import Answerer, Step
from errata.client.check.baseline import Baseline
from errata.client.check.checks import Checks
from errata.client.check.errors import CheckError
from errata.client.check.judging import Report, Subject, judge


def needs_baseline(checks: Checks, option: str = "--baseline") -> None:
    """Raises CheckError where a probe has to be unchanged; for checks that have nothing to compare with.

    `option` is what gives one.
    """
    for probe in checks.probes:
        if probe.unchanged:
            message = f"{probe.id!r} has to be unchanged, and there is no baseline; give {option} VERSION or a file"
            raise CheckError.of(message, path=checks.path, line=probe.line)


def run_checks(
    checks: Checks, version: Answerer, baseline: Answerer | Baseline | None, step: Step = lambda: None
) -> Report:
    """Asks the version, and the baseline where it is one, and judges. `step` is called for each answer.

    Raises CheckError for a baseline that is missing or lacks answers, before anything is asked, and for probes that
    cannot be asked; ErrataError where the server fails.
    """
    if baseline is None:
        needs_baseline(checks)
    before = baseline.answers_to(checks) if isinstance(baseline, Baseline) else {}
    answers = version.answers(checks.path, checks.probes, step)
    if baseline is not None and not isinstance(baseline, Baseline):
        before = baseline.answers(checks.path, checks.probes, step)
    outcomes, shares = judge(checks, answers, before)
    compared = baseline.subject if baseline else None
    return Report(
        checks=checks,
        version=version.subject,
        baseline=compared,
        outcomes=outcomes,
        shares=shares,
        notes=_notes(version.subject, compared),
    )


def _notes(version: Subject, baseline: Subject | None) -> tuple[str, ...]:
    if baseline is None:
        return ()
    if baseline.base_sha256 != version.base_sha256:
        bases = f"{baseline.base_sha256[:12]}… and {version.base_sha256[:12]}…"
        return (f"{baseline.name} and {version.name} have different bases: {bases}",)
    if baseline.delta_sha256 == version.delta_sha256:
        return (f"{baseline.name} and {version.name} are the same: nothing can have changed between them",)
    return ()
