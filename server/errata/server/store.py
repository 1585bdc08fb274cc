"""What the server keeps on disk beside the ledger: deltas by their hash, and each edit's files.

Everything appears whole or not at all: it is written beside its place, flushed to the disk and renamed. No name that
a caller gives becomes a path before it has been checked. Knows nothing of jobs, versions or MLflow.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from errata.editor.delta import Delta, check_base, load_delta
from errata.editor.errors import CorruptDeltaError
from errata.editor.model import EditableModel
from errata.server.errors import MalformedError, NotFoundError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_EDIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PARTIAL = ".partial-"
_CONTENT = ".content"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDelta:
    """A delta that is on the disk: its name, and the bytes of its factors."""

    sha256: str
    nbytes: int


class DeltaStore:
    """Deltas as PEFT adapter folders, each named by its SHA-256. May be used from any thread."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, delta: Delta, model: EditableModel) -> StoredDelta:
        """Stores a delta of this model; one that is there already is left, or mended if it was damaged.

        Raises WrongBaseError for a delta of another base and DeltaError for one that is empty.
        """
        check_base(delta, model)
        stored = StoredDelta(sha256=delta.sha256, nbytes=delta.nbytes)
        if not self._intact(stored.sha256):
            self.remove(stored.sha256)
            self._write(delta, self._path(stored.sha256))
        return stored

    def get(self, sha256: str, model: EditableModel | None = None) -> Delta:
        """The delta of that hash, which is taken again.

        Raises NotFoundError where there is none, CorruptDeltaError where it was altered, and WrongBaseError where
        `model` is not its base.
        """
        folder = self.folder(sha256)
        delta = load_delta(folder, model)
        if delta.sha256 != sha256:
            raise CorruptDeltaError(f"{folder} holds the delta {delta.sha256[:12]}…; restore the folder from a backup")
        return delta

    def folder(self, sha256: str) -> Path:
        """Where it lies. Raises NotFoundError where it does not, MalformedError where the hash is none."""
        path = self._path(sha256)
        if not path.is_dir():
            raise NotFoundError(
                f"the delta {sha256} is not in {self._root}; restore the folder from a backup", reason="DELTA_NOT_FOUND"
            )
        return path

    def remove(self, sha256: str) -> None:
        """Removes it. Idempotent."""
        _remove(self._path(sha256), self._root)

    def sweep(self) -> None:
        """Removes what a write that was cut off left behind. For a moment when nothing is written."""
        _sweep(self._root)

    def _write(self, delta: Delta, target: Path) -> None:
        with _partial(self._root) as partial:
            delta.save(partial)
            _flush(partial)
            try:
                partial.rename(target)
            except OSError:
                # Another thread stored the same delta meanwhile.
                if not self._intact(target.name):
                    raise
        _flush_folder(self._root)

    def _intact(self, sha256: str) -> bool:
        try:
            self.get(sha256)
        except (NotFoundError, CorruptDeltaError):
            return False
        return True

    def _path(self, sha256: str) -> Path:
        return self._root / _checked(_SHA256, sha256, "delta_sha256", "64 digits of 0-9 and a-f")


class ArtifactStore:
    """A folder of named files for each edit. May be used from any thread.

    An edit's name is a link to its folder, because a link can be replaced in one step and a folder cannot.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, edit_id: str, files: Mapping[str, bytes]) -> Path:
        """Writes an edit's files, in place of all that it had, and returns the folder.

        Raises MalformedError for a name that could be a path.
        """
        link = self._link(edit_id)
        for name in files:
            _checked(_FILE, name, "files", "1-100 letters, digits, '.', '-' and '_', the first a letter or digit")
        content = self._root / _CONTENT
        with _partial(content) as partial:
            for name, data in files.items():
                (partial / name).write_bytes(data)
            _flush(partial)
            folder = partial.rename(content / partial.name.replace(_PARTIAL, f"{edit_id}."))
        _flush_folder(content)
        before = link.resolve() if link.is_symlink() else None
        self._point(link, folder)
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return folder

    def folder(self, edit_id: str) -> Path:
        """Where an edit's files lie. Raises NotFoundError where there are none."""
        link = self._link(edit_id)
        if not link.is_dir():
            raise NotFoundError(f"edit {edit_id} has no files in {self._root}", reason="ARTIFACTS_NOT_FOUND")
        return link.resolve()

    def read(self, edit_id: str, name: str) -> bytes:
        """One of an edit's files. Raises NotFoundError where it has none of that name."""
        _checked(_FILE, name, "file", "the name of a file")
        try:
            return (self.folder(edit_id) / name).read_bytes()
        except FileNotFoundError:
            raise NotFoundError(f"{edit_id} has no file {name} any more", reason="FILE_NOT_FOUND") from None

    def remove(self, edit_id: str) -> None:
        """Removes an edit's files. Idempotent."""
        link = self._link(edit_id)
        if link.is_symlink():
            folder = link.resolve()
            link.unlink()
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what a write that was cut off left behind. For a moment when nothing is written."""
        _sweep(self._root)
        used = {p.resolve() for p in self._root.iterdir() if p.is_symlink()} if self._root.is_dir() else set()
        for folder in (self._root / _CONTENT).glob("*"):
            if folder.resolve() not in used:
                shutil.rmtree(folder)

    def _point(self, link: Path, folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=self._root) as beside:
            fresh = Path(beside, link.name)
            fresh.symlink_to(Path(_CONTENT, folder.name))
            fresh.replace(link)
        _flush_folder(self._root)

    def _link(self, edit_id: str) -> Path:
        return self._root / _checked(_EDIT, edit_id, "edit", "1-64 letters, digits, '-' and '_'")


def _checked(pattern: re.Pattern[str], name: str, field: str, wanted: str) -> str:
    if not pattern.fullmatch(name):
        raise MalformedError(f"{name!r} is malformed; {field} takes {wanted}", field=field, reason="MALFORMED_NAME")
    return name


@contextmanager
def _partial(root: Path) -> Iterator[Path]:
    """A new folder to be filled and renamed; gone on the way out if it was not."""
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, root: Path) -> None:
    """Takes the folder away under its name at once, and then its content."""
    if folder.exists():
        with _partial(root) as beside:
            folder.rename(beside / folder.name)


def _sweep(root: Path) -> None:
    for leftover in root.glob(f"{_PARTIAL}*"):
        shutil.rmtree(leftover)


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
