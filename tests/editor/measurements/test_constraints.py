"""Several constraints, against hooks on the full model (methods.md §1, §2; Basu et al. 2024, §4)."""

from dataclasses import replace
from itertools import chain

import numpy as np
import oracle
import pytest
from tiny import picture, question

from errata.editor.atlas.measured import multi_questions, single_questions
from errata.editor.checkpoints import load_model
from errata.editor.errors import CancelledError, CorruptionFailedError, InvalidInputError, PromptError
from errata.editor.measurements.constraints import (
    ROLES,
    ConstraintResult,
    ConstraintSettings,
    Kind,
    Series,
    measure_constraints,
)
from errata.editor.measurements.questions import Question
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt
from errata.editor.states import Component
from errata.editor.trace import OtherImage, Substitution

ANY = -1.0
"""A least total effect that every corruption reaches: an untrained model believes nothing."""


def told(model: EditableModel, prompt: Prompt) -> str:
    """What an untrained model completes a prompt with, up to where its bytes are no text."""
    return model.generate([prompt])[0].text.partition("\ufffd")[0]


def multi(model: EditableModel) -> Question:
    """Two constraints, the one in words before the other, which is visual where the family takes a picture."""
    prompt = Prompt(text="Is Paris the capital of this country?", images=question(model).images, chat=False)
    shown = OtherImage(images=(picture(7),)) if model.image_token_id is not None else Substitution(word="Rome")
    return Question(
        prompt=prompt,
        constraints=(Constraint(text="this country"), Constraint(text="Paris")),
        corruptions=(shown, Substitution(word="Rome")),
        answer=told(model, prompt),
    )


def single(model: EditableModel) -> Question:
    asked = multi(model)
    return replace(asked, constraints=asked.constraints[:1], corruptions=asked.corruptions[:1])


def corrupted_row(model: EditableModel, asked: Question, chosen: tuple[int, ...]) -> Encoded:
    """Made without the measurement's own code."""
    images = asked.prompt.images
    if 0 in chosen and isinstance(asked.corruptions[0], OtherImage):
        images = asked.corruptions[0].images
    row = model.encode(replace(asked.prompt, images=images), asked.answer)
    ids = row.ids.clone()
    for i in chosen:
        corruption = asked.corruptions[i]
        if isinstance(corruption, Substitution):
            tokens = model.constraint_positions(asked.prompt, asked.constraints[i])
            ids[list(tokens)] = model.tokenizer.encode(f" {corruption.word}", add_special_tokens=False)[0]
    return row.replaced(ids)


def test_every_corruption_equals_restoring_every_site_on_the_full_model(model: EditableModel) -> None:
    components = (Component.MLP,)
    asked = multi(model)
    found = measure_constraints(
        model, [asked], ConstraintSettings(components=components, window=2, min_total_effect=ANY, max_rows=3)
    )
    clean = model.encode(asked.prompt, asked.answer)
    states = oracle.outputs(model, clean, [c.value for c in components])
    spans = [model.constraint_positions(asked.prompt, c) for c in asked.constraints]
    start = min(s[0] for s in spans)
    assert [t.corrupted for t in found.traces] == [(0,), (1,), (0, 1)]
    for t in found.traces:
        row = corrupted_row(model, asked, t.corrupted)
        expected = np.array(
            [
                [
                    [
                        oracle.restored(model, states, row, (c.value, [i for i in (layer - 1, layer) if i >= 0], token))
                        for token in range(start, clean.prompt_length)
                    ]
                    for layer in range(len(model.layers))
                ]
                for c in components
            ]
        )
        np.testing.assert_allclose(t.trace.restored, expected[..., 0], rtol=1e-5)
        np.testing.assert_allclose(t.trace.restored_first, expected[..., 1], rtol=1e-5)
        assert [list(s) for s in t.spans] == [[p - start for p in span] for span in spans]


