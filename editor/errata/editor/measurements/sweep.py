"""Layer sweep: one edit at every layer, judged by generation, beside the causal trace (Basu et al. 2024, §5).

Does causality predict editability on this model? Every request is edited at each layer alone and its probes are asked
of the untouched parent and of the child; the MLP's AIE at the constraint's last token, where an edit acts, stands
beside what the edits achieved there.

Fast: the parent is asked once for all layers, and so are the keys and outputs at the constraints. The values of many
requests descend together, though each edit is solved alone, and all edits of a layer answer in one batch (`mixed`).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from errata.editor.delta import Delta
from errata.editor.errors import (
    CancelledError,
    IllConditionedError,
    InvalidInputError,
    NoCausalSiteError,
    check_numbers,
)
from errata.editor.evaluation import Metric, Probe
from errata.editor.measurements.findings import Findings, Line, LinePlot, Number, Scatter, Table
from errata.editor.measurements.intervals import bootstrap_means, interval
from errata.editor.measurements.questions import Cancelled, Progress
from errata.editor.methods import EditSettings, Keys, Method, _check_settings, _shared, _solve, edit
from errata.editor.mixed import MixedDeltas, version_factors
from errata.editor.model import EditableModel, by_length, same_answer
from errata.editor.report.wording import MISSING
from errata.editor.requests import EditRequest, check_batch
from errata.editor.states import Component, record
from errata.editor.statistics import KeyStatistics
from errata.editor.trace import AveragedTrace
from errata.editor.values import Value, ValueSettings, optimise_values

_SITE = "constraint last"
_GROUPS = {
    "generalization": (Metric.IMAGE_GENERALIZATION, Metric.PHRASING_GENERALIZATION),
    "specificity": (Metric.OTHER_SUBJECTS, Metric.SAME_IMAGE, Metric.UNRELATED),
}
"""Metrics that are also told together (methods.md §6)."""

_SHOWN = ("efficacy", "generalization", "specificity")
"""The measures that are drawn; the table has all."""

Bounds = tuple[Float[NDArray[np.float64], " layers"], Float[NDArray[np.float64], " layers"]]
"""The lower and the upper bounds of 95 % intervals, by layer."""

_FEWEST_LAYERS = 3
"""Two points always lie on a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """An edit to make at every layer, and the probes that judge it."""

    request: EditRequest
    probes: tuple[Probe, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """How a sweep edits and judges.

    `layers` are edited one by one; none: all. `together` edits all requests of a layer as one batch, else each alone.
    `method` to `null_energy` are `EditSettings`, `steps` to `most_contexts` are `ValueSettings`, with their units.
    `max_new_tokens`, ≥ 1, bounds an answer. `at_once`, ≥ 1, is how many requests are worked on at a time, and bounds
    memory.
    """

    layers: tuple[int, ...] = ()
    together: bool = False
    method: Method = Method.MEMIT
    keys: Keys = Keys.EACH
    ridge: float | None = None
    preservation: float = 150.0
    null_energy: float = 0.02
    steps: int = 150
    learning_rate: float = 0.2
    clamp: float = 3.0
    decay: float = 1e-3
    kl_weight: float = 1.0
    stop_loss: float = 0.02
    most_contexts: int = 12
    max_new_tokens: int = 16
    at_once: int = 32

    def __post_init__(self) -> None:
        self.edit_at((0,))
        check_numbers(self, at_least={"max_new_tokens": 1, "at_once": 1}, above={})
        if list(self.layers) != sorted(set(self.layers)):
            raise InvalidInputError(
                f"layers {self.layers} must be given once each, in rising order", field="settings.layers"
            )

    def edit_at(self, layers: tuple[int, ...]) -> EditSettings:
        """The settings of an edit at these layers."""
        values = ValueSettings(
            **{f.name: getattr(self, f.name) for f in fields(ValueSettings) if hasattr(self, f.name)}
        )
        return EditSettings(
            layers=layers,
            method=self.method,
            keys=self.keys,
            values=values,
            ridge=self.ridge,
            preservation=self.preservation,
            null_energy=self.null_energy,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """What the edits at each layer achieved, and what the trace says of it.

    `shares` are shares of probes passed, one a request; NaN where a request has no probe of the measure. An edit that
    installed nothing is judged as the parent: its efficacy is 0 and it is perfectly specific. `losses` are the target
    losses in nats where the descents ended (NaN where a batch was refused), `installed` says which edits changed
    anything. `effects` are the indirect effects of each layer's MLP at the constraint's last token, one a traced
    question. `failed` has a line for each layer and reason with edits that installed nothing, `skipped` one for each
    request left out.
    """

    settings: SweepSettings
    layers: tuple[int, ...]
    requests: tuple[str, ...]
    measures: tuple[str, ...]
    shares: Float[NDArray[np.float64], "measures requests layers"]
    losses: Float[NDArray[np.float64], "requests layers"]
    installed: Bool[NDArray[np.bool_], "requests layers"]
    effects: Float[NDArray[np.float64], "traced layers"]
    total_effect: float
    window: int
    failed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def mean(self, measure: str) -> Float[NDArray[np.float64], " layers"]:
        """The mean share of a measure at each layer, over the requests that have it."""
        samples = self._of(measure)
        mean: NDArray[np.float64] = samples[~np.isnan(samples[:, 0])].mean(0)
        return mean

    def interval(self, measure: str) -> Bounds:
        """Its 95 % interval by a bootstrap over requests."""
        return interval(self._drawn(measure))

    @property
    def aie(self) -> Float[NDArray[np.float64], " layers"]:
        """The AIE of each layer's MLP at the constraint's last token."""
        mean: NDArray[np.float64] = self.effects.mean(0)
        return mean

    @property
    def aie_interval(self) -> Bounds:
        """Its 95 % interval by a bootstrap over traced questions."""
        return interval(bootstrap_means(self.effects))

    def correlation(self, measure: str, *, ranks: bool = False) -> tuple[float, float, float]:
        """Pearson's correlation over layers of a measure with the AIE, or Spearman's of their `ranks`, and the bounds
        of its 95 % interval.

        By a bootstrap over requests and, independently, over traced questions; the layers are the model's own and are
        not drawn. NaN where there are fewer than three layers, or where one of the two is the same at all of them.
        """
        value = _correlation(self.mean(measure)[None], self.aie[None], ranks=ranks)[0]
        # Both are drawn with one seed: turned round, the draws of the one do not depend on the other's.
        drawn = _correlation(self._drawn(measure), bootstrap_means(self.effects)[::-1], ranks=ranks)
        low, high = interval(drawn[~np.isnan(drawn)]) if not np.isnan(value) else (np.nan, np.nan)
        return float(value), float(low), float(high)

    def findings(self) -> Findings:
        """The sweep as numbers, a line plot by layer, a scatter plot of efficacy over AIE, and tables."""
        numbers, undefined = self._numbers()
        return Findings(
            kind="sweep",
            title="Layer sweep: edits at each layer beside the causal trace",
            settings={f.name: _told(getattr(self.settings, f.name)) for f in fields(SweepSettings)}
            | {"layers": ", ".join(map(str, self.layers))},
            n=len(self.requests),
            numbers=numbers,
            plots=(self._lines(), self._scatter()),
            tables=(self._table(), *_notes((*self.failed, *undefined))),
            skipped=self.skipped,
        )

    def _of(self, measure: str) -> Float[NDArray[np.float64], "requests layers"]:
        if measure not in self.measures:
            raise InvalidInputError(f"no probe measured {measure!r}; ask one that does", field="measure")
        samples: NDArray[np.float64] = self.shares[self.measures.index(measure)]
        return samples

    def _drawn(self, measure: str) -> Float[NDArray[np.float64], "draws layers"]:
        """Bootstrapped means; a request without a probe of the measure has none in any layer."""
        samples = self._of(measure)
        return bootstrap_means(samples[~np.isnan(samples[:, 0])])

    def _numbers(self) -> tuple[tuple[Number, ...], tuple[str, ...]]:
        numbers, undefined = [], []
        for measure in (m for m in _SHOWN if m in self.measures):
            for name, ranks in (("Pearson", False), ("Spearman", True)):
                value, low, high = self.correlation(measure, ranks=ranks)
                told = f"{name} correlation of {measure} with AIE over layers"
                if np.isnan(value):
                    undefined.append(f"{told}: undefined over {len(self.layers)} layer(s) with these values")
                    continue
                numbers.append(Number(name=told, value=value, unit="", n=len(self.layers), low=low, high=high))
        best = int(np.argmax(self.mean("efficacy")))
        peak = int(np.argmax(self.aie))
        numbers += [
            Number(name="layer of the highest AIE", value=self.layers[peak], unit="layer", n=len(self.effects)),
            Number(name="layer of the highest efficacy", value=self.layers[best], unit="layer", n=len(self.requests)),
        ]
        return tuple(numbers), tuple(undefined)

    def _lines(self) -> LinePlot:
        shown = [m for m in _SHOWN if m in self.measures]
        lines = [Line(label=m, values=self.mean(m), low=b[0], high=b[1]) for m in shown for b in (self.interval(m),)]
        low, high = self.aie_interval
        return LinePlot(
            name="by_layer",
            title="Edits at each layer",
            x_label="edited layer",
            y_label="share of probes passed; AIE (probability)",
            x=np.array(self.layers, dtype=np.float64),
            lines=(*lines, Line(label="AIE", values=self.aie, low=low, high=high)),
            caption=self._caption(),
        )

    def _scatter(self) -> Scatter:
        return Scatter(
            name="aie_efficacy",
            title="Causality and editability",
            x_label="AIE of the layer's MLP at the constraint's last token (probability)",
            y_label="efficacy of an edit there (share)",
            x=self.aie,
            y=self.mean("efficacy"),
            labels=tuple(f"layer {i}" for i in self.layers),
            caption=self._caption(),
        )

    def _caption(self) -> str:
        how = "one batch of" if self.settings.together else "single edits,"
        return (
            f"{self.settings.method.value}, {how} n = {len(self.requests)} requests; AIE of n = {len(self.effects)} "
            f"questions, window {self.window}, total effect {self.total_effect:.2f}; 95 % bootstrap intervals over "
            "requests and over questions"
        )

    def _table(self) -> Table:
        bounds = {m: self.interval(m) for m in self.measures}
        rows = []
        for n, layer in enumerate(self.layers):
            shares = [_cell(self.mean(m)[n], bounds[m], n) for m in self.measures]
            losses = self.losses[:, n][~np.isnan(self.losses[:, n])]
            loss = f"{np.median(losses):.2g}" if len(losses) else MISSING
            aie = _cell(self.aie[n], self.aie_interval, n)
            rows.append((str(layer), aie, *shares, loss, f"{self.installed[:, n].mean():.2f}"))
        columns = ("layer", "AIE", *self.measures, "median target loss, nats", "share installed")
        return Table(name="by_layer", title="Shares of probes passed, by generation", columns=columns, rows=tuple(rows))


def measure_sweep(
    model: EditableModel,
    requests: Sequence[SweepRequest],
    settings: SweepSettings = SweepSettings(),
    *,
    trace: AveragedTrace,
    statistics: KeyStatistics | None = None,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> SweepResult:
    """Edits the requests at each layer and judges what is generated. The model, as it is given, is the parent.

    `trace` is of this model, with its MLPs; its questions need not be the requests'. Every method but MultEdit needs
    `statistics` of all layers. A request whose target the parent answers already is skipped; an edit that installs
    nothing counts as failed. Raises InvalidInputError and its kinds, CancelledError.
    """
    layers = settings.layers or tuple(range(len(model.layers)))
    _check_settings(model, settings.edit_at(layers), statistics)
    effects = _effects(model, trace)[:, layers]
    kept, skipped = _editable(model, requests)
    if not any(p.metric is Metric.EFFICACY for _, r in kept for p in r.probes):
        raise InvalidInputError("no probe measures efficacy; ask the edited questions", field="requests")
    losses = np.full((len(kept), len(layers)), np.nan)
    installed = np.zeros((len(kept), len(layers)), dtype=np.bool_)
    failures: dict[tuple[int, str], list[str]] = defaultdict(list)
    passed: list[dict[Metric, list[list[bool]]]] = []
    tell = progress or (lambda *_: None)
    whole = len(kept) if settings.together else settings.at_once
    for first in range(0, len(kept), whole):
        group = kept[first : first + whole]
        editor = _Editor(model, group, settings, statistics, cancelled)
        judge = _Judge(model, [r for _, r in group], settings)
        for n, layer in enumerate(layers):
            tell(first * len(layers) + n * len(group), len(kept) * len(layers))
            edits = editor.at(layer)
            for i, made in enumerate(edits, first):
                losses[i, n], installed[i, n] = made.loss, made.delta is not None
                if made.delta is None:
                    failures[layer, made.reason].append(kept[i][1].request.name)
            judge.ask([e.delta for e in edits], cancelled)
        passed += judge.passed
    tell(len(kept) * len(layers), len(kept) * len(layers))
    measures, shares = _shares(passed, len(layers))
    failed = [
        f"layer {layer}: {len(names)} edit(s) installed nothing ({reason}) and count as failed: {', '.join(names)}"
        for (layer, reason), names in failures.items()
    ]
    return SweepResult(
        settings=settings,
        layers=layers,
        requests=tuple(r.request.name for _, r in kept),
        measures=measures,
        shares=shares,
        losses=losses,
        installed=installed,
        effects=effects,
        total_effect=trace.total_effect,
        window=trace.window,
        failed=tuple(failed),
        skipped=tuple(skipped),
    )


def _effects(model: EditableModel, trace: AveragedTrace) -> Float[NDArray[np.float64], "traced layers"]:
    """The indirect effects where an edit acts."""
    if Component.MLP not in trace.components:
        raise InvalidInputError("the trace has no MLP component; trace it too", field="trace.components")
    effects = trace.samples(Component.MLP)[:, :, trace.roles.index(_SITE)]
    if effects.shape[1] != len(model.layers):
        raise InvalidInputError(
            f"the trace is of {effects.shape[1]} layers and {model.name!r} has {len(model.layers)}; trace this model",
            field="trace",
        )
    return effects


def _editable(
    model: EditableModel, requests: Sequence[SweepRequest]
) -> tuple[list[tuple[int, SweepRequest]], list[str]]:
    """The requests that ask for something new, each with its index, and a line for each other."""
    check_batch(tuple(r.request for r in requests))
    told = model.generate([r.request.contexts[0].prompt for r in requests])
    kept, skipped = [], []
    for i, (swept, answer) in enumerate(zip(requests, told, strict=True)):
        first = swept.request.contexts[0]
        if same_answer(first.answer or swept.request.target, answer.text):
            skipped.append(f"requests[{i}]: the model already answers {answer.text!r} to {first.prompt.text!r}")
        else:
            kept.append((i, swept))
    if not kept:
        raise InvalidInputError("the model already answers every target; there is nothing to edit", field="requests")
    return kept, skipped


@dataclass(frozen=True, slots=True)
class _Edit:
    """One request's edit at one layer; without a delta it installed nothing, for `reason`."""

    delta: Delta | None
    loss: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _States:
    """A request's contexts at their constraints' last tokens: keys and MLP outputs, by layer."""

    keys: Float[Tensor, "layers contexts m"]
    outputs: Float[Tensor, "layers contexts d"]


class _Editor:
    """Edits a group of requests at any one layer, from states that are recorded once."""

    def __init__(
        self,
        model: EditableModel,
        group: Sequence[tuple[int, SweepRequest]],
        settings: SweepSettings,
        statistics: KeyStatistics | None,
        cancelled: Cancelled | None,
    ) -> None:
        self._model, self._settings, self._statistics, self._cancelled = model, settings, statistics, cancelled
        self._requests = [r.request for _, r in group]
        self._states = [] if settings.together else list(_recorded(model, group, settings.most_contexts))

    def at(self, layer: int) -> list[_Edit]:
        """Every request's edit at one layer: alone, or all the one of the batch."""
        settings = self._settings.edit_at((layer,))
        if self._settings.together:
            return self._batch(settings)
        values = optimise_values(self._model, self._requests, layer, settings.values, cancelled=self._cancelled)
        covariances: dict[frozenset[str], Tensor] = {}
        made = []
        for request, states, value in zip(self._requests, self._states, values, strict=True):
            subjects = frozenset(c.subject for c in request.contexts if c.subject is not None)
            if self._statistics and subjects not in covariances:
                covariances[subjects] = self._statistics.covariance(layer, subjects)
            made.append(self._single(states, value, settings, covariances.get(subjects)))
        return made

    def _single(self, states: _States, value: Value, settings: EditSettings, covariance: Tensor | None) -> _Edit:
        (layer,) = settings.layers
        keys = states.keys[layer].double().T
        residuals = (value.value.double() - states.outputs[layer].double()).T
        if settings.keys is Keys.MEAN or settings.method is Method.ROME:
            keys, residuals = keys.mean(1, keepdim=True), residuals.mean(1, keepdim=True)
        else:
            (keys,), (residuals,) = _shared([keys]), _shared([residuals])
        try:
            low = _solve(keys, residuals, settings, covariance, ())
        except IllConditionedError as error:
            return _Edit(None, value.losses[-1], error.reason)
        delta = Delta(
            base_sha256=self._model.base_sha256,
            layers={layer: low},
            modules={layer: self._model.down_projection_name(layer)},
        ).compressed()
        return _Edit(delta if delta.layers else None, value.losses[-1], NoCausalSiteError.reason)

    def _batch(self, settings: EditSettings) -> list[_Edit]:
        try:
            result = edit(self._model, self._requests, settings, self._statistics, cancelled=self._cancelled)
        except (NoCausalSiteError, IllConditionedError) as error:
            return [_Edit(None, float("nan"), error.reason)] * len(self._requests)
        return [_Edit(result.delta, o.value.losses[-1]) for o in result.outcomes]


def _recorded(
    model: EditableModel, group: Sequence[tuple[int, SweepRequest]], most_contexts: int, chunk: int = 64
) -> Iterator[_States]:
    """The states of every request, all layers from one run of each context; refuses what a descent would refuse."""
    for i, swept in group:
        request = swept.request
        for j, context in enumerate(request.preserve):
            model.encode_at(context, field=f"requests[{i}].preserve[{j}]")
        rows, sites = [], []
        for j, context in enumerate(request.contexts):
            answer = (context.answer or request.target) if j < most_contexts else None
            row, site = model.encode_at(context, answer, field=f"requests[{i}].contexts[{j}]")
            rows.append(row.replaced(row.ids[: row.prompt_length]))
            sites.append(site)
        keys, outputs = [], []
        layers = range(len(model.layers))
        for n in range(0, len(rows), chunk):
            some = record(
                model,
                rows[n : n + chunk],
                sites[n : n + chunk],
                components=(Component.MLP,),
                key_layers=layers,
                resumable=False,
            )
            keys += [torch.stack([r.keys[layer][0] for layer in layers]) for r in some]
            outputs += [r.outputs[Component.MLP][:, 0].clone() for r in some]
        yield _States(torch.stack(keys, dim=1), torch.stack(outputs, dim=1))


class _Judge:
    """Asks a group's probes: the parent once, the children of every layer in mixed batches."""

    def __init__(self, model: EditableModel, group: Sequence[SweepRequest], settings: SweepSettings) -> None:
        self._model, self._most = model, settings.max_new_tokens
        probes = [(i, p) for i, swept in enumerate(group) for p in swept.probes]
        told = [a.text for a in model.generate([p.prompt for _, p in probes], max_new_tokens=self._most)]
        counted = [
            (i, p, answer)
            for (i, p), answer in zip(probes, told, strict=True)
            if p.believed is None or same_answer(p.believed, answer)
        ]
        self._probes = counted
        self._batches = by_length([model.encode(p.prompt) for _, p, _ in counted], 64)
        self.passed: list[dict[Metric, list[list[bool]]]] = [defaultdict(list) for _ in group]
        """Of each request, each metric's probes: which passed, layer by layer."""
        for i, p, _ in counted:
            self.passed[i][p.metric].append([])

    def ask(self, deltas: Sequence[Delta | None], cancelled: Cancelled | None) -> None:
        """Judges one edit a request; None answers as the parent."""
        after = self._answers(deltas, cancelled)
        at: dict[tuple[int, Metric], int] = defaultdict(int)
        for n, (i, probe, before) in enumerate(self._probes):
            place = at[i, probe.metric]
            at[i, probe.metric] += 1
            expected = before if probe.expected is None else probe.expected
            self.passed[i][probe.metric][place].append(same_answer(after.get(n, before), expected))

    def _answers(self, deltas: Sequence[Delta | None], cancelled: Cancelled | None) -> Mapping[int, str]:
        """The children's answers to the probes of requests that have one."""
        distinct = {id(d): d for d in deltas if d is not None}
        factors = {key: version_factors(self._model, [delta]) for key, delta in distinct.items()}
        found: dict[int, str] = {}
        with MixedDeltas(self._model) as mixed:
            for rows in self._batches:
                if cancelled and cancelled():
                    raise CancelledError("the layer sweep was cancelled; nothing was changed")
                asked = [n for n in rows if deltas[self._probes[n][0]] is not None]
                if not asked:
                    continue
                stacked = mixed.stacked([factors[id(deltas[self._probes[n][0]])] for n in asked])
                prompts = [self._probes[n][1].prompt for n in asked]
                with mixed.answering(stacked):
                    told = self._model.generate(prompts, max_new_tokens=self._most, batch_size=len(asked))
                found |= {n: a.text for n, a in zip(asked, told, strict=True)}
        return found


def _shares(
    passed: Sequence[Mapping[Metric, Sequence[Sequence[bool]]]], layers: int
) -> tuple[tuple[str, ...], Float[NDArray[np.float64], "measures requests layers"]]:
    """The shares of each metric that was probed, and of each group of several."""
    metrics = [m for m in Metric if any(m in p for p in passed)]
    groups = {m.value: (m,) for m in metrics} | {
        name: tuple(m for m in ms if m in metrics) for name, ms in _GROUPS.items() if set(ms) & set(metrics)
    }

    def share(probes: Mapping[Metric, Sequence[Sequence[bool]]], of: Sequence[Metric]) -> NDArray[np.float64]:
        rows = [row for m in of for row in probes.get(m, ())]
        return np.mean(rows, axis=0, dtype=np.float64) if rows else np.full(layers, np.nan)

    return tuple(groups), np.array([[share(p, ms) for p in passed] for ms in groups.values()])


def _correlation(
    x: Float[NDArray[np.float64], "draws layers"], y: Float[NDArray[np.float64], "draws layers"], *, ranks: bool
) -> Float[NDArray[np.float64], " draws"]:
    """Pearson's correlation of each pair of rows, or of their ranks; NaN where a row is constant or too short."""
    x, y = (_ranks(x), _ranks(y)) if ranks else (x, y)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    defined = (size > 1e-12) & (x.shape[-1] >= _FEWEST_LAYERS)
    found: NDArray[np.float64] = np.divide((x * y).sum(-1), size, out=np.full(len(size), np.nan), where=defined)
    return found


def _ranks(x: Float[NDArray[np.float64], "draws layers"]) -> Float[NDArray[np.float64], "draws layers"]:
    """The ranks along each row; equal values share the mean of theirs."""
    a, b = x[..., :, None], x[..., None, :]
    ranks: NDArray[np.float64] = (a > b).sum(-1) + (a == b).sum(-1) / 2
    return ranks


def _notes(lines: Sequence[str]) -> tuple[Table, ...]:
    """A table of what else is to be known, where there is anything."""
    rows = tuple((line,) for line in lines)
    return (Table(name="notes", title="Notes", columns=("note",), rows=rows),) if rows else ()


def _cell(value: float, bounds: Bounds, layer: int) -> str:
    return f"{value:.3f} ({bounds[0][layer]:.3f}–{bounds[1][layer]:.3f})"


def _told(value: object) -> str:
    return "the method's own" if value is None else str(value)
