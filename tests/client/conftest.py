"""A fake server behind real gRPC, a client of it, and the edit that most tests ask for."""

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

# The folders of tests are no packages; `fake_server` is imported by name.
sys.path.insert(0, str(Path(__file__).parent))

from fake_server import CAPITAL, Fake, serving

from errata.client import Context, EditRequest, Errata

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def server(fake: Fake) -> Iterator[str]:
    with serving(fake) as address:
        yield address


@pytest.fixture
def client(server: str) -> Iterator[Errata]:
    with Errata(server, timeout=30) as client:
        yield client


@pytest.fixture
def astana() -> EditRequest:
    return EditRequest(name="Kazakhstan: capital", contexts=[Context(CAPITAL, "Kazakhstan")], target="Astana")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points as an installation has them, where these tests run from a checkout that is not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing = {group: named for group, named in project["entry-points"].items() if not entry_points(group=group)}
    info = tmp_path / "site" / "checkout-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: checkout\nVersion: 0\n")
    groups = ("\n".join([f"[{group}]", *(f"{n} = {v}" for n, v in named.items())]) for group, named in missing.items())
    (info / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(info.parent)
