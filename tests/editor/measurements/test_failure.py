"""Failure prediction against counting pairs, the full model's probabilities and its contributions (methods.md §3)."""

import dataclasses
from itertools import product

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import picture, question, said
from torch import Tensor

from errata.editor.atlas.hard import DISTORTIONS, hard_questions
from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.errors import CancelledError, InvalidInputError, LayerError
from errata.editor.measurements.attention import AttentionSettings, measure_attention
from errata.editor.measurements.failure import (
    FailureResult,
    FailureSettings,
    Predictor,
    measure_failure,
)
from errata.editor.measurements.questions import Question
from errata.editor.measurements.roc import auroc
from errata.editor.model import Answer, EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt

NEVER = "something it never says"
SHORT = FailureSettings(max_new_tokens=3, batch_size=3)
"""An untrained model babbles on, image tokens included."""


def asked(model: EditableModel, n: int = 4) -> list[Question]:
    """Questions that an untrained model answers somehow: every second by what is asked for."""
    constraint = (Constraint(text="this country"),)
    texts = ("What is the capital of this country?", "The capital of this country is", "Where is this country?")
    prompts = [question(model, texts[i % 3], seed=4 + i) for i in range(n)]
    told = model.generate(prompts, max_new_tokens=SHORT.max_new_tokens)
    return [
        Question(prompt=p, constraints=constraint, answer=NEVER if i % 2 else a.text)
        for i, (p, a) in enumerate(zip(prompts, told, strict=True))
    ]


def generated(model: EditableModel, row: Encoded, answer: Answer) -> Encoded:
    ends = [model.tokenizer.eos_token_id] if answer.finished else []
    return dataclasses.replace(row, ids=torch.cat([row.ids, torch.tensor([*answer.tokens, *ends])]))


def log_probabilities(model: EditableModel, asked: Question) -> Tensor:
    """Log p of each token that the model generated, its end included, by the full model."""
    row = model.encode(asked.prompt)
    return oracle.answer_log_probabilities(
        model, generated(model, row, model.generate([asked.prompt], max_new_tokens=3)[0])
    )


def result(right: list[bool], contribution: list[float], confidence: list[float], **settings: int) -> FailureResult:
    n = len(right)
    return FailureResult(
        settings=FailureSettings(**settings),  # type: ignore[arg-type]
        window=range(1, 2),
        questions=tuple(f"question {i}" for i in range(n)),
        expected=("right",) * n,
        answers=tuple("right" if r else "wrong" for r in right),
        right=np.array(right),
        contributions=np.array([[0.0, c, 9.0] for c in contribution]),
        confidence=np.array(confidence),
        first=np.array(confidence),
        skipped=(),
    )


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2).filter(lambda x: len({r for _, r in x}) == 2))
def test_auroc_is_the_share_of_pairs_in_the_right_order(scored: list[tuple[int, bool]]) -> None:
    wrong, right = ([s for s, r in scored if r is kind] for kind in (False, True))
    points = [1.0 if a < b else 0.5 if a == b else 0.0 for a, b in product(wrong, right)]
    (found,) = auroc(np.array([s for s, _ in scored], float), np.array([r for _, r in scored]))
    assert found == pytest.approx(sum(points) / len(points))


def test_scores_are_the_full_models_contributions_and_probabilities(model: EditableModel) -> None:
    questions = asked(model)
    found = measure_failure(model, questions, SHORT)
    assert found.right.tolist() == [True, False, True, False]
    flow = "constraint->last"
    plain = [dataclasses.replace(q, answer=said(model, q.prompt)) for q in questions]
    carried = measure_attention(model, plain, AttentionSettings(flows=(flow,))).layers(flow)
    np.testing.assert_allclose(found.contributions, carried, rtol=1e-5)
    np.testing.assert_allclose(found.scores(Predictor.CONTRIBUTION), carried[:, 1:3].mean(1), rtol=1e-5)
    for i, q in enumerate(questions):
        expected = log_probabilities(model, q)
        assert found.scores(Predictor.CONFIDENCE)[i] == pytest.approx(float(expected.sum().exp()), rel=1e-5)
        assert found.scores(Predictor.FIRST)[i] == pytest.approx(float(expected[0].exp()), rel=1e-5)


def test_an_answer_with_an_image_token_has_no_probability_and_is_listed(llava: EditableModel) -> None:
    questions = asked(llava, 12)
    told = llava.generate([q.prompt for q in questions])
    babbled = [i for i, a in enumerate(told) if 3 in a.tokens]
    assert babbled
    known = [
        dataclasses.replace(q, answer=a.text if i % 2 else NEVER)
        for i, (q, a) in enumerate(zip(questions, told, strict=True))
    ]
    found = measure_failure(llava, known)
    assert len(found.questions) == 12 - len(babbled)
    assert [s.split(":")[0] for s in found.skipped] == [f"questions[{i}]" for i in babbled]
    assert "image token" in found.skipped[0]


