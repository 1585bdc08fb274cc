"""Values: the optimised δ against hooks on the full model (methods.md §5; Meng et al. 2022, §3.1)."""

from dataclasses import replace

import oracle
import pytest
import torch
from tiny import context, question

from errata.editor.errors import CancelledError, MemoryLimitError
from errata.editor.memory import Memory
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.values import Value, ValueSettings, optimise_values

LAYER = 1
FIXED = ValueSettings(steps=4, stop_loss=0.0, learning_rate=0.1)
"""Few steps that never stop early, so that every number can be recomputed."""
GENEROUS = ValueSettings(steps=60, clamp=12.0, learning_rate=0.2, stop_loss=0.5)


def rome(model: EditableModel, preserve: bool = False) -> EditRequest:
    kept = (
        context(model, "Where was this?", "this", seed=1),
        context(model, "Is this country in the capital?", "this country"),
    )
    return EditRequest(
        name="rome",
        contexts=(context(model), context(model, "Is this country where it is?", "country", seed=2)),
        target="Rome",
        preserve=kept if preserve else (),
    )


def needle(model: EditableModel) -> EditRequest:
    return EditRequest(
        name="needle",
        contexts=(context(model, "The Space Needle is in", "Space Needle", seed=3),),
        target="the capital of Rome",
    )


def at_the_end(model: EditableModel, text: str, target: str) -> EditRequest:
    """Its constraint ends the prompt: in the middle of one, an untrained model lets nothing steer the answer."""
    asked = question(model, text)
    prompt = Prompt(text=text, images=asked.images, chat=False)
    span = Constraint(text=text.split()[-1])
    return EditRequest(name=target, contexts=(Context(prompt=prompt, constraint=span),), target=target)


def site(model: EditableModel, asked: Context) -> int:
    return model.constraint_positions(asked.prompt, asked.constraint)[-1]


def target_loss(model: EditableModel, request: EditRequest, output: torch.Tensor, layer: int = LAYER) -> float:
    """Mean over contexts of −log p(target) on the full model, whose MLP puts `output` out at each constraint."""
    total = 0.0
    for asked in request.contexts:
        row = model.encode(asked.prompt, request.target)
        change = oracle.block(model, "mlp", layer), oracle.put(site(model, asked), output)
        total -= float(oracle.answer_log_probabilities(model, row, [change]).sum())
    return total / len(request.contexts)


def preserved_kl(model: EditableModel, request: EditRequest, output: torch.Tensor) -> float:
    """Mean over preserved prompts of KL(before ‖ after), summed over the tokens of what the model answers."""
    total = 0.0
    for asked in request.preserve:
        row = model.encode(asked.prompt, model.generate([asked.prompt])[0].text)
        change = oracle.block(model, "mlp", LAYER), oracle.put(site(model, asked), output)
        before, after = (
            oracle.logits(model, row, c)[row.prompt_length - 1 : -1].double().log_softmax(-1) for c in ([], [change])
        )
        total += float((before.exp() * (before - after)).sum())
    return total / len(request.preserve)


@pytest.mark.parametrize("layer", [0, LAYER, 3])
def test_the_losses_are_those_of_the_full_model_with_the_value_added(model: EditableModel, layer: int) -> None:
    requests = [rome(model, preserve=True), needle(model)]
    for request, value in zip(requests, optimise_values(model, requests, layer, FIXED), strict=True):
        assert len(value.losses) == FIXED.steps + 1
        assert value.losses[0] == pytest.approx(target_loss(model, request, value.value - value.delta, layer), rel=1e-5)
        assert value.losses[-1] == pytest.approx(target_loss(model, request, value.value, layer), rel=1e-5)


def test_the_kl_is_that_of_the_full_model_with_the_value_added(model: EditableModel) -> None:
    request = rome(model, preserve=True)
    value = optimise_values(model, [request], LAYER, FIXED)[0]
    assert value.kl == pytest.approx(preserved_kl(model, request, value.value), rel=1e-3)
    assert value.kl > 0


def test_the_loss_falls_until_the_target_is_likely(model: EditableModel) -> None:
    requests = [at_the_end(model, "The capital of this country", "Rome"), at_the_end(model, "Where is this", "Paris")]
    for request, value in zip(requests, optimise_values(model, requests, LAYER, GENEROUS), strict=True):
        assert value.converged
        assert value.losses[-1] < GENEROUS.stop_loss < value.losses[0]
        assert target_loss(model, request, value.value) < GENEROUS.stop_loss * 1.01


