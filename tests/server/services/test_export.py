"""Versions leave the server as folders that answer as the server does, and nothing of them stays behind."""

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hosting import BASE, Hosted, generate_message, question, refused
from peft import PeftModel

from errata.client import Errata, InvalidInputError
from errata.editor.checkpoints import load_model
from errata.editor.delta import load_delta
from errata.editor.model import EditableModel
from errata.server.errors import BusyError, DeadlineExceededError
from errata.server.services.export import ExportService
from errata.v1 import export_pb2, export_pb2_grpc, model_pb2

COUNTRY = "Estonia"
MERGED, UNIFORM = export_pb2.EXPORT_FORMAT_MERGED, export_pb2.EXPORT_FORMAT_UNIFORM_ADAPTER


@pytest.fixture(scope="module")
def version(hosted: Hosted) -> str:
    """Two edits, one on top of the other."""
    return hosted.version("Latvia", parent=hosted.version(COUNTRY))


@pytest.fixture
def client(hosted: Hosted) -> Iterator[Errata]:
    with Errata(hosted.server.address) as client:
        yield client


def stub(hosted: Hosted) -> export_pb2_grpc.ExportServiceStub:
    return export_pb2_grpc.ExportServiceStub(hosted.channel)


def left_behind(hosted: Hosted) -> list[Path]:
    """What is in the server's folder of exports once no call is answered any more."""
    hosted.within(hosted.server.gate.idle())
    return list((hosted.server.models._data_dir / "exports").glob("*"))


def answers(model: EditableModel) -> list[str]:
    prompts = [question(country).prompt for country in (COUNTRY, "Latvia", "France")]
    return [answer.text for answer in model.generate(prompts)]


def served(hosted: Hosted, version: str) -> list[str]:
    call = hosted.call.inference.Generate
    return [call(generate_message(country, version)).text for country in (COUNTRY, "Latvia", "France")]


@pytest.mark.parametrize("format", ["adapter", "uniform"])
def test_an_exported_adapter_answers_with_peft_as_its_version_on_the_server(
    hosted: Hosted, client: Errata, version: str, tmp_path: Path, format: str
) -> None:
    exported = client.export(version, tmp_path / "out", format=format, license="Apache-2.0")
    atlas = load_model("atlas")
    load_delta(tmp_path / "out", atlas)
    loaded = PeftModel.from_pretrained(atlas.model, str(tmp_path / "out")).get_base_model()
    same = {name: getattr(atlas, name) for name in ("name", "processor", "family", "base_sha256")}
    assert answers(EditableModel(model=loaded, **same)) == served(hosted, version)
    assert exported.version == version
    assert exported.rank == (8 if format == "uniform" else 0)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: Apache-2.0" in card
    for country in (COUNTRY, "Latvia"):
        assert country in card
    assert "| efficacy |" in card
    assert left_behind(hosted) == []


def test_a_merged_checkpoint_answers_as_its_version_and_names_what_it_holds(
    hosted: Hosted, client: Errata, version: str, tmp_path: Path
) -> None:
    exported = client.export(version, tmp_path / "out", format="merged", dtype="float32")
    assert answers(load_model(tmp_path / "out")) == served(hosted, version)
    lineage = hosted.call.models.GetLineage(model_pb2.GetLineageRequest(name=version)).versions
    assert json.loads((tmp_path / "out" / "errata.json").read_text()) == {
        "base_sha256": lineage[-1].base_sha256,
        "merged": [each.delta_sha256 for each in reversed(lineage) if each.delta_sha256],
        "version": version,
    }
    assert [each.layer for each in exported.rounding] == [1]
    assert exported.rounding[0].relative_error < 1e-6
    narrow = client.export(version, tmp_path / "narrow", format="merged", dtype="bfloat16").rounding[0]
    assert narrow.relative_error > 1e-4
    assert narrow.max_error > exported.rounding[0].max_error
    assert {p.dtype for p in load_model(tmp_path / "narrow", dtype=torch.bfloat16).model.parameters()} == {
        torch.bfloat16
    }
    assert left_behind(hosted) == []


def test_pieces_are_of_one_megabyte_at_most_and_the_summary_ends_them(hosted: Hosted) -> None:
    request = export_pb2.ExportVersionRequest(name=BASE, format=MERGED)
    *pieces, last = stub(hosted).ExportVersion(request)
    assert max(len(piece.chunk.data) for piece in pieces) == 1_000_000
    received: dict[str, Any] = {}
    for piece in pieces:
        received.setdefault(piece.chunk.file, hashlib.sha256()).update(piece.chunk.data)
    assert [(each.file, each.sha256) for each in last.summary.files] == [
        (name, digest.hexdigest()) for name, digest in received.items()
    ]
    assert last.summary.version == BASE


