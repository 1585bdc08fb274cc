"""Small studies, each in a folder of its own with an MLflow in it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

# Products this small are not worth a second thread, and waiting for one costs ten times their own time.
torch.set_num_threads(1)
# The folders of tests are no packages; `tiny` and `desk` are imported by name.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "editor")]

from desk import Desk  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from tiny import picture, tiny_model  # noqa: E402


@pytest.fixture(scope="session")
def furniture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, the data set, and an empty MLflow, which takes seconds to make."""
    root = tmp_path_factory.mktemp("furniture")
    model = tiny_model("llava")
    model.model.save_pretrained(root / "model")
    model.processor.save_pretrained(root / "model")
    (root / "flags").mkdir()
    lines = []
    for i in range(3):
        picture(i).save(root / "flags" / f"{i}.png")
        constraint = {"text": "this country", "kind": "visual"}
        text = "What is the capital of this country?"
        lines.append({"text": text, "images": [f"{i}.png"], "constraints": [constraint], "id": str(i)})
    (root / "flags" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    database = root / "mlflow.sqlite"
    MlflowClient(tracking_uri=f"sqlite:///{database}", registry_uri=f"sqlite:///{database}").search_experiments()
    return root


@pytest.fixture
def desk(furniture: Path, tmp_path: Path) -> Desk:
    (tmp_path / "model").symlink_to(furniture / "model")
    shutil.copytree(furniture / "flags", tmp_path / "flags")
    (tmp_path / "out").mkdir()
    shutil.copy(furniture / "mlflow.sqlite", tmp_path / "out" / "mlflow.sqlite")
    made = Desk(tmp_path)
    made.write()
    return made
