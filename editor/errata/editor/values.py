"""Values: what each edited MLP should put out at the constraint, so that the target becomes the answer.

For each request the output v* = v₀ + δ of the down-projection at the constraint's last token is optimised by gradient
descent (Basu et al. 2024, §5; Meng et al. 2022, §3.1), from the mean v₀ of its contexts' own outputs:

    L(δ) = mean over contexts of −log p(target) + w_kl · mean over preserved prompts of KL(before ‖ after)
           + w_decay · (‖δ‖ / ‖v₀‖)²,          ‖δ‖ ≤ clamp · ‖v₀‖

One v* is put in place of every context's own output, not one δ added to each: a model that takes one thing for
another from picture to picture puts out something else each time, and only the same output means the same thing. p is
of all the target's tokens, its end included, not of the first alone as in the reference.

All requests of a batch descend together, from recorded states: only the layers above the edited one are run, and only
the tokens from the constraint's last on; of the edited layer v* alone changes what joins the residual stream. Rows of
one picture share its keys and values (`branching`) and stand in one row of a batch, so that none is padded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from errata.editor.answering import answer_rows
from errata.editor.branching import Trunk, forget_below, trunks_of
from errata.editor.errors import CancelledError, InvalidInputError, check_numbers
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded, ReadPrompt, same_answer
from errata.editor.recording import Recording, record
from errata.editor.requests import Context, EditRequest
from errata.editor.states import Component, logits_of
from errata.editor.suffix import Suffix
from errata.editor.trace import Progress


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


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt of one request with the answer that is scored after it."""

    request: int
    encoded: Encoded
    site: int
    preserved: bool
    trunk: Trunk | None

    @property
    def tokens(self) -> int:
        """Tokens from the constraint's last to the last that predicts one."""
        return len(self.encoded.ids) - 1 - self.site


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
    rows = _recorded(model, requests, layer, settings.most_contexts, memory, stop)
    start, scales = _start(rows, layer, len(requests))
    descent = _Descent(start, scales, settings)
    packs = _packs(rows)
    most = memory.rows(settings.max_rows, _graph_bytes(model, packs, layer))
    batches = [_RowBatch(model, batch, layer) for batch in _batches(packs, most)]
    counts = _counts(rows, len(requests)).to(model.device)
    for step in range(settings.steps + 1):
        stop()
        values, means = descent.values.requires_grad_(), torch.zeros_like(counts)
        run = partial(
            _RowBatch.add_losses,
            values=values,
            counts=counts,
            means=means,
            kl_weight=settings.kl_weight,
            descend=step < settings.steps,
        )
        batches = [fitting for batch in batches for fitting, _ in memory.fit(run, batch, _RowBatch.halves)]
        newly_done = descent.observe(*means.cpu())
        if progress:
            progress(step, settings.steps)
        if values.grad is None or bool(descent.done.all()):
            break
        descent.step(values.grad)
        if newly_done:  # their rows are no longer run
            batches = [b for batch in batches if (b := batch.without(descent.done))]
    return descent.found()


_Recorded = tuple[_Row, Recording]
_Pack = list[_Recorded]
"""Rows that stand in one row of a batch."""


def _raise_if(cancelled: Callable[[], bool] | None) -> None:
    if cancelled and cancelled():
        raise CancelledError("the value optimisation was cancelled; nothing was changed")


def _graph_bytes(model: EditableModel, packs: Sequence[_Pack], layer: int) -> int:
    """About what the graph of the longest row keeps: of each token and layer states, the MLP's inner ones, attention's.

    Three times its weights, since scores and their softmax are kept in float32.
    """
    config = model.model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    columns = max(max(len(row.encoded.ids) for row, _ in pack) + _tokens(pack) for pack in packs)
    a_token = 16 * config.hidden_size + 5 * inner + 3 * config.num_attention_heads * columns
    answer = max(len(row.encoded.answer) for pack in packs for row, _ in pack) * 3 * config.vocab_size
    tokens = max(row.tokens for pack in packs for row, _ in pack)
    return 4 * int(tokens * (len(model.layers) - layer - 1) * a_token + answer)


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


