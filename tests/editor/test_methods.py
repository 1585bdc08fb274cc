"""Whole edits on tiny models: installed, refused or failed, and the model left as it was (methods.md §5).

An untrained model attends to nothing in particular, so what stands in the middle of a prompt cannot steer its answer:
the constraints here end their prompts.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import picture, random_delta, tiny_model

from errata.editor.checkpoints import hash_tensors
from errata.editor.delta import Delta, applied, empty_delta, merged
from errata.editor.earlier import Earlier, EarlierRequest
from errata.editor.errors import (
    CancelledError,
    ConflictingRequestsError,
    IllConditionedError,
    InvalidInputError,
    LayerError,
    NoCausalSiteError,
    NoOpEditError,
    TargetError,
    WrongBaseError,
)
from errata.editor.methods import (
    HOLDING,
    EditResult,
    EditSettings,
    Keys,
    Method,
    Stage,
    edit,
    solve_layer,
)
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.recording import record
from errata.editor.requests import Context, EditRequest
from errata.editor.solver import HeldKeys, InverseCovariance
from errata.editor.statistics import KeyStatistics, key_statistics
from errata.editor.values import ValueSettings

GENEROUS = ValueSettings(steps=60, clamp=12.0, learning_rate=0.2, stop_loss=0.5)
NEEDS_STATISTICS = [m for m in Method if m is not Method.MULTEDIT]


def asked(model: EditableModel, text: str, span: str, seed: int = 0) -> Context:
    images = () if model.image_token_id is None else (picture(seed),)
    return Context(prompt=Prompt(text=text, images=images, chat=False), constraint=Constraint(text=span))


def rome(model: EditableModel, target: str = "Rome") -> EditRequest:
    return EditRequest(name="rome", contexts=(asked(model, "The capital of this country", "country"),), target=target)


def paris(model: EditableModel) -> EditRequest:
    return EditRequest(name="paris", contexts=(asked(model, "Where is the Space Needle", "Needle", 1),), target="Paris")


@cache
def _statistics(family: str) -> KeyStatistics:
    model = tiny_model(family)
    texts = (
        "What is this?",
        "Is it the capital?",
        "Which country is in Rome?",
        "A needle.",
        "0 1 2 3 4 5 6 7 8 9",
        "Why?",
    )
    prompts = [asked(model, t + " " + w, t, s).prompt for s, t in enumerate(texts) for w in ("a", "zq jk", "XY")]
    return key_statistics(model, prompts, range(4))


def statistics_of(model: EditableModel) -> KeyStatistics:
    return _statistics(model.name.removeprefix("tiny-"))


def settings_of(method: Method, layers: tuple[int, ...] = (1,), **own: object) -> EditSettings:
    return EditSettings(
        layers=layers, method=method, values=GENEROUS, preservation=0.01, null_energy=0.3, ridge=1e-4, **own
    )


def answered(model: EditableModel, request: EditRequest) -> bool:
    """Whether the model, generating by itself, begins with the target in every context."""
    target = model.encode(request.contexts[0].prompt, request.target).answer.tolist()
    answers = model.generate([c.prompt for c in request.contexts], max_new_tokens=len(target))
    return all(list(a.tokens) == target for a in answers)


def run(model: EditableModel, method: Method, *requests: EditRequest, layers: tuple[int, ...] = (1,)) -> EditResult:
    return edit(model, requests, settings_of(method, layers), statistics_of(model))


@pytest.mark.parametrize("method", list(Method))
def test_every_method_installs_its_targets(model: EditableModel, method: Method) -> None:
    requests = rome(model), paris(model)
    assert not any(answered(model, r) for r in requests)
    result = run(model, method, *requests)
    for way in (applied, merged):
        with way(model, result.delta):
            assert all(answered(model, r) for r in requests)
    assert not any(answered(model, r) for r in requests)
    assert result.delta.ranks == {1: 2}
    assert result.unconverged == ()
    assert [(o.name, o.target, o.before) for o in result.outcomes] == [
        (r.name, r.target, model.generate([r.contexts[0].prompt])[0].text) for r in requests
    ]


@pytest.mark.parametrize("method", [Method.MEMIT, Method.EMMET, Method.ALPHAEDIT])
def test_an_edit_spread_over_layers_installs_its_target(model: EditableModel, method: Method) -> None:
    result = run(model, method, rome(model), layers=(0, 1, 2))
    assert result.delta.ranks == {0: 1, 1: 1, 2: 1}
    with applied(model, result.delta):
        assert answered(model, rome(model))


@pytest.mark.parametrize(("method", "layers"), [(Method.ROME, (1,)), (Method.EMMET, (1,)), (Method.EMMET, (0, 1, 2))])
def test_without_ridge_the_residual_stream_becomes_what_the_value_asked_for(
    model: EditableModel, method: Method, layers: tuple[int, ...]
) -> None:
    """The equality constraint (ROME eq. 2, EMMET eq. 12), spread as in MEMIT §4.3: W's output moves by δ."""
    request = rome(model)
    exact = EditSettings(layers=layers, method=method, values=GENEROUS)
    result = edit(model, [request], exact, statistics_of(model))
    row = model.encode(request.contexts[0].prompt)
    at = model.constraint_positions(request.contexts[0].prompt, request.contexts[0].constraint)[-1]
    before = oracle.outputs(model, row, ["layer"])["layer", layers[-1]][at]
    with applied(model, result.delta):
        after = oracle.outputs(model, row, ["layer"])["layer", layers[-1]][at]
    torch.testing.assert_close(
        after, before + result.outcomes[0].value.delta, rtol=1e-3, atol=1e-3 * float(before.norm())
    )


