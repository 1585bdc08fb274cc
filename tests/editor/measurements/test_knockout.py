"""Attention knockout against masks on the full model (methods.md §4; Zhang et al. 2025, §3)."""

import inspect
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from tiny import question, said

from errata.editor.atlas.facts import trace_requests
from errata.editor.checkpoints import load_model
from errata.editor.errors import CancelledError, ConstraintNotFoundError, InvalidInputError
from errata.editor.measurements.findings import LinePlot
from errata.editor.measurements.knockout import KnockoutResult, KnockoutSettings, Pair, measure_knockout
from errata.editor.measurements.positions import positions
from errata.editor.measurements.questions import Box, Question
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint
from errata.editor.recording import record
from errata.editor.states import logits_of
from errata.editor.suffix import Suffix

TEXTS = ("What is this country's capital called?", "Where is this country, and which is its capital?")
TEXT_PAIRS = ("constraint->question", "constraint->last", "question->last", "question->question")
IMAGE_PAIRS = (
    "image->question",
    "image->constraint",
    "image->last",
    "image+constraint->question+last",
    "box->question",
    "outside->constraint",
    "constraint->last",
    "question->question",
)


def asked(model: EditableModel, text: str = TEXTS[0], seed: int = 0) -> Question:
    """An untrained model knows no answer, so what it says is measured."""
    box = None if model.image_token_id is None else Box(left=0.1, top=0.4, right=0.6, bottom=0.7)
    prompt, constraint = question(model, text, seed), Constraint(text="this country")
    return Question(prompt=prompt, constraints=(constraint,), box=box, answer=said(model, prompt))


def masked_probabilities(
    model: EditableModel, row: Encoded, blocked: dict[int, Sequence[int]], window: Iterable[int]
) -> tuple[float, float]:
    """p(whole answer) and p(first token) of the full model, with its own mask set to −∞ in some layers."""

    def mask(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        changed = call.arguments["attention_mask"].clone()
        for target, sources in blocked.items():
            changed[..., target, list(sources)] = -torch.inf
        call.arguments["attention_mask"] = changed
        return call.args, call.kwargs

    config = model.family.decoder_of(model.model).config
    before = config._attn_implementation
    with ExitStack() as stack:
        stack.callback(setattr, config, "_attn_implementation", before)
        config._attn_implementation = "eager"
        for index in window:
            handle = oracle.layer(model, index).register_forward_pre_hook(mask, with_kwargs=True)
            stack.callback(handle.remove)
        chosen = oracle.answer_log_probabilities(model, row)
    return float(chosen.sum().exp()), float(chosen[0].exp())


def assert_close(found: tuple[float, float], expected: tuple[float, float], tokens: int) -> None:
    """To 1e-5 of p(first token), and of p(whole answer) a token: an untrained model's answers are long and unlikely."""
    assert found[0] ** (1 / tokens) == pytest.approx(expected[0] ** (1 / tokens), rel=1e-5)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)


def assert_equals_the_full_model(
    model: EditableModel, questions: Sequence[Question], settings: KnockoutSettings, window: int
) -> KnockoutResult:
    found = measure_knockout(model, questions, settings)
    layers = len(model.layers)
    assert found.blocked.shape == (len(questions), len(settings.pairs), layers)
    for q, one in enumerate(questions):
        row = model.encode(one.prompt, found.answers[q])
        groups = positions(model, one, row)
        clean = masked_probabilities(model, row, {}, ())
        assert_close((found.clean[q], found.clean_first[q]), clean, len(row.answer))
        for p, text in enumerate(settings.pairs):
            pair = Pair.parse(text)
            blocked = {t: [s for s in groups.of(pair.sources) if s != t] for t in groups.of(pair.targets)}
            for index in range(layers):
                low = index - window // 2
                around = [i for i in range(low, low + window) if 0 <= i < layers]
                expected = masked_probabilities(model, row, blocked, around)
                at = (q, p, index)
                assert_close((found.blocked[at], found.blocked_first[at]), expected, len(row.answer))
    return found


def pairs_of(model: EditableModel) -> tuple[str, ...]:
    return TEXT_PAIRS if model.image_token_id is None else IMAGE_PAIRS


@pytest.mark.parametrize("window", [1, 2, 9])
def test_the_knockout_equals_masks_on_the_full_model(model: EditableModel, window: int) -> None:
    settings = KnockoutSettings(pairs=pairs_of(model), window=window)
    found = assert_equals_the_full_model(model, [asked(model, TEXTS[window % 2])], settings, window)
    assert np.abs(found.change()).max() > 1
    assert not found.skipped


