"""What the registry's tests are made with: stores, versions of a tiny model, and a look into MLflow beside the code."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from tiny import random_delta, tiny_model

from errata.editor.delta import Delta, empty_delta
from errata.editor.model import EditableModel
from errata.server.ledger.rows import PublishState, VersionRow
from errata.server.registry.record import Change, EditRecord
from errata.server.registry.registry import PublishedBase, Registry
from errata.server.store import ArtifactStore, DeltaStore

# After the registry's package, which quiets it.
from mlflow import MlflowClient  # isort: skip
from mlflow.entities import LoggedModel, Run, ViewType  # isort: skip
from mlflow.entities.model_registry import ModelVersion  # isort: skip

MODEL = tiny_model("llama")
TIME = datetime(2030, 1, 2, 3, 4, tzinfo=UTC)
SCORES = [
    {"metric": "METRIC_EFFICACY", "n": 4, "before": 0.0, "after": 1.0, "forced": 1.0, "low": 0.51, "high": 1.0},
    {"metric": "METRIC_OTHER_SUBJECTS", "n": 9, "before": 1, "after": 0.875, "forced": "NaN", "low": 0.6, "high": 0.98},
]
RECORD = EditRecord(
    parameters={"method": "memit", "preservation": "15000", "requests": "1"},
    changes=(Change(name="Kazakhstan: capital", before="Nur-Sultan", after="Astana"),),
    note="The old atlas is *wrong*.",
    example={"prompt": "What is the capital of this country?"},
)
FILES = {
    "report.html": b"<html>",
    "request.json": b"{}",
    "causal_trace.png": b"PNG",
    "before_after.html": b"<table>",
    "before_after.json": json.dumps({"columns": ["q"], "data": [["?"]]}).encode(),
}


def base_row(model: EditableModel = MODEL, name: str = "tiny") -> VersionRow:
    return VersionRow(
        model=name, number=0, parent=None, edit=None, base_sha256=model.base_sha256, delta_sha256="", delta_bytes=0,
        layers=(), facts=(), scores="", rejections=(), aliases=(), publish_state=PublishState.NONE, mlflow_version=0,
        mlflow_run_id="", created_by="server", create_time=TIME,
    )  # fmt: skip


@dataclass(frozen=True)
class Edited:
    """A version and its lineage, itself first."""

    version: VersionRow
    lineage: tuple[VersionRow, ...]


class House:
    """A server's stores and its MLflow in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = f"sqlite:///{root}/mlflow.db"
        self.deltas, self.artifacts = DeltaStore(root / "deltas"), ArtifactStore(root / "files")
        self.client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        self.bases = {"tiny": PublishedBase(registered_model="tiny facts", source="somewhere")}

    def registry(self, on_step: Callable[[str], None] = lambda _step: None, **bases: PublishedBase) -> Registry:
        return Registry(
            self.uri,
            bases={**self.bases, **bases},
            deltas=self.deltas,
            artifacts=self.artifacts,
            artifact_root=self.root / "mlflow",
            on_step=on_step,
        )

    def edited(
        self,
        number: int = 1,
        parent: Edited | None = None,
        *,
        delta: Delta | None = None,
        model: EditableModel = MODEL,
        name: str = "tiny",
        files: Mapping[str, bytes] = FILES,
        rejections: tuple[str, ...] = (),
    ) -> Edited:
        """A version in the stores, as an edit leaves it; nothing of it is in MLflow."""
        delta = delta or random_delta(model, {1: 2, 2: 1}, seed=number)
        stored = self.deltas.put(delta, model)
        lineage = parent.lineage if parent else (base_row(model, name),)
        version = replace(
            lineage[0], number=number, parent=lineage[0].number, edit=f"edit-{number}", delta_sha256=stored.sha256,
            delta_bytes=stored.nbytes, layers=(1, 2), facts=(f"fact {number}",), scores=json.dumps(SCORES),
            rejections=rejections, publish_state=PublishState.PENDING, created_by="ada",
        )  # fmt: skip
        if files:
            self.artifacts.write(f"edit-{number}", files)
        return Edited(version, (version, *lineage))

    def runs(self, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
        experiments = [e.experiment_id for e in self.client.search_experiments()]
        return sorted(self.client.search_runs(experiments, run_view_type=view), key=lambda r: r.info.start_time)

    def models(self) -> list[LoggedModel]:
        return list(self.client.search_logged_models([e.experiment_id for e in self.client.search_experiments()]))

    def registered(self) -> list[ModelVersion]:
        found = (self.client.get_model_version(v.name, v.version) for v in self.client.search_model_versions())
        return sorted(found, key=lambda v: int(v.version))

    def files_of(self, version: ModelVersion) -> Path:
        return Path(version.source.removeprefix("file://"))


def empty() -> Delta:
    return empty_delta(MODEL)
