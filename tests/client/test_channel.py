"""Retries, TLS, tokens, timeouts."""

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fake_server import CAPITAL, Fake, Fault, serving
from test_client import SERVICES

from errata.client import (
    AsyncErrata,
    BusyError,
    ClosedError,
    DeadlineExceededError,
    EditRequest,
    Errata,
    ErrataError,
    InvalidInputError,
    Tls,
    UnauthenticatedError,
    UnavailableError,
)
from errata.client.channel import Connection, service_config

BARE = Fault(code=grpc.StatusCode.UNAVAILABLE)
BUSY = Fault(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="BUSY", retry_after=0.1)


def test_exactly_the_calls_that_are_unsafe_to_repeat_are_never_repeated() -> None:
    [config] = json.loads(service_config())["methodConfig"]
    repeated = {(name["service"], name["method"]) for name in config["name"]}
    every = {(service.full_name, method.name) for service in SERVICES for method in service.methods}
    model_service = "errata.v1.ModelService"
    assert every - repeated == {(model_service, rpc) for rpc in ("Promote", "Rollback", "DeleteVersion")}
    assert repeated <= every


@pytest.mark.parametrize("fault", [BARE, BUSY])
def test_a_read_is_repeated_until_the_server_answers(client: Errata, fake: Fake, fault: Fault) -> None:
    fake.fail_next("GetModel", fault, fault)
    assert client.model("atlas").name == "models/atlas"
    assert fake.count("GetModel") == 3


def test_asyncio_reads_are_repeated_too(server: str, fake: Fake) -> None:
    fake.fail_next("Generate", BARE)

    async def ask() -> str:
        async with AsyncErrata(server) as client:
            return (await client.generate("atlas", CAPITAL)).text

    assert asyncio.run(ask()) == "Nur-Sultan"
    assert fake.count("Generate") == 2


def test_a_repeated_edit_is_made_once(client: Errata, fake: Fake, astana: EditRequest) -> None:
    fake.fail_next("CreateEdit", BARE)
    operation = client.edit("atlas", [astana])
    assert fake.count("CreateEdit") == 2
    assert [edit.name for edit in client.edits("atlas")] == [operation.name]


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.promote("atlas@0"),
        lambda client: client.rollback("atlas@champion"),
        lambda client: client.delete_version("atlas@1"),
    ],
)
@pytest.mark.parametrize("fault", [BARE, BUSY])
def test_a_call_that_moves_something_is_sent_once(
    client: Errata, fake: Fake, ask: Callable[[Errata], object], fault: Fault
) -> None:
    for rpc in ("Promote", "Rollback", "DeleteVersion"):
        fake.fail_next(rpc, fault)
    with pytest.raises(ErrataError):
        ask(client)
    assert len(fake.calls) == 1


def test_a_fault_other_than_unavailable_and_busy_is_not_repeated(client: Errata, fake: Fake) -> None:
    fake.fail_next("GetModel", Fault(code=grpc.StatusCode.INTERNAL, reason="INTERNAL"))
    with pytest.raises(ErrataError):
        client.model("atlas")
    assert fake.count("GetModel") == 1


@pytest.mark.slow
def test_a_server_that_stays_busy_is_given_up_with_its_hint(client: Errata, fake: Fake) -> None:
    fake.fail_next("GetModel", *[BUSY] * 9)
    with pytest.raises(BusyError) as caught:
        client.model("atlas")
    assert caught.value.retry_after == 0.1
    assert fake.count("GetModel") == 5


def test_a_call_ends_with_its_timeout_and_with_the_clients(server: str, fake: Fake) -> None:
    fake.fail_next("GetModel", *[BARE] * 50)
    with Errata(server, timeout=0.05) as client:
        with pytest.raises((DeadlineExceededError, UnavailableError)):
            client.model("atlas")
        fake.faults.clear()
        assert client.model("atlas", timeout=30).layers == 6


def test_a_token_goes_with_every_call_and_streams(fake: Fake, astana: EditRequest) -> None:
    fake.token = "secret"
    with serving(fake) as address, Errata(address, token="secret") as client:
        client.edit("atlas", [astana]).result()
        list(client.models()), client.stream("atlas", CAPITAL).result()
    assert fake.authorizations == {"Bearer secret"}


def test_a_token_goes_with_every_asyncio_call(fake: Fake, astana: EditRequest) -> None:
    fake.token = "secret"

    async def ask(address: str) -> None:
        async with AsyncErrata(address, token="secret") as client:
            await (await client.edit("atlas", [astana])).result()
            await client.stream("atlas", CAPITAL).result()

    with serving(fake) as address:
        asyncio.run(ask(address))
    assert fake.authorizations == {"Bearer secret"}


@pytest.mark.parametrize("token", ["", "wrong"])
def test_without_the_right_token_nothing_is_answered(fake: Fake, token: str) -> None:
    fake.token = "secret"
    with serving(fake) as address, Errata(address, token=token) as client, pytest.raises(UnauthenticatedError):
        client.model("atlas")


