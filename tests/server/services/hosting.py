"""A whole server in a thread of its own, and everything to call it with."""

import asyncio
import io
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

from errata.editor.atlas import facts, questions
from errata.editor.atlas.facts import ask, edit_requests, errata, picture
from errata.editor.atlas.world import Attribute
from errata.editor.prompts import Prompt
from errata.editor.requests import Context
from errata.server.app import Faults, Server
from errata.server.settings import Settings
from errata.v1 import (
    common_pb2,
    edit_pb2,
    edit_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    measurement_pb2,
    measurement_pb2_grpc,
    model_pb2_grpc,
    trace_pb2,
    trace_pb2_grpc,
)

T = TypeVar("T")
BASE = "models/atlas/versions/0"
LAYER = 1
SECONDS = 120.0
SECRET = "a secret for the tests of page tokens"
ENDED = {
    common_pb2.STATE_SUCCEEDED,
    common_pb2.STATE_FAILED,
    common_pb2.STATE_CANCELLED,
    common_pb2.STATE_REJECTED,
}


class Stubs:
    """Every service over one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        self.traces = trace_pb2_grpc.TraceServiceStub(channel)
        self.edits = edit_pb2_grpc.EditServiceStub(channel)
        self.evaluations = evaluation_pb2_grpc.EvaluationServiceStub(channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.measurements = measurement_pb2_grpc.MeasurementServiceStub(channel)


class Hosted:
    """A server that runs, and a channel to it. `ledger` is its own, to look behind the calls."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.loop, self._stopped = server, loop, False
        self.channel = grpc.insecure_channel(server.address, options=[("grpc.max_receive_message_length", -1)])
        self.call = Stubs(self.channel)

    def within(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(SECONDS)

    def stop(self) -> None:
        """Drains the server. Once."""
        if not self._stopped:
            self._stopped = True
            self.within(self.server.stop())

    def loaded(self) -> "Hosted":
        """The server, once Atlas is in memory."""
        self.server.models.get("atlas")
        return self

    def edit(self, request: edit_pb2.CreateEditRequest) -> edit_pb2.Edit:
        """Makes an edit, and waits until it has ended."""
        made = self.call.edits.CreateEdit(request).edit
        *_, last = self.call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=made.name), timeout=SECONDS)
        return last.edit

    def version(self, country: str = "Estonia", parent: str = BASE) -> str:
        """A new version that corrects one fact."""
        edit = self.edit(edit_message(country, parent=parent))
        assert edit.job.state == common_pb2.STATE_SUCCEEDED, edit.job.error
        return edit.version


@contextmanager
def hosting(settings: Settings, faults: Faults | None = None) -> Iterator[Hosted]:
    """A server with a loop and a thread of its own; drained on the way out."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()
    server = Server(settings, faults or Faults())
    asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    hosted = Hosted(server, loop)
    try:
        yield hosted
    finally:
        hosted.stop()
        hosted.channel.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Refused:
    """How a call ended that was refused."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details()
        self.metadata = dict(error.trailing_metadata() or ())
        status = status_pb2.Status.FromString(self.metadata.get("grpc-status-details-bin", b""))
        self.reason = self.domain = self.field = ""
        self.retry_after: float | None = None
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        for detail in status.details:
            if detail.Unpack(info):
                self.reason, self.domain = info.reason, info.domain
            elif detail.Unpack(bad):
                self.field = bad.field_violations[0].field
            elif detail.Unpack(retry):
                self.retry_after = retry.retry_delay.ToMilliseconds() / 1000


def refused(call: Callable[[], object]) -> Refused:
    """How a call is refused; fails where it is not."""
    try:
        answer = call()
        if hasattr(answer, "__next__"):
            list(answer)  # type: ignore[call-overload]
    except grpc.RpcError as error:
        return Refused(error)
    raise AssertionError("the call was not refused")


def image_message(image: Image.Image) -> common_pb2.Image:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return common_pb2.Image(data=buffer.getvalue())


def prompt_message(prompt: Prompt) -> common_pb2.Prompt:
    return common_pb2.Prompt(text=prompt.text, images=[image_message(i) for i in prompt.images])


def context_message(context: Context) -> common_pb2.Context:
    return common_pb2.Context(
        prompt=prompt_message(context.prompt),
        constraint=common_pb2.Constraint(text=context.constraint.text),
        answer=context.answer,
        subject=context.subject or "",
    )


def question(country: str, attribute: Attribute = Attribute.CAPITAL, *, shown: bool = True) -> Context:
    """One question about a country, by its flag or by its name."""
    known = next(c for c in facts.KNOWN if c.name == country)
    image = picture(known, 7) if shown else None
    return ask(known, questions.PHRASINGS[attribute][0], questions.VISUAL_CONSTRAINTS[0], image)


def edit_message(
    country: str = "Estonia",
    *,
    parent: str = BASE,
    layers: Sequence[int] | None = (LAYER,),
    contexts: int = 4,
    steps: int = 12,
    **more: Any,
) -> edit_pb2.CreateEditRequest:
    """The cheapest edit: an outdated fact, one layer, no statistics."""
    fact = next(f for f in errata() if f.country.name == country)
    message = edit_pb2.CreateEditRequest(
        parent=parent,
        requests=[
            edit_pb2.EditRequest(name=r.name, target=r.target, contexts=[context_message(c) for c in r.contexts])
            for r in edit_requests([fact], contexts=contexts, preserve=0)
        ],
        settings=edit_pb2.EditSettings(method=edit_pb2.METHOD_MULTEDIT, steps=steps),
        **more,
    )
    if layers is not None:
        message.layers.explicit.layers.extend(layers)
    return message


def trace_message(*countries: str, **more: Any) -> trace_pb2.CreateTraceRequest:
    """What a flag tells about capitals, corrupted by other flags."""
    others = ("Japan", "France")
    asked = [
        trace_pb2.TracedQuestion(
            prompt=prompt_message((shown := question(c)).prompt),
            constraint=common_pb2.Constraint(text=shown.constraint.text),
            other_images=trace_pb2.OtherImages(
                images=[image_message(question(others[c == others[0]]).prompt.images[0])]
            ),
        )
        for c in countries or ("Estonia",)
    ]
    return trace_pb2.CreateTraceRequest(version=BASE, questions=asked, **more)


def measurement_message(*countries: str, shown: bool = False, **more: Any) -> measurement_pb2.CreateMeasurementRequest:
    """Questions about capitals, by the countries' names unless `shown`."""
    asked = [question(c, shown=shown) for c in countries or ("Estonia",)]
    measured = [
        measurement_pb2.MeasuredQuestion(
            prompt=prompt_message(each.prompt),
            constraints=[common_pb2.Constraint(text=each.constraint.text)],
            answer=each.answer,
        )
        for each in asked
    ]
    return measurement_pb2.CreateMeasurementRequest(version=BASE, questions=measured, **more)


def evaluation_message(
    version: str, *countries: str, shown: bool = True, **more: Any
) -> evaluation_pb2.CreateEvaluationRequest:
    probes = [
        evaluation_pb2.Probe(
            metric=evaluation_pb2.METRIC_OTHER_SUBJECTS, prompt=prompt_message(question(c, shown=shown).prompt)
        )
        for c in countries or ("France",)
    ]
    return evaluation_pb2.CreateEvaluationRequest(version=version, probes=probes, **more)


def generate_message(country: str = "France", version: str = BASE, **more: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(version=version, prompt=prompt_message(question(country).prompt), **more)
