"""What attention carries from token to token (methods.md §3; Basu et al. 2024, §4).

The contribution of position j to position i in head h of a layer is ‖A[i,j]·(x_j W_V W_O)_h‖: how long the vector is
that the head adds to i's residual stream on j's account. A bias of the projection W_O is nobody's contribution.

One forward pass a batch. The model attends in the way that shows its weights (`eager`), and of a layer's weights only
the rows that are asked for outlive the layer; the values are those of the pass's cache. ‖v W_h‖ needs no vector of the
model's width: with W_hᵀ = QR it is ‖R v‖.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from errata.editor.errors import ModelError
from errata.editor.model import EditableModel, Encoded
from errata.editor.quantization import dense_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributions:
    """Of one row: contributions to the targets asked for, in float32, and the log p of each token of its answer.

    A contribution is a length in the residual stream. Positions that a target does not see contribute 0.
    """

    lengths: Float[Tensor, "layers heads targets tokens"]
    answer: Float[Tensor, " answer_tokens"]


OutputFactors = Sequence[Float[Tensor, "heads h h"]]
"""R of W_hᵀ = QR for each layer and head of W_O."""


def output_factors(model: EditableModel) -> OutputFactors:
    """The factors of every layer's W_O: computed once for all batches."""
    return [_factor(model, layer) for layer in model.layers]


def _factor(model: EditableModel, layer: nn.Module) -> Float[Tensor, "heads h h"]:
    into = dense_weight(layer.get_submodule(model.family.attention_output))  # d × (heads · h)
    heads = model.family.decoder_of(model.model).config.num_attention_heads
    of_heads = into.detach().float().unflatten(1, (heads, -1)).transpose(0, 1)
    factor: Tensor = torch.linalg.qr(of_heads, mode="r")[1]
    return factor


def contributions(
    model: EditableModel, rows: Sequence[Encoded], targets: Sequence[Sequence[int]], factors: OutputFactors
) -> list[Contributions]:
    """Contributions of every position to each row's `targets`, by one forward pass over rows of one shape.

    `targets[r]` are positions of row r; every row must have as many. Raises ModelError for a model whose attention
    does not show its weights.
    """
    asked = torch.tensor(targets, device=model.device)
    answers = [row.answer.to(model.device) for row in rows]
    weights: list[Tensor] = []
    cache = DynamicCache()
    with _shown(model, asked, weights), torch.no_grad():
        logits = model.model(
            **model.inputs(rows),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=max(len(answer) for answer in answers) + 1,
        ).logits
    layers: Any = cache.layers
    of_layers = [_lengths(*of) for of in zip(weights, (layer.values for layer in layers), factors, strict=True)]
    lengths = torch.stack(of_layers, dim=1).cpu()
    return [
        Contributions(lengths=lengths[r], answer=answer_log_probabilities(logits[r], answer).cpu())
        for r, answer in enumerate(answers)
    ]


def _lengths(
    weights: Float[Tensor, "rows heads targets tokens"],
    values: Float[Tensor, "rows kv_heads tokens h"],
    factor: Float[Tensor, "heads h h"],
) -> Float[Tensor, "rows heads targets tokens"]:
    """A weight is no less than 0, so ‖A·v W_h‖ = A·‖R v‖; heads of one group share their values."""
    grouped = factor.unflatten(0, (values.shape[1], -1))
    lengths: Tensor = torch.einsum("rkth,kgoh->rkgto", values.float(), grouped).norm(dim=-1).flatten(1, 2)
    return weights.float() * lengths.unsqueeze(2)


def answer_log_probabilities(
    logits: Float[Tensor, "kept vocabulary"], answer: Int[Tensor, " answer_tokens"]
) -> Float[Tensor, " answer_tokens"]:
    """Log p of each token of the answer that ends the row, in float64: read one position before it."""
    before = logits[len(logits) - 1 - len(answer) : len(logits) - 1].float().log_softmax(-1)
    chosen: Tensor = before.gather(-1, answer[:, None])[:, 0].double()
    return chosen


@contextmanager
def _shown(
    model: EditableModel,
    targets: Int[Tensor, "rows targets"],
    weights: list[Float[Tensor, "rows heads targets tokens"]],
) -> Iterator[None]:
    """While open, every layer of the decoder leaves the targets' rows of its attention's weights in `weights`."""
    rows = torch.arange(len(targets), device=targets.device)[:, None]

    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        shown = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(shown, Tensor):
            raise ModelError(f"the attention of {model.name!r} does not show its weights, so nothing can be measured")
        weights.append(shown[rows, :, targets].transpose(1, 2))

    config = model.family.decoder_of(model.model).config
    before = config._attn_implementation
    # Of this config alone: a tower that shares it would see images otherwise.
    config._attn_implementation = {"": "eager"}
    with ExitStack() as hooks:
        hooks.callback(setattr, config, "_attn_implementation", {"": before})
        for layer in model.layers:
            attention = layer.get_submodule(model.family.attention)
            hooks.callback(attention.register_forward_hook(keep).remove)
        yield