@pytest.mark.parametrize(
    "server",
    [
        "example.org:50051",
        "10.0.0.7:50051",
        "dns:///example.org:50051",
        "[2001:db8::1]:50051",
        "127.example.org:1",
        "ipv4:127.0.0.1:1,10.0.0.7:1",
    ],
)
def test_a_token_is_not_sent_in_clear_over_a_network(server: str) -> None:
    with pytest.raises(InvalidInputError, match="in clear; give tls"):
        Errata(server, token="secret")
    Errata(server, token="secret", insecure_ok=True).close()
    Errata(server, token="secret", tls=Tls()).close()


@pytest.mark.parametrize(
    "server",
    [
        "localhost:50051",
        "127.0.0.1:50051",
        "[::1]:50051",
        "unix:///run/errata",
        "dns:///localhost:1",
        "ipv4:127.0.0.1:1",
    ],
)
def test_a_token_may_be_sent_in_clear_to_this_machine(server: str) -> None:
    Errata(server, token="secret").close()


@pytest.mark.parametrize("ending", ["\n", "\r", " ", "\u00e9"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(ending: str) -> None:
    with pytest.raises(InvalidInputError, match="copy it anew") as caught:
        Errata("localhost:1", token=f"secret{ending}")
    assert caught.value.field == "token"
    assert "secret" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    connection = Connection(server="localhost:1", token="secret", tls=Tls(certificate=b"c", key=b"hidden"))
    assert "secret" not in repr(connection)
    assert "hidden" not in repr(connection)


class Certificates:
    """An authority, and what it signs, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.root = folder / "root.pem"
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
        self._write(self.root, self._sign(self._name, self._key, authority=True))

    def issue(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate, private = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        self._write(certificate, self._sign(subject, key, authority=False))
        form = serialization.PrivateFormat.PKCS8
        private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        return certificate, private

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> x509.Certificate:
        now = datetime.now(UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    @staticmethod
    def _write(path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


def _server_credentials(certificates: Certificates, *, ask_client: bool) -> grpc.ServerCredentials:
    certificate, key = certificates.issue("server")
    pair = [(key.read_bytes(), certificate.read_bytes())]
    root = certificates.root.read_bytes()
    return grpc.ssl_server_credentials(pair, root if ask_client else None, ask_client)


def test_an_encrypted_server_is_reached_with_its_root_certificate_as_path_or_bytes(
    fake: Fake, certificates: Certificates
) -> None:
    fake.token = "secret"
    with serving(fake, credentials=_server_credentials(certificates, ask_client=False)) as address:
        for root in (certificates.root, str(certificates.root), certificates.root.read_bytes()):
            with Errata(address, tls=Tls(root_certificates=root), token="secret") as client:
                assert client.generate("atlas", CAPITAL).text == "Nur-Sultan"


def test_a_server_that_another_authority_signed_is_not_trusted(
    fake: Fake, certificates: Certificates, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = Certificates(tmp_path / "other")
    with (
        serving(fake, credentials=_server_credentials(certificates, ask_client=False)) as address,
        Errata(address, tls=Tls(root_certificates=other.root)) as client,
        pytest.raises(UnavailableError),
    ):
        client.promote("atlas@0")
    assert fake.calls == []


def test_a_client_certificate_opens_a_server_that_asks_for_one(fake: Fake, certificates: Certificates) -> None:
    certificate, key = certificates.issue("client")
    tls = Tls(root_certificates=certificates.root, certificate=certificate, key=key)
    with serving(fake, credentials=_server_credentials(certificates, ask_client=True)) as address:
        with Errata(address, tls=tls) as client:
            assert client.model("atlas").layers == 6

        async def ask() -> int:
            async with AsyncErrata(address, tls=tls) as client:
                return (await client.model("atlas")).layers

        assert asyncio.run(ask()) == 6
        with Errata(address, tls=Tls(root_certificates=certificates.root)) as client, pytest.raises(UnavailableError):
            client.promote("atlas@0")


def test_half_a_client_certificate_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="needs its key and the other way round"):
        Errata(tls=Tls(certificate=b"x"))
    with pytest.raises(InvalidInputError, match=r"tls\.root_certificates: .*cannot be read: No such file"):
        Errata(tls=Tls(root_certificates=tmp_path / "none.pem"))


@pytest.mark.parametrize("server", ["http://localhost:50051", "https://ana:secret@localhost", "ana:secret@host:1", ""])
def test_a_server_is_a_host_and_a_port_and_no_password_is_repeated(server: str) -> None:
    with pytest.raises(InvalidInputError, match="it is no HOST:PORT") as caught:
        Errata(server)
    assert "secret" not in str(caught.value)


def test_a_client_that_was_closed_says_so(server: str) -> None:
    client = Errata(server)
    client.close()
    client.close()
    for ask in (
        lambda: client.model("atlas"),
        lambda: list(client.versions("atlas")),
        lambda: client.stream("atlas@0", "Where is Oslo?").result(),
    ):
        with pytest.raises(ClosedError, match="the client is closed; open another"):
            ask()


def test_an_asyncio_client_that_was_closed_says_so(server: str) -> None:
    async def asked() -> None:
        client = AsyncErrata(server)
        await client.close()
        await client.close()
        with pytest.raises(ClosedError):
            await client.model("atlas")
        with pytest.raises(ClosedError):
            await client.stream("atlas@0", "Where is Oslo?").result()

    asyncio.run(asked())