def test_abstentions_are_left_out_and_listed(gpt2: EditableModel) -> None:
    questions = asked(gpt2, 6)
    told = [a.text for a in gpt2.generate([q.prompt for q in questions], max_new_tokens=3)]
    same = [i for i, text in enumerate(told) if text == told[1]]
    found = measure_failure(gpt2, questions, dataclasses.replace(SHORT, abstentions=(told[1].upper(),)))
    assert len(found.questions) == 6 - len(same)
    assert found.skipped == found.findings().skipped
    assert found.skipped == tuple(f"questions[{i}]: {told[1]!r} is no failure to foresee" for i in same)


def test_answers_that_are_all_right_or_all_wrong_are_refused(gpt2: EditableModel) -> None:
    questions = asked(gpt2)
    with pytest.raises(InvalidInputError, match=r"all 2 answers are right.*harder"):
        measure_failure(gpt2, questions[::2], SHORT)
    with pytest.raises(InvalidInputError, match=r"all 2 answers are wrong.*easier"):
        measure_failure(gpt2, questions[1::2], SHORT)
    said = tuple(a.text for a in gpt2.generate([q.prompt for q in questions], max_new_tokens=3))
    with pytest.raises(InvalidInputError, match=r"all 0 answers.*4 were left out, the first"):
        measure_failure(gpt2, questions, dataclasses.replace(SHORT, abstentions=said))


def test_another_flow_can_be_the_predictor(llava: EditableModel, gpt2: EditableModel) -> None:
    settings = dataclasses.replace(SHORT, flow="image->constraint")
    questions = asked(llava)
    plain = [dataclasses.replace(q, answer=said(llava, q.prompt)) for q in questions]
    carried = measure_attention(llava, plain, AttentionSettings(flows=(settings.flow,))).layers(settings.flow)
    np.testing.assert_allclose(measure_failure(llava, questions, settings).contributions, carried, rtol=1e-5)
    with pytest.raises(InvalidInputError, match="no tokens of the flow image → constraint") as error:
        measure_failure(gpt2, asked(gpt2), settings)
    assert error.value.field == "questions[0].prompt"
    with pytest.raises(InvalidInputError) as error:
        FailureSettings(flow="picture->last")
    assert error.value.field == "flow"


def test_a_question_without_an_answer_or_its_constraint_is_named(gpt2: EditableModel) -> None:
    questions = asked(gpt2)
    with pytest.raises(InvalidInputError) as error:
        measure_failure(gpt2, [questions[0], dataclasses.replace(questions[1], answer=None)])
    assert error.value.field == "questions[1].answer"
    absent = dataclasses.replace(questions[1], constraints=(Constraint(text="that country"),))
    with pytest.raises(InvalidInputError) as error:
        measure_failure(gpt2, [questions[0], absent], SHORT)
    assert error.value.field == "questions[1].constraint.text"
    with pytest.raises(InvalidInputError, match="no question given"):
        measure_failure(gpt2, [])


def test_a_text_that_runs_on_after_the_answer_is_right(gpt2: EditableModel) -> None:
    first, second = asked(gpt2)[:2]
    prompt = Prompt(text="Rome is in this country", chat=False)
    told = gpt2.generate([prompt], max_new_tokens=3)[0].text
    assert len(told) > 1
    runs_on = Question(prompt=prompt, constraints=first.constraints, answer=told[0])
    assert measure_failure(gpt2, [runs_on, second], SHORT).right.tolist() == [True, False]


def test_the_window_is_the_middle_third_unless_said(gpt2: EditableModel) -> None:
    assert FailureSettings().window(gpt2) == range(1, 3)
    assert FailureSettings(first_layer=0, last_layer=0).window(gpt2) == range(1)
    with pytest.raises(LayerError):
        FailureSettings(last_layer=4).window(gpt2)
    with pytest.raises(InvalidInputError, match="layers 3 to 2 are none"):
        FailureSettings(first_layer=3).window(gpt2)


