"""Recorded states, and runs that start from them, against the full model (modules `recording`, `suffix`)."""

import oracle
import pytest
import torch
from tiny import picture, question, random_delta, tiny_model

from errata.editor.delta import applied
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Prompt
from errata.editor.recording import Recording, record
from errata.editor.states import Component, changed_output, logits_of
from errata.editor.suffix import Suffix

TEXTS = ("What is the capital of this country?", "Where are we?", "What is this country?", "Where is that capital?")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest entry: rows of one batch are summed in another order than alone."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def rows_of(model: EditableModel) -> list[Encoded]:
    return [model.encode(question(model, text, seed), "Rome") for seed, text in enumerate(TEXTS)]


def starts_of(rows: list[Encoded]) -> list[int]:
    """A different distance from the end in every row."""
    return [len(row.ids) - 4 - n % 4 for n, row in enumerate(rows)]


def climbed(
    model: EditableModel, recordings: list[Recording], starts: list[int], layer: int, packed: list[int] | None = None
) -> list[torch.Tensor]:
    """The logits of a suffix run from `layer` up, padding cut off."""
    suffix = Suffix(model, recordings, starts, packed)
    hidden = suffix.inputs(layer)
    with suffix, torch.no_grad():
        for index in range(layer, len(model.layers)):
            hidden = suffix.run(index, hidden)
        logits = logits_of(model, hidden)
    return [logits[row, span] for row, span in suffix.spans]


def test_several_rows_continue_each_recording_in_turn(model: EditableModel) -> None:
    rows = rows_of(model)
    starts = starts_of(rows)
    suffix = Suffix(model, record(model, rows, starts), starts)
    once = suffix.inputs(1)
    thrice = once.repeat(3, 1, 1)
    with suffix, torch.no_grad():
        for layer in range(1, len(model.layers)):
            once, thrice = suffix.run(layer, once), suffix.run(layer, thrice)
    for n, row in enumerate(thrice):
        recording, span = suffix.spans[n % len(rows)]
        close(row[span], once[recording, span])


def test_a_recording_holds_what_the_full_model_computed(model: EditableModel) -> None:
    rows = rows_of(model)
    starts = starts_of(rows)
    found = record(model, rows, starts, components=tuple(Component), key_layers=(1, 3))
    for row, start, recording in zip(rows, starts, found, strict=True):
        states = oracle.outputs(model, row, [c.value for c in Component])
        for (component, index), expected in states.items():
            got = recording.outputs[Component(component)][index]
            close(got, expected[start:])
        for index in range(1, len(model.layers)):
            close(recording.inputs[index], states["layer", index - 1][start:])
        for index in (1, 3):
            close(recording.keys[index], oracle.keys(model, row, index)[start:])
        assert set(recording.keys) == {1, 3}
        assert recording.length == len(row.ids)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_rows_are_recorded_alike_in_every_batch(model: EditableModel, batch_size: int) -> None:
    rows = [*rows_of(model), *rows_of(model)[::-1]]
    starts = starts_of(rows)
    together = record(model, rows, starts, batch_size=batch_size)
    for row, start, found in zip(rows, starts, together, strict=True):
        assert (found.row, found.start) == (row, start)
        alone = record(model, [row], [start])[0]
        close(found.inputs, alone.inputs)
        for mine, other in zip(found.kv.values(), alone.kv.values(), strict=True):
            close(mine[0], other[0])


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_rows_of_mixed_lengths_continued_together_equal_the_full_model(model: EditableModel, layer: int) -> None:
    rows = rows_of(model)
    starts = starts_of(rows)
    found = climbed(model, record(model, rows, starts), starts, layer)
    for row, start, logits in zip(rows, starts, found, strict=True):
        close(logits, oracle.logits(model, row)[start:])


@pytest.mark.parametrize("packed", [[4], [1, 3], [2, 2], [3, 1]])
@pytest.mark.parametrize("layer", [0, 2])
def test_rows_packed_into_one_see_nothing_of_one_another(model: EditableModel, layer: int, packed: list[int]) -> None:
    rows = rows_of(model)
    starts = starts_of(rows)
    found = climbed(model, record(model, rows, starts), starts, layer, packed)
    for row, start, logits in zip(rows, starts, found, strict=True):
        close(logits, oracle.logits(model, row)[start:])


def test_several_rows_continue_each_pack_in_turn(model: EditableModel) -> None:
    rows = rows_of(model)
    starts = starts_of(rows)
    suffix = Suffix(model, record(model, rows, starts), starts, [1, 3])
    once = suffix.inputs(1)
    twice = once.repeat(2, 1, 1)
    with suffix, torch.no_grad():
        for layer in range(1, len(model.layers)):
            once, twice = suffix.run(layer, once), suffix.run(layer, twice)
    for recording, span in suffix.spans:
        close(twice[suffix.rows + recording, span], once[recording, span])


