"""Everything the client raises on purpose: the server's errors by their reason, and its own.

    ErrataError
    ├── InvalidInputError            INVALID_ARGUMENT: what the caller gave cannot be used; `field` names it
    │   ├── ConstraintNotFoundError, PromptError, TargetError, NoOpEditError, ImageError, LayerError
    │   ├── ConflictingRequestsError     one key, two targets
    │   ├── RankTooLargeError            more than a serving engine takes
    │   ├── MemoryLimitError             not even one row fits in the server's memory
    │   ├── MalformedError               a request that breaks the API's own limits
    │   ├── PageTokenError               malformed, expired or another list's page token
    │   └── MessageTooLargeError         more bytes in one message than the client or the server takes
    ├── NotFoundError                NOT_FOUND: no such model, version, alias, trace, edit, evaluation
    ├── RequestIdReusedError         ALREADY_EXISTS: the same request_id with another body
    ├── EtagMismatchError            ABORTED: the alias has moved since it was seen
    ├── PreconditionError            FAILED_PRECONDITION: not as things stand
    │   ├── ModelError                   UnknownFamilyError, UnsafeCheckpointError, NonFiniteWeightsError
    │   ├── DeltaError                   WrongBaseError, CorruptDeltaError, UnsupportedAdapterError
    │   ├── CorruptionFailedError, NoCausalSiteError, IllConditionedError
    │   ├── RejectedVersionError, VersionInUseError, NothingToRollBackError
    │   ├── EditsConflictError           edits that are to be composed speak against each other
    │   ├── NothingToBisectError         the good version fails a probe, or the bad one passes all
    │   └── LedgerError                  NotMigratedError, BaseChangedError
    ├── CancelledError               CANCELLED: stopped on request
    ├── ClosedError                  the client was closed before
    ├── UnauthenticatedError         UNAUTHENTICATED: no token, or one the server does not know
    ├── ForbiddenError               PERMISSION_DENIED: the token's role does not allow it
    ├── BusyError                    RESOURCE_EXHAUSTED: `retry_after` says when to come back
    ├── UnavailableError             UNAVAILABLE: the server cannot be reached
    │   ├── DrainingError                it is shutting down
    │   └── LedgerUnavailableError       its ledger's database does not answer
    ├── DeadlineExceededError        DEADLINE_EXCEEDED, and a timeout of the client's; also a TimeoutError
    ├── UnsupportedError             UNIMPLEMENTED: the server knows no such call
    └── InternalError                INTERNAL, UNKNOWN, DATA_LOSS: a fault of the server
        └── EngineError                  in inference

A reason that this release does not know is raised as the class beside its gRPC code above, with the reason kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import grpc

from errata.client.details import ErrorDetails, FieldViolation


class ErrataError(Exception):
    """Base of all errors that the client raises on purpose.

    `message` says what, where, and what to do. `reason` is UPPER_SNAKE and the same in every release. `violations`
    are the parts of the request at fault, `field` the first one's name. `code` is the gRPC code, None where no call
    failed: a failed piece of work, an image that cannot be read. `retry_after` is in seconds, None where the server
    named none. `explained` is False where only a gRPC code came back, as from a proxy or a broken connection.
    """

    default_reason: ClassVar[str] = "ERRATA"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        violations: tuple[FieldViolation, ...] = (),
        code: grpc.StatusCode | None = None,
        retry_after: float | None = None,
        explained: bool = True,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.violations = violations
        self.code = code
        self.retry_after = retry_after
        self.explained = explained

    @classmethod
    def at(cls, field: str, message: str) -> Self:
        """The error of one part of what the caller gave, found before anything was sent."""
        return cls(message, violations=(FieldViolation(field=field, description=message),))

    @property
    def field(self) -> str:
        """The first part of the request at fault, dotted: "requests[2].constraint.text". Empty where none is."""
        return self.violations[0].field if self.violations else ""

    def __str__(self) -> str:
        return self.message if self.message.startswith(self.field) else f"{self.field}: {self.message}"


class InvalidInputError(ErrataError):
    """What the caller gave cannot be used. `field` names it."""

    default_reason = "INVALID_INPUT"


class ConstraintNotFoundError(InvalidInputError):
    """The constraint does not occur in the prompt, or not as often as the occurrence asked for."""

    default_reason = "CONSTRAINT_NOT_FOUND"


class PromptError(InvalidInputError):
    """The prompt is empty, or its images do not fit it."""

    default_reason = "INVALID_PROMPT"


class TargetError(InvalidInputError):
    """The target is empty or has no tokens."""

    default_reason = "INVALID_TARGET"


class NoOpEditError(InvalidInputError):
    """The model already answers the target: there is nothing to edit."""

    default_reason = "NO_OP_EDIT"


class ImageError(InvalidInputError):
    """The image cannot be read, is truncated, or is larger than allowed."""

    default_reason = "INVALID_IMAGE"


class LayerError(InvalidInputError):
    """The model has no such layer."""

    default_reason = "LAYER_OUT_OF_RANGE"


class ConflictingRequestsError(InvalidInputError):
    """Two requests of a batch have the same key and different targets."""

    default_reason = "CONFLICTING_REQUESTS"


class RankTooLargeError(InvalidInputError):
    """The version's rank is above all that serving engines take; export it merged, or as a plain adapter."""

    default_reason = "RANK_TOO_LARGE"


