"""What MLPs promote at the constraint, against plain hooks and dense weights (methods.md §5; Geva et al. 2022, §3)."""

import math

import numpy as np
import oracle
import pytest
import torch
from tiny import context, picture, question, random_delta, tiny_model
from torch import Tensor

from errata.editor.delta import Delta, LowRank, merged
from errata.editor.errors import CancelledError, ConstraintNotFoundError, InvalidInputError, LayerError, WrongBaseError
from errata.editor.measurements.promoted import Promoted
from errata.editor.measurements.questions import Question
from errata.editor.measurements.readout import ReadoutSettings, measure_readout
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt

TEXTS = ("What is the capital of this country?", "Where is this country in Rome?")
SETTINGS = ReadoutSettings(neurons=6, tokens=7)


def questions(model: EditableModel, answer: str | None = "Rome") -> list[Question]:
    return [
        Question(prompt=question(model, text, n), constraints=(Constraint(text="this country"),), answer=answer)
        for n, text in enumerate(TEXTS)
    ]


def weight(model: EditableModel, layer: int) -> Tensor:
    """W, d × m. GPT-2's Conv1D holds it transposed."""
    held = oracle.down(model, layer).weight.detach().double()
    return held.T if "gpt2" in model.name else held


def at_constraint(model: EditableModel, index: int, layer: int) -> tuple[Tensor, Tensor]:
    """Key and MLP output at the constraint's last token, by hooks on the full model."""
    row, site = model.encode_at(context(model, TEXTS[index], seed=index), field="context")
    key = oracle.keys(model, row, layer)[site].double()
    return key, oracle.outputs(model, row, ["mlp"])["mlp", layer][site].double()


def head(model: EditableModel) -> Tensor:
    return model.model.lm_head.weight.detach().double()


def assert_promoted(model: EditableModel, found: Promoted | None, vector: Tensor) -> None:
    logits = head(model) @ vector
    order = logits.argsort(descending=True)[: len(found.tokens)]
    assert found.logits == pytest.approx(logits[order].tolist(), abs=1e-5, rel=1e-5)
    assert found.tokens == tuple(model.tokenizer.decode([t]) for t in order.tolist())


def rank(model: EditableModel, vector: Tensor, token: int) -> int:
    logits = head(model) @ vector
    return logits.argsort(descending=True).tolist().index(token) + 1


def test_outputs_and_ranks_are_those_of_plain_hooks_and_merged_weights(model: EditableModel) -> None:
    """The outputs and the change (§5); the later edited layer sees the earlier one's edit."""
    delta = random_delta(model, {1: 2, 2: 1})
    found = measure_readout(model, questions(model), SETTINGS, delta=delta)
    assert (found.layers, found.edited) == ((1, 2), (1, 2))
    for i, fact in enumerate(found.facts):
        token = int(model.encode(question(model, TEXTS[i], i), "Rome").answer[0])
        for n, layer in enumerate((1, 2)):
            _, before = at_constraint(model, i, layer)
            with merged(model, delta):
                key, after = at_constraint(model, i, layer)
            written = delta.layers[layer].dense() @ key
            read = fact.layers[n]
            for promoted, vector in ((read.before, before), (read.written, written), (read.after, after)):
                assert_promoted(model, promoted, vector)
            assert found.ranks[i, n].tolist() == [rank(model, v, token) for v in (before, written, after)]
            share = written.norm() / (weight(model, layer) @ key).norm()
            assert found.shares[i, n] == pytest.approx(float(share), rel=1e-5)