def test_a_run_can_start_later_than_its_recording_does(model: EditableModel) -> None:
    rows = rows_of(model)
    starts = starts_of(rows)
    recordings = record(model, rows, [max(0, s - n) for n, s in enumerate(starts)])
    for row, start, logits in zip(rows, starts, climbed(model, recordings, starts, 1), strict=True):
        close(logits, oracle.logits(model, row)[start:])


def test_a_run_from_the_first_token_on_has_no_prefix(model: EditableModel) -> None:
    rows = rows_of(model)
    for starts in ([0, 0, 0, 0], [0, 3, 1, 0]):
        found = climbed(model, record(model, rows, starts), starts, 0)
        for row, start, logits in zip(rows, starts, found, strict=True):
            close(logits, oracle.logits(model, row)[start:])


def test_a_run_of_the_last_token_alone_equals_the_full_model(model: EditableModel) -> None:
    rows = rows_of(model)
    starts = [len(row.ids) - 1 for row in rows]
    for row, logits in zip(rows, climbed(model, record(model, rows, starts), starts, 0), strict=True):
        close(logits[0], oracle.logits(model, row)[-1])


@pytest.mark.parametrize("component", list(Component))
@pytest.mark.parametrize("layer", [0, 2])
def test_a_value_added_to_a_rows_first_token_equals_a_hook_on_the_full_model(
    model: EditableModel, component: Component, layer: int
) -> None:
    rows = rows_of(model)
    starts = starts_of(rows)
    values = torch.randn(len(rows), 32, generator=torch.Generator().manual_seed(1))

    def add(output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1] + values[:, None], output[:, 1:]], dim=1)

    suffix = Suffix(model, record(model, rows, starts), starts)
    hidden = suffix.inputs(layer)
    with suffix, torch.no_grad():
        for index in range(layer, len(model.layers)):
            hidden = suffix.run(index, hidden, {component: add} if index == layer else None)
        logits = logits_of(model, hidden)
    for r, (row, start) in enumerate(zip(rows, starts, strict=True)):
        change = oracle.block(model, component.value, layer), oracle.add(start, values[r])
        expected = oracle.logits(model, row, [change])[start:]
        close(logits[r, suffix.spans[r][1]], expected)


def test_gradients_through_a_suffix_equal_gradients_through_the_full_model(model: EditableModel) -> None:
    row = rows_of(model)[0]
    start = len(row.ids) - 5
    recording = record(model, [row], [start])
    suffix = Suffix(model, recording, [start])
    delta = torch.zeros(32, requires_grad=True)
    hidden = suffix.inputs(1)
    with suffix:
        for index in range(1, len(model.layers)):
            put = {Component.MLP: oracle.add(0, delta)} if index == 1 else None
            hidden = suffix.run(index, hidden, put)
        logits_of(model, hidden)[0, -1].log_softmax(-1)[7].backward()
    other = torch.zeros(32, requires_grad=True)
    with changed_output(oracle.block(model, "mlp", 1), oracle.add(start, other)):
        model.model(**model.inputs([row]), use_cache=False).logits[0, -1].log_softmax(-1)[7].backward()
    torch.testing.assert_close(delta.grad, other.grad, rtol=1e-3, atol=1e-5)


def test_a_failing_hook_leaves_attention_and_hooks_as_they_were(model: EditableModel) -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    row = rows_of(model)[0]
    suffix = Suffix(model, record(model, [row], [3]), [3])
    with pytest.raises(RuntimeError, match="no"), suffix:
        suffix.run(0, suffix.inputs(0), {Component.MLP: fail})


def test_a_failing_recording_leaves_no_hooks_behind() -> None:
    model = tiny_model("llama")
    row = model.encode(Prompt(text="What?"))
    broken = row.replaced(torch.full_like(row.ids, 10_000))
    with pytest.raises(IndexError):
        record(model, [broken], [0], components=tuple(Component), key_layers=(1,))
    assert not any(m._forward_hooks or m._forward_pre_hooks for layer in model.layers for m in layer.modules())


def test_states_are_recorded_under_an_applied_delta_as_the_edited_model_computes_them(model: EditableModel) -> None:
    rows = rows_of(model)
    starts = starts_of(rows)
    with applied(model, random_delta(model, {0: 2, 2: 1})):
        recordings = record(model, rows, starts)
        found = climbed(model, recordings, starts, 0)
        for row, start, logits in zip(rows, starts, found, strict=True):
            close(logits, oracle.logits(model, row)[start:])
    assert not torch.allclose(found[0][-1], oracle.logits(model, rows[0])[-1])


def test_two_images_and_their_text_are_continued_like_the_full_model(llava: EditableModel) -> None:
    row = llava.encode(Prompt(text="Is <image> or <image> this?", images=(picture(1), picture(2))), "Rome")
    for start in (2, row.images[0].start + 3, row.images[1].stop):
        found = climbed(llava, record(llava, [row], [start]), [start], 0)[0]
        close(found, oracle.logits(llava, row)[start:])
