"""Vectors of the residual stream read in the vocabulary: what an MLP's output, a neuron and a change promote.

A vector's product with the head's matrix, *without* the final norm, the largest entries first (Geva et al. 2022, §3).
Where a norm stands between the MLP and the residual stream, a vector is read with that norm's gain, as it joins; the
norm's scale, one positive number a token, is left out as the final norm's is.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from errata.editor.model import EditableModel
from errata.editor.quantization import dense_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted:
    """The tokens that a vector promotes most, as they are written, with their logits by the head alone."""

    tokens: tuple[str, ...]
    logits: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Neuron:
    """One neuron of an MLP at the constraint's last token.

    `key` is kᵢ, `key_after` the edited model's and `norm` ‖W[:, i]‖. `before` is promoted by kᵢ·W[:, i], `after` by
    kᵢ·(W + ΔW)[:, i] with the edited model's kᵢ.
    """

    index: int
    key: float
    key_after: float
    norm: float
    before: Promoted
    after: Promoted


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReadout:
    """One layer at one constraint. `neurons` in falling order of |kᵢ|·‖W[:, i]‖ before the edit.

    `before` is promoted by v, `written` by ΔW k, None where the layer is not edited, and `after` by the edited
    model's v.
    """

    layer: int
    neurons: tuple[Neuron, ...]
    before: Promoted
    written: Promoted | None
    after: Promoted


@dataclass(frozen=True, slots=True)
class State:
    """A constraint's last token in one run: the key and the MLP's output of each layer, in float64."""

    keys: Float[Tensor, "layers m"]
    outputs: Float[Tensor, "layers d"]


class Reader:
    """Reads vectors in the vocabulary, in float64: of each layer its `neurons` key ones, of each vector `tokens`.

    `changes` are the ΔW of edited layers.
    """

    def __init__(self, model: EditableModel, changes: Mapping[int, Tensor], *, neurons: int, tokens: int) -> None:
        self._model, self._changes, self._most, self._tokens = model, changes, neurons, tokens
        self._head: Float[Tensor, "vocabulary d"] = model.model.get_output_embeddings().weight.detach().double().cpu()
        self._weights: dict[int, Float[Tensor, "d m"]] = {}

    @property
    def vocabulary(self) -> int:
        """How many tokens the head tells apart."""
        return len(self._head)

    def layer(self, layer: int, n: int, old: State, new: State) -> LayerReadout:
        """What is promoted at a layer, the n-th that is read."""
        written = self._written(layer, n, new)
        return LayerReadout(
            layer=layer,
            neurons=self._neurons(layer, old.keys[n], new.keys[n]),
            before=self._promoted(layer, old.outputs[n]),
            written=None if written is None else self._promoted(layer, written),
            after=self._promoted(layer, new.outputs[n]),
        )

    def ranks(self, layer: int, n: int, old: State, new: State, token: int) -> list[float]:
        """The token's rank in v before, ΔW k and v after, from 1; NaN for a change that is not there."""
        vectors = (old.outputs[n], self._written(layer, n, new), new.outputs[n])
        return [math.nan if v is None else self._rank(layer, v, token) for v in vectors]

    def share(self, layer: int, n: int, new: State) -> float:
        """‖ΔW k‖ / ‖W k‖; 0 where the layer is not edited."""
        written = self._written(layer, n, new)
        return 0.0 if written is None else float(written.norm() / (self._weight(layer) @ new.keys[n]).norm())

    def _written(self, layer: int, n: int, new: State) -> Float[Tensor, " d"] | None:
        return self._changes[layer] @ new.keys[n] if layer in self._changes else None

    def _neurons(self, layer: int, old: Float[Tensor, " m"], new: Float[Tensor, " m"]) -> tuple[Neuron, ...]:
        weight = self._weight(layer)
        change = self._changes.get(layer)
        norms = weight.norm(dim=0)
        chosen = (old.abs() * norms).topk(min(self._most, len(norms))).indices.tolist()
        return tuple(
            Neuron(
                index=i,
                key=float(old[i]),
                key_after=float(new[i]),
                norm=float(norms[i]),
                before=self._promoted(layer, old[i] * weight[:, i]),
                after=self._promoted(layer, new[i] * (weight[:, i] + (change[:, i] if change is not None else 0))),
            )
            for i in chosen
        )

    def _promoted(self, layer: int, vector: Float[Tensor, " d"]) -> Promoted:
        found = self._logits(layer, vector).topk(min(self._tokens, self.vocabulary))
        return Promoted(
            tokens=tuple(str(self._model.tokenizer.decode([t])) for t in found.indices.tolist()),
            logits=tuple(found.values.tolist()),
        )

    def _rank(self, layer: int, vector: Float[Tensor, " d"], token: int) -> float:
        logits = self._logits(layer, vector)
        return float((logits > logits[token]).sum() + 1)

    def _logits(self, layer: int, vector: Float[Tensor, " d"]) -> Float[Tensor, " vocabulary"]:
        family = self._model.family
        if family.normed_mlp(self._model.model):
            norm = self._model.layers[layer].get_submodule(str(family.mlp_norm))
            # Ones pass it with a scale of 1, and come out as its gain.
            vector = vector * norm(vector.new_ones(len(vector)).to(self._model.device)).double().cpu()
        return self._head @ vector

    def _weight(self, layer: int) -> Float[Tensor, "d m"]:
        if layer not in self._weights:
            weight = dense_weight(self._model.down_projection(layer))
            self._weights[layer] = weight.detach().double().cpu()
        return self._weights[layer]
