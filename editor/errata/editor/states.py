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
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from errata.editor.errors import InvalidInputError
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What one forward pass left behind of one row: `outputs` and `keys` of the tokens from `start` on.

    `begin` is where a run from `start` begins (`begin_of`). `inputs` are those from there on, and so is `injected`:
    what the model adds to the stream between a layer and the next, such as image features.
    """

    row: Encoded
    start: int
    begin: int
    inputs: Float[Tensor, "layers suffix d"]
    injected: Mapping[int, Float[Tensor, "suffix d"]]
    outputs: Mapping[Component, Float[Tensor, "layers suffix d"]]
    keys: Mapping[int, Float[Tensor, "suffix m"]]
    """Inputs of the down-projections of the layers asked for."""
    kv: Sequence[tuple[Float[Tensor, "heads tokens h"], Float[Tensor, "heads tokens h"]]]
    calls: Sequence[Mapping[str, Any]]

    @property
    def length(self) -> int:
        """Tokens of the whole row."""
        return len(self.row.ids)

    def begin_of(self, start: int) -> int:
        """The last token up to `start` before which nothing sees itself or more: `start`, if attention is causal."""
        return _begin(self.calls[0].get("attention_mask"), start)


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
    rows, low = len(batch), 0
    begins: list[int] = []
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
            mask = call.get("attention_mask")
            begins.extend(_begin(_row_of("attention_mask", mask, b), s) for b, s in enumerate(starts))
            low = min(begins)
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
    cache = DynamicCache()
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
            begin=begin,
            inputs=stacked[:, b, begin - low :],
            injected={i: x[b, begin - low :] for i, x in injected.items()},
            outputs={c: o[:, b, start - low :] for c, o in stacked_outputs.items()},
            keys={i: k[b, start - low :] for i, k in keys.items()},
            kv=[(keys[b], values[b]) for keys, values in states],
            calls=[{k: _row_of(k, v, b) for k, v in call.items()} for call in calls],
        )
        for b, (row, start, begin) in enumerate(zip(batch, starts, begins, strict=True))
    ]


class Suffix:
    """Runs decoder layers on the tokens from a position on, over the keys and values of recorded runs.

    Of n recordings row r of a batch continues the one of number r modulo n, and the rows of one share its prefix, which
    is attended to once for all of them: a batch has as many rows as recordings, or several times as many. Rows shorter
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
        self._prefix = max(self.begins)
        self._valid = self._prefix_mask()
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
        alone = (prefix.hidden(self.width) | blocked).all(-1)
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
        hidden = prefix.hidden(self.width) if prefix.blocked is None else prefix.hidden(self.width) | prefix.blocked
        bias = torch.zeros(hidden.shape, dtype=rows.dtype, device=hidden.device)
        bias = bias.masked_fill_(hidden, torch.finfo(rows.dtype).min)
        return call | {"attention_mask": of_rows(bias, len(rows))[:, None]}

    def _from_starts(self, layer: int, name: str) -> Any:
        def cut(value: Any, start: int) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(v, start) for v in value)
            piece = value[start:]
            return torch.cat([piece, piece[-1:].expand(self.width - len(piece), *piece.shape[1:])])

        rows = [cut(r.calls[layer][name], b) for r, b in self._rows()]
        if isinstance(rows[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
        return torch.stack(rows)

    def _prefix_of(self, layer: int) -> Prefix:
        def padded(x: Tensor, start: int) -> Tensor:
            return nn.functional.pad(x[:, :start], (0, 0, 0, self._prefix - start))

        if layer not in self._prefixes:
            pairs = [(r.kv[layer], b) for r, b in self._rows()]
            self._prefixes[layer] = Prefix(
                keys=torch.stack([padded(kv[0], b) for kv, b in pairs]),
                values=torch.stack([padded(kv[1], b) for kv, b in pairs]),
                valid=self._valid,
                unseen=self._unseen(layer),
                longest=max(r.length for r in self._recordings),
            )
        return self._prefixes[layer]

    def _prefix_mask(self) -> Tensor | None:
        if len(set(self.begins)) == 1:
            return None
        begins = torch.tensor(self.begins, device=self._model.device)
        return torch.arange(self._prefix, device=self._model.device) < begins[:, None]

    def _unseen(self, layer: int) -> Bool[Tensor, "rows suffix tokens"] | None:
        """What the model's own mask hides; None where it passed none, for plain causal attention."""
        masks: list[Tensor | None] = [r.calls[layer].get("attention_mask") for r in self._recordings]
        if all(mask is None for mask in masks):
            return None
        # A row that is shorter than a sliding window is passed none.
        causal = [
            torch.ones(r.length, r.length, dtype=torch.bool, device=self._model.device).tril() for r in self._recordings
        ]
        seen = [c if mask is None else _seen(mask) for mask, c in zip(masks, causal, strict=True)]
        return torch.stack([self._unseen_of(s, b) for s, b in zip(seen, self.begins, strict=True)])

    def _unseen_of(self, seen: Bool[Tensor, "tokens tokens"], begin: int) -> Bool[Tensor, "suffix tokens"]:
        """Padded: no token sees the padding of the prefix, and padding after the row's end sees only itself."""
        own = len(seen) - begin
        unseen = ~torch.eye(self.width, dtype=torch.bool, device=seen.device)
        unseen = torch.cat([torch.ones(self.width, self._prefix, dtype=torch.bool, device=seen.device), unseen], dim=1)
        unseen[:own, :begin] = ~seen[begin:, :begin]
        unseen[:own, self._prefix : self._prefix + own] = ~seen[begin:, begin:]
        return unseen


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


def _seen(mask: Float[Tensor, "1 tokens tokens"] | Bool[Tensor, "1 tokens tokens"]) -> Bool[Tensor, "tokens tokens"]:
    """What each token sees, of a mask as models pass it to their layers: Booleans, or what is added to the scores."""
    return mask[0] if mask.dtype == torch.bool else mask[0] > torch.finfo(mask.dtype).min / 2


def _begin(mask: Tensor | None, start: int) -> int:
    """The last token up to `start` before which no token sees it or what follows it."""
    if mask is None or start == 0:
        return start
    seen = _seen(mask)[:start]
    columns = torch.arange(seen.shape[1], device=seen.device)
    furthest = torch.where(seen, columns, -1).amax(1).cummax(0).values.tolist()
    while start and furthest[start - 1] >= start:
        start -= 1
    return start
