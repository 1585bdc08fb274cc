"""Versions as folders, sent file by file. Each is written for its call alone and removed when the call ends."""

import asyncio
import hashlib
import re
import secrets
import shutil
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from errata.editor.card import Card, CardScore, CardVersion
from errata.editor.export import Export, ExportFormat, ExportSettings, export
from errata.editor.merging import Rounding
from errata.server.conversion import scores_from_json
from errata.server.errors import BusyError, DeadlineExceededError, MalformedError
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import VersionRow
from errata.server.models import LoadedModel, Models
from errata.server.names import VersionRef, version_name, version_ref
from errata.server.services.calls import Context
from errata.v1 import evaluation_pb2, export_pb2, export_pb2_grpc

_PIECE = 1_000_000
"""Bytes of a chunk."""

_AT_ONCE, _RETRY_SECONDS = 4, 5.0
"""Folders that are on the disk at once, and when one more may be asked for."""

_PATIENCE = 60.0
"""Seconds for one piece to be taken: a reader that stopped reading must not keep its folder from the others."""

_LICENSE = re.compile(r"[A-Za-z0-9.+-]{1,64}( (AND|OR|WITH) [A-Za-z0-9.+-]{1,64}){0,4}")

_FORMATS = {
    export_pb2.EXPORT_FORMAT_UNSPECIFIED: ExportFormat.ADAPTER,
    **{value: ExportFormat[name.removeprefix("EXPORT_FORMAT_")] for name, value in export_pb2.ExportFormat.items()[1:]},
}
_DTYPES: dict[int, torch.dtype | None] = {
    export_pb2.EXPORT_DTYPE_UNSPECIFIED: None,
    export_pb2.EXPORT_DTYPE_FLOAT32: torch.float32,
    export_pb2.EXPORT_DTYPE_BFLOAT16: torch.bfloat16,
    export_pb2.EXPORT_DTYPE_FLOAT16: torch.float16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOrder:
    """An ExportVersionRequest."""

    version: VersionRef
    settings: ExportSettings
    license: str


def export_order(message: export_pb2.ExportVersionRequest) -> ExportOrder:
    """An ExportVersionRequest, checked. Raises MalformedError, InvalidInputError."""
    for table, value, named in ((_FORMATS, message.format, "format"), (_DTYPES, message.dtype, "dtype")):
        if value not in table:
            raise MalformedError(
                f"{named} is {value}, which this server does not know; give another",
                field=named,
                reason="OUT_OF_RANGE",
            )
    if message.license and not _LICENSE.fullmatch(message.license):
        raise MalformedError(
            f"license is {message.license[:100]!a}; give an SPDX identifier such as Apache-2.0",
            field="license",
            reason="MALFORMED_TEXT",
        )
    return ExportOrder(
        version=version_ref(message.name, "name"),
        settings=ExportSettings(format=_FORMATS[message.format], dtype=_DTYPES[message.dtype]),
        license=message.license,
    )


class ExportService(export_pb2_grpc.ExportServiceServicer):
    """`root` is a folder of its own; what an earlier server left in it is removed by whoever starts this one."""

    def __init__(self, ledger: Ledger, models: Models, root: Path, *, patience: float = _PATIENCE) -> None:
        self._ledger, self._models, self._root, self._patience = ledger, models, root, patience
        self._there = 0
        # Of their own: each takes long, and every call's admission needs a common one.
        self._writers = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="export")
        self._removals: set[asyncio.Task[None]] = set()

    async def ExportVersion(  # noqa: N802
        self, request: export_pb2.ExportVersionRequest, context: Context
    ) -> AsyncIterator[export_pb2.ExportVersionResponse]:
        """A version's folder. A caller that leaves stops the work, and its folder goes."""
        order = export_order(request)
        version, loaded = await self._asked(order.version)
        if self._there >= _AT_ONCE:
            raise BusyError(
                f"{_AT_ONCE} versions are being exported; come back in a moment", retry_after=_RETRY_SECONDS
            )
        self._there += 1
        stop = threading.Event()
        loop = asyncio.get_running_loop()
        writing = loop.run_in_executor(self._writers, self._write, order, version, loaded, stop)
        end = self._ending(writing, stop)
        try:
            written = await asyncio.shield(writing)
            sent: list[export_pb2.ExportedFile] = []
            for path in sorted(written.folder.iterdir()):
                async with aclosing(_pieces(path, sent)) as pieces:
                    async for piece in pieces:
                        with _unless_taken(self._patience, end):
                            yield piece
                        _check_patience(stop)
            yield _summary(version, written, sent)
        finally:
            await asyncio.shield(end())

    def _ending(self, writing: "asyncio.Future[Export]", stop: threading.Event) -> "Callable[[], asyncio.Task[None]]":
        """What ends an export, however often it is called: the folder goes, and another one may come."""

        @cache
        def end() -> asyncio.Task[None]:
            stop.set()
            removal = asyncio.create_task(self._remove(writing))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)
            return removal

        return end

    async def _asked(self, ref: VersionRef) -> tuple[VersionRow, LoadedModel]:
        """The version that a name means now, and its model, once it is loaded."""
        loading = self._models.load(ref.model)
        version = await asyncio.to_thread(self._ledger.resolve, ref.model, ref.number, ref.alias)
        # Shielded: others wait for the same model.
        return version, await asyncio.shield(asyncio.wrap_future(loading))

    def _write(self, order: ExportOrder, version: VersionRow, loaded: LoadedModel, stop: threading.Event) -> Export:
        self._root.mkdir(parents=True, exist_ok=True)
        folder = self._root / secrets.token_hex(8)
        deltas = loaded.deltas_of(version.number)
        card = self._card(version, loaded, order.license)
        with loaded.borrow() as model:
            return export(model, deltas, folder, order.settings, card, cancelled=stop.is_set)

    def _card(self, version: VersionRow, loaded: LoadedModel, license: str) -> Card:
        lineage = reversed(self._ledger.lineage(version.model, version.number))
        source = loaded.settings.source
        return Card(
            version=version_name(version.model, version.number),
            # A name on a hub helps whoever reads the card; a path on this server's disk does not.
            base=version.model if Path(source).is_absolute() or Path(source).exists() else source,
            lineage=tuple(
                CardVersion(name=version_name(v.model, v.number), facts=v.facts, delta_sha256=v.delta_sha256)
                for v in lineage
                if v.delta_sha256
            ),
            scores=tuple(
                CardScore(metric=_metric(s.metric), n=s.n, before=s.before, after=s.after)
                for s in scores_from_json(version.scores)
            ),
            license=license,
        )

    async def _remove(self, writing: "asyncio.Future[Export]") -> None:
        """Removes the folder once it is written: a thread cannot be stopped, it stops by itself."""
        await asyncio.wait([writing])
        if writing.exception() is None:  # otherwise there is none, and whoever awaited it was told or has left
            await asyncio.to_thread(shutil.rmtree, writing.result().folder, ignore_errors=True)
        self._there -= 1