def test_key_neurons_are_those_that_add_most_to_the_output(model: EditableModel) -> None:
    """|kᵢ|·‖W[:, i]‖, and kᵢ·W[:, i] in the vocabulary: a negative key turns its column round."""
    delta = random_delta(model, {1: 2})
    found = measure_readout(model, questions(model), SETTINGS, delta=delta)
    w, changed = weight(model, 1), weight(model, 1) + delta.layers[1].dense()
    signs = set()
    for i, fact in enumerate(found.facts):
        key, _ = at_constraint(model, i, 1)
        order = (key[None] * w).norm(dim=0).argsort(descending=True)[:6]
        assert [u.index for u in fact.layers[0].neurons] == order.tolist()
        for u in fact.layers[0].neurons:
            assert (u.key, u.key_after) == pytest.approx((float(key[u.index]),) * 2, rel=1e-5)
            assert u.norm == pytest.approx(float(w[:, u.index].norm()), rel=1e-5)
            assert_promoted(model, u.before, key[u.index] * w[:, u.index])
            assert_promoted(model, u.after, key[u.index] * changed[:, u.index])
            signs.add(u.key > 0)
    assert signs == {True, False} or "gpt2" in model.name  # GELU hardly goes below 0


def test_a_change_that_writes_a_tokens_own_direction_is_read_as_that_token(model: EditableModel) -> None:
    asked = questions(model)[:1]
    token = int(model.encode(asked[0].prompt, "Rome").answer[0])
    key, _ = at_constraint(model, 0, 1)
    direction = torch.linalg.pinv(head(model))[:, token]
    low = LowRank(a=(key / key.dot(key))[None].float(), b=(direction * 100)[:, None].float())
    delta = Delta(base_sha256=model.base_sha256, layers={1: low}, modules={1: model.down_projection_name(1)})
    found = measure_readout(model, asked, SETTINGS, delta=delta)
    assert found.ranks[0, 0, 0] > 1
    assert found.ranks[0, 0, 1] == 1
    assert found.facts[0].layers[0].written.tokens[0] == model.tokenizer.decode([token])


def test_without_an_edit_every_layer_is_read_once(model: EditableModel) -> None:
    found = measure_readout(model, questions(model), ReadoutSettings(neurons=2, tokens=3))
    assert (found.layers, found.edited) == ((0, 1, 2, 3), ())
    assert all(r.before == r.after and r.written is None for f in found.facts for r in f.layers)
    np.testing.assert_array_equal(found.ranks[:, :, 0], found.ranks[:, :, 2])
    assert np.isnan(found.ranks[:, :, 1]).all()
    told = found.findings()
    assert len(told.numbers) == 4
    assert [g.label for g in told.plots[0].grids] == ["output before"]
    assert all(row[-2:] == ("–", "–") for row in next(t for t in told.tables if t.name == "outputs").rows)


def test_a_layer_that_is_read_but_not_edited_has_no_written_change(llama: EditableModel) -> None:
    """Above the edit its key and output change, below they do not."""
    settings = ReadoutSettings(layers=(0, 1, 3))
    found = measure_readout(llama, questions(llama), settings, delta=random_delta(llama, {1: 1}))
    assert np.isnan(found.ranks[:, [0, 2], 1]).all()
    assert found.shares[:, [0, 2]].tolist() == [[0, 0]] * 2
    for fact in found.facts:
        below, _, above = fact.layers
        assert below.before.logits == pytest.approx(below.after.logits)
        assert above.before.logits != pytest.approx(above.after.logits)
        assert above.neurons[0].key != pytest.approx(above.neurons[0].key_after)


def test_without_an_answer_the_target_is_what_the_edited_model_says(llama: EditableModel) -> None:
    delta = random_delta(llama, {1: 3})
    found = measure_readout(llama, questions(llama, None), delta=delta)
    with merged(llama, delta):
        told = [a.text for a in llama.generate([q.prompt for q in questions(llama)])]
    assert [f.target for f in found.facts] == told == [f.said_after for f in found.facts]
    assert told != [f.said_before for f in found.facts]


