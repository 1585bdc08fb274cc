"""The running batch: rows of any version, prompt and length that take one decoding step together.

Every row has a slot of the cache and its own position in it, so that a row joins by copying its prompt's keys and
values in and leaves by moving the last row into its slot. Nothing is padded or shifted, and nothing is copied while
the rows stay the same. Knows nothing about queues, deadlines or text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from errata.editor.mixed import MixedDeltas, MixedRows, VersionFactors
from errata.editor.model import EditableModel, Encoded, reading_positions
from errata.server.engine.sampling import Chooser, RowSampling

_GRAIN = 64
"""Tokens by which slots grow: a multiple that attention kernels like."""


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """A row of the batch. `length`: tokens whose keys and values are in its slot; `generated`: tokens chosen."""

    encoded: Encoded = field(repr=False)
    version: VersionFactors | None
    sampling: RowSampling | None
    length: int = 0
    generated: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A row's next token and its log p under the unmodified distribution."""

    token: int
    log_probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """Rows whose prompts were read: their first tokens, and the keys and values they join with."""

    rows: Sequence[Row]
    chosen: Sequence[Chosen]
    cache: DynamicCache = field(repr=False)
    ahead: Int[Tensor, " rows"] = field(repr=False)
    """By how much the next token's position is ahead of how many tokens stand before it: images may count otherwise."""


