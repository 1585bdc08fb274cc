"""What only the engine raises. Both follow the rules of errata.server.errors."""

from errata.editor.errors import CancelledError, ErrataError


class EngineError(ErrataError):
    """Something failed that no request is to blame for; the cause is chained. INTERNAL on the wire."""

    reason = "ENGINE_FAILURE"


class DeadlineExceededError(CancelledError):
    """The request's deadline passed before its answer was complete."""

    reason = "DEADLINE_EXCEEDED"
