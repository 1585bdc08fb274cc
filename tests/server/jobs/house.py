"""A server's parts without the server: ledger, stores, Atlas; and requests small enough to run often."""

import io
import json
import queue
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from errata.editor.atlas import facts, questions
from errata.editor.atlas.facts import Fact, ask, edit_requests, errata, picture
from errata.editor.atlas.world import Attribute
from errata.editor.prompts import Prompt
from errata.editor.requests import Context, EditRequest
from errata.server.jobs.events import JobEvents
from errata.server.jobs.faults import no_fault
from errata.server.jobs.runner import JobRunner
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, JobRow, JobState
from errata.server.models import Models
from errata.server.store import ArtifactStore, DeltaStore
from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, history_pb2, measurement_pb2, trace_pb2

LAYER = 1
"""Where Atlas looks its facts up."""

SECONDS = 240.0
"""How long a test waits for what must come."""


@dataclass
class House:
    """Everything a runner needs. `published` counts the wake-ups of the outbox."""

    ledger: Ledger
    models: Models
    deltas: DeltaStore
    artifacts: ArtifactStore
    decoder: object
    published: list[str] = field(default_factory=list)

    def create(self, message: object, *, model: str = "atlas", version: int = 0) -> JobRow:
        kind = {
            edit_pb2.CreateEditRequest: JobKind.EDIT,
            trace_pb2.CreateTraceRequest: JobKind.TRACE,
            history_pb2.CreateDerivationRequest: JobKind.DERIVATION,
            history_pb2.CreateBisectionRequest: JobKind.BISECTION,
            evaluation_pb2.CreateEvaluationRequest: JobKind.EVALUATION,
            measurement_pb2.CreateMeasurementRequest: JobKind.MEASUREMENT,
        }[type(message)]
        request = message.SerializeToString(deterministic=True)
        return self.ledger.create_job(kind, model, version=version, request=request, request_id=None, actor="tester")

    def row(self, job: JobRow) -> JobRow:
        return self.ledger.job(job.kind, job.model, job.id)

    def versions(self, model: str = "atlas") -> int:
        return len(self.ledger.versions(model, None, 1000)) - 1


class Seen(JobEvents):
    """Shows every change of a running job to `look`, in the job's own thread: it goes on when that returns."""

    def __init__(self, ledger: Ledger, look: Callable[[JobRow], None]) -> None:
        super().__init__()
        self._ledger, self._look = ledger, look

    def changed(self, job_id: str) -> None:
        super().changed(job_id)
        for row in self._ledger.running():
            if row.id == job_id:
                self._look(row)


class Worker:
    """A runner and what it has ended. `look` is shown every change of a running job."""

    def __init__(
        self,
        house: House,
        fault: Callable[[str], None] = no_fault,
        threads: int = 2,
        look: Callable[[JobRow], None] = lambda _row: None,
    ) -> None:
        self.house, self.events = house, Seen(house.ledger, look)
        self._ended: queue.Queue[JobRow] = queue.Queue()
        self._seen: dict[str, JobRow] = {}
        self.runner = JobRunner(
            house.ledger,
            house.models,
            house.deltas,
            house.artifacts,
            lambda: house.published.append("!"),
            house.decoder,
            events=self.events,
            worker_threads=threads,
            ended=self._ended.put,
            fault=fault,
        )

    def end_of(self, job: JobRow) -> JobRow:
        """How a job ended, once it has."""
        while job.id not in self._seen:
            row = self._ended.get(timeout=SECONDS)
            self._seen[row.id] = row
        return self._seen[job.id]

    def run(self, message: object, *, model: str = "atlas", version: int = 0) -> JobRow:
        job = self.house.create(message, model=model, version=version)
        self.runner.notify()
        return self.end_of(job)


@contextmanager
def working(house: House, *args: object, **kwargs: object):
    worker = Worker(house, *args, **kwargs)
    worker.runner.recover()
    worker.runner.start()
    try:
        yield worker
    finally:
        worker.runner.stop(0)
        assert not worker.runner.running