def test_the_kl_term_keeps_the_preserved_prompts(model: EditableModel) -> None:
    request = rome(model, preserve=True)
    free, bound = (
        optimise_values(model, [request], LAYER, ValueSettings(steps=20, learning_rate=0.1, stop_loss=0, kl_weight=w))[
            0
        ]
        for w in (0.0, 10.0)
    )
    assert bound.kl < free.kl / 2


def test_a_value_never_leaves_its_clamp(model: EditableModel) -> None:
    for clamp in (0.05, 1.0):
        value = optimise_values(model, [needle(model)], LAYER, ValueSettings(steps=6, clamp=clamp, stop_loss=0))[0]
        assert float(value.delta.norm()) <= clamp * value.scale * (1 + 1e-5)
        assert float(value.delta.norm()) > 0.2 * clamp * value.scale


def test_a_value_starts_from_its_contexts_mean_output_and_is_scaled_by_it_or_the_residual_it_joins(
    model: EditableModel,
) -> None:
    outputs, residuals = [], []
    for asked in rome(model).contexts:
        states = oracle.outputs(model, model.encode(asked.prompt), ["mlp", "layer"])
        outputs.append(states["mlp", LAYER][site(model, asked)])
        residuals.append(states["layer", LAYER - 1][site(model, asked)])
    own, stream = (float(torch.stack(states).norm(dim=1).mean()) for states in (outputs, residuals))
    value = optimise_values(model, [rome(model)], LAYER, FIXED)[0]
    assert value.scale == pytest.approx(max(own, stream), rel=1e-5)
    torch.testing.assert_close(value.value - value.delta, torch.stack(outputs).mean(0), rtol=1e-4, atol=1e-4)


def test_only_the_first_contexts_are_descended_on(llama: EditableModel) -> None:
    request = rome(llama)
    first = EditRequest(name="first", contexts=request.contexts[:1], target=request.target)
    few = ValueSettings(steps=4, stop_loss=0.0, learning_rate=0.1, most_contexts=1)
    assert_alike(optimise_values(llama, [request], LAYER, few)[0], optimise_values(llama, [first], LAYER, FIXED)[0])


def test_a_preserved_prompt_whose_right_answer_is_not_the_models_is_left_out(llama: EditableModel) -> None:
    kept = rome(llama, preserve=True).preserve
    own = llama.generate([kept[0].prompt])[0].text
    right = replace(kept[0], answer=own.upper())
    wrong = replace(kept[1], answer="no such answer")

    def with_preserved(*preserve: Context) -> Value:
        request = EditRequest(name="a", contexts=rome(llama).contexts, target="Rome", preserve=preserve)
        return optimise_values(llama, [request], LAYER, FIXED)[0]

    assert_alike(with_preserved(right, wrong), with_preserved(kept[0]))
    assert with_preserved(right, wrong).kl > 0
    assert with_preserved(wrong).kl == 0


def test_a_request_that_cannot_converge_says_so_and_is_returned(model: EditableModel) -> None:
    easy = ValueSettings(steps=5, clamp=1e-4)
    value = optimise_values(model, [needle(model)], LAYER, easy)[0]
    assert not value.converged
    assert len(value.losses) == 6
    assert value.losses[-1] == pytest.approx(value.losses[0], rel=0.05)


def test_no_steps_return_no_change(model: EditableModel) -> None:
    value = optimise_values(model, [needle(model)], LAYER, ValueSettings(steps=0))[0]
    assert float(value.delta.norm()) == 0
    assert len(value.losses) == 1


def assert_alike(found: Value, expected: Value) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    torch.testing.assert_close(found.delta, expected.delta, rtol=1e-2, atol=1e-2 * float(expected.delta.norm()))


def test_requests_descend_together_as_each_alone(model: EditableModel) -> None:
    requests = [rome(model, preserve=True), needle(model)]
    together = optimise_values(model, requests, LAYER, FIXED)
    for request, value in zip(requests, together, strict=True):
        assert_alike(value, optimise_values(model, [request], LAYER, FIXED)[0])


@pytest.mark.parametrize("max_rows", [1, 2, 3])
def test_the_row_limit_changes_no_value(model: EditableModel, max_rows: int) -> None:
    requests = [rome(model, preserve=True), needle(model)]
    cut = ValueSettings(steps=4, stop_loss=0.0, learning_rate=0.1, max_rows=max_rows)
    for value, whole in zip(
        optimise_values(model, requests, LAYER, cut), optimise_values(model, requests, LAYER, FIXED), strict=True
    ):
        assert_alike(value, whole)


