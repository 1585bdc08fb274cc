"""Rows that begin alike, read once: a trunk, its images included, and each row's own branch behind it.

Several questions about one picture, or prompts behind one long instruction, differ only after their common tokens.
Attention is causal, so what a model computes of these is the same in all of them: the trunk goes through the tower and
the decoder once, and its keys and values stand before every branch.

Where the first row of a trunk shows that a token of it sees beyond it (PaliGemma's prompts see all of themselves), the
rows are not split. Knows nothing about what is read off the branches (`recording`, `answering`).
"""

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded, by_length, reading_positions

LEAST_SHARED = 64
"""Tokens that a trunk must save: below, a pass of its own costs more."""

KeysValues = tuple[Float[Tensor, "rows kv_heads tokens h"], Float[Tensor, "rows kv_heads tokens h"]]


@dataclass(frozen=True, slots=True, eq=False)
class Trunk:
    """The first `tokens` of several rows, as entry `index` of a stack of runs, layer by layer.

    Behind it positions are `ahead` of how many tokens stand before them: an image may count otherwise.
    """

    tokens: int
    ahead: int
    index: int
    stack: dict[int, KeysValues]


def by_trunk(rows: Sequence[Encoded], branches: Sequence[int]) -> tuple[list[int], list[int]]:
    """The rows that are to be read whole, and those that share trunks, of one trunk after another.

    `branches[i]` is the last token at which row i's own branch may begin.
    """
    groups = list(_groups(rows, branches))
    sharing = [i for g in groups if g.worth for i in g.members]
    return sorted(set(range(len(rows))) - set(sharing)), sharing


def trunks_of(
    model: EditableModel,
    rows: Sequence[Encoded],
    branches: Sequence[int],
    *,
    batch_size: int = 16,
    memory: Memory | None = None,
) -> list[Trunk | None]:
    """The trunk of each row that shares one, read now; None for a row that is to be read whole.

    Raises MemoryLimitError where not even one fits.
    """
    groups = [g for g in _groups(rows, branches) if g.worth]
    found: list[Trunk | None] = [None] * len(rows)
    firsts = [rows[g.members[0]] for g in groups]

    def run(some: Sequence[int]) -> None:
        for g, trunk in zip(some, _read(model, [firsts[g] for g in some], [groups[g] for g in some]), strict=True):
            for member in groups[g].members:
                found[member] = trunk

    fits = memory or Memory.of(model.device)
    for batch in by_length(firsts, batch_size):
        fits.parts(run, batch, most=batch_size, row_bytes=len(firsts[batch[0]].ids) * model.token_bytes)
    return found


def forget_below(trunks: Sequence[Trunk | None], layer: int) -> None:
    """Frees the keys and values of the layers below, where no run will start."""
    for stack in (trunk.stack for trunk in trunks if trunk):
        for below in [i for i in stack if i < layer]:
            del stack[below]


@dataclass(frozen=True, slots=True)
class _Group:
    members: Sequence[int]
    tokens: int

    @property
    def worth(self) -> bool:
        """Whether the tokens that it saves are worth a pass of their own."""
        return self.tokens * (len(self.members) - 1) >= LEAST_SHARED


