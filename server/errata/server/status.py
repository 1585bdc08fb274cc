"""How an error looks on the wire: a gRPC code, and a `google.rpc.Status` that says reason, field and when to retry.

Sizes are bounded, because a client refuses trailing metadata of more than 8 KiB: whatever quotes a request is cut.
Knows nothing of calls; `interceptors` ends them with what is made here.
"""

from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from errata.editor.errors import ErrataError
from errata.server.errors import code_of, reason_of

DOMAIN = "errata"
"""Of every ErrorInfo."""

DETAILS_KEY = "grpc-status-details-bin"
"""The trailing metadata that holds the rich status."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""The trailing metadata by which gRPC's own retries are delayed."""

_LONGEST = 800
"""Bytes of a message: it is sent three times, and once with each byte escaped to three."""

TrailingMetadata = tuple[tuple[str, str | bytes], ...]


def status_of(error: ErrataError) -> status_pb2.Status:
    """The rich status of an error raised on purpose."""
    said = _cut(str(error.args[0]) if error.args else type(error).__name__)
    field: str = getattr(error, "field", "")
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason_of(error), domain=DOMAIN)]
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=_cut(field), description=said)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if (seconds := retry_after(error)) is not None:
        delay = Duration()
        delay.FromMilliseconds(round(1000 * seconds))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return _status(code_of(error), said, details)


def internal(method: str, error_id: str) -> status_pb2.Status:
    """The status of an error that nobody meant: the method, and the id to look for in the server's log."""
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id})
    said = f"{method} failed inside the server; its log says why, under the id {error_id}"
    return _status(StatusCode.INTERNAL, said, [info])


def retry_after(error: Exception) -> float | None:
    """Seconds after which the call may be repeated; None where the error names none."""
    seconds: float | None = getattr(error, "retry_after", None)
    return None if seconds is None else max(0.0, seconds)


def trailing_metadata(status: status_pb2.Status, retry: float | None = None) -> TrailingMetadata:
    """What a call ends with besides its code and message. `retry` is in seconds."""
    rich = (DETAILS_KEY, status.SerializeToString())
    return (rich,) if retry is None else (rich, (PUSHBACK_KEY, str(round(1000 * retry))))


def code_from(status: status_pb2.Status) -> StatusCode:
    """The gRPC code of a status."""
    return next(code for code in StatusCode if code.value[0] == status.code)


def _status(code: StatusCode, said: str, details: list[Message]) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=said)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _cut(text: str) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= _LONGEST:
        return encoded.decode()
    return encoded[:_LONGEST].decode(errors="ignore") + " …"
