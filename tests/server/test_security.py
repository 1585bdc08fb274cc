"""Roles for every RPC, callers by token, rates by caller, and TLS that is refused before it would fail."""

import asyncio
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from errata.server.errors import BusyError, ForbiddenError, MalformedError, UnauthenticatedError
from errata.server.ledger.rows import TokenRow
from errata.server.security import (
    ANONYMOUS,
    OPEN,
    ROLES,
    Authenticator,
    Caller,
    RateLimiter,
    Role,
    authorize,
    roles_from,
    roles_of,
    server_credentials,
)
from errata.server.settings import Settings, SettingsError
from errata.v1 import (
    edit_pb2,
    evaluation_pb2,
    export_pb2,
    history_pb2,
    inference_pb2,
    measurement_pb2,
    model_pb2,
    trace_pb2,
)

MODULES = (
    edit_pb2,
    evaluation_pb2,
    export_pb2,
    history_pb2,
    inference_pb2,
    measurement_pb2,
    model_pb2,
    trace_pb2,
)

ALL_METHODS = {
    f"/{service.full_name}/{method.name}"
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def row(**roles: str) -> TokenRow:
    made = datetime(2026, 7, 1, tzinfo=UTC)
    return TokenRow(
        name="ci", roles={k.replace("ALL", "*"): v for k, v in roles.items()}, create_time=made, revoked=False
    )


def test_every_rpc_has_a_role_and_no_role_is_without_its_rpc() -> None:
    assert len(ALL_METHODS) > 20
    assert set(ROLES) == ALL_METHODS


def test_whatever_changes_something_needs_more_than_to_read() -> None:
    changing = {
        m for m in ALL_METHODS if m.split("/")[2].startswith(("Create", "Cancel", "Promote", "Rollback", "Delete"))
    }
    assert {m for m, role in ROLES.items() if role is Role.READER} & changing == set()


@pytest.mark.parametrize(
    ("role", "method", "allowed"),
    [
        (Role.READER, "/errata.v1.InferenceService/Generate", True),
        (Role.READER, "/errata.v1.EditService/CreateEdit", False),
        (Role.EDITOR, "/errata.v1.EditService/CreateEdit", True),
        (Role.EDITOR, "/errata.v1.ModelService/GetModel", True),
        (Role.EDITOR, "/errata.v1.ModelService/DeleteVersion", False),
        (Role.ADMIN, "/errata.v1.ModelService/DeleteVersion", True),
        (Role.ADMIN, "/errata.v1.ModelService/NoSuchMethod", False),
        (Role.READER, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", True),
    ],
)
def test_a_role_allows_what_it_says(role: Role, method: str, allowed: bool) -> None:
    caller = Caller(name="ci", roles={"atlas": role})
    if allowed:
        authorize(caller, method, "atlas")
    else:
        with pytest.raises(ForbiddenError):
            authorize(caller, method, "atlas")


def test_a_role_is_for_its_own_model_or_for_all() -> None:
    create = "/errata.v1.EditService/CreateEdit"
    authorize(Caller(name="ci", roles={"*": Role.EDITOR}), create, "atlas")
    authorize(Caller(name="ci", roles={"*": Role.READER, "atlas": Role.EDITOR}), create, "atlas")
    authorize(Caller(name="ci", roles={"*": Role.EDITOR, "atlas": Role.READER}), create, "atlas")
    with pytest.raises(ForbiddenError, match="'ci' is reader for model 'other', and this needs editor"):
        authorize(Caller(name="ci", roles={"*": Role.READER, "atlas": Role.EDITOR}), create, "other")
    with pytest.raises(ForbiddenError, match="has no role for model 'other'"):
        authorize(Caller(name="ci", roles={"atlas": Role.ADMIN}), create, "other")


def test_a_list_of_models_is_open_to_whoever_has_any() -> None:
    listing = "/errata.v1.ModelService/ListModels"
    reader = Caller(name="ci", roles={"atlas": Role.READER})
    authorize(reader, listing, None)
    assert (reader.may_read("atlas"), reader.may_read("other")) == (True, False)
    with pytest.raises(ForbiddenError):
        authorize(Caller(name="ci", roles={}), listing, None)


def test_without_a_caller_only_health_is_open() -> None:
    for method in OPEN:
        authorize(None, method, None)
    for method in (*ALL_METHODS, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
        with pytest.raises(UnauthenticatedError, match="Bearer"):
            authorize(None, method, None)


def test_a_server_without_tokens_knows_everyone_as_anonymous() -> None:
    assert Authenticator(None).caller([("authorization", "Bearer whatever")]) is ANONYMOUS
    for method in ALL_METHODS:
        authorize(ANONYMOUS, method, "atlas")


def test_a_token_is_looked_up_at_every_call_so_that_a_revoked_one_ends() -> None:
    known = {"s3cret": row(atlas="editor", ALL="reader")}
    authenticator = Authenticator(known.get)
    metadata = [("user-agent", "x"), ("authorization", "bearer s3cret")]
    assert authenticator.caller(metadata) == Caller(name="ci", roles={"atlas": Role.EDITOR, "*": Role.READER})
    known.clear()
    with pytest.raises(UnauthenticatedError, match="revoked"):
        authenticator.caller(metadata)


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "")],
        [("authorization", "s3cret")],
        [("authorization", "Basic s3cret")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer " + "x" * 600)],
        [("authorization", b"Bearer s3cret")],
        [("authorization", "Bearer s3cret"), ("authorization", "Bearer other")],
        [("authorization-bin", b"Bearer s3cret")],
    ],
)
def test_metadata_without_one_bearer_token_never_reaches_the_ledger(metadata: list[tuple[str, str | bytes]]) -> None:
    def lookup(_secret: str) -> TokenRow:
        raise AssertionError("asked")

    with pytest.raises(UnauthenticatedError, match="Bearer TOKEN"):
        Authenticator(lookup).caller(metadata)


