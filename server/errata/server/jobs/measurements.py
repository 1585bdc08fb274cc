"""The work of a measurement: its questions measured on a version, by whatever kind was asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from errata.editor.delta import Delta, applied
from errata.editor.errors import InvalidInputError
from errata.editor.evaluation import Probe
from errata.editor.measurements.attention import measure_attention
from errata.editor.measurements.constraints import measure_constraints
from errata.editor.measurements.failure import measure_failure
from errata.editor.measurements.findings import Findings
from errata.editor.measurements.knockout import measure_knockout
from errata.editor.measurements.lens import measure_lens
from errata.editor.measurements.noise import measure_noise
from errata.editor.measurements.questions import Cancelled, Progress, Question
from errata.editor.measurements.readout import ReadoutSettings, measure_readout
from errata.editor.measurements.sweep import SweepRequest, measure_sweep
from errata.editor.measurements.swept import SweepSettings
from errata.editor.measurements.windows import measure_windows
from errata.editor.methods import Method
from errata.editor.model import EditableModel
from errata.editor.requests import Context, EditRequest
from errata.editor.statistics import KeyStatistics
from errata.server.conversion import Decoder, MeasurementOrder, measurement_outcome, within_settings
from errata.server.jobs.auto import trace_edit
from errata.server.jobs.edits import own_probes
from errata.server.jobs.findings import findings_files
from errata.server.jobs.running import RunningJob
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobState
from errata.server.models import LoadedModel, Models
from errata.server.store import ArtifactStore
from errata.v1 import measurement_pb2


class Measured(Protocol):
    """What a measurement found, in a type of its own."""

    def findings(self) -> Findings:
        """The same as numbers, plots and tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured: the base as it is, the version's deltas, and what was asked."""

    job: RunningJob
    loaded: LoadedModel
    model: EditableModel
    deltas: tuple[Delta, ...]
    order: MeasurementOrder


Measure = Callable[[Subject], Measured]
"""The work of one kind."""

OF_QUESTIONS: Mapping[str, Callable[..., Measured]] = {
    "noise": measure_noise,
    "constraints": measure_constraints,
    "windows": measure_windows,
    "attention": measure_attention,
    "failure": measure_failure,
    "knockout": measure_knockout,
    "lens": measure_lens,
}
"""Kinds that ask a model questions and need no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Who hears of stages with their steps, of each step, and who says whether to go on."""

    stage: Callable[[str, int], None]
    progress: Progress
    cancelled: Cancelled


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptEdits:
    """What a sweep edits, and the probes that judge it.

    `references` are prompts whose keys stay; `statistics` of them at these layers, None where there are none.
    """

    requests: Sequence[EditRequest]
    probes: Sequence[Probe]
    references: Sequence[Context]
    statistics: Callable[[tuple[int, ...]], KeyStatistics | None]


def read_out(
    model: EditableModel, deltas: Sequence[Delta], questions: Sequence[Question], settings: ReadoutSettings, told: Told
) -> Measured:
    """What the last of the deltas wrote: the model is read with those before it, and then with it."""
    *parent, delta = (*deltas,) or (None,)
    with applied(model, *parent):
        return measure_readout(
            model, questions, settings, delta=delta, progress=told.progress, cancelled=told.cancelled
        )


def sweep(
    model: EditableModel, deltas: Sequence[Delta], edits: SweptEdits, settings: SweepSettings, told: Told
) -> Measured:
    """Edits of the model with the deltas, traced first and then made at every layer. Statistics are of the base."""
    requests = [
        SweepRequest(request=r, probes=tuple(p for p in edits.probes if p.request in (r.name, None)))
        for r in edits.requests
    ]
    told.stage("tracing", len(requests))
    with applied(model, *deltas):
        trace = trace_edit(
            model,
            edits.requests,
            edits.references,
            progress=told.progress,
            cancelled=told.cancelled,
            most=len(edits.requests),
        )
    statistics = None
    if settings.method is not Method.MULTEDIT:
        told.stage("statistics", len(edits.references))
        statistics = edits.statistics(settings.layers or tuple(range(len(model.layers))))
    told.stage("measuring", len(requests))
    with applied(model, *deltas):
        return measure_sweep(
            model,
            requests,
            settings,
            trace=trace,
            statistics=statistics,
            progress=told.progress,
            cancelled=told.cancelled,
        )