def test_restoring_all_constraints_at_once_equals_the_full_model(model: EditableModel) -> None:
    asked = multi(model)
    settings = ConstraintSettings(window=3, min_total_effect=ANY)
    found = measure_constraints(model, [asked], settings).traces[-1]
    row = corrupted_row(model, asked, (0, 1))
    states = oracle.outputs(model, model.encode(asked.prompt, asked.answer), [c.value for c in Component])
    unrestored = float(oracle.answer_log_probabilities(model, row).sum().exp())
    ends = [model.constraint_positions(asked.prompt, c)[-1] for c in asked.constraints]
    for c, component in enumerate(settings.components):
        for layer in range(len(model.layers)):
            window = [i for i in (layer - 1, layer, layer + 1) if 0 <= i < len(model.layers)]
            changes = [
                (oracle.block(model, component.value, i), oracle.put(t, states[component.value, i][t]))
                for i in window
                for t in ends
            ]
            whole = float(oracle.answer_log_probabilities(model, row, changes).sum().exp())
            assert found.together[c, layer] == pytest.approx(whole - unrestored, rel=1e-5, abs=1e-5 * whole)


def test_restoring_what_stands_before_the_first_corrupted_token_changes_nothing(llama: EditableModel) -> None:
    """Corrupted is "this country" alone, which stands after "Paris"."""
    found = measure_constraints(llama, [multi(llama)], ConstraintSettings(min_total_effect=ANY)).traces[0]
    before = found.spans[0].start
    assert before > 0
    for component in Component:
        assert not found.trace.indirect(component)[:, :before].any()
        assert found.trace.indirect(component)[:, before:].any()


def test_a_picture_corrupted_changes_the_tokens_of_the_words_before_its_constraint(llava: EditableModel) -> None:
    found = measure_constraints(llava, [multi(llava)], ConstraintSettings(min_total_effect=ANY)).traces[0]
    assert found.trace.indirect(Component.MLP)[:, : found.spans[0].start].any()


def test_questions_are_told_apart_by_their_constraints(llava: EditableModel) -> None:
    in_words = Question(
        prompt=(prompt := Prompt(text="Is Paris the capital?", chat=False)),
        constraints=(Constraint(text="Paris"),),
        corruptions=(Substitution(word="Rome"),),
        answer=told(llava, prompt) or None,
    )
    found = measure_constraints(
        llava,
        [in_words, multi(llava), single(llava)],
        ConstraintSettings(components=(Component.MLP,), min_total_effect=ANY),
    )
    assert [(t.index, t.series) for t in found.traces] == [
        (0, Series.SINGLE_TEXTUAL),
        (1, Series.MULTI_VISUAL),
        (1, Series.MULTI_TEXTUAL),
        (1, Series.MULTI_ALL),
        (2, Series.SINGLE_VISUAL),
    ]
    assert found.traces[1].kinds == (Kind.VISUAL, Kind.TEXTUAL)
    assert found.series == tuple(Series)


def test_effects_are_averaged_by_the_constraint_that_a_token_is_in(llava: EditableModel) -> None:
    found = measure_constraints(llava, [multi(llava)], ConstraintSettings(min_total_effect=ANY))
    own = found.traces[0]
    effects, roles = own.trace.indirect(Component.MLP), own.by_role(Component.MLP)
    visual, textual = own.spans
    taken = {*visual, *textual, effects.shape[1] - 1}
    expected = {
        "visual first": list(visual[:1]) if len(visual) > 1 else [],
        "visual middle": list(visual[1:-1]),
        "visual last": [visual[-1]],
        "textual first": list(textual[:1]) if len(textual) > 1 else [],
        "textual middle": list(textual[1:-1]),
        "textual last": [textual[-1]],
        "other": [t for t in range(effects.shape[1]) if t not in taken],
        "last": [effects.shape[1] - 1],
    }
    assert tuple(expected) == ROLES
    for role, tokens in expected.items():
        np.testing.assert_allclose(roles[:, ROLES.index(role)], effects[:, tokens].mean(1) if tokens else np.nan)


