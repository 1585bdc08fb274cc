"""Edits at every layer beside the causal trace, against edits made and judged plainly (methods.md §2, §5, §6).

As in test_methods: the constraints end their prompts, since an untrained model attends to nothing in particular.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import oracle
import pytest
import torch
from tiny import picture, tiny_model
from torch import Tensor

from errata.editor.delta import applied
from errata.editor.errors import CancelledError, InvalidInputError, LayerError
from errata.editor.evaluation import Metric, Probe, evaluate
from errata.editor.measurements.sweep import SweepRequest, measure_sweep
from errata.editor.measurements.swept import SweepResult, SweepSettings
from errata.editor.methods import Keys, Method, edit
from errata.editor.model import EditableModel, same_answer
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.states import Component
from errata.editor.statistics import KeyStatistics, key_statistics
from errata.editor.trace import AveragedTrace, Substitution, TraceRequest, TraceSettings, average, trace

TEXTS = ("The capital of this country", "The capital in this country", "Where is the Space Needle", "Is it this Rome")
SPANS = ("country", "country", "Needle", "Rome")
SETTINGS = SweepSettings(
    method=Method.MULTEDIT, ridge=1e-4, steps=40, clamp=12.0, stop_loss=0.5, max_new_tokens=1, most_contexts=2
)


def asked(model: EditableModel, n: int, seed: int = 0) -> Context:
    images = () if model.image_token_id is None else (picture(seed),)
    return Context(
        prompt=Prompt(text=TEXTS[n], images=images, chat=False), constraint=Constraint(text=SPANS[n]), subject=str(n)
    )


def requests(model: EditableModel) -> list[SweepRequest]:
    """Two requests, one of two contexts. "Rome" is one fact's probe of specificity and the other's target."""
    made = (
        EditRequest(name="rome", contexts=(asked(model, 0), asked(model, 1, 1)), target="Rome"),
        EditRequest(name="paris", contexts=(asked(model, 2, 2),), target="Paris"),
    )
    return [
        SweepRequest(
            request=request,
            probes=(
                Probe(metric=Metric.EFFICACY, prompt=request.contexts[0].prompt, expected=request.target),
                Probe(metric=Metric.IMAGE_GENERALIZATION, prompt=asked(model, n, 5).prompt, expected=request.target),
                Probe(metric=Metric.OTHER_SUBJECTS, prompt=asked(model, 3, 3).prompt),
                Probe(metric=Metric.UNRELATED, prompt=asked(model, n + 1, 4).prompt),
                Probe(metric=Metric.SAME_IMAGE, prompt=asked(model, 3, 4).prompt, believed="never said"),
            ),
        )
        for n, request in zip((0, 2), made, strict=True)
    ]


@cache
def _traced(family: str) -> AveragedTrace:
    model = tiny_model(family)
    settings = TraceSettings(components=(Component.MLP,), min_total_effect=-1.0)
    return average([trace(model, r, settings) for r in traced(model)])


def traced(model: EditableModel) -> list[TraceRequest]:
    contexts = [asked(model, n, n) for n in range(4)]
    return [
        TraceRequest(prompt=c.prompt, constraint=c.constraint, corruption=Substitution(word="zq"), answer="Rome")
        for c in contexts
    ]


@cache
def _statistics(family: str) -> KeyStatistics:
    model = tiny_model(family)
    texts = ("What is this?", "Is it the capital?", "0 1 2 3 4 5 6 7 8 9", "XY zq jk", "A needle.", "Why Rome?")
    images = () if model.image_token_id is None else (picture(7),)
    prompts = [Prompt(text=f"{t} {w}", images=images, chat=False) for t in texts for w in ("a", "jk", "Paris")]
    return key_statistics(model, [*prompts, *(asked(model, n, 8) for n in range(4))], range(4))


def family(model: EditableModel) -> str:
    return model.name.removeprefix("tiny-")


def swept(model: EditableModel, settings: SweepSettings = SETTINGS, **own: object) -> SweepResult:
    given = own.pop("requests", None) or requests(model)
    return measure_sweep(
        model, given, settings, trace=_traced(family(model)), statistics=_statistics(family(model)), **own
    )


def test_effects_are_those_of_restoring_each_mlp_by_a_hook(model: EditableModel) -> None:
    """The indirect effect at the constraint's last token (§2), question by question."""
    found = swept(model, replace(SETTINGS, steps=1))
    for i, request in enumerate(traced(model)):
        row = model.encode(request.prompt, "Rome")
        span = row.positions(*request.constraint.span(request.prompt.text))
        ids = row.ids.clone()
        ids[span.start : span.stop] = model.tokenizer(" zq", add_special_tokens=False)["input_ids"][0]
        wrong = row.replaced(ids)
        clean = oracle.outputs(model, row, ["mlp"])
        base = float(oracle.answer_log_probabilities(model, wrong).sum().exp())
        effects = [oracle.restored(model, clean, wrong, ("mlp", (n,), span[-1]))[0] - base for n in range(4)]
        np.testing.assert_allclose(found.effects[i], effects, atol=1e-5)