def _groups(rows: Sequence[Encoded], branches: Sequence[int]) -> Iterator[_Group]:
    """Rows of the same images and the tokens that all of them begin with; of as many images, as many tokens."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        # Behind an image, and before no other: what stands in a branch is text.
        end = row.images[-1].stop if row.images else 0
        if branches[i] >= end:
            alike[end, row.ids[:end].numpy().tobytes(), _digest(row)].append(i)
    shared = {key: _common([rows[i].ids[: branches[i]] for i in members]) for key, members in alike.items()}
    least: dict[int, int] = {}
    for (end, *_), tokens in shared.items():  # type: ignore[misc]
        least[end] = min(tokens, least.get(end, tokens))
    for (end, *_), members in alike.items():  # type: ignore[misc]
        yield _Group(members, least[end])


def _digest(row: Encoded) -> bytes:
    digest = hashlib.blake2b()
    for name, x in sorted(row.vision.items()):
        digest.update(name.encode())
        digest.update(x.contiguous().view(torch.uint8).numpy().data if x.dim() else bytes(str(x), "ascii"))
    return digest.digest()


def _common(ids: Sequence[Int[Tensor, " tokens"]]) -> int:
    """How many tokens all rows begin with."""
    shortest = min(len(x) for x in ids)
    same = torch.stack([x[:shortest] == ids[0][:shortest] for x in ids]).all(0)
    return int(same.long().cumprod(0).sum())


def _read(model: EditableModel, firsts: Sequence[Encoded], groups: Sequence[_Group]) -> list[Trunk | None]:
    """The trunks of rows of one shape, each read with all of its first row, which shows what its tokens see."""
    masks: dict[int, Tensor] = {}

    def on_layer(_layer: object, _args: object, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor):
            masks[id(mask)] = mask

    # Not made from the config: a sliding cache forgets what a branch needs.
    cache = DynamicCache()
    hooks = [layer.register_forward_pre_hook(on_layer, with_kwargs=True) for layer in model.layers]
    try:
        with reading_positions(model) as positions, torch.no_grad():
            model.model(**model.inputs(firsts), past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    ahead = positions.ahead(len(firsts), len(firsts[0].ids)).tolist()
    layers: Any = cache.layers
    longest = max(g.tokens for g in groups)
    stack = {i: (layer.keys[:, :, :longest], layer.values[:, :, :longest]) for i, layer in enumerate(layers)}
    sound = [
        all(_closed(seen(mask[min(b, len(mask) - 1)]), g.tokens) for mask in masks.values())
        for b, g in enumerate(groups)
    ]
    return [
        Trunk(tokens=g.tokens, ahead=ahead[b], index=b, stack=stack) if sound[b] else None for b, g in enumerate(groups)
    ]


def seen(mask: Float[Tensor, "1 tokens tokens"] | Bool[Tensor, "1 tokens tokens"]) -> Bool[Tensor, "tokens tokens"]:
    """What each token sees, of a mask as models pass it to their layers: Booleans, or what is added to the scores."""
    return mask[0] if mask.dtype == torch.bool else mask[0] > torch.finfo(mask.dtype).min / 2


def furthest(sees: Bool[Tensor, "tokens tokens"]) -> Int[Tensor, " tokens"]:
    """The last token that each token sees."""
    return torch.where(sees, torch.arange(sees.shape[1], device=sees.device), -1).amax(1)


def _closed(sees: Bool[Tensor, "tokens tokens"], tokens: int) -> bool:
    """Whether the first tokens see nothing behind them, and those behind nothing behind themselves."""
    bound = torch.arange(len(sees), device=sees.device).clamp(min=tokens - 1)
    return bool((furthest(sees) <= bound).all())


def stacked(trunks: Sequence[Trunk], layer: int) -> KeysValues:
    """The keys and values of several trunks, padded on the right; not copied where one stack holds them in order."""
    first, last = trunks[0], trunks[-1]
    in_order = [t.index for t in trunks] == list(range(first.index, last.index + 1))
    tokens = max(t.tokens for t in trunks)
    if in_order and all(t.stack is first.stack for t in trunks):
        keys, values = (x[first.index : last.index + 1, :, :tokens] for x in first.stack[layer])
        return keys, values

    def one(t: Trunk, which: int) -> Tensor:
        own = t.stack[layer][which][t.index, :, : t.tokens]
        return torch.nn.functional.pad(own, (0, 0, 0, tokens - t.tokens))

    return torch.stack([one(t, 0) for t in trunks]), torch.stack([one(t, 1) for t in trunks])


class _BranchLayer(CacheLayerMixin):
    """One layer's keys and values: those of the trunks, which stay where they are, and the branches' own."""

    def __init__(self, trunk: KeysValues, of: Int[Tensor, " rows"]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trunk, self._of = trunk, of

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing of the branches yet."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keeps the branches' states; gives them behind each row's trunk, joined for this one layer."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        whole = [torch.cat([t[self._of], x], dim=2) for t, x in zip(self._trunk, (self.keys, self.values), strict=True)]
        return whole[0], whole[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of trunk and branches."""
        return self._trunk[0].shape[2] + (0 if self.keys is None else self.keys.shape[2])

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def branch_inputs(
    model: EditableModel, rows: Sequence[Encoded], trunks: Sequence[Trunk], cache: Cache | None = None
) -> dict[str, Any]:
    """What the model's forward takes to read the branches of rows whose trunks have as many tokens each.

    Shorter branches are padded on the right, where causality keeps the padding from reaching anything. `cache` holds
    the trunks already; None: one that keeps the branches' own states.
    """
    tokens = trunks[0].tokens
    ids = pad_sequence([row.ids[tokens:] for row in rows], batch_first=True).to(model.device)
    distinct = sorted(dict.fromkeys(trunks), key=lambda t: (id(t.stack), t.index))
    of = torch.tensor([distinct.index(t) for t in trunks], device=model.device)
    ahead = torch.tensor([t.ahead for t in trunks], device=model.device)
    at = torch.arange(tokens, tokens + ids.shape[1], device=model.device)
    own = cache or Cache([_BranchLayer(stacked(distinct, i), of) for i in range(len(model.layers))])
    return {"input_ids": ids, "position_ids": at + ahead[:, None], "past_key_values": own, "use_cache": True}