def several(model: EditableModel) -> list[EditRequest]:
    """Contexts and preserved prompts of one picture each, behind a text that makes it worth sharing."""
    long = "What is the capital of this country? " * 8
    found = []
    for seed in (1, 2):
        asked, *kept = (
            Context(prompt=question(model, long + text, seed), constraint=Constraint(text=span))
            for text, span in (
                ("The Needle is where?", "Needle"),
                ("Is Space there?", "Space"),
                ("Where was the Tower?", "Tower"),
            )
        )
        found.append(EditRequest(name=str(seed), contexts=(asked,), target="the capital of Rome", preserve=(*kept,)))
    return found


def test_values_of_prompts_that_share_a_picture_are_those_of_the_full_model(model: EditableModel) -> None:
    requests = several(model)
    for request, value in zip(requests, optimise_values(model, requests, LAYER, FIXED), strict=True):
        assert value.losses[0] == pytest.approx(target_loss(model, request, value.value - value.delta), rel=1e-5)
        assert value.losses[-1] == pytest.approx(target_loss(model, request, value.value), rel=1e-5)
        assert value.kl == pytest.approx(preserved_kl(model, request, value.value), rel=1e-3)


def test_values_that_memory_does_not_hold_together_descend_in_smaller_batches(model: EditableModel) -> None:
    requests = several(model)
    together = optimise_values(model, requests, LAYER, FIXED)
    for value, whole in zip(
        optimise_values(model, requests, LAYER, FIXED, memory=Memory(free=lambda: 4_000_000)), together, strict=True
    ):
        assert_alike(value, whole)
    with pytest.raises(MemoryLimitError, match="one row takes about"):
        optimise_values(model, requests, LAYER, FIXED, memory=Memory(free=lambda: 10_000))


def test_a_request_that_is_done_keeps_its_value_while_others_go_on(llava: EditableModel) -> None:
    easy = at_the_end(llava, "The capital of this country", "Rome")
    alone = optimise_values(llava, [easy], LAYER, GENEROUS)[0]
    both = optimise_values(llava, [needle(llava), easy], LAYER, GENEROUS)
    assert [v.converged for v in both] == [False, True]
    assert len(both[1].losses) < len(both[0].losses) == GENEROUS.steps + 1
    assert target_loss(llava, easy, both[1].value) < GENEROUS.stop_loss * 1.01
    assert_alike(both[1], alone)


@pytest.mark.parametrize("after", [0, 2])
def test_a_cancelled_descent_raises_and_changes_nothing(model: EditableModel, after: int) -> None:
    calls = iter(range(100))
    with pytest.raises(CancelledError, match="nothing was changed"):
        optimise_values(model, [rome(model)], LAYER, FIXED, cancelled=lambda: next(calls) >= after)


def test_progress_counts_the_steps(llama: EditableModel) -> None:
    steps: list[tuple[int, int]] = []
    optimise_values(llama, [rome(llama)], LAYER, FIXED, progress=lambda *s: steps.append(s))
    assert steps == [(i, FIXED.steps) for i in range(FIXED.steps + 1)]


def test_no_parameter_gathers_a_gradient(model: EditableModel) -> None:
    optimise_values(model, [rome(model)], LAYER, FIXED)
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())


def test_a_preserved_prompt_that_the_model_answers_with_nothing_is_left_out(gpt2: EditableModel) -> None:
    request = EditRequest(
        name="a",
        contexts=(context(gpt2),),
        target="Rome",
        preserve=(Context(prompt=Prompt(text="this"), constraint=Constraint(text="this")),),
    )
    value = optimise_values(gpt2, [request], LAYER, FIXED)[0]
    assert value.kl >= 0


def test_a_constraint_that_ends_the_prompt_is_optimised_where_the_answer_begins(llama: EditableModel) -> None:
    asked = Context(prompt=question(llama, "The capital of this country"), constraint=Constraint(text="country"))
    request = EditRequest(name="a", contexts=(asked,), target="Rome")
    value = optimise_values(llama, [request], LAYER, FIXED)[0]
    assert value.losses[-1] == pytest.approx(target_loss(llama, request, value.value), rel=1e-5)
