"""Key statistics C₀ = E[kkᵀ]: what the keys of a layer look like on prompts that must not change.

Taken over all token positions of the references, image tokens and the template included, and once more over their
constraints' last tokens alone: an edit acts there, and among all tokens those keys are too few to weigh. These last are
kept one by one, so that an edit can leave out the references to the very thing it edits.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errata.editor.caching import digest_of, written
from errata.editor.images import sha256_of
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded, by_length
from errata.editor.prompts import Prompt
from errata.editor.requests import Context
from errata.editor.solver import eigenvectors, free_directions
from errata.editor.states import by_row
from errata.editor.trace import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyStatistics:
    """What the keys of each layer look like.

    `everywhere` is E[kkᵀ] over all `count` tokens, in float64. `sites` are the references' keys at their constraints'
    last tokens, in float32, and `subjects` what these constraints mean; `site_share` is their share of C₀, 0…1.
    """

    everywhere: Mapping[int, Float[Tensor, "m m"]]
    sites: Mapping[int, Float[Tensor, "n m"]]
    subjects: tuple[str | None, ...]
    site_share: float
    count: int
    _eigenvectors: dict[int, tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def eigenvectors(
        self, layer: int, without: Collection[str] = ()
    ) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]:
        """C₀'s eigenvalues in rising order, and their vectors as columns.

        Kept where no reference is to a subject of `without`: of wide layers they cost more than all else of an edit.
        """
        if not set(without).isdisjoint(self.subjects):
            return eigenvectors(self.covariance(layer, without))
        if layer not in self._eigenvectors:
            self._eigenvectors[layer] = eigenvectors(self.covariance(layer))
        return self._eigenvectors[layer]

    def free_directions(self, layer: int, without: Collection[str] = (), *, energy: float) -> Float[Tensor, "m f"]:
        """C₀'s eigenvectors of least energy (`solver.free_directions`)."""
        return free_directions(*self.eigenvectors(layer, without), energy=energy)

    def covariance(self, layer: int, without: Collection[str] = ()) -> Float[Tensor, "m m"]:
        """C₀ of a layer in float64, from all references but those to the subjects `without`."""
        kept = [n for n, subject in enumerate(self.subjects) if subject is None or subject not in without]
        if not kept:
            return self.everywhere[layer]
        keys = self.sites[layer][kept].double()
        return torch.lerp(self.everywhere[layer], keys.T @ keys / len(keys), self.site_share)


def key_statistics(
    model: EditableModel,
    references: Sequence[Prompt | Context],
    layers: Sequence[int],
    *,
    site_share: float = 0.5,
    cache: Path | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
    memory: Memory | None = None,
) -> KeyStatistics:
    """C₀ of `layers` on `references`; read from `cache`, a folder, where the same was computed before.

    A reference that says where its constraint stands also counts by its key there: these keys make up `site_share` of
    C₀, however few they are among all tokens.

    The cache is keyed by the base's weights and how it reads prompts, the references with their images, and the
    settings. A cached file that cannot be read is computed anew, and one that cannot be written is left out with a
    warning. Batches are cut to what `memory` holds, None: the
    device's own.
    """
    model.check_layers(layers)
    path = cache / f"{_fingerprint(model, references, layers, site_share)}.safetensors" if cache else None
    if path and (found := _read(path)):
        return found
    rows, ends = _encoded(model, references)
    sums, memory = _Sums(model, layers, ends), memory or Memory.of(model.device)
    with sums.listening():

        def run(batch: Sequence[int]) -> None:
            sums.run([rows[i] for i in batch], batch)
            if progress:
                progress(sums.done, len(rows))

        for batch in by_length(rows, batch_size):
            memory.parts(run, batch, most=batch_size, row_bytes=len(rows[batch[0]].ids) * model.token_bytes)
    statistics = KeyStatistics(
        everywhere={i: sums.mean(i) for i in layers},
        sites={i: sums.at_sites(i) for i in layers},
        subjects=tuple(_subject(references[n]) for n in ends),
        site_share=site_share,
        count=sums.tokens,
    )
    if path:
        _write(path, statistics)
    return statistics