def dense(model: EditableModel, request: EditRequest, layer: int, value: Tensor) -> Tensor:
    """ΔW = R (KᵀK + λI)⁻¹ Kᵀ (§5), from keys and outputs read by hooks; each context counts 1/√n."""
    keys, residuals = [], []
    for context in request.contexts:
        row, site = model.encode_at(context, field="context")
        keys.append(oracle.keys(model, row, layer)[site].double())
        residuals.append(value.double() - oracle.outputs(model, row, ["mlp"])["mlp", layer][site].double())
    k, r = (torch.stack(c, dim=1) / len(c) ** 0.5 for c in (keys, residuals))
    gram = k.T @ k
    ridge = 1e-4 * float(gram.diagonal().mean())
    return r @ torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=torch.float64)) @ k.T


def said(model: EditableModel, prompt: Prompt, layer: int, change: Tensor) -> str:
    """What the full model says, token by token, with ΔW k added to the down-projection's output by a hook."""
    row = model.encode(prompt)
    down, ids = oracle.down(model, layer), row.ids
    handle = down.register_forward_hook(lambda _m, args, out: out + (args[0].double() @ change.T).to(out.dtype))
    try:
        for _ in range(SETTINGS.max_new_tokens):
            next_id = oracle.logits(model, row.replaced(ids))[-1].argmax()
            ids = torch.cat([ids, next_id[None]])
    finally:
        handle.remove()
    told = ids[len(row.ids) :].tolist()
    end = told.index(model.end_token_id) if model.end_token_id in told else len(told)
    return str(model.tokenizer.decode(told[:end], skip_special_tokens=True)).strip()


def test_shares_are_what_single_edits_hooked_into_the_full_model_generate(model: EditableModel) -> None:
    """Efficacy, generalization, specificity (§6): each request alone, at each layer, before against after."""
    given = requests(model)
    layers = (0, 2)
    found = swept(model, replace(SETTINGS, layers=layers))
    kept = ("efficacy", "image generalization", "specificity: other subjects", "specificity: unrelated prompts")
    assert found.measures == (*kept, "generalization", "specificity")  # "never said" is not counted
    for i, one in enumerate(given):
        before = [a.text for a in model.generate([p.prompt for p in one.probes], max_new_tokens=1)]
        for at, layer in enumerate(layers):
            outcome = edit(model, [one.request], SETTINGS.edit_at((layer,))).outcomes[0]
            change = dense(model, one.request, layer, outcome.value.value)
            passed = [
                same_answer(said(model, p.prompt, layer, change), b if p.expected is None else p.expected)
                for p, b in zip(one.probes[:4], before, strict=False)
            ]
            assert found.shares[:4, i, at].tolist() == passed
            assert found.shares[4:, i, at].tolist() == [passed[1], np.mean(passed[2:])]
            assert found.losses[i, at] == pytest.approx(outcome.value.losses[-1], rel=1e-3, abs=1e-3)
    assert 0 < found.shares.mean() < 1
    assert found.installed.all()


@pytest.mark.parametrize(
    ("method", "keys"), [(Method.MEMIT, Keys.EACH), (Method.ROME, Keys.EACH), (Method.ALPHAEDIT, Keys.MEAN)]
)
def test_every_method_edits_as_it_does_alone(llama: EditableModel, method: Method, keys: Keys) -> None:
    settings = replace(SETTINGS, method=method, keys=keys, layers=(0, 2), preservation=0.01, null_energy=0.3)
    found = swept(llama, settings)
    for i, one in enumerate(requests(llama)):
        for n, layer in enumerate((0, 2)):
            delta = edit(llama, [one.request], settings.edit_at((layer,)), _statistics("llama")).delta
            judged = evaluate(llama, one.probes, applied(llama, delta), max_new_tokens=1)
            assert found.shares[:4, i, n].tolist() == [r.passed for r in judged.results]


