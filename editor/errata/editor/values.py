"""Values: what each edited MLP should put out at the constraint, so that the target becomes the answer.

For each request the output v* = v₀ + δ of the down-projection at the constraint's last token is optimised by gradient
descent (Basu et al. 2024, §5; Meng et al. 2022, §3.1), from the mean v₀ of its contexts' own outputs:

    L(δ) = mean over contexts of −log p(target) + w_kl · mean over preserved prompts of KL(before ‖ after)
           + w_decay · (‖δ‖ / ‖v₀‖)²,          ‖δ‖ ≤ clamp · ‖v₀‖

One v* is put in place of every context's own output, not one δ added to each: a model that takes one thing for
another from picture to picture puts out something else each time, and only the same output means the same thing. p is
of all the target's tokens, its end included, not of the first alone as in the reference. All requests of a
batch descend together, from recorded states: only the layers from the edited one up are run, and only the tokens
from the constraint's last on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from errata.editor.errors import CancelledError, check_numbers
from errata.editor.model import EditableModel, Encoded, same_answer
from errata.editor.requests import EditRequest
from errata.editor.states import Component, Recording, Suffix, record
from errata.editor.trace import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueSettings:
    """How values are optimised.

    `learning_rate` is Adam's, as the length of a step relative to ‖v₀‖.
    `clamp` and `decay` are relative to ‖v₀‖, the mean norm of the MLP's own output at the contexts' constraints, or
    to the norm of the residual stream there if that is larger: an early MLP's own output can be tiny.
    `stop_loss` ends a request whose target loss, in nats, and whose KL, in nats, are both below it. The first
    `most_contexts` of a request are descended on; the rest only lend the edit their keys, which cost little.
    `max_rows` bounds the rows run at once, and with it memory.
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


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt of one request with the answer that is scored after it."""

    request: int
    encoded: Encoded
    site: int
    preserved: bool


def optimise_values(
    model: EditableModel,
    requests: Sequence[EditRequest],
    layer: int,
    settings: ValueSettings = ValueSettings(),
    *,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> list[Value]:
    """The δ of every request at `layer`, optimised together. The model is left as it was.

    A request that does not reach `stop_loss` within `steps` is returned with `converged` False.
    """
    rows = _rows(model, requests, settings.most_contexts)
    recordings = record(
        model,
        [r.encoded.replaced(r.encoded.ids[:-1]) for r in rows],
        [r.site for r in rows],
        components=(Component.MLP,),
    )
    start, scales = _start(rows, recordings, layer, len(requests))
    descent = _Descent(start, scales, settings)
    batches = _batches(model, rows, recordings, layer, settings.max_rows)
    counts = _counts(rows, len(requests)).to(model.device)
    for step in range(settings.steps + 1):
        if cancelled and cancelled():
            raise CancelledError("the value optimisation was cancelled; nothing was changed")
        values = descent.values.requires_grad_()
        target, kl = _losses(batches, values, counts, settings.kl_weight, descend=step < settings.steps)
        newly_done = descent.observe(target, kl)
        if progress:
            progress(step, settings.steps)
        if values.grad is None or bool(descent.done.all()):
            break
        descent.step(values.grad)
        if newly_done:  # their rows are no longer run
            batches = [b for b in (b.without(descent.done) for b in batches) if len(b)]
    return descent.found()


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


def _rows(model: EditableModel, requests: Sequence[EditRequest], most_contexts: int) -> list[_Row]:
    rows = []
    for i, request in enumerate(requests):
        for j, context in enumerate(request.contexts[:most_contexts]):
            field = f"requests[{i}].contexts[{j}]"
            encoded, site = model.encode_at(context, context.answer or request.target, field=field)
            rows.append(_Row(request=i, encoded=encoded, site=site, preserved=False))
    kept = [(i, j, c) for i, r in enumerate(requests) for j, c in enumerate(r.preserve)]
    answers = model.generate([c.prompt for _, _, c in kept])
    for (i, j, context), answer in zip(kept, answers, strict=True):
        if answer.text and (context.answer is None or same_answer(answer.text, context.answer)):
            encoded, site = model.encode_at(context, answer.text, field=f"requests[{i}].preserve[{j}]")
            rows.append(_Row(request=i, encoded=encoded, site=site, preserved=True))
    return rows


def _start(
    rows: Sequence[_Row], recordings: Sequence[Recording], layer: int, n: int
) -> tuple[Float[Tensor, "requests d"], Float[Tensor, " requests"]]:
    """v₀ of each request, its contexts' mean output, and the scale: the larger of the mean norms of the MLP's output
    and of the residual stream that it joins.
    """
    device, d = recordings[0].inputs.device, recordings[0].inputs.shape[-1]
    outputs, own, stream, count = (torch.zeros(n, k, dtype=torch.float32, device=device) for k in (d, 1, 1, 1))
    for row, recording in zip(rows, recordings, strict=True):
        if not row.preserved:
            output = recording.outputs[Component.MLP][layer, 0].float()
            outputs[row.request] += output
            own[row.request] += output.norm()
            stream[row.request] += recording.inputs[layer, recording.start - recording.begin].float().norm()
            count[row.request] += 1
    return outputs / count, (torch.maximum(own, stream) / count).squeeze(1)


def _batches(
    model: EditableModel, rows: Sequence[_Row], recordings: Sequence[Recording], layer: int, limit: int
) -> list["_RowBatch"]:
    """Rows of about the same length together, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda i: recordings[i].length - rows[i].site)
    parts = [order[i : i + limit] for i in range(0, len(order), limit)]
    return [_RowBatch(model, [rows[i] for i in part], [recordings[i] for i in part], layer) for part in parts]