class MemoryLimitError(InvalidInputError):
    """Not even one row fits in the server's memory; give a smaller picture or a shorter prompt."""

    default_reason = "MEMORY_LIMIT"


class MalformedError(InvalidInputError):
    """The request breaks one of the API's limits."""

    default_reason = "MALFORMED"


class PageTokenError(InvalidInputError):
    """The page token is malformed, expired, or of another list."""

    default_reason = "INVALID_PAGE_TOKEN"


class MessageTooLargeError(InvalidInputError):
    """A message has more bytes than the client or the server takes."""

    default_reason = "MESSAGE_TOO_LARGE"


class NotFoundError(ErrataError):
    """No such model, version, alias, trace, edit or evaluation; `reason` tells which: VERSION_NOT_FOUND."""

    default_reason = "NOT_FOUND"


class RequestIdReusedError(ErrataError):
    """The same request_id came with another body before."""

    default_reason = "REQUEST_ID_REUSED"


class EtagMismatchError(ErrataError):
    """The alias has moved since the caller saw it."""

    default_reason = "ETAG_MISMATCH"


class PreconditionError(ErrataError):
    """Not as things stand on the server."""

    default_reason = "FAILED_PRECONDITION"


class ModelError(PreconditionError):
    """The checkpoint cannot be used."""

    default_reason = "MODEL"


class UnknownFamilyError(ModelError):
    """No adapter knows this architecture."""

    default_reason = "UNKNOWN_MODEL_FAMILY"


class UnsafeCheckpointError(ModelError):
    """The checkpoint's weights are pickled; only safetensors are loaded."""

    default_reason = "UNSAFE_CHECKPOINT"


class NonFiniteWeightsError(ModelError):
    """The checkpoint's weights hold NaN or infinity."""

    default_reason = "NON_FINITE_WEIGHTS"


class DeltaError(PreconditionError):
    """The delta cannot be used."""

    default_reason = "DELTA"


class WrongBaseError(DeltaError):
    """The delta was made for another base model."""

    default_reason = "WRONG_BASE"


class CorruptDeltaError(DeltaError):
    """The adapter folder cannot be read or was altered."""

    default_reason = "CORRUPT_DELTA"


class UnsupportedAdapterError(DeltaError):
    """The adapter does more than add a low-rank change to down-projections."""

    default_reason = "UNSUPPORTED_ADAPTER"


class CorruptionFailedError(PreconditionError):
    """The corruption does not corrupt: the answer stays about as likely, so a causal trace would mean nothing."""

    default_reason = "CORRUPTION_FAILED"


