"""Where a layer's states are found: the modules that put them out, and the head that reads them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from errata.editor.model import EditableModel


class Component(StrEnum):
    """What of a layer is read or restored: the output of its MLP, of its attention block, or its whole output."""

    MLP = "mlp"
    ATTENTION = "attention"
    LAYER = "layer"


def component_module(model: EditableModel, layer: nn.Module, component: Component) -> nn.Module:
    """The module whose output is the component's."""
    match component:
        case Component.MLP:
            return layer.get_submodule(model.family.mlp)
        case Component.ATTENTION:
            return layer.get_submodule(model.family.attention)
        case Component.LAYER:
            return layer


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

    with removing(module.register_forward_hook(hook)):
        yield


@contextmanager
def removing(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    """Removes a hook in the end."""
    try:
        yield
    finally:
        handle.remove()


def first_of(output: Any) -> Tensor:
    """A module's output, or the first of several."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def by_row(state: Tensor, rows: int) -> Float[Tensor, "rows tokens d"]:
    """A module's state row by row, where its layer ran it on all tokens in one row."""
    return state if state.dim() == 3 else state.unflatten(0, (rows, -1))
