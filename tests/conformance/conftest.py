"""The conformance suite runs on every tiny model of tests/editor: one an architecture."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_FILE = Path(__file__).parents[1] / "editor" / "conftest.py"
_spec = importlib.util.spec_from_file_location("editor_conftest", _FILE)
assert _spec
assert _spec.loader
_editor = importlib.util.module_from_spec(_spec)
sys.modules["editor_conftest"] = _editor
_spec.loader.exec_module(_editor)

from tiny import ARCHITECTURES  # noqa: E402
from tiny_vision import VISION  # noqa: E402

from errata.editor.model import EditableModel  # noqa: E402


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Iterator[EditableModel]:
    """Each architecture in turn."""
    yield from _editor._borrowed(request.param)


# Each token of Phi-4's 545 an image would be a column of the trace, and its decoder sees an image as Phi-3 sees words.
@pytest.fixture(params=[name for name in VISION if name != "phi4_multimodal"])
def seeing(request: pytest.FixtureRequest) -> Iterator[EditableModel]:
    """Each architecture that takes images."""
    yield from _editor._borrowed(request.param)
