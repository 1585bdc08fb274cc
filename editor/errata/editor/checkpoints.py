"""Loading a checkpoint folder or hub name as a model that can be located, edited and asked.

Knows `transformers` and safetensors; knows nothing about traces or edits.
"""

import hashlib
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from errata.editor.errors import ModelError, NonFiniteWeightsError, UnsafeCheckpointError
from errata.editor.families import FAMILIES, family_of, unknown
from errata.editor.model import EditableModel
from errata.editor.unfamiliar import check_unfamiliar

ATLAS = "atlas"
"""The name of the model that ships with Errata."""


def atlas_folder() -> Path:
    """Where Atlas's weights lie in the installed package."""
    return Path(str(files("errata.editor.atlas").joinpath("weights")))


def load_model(
    source: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> EditableModel:
    """The model at `source`: `"atlas"`, a checkpoint folder, or a hub name that `transformers` can find.

    Weights must be safetensors and finite. They are cast to `dtype`; the base's hash is that of the stored
    weights, so the same checkpoint has one hash in every dtype.

    Raises UnknownFamilyError, UnsafeCheckpointError, NonFiniteWeightsError, or ModelError where nothing can be
    read at `source`.
    """
    path = str(atlas_folder() if str(source) == ATLAS else source)
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ModelError(f"there is no folder {path!r}; give a folder saved by `save_pretrained`, or a hub name")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"no model can be read at {path!r}: {error}") from error
    architecture = (config.architectures or [config.model_type])[0]
    cls = _class_of(architecture)
    with torch.device("meta"):
        family = family_of(cls(config))
    weights = weight_files(path)
    base_sha256 = hash_files(weights)
    try:
        model, loading = cls.from_pretrained(path, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"the weights at {path!r} do not fit {architecture}: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise ModelError(f"{path!r} lacks {len(missing)} of the tensors of {architecture}: {', '.join(missing[:3])} …")
    _refuse_non_finite(model.named_parameters(), path)
    loaded = EditableModel(
        name=str(source),
        model=model.to(device).eval().requires_grad_(False),
        processor=_processor(path, multimodal=family.image_token_id(model) is not None),
        family=family,
        base_sha256=base_sha256,
    )
    if family not in FAMILIES:
        check_unfamiliar(loaded)
    return loaded


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
        return reader.from_pretrained(path, trust_remote_code=False)
    except ImportError as error:
        said = " ".join(str(error).split())
        raise ModelError(f"the processor at {path!r} needs a package that is not installed: {said}") from error
    except (OSError, ValueError) as error:
        what = "processor" if multimodal else "tokenizer"
        raise ModelError(f"{path!r} holds weights but no readable {what}: {error}") from error


def _refuse_non_finite(parameters: Iterator[tuple[str, Tensor]], path: str) -> None:
    for name, parameter in parameters:
        if not torch.isfinite(parameter).all():
            raise NonFiniteWeightsError(
                f"{path!r}: {name} holds NaN or infinity; the checkpoint is damaged or overflowed in a narrower dtype"
            )
