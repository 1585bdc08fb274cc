"""One copy of the weights for several threads, and one batch whose rows answer as different versions.

A forward pass reads the weights and writes nothing; what two threads must not share is the module tree, where hooks
hang and the config is changed. So each takes a `replica`: a tree of its own over the same tensors.

Of a version only its low-rank factors are held. `MixedDeltas` adds b(a·x) of every row's own version in one batched
product per layer, in float32 as `delta.applied` does. Knows nothing about requests, queues or sampling.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from errata.editor.delta import Delta, LowRank, check_base
from errata.editor.errors import DeltaError
from errata.editor.model import EditableModel
from errata.editor.quantization import shared_tensors

_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
"""How the names of the dictionaries end in which torch keeps a module's hooks."""

_CAPTURING = "_output_capturing_hooks_installed"
"""Where transformers notes that its own hooks are on a module; without it they are put on again when needed."""


def replica(model: EditableModel) -> EditableModel:
    """The same model with modules, hooks, config and processor of its own, over the very same tensors.

    An edit, a trace and the engine can run at once, each in a thread with its own replica. Make it while no other
    thread uses `model`; hooks that are on it then stay behind. What writes to the weights themselves
    (`delta.merged`, `delta.borrowed_weights`) is seen by every replica.
    """
    memo: dict[int, Any] = {id(t): t for t in chain(model.model.parameters(), model.model.buffers())}
    memo |= {id(t): t for module in model.model.modules() for t in shared_tensors(module)}
    for module in model.model.modules():
        memo |= {id(hooks): type(hooks)() for name, hooks in vars(module).items() if name.endswith(_HOOKS)}
    copied = copy.deepcopy(model.model, memo)
    for module in copied.modules():
        vars(module).pop(_CAPTURING, None)
    return replace(model, model=copied, processor=copy.deepcopy(model.processor))


@dataclass(frozen=True, slots=True)
class _Factors:
    """ΔW = bᵀ a of one version at one layer, in float32 on the model's device.

    Both in one tensor, row by row: each further one would take a kilobyte beside its numbers, and there are many.
    """

    both: Float[Tensor, "rank m_and_d"]
    m: int

    @property
    def a(self) -> Float[Tensor, "rank m"]:
        return self.both[:, : self.m]

    @property
    def b(self) -> Float[Tensor, "rank d"]:
        return self.both[:, self.m :]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VersionFactors:
    """What is held of a version: its lineage's factors side by side, per layer. Compared by identity."""

    layers: Mapping[int, _Factors] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(f.both.nbytes for f in self.layers.values())


def version_factors(model: EditableModel, deltas: Sequence[Delta]) -> VersionFactors:
    """The factors of a lineage, on the model's device. A lineage whose rank exceeds the width is compressed to it.

    Raises WrongBaseError for a delta of another base and DeltaError for factors that are not finite, which would
    reach the neighbours in a batch.
    """
    for delta in deltas:
        check_base(delta, model)
        if not all(torch.isfinite(f).all() for low in delta.layers.values() for f in (low.a, low.b)):
            raise DeltaError("a delta holds NaN or infinity; make the edit again")
    if not deltas:
        return VersionFactors(layers={})
    lineage = deltas[0]
    for delta in deltas[1:]:
        lineage = lineage + delta
    if any(low.rank > low.b.shape[0] for low in lineage.layers.values()):
        lineage = lineage.compressed()

    def placed(low: LowRank) -> _Factors:
        both = torch.cat([low.a.detach(), low.b.detach().T], dim=1)
        return _Factors(both.to(model.device, torch.float32), low.a.shape[1])

    return VersionFactors(layers={i: placed(low) for i, low in lineage.layers.items() if low.rank})


@dataclass(frozen=True, slots=True)
class _Bank:
    """The padded factors of several versions at one layer, one entry each; a version may have several entries."""

    entries: tuple[VersionFactors, ...]
    a: Float[Tensor, "entries rank m"]
    b: Float[Tensor, "entries rank d"]


@dataclass(frozen=True, slots=True)
class _Product:
    """One batched product: which rows stand at which place of which entry. All None: row i is entry i."""

    bank: _Bank
    places: Int[Tensor, " entries_times_places"] | None = None
    rows: Int[Tensor, " rows_taking_part"] | None = None
    taken: Int[Tensor, " rows_taking_part"] | None = None

    def added(self, x: Float[Tensor, "rows tokens m"], output: Float[Tensor, "rows tokens d"]) -> Tensor:
        """`output`, in float32, with every row's b(a·x)."""
        bank = self.bank
        if self.places is None or self.rows is None or self.taken is None:
            return output + torch.bmm(torch.bmm(x.to(bank.a.dtype), bank.a.transpose(1, 2)), bank.b)
        placed = x.index_select(0, self.places).to(bank.a.dtype)
        grouped = placed.unflatten(0, (len(bank.entries), -1)).flatten(1, 2)
        change = torch.bmm(torch.bmm(grouped, bank.a.transpose(1, 2)), bank.b)
        change = change.reshape(len(self.places), x.shape[1], -1).index_select(0, self.taken)
        return output.index_add(0, self.rows, change)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRows:
    """The rows of a batch, ready to be multiplied. Costs nothing for rows of the base alone."""

    count: int
    products: Mapping[int, Sequence[_Product]] = field(repr=False)


