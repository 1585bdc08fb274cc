"""Recorded states of a run, and runs that start from them: the machinery under every trace and every value.

Attention is causal, so what a model computes at a token depends on nothing after it. A run that differs from a
recorded one only from token s and layer ℓ on is therefore *started* there: the keys and values of the tokens before
s are taken from the recording, and the layers below ℓ are not run at all. Many such runs ride in one batch of rows.

Architecture invariant: this module calls the model's own layers with the arguments that the model itself passed
them. It holds no arithmetic of any family but the attention over (recorded prefix, own suffix).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from errata.editor.model import EditableModel, Encoded, by_length

_POSITIONAL = ("position_embeddings", "position_ids", "cache_position")
"""Layer arguments with one entry a token, which a run started in the middle takes from there on."""


class Component(StrEnum):
    """What of a layer is read or restored: the output of its MLP, of its attention block, or its whole output."""

    MLP = "mlp"
    ATTENTION = "attention"
    LAYER = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What one forward pass left behind of one row. Everything but `kv` holds the tokens from `start` on."""

    row: Encoded
    start: int
    inputs: Float[Tensor, "layers suffix d"]
    outputs: Mapping[Component, Float[Tensor, "layers suffix d"]]
    keys: Mapping[int, Float[Tensor, "suffix m"]]
    """Inputs of the down-projections of the layers asked for."""
    kv: Sequence[tuple[Float[Tensor, "heads tokens h"], Float[Tensor, "heads tokens h"]]]
    calls: Sequence[Mapping[str, Any]]

    @property
    def length(self) -> int:
        """Tokens of the whole row."""
        return len(self.row.ids)


def record(
    model: EditableModel,
    rows: Sequence[Encoded],
    starts: Sequence[int],
    *,
    components: Sequence[Component] = (),
    key_layers: Sequence[int] = (),
    resumable: bool = True,
    batch_size: int = 64,
) -> list[Recording]:
    """Runs the full model once over each row and keeps what later runs can start from.

    `starts[i]` is the first token whose states are kept for row i. Rows of one length share a batch. Without
    `resumable` no attention keys and values are kept, most of a recording's memory, and no run can start from it.
    """
    found: list[Recording | None] = [None] * len(rows)
    for indices in by_length(rows, batch_size):
        batch = [rows[i] for i in indices]
        recorded = _record(model, batch, [starts[i] for i in indices], components, key_layers, resumable)
        for i, recording in zip(indices, recorded, strict=True):
            found[i] = recording
    return [r for r in found if r is not None]


