"""What a job was asked stays what it was, whatever moves, changes or goes while it waits; and a retry is the first one.

The server's only worker stands still in front of an edit, so that everything else waits as long as a test wants.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from hosting import (
    BASE,
    SECONDS,
    Hosted,
    edit_message,
    evaluation_message,
    hosting,
    question,
    refused,
    trace_message,
)

from errata.editor.atlas.world import Attribute
from errata.server.app import Faults
from errata.server.ledger.rows import JobKind
from errata.server.settings import Settings
from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, model_pb2, trace_pb2

pytestmark = pytest.mark.slow

ATLAS = "models/atlas"


class Gatekeeper:
    """Holds the first edit that is begun while it is shut."""

    def __init__(self) -> None:
        self.open, self.holds = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, stage: str) -> None:
        if stage == "queued" and not self.open.is_set():
            self.holds.set()
            assert self.open.wait(SECONDS)


class Held:
    """A server that can be made to wait. `folder` is where it reads images."""

    def __init__(self, hosted: Hosted, keeper: Gatekeeper, folder: Path) -> None:
        self.hosted, self.call, self.folder, self._keeper = hosted, hosted.call, folder, keeper

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While open, nothing that is queued is begun."""
        self._keeper.open.clear()
        first = self.call.edits.CreateEdit(edit_message("Estonia", contexts=1, steps=1)).edit
        assert self._keeper.holds.wait(SECONDS)
        try:
            yield
        finally:
            self.call.edits.CancelEdit(edit_pb2.CancelEditRequest(name=first.name))
            self._keeper.holds.clear()
            self._keeper.open.set()

    def alias(self, alias: str, version: str) -> str:
        promoted = self.call.models.Promote(model_pb2.PromoteRequest(version=version, alias=alias))
        return str(promoted.alias.name)

    def judged(self, name: str) -> evaluation_pb2.Evaluation:
        watch = evaluation_pb2.WatchEvaluationRequest(name=name)
        *_, last = self.call.evaluations.WatchEvaluation(watch, timeout=SECONDS)
        return last.evaluation

    def delete(self, version: str) -> None:
        self.call.models.DeleteVersion(model_pb2.DeleteVersionRequest(name=version))

    def file(self, name: str, data: bytes) -> str:
        (self.folder / name).write_bytes(data)
        return f"file://{self.folder / name}"

    def audit(self) -> list[model_pb2.AuditEntry]:
        asked = model_pb2.ListAuditEntriesRequest(parent=ATLAS, page_size=1000)
        return list(self.call.models.ListAuditEntries(asked).entries)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    folder, keeper = tmp_path_factory.mktemp("images"), Gatekeeper()
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"),
        port=0,
        mlflow_uri="none",
        worker_threads=1,
        image_schemes=("file",),
        image_folders=(folder,),
        max_image_bytes=200_000,
        requests_per_minute=1_000_000,
        drain_seconds=5.0,
    )
    with hosting(settings, Faults(edit=keeper)) as hosted:
        yield Held(hosted.loaded(), keeper, folder)


def by_uri(held: Held, country: str = "Estonia", **more: object) -> edit_pb2.CreateEditRequest:
    """An edit whose pictures lie in files, one file a context."""
    request = edit_message(country, contexts=4, **more)
    for n, context in enumerate(request.requests[0].contexts):
        for image in context.prompt.images:
            image.uri = held.file(f"{country}-{n}.png", image.data)
    return request


def test_an_evaluation_judges_what_its_aliases_meant_when_it_was_asked_for(held: Held) -> None:
    version = held.hosted.version("Estonia")
    judged, rival = held.alias("judged", BASE), held.alias("rival", version)
    request = evaluation_message(judged, baseline=rival)
    request.probes[0].prompt.images[0].CopyFrom(edit_message("Estonia").requests[0].contexts[0].prompt.images[0])
    request.probes[0].prompt.text = question("Estonia", Attribute.CURRENCY).prompt.text
    with held.waiting():
        made = held.call.evaluations.CreateEvaluation(request).evaluation
        assert (made.version, made.baseline) == (BASE, version)
        held.alias("judged", version), held.alias("rival", BASE)
        held.alias("judged", BASE)  # so that no alias keeps the version from being deleted
        kept = refused(lambda: held.delete(version))
        assert (kept.code, kept.reason, kept.field) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "VERSION_IN_USE",
            "name",
        )
        assert made.name.rpartition("/")[2] in kept.message
        got = held.call.evaluations.GetEvaluation(evaluation_pb2.GetEvaluationRequest(name=made.name)).evaluation
        assert got.baseline == version
    done = held.judged(made.name)
    assert done.job.state == common_pb2.STATE_SUCCEEDED, done.job.error
    assert (done.version, done.baseline) == (BASE, version)
    assert (done.results[0].before, done.results[0].after) == ("euro", "kroon")
    held.delete(version)


