"""Deltas: three ways of applying them that agree, a folder that PEFT reads, and an algebra that is exact."""

import json
from contextlib import AbstractContextManager
from pathlib import Path

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import picture, question, random_delta, tiny_model, weights_sha256

from errata.editor.delta import (
    Delta,
    LowRank,
    applied,
    borrowed_weights,
    check_base,
    empty_delta,
    load_delta,
    merged,
    weight_of,
)
from errata.editor.errors import CorruptDeltaError, DeltaError, LayerError, WrongBaseError
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt

RANKS = {0: 1, 2: 3, 3: 2}


def answer_logits(model: EditableModel) -> torch.Tensor:
    return torch.stack(
        [oracle.logits(model, model.encode(question(model, t)))[-1] for t in ("What is this country?", "Where are we?")]
    )


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def dense(delta: Delta) -> dict[int, torch.Tensor]:
    return {i: low.dense() for i, low in delta.layers.items()}


@pytest.mark.parametrize("ranks", [RANKS, {1: 4}, {0: 2, 1: 2, 2: 2, 3: 2}], ids=str)
def test_an_applied_a_merged_and_a_peft_adapter_answer_alike(
    ranks: dict[int, int], family_model, tmp_path: Path
) -> None:
    model = family_model
    delta = random_delta(model, ranks)
    before = answer_logits(model)
    with applied(model, delta):
        ours = answer_logits(model)
    with merged(model, delta):
        weights = answer_logits(model)
    delta.save(tmp_path)
    peft = PeftModel.from_pretrained(model.model, str(tmp_path))
    theirs = answer_logits(EditableModel(**{**_fields(model), "model": peft.get_base_model()}))
    peft.unload()
    close(ours, weights)
    close(ours, theirs)
    assert float((ours - before).abs().max()) > 0.1


def _fields(model: EditableModel) -> dict[str, object]:
    return {f: getattr(model, f) for f in ("name", "model", "processor", "family", "base_sha256")}


@pytest.fixture(params=["llava", "llama", "gpt2"])
def family_model(request: pytest.FixtureRequest) -> EditableModel:
    """A fresh one: PEFT puts modules of its own into the model and takes them out again."""
    return tiny_model(request.param)


def test_an_adapter_merged_by_peft_holds_the_weights_of_ours(family_model: EditableModel, tmp_path: Path) -> None:
    delta = random_delta(family_model, RANKS)
    delta.save(tmp_path)
    with merged(family_model, delta):
        ours = {i: weight_of(family_model, i).clone() for i in range(4)}
    PeftModel.from_pretrained(family_model.model, str(tmp_path)).merge_and_unload()
    for i, weight in ours.items():
        torch.testing.assert_close(weight_of(family_model, i).data, weight, rtol=1e-5, atol=1e-6)


def test_a_delta_changes_its_own_down_projections_and_nothing_else(model: EditableModel) -> None:
    delta = random_delta(model, {1: 2})
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    with merged(model, delta):
        changed = [n for n, p in model.model.named_parameters() if not p.equal(before[n])]
    assert changed == [f"{model.down_projection_name(1)}.weight"]


def test_deltas_applied_together_or_nested_answer_like_their_sum(model: EditableModel) -> None:
    one, two = random_delta(model, {0: 2, 2: 1}, seed=1), random_delta(model, {2: 3, 3: 1}, seed=2)
    with applied(model, one + two):
        expected = answer_logits(model)
    with applied(model, one, two):
        close(answer_logits(model), expected)
    with applied(model, one), applied(model, two):
        close(answer_logits(model), expected)
    with merged(model, one, two):
        close(answer_logits(model), expected)
    with merged(model, one), applied(model, two):
        close(answer_logits(model), expected)
    with merged(model, one), merged(model, two):
        close(answer_logits(model), expected)


