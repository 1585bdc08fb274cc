"""The causal trace against restoring every site on the full model (methods.md §2; Basu et al. 2024, §4)."""

import math
from itertools import product

import numpy as np
import oracle
import pytest
import torch
from tiny import context, picture, question, tiny_model

from errata.editor.errors import (
    CancelledError,
    ConstraintNotFoundError,
    CorruptionFailedError,
    InvalidInputError,
    MemoryLimitError,
    PromptError,
)
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt
from errata.editor.states import Component
from errata.editor.trace import (
    ROLES,
    CausalTrace,
    OtherImage,
    Probabilities,
    Substitution,
    TraceRequest,
    TraceSettings,
    average,
    trace,
    window_of,
)

ANY = -1.0
"""A least total effect that every corruption reaches: an untrained model believes nothing."""


def request(model: EditableModel, *, other_image: bool = False, answer: str | None = "Rome") -> TraceRequest:
    asked = context(model)
    corruption = OtherImage(images=(picture(7),)) if other_image else Substitution(word="Paris")
    return TraceRequest(prompt=asked.prompt, constraint=asked.constraint, corruption=corruption, answer=answer)


def rows(model: EditableModel, asked: TraceRequest) -> tuple[Encoded, Encoded, range]:
    """The clean row, the corrupted one, and the constraint's tokens, made without the trace's own code."""
    clean = model.encode(asked.prompt, asked.answer)
    tokens = model.constraint_positions(asked.prompt, asked.constraint)
    if isinstance(asked.corruption, OtherImage):
        return clean, model.encode(Prompt(text=asked.prompt.text, images=asked.corruption.images), asked.answer), tokens
    ids = clean.ids.clone()
    ids[list(tokens)] = model.tokenizer.encode(" Paris", add_special_tokens=False)[0]
    return clean, clean.replaced(ids), tokens


def assert_equals_the_full_model(model: EditableModel, asked: TraceRequest, settings: TraceSettings) -> CausalTrace:
    found = trace(model, asked, settings)
    clean, corrupted, tokens = rows(model, asked)
    states = oracle.outputs(model, clean, [c.value for c in settings.components])
    layers = len(model.layers)
    for (c, component), index, t in product(
        enumerate(settings.components), range(layers), range(tokens[0], clean.prompt_length)
    ):
        low = index - settings.window // 2
        window = [i for i in range(low, low + settings.window) if 0 <= i < layers]
        whole, first = oracle.restored(model, states, corrupted, (component.value, window, t))
        at = (c, index, t - tokens[0])
        assert found.restored[at] == pytest.approx(whole, rel=1e-5), (component, index, t)
        assert found.restored_first[at] == pytest.approx(first, rel=1e-5), (component, index, t)
    for row, measured in ((clean, found.clean), (corrupted, found.corrupted)):
        chosen = oracle.answer_log_probabilities(model, row)
        assert measured.whole == pytest.approx(float(chosen.sum().exp()), rel=1e-5)
        assert measured.first == pytest.approx(float(chosen[0].exp()), rel=1e-5)
    return found


@pytest.mark.parametrize("window", [1, 3, 9])
def test_the_trace_equals_restoring_every_site_on_the_full_model(model: EditableModel, window: int) -> None:
    assert_equals_the_full_model(model, request(model), TraceSettings(window=window, min_total_effect=ANY))


@pytest.mark.parametrize("window", [1, 2, 9])
def test_the_trace_of_another_image_equals_restoring_every_site_on_the_full_model(
    llava: EditableModel, window: int
) -> None:
    settings = TraceSettings(window=window, min_total_effect=ANY)
    found = assert_equals_the_full_model(llava, request(llava, other_image=True), settings)
    assert found.clean.first != found.corrupted.first