class NoCausalSiteError(PreconditionError):
    """No MLP at the constraint carries a real share of the total effect."""

    default_reason = "NO_CAUSAL_SITE"


class IllConditionedError(PreconditionError):
    """The closed form's normal matrix is not positive definite in float64."""

    default_reason = "ILL_CONDITIONED"


class RejectedVersionError(PreconditionError):
    """A rejected version is promoted only with an override and its reason."""

    default_reason = "VERSION_REJECTED"


class VersionInUseError(PreconditionError):
    """An alias points to the version, or another version is built on it."""

    default_reason = "VERSION_IN_USE"


class NothingToRollBackError(PreconditionError):
    """The alias never named another version."""

    default_reason = "NOTHING_TO_ROLL_BACK"


class EditsConflictError(PreconditionError):
    """Edits that are to be composed speak against each other; the derivation's `conflicts` name both facts of each."""

    default_reason = "EDITS_CONFLICT"


class NothingToBisectError(PreconditionError):
    """The version said to be good fails a probe, or the one said to be bad passes all."""

    default_reason = "NOTHING_TO_BISECT"


class LedgerError(PreconditionError):
    """The server's ledger cannot be used."""

    default_reason = "LEDGER"


class NotMigratedError(LedgerError):
    """The ledger's schema is not the server's release's."""

    default_reason = "LEDGER_NOT_MIGRATED"


class BaseChangedError(LedgerError):
    """A model's checkpoint is not the one that its versions were made for."""

    default_reason = "BASE_CHANGED"


class CancelledError(ErrataError):
    """Stopped on request; nothing was changed."""

    default_reason = "CANCELLED"


class ClosedError(ErrataError):
    """A client is used that was closed."""

    default_reason = "CLIENT_CLOSED"


class UnauthenticatedError(ErrataError):
    """No token, or one the server does not know."""

    default_reason = "UNAUTHENTICATED"


class ForbiddenError(ErrataError):
    """The token's role does not allow this."""

    default_reason = "FORBIDDEN"


class BusyError(ErrataError):
    """A queue or a rate limit is full; come back after `retry_after` seconds."""

    default_reason = "BUSY"


class UnavailableError(ErrataError):
    """The server cannot be reached."""

    default_reason = "UNAVAILABLE"


class DrainingError(UnavailableError):
    """The server is shutting down and takes nothing new."""

    default_reason = "DRAINING"


class LedgerUnavailableError(UnavailableError, LedgerError):
    """The server cannot reach its ledger's database at present. Call again in a moment."""

    default_reason = "LEDGER_UNAVAILABLE"


class DeadlineExceededError(ErrataError, TimeoutError):
    """The answer took longer than the timeout. Work that was queued goes on: ask for it by name."""

    default_reason = "DEADLINE_EXCEEDED"


class UnsupportedError(ErrataError):
    """The server knows no such call: of another release, no Errata server, or replicas, which only answer."""

    default_reason = "UNIMPLEMENTED"


class InternalError(ErrataError):
    """A fault of the server; its log says more."""

    default_reason = "INTERNAL"


class EngineError(InternalError):
    """Inference failed inside the server, through no request's fault; its log says more."""

    default_reason = "ENGINE_FAILURE"


_Code = grpc.StatusCode
_BY_CODE: dict[grpc.StatusCode, type[ErrataError]] = {
    _Code.INVALID_ARGUMENT: InvalidInputError,
    _Code.OUT_OF_RANGE: InvalidInputError,
    _Code.NOT_FOUND: NotFoundError,
    _Code.ALREADY_EXISTS: RequestIdReusedError,
    _Code.ABORTED: EtagMismatchError,
    _Code.FAILED_PRECONDITION: PreconditionError,
    _Code.CANCELLED: CancelledError,
    _Code.UNAUTHENTICATED: UnauthenticatedError,
    _Code.PERMISSION_DENIED: ForbiddenError,
    _Code.RESOURCE_EXHAUSTED: BusyError,
    _Code.UNAVAILABLE: UnavailableError,
    _Code.DEADLINE_EXCEEDED: DeadlineExceededError,
    _Code.UNIMPLEMENTED: UnsupportedError,
    _Code.INTERNAL: InternalError,
    _Code.UNKNOWN: InternalError,
    _Code.DATA_LOSS: InternalError,
}


