"""Runs of one question with clean states put back, in batches that climb the layers together.

A run restored at a token and from a layer on equals the corrupted run before that token and below that layer, so it
starts there. Runs of several windows, components and corruptions share a batch, and a run that two windows ask for is
made once. Knows nothing about how a question is corrupted (`trace`, `measurements.noise`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from errata.editor.errors import CancelledError
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded
from errata.editor.recording import Recording
from errata.editor.states import Component, logits_of
from errata.editor.suffix import Suffix


@dataclass(frozen=True, slots=True, kw_only=True)
class Probabilities:
    """Of the answer's first token, and of the whole answer including its end."""

    first: float
    whole: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoration:
    """One restored run: the clean outputs of `component` in `layers` at one token, or at several together.

    `tokens` count from the suffix's first.
    """

    component: Component
    layers: range
    tokens: tuple[int, ...] = (0,)


def window_of(layer: int, window: int, layers: int) -> range:
    """The layers restored together under `layer`: `window` of them centred on it, cut at the model's ends."""
    low = layer - window // 2
    return range(max(0, low), min(layers, low + window))


class AnswerReader:
    """Reads the answer's probabilities from the last layer's outputs."""

    def __init__(self, model: EditableModel, row: Encoded) -> None:
        self._model, self._answer = model, row.answer.to(model.device)
        self._first = row.prompt_length - 1

    def recorded(self, recording: Recording) -> Probabilities:
        """Of a recorded run."""
        suffix = Suffix(self._model, [recording], [recording.start])
        with suffix, torch.no_grad():
            top = len(self._model.layers) - 1
            hidden = suffix.run(top, suffix.inputs(top))
            return self.of(suffix, hidden, recording.start)[0]

    def of(self, suffix: Suffix, hidden: Float[Tensor, "rows suffix d"], start: int) -> list[Probabilities]:
        """Of each row, which starts at `start`."""
        at = self._first - start + suffix.spans[0][1].start
        logits = logits_of(self._model, hidden[:, at : at + len(self._answer)])
        chosen = logits.log_softmax(-1).gather(-1, self._answer.expand(len(hidden), -1).unsqueeze(-1)).squeeze(-1)
        whole, first = chosen.double().sum(-1).exp(), chosen[:, 0].double().exp()
        return [Probabilities(first=f, whole=w) for f, w in zip(first.tolist(), whole.tolist(), strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restorer:
    """Restores states of `clean` in corrupted runs.

    `max_rows` bounds a batch, which holds at least one restoration in each corrupted run; smaller ones are run where
    `memory` holds no more.
    """

    clean: Recording
    reader: AnswerReader
    max_rows: int
    cancelled: Callable[[], bool] | None = None
    memory: Memory | None = None

    def __call__(
        self, suffix: Suffix, start: int, restorations: Iterable[Restoration], layers: int
    ) -> dict[Restoration, tuple[Probabilities, ...]]:
        """Makes each of the restored runs once, from token `start` on: one in each of the corrupted runs.

        `suffix` must be open and continue the corrupted runs from `start`. Raises CancelledError between batches, and
        MemoryLimitError where one restoration does not fit.
        """
        runs = sorted(dict.fromkeys(restorations), key=lambda r: r.layers.start)
        found: dict[Restoration, tuple[Probabilities, ...]] = {}
        draws = suffix.rows

        def run(batch: Sequence[Restoration]) -> None:
            if self.cancelled and self.cancelled():
                raise CancelledError("the causal trace was cancelled; nothing was changed")
            hidden = self._climb(suffix, start - self.clean.start, batch, layers)
            told = self.reader.of(suffix, hidden, start)
            found.update({one: tuple(told[n * draws : (n + 1) * draws]) for n, one in enumerate(batch)})

        memory = self.memory or Memory.of(self.clean.inputs.device)
        most, row_bytes = max(1, self.max_rows // draws), draws * suffix.row_bytes
        memory.parts(run, runs, most=most, row_bytes=row_bytes)
        return found

    def _climb(
        self, suffix: Suffix, offset: int, runs: Sequence[Restoration], layers: int
    ) -> Float[Tensor, "runs_and_draws suffix d"]:
        """The last layer's outputs of runs in order of their lowest layer, at which each joins the batch."""
        first, draws = runs[0].layers.start, suffix.rows
        hidden = suffix.inputs(first)[:0]
        for layer in range(first, layers):
            joining = sum(r.layers.start == layer for r in runs)
            if joining:
                hidden = torch.cat([hidden, suffix.inputs(layer).repeat(joining, 1, 1)])
            hooks = {}
            for component, outputs in self.clean.outputs.items():
                sites = [
                    (row, token)
                    for n, run in enumerate(runs[: len(hidden) // draws])
                    if run.component == component and layer in run.layers
                    for row in range(n * draws, (n + 1) * draws)
                    for token in run.tokens
                ]
                if sites:
                    rows, tokens = map(list, zip(*sites, strict=True))
                    at = [suffix.spans[0][1].start + t for t in tokens]
                    hooks[component] = _put(rows, at, outputs[layer, offset:][tokens])
            hidden = suffix.run(layer, hidden, hooks)
        return hidden


def _put(rows: list[int], tokens: list[int], values: Float[Tensor, "sites d"]) -> Callable[[Tensor], Tensor]:
    """Sets the given tokens of the given rows."""

    def change(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[rows, tokens] = values
        return changed

    return change