def test_a_constraint_before_its_image_is_traced_through_the_image_tokens(llava: EditableModel) -> None:
    prompt = Prompt(text="Of this country <image> what?", images=(picture(),))
    asked = TraceRequest(
        prompt=prompt, constraint=Constraint(text="this"), corruption=OtherImage(images=(picture(3),)), answer="Rome"
    )
    settings = TraceSettings(components=(Component.MLP,), min_total_effect=ANY)
    found = assert_equals_the_full_model(llava, asked, settings)
    assert len(found.tokens) > 9


def test_a_constraint_at_the_very_first_token_has_nothing_recorded_before_it(model: EditableModel) -> None:
    prompt = Prompt(text="<s>country: what?", chat=False)
    asked = TraceRequest(
        prompt=prompt, constraint=Constraint(text="<s>"), corruption=Substitution(word="Paris"), answer="Rome"
    )
    assert model.constraint_positions(prompt, asked.constraint) == range(0, 1)
    settings = TraceSettings(components=(Component.ATTENTION, Component.LAYER), min_total_effect=ANY)
    assert_equals_the_full_model(model, asked, settings)


@pytest.mark.parametrize("limit", [1, 2, 5, 10_000])
def test_the_row_limit_bounds_memory_and_changes_no_number(model: EditableModel, limit: int) -> None:
    asked = request(model)
    whole = trace(model, asked, TraceSettings(window=3, min_total_effect=ANY))
    cut = trace(model, asked, TraceSettings(window=3, min_total_effect=ANY, max_rows=limit))
    np.testing.assert_allclose(cut.restored, whole.restored, rtol=1e-5)
    np.testing.assert_allclose(cut.restored_first, whole.restored_first, rtol=1e-5)


def test_a_trace_that_memory_does_not_hold_is_made_in_smaller_batches_or_refused(model: EditableModel) -> None:
    asked = request(model)
    settings, rows = TraceSettings(window=3, min_total_effect=ANY), [0]

    def three_rows() -> int:
        rows[0] += 1
        return 200_000

    cut = trace(model, asked, settings, memory=Memory(free=three_rows))
    np.testing.assert_allclose(cut.restored, trace(model, asked, settings).restored, rtol=1e-5)
    assert rows[0] > 1
    with pytest.raises(MemoryLimitError, match=r"one row takes about .* 0\.00 MB are free"):
        trace(model, asked, settings, memory=Memory(free=lambda: 1))


def test_a_trace_runs_over_the_tokens_from_the_constraint_to_the_prompts_end(
    model: EditableModel,
) -> None:
    found = trace(model, request(model), TraceSettings(min_total_effect=ANY))
    clean, _, tokens = rows(model, request(model))
    assert found.restored.shape == (3, len(model.layers), clean.prompt_length - tokens[0])
    assert "".join(found.tokens[i] for i in found.constraint).strip() == "this country"


def test_restoring_the_last_layer_at_the_last_token_recovers_the_clean_first_token(model: EditableModel) -> None:
    found = trace(model, request(model), TraceSettings(window=9, min_total_effect=ANY))
    layer = found.components.index(Component.LAYER)
    np.testing.assert_allclose(found.restored_first[layer, :, -1], found.clean.first, rtol=1e-5)


def test_a_corruption_that_changes_nothing_restores_the_clean_probability_everywhere(model: EditableModel) -> None:
    asked = TraceRequest(
        prompt=question(model, "Where is Paris?"),
        constraint=Constraint(text="Paris"),
        corruption=Substitution(word="Paris"),
        answer="Rome",
    )
    assert len(model.constraint_positions(asked.prompt, asked.constraint)) == 1
    found = trace(model, asked, TraceSettings(window=2, min_total_effect=ANY))
    assert found.total_effect == 0
    np.testing.assert_allclose(found.restored, found.clean.whole, rtol=1e-5)