def test_requests_of_rome_see_those_before_them(model: EditableModel) -> None:
    """One after the other, each on top of the last: the second leaves the first in place."""
    one = rome(model)
    other = EditRequest(
        name="other", contexts=(asked(model, "The capital of that country", "that country"),), target="Paris"
    )
    result = run(model, Method.ROME, one, other)
    with applied(model, result.delta):
        assert answered(model, other)
    assert result.delta.ranks == {1: 2}


@pytest.mark.parametrize("keys", list(Keys))
def test_contexts_of_one_request_are_one_key_or_one_each(llama: EditableModel, keys: Keys) -> None:
    contexts = (
        asked(llama, "The capital of this country", "country"),
        asked(llama, "The capital in this country", "country"),
    )
    request = EditRequest(name="a", contexts=contexts, target="Rome")
    result = edit(llama, [request], settings_of(Method.EMMET, keys=keys), statistics_of(llama))
    assert result.delta.ranks == {1: 1 if keys is Keys.MEAN else 2}
    with applied(llama, result.delta):
        assert answered(llama, request)


def test_multedit_needs_no_statistics_and_the_others_say_how_to_get_them(model: EditableModel) -> None:
    assert edit(model, [rome(model)], settings_of(Method.MULTEDIT)).delta.ranks == {1: 1}
    for method in NEEDS_STATISTICS:
        with pytest.raises(
            InvalidInputError, match=r"needs key statistics of the layers \[1\].*key_statistics"
        ) as caught:
            edit(model, [rome(model)], settings_of(method))
        assert caught.value.field == "statistics"


def test_statistics_of_other_layers_do_not_do(llama: EditableModel) -> None:
    whole = statistics_of(llama)
    partial = replace(whole, everywhere={1: whole.everywhere[1]}, sites={1: whole.sites[1]})
    with pytest.raises(InvalidInputError, match=r"of the layers \[2\]"):
        edit(llama, [rome(llama)], settings_of(Method.MEMIT, (1, 2)), partial)


@pytest.mark.parametrize("layers", [(4,), (-1,), (1, 9)])
def test_a_layer_out_of_range_is_refused(model: EditableModel, layers: tuple[int, ...]) -> None:
    with pytest.raises(LayerError, match="4 layers are counted from 0"):
        run(model, Method.MULTEDIT, rome(model), layers=layers)


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1)])
def test_layers_are_given_once_each_in_rising_order(model: EditableModel, layers: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="rising order") as caught:
        run(model, Method.MULTEDIT, rome(model), layers=layers)
    assert caught.value.field == "layers"


def test_an_empty_batch_is_refused(llama: EditableModel) -> None:
    with pytest.raises(InvalidInputError, match="no edit request"):
        run(llama, Method.MULTEDIT)


def test_an_edit_to_what_the_model_already_answers_is_refused() -> None:
    model = tiny_model("llama")
    head = model.model.get_output_embeddings()
    rome_token = model.tokenizer.encode(" Rome", add_special_tokens=False)[0]
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
    head.bias[rome_token] = 1e4
    own = model.generate([rome(model).contexts[0].prompt])[0].text
    assert own.startswith("Rome")
    with pytest.raises(NoOpEditError, match="already answers") as caught:
        run(model, Method.MULTEDIT, rome(model, target=own.upper() + "."))
    assert caught.value.field == "requests[0].target"