def _record(
    model: EditableModel,
    batch: Sequence[Encoded],
    starts: Sequence[int],
    components: Sequence[Component],
    key_layers: Sequence[int],
    resumable: bool,
) -> list[Recording]:
    low = min(starts)
    inputs: list[Tensor] = []
    calls: list[Mapping[str, Any]] = []
    outputs: dict[Component, list[Tensor]] = {c: [] for c in components}
    keys: dict[int, Tensor] = {}

    def on_layer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(layer.forward).bind(*args, **kwargs)
        call = {**{k: v for k, v in bound.arguments.items() if k != "kwargs"}, **bound.arguments.get("kwargs", {})}
        inputs.append(call.pop("hidden_states")[:, low:].clone())
        calls.append(call)

    def on_output(component: Component) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: outputs[component].append(_first(output)[:, low:].clone())

    def on_key(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, args: keys.__setitem__(index, args[0][:, low:].clone())

    cache = DynamicCache(config=model.model.config.get_text_config())
    with ExitStack() as hooks, torch.no_grad():
        for index, layer in enumerate(model.layers):
            hooks.enter_context(_hook(layer.register_forward_pre_hook(on_layer, with_kwargs=True)))
            for component in components:
                module = component_module(model, layer, component)
                hooks.enter_context(_hook(module.register_forward_hook(on_output(component))))
            if index in key_layers:
                down = layer.get_submodule(model.family.down_projection)
                hooks.enter_context(_hook(down.register_forward_pre_hook(on_key(index))))
        model.model(
            **model.inputs(batch), past_key_values=cache if resumable else None, use_cache=resumable, logits_to_keep=1
        )
    layers: Any = cache.layers if resumable else ()
    states: list[tuple[Tensor, Tensor]] = [(layer.keys, layer.values) for layer in layers]
    stacked = torch.stack(inputs)
    stacked_outputs = {c: torch.stack(o) for c, o in outputs.items()}
    return [
        Recording(
            row=row,
            start=start,
            inputs=stacked[:, b, start - low :],
            outputs={c: o[:, b, start - low :] for c, o in stacked_outputs.items()},
            keys={i: k[b, start - low :] for i, k in keys.items()},
            kv=[(keys[b], values[b]) for keys, values in states],
            calls=[{k: _row_of(k, v, b) for k, v in call.items()} for call in calls],
        )
        for b, (row, start) in enumerate(zip(batch, starts, strict=True))
    ]


class Suffix:
    """Runs decoder layers on the tokens from a position on, over the keys and values of recorded runs.

    With one recording every row of the batch shares its prefix, which is attended to once for all rows; with
    several, row r continues recording r. Rows shorter than the longest are padded on the right, where causality
    keeps the padding from reaching anything.

    Use as a context manager: while open, the decoder's attention is Errata's.
    """

    def __init__(self, model: EditableModel, recordings: Sequence[Recording], starts: Sequence[int]) -> None:
        self._model = model
        self._recordings, self._starts = recordings, starts
        self.lengths = [r.length - s for r, s in zip(recordings, starts, strict=True)]
        self.width = max(self.lengths)
        self._prefix = max(starts)
        self._valid = self._prefix_mask()
        # Put together on first use: a value's descent runs the same layers many times.
        self._prefixes: dict[int, _Prefix] = {}
        self._calls: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> "Suffix":
        self._exit = ExitStack()
        self._exit.enter_context(_attention_of(self._model))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def inputs(self, layer: int) -> Float[Tensor, "rows suffix d"]:
        """The recorded inputs of a layer, one row a recording, padded with zeros."""
        rows = [r.inputs[layer, s - r.start :] for r, s in zip(self._recordings, self._starts, strict=True)]
        return torch.stack([nn.functional.pad(r, (0, 0, 0, self.width - len(r))) for r in rows])

    def run(
        self,
        layer: int,
        hidden: Float[Tensor, "rows suffix d"],
        hooks: Mapping[Component, Callable[[Tensor], Tensor]] | None = None,
    ) -> Float[Tensor, "rows suffix d"]:
        """One layer's output. `hooks` change the output of its MLP, attention block or whole."""
        module = self._model.layers[layer]
        hooks = hooks or {}
        token = _PREFIX.set(self._prefix_of(layer))
        try:
            with ExitStack() as open_hooks:
                for component in (Component.ATTENTION, Component.MLP):
                    if component in hooks:
                        target = component_module(self._model, module, component)
                        open_hooks.enter_context(changed_output(target, hooks[component]))
                out = _first(module(hidden, **self._call(layer)))
        finally:
            _PREFIX.reset(token)
        return hooks[Component.LAYER](out) if Component.LAYER in hooks else out

    def logits(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... vocabulary"]:
        """The head's logits, in float32, from outputs of the last layer."""
        normed = self._model.family.final_norm_of(self._model.model)(hidden)
        head: Tensor = self._model.model.get_output_embeddings()(normed)
        return head.float()

    def _call(self, layer: int) -> dict[str, Any]:
        """The arguments the model passed to this layer, for these rows from their starts on."""
        if layer not in self._calls:
            own = dict(self._recordings[0].calls[layer])
            for name in _POSITIONAL:
                if own.get(name) is not None:
                    own[name] = self._from_starts(layer, name)
            own |= {"attention_mask": None, "past_key_values": _PassThrough(), "use_cache": False}
            self._calls[layer] = own
        return self._calls[layer]

    def _from_starts(self, layer: int, name: str) -> Any:
        def cut(value: Any, start: int) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(v, start) for v in value)
            piece = value[start:]
            return torch.cat([piece, piece[-1:].expand(self.width - len(piece), *piece.shape[1:])])

        rows = [cut(r.calls[layer][name], s) for r, s in zip(self._recordings, self._starts, strict=True)]
        if isinstance(rows[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
        return torch.stack(rows)

    def _prefix_of(self, layer: int) -> "_Prefix":
        def padded(x: Tensor, start: int) -> Tensor:
            return nn.functional.pad(x[:, :start], (0, 0, 0, self._prefix - start))

        if layer not in self._prefixes:
            pairs = [(r.kv[layer], s) for r, s in zip(self._recordings, self._starts, strict=True)]
            self._prefixes[layer] = _Prefix(
                keys=torch.stack([padded(kv[0], s) for kv, s in pairs]),
                values=torch.stack([padded(kv[1], s) for kv, s in pairs]),
                valid=self._valid,
            )
        return self._prefixes[layer]

    def _prefix_mask(self) -> Tensor | None:
        if len(set(self._starts)) == 1:
            return None
        starts = torch.tensor(self._starts, device=self._model.device)
        return torch.arange(self._prefix, device=self._model.device) < starts[:, None]


@dataclass(frozen=True, slots=True)
class _Prefix:
    keys: Float[Tensor, "rows kv_heads prefix h"]
    values: Float[Tensor, "rows kv_heads prefix h"]
    valid: Bool[Tensor, "rows prefix"] | None


_PREFIX: ContextVar[_Prefix] = ContextVar("prefix")


class _PassThrough:
    """Stands where a layer expects its cache: the suffix's own keys and values, unchanged."""

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return keys, values


def _prefixed_attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads suffix h"],
    key: Float[Tensor, "rows kv_heads suffix h"],
    value: Float[Tensor, "rows kv_heads suffix h"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "rows suffix heads h"], None]:
    """Causal attention over a recorded prefix and the rows' own suffix, in one softmax.

    A shared prefix is multiplied once with the queries of all rows, and never copied to them.
    """
    prefix = _PREFIX.get()
    heads, suffix, width = query.shape[1:]
    kv_heads, before = prefix.keys.shape[1], prefix.keys.shape[2]
    scale = width**-0.5 if scaling is None else scaling
    grouped = (query * scale).unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)  # rows, kv heads, g·s, h
    past = _against(grouped, prefix.keys.transpose(-1, -2))
    if prefix.valid is not None:
        past = past.masked_fill(~prefix.valid[:, None, None], -torch.inf)
    own = (grouped @ key.transpose(-1, -2)).unflatten(2, (-1, suffix))
    later = torch.ones(suffix, suffix, dtype=torch.bool, device=query.device).triu(1)
    own = own.masked_fill(later, -torch.inf).flatten(2, 3)
    weights = torch.cat([past, own], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)
    out = _against(weights[..., :before], prefix.values) + weights[..., before:] @ value
    joined: Tensor = out.unflatten(2, (-1, suffix)).flatten(1, 2).transpose(1, 2)
    return joined, None


def _against(x: Float[Tensor, "rows k a b"], shared: Float[Tensor, "rows_or_1 k b c"]) -> Float[Tensor, "rows k a c"]:
    """`x @ shared`, with the rows of x folded into one product where `shared` is the same for all."""
    if shared.shape[0] != 1 or x.shape[0] == 1:
        return x @ shared
    folded = x.transpose(0, 1).flatten(1, 2) @ shared[0]
    unfolded: Tensor = folded.unflatten(1, (x.shape[0], -1)).transpose(0, 1)
    return unfolded


_NAME = "errata_prefixed"
AttentionInterface.register(_NAME, _prefixed_attention)


@contextmanager
def _attention_of(model: EditableModel) -> Iterator[None]:
    """While open, the decoder's layers attend with `_prefixed_attention`."""
    config = model.family.decoder_of(model.model).config
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


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


def _row_of(name: str, value: Any, row: int) -> Any:
    """Row `row` of a layer argument that has one entry a token; other arguments as they are."""
    if name not in _POSITIONAL or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_row_of(name, v, row) for v in value)
    return value if value.dim() == 1 else value[min(row, value.shape[0] - 1)]
