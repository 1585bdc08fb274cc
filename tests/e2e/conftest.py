"""Real processes on one machine. Everything here is slow, and none of it is faked."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The folders of tests are no packages; `hosting` and `processes` are imported by name.
sys.path[:0] = [str(HERE), str(HERE.parent / "server" / "services")]

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(scope="session")
def output() -> Path:
    """Where tests leave what people look at: `tests/output/`, which git ignores."""
    folder = HERE.parent / "output"
    folder.mkdir(exist_ok=True)
    return folder