class MeasurementWork:
    """Measures. `outbox_notify` wakes whoever tells MLflow; None where nobody does."""

    def __init__(
        self,
        ledger: Ledger,
        models: Models,
        artifacts: ArtifactStore,
        outbox_notify: Callable[[], None] | None,
        decoder: Decoder,
    ) -> None:
        self._ledger, self._models, self._artifacts, self._decoder = ledger, models, artifacts, decoder
        self._outbox_notify = outbox_notify

    def __call__(self, job: RunningJob) -> None:
        """Ends the job SUCCEEDED. Raises what stops it."""
        row = job.row
        order = self._decoder.measurement(measurement_pb2.CreateMeasurementRequest.FromString(row.request))
        job.stage("loading")
        loaded = job.result_of(self._models.load(row.model))
        deltas = tuple(loaded.deltas_of(row.version))
        with loaded.borrow() as model, job.watching(model):
            measured = _measured(Subject(job=job, loaded=loaded, model=model, deltas=deltas, order=order))
        findings = measured.findings()
        job.stage("drawing", len(findings.plots))
        files = findings_files(findings, _told(job))
        job.stage("publish")
        self._artifacts.write(row.id, files)
        result = measurement_outcome(findings, files).SerializeToString(deterministic=True)
        publish = self._outbox_notify is not None
        self._ledger.finish(row.id, JobState.SUCCEEDED, result=result, publish=publish)
        if self._outbox_notify:
            self._outbox_notify()


def _told(job: RunningJob) -> Progress:
    """Progress that a cancelled job stops at: figures take a moment each."""

    def tell(done: int, total: int) -> None:
        job.check()
        job.step(done, total)

    return tell


def _measured(subject: Subject) -> Measured:
    """What the kind found. What its settings are to blame for names them as the request does."""
    kind = subject.order.kind
    try:
        return MEASURES[kind](subject)
    except InvalidInputError as error:
        raise error if error.field.startswith(("questions", "requests")) else within_settings(error, kind) from None


def _of_questions(measure: Callable[..., Measured]) -> Measure:
    """A measurement of the version as it is."""

    def measured(subject: Subject) -> Measured:
        order, job = subject.order, subject.job
        job.stage("measuring", len(order.questions))
        with applied(subject.model, *subject.deltas):
            return measure(subject.model, order.questions, order.settings, progress=job.step, cancelled=job.cancelled)

    return measured


def _readout(subject: Subject) -> Measured:
    """Of the version's own edit."""
    order, job = subject.order, subject.job
    job.stage("measuring", len(order.questions))
    settings = cast(ReadoutSettings, order.settings)
    told = Told(stage=job.stage, progress=job.step, cancelled=job.cancelled)
    return read_out(subject.model, subject.deltas, order.questions, settings, told)


def _sweep(subject: Subject) -> Measured:
    """Edits of the version that nobody keeps."""
    order, job, loaded = subject.order, subject.job, subject.loaded
    edits = SweptEdits(
        requests=order.requests,
        probes=(*own_probes(order.requests), *order.probes),
        references=order.references or loaded.references,
        statistics=lambda layers: loaded.statistics(subject.model, layers, order.references, progress=job.step),
    )
    told = Told(stage=job.stage, progress=job.step, cancelled=job.cancelled)
    return sweep(subject.model, subject.deltas, edits, cast(SweepSettings, order.settings), told)


MEASURES: Mapping[str, Measure] = {
    **{kind: _of_questions(measure) for kind, measure in OF_QUESTIONS.items()},
    "sweep": _sweep,
    "readout": _readout,
}
"""What each kind of `conversion.SETTINGS` is done by."""