def test_an_empty_delta_is_its_base_bit_for_bit(model: EditableModel) -> None:
    before = answer_logits(model)
    for way in (applied, merged):
        with way(model, empty_delta(model)):
            assert answer_logits(model).equal(before)
    with applied(model):
        assert answer_logits(model).equal(before)
    assert empty_delta(model).norm() == 0
    assert empty_delta(model).nbytes == 0


def _borrowed(model: EditableModel, delta: Delta) -> AbstractContextManager[object]:
    return borrowed_weights([weight_of(model, i) for i in delta.layers])


WAYS = {"applied": applied, "merged": merged, "borrowed_weights": _borrowed}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fails", [False, True])
def test_leaving_the_context_leaves_the_weights_bit_identical(model: EditableModel, way: str, fails: bool) -> None:
    delta = random_delta(model, RANKS)
    before, weights = answer_logits(model), weights_sha256(model)
    try:
        with WAYS[way](model, delta):
            if way == "borrowed_weights":
                with torch.no_grad():
                    weight_of(model, 2).fill_(torch.nan)
            assert not answer_logits(model).equal(before)
            if fails:
                raise RuntimeError("in the middle")
    except RuntimeError:
        assert fails
    assert weights_sha256(model) == weights
    assert answer_logits(model).equal(before)


@pytest.mark.parametrize("way", ["applied", "merged"])
def test_a_delta_that_fails_half_way_leaves_the_model_as_it_was(model: EditableModel, way: str) -> None:
    good = random_delta(model, {0: 1, 1: 1})
    lows = {**good.layers, 2: LowRank(a=torch.ones(1, 48), b=torch.ones(7, 1))}
    misfit = Delta(base_sha256=good.base_sha256, layers=lows, modules={**good.modules, 2: "x"})
    beyond = Delta(
        base_sha256=good.base_sha256, layers={**good.layers, 9: good.layers[0]}, modules={**good.modules, 9: "x"}
    )
    before, weights = answer_logits(model), weights_sha256(model)
    for delta, error in ((misfit, RuntimeError), (beyond, LayerError)):
        with pytest.raises(error), WAYS[way](model, delta):
            answer_logits(model)
    assert weights_sha256(model) == weights
    assert answer_logits(model).equal(before)