@pytest.mark.parametrize(
    "grants", [["atlas"], ["atlas=owner"], ["=reader"], ["a/b=reader"], ["a=reader", "a=admin"], []]
)
def test_what_is_no_grant_is_refused(grants: list[str]) -> None:
    with pytest.raises(MalformedError):
        roles_from(grants)


def test_grants_are_read_as_a_command_line_gives_them() -> None:
    roles = roles_from(["atlas=Editor", "*=reader"])
    assert roles == {"atlas": "editor", "*": "reader"}
    assert roles_of(roles) == {"atlas": Role.EDITOR, "*": Role.READER}


@dataclass
class Clock:
    """Seconds that pass when they are told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_caller_has_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    limiter = RateLimiter(60, burst=3, clock=clock)
    for _ in range(3):
        limiter.take("ci")
    with pytest.raises(BusyError, match="more than 60 calls a minute") as caught:
        limiter.take("ci")
    assert caught.value.retry_after == pytest.approx(1.0)
    assert caught.value.said_reason == "RATE_LIMITED"
    clock.now += 1.0
    limiter.take("ci")
    with pytest.raises(BusyError):
        limiter.take("ci")


def test_one_callers_haste_is_not_anothers() -> None:
    limiter = RateLimiter(1, burst=1, clock=Clock())
    limiter.take("a")
    limiter.take("b")
    with pytest.raises(BusyError):
        limiter.take("a")


def patiently(limiter: RateLimiter, clock: Clock) -> None:
    """Takes one call, after the wait it is told where it comes too soon."""
    try:
        limiter.take("ci")
    except BusyError as busy:
        clock.now += busy.retry_after or 0.0
        limiter.take("ci")


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 120), st.integers(1, 10))
def test_no_pattern_of_calls_gets_more_than_burst_and_rate(waits: list[float], per_minute: int, burst: int) -> None:
    clock = Clock(0.0)
    limiter = RateLimiter(per_minute, burst=burst, clock=clock)
    for taken, wait in enumerate(waits, 1):
        clock.now += wait
        patiently(limiter, clock)
        assert taken <= burst + clock.now * per_minute / 60 + 1e-6


def test_callers_that_have_rested_are_forgotten() -> None:
    clock = Clock()
    limiter = RateLimiter(60, burst=1, clock=clock, most=10)
    for n in range(100):
        limiter.take(f"caller {n}")
        clock.now += 1.0
    assert len(limiter._due) <= 10


@dataclass(frozen=True)
class Authority:
    """A CA that signs for loopback, and where its PEM files lie."""

    folder: Path
    certificate: Path
    issue: Callable[[str], tuple[Path, Path]]


def authority(folder: Path) -> Authority:
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])

    def signed(subject: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> bytes:
        today = datetime.now(UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - timedelta(days=1))
            .not_valid_after(today + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
        )
        return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(who: str) -> tuple[Path, Path]:
        own = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)])
        certificate, private = folder / f"{who}.pem", folder / f"{who}.key"
        certificate.write_bytes(signed(subject, own.public_key(), ca=False))
        private.write_bytes(
            own.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, private

    own = folder / "ca.pem"
    own.write_bytes(signed(name, key.public_key(), ca=True))
    return Authority(folder, own, issue)


class Echo(grpc.GenericRpcHandler):
    """Answers every method with what it was sent."""

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        async def echo(request: bytes, _context: object) -> bytes:
            return request

        return grpc.unary_unary_rpc_method_handler(echo)


async def answered(credentials: grpc.ServerCredentials, channel_credentials: grpc.ChannelCredentials) -> bytes:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", channel_credentials) as channel:
            call: Any = channel.unary_unary("/x/Echo")
            said: bytes = await call(b"hello", timeout=20)
            return said
    finally:
        await server.stop(None)


def test_without_a_certificate_there_is_no_tls() -> None:
    assert server_credentials(Settings()) is None


def test_a_caller_that_trusts_the_ca_is_answered_over_tls(tmp_path: Path) -> None:
    ca = authority(tmp_path / "ca")
    certificate, key = ca.issue("server")
    credentials = server_credentials(Settings(tls_certificate=certificate, tls_key=key))
    assert credentials
    trusting = grpc.ssl_channel_credentials(ca.certificate.read_bytes())
    assert asyncio.run(answered(credentials, trusting)) == b"hello"


def test_mutual_tls_answers_only_who_shows_a_certificate_of_its_ca(tmp_path: Path) -> None:
    ca, clients, strangers = (authority(tmp_path / n) for n in ("ca", "clients", "strangers"))
    certificate, key = ca.issue("server")
    credentials = server_credentials(
        Settings(tls_certificate=certificate, tls_key=key, tls_client_ca=clients.certificate)
    )
    assert credentials

    def trusting(own: tuple[Path, Path] | None) -> grpc.ChannelCredentials:
        chain, private = (own[0].read_bytes(), own[1].read_bytes()) if own else (None, None)
        return grpc.ssl_channel_credentials(ca.certificate.read_bytes(), private, chain)

    assert asyncio.run(answered(credentials, trusting(clients.issue("ci")))) == b"hello"
    for own in (None, strangers.issue("ci")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            asyncio.run(answered(credentials, trusting(own)))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_key_of_another_certificate_is_refused_at_start(tmp_path: Path) -> None:
    ca = authority(tmp_path / "ca")
    certificate, other_key = ca.issue("one")[0], ca.issue("two")[1]
    with pytest.raises(SettingsError, match="tls_key"):
        server_credentials(Settings(tls_certificate=certificate, tls_key=other_key))


def test_files_that_hold_no_pem_are_refused_at_start(tmp_path: Path) -> None:
    certificate, key = authority(tmp_path / "ca").issue("server")
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    with pytest.raises(SettingsError, match="tls_certificate"):
        server_credentials(Settings(tls_certificate=nothing, tls_key=key))
    with pytest.raises(SettingsError, match="tls_client_ca"):
        server_credentials(Settings(tls_certificate=certificate, tls_key=key, tls_client_ca=nothing))
