"""The gate: who may pass, how often, and how every end looks on the wire, in the log and in the figures."""

import asyncio
import io
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import grpc
import pytest
from hosting import Refused, refused

from errata.editor.errors import ConstraintNotFoundError
from errata.server.errors import BusyError, NotFoundError
from errata.server.interceptors import Gate
from errata.server.ledger.rows import TokenRow
from errata.server.logs import JsonFormatter
from errata.server.metrics import Metrics
from errata.server.security import Authenticator, RateLimiter
from errata.server.services.calls import Context, caller
from errata.v1 import edit_pb2, edit_pb2_grpc, inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """Raises what it is told to; answers with the caller's name."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.left = threading.Event()

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        if self.error:
            raise self.error
        return inference_pb2.GenerateResponse(text=caller().name)

    async def StreamGenerate(  # noqa: N802
        self, request: inference_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        yield inference_pb2.StreamGenerateResponse(text=caller().name)
        if self.error:
            raise self.error
        try:
            await asyncio.Event().wait()
        finally:
            self.left.set()


class Edits(edit_pb2_grpc.EditServiceServicer):
    async def CreateEdit(  # noqa: N802
        self, request: edit_pb2.CreateEditRequest, context: Context
    ) -> edit_pb2.CreateEditResponse:
        return edit_pb2.CreateEditResponse(edit=edit_pb2.Edit(name="models/atlas/edits/7"))


class ModelLists(model_pb2_grpc.ModelServiceServicer):
    async def ListModels(  # noqa: N802
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse()


class Behind:
    """A gate with services behind it, in a loop of its own."""

    def __init__(self, loop: asyncio.AbstractEventLoop, roles: dict[str, dict[str, str]] | None, limit: int) -> None:
        self.loop, self.inference = loop, Inference()
        self.metrics = Metrics(lambda: ())
        self.roles = roles or {}
        self.gate = Gate(
            Authenticator(None if roles is None else self._lookup),
            RateLimiter(limit, burst=limit),
            self.metrics,
            max_message_bytes=2**20,
            most_of_a_caller=3,
        )
        self.log = io.StringIO()
        self.channel: grpc.Channel

    def _lookup(self, secret: str) -> TokenRow | None:
        found = self.roles.get(secret)
        now = datetime.now(UTC)
        return TokenRow(name=secret, roles=found, create_time=now, revoked=False) if found else None

    async def start(self) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[self.gate])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.inference, server)
        edit_pb2_grpc.add_EditServiceServicer_to_server(Edits(), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelLists(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        return server

    def generate(self, version: str = "models/atlas", token: str = "") -> inference_pb2.GenerateResponse:
        stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        return stub.Generate(inference_pb2.GenerateRequest(version=version), metadata=_bearer(token))

    def stream(self, version: str = "models/atlas", token: str = "") -> Iterator[inference_pb2.StreamGenerateResponse]:
        stub = inference_pb2_grpc.InferenceServiceStub(self.channel)
        request = inference_pb2.StreamGenerateRequest(request=inference_pb2.GenerateRequest(version=version))
        return stub.StreamGenerate(request, metadata=_bearer(token))

    def settled(self) -> None:
        """Waits until every call has left the gate."""
        asyncio.run_coroutine_threadsafe(self.gate.idle(), self.loop).result(60)

    @property
    def lines(self) -> list[dict[str, object]]:
        self.settled()
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def calls(self, method: str, code: str) -> float | None:
        self.settled()
        return self.metrics.registry.get_sample_value(
            "errata_calls_total", {"method": f"/errata.v1.InferenceService/{method}", "code": code}
        )


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


@contextmanager
def behind(roles: dict[str, dict[str, str]] | None = None, limit: int = 1000) -> Iterator[Behind]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    placed = Behind(loop, roles, limit)
    handler = logging.StreamHandler(placed.log)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("errata.server.interceptors")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    server = asyncio.run_coroutine_threadsafe(placed.start(), loop).result()
    try:
        yield placed
    finally:
        placed.channel.close()
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture
def placed() -> Iterator[Behind]:
    with behind() as found:
        yield found


Ask = Callable[[Behind], Refused]
BOTH: list[Ask] = [lambda p: refused(p.generate), lambda p: refused(p.stream)]


@pytest.mark.parametrize("ask", BOTH, ids=["unary", "streaming"])
def test_an_error_raised_on_purpose_keeps_its_reason_and_field(placed: Behind, ask: Ask) -> None:
    placed.inference.error = ConstraintNotFoundError("no such words; copy them", field="constraint.text")
    found = ask(placed)
    assert (found.code, found.reason, found.field, found.message, found.domain) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "CONSTRAINT_NOT_FOUND",
        "constraint.text",
        "no such words; copy them",
        "errata",
    )


@pytest.mark.parametrize("ask", BOTH, ids=["unary", "streaming"])
def test_a_busy_server_says_when_to_come_back_to_callers_and_to_grpc(placed: Behind, ask: Ask) -> None:
    placed.inference.error = BusyError("full", retry_after=1.5)
    found = ask(placed)
    assert (found.code, found.reason, found.retry_after) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "BUSY", 1.5)
    assert found.metadata["grpc-retry-pushback-ms"] == "1500"


@pytest.mark.parametrize("ask", BOTH, ids=["unary", "streaming"])
def test_an_unknown_error_shows_an_id_and_its_traceback_only_in_the_log(placed: Behind, ask: Ask) -> None:
    placed.inference.error = ZeroDivisionError("secret detail")
    found = ask(placed)
    assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in found.message
    assert "Traceback" not in found.message
    line = next(line for line in placed.lines if "exception" in line)
    assert str(line["error_id"]) in found.message
    assert "secret detail" in str(line["exception"])


def test_a_message_too_long_for_metadata_is_cut(placed: Behind) -> None:
    placed.inference.error = NotFoundError("ж" * 100_000, field="x" * 100_000)
    found = refused(placed.generate)
    assert found.code is grpc.StatusCode.NOT_FOUND
    assert found.message.endswith("…")


def test_a_caller_who_leaves_ends_the_handler_and_is_logged_as_cancelled(placed: Behind) -> None:
    stream = placed.stream()
    next(stream)
    stream.cancel()  # type: ignore[attr-defined]
    assert placed.inference.left.wait(60)
    assert placed.lines[-1]["code"] == "CANCELLED"
    assert placed.calls("StreamGenerate", "CANCELLED") == 1.0


def test_a_caller_with_too_many_open_calls_is_refused_more_and_nobody_else_is() -> None:
    roles = {"ada": {"*": "reader"}, "bob": {"*": "reader"}}
    with behind(roles) as placed:
        streams = [placed.stream(token="ada") for _ in range(3)]
        for stream in streams:
            next(stream)
        found = refused(lambda: placed.generate(token="ada"))
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "BUSY")
        assert found.retry_after
        assert placed.generate(token="bob").text == "bob"
        for stream in streams:
            stream.cancel()  # type: ignore[attr-defined]
        placed.settled()
        assert placed.generate(token="ada").text == "ada"


def test_every_call_is_logged_with_its_method_caller_operation_code_and_time(placed: Behind) -> None:
    placed.generate("models/atlas/versions/3")
    line = placed.lines[-1]
    assert line["method"] == "/errata.v1.InferenceService/Generate"
    assert (line["operation"], line["caller"], line["code"]) == ("models/atlas/versions/3", "anonymous", "OK")
    assert isinstance(line["milliseconds"], float)


def test_a_created_job_is_logged_under_its_own_name(placed: Behind) -> None:
    edit_pb2_grpc.EditServiceStub(placed.channel).CreateEdit(edit_pb2.CreateEditRequest(parent="models/atlas"))
    assert placed.lines[-1]["operation"] == "models/atlas/edits/7"


def test_a_line_break_in_a_request_makes_no_line_in_the_log(placed: Behind) -> None:
    placed.generate('models/atlas\n{"level": "FAKE"}')
    assert [line["level"] for line in placed.lines] == ["INFO"]


def test_calls_are_counted_by_method_and_code(placed: Behind) -> None:
    placed.generate()
    placed.inference.error = BusyError("full")
    refused(placed.generate)
    assert placed.calls("Generate", "OK") == 1.0
    assert placed.calls("Generate", "RESOURCE_EXHAUSTED") == 1.0
    active = {"method": "/errata.v1.InferenceService/Generate"}
    assert placed.metrics.registry.get_sample_value("errata_calls_active", active) == 0.0
    assert placed.metrics.registry.get_sample_value("errata_call_seconds_count", active) == 2.0


@pytest.mark.parametrize("ask", BOTH, ids=["unary", "streaming"])
def test_a_call_during_drain_is_refused_and_said_to_be(placed: Behind, ask: Ask) -> None:
    placed.gate.drain()
    found = ask(placed)
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")


def test_a_call_that_runs_when_draining_begins_is_waited_for(placed: Behind) -> None:
    stream = placed.stream()
    next(stream)
    placed.gate.drain()
    waiting = asyncio.run_coroutine_threadsafe(placed.gate.idle(), placed.loop)
    assert not waiting.done()
    stream.cancel()  # type: ignore[attr-defined]
    waiting.result(60)


def test_more_calls_than_allowed_are_told_when_to_come_back() -> None:
    with behind(limit=2) as placed:
        placed.generate()
        placed.generate()
        found = refused(placed.generate)
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
        assert found.retry_after is not None
        assert 0 < found.retry_after <= 30


ROLES = {"rita": {"atlas": "reader"}, "ed": {"atlas": "editor"}, "ada": {"*": "admin"}, "luc": {"llava": "admin"}}


def test_without_a_token_nobody_is_answered() -> None:
    with behind(ROLES) as placed:
        for ask in BOTH:
            found = ask(placed)
            assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        assert refused(lambda: placed.generate(token="guess")).code is grpc.StatusCode.UNAUTHENTICATED


def test_the_handler_knows_who_calls_streaming_or_not() -> None:
    with behind(ROLES) as placed:
        assert placed.generate(token="rita").text == "rita"
        stream = placed.stream(token="ada")
        assert next(stream).text == "ada"
        stream.cancel()  # type: ignore[attr-defined]


def test_a_role_is_for_the_model_that_the_request_names() -> None:
    with behind(ROLES) as placed:
        edits = edit_pb2_grpc.EditServiceStub(placed.channel)

        def create(token: str, model: str = "atlas") -> edit_pb2.CreateEditResponse:
            request = edit_pb2.CreateEditRequest(parent=f"models/{model}/versions/0")
            return edits.CreateEdit(request, metadata=_bearer(token))

        assert create("ed").edit.name
        assert create("ada").edit.name
        for found in (
            refused(lambda: create("rita")),
            refused(lambda: create("luc")),
            refused(lambda: create("ed", "llava")),
            refused(lambda: placed.generate(token="luc")),
            refused(lambda: placed.stream(token="luc")),
        ):
            assert (found.code, found.reason) == (grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN")


def test_a_list_of_models_needs_no_model_but_a_token() -> None:
    with behind(ROLES) as placed:
        stub = model_pb2_grpc.ModelServiceStub(placed.channel)
        stub.ListModels(model_pb2.ListModelsRequest(), metadata=_bearer("rita"))
        found = refused(lambda: stub.ListModels(model_pb2.ListModelsRequest()))
        assert found.code is grpc.StatusCode.UNAUTHENTICATED
