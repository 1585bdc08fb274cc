"""One copy of the base, however many versions."""

from pathlib import Path

import pytest
from hosting import edit_message, generate_message, hosting

from errata.server.settings import Settings
from errata.v1 import model_pb2

pytestmark = pytest.mark.slow


def test_fifty_loaded_versions_add_less_than_a_tenth_of_the_base(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, port=0, mlflow_uri="none", drain_seconds=1.0)
    with hosting(settings) as hosted:
        engine = hosted.loaded().server.models.get("atlas").engine
        weights = {p.data_ptr() for p in hosted.server.models.get("atlas").base.model.parameters()}
        versions = [hosted.edit(edit_message("Estonia", steps=1)).version for _ in range(50)]
        for version in versions:
            assert hosted.call.inference.Generate(generate_message("France", version)).version == version
        model = hosted.call.models.GetModel(model_pb2.GetModelRequest(name="models/atlas")).model
        assert set(range(1, 51)) <= set(engine.loaded_versions)
        assert 0 < model.versions_memory_bytes < 0.1 * model.memory_bytes
        with hosted.server.models.get("atlas").borrow() as borrowed:
            assert {p.data_ptr() for p in borrowed.model.parameters()} == weights