@pytest.mark.parametrize("field", ["max_new_tokens", "batch_size", "draws"])
def test_senseless_settings_are_refused(field: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        FailureSettings(**{field: 0})
    assert error.value.field == field


def test_progress_is_told_and_a_cancelled_measurement_stops(gpt2: EditableModel) -> None:
    steps: list[tuple[int, int]] = []
    questions = asked(gpt2)
    measure_failure(gpt2, questions, SHORT, progress=lambda done, of: steps.append((done, of)))
    assert steps[-1] == (4, 4)
    with pytest.raises(CancelledError):
        measure_failure(gpt2, questions, SHORT, cancelled=lambda: True)


def test_a_predictor_that_separates_has_a_square_curve_and_one_of_equal_scores_a_diagonal() -> None:
    found = result([True] * 6 + [False] * 4, [5.0] * 6 + [1.0] * 4, [0.3] * 10).findings()
    numbers = {n.name: n for n in found.numbers}
    contribution = numbers[f"AUROC: {Predictor.CONTRIBUTION}"]
    assert (contribution.value, contribution.low, contribution.high) == (1, 1, 1)
    assert numbers[f"AUROC: {Predictor.CONFIDENCE}"].value == 0.5
    assert numbers["AUROC: confidence minus contribution"].value == -0.5
    assert numbers["wrong answers"].value == pytest.approx(0.4)
    square, diagonal = found.plots[0].lines[:2]  # type: ignore[union-attr]
    np.testing.assert_allclose(square.values, 1)
    np.testing.assert_allclose(diagonal.values, np.linspace(0, 1, 101))


def test_the_curve_holds_as_much_area_as_the_auroc_says() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(400) < 0.6
    scores = np.round(rng.normal(right, 1.5), 1)
    found = result(right.tolist(), scores.tolist(), scores.tolist())
    curve = found.findings().plots[0].lines[0]  # type: ignore[union-attr]
    area = float(np.trapezoid(curve.values, np.linspace(0, 1, 101)))
    assert area == pytest.approx(found.auroc(Predictor.CONTRIBUTION), abs=0.005)


def test_intervals_come_from_the_seed_and_narrow_with_more_questions() -> None:
    def bounds(n: int, seed: int) -> tuple[float, float]:
        rng = np.random.default_rng(1)
        right = np.arange(n) % 2 == 0
        scores = rng.normal(right, 1).tolist()
        number = result(right.tolist(), scores, scores, seed=seed).findings().numbers[0]
        assert number.low is not None
        assert number.high is not None
        assert number.low < number.value < number.high
        return number.low, number.high

    assert bounds(40, 0) == bounds(40, 0)
    assert bounds(40, 0) != bounds(40, 1)
    assert np.diff(bounds(400, 0)) < np.diff(bounds(40, 0))


def test_findings_list_the_surest_wrong_answers_and_compare_layers() -> None:
    found = result([True, True, False, False], [4.0, 3.0, 3.5, 1.0], [0.9, 0.8, 0.7, 0.95]).findings()
    assert [row[0] for row in found.tables[0].rows] == ["question 3", "question 2"]
    by_answer = found.plots[1]
    assert [line.label for line in by_answer.lines] == ["right answers", "wrong answers"]  # type: ignore[union-attr]
    np.testing.assert_allclose(by_answer.lines[0].values, [0, 3.5, 9])  # type: ignore[union-attr]
    by_layer = found.plots[2].lines[0]  # type: ignore[union-attr]
    np.testing.assert_allclose(by_layer.values, [0.5, 0.75, 0.5])
    assert found.settings["first_layer"] == found.settings["last_layer"] == "1"


@pytest.mark.parametrize("name", DISTORTIONS)
def test_a_distortion_grows_from_nothing(name: str) -> None:
    image = picture(3).resize((96, 96))
    changed = []
    for severity in (0.0, 0.5, 1.0):
        bad = DISTORTIONS[name](image, severity, np.random.default_rng(0))
        assert (bad.size, bad.mode) == (image.size, "RGB")
        changed.append(float(np.abs(np.asarray(bad, float) - np.asarray(image, float)).mean()))
    assert changed[0] == 0
    assert min(changed[1:]) > 1


def test_hard_questions_are_seeded_and_know_their_answers() -> None:
    first, again, other = hard_questions(8), hard_questions(8), hard_questions(8, seed=1)
    assert first == again
    assert first != other
    for q in first:
        assert q.answer
        assert q.constraints[0].span(q.prompt.text)


@pytest.mark.slow
def test_atlas_is_less_sure_of_its_wrong_facts() -> None:
    """Basu et al. 2024, §5: confidence predicts failure, and better than contributions do."""
    found = measure_failure(load_model(ATLAS), hard_questions(160), FailureSettings(abstentions=("unknown",)))
    assert (~found.right).sum() >= 5
    assert found.auroc(Predictor.CONFIDENCE) > 0.6
    assert found.auroc(Predictor.CONFIDENCE) > found.auroc(Predictor.CONTRIBUTION)