_TOGETHER = 32
"""Requests whose rows are read at once: until then all layers' keys and values of their pictures are held."""


def _recorded(
    model: EditableModel,
    requests: Sequence[EditRequest],
    layer: int,
    most_contexts: int,
    memory: Memory,
    stop: Callable[[], None],
) -> list[_Recorded]:
    """Every row that is descended on, with what the layers above `layer` need of it."""
    found: list[_Recorded] = []
    for first in range(0, len(requests), _TOGETHER):
        stop()
        numbered = list(enumerate(requests))[first : first + _TOGETHER]
        rows = _rows(model, numbered, most_contexts, memory)
        recordings = record(
            model,
            [r.encoded.replaced(r.encoded.ids[:-1]) for r in rows],
            [r.site for r in rows],
            components=(Component.MLP, Component.LAYER),
            trunks=[r.trunk for r in rows],
            lowest=layer + 1,
            memory=memory,
        )
        forget_below([r.trunk for r in rows], layer + 1)
        found += zip(rows, recordings, strict=True)
    return found


def _rows(
    model: EditableModel, requests: Sequence[tuple[int, EditRequest]], most_contexts: int, memory: Memory
) -> list[_Row]:
    """Every context with the target behind it, and every prompt to preserve with what the model answers."""
    asked = [
        _Asked.read(model, i, context, f"requests[{i}].contexts[{j}]")
        for i, request in requests
        for j, context in enumerate(request.contexts[:most_contexts])
    ]
    kept = [
        _Asked.read(model, i, context, f"requests[{i}].preserve[{j}]")
        for i, request in requests
        for j, context in enumerate(request.preserve)
    ]
    of = dict(requests)
    targets = [a.answered(a.context.answer or of[a.request].target) for a in asked]
    # What is right is what the model is hoped to say.
    rows = [*targets, *(k.drafted() for k in kept)]
    sites = [a.site for a in (*asked, *kept)]
    trunks = trunks_of(model, rows, sites, memory=memory)
    found = [a.row(encoded, trunk) for a, encoded, trunk in zip(asked, rows, trunks, strict=False)]
    of_kept = trunks[len(asked) :]
    answers = answer_rows(model, rows[len(asked) :], trunks=of_kept, memory=memory)
    for k, told, trunk in zip(kept, answers, of_kept, strict=True):
        answer = told.answer.text
        if answer and (k.context.answer is None or same_answer(answer, k.context.answer)):
            found.append(k.row(k.prompt.said(told.answer), trunk, preserved=True))
    return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """A context of a request, read; errors name `field`'s part."""

    request: int
    context: Context
    prompt: ReadPrompt
    site: int
    field: str

    @classmethod
    def read(cls, model: EditableModel, request: int, context: Context, field: str) -> "_Asked":
        """With its constraint's last token."""
        try:
            prompt = model.read(context.prompt)
            site = prompt.row.positions(*context.constraint.span(context.prompt.text))[-1]
        except InvalidInputError as error:
            raise error.within(field) from None
        return cls(request, context, prompt, site, field)

    def answered(self, answer: str) -> Encoded:
        """The prompt with an answer behind it."""
        try:
            return self.prompt.answered(answer)
        except InvalidInputError as error:
            raise error.within(self.field) from None

    def drafted(self) -> Encoded:
        """The prompt with the answer that is right, where that is known and can be written."""
        try:
            return self.prompt.answered(self.context.answer) if self.context.answer else self.prompt.row
        except InvalidInputError:
            return self.prompt.row

    def row(self, encoded: Encoded, trunk: Trunk | None, *, preserved: bool = False) -> _Row:
        """The row that is descended on."""
        return _Row(request=self.request, encoded=encoded, site=self.site, preserved=preserved, trunk=trunk)


