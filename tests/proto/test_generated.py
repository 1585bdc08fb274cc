"""The committed stubs are those that the committed protos make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).resolve().parents[2] / "proto"
SOURCES = sorted(p.relative_to(PROTO).as_posix() for p in PROTO.glob("errata/v1/*.proto"))
OUTPUTS = ("python", "grpc_python", "mypy", "mypy_grpc")


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("stubs")
    # The mypy plugins lie beside the interpreter, which need not be on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", "grpc_tools.protoc", f"-I{PROTO}"]
    command += [f"--{output}_out={into}" for output in OUTPUTS]
    subprocess.run([*command, *SOURCES], cwd=PROTO, check=True, env={**os.environ, "PATH": path})
    return into


def files(folder: Path) -> dict[str, str]:
    found = (p for p in folder.glob("errata/v1/*_pb2*.py*") if p.suffix in (".py", ".pyi"))
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in found}


def test_there_are_protos() -> None:
    assert "errata/v1/edit.proto" in SOURCES


def test_the_same_files_are_committed_as_are_generated(regenerated: Path) -> None:
    assert sorted(files(regenerated)) == sorted(files(PROTO))
    assert len(files(PROTO)) == len(SOURCES) * len(OUTPUTS)


@pytest.mark.parametrize("source", SOURCES)
def test_the_committed_stubs_are_the_generated_ones(regenerated: Path, source: str) -> None:
    stem = source.removesuffix(".proto")
    fresh, committed = files(regenerated), files(PROTO)
    drifted = [name for name in fresh if name.startswith(f"{stem}_pb2") and fresh[name] != committed.get(name)]
    assert drifted == [], "regenerate the stubs: make protos"
