"""Traces and evaluations in shards over workers that hold the model: the numbers are those of one process.

A question is traced by itself, and a probe answered by itself, so where they run changes nothing but which prompts
share a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from transformers.utils.logging import disable_progress_bar

from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.delta import Delta, applied
from errata.editor.errors import ErrataError, InvalidInputError
from errata.editor.evaluation import Evaluation, Probe, evaluate
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt
from errata.editor.trace import CausalTrace, TraceRequest, TraceSettings, trace
from errata.server.cluster.workers import Workers

_PROBES = 64
"""A shard of an evaluation: as many as the editor answers in a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that every worker can load: "atlas", a folder that all nodes have, or a hub's name."""

    source: str = ATLAS
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    quantization: Literal["none", "bnb-8bit", "bnb-4bit", "bnb-4bit-fp4"] = "none"

    def __call__(self) -> EditableModel:
        """Loads it. Raises ModelError."""
        disable_progress_bar()  # nobody sees a worker's
        dtype = getattr(torch, self.dtype)
        return load_model(self.source, dtype=dtype, device=self.device, quantization=self.quantization)


def sharded_traces(
    workers: Workers[EditableModel],
    requests: Sequence[TraceRequest],
    settings: TraceSettings | None = None,
    *,
    deltas: Sequence[Delta] = (),
) -> list[CausalTrace | ErrataError]:
    """Each question's trace, on the version that `deltas` make, or the error that it ended with, in their order.

    Raises nothing for a single question: the others would be lost with it.
    """
    found: dict[int, CausalTrace | ErrataError] = {
        ended.shard: ended.outcome
        for ended in workers.map(partial(_traced, deltas=tuple(deltas), settings=settings or TraceSettings()), requests)
    }
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
) -> Evaluation:
    """What `evaluate` finds for `child` on the version that `parent` makes, the probes in shards.

    Drift and fluency are of all reference prompts together, and so of one shard. Raises what any shard ended with.
    """
    if probes_per_shard < 1:
        raise InvalidInputError(f"probes_per_shard is {probes_per_shard}; give at least 1", field="probes_per_shard")
    pieces = [(tuple(probes[i : i + probes_per_shard]), ()) for i in range(0, len(probes), probes_per_shard)]
    # First, as the longest: free text is generated from each of them.
    shards: list[tuple[tuple[Probe, ...], tuple[Prompt, ...]]] = [((), tuple(reference)), *pieces]
    task = partial(_evaluated, parent=tuple(parent), child=child, max_new_tokens=max_new_tokens)
    found = dict[int, Evaluation]()
    for ended in workers.map(task, shards):
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


def _traced(
    model: EditableModel, request: TraceRequest, *, deltas: tuple[Delta, ...], settings: TraceSettings
) -> CausalTrace:
    with applied(model, *deltas):
        return trace(model, request, settings)


def _evaluated(
    model: EditableModel,
    shard: tuple[tuple[Probe, ...], tuple[Prompt, ...]],
    *,
    parent: tuple[Delta, ...],
    child: Delta,
    max_new_tokens: int,
) -> Evaluation:
    probes, reference = shard
    with applied(model, *parent):
        return evaluate(model, probes, applied(model, child), reference=reference, max_new_tokens=max_new_tokens)
