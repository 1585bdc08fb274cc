"""The window study, against hooks on the full model for every window (methods.md §2; Basu et al. 2024, §4)."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
from tiny import picture, question

from errata.editor.atlas.measured import single_questions, textual_questions
from errata.editor.checkpoints import load_model
from errata.editor.errors import CancelledError, CorruptionFailedError, InvalidInputError
from errata.editor.measurements.questions import Question
from errata.editor.measurements.windows import WindowResult, WindowSettings, measure_windows
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.states import Component
from errata.editor.trace import OtherImage, Substitution, TraceRequest, TraceSettings, trace

ANY = -1.0
"""A least total effect that every corruption reaches: an untrained model believes nothing."""


def asked(model: EditableModel, *, shown: bool = False) -> Question:
    """Something that an untrained model completes with text, corrupted by words, or `shown`, by another picture."""
    prompt = Prompt(
        text="Is Paris the capital of this country?" if shown or model.image_token_id is None else "This country is",
        images=question(model).images if shown else (),
        chat=False,
    )
    told = model.generate([prompt])[0].text.partition("\ufffd")[0]
    assert told.strip()
    return Question(
        prompt=prompt,
        constraints=(Constraint(text=prompt.text[-13:-1] if prompt.text.endswith("?") else "country"),),
        corruptions=(OtherImage(images=(picture(7),)) if shown else Substitution(word="Rome"),),
        answer=told,
    )


def test_every_window_equals_restoring_its_sites_on_the_full_model(model: EditableModel) -> None:
    """At the constraint's last token, which the study reports."""
    measured = asked(model, shown=model.image_token_id is not None)
    windows = (1, 2, 3, 9)
    settings = WindowSettings(windows=windows, min_total_effect=ANY, max_rows=5)
    found = measure_windows(model, [measured], settings)
    prompt = measured.prompt
    clean = model.encode(prompt, measured.answer)
    tokens = model.constraint_positions(prompt, measured.constraints[0])
    corruption = measured.corruptions[0]
    if isinstance(corruption, OtherImage):
        corrupted = model.encode(replace(prompt, images=corruption.images), measured.answer)
    else:
        ids = clean.ids.clone()
        ids[list(tokens)] = model.tokenizer.encode(" Rome", add_special_tokens=False)[0]
        corrupted = clean.replaced(ids)
    states = oracle.outputs(model, clean, [c.value for c in settings.components])
    unrestored = float(oracle.answer_log_probabilities(model, corrupted).sum().exp())
    for component in settings.components:
        effects = found.groups[0].samples(component)[0]
        for w, window in enumerate(windows):
            for layer in range(len(model.layers)):
                low = layer - window // 2
                restored = [i for i in range(low, low + window) if 0 <= i < len(model.layers)]
                whole, _ = oracle.restored(model, states, corrupted, (component.value, restored, tokens[-1]))
                assert effects[w, layer] + unrestored == pytest.approx(whole, rel=1e-5), (component, window, layer)


def test_all_windows_in_one_climb_are_the_traces_of_each_alone(model: EditableModel) -> None:
    measured = asked(model, shown=model.image_token_id is not None)
    found = measure_windows(model, [measured], WindowSettings(windows=(3, 1), min_total_effect=ANY))
    request = TraceRequest(
        prompt=measured.prompt,
        constraint=measured.constraints[0],
        corruption=measured.corruptions[0],
        answer=measured.answer,
    )
    for window, averaged in zip(found.windows, found.groups[0].averages, strict=True):
        settings = TraceSettings(components=found.settings.components, window=window, min_total_effect=ANY)
        alone = trace(model, request, settings)
        assert averaged.window == window
        np.testing.assert_allclose(averaged.traces[0].restored, alone.restored, rtol=1e-5)
        np.testing.assert_allclose(averaged.traces[0].restored_first, alone.restored_first, rtol=1e-5)


def test_without_windows_all_up_to_the_models_depth_are_restored(llama: EditableModel) -> None:
    found = measure_windows(llama, [asked(llama)], WindowSettings(components=(Component.MLP,), min_total_effect=ANY))
    assert found.windows == (1, 2, 3, 4)
    assert found.groups[0].samples(Component.MLP).shape == (1, 4, 4)


