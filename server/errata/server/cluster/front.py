"""Where calls enter: each goes to a replica, by the version that it asks. Holds no model and imports none."""

import logging
import secrets
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import Message
from grpc import StatusCode
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

from errata.editor.errors import ErrataError
from errata.server.cluster.reply import Metadata, Reply
from errata.server.cluster.workers import LOST
from errata.server.errors import DrainingError, MalformedError
from errata.server.status import code_from, internal, retry_after, status_of, trailing_metadata
from errata.v1 import inference_pb2

_log = logging.getLogger(__name__)

CALLS = 1000
"""Calls that one process has at once, as many as a server; a replica's engine refuses what it cannot queue."""

REPLICA_KEY = "errata-replica"
"""The trailing metadata that says which replica answered."""

_RETRY_SECONDS = 1.0

_SERVICE = "/errata.v1.InferenceService/"


@serve.deployment(max_ongoing_requests=CALLS)
class Front:
    """Sends calls to the replicas. Its methods are the service's."""

    def __init__(self, replicas: Any, max_message_bytes: int) -> None:
        self._replicas, self._most = replicas, max_message_bytes

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
        method = _SERVICE + "StreamGenerate"
        try:
            async for reply in handle.stream.remote(method, self._sent(request), _metadata(grpc_context)):
                _end(grpc_context, reply)
                # Serve takes a status from beside a message only, so a stream that fails ends with an empty one.
                yield inference_pb2.StreamGenerateResponse.FromString(reply.message)
        except Exception as error:
            _end(grpc_context, _failed(method, error))
            yield inference_pb2.StreamGenerateResponse()

    async def _called(self, name: str, request: Message, version: str, context: RayServegRPCContext) -> bytes:
        handle = self._replicas.options(multiplexed_model_id=version)
        method = _SERVICE + name
        try:
            reply: Reply = await handle.call.remote(method, self._sent(request), _metadata(context))
        except Exception as error:
            reply = _failed(method, error)
        _end(context, reply)
        return reply.message

    def _sent(self, request: Message) -> bytes:
        """What a replica would refuse for its size is not carried to one. Raises MalformedError."""
        if (size := request.ByteSize()) > self._most:
            raise MalformedError(
                f"the request has {size} bytes, and this server takes {self._most}; split it or send smaller images",
                field="request",
                reason="MESSAGE_TOO_LARGE",
            )
        return request.SerializeToString()


def _metadata(context: RayServegRPCContext) -> Metadata:
    return tuple(context.invocation_metadata())


def _failed(method: str, error: Exception) -> Reply:
    """How a call ends that no replica ended; what nobody meant goes to the log, as at the server."""
    if isinstance(error, LOST):
        said = "the replica that had the call is gone; call again, another one takes it"
        error = DrainingError(said, reason="REPLICA_LOST", retry_after=_RETRY_SECONDS)
    if isinstance(error, ErrataError):
        status = status_of(error)
    else:
        error_id = secrets.token_hex(4)
        _log.error("%s failed", method, exc_info=error, extra={"method": method, "error_id": error_id})
        status = internal(method, error_id)
    trailing = trailing_metadata(status, retry_after(error))
    return Reply(code=code_from(status), details=status.message, trailing=trailing)


def _end(context: RayServegRPCContext, reply: Reply) -> None:
    if reply.code is not StatusCode.OK:
        context.set_code(reply.code)
        context.set_details(reply.details)
    context.set_trailing_metadata([*reply.trailing, (REPLICA_KEY, reply.replica)])  # type: ignore[list-item]  # bytes pass
