"""Greedy answers to many prompts: trunks are read once, and drafts of the answers are read with their prompts.

A draft is what an answer may turn out to be. One pass over prompt and draft says what the model says after every token
of it, so that of an answer only what differs is decoded token by token. The answers are those of
`EditableModel.generate`, whatever the drafts; in 16 bits as far as rounding leaves the likeliest token the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from errata.editor.branching import KeysValues, Trunk, branch_inputs, by_trunk, stacked, trunks_of
from errata.editor.memory import Memory
from errata.editor.model import Answer, EditableModel, Encoded, by_length, check_room, reading_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A generated answer, and the share of its draft's tokens that were likeliest, each after the right ones before it.

    NaN where there was no draft. `tokens` are those generated, with the one that ends the answer if it came.
    """

    answer: Answer
    agreed: float
    tokens: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class _Row:
    """A prompt with a draft, if any, behind it, and what is generated: at most `room` tokens.

    `at` is the token of the row at which the last generated one is read.
    """

    encoded: Encoded = field(repr=False)
    trunk: Trunk | None
    room: int
    tokens: list[int] = field(default_factory=list)
    at: int = 0
    agreed: float = math.nan

    def hear(self, likeliest: Sequence[int], ends: frozenset[int | None]) -> None:
        """Takes in the likeliest tokens after the prompt and after each of the draft's, up to the first that ends."""
        draft = self.encoded.answer.tolist()
        same = [a == b for a, b in zip(likeliest, draft, strict=False)]
        accepted = same.index(False) if False in same else len(same)
        self.agreed = sum(same) / len(same) if same else math.nan
        said = [*draft[:accepted], likeliest[accepted]][: self.room]
        end = next((n for n, token in enumerate(said, 1) if token in ends), len(said))
        self.tokens = said[:end]
        self.at = self.encoded.prompt_length + accepted

    def ended(self, ends: frozenset[int | None]) -> bool:
        """Whether nothing more is to be generated."""
        return len(self.tokens) >= self.room or not ends.isdisjoint(self.tokens)


def answer_rows(
    model: EditableModel,
    rows: Sequence[Encoded],
    *,
    trunks: Sequence[Trunk | None] | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 64,
    memory: Memory | None = None,
) -> list[Answered]:
    """The greedy answer to each row's prompt, as `EditableModel.generate` gives it; what follows a prompt is its draft.

    `trunks` are the rows' own where they are read already. Raises MemoryLimitError where not even one row fits, and
    InvalidInputError for `max_new_tokens` below 1.
    """
    check_room(max_new_tokens)
    memory = memory or Memory.of(model.device)
    holds = model.context_length or math.inf
    asked = [
        _Row(encoded=r, trunk=t, room=int(min(max_new_tokens, holds - r.prompt_length)))
        for r, t in zip(rows, trunks or [None] * len(rows), strict=True)
    ]
    most = max((len(r.ids) for r in rows), default=0) + max_new_tokens
    row_bytes = most * model.token_bytes
    prompts = [r.replaced(r.ids[: r.prompt_length]) for r in rows]
    branches = [r.prompt_length - 1 for r in rows]
    # Behind a trunk a row has its keys and values twice for a moment.
    share = trunks is None and memory.holds(2 * row_bytes)
    alone, sharing = by_trunk(rows, branches) if share else (list(range(len(rows))), [])
    for batch in _alike([asked[i] for i in alone], [prompts[i] for i in alone], batch_size):
        memory.parts(lambda some: _answer(model, some), batch, most=batch_size, row_bytes=row_bytes)
    memory.parts(
        lambda some: _behind_trunks(model, some, batch_size),
        [asked[i] for i in sharing],
        most=batch_size,
        row_bytes=2 * row_bytes,
    )
    return [Answered(answer=model.answer_of(r.tokens), agreed=r.agreed, tokens=tuple(r.tokens)) for r in asked]


def _behind_trunks(model: EditableModel, rows: Sequence[_Row], batch_size: int) -> None:
    """Answers rows that share pictures."""
    encoded = [r.encoded for r in rows]
    try:
        for row, trunk in zip(rows, trunks_of(model, encoded, [e.prompt_length - 1 for e in encoded]), strict=True):
            row.trunk = trunk
        for batch in _alike(rows, [e.replaced(e.ids[: e.prompt_length]) for e in encoded], batch_size):
            _answer(model, batch)
    finally:
        # Also of rows that ran out of memory: their halves need it.
        for row in rows:
            row.trunk = None


def _alike(rows: Sequence[_Row], prompts: Sequence[Encoded], limit: int) -> list[list[_Row]]:
    """Rows that can be run together: prompts of one shape, or branches behind trunks of as many tokens."""
    whole = [i for i, row in enumerate(rows) if row.trunk is None]
    batches = [[rows[whole[i]] for i in some] for some in by_length([prompts[i] for i in whole], limit)]
    for tokens in sorted({row.trunk.tokens for row in rows if row.trunk}):
        branches = [row for row in rows if row.trunk and row.trunk.tokens == tokens]
        batches += [branches[i : i + limit] for i in range(0, len(branches), limit)]
    return batches