def _start(
    rows: Sequence[_Recorded], layer: int, n: int
) -> tuple[Float[Tensor, "requests d"], Float[Tensor, " requests"]]:
    """v₀ of each request, its contexts' mean output, and the scale: the larger of the mean norms of the MLP's output
    and of the residual stream that it joins.
    """
    device, d = rows[0][1].inputs.device, rows[0][1].inputs.shape[-1]
    outputs, own, stream, count = (torch.zeros(n, k, dtype=torch.float32, device=device) for k in (d, 1, 1, 1))
    for row, recording in rows:
        if not row.preserved:
            output = recording.outputs[Component.MLP][layer, 0].float()
            outputs[row.request] += output
            own[row.request] += output.norm()
            stream[row.request] += recording.inputs[layer, recording.start - recording.begin].float().norm()
            count[row.request] += 1
    return outputs / count, (torch.maximum(own, stream) / count).squeeze(1)


_PACKED = 64
"""Tokens up to which rows without a trunk are packed into one: what one sees of the others is masked, not spared."""


def _packs(rows: Sequence[_Recorded]) -> list[_Pack]:
    """Rows of one trunk, in the order of its stack; others until a pack is as long as the longest, or `_PACKED`."""
    of_trunks = sorted((r for r in rows if r[0].trunk), key=lambda r: _stacked(r[0]))
    packs = [list(pack) for _, pack in groupby(of_trunks, key=lambda r: _stacked(r[0]))]
    alone = sorted((r for r in rows if not r[0].trunk), key=lambda r: -r[0].tokens)
    bins: list[_Pack] = []
    for row in alone:
        room = max(alone[0][0].tokens, _PACKED) - row[0].tokens
        fitting = next((b for b in bins if _tokens(b) <= room), None)
        if fitting is None:
            bins.append(fitting := [])
        fitting.append(row)
    return [*packs, *bins]


def _batches(packs: Sequence[_Pack], limit: int) -> Iterator[list[_Pack]]:
    """Packs of one stack, which is not copied for them then, or of none; as many as have `limit` rows."""
    for _, alike in groupby(packs, key=lambda pack: _stacked(pack[0][0])[0]):
        batch: list[_Pack] = []
        for pack in (part for whole in alike for part in _parts(whole, limit)):
            if sum(map(len, batch)) + len(pack) > limit:
                yield batch
                batch = []
            batch.append(pack)
        yield batch


def _parts(pack: _Pack, limit: int) -> list[_Pack]:
    return [pack[i : i + limit] for i in range(0, len(pack), limit)]


def _stacked(row: _Row) -> tuple[int, int]:
    """Its trunk's stack, and where in it the trunk is."""
    return (id(row.trunk.stack), row.trunk.index) if row.trunk else (0, 0)


def _tokens(pack: _Pack) -> int:
    return sum(row.tokens for row, _ in pack)


