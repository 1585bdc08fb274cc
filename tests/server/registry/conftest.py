"""An MLflow in each test's own folder: SQLite, made once and copied, because MLflow takes seconds to make one."""

import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

# Products this small are not worth a second thread, and waiting for one costs ten times their own time.
torch.set_num_threads(1)
# The folders of tests are no packages; `tiny` and `publishing` are imported by name.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "editor")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns of its own code when it is imported
    from publishing import House  # imports MLflow, after the registry's package has quieted it

from mlflow import MlflowClient  # noqa: E402


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def house(empty_mlflow: Path, tmp_path: Path) -> House:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    return House(tmp_path)
