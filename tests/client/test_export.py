"""Exported folders arrive whole and checked, or not at all."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_server import EXPORTED, Fake, Fault

from errata.client import (
    AsyncErrata,
    CancelledError,
    Errata,
    Export,
    ExportDtype,
    ExportedFile,
    ExportFormat,
    ForbiddenError,
    InternalError,
    InvalidInputError,
    Rounding,
    UnavailableError,
)
from errata.v1 import export_pb2

Exporting = Callable[..., Export]


@pytest.fixture(params=["threads", "asyncio"])
def export(request: pytest.FixtureRequest, server: str, client: Errata) -> Exporting:
    """`export` of each client in turn."""

    async def awaited(*args: Any, **options: Any) -> Export:
        async with AsyncErrata(server, timeout=30) as one:
            return await one.export(*args, **options)

    return client.export if request.param == "threads" else lambda *args, **how: asyncio.run(awaited(*args, **how))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


WHOLE = {name: b"".join(pieces) for name, pieces in EXPORTED.items()}


def test_a_version_is_written_as_a_folder(export: Exporting, fake: Fake, tmp_path: Path) -> None:
    exported = export("atlas@0", tmp_path / "out", license="MIT")
    assert contents(tmp_path / "out") == WHOLE
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (exported.folder, exported.version) == (tmp_path / "out", "models/atlas/versions/0")
    assert [(f.file, f.size) for f in exported.files] == [(name, len(data)) for name, data in WHOLE.items()]
    assert isinstance(exported.files[0], ExportedFile)
    assert (exported.rounding, exported.rank) == ((), 0)
    assert fake.requests[-1] == export_pb2.ExportVersionRequest(
        name="models/atlas/versions/0", format=export_pb2.EXPORT_FORMAT_ADAPTER, license="MIT"
    )


def test_formats_and_dtypes_are_sent_by_member_or_by_name(export: Exporting, fake: Fake, tmp_path: Path) -> None:
    merged = export("atlas", str(tmp_path / "one"), format=ExportFormat.MERGED, dtype=ExportDtype.BFLOAT16)
    sent = fake.requests[-1]
    assert (sent.format, sent.dtype) == (export_pb2.EXPORT_FORMAT_MERGED, export_pb2.EXPORT_DTYPE_BFLOAT16)
    assert merged.rounding == (Rounding(layer=2, max_error=0.5, relative_error=0.25),)
    assert export("atlas", tmp_path / "two", format="uniform").rank == 8
    assert export("atlas", tmp_path / "three", format="merged", dtype="float16").version == "models/atlas/versions/0"


@pytest.mark.parametrize(("field", "wrong"), [("format", "gguf"), ("dtype", "int4")])
def test_a_format_or_dtype_that_there_is_not_is_named(
    export: Exporting, fake: Fake, tmp_path: Path, field: str, wrong: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"no {field} '{wrong}'; give one of") as refused:
        export("atlas", tmp_path / "out", **{field: wrong})
    assert refused.value.field == field
    assert fake.calls == []


def _summary(change: Callable[[Any], object]) -> Callable[[Any], list[Any]]:
    def ending(summary: Any) -> list[Any]:
        change(summary.summary)
        return [summary]

    return ending


TAMPERINGS: dict[str, dict[str, Any]] = {
    "another hash": {"ending": _summary(lambda s: setattr(s.files[2], "sha256", "0" * 64))},
    "a file that never came": {"ending": _summary(lambda s: s.files.add(file="more.json", sha256="0" * 64))},
    "a file that nobody announced": {"ending": _summary(lambda s: s.files.pop())},
    "a piece after the file's hash": {
        "ending": lambda summary: [
            export_pb2.ExportVersionResponse(chunk=export_pb2.ExportChunk(file="errata.json", data=b"x")),
            summary,
        ]
    },
    "a path": {"exported": {"../evil": [b"x"]}},
    "a folder": {"exported": {"a/b": [b"x"]}},
    "an absolute path": {"exported": {"/tmp/evil": [b"x"]}},
    "a hidden file": {"exported": {".bashrc": [b"x"]}},
    "no name": {"exported": {"": [b"x"]}},
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_a_tampered_stream_leaves_nothing(export: Exporting, fake: Fake, tmp_path: Path, tampering: str) -> None:
    for name, value in TAMPERINGS[tampering].items():
        setattr(fake, name, value)
    (tmp_path / "in").mkdir()
    with pytest.raises(InternalError) as noticed:
        export("atlas", tmp_path / "in" / "out")
    assert noticed.value.reason == "EXPORT_DAMAGED"
    assert [f.name for f in tmp_path.rglob("*")] == ["in"]


def test_an_export_that_is_cut_off_leaves_nothing(export: Exporting, fake: Fake, tmp_path: Path) -> None:
    fake.ending = lambda _summary: []
    with pytest.raises(UnavailableError, match="cut off before its end"):
        export("atlas", tmp_path / "out")
    fake.break_streams_after = [2]
    with pytest.raises(UnavailableError, match="connection reset"):
        export("atlas", tmp_path / "out")
    fake.fail_next("ExportVersion", Fault(code=grpc.StatusCode.PERMISSION_DENIED, reason="FORBIDDEN"))
    with pytest.raises(ForbiddenError):
        export("atlas", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_whose_client_is_closed_leaves_nothing_and_frees_the_server(
    client: Errata, fake: Fake, tmp_path: Path
) -> None:
    fake.gate.clear()
    closer = threading.Thread(target=lambda: (fake.waiting.wait(30), client.close()))
    closer.start()
    with pytest.raises(CancelledError):
        client.export("atlas", tmp_path / "out")
    closer.join()
    assert fake.stream_ended.wait(30)
    assert list(tmp_path.iterdir()) == []


def test_a_cancelled_task_leaves_nothing_and_frees_the_server(server: str, fake: Fake, tmp_path: Path) -> None:
    fake.gate.clear()

    async def leave() -> None:
        async with AsyncErrata(server) as client:
            task = asyncio.create_task(client.export("atlas", tmp_path / "out"))
            await asyncio.to_thread(fake.waiting.wait, 30)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave())
    assert fake.stream_ended.wait(30)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_in_use_is_left_alone(export: Exporting, fake: Fake, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    refusals = (
        (mine, False, "is not empty"),
        (mine, True, "holds no export"),
        (tmp_path / "file", True, "is no folder"),
        (tmp_path / "none" / "out", False, "make it first"),
    )
    for folder, overwrite, wrong in refusals:
        with pytest.raises(InvalidInputError, match=wrong) as refused:
            export("atlas", folder, overwrite=overwrite)
        assert refused.value.field == "folder"
    assert fake.calls == []
    assert contents(mine) == {"notes.txt": b"mine"}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "mine"]


def test_an_empty_folder_is_filled_and_an_earlier_export_replaced_only_when_asked(
    export: Exporting, fake: Fake, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export("atlas", out)
    assert contents(out) == WHOLE
    (out / "stale.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="not empty"):
        export("atlas", out)
    fake.ending = lambda _summary: []
    with pytest.raises(UnavailableError):
        export("atlas", out, overwrite=True)
    assert "stale.json" in contents(out)
    fake.ending = lambda summary: [summary]
    export("atlas", out, overwrite=True)
    assert contents(out) == WHOLE
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_fills_up_meanwhile_is_left_alone(client: Errata, fake: Fake, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def meanwhile(summary: Any) -> list[Any]:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        return [summary]

    fake.ending = meanwhile
    with pytest.raises(InvalidInputError, match="not empty"):
        client.export("atlas", out)
    assert contents(out) == {"notes.txt": b"mine"}
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_takes_nothing_is_said(export: Exporting, fake: Fake, tmp_path: Path) -> None:
    fake.exported = {"x" * 200: [b"y"]}
    long = tmp_path / ("d" * 250)
    with pytest.raises(InvalidInputError, match="cannot be written: File name too long") as refused:
        export("atlas", long)
    assert refused.value.field == "folder"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_the_rights_of_any_new_one(export: Exporting, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    export("atlas", tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
