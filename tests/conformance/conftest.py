"""The conformance suite runs on the tiny models of tests/editor."""

import importlib.util
import sys
from pathlib import Path

_FILE = Path(__file__).parents[1] / "editor" / "conftest.py"
_spec = importlib.util.spec_from_file_location("editor_conftest", _FILE)
assert _spec
assert _spec.loader
_editor = importlib.util.module_from_spec(_spec)
sys.modules["editor_conftest"] = _editor
_spec.loader.exec_module(_editor)

model = _editor.model
