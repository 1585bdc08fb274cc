"""Choosing tokens for all rows of a batch at once, each row by its own rule and its own random numbers.

A row's numbers are drawn before it starts, from a generator of its own seed, and used one a token by inverting the
row's cumulative distribution: what a seed gives does not depend on the neighbours.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from errata.server.engine.requests import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """How one row's tokens are drawn. `uniforms[t]` decides its token t."""

    temperature: float
    top_p: float
    top_k: int | None
    seed: int
    uniforms: Float[Tensor, " tokens"] = field(repr=False)

    @property
    def restricted(self) -> bool:
        """Whether only the likeliest tokens can be drawn."""
        return self.top_p < 1 or self.top_k is not None


def row_sampling(sampling: Sampling | None, tokens: int) -> RowSampling | None:
    """The rule of a row of up to `tokens` tokens; None: greedy."""
    if sampling is None or sampling.temperature == 0:
        return None
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    random = torch.Generator().manual_seed(seed)
    return RowSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        uniforms=torch.rand(tokens, generator=random, dtype=torch.float64),
    )


class Chooser:
    """Chooses the next tokens of a fixed set of rows, step after step. `generated[i]`: tokens row i has already."""

    def __init__(self, rows: Sequence[RowSampling | None], generated: Sequence[int], device: torch.device) -> None:
        drawn = [i for i, row in enumerate(rows) if row]
        restricted = [i for i in drawn if (row := rows[i]) and row.restricted]
        free = [i for i in drawn if i not in set(restricted)]
        self._groups = [_Group(some, rows, generated, device) for some in (free, restricted) if some]

    def choose(self, logits: Float[Tensor, "rows vocabulary"]) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """The next token of each row and its log p under the unmodified distribution, in float32."""
        logits = logits.float()
        tokens = logits.argmax(-1)
        for group in self._groups:
            tokens = tokens.index_copy(0, group.rows, group.drawn(logits))
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        return tokens, chosen - logits.logsumexp(-1)


class _Group:
    """Rows that are all restricted to their likeliest tokens, or all not."""

    def __init__(
        self, rows: Sequence[int], rules: Sequence[RowSampling | None], generated: Sequence[int], device: torch.device
    ) -> None:
        chosen = [(rule, generated[i]) for i in rows if (rule := rules[i])]
        self.rows = torch.tensor(rows, device=device)
        self._restricted = chosen[0][0].restricted
        least = torch.finfo(torch.float32).tiny
        self._temperature = torch.tensor([[max(r.temperature, least)] for r, _ in chosen], device=device)
        self._top_p = torch.tensor([[r.top_p] for r, _ in chosen], device=device, dtype=torch.float64)
        self._top_k = torch.tensor([[r.top_k or torch.iinfo(torch.long).max] for r, _ in chosen], device=device)
        self._uniforms = pad_sequence([r.uniforms[n:] for r, n in chosen], batch_first=True).to(device)
        self._step = 0

    def drawn(self, logits: Float[Tensor, "rows vocabulary"]) -> Int[Tensor, " group"]:
        """One token a row; uses up one uniform number of each."""
        scaled = logits.index_select(0, self.rows)
        # The likeliest token stands at 0, and the others go to −∞ with the temperature: nothing overflows.
        scaled = (scaled - scaled.amax(-1, keepdim=True)) / self._temperature
        uniform = self._uniforms[:, self._step, None]
        self._step += 1
        if not self._restricted:
            return _inverted(scaled.softmax(-1, dtype=torch.float64), uniform)[:, 0]
        scaled, order = scaled.sort(descending=True, stable=True)
        ranks = torch.arange(scaled.shape[1], device=scaled.device)
        p = scaled.masked_fill(ranks >= self._top_k, -torch.inf).softmax(-1, dtype=torch.float64)
        # The first token whose cumulative probability reaches the nucleus is still in it.
        p = p.masked_fill(p.cumsum(-1) - p >= self._top_p, 0)
        return order.gather(1, _inverted(p, uniform))[:, 0]


def _inverted(p: Float[Tensor, "rows n"], uniform: Float[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
    """Where the cumulative distribution passes each row's uniform number; never at a p of 0."""
    cumulative = p.cumsum(-1)
    # Rounding may leave the sum a little off 1; below it, a number in [0, 1) always has its place.
    at = uniform * cumulative[:, -1:]
    last = (p.shape[-1] - 1) - (p > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cumulative, at, right=True), last)
