"""Files of checks written by the test that reads them, and a version of the fake server that has forgotten Norway."""

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from fake_server import CAPITAL, Fake

from errata.v1 import model_pb2

NORWAY = "What is the capital of Norway?"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a file of checks and returns its path."""

    def written(text: str, name: str = "facts.errata.yaml") -> Path:
        path = tmp_path / name
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return written


@pytest.fixture
def edited(fake: Fake) -> Fake:
    """A candidate that knows Astana, and no longer Oslo."""
    version = model_pb2.Version()
    version.CopyFrom(fake.versions["models/atlas/versions/0"])
    version.name, version.parent = "models/atlas/versions/1", "models/atlas/versions/0"
    version.delta_sha256 = "cd" * 32
    fake.versions[version.name] = version
    fake.answers[version.name] = {CAPITAL: "Astana", NORWAY: "Bergen"}
    fake.aliases["models/atlas/aliases/candidate"] = [version.name]
    return fake
