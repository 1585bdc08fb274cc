"""The tiny models, shared by all tests: whoever borrows one gives it back as it was."""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

# Products this small are not worth a second thread, and waiting for one costs ten times their own time.
torch.set_num_threads(1)
# The folders of tests are no packages; `tiny` and `oracle` are imported by name from here and from conformance/.
sys.path.insert(0, str(Path(__file__).parent))

from tiny import FAMILIES, question, tiny_model, weights_sha256  # noqa: E402

from errata.editor.model import EditableModel  # noqa: E402


@cache
def _shared(family: str) -> EditableModel:
    model = tiny_model(family)
    model.generate([question(model)], max_new_tokens=1)  # transformers puts hooks of its own on at the first call
    return model


def _hooks(model: EditableModel) -> dict[str, int]:
    return {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.model.named_modules()}


def _borrowed(family: str) -> Iterator[EditableModel]:
    model = _shared(family)
    decoder = model.family.decoder_of(model.model).config
    attention, hooks = decoder._attn_implementation, _hooks(model)
    yield model
    assert weights_sha256(model) == model.base_sha256, "the test changed the weights"
    assert decoder._attn_implementation == attention, "the test left another attention behind"
    assert _hooks(model) == hooks, "the test left hooks behind"


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Iterator[EditableModel]:
    """Each family in turn."""
    yield from _borrowed(request.param)


@pytest.fixture
def llava() -> Iterator[EditableModel]:
    yield from _borrowed("llava")


@pytest.fixture
def llama() -> Iterator[EditableModel]:
    yield from _borrowed("llama")


@pytest.fixture
def gpt2() -> Iterator[EditableModel]:
    yield from _borrowed("gpt2")
