"""Ledgers on both databases. PostgreSQL comes from Debian's packages, in a folder and on a socket of its own."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

# The folders of tests are no packages; `ledgers` is imported by name.
sys.path.insert(0, str(Path(__file__).parent))

from ledgers import BASE, Clock, Edit, Postgres, new_version

from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, VersionRow


def migrate(url: str) -> None:
    ledger = Ledger(url)
    ledger.migrate()
    ledger.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        reason = "PostgreSQL's server is not installed (Debian: apt-get install postgresql)"
        # A gate that leaves half of the ledger untested has not passed.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    # Not below tmp_path: a socket's path has room for 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="errata-pg-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    server = Postgres(folder, found[-1].parent)
    try:
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind in turn."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/ledger.db"
        return
    server: Postgres = request.getfixturevalue("postgres")
    url = server.new_database()
    yield url
    server.drop_database(url)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("migrated") / "ledger.db"
    migrate(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> str:
    """The name of a database to copy."""
    url = postgres.new_database()
    migrate(url)
    return make_url(url).database or ""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated database of each kind in turn; a copy, as migrating takes its time."""
    if request.param == "sqlite":
        file = shutil.copy(request.getfixturevalue("migrated_sqlite"), tmp_path)
        yield f"sqlite:///{file}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    url = server.new_database(copied=request.getfixturevalue("migrated_postgres"))
    yield url
    server.drop_database(url)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def opened(url: str, clock: Clock) -> Iterator[Callable[[], Ledger]]:
    """Opens the same database again, as another process would."""
    ledgers = []

    def open_ledger() -> Ledger:
        ledgers.append(Ledger(url, clock))
        return ledgers[-1]

    yield open_ledger
    for ledger in ledgers:
        ledger.close()


@pytest.fixture
def ledger(opened: Callable[[], Ledger]) -> Ledger:
    """A ledger with the model "atlas"."""
    ledger = opened()
    ledger.ensure_model("atlas")
    ledger.describe_model("atlas", base_sha256=BASE, architecture="LlavaForConditionalGeneration", layers=6)
    return ledger


@pytest.fixture
def edit(ledger: Ledger) -> Edit:
    def make(parent: int = 0, *, rejections: tuple[str, ...] = (), publish: bool = True) -> VersionRow:
        job = ledger.create_job(JobKind.EDIT, "atlas", version=parent, request=b"request", request_id=None, actor="ada")
        return ledger.commit_edit(job.id, new_version(rejections), result=b"result", publish=publish)

    return make
