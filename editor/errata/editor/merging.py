"""A checkpoint with deltas added to its weights: the base's files, read and written one at a time.

W + ΔW is summed in float64 from the stored weight and rounded once, and what that costs is reported. The model in
memory is only compared with, never changed. Weights are safetensors on both sides; code is never copied.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from errata.editor.checkpoints import ATLAS, atlas_folder, hash_files, weight_files
from errata.editor.delta import Delta, LowRank, empty_delta, weight_of
from errata.editor.errors import CancelledError, InvalidInputError, ModelError
from errata.editor.model import EditableModel
from errata.editor.quantization import check_writable

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_INDICES = (_INDEX, "pytorch_model.bin.index.json")
_SUFFIXES = (".json", ".jinja", ".txt", ".model")
_LEGAL = ("LICENSE", "NOTICE", "USE_POLICY")

_Json: TypeAlias = "dict[str, _Json] | list[_Json] | str | int | float | bool | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """One merged layer: the largest |stored − exact|, and ‖stored − exact‖ relative to ‖ΔW‖ (Frobenius)."""

    layer: int
    max_error: float
    relative_error: float


def merge_checkpoint(
    model: EditableModel,
    deltas: Sequence[Delta],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[Rounding, ...]:
    """Writes the model's checkpoint with the deltas merged in, and all that belongs to it, into an existing folder.

    `dtype` is for all tensors; None: each keeps its own. A sharded base stays sharded in the same way; as much is in
    memory at once as one of its files holds. Returns the rounding of each edited layer.

    Raises ModelError where the files cannot be read or are not those that were loaded, and for a quantised base, whose
    files hold other weights than the edit was made on; InvalidInputError (`dtype`) for values that `dtype` cannot
    hold, CancelledError.
    """
    check_writable(model, "its files hold others than those the deltas were made and judged on")
    base = base_folder(model)
    if base is None:
        raise ModelError(f"the checkpoint of {model.name!r} is not on this disk; load it from a folder")
    files = weight_files(str(base))
    if hash_files(files) != model.base_sha256:
        raise ModelError(f"the checkpoint at {model.name!r} is no longer the one that was loaded; load it again")
    change = reduce(add, deltas, empty_delta(model))
    edited = _stored_names(model, files, change.layers)
    rounding, size = [], 0
    for file in files:
        tensors = {}
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                if cancelled():
                    raise CancelledError("the export was cancelled; nothing was written")
                tensor = opened.get_tensor(name)
                if (layer := edited.get(name)) is not None:
                    tensor, rounded = _merged(model, layer, tensor, change.layers[layer], dtype)
                    rounding.append(rounded)
                tensors[name] = _stored(name, tensor, dtype)
            metadata = opened.metadata()
        save_file(tensors, folder / file.name, metadata or {"format": "pt"})
        size += sum(t.nbytes for t in tensors.values())
    _copy_others(base, folder, dtype)
    if len(files) > 1 or not (base / _WEIGHTS).is_file():
        _write_index(base / _INDEX, folder / _INDEX, size)
    return tuple(sorted(rounding, key=lambda each: each.layer))


def base_folder(model: EditableModel) -> Path | None:
    """Where the model's checkpoint lies; None where it is not on this disk. Asks no network."""
    if model.name == ATLAS:
        return atlas_folder()
    if Path(model.name).is_dir():
        return Path(model.name)
    try:
        config = cached_file(model.name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(config).parent if config else None


def _merged(
    model: EditableModel, layer: int, stored: Tensor, low: LowRank, dtype: torch.dtype | None
) -> tuple[Tensor, Rounding]:
    weight = weight_of(model, layer)
    if stored.shape != weight.shape or not stored.to(weight.dtype).equal(weight.cpu()):
        raise ModelError(
            f"layer {layer} of {model.name!r} is stored in another form than it is used in; load the model with "
            "transformers, save it with `save_pretrained`, and edit that checkpoint"
        )
    change = low.dense()
    norm = float(change.norm())
    exact = stored.double() + (change.T if isinstance(model.down_projection(layer), Conv1D) else change)
    merged = exact.to(dtype or stored.dtype).contiguous()
    error = merged.double() - exact
    return merged, Rounding(
        layer=layer,
        max_error=float(error.abs().max()),
        relative_error=float(error.norm()) / norm if norm else 0.0,
    )


def _stored(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    stored = tensor if dtype is None else tensor.to(dtype)
    if not torch.isfinite(stored).all():
        raise InvalidInputError(
            f"{name} holds values that {stored.dtype} cannot; export in bfloat16 or float32", field="dtype"
        )
    return stored


def _stored_names(model: EditableModel, files: Sequence[Path], layers: Iterable[int]) -> dict[str, int]:
    """The edited weights' names in the files, each with its layer. They may have other prefixes than in memory."""
    names = []
    for file in files:
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    found = {}
    for layer in layers:
        ending = f"{model.family.layers}.{layer}.{model.family.down_projection}.weight"
        matching = [name for name in names if f".{name}".endswith(f".{ending}")]
        if len(matching) != 1:
            raise ModelError(f"the files of {model.name!r} hold {len(matching)} tensors named {ending!r}, not one")
        found[matching[0]] = layer
    return found


def _copy_others(base: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copies config, tokenizer, processor and licence; the config names the new dtype if there is one."""
    for file in sorted(base.iterdir()):
        belongs = file.suffix in _SUFFIXES or file.name.startswith(_LEGAL)
        if belongs and file.is_file() and file.name not in _INDICES:
            shutil.copyfile(file, folder / file.name)
    if dtype is not None:
        path = folder / "config.json"
        config = _with_dtype(json.loads(path.read_text(encoding="utf-8")), str(dtype).removeprefix("torch."))
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_dtype(config: _Json, dtype: str) -> _Json:
    if not isinstance(config, dict):
        return config
    return {k: dtype if k in ("dtype", "torch_dtype") else _with_dtype(v, dtype) for k, v in config.items()}


def _write_index(base: Path, index: Path, size: int) -> None:
    read = json.loads(base.read_text(encoding="utf-8"))
    read["metadata"] = {**read.get("metadata", {}), "total_size": size}
    index.write_text(json.dumps(read, indent=2) + "\n", encoding="utf-8")
