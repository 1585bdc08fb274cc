"""Recorded states of a run, and runs that start from them: the machinery under every trace and every value.

Attention is causal, so what a model computes at a token depends on nothing after it. A run that differs from a
recorded one only from token s and layer ℓ on is therefore *started* there: the keys and values of the tokens before
s are taken from the recording, and the layers below ℓ are not run at all. Many such runs ride in one batch of rows.

Where a model attends both ways, over an image or over the whole prompt, a run starts at the first token of that block,
so that nothing before it sees what differs. The masks are those that the model itself passed to its layers.

Architecture invariant: this module calls the model's own layers with the arguments that the model itself passed
them. The only arithmetic that takes their place is the attention over (recorded prefix, own suffix) (`prefixed`).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from errata.editor.branching import Trunk, branch_inputs, furthest, seen, stacked, token_bytes
from errata.editor.errors import InvalidInputError
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded, by_length
from errata.editor.prefixed import (
    PREFIX,
    JoinedPrefix,
    Prefix,
    SharedPrefix,
    of_rows,
    prefixed_attention_of,
    shares_prefix,
)

_POSITIONAL = ("position_embeddings", "position_ids", "cache_position")
"""Layer arguments with one entry a token, which a run started in the middle takes from there on."""


class Component(StrEnum):
    """What of a layer is read or restored: the output of its MLP, of its attention block, or its whole output."""

    MLP = "mlp"
    ATTENTION = "attention"
    LAYER = "layer"


KeysValues = tuple[Float[Tensor, "heads tokens h"], Float[Tensor, "heads tokens h"]]


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
    kv: Mapping[int, KeysValues]
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
        recorded = _record(model, batch, own, [starts[i] for i in indices], components, key_layers, kept)
        for i, recording in zip(indices, recorded, strict=True):
            found[i] = recording

    for indices in _batches(rows, trunks, batch_size):
        longest = max(len(rows[i].ids) for i in indices)
        fits.parts(run, indices, most=batch_size, row_bytes=longest * token_bytes(model))
    return [r for r in found if r is not None]


def _batches(rows: Sequence[Encoded], trunks: Sequence[Trunk | None], limit: int) -> list[list[int]]:
    """Rows that can be run together: whole ones of one shape, or branches behind trunks of as many tokens."""
    whole = [i for i, trunk in enumerate(trunks) if trunk is None]
    batches = [[whole[i] for i in some] for some in by_length([rows[i] for i in whole], limit)]
    branches: dict[int, list[int]] = {}
    for i, trunk in enumerate(trunks):
        if trunk is not None:
            branches.setdefault(trunk.tokens, []).append(i)
    for some in branches.values():
        some.sort(key=lambda i: len(rows[i].ids))
        batches += [some[i : i + limit] for i in range(0, len(some), limit)]
    return batches


def _record(
    model: EditableModel,
    batch: Sequence[Encoded],
    trunks: Sequence[Trunk | None],
    starts: Sequence[int],
    components: Sequence[Component],
    key_layers: Sequence[int],
    kept: range,
) -> list[Recording]:
    rows, low = len(batch), 0
    behind = [t for t in trunks if t is not None]
    offset = behind[0].tokens if behind else 0
    begins: list[int] = list(starts) if behind else []
    inputs: list[Tensor] = []
    injected: dict[int, Tensor] = {}
    calls: list[Mapping[str, Any]] = []
    outputs: dict[Component, list[Tensor]] = {c: [] for c in components}
    keys: dict[int, Tensor] = {}
    left: list[Tensor] = []

    def on_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal low
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        call = {**{k: v for k, v in bound.arguments.items() if k != "kwargs"}, **bound.arguments.get("kwargs", {})}
        hidden = call.pop("hidden_states")
        if not calls:
            if not begins:
                mask = call.get("attention_mask")
                begins.extend(_begin(_row_of("attention_mask", mask, b), s) for b, s in enumerate(starts))
            low = min(begins) - offset
        elif hidden is not left[0] and not torch.equal(hidden, left[0]):
            injected[len(calls) - 1] = (hidden - left[0])[:, low:]
        inputs.append(hidden[:, low:].clone())
        calls.append(call)

    def on_layer_output(_layer: nn.Module, _args: Any, output: Any) -> None:
        left[:] = [_first(output)]

    def on_output(component: Component) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: outputs[component].append(by_row(_first(output), rows)[:, low:].clone())

    def on_key(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: keys.__setitem__(index, by_row(args[0], rows)[:, low:].clone())

    # Not made from the config: a sliding cache forgets what a run started in the middle needs.
    cached = {"past_key_values": DynamicCache() if kept else None, "use_cache": bool(kept)}
    given: dict[str, Any] = branch_inputs(model, batch, behind) if behind else {**model.inputs(batch), **cached}
    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(model.layers):
            hooks.enter_context(_hook(layer.register_forward_pre_hook(on_layer, with_kwargs=True)))
            hooks.enter_context(_hook(layer.register_forward_hook(on_layer_output)))
            for component in components:
                module = component_module(model, layer, component)
                hooks.enter_context(_hook(module.register_forward_hook(on_output(component))))
            if index in key_layers:
                down = layer.get_submodule(model.family.down_projection)
                hooks.enter_context(_hook(down.register_forward_pre_hook(on_key(index))))
        model.model(**given, logits_to_keep=1)
    layers: Any = given["past_key_values"].layers if kept else ()
    states: dict[int, tuple[Tensor, Tensor]] = {i: (layers[i].keys, layers[i].values) for i in kept}
    stacks = torch.stack(inputs), {c: torch.stack(o) for c, o in outputs.items()}

    def recording(b: int, row: Encoded, start: int, begin: int) -> Recording:
        own, since, until = start - offset - low, begin - offset - low, len(row.ids) - offset - low
        return Recording(
            row=row,
            start=start,
            begin=begin,
            trunk=trunks[b],
            inputs=stacks[0][:, b, since:until],
            injected={i: x[b, since:until] for i, x in injected.items()},
            outputs={c: o[:, b, own:until] for c, o in stacks[1].items()},
            keys={i: k[b, own:until] for i, k in keys.items()},
            kv={i: (k[b, :, : until + low], v[b, :, : until + low]) for i, (k, v) in states.items()},
            calls=[_call_of(call, b, offset, len(row.ids)) for call in calls],
        )

    return [recording(b, row, s, begin) for b, (row, s, begin) in enumerate(zip(batch, starts, begins, strict=True))]


def _cut(value: Any, tokens: int) -> Any:
    """A positional argument without those of the padding."""
    return tuple(_cut(v, tokens) for v in value) if isinstance(value, tuple) else value[:tokens]


def _call_of(call: Mapping[str, Any], row: int, offset: int, length: int) -> Mapping[str, Any]:
    """A layer's arguments for one row; a mask that hides of a branch only what comes later is none."""
    own = {k: _row_of(k, v, row) for k, v in call.items()}
    own |= {k: _cut(own[k], length - offset) for k in _POSITIONAL if own.get(k) is not None}
    mask = own.get("attention_mask")
    if offset and mask is not None:
        own["attention_mask"] = mask = mask[:, : length - offset, :length]
        sees = seen(mask)
        if torch.equal(sees, torch.ones_like(sees).tril(offset)):
            own["attention_mask"] = None
    return own


