"""The work of `long_sequence`: edits one after another or at once, what they did, and what compressing leaves of it."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from almanac_edits import Change, World, probes, request, texts
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from errata.editor.delta import Delta, applied, empty_delta, load_delta, weight_of
from errata.editor.earlier import Earlier
from errata.editor.errors import ErrataError
from errata.editor.evaluation import Evaluation, Metric, evaluate
from errata.editor.methods import EditSettings, Method, edit, key_metric, solve_layer
from errata.editor.model import EditableModel
from errata.editor.recording import Recording, record
from errata.editor.requests import EditRequest
from errata.editor.solver import HeldKeys
from errata.editor.states import Component
from errata.editor.statistics import KeyStatistics
from errata.editor.values import ValueSettings, optimise_values

MOST_JUDGED = 334
"""Edits whose probes are asked at a checkpoint."""

EACH_KEY = 256
"""Requests that are held with each of their keys."""

TOLERANCES = (1e-7, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Of re-compression (`Delta.compressed`)."""

JUDGED = {
    Metric.EFFICACY: "efficacy",
    Metric.PHRASING_GENERALIZATION: "phrasings",
    Metric.OTHER_SUBJECTS: "other subjects",
    Metric.SAME_IMAGE: "same subject",
    Metric.PORTABILITY: "portraits",
}
"""The metrics, and what they are called here."""

LAYERS = (1,)
"""The peak of the trace of facts that are never edited (`almanac_measure`); AUTO adds layer 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is measured at once. `held` is how many of the newest requests an edit holds; a `batch` holds none.

    Values are found on the base, for all edits at once; `anew`, on the version that each edit is made on.
    """

    method: Method
    held: int = 0
    batch: int = 0
    seed: int = 1
    anew: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        kind = f"batch-{self.batch}" if self.batch else f"sequence-held-{self.held}"
        return f"{self.method.value}-{kind}-seed-{self.seed}" + ("-anew" if self.anew else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all cells share. `made` is where values and deltas are kept."""

    model: EditableModel
    statistics: KeyStatistics
    world: World
    made: Path
    checkpoints: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A change with what its edit needs: v*, and of each context the key and what the base puts out there."""

    change: Change
    value: Float[Tensor, " d"]
    keys: Float[Tensor, "m n"]
    outputs: Float[Tensor, "d n"]


def prepared(bench: Bench, facts: Sequence[Change], values: ValueSettings, name: str) -> list[Prepared]:
    """The values of all facts, descended together on the base or read from an earlier run, and their keys.

    An edit changes one layer alone. So no edit changes a key, and v*, which takes the place of what the layer's MLP
    puts out, means to the layers above what it meant on the base.
    """
    requests, path = [request(c) for c in facts], bench.made / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = optimise_values(bench.model, requests, LAYERS[0], values)
        save_file({"values": torch.stack([v.value for v in found])}, path)
    stored = load_file(path)["values"].double()
    sites = [bench.model.encode_at(c, field="contexts") for r in requests for c in r.contexts]
    rows, ends = zip(*sites, strict=True)
    recorded = iter(record(bench.model, rows, ends, components=(Component.MLP,), key_layers=LAYERS, resumable=False))
    return [
        _prepared(change, value, [next(recorded) for _ in r.contexts])
        for change, value, r in zip(facts, stored, requests, strict=True)
    ]


def _prepared(change: Change, value: Float[Tensor, " d"], contexts: Sequence[Recording]) -> Prepared:
    layer = LAYERS[0]
    return Prepared(
        change=change,
        value=value,
        keys=torch.stack([r.keys[layer][0].double() for r in contexts], dim=1),
        outputs=torch.stack([r.outputs[Component.MLP][layer, 0].double() for r in contexts], dim=1),
    )


@dataclass(slots=True)
class Made:
    """A sequence as it grows: the delta of all edits, what was edited, and what each edit cost."""

    delta: Delta
    done: list[Change] = field(default_factory=list)
    ranks: int = 0
    nbytes: int = 0
    seconds: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, delta: Delta) -> None:
        """One edit more."""
        self.ranks += sum(delta.compressed().ranks.values())
        self.nbytes += delta.compressed().nbytes
        self.delta = (self.delta + delta).compressed()


def sequence(bench: Bench, cell: Cell, facts: Sequence[Prepared], settings: EditSettings) -> Iterator[dict[str, Any]]:
    """Edits all facts, each on the version before, and judges at every checkpoint."""
    made = Made(empty_delta(bench.model))
    for n, fact in enumerate(facts[: bench.checkpoints[-1]]):
        began, held = time.process_time(), facts[max(0, n - cell.held) : n]
        if cell.anew:
            edit_anew(bench, made, [fact.change], settings, [replace(request(h.change), preserve=()) for h in held])
        else:
            solve_next(bench, made, [fact], settings, held)
        made.seconds.append(time.process_time() - began)
        if len(made.done) in bench.checkpoints:
            made.delta.save(bench.made / cell.name)
            yield judged(bench, made)


