"""What is measured, and the bad input that every measurement refuses alike."""

from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from tiny import picture, question, said, tiny_model

from errata.editor.datasets.records import Kind
from errata.editor.errors import InvalidInputError, PromptError
from errata.editor.measurements.attention import AttentionSettings, measure_attention
from errata.editor.measurements.constraints import ConstraintSettings, Series, measure_constraints
from errata.editor.measurements.failure import FailureSettings, measure_failure
from errata.editor.measurements.findings import Findings
from errata.editor.measurements.knockout import KnockoutSettings, measure_knockout
from errata.editor.measurements.lens import LensSettings, measure_lens
from errata.editor.measurements.noise import NoiseSettings, measure_noise
from errata.editor.measurements.questions import Box, Question, answered
from errata.editor.measurements.readout import ReadoutSettings, measure_readout
from errata.editor.measurements.swept import SweepSettings
from errata.editor.measurements.windows import WindowSettings, measure_windows
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.states import Component
from errata.editor.trace import Substitution

THIS = (Constraint(text="this country"),)
ANY = -1.0
"""Every question of an untrained model counts."""

SETTINGS = (
    AttentionSettings, ConstraintSettings, FailureSettings, KnockoutSettings, LensSettings, NoiseSettings,
    ReadoutSettings, SweepSettings, WindowSettings,
)  # fmt: skip
NUMBERS = [(s, f.name, f.type) for s in SETTINGS for f in fields(s) if f.type in (int, float, int | None, float | None)]

Measured = Callable[[EditableModel, list[Question]], Findings]
ONE_ROW: dict[str, Measured] = {
    "attention": lambda m, q: measure_attention(m, q, AttentionSettings(batch_size=1)).findings(),
    "constraints": lambda m, q: measure_constraints(
        m, q, ConstraintSettings(max_rows=1, min_total_effect=ANY)
    ).findings(),
    "failure": lambda m, q: measure_failure(m, q, FailureSettings(draws=20, batch_size=1)).findings(),
    "windows": lambda m, q: measure_windows(
        m, q, WindowSettings(windows=(1,), max_rows=1, min_total_effect=ANY)
    ).findings(),
}
"""Those whose row limit no test of their own tries."""

MEASURES: dict[str, Measured] = {
    "attention": lambda m, q: measure_attention(m, q).findings(),
    "constraints": lambda m, q: measure_constraints(m, q, ConstraintSettings(min_total_effect=ANY)).findings(),
    "failure": lambda m, q: measure_failure(m, q, FailureSettings(draws=20)).findings(),
    "knockout": lambda m, q: measure_knockout(m, q).findings(),
    "lens": lambda m, q: measure_lens(m, q).findings(),
    "noise": lambda m, q: measure_noise(m, q, NoiseSettings(draws=2, min_total_effect=ANY)).findings(),
    "readout": lambda m, q: measure_readout(m, q).findings(),
    "windows": lambda m, q: measure_windows(m, q, WindowSettings(windows=(1,), min_total_effect=ANY)).findings(),
}


def asked(model: EditableModel, text: str = "What is the capital of this country?") -> Question:
    prompt = question(model, text)
    return Question(
        prompt=prompt, constraints=THIS, corruptions=(Substitution(word="Paris"),), answer=said(model, prompt)
    )


