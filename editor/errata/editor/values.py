"""Values: what each edited MLP should put out at the constraint, so that the target becomes the answer.

For each request the output v* = v₀ + δ of the down-projection at the constraint's last token is optimised by gradient
descent (Basu et al. 2024, §5; Meng et al. 2022, §3.1), from the mean v₀ of its contexts' own outputs:

    L(δ) = mean over contexts of −log p(target) + w_kl · mean over preserved prompts of KL(before ‖ after)
           + w_decay · (‖δ‖ / ‖v₀‖)²,          ‖δ‖ ≤ clamp · ‖v₀‖

One v* is put in place of every context's own output, not one δ added to each: a model that takes one thing for
another from picture to picture puts out something else each time, and only the same output means the same thing. p is
of all the target's tokens, its end included, not of the first alone as in the reference.

All requests of a batch descend together, from recorded states (`value_rows`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from errata.editor.errors import CancelledError, check_numbers
from errata.editor.memory import Memory
from errata.editor.model import EditableModel
from errata.editor.requests import EditRequest
from errata.editor.states import Component
from errata.editor.trace import Progress
from errata.editor.value_rows import RecordedRow, RowBatch, batches_of, graph_bytes, packs_of, recorded_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueSettings:
    """How values are optimised.

    `learning_rate` is Adam's, as the length of a step relative to ‖v₀‖.
    `clamp` and `decay` are relative to ‖v₀‖, the mean norm of the MLP's own output at the contexts' constraints, or
    to the norm of the residual stream there if that is larger: an early MLP's own output can be tiny.
    `stop_loss` ends a request whose target loss, in nats, and whose KL, in nats, are both below it. The first
    `most_contexts` of a request are descended on; the rest only lend the edit their keys, which cost little.
    `max_rows` bounds the rows run at once; fewer are where memory holds no more.
    """

    steps: int = 150
    learning_rate: float = 0.2
    clamp: float = 3.0
    decay: float = 1e-3
    kl_weight: float = 1.0
    stop_loss: float = 0.02
    most_contexts: int = 12
    max_rows: int = 128

    def __post_init__(self) -> None:
        at_least = {"steps": 0, "most_contexts": 1, "max_rows": 1, "decay": 0.0, "kl_weight": 0.0, "stop_loss": 0.0}
        check_numbers(self, at_least=at_least, above={"learning_rate": 0.0, "clamp": 0.0})


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """The optimised v* of one request, and how the descent went.

    `delta` is v* − v₀, `scale` the norm that clamp and decay are relative to.
    `losses` are the target losses in nats per answer, step by step; `kl` the last mean KL on the preserved prompts.
    """

    value: Float[Tensor, " d"]
    delta: Float[Tensor, " d"]
    scale: float
    losses: tuple[float, ...]
    kl: float
    converged: bool


def optimise_values(
    model: EditableModel,
    requests: Sequence[EditRequest],
    layer: int,
    settings: ValueSettings = ValueSettings(),
    *,
    memory: Memory | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Value]:
    """The δ of every request at `layer`, optimised together. The model is left as it was.

    A request that does not reach `stop_loss` within `steps` is returned with `converged` False. `memory` says what
    rows may take; None: what the model's device has. Raises MemoryLimitError where one row takes more.
    """
    memory = memory or Memory.of(model.device)
    stop = partial(_raise_if, cancelled)
    rows = recorded_rows(model, requests, layer, settings.most_contexts, memory, stop)
    start, scales = _start(rows, layer, len(requests))
    descent = _Descent(start, scales, settings)
    packs = packs_of(rows)
    most = memory.rows(settings.max_rows, graph_bytes(model, packs, layer))
    batches = [RowBatch(model, batch, layer) for batch in batches_of(packs, most)]
    counts = _counts(rows, len(requests)).to(model.device)
    for step in range(settings.steps + 1):
        stop()
        values, means = descent.values.requires_grad_(), torch.zeros_like(counts)
        run = partial(
            RowBatch.add_losses,
            values=values,
            counts=counts,
            means=means,
            kl_weight=settings.kl_weight,
            descend=step < settings.steps,
        )
        batches = [fitting for batch in batches for fitting, _ in memory.fit(run, batch, RowBatch.halves)]
        newly_done = descent.observe(*means.cpu())
        if progress:
            progress(step, settings.steps)
        if values.grad is None or bool(descent.done.all()):
            break
        descent.step(values.grad)
        if newly_done:  # their rows are no longer run
            batches = [b for batch in batches if (b := batch.without(descent.done))]
    return descent.found()


def _raise_if(cancelled: Callable[[], bool] | None) -> None:
    if cancelled and cancelled():
        raise CancelledError("the value optimisation was cancelled; nothing was changed")


class _Descent:
    """Adam on every request's δ, in units of its scale, inside the clamp, and how far each has come."""

    def __init__(
        self, start: Float[Tensor, "requests d"], scales: Float[Tensor, " requests"], settings: ValueSettings
    ) -> None:
        n, d = start.shape
        self._start, self._unit, self._settings = start, scales.to(start.device)[:, None], settings
        self._delta = torch.zeros(n, d, dtype=torch.float32, device=start.device, requires_grad=True)
        # Adam moves every coordinate by about its rate: over d of them that is a step of rate · √d.
        self._optimizer = torch.optim.Adam([self._delta], lr=settings.learning_rate / d**0.5)
        self._best = torch.zeros_like(start, dtype=torch.float32)
        self._curves: list[list[float]] = [[] for _ in range(n)]
        self._kl = torch.zeros(n, dtype=torch.float32)
        self.done = torch.zeros(n, dtype=torch.bool)

    @property
    def values(self) -> Float[Tensor, "requests d"]:
        """v* of every request as it stands."""
        return self._start + self._delta.detach() * self._unit

    def observe(self, target: Float[Tensor, " requests"], kl: Float[Tensor, " requests"]) -> bool:
        """Takes in the losses of `values`; returns whether any request is newly done."""
        for i in (~self.done).nonzero().flatten().tolist():
            self._curves[i].append(float(target[i]))
        self._kl = torch.where(self.done, self._kl, kl)
        self._best = torch.where(self.done[:, None].to(self._best.device), self._best, self._delta.detach())
        reached = (target < self._settings.stop_loss) & (kl < self._settings.stop_loss) & ~self.done
        self.done = self.done | reached
        return bool(reached.any())

    def step(self, gradient: Float[Tensor, "requests d"]) -> None:
        """One step down the gradient of the losses by the values, and down the decay's."""
        active = (~self.done).to(self._delta.device)[:, None]
        delta = self._delta.detach()
        self._delta.grad = (gradient * self._unit + 2 * self._settings.decay * delta) * active
        self._optimizer.step()
        with torch.no_grad():
            norm = self._delta.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            self._delta.mul_((self._settings.clamp / norm).clamp(max=1.0))

    def found(self) -> list[Value]:
        """Every request's v* where it was done, or where it stood at the last."""
        final = self._best * self._unit
        return [
            Value(
                value=self._start[i] + final[i],
                delta=final[i],
                scale=float(self._unit[i]),
                losses=tuple(self._curves[i]),
                kl=float(self._kl[i]),
                converged=bool(self.done[i]),
            )
            for i in range(len(final))
        ]


