"""Who may do what, how often, and over which wire. Knows roles and RPCs; nothing of what an RPC does.

A token gives a role for each model, or for all ("*"): reader < editor < admin. Every RPC of this API has one entry in
`ROLES`; one without would be refused, and a test holds the table complete.
"""

import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from threading import Lock
from time import monotonic

import grpc

from errata.server.errors import BusyError, ForbiddenError, MalformedError, UnauthenticatedError
from errata.server.ledger.rows import TokenRow
from errata.server.names import model_part
from errata.server.settings import Settings, SettingsError

Metadata = Iterable[tuple[str, str | bytes]]

ALL_MODELS = "*"
"""The entry of a token's roles that stands for every model."""

_LONGEST_TOKEN = 512


class Role(IntEnum):
    """What a caller may do; each may what the one before may."""

    READER = 1
    """Look, and ask any version."""
    EDITOR = 2
    """Trace, measure, edit, evaluate, cancel, and move aliases to versions that passed."""
    ADMIN = 3
    """Delete versions, override guardrails."""


ROLES: Mapping[str, Role] = {
    "/errata.v1.ModelService/ListModels": Role.READER,
    "/errata.v1.ModelService/GetModel": Role.READER,
    "/errata.v1.ModelService/ListVersions": Role.READER,
    "/errata.v1.ModelService/GetVersion": Role.READER,
    "/errata.v1.ModelService/GetLineage": Role.READER,
    "/errata.v1.ModelService/Promote": Role.EDITOR,
    "/errata.v1.ModelService/Rollback": Role.EDITOR,
    "/errata.v1.ModelService/DeleteVersion": Role.ADMIN,
    "/errata.v1.ModelService/ListAuditEntries": Role.EDITOR,
    "/errata.v1.TraceService/CreateTrace": Role.EDITOR,
    "/errata.v1.TraceService/GetTrace": Role.READER,
    "/errata.v1.TraceService/ListTraces": Role.READER,
    "/errata.v1.TraceService/CancelTrace": Role.EDITOR,
    "/errata.v1.TraceService/WatchTrace": Role.READER,
    "/errata.v1.EditService/CreateEdit": Role.EDITOR,
    "/errata.v1.EditService/GetEdit": Role.READER,
    "/errata.v1.EditService/ListEdits": Role.READER,
    "/errata.v1.EditService/CancelEdit": Role.EDITOR,
    "/errata.v1.EditService/WatchEdit": Role.READER,
    "/errata.v1.EvaluationService/CreateEvaluation": Role.EDITOR,
    "/errata.v1.EvaluationService/GetEvaluation": Role.READER,
    "/errata.v1.EvaluationService/ListEvaluations": Role.READER,
    "/errata.v1.EvaluationService/CancelEvaluation": Role.EDITOR,
    "/errata.v1.EvaluationService/WatchEvaluation": Role.READER,
    "/errata.v1.HistoryService/CreateDerivation": Role.EDITOR,
    "/errata.v1.HistoryService/GetDerivation": Role.READER,
    "/errata.v1.HistoryService/ListDerivations": Role.READER,
    "/errata.v1.HistoryService/CancelDerivation": Role.EDITOR,
    "/errata.v1.HistoryService/WatchDerivation": Role.READER,
    "/errata.v1.HistoryService/CreateBisection": Role.EDITOR,
    "/errata.v1.HistoryService/GetBisection": Role.READER,
    "/errata.v1.HistoryService/ListBisections": Role.READER,
    "/errata.v1.HistoryService/CancelBisection": Role.EDITOR,
    "/errata.v1.HistoryService/WatchBisection": Role.READER,
    "/errata.v1.HistoryService/CompareVersions": Role.READER,
    "/errata.v1.MeasurementService/CreateMeasurement": Role.EDITOR,
    "/errata.v1.MeasurementService/GetMeasurement": Role.READER,
    "/errata.v1.MeasurementService/ListMeasurements": Role.READER,
    "/errata.v1.MeasurementService/CancelMeasurement": Role.EDITOR,
    "/errata.v1.MeasurementService/WatchMeasurement": Role.READER,
    "/errata.v1.MeasurementService/GetMeasurementFile": Role.READER,
    "/errata.v1.InferenceService/Generate": Role.READER,
    "/errata.v1.InferenceService/StreamGenerate": Role.READER,
    "/errata.v1.InferenceService/Score": Role.READER,
    "/errata.v1.ExportService/ExportVersion": Role.READER,
}
"""The role each RPC needs, of the model that it names; ListModels, which names none, lists what the caller may see."""

OVERRIDE_ROLE = Role.ADMIN
"""What Promote needs with `override_guardrails`."""

OPEN = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List", "/grpc.health.v1.Health/Watch"})
"""RPCs that anyone may call: whoever watches over the server has no token."""

_KNOWN_CALLERS = "/grpc.reflection."


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls. `roles` maps a model's name, or "*", to a role."""

    name: str
    roles: Mapping[str, Role]

    def role(self, model: str) -> Role | None:
        """The higher of its role for the model and its role for all."""
        return max((r for key in (model, ALL_MODELS) if (r := self.roles.get(key))), default=None)

    def require(self, needed: Role, model: str) -> None:
        """Raises ForbiddenError where it has a lower role for the model, or none."""
        role = self.role(model)
        if role is None or role < needed:
            has = f"is {role.name.lower()}" if role else "has no role"
            raise ForbiddenError(
                f"token {self.name!r} {has} for model {model!r}, and this needs {needed.name.lower()}; "
                "ask whoever runs the server for a token with that role"
            )

    def may_read(self, model: str) -> bool:
        """Whether it may see the model: what lists leave out."""
        return self.role(model) is not None


