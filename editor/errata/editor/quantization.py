"""Bases whose linear maps are held in 8 or 4 bits by bitsandbytes (Dettmers et al. 2022 and 2023), on CPU or CUDA.

A quantised map is a module like any other: it is run, hooked, and passes gradients on to its input. What differs is
here: how a base is loaded so, what its maps hold besides a parameter, and W as the numbers that the codes stand for.
Its weights cannot be changed; an edit is applied in float32 to what a map puts out (docs/adr/0009).
"""

import hashlib
import logging
from collections.abc import Iterator
from enum import StrEnum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from errata.editor.errors import InvalidInputError, ModelError

if TYPE_CHECKING:
    from errata.editor.model import EditableModel

BLOCK = 64
"""4-bit codes that share a scale."""

_LOGGER = "bitsandbytes.autograd._functions"
_PACKED = ("Int8Params", "Params4bit")
"""bitsandbytes' parameters, by name: whoever has no quantised model need not import it."""


class Quantization(StrEnum):
    """How a base's linear maps are held: LLM.int8, 4-bit NormalFloat, 4-bit floats. Embeddings and head never are."""

    NONE = "none"
    BNB_8BIT = "bnb-8bit"
    BNB_4BIT = "bnb-4bit"
    BNB_4BIT_FP4 = "bnb-4bit-fp4"


def quantization_config(
    quantization: Quantization, skeleton: PreTrainedModel, dtype: torch.dtype
) -> BitsAndBytesConfig:
    """What `transformers` loads a base with, whose modules `skeleton` has; 4-bit products are computed in `dtype`.

    Raises InvalidInputError: `quantization` where bitsandbytes is not installed, `dtype` for one it has no products in.
    """
    check_usable(quantization.value, dtype)
    if quantization is Quantization.BNB_8BIT:
        return BitsAndBytesConfig(load_in_8bit=True)
    kind = "fp4" if quantization is Quantization.BNB_4BIT_FP4 else "nf4"
    # The first are those that would be left out were no others named.
    left = [*get_keys_to_not_convert(skeleton), *across_blocks(skeleton)]
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=left
    )


def across_blocks(model: PreTrainedModel) -> list[str]:
    """Maps whose rows end within a block of 4-bit codes: read with wrong scales on CPUs (bitsandbytes 0.50)."""
    maps = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D))
    return [name for name, m in maps if map_shape(m)[1] % BLOCK]


def check_usable(what: str, dtype: torch.dtype) -> None:
    """Raises InvalidInputError: `quantization` where `what` needs bitsandbytes and it is not there, `dtype` for one it
    has no products in.
    """
    check_installed(what)
    if dtype is torch.float64:
        # Of 4-bit codes that were stored it would be nonsense, without a word.
        raise InvalidInputError(f"{what} has no products in float64; use float32", field="dtype")


def check_installed(what: str) -> None:
    """Raises InvalidInputError (`quantization`) where `what` needs bitsandbytes and it is not there."""
    if find_spec("bitsandbytes") is None:
        raise InvalidInputError(
            f"{what} needs bitsandbytes, which is not installed; install Errata with the extra 'quantised', or load "
            "the model without quantization",
            field="quantization",
        )


def quantization_of(model: PreTrainedModel) -> Quantization:
    """How a model's maps are held, by what it says of itself."""
    if not getattr(model, "is_quantized", False):
        return Quantization.NONE
    config = cast(BitsAndBytesConfig, model.config.quantization_config)
    if config.load_in_8bit:
        return Quantization.BNB_8BIT
    return Quantization.BNB_4BIT_FP4 if config.bnb_4bit_quant_type == "fp4" else Quantization.BNB_4BIT


def quantized_base(base_sha256: str, quantization: Quantization) -> str:
    """The hash of a base that is quantised on loading, from its checkpoint's: W is another, so it is another base."""
    if quantization is Quantization.NONE:
        return base_sha256
    return hashlib.sha256(f"{base_sha256}\0{quantization.value}".encode()).hexdigest()


def settle(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Does now what bitsandbytes would do at each map's first product, and makes every CPU compute alike.

    Left to itself it moves the scales when a map is first run, which two replicas must not do at once, and on CPUs
    with AVX512-BF16 repacks 4-bit weights for a product in bfloat16 that passes no gradient on.
    """
    # It would say at every product that LLM.int8 casts its input to float16.
    logging.getLogger(_LOGGER).setLevel(logging.ERROR)
    for module in model.modules():
        if not is_quantized(module):
            continue
        held = cast(Any, module)
        if hasattr(held, "init_8bit_state"):
            if held.weight.CB is not None:
                held.init_8bit_state()
        else:
            held.compute_dtype, held.compute_type_is_set = dtype, True
            held.support_avx512bf16_for_cpu = False


def is_quantized(module: nn.Module) -> bool:
    """Whether a module holds its weight in codes."""
    return type(getattr(module, "weight", None)).__name__ in _PACKED


def scales(module: nn.Module) -> Iterator[Tensor]:
    """The tensors, codes aside, that a module's codes are read with; they are neither parameters nor buffers."""
    if not is_quantized(module):
        return
    state = getattr(module, "state", None)
    if state is not None:
        yield state.SCB
        return
    state = cast(Any, module.weight).quant_state
    for part in (state, state.state2):
        yield from (t for t in (getattr(part, "absmax", None), getattr(part, "code", None)) if t is not None)
    if state.offset is not None:
        yield state.offset


def shared_tensors(module: nn.Module) -> Iterator[Tensor]:
    """What copies of a module must share besides parameters and buffers: its scales, and its codes' second name."""
    yield from scales(module)
    state = getattr(module, "state", None)
    if is_quantized(module) and state is not None:
        yield state.CB


def dense_weight(module: nn.Module) -> Float[Tensor, "d m"]:
    """W of a linear map, however it is stored; of a quantised one, in float, what its codes stand for."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    if is_quantized(module):
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        dense: Tensor = dequantize_bnb_weight(weight, getattr(module, "state", None))
        return dense
    return weight.T if isinstance(module, Conv1D) else weight


def map_shape(module: nn.Module) -> tuple[int, int]:
    """(d, m) of a linear map from m to d."""
    if isinstance(module, Conv1D):
        m, d = module.weight.shape
        return d, m
    linear = cast(nn.Linear, module)
    return linear.out_features, linear.in_features


def check_writable(model: "EditableModel", what: str) -> None:
    """Raises ModelError for a quantised model, whose weights hold codes; `what` needs to change them."""
    quantization = quantization_of(model.model)
    if quantization is not Quantization.NONE:
        raise ModelError(
            f"{model.name!r} is loaded as {quantization.value}, so its weights are codes, and {what}; load it without "
            "quantization, or use the delta as an adapter"
        )


def memory_bytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers and scales, shared ones once."""
    held = [*model.parameters(), *model.buffers(), *(t for module in model.modules() for t in scales(module))]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in held)}.values())