class _RowBatch:
    """Rows that are run together, with what their answers were before any edit."""

    def __init__(self, model: EditableModel, rows: Sequence[_Row], recordings: Sequence[Recording], layer: int) -> None:
        self._model, self._layer = model, layer
        self._rows, self._recordings = rows, recordings
        if not rows:
            return
        self._suffix = Suffix(model, recordings, [r.site for r in rows])
        self._sites = torch.tensor(self._suffix.offsets, device=model.device)
        self.request = torch.tensor([r.request for r in rows], device=model.device)
        self.preserved = torch.tensor([r.preserved for r in rows], device=model.device)
        self._answer, self._at = self._answers(rows)
        with torch.no_grad():
            self._before = self._log_probabilities(None)

    def __len__(self) -> int:
        return len(self._rows)

    def without(self, done: Tensor) -> "_RowBatch":
        """The batch without the rows of the requests that are done; itself where that leaves out nothing."""
        kept = [i for i, row in enumerate(self._rows) if not done[row.request]]
        if len(kept) == len(self._rows):
            return self
        return _RowBatch(self._model, [self._rows[i] for i in kept], [self._recordings[i] for i in kept], self._layer)

    def losses(self, values: Float[Tensor, "requests d"]) -> Float[Tensor, " rows"]:
        """−log p(target) of each context, KL(before ‖ after) of each preserved prompt, both summed over the answer."""
        after = self._log_probabilities(values[self.request])
        scored = self._answer >= 0
        chosen = after.gather(-1, self._answer.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        target = -(chosen * scored).sum(-1)
        divergence = ((self._before.exp() * (self._before - after)).sum(-1) * scored).sum(-1)
        return torch.where(self.preserved, divergence, target)

    def _log_probabilities(self, values: Tensor | None) -> Float[Tensor, "rows answer vocabulary"]:
        hidden = self._suffix.inputs(self._layer)
        with self._suffix as suffix:
            for layer in range(self._layer, len(self._model.layers)):
                puts = {}
                if values is not None and layer == self._layer:
                    puts = {Component.MLP: _putting(values, self._sites)}
                hidden = suffix.run(layer, hidden, puts)
            rows = torch.arange(len(hidden), device=hidden.device)[:, None]
            return suffix.logits(hidden[rows, self._at]).log_softmax(-1)

    def _answers(self, rows: Sequence[_Row]) -> tuple[Int[Tensor, "rows answer"], Int[Tensor, "rows answer"]]:
        """The answers' ids, −1 where a row has no more, and the suffix positions that predict them."""
        longest = max(len(r.encoded.answer) for r in rows)
        ids = torch.full((len(rows), longest), -1)
        at = torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row.encoded.answer)
            ids[i, :n] = row.encoded.answer
            at[i, :n] = torch.arange(n) + row.encoded.prompt_length - 1 - self._suffix.begins[i]
        return ids.to(self._model.device), at.to(self._model.device)


def _putting(values: Float[Tensor, "rows d"], sites: Int[Tensor, " rows"]) -> Callable[[Tensor], Tensor]:
    """Makes each row's v* the MLP's output at the row's site, where its constraint ends."""

    def change(output: Tensor) -> Tensor:
        return output.index_put((torch.arange(len(sites), device=sites.device), sites), values.to(output.dtype))

    return change


def _counts(rows: Sequence[_Row], n: int) -> Float[Tensor, "2 requests"]:
    """Rows of each request: contexts, and preserved prompts."""
    counts = torch.zeros(2, n, dtype=torch.float32)
    for row in rows:
        counts[int(row.preserved), row.request] += 1
    return counts.clamp(min=1)


def _losses(
    batches: Sequence[_RowBatch],
    values: Float[Tensor, "requests d"],
    counts: Float[Tensor, "2 requests"],
    kl_weight: float,
    *,
    descend: bool,
) -> tuple[Float[Tensor, " requests"], Float[Tensor, " requests"]]:
    """Mean target loss and mean KL of each request, and, to `descend`, their gradient into `values.grad`.

    Batch by batch, so that only one batch's graph is held at a time.
    """
    means = torch.zeros_like(counts)
    for batch in batches:
        with torch.set_grad_enabled(descend):
            kind = batch.preserved.long()
            shares = batch.losses(values) / counts[kind, batch.request]
        if descend:
            torch.where(batch.preserved, kl_weight * shares, shares).sum().backward()
        means.index_put_((kind, batch.request), shares.detach(), accumulate=True)
    target, kl = means.cpu()
    return target, kl