def _start(
    rows: Sequence[RecordedRow], layer: int, n: int
) -> tuple[Float[Tensor, "requests d"], Float[Tensor, " requests"]]:
    """v₀ of each request, its contexts' mean output, and the scale: the larger of the mean norms of the MLP's output
    and of the residual stream that it joins.
    """
    device, d = rows[0].recording.inputs.device, rows[0].recording.inputs.shape[-1]
    outputs, own, stream, count = (torch.zeros(n, k, dtype=torch.float32, device=device) for k in (d, 1, 1, 1))
    for row, recording in ((r.row, r.recording) for r in rows):
        if not row.preserved:
            output = recording.outputs[Component.MLP][layer, 0].float()
            outputs[row.request] += output
            own[row.request] += output.norm()
            stream[row.request] += recording.inputs[layer, recording.start - recording.begin].float().norm()
            count[row.request] += 1
    return outputs / count, (torch.maximum(own, stream) / count).squeeze(1)


def _counts(rows: Sequence[RecordedRow], n: int) -> Float[Tensor, "2 requests"]:
    """Rows of each request: contexts, and preserved prompts."""
    counts = torch.zeros(2, n, dtype=torch.float32)
    for r in rows:
        counts[int(r.row.preserved), r.row.request] += 1
    return counts.clamp(min=1)
