"""Key statistics C₀ = E[kkᵀ]: what the keys of a layer look like on prompts that must not change.

Taken over all token positions of the references, image tokens and the template included, and once more over their
constraints' last tokens alone: an edit acts there, and among all tokens those keys are too few to weigh.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from errata.editor.images import sha256_of
from errata.editor.model import EditableModel, Encoded, by_length
from errata.editor.prompts import Prompt
from errata.editor.requests import Context
from errata.editor.trace import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyStatistics:
    """C₀ of each layer, in float64, and the number of keys behind it."""

    covariances: Mapping[int, Float[Tensor, "m m"]]
    count: int


def key_statistics(
    model: EditableModel,
    references: Sequence[Prompt | Context],
    layers: Sequence[int],
    *,
    site_share: float = 0.5,
    cache: Path | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> KeyStatistics:
    """C₀ of `layers` on `references`; read from `cache`, a folder, where the same was computed before.

    A reference that says where its constraint stands also counts by its key there: these keys make up `site_share` of
    C₀, 0…1, however few they are among all tokens.

    The cache is keyed by the base's weights, the references with their images, and the settings. A cached file that
    cannot be read is computed anew.
    """
    model.check_layers(layers)
    path = cache / f"{_fingerprint(model, references, layers, site_share)}.safetensors" if cache else None
    if path and (found := _read(path)):
        return found
    encoded = [model.encode(_prompt(r)) for r in references]
    sites = [_site(e, r) for e, r in zip(encoded, references, strict=True)]
    everywhere, at_sites = _Products(), _Products()
    done = 0
    with ExitStack() as hooks, torch.no_grad():
        kept: list[tuple[int, int]] = []
        for layer in layers:
            hook = _adding_to(everywhere, at_sites, kept, layer)
            hooks.callback(model.down_projection(layer).register_forward_pre_hook(hook).remove)
        for rows in by_length(encoded, batch_size):
            kept[:] = [(n, site) for n, i in enumerate(rows) if (site := sites[i]) is not None]
            model.model(**model.inputs([encoded[i] for i in rows]), logits_to_keep=1, use_cache=False)
            done += len(rows)
            if progress:
                progress(done, len(encoded))
    covariances = {i: everywhere.mean(i) for i in layers}
    if any(s is not None for s in sites):
        covariances = {i: torch.lerp(c, at_sites.mean(i), site_share) for i, c in covariances.items()}
    statistics = KeyStatistics(covariances=covariances, count=everywhere.count[layers[0]])
    if path:
        _write(path, statistics)
    return statistics


class _Products:
    """Sums of kkᵀ by layer: float32 products of one batch, summed in float64 over batches."""

    def __init__(self) -> None:
        self._sums: dict[int, Float[Tensor, "m m"]] = {}
        self.count: dict[int, int] = {}

    def add(self, layer: int, keys: Float[Tensor, "n m"]) -> None:
        product = (keys.float().T @ keys.float()).double()
        self._sums[layer] = self._sums[layer] + product if layer in self._sums else product
        self.count[layer] = self.count.get(layer, 0) + len(keys)

    def mean(self, layer: int) -> Float[Tensor, "m m"]:
        return self._sums[layer].cpu() / self.count[layer]


def _adding_to(
    everywhere: _Products, at_sites: _Products, kept: Sequence[tuple[int, int]], layer: int
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        everywhere.add(layer, args[0].flatten(0, -2))
        if kept:
            rows, sites = zip(*kept, strict=True)
            at_sites.add(layer, args[0][list(rows), list(sites)])

    return hook


def _prompt(reference: Prompt | Context) -> Prompt:
    return reference.prompt if isinstance(reference, Context) else reference


def _site(encoded: Encoded, reference: Prompt | Context) -> int | None:
    """Where the reference's constraint ends, if it says."""
    if not isinstance(reference, Context):
        return None
    return encoded.positions(*reference.constraint.span(reference.prompt.text))[-1]


def _fingerprint(
    model: EditableModel, references: Sequence[Prompt | Context], layers: Sequence[int], site_share: float
) -> str:
    digest = hashlib.sha256()

    def parts() -> Iterator[str]:
        yield from (model.base_sha256, str(model.model.dtype), repr((sorted(layers), site_share)))
        for reference in references:
            prompt = _prompt(reference)
            constraint = reference.constraint if isinstance(reference, Context) else None
            yield repr((prompt.text, prompt.chat, constraint, [sha256_of(i) for i in prompt.images]))

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
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file({str(i): c for i, c in statistics.covariances.items()}, partial, {"count": str(statistics.count)})
    partial.replace(path)