def _classes(root: type[ErrataError]) -> Iterator[type[ErrataError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


_NARROWER: dict[type[ErrataError], tuple[str, ...]] = {
    MalformedError: (
        "MALFORMED_NAME",
        "MALFORMED_MESSAGE",
        "MALFORMED_TEXT",
        "MISSING_FIELD",
        "OUT_OF_RANGE",
        "TOO_MANY",
        "TRACE_NOT_DONE",
        "REFERENCES_MISSING",
        "ANOTHER_MODEL",
        "IS_BASE",
        "NOT_IN_LINEAGE",
        "IN_LINEAGE",
        "SOURCE_TWICE",
        "ALREADY_REVERTED",
        "NOT_MERGED_FROM",
        "NOT_ALL_EDITS",
        "NOTHING_TO_DERIVE",
    ),
    PageTokenError: ("PAGE_TOKEN_EXPIRED",),
    NotFoundError: (
        "MODEL_NOT_FOUND",
        "VERSION_NOT_FOUND",
        "ALIAS_NOT_FOUND",
        "TRACE_NOT_FOUND",
        "EDIT_NOT_FOUND",
        "EVALUATION_NOT_FOUND",
        "DERIVATION_NOT_FOUND",
        "BISECTION_NOT_FOUND",
    ),
    BusyError: ("RATE_LIMITED",),
    InternalError: ("INTERRUPTED",),
}
"""Reasons that say more than their class does. They matter where no code does: in failed work."""

_BY_REASON = {each.default_reason: each for each in _classes(ErrataError)} | {
    reason: kind for kind, reasons in _NARROWER.items() for reason in reasons
}

# What gRPC itself says of a message over a limit, whichever side finds it; there are no details to tell it by.
_TOO_LARGE = "larger than max"


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcStatus:
    """How a call ended: the code, what was said, and the server's details where it sent any."""

    code: grpc.StatusCode
    message: str
    details: ErrorDetails | None


def from_status(status: RpcStatus, server: str) -> ErrataError:
    """The exception of a failed call to `server`, by its reason, or else by its code."""
    known = status.details
    if known is None or not known.reason:
        return _unexplained(status, server)
    kind = _BY_REASON.get(known.reason) or _BY_CODE.get(status.code, ErrataError)
    return kind(
        known.message or status.message,
        reason=known.reason,
        violations=known.violations,
        code=status.code,
        retry_after=known.retry_after,
    )


def from_failure(reason: str, message: str, field: str) -> ErrataError:
    """The exception of a failed piece of work, by its reason; ErrataError where this release does not know it."""
    kind = _BY_REASON.get(reason, ErrataError)
    violations = (FieldViolation(field=field, description=message),) if field else ()
    return kind(message, reason=reason, violations=violations)


def _unexplained(status: RpcStatus, server: str) -> ErrataError:
    kind = _BY_CODE.get(status.code, ErrataError)
    message = status.message or status.code.name
    if status.code is _Code.RESOURCE_EXHAUSTED and _TOO_LARGE in message:
        kind, message = MessageTooLargeError, f"{message}; split the request or send smaller images"
    elif status.code is _Code.UNAVAILABLE:
        message = f"{server} does not answer ({message}); check the address, and that the server runs there"
    elif status.code is _Code.DEADLINE_EXCEEDED:
        message = f"{server} did not answer in time ({message}); give a longer timeout"
    elif status.code is _Code.UNIMPLEMENTED:
        whose = "it is of another release or no Errata server, or replicas, which only answer"
        message = f"{server} knows no such call ({message}); {whose}"
    details = status.details
    return kind(
        message,
        violations=details.violations if details else (),
        code=status.code,
        retry_after=details.retry_after if details else None,
        explained=False,
    )
