"""Runs side by side in rows, several in one where that spares padding, and what stands before each.

A row's columns are those of what its runs share, then each run's own tokens before its suffix, then the suffixes one
behind another. A token sees nothing of the other runs in its row. Padding stands on the right and sees only itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from errata.editor.branching import Trunk, seen, stacked
from errata.editor.recording import Recording


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run in row `row`: `recording` continued from its token `start`, and run from `begin` (`Recording.begin_of`).

    Of what stands before it the row's runs share the first `shared` tokens; the rest is at `own_at` among the row's
    own tokens. Its suffix is at `at` among the suffixes.
    """

    recording: Recording
    start: int
    begin: int
    row: int
    shared: int
    own_at: int
    at: int

    @property
    def tokens(self) -> int:
        """Of its suffix."""
        return self.recording.length - self.begin

    @property
    def own(self) -> int:
        """Tokens between what is shared and the suffix."""
        return self.begin - self.shared

    def positional(self, layer: int, name: str) -> Any:
        """The suffix's part of a layer's argument that has an entry a token."""
        return _from(self.recording.calls[layer][name], self.begin - self.recording.offset)

    def sees(self, layer: int) -> Bool[Tensor, "suffix tokens"]:
        """What each token of the suffix may attend to, in the recorded run."""
        mask = self.recording.calls[layer].get("attention_mask")
        if mask is not None:
            return seen(mask)[self.begin - self.recording.offset :]
        device = self.recording.inputs.device
        return torch.ones(self.tokens, self.recording.length, dtype=torch.bool, device=device).tril(self.begin)