@pytest.mark.parametrize("box", [(-0.1, 0, 1, 1), (0, 0, 1.1, 1), (0.5, 0, 0.5, 1), (0, float("nan"), 1, 1)])
def test_a_box_outside_the_image_or_of_nothing_is_refused(box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = box
    with pytest.raises(InvalidInputError, match="does not lie in the image"):
        Box(left=left, top=top, right=right, bottom=bottom)


@pytest.mark.parametrize(("settings", "name", "kind"), NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "3"])
def test_a_setting_that_is_no_number_is_refused_by_name(
    settings: Callable[..., object], name: str, kind: object, value: object
) -> None:
    with pytest.raises(InvalidInputError, match=name) as caught:
        settings(**{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize(("settings", "name"), [(s, name) for s, name, kind in NUMBERS if kind in (int, int | None)])
def test_a_setting_that_counts_takes_no_fraction(settings: Callable[..., object], name: str) -> None:
    with pytest.raises(InvalidInputError, match="give a whole number"):
        settings(**{name: 2.5})


@pytest.mark.parametrize("settings", [ConstraintSettings, NoiseSettings, WindowSettings])
def test_components_are_given_once_each_and_at_least_one(settings: Callable[..., object]) -> None:
    for components in ((), (Component.MLP, Component.MLP)):
        with pytest.raises(InvalidInputError, match="none twice"):
            settings(components=components)


@pytest.mark.parametrize("texts", [("this country", "country?"), ("this country", "country"), ("this country",) * 2])
def test_constraints_that_overlap_are_refused_and_neighbours_are_not(texts: tuple[str, str]) -> None:
    prompt = Prompt(text="What is the capital of this country?")
    Question(prompt=prompt, constraints=(Constraint(text="capital of "), *THIS))
    with pytest.raises(InvalidInputError, match=r"constraints\[1\]: it overlaps constraints\[0\]"):
        Question(prompt=prompt, constraints=tuple(Constraint(text=t) for t in texts))


def test_a_constraint_is_visual_where_it_is_said_to_be_and_else_the_first_of_a_picture(llava: EditableModel) -> None:
    two = Question(prompt=question(llava), constraints=(Constraint(text="capital"), *THIS))
    assert [two.kind(i) for i in range(2)] == [Kind.VISUAL, Kind.TEXTUAL]
    assert [replace(two, prompt=Prompt(text=two.prompt.text)).kind(i) for i in range(2)] == [Kind.TEXTUAL] * 2
    assert [replace(two, kinds=(Kind.TEXTUAL,) * 2).kind(i) for i in range(2)] == [Kind.TEXTUAL] * 2
    with pytest.raises(InvalidInputError, match=r"1 kind\(s\) for 2"):
        replace(two, kinds=(Kind.TEXTUAL,))
    one = replace(asked(llava), kinds=(Kind.TEXTUAL,))
    found = measure_constraints(llava, [one], ConstraintSettings(components=(Component.MLP,), min_total_effect=ANY))
    assert found.series == (Series.SINGLE_TEXTUAL,)


def test_an_answer_that_goes_on_has_no_end_to_measure_and_is_listed(llava: EditableModel) -> None:
    prompts = [question(llava, seed=seed) for seed in range(8)]
    told = llava.generate(prompts)
    prompt, text = next((p, a.text) for p, a in zip(prompts, told, strict=True) if not a.finished)
    given = Question(prompt=prompt, constraints=THIS, answer=text)
    kept, skipped = answered(llava, [replace(given, answer=None), given])
    assert [i for i, _, _ in kept] == [1]
    assert "which goes on" in skipped[0]
    # A text that the answer completes has no end either way.
    raw = replace(given, answer=None, prompt=replace(given.prompt, chat=False))
    assert answered(llava, [raw])[1] == []


@pytest.mark.parametrize("kind", sorted(MEASURES))
def test_questions_that_cannot_be_asked_are_named_by_every_measurement(llama: EditableModel, kind: str) -> None:
    given = asked(llama)
    long = replace(
        given, prompt=Prompt(text="this country " * 400), constraints=(Constraint(text="this country", occurrence=0),)
    )
    with pytest.raises(PromptError) as caught:
        MEASURES[kind](llama, [given, long])
    assert caught.value.field == "questions[1].prompt.text"
    with pytest.raises(PromptError) as refused:
        MEASURES[kind](llama, [given, replace(given, prompt=replace(given.prompt, images=(picture(),)))])
    assert refused.value.field == "questions[1].prompt.images"
    with pytest.raises(InvalidInputError, match="no question given"):
        MEASURES[kind](llama, [])


@pytest.mark.parametrize("kind", sorted(MEASURES))
def test_a_model_in_bfloat16_is_measured_to_finite_numbers(kind: str) -> None:
    model = tiny_model("llava")
    model.model.to(torch.bfloat16)
    questions = [asked(model), asked(model, "Où est “this country” 日本?")]
    if kind == "failure":
        questions[0] = replace(questions[0], answer="something it never says")
    found = MEASURES[kind](model, questions)
    assert found.n == 2
    assert np.isfinite([n.value for n in found.numbers]).all()


@pytest.mark.parametrize("kind", sorted(MEASURES))
def test_the_order_of_questions_changes_no_number(llava: EditableModel, kind: str) -> None:
    texts = ("What is the capital of this country?", "Where is this country?", "this country lies where?")
    questions = [asked(llava, text) for text in texts]
    if kind == "failure":
        questions[0] = replace(questions[0], answer="something it never says")
    ahead, back = (MEASURES[kind](llava, order) for order in (questions, questions[::-1]))
    assert {n.name: n.value for n in ahead.numbers} == pytest.approx({n.name: n.value for n in back.numbers}, rel=1e-4)


@pytest.mark.parametrize("kind", sorted(ONE_ROW))
def test_one_row_at_a_time_gives_the_same_numbers(llava: EditableModel, kind: str) -> None:
    questions = [asked(llava), asked(llava, "this country lies where?")]
    if kind == "failure":
        questions[0] = replace(questions[0], answer="something it never says")
    alone, together = ONE_ROW[kind](llava, questions), MEASURES[kind](llava, questions)
    assert {n.name: n.value for n in alone.numbers} == pytest.approx(
        {n.name: n.value for n in together.numbers}, rel=1e-4
    )
