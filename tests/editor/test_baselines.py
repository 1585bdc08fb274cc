"""The trained baselines against training the weights themselves, and against PEFT (methods.md §6)."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import context, random_delta, tiny_model, weights_sha256
from torch import Tensor

from errata.editor.baselines import (
    BaselineResult,
    DescentSettings,
    FineTuneSettings,
    LoraSettings,
    WeightChange,
    fine_tune,
    fine_tune_lora,
)
from errata.editor.delta import Delta, applied, weight_of
from errata.editor.errors import CancelledError, InvalidInputError, LayerError, WrongBaseError
from errata.editor.evaluation import Metric, Probe, evaluate, same_answer
from errata.editor.model import EditableModel
from errata.editor.requests import EditRequest

# An untrained head bounds the logits: no answer of a tiny model is much likelier than exp(−0.2).
FAST = DescentSettings(steps=100, learning_rate=0.01, stop_loss=0.4)
FEW = DescentSettings(steps=4, learning_rate=0.02, stop_loss=0.0)
FT = FineTuneSettings(layers=(1, 2), descent=FEW)
LORA = LoraSettings(layers=(1, 2), descent=FEW)
ATTENTION = replace(LORA, attention=True)

Train = Callable[..., BaselineResult]
TRAINERS = {
    "FT": partial(fine_tune, settings=FT),
    "FT-L": partial(fine_tune, settings=replace(FT, bound=0.75)),
    "LoRA": partial(fine_tune_lora, settings=LORA),
    "LoRA with attention": partial(fine_tune_lora, settings=ATTENTION),
}


@pytest.fixture(params=TRAINERS)
def train(request: pytest.FixtureRequest) -> Train:
    """Each baseline in turn."""
    return TRAINERS[request.param]


def with_descent(train: Train, descent: DescentSettings) -> Train:
    """The same baseline with other settings of its descent; `train` takes but a few steps."""
    assert isinstance(train, partial)
    return partial(train.func, settings=replace(train.keywords["settings"], descent=descent))


def requests(model: EditableModel) -> list[EditRequest]:
    """Two facts, one of them asked in two ways, so that rows differ in length."""
    asked = context(model), context(model, "Name the capital city of this country!")
    other = context(model, "The Space Needle is in", "The Space Needle", seed=1)
    kept = context(model, "Is this country large?")
    return [
        EditRequest(name="capital", contexts=asked, target="Rome", preserve=(kept,)),
        EditRequest(name="tower", contexts=(other,), target="Paris"),
    ]


def answers(model: EditableModel) -> list[str]:
    return [a.text for a in model.generate([c.prompt for r in requests(model) for c in r.contexts])]


def logits(model: EditableModel) -> list[Tensor]:
    """Of the last position, for every context."""
    rows = [model.encode(c.prompt) for r in requests(model) for c in r.contexts]
    with torch.no_grad():
        return [model.model(**model.inputs([r]), use_cache=False).logits[0, -1] for r in rows]


def loss_by_hand(model: EditableModel) -> Tensor:
    """Mean over requests of the mean over contexts of −log p(target), one full pass a context."""
    total = torch.zeros(())
    for request in requests(model):
        for asked in request.contexts:
            row = model.encode(asked.prompt, request.target)
            log_p = model.model(**model.inputs([row]), use_cache=False).logits[0].log_softmax(-1)
            at = torch.arange(row.prompt_length, len(row.ids))
            total = total - log_p[at - 1, row.ids[at]].sum() / (2 * len(request.contexts))
    return total


def state_of(model: EditableModel) -> tuple[object, ...]:
    """Everything about a model that training could leave behind."""
    modules = [(n, id(m), m.training, len(m._forward_hooks)) for n, m in model.model.named_modules()]
    parameters = [(n, id(p), p.requires_grad, p.grad is None) for n, p in model.model.named_parameters()]
    return weights_sha256(model), modules, parameters, sorted(vars(model.model))


def test_a_baseline_lowers_the_loss_and_makes_the_model_say_the_target(model: EditableModel, train: Train) -> None:
    targets = ["Rome", "Rome", "Paris"]
    assert not any(a.startswith(t) for a, t in zip(answers(model), targets, strict=True))
    result = with_descent(train, FAST)(model, requests(model))
    assert result.converged
    assert result.losses[-1] < FAST.stop_loss < result.losses[0]
    assert result.steps == len(result.losses) - 1 < FAST.steps
    with result.applied(model):
        said = answers(model)
    # A model without a chat template is not taught where to stop.
    ends = model.tokenizer is not model.processor
    assert all(same_answer(a, t) if ends else a.startswith(t) for a, t in zip(said, targets, strict=True)), said


def test_the_model_is_bit_identical_after_success(model: EditableModel, train: Train) -> None:
    before, random = state_of(model), torch.random.get_rng_state()
    result = train(model, requests(model))
    assert state_of(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    with result.applied(model):
        pass
    assert state_of(model) == before


def test_the_model_is_bit_identical_after_a_cancellation(model: EditableModel, train: Train) -> None:
    before, steps = state_of(model), []
    with pytest.raises(CancelledError):
        train(model, requests(model), progress=lambda step, _: steps.append(step), cancelled=lambda: len(steps) == 3)
    assert steps == [0, 1, 2]
    assert state_of(model) == before


def test_the_model_is_bit_identical_after_a_failure(model: EditableModel, train: Train) -> None:
    def fail(step: int, _steps: int) -> None:
        if step == 2:
            raise RuntimeError("the caller's fault")

    before = state_of(model)
    with pytest.raises(RuntimeError, match="the caller's fault"):
        train(model, requests(model), progress=fail)
    assert state_of(model) == before
    result = train(model, requests(model))
    with pytest.raises(RuntimeError, match="the caller's fault"), result.applied(model):
        fail(2, 0)
    assert state_of(model) == before


def test_a_failure_halfway_through_wrapping_leaves_no_layer_wrapped(
    llama: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(base: torch.nn.Module, *_: object) -> None:
        base.get_submodule("model.layers.1.mlp").down_proj = torch.nn.Identity()
        raise MemoryError

    before = state_of(llama)
    monkeypatch.setattr("peft.LoraModel", half)
    with pytest.raises(MemoryError):
        fine_tune_lora(llama, requests(llama), LORA)
    assert state_of(llama) == before


def test_weights_that_took_gradients_still_do_and_hold_none(train: Train) -> None:
    model = tiny_model("llama")
    model.model.requires_grad_(True)
    before = state_of(model)
    train(model, requests(model))
    assert state_of(model) == before


def test_a_callers_no_grad_does_not_stop_the_training(llama: EditableModel, train: Train) -> None:
    with torch.no_grad():
        losses = train(llama, requests(llama)).losses
    assert losses[-1] < losses[0]


def test_fine_tuning_is_adam_on_the_weights_themselves(model: EditableModel) -> None:
    result = fine_tune(model, requests(model), FT)
    twin = replace(model, model=copy.deepcopy(model.model))
    weights = [weight_of(twin, i).requires_grad_() for i in (1, 2)]
    optimizer = torch.optim.Adam(weights, lr=FEW.learning_rate)
    for step in range(FEW.steps):
        loss = loss_by_hand(twin)
        assert float(loss.detach()) == pytest.approx(result.losses[step], rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with result.applied(model):
        for i, trained in zip((1, 2), weights, strict=True):
            # Adam divides by a gradient's size: where that is nothing but rounding, so is its sign.
            wrong = ((weight_of(model, i) - trained).abs() > 1e-3).float().mean()
            assert wrong < 0.01
        assert float(loss_by_hand(model)) == pytest.approx(result.losses[-1], rel=1e-4)


@pytest.mark.parametrize("bound", [0.05, 0.5])
def test_ft_l_stays_within_its_bound_of_the_mean_weight(model: EditableModel, bound: float) -> None:
    result = fine_tune(model, requests(model), replace(FT, bound=bound, descent=replace(FEW, steps=10)))
    for i in FT.layers:
        before = weight_of(model, i).detach().clone()
        limit = bound * float(before.abs().mean())
        with result.applied(model):
            change = float((weight_of(model, i) - before).abs().max())
        # Up to the rounding of W + ΔW.
        assert change == pytest.approx(limit, rel=1e-4), "the bound is met where it binds"
        assert isinstance(result.change, WeightChange)
        assert float(result.change.weights[model.down_projection_name(i)].abs().max()) <= limit * (1 + 1e-6)


def test_a_tight_bound_costs_the_target(llama: EditableModel) -> None:
    tight = fine_tune(llama, requests(llama), replace(FT, bound=1e-4, descent=replace(FAST, steps=20)))
    assert not tight.converged
    assert tight.unconverged == ("capital", "tower")
    assert tight.steps == 20


def test_the_change_of_fine_tuning_is_dense_and_in_the_shape_of_deltas(model: EditableModel) -> None:
    result = fine_tune(model, requests(model), FT)
    assert isinstance(result.change, WeightChange)
    assert {p: tuple(w.shape) for p, w in result.change.weights.items()} == {
        model.down_projection_name(i): (32, 48) for i in (1, 2)
    }
    assert result.nbytes == 2 * 32 * 48 * 4


def test_a_lora_delta_answers_as_peft_did(model: EditableModel, tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []
    result = fine_tune_lora(model, requests(model), LORA, progress=lambda *_: seen.append(logits(model)))
    assert isinstance(result.change, Delta)
    assert result.change.ranks == {1: 8, 2: 8}
    untrained = logits(model)
    with result.applied(model):
        ours = logits(model)
    for peft, own, before in zip(seen[-1], ours, untrained, strict=True):
        assert torch.allclose(own, peft, atol=1e-5)
        assert (own - before).abs().max() > 0.1
    result.change.save(tmp_path)
    twin = replace(model, model=PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path))
    for peft, own in zip(logits(twin), ours, strict=True):
        assert torch.allclose(own, peft, atol=1e-5)


def test_lora_on_attention_answers_as_peft_did(model: EditableModel) -> None:
    seen: list[list[Tensor]] = []
    result = fine_tune_lora(model, requests(model), ATTENTION, progress=lambda *_: seen.append(logits(model)))
    assert isinstance(result.change, WeightChange)
    names = {path.rsplit(".", 1)[1] for path in result.change.weights}
    assert names == (
        {"c_attn", "c_proj"} if names & {"c_proj"} else {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    )
    with result.applied(model):
        for peft, own in zip(seen[-1], logits(model), strict=True):
            assert torch.allclose(own, peft, atol=1e-4)


def test_while_lora_trains_the_model_is_wrapped_and_afterwards_not(model: EditableModel) -> None:
    def wrapped() -> int:
        return sum(isinstance(m, BaseTunerLayer) for m in model.model.modules())

    during: list[int] = []
    fine_tune_lora(model, requests(model), LORA, progress=lambda *_: during.append(wrapped()))
    assert set(during) == {2}
    assert wrapped() == 0
    assert "peft_config" not in vars(model.model)


def test_a_seed_draws_loras_factors(llama: EditableModel) -> None:
    def sha(seed: int) -> str:
        change = fine_tune_lora(llama, requests(llama), replace(LORA, seed=seed)).change
        assert isinstance(change, Delta)
        return change.sha256

    assert sha(0) == sha(0) != sha(1)


def test_a_baseline_trains_on_its_parent(model: EditableModel, train: Train) -> None:
    parent = random_delta(model, {1: 2, 3: 1})
    with applied(model, parent):
        there, said = float(loss_by_hand(model).detach()), answers(model)
    result = train(model, requests(model), parent=parent)
    assert said != answers(model), "the parent changes the answers"
    assert result.losses[0] == pytest.approx(there, rel=1e-4)
    with applied(model, parent), result.applied(model):
        assert float(loss_by_hand(model).detach()) == pytest.approx(result.losses[-1], rel=1e-3)


def test_a_parent_of_another_base_is_refused(llama: EditableModel, train: Train) -> None:
    parent = random_delta(tiny_model("llama", seed=1), {1: 1})
    with pytest.raises(WrongBaseError):
        train(llama, requests(llama), parent=parent)


def test_a_change_is_refused_by_another_base(llama: EditableModel, train: Train) -> None:
    result, other = train(llama, requests(llama)), tiny_model("llama", seed=1)
    before = state_of(other)
    with pytest.raises(WrongBaseError), result.applied(other):
        pass
    assert state_of(other) == before


@pytest.mark.slow
def test_preservation_keeps_what_plain_training_loses(llama: EditableModel, train: Train) -> None:
    plain = DescentSettings(steps=40, learning_rate=0.01, stop_loss=0.0)
    kept = requests(llama)[0].preserve[0]
    probes = [Probe(metric=Metric.SAME_IMAGE, prompt=kept.prompt)]

    def trained(descent: DescentSettings) -> tuple[BaselineResult, float]:
        result = with_descent(train, descent)(llama, requests(llama))
        return result, evaluate(llama, probes, result.applied(llama), reference=[kept.prompt]).drift

    unfair, drift = trained(plain)
    fair, less = trained(replace(plain, preserve_weight=1.0))
    assert unfair.kl == 0.0
    assert 0.0 < fair.kl < 0.3
    assert fair.losses[-1] < 0.5
    assert less < drift / 5


def test_preserved_answers_are_those_of_the_parent(llama: EditableModel) -> None:
    still = replace(FT, descent=DescentSettings(steps=0, preserve_weight=1.0))
    result = fine_tune(llama, requests(llama), still, parent=random_delta(llama, {1: 2}))
    assert result.kl == pytest.approx(0.0, abs=1e-6)
    assert result.steps == 0


def test_the_batch_size_does_not_change_what_is_learnt(model: EditableModel) -> None:
    def curve(rows: int) -> tuple[float, ...]:
        descent = replace(FEW, preserve_weight=0.5, max_rows=rows)
        return fine_tune(model, requests(model), replace(FT, descent=descent)).losses

    assert curve(1) == pytest.approx(curve(64), rel=1e-3)


def test_folds_take_a_requests_contexts_in_turn(llama: EditableModel) -> None:
    [capital, _] = requests(llama)
    still = DescentSettings(steps=3, learning_rate=1e-12, stop_loss=0.0)

    def losses(asked: EditRequest, folds: int) -> tuple[float, ...]:
        return fine_tune(llama, [asked], replace(FT, descent=replace(still, folds=folds))).losses

    alone = [losses(replace(capital, contexts=(c,)), folds=1)[0] for c in capital.contexts]
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)
    assert losses(capital, folds=2) == pytest.approx((*alone, *alone), rel=1e-4)
    assert losses(capital, folds=1) == pytest.approx((sum(alone) / 2,) * 4, rel=1e-4)


def test_a_descent_in_folds_ends_only_when_each_of_them_is_done(llama: EditableModel) -> None:
    asked = requests(llama)
    easy = loss_by_hand(llama).item() + 100.0
    result = fine_tune(llama, asked, replace(FT, descent=replace(FEW, steps=10, folds=3, stop_loss=easy)))
    assert result.steps == 2
    assert result.unconverged == ()


def test_a_baseline_is_judged_like_an_edit(llava: EditableModel, train: Train) -> None:
    asked = requests(llava)
    probes = [
        Probe(metric=Metric.EFFICACY, prompt=r.contexts[0].prompt, expected=r.target, request=r.name) for r in asked
    ]
    evaluation = evaluate(llava, probes, with_descent(train, FAST)(llava, asked).applied(llava))
    assert evaluation.score(Metric.EFFICACY).before == 0
    assert evaluation.score(Metric.EFFICACY).after == 1


@pytest.mark.parametrize("layers", [(), (1, 1)])
def test_layers_are_given_once_each(llama: EditableModel, layers: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="once each"):
        fine_tune(llama, requests(llama), FineTuneSettings(layers=layers))


def test_a_layer_that_does_not_exist_is_refused(llama: EditableModel) -> None:
    with pytest.raises(LayerError):
        fine_tune_lora(llama, requests(llama), LoraSettings(layers=(4,)))


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="bound"):
        FineTuneSettings(layers=(1,), bound=0.0)
    with pytest.raises(InvalidInputError, match="rank"):
        LoraSettings(layers=(1,), rank=0)
