import threading
from collections.abc import Callable

import pytest
import torch
from tiny import question, random_delta, tiny_model, weights_sha256

from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.delta import Delta, LowRank, applied
from errata.editor.errors import DeltaError, WrongBaseError
from errata.editor.mixed import MixedDeltas, VersionFactors, mixed, replica, version_factors
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt

LINEAGES = ((), (0,), (1, 2), (), (3,), (1, 2), (1, 2), (1, 2), (1, 2))
"""Which deltas the rows of a batch answer with: the base, one edit, a lineage, and one version on many rows."""


def deltas_of(model: EditableModel) -> list[Delta]:
    ranks: list[dict[int, int]] = [{1: 1}, {1: 3, 2: 2}, {2: 9}, {0: 8, 3: 2}]
    return [random_delta(model, r, seed=i) for i, r in enumerate(ranks)]


def logits(model: EditableModel, prompts: list[Prompt]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.model(**model.inputs([model.encode(p) for p in prompts])).logits
    return found


def test_a_replica_shares_every_tensor_and_no_module(model: EditableModel) -> None:
    copied = replica(model)
    for of in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers):
        mine, theirs = dict(of(copied.model, remove_duplicate=False)), dict(of(model.model, remove_duplicate=False))
        assert mine.keys() == theirs.keys()
        assert [t.data_ptr() for t in mine.values()] == [t.data_ptr() for t in theirs.values()]
    assert not {id(m) for m in copied.model.modules()} & {id(m) for m in model.model.modules()}
    assert copied.model.config is not model.model.config
    assert copied.model.generation_config is not model.model.generation_config
    assert copied.tokenizer is not model.tokenizer


def test_tied_weights_stay_tied_in_a_replica(gpt2: EditableModel) -> None:
    copied = replica(gpt2).model
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    assert copied.get_output_embeddings().weight is gpt2.model.get_input_embeddings().weight


def test_a_replica_adds_less_than_a_hundredth_of_the_weights() -> None:
    model = load_model(ATLAS)
    held = {t.untyped_storage().data_ptr() for t in (*model.model.parameters(), *model.model.buffers())}
    total = sum(t.nbytes for t in model.model.parameters())
    copied = replica(model).model
    added = [
        v
        for m in copied.modules()
        for v in (*vars(m).values(), *m._parameters.values(), *m._buffers.values())
        if isinstance(v, torch.Tensor) and v.untyped_storage().data_ptr() not in held
    ]
    assert sum(t.nbytes for t in added) < 0.01 * total


def test_a_replica_answers_alike_and_leaves_hooks_behind(model: EditableModel) -> None:
    prompts = [question(model)]
    expected = logits(model, prompts)
    with applied(model, random_delta(model, {1: 4})):
        copied = replica(model)
        torch.testing.assert_close(logits(copied, prompts), expected, rtol=0, atol=0)
        with applied(copied, random_delta(copied, {2: 4}, seed=1)):
            edited = logits(copied, prompts)
            assert not torch.allclose(edited, expected)
            assert not torch.allclose(edited, logits(model, prompts))
    torch.testing.assert_close(logits(model, prompts), expected, rtol=0, atol=0)