@pytest.mark.parametrize("format", [0, export_pb2.EXPORT_FORMAT_ADAPTER, UNIFORM])
def test_the_base_is_no_adapter(hosted: Hosted, format: int) -> None:
    request = export_pb2.ExportVersionRequest(name=BASE, format=format)
    error = refused(lambda: stub(hosted).ExportVersion(request))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "format")
    assert "equals its base" in error.message
    assert left_behind(hosted) == []


BAD: dict[str, tuple[dict[str, Any], str, grpc.StatusCode]] = {
    "no name": ({}, "name", grpc.StatusCode.INVALID_ARGUMENT),
    "a path": ({"name": "models/../versions/1"}, "name", grpc.StatusCode.INVALID_ARGUMENT),
    "another model": ({"name": "models/none"}, "name", grpc.StatusCode.NOT_FOUND),
    "another version": ({"name": "models/atlas/versions/9999"}, "name", grpc.StatusCode.NOT_FOUND),
    "an unknown format": ({"name": BASE, "format": 99}, "format", grpc.StatusCode.INVALID_ARGUMENT),
    "an unknown dtype": ({"name": BASE, "format": MERGED, "dtype": 99}, "dtype", grpc.StatusCode.INVALID_ARGUMENT),
    "a dtype of an adapter": ({"name": BASE, "dtype": 1}, "dtype", grpc.StatusCode.INVALID_ARGUMENT),
    "a licence that is none": ({"name": BASE, "license": "MIT\nx: y"}, "license", grpc.StatusCode.INVALID_ARGUMENT),
    "a licence without end": ({"name": BASE, "license": "M" * 5000}, "license", grpc.StatusCode.INVALID_ARGUMENT),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_by_its_field(hosted: Hosted, case: str) -> None:
    request, field, code = BAD[case]
    error = refused(lambda: stub(hosted).ExportVersion(export_pb2.ExportVersionRequest(**request)))
    assert (error.code, error.field) == (code, field)
    assert left_behind(hosted) == []


def test_the_client_raises_what_the_server_says(client: Errata, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="equals its base") as refusal:
        client.export("atlas@0", tmp_path / "out")
    assert refusal.value.field == "format"
    assert list(tmp_path.iterdir()) == []


def test_a_caller_that_leaves_takes_the_folder_with_it(hosted: Hosted) -> None:
    for read in range(3):
        call = stub(hosted).ExportVersion(export_pb2.ExportVersionRequest(name=BASE, format=MERGED))
        for _ in range(read):
            next(call)
        call.cancel()
        assert left_behind(hosted) == []


def service(hosted: Hosted, root: Path) -> ExportService:
    return ExportService(hosted.server.stores.ledger, hosted.server.models, root)


REQUEST = export_pb2.ExportVersionRequest(name=BASE, format=MERGED)


def test_a_call_cancelled_at_any_point_leaves_nothing(hosted: Hosted, tmp_path: Path) -> None:
    async def cancelled_after(steps: int) -> None:
        call = service(hosted, tmp_path).ExportVersion(REQUEST, None)  # type: ignore[arg-type]
        first = asyncio.create_task(anext(call))
        for _ in range(steps):
            await asyncio.wait([first], timeout=0.001)
        first.cancel()
        first.cancel()
        await asyncio.wait([first])
        await call.aclose()

    for steps in (0, 1, 2, 4, 8, 16, 32, 64):
        asyncio.run(cancelled_after(steps))
        assert list(tmp_path.iterdir()) == []


def test_only_so_many_folders_are_on_the_disk_at_once(hosted: Hosted, tmp_path: Path) -> None:
    async def crowd() -> None:
        one = service(hosted, tmp_path)
        calls = [one.ExportVersion(REQUEST, None) for _ in range(4)]  # type: ignore[arg-type]
        for call in calls:
            await anext(call)
        with pytest.raises(BusyError) as busy:
            await anext(one.ExportVersion(REQUEST, None))  # type: ignore[arg-type]
        assert busy.value.retry_after
        assert len(list(tmp_path.iterdir())) == 4
        await calls[0].aclose()
        late = one.ExportVersion(REQUEST, None)  # type: ignore[arg-type]
        await anext(late)
        for call in (*calls, late):
            await call.aclose()

    asyncio.run(crowd())
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_stops_reading_is_given_up_and_its_folder_goes(hosted: Hosted, tmp_path: Path) -> None:
    async def stalled() -> None:
        one = ExportService(hosted.server.stores.ledger, hosted.server.models, tmp_path, patience=0.0)
        call = one.ExportVersion(REQUEST, None)  # type: ignore[arg-type]
        await anext(call)
        while list(tmp_path.iterdir()):
            await asyncio.sleep(0)
        with pytest.raises(DeadlineExceededError, match="not taken in time"):
            await anext(call)
        assert one._there == 0

    asyncio.run(stalled())