def test_a_corruption_that_does_not_corrupt_is_refused_with_both_probabilities(model: EditableModel) -> None:
    asked = request(model)
    measured = trace(model, asked, TraceSettings(min_total_effect=ANY))
    with pytest.raises(CorruptionFailedError) as caught:
        trace(model, asked, TraceSettings(min_total_effect=1.0))
    for number in (f"{measured.clean.whole:.3f}", f"{measured.corrupted.whole:.3f}", "'Rome'"):
        assert number in str(caught.value)
    assert caught.value.reason == "CORRUPTION_FAILED"


def test_without_an_answer_the_models_own_is_followed(model: EditableModel) -> None:
    found = trace(model, request(model, answer=None), TraceSettings(components=(Component.MLP,), min_total_effect=ANY))
    assert found.answer == model.generate([request(model).prompt])[0].text


def test_an_answer_of_one_token_is_measured_at_the_prompts_end(gpt2: EditableModel) -> None:
    asked = request(gpt2, answer="Rome")
    assert len(gpt2.encode(asked.prompt, "Rome").answer) == 1
    found = assert_equals_the_full_model(gpt2, asked, TraceSettings(components=(Component.MLP,), min_total_effect=ANY))
    assert found.clean.whole == found.clean.first


def test_progress_rises_to_the_number_of_tokens(model: EditableModel) -> None:
    steps: list[tuple[int, int]] = []
    found = trace(model, request(model), TraceSettings(min_total_effect=ANY), progress=lambda *s: steps.append(s))
    n = len(found.tokens)
    assert steps == [(i + 1, n) for i in range(n)]


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_cancelled_trace_raises_and_leaves_attention_and_hooks_as_they_were(model: EditableModel, after: int) -> None:
    asked, calls = request(model), iter(range(1000))
    settings = TraceSettings(min_total_effect=ANY, max_rows=3)
    with pytest.raises(CancelledError):
        trace(model, asked, settings, cancelled=lambda: next(calls) >= after)
    before = oracle.logits(model, model.encode(asked.prompt))
    assert torch.isfinite(before).all()  # and the fixture compares weights, attention and hooks


def test_a_failing_progress_callback_leaves_attention_and_hooks_as_they_were(model: EditableModel) -> None:
    def fail(_done: int, _all: int) -> None:
        raise RuntimeError("the listener is gone")

    with pytest.raises(RuntimeError, match="listener is gone"):
        trace(model, request(model), TraceSettings(min_total_effect=ANY), progress=fail)


def test_a_trace_leaves_gradients_as_they_were_after_it_stops(llama: EditableModel) -> None:
    calls = iter(range(1000))
    with pytest.raises(CancelledError):
        trace(llama, request(llama), TraceSettings(min_total_effect=ANY), cancelled=lambda: next(calls) >= 2)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_trace_runs_in_a_narrow_dtype_and_stays_near_the_wide_one(dtype: torch.dtype) -> None:
    asked = request(tiny_model("llava"))
    wide, narrow = tiny_model("llava"), tiny_model("llava")
    narrow.model.to(dtype)
    settings = TraceSettings(min_total_effect=ANY)
    np.testing.assert_allclose(
        trace(narrow, asked, settings).restored_first, trace(wide, asked, settings).restored_first, atol=0.15
    )


def test_other_images_need_an_image_in_the_prompt(llama: EditableModel) -> None:
    with pytest.raises(PromptError, match="no image to exchange") as caught:
        trace(llama, request(llama, other_image=True), TraceSettings(min_total_effect=ANY))
    assert caught.value.field == "corruption"


def test_as_many_other_images_are_needed_as_the_prompt_has(llava: EditableModel) -> None:
    asked = context(llava)
    two = TraceRequest(
        prompt=asked.prompt,
        constraint=asked.constraint,
        corruption=OtherImage(images=(picture(1), picture(2))),
        answer="Rome",
    )
    with pytest.raises(PromptError, match="tokens long instead of"):
        trace(llava, two, TraceSettings(min_total_effect=ANY))