class RunningBatch:
    """For one thread, under inference mode."""

    def __init__(self, model: EditableModel, deltas: MixedDeltas) -> None:
        self._model, self._deltas = model, deltas
        self.rows: list[Row] = []
        self._slots = _Slots(model)
        self._tokens = torch.zeros(0, dtype=torch.long, device=model.device)
        self._stack: MixedRows | None = None
        self._chooser: Chooser | None = None

    @property
    def versions(self) -> int:
        """Distinct versions among the rows, the base one of them."""
        return len({row.version for row in self.rows})

    def prefill(self, rows: Sequence[Row]) -> Prefilled:
        """Reads prompts of one length and number of images, and chooses their first tokens. Changes no row but these.

        Takes memory for all of their tokens at once.
        """
        # Not made from the config: a sliding cache drops what a slot keeps.
        cache = DynamicCache()
        with (
            reading_positions(self._model) as read,
            self._deltas.answering(self._deltas.stacked([r.version for r in rows])),
        ):
            logits = self._model.model(
                **self._model.inputs([r.encoded for r in rows]), past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]
        chooser = Chooser([r.sampling for r in rows], [0] * len(rows), self._model.device)
        _, chosen = _choose(chooser, logits)
        length = cache.get_seq_length()
        for row in rows:
            row.length, row.generated = length, 1
        return Prefilled(
            rows=rows, chosen=chosen, cache=cache, ahead=read.ahead(len(rows), length).to(self._model.device)
        )

    def join(self, prefilled: Prefilled, staying: Sequence[int]) -> None:
        """Takes those rows in, by their index among the prefilled, that did not end with their first token."""
        if not staying:
            return
        self._slots.fill(len(self.rows), prefilled, staying)
        first = torch.tensor([prefilled.chosen[i].token for i in staying], device=self._model.device)
        self._tokens = torch.cat([self._tokens, first])
        self.rows += [prefilled.rows[i] for i in staying]
        self._chooser = None

    def leave(self, gone: Sequence[int]) -> None:
        """Frees the slots of these rows, by index."""
        kept = list(range(len(self.rows)))
        for at in sorted(gone, reverse=True):
            last = len(self.rows) - 1
            if at != last:
                self._slots.move(last, at)
                self.rows[at], kept[at] = self.rows[last], kept[last]
            self.rows.pop()
            kept.pop()
        if gone:
            self._tokens = self._tokens[kept]
            # An empty batch gives its memory back.
            self._slots = self._slots.kept(len(self.rows)) if self.rows else _Slots(self._model)
            self._chooser = None

    def clear(self) -> None:
        """Drops all rows and what was computed of them."""
        self.rows = []
        self._slots = _Slots(self._model)
        self._tokens = self._tokens[:0]
        self._stack = self._chooser = None

    def step(self) -> Sequence[Chosen]:
        """One more token for every row."""
        if self._chooser is None or self._stack is None:
            self._stack = self._deltas.stacked([r.version for r in self.rows], self._stack)
            self._chooser = Chooser(
                [r.sampling for r in self.rows], [r.generated for r in self.rows], self._model.device
            )
        mask = self._slots.advance(len(self.rows), 1 + max(r.length for r in self.rows))
        decoder = self._model.family.decoder_of(self._model.model)
        with self._deltas.answering(self._stack), _masked(decoder, mask):
            logits = self._model.model(
                input_ids=self._tokens[:, None],
                position_ids=(self._slots.positions + self._slots.ahead)[:, None],
                attention_mask=mask["full_attention"] if isinstance(mask, dict) else mask,
                past_key_values=self._slots.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        self._tokens, chosen = _choose(self._chooser, logits)
        self._slots.advanced()
        for row in self.rows:
            row.length += 1
            row.generated += 1
        return chosen


@contextmanager
def _masked(decoder: nn.Module, mask: Tensor | dict[str, Tensor]) -> Iterator[None]:
    """While open, the decoder is given masks by the kind of its layers: not every model hands such on to it."""
    if not isinstance(mask, dict):
        yield
        return

    def give(_decoder: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        return args, {**given, "attention_mask": mask}

    handle = decoder.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _choose(chooser: Chooser, logits: Tensor) -> tuple[Int[Tensor, " rows"], list[Chosen]]:
    """The tokens where the next step needs them, and here: one transfer for both numbers of all rows."""
    tokens, log_p = chooser.choose(logits)
    here = torch.stack([tokens.double(), log_p.double()]).tolist()
    return tokens, [Chosen(token=int(t), log_probability=p) for t, p in zip(*here, strict=True)]


class _Slots:
    """The keys and values of all rows, one slot each, and where in them each row stands."""

    def __init__(self, model: EditableModel) -> None:
        self._device, self._dtype = model.device, model.model.dtype
        self._layers = [_SlotLayer() for _ in model.layers]
        self.cache = Cache(layers=list(self._layers))
        self.positions = torch.zeros(0, dtype=torch.long, device=self._device)
        self.ahead = self.positions
        self._capacity = 0
        self._window, self._by_layer = model.sliding_window

    def fill(self, first: int, prefilled: Prefilled, rows: Sequence[int]) -> None:
        """Copies rows of a prompt's cache into the slots from `first` on."""
        cache = prefilled.cache
        length = cache.get_seq_length()
        self._reserve(first + len(rows), length + 1)
        index = torch.tensor(list(rows), device=self._device)
        for slots, filled in zip(self._layers, cache.layers, strict=True):
            assert isinstance(filled, CacheLayerMixin)
            slots.fill(first, filled, index)
        joined = torch.full((len(rows),), length, dtype=torch.long, device=self._device)
        self.positions = torch.cat([self.positions, joined])
        self.ahead = torch.cat([self.ahead, prefilled.ahead[index]])

    def move(self, source: int, target: int) -> None:
        """Copies a slot over another."""
        for layer in self._layers:
            layer.move(source, target)
        self.positions[target], self.ahead[target] = self.positions[source], self.ahead[source]

    def kept(self, rows: int) -> "_Slots":
        """Itself with all slots but the first forgotten."""
        self.positions, self.ahead = self.positions[:rows], self.ahead[:rows]
        return self

    def advance(
        self, rows: int, width: int
    ) -> Float[Tensor, "rows 1 1 width"] | dict[str, Float[Tensor, "rows 1 1 width"]]:
        """Makes room for one token a row, and gives what is added to its attention: −∞ beyond the row's end.

        And before the window of layers that slide; by their kind where only some do.
        """
        self._reserve(rows, width)
        columns = torch.arange(width, device=self._device)
        beyond = columns > self.positions[:, None]
        at = torch.arange(rows, device=self._device) * self._capacity + self.positions
        for layer in self._layers:
            layer.at, layer.width = at, width
        full = torch.zeros(rows, width, dtype=self._dtype, device=self._device)
        full = full.masked_fill_(beyond, -torch.inf)[:, None, None]
        if self._window is None or width <= self._window:
            return full
        past = columns <= self.positions[:, None] - self._window
        sliding = full.masked_fill(past[:, None, None], -torch.inf)
        return {"full_attention": full, "sliding_attention": sliding} if self._by_layer else sliding

    def advanced(self) -> None:
        """The token is in."""
        self.positions = self.positions + 1

    def _reserve(self, rows: int, width: int) -> None:
        if width > self._capacity:
            # By half as much again, so that a long answer is not copied at every grain.
            self._capacity = -(-max(width, self._capacity * 3 // 2) // _GRAIN) * _GRAIN
        for layer in self._layers:
            layer.reserve(rows, self._capacity)


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, slots × tokens × heads × h. A step writes every row at its own position."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows, self._tokens = 0, 0
        self.at = torch.zeros(0, dtype=torch.long)
        self.width = 0

    def fill(self, first: int, layer: CacheLayerMixin, rows: Tensor) -> None:
        """Copies rows of a filled layer into the slots from `first` on."""
        assert layer.keys is not None
        assert layer.values is not None
        if self.keys is None or self.values is None:
            self.lazy_initialization(layer.keys, layer.values)
        for mine, theirs in ((self.keys, layer.keys), (self.values, layer.values)):
            assert mine is not None
            slots = mine[first : first + len(rows)]
            # What an earlier row left behind is masked, but NaN would come through a mask.
            slots[:, theirs.shape[2] :].zero_()
            slots[:, : theirs.shape[2]] = theirs.index_select(0, rows).transpose(1, 2)

    def move(self, source: int, target: int) -> None:
        """Copies a slot over another."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[target], self.values[target] = self.keys[source], self.values[source]

    def reserve(self, rows: int, tokens: int) -> None:
        """Makes room for so many rows of so many tokens."""
        if rows <= self._rows and tokens <= self._tokens:
            return
        self._rows, self._tokens = max(rows, 2 * self._rows if rows > self._rows else self._rows), tokens
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the slots reserved, for heads and widths as in these states."""
        self.keys, self.values = (
            torch.zeros(self._rows, self._tokens, s.shape[1], s.shape[3], dtype=s.dtype, device=s.device)
            for s in (key_states, value_states)
        )
        self.is_initialized = True

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(self._rows, self._tokens, *old.shape[2:])
        new[: old.shape[0], : old.shape[1]] = old
        return new

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Float[Tensor, "rows heads width h"], Float[Tensor, "rows heads width h"]]:
        """Writes one token's states a row, and gives all up to the longest row's."""
        assert self.keys is not None
        assert self.values is not None
        rows = len(key_states)
        for slots, states in ((self.keys, key_states), (self.values, value_states)):
            slots.flatten(0, 1).index_copy_(0, self.at, states[:, :, 0])
        keys, values = (s[:rows, : self.width].transpose(1, 2) for s in (self.keys, self.values))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the first of them."""
        return self.width, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return self.width

    def get_max_length(self) -> int:
        """No limit."""
        return -1