def test_an_edit_uses_the_pictures_that_lay_there_when_it_was_asked_for(held: Held) -> None:
    expected = held.hosted.edit(edit_message("Latvia", contexts=4))
    request = by_uri(held, "Latvia")
    with held.waiting():
        made = held.call.edits.CreateEdit(request).edit
        for n, file in enumerate(held.folder.glob("Latvia-*.png")):
            file.unlink() if n % 2 else file.write_bytes(b"no picture any more")
    *_, last = held.call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=made.name), timeout=SECONDS)
    assert last.edit.job.state == common_pb2.STATE_SUCCEEDED, last.edit.job.error
    versions = [
        held.call.models.GetVersion(model_pb2.GetVersionRequest(name=e.version)).version for e in (expected, last.edit)
    ]
    assert versions[0].delta_sha256 == versions[1].delta_sha256
    row = held.hosted.server.stores.ledger.job(JobKind.EDIT, "atlas", made.name.rpartition("/")[2])
    assert b"file://" not in row.request


@pytest.mark.parametrize("kind", ["edit", "trace", "evaluation"])
def test_a_retry_is_the_first_job_though_its_alias_version_and_pictures_are_gone(held: Held, kind: str) -> None:
    version = held.hosted.version("Lithuania")
    alias = held.alias("retried", version)
    request = _asked(held, kind, alias)
    with held.waiting():
        first = _create(held, request)
        _cancel(held, first)
    for file in held.folder.iterdir():
        file.write_bytes(b"no picture any more")
    held.alias("retried", BASE)
    held.delete(version)
    before = held.audit()
    assert _create(held, request) == first
    request.request_id = "another-one"
    gone = refused(lambda: _create(held, request))
    assert (gone.code, gone.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_IMAGE")
    request.request_id = f"retried-{kind}"
    field = "parent" if kind == "edit" else "version"
    setattr(request, field, BASE)
    other = refused(lambda: _create(held, request))
    assert (other.code, other.reason, other.field) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "REQUEST_ID_REUSED",
        "request_id",
    )
    assert held.audit() == before


Request = edit_pb2.CreateEditRequest | trace_pb2.CreateTraceRequest | evaluation_pb2.CreateEvaluationRequest


def _asked(held: Held, kind: str, version: str) -> Request:
    """A job about pictures in files."""
    if kind == "edit":
        return by_uri(held, parent=version, request_id="retried-edit")
    if kind == "trace":
        trace = trace_message("Estonia", request_id="retried-trace")
        trace.version = version
        image = trace.questions[0].other_images.images[0]
        image.uri = held.file("other.png", image.data)
        return trace
    evaluation = evaluation_message(version, request_id="retried-evaluation")
    image = evaluation.probes[0].prompt.images[0]
    image.uri = held.file("probe.png", image.data)
    return evaluation


def _create(held: Held, request: Request) -> str:
    call = held.call
    match request:
        case edit_pb2.CreateEditRequest():
            return str(call.edits.CreateEdit(request).edit.name)
        case trace_pb2.CreateTraceRequest():
            return str(call.traces.CreateTrace(request).trace.name)
        case _:
            return str(call.evaluations.CreateEvaluation(request).evaluation.name)


def _cancel(held: Held, name: str) -> None:
    cancel: dict[str, Callable[[], object]] = {
        "edits": lambda: held.call.edits.CancelEdit(edit_pb2.CancelEditRequest(name=name)),
        "traces": lambda: held.call.traces.CancelTrace(trace_pb2.CancelTraceRequest(name=name)),
        "evaluations": lambda: held.call.evaluations.CancelEvaluation(
            evaluation_pb2.CancelEvaluationRequest(name=name)
        ),
    }
    cancel[name.split("/")[2]]()


@pytest.mark.parametrize("data", [b"no picture", bytes(200_001), None], ids=["no picture", "too many bytes", "no file"])
def test_what_lies_at_a_uri_is_looked_at_before_anything_is_queued(held: Held, data: bytes | None) -> None:
    before, request = held.audit(), by_uri(held)
    if data is None:
        (held.folder / "Estonia-1.png").unlink()
    else:
        held.file("Estonia-1.png", data)
    for request.validate_only in (False, True):
        found = refused(lambda: held.call.edits.CreateEdit(request))
        assert (found.code, found.reason, found.field) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_IMAGE",
            "requests[0].contexts[1].prompt.images[0].uri",
        )
    assert held.audit() == before
