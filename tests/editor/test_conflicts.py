"""How alike two deltas read, and whether a delta from elsewhere fits."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import random_delta, tiny_model

from errata.editor.conflicts import key_overlap
from errata.editor.delta import Delta, LowRank, check_fit
from errata.editor.errors import DeltaError
from errata.editor.model import EditableModel

BASE = "ab" * 32


def _reading(*rows: list[float], layer: int = 0) -> Delta:
    a = torch.tensor(rows)
    return Delta(base_sha256=BASE, layers={layer: LowRank(a=a, b=torch.ones(2, len(rows)))}, modules={layer: "m"})


def test_deltas_that_read_one_direction_overlap_whatever_its_length_and_sign() -> None:
    first = _reading([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    assert key_overlap(first, _reading([-7.0, 0.0, 0.0])) == pytest.approx(1.0)


def test_the_overlap_is_the_cosine_of_the_smallest_angle() -> None:
    half = _reading([1.0, 0.0, 3.0**0.5])
    assert key_overlap(_reading([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]), half) == pytest.approx(0.5)


def test_deltas_of_other_directions_or_other_layers_do_not_overlap() -> None:
    first = _reading([1.0, 0.0, 0.0])
    assert key_overlap(first, _reading([0.0, 2.0, 0.0])) == 0.0
    assert key_overlap(first, _reading([1.0, 0.0, 0.0], layer=1)) == 0.0


def test_a_row_said_twice_does_not_count_twice() -> None:
    assert key_overlap(_reading([1.0, 0.0], [1.0, 0.0]), _reading([1.0, 1.0])) == pytest.approx(0.5**0.5)


def test_the_norm_of_the_factors_is_that_of_their_product() -> None:
    low = random_delta(tiny_model("llama"), {1: 3}).layers[1]
    assert low.norm() == pytest.approx(float(low.dense().norm()))


def _changed(change: Callable[[LowRank], LowRank]) -> Callable[[Delta], Delta]:
    return lambda delta: replace(delta, layers={i: change(low) for i, low in delta.layers.items()})


@pytest.mark.parametrize(
    "change",
    [
        lambda delta: replace(delta, layers={99: delta.layers[1]}, modules={99: delta.modules[1]}),
        lambda delta: replace(delta, modules={1: "model.embed_tokens"}),
        _changed(lambda low: LowRank(a=low.a[:, 1:], b=low.b)),
        _changed(lambda low: LowRank(a=low.a, b=low.b[:, 1:])),
        _changed(lambda low: LowRank(a=low.a[:0], b=low.b[:, :0])),
        _changed(lambda low: LowRank(a=low.a * float("nan"), b=low.b)),
        _changed(lambda low: LowRank(a=low.a.double(), b=low.b)),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_delta_that_does_not_fit_is_refused(family: str, change: Callable[[Delta], Delta]) -> None:
    model: EditableModel = tiny_model(family)
    delta = random_delta(model, {1: 2})
    check_fit(delta, model)
    with pytest.raises(DeltaError):
        check_fit(change(delta), model)