def test_one_key_with_two_targets_is_refused_with_both_names(model: EditableModel) -> None:
    other = EditRequest(name="other", contexts=rome(model).contexts, target="Paris")
    for method in Method:
        with pytest.raises(ConflictingRequestsError, match="'rome' and 'other' have the same key at layer 1") as caught:
            run(model, method, rome(model), other)
        assert caught.value.field == "requests[1].target"


def test_texts_that_agree_up_to_the_constraint_conflict_whatever_follows_it(gpt2: EditableModel) -> None:
    """A key knows nothing of what stands after it: the attribute has to come first."""
    first = EditRequest(name="capital", contexts=(asked(gpt2, "This country: capital", "country"),), target="Rome")
    second = EditRequest(name="currency", contexts=(asked(gpt2, "This country: currency", "country"),), target="Paris")
    with pytest.raises(ConflictingRequestsError, match="attribute before the constraint"):
        run(gpt2, Method.MULTEDIT, first, second)


def test_a_failed_solve_leaves_the_weights_bit_identical(model: EditableModel) -> None:
    """The fixture compares them. Two contexts that are one have one key: without ridge there is no solution."""
    twice = EditRequest(name="twice", contexts=rome(model).contexts * 2, target="Rome")
    exact = EditSettings(layers=(1,), method=Method.EMMET, values=ValueSettings(steps=2))
    with pytest.raises(IllConditionedError):
        edit(model, [twice], exact, statistics_of(model))
    assert run(model, Method.MULTEDIT, twice).delta.ranks == {1: 1}


@pytest.mark.parametrize("after", [0, 3])
def test_a_cancelled_edit_leaves_the_weights_bit_identical(model: EditableModel, after: int) -> None:
    calls = iter(range(100))
    with pytest.raises(CancelledError):
        edit(model, [rome(model)], settings_of(Method.MULTEDIT), cancelled=lambda: next(calls) >= after)


def test_a_request_that_does_not_converge_is_named(model: EditableModel) -> None:
    weak = EditSettings(layers=(1,), method=Method.MULTEDIT, values=ValueSettings(steps=2, clamp=1e-3))
    result = edit(model, [rome(model), paris(model)], weak)
    assert result.unconverged == ("rome", "paris")


@pytest.fixture
def parent(model: EditableModel) -> Delta:
    return run(model, Method.MULTEDIT, rome(model)).delta


def test_an_edit_on_a_parent_starts_from_what_the_parent_answers(model: EditableModel, parent: Delta) -> None:
    with applied(model, parent):
        present = model.generate([rome(model).contexts[0].prompt])[0].text
    result = edit(model, [rome(model, target="Paris")], settings_of(Method.MULTEDIT), parent=parent)
    assert result.outcomes[0].before == present
    with applied(model, parent, result.delta):
        assert answered(model, rome(model, target="Paris"))
    with pytest.raises(NoOpEditError):
        edit(model, [rome(model, target=present)], settings_of(Method.MULTEDIT), parent=parent)


def test_a_child_is_added_to_its_parent(model: EditableModel, parent: Delta) -> None:
    child = edit(model, [paris(model)], settings_of(Method.MULTEDIT), parent=parent).delta
    assert child.ranks == {1: 1}
    whole = (parent + child).compressed()
    assert whole.ranks == {1: 2}
    with applied(model, whole):
        assert answered(model, paris(model))
    with applied(model, (whole - child).compressed()):
        assert answered(model, rome(model))


def test_an_edit_on_an_empty_parent_is_an_edit_on_the_base(llama: EditableModel) -> None:
    alone = run(llama, Method.MULTEDIT, rome(llama)).delta
    child = edit(llama, [rome(llama)], settings_of(Method.MULTEDIT), parent=empty_delta(llama)).delta
    torch.testing.assert_close(child.layers[1].dense(), alone.layers[1].dense(), rtol=1e-4, atol=1e-5)


def test_an_edit_that_would_install_nothing_is_refused(model: EditableModel) -> None:
    still = replace(settings_of(Method.MULTEDIT), values=replace(GENEROUS, steps=0))
    with pytest.raises(NoCausalSiteError, match="choose earlier layers"):
        edit(model, [rome(model)], still)