def test_one_weight_borrowed_twice_is_still_given_back(llama: EditableModel) -> None:
    weight = weight_of(llama, 1)
    with borrowed_weights([weight]), torch.no_grad():
        weight.zero_()
        with borrowed_weights([weight, weight]):
            weight.fill_(3)
        assert float(weight.abs().sum()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llava", "gpt2"])
def test_a_narrow_base_takes_a_delta_in_float32_and_keeps_its_weights(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family)
    model.model.to(dtype)
    delta = random_delta(model, {1: 2}, size=0.02)
    row = model.encode(question(model))
    weights = weights_sha256(model)
    key = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        plain = oracle.down(model, 1)(key)
        with applied(model, delta):
            found = oracle.down(model, 1)(key)
            assert model.model(**model.inputs([row])).logits.isfinite().all()
    expected = plain.float() + (key.double() @ delta.layers[1].dense().T).float()
    assert found.dtype == dtype
    assert found.equal(expected.to(dtype)) or torch.allclose(found.float(), expected, rtol=torch.finfo(dtype).eps)
    with merged(model, delta):
        assert weight_of(model, 1).dtype == dtype
    assert weights_sha256(model) == weights


def test_a_merged_weight_is_the_exact_sum_rounded_once() -> None:
    model = tiny_model("llama")
    model.model.to(torch.bfloat16)
    delta = random_delta(model, {1: 2}, size=0.05)
    exact = weight_of(model, 1).double() + delta.layers[1].dense()
    with merged(model, delta):
        assert weight_of(model, 1).equal(exact.to(torch.bfloat16))


def test_a_saved_delta_is_loaded_bit_for_bit(model: EditableModel, tmp_path: Path) -> None:
    delta = random_delta(model, RANKS)
    delta.save(tmp_path / "new" / "folder")
    found = load_delta(tmp_path / "new" / "folder", model)
    assert (found.sha256, found.base_sha256, found.ranks) == (delta.sha256, delta.base_sha256, delta.ranks)
    assert dict(found.modules) == dict(delta.modules)
    for i, low in delta.layers.items():
        assert found.layers[i].a.equal(low.a)
        assert found.layers[i].b.equal(low.b)


def test_a_saved_delta_holds_no_pickle_and_its_scale_is_one(llama: EditableModel, tmp_path: Path) -> None:
    random_delta(llama, RANKS).save(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} <= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "errata.json",
        "README.md",
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert sorted(config["target_modules"]) == [f"model.layers.{i}.mlp.down_proj" for i in RANKS]


def test_saving_over_an_older_delta_leaves_the_newer_one(llama: EditableModel, tmp_path: Path) -> None:
    random_delta(llama, RANKS).save(tmp_path)
    newer = random_delta(llama, {1: 2}, seed=5)
    newer.save(tmp_path)
    assert load_delta(tmp_path, llama).sha256 == newer.sha256


def test_an_empty_delta_cannot_be_saved(llama: EditableModel, tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match="it is its base"):
        empty_delta(llama).save(tmp_path)


def test_a_delta_of_another_base_is_refused_everywhere(llama: EditableModel, tmp_path: Path) -> None:
    other = tiny_model("llama", seed=1)
    delta = random_delta(other, {1: 1})
    delta.save(tmp_path)
    for refused in (
        lambda: check_base(delta, llama),
        lambda: load_delta(tmp_path, llama),
        lambda: applied(llama, delta).__enter__(),
        lambda: merged(llama, delta).__enter__(),
        lambda: random_delta(llama, {1: 1}) + delta,
        lambda: empty_delta(llama) - delta,
    ):
        with pytest.raises(WrongBaseError, match=delta.base_sha256[:12]):
            refused()
    assert load_delta(tmp_path).base_sha256 == other.base_sha256


def _edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "errata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, path)


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _add_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name.replace("layers.1", "layers.3"): tensors[name].clone()}, path)


TAMPERINGS = {
    "the scale": lambda f: _edit_config(f, lora_alpha=300),
    "what it goes on": lambda f: _edit_config(f, target_modules=["model.layers.2.mlp.down_proj"]),
    "one more tensor": _add_tensor,
    "a factor": _edit_tensor,
    "the base": lambda f: _edit_manifest(f, base_sha256="0" * 64),
    "the hash": lambda f: _edit_manifest(f, delta_sha256="0" * 64),
    "the module": lambda f: _edit_manifest(f, layers={"1": "model.layers.0.mlp.down_proj"}),
    "the layer": lambda f: _edit_manifest(f, layers={"2": "model.layers.1.mlp.down_proj"}),
    "no layer": lambda f: _edit_manifest(f, layers={}),
    "a layer that is no number": lambda f: _edit_manifest(f, layers={"one": "model.layers.1.mlp.down_proj"}),
    "a layer list": lambda f: _edit_manifest(f, layers=["model.layers.1.mlp.down_proj"]),
    "a manifest that is no JSON": lambda f: (f / "errata.json").write_text("{"),
    "a manifest that is a list": lambda f: (f / "errata.json").write_text("[]"),
    "a manifest that is no text": lambda f: (f / "errata.json").write_bytes(b"\xff\xfe\x00"),
    "no manifest": lambda f: (f / "errata.json").unlink(),
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "cut weights": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:-9]
    ),
    "empty weights": lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
    "a later format": lambda f: _edit_manifest(f, format=2),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_an_altered_folder_is_refused(llama: EditableModel, tmp_path: Path, tampering: str) -> None:
    random_delta(llama, {1: 2}).save(tmp_path)
    TAMPERINGS[tampering](tmp_path)
    with pytest.raises(CorruptDeltaError, match=str(tmp_path)):
        load_delta(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptDeltaError, match="no readable adapter"):
        load_delta(tmp_path / "nowhere")