class Suffix:
    """Runs decoder layers on the tokens from a position on, over the keys and values of recorded runs.

    Of n recordings row r of a batch continues the one of number r modulo n, and the rows of one share its prefix, which
    is attended to once for all of them: a batch has as many rows as recordings, or several times as many. Where all
    recordings have trunks it has as many; those of one trunk must follow one another and share that. Rows shorter
    than the longest are padded on the right, where causality keeps the padding from reaching anything.

    `begins` are the tokens that the rows begin with, `offsets` where in its row each of `starts` stands: 0 but where
    attention sees ahead (`Recording.begin_of`).

    Use as a context manager: while open, the decoder's attention is Errata's.
    """

    def __init__(self, model: EditableModel, recordings: Sequence[Recording], starts: Sequence[int]) -> None:
        self._model = model
        self._recordings = recordings
        self.begins = [r.begin_of(s) for r, s in zip(recordings, starts, strict=True)]
        self.offsets = [s - b for s, b in zip(starts, self.begins, strict=True)]
        self.lengths = [r.length - b for r, b in self._rows()]
        self.width = max(self.lengths)
        self._layout = _Layout.of(recordings, self.begins)
        # Put together on first use: a value's descent runs the same layers many times.
        self._prefixes: dict[int, Prefix] = {}
        self._calls: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> "Suffix":
        self._exit = ExitStack()
        self._exit.enter_context(prefixed_attention_of(self._model))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def inputs(self, layer: int) -> Float[Tensor, "rows suffix d"]:
        """The recorded inputs of a layer, one row a recording, padded with zeros."""
        return self._padded([r.inputs[layer, b - r.begin :] for r, b in self._rows()])

    @property
    def row_bytes(self) -> int:
        """About what one row takes while a layer runs: its states, the MLP's, and attention's weights in float32."""
        config = self._model.model.config.get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        columns = self._layout.width + self._layout.own_width + self.width
        a_token = (16 * config.hidden_size + 3 * inner) * self._model.model.dtype.itemsize
        return self.width * int(a_token + 12 * config.num_attention_heads * columns)

    def outputs(self, layer: int) -> Float[Tensor, "rows suffix d"]:
        """The recorded outputs of a layer, with what the model adds to them, as `inputs`.

        Those of the last layer must be recorded, and are zeros before the row's start.
        """
        if layer + 1 < len(self._model.layers):
            return self.inputs(layer + 1)
        last = [(r.outputs[Component.LAYER][layer], r.start - b) for r, b in self._rows()]
        return self._padded([nn.functional.pad(x, (0, 0, before, 0)) for x, before in last])

    def _rows(self) -> Iterator[tuple[Recording, int]]:
        return zip(self._recordings, self.begins, strict=True)

    def _padded(self, rows: Sequence[Float[Tensor, "suffix d"]]) -> Float[Tensor, "rows suffix d"]:
        return torch.stack([nn.functional.pad(r, (0, 0, 0, self.width - len(r))) for r in rows])

    def run(
        self,
        layer: int,
        hidden: Float[Tensor, "rows suffix d"],
        hooks: Mapping[Component, Callable[[Tensor], Tensor]] | None = None,
        blocked: Bool[Tensor, "rows suffix tokens"] | None = None,
    ) -> Float[Tensor, "rows suffix d"]:
        """One layer's output. `hooks` change the output of its MLP, attention block or whole.

        `blocked[r, i, j]` forbids the i-th token of row r's suffix to attend to token j; the last axis runs over the
        longest prefix and then over the suffix. What comes after a token is forbidden anyway. Raises
        InvalidInputError where a token would have nothing left to attend to, itself included: its state would be NaN.
        """
        module = self._model.layers[layer]
        hooks = hooks or {}
        prefix = self._prefix_of(layer)
        prefix = prefix if blocked is None else replace(prefix, blocked=self._checked(blocked, prefix))
        token = PREFIX.set(prefix)
        try:
            with ExitStack() as open_hooks:
                for component in (Component.ATTENTION, Component.MLP):
                    if component in hooks:
                        target = component_module(self._model, module, component)
                        open_hooks.enter_context(changed_output(target, _on_rows(hooks[component], len(hidden))))
                out = _first(module(hidden, **self._call(layer, prefix, hidden)))
        finally:
            PREFIX.reset(token)
        out = hooks[Component.LAYER](out) if Component.LAYER in hooks else out
        return self._with_injected(layer, out)

    def _with_injected(self, layer: int, out: Float[Tensor, "rows suffix d"]) -> Float[Tensor, "rows suffix d"]:
        """What the model adds between this layer and the next does not depend on the run."""
        if not any(layer in r.injected for r in self._recordings):
            return out
        nothing = out.new_zeros(1, out.shape[-1])
        added = self._padded([r.injected.get(layer, nothing)[b - r.begin :] for r, b in self._rows()])
        return out + of_rows(added, len(out))

    def logits(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... vocabulary"]:
        """The head's logits, in float32, from outputs of the last layer."""
        return logits_of(self._model, hidden)

    def _checked(
        self, blocked: Bool[Tensor, "rows suffix tokens"], prefix: Prefix
    ) -> Bool[Tensor, "rows suffix tokens"]:
        """`blocked`, if it leaves every token something to attend to."""
        alone = (prefix.hidden() | blocked).all(-1)
        if alone.any():
            row, position = (int(i) for i in alone.nonzero()[0])
            raise InvalidInputError(
                f"token {position} of the suffix of row {row} has nothing left to attend to, and its state would be "
                "NaN; let every token attend at least to itself",
                field="blocked",
            )
        return blocked

    def _call(self, layer: int, prefix: Prefix, rows: Float[Tensor, "rows suffix d"]) -> dict[str, Any]:
        """The arguments the model passed to this layer, for these rows from their starts on."""
        if layer not in self._calls:
            own = dict(self._recordings[0].calls[layer])
            for name in _POSITIONAL:
                if own.get(name) is not None:
                    own[name] = self._from_starts(layer, name)
            cache = SharedPrefix() if shares_prefix(self._model) else JoinedPrefix()
            # Families differ in the name by which a layer takes its cache.
            own |= {name: cache for name, value in own.items() if isinstance(value, Cache)}
            own |= {"attention_mask": None, "use_cache": False}
            self._calls[layer] = own
        call = {k: _of_rows(v, len(rows)) if k in _POSITIONAL else v for k, v in self._calls[layer].items()}
        if shares_prefix(self._model):
            return call
        hidden = prefix.hidden() if prefix.blocked is None else prefix.hidden() | prefix.blocked
        bias = torch.zeros(hidden.shape, dtype=rows.dtype, device=hidden.device)
        bias = bias.masked_fill_(hidden, torch.finfo(rows.dtype).min)
        return call | {"attention_mask": of_rows(bias, len(rows))[:, None]}

    def _from_starts(self, layer: int, name: str) -> Any:
        def cut(value: Any, start: int) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(v, start) for v in value)
            piece = value[start:]
            return torch.cat([piece, piece[-1:].expand(self.width - len(piece), *piece.shape[1:])])

        rows = [cut(r.calls[layer][name], b - r.offset) for r, b in self._rows()]
        if isinstance(rows[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
        return torch.stack(rows)

    def _prefix_of(self, layer: int) -> Prefix:
        if layer not in self._prefixes:
            keys, values = self._layout.shared(self._recordings, self.begins, layer)
            self._prefixes[layer] = Prefix(
                keys=keys,
                values=values,
                counts=self._layout.counts,
                own=self._layout.own(self._recordings, self.begins, layer),
                valid=self._valid,
                later=self._later,
                unseen=self._unseen(layer),
                longest=max(r.length for r in self._recordings),
            )
        return self._prefixes[layer]

    @cached_property
    def _valid(self) -> Bool[Tensor, "rows trunk"] | None:
        return _up_to(self._layout.trunks, self._layout.width, self._model.device)

    @cached_property
    def _later(self) -> Bool[Tensor, "rows_or_1 suffix own_and_suffix"]:
        """What of its own tokens and the suffix a token may not see, by plain causality."""
        own = self._layout.own_width
        later = torch.ones(self.width, own + self.width, dtype=torch.bool, device=self._model.device).triu(own + 1)
        lengths = [b - t for b, t in zip(self.begins, self._layout.trunks, strict=True)]
        valid = _up_to(lengths, own, self._model.device)
        if valid is None:
            return later[None]
        return later | nn.functional.pad(~valid, (0, self.width))[:, None]

    def _unseen(self, layer: int) -> Bool[Tensor, "rows suffix tokens"] | None:
        """What the model's own mask hides; None where it passed none, for plain causal attention."""
        masks: list[Tensor | None] = [r.calls[layer].get("attention_mask") for r in self._recordings]
        if all(mask is None for mask in masks):
            return None
        # A row that is shorter than a sliding window is passed none.
        sees = [
            seen(mask)[b - r.offset :]
            if mask is not None
            else torch.ones(r.length - b, r.length, dtype=torch.bool, device=self._model.device).tril(b)
            for mask, (r, b) in zip(masks, self._rows(), strict=True)
        ]
        return torch.stack(
            [self._unseen_of(s, t, b) for s, t, b in zip(sees, self._layout.trunks, self.begins, strict=True)]
        )

    def _unseen_of(self, sees: Bool[Tensor, "own tokens"], trunk: int, begin: int) -> Bool[Tensor, "suffix columns"]:
        """Padded: no token sees the padding of the prefix, and padding after the row's end sees only itself."""
        prefix, own = self._layout.width + self._layout.own_width, len(sees)
        unseen = ~torch.eye(self.width, dtype=torch.bool, device=sees.device)
        unseen = torch.cat([torch.ones(self.width, prefix, dtype=torch.bool, device=sees.device), unseen], dim=1)
        unseen[:own, :trunk] = ~sees[:, :trunk]
        unseen[:own, self._layout.width : self._layout.width + begin - trunk] = ~sees[:, trunk:begin]
        unseen[:own, prefix : prefix + own] = ~sees[:, begin:]
        return unseen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where the tokens before each row's suffix stand: `trunks[r]` of row r's in what is shared, the rest in its own.

    `width` and `own_width` are the most that any row has of either. `counts` are the rows of each trunk; None where
    rows have none, and a recording's whole prefix is shared by the runs that continue it.
    """

    trunks: Sequence[int]
    width: int
    own_width: int
    counts: tuple[int, ...] | None

    @classmethod
    def of(cls, recordings: Sequence[Recording], begins: Sequence[int]) -> "_Layout":
        """Shares the trunks where every recording has one."""
        behind = [r.trunk for r in recordings]
        if any(t is None for t in behind):
            return cls(trunks=begins, width=max(begins), own_width=0, counts=None)
        counts = tuple(len(list(rows)) for _, rows in groupby(behind, key=id))
        trunks = [r.offset for r in recordings]
        own = max(b - t for b, t in zip(begins, trunks, strict=True))
        return cls(trunks=trunks, width=max(trunks), own_width=own, counts=counts)

    def shared(
        self, recordings: Sequence[Recording], begins: Sequence[int], layer: int
    ) -> tuple[Float[Tensor, "trunks heads width h"], Float[Tensor, "trunks heads width h"]]:
        """The keys and values that rows share, padded."""
        if self.counts is not None:
            distinct = [trunk for trunk, _ in groupby((r.trunk for r in recordings), key=lambda t: t)]
            return stacked([t for t in distinct if t is not None], layer)
        whole = [_whole(r, layer) for r in recordings]
        keys, values = (_padded_heads([kv[n][:, :b] for kv, b in zip(whole, begins, strict=True)]) for n in (0, 1))
        return keys, values

    def own(
        self, recordings: Sequence[Recording], begins: Sequence[int], layer: int
    ) -> tuple[Float[Tensor, "rows heads own h"], Float[Tensor, "rows heads own h"]] | None:
        """Those of each row alone, padded."""
        if not self.own_width:
            return None
        pieces = [(r.kv[layer], b - t) for r, b, t in zip(recordings, begins, self.trunks, strict=True)]
        keys, values = (_padded_heads([kv[n][:, :b] for kv, b in pieces], self.own_width) for n in (0, 1))
        return keys, values


def _whole(recording: Recording, layer: int) -> KeysValues:
    """A row's keys and values, its trunk's before its own."""
    own, trunk = recording.kv[layer], recording.trunk
    if trunk is None:
        return own
    before = (x[trunk.index, :, : trunk.tokens] for x in trunk.stack[layer])
    keys, values = (torch.cat(parts, dim=1) for parts in zip(before, own, strict=True))
    return keys, values


def _padded_heads(
    rows: Sequence[Float[Tensor, "heads tokens h"]], width: int = 0
) -> Float[Tensor, "rows heads width h"]:
    width = max(width, *(x.shape[1] for x in rows))
    return torch.stack([nn.functional.pad(x, (0, 0, 0, width - x.shape[1])) for x in rows])


def _up_to(lengths: Sequence[int], width: int, device: torch.device) -> Bool[Tensor, "rows width"] | None:
    """Which entries are within each row's length; None where all are."""
    if all(n == width for n in lengths):
        return None
    return torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]


def logits_of(model: EditableModel, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... vocabulary"]:
    """The head's logits, in float32, from outputs of the last layer, or of any other as if it were the last."""
    head: Tensor = model.model.get_output_embeddings()(model.family.final_norm_of(model.model)(hidden))
    cap = getattr(model.family.decoder_of(model.model).config, "final_logit_softcapping", None)
    return head.float() if cap is None else ((head / cap).tanh() * cap).float()


@contextmanager
def changed_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `module`'s output (the first of several) passes through `change`."""

    def hook(_module: nn.Module, _args: object, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    with _hook(module.register_forward_hook(hook)):
        yield


def component_module(model: EditableModel, layer: nn.Module, component: Component) -> nn.Module:
    """The module whose output is the component's."""
    match component:
        case Component.MLP:
            return layer.get_submodule(model.family.mlp)
        case Component.ATTENTION:
            return layer.get_submodule(model.family.attention)
        case Component.LAYER:
            return layer


@contextmanager
def _hook(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _of_rows(value: Any, rows: int) -> Any:
    """A layer argument that has an entry a recording, for so many rows."""
    if isinstance(value, tuple):
        return tuple(of_rows(v, rows) for v in value)
    return value if value is None else of_rows(value, rows)


def by_row(state: Tensor, rows: int) -> Float[Tensor, "rows tokens d"]:
    """A module's state row by row, where its layer ran it on all tokens in one row."""
    return state if state.dim() == 3 else state.unflatten(0, (rows, -1))


def _on_rows(change: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
    return lambda output: change(by_row(output, rows)).view(output.shape)


def _row_of(name: str, value: Any, row: int) -> Any:
    """Row `row` of a layer argument that has one entry a token; other arguments as they are."""
    if name not in (*_POSITIONAL, "attention_mask") or value is None:
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