class _Sums:
    """Σkkᵀ at each layer, float32 products of one pass summed in float64 over passes, and the keys at the `ends`.

    What a pass found counts once it has ended, so that one that runs out of memory can be made again in parts.
    """

    def __init__(self, model: EditableModel, layers: Sequence[int], ends: Mapping[int, int]) -> None:
        self._model, self._layers, self._ends = model, layers, ends
        self._sums: dict[int, Float[Tensor, "m m"]] = {}
        self._sites: dict[int, dict[int, Float[Tensor, " m"]]] = {i: {} for i in layers}
        self._batch: Sequence[int] = ()
        self._products: dict[int, Float[Tensor, "m m"]] = {}
        self.done, self.tokens = 0, 0
        """Rows, and their tokens."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, the model's passes are heard."""
        with ExitStack() as hooks:
            for layer in self._layers:
                down = self._model.down_projection(layer)
                hooks.callback(down.register_forward_pre_hook(partial(self._hear, layer)).remove)
            yield

    def run(self, rows: Sequence[Encoded], batch: Sequence[int]) -> None:
        """Adds these rows, of one length, whose numbers `batch` says."""
        self._batch, self._products = batch, {}
        with torch.no_grad():
            self._model.model(**self._model.inputs(rows), logits_to_keep=1, use_cache=False)
        for layer, product in self._products.items():
            self._sums[layer] = self._sums[layer] + product if layer in self._sums else product.double()
        self._products = {}
        self.done += len(rows)
        self.tokens += sum(len(row.ids) for row in rows)

    def mean(self, layer: int) -> Float[Tensor, "m m"]:
        """E[kkᵀ], on the CPU."""
        return self._sums[layer].cpu() / self.tokens

    def at_sites(self, layer: int) -> Float[Tensor, "n m"]:
        """The keys at the ends, in their order."""
        return torch.stack([self._sites[layer][n] for n in self._ends]) if self._ends else torch.zeros(0, 0)

    def _hear(self, layer: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        keys = args[0].flatten(0, -2).float()
        self._products[layer] = keys.T @ keys
        own = by_row(args[0], len(self._batch))
        self._sites[layer] |= {
            i: own[n, self._ends[i]].float().cpu() for n, i in enumerate(self._batch) if i in self._ends
        }


def _prompt(reference: Prompt | Context) -> Prompt:
    return reference.prompt if isinstance(reference, Context) else reference


def _subject(reference: Prompt | Context) -> str | None:
    return reference.subject if isinstance(reference, Context) else None


def _encoded(model: EditableModel, references: Sequence[Prompt | Context]) -> tuple[list[Encoded], dict[int, int]]:
    """Every reference's row, and the last token of the constraint of those that say where it stands."""
    rows: list[Encoded] = []
    sites: dict[int, int] = {}
    for n, reference in enumerate(references):
        if isinstance(reference, Context):
            row, sites[n] = model.encode_at(reference, field=f"references[{n}]")
        else:
            row = model.encode(reference)
        rows.append(row)
    return rows, sites


def _fingerprint(
    model: EditableModel, references: Sequence[Prompt | Context], layers: Sequence[int], site_share: float
) -> str:
    def parts() -> Iterator[str]:
        yield from (model.base_sha256, model.reading_sha256, str(model.model.dtype))
        yield repr((sorted(layers), site_share))
        for reference in references:
            prompt = _prompt(reference)
            constraint = reference.constraint if isinstance(reference, Context) else None
            images = [sha256_of(i) for i in prompt.images]
            yield repr((prompt.text, prompt.chat, constraint, _subject(reference), images))

    return digest_of(parts())


def _read(path: Path) -> KeyStatistics | None:
    try:
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["statistics"])
            layers = [int(k.removeprefix("everywhere.")) for k in file.keys() if k.startswith("everywhere.")]  # noqa: SIM118
            return KeyStatistics(
                everywhere={i: file.get_tensor(f"everywhere.{i}") for i in layers},
                sites={i: file.get_tensor(f"sites.{i}") for i in layers},
                subjects=tuple(said["subjects"]),
                site_share=float(said["site_share"]),
                count=int(said["count"]),
            )
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _write(path: Path, statistics: KeyStatistics) -> None:
    tensors = {f"everywhere.{i}": c for i, c in statistics.everywhere.items()}
    tensors |= {f"sites.{i}": k for i, k in statistics.sites.items()}
    said = {"subjects": statistics.subjects, "site_share": statistics.site_share, "count": statistics.count}
    written(path, tensors, {"statistics": json.dumps(said)})