class MixedDeltas:
    """While open, forward passes inside `answering(rows)` answer row by row as the rows' versions.

    For one thread. `stacked` is called when the rows of a batch change, not at every step.
    """

    def __init__(self, model: EditableModel) -> None:
        self._model = model
        self._rows: MixedRows | None = None

    def __enter__(self) -> "MixedDeltas":
        with ExitStack() as hooks:
            for i in range(len(self._model.layers)):
                handle = self._model.down_projection(i).register_forward_hook(self._hook(i))
                hooks.callback(handle.remove)
            self._exit = hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def stacked(self, versions: Sequence[VersionFactors | None], previous: MixedRows | None = None) -> MixedRows:
        """Rows of these versions, None for the base. Factors that `previous` already stacked are taken from there."""
        known = _banks(previous)
        products: dict[int, list[_Product]] = defaultdict(list)
        for (layer, _), rows in sorted(_alike(versions).items()):
            entries = _entries(rows)
            bank = known.get((layer, frozenset(Counter(entries).items()))) or _bank(layer, entries)
            products[layer].append(_product(bank, rows, len(versions), self._model.device))
        return MixedRows(count=len(versions), products=products)

    @contextmanager
    def answering(self, rows: MixedRows) -> Iterator[EditableModel]:
        """While open, row i of every forward pass answers as the version of `rows[i]`."""
        before, self._rows = self._rows, rows
        try:
            yield self._model
        finally:
            self._rows = before

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._rows is None or not (products := self._rows.products.get(layer)):
                return None
            count = self._rows.count
            # Some layers run their MLP on all tokens in one row.
            keys, changed = (x if x.dim() == 3 else x.reshape(count, -1, x.shape[-1]) for x in (args[0], output))
            if len(changed) != count:
                raise ValueError(f"a batch of {len(changed)} rows runs as {count} versions; stack them again")
            changed = changed.to(torch.float32)
            for product in products:
                changed = product.added(keys, changed)
            return changed.to(output.dtype).view(output.shape)

        return hook


@contextmanager
def mixed(model: EditableModel, lineages: Sequence[Sequence[Delta]]) -> Iterator[EditableModel]:
    """While open, row i of every forward pass answers as `delta.applied(model, *lineages[i])` would."""
    found: dict[tuple[int, ...], VersionFactors] = {}
    keys = [tuple(id(d) for d in lineage) for lineage in lineages]
    for key, lineage in zip(keys, lineages, strict=True):
        if key not in found:
            found[key] = version_factors(model, lineage)
    with MixedDeltas(model) as deltas, deltas.answering(deltas.stacked([found[k] for k in keys])):
        yield model


def _alike(versions: Sequence[VersionFactors | None]) -> dict[tuple[int, int], dict[int, VersionFactors]]:
    """Rows by layer and by rank rounded up to a power of two, so that padding at most doubles a rank."""
    found: dict[tuple[int, int], dict[int, VersionFactors]] = defaultdict(dict)
    for row, version in enumerate(versions):
        for layer, factors in version.layers.items() if version else ():
            found[layer, max(8, 1 << (len(factors.a) - 1).bit_length())][row] = version  # type: ignore[assignment]
    return found


def _entries(rows: Mapping[int, VersionFactors]) -> tuple[VersionFactors, ...]:
    """Every version, as often as its rows fill entries of `_places`: at most twice as many as there are versions."""
    counts = Counter(rows.values())
    places = _places(len(rows), len(counts))
    return tuple(v for v in counts for _ in range(-(-counts[v] // places)))


def _places(rows: int, versions: int) -> int:
    """Rows that share an entry: the mean, so that one busy version does not pad the entries of all others."""
    return -(-rows // versions)


def _bank(layer: int, entries: tuple[VersionFactors, ...]) -> _Bank:
    factors = [v.layers[layer] for v in entries]
    return _Bank(
        entries,
        pad_sequence([f.a for f in factors], batch_first=True),
        pad_sequence([f.b for f in factors], batch_first=True),
    )


def _banks(rows: MixedRows | None) -> dict[tuple[int, frozenset[tuple[VersionFactors, int]]], _Bank]:
    products = rows.products.items() if rows else ()
    return {(i, frozenset(Counter(p.bank.entries).items())): p.bank for i, ps in products for p in ps}


def _product(bank: _Bank, rows: Mapping[int, VersionFactors], count: int, device: torch.device) -> _Product:
    """Gives every row a place at an entry of its version; places left over repeat a row, and nobody takes them."""
    if len(rows) == count and bank.entries == tuple(rows.values()):
        return _Product(bank)
    width = _places(len(rows), len(set(bank.entries)))
    free: dict[VersionFactors, list[int]] = defaultdict(list)
    for entry in reversed(range(len(bank.entries))):
        free[bank.entries[entry]] += range((entry + 1) * width - 1, entry * width - 1, -1)
    taken = {row: free[version].pop() for row, version in rows.items()}
    places = [next(iter(rows))] * (width * len(bank.entries))
    for row, place in taken.items():
        places[place] = row

    def index(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), device=device)

    return _Product(bank, index(places), index(taken), index(taken.values()))