def test_each_of_several_questions_is_knocked_out_alone(model: EditableModel) -> None:
    questions = [asked(model, text, seed) for seed, text in enumerate(TEXTS)]
    assert_equals_the_full_model(model, questions, KnockoutSettings(pairs=("constraint->last",), window=2), 2)


def test_the_window_is_nine_thirty_seconds_of_the_depth(model: EditableModel) -> None:
    settings = KnockoutSettings(pairs=("constraint->last",))
    assert settings.layers(32) == 9
    assert settings.layers(2) == 1
    assert assert_equals_the_full_model(model, [asked(model)], settings, 1).window == 1


@pytest.mark.parametrize("limit", [1, 5, 10_000])
def test_the_row_limit_bounds_memory_and_changes_no_number(model: EditableModel, limit: int) -> None:
    settings = KnockoutSettings(pairs=pairs_of(model), window=2)
    whole = measure_knockout(model, [asked(model)], settings)
    cut = measure_knockout(model, [asked(model)], replace(settings, max_rows=limit))
    np.testing.assert_allclose(cut.blocked, whole.blocked, rtol=1e-4)
    np.testing.assert_allclose(cut.blocked_first, whole.blocked_first, rtol=1e-5)


def test_a_position_keeps_itself_where_a_group_is_hidden_from_itself(model: EditableModel) -> None:
    """`question->question` of the first word, where nothing else is left, is no NaN."""
    found = measure_knockout(model, [asked(model)], KnockoutSettings(pairs=("question->question",), window=9))
    assert np.isfinite(found.blocked).all()


def test_a_block_that_leaves_a_token_nothing_is_refused_and_says_which(model: EditableModel) -> None:
    row = model.encode(question(model), "Rome")
    start = len(row.ids) - 3
    suffix = Suffix(model, record(model, [row], [start]), [start])
    blocked = torch.zeros(1, 3, len(row.ids), dtype=torch.bool)
    blocked[0, 1, : start + 2] = True
    with suffix, torch.no_grad(), pytest.raises(InvalidInputError, match=r"token 1 of the suffix of row 0.*NaN"):
        suffix.run(0, suffix.inputs(0), blocked=blocked)


def test_blocked_rows_of_mixed_lengths_equal_the_full_model(model: EditableModel) -> None:
    rows = [model.encode(question(model, text), "Rome") for text in TEXTS]
    starts, layers = [len(row.ids) - n for row, n in zip(rows, (5, 7), strict=True)], len(model.layers)
    suffix = Suffix(model, record(model, rows, starts), starts)
    hidden = suffix.inputs(0)
    blocked = torch.zeros(2, hidden.shape[1], max(starts) + hidden.shape[1], dtype=torch.bool)
    # Each row's last prompt position may attend neither to token 1 of its prefix nor to the first of its suffix.
    lasts = [row.prompt_length - 1 for row in rows]
    for r, (last, start) in enumerate(zip(lasts, starts, strict=True)):
        blocked[r, last - start, [1, max(starts)]] = True
    with suffix, torch.no_grad():
        for index in range(layers):
            hidden = suffix.run(index, hidden, blocked=blocked)
        logits = logits_of(model, hidden)
    for r, (row, last, start) in enumerate(zip(rows, lasts, starts, strict=True)):
        p = logits[r, last - start].softmax(-1)[row.answer[0]]
        assert float(p) == pytest.approx(
            masked_probabilities(model, row, {last: [1, start]}, range(layers))[1], rel=1e-5
        )


def test_pairs_that_a_prompt_does_not_have_are_left_out_counted_and_listed(model: EditableModel) -> None:
    alone = replace(asked(model), box=None)
    pairs = ("box->last", "last->constraint", "constraint->last")
    found = measure_knockout(model, [alone, asked(model), alone], KnockoutSettings(pairs=pairs))
    missing = [0, 2] if model.image_token_id is not None else [0, 1, 2]
    assert found.skipped == (
        f"box → last left out of {len(missing)} of 3 questions, as the question gives no box: questions{missing}",
        "last → constraint left out of 3 of 3 questions, as no target stands after a source: questions[0, 1, 2]",
    )
    assert np.isnan(found.blocked[missing, 0]).all()
    assert np.isnan(found.blocked[:, 1]).all()
    assert np.isfinite(found.blocked[:, 2]).all()
    assert len(found.of("box->last")) == 3 - len(missing)
    (plot,) = found.findings().plots
    assert isinstance(plot, LinePlot)
    labels = ["constraint → last"] if len(missing) == 3 else ["box → last", "constraint → last"]
    assert [line.label for line in plot.lines] == labels
    assert ("n = 3 questions (1 of box → last)" in plot.caption) == (len(missing) < 3)
    assert found.findings().skipped == found.skipped


