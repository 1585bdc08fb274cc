"""What goes wrong, said in one readable line on stderr, and with `--json` as a document on stdout as well."""

import traceback

import typer

from errata.client.cli.output import Output
from errata.client.cli.plain import clean
from errata.client.errors import ErrataError, InvalidInputError, RejectedVersionError, UnavailableError
from errata.client.results import JsonValue

_REMEDIES = {
    "MODEL_NOT_FOUND": "errata models lists those there are",
    "VERSION_NOT_FOUND": "errata log lists those there are",
    "ALIAS_NOT_FOUND": "errata models lists those there are",
    "VERSION_REJECTED": "promote it with --override REASON, or make a better edit",
    "NOT_IN_LINEAGE": "errata log VERSION draws what a version descends from",
    "UNAUTHENTICATED": "give a valid one by ERRATA_TOKEN",
    "EDIT_NOT_FOUND": "errata show VERSION names the one it was made by",
    "DERIVATION_NOT_FOUND": "errata show VERSION names the one it was made by",
}
"""What to do about a server's errors in a shell, by reason: the server says it for those who call its API."""

OK, NO, UNDONE = 0, 1, 2
"""Exit codes: done; the answer is no; it could not be done."""
BROKEN_PIPE = 141
"""What a shell says of a command whose reader went away."""

_NO_REASONS = (RejectedVersionError.default_reason, "EDITS_CONFLICT")


class UsageError(InvalidInputError):
    """A command line that cannot be meant."""

    default_reason = "USAGE"


class MissingExtraError(ErrataError):
    """Something that is not installed is needed."""

    default_reason = "NOT_INSTALLED"


def explain(error: Exception, output: Output) -> int:
    """Says what went wrong and returns the exit code. Raises BrokenPipeError where nobody reads it."""
    reason, message, field = _described(error)
    try:
        _say(error, output, reason, message, field)
    except BrokenPipeError:
        raise
    except OSError:  # a full disk, say: the exit code is what is left
        pass
    return NO if reason in _NO_REASONS else UNDONE


def _say(error: Exception, output: Output, reason: str, message: str, field: str) -> None:
    output.errors.print(f"errata: {clean(message)}", soft_wrap=True)
    if output.verbose:
        output.note(f"reason: {reason}" + (f"\nfield: {field}" if field else ""))
        output.note("".join(traceback.format_exception(error)).rstrip())
    if output.as_json:
        said: dict[str, JsonValue] = {"reason": reason, "message": message, "field": field}
        output.document({"error": said})


def _described(error: Exception) -> tuple[str, str, str]:
    match error:
        case UnavailableError(explained=False):
            # What gRPC says of the connection is in the traceback of --verbose.
            server = error.message.partition(" (")[0]
            return error.reason, f"{server}; check --server, or start one with `errata up`", error.field
        case ErrataError(reason=reason) if reason in _REMEDIES:
            what, _, _ = error.message.rpartition("; ")
            return reason, f"{what or error.message}; {_REMEDIES[reason]}", error.field
        case ErrataError():
            return error.reason, str(error), error.field
        case typer.TyperException():
            return UsageError.default_reason, _usage(error), ""
        case ModuleNotFoundError():
            remedy = f"{error.name} is needed and not installed; pip install 'errata[cli]'"
            return MissingExtraError.default_reason, remedy, ""
        case UnicodeEncodeError():
            # What a shell hands over that is not in UTF-8.
            return UsageError.default_reason, "the command line holds bytes that are not UTF-8; write them anew", ""
        case OSError():
            name = f"{error.filename}: " if error.filename else ""
            return "FILE", f"{name}{error.strerror or error}; check the path and its permissions", ""
    return "INTERNAL", f"{type(error).__name__}: {error}; this is a fault of errata, --verbose says where", ""


def _usage(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    problem = " ".join(error.format_message().split()).rstrip(".")
    return f"{problem}; see {context.command_path if context else 'errata'} --help"
