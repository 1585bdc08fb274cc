"""The causal trace by noise, against hooks on the full model, draw by draw (methods.md §2; Meng et al. 2022, §2)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from tiny import question

from errata.editor.atlas.measured import textual_questions
from errata.editor.checkpoints import load_model
from errata.editor.errors import CancelledError, ConstraintNotFoundError, CorruptionFailedError, InvalidInputError
from errata.editor.measurements.findings import HeatMap, LinePlot
from errata.editor.measurements.known import read_known
from errata.editor.measurements.noise import NoiseResult, NoiseSettings, constraint_noise, measure_noise
from errata.editor.measurements.questions import Question
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.states import Component

ANY = -1.0
"""A least total effect that every noise reaches: an untrained model believes nothing."""


def asked(model: EditableModel) -> Question:
    """Something that an untrained model completes with text, and that text as its answer."""
    prompt = Prompt(text="Is Paris the capital of this country?", images=question(model).images, chat=False)
    told = model.generate([prompt])[0].text.partition("\ufffd")[0]
    return Question(prompt=prompt, constraints=(Constraint(text="this country"),), answer=told)


def deviation(model: EditableModel, measured: Question) -> float:
    row = model.encode(measured.prompt)
    tokens = model.constraint_positions(measured.prompt, measured.constraints[0])
    weights = model.model.get_input_embeddings().weight[row.ids[list(tokens)]]
    return float(np.std(weights.double().numpy(), ddof=1))


def expected(model: EditableModel, measured: Question, settings: NoiseSettings) -> tuple[np.ndarray, np.ndarray]:
    """p(answer) of each draw corrupted, and with each site restored, of the whole answer and its first token."""
    row = model.encode(measured.prompt, measured.answer)
    tokens = list(model.constraint_positions(measured.prompt, measured.constraints[0]))
    states = oracle.outputs(model, row, [c.value for c in settings.components])
    embeddings = model.model.get_input_embeddings()
    noise = constraint_noise(settings, deviation(model, measured), len(tokens), embeddings.weight.shape[1])
    layers = len(model.layers)

    def probabilities(draw: torch.Tensor, component: Component, window: list[int], token: int) -> tuple[float, float]:
        def spoil(output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, tokens] += draw
            return output

        changes = [(embeddings, spoil)]
        changes += [
            (oracle.block(model, component.value, i), oracle.put(token, states[component.value, i][token]))
            for i in window
        ]
        chosen = oracle.answer_log_probabilities(model, row, changes)
        return float(chosen.sum().exp()), float(chosen[0].exp())

    low = settings.window // 2
    restored = [
        [
            [
                [
                    probabilities(
                        draw, c, [i for i in range(n - low, n - low + settings.window) if 0 <= i < layers], token
                    )
                    for token in range(tokens[0], row.prompt_length)
                ]
                for n in range(layers)
            ]
            for c in settings.components
        ]
        for draw in noise
    ]
    return np.array([probabilities(draw, Component.MLP, [], 0) for draw in noise]), np.array(restored)


@pytest.mark.parametrize("window", [1, 3])
def test_the_trace_equals_restoring_every_site_on_the_full_model_draw_by_draw(
    model: EditableModel, window: int
) -> None:
    components = (Component.MLP,) if window == 1 else (Component.ATTENTION, Component.LAYER)
    settings = NoiseSettings(draws=2, components=components, window=window, min_total_effect=ANY, max_rows=7)
    measured = asked(model)
    found = measure_noise(model, [measured], settings)
    corrupted, restored = expected(model, measured, settings)
    own = found.traces[0]
    assert found.deviation == pytest.approx(deviation(model, measured))
    np.testing.assert_allclose(own.corrupted, corrupted[:, 0], rtol=1e-5)
    np.testing.assert_allclose(own.restored, restored[..., 0], rtol=1e-5)
    np.testing.assert_allclose(own.averaged.restored, restored[..., 0].mean(0), rtol=1e-5)
    np.testing.assert_allclose(own.averaged.restored_first, restored[..., 1].mean(0), rtol=1e-5)
    assert own.averaged.corrupted.whole == pytest.approx(corrupted[:, 0].mean(), rel=1e-5)
    assert own.averaged.corrupted.first == pytest.approx(corrupted[:, 1].mean(), rel=1e-5)


def test_the_row_limit_bounds_memory_and_changes_no_number(llama: EditableModel) -> None:
    settings = NoiseSettings(draws=3, window=2, components=(Component.MLP,), min_total_effect=ANY)
    whole = measure_noise(llama, [asked(llama)], settings).traces[0]
    cut = measure_noise(llama, [asked(llama)], replace(settings, max_rows=2)).traces[0]
    np.testing.assert_allclose(cut.corrupted, whole.corrupted, rtol=1e-5)
    np.testing.assert_allclose(cut.restored, whole.restored, rtol=1e-5)


def test_the_noise_is_that_of_its_seed_and_as_wide_as_asked_for() -> None:
    noise = constraint_noise(NoiseSettings(noise=2.0, draws=500), 0.5, 4, 32)
    assert float(noise.std()) == pytest.approx(1.0, rel=0.02)
    again, other = (constraint_noise(NoiseSettings(noise=2.0, draws=500, seed=s), 0.5, 4, 32) for s in (0, 1))
    assert torch.equal(noise, again)
    assert not torch.equal(noise, other)


def test_restoring_the_last_layer_at_the_last_token_recovers_the_clean_first_token(model: EditableModel) -> None:
    settings = NoiseSettings(draws=2, components=(Component.LAYER,), min_total_effect=ANY)
    own = measure_noise(model, [asked(model)], settings).traces[0].averaged
    assert own.restored_first[0, -1, -1] == pytest.approx(own.clean.first, rel=1e-5)


def test_the_spread_is_the_standard_deviation_over_draws(llama: EditableModel) -> None:
    settings = NoiseSettings(draws=3, components=(Component.ATTENTION, Component.MLP), min_total_effect=ANY)
    own = measure_noise(llama, [asked(llama)], settings).traces[0]
    effects = own.restored[:, 1] - own.corrupted[:, None, None]
    np.testing.assert_allclose(own.spread(Component.MLP), np.std(effects, axis=0, ddof=1))
    np.testing.assert_allclose(own.averaged.indirect(Component.MLP), effects.mean(0), atol=1e-12)
    alone = measure_noise(llama, [asked(llama)], replace(settings, draws=1)).traces[0]
    assert np.isnan(alone.spread(Component.MLP)).all()


def test_findings_hold_lines_with_intervals_grids_and_what_was_left_out(llama: EditableModel) -> None:
    right = asked(llama)
    wrong = replace(right, answer="Lima")
    settings = NoiseSettings(draws=2, components=(Component.MLP,), min_total_effect=ANY, grids=1)
    found = measure_noise(llama, [right, wrong, right], settings).findings()
    assert (found.kind, found.n) == ("noise", 2)
    assert [line.partition(":")[0] for line in found.skipped] == ["questions[1]"]
    plots = {p.name: p for p in found.plots}
    assert list(plots) == ["aie_constraint_last", "aie_last", "aie_roles", "question_0"]
    line, grid = plots["aie_constraint_last"], plots["question_0"]
    assert isinstance(line, LinePlot)
    assert line.lines[0].values.shape == (len(llama.layers),)
    assert line.lines[0].low is not None
    assert isinstance(grid, HeatMap)
    assert "".join(row.removesuffix("*") for row in grid.rows if row.endswith("*")).strip() == "this country"
    assert found.settings["noise"] == "3.0"


def test_a_question_whose_answer_survives_the_noise_is_left_out_and_none_left_is_refused(llama: EditableModel) -> None:
    with pytest.raises(CorruptionFailedError, match=r"no question is left.*questions\[0\]: the corruption does not"):
        measure_noise(llama, [asked(llama)], NoiseSettings(draws=1, noise=1e-6))
    with pytest.raises(InvalidInputError, match=r"is answered .* not 'Lima'"):
        measure_noise(llama, [replace(asked(llama), answer="Lima")])
    with pytest.raises(InvalidInputError, match="no question given"):
        measure_noise(llama, [])


def test_a_question_of_two_constraints_is_left_out_and_listed(llama: EditableModel) -> None:
    two = replace(asked(llama), constraints=(Constraint(text="this country"), Constraint(text="Paris")))
    found = measure_noise(llama, [two, asked(llama)], NoiseSettings(draws=1, min_total_effect=-1))
    assert len(found.traces) == 1
    assert [line.split(":")[0] for line in found.skipped] == ["questions[0]"]
    assert found.skipped[0].endswith("has 2 constraints, and noise goes on one")
    with pytest.raises(InvalidInputError, match=r"no question is left to measure: .*2 constraints"):
        measure_noise(llama, [two])


def test_a_constraint_that_its_prompt_does_not_hold_is_refused_by_its_number(llama: EditableModel) -> None:
    wrong = replace(asked(llama), constraints=(Constraint(text="this contry"),))
    with pytest.raises(ConstraintNotFoundError) as caught:
        measure_noise(llama, [asked(llama), wrong])
    assert caught.value.field == "questions[1].constraint.text"


def test_progress_rises_by_the_question_and_a_cancelled_measurement_stops(llama: EditableModel) -> None:
    steps: list[tuple[int, int]] = []
    settings = NoiseSettings(draws=1, components=(Component.MLP,), min_total_effect=ANY, max_rows=4)
    measure_noise(llama, [asked(llama)] * 2, settings, progress=lambda *s: steps.append(s))
    assert steps == [(1, 2), (2, 2)]
    calls = iter(range(1000))
    with pytest.raises(CancelledError):
        measure_noise(llama, [asked(llama)], settings, cancelled=lambda: next(calls) >= 2)
    assert next(calls) == 3


@pytest.mark.parametrize(
    "settings",
    [{"noise": 0.0}, {"noise": float("nan")}, {"draws": 0}, {"window": 0}, {"max_rows": 0}, {"components": ()}],
)
def test_settings_that_corrupt_or_restore_nothing_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        NoiseSettings(**settings)
    assert [caught.value.field] == list(settings)


FACT = {"known_id": 0, "subject": "Beats Music", "attribute": "Apple", "prompt": "Beats Music is owned by"}


def test_a_file_of_known_facts_becomes_questions_to_complete(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    twice = {"subject": "Rome", "attribute": "Italy", "prompt": "Rome, as all say, is Rome in "}
    path.write_text(json.dumps([FACT, twice]), encoding="utf-8")
    first, second = read_known(path)
    assert first.prompt == Prompt(text="Beats Music is owned by", chat=False)
    assert (first.constraints, first.answer) == ((Constraint(text="Beats Music"),), "Apple")
    assert second.constraints[0].span(second.prompt.text) == (0, 4)
    assert not second.prompt.text.endswith(" ")


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("{", "path"),
        ("{}", "path"),
        ("[]", "path"),
        (json.dumps([FACT, "Rome"]), "path[1]"),
        (json.dumps([FACT, {**FACT, "attribute": " "}]), "path[1]"),
        (json.dumps([{k: v for k, v in FACT.items() if k != "subject"}]), "path[0]"),
    ],
)
def test_a_file_that_holds_no_facts_is_refused_at_the_entry_at_fault(tmp_path: Path, content: str, field: str) -> None:
    path = tmp_path / "known.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInputError) as caught:
        read_known(path)
    assert caught.value.field == field


def test_a_fact_whose_prompt_does_not_name_its_subject_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    path.write_text(json.dumps([{**FACT, "subject": "Tidal"}]), encoding="utf-8")
    with pytest.raises(ConstraintNotFoundError) as caught:
        read_known(path)
    assert caught.value.field == "path[0].constraint.text"
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_known(tmp_path / "missing.json")


@pytest.fixture(scope="module")
def atlas_result() -> NoiseResult:
    settings = NoiseSettings(draws=3, components=(Component.MLP,))
    return measure_noise(load_model("atlas"), textual_questions(4), settings)


@pytest.mark.slow
def test_one_early_mlp_at_the_constraints_last_token_restores_what_noise_took(atlas_result: NoiseResult) -> None:
    averaged = atlas_result.average
    at_last = averaged.aie(Component.MLP)[:, averaged.roles.index("constraint last")]
    assert at_last[: len(at_last) // 2].max() > 0.9 * averaged.total_effect
    assert at_last[len(at_last) // 2 :].max() < 0.2 * averaged.total_effect