def test_questions_that_are_answered_otherwise_are_listed_and_without_any_other_it_is_refused(
    model: EditableModel,
) -> None:
    wrong = replace(asked(model), answer="surely not")
    settings = KnockoutSettings(pairs=("constraint->last",))
    found = measure_knockout(model, [wrong, asked(model)], settings)
    assert len(found.questions) == 1
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("questions[0]: ")
    with pytest.raises(InvalidInputError, match=r"no question is left to measure.*not 'surely not'"):
        measure_knockout(model, [wrong], settings)
    with pytest.raises(InvalidInputError, match="no question is left to measure: last → constraint left out of 1"):
        measure_knockout(model, [asked(model)], KnockoutSettings(pairs=("last->constraint",)))
    with pytest.raises(InvalidInputError, match="no question given"):
        measure_knockout(model, [], settings)


def test_a_constraint_that_the_prompt_does_not_hold_names_its_question(model: EditableModel) -> None:
    lost = replace(asked(model), constraints=(Constraint(text="that city"),))
    with pytest.raises(ConstraintNotFoundError, match=r"questions\[1\].constraint.text: "):
        measure_knockout(model, [asked(model), lost])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pairs": ("image->answer",)}, "pairs: 'image->answer' is no pair.*one of image, box, outside"),
        ({"pairs": ("image",)}, "is no pair"),
        ({"pairs": ("image->last->last",)}, "is no pair"),
        ({"pairs": ("image+->last",)}, "is no pair"),
        ({"pairs": ()}, "at least one pair"),
        ({"pairs": ("image->last", "image->last")}, "none twice"),
        ({"window": -1}, "window: .*-1"),
        ({"max_rows": 0}, "max_rows: "),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        KnockoutSettings(**given)


def test_progress_is_told_and_cancelling_leaves_the_model_as_it_was(model: EditableModel) -> None:
    told: list[tuple[int, int]] = []
    settings = KnockoutSettings(pairs=("constraint->last",))
    with pytest.raises(CancelledError):
        measure_knockout(
            model,
            [asked(model)] * 3,
            settings,
            progress=lambda *steps: told.append(steps),
            cancelled=lambda: len(told) == 2,
        )
    assert told == [(1, 3), (2, 3)]


def test_the_findings_are_means_of_the_change_between_their_bounds() -> None:
    clean, blocked = np.array([0.5, 0.8, 1.0]), np.array([[[0.5, 0.0]], [[0.4, 0.0]], [[0.5, 0.1]]])
    found = KnockoutResult(
        pairs=("image->last",),
        window=1,
        questions=("a", "b", "c"),
        answers=("x", "y", "z"),
        clean=clean,
        clean_first=clean,
        blocked=blocked,
        blocked_first=blocked,
        settings=KnockoutSettings(pairs=("image->last",)),
        skipped=(),
    ).findings()
    (plot,) = found.plots
    assert isinstance(plot, LinePlot)
    (line,) = plot.lines
    np.testing.assert_allclose(line.values, [-100 / 3, -290 / 3])
    assert line.low is not None
    assert line.high is not None
    np.testing.assert_allclose((line.low[0], line.high[0]), (-50, 0))
    np.testing.assert_allclose((line.low[1], line.high[1]), (-100, -90))
    assert [(n.name, round(n.value, 3), n.unit, n.n) for n in found.numbers] == [
        ("image → last: lowest change", -96.667, "%", 3),
        ("image → last: layer of the lowest change", 1, "layer", 3),
    ]


@pytest.mark.slow
def test_atlas_hears_of_the_image_at_the_constraint_early_and_of_the_constraint_at_the_last_position_later() -> None:
    """Zhang et al. 2025, §4: image information joins the question in lower layers than the answer leaves it in."""
    questions = [
        Question(prompt=r.prompt, constraints=(r.constraint,), answer=r.answer) for r in trace_requests(12, seed=3)
    ]
    pairs = ("image->constraint", "constraint->last", "image->last")
    found = measure_knockout(load_model("atlas"), questions, KnockoutSettings(pairs=pairs))
    early, late, direct = (found.of(pair).mean(0) for pair in pairs)
    assert early[0] < -50
    assert late.min() < -40
    assert early[late.argmin()] > -10
    assert late[0] > -10
    assert direct.min() > -5
