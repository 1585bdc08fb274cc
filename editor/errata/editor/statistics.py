"""Key statistics C₀ = E[kkᵀ]: what the keys of a layer look like on prompts that must not change.

Taken over all token positions of the reference prompts, image tokens and the template included: statistics of the
constraint's keys alone protect less (Errata's ARCHITECTURE.md gives the measurement).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from errata.editor.images import sha256_of
from errata.editor.model import EditableModel, by_length
from errata.editor.prompts import Prompt
from errata.editor.trace import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyStatistics:
    """C₀ of each layer, in float64, and the number of keys behind it."""

    covariances: Mapping[int, Float[Tensor, "m m"]]
    count: int


def key_statistics(
    model: EditableModel,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    *,
    cache: Path | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> KeyStatistics:
    """C₀ of `layers` on `prompts`; read from `cache`, a folder, where the same was computed before.

    The cache is keyed by the base's weights, the prompts with their images, and the layers. A cached file that
    cannot be read is computed anew.
    """
    model.check_layers(layers)
    path = cache / f"{_fingerprint(model, prompts, layers)}.safetensors" if cache else None
    if path and (found := _read(path)):
        return found
    encoded = [model.encode(p) for p in prompts]
    sums: dict[int, Tensor] = {}
    count = done = 0
    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            handle = model.down_projection(layer).register_forward_pre_hook(_adding_to(sums, layer))
            hooks.callback(handle.remove)
        for rows in by_length(encoded, batch_size):
            inputs = model.inputs([encoded[i] for i in rows])
            model.model(**inputs, logits_to_keep=1, use_cache=False)
            count += inputs["input_ids"].numel()
            done += len(rows)
            if progress:
                progress(done, len(encoded))
    statistics = KeyStatistics(covariances={i: s.cpu() / count for i, s in sums.items()}, count=count)
    if path:
        _write(path, statistics)
    return statistics


def _adding_to(sums: dict[int, Tensor], layer: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        keys = args[0].flatten(0, -2)
        # float32 products of one batch, summed in float64 over batches.
        product = (keys.float().T @ keys.float()).double()
        sums[layer] = sums[layer] + product if layer in sums else product

    return hook


def _fingerprint(model: EditableModel, prompts: Sequence[Prompt], layers: Sequence[int]) -> str:
    digest = hashlib.sha256()

    def parts() -> Iterator[str]:
        yield from (model.base_sha256, str(model.model.dtype), repr(sorted(layers)))
        for prompt in prompts:
            yield repr((prompt.text, prompt.chat, [sha256_of(i) for i in prompt.images]))

    for part in parts():
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _read(path: Path) -> KeyStatistics | None:
    try:
        with safe_open(path, "pt") as file:
            count = int(file.metadata()["count"])
            return KeyStatistics(covariances={int(k): file.get_tensor(k) for k in tuple(file.keys())}, count=count)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _write(path: Path, statistics: KeyStatistics) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({str(i): c for i, c in statistics.covariances.items()}, partial, {"count": str(statistics.count)})
    partial.replace(path)
