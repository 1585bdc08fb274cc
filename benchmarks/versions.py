"""A version beside a whole edited checkpoint: its size, the time to load it, its memory, the time to publish it."""

import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import shapes
import torch
from measure import Case, Numbers, Way, folder_bytes
from transformers import LlamaForCausalLM

from errata.editor.delta import Delta, LowRank, applied, load_delta, merged
from errata.editor.mixed import version_factors
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt
from errata.server.ledger.rows import PublishState, VersionRow
from errata.server.registry.record import Change, EditRecord
from errata.server.registry.registry import PublishedBase, Registry
from errata.server.store import ArtifactStore, DeltaStore

# After the registry's package, which quiets it.
from mlflow import MlflowClient  # isort: skip

PROMPT = Prompt(text="What is the capital of Estonia?", chat=False)


def cases(quick: bool) -> Iterator[Case]:
    """A Llama with edits of rank 8 at three layers."""
    model = shapes.llama(64, 4) if quick else shapes.llama(768, 12)
    with tempfile.TemporaryDirectory() as folder:
        yield case(model, Path(folder), published=2 if quick else 20)


def case(model: EditableModel, root: Path, published: int) -> Case:
    """Both stored, then loaded until they answer."""
    deltas = [random_delta(model, seed) for seed in range(published + 1)]
    deltas[0].save(root / "delta")
    with merged(model, deltas[0]):
        model.model.save_pretrained(root / "whole")
    sizes = folder_bytes(root / "delta"), folder_bytes(root / "whole")
    return Case(
        name="load a version",
        about=f"rank 8 at 3 layers of a Llama of {sum(p.numel() for p in model.model.parameters()) / 1e6:.0f} M",
        tolerance=1e-3,
        ways=[
            Way(name="Errata", run=partial(_ours, model, root / "delta")),
            Way(name="a whole checkpoint", run=partial(_whole, model, root / "whole")),
        ],
        figures={
            "bytes on disk of a version": sizes[0],
            "bytes on disk of a whole checkpoint": sizes[1],
            "bytes in memory of a version": version_factors(model, deltas[:1]).nbytes,
            "bytes in memory of a whole checkpoint": sum(p.nbytes for p in model.model.parameters()),
            "seconds to publish a version in MLflow": _publishing(model, deltas[1:], root),
        },
    )


def random_delta(model: EditableModel, seed: int, rank: int = 8) -> Delta:
    """An edit of the layers 1 to 3."""
    random = torch.Generator().manual_seed(seed)
    d, m = model.model.config.hidden_size, model.model.config.intermediate_size
    layers = {
        i: LowRank(a=torch.randn(rank, m, generator=random) * 0.05, b=torch.randn(d, rank, generator=random) * 0.1)
        for i in (1, 2, 3)
    }
    return Delta(
        base_sha256=model.base_sha256, layers=layers, modules={i: model.down_projection_name(i) for i in layers}
    )


def _ours(model: EditableModel, folder: Path) -> Numbers:
    """Read, checked against its hash and its base, and asked once."""
    with applied(model, load_delta(folder, model)):
        return _logits(model, model.model)


def _whole(model: EditableModel, folder: Path) -> Numbers:
    return _logits(model, LlamaForCausalLM.from_pretrained(folder).eval())


def _logits(model: EditableModel, asked: torch.nn.Module) -> Numbers:
    with torch.inference_mode():
        logits: torch.Tensor = asked(**model.inputs([model.encode(PROMPT)]), logits_to_keep=1).logits
    return logits.double().numpy()


def _publishing(model: EditableModel, deltas: list[Delta], root: Path) -> float:
    """Median seconds to publish one of several versions, with MLflow's store in SQLite on this machine."""
    uri = f"sqlite:///{root}/mlflow.db"
    MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments()
    stores = DeltaStore(root / "deltas"), ArtifactStore(root / "files")
    registry = Registry(
        uri,
        bases={"llama": PublishedBase(registered_model="llama", source="untrained")},
        deltas=stores[0],
        artifacts=stores[1],
        artifact_root=root / "mlflow",
    )
    record = EditRecord(parameters={"method": "memit"}, changes=(Change(name="a", before="b", after="c"),), note="", example={"prompt": PROMPT.text})  # fmt: skip  # noqa: E501
    base, seconds = _row(model, 0), []
    for number, delta in enumerate(deltas, 1):
        stored = stores[0].put(delta, model)
        stores[1].write(f"edit-{number}", {"report.html": b"<html>"})
        version = _row(model, number, stored.sha256, stored.nbytes)
        began = time.perf_counter()
        registry.publish(version, (version, base), record)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def _row(model: EditableModel, number: int, sha256: str = "", nbytes: int = 0) -> VersionRow:
    return VersionRow(
        model="llama", number=number, parent=0 if number else None, edit=f"edit-{number}" if number else None,
        base_sha256=model.base_sha256, delta_sha256=sha256, delta_bytes=nbytes, layers=(1, 2, 3) if number else (),
        facts=(), scores="", rejections=(), aliases=(),
        publish_state=PublishState.PENDING if number else PublishState.NONE, mlflow_version=0, mlflow_run_id="",
        created_by="benchmark", create_time=datetime(2030, 1, 1, tzinfo=UTC),
    )  # fmt: skip