class Packing:
    """Where each of several runs stands; `packed` says how many follow one another in each row, None: one in each.

    Runs of one row continue one trunk, or have none. A run alone in its row, without a trunk, shares all that stands
    before it with the runs of other batches that continue it there.
    """

    def __init__(self, recordings: Sequence[Recording], starts: Sequence[int], packed: Sequence[int] | None) -> None:
        self.runs = list(_placed(recordings, starts, packed or [1] * len(recordings)))
        self.rows = self.runs[-1].row + 1
        self.width = max(r.at + r.tokens for r in self.runs)
        self.own_width = max(r.own_at + r.own for r in self.runs)
        self.shared = [next(r.shared for r in self.runs if r.row == row) for row in range(self.rows)]
        self.shared_width = max(self.shared)
        self._device = recordings[0].inputs.device

    @property
    def columns(self) -> int:
        """All that a token of a suffix might attend to."""
        return self.shared_width + self.own_width + self.width

    def padded(self, piece: Callable[[Run], Tensor]) -> Float[Tensor, "rows suffix ..."]:
        """What has an entry for each token of the suffixes, padded with zeros."""
        return self._padded(piece, self.width)

    def positional(self, layer: int, name: str) -> Any:
        """A layer's argument that has an entry a token."""
        first = self.runs[0].positional(layer, name)
        if isinstance(first, tuple):
            return tuple(self.padded(lambda r, n=n: r.positional(layer, name)[n]) for n in range(len(first)))  # type: ignore[misc]
        return self.padded(lambda r: r.positional(layer, name))

    def before(self, layer: int) -> tuple[Float[Tensor, "rows heads shared h"], Float[Tensor, "rows heads shared h"]]:
        """The keys and values that the runs of a row share; not copied where they are trunks read together."""
        firsts = [next(r for r in self.runs if r.row == row) for row in range(self.rows)]
        trunks = [t for t in (r.recording.trunk for r in firsts) if t is not None]
        if len(trunks) == self.rows:
            return stacked(trunks, layer)
        keys, values = (_padded_heads([_shared(r, layer)[n] for r in firsts], self.shared_width) for n in (0, 1))
        return keys, values

    def own(self, layer: int) -> tuple[Float[Tensor, "rows heads own h"], Float[Tensor, "rows heads own h"]] | None:
        """The keys and values of each run's own tokens before its suffix."""
        if not self.own_width:
            return None
        by_token = (
            self._padded(lambda r, n=n: r.recording.kv[layer][n][:, : r.own].transpose(0, 1), self.own_width)  # type: ignore[misc]
            for n in (0, 1)
        )
        keys, values = (x.transpose(1, 2) for x in by_token)
        return keys, values

    @cached_property
    def valid(self) -> Bool[Tensor, "rows shared"] | None:
        """What of the shared columns is a row's own; None where all is."""
        if all(n == self.shared_width for n in self.shared):
            return None
        lengths = torch.tensor(self.shared, device=self._device)
        return torch.arange(self.shared_width, device=self._device) < lengths[:, None]

    @cached_property
    def later(self) -> Bool[Tensor, "rows_or_1 suffix own_and_suffix"]:
        """What of its row's own tokens and the suffixes a token may not see, by plain causality."""
        shapes = [[(r.own, r.tokens) for r in self.runs if r.row == row] for row in range(self.rows)]
        alike = all(shape == shapes[0] for shape in shapes)
        hidden = self._nothing(1 if alike else self.rows, self.own_width)
        for r in self.runs:
            if r.row < len(hidden):
                of = hidden[r.row, r.at : r.at + r.tokens]
                of[:, r.own_at : r.own_at + r.own] = False
                own = of[:, self.own_width + r.at : self.own_width + r.at + r.tokens]
                own.copy_(torch.ones_like(own).triu(1))
        return hidden

    def unseen(self, layer: int) -> Bool[Tensor, "rows suffix columns"] | None:
        """What the model's own masks hide; None where it passed none, for plain causal attention."""
        # A row that is shorter than a sliding window is passed none.
        if all(r.recording.calls[layer].get("attention_mask") is None for r in self.runs):
            return None
        before = self.shared_width + self.own_width
        hidden = self._nothing(self.rows, before)
        for r in self.runs:
            of, unseen = hidden[r.row, r.at : r.at + r.tokens], ~r.sees(layer)
            of[:, : r.shared] = unseen[:, : r.shared]
            of[:, self.shared_width + r.own_at : self.shared_width + r.own_at + r.own] = unseen[:, r.shared : r.begin]
            of[:, before + r.at : before + r.at + r.tokens] = unseen[:, r.begin :]
        return hidden

    def _nothing(self, rows: int, before: int) -> Bool[Tensor, "rows suffix columns"]:
        """Every token of the suffixes sees only itself."""
        itself = torch.eye(self.width, dtype=torch.bool, device=self._device)
        return nn.functional.pad(~itself, (before, 0), value=True).repeat(rows, 1, 1)

    def _padded(self, piece: Callable[[Run], Tensor], width: int) -> Tensor:
        rows: list[list[Tensor]] = [[] for _ in range(self.rows)]
        for r in self.runs:
            rows[r.row].append(piece(r))
        joined = [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in rows]
        return torch.stack([nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, width - len(x))) for x in joined])


def _placed(recordings: Sequence[Recording], starts: Sequence[int], packed: Sequence[int]) -> Iterator[Run]:
    both = zip(recordings, starts, strict=True)
    for row, count in enumerate(packed):
        own_at = at = 0
        for recording, start in islice(both, count):
            begin = recording.begin_of(start)
            shared = _tokens(recording.trunk) or (begin if count == 1 else 0)
            run = Run(
                recording=recording, start=start, begin=begin, row=row, shared=shared, own_at=own_at, at=at
            )  # fmt: skip
            own_at, at = own_at + run.own, at + run.tokens
            yield run


def _tokens(trunk: Trunk | None) -> int:
    return trunk.tokens if trunk else 0


def _shared(run: Run, layer: int) -> tuple[Float[Tensor, "heads shared h"], Float[Tensor, "heads shared h"]]:
    """What a run shares: its trunk, or else of its own keys and values what stands in no column of its row's own."""
    trunk = run.recording.trunk
    keys, values = (x[trunk.index] for x in trunk.stack[layer]) if trunk else run.recording.kv[layer]
    return keys[:, : run.shared], values[:, : run.shared]


def _padded_heads(rows: Sequence[Float[Tensor, "heads tokens h"]], width: int) -> Float[Tensor, "rows heads width h"]:
    return torch.stack([nn.functional.pad(x, (0, 0, 0, width - x.shape[1])) for x in rows])


def _from(value: Any, start: int) -> Any:
    return tuple(_from(v, start) for v in value) if isinstance(value, tuple) else value[start:]