class _RowBatch:
    """Packs of rows that are run together, with what their answers were before any edit."""

    def __init__(self, model: EditableModel, packs: Sequence[_Pack], layer: int) -> None:
        self._model, self._layer, self._packs = model, layer, packs
        self._rows = [row for pack in packs for row in pack]
        recordings = [recording for _, recording in self._rows]
        self._suffix = Suffix(model, recordings, [row.site for row, _ in self._rows], [len(pack) for pack in packs])
        self.request = torch.tensor([row.request for row, _ in self._rows], device=model.device)
        self.preserved = torch.tensor([row.preserved for row, _ in self._rows], device=model.device)
        self._entries()
        self._norm: nn.Module = nn.Identity()
        if model.family.normed_mlp(model.model):
            self._norm = model.layers[layer].get_submodule(str(model.family.mlp_norm))
        in_rows, at = torch.tensor([(n, span.start) for n, span in self._suffix.spans], device=model.device).T
        self._sites = in_rows, at
        with torch.no_grad():
            self._others = self._suffix.outputs(layer)
            own = torch.stack([r.outputs[Component.MLP][layer, 0] for r in recordings])
            self._joined = self._others[self._sites] - self._norm(own)

    def without(self, done: Bool[Tensor, " requests"]) -> "_RowBatch | None":
        """The batch without the rows of requests that are done; itself where it has none, None if nothing is left."""
        if not done[self.request.cpu()].any():
            return self
        packs = [left for pack in self._packs if (left := [row for row in pack if not done[row[0].request]])]
        return _RowBatch(self._model, packs, self._layer) if packs else None

    def halves(self) -> list["_RowBatch"]:
        """The same rows in two batches, or in one where it is one row."""
        packs = self._packs if len(self._packs) > 1 else _parts(self._packs[0], -(-len(self._rows) // 2))
        half = len(packs) // 2
        return [_RowBatch(self._model, part, self._layer) for part in (packs[:half], packs[half:]) if part]

    def add_losses(
        self,
        *,
        values: Float[Tensor, "requests d"],
        counts: Float[Tensor, "2 requests"],
        means: Float[Tensor, "2 requests"],
        kl_weight: float,
        descend: bool,
    ) -> None:
        """Adds these rows' part of each request's mean target loss and mean KL to `means`.

        And, to `descend`, their gradient to `values.grad`: one batch's graph is held at a time.
        """
        kind = self.preserved.long()
        with torch.set_grad_enabled(descend):
            shares = self.losses(values) / counts[kind, self.request]
        if descend:
            torch.where(self.preserved, kl_weight * shares, shares).sum().backward()
        means.index_put_((kind, self.request), shares.detach(), accumulate=True)

    def losses(self, values: Float[Tensor, "requests d"]) -> Float[Tensor, " rows"]:
        """−log p(target) of each context, KL(before ‖ after) of each preserved prompt, both summed over the answer."""
        dtype = self._others.dtype
        put = self._joined + self._norm(values[self.request].to(dtype))
        hidden = self._others.index_put(self._sites, put.to(dtype))
        with self._suffix as suffix:
            for layer in range(self._layer + 1, len(self._model.layers)):
                hidden = suffix.run(layer, hidden)
        after = logits_of(self._model, hidden[self._predicting]).log_softmax(-1)
        chosen = -after.gather(-1, self._token[:, None]).squeeze(-1)
        divergence = (self._before.exp() * (self._before - after[self._kept])).sum(-1)
        each = chosen.index_put((self._kept,), divergence)
        return torch.zeros(len(self._rows), device=each.device).index_add(0, self._row, each)

    def _entries(self) -> None:
        """For each token of the answers whose it is, its id and the place that predicts it.

        `_kept` are the entries of preserved answers, `_before` what the model said there.
        """
        entries, before = [], []
        for n, ((row, recording), (in_row, span)) in enumerate(zip(self._rows, self._suffix.spans, strict=True)):
            first, answer = row.encoded.prompt_length - 1, row.encoded.answer.tolist()
            predicting = span.start + first - row.site
            entries += [(n, in_row, predicting + i, token, row.preserved) for i, token in enumerate(answer)]
            if row.preserved:
                since = first - recording.start
                before.append(recording.outputs[Component.LAYER][-1, since : since + len(answer)])
        device = self._model.device
        self._row, in_rows, at, self._token, kept = torch.tensor(entries, device=device).T
        self._predicting = in_rows, at
        self._kept = kept.nonzero().squeeze(-1)
        with torch.no_grad():
            states = torch.cat(before) if before else self._rows[0][1].outputs[Component.LAYER][-1, :0]
            self._before = logits_of(self._model, states).log_softmax(-1)


def _counts(rows: Sequence[_Recorded], n: int) -> Float[Tensor, "2 requests"]:
    """Rows of each request: contexts, and preserved prompts."""
    counts = torch.zeros(2, n, dtype=torch.float32)
    for row, _ in rows:
        counts[int(row.preserved), row.request] += 1
    return counts.clamp(min=1)