def batch(bench: Bench, cell: Cell, facts: Sequence[Prepared], settings: EditSettings) -> Iterator[dict[str, Any]]:
    """Edits the first facts at once."""
    made = Made(empty_delta(bench.model))
    began = time.process_time()
    solve_next(bench, made, facts[: cell.batch], settings, [])
    made.seconds.append((time.process_time() - began) / cell.batch)
    made.delta.save(bench.made / cell.name)
    yield judged(bench, made)


def solve_next(
    bench: Bench, made: Made, facts: Sequence[Prepared], settings: EditSettings, held: Sequence[Prepared]
) -> None:
    """One edit more, to values that are known."""
    layer, keys = LAYERS[0], [f.keys for f in facts]
    low = made.delta.layers.get(layer)
    residuals = [f.value[:, None] - f.outputs - (low.dense() @ f.keys if low else 0) for f in facts]
    kept = HeldKeys()
    for fact in held:
        kept.add(_holding(fact, len(held)))
    try:
        found = solve_layer(keys, residuals, settings, key_metric(settings, bench.statistics, layer), kept)
        modules = {layer: bench.model.down_projection_name(layer)}
        made.add(Delta(base_sha256=bench.model.base_sha256, layers={layer: found}, modules=modules))
    except ErrataError as error:
        made.failed[type(error).__name__] += 1
    made.done += [f.change for f in facts]


def _holding(fact: Prepared, number: int) -> Float[Tensor, "m n"]:
    """The keys of one that is held: of more than `EACH_KEY` their mean, as those of one subject are hardly apart."""
    return fact.keys if number <= EACH_KEY else fact.keys.mean(1, keepdim=True)


def edit_anew(
    bench: Bench, made: Made, facts: Sequence[Change], settings: EditSettings, earlier: Sequence[EditRequest]
) -> None:
    """One edit more, as the service makes it; one that cannot be made is counted, and judged with the others."""
    requests, held = [request(c) for c in facts], Earlier.of(earlier, bench.made / "keys")
    try:
        found = edit(bench.model, requests, settings, bench.statistics, parent=made.delta, earlier=held)
        made.add(found.delta)
    except ErrataError as error:
        made.failed[type(error).__name__] += 1
    made.done += facts


def judged(bench: Bench, made: Made) -> dict[str, Any]:
    """Everything that is told of a version."""
    weight = weight_of(bench.model, LAYERS[0]).norm()
    return {
        "edits": len(made.done),
        **scores(bench, made.done, made.delta),
        "norm": made.delta.norm() / float(weight),
        "rank": max(made.delta.ranks.values(), default=0),
        "sum of ranks": made.ranks,
        "bytes": made.delta.nbytes,
        "sum of bytes": made.nbytes,
        "CPU seconds an edit": float(np.mean(made.seconds[-100:])),
        "failed": dict(made.failed),
    }


def scores(bench: Bench, done: Sequence[Change], delta: Delta) -> dict[str, float]:
    """Shares by generation, drift and fluency; of many edits `MOST_JUDGED`, evenly spread."""
    done = done[:: -(-len(done) // MOST_JUDGED)]
    asked = probes(done, bench.world)
    found = evaluate(bench.model, asked, applied(bench.model, delta), reference=texts(bench.world), max_new_tokens=16)
    shares = {name: _share(found, metric) for metric, name in JUDGED.items()}
    first = {c.name for c in done[: (len(done) + 1) // 2]}
    shares["efficacy, first half"] = _share(found, Metric.EFFICACY, first)
    told = [shares[JUDGED[m]] for m in list(JUDGED)[:4]]
    harmonic = len(told) / sum(1 / s for s in told) if all(told) else 0.0
    fluency = {"fluency before": found.fluency_before, "fluency": found.fluency}
    return {**shares, "harmonic": harmonic, "drift": found.drift, **fluency}


def _share(found: Evaluation, metric: Metric, requests: set[str] | None = None) -> float:
    passed = [
        r.passed
        for r in found.results
        if r.probe.metric is metric and (requests is None or r.probe.request in requests)
    ]
    return float(np.mean(passed)) if passed else 0.0


def compressions(bench: Bench, cell: Cell, facts: Sequence[Change]) -> Iterator[dict[str, Any]]:
    """What a cell's last delta says at a lower rank."""
    whole = load_delta(bench.made / cell.name, bench.model)
    for tolerance in TOLERANCES:
        began = time.process_time()
        less = whole.compressed(tolerance)
        seconds = time.process_time() - began
        yield {
            "tolerance": tolerance,
            "rank": max(less.ranks.values(), default=0),
            "bytes": less.nbytes,
            "error": (whole - less).norm() / whole.norm(),
            "CPU seconds": seconds,
            **scores(bench, facts, less),
        }