@pytest.mark.parametrize("method", [Method.MEMIT, Method.ALPHAEDIT])
def test_what_earlier_edits_installed_is_held(model: EditableModel, method: Method) -> None:
    first = run(model, method, rome(model)).delta

    def disturbed(*earlier: EditRequest) -> float:
        """How far the second edit changes what stands at the first one's key, relative to its own size."""
        settings, statistics = settings_of(method), statistics_of(model)
        second = edit(
            model, [paris(model)], settings, statistics, parent=first, earlier=Earlier.of(earlier)
        ).delta.layers[1]
        with applied(model, first), torch.no_grad():
            row, site = model.encode_at(rome(model).contexts[0], field="context")
            key = record(model, [row], [site], key_layers=(1,), resumable=False)[0].keys[1][0].double()
        dense = second.dense()
        return float((dense @ key).norm() / dense.norm())

    assert disturbed(rome(model)) < 0.6 * disturbed()


@pytest.mark.parametrize("ridge", [None, 0.5, 20.0])
def test_a_ridge_makes_memit_hold_earlier_keys_no_harder_than_it_installs_new_ones(
    llama: EditableModel, ridge: float | None
) -> None:
    """ΔW = RKᵀ(λG₀ + K₁K₁ᵀ + KKᵀ)⁻¹, whatever λ is."""
    random = torch.Generator().manual_seed(0)
    settings, statistics, held = replace(settings_of(Method.MEMIT), ridge=ridge), statistics_of(llama), HeldKeys()
    metric = InverseCovariance(statistics.covariance(1), weight=settings.preservation)
    m = len(metric.covariance)
    key, old = (torch.randn(m, 1, generator=random, dtype=torch.float64) for _ in range(2))
    residual = torch.randn(4, 1, generator=random, dtype=torch.float64)
    held.add(old)
    found = solve_layer([key], [residual], settings, metric, held).dense().double()
    weight = 1 + (ridge or 0) * float(key.T @ metric.times(key))
    expected = residual @ key.T @ torch.linalg.inv(weight * metric.inverse() + old @ old.T + key @ key.T)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.norm()))


@pytest.mark.parametrize("parent_layer", [0, 1])
@pytest.mark.parametrize("layers", [(1,), (1, 2)])
def test_an_edit_that_reads_kept_keys_is_the_edit_that_computes_them(
    llama: EditableModel, tmp_path: Path, layers: tuple[int, ...], parent_layer: int
) -> None:
    """Only keys that no edit changes are kept: those at the first layer, where the parent edits nothing below it."""
    parent, settings = random_delta(llama, {parent_layer: 2}), settings_of(Method.MEMIT, layers)

    def held(folder: Path | None) -> str:
        earlier = Earlier.of([rome(llama)], folder)
        return edit(llama, [paris(llama)], settings, statistics_of(llama), parent=parent, earlier=earlier).delta.sha256

    fresh = held(None)
    assert held(tmp_path) == held(tmp_path) == fresh
    assert len(list(tmp_path.iterdir())) == (parent_layer == 1)
    for file in tmp_path.iterdir():
        other = load_file(file)["keys"].flip(1)
        save_file({"keys": other}, file, {"sha256": hash_tensors([("keys", other)])})
        assert held(tmp_path) != fresh


@pytest.mark.parametrize("method", [m for m in Method if m not in HOLDING])
def test_a_method_that_holds_nothing_does_not_look_at_what_was_edited(llama: EditableModel, method: Method) -> None:
    def fail() -> tuple[Context, ...]:
        raise AssertionError("these contexts are not needed")

    earlier = Earlier(requests=(EarlierRequest(name="rome", subjects=frozenset(), contexts=fail),))
    edit(llama, [paris(llama)], settings_of(method), statistics_of(llama), earlier=earlier)


