"""What every test needs: no network, the same examples in every run, and processes that hear Ctrl-C."""

import os
import signal
from pathlib import Path

# Read by transformers when it is imported, so it is set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings

# A shell that starts the suite in the background has it ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure, and the gate gives one commit one answer.
settings.register_profile("gate", deadline=None, derandomize=True)
settings.load_profile("gate")

TESTS = Path(__file__).parent
LONGEST = (
    "editor/atlas/test_atlas.py",
    "e2e/test_crashes.py",
    "server/studies/test_command.py",
    "server/cluster/test_cluster.py",
    "e2e/test_whole.py",
    "test_long_sequence.py",
    "client/cli/test_terminal.py",
    "client/cli/test_documents.py",
    "test_readme.py",
    "test_benchmarks.py",
    "e2e/test_measurements.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: each is one process's, and the last that begins is waited for alone."""
    rank = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
