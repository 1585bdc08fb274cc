"""The logit lens against hooks on the full model (methods.md §4; Zhang et al. 2025)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from tiny import question, said

from errata.editor.atlas.facts import trace_requests
from errata.editor.checkpoints import load_model
from errata.editor.errors import CancelledError, InvalidInputError
from errata.editor.measurements.findings import LinePlot
from errata.editor.measurements.lens import LensResult, LensSettings, measure_lens
from errata.editor.measurements.questions import Question
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint

NORM = {
    "LlavaForConditionalGeneration": "model.language_model.norm",
    "LlamaForCausalLM": "model.norm",
    "GPT2LMHeadModel": "transformer.ln_f",
}
TEXTS = ("What is this country's capital called?", "Where is this country?", "What is this country's capital called?")


def asked(model: EditableModel) -> list[Question]:
    return [
        Question(prompt=prompt, constraints=(Constraint(text="this country"),), answer=said(model, prompt))
        for prompt in (question(model, text, seed) for seed, text in enumerate(TEXTS))
    ]


def lens(model: EditableModel, one: Question) -> torch.Tensor:
    """The probability of every token at every layer's last position, layers × vocabulary."""
    states = oracle.outputs(model, model.encode(one.prompt), ["layer"])
    norm = model.model.get_submodule(NORM[type(model.model).__name__])
    with torch.no_grad():
        last = torch.stack([states["layer", i][-1] for i in range(len(model.layers))])
        return model.model.lm_head(norm(last)).double().softmax(-1)


def test_every_layers_last_position_is_read_as_hooks_read_it(model: EditableModel) -> None:
    found = measure_lens(model, asked(model))
    assert not found.skipped
    for q, one in enumerate(asked(model)):
        expected = lens(model, one)
        first = int(model.encode(one.prompt, found.answers[q]).answer[0])
        np.testing.assert_allclose(found.answer[q], expected[:, first], rtol=1e-5)
        np.testing.assert_allclose(found.top[q], expected.max(-1).values, rtol=1e-5)
        assert found.first[q].tolist() == (expected.argmax(-1) == first).tolist()
        assert list(found.tokens[q]) == [model.tokenizer.decode([i]) for i in expected.argmax(-1).tolist()]


def test_the_last_layer_says_what_the_model_says(model: EditableModel) -> None:
    found = measure_lens(model, asked(model))
    for q, one in enumerate(asked(model)):
        p = oracle.logits(model, model.encode(one.prompt))[-1].double().softmax(-1)
        first = int(model.encode(one.prompt, found.answers[q]).answer[0])
        assert found.answer[q, -1] == pytest.approx(float(p[first]), rel=1e-5)
        assert found.top[q, -1] == pytest.approx(float(p.max()), rel=1e-5)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_row_limit_changes_no_number(model: EditableModel, limit: int) -> None:
    told: list[tuple[int, int]] = []
    cut = measure_lens(model, asked(model), LensSettings(max_rows=limit), progress=lambda *steps: told.append(steps))
    whole = measure_lens(model, asked(model))
    np.testing.assert_allclose(cut.answer, whole.answer, rtol=1e-5)
    assert cut.tokens == whole.tokens
    assert told[-1] == (3, 3)


def test_questions_that_are_answered_otherwise_are_listed_and_without_any_other_it_is_refused(
    model: EditableModel,
) -> None:
    wrong = replace(asked(model)[0], answer="surely not")
    found = measure_lens(model, [wrong, asked(model)[1]])
    assert len(found.questions) == 1
    assert found.skipped[0].startswith("questions[0]: ")
    with pytest.raises(InvalidInputError, match=r"no question is left to measure.*not 'surely not'"):
        measure_lens(model, [wrong])
    with pytest.raises(InvalidInputError, match="no question given"):
        measure_lens(model, [])


def test_settings_that_mean_nothing_are_refused_and_cancelling_stops(model: EditableModel) -> None:
    with pytest.raises(InvalidInputError, match="max_rows: "):
        LensSettings(max_rows=0)
    with pytest.raises(CancelledError):
        measure_lens(model, asked(model), cancelled=lambda: True)


def result(answer: Sequence[Sequence[float]], first: Sequence[Sequence[bool]]) -> LensResult:
    n = len(answer)
    return LensResult(
        questions=("?",) * n,
        answers=("!",) * n,
        answer=np.array(answer),
        top=np.array(answer),
        first=np.array(first),
        tokens=(("a", "b", "c"),) * n,
        settings=LensSettings(),
        skipped=(),
    )


@pytest.mark.parametrize(
    ("first", "layer"),
    [
        ([[False, False, True]] * 3, 2),
        ([[True, True, True]] * 3, 0),
        ([[False, False, False]] * 3, 3),
        ([[True, False, True]] * 3, 2),
        ([[False, True, True], [False, True, True], [False, False, True]], 1),
    ],
)
def test_the_layer_from_which_the_answer_leads_is_of_half_of_the_questions(first: list[list[bool]], layer: int) -> None:
    findings = result([[0.1, 0.2, 0.9]] * 3, first).findings()
    (number,) = findings.numbers
    assert (number.value, number.n, number.unit) == (layer, 3, "layer")
    assert number.low is not None
    assert number.high is not None
    assert number.low <= layer <= number.high


def test_the_findings_are_means_between_their_bounds_and_the_tokens_that_lead() -> None:
    findings = result([[0.0, 0.5], [0.1, 0.9]], [[False, True], [False, True]]).findings()
    probability, leads = findings.plots
    assert isinstance(probability, LinePlot)
    assert isinstance(leads, LinePlot)
    line = probability.lines[0]
    np.testing.assert_allclose(line.values, [0.05, 0.7])
    np.testing.assert_allclose(line.low, [0, 0.5])
    np.testing.assert_allclose(line.high, [0.1, 0.9])
    np.testing.assert_allclose(leads.lines[0].values, [0, 100])
    assert findings.tables[0].rows[0] == ("0", "'a' (100 %)")


@pytest.mark.slow
def test_atlas_says_the_answer_at_the_last_position_in_its_upper_layers() -> None:
    questions = [
        Question(prompt=r.prompt, constraints=(r.constraint,), answer=r.answer) for r in trace_requests(24, seed=3)
    ]
    found = measure_lens(load_model("atlas"), questions)
    answer = found.answer.mean(0)
    # Before the constraint is heard of there, the position knows what kind of answer is asked for, and little more.
    assert answer[:2].max() < 0.3
    assert answer[-1] > 0.9
    assert (np.diff(answer[1:]) > 0).all()
    assert found.first[:, -1].all()
