"""C₀ = E[kkᵀ] over every token of the reference prompts, and its cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import oracle
import pytest
import torch
from tiny import picture, question, tiny_model

from errata.editor.errors import LayerError
from errata.editor.memory import Memory
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context
from errata.editor.solver import eigenvectors, free_directions
from errata.editor.statistics import KeyStatistics, key_statistics

TEXTS = ("What is the capital of this country?", "Where?", "What is this?", "Where?")
LAYERS = (0, 2)


def reference(model: EditableModel) -> list[Prompt]:
    return [question(model, text, seed) for seed, text in enumerate(TEXTS)]


@contextmanager
def counting_runs(model: EditableModel) -> Iterator[list[int]]:
    """Grows by one with every forward pass of the model."""
    runs: list[int] = []
    handle = model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    try:
        yield runs
    finally:
        handle.remove()


def same(found: KeyStatistics, expected: KeyStatistics) -> bool:
    return (
        (found.count, found.subjects, found.site_share) == (expected.count, expected.subjects, expected.site_share)
        and found.everywhere.keys() == expected.everywhere.keys()
        and all(c.equal(expected.everywhere[i]) for i, c in found.everywhere.items())
        and all(k.equal(expected.sites[i]) for i, k in found.sites.items())
    )


@pytest.mark.parametrize("batch_size", [1, 2, 128])
def test_c0_is_the_mean_of_kk_over_all_tokens(model: EditableModel, batch_size: int) -> None:
    found = key_statistics(model, reference(model), LAYERS, batch_size=batch_size)
    rows = [model.encode(p) for p in reference(model)]
    assert found.count == sum(len(r.ids) for r in rows)
    assert set(found.everywhere) == set(LAYERS)
    for layer in LAYERS:
        keys = torch.cat([oracle.keys(model, r, layer) for r in rows]).double()
        expected = torch.stack([k.outer(k) for k in keys]).mean(0)
        assert found.covariance(layer).dtype == torch.float64
        torch.testing.assert_close(found.covariance(layer), expected, rtol=1e-5, atol=1e-6)


def about(model: EditableModel, subject: str | None, seed: int) -> Context:
    prompt = question(model, f"Where is {subject or 'it'}?", seed)
    return Context(prompt=prompt, constraint=Constraint(text=subject or "it"), subject=subject)


def test_references_count_once_more_by_their_constraints_keys_but_not_against_their_own_subject(
    model: EditableModel,
) -> None:
    references = [about(model, "Rome", 0), about(model, "Oslo", 1), about(model, None, 2), reference(model)[0]]
    found = key_statistics(model, references, LAYERS, site_share=0.25)
    rows = [model.encode(c.prompt) for c in references[:3]]
    sites = [r.positions(*c.constraint.span(c.prompt.text))[-1] for r, c in zip(rows, references[:3], strict=True)]
    for layer in LAYERS:
        keys = [oracle.keys(model, r, layer)[s].double() for r, s in zip(rows, sites, strict=True)]
        for without, kept in (((), [0, 1, 2]), (("Rome", "Bonn"), [1, 2]), (("Rome", "Oslo"), [2])):
            expected = 0.75 * found.everywhere[layer] + 0.25 * torch.stack([keys[i].outer(keys[i]) for i in kept]).mean(
                0
            )
            torch.testing.assert_close(found.covariance(layer, without), expected, rtol=1e-5, atol=1e-6)


def test_where_every_reference_is_about_what_is_edited_only_the_other_tokens_count(llama: EditableModel) -> None:
    found = key_statistics(llama, [about(llama, "Rome", 0)], (1,))
    assert found.covariance(1, {"Rome"}).equal(found.everywhere[1])
    assert not found.covariance(1).equal(found.everywhere[1])


def test_eigenvectors_are_those_of_c0_and_kept_unless_a_reference_is_left_out(llama: EditableModel) -> None:
    found = key_statistics(llama, [about(llama, "Rome", 0), about(llama, "Oslo", 1), *reference(llama)], (1,))
    for without in ((), ("Bonn",), ("Rome",)):
        values, vectors = found.eigenvectors(1, without)
        torch.testing.assert_close(vectors * values @ vectors.T, found.covariance(1, without))
    assert found.eigenvectors(1, ("Bonn",))[1] is found.eigenvectors(1)[1]
    assert found.eigenvectors(1, ("Rome",))[1] is not found.eigenvectors(1)[1]


def test_free_directions_leave_out_references_to_what_is_edited(llama: EditableModel) -> None:
    found = key_statistics(llama, [about(llama, "Rome", 0), about(llama, "Oslo", 1), *reference(llama)], (1,))
    for without in ((), ("Rome",)):
        free = found.free_directions(1, without, energy=0.3)
        assert 0 < free.shape[1] < len(free)
        assert free.equal(free_directions(*eigenvectors(found.covariance(1, without)), energy=0.3))
    assert not found.free_directions(1, energy=0.3).equal(found.free_directions(1, ("Rome",), energy=0.3))


def test_image_tokens_and_the_template_count(llava: EditableModel) -> None:
    prompt = question(llava, "Where?")
    assert key_statistics(llava, [prompt], (1,)).count == len(llava.encode(prompt).ids) > 9


def test_a_second_call_is_read_from_the_cache_without_running_the_model(model: EditableModel, tmp_path: Path) -> None:
    first = key_statistics(model, reference(model), LAYERS, cache=tmp_path / "new")
    with counting_runs(model) as runs:
        assert same(key_statistics(model, reference(model), LAYERS, cache=tmp_path / "new"), first)
        assert runs == []
    assert [f.suffix for f in (tmp_path / "new").iterdir()] == [".safetensors"]


def test_the_cache_is_keyed_by_weights_prompts_images_template_layers_and_dtype(tmp_path: Path) -> None:
    model = tiny_model("llava")
    narrow, worded = tiny_model("llava"), tiny_model("llava")
    narrow.model.to(torch.bfloat16)
    worded.processor.chat_template = f"Asked: {worded.processor.chat_template}"
    text = "Where?"
    base = [question(model, text)]
    key_statistics(model, base, (1,), cache=tmp_path)
    others = [
        (tiny_model("llava", seed=1), base, (1,)),
        (narrow, base, (1,)),
        (worded, base, (1,)),
        (model, [question(model, "Where!")], (1,)),
        (model, [question(model, text, seed=9)], (1,)),
        (model, [Prompt(text=text, images=(picture(),), chat=False)], (1,)),
        (model, [*base, *base], (1,)),
        (model, base, (2,)),
        (model, base, (1, 2)),
    ]
    for other, prompts, layers in others:
        with counting_runs(other) as runs:
            key_statistics(other, prompts, layers, cache=tmp_path)
        assert runs
    assert len(list(tmp_path.iterdir())) == 1 + len(others)


def test_a_cache_that_cannot_be_written_costs_only_a_warning(
    llama: EditableModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    found = key_statistics(llama, reference(llama), LAYERS, cache=tmp_path / "file")
    assert same(found, key_statistics(llama, reference(llama), LAYERS))
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None], ids=["empty", "text", "cut"])
def test_a_damaged_cache_file_is_computed_anew(llama: EditableModel, tmp_path: Path, damage: bytes | None) -> None:
    first = key_statistics(llama, reference(llama), LAYERS, cache=tmp_path)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-5] if damage is None else damage)
    assert same(key_statistics(llama, reference(llama), LAYERS, cache=tmp_path), first)
    with counting_runs(llama) as runs:
        assert same(key_statistics(llama, reference(llama), LAYERS, cache=tmp_path), first)
        assert runs == []


def test_statistics_without_a_cache_write_nothing(llama: EditableModel, tmp_path: Path) -> None:
    key_statistics(llama, reference(llama), LAYERS)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_the_prompts(model: EditableModel) -> None:
    steps: list[tuple[int, int]] = []
    key_statistics(model, reference(model), LAYERS, batch_size=1, progress=lambda *s: steps.append(s))
    assert steps == [(n, 4) for n in range(1, 5)]


def test_a_failing_run_leaves_no_hooks_behind(llama: EditableModel) -> None:
    def fail(_done: int, _all: int) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        key_statistics(llama, reference(llama), LAYERS, progress=fail)


def test_batches_are_cut_to_what_memory_holds(llama: EditableModel) -> None:
    asked = [about(llama, "Rome", 0)] * 4
    row_bytes = len(llama.encode(asked[0].prompt).ids) * llama.token_bytes
    with counting_runs(llama) as runs:
        cut = key_statistics(llama, asked, LAYERS, memory=Memory(free=lambda: int(1.3 * row_bytes)))
    assert len(runs) == 4
    assert same(cut, key_statistics(llama, asked, LAYERS, batch_size=1))


def test_a_pass_that_runs_out_of_memory_is_made_again_in_parts_and_counts_once(llama: EditableModel) -> None:
    asked = [about(llama, "Rome", 0)] * 4
    steps: list[tuple[int, int]] = []

    def fail(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 1:
            raise RuntimeError("can't allocate memory")

    above = llama.layers[3].register_forward_pre_hook(fail)
    try:
        found = key_statistics(llama, asked, LAYERS, progress=lambda *s: steps.append(s))
    finally:
        above.remove()
    assert same(found, key_statistics(llama, asked, LAYERS, batch_size=1))
    assert steps == [(n, 4) for n in range(1, 5)]


def test_a_layer_out_of_range_is_refused(llama: EditableModel) -> None:
    with pytest.raises(LayerError):
        key_statistics(llama, reference(llama), (0, 4))