def test_questions_with_a_picture_stand_beside_those_in_words_alone(llava: EditableModel) -> None:
    shown, words = asked(llava, shown=True), asked(llava)
    wrong = replace(words, answer="Lima")
    settings = WindowSettings(windows=(1, 2), components=(Component.MLP,), min_total_effect=ANY)
    result = measure_windows(llava, [words, shown, wrong, shown], settings)
    assert [(g.label, g.n) for g in result.groups] == [("with the picture", 2), ("in words alone", 1)]
    found = result.findings()
    assert (found.kind, found.n, len(found.skipped)) == ("windows", 3, 1)
    assert found.skipped[0].startswith("questions[2]: ")
    assert [p.name for p in found.plots] == ["windows_mlp", "windows_layers_mlp"]
    assert [t.name for t in found.tables] == ["windows_mlp"]
    assert len(found.tables[0].rows) == 4
    group = result.groups[0]
    best = group.best(Component.MLP)
    np.testing.assert_allclose(best.values, group.samples(Component.MLP).mean(0).max(1) / group.totals.mean())
    assert best.low is not None
    assert result.groups[1].best(Component.MLP).low is None, "one question has no interval"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"windows": (0, 1)}, "windows"),
        ({"windows": (2, 2)}, "windows"),
        ({"components": ()}, "components"),
        ({"max_rows": 0}, "max_rows"),
    ],
)
def test_settings_that_restore_nothing_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        WindowSettings(**settings)
    assert caught.value.field == field


def test_questions_that_cannot_be_traced_are_named_and_none_left_is_refused(llama: EditableModel) -> None:
    measured = asked(llama)
    with pytest.raises(InvalidInputError) as caught:
        measure_windows(llama, [measured, replace(measured, corruptions=())])
    assert caught.value.field == "questions[1].corruptions"
    with pytest.raises(InvalidInputError) as refused:
        measure_windows(llama, [replace(measured, corruptions=(Substitution(word=" "),))])
    assert refused.value.field == "questions[0].corruption.word"
    with pytest.raises(CorruptionFailedError, match=r"questions\[0\]: the corruption does not corrupt"):
        measure_windows(llama, [measured], WindowSettings(min_total_effect=1.0))
    with pytest.raises(InvalidInputError, match="no question given"):
        measure_windows(llama, [])


def test_a_question_of_two_constraints_is_left_out_and_listed(llama: EditableModel) -> None:
    measured = asked(llama)
    two = replace(
        measured,
        constraints=(*measured.constraints, Constraint(text="capital")),
        corruptions=(*measured.corruptions, Substitution(word="flag")),
    )
    found = measure_windows(llama, [two, measured], WindowSettings(windows=(1,), min_total_effect=ANY))
    assert [line.split(":")[0] for line in found.skipped] == ["questions[0]"]
    assert found.skipped[0].endswith("has 2 constraints, and windows are studied with one")


def test_progress_rises_by_the_question_and_a_cancelled_study_stops(llama: EditableModel) -> None:
    steps: list[tuple[int, int]] = []
    settings = WindowSettings(components=(Component.MLP,), min_total_effect=ANY)
    measure_windows(llama, [asked(llama)] * 2, settings, progress=lambda *s: steps.append(s))
    assert steps == [(1, 2), (2, 2)]
    calls = iter(range(1000))
    with pytest.raises(CancelledError):
        measure_windows(llama, [asked(llama)], settings, cancelled=lambda: next(calls) >= 2)
    assert next(calls) == 3


@pytest.fixture(scope="module")
def atlas_result() -> WindowResult:
    settings = WindowSettings(windows=(1, 3), components=(Component.MLP,))
    return measure_windows(load_model("atlas"), [*single_questions(4), *textual_questions(4)], settings)


@pytest.mark.slow
def test_a_window_of_one_early_layer_is_enough_for_atlas_with_the_picture_and_in_words(
    atlas_result: WindowResult,
) -> None:
    """As Basu et al. find of LLaVA, not of its text-only decoder (§4)."""
    for group in atlas_result.groups:
        by_layer = group.samples(Component.MLP)[:, 0].mean(0) / group.totals.mean()
        assert by_layer.argmax() < len(by_layer) // 2, group.label
        assert by_layer.max() > 0.9, group.label
