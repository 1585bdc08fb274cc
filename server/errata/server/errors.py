"""What the service raises on purpose, and how every error looks on the wire.

ErrataError (errata.editor.errors)
├── EngineError                      something failed that no request is to blame for
├── DeadlineExceededError            the request's deadline passed
└── ServiceError                     `reason` and gRPC code by class
    ├── NotFoundError                    no such model, version, alias, trace, edit, evaluation
    ├── MalformedError                   a request that breaks the API's own limits; `field` names it
    ├── RequestIdReusedError             the same request_id with another body
    ├── EtagMismatchError                the alias has moved since it was seen
    ├── RejectedVersionError             a rejected version promoted without an override
    ├── VersionInUseError                deleted while an alias points to it or a version is built on it
    ├── NothingToRollBackError           the alias names the first version it ever named
    ├── EditsConflictError               edits that are to be composed speak against each other
    ├── NothingToBisectError             the good version fails a probe, or the bad one passes all
    ├── UnauthenticatedError             no token, or one the server does not know
    ├── ForbiddenError                   the token's role does not allow it
    ├── BusyError                        queue or rate limit is full; `retry_after` says when to come back
    ├── DrainingError                    the server is shutting down
    ├── PageTokenError                   malformed, expired or another list's page token
    └── LedgerError                      the ledger cannot be used
        ├── LedgerUnavailableError           for the moment; `retry_after` says when to come back
        ├── NotMigratedError                 its schema is not this release's
        └── BaseChangedError                 the checkpoint is not the one its versions were made for
"""

from typing import ClassVar

import grpc

from errata.editor.errors import (
    CancelledError,
    CorruptionFailedError,
    DeltaError,
    ErrataError,
    IllConditionedError,
    InvalidInputError,
    ModelError,
    NoCausalSiteError,
)


class EngineError(ErrataError):
    """Something failed in the engine that no request is to blame for; the cause is chained. INTERNAL on the wire."""

    reason = "ENGINE_FAILURE"


class DeadlineExceededError(ErrataError):
    """The request's deadline passed before its answer was complete."""

    reason = "DEADLINE_EXCEEDED"


class ServiceError(ErrataError):
    """Base of the service's own errors. `field` is the part of the request at fault, dotted, if one is."""

    reason: ClassVar[str] = "SERVICE"

    def __init__(self, message: str, *, field: str = "", reason: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after = retry_after
        self._reason = reason

    @property
    def said_reason(self) -> str:
        """The reason on the wire: the class's own, or a narrower one given when it was raised."""
        return self._reason or self.reason


class NotFoundError(ServiceError):
    """No such resource. The reason says which: MODEL_NOT_FOUND, VERSION_NOT_FOUND and so on."""

    reason = "NOT_FOUND"


class MalformedError(ServiceError):
    """The request breaks one of the API's limits. The reason says which: MALFORMED_NAME, OUT_OF_RANGE and so on."""

    reason = "MALFORMED"


class RequestIdReusedError(ServiceError):
    """The same request_id came with another body before."""

    reason = "REQUEST_ID_REUSED"


class EtagMismatchError(ServiceError):
    """The alias has moved since the caller saw it."""

    reason = "ETAG_MISMATCH"


class RejectedVersionError(ServiceError):
    """A rejected version is promoted only with an override and its reason."""

    reason = "VERSION_REJECTED"


class VersionInUseError(ServiceError):
    """An alias points to the version, or another version is built on it."""

    reason = "VERSION_IN_USE"


class NothingToRollBackError(ServiceError):
    """The alias never named another version."""

    reason = "NOTHING_TO_ROLL_BACK"


class EditsConflictError(ServiceError):
    """Edits that are to be composed speak against each other."""

    reason = "EDITS_CONFLICT"


class NothingToBisectError(ServiceError):
    """The version said to be good fails a probe, or the one said to be bad passes all."""

    reason = "NOTHING_TO_BISECT"


class UnauthenticatedError(ServiceError):
    """No token, or one the server does not know."""

    reason = "UNAUTHENTICATED"


class ForbiddenError(ServiceError):
    """The token's role does not allow this."""

    reason = "FORBIDDEN"


class BusyError(ServiceError):
    """A queue or a rate limit is full."""

    reason = "BUSY"


class DrainingError(ServiceError):
    """The server is shutting down and takes nothing new."""

    reason = "DRAINING"


class PageTokenError(ServiceError):
    """The page token is malformed, expired, or of another list."""

    reason = "INVALID_PAGE_TOKEN"


class LedgerError(ServiceError):
    """The ledger cannot be used."""

    reason = "LEDGER"


class LedgerUnavailableError(LedgerError):
    """The ledger's database does not answer now: it is down, locked, or cannot be written. The cause is chained."""

    reason = "LEDGER_UNAVAILABLE"


class NotMigratedError(LedgerError):
    """The ledger's schema is not this release's."""

    reason = "LEDGER_NOT_MIGRATED"


class BaseChangedError(LedgerError):
    """A model's checkpoint is not the one that its versions were made for."""

    reason = "BASE_CHANGED"


_Code = grpc.StatusCode
CODES: dict[type[ErrataError], grpc.StatusCode] = {
    InvalidInputError: _Code.INVALID_ARGUMENT,
    ModelError: _Code.FAILED_PRECONDITION,
    DeltaError: _Code.FAILED_PRECONDITION,
    CorruptionFailedError: _Code.FAILED_PRECONDITION,
    NoCausalSiteError: _Code.FAILED_PRECONDITION,
    IllConditionedError: _Code.FAILED_PRECONDITION,
    CancelledError: _Code.CANCELLED,
    DeadlineExceededError: _Code.DEADLINE_EXCEEDED,
    EngineError: _Code.INTERNAL,
    NotFoundError: _Code.NOT_FOUND,
    MalformedError: _Code.INVALID_ARGUMENT,
    RequestIdReusedError: _Code.ALREADY_EXISTS,
    EtagMismatchError: _Code.ABORTED,
    RejectedVersionError: _Code.FAILED_PRECONDITION,
    VersionInUseError: _Code.FAILED_PRECONDITION,
    NothingToRollBackError: _Code.FAILED_PRECONDITION,
    EditsConflictError: _Code.FAILED_PRECONDITION,
    NothingToBisectError: _Code.FAILED_PRECONDITION,
    UnauthenticatedError: _Code.UNAUTHENTICATED,
    ForbiddenError: _Code.PERMISSION_DENIED,
    BusyError: _Code.RESOURCE_EXHAUSTED,
    DrainingError: _Code.UNAVAILABLE,
    PageTokenError: _Code.INVALID_ARGUMENT,
    LedgerError: _Code.FAILED_PRECONDITION,
    LedgerUnavailableError: _Code.UNAVAILABLE,
}
"""The one table from errors to gRPC codes; a class without an entry has its nearest base's."""


def code_of(error: ErrataError) -> grpc.StatusCode:
    """The gRPC code of an error raised on purpose."""
    return next((CODES[c] for c in type(error).__mro__ if c in CODES), _Code.INTERNAL)


def reason_of(error: ErrataError) -> str:
    """Its UPPER_SNAKE reason."""
    return error.said_reason if isinstance(error, ServiceError) else error.reason
