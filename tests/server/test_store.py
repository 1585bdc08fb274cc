"""What lies on disk appears whole or not at all, is what it says it is, and lies nowhere else."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

# The folders of tests are no packages; `tiny` is imported by name.
sys.path.insert(0, str(Path(__file__).parents[1] / "editor"))

from tiny import random_delta, tiny_model

from errata.editor.delta import Delta, empty_delta
from errata.editor.errors import CorruptDeltaError, DeltaError, WrongBaseError
from errata.server.errors import MalformedError, NotFoundError
from errata.server.store import ArtifactStore, DeltaStore

MODEL = tiny_model("llama")
DELTA = random_delta(MODEL, {1: 2, 3: 1})

NO_HASHES = {
    "empty": "",
    "short": "a" * 63,
    "upper case": "A" * 64,
    "a path": "../" + "a" * 61,
    "a newline": "a" * 63 + "\n",
    "another script's digits": "٣" * 64,
    "a longer one": "a" * 65,
}
NO_NAMES = ("", ".", "..", ".hidden", "../up", "a/b", "a\\b", "/etc", "a\0b", "a\n", "ä", "-" * 65, "%2e%2e", "a b")


@pytest.fixture
def deltas(tmp_path: Path) -> DeltaStore:
    return DeltaStore(tmp_path / "deltas")


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def everything(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


class HalfWritten(Delta):
    """The disk is full before it is saved."""

    def save(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")


def test_a_stored_delta_is_found_by_its_hash(deltas: DeltaStore) -> None:
    stored = deltas.put(DELTA, MODEL)
    assert (stored.sha256, stored.nbytes) == (DELTA.sha256, DELTA.nbytes)
    assert deltas.get(stored.sha256, MODEL).sha256 == DELTA.sha256
    assert deltas.folder(stored.sha256).name == DELTA.sha256


def test_the_same_delta_is_stored_once_and_left_as_it_is(deltas: DeltaStore) -> None:
    folder = deltas.folder(deltas.put(DELTA, MODEL).sha256)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    deltas.put(DELTA, MODEL)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [DELTA.sha256]


def test_a_damaged_delta_is_refused_and_mended_when_it_is_stored_again(deltas: DeltaStore) -> None:
    folder = deltas.folder(deltas.put(DELTA, MODEL).sha256)
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CorruptDeltaError, match=DELTA.sha256):
        deltas.get(DELTA.sha256)
    deltas.put(DELTA, MODEL)
    assert deltas.get(DELTA.sha256).sha256 == DELTA.sha256


def test_a_delta_under_another_ones_hash_is_refused(deltas: DeltaStore) -> None:
    other = "0" * 64
    deltas.folder(deltas.put(DELTA, MODEL).sha256).rename(deltas.folder(DELTA.sha256).with_name(other))
    with pytest.raises(CorruptDeltaError, match=DELTA.sha256[:12]):
        deltas.get(other, MODEL)


def test_a_delta_that_cannot_be_written_leaves_nothing(deltas: DeltaStore, tmp_path: Path) -> None:
    half = HalfWritten(base_sha256=DELTA.base_sha256, layers=DELTA.layers, modules=DELTA.modules)
    with pytest.raises(OSError, match="no space"):
        deltas.put(half, MODEL)
    assert everything(tmp_path) == set()
    with pytest.raises(NotFoundError, match=DELTA.sha256):
        deltas.get(DELTA.sha256)


def test_a_delta_of_another_base_and_an_empty_one_are_refused(deltas: DeltaStore, tmp_path: Path) -> None:
    with pytest.raises(WrongBaseError):
        deltas.put(DELTA, tiny_model("llama", seed=1))
    with pytest.raises(DeltaError, match="it is its base"):
        deltas.put(empty_delta(MODEL), MODEL)
    deltas.put(DELTA, MODEL)
    with pytest.raises(WrongBaseError):
        deltas.get(DELTA.sha256, tiny_model("llama", seed=1))
    assert deltas.get(DELTA.sha256).base_sha256 == MODEL.base_sha256


def test_a_removed_delta_is_gone_and_may_be_removed_again(deltas: DeltaStore, tmp_path: Path) -> None:
    deltas.put(DELTA, MODEL)
    deltas.remove(DELTA.sha256)
    deltas.remove(DELTA.sha256)
    assert everything(tmp_path) == set()
    with pytest.raises(NotFoundError) as refused:
        deltas.folder(DELTA.sha256)
    assert refused.value.said_reason == "DELTA_NOT_FOUND"


@pytest.mark.parametrize("name", NO_HASHES.values(), ids=NO_HASHES)
def test_only_a_hash_names_a_delta(deltas: DeltaStore, name: str, tmp_path: Path) -> None:
    for refused in (deltas.get, deltas.folder, deltas.remove):
        with pytest.raises(MalformedError, match="64 digits") as error:
            refused(name)
        assert error.value.said_reason == "MALFORMED_NAME"
    assert everything(tmp_path) == set()


def test_threads_that_store_one_delta_at_once_store_it_once(deltas: DeltaStore, tmp_path: Path) -> None:
    together = threading.Barrier(8)
    failed: list[BaseException] = []

    def put() -> None:
        together.wait()
        try:
            deltas.put(DELTA, MODEL)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=put) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert deltas.get(DELTA.sha256).sha256 == DELTA.sha256
    assert [p.name for p in (tmp_path / "deltas").iterdir()] == [DELTA.sha256]


def test_an_edits_files_are_found_as_they_were_written(artifacts: ArtifactStore) -> None:
    files = {"report.html": b"<html>", "request.json": b"{}", "empty": b""}
    assert artifacts.write("edit-1", files) == artifacts.folder("edit-1")
    assert {p.name: p.read_bytes() for p in artifacts.folder("edit-1").iterdir()} == files


def test_writing_again_replaces_all_files_of_that_edit_and_no_others(artifacts: ArtifactStore, tmp_path: Path) -> None:
    artifacts.write("other", {"report.html": b"other"})
    artifacts.write("edit", {"report.html": b"first", "old.txt": b"old"})
    artifacts.write("edit", {"report.html": b"second"})
    assert {p.name: p.read_bytes() for p in artifacts.folder("edit").iterdir()} == {"report.html": b"second"}
    assert (artifacts.folder("other") / "report.html").read_bytes() == b"other"
    assert len(everything(tmp_path)) == 2


def test_files_that_cannot_be_written_leave_the_older_ones(artifacts: ArtifactStore, tmp_path: Path) -> None:
    artifacts.write("edit", {"report.html": b"first"})
    with pytest.raises(TypeError):
        artifacts.write("edit", {"report.html": b"second", "request.json": None})  # type: ignore[dict-item]
    assert (artifacts.folder("edit") / "report.html").read_bytes() == b"first"
    assert len(everything(tmp_path)) == 1


def test_a_sweep_removes_what_a_cut_off_write_left_and_nothing_else(
    deltas: DeltaStore, artifacts: ArtifactStore, tmp_path: Path
) -> None:
    deltas.sweep()
    artifacts.sweep()
    deltas.put(DELTA, MODEL)
    artifacts.write("edit", {"report.html": b"first"})
    whole = everything(tmp_path)
    for left in (
        "deltas/.partial-x",
        "artifacts/.partial-x",
        "artifacts/.content/.partial-x",
        "artifacts/.content/e.x",
    ):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_bytes(b"half")
    deltas.sweep()
    artifacts.sweep()
    assert everything(tmp_path) == whole
    assert (artifacts.folder("edit") / "report.html").read_bytes() == b"first"


def test_removed_files_are_gone_and_may_be_removed_again(artifacts: ArtifactStore, tmp_path: Path) -> None:
    artifacts.write("edit", {"report.html": b"first"})
    artifacts.remove("edit")
    artifacts.remove("edit")
    assert everything(tmp_path) == set()
    with pytest.raises(NotFoundError) as refused:
        artifacts.folder("edit")
    assert refused.value.said_reason == "ARTIFACTS_NOT_FOUND"


@pytest.mark.parametrize("name", NO_NAMES)
def test_no_name_becomes_a_path(artifacts: ArtifactStore, name: str, tmp_path: Path) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: artifacts.write(name, {"a": b""}),
        lambda: artifacts.folder(name),
        lambda: artifacts.remove(name),
        lambda: artifacts.write("edit", {"fine": b"", name * 2 if set(name) == {"-"} else name: b""}),
    ]
    for attempt in attempts:
        with pytest.raises(MalformedError):
            attempt()
    assert everything(tmp_path) == set()
