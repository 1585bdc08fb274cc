"""Recorded states of a run, from which other runs can start (`suffix`).

Attention is causal, so what a model computes at a token depends on nothing after it: of a run that differs from a
recorded one only from a token on, all that stands before it is known. Where a model attends both ways, over an image or
over the whole prompt, a run starts at the first token of that block.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from errata.editor.branching import Trunk, branch_inputs, furthest, seen
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded, by_length
from errata.editor.states import Component, by_row, component_module, first_of, removing

POSITIONAL = ("position_embeddings", "position_ids", "cache_position")
"""Layer arguments with one entry a token, which a run started in the middle takes from there on."""

RowKeysValues = tuple[Float[Tensor, "heads tokens h"], Float[Tensor, "heads tokens h"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What one forward pass left behind of one row: `outputs` and `keys` of the tokens from `start` on.

    `begin` is where a run from `start` begins (`begin_of`). `inputs` are those from there on, and so is `injected`:
    what the model adds to the stream between a layer and the next, such as image features. What stands before the
    row's own branch is in `trunk`, where it has one: `kv` and `calls` are of the tokens behind it.
    """

    row: Encoded
    start: int
    begin: int
    trunk: Trunk | None
    inputs: Float[Tensor, "layers suffix d"]
    injected: Mapping[int, Float[Tensor, "suffix d"]]
    outputs: Mapping[Component, Float[Tensor, "layers suffix d"]]
    keys: Mapping[int, Float[Tensor, "suffix m"]]
    """Inputs of the down-projections of the layers asked for."""
    kv: Mapping[int, RowKeysValues]
    calls: Sequence[Mapping[str, Any]]

    @property
    def length(self) -> int:
        """Tokens of the whole row."""
        return len(self.row.ids)

    @property
    def offset(self) -> int:
        """Tokens of the trunk."""
        return self.trunk.tokens if self.trunk else 0

    def begin_of(self, start: int) -> int:
        """The last token up to `start` before which nothing sees itself or more: `start`, if attention is causal."""
        return start if self.trunk else _begin(self.calls[0].get("attention_mask"), start)


def record(
    model: EditableModel,
    rows: Sequence[Encoded],
    starts: Sequence[int],
    *,
    components: Sequence[Component] = (),
    key_layers: Sequence[int] = (),
    resumable: bool = True,
    batch_size: int = 64,
    trunks: Sequence[Trunk | None] | None = None,
    lowest: int = 0,
    memory: Memory | None = None,
) -> list[Recording]:
    """Runs the full model once over each row and keeps what later runs can start from.

    `starts[i]` is the first token whose states are kept for row i. Rows of one length share a batch. Without
    `resumable` no attention keys and values are kept, most of a recording's memory, and no run can start from it; with
    it a run can start at the layer `lowest`, below which none are kept. Rows that have one of `trunks` are run behind
    it; it must end before what is kept of them. Batches are cut to what `memory` holds, where it is given.
    """
    found: list[Recording | None] = [None] * len(rows)
    trunks = trunks or [None] * len(rows)
    kept = range(lowest, len(model.layers)) if resumable else range(0)
    behind, fits = trunks, memory or Memory(free=lambda: None)

    def run(indices: Sequence[int]) -> None:
        batch, own = [rows[i] for i in indices], [behind[i] for i in indices]
        recorded = _Recorder(model, batch, own, [starts[i] for i in indices]).run(components, key_layers, kept)
        for i, recording in zip(indices, recorded, strict=True):
            found[i] = recording

    for indices in _batches(rows, trunks, batch_size):
        longest = max(len(rows[i].ids) for i in indices)
        fits.parts(run, indices, most=batch_size, row_bytes=longest * model.token_bytes)
    return [r for r in found if r is not None]


def _batches(rows: Sequence[Encoded], trunks: Sequence[Trunk | None], limit: int) -> list[list[int]]:
    """Rows that can be run together: whole ones of one shape, or branches behind trunks of as many tokens."""
    whole = [i for i, trunk in enumerate(trunks) if trunk is None]
    batches = [[whole[i] for i in some] for some in by_length([rows[i] for i in whole], limit)]
    # Of one stack: it is not copied then.
    branches: dict[tuple[int, int], list[int]] = {}
    for i, trunk in enumerate(trunks):
        if trunk is not None:
            branches.setdefault((trunk.tokens, id(trunk.stack)), []).append(i)
    for some in branches.values():
        some.sort(key=lambda i: len(rows[i].ids))
        batches += [some[i : i + limit] for i in range(0, len(some), limit)]
    return batches


