"""How the client reaches the server: TLS, the token, retries, limits. Opens nothing by itself."""

import json
import re
from dataclasses import dataclass, field
from ipaddress import ip_address
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import grpc

from errata.client.errors import InvalidInputError

DEFAULT_SERVER = "localhost:50051"
DEFAULT_TIMEOUT = 60.0
"""Seconds for a call."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

Pem: TypeAlias = bytes | str | PathLike[str]
"""PEM bytes, or the path of a file with them."""
_URL = re.compile(r"(https?|grpcs?)://|[^/]*@|[^/]*//[^/]*@", re.IGNORECASE)
_TOKEN = re.compile("[!-~]*")
"""What a header can carry of a token."""

_RETRIED = {
    "ModelService": ("ListModels", "GetModel", "ListVersions", "GetVersion", "GetLineage", "ListAuditEntries"),
    "TraceService": ("CreateTrace", "GetTrace", "ListTraces", "CancelTrace", "WatchTrace"),
    "EditService": ("CreateEdit", "GetEdit", "ListEdits", "CancelEdit", "WatchEdit"),
    "EvaluationService": (
        "CreateEvaluation",
        "GetEvaluation",
        "ListEvaluations",
        "CancelEvaluation",
        "WatchEvaluation",
    ),
    "MeasurementService": (
        "CreateMeasurement",
        "GetMeasurement",
        "ListMeasurements",
        "CancelMeasurement",
        "WatchMeasurement",
        "GetMeasurementFile",
    ),
    "InferenceService": ("Generate", "StreamGenerate", "Score"),
    "ExportService": ("ExportVersion",),
    "HistoryService": (
        "CreateDerivation",
        "GetDerivation",
        "ListDerivations",
        "CancelDerivation",
        "WatchDerivation",
        "CompareVersions",
        "CreateBisection",
        "GetBisection",
        "ListBisections",
        "CancelBisection",
        "WatchBisection",
    ),
}
"""Calls that change nothing, carry a request_id, or are idempotent. The rest is for the caller to repeat: a Rollback
whose answer was lost has rolled back."""

_RETRY_POLICY = {
    "maxAttempts": 5,  # gRPC's upper limit.
    "initialBackoff": "0.2s",
    "maxBackoff": "5s",
    "backoffMultiplier": 2.5,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Encryption. What is left out: the system's root certificates, no client certificate.

    `root_certificates` are those that the server's must be signed by. `certificate` and `key` are the client's own,
    given together, where the server asks for one (mTLS). `server_name` is the name in the server's certificate where
    it is not the address's.
    """

    root_certificates: Pem | None = None
    certificate: Pem | None = None
    key: Pem | None = field(default=None, repr=False)
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """GRPC's form of it. Raises InvalidInputError for a file that cannot be read, or half a pair."""
        if (self.certificate is None) != (self.key is None):
            raise InvalidInputError.at("tls", "a client certificate needs its key and the other way round; give both")
        return grpc.ssl_channel_credentials(
            root_certificates=_pem(self.root_certificates, "tls.root_certificates"),
            private_key=_pem(self.key, "tls.key"),
            certificate_chain=_pem(self.certificate, "tls.certificate"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Everything that a channel needs.

    Raises InvalidInputError for a server that is no host and port, and for a token that would go over the network in
    clear, or that no header can carry.
    """

    server: str = DEFAULT_SERVER
    token: str = field(default="", repr=False)
    tls: Tls | None = None
    timeout: float | None = DEFAULT_TIMEOUT
    max_message_bytes: int = MAX_MESSAGE_BYTES
    insecure_ok: bool = False

    def __post_init__(self) -> None:
        if _URL.match(self.server) or not self.server:
            # It may hold a password, which no error should repeat.
            raise InvalidInputError.at("server", "it is no HOST:PORT; leave http:// and the like, and a user, out")
        if not _TOKEN.fullmatch(self.token):
            raise InvalidInputError.at(
                "token", "it holds a space, a line break or a letter with an accent; copy it anew"
            )
        if self.token and self.tls is None and not self.insecure_ok and not _is_local(self.server):
            remedy = "give tls=Tls(), or insecure_ok=True where the network itself is private"
            raise InvalidInputError.at("token", f"the token would go to {self.server} in clear; {remedy}")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def options(self) -> list[tuple[str, str | int]]:
        """The channel's options."""
        named = [("grpc.ssl_target_name_override", self.tls.server_name)] if self.tls and self.tls.server_name else []
        return [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.service_config", service_config()),
            # A server that restarts is found again within seconds; gRPC's default waits up to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5000),
            *named,
        ]


def service_config() -> str:
    """GRPC's service config: which calls are repeated, and how."""
    names = [{"service": f"errata.v1.{service}", "method": rpc} for service, rpcs in _RETRIED.items() for rpc in rpcs]
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": _RETRY_POLICY}]})


def _is_local(server: str) -> bool:
    if server.startswith(("unix:", "unix-abstract:")):
        return True
    addresses = server.rpartition("/")[2].removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:")
    return all(_is_loopback(address) for address in addresses.split(","))


def _is_loopback(address: str) -> bool:
    bracketed = address.startswith("[")
    host = address[1:].partition("]")[0] if bracketed else address.partition(":")[0]
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False  # a name: who knows where it leads


def _pem(given: Pem | None, field: str) -> bytes | None:
    if given is None or isinstance(given, bytes):
        return given
    try:
        return Path(given).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidInputError.at(field, f"{str(given)!r} cannot be read: {reason}; check the path") from error
