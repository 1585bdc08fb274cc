"""One replica: the base models in memory, and the server's own inference service behind the server's own gate.

It reads the server's ledger and its deltas, and writes neither, so that a promotion counts here from the next call
on. Knows nothing of Ray: what carries calls to it is `serving`.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn, TypeAlias, cast

import grpc

from errata.server.app import ledger_url
from errata.server.cluster.errors import ClusterError
from errata.server.cluster.ledger import LedgerReader
from errata.server.cluster.reply import Metadata, Reply
from errata.server.conversion import Decoder
from errata.server.images import ImagePolicy
from errata.server.interceptors import Gate
from errata.server.metrics import Metrics
from errata.server.models import Models
from errata.server.security import Authenticator, RateLimiter
from errata.server.services.inference import InferenceService
from errata.server.settings import Settings
from errata.server.status import TrailingMetadata
from errata.server.store import DeltaStore
from errata.v1 import inference_pb2_grpc

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Replica:
    """Answers calls of the inference service, given as gRPC carries them. In one event loop.

    Made once the models that load at the start are in memory. Raises ModelError, LedgerError, NotFoundError for a
    model that the server does not have.
    """

    def __init__(self, settings: Settings) -> None:
        if not settings.data_dir.is_dir():
            raise ClusterError(f"{str(settings.data_dir)!r} is not there; give all nodes the server's data_dir")
        self._settings = settings
        self._ledger = LedgerReader(ledger_url(settings))
        deltas = DeltaStore(settings.data_dir / "versions")
        metrics = Metrics(lambda: ())
        self._models = Models(settings.models, self._ledger, deltas, settings.data_dir, observer=metrics.engine)
        decoder = Decoder(ImagePolicy.of(settings).within_budget())
        self._handlers = _handlers(InferenceService(self._ledger, self._models, decoder, metrics.answered))
        self._gate = Gate(
            Authenticator(self._ledger.caller if settings.auth else None),
            RateLimiter(settings.requests_per_minute),
            metrics,
            max_message_bytes=settings.max_message_bytes,
        )
        try:
            self._models.start()
            for name, model in settings.models.items():
                if model.load == "start":
                    self._models.get(name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends what it answers, and closes everything."""
        self._models.close(self._settings.drain_seconds)
        self._ledger.close()

    async def call(self, method: str, request: bytes, metadata: Metadata) -> Reply:
        """One answer."""
        context = _Context(metadata)
        handler = await self._guarded(method)
        assert handler.unary_unary is not None
        assert handler.response_serializer is not None
        try:
            answer = await cast(Any, handler.unary_unary)(request, context)
        except grpc.aio.AbortError:
            return context.ended()
        return Reply(message=handler.response_serializer(answer))

    async def stream(self, method: str, request: bytes, metadata: Metadata) -> AsyncIterator[Reply]:
        """An answer as it grows."""
        context = _Context(metadata)
        handler = await self._guarded(method)
        assert handler.unary_stream is not None
        assert handler.response_serializer is not None
        try:
            async for answer in cast(Any, handler.unary_stream)(request, context):
                yield Reply(message=handler.response_serializer(answer))
        except grpc.aio.AbortError:
            yield context.ended()

    async def _guarded(self, method: str) -> _Handler:
        async def found(details: grpc.HandlerCallDetails) -> _Handler:
            return self._handlers[details.method]

        handler = await self._gate.intercept_service(found, _Details(method))
        assert handler is not None
        return handler


class _Details(grpc.HandlerCallDetails):
    """Which method is called."""

    def __init__(self, method: str) -> None:
        self.method, self.invocation_metadata = method, ()


class _Context:
    """As much of gRPC's side of a call as the gate and the service ask for. Deadlines end at Ray's proxy."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = tuple(metadata)
        self._ended = Reply()

    def invocation_metadata(self) -> Metadata:
        return self._metadata

    def time_remaining(self) -> float | None:
        return None

    def code(self) -> grpc.StatusCode:
        return self._ended.code

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: TrailingMetadata) -> NoReturn:
        self._ended = Reply(code=code, details=details, trailing=trailing_metadata)
        raise grpc.aio.AbortError

    def ended(self) -> Reply:
        return self._ended


class _Registry:
    """Takes the handlers that a generated `add_…_to_server` gives to a server."""

    def __init__(self) -> None:
        self.handlers: dict[str, _Handler] = {}

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """The same again, in a form that cannot be listed."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, _Handler]) -> None:
        self.handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}


def _handlers(service: InferenceService) -> dict[str, _Handler]:
    registry = _Registry()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, cast(grpc.aio.Server, registry))
    return registry.handlers
