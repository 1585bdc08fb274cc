"""Loading a checkpoint folder or hub name as a model that can be located, edited and asked.

Knows `transformers` and safetensors; knows nothing about traces or edits.
"""

import hashlib
from collections.abc import Iterable, Iterator
from importlib.resources import files
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from errata.editor.errors import InvalidInputError, ModelError, NonFiniteWeightsError, UnsafeCheckpointError
from errata.editor.families import FAMILIES, family_of, unknown
from errata.editor.model import EditableModel
from errata.editor.placement import checked_device, checked_dtype
from errata.editor.quantization import (
    BLOCK,
    Quantization,
    across_blocks,
    check_usable,
    is_quantized,
    map_shape,
    quantization_config,
    quantization_of,
    quantized_base,
    scales,
    settle,
)
from errata.editor.unfamiliar import check_unfamiliar

ATLAS = "atlas"
"""The name of the model that ships with Errata."""


def atlas_folder() -> Path:
    """Where Atlas's weights lie in the installed package."""
    return Path(str(files("errata.editor.atlas").joinpath("weights")))


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    quantization: Quantization | str = Quantization.NONE,
) -> EditableModel:
    """The model at `source`: `"atlas"`, a checkpoint folder, or a hub name that `transformers` can find.

    Weights must be safetensors and finite. They are cast to `dtype`; the base's hash is that of the stored
    weights, so the same checkpoint has one hash in every dtype. Quantised on loading it is another base, with a hash
    of its own; a checkpoint that bitsandbytes stored quantised is loaded as it is.

    Raises UnknownFamilyError, UnsafeCheckpointError, NonFiniteWeightsError, or ModelError where nothing can be
    read at `source`; InvalidInputError (`device`, `dtype`, `quantization`) for what this machine cannot do.
    """
    place = checked_device(device)
    dtype = checked_dtype(dtype, place)
    scheme = _scheme(quantization)
    path = str(atlas_folder() if str(source) == ATLAS else source)
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ModelError(f"there is no folder {path!r}; give a folder saved by `save_pretrained`, or a hub name")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"no model can be read at {path!r}: {error}") from error
    architecture = (config.architectures or [config.model_type])[0]
    cls = _class_of(architecture)
    with torch.device("meta"):
        skeleton = cls(config)
    family = family_of(skeleton)
    how = _quantized(path, skeleton, scheme, dtype, place)
    weights = weight_files(path)
    base_sha256 = quantized_base(hash_files(weights), scheme)
    try:
        model, loading = cls.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True, **how)
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"the weights at {path!r} do not fit {architecture}: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise ModelError(f"{path!r} lacks {len(missing)} of the tensors of {architecture}: {', '.join(missing[:3])} …")
    loaded = EditableModel(
        name=str(source),
        # What is quantised was put in its place as it was read, and cannot be moved.
        model=(model if how else model.to(place)).eval().requires_grad_(False),
        processor=_processor(path, multimodal=family.image_token_id(model) is not None),
        family=family,
        base_sha256=base_sha256,
    )
    if how:
        settle(model, dtype)
        _check_quantized(loaded, scheme)
        # Codes are always finite.
        _refuse_non_finite(chain(_stored(weights), _scales(model)), path)
    _refuse_non_finite(model.named_parameters(), path)
    if family not in FAMILIES:
        check_unfamiliar(loaded)
    return loaded


def _scheme(quantization: Quantization | str) -> Quantization:
    try:
        return Quantization(quantization)
    except ValueError:
        known = ", ".join(q.value for q in Quantization)
        raise InvalidInputError(f"there is no {quantization!r}; use one of {known}", field="quantization") from None


