"""Where calls enter: each goes to a replica, by the version that it asks. Holds no model and imports none."""

from collections.abc import AsyncIterator
from typing import Any

from grpc import StatusCode
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.grpc_util import RayServegRPCContext

from errata.server.cluster.reply import Metadata, Reply
from errata.server.errors import DrainingError
from errata.server.status import code_from, status_of, trailing_metadata
from errata.v1 import inference_pb2

CALLS = 1000
"""Calls that one process has at once, as many as a server; a replica's engine refuses what it cannot queue."""

REPLICA_KEY = "errata-replica"
"""The trailing metadata that says which replica answered."""

_RETRY_SECONDS = 1.0

_SERVICE = "/errata.v1.InferenceService/"


@serve.deployment(max_ongoing_requests=CALLS)
class Front:
    """Sends calls to the replicas. Its methods are the service's."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.GenerateResponse:
        """One answer."""
        message = await self._called("Generate", request, request.version, grpc_context)
        return inference_pb2.GenerateResponse.FromString(message)

    async def Score(  # noqa: N802
        self, request: inference_pb2.ScoreRequest, grpc_context: RayServegRPCContext
    ) -> inference_pb2.ScoreResponse:
        """How likely each of several answers is."""
        return inference_pb2.ScoreResponse.FromString(
            await self._called("Score", request, request.version, grpc_context)
        )

    async def StreamGenerate(  # noqa: N802
        self, request: inference_pb2.StreamGenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        """An answer as it grows."""
        handle = self._replicas.options(stream=True, multiplexed_model_id=request.request.version)
        sent = _SERVICE + "StreamGenerate", request.SerializeToString(), _metadata(grpc_context)
        try:
            async for reply in handle.stream.remote(*sent):
                _end(grpc_context, reply)
                # Serve takes a status from beside a message only, so a stream that fails ends with an empty one.
                yield inference_pb2.StreamGenerateResponse.FromString(reply.message)
        except RayActorError:
            _end(grpc_context, _lost())
            yield inference_pb2.StreamGenerateResponse()

    async def _called(self, method: str, request: Any, version: str, context: RayServegRPCContext) -> bytes:
        handle = self._replicas.options(multiplexed_model_id=version)
        sent = _SERVICE + method, request.SerializeToString(), _metadata(context)
        try:
            reply: Reply = await handle.call.remote(*sent)
        except RayActorError:
            reply = _lost()
        _end(context, reply)
        return reply.message


def _metadata(context: RayServegRPCContext) -> Metadata:
    return tuple(context.invocation_metadata())


def _lost() -> Reply:
    """The end of a call whose replica died."""
    said = "the replica that had the call is gone; call again, another one takes it"
    status = status_of(DrainingError(said, reason="REPLICA_LOST", retry_after=_RETRY_SECONDS))
    trailing = trailing_metadata(status, _RETRY_SECONDS)
    return Reply(code=code_from(status), details=status.message, trailing=trailing)


def _end(context: RayServegRPCContext, reply: Reply) -> None:
    if reply.code is not StatusCode.OK:
        context.set_code(reply.code)
        context.set_details(reply.details)
    context.set_trailing_metadata([*reply.trailing, (REPLICA_KEY, reply.replica)])  # type: ignore[list-item]  # bytes pass