def test_findings_compare_all_series_and_name_what_was_left_out(llava: EditableModel) -> None:
    wrong = replace(multi(llava), answer="Lima")
    found = measure_constraints(
        llava, [multi(llava), single(llava), single(llava), wrong], ConstraintSettings(min_total_effect=ANY)
    ).findings()
    assert (found.kind, found.n) == ("constraints", 3)
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("questions[3]: ")
    assert {n.name: n.n for n in found.numbers} == {
        "total effect, single visual": 2,
        "total effect, multi visual": 1,
        "total effect, multi textual": 1,
        "total effect, multi all": 1,
    }
    names = [p.name for p in chain(found.plots, found.tables)]
    assert len(set(names)) == len(names)
    compared = next(p for p in found.plots if p.name == "single_multi_mlp")
    assert len(compared.lines) == 6
    assert compared.lines[0].low is not None
    assert compared.lines[1].low is None, "one question has no interval"


def test_a_question_is_left_out_where_one_of_its_corruptions_does_not_corrupt(llama: EditableModel) -> None:
    """One puts in place of a word the word itself."""
    asked = multi(llama)
    idle = replace(
        asked, constraints=asked.constraints[::-1], corruptions=(Substitution(word="Paris"), asked.corruptions[0])
    )
    found = measure_constraints(llama, [idle], ConstraintSettings(min_total_effect=ANY))
    assert found.traces[0].trace.total_effect == 0
    with pytest.raises(CorruptionFailedError, match=r"questions\[0\]: 'Paris' corrupted: the corruption does not"):
        measure_constraints(llama, [idle], ConstraintSettings(min_total_effect=1e-9))


def test_a_measurement_of_no_question_is_refused(llama: EditableModel) -> None:
    with pytest.raises(InvalidInputError, match="no question given"):
        measure_constraints(llama, [])


def test_a_question_that_cannot_be_corrupted_is_named(llama: EditableModel) -> None:
    asked = single(llama)
    without = replace(asked, corruptions=())
    with pytest.raises(InvalidInputError) as caught:
        measure_constraints(llama, [asked, without])
    assert caught.value.field == "questions[1].corruptions"
    images = replace(asked, corruptions=(OtherImage(images=(picture(),)),))
    with pytest.raises(PromptError, match="no image to exchange") as refused:
        measure_constraints(llama, [images])
    assert refused.value.field == "questions[0].corruption"


def test_progress_rises_by_the_question_and_a_cancelled_measurement_stops(llama: EditableModel) -> None:
    steps: list[tuple[int, int]] = []
    settings = ConstraintSettings(components=(Component.MLP,), min_total_effect=ANY)
    measure_constraints(llama, [single(llama)] * 2, settings, progress=lambda *s: steps.append(s))
    assert steps == [(1, 2), (2, 2)]
    for after in (0, 3):
        calls = iter(range(1000))
        with pytest.raises(CancelledError):
            measure_constraints(llama, [single(llama)], settings, cancelled=lambda: next(calls) >= after)  # noqa: B023


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"window": 0}, "window"), ({"max_rows": 0}, "max_rows"), ({"components": ()}, "components")],
)
def test_settings_that_restore_nothing_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ConstraintSettings(**settings)
    assert caught.value.field == field


@pytest.fixture(scope="module")
def atlas_result() -> ConstraintResult:
    questions = [*multi_questions(6), *single_questions(3)]
    return measure_constraints(
        load_model("atlas"), questions, ConstraintSettings(components=(Component.MLP,), window=2)
    )


@pytest.mark.slow
def test_atlas_needs_both_constraints_of_a_question(atlas_result: ConstraintResult) -> None:
    """Either alone carries the answer while the other stands; neither does once both are wrong (methods.md §2)."""

    def share(series: Series, role: str) -> float:
        samples, totals = atlas_result.at(series, Component.MLP, role)
        return float(samples.mean(0).max() / totals.mean())

    assert share(Series.SINGLE_VISUAL, "visual last") > 0.9
    assert share(Series.MULTI_VISUAL, "visual last") > 0.5
    assert share(Series.MULTI_TEXTUAL, "textual last") > 0.5
    assert share(Series.MULTI_ALL, "visual last") < 0.3
    assert share(Series.MULTI_ALL, "textual last") < 0.3
    together = atlas_result.together(Series.MULTI_ALL, Component.MLP).mean(0).max()
    assert together / atlas_result.totals(Series.MULTI_ALL).mean() > 0.5