def test_together_all_requests_of_a_layer_are_one_batch(model: EditableModel) -> None:
    settings = replace(SETTINGS, together=True, layers=(1, 3))
    given = requests(model)
    found = swept(model, settings)
    for n, layer in enumerate((1, 3)):
        delta = edit(model, [r.request for r in given], settings.edit_at((layer,))).delta
        for i, one in enumerate(given):
            judged = evaluate(model, one.probes, applied(model, delta), max_new_tokens=1)
            assert found.shares[:4, i, n].tolist() == [r.passed for r in judged.results]


def test_how_many_are_worked_on_at_once_changes_nothing(llama: EditableModel) -> None:
    few = replace(SETTINGS, layers=(1,), steps=10)
    one, two = swept(llama, few), swept(llama, replace(few, at_once=1))
    np.testing.assert_array_equal(one.shares, two.shares)
    np.testing.assert_allclose(one.losses, two.losses, atol=1e-4)


def test_an_edit_that_installs_nothing_counts_as_failed_and_is_listed(model: EditableModel) -> None:
    # The mean of several contexts' outputs would change each of them even so.
    alone = [replace(r, request=replace(r.request, contexts=r.request.contexts[:1])) for r in requests(model)]
    found = swept(model, replace(SETTINGS, steps=0, layers=(1, 2)), requests=alone)
    assert not found.installed.any()
    assert found.mean("efficacy").tolist() == [0, 0]
    assert found.mean("specificity").tolist() == [1, 1]
    told = [f"layer {n}: 2 edits installed nothing (NO_CAUSAL_SITE), counted as failed: rome, paris" for n in (1, 2)]
    assert list(found.failed) == told
    assert [row[0] for row in found.findings().tables[1].rows][:2] == told
    assert found.skipped == ()
    batch = swept(model, replace(SETTINGS, steps=0, layers=(1,), together=True), requests=alone)
    assert list(batch.failed) == told[:1]


def test_a_target_that_is_answered_already_is_skipped(llama: EditableModel) -> None:
    one, two = requests(llama)
    present = llama.generate([one.request.contexts[0].prompt])[0].text
    known = replace(one, request=replace(one.request, target=present))
    found = swept(llama, requests=[known, two])
    assert found.requests == ("paris",)
    assert found.skipped == (f"requests[0]: the model already answers {present!r} to {TEXTS[0]!r}",)
    with pytest.raises(InvalidInputError, match="nothing to edit"):
        swept(llama, requests=[known])


def result(efficacy: list[list[float]], effects: list[list[float]]) -> SweepResult:
    n = len(efficacy)
    return SweepResult(
        settings=SweepSettings(),
        layers=tuple(range(len(effects[0]))),
        requests=tuple(map(str, range(n))),
        measures=("efficacy",),
        shares=np.array([efficacy], dtype=np.float64),
        losses=np.zeros((n, len(effects[0]))),
        installed=np.ones((n, len(effects[0])), dtype=np.bool_),
        effects=np.array(effects, dtype=np.float64),
        total_effect=0.9,
        window=1,
    )


def test_correlations_are_pearsons_and_spearmans_over_layers() -> None:
    found = result([[1, 1, 0, 1, 0], [1, 0, 0, 1, 0], [1, 1, 0, 0, 1]], [[0.5, 0.4, 0.2, 0.1, 0.0]] * 4)
    mean = [1, 2 / 3, 0, 2 / 3, 1 / 3]
    assert found.correlation("efficacy")[0] == pytest.approx(np.corrcoef(mean, found.aie)[0, 1])
    ranks = ([5, 3.5, 1, 3.5, 2], [5, 4, 3, 2, 1])
    value, low, high = found.correlation("efficacy", ranks=True)
    assert value == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert -1 <= low < value < high <= 1


def test_intervals_narrow_with_the_requests_and_hold_the_mean() -> None:
    few = result([[1, 0, 0.5], [0, 0, 1]] * 4, [[0.5, 0.4, 0.1], [0.1, 0.4, 0.3]])
    many = result([[1, 0, 0.5], [0, 0, 1]] * 100, [[0.5, 0.4, 0.1], [0.1, 0.4, 0.3]])
    for found in (few, many):
        low, high = found.interval("efficacy")
        assert (low <= found.mean("efficacy")).all()
        assert (found.mean("efficacy") <= high).all()
    wide, narrow = (np.ptp(np.array(f.interval("efficacy")), axis=0)[0] for f in (few, many))
    # 2 · 1.96 · ½ / √n
    assert (wide, narrow) == pytest.approx((0.69, 0.139), rel=0.15)