def test_threads_on_replicas_never_see_each_others_edits(model: EditableModel) -> None:
    prompts = [question(model)]
    deltas = [*deltas_of(model)]
    expected = []
    for delta in deltas:
        with applied(model, delta):
            expected.append(logits(model, prompts))
    copies = [replica(model) for _ in deltas]
    together = threading.Barrier(len(deltas))
    wrong: list[int] = []

    def ask(i: int) -> None:
        for _ in range(10):
            together.wait(timeout=60)
            with applied(copies[i], deltas[i]):
                found = logits(copies[i], prompts)
            if not torch.equal(found, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(deltas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert weights_sha256(model) == model.base_sha256


def test_a_mixed_batch_has_the_logits_of_each_version_alone(model: EditableModel) -> None:
    deltas = deltas_of(model)
    lineages = [[deltas[i] for i in lineage] for lineage in LINEAGES]
    prompts = [question(model, seed=i) for i in range(len(LINEAGES))]
    base = logits(model, prompts)
    with mixed(model, lineages):
        found = logits(model, prompts)
    for row, (prompt, lineage) in enumerate(zip(prompts, lineages, strict=True)):
        with applied(model, *lineage):
            torch.testing.assert_close(found[row], logits(model, [prompt])[0], rtol=1e-4, atol=1e-4)
        assert lineage == [] or not torch.allclose(found[row], base[row], atol=1e-2)


def test_a_mixed_batch_answers_like_each_version_alone(model: EditableModel) -> None:
    deltas = deltas_of(model)
    lineages = [[deltas[i] for i in lineage] for lineage in LINEAGES]
    prompts = [question(model, seed=i) for i in range(len(LINEAGES))]
    with mixed(model, lineages):
        found = model.generate(prompts, max_new_tokens=8)
    alone = []
    for prompt, lineage in zip(prompts, lineages, strict=True):
        with applied(model, *lineage):
            alone += model.generate([prompt], max_new_tokens=8)
    assert found == alone
    assert found != model.generate(prompts, max_new_tokens=8)


def test_rows_of_the_base_alone_run_no_product(llama: EditableModel) -> None:
    with MixedDeltas(llama) as deltas:
        factors = version_factors(llama, [random_delta(llama, {1: 4})])
        assert deltas.stacked([None, version_factors(llama, []), None]).products == {}
        assert set(deltas.stacked([None, factors]).products) == {1}


def test_factors_are_stacked_again_only_for_other_versions(llama: EditableModel) -> None:
    one, two = (version_factors(llama, [random_delta(llama, {1: 4}, seed=i)]) for i in range(2))

    def bank(rows: object) -> object:
        return rows.products[1][0].bank  # type: ignore[attr-defined]

    with MixedDeltas(llama) as deltas:
        first = deltas.stacked([one, two])
        assert bank(deltas.stacked([two, None, one], first)) is bank(first)
        assert bank(deltas.stacked([one, one], first)) is not bank(first)
        assert len(bank(deltas.stacked([one] * 31 + [two])).entries) == 3  # type: ignore[attr-defined]


def test_a_long_lineage_is_brought_down_to_the_width(llama: EditableModel) -> None:
    lineage = [random_delta(llama, {1: 9}, seed=i, size=0.1) for i in range(5)]
    factors = version_factors(llama, lineage)
    assert len(factors.layers[1].a) == 32
    assert factors.nbytes == 32 * (48 + 32) * 4
    prompts = [question(llama)]
    with MixedDeltas(llama) as deltas, deltas.answering(deltas.stacked([factors])):
        found = logits(llama, prompts)
    with applied(llama, *lineage):
        torch.testing.assert_close(found, logits(llama, prompts), rtol=1e-4, atol=1e-4)


def test_a_narrow_model_is_edited_in_float32() -> None:
    model = tiny_model("llama")
    model.model.to(torch.bfloat16)
    delta = random_delta(model, {1: 4})
    prompts = [question(model)] * 3
    with applied(model, delta):
        expected = logits(model, prompts)
    with mixed(model, [(delta,), (), (delta,)]):
        found = logits(model, prompts)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    assert not torch.equal(found[1], expected[1])


def _wrong_base(delta: Delta) -> Delta:
    return Delta(base_sha256="0" * 64, layers=delta.layers, modules=delta.modules)


def _not_finite(delta: Delta) -> Delta:
    low = LowRank(a=delta.layers[1].a, b=torch.full_like(delta.layers[1].b, torch.nan))
    return Delta(base_sha256=delta.base_sha256, layers={1: low}, modules=delta.modules)


@pytest.mark.parametrize(("broken", "error"), [(_wrong_base, WrongBaseError), (_not_finite, DeltaError)])
def test_a_delta_that_would_harm_its_neighbours_is_refused(
    llama: EditableModel, broken: Callable[[Delta], Delta], error: type[Exception]
) -> None:
    with pytest.raises(error):
        version_factors(llama, [broken(random_delta(llama, {1: 4}))])


def test_rows_that_are_not_those_stacked_are_refused(llama: EditableModel) -> None:
    factors: VersionFactors = version_factors(llama, [random_delta(llama, {1: 4})])
    with (
        MixedDeltas(llama) as deltas,
        deltas.answering(deltas.stacked([factors, None])),
        pytest.raises(ValueError, match="3 rows runs as 2 versions"),
    ):
        logits(llama, [question(llama)] * 3)
