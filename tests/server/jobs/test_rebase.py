"""A version moved onto a base that has some of its edits merged in."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from house import House, Worker, question, succeeded, working
from planting import noise, plant, request

from errata.editor.card import Card
from errata.editor.checkpoints import load_model
from errata.editor.delta import applied
from errata.editor.evaluation import next_token_logits
from errata.editor.export import ExportFormat, ExportSettings, export
from errata.server.conversion import Decoder
from errata.server.images import ImagePolicy
from errata.server.ledger.ledger import Ledger
from errata.server.models import Models
from errata.server.settings import ModelSettings
from errata.server.store import ArtifactStore, DeltaStore
from errata.v1 import history_pb2

MERGED = "models/merged/versions/0"


@pytest.fixture
def merged(tmp_path: Path) -> Iterator[House]:
    """Atlas, and the same with a delta merged in that a version of Atlas has as well."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.migrate()
    deltas = DeltaStore(tmp_path / "deltas")
    configured = {
        "atlas": ModelSettings(source="atlas"),
        "merged": ModelSettings(source=str(tmp_path / "merged"), load="lazy"),
    }
    models = Models(configured, ledger, deltas, tmp_path)
    models.start()
    yield House(ledger, models, deltas, ArtifactStore(tmp_path / "artifacts"), Decoder(ImagePolicy()))
    models.close(0)
    ledger.close()


def _merge(house: House, number: int, folder: Path) -> None:
    loaded = house.models.get("atlas")
    version = f"models/atlas/versions/{number}"
    settings = ExportSettings(format=ExportFormat.MERGED, dtype=torch.float32)
    export(load_model("atlas"), loaded.deltas_of(number), folder, settings, Card(version=version, base="atlas"))


def _rebase(worker: Worker, number: int) -> history_pb2.Derivation:
    rebase = history_pb2.Rebase(version=f"models/atlas/versions/{number}")
    row = worker.run(history_pb2.CreateDerivationRequest(parent=MERGED, rebase=rebase), model="merged")
    if row.failure:
        assert row.failure.reason == "NOTHING_TO_DERIVE"
        return history_pb2.Derivation()
    outcome = history_pb2.Derivation.FromString(succeeded(row).result or b"")
    outcome.version = f"models/merged/versions/{row.made}"
    return outcome


@pytest.mark.slow
def test_only_what_was_not_merged_is_moved_and_the_answers_stay(merged: House, tmp_path: Path) -> None:
    held = plant(merged, request("France", "Paris"), noise(merged, 1, 0.05))
    version = plant(merged, request("Japan", "Tokyo"), noise(merged, 2, 0.05), parent=held)
    _merge(merged, held, tmp_path / "merged")
    with working(merged) as worker:
        outcome = _rebase(worker, version)
        assert outcome.sources == [f"models/atlas/versions/{version}"]
        assert outcome.facts == ["Japan: capital → Tokyo"]
        prompts = [question(country).prompt for country in ("France", "Japan", "Estonia")]
        logits = []
        for name, number in (("atlas", version), ("merged", int(outcome.version.rpartition("/")[2]))):
            loaded = merged.models.get(name)
            with loaded.borrow() as model, applied(model, *loaded.deltas_of(number)):
                logits.append(next_token_logits(model, prompts))
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(*logits, strict=True))
        assert not _rebase(worker, held).version
        again = history_pb2.CreateDerivationRequest(parent=outcome.version)
        again.rebase.version = f"models/atlas/versions/{version}"
        number = int(outcome.version.rpartition("/")[2])
        twice = worker.run(again, model="merged", version=number).failure
        assert twice is not None
        assert (twice.reason, twice.field) == ("IN_LINEAGE", "rebase.version")