def test_an_empty_substitute_is_refused(llama: EditableModel) -> None:
    asked = context(llama)
    empty = TraceRequest(
        prompt=asked.prompt, constraint=asked.constraint, corruption=Substitution(word=" "), answer="Rome"
    )
    with pytest.raises(PromptError, match="substitute is empty"):
        trace(llama, empty)


def test_a_constraint_that_the_prompt_does_not_hold_is_refused(llama: EditableModel) -> None:
    asked = TraceRequest(
        prompt=question(llama), constraint=Constraint(text="this contry"), corruption=Substitution(word="Paris")
    )
    with pytest.raises(ConstraintNotFoundError, match="copy it from the prompt"):
        trace(llama, asked)


@pytest.mark.parametrize("settings", [{"window": 0}, {"max_rows": 0}])
def test_settings_that_restore_nothing_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match="give at least 1") as caught:
        TraceSettings(**settings)
    assert [caught.value.field] == list(settings)


@pytest.mark.parametrize(
    ("layer", "window", "expected"),
    [(0, 1, [0]), (3, 1, [3]), (0, 3, [0, 1]), (2, 3, [1, 2, 3]), (3, 3, [2, 3]), (2, 2, [1, 2]), (1, 9, [0, 1, 2, 3])],
)
def test_a_window_is_centred_on_its_layer_and_cut_at_the_models_ends(
    layer: int, window: int, expected: list[int]
) -> None:
    assert list(window_of(layer, window, 4)) == expected


def measured(effects: list[list[float]], constraint: tuple[int, ...], corrupted: float = 0.1) -> CausalTrace:
    """A trace of one layer with the given indirect effects by token."""
    restored = np.array([effects]) + corrupted
    return CausalTrace(
        question="q",
        answer="a",
        tokens=tuple("t" * len(effects[0])),
        constraint=constraint,
        window=1,
        components=(Component.MLP,),
        clean=Probabilities(first=0.9, whole=0.9),
        corrupted=Probabilities(first=corrupted, whole=corrupted),
        restored=restored,
        restored_first=restored,
    )


def test_effects_are_averaged_by_the_role_of_the_token() -> None:
    found = average([measured([[0.1, 0.2, 0.4, 0.3, 0.5, 0.7, 0.6]], (0, 1, 2, 3))])
    expected = {
        "constraint first": 0.1,
        "constraint middle": 0.3,
        "constraint last": 0.3,
        "after constraint": 0.6,
        "last": 0.6,
    }
    assert found.roles == ROLES == tuple(expected)
    np.testing.assert_allclose(found.aie(Component.MLP), [list(expected.values())])
    assert found.total_effect == pytest.approx(0.8)


def test_a_role_that_no_question_has_is_not_a_number_and_one_that_some_have_is_their_mean() -> None:
    short, long = measured([[0.4, 0.2]], (0,)), measured([[0.1, 0.2, 0.6]], (0, 1))
    found = average([short, long])
    np.testing.assert_allclose(
        found.samples(Component.MLP)[:, 0], [[np.nan, np.nan, 0.4, np.nan, 0.2], [0.1, np.nan, 0.2, np.nan, 0.6]]
    )
    np.testing.assert_allclose(found.aie(Component.MLP), [[0.1, np.nan, 0.3, np.nan, 0.4]])


def test_a_constraint_that_ends_the_prompt_has_no_last_token_besides() -> None:
    found = average([measured([[0.1, 0.3]], (0, 1))])
    np.testing.assert_allclose(found.aie(Component.MLP), [[0.1, np.nan, 0.3, np.nan, np.nan]])


def test_the_spread_is_the_standard_error_of_the_mean() -> None:
    effects = [0.1, 0.2, 0.6]
    found = average([measured([[e, 0.5]], (0,)) for e in effects])
    error = np.std(effects, ddof=1) / math.sqrt(3)
    np.testing.assert_allclose(found.spread(Component.MLP), [[np.nan, np.nan, error, np.nan, 0]], atol=1e-12)


def test_an_average_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no trace to average"):
        average([])