def fact(country: str) -> Fact:
    """An outdated fact of a country: the euro, for the Baltic states."""
    return next(f for f in errata() if f.country.name == country)


def small_edit(*countries: str, contexts: int = 4, preserve: int = 0) -> list[EditRequest]:
    chosen = [fact(c) for c in countries or ("Estonia",)]
    return list(edit_requests(chosen, contexts=contexts, preserve=preserve))


def edit_message(
    requests: Sequence[EditRequest],
    *,
    layers: Sequence[int] | None = (LAYER,),
    method: edit_pb2.Method = edit_pb2.METHOD_MULTEDIT,
    steps: int = 12,
    target: str | None = None,
) -> edit_pb2.CreateEditRequest:
    """The cheapest edit: one layer, no statistics. `layers` None is AUTO."""
    message = edit_pb2.CreateEditRequest(
        parent="models/atlas/versions/0",
        requests=[
            edit_pb2.EditRequest(
                name=r.name,
                target=target or r.target,
                contexts=[context_message(c, answer=target) for c in r.contexts],
                preserve=[context_message(c) for c in r.preserve],
            )
            for r in requests
        ],
        settings=edit_pb2.EditSettings(method=method, steps=steps),
    )
    if layers is None:
        message.layers.auto = True
    else:
        message.layers.explicit.layers.extend(layers)
    return message


def context_message(context: Context, *, answer: str | None = None) -> common_pb2.Context:
    return common_pb2.Context(
        prompt=prompt_message(context.prompt),
        constraint=common_pb2.Constraint(text=context.constraint.text),
        answer=answer or context.answer,
        subject=context.subject or "",
    )


def prompt_message(prompt: Prompt) -> common_pb2.Prompt:
    return common_pb2.Prompt(text=prompt.text, images=[image_message(i) for i in prompt.images])


def image_message(image: Image.Image) -> common_pb2.Image:
    return common_pb2.Image(data=_png(image))


def probe_message(
    prompt: Prompt, expected: str | None = None, metric: evaluation_pb2.Metric = evaluation_pb2.METRIC_EFFICACY
) -> evaluation_pb2.Probe:
    return evaluation_pb2.Probe(metric=metric, prompt=prompt_message(prompt), expected=expected)


def question(country: str, attribute: Attribute = Attribute.CAPITAL, *, shown: bool = True) -> Context:
    """One question about a country, by its flag or by its name."""
    known = next(c for c in facts.KNOWN if c.name == country)
    image = picture(known, 7) if shown else None
    return ask(known, questions.PHRASINGS[attribute][0], questions.VISUAL_CONSTRAINTS[0], image)


def write_references(folder: Path) -> Path:
    """A few of Atlas's references, as a file."""
    lines = []
    for n, country in enumerate(facts.KNOWN[:10]):
        shown = question(country.name, list(Attribute)[n % 4], shown=n % 2 == 0)
        (folder / f"{n}.png").write_bytes(_png(shown.prompt.images[0])) if shown.prompt.images else None
        images = [f"{n}.png"] if shown.prompt.images else []
        line = {"text": shown.prompt.text, "constraint": shown.constraint.text, "images": images}
        lines.append(json.dumps({**line, "subject": shown.subject}))
    path = folder / "references.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def succeeded(row: JobRow) -> JobRow:
    assert row.state is JobState.SUCCEEDED, row.failure
    return row


def trace_message(n: int) -> trace_pb2.CreateTraceRequest:
    """Questions about known flags, corrupted by other countries' flags."""
    return trace_pb2.CreateTraceRequest(
        version="models/atlas/versions/0",
        questions=[
            trace_pb2.TracedQuestion(
                prompt=prompt_message(r.prompt),
                constraint=common_pb2.Constraint(text=r.constraint.text),
                answer=r.answer,
                other_images=trace_pb2.OtherImages(images=[image_message(i) for i in r.corruption.images]),
            )
            for r in facts.trace_requests(n)
        ],
    )