ANONYMOUS = Caller(name="anonymous", roles={ALL_MODELS: Role.ADMIN})
"""Whoever calls a server that asks for no tokens."""


def authorize(caller: Caller | None, method: str, model: str | None) -> None:
    """Whether a caller may call an RPC, given with its slashes, on a model; None where the request names none.

    Raises UnauthenticatedError for no caller, ForbiddenError for too low a role or an RPC that is in no table.
    """
    if method in OPEN:
        return
    if caller is None:
        raise UnauthenticatedError(_HOW)
    if method.startswith(_KNOWN_CALLERS):
        return
    needed = ROLES.get(method)
    if needed is None:
        raise ForbiddenError(f"{method} is open to nobody: no role is set for it")
    if model is not None:
        caller.require(needed, model)
    elif not any(role >= needed for role in caller.roles.values()):
        raise ForbiddenError(f"token {caller.name!r} has no role for any model; ask for one that has")


_HOW = 'this server asks for a token; send the metadata "authorization: Bearer TOKEN"'


class Authenticator:
    """Says who calls, by the bearer token in a call's metadata.

    `lookup` is the ledger's `caller`, asked at every call: a revoked token ends at once. None: everyone is anonymous.
    Blocks while the ledger is asked. Safe from any thread.
    """

    def __init__(self, lookup: Callable[[str], TokenRow | None] | None) -> None:
        self._lookup = lookup

    def caller(self, metadata: Metadata) -> Caller:
        """Who calls. Raises UnauthenticatedError."""
        if self._lookup is None:
            return ANONYMOUS
        row = self._lookup(_bearer(metadata))
        if row is None or row.revoked:
            raise UnauthenticatedError("the server does not know this token, or it was revoked; ask for a new one")
        return Caller(name=row.name, roles=roles_of(row.roles))


def _bearer(metadata: Metadata) -> str:
    values = [value for key, value in metadata if key.lower() == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        raise UnauthenticatedError(_HOW)
    scheme, _, token = values[0].partition(" ")
    if scheme.lower() != "bearer" or not token.strip() or len(token) > _LONGEST_TOKEN:
        raise UnauthenticatedError(_HOW)
    return token.strip()


def roles_of(given: Mapping[str, str]) -> dict[str, Role]:
    """Roles from their words, `{"atlas": "editor", "*": "reader"}`. Raises MalformedError."""
    if not given:
        raise MalformedError("a token needs a role; give atlas=editor, or *=reader for all models", field="roles")
    for model, role in given.items():
        if model != ALL_MODELS:
            model_part(model, "roles")
        if role.upper() not in Role.__members__:
            words = ", ".join(r.name.lower() for r in Role)
            raise MalformedError(f"{role!r} is no role; use one of {words}", field="roles")
    return {model: Role[role.upper()] for model, role in given.items()}


def roles_from(grants: Sequence[str]) -> dict[str, str]:
    """Roles as a command line gives them, `atlas=editor` or `*=reader`, for `Ledger.create_token`.

    Raises MalformedError for what is no grant, and for one model twice.
    """
    given: dict[str, str] = {}
    for grant in grants:
        model, equals, role = grant.partition("=")
        if not equals or model in given:
            raise MalformedError(f"{grant!r} is no role for another model; give MODEL=ROLE, once each", field="roles")
        given[model] = role.lower()
    roles_of(given)
    return given


class RateLimiter:
    """At most `per_minute` calls a caller, spread evenly but for bursts of `burst` at once (GCRA, a token bucket).

    `clock` is in seconds and never goes back. Safe from any thread.
    """

    def __init__(
        self, per_minute: int, *, burst: int | None = None, clock: Callable[[], float] = monotonic, most: int = 10_000
    ) -> None:
        self._interval = 60.0 / per_minute
        self._burst = burst if burst is not None else max(1, per_minute // 6)
        self._clock, self._most = clock, most
        self._lock = Lock()
        self._due: dict[str, float] = {}  # when the calls taken so far would have come, had they come evenly

    def take(self, caller: str) -> None:
        """Counts one call. Raises BusyError, with `retry_after` in seconds, where it is one too many."""
        with self._lock:
            now = self._clock()
            due = max(self._due.get(caller, now), now)
            early = due - now - (self._burst - 1) * self._interval
            if early > 1e-9:
                raise BusyError(
                    f"more than {60 / self._interval:.0f} calls a minute by {caller!r}; come back in {early:.2f} s",
                    reason="RATE_LIMITED",
                    retry_after=early,
                )
            if len(self._due) >= self._most:
                self._due = {name: t for name, t in self._due.items() if t > now}
            self._due[caller] = due + self._interval


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """TLS, and with a client CA mutual TLS; None where the settings have no certificate.

    Raises SettingsError where the files do not hold what they are to, or key and certificate do not belong together.
    """
    certificate, key, client_ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if certificate is None or key is None:
        return None
    _check_tls(certificate, key, client_ca)
    return grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())],
        root_certificates=client_ca.read_bytes() if client_ca else None,
        require_client_auth=client_ca is not None,
    )


def _check_tls(certificate: Path, key: Path, client_ca: Path | None) -> None:
    # gRPC finds a wrong file only when the first caller comes.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")  # an empty one, or OpenSSL would ask the terminal
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"tls_certificate {str(certificate)!r} and tls_key {str(key)!r} cannot be used ({error}); give a PEM "
            "certificate with its chain and its unencrypted PEM key"
        ) from error
    try:
        if client_ca:
            context.load_verify_locations(client_ca)
    except (OSError, ValueError) as error:
        raise SettingsError(f"tls_client_ca {str(client_ca)!r} cannot be used ({error}); give PEM") from error
