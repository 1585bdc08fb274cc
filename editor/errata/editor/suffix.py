"""Runs that start in the middle of recorded ones: the machinery under every trace and every value.

A run that differs from a recorded one only from token s and layer ℓ on is *started* there: the keys and values of the
tokens before s are taken from the recording, and the layers below ℓ are not run at all. Many such runs ride in one
batch of rows.

Where a model attends both ways, a run starts at the first token of that block, so that nothing before it sees what
differs. The masks are those that the model itself passed to its layers.

Architecture invariant: this module calls the model's own layers with the arguments that the model itself passed
them. The only arithmetic that takes their place is the attention over (recorded prefix, own suffix) (`prefixed`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Cache

from errata.editor.errors import InvalidInputError
from errata.editor.model import EditableModel
from errata.editor.packing import Packing, Run
from errata.editor.prefixed import (
    PREFIX,
    JoinedPrefix,
    Prefix,
    SharedPrefix,
    of_rows,
    prefixed_attention_of,
    shares_prefix,
)
from errata.editor.recording import POSITIONAL, Recording
from errata.editor.states import Component, by_row, changed_output, component_module, first_of


class Suffix:
    """Runs decoder layers on the tokens from a position on, over the keys and values of recorded runs.

    Of n rows of recordings row r of a batch continues the one of number r modulo n, and the rows of one share its
    prefix, which is attended to once for all of them: a batch has n rows, or several times as many. `packed` recordings
    follow one another in a row (`Packing`), which spares padding where their suffixes differ in length.

    `spans` are the row of each recording and where in it stand its tokens from that of `starts` on: from 0 on, but
    behind others, or where attention sees ahead (`Recording.begin_of`).

    Use as a context manager: while open, the decoder's attention is Errata's.
    """

    def __init__(
        self,
        model: EditableModel,
        recordings: Sequence[Recording],
        starts: Sequence[int],
        packed: Sequence[int] | None = None,
    ) -> None:
        self._model = model
        self._packing = Packing(recordings, starts, packed)
        self.rows = self._packing.rows
        self.spans = [(r.row, slice(r.at + r.start - r.begin, r.at + r.tokens)) for r in self._packing.runs]
        # Put together on first use: a value's descent runs the same layers many times.
        self._prefixes: dict[int, Prefix] = {}
        self._calls: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> "Suffix":
        self._exit = ExitStack()
        self._exit.enter_context(prefixed_attention_of(self._model))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    @property
    def begin(self) -> int:
        """The token that the first recording's run begins with."""
        return self._packing.runs[0].begin

    def inputs(self, layer: int) -> Float[Tensor, "rows suffix d"]:
        """The recorded inputs of a layer, padded with zeros."""
        return self._packing.padded(lambda r: r.recording.inputs[layer, r.begin - r.recording.begin :])

    @property
    def row_bytes(self) -> int:
        """About what one row takes while a layer runs: its states, the MLP's, and attention's weights in float32."""
        config = self._model.model.config.get_text_config()
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        a_token = (16 * config.hidden_size + 3 * inner) * self._model.model.dtype.itemsize
        return self._packing.width * int(a_token + 12 * config.num_attention_heads * self._packing.columns)

    def outputs(self, layer: int) -> Float[Tensor, "rows suffix d"]:
        """The recorded outputs of a layer, with what the model adds to them, as `inputs`.

        Those of the last layer must be recorded, and are zeros before a run's start.
        """
        if layer + 1 < len(self._model.layers):
            return self.inputs(layer + 1)

        def of_last(run: Run) -> Float[Tensor, "suffix d"]:
            recorded = run.recording.outputs[Component.LAYER][layer]
            return torch.cat([recorded.new_zeros(run.recording.start - run.begin, recorded.shape[-1]), recorded])

        return self._packing.padded(of_last)

    def run(
        self,
        layer: int,
        hidden: Float[Tensor, "rows suffix d"],
        hooks: Mapping[Component, Callable[[Tensor], Tensor]] | None = None,
        blocked: Bool[Tensor, "rows suffix tokens"] | None = None,
    ) -> Float[Tensor, "rows suffix d"]:
        """One layer's output. `hooks` change the output of its MLP, attention block or whole.

        `blocked[r, i, j]` forbids the i-th token of row r's suffix to attend to column j, of the longest prefix and
        then of the suffix (`Packing`). What comes after a token is forbidden anyway. Raises InvalidInputError where a
        token would have nothing left to attend to, itself included: its state would be NaN.
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
                out = first_of(module(hidden, **self._call(layer, prefix, hidden)))
        finally:
            PREFIX.reset(token)
        out = hooks[Component.LAYER](out) if Component.LAYER in hooks else out
        return self._with_injected(layer, out)

    def _with_injected(self, layer: int, out: Float[Tensor, "rows suffix d"]) -> Float[Tensor, "rows suffix d"]:
        """What the model adds between this layer and the next does not depend on the run."""
        if not any(layer in r.recording.injected for r in self._packing.runs):
            return out

        def added(run: Run) -> Float[Tensor, "suffix d"]:
            injected = run.recording.injected.get(layer)
            nothing = out.new_zeros(run.tokens, out.shape[-1])
            return nothing if injected is None else injected[run.begin - run.recording.begin :]

        return out + of_rows(self._packing.padded(added), len(out))

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
            own = dict(self._packing.runs[0].recording.calls[layer])
            for name in POSITIONAL:
                if own.get(name) is not None:
                    own[name] = self._packing.positional(layer, name)
            cache = SharedPrefix() if shares_prefix(self._model) else JoinedPrefix()
            # Families differ in the name by which a layer takes its cache.
            own |= {name: cache for name, value in own.items() if isinstance(value, Cache)}
            own |= {"attention_mask": None, "use_cache": False}
            self._calls[layer] = own
        call = {k: _of_rows(v, len(rows)) if k in POSITIONAL else v for k, v in self._calls[layer].items()}
        if shares_prefix(self._model):
            return call
        hidden = prefix.hidden() if prefix.blocked is None else prefix.hidden() | prefix.blocked
        bias = torch.zeros(hidden.shape, dtype=rows.dtype, device=hidden.device)
        bias = bias.masked_fill_(hidden, torch.finfo(rows.dtype).min)
        return call | {"attention_mask": of_rows(bias, len(rows))[:, None]}

    def _prefix_of(self, layer: int) -> Prefix:
        if layer not in self._prefixes:
            keys, values = self._packing.before(layer)
            self._prefixes[layer] = Prefix(
                keys=keys,
                values=values,
                own=self._packing.own(layer),
                valid=self._packing.valid,
                later=self._packing.later,
                unseen=self._packing.unseen(layer),
                longest=max(r.recording.length for r in self._packing.runs),
            )
        return self._prefixes[layer]


def _of_rows(value: Any, rows: int) -> Any:
    """A layer argument that has an entry a recording, for so many rows."""
    if isinstance(value, tuple):
        return tuple(of_rows(v, rows) for v in value)
    return value if value is None else of_rows(value, rows)


def _on_rows(change: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
    return lambda output: change(by_row(output, rows)).view(output.shape)
