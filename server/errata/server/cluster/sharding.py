"""Traces and evaluations in shards over workers that hold the model: the numbers are those of one process.

A question is traced by itself, and a probe answered by itself, so where they run changes nothing but which prompts
share a batch.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from socket import gethostname
from typing import Literal, TypeVar

import torch
from transformers.utils.logging import disable_progress_bar

from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.delta import Delta, applied
from errata.editor.errors import CancelledError, ErrataError, InvalidInputError, ModelError
from errata.editor.evaluation import Evaluation, Probe, evaluate
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt
from errata.editor.trace import CausalTrace, Progress, TraceRequest, TraceSettings, trace
from errata.server.cluster.errors import ClusterError
from errata.server.cluster.workers import Ended, Workers

R = TypeVar("R")

_PROBES = 64
"""A shard of an evaluation: as many as the editor answers in a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that every worker can load: "atlas", a folder that all nodes have, or a hub's name.

    `base_sha256` is the base's hash, as versions and the server's models have it; empty: whatever lies there.
    """

    source: str = ATLAS
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    quantization: Literal["none", "bnb-8bit", "bnb-4bit", "bnb-4bit-fp4"] = "none"
    base_sha256: str = ""

    def __call__(self) -> EditableModel:
        """Loads it. Raises ModelError."""
        disable_progress_bar()  # nobody sees a worker's
        dtype = getattr(torch, self.dtype)
        model = load_model(self.source, dtype=dtype, device=self.device, quantization=self.quantization)
        if self.base_sha256 not in ("", model.base_sha256):
            raise ModelError(
                f"the checkpoint {self.source!r} is {model.base_sha256} on {gethostname()!r}, and {self.base_sha256} "
                "is asked for; give all nodes the same"
            )
        return model


def sharded_traces(
    workers: Workers[EditableModel],
    requests: Sequence[TraceRequest],
    settings: TraceSettings | None = None,
    *,
    deltas: Sequence[Delta] = (),
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[CausalTrace | ErrataError]:
    """Each question's trace, on the version that `deltas` make, or the error that it ended with, in their order.

    A single question raises nothing: the others would be lost with it. Raises ClusterError where the workers' models
    are not the same. `progress` is told the questions that have ended and all of them; `cancelled` is asked after
    each, and ends all with CancelledError.
    """
    task = partial(_traced, deltas=tuple(deltas), settings=settings or TraceSettings())
    found: dict[int, CausalTrace | ErrataError] = {}
    bases = set[str]()
    for ended in _watched(workers.map(task, requests), len(requests), progress, cancelled):
        if isinstance(ended.outcome, ErrataError):
            found[ended.shard] = ended.outcome
        else:
            base, found[ended.shard] = ended.outcome
            bases.add(base)
            _check_same(bases)
    return [found[i] for i in range(len(requests))]


def sharded_evaluation(
    workers: Workers[EditableModel],
    probes: Sequence[Probe],
    child: Delta,
    *,
    parent: Sequence[Delta] = (),
    reference: Sequence[Prompt] = (),
    max_new_tokens: int = 16,
    probes_per_shard: int = _PROBES,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Evaluation:
    """What `evaluate` finds for `child` on the version that `parent` makes, the probes in shards.

    Drift and fluency are of all reference prompts together, and so of one shard. Raises what any shard ended with.
    `progress` is told shards, `cancelled` asked after each, as for traces.
    """
    if probes_per_shard < 1:
        raise InvalidInputError(f"probes_per_shard is {probes_per_shard}; give at least 1", field="probes_per_shard")
    starts = range(0, len(probes), probes_per_shard)
    pieces = [_Shard(first=i, probes=tuple(probes[i : i + probes_per_shard])) for i in starts]
    # First, as the longest: free text is generated from each of them.
    shards = [_Shard(reference=tuple(reference)), *pieces]
    task = partial(_evaluated, parent=tuple(parent), child=child, max_new_tokens=max_new_tokens)
    found = dict[int, Evaluation]()
    for ended in _watched(workers.map(task, shards), len(shards), progress, cancelled):
        if isinstance(ended.outcome, ErrataError):
            raise ended.outcome
        found[ended.shard] = ended.outcome
    of_reference, *of_probes = (found[i] for i in range(len(shards)))
    return Evaluation(
        results=tuple(result for each in of_probes for result in each.results),
        drift=of_reference.drift,
        fluency_before=of_reference.fluency_before,
        fluency=of_reference.fluency,
    )


def _watched(
    ended: Iterator[Ended[R]], shards: int, progress: Progress | None, cancelled: Callable[[], bool] | None
) -> Iterator[Ended[R]]:
    """The ends of so many shards as they come. Raises CancelledError; what workers are at is then not waited for."""
    for done, each in enumerate(ended, start=1):
        if progress:
            progress(done, shards)
        yield each
        if done < shards and cancelled and cancelled():
            raise CancelledError(f"cancelled after {done} of {shards} shards; nothing was changed")


def _check_same(bases: Collection[str]) -> None:
    if len(bases) > 1:
        raise ClusterError(f"the workers' checkpoints are {' and '.join(sorted(bases))}; give all nodes the same")


def _traced(
    model: EditableModel, request: TraceRequest, *, deltas: tuple[Delta, ...], settings: TraceSettings
) -> tuple[str, CausalTrace]:
    """With the hash of the base that it was traced on."""
    with applied(model, *deltas):
        return model.base_sha256, trace(model, request, settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shard:
    """Some of an evaluation's probes, from number `first` on, or its reference prompts."""

    first: int = 0
    probes: tuple[Probe, ...] = ()
    reference: tuple[Prompt, ...] = ()


def _evaluated(
    model: EditableModel,
    shard: _Shard,
    *,
    parent: tuple[Delta, ...],
    child: Delta,
    max_new_tokens: int,
) -> Evaluation:
    with applied(model, *parent):
        return evaluate(
            model,
            shard.probes,
            applied(model, child),
            reference=shard.reference,
            max_new_tokens=max_new_tokens,
            field=lambda i: f"probes[{shard.first + i}]",
        )
