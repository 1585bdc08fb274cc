"""The rows that a value's descent runs: read, recorded, packed into batches, and their losses (module `values`).

Only the layers above the edited one are run, and only the tokens from the constraint's last on; of the edited layer v*
alone changes what joins the residual stream. Rows of one picture share its keys and values (`branching`) and stand in
one row of a batch, so that little is padded (`packing`).
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from errata.editor.answering import answer_rows
from errata.editor.branching import Trunk, forget_below, trunks_of
from errata.editor.errors import InvalidInputError
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded, ReadPrompt, same_answer
from errata.editor.recording import Recording, record
from errata.editor.requests import Context, EditRequest
from errata.editor.states import Component, logits_of
from errata.editor.suffix import Suffix

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of one request with the answer that is scored after it."""

    request: int
    encoded: Encoded
    site: int
    preserved: bool
    trunk: Trunk | None


@dataclass(frozen=True, slots=True)
class RecordedRow:
    """A row, and what runs that start from it need."""

    row: Row
    recording: Recording

    @property
    def tokens(self) -> int:
        """Of a run: from the constraint's last, or where attention sees ahead from an earlier one, on."""
        return self.recording.length - self.recording.begin_of(self.row.site)

    @property
    def own(self) -> int:
        """Tokens behind the trunk, which the others of its pack are multiplied with for nothing."""
        return self.recording.length - self.recording.offset


Pack = list[RecordedRow]
"""What stands in one row of a batch."""


_TOGETHER = 32
"""Requests whose rows are read at once: until then all layers' keys and values of their pictures are held."""


def recorded_rows(
    model: EditableModel,
    requests: Sequence[EditRequest],
    layer: int,
    most_contexts: int,
    memory: Memory,
    stop: Callable[[], None],
) -> list[RecordedRow]:
    """Every row that is descended on, with what the layers above `layer` need of it."""
    found: list[RecordedRow] = []
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
        found += map(RecordedRow, rows, recordings)
    return found


def _rows(
    model: EditableModel, requests: Sequence[tuple[int, EditRequest]], most_contexts: int, memory: Memory
) -> list[Row]:
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

    def row(self, encoded: Encoded, trunk: Trunk | None, *, preserved: bool = False) -> Row:
        """The row that is descended on."""
        return Row(request=self.request, encoded=encoded, site=self.site, preserved=preserved, trunk=trunk)


def graph_bytes(model: EditableModel, packs: Sequence[Pack], layer: int) -> int:
    """About the most that the graph of a row keeps: of each token and layer states, the MLP's inner ones, attention's.

    Three times its weights, since scores and their softmax are kept in float32.
    """
    config = model.model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size

    def of_row(pack: Pack) -> int:
        columns = pack[0].recording.offset + sum(r.own for r in pack)
        a_token = 16 * config.hidden_size + 5 * inner + 3 * config.num_attention_heads * columns
        answer = max(len(r.row.encoded.answer) for r in pack) * 3 * config.vocab_size
        # A batch is padded to `_LONGER`, and a row that is cut from its pack stands alone.
        tokens = max(_LONGER * _tokens(pack) / len(pack), *(r.tokens for r in pack))
        return 4 * int(tokens * (len(model.layers) - layer - 1) * a_token + answer)

    return max(of_row(pack) for pack in packs)


_PACKED, _LONGER = 128, 1.5
"""Own tokens up to which all rows of a trunk, or of none, are one pack: more are packed up to as many as the trunk has,
as what one sees of the others is only masked. And how much longer than a batch's shortest row its longest may be."""


def packs_of(rows: Sequence[RecordedRow]) -> list[Pack]:
    """Rows of one trunk, and rows without any, each pack as long as it saves more than it costs."""
    packs: list[Pack] = []
    for behind in _by(rows, lambda r: id(r.row.trunk) if r.row.trunk else None):
        most = _PACKED if sum(r.own for r in behind) <= _PACKED else behind[0].recording.offset
        open_packs: list[Pack] = []
        for row in sorted(behind, key=lambda r: -r.own):
            fitting = next((p for p in open_packs if sum(r.own for r in p) + row.own <= most), None)
            if fitting is None:
                open_packs.append(fitting := [])
            fitting.append(row)
        packs += open_packs
    return packs


def batches_of(packs: Sequence[Pack], limit: int) -> Iterator[list[Pack]]:
    """Packs of about one length, of one stack, which is not copied where all of it is there, or of none."""
    for alike in _by(packs, lambda p: id(p[0].row.trunk.stack) if p[0].row.trunk else None):
        sizes = sorted((part for pack in alike for part in _parts(pack, limit)), key=_tokens)
        while sizes:
            batch = [p for p in sizes if _tokens(p) <= _LONGER * _tokens(sizes[0])]
            sizes = sizes[len(batch) :]
            yield from _up_to(sorted(batch, key=lambda p: p[0].row.trunk.index if p[0].row.trunk else 0), limit)


def _up_to(packs: Sequence[Pack], limit: int) -> Iterator[list[Pack]]:
    """Batches of at most `limit` rows."""
    batch: list[Pack] = []
    for pack in packs:
        if sum(map(len, batch)) + len(pack) > limit:
            yield batch
            batch = []
        batch.append(pack)
    yield batch


def _by(items: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Those of one key together, in the order in which keys first appear."""
    found: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return list(found.values())


def _parts(pack: Pack, limit: int) -> list[Pack]:
    return [pack[i : i + limit] for i in range(0, len(pack), limit)]


def _tokens(pack: Pack) -> int:
    return sum(r.tokens for r in pack)


class RowBatch:
    """Packs of rows that are run together, with what their answers were before any edit."""

    def __init__(self, model: EditableModel, packs: Sequence[Pack], layer: int) -> None:
        self._model, self._layer, self._packs = model, layer, packs
        self._rows = [row for pack in packs for row in pack]
        recordings, rows = [r.recording for r in self._rows], [r.row for r in self._rows]
        self._suffix = Suffix(model, recordings, [row.site for row in rows], [len(pack) for pack in packs])
        self.request = torch.tensor([row.request for row in rows], device=model.device)
        self.preserved = torch.tensor([row.preserved for row in rows], device=model.device)
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

    def without(self, done: Bool[Tensor, " requests"]) -> "RowBatch | None":
        """The batch without the rows of requests that are done; itself where it has none, None if nothing is left."""
        if not done[self.request.cpu()].any():
            return self
        packs = [left for pack in self._packs if (left := [r for r in pack if not done[r.row.request]])]
        return RowBatch(self._model, packs, self._layer) if packs else None

    def halves(self) -> list["RowBatch"]:
        """The same rows in two batches, or in one where it is one row."""
        packs = self._packs if len(self._packs) > 1 else _parts(self._packs[0], -(-len(self._rows) // 2))
        half = len(packs) // 2
        return [RowBatch(self._model, part, self._layer) for part in (packs[:half], packs[half:]) if part]

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
        for n, (recorded, (in_row, span)) in enumerate(zip(self._rows, self._suffix.spans, strict=True)):
            row, recording = recorded.row, recorded.recording
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
            states = torch.cat(before) if before else self._rows[0].recording.outputs[Component.LAYER][-1, :0]
            self._before = logits_of(self._model, states).log_softmax(-1)