@contextmanager
def _unless_taken(seconds: float, end: Callable[[], object]) -> Iterator[None]:
    """Calls `end` where the reader does not take what it is given within by then."""
    ending = asyncio.get_running_loop().call_later(seconds, end)
    try:
        yield
    finally:
        ending.cancel()


def _check_patience(stop: threading.Event) -> None:
    if stop.is_set():
        raise DeadlineExceededError("a piece of the export was not taken in time, and the rest was given up; ask again")


async def _pieces(path: Path, sent: list[export_pb2.ExportedFile]) -> AsyncGenerator[export_pb2.ExportVersionResponse]:
    """A file in pieces, at least one; then it is entered in `sent`."""
    digest = hashlib.sha256()
    size = 0

    def read() -> bytes:
        # Opened for each piece: an open file would stay on the disk while its reader sleeps.
        with path.open("rb") as file:
            file.seek(size)
            data = file.read(_PIECE)
        digest.update(data)
        return data

    data = await asyncio.to_thread(read)
    while True:
        yield export_pb2.ExportVersionResponse(chunk=export_pb2.ExportChunk(file=path.name, data=data))
        size += len(data)
        if not (data := await asyncio.to_thread(read)):
            break
    sent.append(export_pb2.ExportedFile(file=path.name, size=size, sha256=digest.hexdigest()))


def _summary(
    version: VersionRow, written: Export, sent: list[export_pb2.ExportedFile]
) -> export_pb2.ExportVersionResponse:
    summary = export_pb2.ExportSummary(
        version=version_name(version.model, version.number),
        files=sent,
        rounding=map(_rounding, written.rounding),
        rank=written.rank,
    )
    return export_pb2.ExportVersionResponse(summary=summary)


def _rounding(rounding: Rounding) -> export_pb2.Rounding:
    return export_pb2.Rounding(
        layer=rounding.layer, max_error=rounding.max_error, relative_error=rounding.relative_error
    )


def _metric(value: "evaluation_pb2.Metric.ValueType") -> str:
    return evaluation_pb2.Metric.Name(value).removeprefix("METRIC_").lower()