@pytest.mark.parametrize(
    ("text", "subject"), [("Where is this country", "Italy"), ("The capital of this country", None)]
)
def test_an_edit_is_not_held_back_by_what_it_replaces(
    model: EditableModel, parent: Delta, text: str, subject: str | None
) -> None:
    """Known by its subject, or by its key."""
    new, old = (
        EditRequest(name="italy", contexts=(replace(asked(model, t, "country"), subject=subject),), target=target)
        for t, target in (("The capital of this country", "Paris"), (text, "Rome"))
    )
    settings, statistics = settings_of(Method.MEMIT), statistics_of(model)
    free = edit(model, [new], settings, statistics, parent=parent)
    held = edit(model, [new], settings, statistics, parent=parent, earlier=Earlier.of([old]))
    assert held.delta.sha256 == free.delta.sha256
    other = EditRequest(name="other", contexts=(asked(model, "Where is the number", "number"),), target="Rome")
    both = edit(model, [new], settings, statistics, parent=parent, earlier=Earlier.of([old, other]))
    assert (free.held, held.held, both.held) == (0, 0, 1)


def test_a_parent_of_another_base_is_refused(llama: EditableModel) -> None:
    with pytest.raises(WrongBaseError):
        edit(
            llama, [rome(llama)], settings_of(Method.MULTEDIT), parent=random_delta(tiny_model("llama", seed=1), {1: 1})
        )


def test_the_same_edit_twice_is_the_same_delta(model: EditableModel) -> None:
    one, two = (run(model, Method.MEMIT, rome(model), paris(model)).delta for _ in range(2))
    assert one.sha256 == two.sha256


def test_a_narrow_model_is_edited_too() -> None:
    model = tiny_model("llama")
    wide = statistics_of(model)
    model.model.to(torch.bfloat16)
    result = edit(model, [rome(model)], settings_of(Method.MEMIT), wide)
    with applied(model, result.delta):
        assert answered(model, rome(model))


def test_progress_is_told(llama: EditableModel) -> None:
    told: list[tuple[Stage, int, int]] = []
    edit(llama, [rome(llama)], settings_of(Method.MULTEDIT), progress=lambda *t: told.append(t))
    values = [done for stage, done, total in told if (stage, total) == (Stage.VALUES, 60)]
    solved = [done for stage, done, total in told if (stage, total) == (Stage.SOLVE, 1)]
    assert values[0] == 0
    assert values == sorted(values)
    assert solved == [0, 1]
    assert told == sorted(told, key=lambda t: t[0] is Stage.SOLVE)


@pytest.mark.parametrize(("method", "solves"), [(Method.MEMIT, 2), (Method.ROME, 4)])
def test_each_layer_that_is_solved_is_a_step_and_rome_solves_each_request(
    llama: EditableModel, method: Method, solves: int
) -> None:
    told: list[tuple[Stage, int, int]] = []
    two = [rome(llama), paris(llama)]
    edit(llama, two, settings_of(method, layers=(0, 1)), statistics_of(llama), progress=lambda *t: told.append(t))
    assert [t[1:] for t in told if t[0] is Stage.SOLVE] == [(n, solves) for n in range(solves + 1)]


def test_holding_an_earlier_request_is_a_step_at_each_layer_and_can_be_cancelled(llama: EditableModel) -> None:
    told: list[tuple[Stage, int, int]] = []
    earlier, settings = Earlier.of([rome(llama)] * 3), settings_of(Method.MEMIT, layers=(0, 1))

    def held(**own: Callable[..., object]) -> None:
        edit(llama, [paris(llama)], settings, statistics_of(llama), earlier=earlier, **own)

    held(progress=lambda *t: told.append(t))
    assert [t[1:] for t in told if t[0] is Stage.SOLVE] == [(n, 8) for n in range(9)]
    told.clear()
    with pytest.raises(CancelledError, match="nothing was changed"):
        held(progress=lambda *t: told.append(t), cancelled=lambda: bool(told) and told[-1][:2] == (Stage.SOLVE, 2))
    assert told[-1][:2] == (Stage.SOLVE, 2)


@pytest.mark.parametrize("target", ["<image>", "a <image> b"])
def test_a_target_with_an_image_in_it_is_refused(llava: EditableModel, target: str) -> None:
    with pytest.raises(TargetError, match="cannot be written"):
        run(llava, Method.MULTEDIT, rome(llava, target=target))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (lambda: EditSettings(layers=(1,), ridge=-1.0), "ridge"),
        (lambda: EditSettings(layers=(1,), preservation=float("nan")), "preservation"),
        (lambda: ValueSettings(learning_rate=0.0), "learning_rate"),
        (lambda: ValueSettings(max_rows=0), "max_rows"),
        (lambda: ValueSettings(clamp=-1.0), "clamp"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidInputError, match="; give") as caught:
        settings()
    assert caught.value.field == field
