"""What is built, what it requires and what the lock pins, all read from the checkout, without a network."""

import email
import importlib.metadata
import re
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import hatchling.build
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PORTIONS = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]


def build_wheel(project: Path, into: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)  # A build backend builds the folder it stands in (PEP 517).
        return into / hatchling.build.build_wheel(str(into))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [path] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(path))


def portion_files(portion: str) -> set[str]:
    """The files of a portion, named as they are imported: below the top-level folder."""
    top = ROOT / Path(portion).parts[0]
    return {
        path.relative_to(top).as_posix()
        for path in (ROOT / portion).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


@pytest.mark.parametrize("portion", PORTIONS)
def test_the_wheel_holds_every_file_of_a_portion(portion: str, names: set[str]) -> None:
    package = Path(*Path(portion).parts[1:]).as_posix()
    assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert portion_files(portion) - names == set()


def test_the_wheel_holds_only_the_portions_and_its_metadata(names: set[str]) -> None:
    outside = names - set().union(*map(portion_files, PORTIONS))
    migrations = {name for name in outside if name.startswith("errata/server/ledger/migrations/")}
    assert {name.split("/")[0] for name in outside - migrations} == {f"errata-{PROJECT['version']}.dist-info"}
    assert "errata/server/ledger/migrations/versions/0001_ledger.py" in migrations


def test_errata_is_a_namespace_package(names: set[str]) -> None:
    assert "errata/__init__.py" not in names
    assert list(ROOT.glob("*/errata/__init__.py")) == []
    # A top-level folder that is a package would be imported by its own name, `proto` or `server`.
    assert [portion for portion in PORTIONS if (ROOT / portion).parents[1].joinpath("__init__.py").exists()] == []


def test_the_source_distribution_builds_the_same_wheel(
    tmp_path: Path, names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / hatchling.build.build_sdist(str(tmp_path))) as archive:
        # An attribute, because extractall takes no `filter` before 3.11.4 and warns without one from 3.12 on.
        archive.extraction_filter = lambda member, path: member
        archive.extractall(tmp_path)
    rebuilt = build_wheel(tmp_path / f"errata-{PROJECT['version']}", tmp_path)
    with zipfile.ZipFile(rebuilt) as archive:
        assert set(archive.namelist()) == names


def test_every_portion_is_named_wherever_a_tool_must_know_it() -> None:
    portions = {
        init.parent.relative_to(ROOT).as_posix()
        for init in ROOT.glob("*/errata/**/__init__.py")
        if not (init.parents[1] / "__init__.py").exists()
    }
    assert set(PORTIONS) == portions

    tools = PYPROJECT["tool"]
    tops = {Path(portion).parts[0] for portion in portions}
    for place in [
        tools["hatch"]["build"]["dev-mode-dirs"],
        tools["hatch"]["build"]["targets"]["wheel"]["sources"],
        tools["mypy"]["files"],
        tools["mypy"]["mypy_path"],
        tools["pytest"]["pythonpath"],
        tools["ruff"]["src"],
    ]:
        assert set(place) == tops


def test_a_client_needs_only_grpcio_and_protobuf(metadata: Message) -> None:
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    base = {requirement.name for requirement in requirements if requirement.marker is None}
    cli = {r.name for r in requirements if r.marker is not None and r.marker.evaluate({"extra": "cli"})}
    assert base == {"grpcio", "protobuf"}
    assert cli == {"pydantic", "pyyaml", "rich", "typer"}


def test_the_wheel_and_the_installation_have_the_version_of_pyproject(metadata: Message) -> None:
    assert metadata["Version"] == PROJECT["version"]
    assert importlib.metadata.version("errata") == PROJECT["version"]


def test_the_version_is_written_nowhere_else() -> None:
    sources = [path for portion in PORTIONS for path in (ROOT / portion).rglob("*.py")]
    assert [path for path in sources if PROJECT["version"] in path.read_text(encoding="utf-8")] == []


def test_the_lock_pins_exactly_and_names_no_place() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pin = re.compile(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*")  # no local version, URL, option or path
    assert [line for line in lines if not line.startswith("#") and not pin.fullmatch(line)] == []


def test_the_lock_leaves_the_choice_of_an_accelerator_to_the_machine() -> None:
    assert [name for name in locked() if name.startswith(("nvidia", "cuda", "triton"))] == []


def test_the_lock_satisfies_every_requirement() -> None:
    extras = PROJECT["optional-dependencies"].values()
    requirements = [Requirement(text) for group in [PROJECT["dependencies"], *extras] for text in group]
    pins = locked()
    unmet = [str(r) for r in requirements if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"))]
    assert unmet == []


def test_what_is_rays_own_is_used_of_one_minor_release_alone() -> None:
    sources = [path for portion in PORTIONS for path in (ROOT / portion).rglob("*.py")]
    assert any("from ray._private" in path.read_text(encoding="utf-8") for path in sources)
    extras = [Requirement(text) for group in PROJECT["optional-dependencies"].values() for text in group]
    minor = int(locked()["ray"].split(".")[1])
    taken = [r.specifier.contains(f"2.{minor + 1}.0") for r in extras if r.name == "ray"]
    assert taken == [False, False]
