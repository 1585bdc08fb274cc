"""Layer sweep: one edit at every layer, judged by generation, beside the causal trace (Basu et al. 2024, §5).

Does causality predict editability on this model? Every request is edited at each layer alone and its probes are asked
of the untouched parent and of the child; the MLP's AIE at the constraint's last token, where an edit acts, stands
beside what the edits achieved there.

Fast: the parent is asked once for all layers, and so are the keys and outputs at the constraints. The values of many
requests descend together, though each edit is solved alone, and all edits of a layer answer in one batch (`mixed`).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from errata.editor.delta import Delta
from errata.editor.errors import (
    CancelledError,
    IllConditionedError,
    InvalidInputError,
    NoCausalSiteError,
)
from errata.editor.evaluation import Metric, Probe
from errata.editor.measurements.questions import Cancelled, Progress, said_to
from errata.editor.measurements.swept import SweepResult, SweepSettings
from errata.editor.methods import EditSettings, check_settings, edit, key_metric, solve_layer
from errata.editor.mixed import MixedDeltas, version_factors
from errata.editor.model import EditableModel, by_length, same_answer
from errata.editor.recording import record
from errata.editor.report.wording import counted
from errata.editor.requests import EditRequest, check_batch
from errata.editor.solver import KeyMetric
from errata.editor.states import Component
from errata.editor.statistics import KeyStatistics
from errata.editor.trace import AveragedTrace
from errata.editor.values import Value, optimise_values

_SITE = "constraint last"
_GROUPS = {
    "generalization": (Metric.IMAGE_GENERALIZATION, Metric.PHRASING_GENERALIZATION),
    "specificity": (Metric.OTHER_SUBJECTS, Metric.SAME_IMAGE, Metric.UNRELATED),
}
"""Metrics that are also told together (methods.md §6)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """An edit to make at every layer, and the probes that judge it."""

    request: EditRequest
    probes: tuple[Probe, ...] = field(repr=False)


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
    check_settings(model, settings.edit_at(layers), statistics)
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
            begun = first * len(layers) + n * len(group)
            edits = editor.at(layer, _within(tell, begun, len(group), len(kept) * len(layers)))
            for i, made in enumerate(edits, first):
                losses[i, n], installed[i, n] = made.loss, made.delta is not None
                if made.delta is None:
                    failures[layer, made.reason].append(kept[i][1].request.name)
            judge.ask([e.delta for e in edits], cancelled)
        passed += judge.passed
    tell(len(kept) * len(layers), len(kept) * len(layers))
    measures, shares = _shares(passed, len(layers))
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
        failed=tuple(_failed(layer, reason, names) for (layer, reason), names in failures.items()),
        skipped=tuple(skipped),
    )


def _within(tell: Progress, begun: int, edits: int, total: int) -> Progress:
    """Tells how far the edits of one layer are by the steps of their values' descent."""
    tell(begun, total)
    return lambda step, steps: tell(begun + edits * step // max(steps, 1), total)


def _failed(layer: int, reason: str, names: Sequence[str]) -> str:
    edits = counted(len(names), "edit")
    return f"layer {layer}: {edits} installed nothing ({reason}), counted as failed: {', '.join(names)}"


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
    firsts = [r.request.contexts[0].prompt for r in requests]
    told = said_to(model, firsts, lambda i: f"requests[{i}].contexts[0]")
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

    def at(self, layer: int, progress: Progress) -> list[_Edit]:
        """Every request's edit at one layer: alone, or all the one of the batch."""
        settings = self._settings.edit_at((layer,))
        if self._settings.together:
            return self._batch(settings)
        values = optimise_values(
            self._model, self._requests, layer, settings.values, progress=progress, cancelled=self._cancelled
        )
        metrics: dict[frozenset[str], KeyMetric] = {}
        made = []
        for request, states, value in zip(self._requests, self._states, values, strict=True):
            if request.subjects not in metrics:
                metrics[request.subjects] = key_metric(settings, self._statistics, layer, request.subjects)
            made.append(self._single(states, value, settings, metrics[request.subjects]))
        return made

    def _single(self, states: _States, value: Value, settings: EditSettings, metric: KeyMetric) -> _Edit:
        (layer,) = settings.layers
        keys = states.keys[layer].double().T
        residuals = (value.value.double() - states.outputs[layer].double()).T
        try:
            low = solve_layer([keys], [residuals], settings, metric)
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
