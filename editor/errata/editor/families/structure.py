"""Finds a family by the structure of a model that no adapter names, where it is unambiguous.

One list of equal decoder layers, each with one attention whose last linear map leads back to the width, and one MLP
whose last linear map does. What structure cannot say (what joins the residual stream, what the head adds) is checked
on a run by `errata.editor.unfamiliar`.
"""

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from errata.editor.errors import UnknownFamilyError
from errata.editor.families.base import ModelFamily

Named = tuple[str, nn.Module]


def family_by_structure(model: PreTrainedModel) -> ModelFamily:
    """The family that the model's modules show. Needs no weights: the model may be on the meta device.

    Raises UnknownFamilyError with what was found instead.
    """
    if not model.can_generate():
        raise UnknownFamilyError("it does not generate text")
    text = model.config.get_text_config()
    path, decoder = _decoder(model)
    layers_path, layers = _only(_lists(decoder, text.num_hidden_layers), "list of decoder layers", path)
    assert isinstance(layers, nn.ModuleList)
    kinds = {type(layer).__name__ for layer in layers} | {type(m).__name__ for m in layers if m is not layers[0]}
    if len(kinds) > 1:
        raise UnknownFamilyError(f"its layers are of several kinds: {', '.join(sorted(kinds))}")
    for i, layer in enumerate(layers):
        _refuse_experts(i, layer)
    attention, mlp = _blocks(layers[0], text.hidden_size)
    if any(_blocks(layer, text.hidden_size) != (attention, mlp) for layer in layers):
        raise UnknownFamilyError("its layers do not all keep their parts in the same places")
    norm, _ = _only(_norms(decoder), "norm between its layers and its head", path)
    return ModelFamily(
        architectures=(type(model).__name__,),
        decoder=path,
        layers=layers_path,
        final_norm=norm,
        attention=attention[0],
        attention_output=attention[1],
        mlp=mlp[0],
        down_projection=mlp[1],
        image_token="image_token_id" if getattr(model.config, "image_token_id", None) is not None else None,
    )


def _decoder(model: PreTrainedModel) -> Named:
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    if not path:
        raise UnknownFamilyError("it does not say where its text decoder is")
    return path, decoder


def _lists(decoder: nn.Module, layers: int) -> list[Named]:
    return [(n, m) for n, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]


def _norms(decoder: nn.Module) -> list[Named]:
    return [(n, m) for n, m in decoder.named_children() if "norm" in type(m).__name__.casefold()]


def _refuse_experts(index: int, layer: nn.Module) -> None:
    experts = next((n for n, m in layer.named_modules() if "expert" in f"{n} {type(m).__name__}".casefold()), None)
    if experts:
        raise UnknownFamilyError(
            f"layer {index} is a mixture of experts ({experts}): a token's key goes through several down-projections "
            "weighed by a router, so there is no one W whose output an edit could set"
        )


def _blocks(layer: nn.Module, width: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Of the attention and of the MLP: its path, and that of the linear map that leads back to the width."""
    attentions = [n for n, m in layer.named_children() if "attention" in type(m).__name__.casefold()]
    if len(attentions) != 1:
        raise UnknownFamilyError(f"its layers have {len(attentions)} attentions: {_said(attentions)}")
    back = _last_linear(layer.get_submodule(attentions[0]), width)
    if back is None:
        raise UnknownFamilyError(f"{attentions[0]} has no linear map back to the width {width}")
    others = [(n, m) for n, m in layer.named_children() if n != attentions[0] and _linears(m)]
    if others and all(isinstance(m, nn.Linear | Conv1D) for _, m in others):
        # The layer holds the MLP's maps itself.
        return (attentions[0], f"{attentions[0]}.{back}"), (others[-1][0], others[-1][0])
    if len(others) != 1:
        raise UnknownFamilyError(f"its layers have {len(others)} candidates for the MLP: {_said(n for n, _ in others)}")
    name, mlp = others[0]
    down = _last_linear(mlp, width)
    if down is None:
        raise UnknownFamilyError(f"{name} has no linear map back to the width {width}")
    return (attentions[0], f"{attentions[0]}.{back}"), (name, f"{name}.{down}")


def _linears(module: nn.Module) -> list[Named]:
    return [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)]


def _last_linear(module: nn.Module, width: int) -> str | None:
    """The last linear map that a module defines, if it leads to the width."""
    found = _linears(module)
    if not found:
        return None
    name, last = found[-1]
    out = last.nf if isinstance(last, Conv1D) else last.out_features
    return name if out == width else None


def _only(found: Sequence[Named], what: str, where: str) -> Named:
    if len(found) != 1:
        raise UnknownFamilyError(f"{where} has {len(found)} candidates for the {what}: {_said(n for n, _ in found)}")
    return found[0]


def _said(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