def test_findings_tell_ranks_and_tokens_in_readable_words(model: EditableModel) -> None:
    found = measure_readout(model, questions(model), SETTINGS, delta=random_delta(model, {1: 2}))
    told = found.findings()
    assert (told.kind, told.n, told.settings["edited layers"]) == ("readout", 2, "1")
    numbers = {n.name: n for n in told.numbers}
    middle = numbers["rank of the target in the written change at layer 1, geometric mean"]
    assert middle.value == pytest.approx(math.prod(found.ranks[:, 0, 1]) ** 0.5)
    assert middle.low <= middle.value <= middle.high
    assert numbers["norm of the written change over the norm of W k at layer 1, mean"].value == pytest.approx(
        found.shares.mean()
    )
    tables = {t.name: t for t in told.tables}
    assert {n: len(t.rows) for n, t in tables.items()} == {"facts": 2, "outputs": 2, "neurons": 12}
    assert all(len(row) == len(t.columns) for t in told.tables for row in t.rows)
    assert all(cell.isprintable() for t in told.tables for row in t.rows for cell in row)
    assert [g.values.shape for g in told.plots[0].grids] == [(2, 1)] * 3


def test_line_breaks_and_spaces_among_tokens_are_made_visible(llama: EditableModel) -> None:
    """Every token of the vocabulary is listed: the alphabet of bytes has control characters."""
    found = measure_readout(llama, questions(llama), ReadoutSettings(layers=(0,), neurons=0, tokens=10**6))
    assert len(found.facts[0].layers[0].before.tokens) == found.vocabulary == len(head(llama))
    (row, _) = next(t for t in found.findings().tables if t.name == "outputs").rows
    assert "↵" in row[3]
    assert "␣" in row[3]
    assert row[3].isprintable()


def test_a_question_that_is_answered_with_nothing_is_listed_not_read() -> None:
    model = tiny_model("llama")
    out = model.model.get_output_embeddings()
    out.bias = torch.nn.Parameter(torch.zeros(out.out_features), requires_grad=False)
    out.bias[model.end_token_id] = 1e4
    one, other = questions(model)[0], questions(model, None)[1]
    found = measure_readout(model, [one, other])
    assert len(found.facts) == 1
    assert found.skipped == (f"questions[1]: {TEXTS[1]!r} is answered with nothing; give its target",)
    with pytest.raises(InvalidInputError, match="nothing is left to read"):
        measure_readout(model, [other])


def test_bad_input_is_refused_with_its_place(llama: EditableModel) -> None:
    with pytest.raises(InvalidInputError, match="no question given"):
        measure_readout(llama, [])
    with pytest.raises(LayerError) as caught:
        measure_readout(llama, questions(llama), ReadoutSettings(layers=(4,)))
    assert caught.value.field == "layers"
    lost = Question(prompt=Prompt(text="Where?"), constraints=(Constraint(text="this country"),))
    with pytest.raises(ConstraintNotFoundError) as caught:
        measure_readout(llama, [*questions(llama), lost])
    assert caught.value.field.startswith("questions[2].")
    with pytest.raises(WrongBaseError):
        measure_readout(llama, questions(llama), delta=random_delta(tiny_model("llama", seed=1), {1: 1}))


@pytest.mark.parametrize(
    ("field", "value"), [("neurons", -1), ("tokens", 0), ("max_new_tokens", 0), ("layers", (2, 1))]
)
def test_settings_that_mean_nothing_are_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ReadoutSettings(**{field: value})
    assert caught.value.field.endswith(field)


def test_a_cancelled_readout_stops_and_progress_is_told(llama: EditableModel) -> None:
    told: list[tuple[int, int]] = []
    measure_readout(llama, questions(llama), progress=lambda *t: told.append(t))
    assert told == [(1, 2), (2, 2)]
    with pytest.raises(CancelledError):
        measure_readout(llama, questions(llama), cancelled=lambda: True)


def test_a_picture_is_part_of_what_is_read(llava: EditableModel) -> None:
    asked = questions(llava)[:1]
    other = Question(
        prompt=Prompt(text=TEXTS[0], images=(picture(9),)), constraints=asked[0].constraints, answer="Rome"
    )
    found = measure_readout(llava, [*asked, other], ReadoutSettings(layers=(2,)))
    assert found.facts[0].layers[0].before.logits != found.facts[1].layers[0].before.logits