def _quantized(
    path: str, skeleton: PreTrainedModel, scheme: Quantization, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What `from_pretrained` takes besides for quantised weights; nothing for others."""
    stored = getattr(skeleton.config, "quantization_config", None)
    if stored is not None:
        method = str(stored.get("quant_method", "unknown"))
        if method != "bitsandbytes":
            raise ModelError(
                f"{path!r} is stored quantised by {method}; Errata reads bitsandbytes' and plain weights: load the "
                "checkpoint that it was made from, with quantization if it must be small"
            )
        if scheme is not Quantization.NONE:
            raise InvalidInputError(f"{path!r} is stored quantised; leave quantization out", field="quantization")
        check_usable(f"{path!r}, stored quantised,", dtype)
        return {"device_map": {"": device}}
    if scheme is Quantization.NONE:
        return {}
    return {"quantization_config": quantization_config(scheme, skeleton, dtype), "device_map": {"": device}}


def _check_quantized(model: EditableModel, scheme: Quantization) -> None:
    """Raises ModelError where bitsandbytes left every map of the decoder as it was, so that nothing is quantised, and
    where this device would read codes wrongly.
    """
    if not any(is_quantized(module) for module in model.layers.modules()):
        if scheme is Quantization.NONE:
            raise ModelError(
                f"the config of {model.name!r} says that bitsandbytes stored it quantised, and its weights are plain; "
                "take `quantization_config` out of its config.json, and load it with quantization"
            )
        kind, (d, m) = type(model.down_projection(0)).__name__, map_shape(model.down_projection(0))
        raise ModelError(
            f"bitsandbytes leaves all maps in the decoder of {model.name!r} as they are, such as the {kind} from {m} "
            f"to {d} at {model.down_projection_name(0)!r}: 4 bits need inputs of a multiple of 64; load it without "
            "quantization"
        )
    torn = [n for n in across_blocks(model.model) if is_quantized(model.model.get_submodule(n))]
    if torn and model.device.type == "cpu" and quantization_of(model.model) is not Quantization.BNB_8BIT:
        raise ModelError(
            f"{model.name!r} is stored in 4 bits, {torn[0]!r} too, whose rows end within a block of {BLOCK} codes; "
            "bitsandbytes reads those with wrong scales on CPUs: load it on a GPU, or let Errata quantise it"
        )


def _class_of(architecture: str) -> Any:
    """The model's class. The name is the folder's, so it could be that of anything in `transformers`."""
    found = getattr(transformers, architecture, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise unknown(architecture, "transformers has no model of that name")
    return found


def hash_files(weights: Iterable[Path]) -> str:
    """SHA-256 over every stored tensor: name, dtype, shape and bytes, in the order of the names."""
    tensors: dict[str, Path] = {}
    for path in weights:
        try:
            with safe_open(path, "pt") as file:
                tensors |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is not a readable safetensors file: {error}; fetch it again") from error
    digest = hashlib.sha256()
    for name in sorted(tensors):
        with safe_open(tensors[name], "pt") as file:
            _add(digest, name, file.get_tensor(name))
    return digest.hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over tensors in memory, as `hash_files` takes it over stored ones."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    digest.update(raw.numpy().data)


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a checkpoint. Raises UnsafeCheckpointError for pickled ones, ModelError for none."""

    def find(name: str) -> str | None:
        try:
            return cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise ModelError(f"no model can be read at {path!r}: {error}") from error

    if single := find("model.safetensors"):
        return [Path(single)]
    if index := find("model.safetensors.index.json"):
        try:
            shards, _ = get_checkpoint_shard_files(path, index)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"the index of the shards at {path!r} cannot be read: {error}; fetch it again") from error
        return [Path(s) for s in shards]
    pickled = next((n for n in ("pytorch_model.bin", "pytorch_model.bin.index.json") if find(n)), None)
    if pickled:
        raise UnsafeCheckpointError(
            f"{path!r} holds pickled weights ({pickled}), which can run code when loaded; convert them with "
            "`model.save_pretrained(folder)` in an environment you trust and load that folder"
        )
    raise ModelError(f"{path!r} holds no model.safetensors; point to a folder saved by `save_pretrained`")


def _processor(path: str, *, multimodal: bool) -> ProcessorMixin | PreTrainedTokenizerBase:
    try:
        # Never asked for on the terminal either: what lies beside the weights could run code.
        reader = AutoProcessor if multimodal else AutoTokenizer
        processor = reader.from_pretrained(path, trust_remote_code=False)
        if multimodal and hasattr(processor, "image_processor"):
            # Where torchvision is installed transformers takes its; the same image would be other pixels elsewhere.
            processor.image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False, backend="pil")
        if multimodal and "chat_template" not in signature(type(processor)).parameters:
            # transformers hands it the template by that name alone, and its tokenizer the same file.
            processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
        return processor
    except ImportError as error:
        said = " ".join(str(error).split())
        raise ModelError(f"the processor at {path!r} needs a package that is not installed: {said}") from error
    except (OSError, ValueError) as error:
        what = "processor" if multimodal else "tokenizer"
        raise ModelError(f"{path!r} holds weights but no readable {what}: {error}") from error


def _stored(weights: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in weights:
        with safe_open(path, "pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118  (it is no mapping)


def _scales(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    return ((f"{name}.weight", scale) for name, module in model.named_modules() for scale in scales(module))


def _refuse_non_finite(parameters: Iterator[tuple[str, Tensor]], path: str) -> None:
    for name, parameter in parameters:
        if not torch.isfinite(parameter).all():
            raise NonFiniteWeightsError(
                f"{path!r}: {name} holds NaN or infinity; the checkpoint is damaged or overflowed in a narrower dtype"
            )
