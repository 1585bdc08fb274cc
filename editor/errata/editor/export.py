"""Exports: a version as a folder that other software loads. Knows no server and changes no model.

An adapter is all of a version's deltas as one PEFT adapter; a uniform one is padded with zeros to one rank that vLLM
and SGLang take; a merged checkpoint has them in its weights. Each folder has a model card and an `errata.json` that
binds it to its base, and is there whole or not at all.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch.nn import functional as F

from errata.editor.card import Card, ExportedForm, license_of, render_card
from errata.editor.delta import MANIFEST, Delta, LowRank, check_base
from errata.editor.errors import InvalidInputError, RankTooLargeError
from errata.editor.merging import Rounding, base_folder, merge_checkpoint
from errata.editor.model import EditableModel

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""

CARD = "README.md"


class ExportFormat(StrEnum):
    """What is exported."""

    ADAPTER = "adapter"
    UNIFORM_ADAPTER = "uniform_adapter"
    MERGED = "merged"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """How to export. `dtype` is what a merged checkpoint is stored in; None: each tensor keeps its own.

    Raises InvalidInputError (`dtype`) for an adapter in another dtype than its own, float32.
    """

    format: ExportFormat = ExportFormat.ADAPTER
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.format is not ExportFormat.MERGED:
            raise InvalidInputError(
                "an adapter is stored in float32, which is exact; leave the dtype out, or export a merged checkpoint",
                field="dtype",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written. `rank` is the uniform one, 0 for the other formats; only merging rounds."""

    folder: Path
    rank: int = 0
    rounding: tuple[Rounding, ...] = ()


def export(
    model: EditableModel,
    deltas: Sequence[Delta],
    folder: Path,
    settings: ExportSettings,
    card: Card,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Export:
    """Writes the version that `deltas`, the oldest first, make of `model` into `folder`, which must not be there yet.

    Raises InvalidInputError for a folder that is there or has no parent (`folder`), a version that is no adapter
    (`format`), values that the dtype cannot hold (`dtype`); WrongBaseError for a delta of another base; ModelError
    where the base's files are not those that were loaded; CancelledError. After any of them there is no folder.
    """
    for delta in deltas:
        check_base(delta, model)
    with _new_folder(folder) as partial:
        rank, rounding = 0, tuple[Rounding, ...]()
        match settings.format:
            case ExportFormat.MERGED:
                rounding = merge_checkpoint(model, deltas, partial, dtype=settings.dtype, cancelled=cancelled)
                _write_manifest(partial / MANIFEST, model, deltas, card.version)
            case ExportFormat.UNIFORM_ADAPTER:
                padded = uniform(composed(deltas))
                padded.save(partial)
                rank = max(padded.ranks.values())
            case ExportFormat.ADAPTER:
                composed(deltas).save(partial)
        form = ExportedForm(
            format=settings.format,
            architecture=type(model.model).__name__,
            base_sha256=model.base_sha256,
            rank=rank,
            dtype=str(settings.dtype or "").removeprefix("torch."),
            rounding=rounding,
        )
        said = replace(card, license=card.license or license_of(base_folder(model)))
        (partial / CARD).write_text(render_card(said, form), encoding="utf-8")
    return Export(folder=folder, rank=rank, rounding=rounding)


def composed(deltas: Sequence[Delta]) -> Delta:
    """Deltas as one, at the lowest rank that is exact in float32; a single one as it is.

    Raises InvalidInputError (`format`) where nothing is left of them.
    """
    total = deltas[0] if len(deltas) == 1 else reduce(add, deltas).compressed() if deltas else None
    if total is None or not total.layers:
        raise InvalidInputError(
            "the version equals its base, so an adapter has nothing to hold; use the base, or export it merged",
            field="format",
        )
    return total


def uniform(delta: Delta) -> Delta:
    """The same ΔW with one rank at every layer, the lowest of `RANKS` that it fits: compressed, then zero-padded.

    Raises RankTooLargeError.
    """
    least = delta.compressed()
    needed = max(least.ranks.values(), default=1)
    rank = next((r for r in RANKS if r >= needed), None)
    if rank is None:
        raise RankTooLargeError(
            f"the version has rank {needed}, and vLLM takes at most {RANKS[-1]}; export it merged, or as a "
            "plain adapter",
            field="format",
        )
    return replace(least, layers={i: _padded(low, rank - low.rank) for i, low in least.layers.items()})


def _padded(low: LowRank, missing: int) -> LowRank:
    return LowRank(a=F.pad(low.a, (0, 0, 0, missing)), b=F.pad(low.b, (0, missing)))


def _write_manifest(path: Path, model: EditableModel, deltas: Sequence[Delta], version: str) -> None:
    manifest = {"base_sha256": model.base_sha256, "merged": [d.sha256 for d in deltas], "version": version}
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed on the way out; gone after a failure."""
    if folder.exists() or not folder.parent.is_dir():
        wrong = "is there already; give another one" if folder.exists() else "has no parent folder; make that first"
        raise InvalidInputError(f"{str(folder)!r} {wrong}", field="folder")
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
