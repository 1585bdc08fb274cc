"""Closed-form editing: keys, values, solve, layer by layer (module `solver` gives the family's equation).

One path serves every method; a method is a key metric, a ridge, and whether requests are solved together.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from itertools import count

import torch
from jaxtyping import Float
from torch import Tensor

from errata.editor.delta import Delta, LowRank, applied, empty_delta
from errata.editor.earlier import Earlier
from errata.editor.errors import (
    CancelledError,
    ConflictingRequestsError,
    InvalidInputError,
    NoCausalSiteError,
    NoOpEditError,
    check_numbers,
)
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, same_answer
from errata.editor.recording import record
from errata.editor.requests import EditRequest, check_batch
from errata.editor.solver import (
    HeldKeys,
    Identity,
    InverseCovariance,
    KeyMetric,
    NullSpace,
    shared,
    solve_edit,
    solve_weighted,
)
from errata.editor.states import Component
from errata.editor.statistics import KeyStatistics
from errata.editor.trace import Progress
from errata.editor.values import Value, ValueSettings, optimise_values


class Method(StrEnum):
    """The closed-form editors (module `solver`)."""

    MULTEDIT = "multedit"
    ROME = "rome"
    MEMIT = "memit"
    EMMET = "emmet"
    ALPHAEDIT = "alphaedit"


class Keys(StrEnum):
    """How the keys of a request's contexts enter: as their mean, one column, or each as a column of its own."""

    MEAN = "mean"
    EACH = "each"


class Stage(StrEnum):
    """What an edit is at: the values' descent, or the closed form."""

    VALUES = "values"
    SOLVE = "solve"


StageProgress = Callable[[Stage, int, int], None]
"""Called with a stage, its steps that are done (0 where it begins), and its steps in all: of descent; or layers, and
earlier requests that are held at each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSettings:
    """How a batch is edited.

    `layers` in rising order: values are optimised at the last and the residual is spread over all of them (MEMIT
    §4.3). `ridge` is λ relative to the mean of KᵀMK's diagonal, so that it means the same for keys of any size;
    None takes the method's own. `preservation` weighs C₀ against one request (MEMIT's λ), however many contexts'
    keys it brings.
    """

    layers: tuple[int, ...]
    method: Method = Method.MEMIT
    keys: Keys = Keys.EACH
    values: ValueSettings = field(default_factory=ValueSettings)
    ridge: float | None = None
    preservation: float = 150.0
    null_energy: float = 0.02

    def __post_init__(self) -> None:
        check_numbers(self, at_least={"ridge": 0.0}, above={"preservation": 0.0, "null_energy": 0.0})


RIDGES = {Method.MULTEDIT: 0.01, Method.ROME: 0.0, Method.MEMIT: 0.0, Method.EMMET: 0.0, Method.ALPHAEDIT: 0.01}
"""λ of each method where the settings give none. MEMIT's own λ = 1 is absolute and always there."""


HOLDING = frozenset({Method.MEMIT, Method.ALPHAEDIT})
"""The methods that hold what earlier edits installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutcome:
    """How one request's value went, at the layer where it was optimised."""

    name: str
    target: str
    before: str
    value: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class EditResult:
    """The delta of a batch and how it came about. `held` counts the earlier requests that its first layer held."""

    delta: Delta
    settings: EditSettings
    outcomes: tuple[RequestOutcome, ...]
    held: int = 0

    @property
    def unconverged(self) -> tuple[str, ...]:
        """Names of the requests whose value did not reach the target loss."""
        return tuple(o.name for o in self.outcomes if not o.value.converged)