def _answer(model: EditableModel, rows: Sequence[_Row]) -> None:
    """Answers rows that can be run together."""
    with torch.inference_mode():
        slots = _Slots(model, rows)
        ends = model.end_token_ids
        for row, likeliest in zip(rows, slots.read(), strict=True):
            row.hear(likeliest, ends)
        while going := [n for n, row in enumerate(slots.rows) if not row.ended(ends)]:
            # Rows that have ended stay until they are as many as the others: to take them out is to copy these.
            if 2 * len(going) <= len(slots.rows):
                slots.keep(going)
                going = list(range(len(going)))
            for n, token in zip(going, slots.next(going), strict=True):
                slots.rows[n].tokens.append(token)
                slots.rows[n].at += 1


class _Slots:
    """The keys and values of rows that are decoded together, each row's at its own length."""

    def __init__(self, model: EditableModel, rows: Sequence[_Row]) -> None:
        self._model, self.rows = model, list(rows)
        trunks = [r.trunk for r in rows if r.trunk]
        self._trunks = trunks
        self._offset = trunks[0].tokens if trunks else 0
        self._width = max(len(r.encoded.ids) for r in rows)
        room = self._width + max(r.room for r in rows)
        distinct = list(dict.fromkeys(trunks))
        of = torch.tensor([distinct.index(t) for t in trunks], device=model.device)
        self._layers = [
            _SlotLayer(len(rows), room, (stacked(distinct, i), of) if trunks else None)
            for i in range(len(model.layers))
        ]
        self._cache = Cache(list(self._layers))
        self._window, self._by_kind = model.sliding_window
        self._ahead = torch.tensor([t.ahead for t in trunks], device=model.device)

    def read(self) -> list[list[int]]:
        """The likeliest token after each row's prompt, and after each token of its draft."""
        model, encoded = self._model, [r.encoded for r in self.rows]
        first = [e.prompt_length - 1 for e in encoded]
        with reading_positions(model) as positions:
            logits = model.model(**self._given(), logits_to_keep=self._width - min(first)).logits
        if not self._trunks:
            self._ahead = positions.ahead(len(encoded), self._width).to(model.device)
        likeliest = logits.argmax(-1).tolist()
        low = min(first)
        return [of[f - low : len(e.ids) - low] for of, f, e in zip(likeliest, first, encoded, strict=True)]

    def _given(self) -> dict[str, Any]:
        encoded = [r.encoded for r in self.rows]
        if self._trunks:
            return branch_inputs(self._model, encoded, self._trunks, self._cache)
        # Padding stands behind everything that is read.
        padded = [e.replaced(nn.functional.pad(e.ids, (0, self._width - len(e.ids)))) for e in encoded]
        return {**self._model.inputs(padded), "past_key_values": self._cache, "use_cache": True}

    def next(self, rows: Sequence[int]) -> list[int]:
        """The likeliest token after the last one of these rows; the others stay as they are."""
        device = self._model.device
        at = torch.tensor([r.at for r in self.rows], device=device)
        width = int(at.max()) + 1
        for layer in self._layers:
            layer.at, layer.width = at, width
        ids = torch.tensor([[r.tokens[-1]] for r in self.rows], device=device)
        # The decoder alone: what a model puts around it takes no mask for each kind of layer.
        states = self._model.family.decoder_of(self._model.model)(
            input_ids=ids,
            position_ids=(at + self._ahead)[:, None],
            attention_mask=self._mask(at, width),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        # A cap on the logits would not change which is the largest.
        tokens: list[int] = self._model.model.get_output_embeddings()(states).argmax(-1).tolist()
        return [tokens[n] for n in rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Drops the other rows."""
        index = torch.tensor(rows, device=self._model.device)
        self.rows = [self.rows[n] for n in rows]
        self._ahead = self._ahead[index]
        for layer in self._layers:
            layer.keep(index)

    def _mask(self, at: Tensor, width: int) -> Any:
        """What is added to attention: −∞ beyond each row's end, and before the window of layers that slide."""
        columns = torch.arange(width, device=at.device)
        full = torch.zeros(len(at), width, dtype=self._model.model.dtype, device=at.device)
        full = full.masked_fill_(columns > at[:, None], -torch.inf)[:, None, None]
        if self._window is None or width <= self._window:
            return full
        sliding = full.masked_fill((columns <= at[:, None] - self._window)[:, None, None], -torch.inf)
        return {"full_attention": full, "sliding_attention": sliding} if self._by_kind else sliding


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, one slot a row: first all that is read, then a token a row at its own place."""

    def __init__(self, rows: int, room: int, trunk: tuple[KeysValues, Tensor] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shape, self._trunk = (rows, room), trunk
        self.at: Tensor | None = None
        self.width = trunk[0][0].shape[2] if trunk else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the slots, with the trunks' states in them."""
        rows, room = self._shape
        self.keys, self.values = (x.new_zeros(rows, x.shape[1], room, x.shape[3]) for x in (key_states, value_states))
        if self._trunk:
            (keys, values), of = self._trunk
            self.keys[:, :, : self.width], self.values[:, :, : self.width] = keys[of], values[of]
            self._trunk = None
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Float[Tensor, "rows heads width h"], Float[Tensor, "rows heads width h"]]:
        """Writes the states in, and gives all up to the longest row's."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.at is None:
            start, self.width = self.width, self.width + key_states.shape[2]
            self.keys[:, :, start : self.width], self.values[:, :, start : self.width] = key_states, value_states
        else:
            rows = torch.arange(len(key_states), device=key_states.device)
            self.keys[rows, :, self.at], self.values[rows, :, self.at] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the first of them."""
        return self.width + (query_length if self.at is None else 0), 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return self.width

    def get_max_length(self) -> int:
        """No limit."""
        return -1
