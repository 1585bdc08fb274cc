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

from desk import Desk, Report  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from tiny import picture, tiny_model  # noqa: E402

from errata.editor.model import EditableModel  # noqa: E402
from errata.editor.prompts import Prompt  # noqa: E402

TEXT = "What is the capital of this country?"


def _answered(model: EditableModel) -> list[int]:
    """Pictures about which an untrained model says something and comes to an end."""
    told = model.generate([Prompt(text=TEXT, images=(picture(seed),)) for seed in range(40)])
    return [seed for seed, answer in enumerate(told) if answer.text.strip() and answer.finished]


@pytest.fixture(scope="session")
def furniture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, the data set, and an empty MLflow, which takes seconds to make."""
    root = tmp_path_factory.mktemp("furniture")
    model = tiny_model("llava")
    model.model.save_pretrained(root / "model")
    model.processor.save_pretrained(root / "model")
    (root / "flags").mkdir()
    lines = []
    for i, seed in zip(range(3), _answered(model), strict=False):
        picture(seed).save(root / "flags" / f"{i}.png")
        constraint = {"text": "this country", "kind": "visual"}
        lines.append({"text": TEXT, "images": [f"{i}.png"], "constraints": [constraint], "id": str(i)})
    (root / "flags" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    database = root / "mlflow.sqlite"
    MlflowClient(tracking_uri=f"sqlite:///{database}", registry_uri=f"sqlite:///{database}").search_experiments()
    return root


@pytest.fixture
def other_weights(tmp_path: Path) -> Path:
    """A model like the study's, with other weights."""
    model = tiny_model("llava", seed=1)
    model.model.save_pretrained(tmp_path / "other")
    model.processor.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def furnished(furniture: Path, root: Path, results: Path | None = None) -> Desk:
    (root / "model").symlink_to(furniture / "model")
    shutil.copytree(furniture / "flags", root / "flags")
    (root / "out").mkdir()
    shutil.copy(furniture / "mlflow.sqlite", root / "out" / "mlflow.sqlite")
    made = Desk(root, results)
    made.write()
    return made


@pytest.fixture
def desk(furniture: Path, tmp_path: Path) -> Desk:
    """A study that nobody has run."""
    return furnished(furniture, tmp_path)


@pytest.fixture(scope="session")
def finished(furniture: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, Report]:
    """A study that was run; to be read only."""
    made = furnished(furniture, tmp_path_factory.mktemp("finished"))
    return made, made.run()


@pytest.fixture
def again(furniture: Path, tmp_path: Path, finished: tuple[Desk, Report]) -> Desk:
    """The same study in another folder, with the results of the finished one; to be planned, not run."""
    return furnished(furniture, tmp_path, finished[0].out)
