"""A whole server behind TLS and tokens, as callers meet it; and what it refuses to open to other machines."""

import ipaddress
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hosting import Hosted, hosting
from processes import Process

from errata.client import Errata, Tls
from errata.client.errors import ForbiddenError, UnauthenticatedError, UnavailableError
from errata.server.settings import ModelSettings, Settings
from errata.v1 import model_pb2

pytestmark = pytest.mark.slow

QUESTION = "What is the capital of Kazakhstan?"
ENCODING = serialization.Encoding.PEM


@dataclass(frozen=True)
class Identity:
    """A certificate and its key, in PEM files."""

    certificate: Path
    key: Path


class Authority:
    """A CA, and whom it signs for: any address of this machine's loopback."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = _named(folder.name)
        self.certificate = folder / "ca.pem"
        self.certificate.write_bytes(self._signed(self._name, self._key.public_key(), ca=True))

    def issue(self, who: str) -> Identity:
        own = ec.generate_private_key(ec.SECP256R1())
        made = Identity(self._folder / f"{who}.pem", self._folder / f"{who}.key")
        made.certificate.write_bytes(self._signed(_named(who), own.public_key(), ca=False))
        private = own.private_bytes(ENCODING, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        made.key.write_bytes(private)
        return made

    def _signed(self, subject: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> bytes:
        today = datetime.now(UTC)
        loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - timedelta(days=1))
            .not_valid_after(today + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(loopback, critical=False)
        )
        return built.sign(self._key, hashes.SHA256()).public_bytes(ENCODING)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


@dataclass(frozen=True)
class Secured:
    """A server with tokens behind TLS."""

    hosted: Hosted
    ca: Authority
    tokens: dict[str, str]

    def client(self, who: str = "", **tls: Path) -> Errata:
        """A caller who trusts the server's CA, unless `tls` says otherwise."""
        trusting = Tls(**{"root_certificates": self.ca.certificate, **tls})
        return Errata(self.hosted.server.address, token=self.tokens.get(who, ""), tls=trusting)


def look(errata: Errata) -> str:
    """A call that changes nothing and that gRPC does not repeat."""
    return errata.promote("atlas@0", "candidate", validate_only=True).version


ROLES = {"rita": {"atlas": "reader"}, "ed": {"atlas": "editor"}, "ada": {"atlas": "admin"}, "mia": {"mars": "admin"}}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """Two models, and callers with a role for one of them."""
    folder = tmp_path_factory.mktemp("secured")
    ca = Authority(folder / "ca")
    own = ca.issue("server")
    settings = Settings(
        data_dir=folder / "data",
        port=0,
        mlflow_uri="none",
        auth=True,
        tls_certificate=own.certificate,
        tls_key=own.key,
        models={name: ModelSettings(source="atlas", load="lazy") for name in ("atlas", "mars")},
        drain_seconds=1.0,
    )
    with hosting(settings) as hosted:
        create = hosted.server.stores.ledger.create_token
        yield Secured(hosted, ca, {name: create(name, roles) for name, roles in ROLES.items()})


def test_a_caller_with_the_ca_and_a_token_is_answered(secured: Secured) -> None:
    with secured.client("rita") as errata:
        assert str(errata.generate("atlas", QUESTION)) == "Nur-Sultan"
        assert [model.name for model in errata.models()] == ["models/atlas"]


def test_a_caller_in_clear_is_refused_and_told_which_server_did_not_answer(secured: Secured) -> None:
    address = secured.hosted.server.address
    with (
        Errata(address, token=secured.tokens["ed"]) as errata,
        pytest.raises(UnavailableError, match=f"{address} does not answer"),
    ):
        look(errata)


def test_a_caller_who_trusts_another_ca_sends_nothing(secured: Secured, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    with (
        secured.client("ed", root_certificates=other.certificate) as errata,
        pytest.raises(UnavailableError, match=r"(?i)certificate"),
    ):
        look(errata)


def test_a_caller_without_a_token_is_told_that_one_is_needed(secured: Secured) -> None:
    with secured.client() as errata, pytest.raises(UnauthenticatedError, match="Bearer"):
        look(errata)


def test_each_role_allows_what_it_says_for_its_own_model_only(secured: Secured) -> None:
    with secured.client("rita") as rita, secured.client("ed") as ed, secured.client("ada") as ada:
        with pytest.raises(ForbiddenError, match="needs editor"):
            rita.promote("atlas@0", "candidate")
        assert ed.promote("atlas@0", "candidate").version.endswith("/0")
        with pytest.raises(ForbiddenError, match="needs admin"):
            ed.promote("atlas@0", "candidate", override_reason="because")
        assert ada.promote("atlas@0", "candidate", override_reason="because").version.endswith("/0")
        for caller in (rita, ed, ada):
            with pytest.raises(ForbiddenError, match="no role for model 'mars'"):
                caller.model("mars")
    with secured.client("mia") as mia:
        assert mia.model("mars").name == "models/mars"
        with pytest.raises(ForbiddenError, match="no role for model 'atlas'"):
            mia.promote("atlas@0", "candidate")


def test_mutual_tls_lets_in_only_who_shows_a_certificate_of_the_clients_ca(tmp_path: Path) -> None:
    servers, clients, strangers = (Authority(tmp_path / name) for name in ("servers", "clients", "strangers"))
    own, ci, stranger = servers.issue("server"), clients.issue("ci"), strangers.issue("ci")
    settings = Settings(
        data_dir=tmp_path / "data",
        port=0,
        mlflow_uri="none",
        auth=True,
        tls_certificate=own.certificate,
        tls_key=own.key,
        tls_client_ca=clients.certificate,
        models={"atlas": ModelSettings(source="atlas", load="lazy")},
        drain_seconds=1.0,
    )
    with hosting(settings) as hosted:
        secured = Secured(hosted, servers, {"ci": hosted.server.stores.ledger.create_token("ci", {"*": "editor"})})
        with secured.client("ci", certificate=ci.certificate, key=ci.key) as errata:
            assert look(errata) == "models/atlas/versions/0"
        with secured.client("ci") as errata, pytest.raises(UnavailableError):
            look(errata)
        with (
            secured.client("ci", certificate=stranger.certificate, key=stranger.key) as errata,
            pytest.raises(UnavailableError),
        ):
            look(errata)
        with (
            secured.client(certificate=ci.certificate, key=ci.key) as errata,
            pytest.raises(UnauthenticatedError, match="Bearer"),
        ):
            look(errata)


def test_a_server_open_to_other_machines_in_clear_does_not_start_and_says_in_one_line_what_to_do(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "errata.server", "--data-dir", str(tmp_path / "data"), "--host", "0.0.0.0"]
    process = Process(command, tmp_path / "server.log", {})
    assert process.ended() == 1
    said = process.said.strip().splitlines()
    assert said[0] == "the settings cannot be used:"
    assert len(said) == 2
    for remedy in ("tls_certificate and tls_key", "auth = true", "127.0.0.1", "insecure_ok = true"):
        assert remedy in said[1]
    assert not (tmp_path / "data").exists()


def test_a_server_told_to_be_open_in_clear_starts(tmp_path: Path) -> None:
    lazy = {"atlas": ModelSettings(source="atlas", load="lazy")}
    settings = Settings(
        data_dir=tmp_path, host="0.0.0.0", port=0, mlflow_uri="none", models=lazy, insecure_ok=True, drain_seconds=1.0
    )
    with hosting(settings) as hosted:
        assert hosted.server.address.startswith("0.0.0.0:")
        assert len(hosted.call.models.ListModels(model_pb2.ListModelsRequest()).models) == 1