def test_a_correlation_that_is_not_defined_is_said_to_be_so() -> None:
    for found in (result([[1, 1, 1]], [[0.5, 0.4, 0.1]]), result([[1, 0]], [[0.5, 0.4]])):
        assert np.isnan(found.correlation("efficacy")).all()
        told = found.findings()
        assert [n.name for n in told.numbers] == ["layer of the highest AIE", "layer of the highest efficacy"]
        assert len([note for (note,) in told.tables[1].rows if "correlation of efficacy" in note]) == 2


def test_findings_have_a_line_each_a_labelled_scatter_and_a_row_a_layer(model: EditableModel) -> None:
    found = swept(model, replace(SETTINGS, layers=(0, 1, 3)))
    told = found.findings()
    lines, scatter = told.plots
    assert [line.label for line in lines.lines] == ["efficacy", "generalization", "specificity", "AIE"]
    assert lines.x.tolist() == [0, 1, 3]
    assert scatter.labels == ("layer 0", "layer 1", "layer 3")
    np.testing.assert_array_equal(scatter.y, found.mean("efficacy"))
    np.testing.assert_array_equal(scatter.x, found.effects.mean(0))
    table = told.tables[0]
    assert [row[0] for row in table.rows] == ["0", "1", "3"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert (told.n, told.settings["layers"], told.settings["method"]) == (2, "0, 1, 3", "multedit")
    assert "n = 2 requests; AIE of n = 4 questions" in lines.caption


def test_bad_input_is_refused_with_its_place(llama: EditableModel) -> None:
    one, two = requests(llama)
    with pytest.raises(LayerError):
        swept(llama, replace(SETTINGS, layers=(4,)))
    with pytest.raises(InvalidInputError, match="two requests are named 'rome'"):
        swept(llama, requests=[one, one])
    with pytest.raises(InvalidInputError, match="no probe measures efficacy"):
        swept(llama, requests=[replace(two, probes=two.probes[1:])])
    with pytest.raises(InvalidInputError, match="needs key statistics"):
        measure_sweep(llama, [one], replace(SETTINGS, method=Method.MEMIT), trace=_traced("llama"))
    only_attention = average(
        [trace(llama, traced(llama)[0], TraceSettings(components=(Component.ATTENTION,), min_total_effect=-1.0))]
    )
    with pytest.raises(InvalidInputError, match="no MLP component"):
        measure_sweep(llama, [one], SETTINGS, trace=only_attention)
    shown = Context(prompt=Prompt(text="Where?", images=(picture(),)), constraint=Constraint(text="Where"))
    for part in ("contexts", "preserve"):
        bad = replace(two.request, **{part: (two.request.contexts[0], shown)})
        with pytest.raises(InvalidInputError, match="drop the image") as caught:
            swept(llama, requests=[one, replace(two, request=bad)])
        assert caught.value.field == f"requests[1].{part}[1].prompt.images"
    with pytest.raises(InvalidInputError, match="drop the image") as refused:
        swept(llama, requests=[one, replace(two, request=replace(two.request, contexts=(shown,)))])
    assert refused.value.field == "requests[1].contexts[0].prompt.images"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda: SweepSettings(layers=(1, 0)), "layers"),
        (lambda: SweepSettings(at_once=0), "at_once"),
        (lambda: SweepSettings(max_new_tokens=0), "max_new_tokens"),
        (lambda: SweepSettings(clamp=-1.0), "clamp"),
        (lambda: SweepSettings(ridge=float("nan")), "ridge"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        change()
    assert caught.value.field.endswith(field)


def test_progress_is_told_and_a_cancelled_sweep_stops(llama: EditableModel) -> None:
    told: list[tuple[int, int]] = []
    swept(llama, replace(SETTINGS, layers=(0, 1), at_once=1, steps=2), progress=lambda *t: told.append(t))
    assert list(dict.fromkeys(told)) == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    told.clear()
    swept(llama, replace(SETTINGS, layers=(0,), at_once=2, steps=8), progress=lambda *t: told.append(t))
    assert list(dict.fromkeys(told)) == [(0, 2), (1, 2), (2, 2)]  # within a layer, too
    calls = iter(range(100))
    with pytest.raises(CancelledError):
        swept(llama, cancelled=lambda: next(calls) > 5)