def edit(
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: EditSettings,
    statistics: KeyStatistics | None = None,
    *,
    parent: Delta | None = None,
    earlier: Earlier | None = None,
    progress: StageProgress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> EditResult:
    """Edits a batch of requests into a delta on `parent`, the base where None. The model is left as it was.

    `earlier` is what the parent holds already: MEMIT and AlphaEdit keep what stands at its keys as firmly as they
    install the new values; requests of a subject or key that is edited again are left out. No other delta may be
    applied to `model`. Every method but MultEdit needs `statistics` of the layers. Raises InvalidInputError and its
    kinds for requests that cannot be edited, NoOpEditError for one whose target is the present answer,
    ConflictingRequestsError for two with one key and different targets, NoCausalSiteError where no value moved,
    IllConditionedError, CancelledError.
    """
    check_batch(tuple(requests))
    check_settings(model, settings, statistics)
    tell: StageProgress = progress or (lambda *_: None)
    tell(Stage.VALUES, 0, settings.values.steps)
    parent, last = parent or empty_delta(model), settings.layers[-1]
    with applied(model, parent):
        before = _answers_before(model, requests)
        found = _at_constraints(model, requests, last, last)
        _refuse_conflicts(requests, found, last)
        values = optimise_values(
            model, requests, last, settings.values, progress=partial(tell, Stage.VALUES), cancelled=cancelled
        )
        held = _to_hold(earlier, requests, settings.method)
        steps = len(settings.layers) * (len(requests) if settings.method is Method.ROME else 1 + len(held.requests))
        work = _Work(model, settings, statistics, parent, held, _counted(partial(tell, Stage.SOLVE), steps), cancelled)
        if settings.method is Method.ROME:
            delta, number = _one_by_one(work, requests, values), 0
        else:
            delta, number = _spread(work, requests, values, before=found)
    if not delta.layers:
        raise NoCausalSiteError(
            f"nothing was installed: at layer {last} no value at the constraint changes the answer; choose earlier "
            "layers, or let a trace choose them"
        )
    outcomes = tuple(
        RequestOutcome(name=r.name, target=r.target, before=b, value=v)
        for r, b, v in zip(requests, before, values, strict=True)
    )
    return EditResult(delta=delta, settings=settings, outcomes=outcomes, held=number)


@dataclass(frozen=True, slots=True)
class _Work:
    """What an edit's layers are solved with. `done` tells of one step more."""

    model: EditableModel
    settings: EditSettings
    statistics: KeyStatistics | None
    parent: Delta
    held: Earlier
    done: Callable[[], None]
    cancelled: Callable[[], bool] | None


@dataclass(frozen=True, slots=True)
class _State:
    """What a context's constraint looks like at its last token: the key of a layer, and what leaves the last one."""

    key: Float[Tensor, " m"]
    mlp: Float[Tensor, " d"]
    output: Float[Tensor, " d"]


def check_settings(model: EditableModel, settings: EditSettings, statistics: KeyStatistics | None) -> None:
    """Raises LayerError, and InvalidInputError for layers out of order or without the statistics they need."""
    model.check_layers(settings.layers)
    if not settings.layers or list(settings.layers) != sorted(set(settings.layers)):
        raise InvalidInputError(f"layers {settings.layers} must be given once each, in rising order", field="layers")
    if len(settings.layers) > 1 and model.family.normed_mlp(model.model):
        raise InvalidInputError(
            f"{model.name!r} passes what its MLPs put out through a norm, so that edits of several layers do not add "
            f"up; give one layer instead of {settings.layers}",
            field="layers",
        )
    missing = set(settings.layers) - set(statistics.everywhere if statistics else ())
    if missing and settings.method is not Method.MULTEDIT:
        raise InvalidInputError(
            f"{settings.method.value} needs key statistics of the layers {sorted(missing)}; compute them with "
            "key_statistics(model, prompts, layers)",
            field="statistics",
        )


def _answers_before(model: EditableModel, requests: Sequence[EditRequest]) -> list[str]:
    """What each request's first context is answered now. Raises NoOpEditError where that is what it asks for."""
    asked = [r.contexts[0].prompt for r in requests]
    before = [a.text for a in model.generate(asked, field="requests[{}].contexts[0]".format)]
    for i, (request, answer) in enumerate(zip(requests, before, strict=True)):
        if same_answer(request.contexts[0].answer or request.target, answer):
            raise NoOpEditError(
                f"the model already answers {answer!r} to {request.contexts[0].prompt.text!r}; drop the request",
                field=f"requests[{i}].target",
            )
    return before


def _to_hold(earlier: Earlier | None, requests: Sequence[EditRequest], method: Method) -> Earlier:
    """What the method holds of what was edited earlier: all that is not of a subject that is edited again."""
    if earlier is None or method not in HOLDING:
        return Earlier()
    again = _subjects(requests)
    return replace(earlier, requests=tuple(r for r in earlier.requests if r.subjects.isdisjoint(again)))


def _one_by_one(work: _Work, requests: Sequence[EditRequest], values: Sequence[Value]) -> Delta:
    """ROME solves one request at a time; the next one sees the edits before it."""
    delta = empty_delta(work.model)
    for request, value in zip(requests, values, strict=True):
        delta = delta + _spread(work, [request], [value], below=delta)[0]
    return delta


def _spread(
    work: _Work,
    requests: Sequence[EditRequest],
    values: Sequence[Value],
    *,
    below: Delta | None = None,
    before: Sequence[Sequence[_State]] | None = None,
) -> tuple[Delta, int]:
    """ΔW of every layer for these requests, on top of `below`, and how many earlier requests the first layer holds.

    `before` are the requests' states there, if known.

    Later layers see the edits below them, so keys, and what is left to install, are computed again before each
    (MEMIT §4.3).
    """
    model, layers = work.model, work.settings.layers
    delta, below, last, number = empty_delta(model), below or empty_delta(model), layers[-1], 0
    with applied(model, below):
        before = before or _at_constraints(model, requests, last, last)
    # The residual stream after the last layer, as if its MLP had put out v*.
    wanted = [[s.output - s.mlp + v.value.double() for s in ss] for ss, v in zip(before, values, strict=True)]
    for n, layer in enumerate(layers):
        with applied(model, below, delta):
            found = before if len(layers) == 1 else _at_constraints(model, requests, layer, last)
            keys = [torch.stack([s.key for s in ss], dim=1) for ss in found]
            held = _held(work, layer, torch.cat(keys, 1), (*work.parent.layers, *delta.layers))
        number = held.requests if n == 0 else number
        share = 1 / (len(layers) - n)
        residuals = [
            share * torch.stack([w - s.output for w, s in zip(ws, ss, strict=True)], dim=1)
            for ws, ss in zip(wanted, found, strict=True)
        ]
        metric = key_metric(work.settings, work.statistics, layer, _subjects(requests))
        low = solve_layer(keys, residuals, work.settings, metric, held)
        modules = {layer: model.down_projection_name(layer)}
        delta = delta + Delta(base_sha256=model.base_sha256, layers={layer: low}, modules=modules)
        work.done()
    return delta.compressed(), number


def _counted(progress: Progress, total: int) -> Callable[[], None]:
    """Tells `progress` that the work begins, and of one more step each time that it is called."""
    done = count(1)
    progress(0, total)
    return lambda: progress(next(done), total)


def _held(work: _Work, layer: int, keys: Float[Tensor, "m n"], edited: Collection[int]) -> HeldKeys:
    """What is to stay at a layer: the earlier requests' keys, but of those that have one of the new `keys`."""
    held, keys = HeldKeys(), keys.cpu()
    for earlier in work.held.keys(work.model, layer, of_base=all(i >= layer for i in edited)):
        if work.cancelled and work.cancelled():
            raise CancelledError("the edit was cancelled; nothing was changed")
        if not _alike(earlier, keys):
            held.add(earlier)
        work.done()
    return held


def _alike(held: Float[Tensor, "m p"], keys: Float[Tensor, "m n"]) -> bool:
    """Whether one of the held keys is practically one of the new ones: then the new value replaces what is there."""
    nearest = torch.cdist(held.T, keys.T).amin(1)
    return bool((nearest < 0.05 * held.norm(dim=0)).any())


def _at_constraints(
    model: EditableModel, requests: Sequence[EditRequest], layer: int, last: int, chunk: int = 256
) -> list[list[_State]]:
    """The states of every context of every request: the key at `layer`, the outputs at `last`, in float64."""
    contexts = [(c, f"requests[{i}].contexts[{j}]") for i, r in enumerate(requests) for j, c in enumerate(r.contexts)]
    states: list[_State] = []
    for i in range(0, len(contexts), chunk):
        some = contexts[i : i + chunk]
        rows, sites = zip(*(model.encode_at(c, field=field) for c, field in some), strict=True)
        components, memory = (Component.LAYER, Component.MLP), Memory.of(model.device)
        for r in record(model, rows, sites, components=components, key_layers=(layer,), resumable=False, memory=memory):
            mlp, output = r.outputs[Component.MLP][last, 0], r.outputs[Component.LAYER][last, 0]
            states.append(_State(r.keys[layer][0].double(), mlp.double(), output.double()))
    found = iter(states)
    return [[next(found) for _ in r.contexts] for r in requests]


def _subjects(requests: Sequence[EditRequest]) -> frozenset[str]:
    return frozenset().union(*(r.subjects for r in requests))


def solve_layer(
    keys: Sequence[Float[Tensor, "m n"]],
    residuals: Sequence[Float[Tensor, "d n"]],
    settings: EditSettings,
    metric: KeyMetric,
    held: HeldKeys | None = None,
) -> LowRank:
    """ΔW of one layer by the settings' method (methods.md §5), whose `metric` it is, in float64.

    `keys` and `residuals` are one matrix a request, a column a context; at the keys `held` nothing is to change. Raises
    IllConditionedError.
    """
    if settings.keys is Keys.MEAN or settings.method is Method.ROME:
        keys, residuals = ([c.mean(1, keepdim=True) for c in columns] for columns in (keys, residuals))
    K, R = (torch.cat([shared(c) for c in columns], 1).cpu() for columns in (keys, residuals))  # as the statistics
    ridge = RIDGES[settings.method] if settings.ridge is None else settings.ridge
    installed = 1.0 if settings.method is Method.MEMIT else 0.0
    kept = held if held and held.requests else None
    if ridge:
        weighted = metric.times(K)
        ridge *= float((K * weighted).sum(0).mean())
        if kept is None:
            return solve_weighted(K, weighted, R, ridge + installed)
    ridge += installed
    return solve_edit(K, R, metric.holding(kept, ridge) if kept else metric, ridge)


def key_metric(
    settings: EditSettings, statistics: KeyStatistics | None, layer: int, subjects: Collection[str] = ()
) -> KeyMetric:
    """The method's key metric at a layer; references to the `subjects` that are edited do not speak against it."""
    if settings.method is Method.MULTEDIT or statistics is None:
        return Identity()
    match settings.method:
        case Method.MEMIT:
            return InverseCovariance(statistics.covariance(layer, subjects), weight=settings.preservation)
        case Method.ALPHAEDIT:
            return NullSpace(statistics.free_directions(layer, subjects, energy=settings.null_energy))
        case _:
            return InverseCovariance(statistics.covariance(layer, subjects))


def _refuse_conflicts(requests: Sequence[EditRequest], found: Sequence[Sequence[_State]], layer: int) -> None:
    """Raises ConflictingRequestsError where two requests with different targets have the same key."""
    keys = torch.stack([s.key for ss in found for s in ss])
    owner = [i for i, rs in enumerate(found) for _ in rs]
    norms = keys.norm(dim=1).clamp(min=1e-30)
    distance = torch.cdist(keys, keys) / torch.maximum(norms[:, None], norms[None])
    for a, b in (distance < 1e-4).nonzero().tolist():
        first, second = owner[a], owner[b]
        if first < second and not same_answer(requests[first].target, requests[second].target):
            raise ConflictingRequestsError(
                f"{requests[first].name!r} and {requests[second].name!r} have the same key at layer {layer} and "
                f"different targets, {requests[first].target!r} and {requests[second].target!r}; a layer cannot tell "
                "them apart: edit them as two phrasings with the attribute before the constraint, or keep one",
                field=f"requests[{second}].target",
            )