class _Recorder:
    """Hears one pass over a batch of rows of one shape, or of branches behind trunks of as many tokens."""

    def __init__(
        self, model: EditableModel, batch: Sequence[Encoded], trunks: Sequence[Trunk | None], starts: Sequence[int]
    ) -> None:
        self._model, self._batch, self._trunks, self._starts = model, batch, trunks, starts
        self._behind = [t for t in trunks if t is not None]
        self._offset = self._behind[0].tokens if self._behind else 0
        self._begins: list[int] = list(starts) if self._behind else []
        self._low = 0
        self._inputs: list[Tensor] = []
        self._injected: dict[int, Tensor] = {}
        self._calls: list[Mapping[str, Any]] = []
        self._outputs: dict[Component, list[Tensor]] = {}
        self._keys: dict[int, Tensor] = {}
        self._left = torch.empty(0)

    def run(self, components: Sequence[Component], key_layers: Sequence[int], kept: range) -> list[Recording]:
        """What the pass leaves of each row, with keys and values of the layers that are `kept`."""
        model = self._model
        # Not made from the config: a sliding cache forgets what a run started in the middle needs.
        cached = {"past_key_values": DynamicCache() if kept else None, "use_cache": bool(kept)}
        given: dict[str, Any] = (
            branch_inputs(model, self._batch, self._behind) if self._behind else {**model.inputs(self._batch), **cached}
        )
        self._outputs = {c: [] for c in components}
        with ExitStack() as hooks, torch.no_grad():
            for index, layer in enumerate(model.layers):
                hooks.enter_context(removing(layer.register_forward_pre_hook(self._on_layer, with_kwargs=True)))
                hooks.enter_context(removing(layer.register_forward_hook(self._on_layer_output)))
                for component in components:
                    module = component_module(model, layer, component)
                    hooks.enter_context(removing(module.register_forward_hook(self._on_output(component))))
                if index in key_layers:
                    down = layer.get_submodule(model.family.down_projection)
                    hooks.enter_context(removing(down.register_forward_pre_hook(self._on_key(index))))
            model.model(**given, logits_to_keep=1)
        layers: Any = given["past_key_values"].layers if kept else ()
        return self._recordings({i: (layers[i].keys, layers[i].values) for i in kept})

    def _on_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        call = {**{k: v for k, v in bound.arguments.items() if k != "kwargs"}, **bound.arguments.get("kwargs", {})}
        hidden = call.pop("hidden_states")
        if not self._calls:
            if not self._begins:
                mask = call.get("attention_mask")
                of_rows = (_row_of("attention_mask", mask, b) for b in range(len(self._batch)))
                self._begins = [_begin(m, s) for m, s in zip(of_rows, self._starts, strict=True)]
            self._low = min(self._begins) - self._offset
        elif hidden is not self._left and not torch.equal(hidden, self._left):
            self._injected[len(self._calls) - 1] = (hidden - self._left)[:, self._low :]
        self._inputs.append(hidden[:, self._low :].clone())
        self._calls.append(call)

    def _on_layer_output(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        self._left = first_of(output)

    def _on_output(self, component: Component) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: self._outputs[component].append(self._kept(first_of(output)))

    def _on_key(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: self._keys.__setitem__(index, self._kept(args[0]))

    def _kept(self, state: Tensor) -> Float[Tensor, "rows tokens d"]:
        return by_row(state, len(self._batch))[:, self._low :].clone()

    def _recordings(self, states: Mapping[int, tuple[Tensor, Tensor]]) -> list[Recording]:
        inputs, outputs = torch.stack(self._inputs), {c: torch.stack(o) for c, o in self._outputs.items()}
        found: list[Recording] = []
        rows = zip(self._batch, self._trunks, self._starts, self._begins, strict=True)
        for b, (row, trunk, start, begin) in enumerate(rows):
            own, since, until = (n - self._offset - self._low for n in (start, begin, len(row.ids)))
            recording = Recording(
                row=row,
                start=start,
                begin=begin,
                trunk=trunk,
                inputs=inputs[:, b, since:until],
                injected={i: x[b, since:until] for i, x in self._injected.items()},
                outputs={c: o[:, b, own:until] for c, o in outputs.items()},
                keys={i: k[b, own:until] for i, k in self._keys.items()},
                kv={i: (k[b, :, : until + self._low], v[b, :, : until + self._low]) for i, (k, v) in states.items()},
                calls=[_call_of(call, b, self._offset, len(row.ids)) for call in self._calls],
            )
            found.append(recording)
        return found


def _cut(value: Any, tokens: int) -> Any:
    """A positional argument without those of the padding."""
    return tuple(_cut(v, tokens) for v in value) if isinstance(value, tuple) else value[:tokens]


def _call_of(call: Mapping[str, Any], row: int, offset: int, length: int) -> Mapping[str, Any]:
    """A layer's arguments for one row, without what a cache holds; a mask that hides of a branch only what comes later
    is none.
    """
    own: dict[str, Any] = {k: Cache([]) if isinstance(v, Cache) else _row_of(k, v, row) for k, v in call.items()}
    own |= {k: _cut(own[k], length - offset) for k in POSITIONAL if own.get(k) is not None}
    mask = own.get("attention_mask")
    if offset and mask is not None:
        own["attention_mask"] = mask = mask[:, : length - offset, :length]
        sees = seen(mask)
        if torch.equal(sees, torch.ones_like(sees).tril(offset)):
            own["attention_mask"] = None
    return own


def _row_of(name: str, value: Any, row: int) -> Any:
    """Row `row` of a layer argument that has one entry a token; other arguments as they are."""
    if name not in (*POSITIONAL, "attention_mask") or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_row_of(name, v, row) for v in value)
    return value if value.dim() == 1 else value[min(row, value.shape[0] - 1)]


def _begin(mask: Tensor | None, start: int) -> int:
    """The last token up to `start` before which no token sees it or what follows it."""
    if mask is None or start == 0:
        return start
    last = furthest(seen(mask)[:start]).cummax(0).values.tolist()
    while start and last[start - 1] >= start:
        start -= 1
    return start
