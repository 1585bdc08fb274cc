"""The details of an error on the wire, read with protobuf alone.

The server sends a `google.rpc.Status` in the trailing metadata `grpc-status-details-bin`. Its types come with
googleapis-common-protos, which the client does not need for five small messages: they are declared here, with the
same field numbers, in a descriptor pool of their own, so that they never meet the real ones. They are built when the
first such error arrives, not on import.

Knows nothing of the client's exceptions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

DETAILS_KEY = "grpc-status-details-bin"

_Field = FieldDescriptorProto
_PACKAGE = "errata.client.wire"
_SCALARS = {
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
}
# Only the fields that are read: protobuf skips what it does not know. "*" marks a repeated one.
_SCHEMA = {
    "Any": {"type_url": (1, "string"), "value": (2, "bytes")},
    "Duration": {"seconds": (1, "int64"), "nanos": (2, "int32")},
    "Status": {"code": (1, "int32"), "message": (2, "string"), "details": (3, "*Any")},
    "ErrorInfo": {"reason": (1, "string"), "domain": (2, "string")},
    "FieldViolation": {"field": (1, "string"), "description": (2, "string")},
    "BadRequest": {"field_violations": (1, "*FieldViolation")},
    "RetryInfo": {"retry_delay": (1, "Duration")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """A part of the request at fault, dotted ("requests[2].target"), and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetails:
    """What the server says about an error. `retry_after` is in seconds, None where it named none."""

    message: str
    reason: str
    violations: tuple[FieldViolation, ...]
    retry_after: float | None


def read_details(metadata: Iterable[tuple[str, str | bytes]]) -> ErrorDetails | None:
    """The details in a call's trailing metadata; None where there are none or they cannot be read."""
    raw = next((value for key, value in metadata if key == DETAILS_KEY), None)
    if not isinstance(raw, bytes):
        return None
    try:
        return _read(raw)
    except DecodeError:
        return None  # The call's code and message still say what happened.


def _read(raw: bytes) -> ErrorDetails:
    status = _parse("Status", raw)
    reason, violations, retry_after = "", tuple[FieldViolation, ...](), None
    for detail in status.details:  # type: ignore[attr-defined]
        match detail.type_url.rpartition("/")[2]:
            case "google.rpc.ErrorInfo":
                reason = _parse("ErrorInfo", detail.value).reason  # type: ignore[attr-defined]
            case "google.rpc.BadRequest":
                violations += _violations(_parse("BadRequest", detail.value))
            case "google.rpc.RetryInfo":
                delay = _parse("RetryInfo", detail.value).retry_delay  # type: ignore[attr-defined]
                retry_after = delay.seconds + delay.nanos / 1e9
    message: str = status.message  # type: ignore[attr-defined]
    return ErrorDetails(message=message, reason=reason, violations=violations, retry_after=retry_after)


def _violations(bad: Message) -> tuple[FieldViolation, ...]:
    found = bad.field_violations  # type: ignore[attr-defined]
    return tuple(FieldViolation(field=each.field, description=each.description) for each in found)


def _parse(name: str, raw: bytes) -> Message:
    return GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}")).FromString(raw)


@cache
def _pool() -> DescriptorPool:
    file = FileDescriptorProto(name="errata/client/wire.proto", package=_PACKAGE, syntax="proto3")
    file.message_type.extend(_message(name, fields) for name, fields in _SCHEMA.items())
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool


def _message(name: str, fields: dict[str, tuple[int, str]]) -> DescriptorProto:
    message = DescriptorProto(name=name)
    for field, (number, kind) in fields.items():
        label = _Field.LABEL_REPEATED if kind.startswith("*") else _Field.LABEL_OPTIONAL
        added = message.field.add(name=field, number=number, label=label)
        if kind in _SCALARS:
            added.type = _SCALARS[kind]
        else:
            added.type = _Field.TYPE_MESSAGE
            added.type_name = f".{_PACKAGE}.{kind.lstrip('*')}"
    return message
