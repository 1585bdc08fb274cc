"""Attention over a recorded prefix and a run's own suffix, in place of the attention of a decoder's layers.

The prefix of the moment is in `PREFIX`; a layer's own arithmetic is left to the layer. Knows nothing about recordings.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from transformers import AttentionInterface

from errata.editor.errors import ModelError
from errata.editor.model import EditableModel


@dataclass(frozen=True, slots=True)
class Prefix:
    """The keys and values that stand before the suffixes of each row: what its runs share, then each run's own.

    Of n entries row r has the one of number r modulo n.

    `own` are keys and values between what is shared and the suffixes, None where there are none. Both are padded:
    `valid` says which of the shared are a row's own, None where all are; `later` what of its row's own tokens and the
    suffixes a token may not see. `unseen` is what the model's mask hides of all of it, None for plain causal attention;
    `blocked` what is hidden besides. The longest run has `longest` tokens.
    """

    keys: Float[Tensor, "rows kv_heads shared h"]
    values: Float[Tensor, "rows kv_heads shared h"]
    own: tuple[Float[Tensor, "rows kv_heads own h"], Float[Tensor, "rows kv_heads own h"]] | None
    valid: Bool[Tensor, "rows shared"] | None
    later: Bool[Tensor, "rows_or_1 suffix own_and_suffix"]
    unseen: Bool[Tensor, "rows suffix tokens"] | None
    longest: int
    blocked: Bool[Tensor, "rows suffix tokens"] | None = None

    def hidden(self) -> Bool[Tensor, "rows suffix tokens"]:
        """What each token of the suffix may not attend to, but for what is `blocked`."""
        if self.unseen is not None:
            return self.unseen
        shared, suffix = self.keys.shape[2], self.later.shape[1]
        if self.valid is None:
            return nn.functional.pad(self.later, (shared, 0))
        past = (~self.valid)[:, None].expand(-1, suffix, -1)
        return torch.cat([past, self.later.expand(len(past), -1, -1)], dim=-1)

    def joined(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The runs' own keys and values behind what they share, in front of these, which are the suffixes'."""
        if self.own is None:
            return keys, values
        own = (of_rows(x, len(keys)).expand(len(keys), -1, -1, -1) for x in self.own)
        joined = [torch.cat(parts, dim=2) for parts in zip(own, (keys, values), strict=True)]
        return joined[0], joined[1]

    def shared(self, rows: int) -> tuple[Tensor, Tensor]:
        """What the runs of each of so many rows share."""
        keys, values = (of_rows(x, rows).expand(rows, -1, -1, -1) for x in (self.keys, self.values))
        return keys, values


PREFIX: ContextVar[Prefix] = ContextVar("prefix")


class SharedPrefix:
    """Stands where a layer expects its cache, and leaves the prefix to the attention, for all rows at once."""

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """The suffix's own keys and values, unchanged."""
        return keys, values


class JoinedPrefix:
    """The same for layers whose attention is theirs alone."""

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """The suffix's own keys and values behind a copy of the prefix in every row."""
        prefix = PREFIX.get()
        own = prefix.joined(keys, values)
        joined = [torch.cat(parts, dim=2) for parts in zip(prefix.shared(len(keys)), own, strict=True)]
        return joined[0], joined[1]


def shares_prefix(model: EditableModel) -> bool:
    """Whether the decoder's layers attend through the interface that `_prefixed_attention` is registered with."""
    return bool(getattr(model.family.decoder_of(model.model), "_supports_attention_backend", False))


def _prefixed_attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads suffix h"],
    key: Float[Tensor, "rows kv_heads suffix h"],
    value: Float[Tensor, "rows kv_heads suffix h"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "rows suffix heads h"], None]:
    """Attention over a recorded prefix and the rows' own suffix, in one softmax; causal unless the model hid more.

    A prefix is multiplied once with the queries of all its rows, and never copied to them.
    """
    prefix = PREFIX.get()
    heads, suffix, width = query.shape[1:]
    kv_heads, shared = prefix.keys.shape[1], prefix.keys.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    key, value = prefix.joined(key, value)
    grouped = (query * scale).unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)  # rows, kv heads, g·s, h
    past = _against(grouped, prefix.keys.transpose(-1, -2))
    own = grouped @ key.transpose(-1, -2)
    if softcap is not None:
        past, own = ((x / softcap).tanh() * softcap for x in (past, own))
    if prefix.unseen is not None:
        scores = _masked(torch.cat([past, own], dim=-1), prefix.unseen)
    elif sliding_window is not None and prefix.longest > sliding_window:
        raise ModelError("the model passes its layers no mask for its sliding window; load it with attention 'sdpa'")
    else:
        if prefix.valid is not None:
            past = past.masked_fill(~of_rows(prefix.valid, len(past))[:, None, None], -torch.inf)
        scores = torch.cat([past, _masked(own, prefix.later)], dim=-1)
    if prefix.blocked is not None:
        scores = _masked(scores, prefix.blocked)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    out = _against(weights[..., :shared], prefix.values) + weights[..., shared:] @ value
    joined: Tensor = out.unflatten(2, (-1, suffix)).flatten(1, 2).transpose(1, 2)
    return joined, None


def _masked(
    scores: Float[Tensor, "rows k gs tokens"], hidden: Bool[Tensor, "prefixes suffix tokens"]
) -> Float[Tensor, "rows k gs tokens"]:
    """−∞ where `hidden`, for the queries of every group of heads."""
    by_group = scores.unflatten(2, (-1, hidden.shape[1]))
    masked: Tensor = by_group.masked_fill(of_rows(hidden, len(scores))[:, None, None], -torch.inf).flatten(2, 3)
    return masked


def of_rows(x: Shaped[Tensor, "prefixes ..."], rows: int) -> Shaped[Tensor, "rows_or_1 ..."]:
    """Each row's entry, where there is one a prefix; a single one as it is."""
    return x if len(x) in (1, rows) else x.repeat(rows // len(x), *[1] * (x.dim() - 1))


def _against(x: Float[Tensor, "rows k a b"], shared: Float[Tensor, "prefixes k b c"]) -> Float[Tensor, "rows k a c"]:
    """`x @ shared`, with the rows of x that share one folded into one product."""
    if len(shared) == len(x):
        return x @ shared
    folded = x.unflatten(0, (-1, len(shared))).movedim(0, 2)  # prefixes, k, rows of each, a, b
    product = (folded.flatten(2, 3) @ shared).unflatten(2, folded.shape[2:4])
    unfolded: Tensor = product.movedim(2, 0).flatten(0, 1)
    return unfolded


_NAME = "errata_prefixed"
AttentionInterface.register(_NAME, _prefixed_attention)


@contextmanager
def prefixed_attention_of(model: EditableModel) -> Iterator[None]:
    """While open, the decoder's layers attend with `_prefixed_attention`."""
    config = model.family.decoder_of(model.model).config
    before = config._attn_implementation
    if shares_prefix(model):
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