BASE = tiny_model("llama")
DELTAS = st.builds(
    lambda ranks, seed: random_delta(BASE, ranks, seed),
    st.dictionaries(st.integers(0, 3), st.integers(1, 4), max_size=4),
    st.integers(0, 1000),
)


@given(one=DELTAS, two=DELTAS)
def test_deltas_add_like_their_dense_changes(one: Delta, two: Delta) -> None:
    left, right, total = dense(one), dense(two), dense(one + two)
    assert total.keys() == left.keys() | right.keys()
    assert list((one + two).layers) == sorted(total)
    for i, change in total.items():
        zero = torch.zeros(32, 48, dtype=torch.float64)
        torch.testing.assert_close(change, left.get(i, zero) + right.get(i, zero))


@given(first=DELTAS, middle=DELTAS, last=DELTAS)
def test_subtracting_an_edit_in_the_middle_leaves_the_others(first: Delta, middle: Delta, last: Delta) -> None:
    """design.md: exact to 5e-7 in float32."""
    kept, found = dense(first + last), dense((first + middle + last - middle).compressed())
    assert set(found) == set(kept)
    whole = dense(first + middle + last)
    for i, change in kept.items():
        assert float((found[i] - change).norm()) <= 5e-7 * max(float(change.norm()), float(whole[i].norm()))


@given(one=DELTAS, weight=st.floats(-4, 4))
def test_a_scaled_delta_scales_its_change_and_its_norm(one: Delta, weight: float) -> None:
    for i, change in dense(one * weight).items():
        torch.testing.assert_close(change, one.layers[i].dense() * weight, rtol=1e-5, atol=1e-6)
    assert (one * weight).norm() == pytest.approx(abs(weight) * one.norm(), rel=1e-5, abs=1e-9)


@given(one=DELTAS, two=DELTAS, repeats=st.integers(1, 3))
def test_compression_keeps_the_change_and_lowers_the_rank(one: Delta, two: Delta, repeats: int) -> None:
    long = one + two
    for _ in range(repeats):
        long = long + one * 0.5
    short = long.compressed()
    for i, low in long.layers.items():
        assert float((short.layers[i].dense() - low.dense()).norm()) <= 1e-6 * float(low.dense().norm())
        assert short.ranks[i] <= one.ranks.get(i, 0) + two.ranks.get(i, 0)
    assert short.compressed().ranks == short.ranks
    assert short.modules == {i: long.modules[i] for i in short.layers}


@given(one=DELTAS, two=DELTAS)
def test_a_sum_that_cancels_comes_to_nothing(one: Delta, two: Delta) -> None:
    gone = (one + two - one - two).compressed()
    assert gone.layers == {}
    assert gone.modules == {}
    assert (one * 0).compressed().layers == {}


def test_a_rank_beyond_the_width_is_compressed_to_the_width(llama: EditableModel) -> None:
    long = random_delta(llama, {1: 90})
    assert long.compressed().ranks == {1: 32}
    torch.testing.assert_close(long.compressed().layers[1].dense(), long.layers[1].dense(), rtol=1e-4, atol=1e-5)


@given(one=DELTAS, two=DELTAS)
def test_a_hash_says_whether_two_deltas_are_the_same(one: Delta, two: Delta) -> None:
    same = one.ranks == two.ranks and all(
        low.a.equal(two.layers[i].a) and low.b.equal(two.layers[i].b) for i, low in one.layers.items()
    )
    assert (one.sha256 == two.sha256) == same


def test_a_delta_weighs_kilobytes(llama: EditableModel) -> None:
    assert random_delta(llama, {1: 2, 2: 1}).nbytes == (2 + 1) * (32 + 48) * 4


def test_a_delta_is_alike_before_and_after_any_image(llava: EditableModel) -> None:
    prompt = Prompt(text="What?", images=(picture(3),))
    with applied(llava, random_delta(llava, {0: 2})):
        edited = llava.generate([prompt])
    with merged(llava, random_delta(llava, {0: 2})):
        assert llava.generate([prompt]) == edited
