"""The engine's tests run on the tiny models of tests/editor and on Atlas."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

_FILE = Path(__file__).parents[2] / "editor" / "conftest.py"
_spec = importlib.util.spec_from_file_location("editor_conftest", _FILE)
assert _spec
assert _spec.loader
_editor = importlib.util.module_from_spec(_spec)
sys.modules["editor_conftest"] = _editor
_spec.loader.exec_module(_editor)

sys.path.insert(0, str(Path(__file__).parent))  # `alone` is imported by name

model, llava, llama = _editor.model, _editor.llava, _editor.llama

from errata.editor.delta import Delta  # noqa: E402
from errata.editor.model import EditableModel  # noqa: E402
from errata.server.engine import Engine, EngineObserver, EngineSettings  # noqa: E402

StartEngine = Callable[..., Engine]


@pytest.fixture
def start_engine() -> Iterator[StartEngine]:
    """Starts engines over lineages by version number, and closes them."""
    with ExitStack() as engines:

        def start(
            of: EditableModel,
            lineages: Mapping[int, Sequence[Delta]] | None = None,
            observer: EngineObserver | None = None,
            clock: Callable[[], float] | None = None,
            **settings: int,
        ) -> Engine:
            known = {0: (), **(lineages or {})}
            timed = {"clock": clock} if clock else {}
            engine = Engine(of, known.__getitem__, EngineSettings(**settings), observer=observer, **timed)
            engines.callback(engine.close)
            engine.start()
            return engine

        yield start
