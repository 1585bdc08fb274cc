"""Exported folders, received: written beside their place, checked file by file, and put there whole or not at all.

What a server sends is not trusted with this machine's disk: a file's name must be a plain one.
"""

import hashlib
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from errata.client.calls import Call
from errata.client.errors import InternalError, InvalidInputError, UnavailableError
from errata.client.names import NameLike, full_name
from errata.v1 import export_pb2

S = TypeVar("S", bound=StrEnum)

_NAME = re.compile(r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,199}")
_MANIFEST = "errata.json"
"""What every export holds, and by which an earlier one is known."""


class ExportFormat(StrEnum):
    """What is exported: a PEFT adapter, the same at one rank for vLLM and SGLang, or the whole checkpoint."""

    ADAPTER = "adapter"
    UNIFORM = "uniform"
    MERGED = "merged"


class ExportDtype(StrEnum):
    """What merged weights are stored in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """A file of the folder. `size` is in bytes, `sha256` hexadecimal."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """One merged layer: the largest |stored − exact|, and ‖stored − exact‖ relative to ‖ΔW‖ (Frobenius)."""

    layer: int
    max_error: float
    relative_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A folder that was written. `rank` is the uniform one, else 0; `rounding` is empty for an adapter: it is exact."""

    folder: Path
    version: str
    files: tuple[ExportedFile, ...] = field(repr=False)
    rounding: tuple[Rounding, ...]
    rank: int


_FORMATS = {
    ExportFormat.ADAPTER: export_pb2.EXPORT_FORMAT_ADAPTER,
    ExportFormat.UNIFORM: export_pb2.EXPORT_FORMAT_UNIFORM_ADAPTER,
    ExportFormat.MERGED: export_pb2.EXPORT_FORMAT_MERGED,
}
_DTYPES = {
    ExportDtype.FLOAT32: export_pb2.EXPORT_DTYPE_FLOAT32,
    ExportDtype.BFLOAT16: export_pb2.EXPORT_DTYPE_BFLOAT16,
    ExportDtype.FLOAT16: export_pb2.EXPORT_DTYPE_FLOAT16,
}


def export_version(
    version: NameLike, *, format: ExportFormat | str, dtype: ExportDtype | str | None, license: str
) -> Call[export_pb2.ExportVersionResponse]:
    """The folder of a version. Raises InvalidInputError for a format or dtype that there is not."""
    request = export_pb2.ExportVersionRequest(
        name=full_name(version),
        format=_FORMATS[_member(ExportFormat, format, "format")],
        dtype=export_pb2.EXPORT_DTYPE_UNSPECIFIED if dtype is None else _DTYPES[_member(ExportDtype, dtype, "dtype")],
        license=license,
    )
    return Call("/errata.v1.ExportService/ExportVersion", request, export_pb2.ExportVersionResponse.FromString)


class FolderWriter:
    """Takes an export's messages, within a `with`, and puts the folder in its place with `finish`.

    Raises InvalidInputError (`folder`) when it is entered, for a place that is taken: a file, a folder that is not
    empty or, with `overwrite`, one that holds no earlier export.
    """

    def __init__(self, folder: str | PathLike[str], *, overwrite: bool) -> None:
        self._folder, self._overwrite = Path(folder).resolve(), overwrite
        self._partial = self._folder.parent / f".{self._folder.name}.{secrets.token_hex(4)}.partial"
        self._hashes: dict[str, hashlib._Hash] = {}
        self._summary: export_pb2.ExportSummary | None = None

    def __enter__(self) -> "FolderWriter":
        _check_place(self._folder, overwrite=self._overwrite)
        with self._writable():
            self._partial.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, part: export_pb2.ExportVersionResponse) -> None:
        """Writes the next piece. Raises InternalError for a file that may not be in a folder."""
        match part.WhichOneof("part"):
            case "chunk":
                self._write(part.chunk)
            case "summary":
                self._summary = part.summary

    def finish(self) -> Export:
        """Checks every file, and renames the folder to its place.

        Raises UnavailableError where the end is missing, InternalError where a file is not what the server sent.
        """
        summary = self._summary
        if summary is None:
            raise UnavailableError("the export was cut off before its end; export it again")
        self._check(summary.files)
        _check_place(self._folder, overwrite=self._overwrite)
        with self._writable():
            _replace(self._partial, self._folder)
        return Export(
            folder=self._folder,
            version=summary.version,
            files=tuple(ExportedFile(file=f.file, size=f.size, sha256=f.sha256) for f in summary.files),
            rounding=tuple(
                Rounding(layer=r.layer, max_error=r.max_error, relative_error=r.relative_error)
                for r in summary.rounding
            ),
            rank=summary.rank,
        )

    def _write(self, chunk: export_pb2.ExportChunk) -> None:
        if not _NAME.fullmatch(chunk.file):
            raise InternalError(
                f"the server sent a file named {chunk.file[:100]!a}, which no export holds", reason="EXPORT_DAMAGED"
            )
        with self._writable(), (self._partial / chunk.file).open("ab") as file:
            file.write(chunk.data)
        self._hashes.setdefault(chunk.file, hashlib.sha256()).update(chunk.data)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InvalidInputError.at("folder", f"{str(self._folder)!r} cannot be written: {reason}") from error

    def _check(self, files: Iterable[export_pb2.ExportedFile]) -> None:
        found = {name: digest.hexdigest() for name, digest in self._hashes.items()}
        said = {each.file: each.sha256 for each in files}
        if wrong := sorted(name for name in found.keys() | said.keys() if found.get(name) != said.get(name)):
            names = ", ".join(wrong)
            raise InternalError(f"not what the server sent: {names}; export it again", reason="EXPORT_DAMAGED")


def _check_place(folder: Path, *, overwrite: bool) -> None:
    if not folder.parent.is_dir():
        raise InvalidInputError.at("folder", f"there is no folder {str(folder.parent)!r}; make it first")
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError.at("folder", f"{str(folder)!r} is no folder; give another place")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise InvalidInputError.at("folder", f"{str(folder)!r} is not empty; give another folder, or overwrite it")
    if not (folder / _MANIFEST).is_file():
        # Whoever mistypes a folder must not lose it.
        raise InvalidInputError.at("folder", f"{str(folder)!r} holds no export ({_MANIFEST}); empty it yourself")


def _replace(fresh: Path, folder: Path) -> None:
    """Renames a folder to its place. What is there goes, and comes back where that fails."""
    if not folder.exists():
        fresh.rename(folder)
        return
    old = fresh.with_suffix(".old")
    folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        with suppress(OSError):
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _member(kind: type[S], given: S | str, field: str) -> S:
    try:
        return kind(given)
    except ValueError:
        known = ", ".join(kind)
        raise InvalidInputError.at(field, f"there is no {field} {given!r}; give one of {known}") from None
