"""One cell measured: its model loaded, its questions asked, what was found told with what it was found from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from errata.editor.atlas.facts import references as atlas_references
from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.delta import Delta, applied, load_delta
from errata.editor.measurements.findings import Findings
from errata.editor.measurements.questions import Cancelled
from errata.editor.measurements.readout import ReadoutSettings
from errata.editor.measurements.swept import SweepSettings
from errata.editor.methods import EditSettings, Method, edit
from errata.editor.model import EditableModel
from errata.editor.requests import Context
from errata.editor.statistics import KeyStatistics, key_statistics
from errata.server.jobs import measurements
from errata.server.jobs.measurements import OF_QUESTIONS, Measured
from errata.server.jobs.references import read_references
from errata.server.local import LocalVersions
from errata.server.studies.format import ModelEntry
from errata.server.studies.material import Edits, edited_questions, edits_of, questions_of
from errata.server.studies.plan import Cell, source_of

_PER_COUNTRY = 16
"""Atlas's references about each country: key statistics of four times as many take as much longer, and 4 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model, and what its adapter adds to it."""

    model: EditableModel
    deltas: tuple[Delta, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A cell with its model. `statistics` is the folder where key statistics are kept."""

    cell: Cell
    opened: Opened
    statistics: Path
    cancelled: Cancelled

    @property
    def model(self) -> EditableModel:
        """The base."""
        return self.opened.model


def open_model(entry: ModelEntry, folder: Path) -> Opened:
    """Loads a model. Raises ModelError, DeltaError, or UnusableError for a version that MLflow does not have."""
    if entry.version:
        version = LocalVersions()(entry.version, "")
        return Opened(model=version.model, deltas=(version.delta,) if version.delta else ())
    source = source_of(entry, folder)
    # Atlas is too small for a transfer to pay.
    device = "cuda" if source != ATLAS and torch.cuda.is_available() else "cpu"
    model = load_model(source, dtype=entry.dtype, device=device, quantization=entry.quantization)
    return Opened(model=model, deltas=(load_delta(folder / entry.adapter, model),) if entry.adapter else ())


def measure(work: Work) -> Findings:
    """What the cell found; its settings also say the model, the data and the seed. Raises ErrataError."""
    cell = work.cell
    measured, skipped = _MEASURES[cell.measurement.kind](work)
    found = measured.findings()
    origin = {"model": cell.model_name, "data": cell.data_name}
    if cell.seed is not None:
        origin["seed"] = str(cell.seed)
    settings = origin | {name: value for name, value in found.settings.items() if name not in origin}
    title = f"{cell.label}: {found.title}"
    return replace(found, title=title, settings=settings, skipped=(*skipped, *found.skipped))


_Measure = Callable[[Work], tuple[Measured, tuple[str, ...]]]
"""What a kind finds, and what was left out before anything was asked."""


def _of_questions(kind: Callable[..., Measured]) -> _Measure:
    """A measurement of the model as it is."""

    def measured(work: Work) -> tuple[Measured, tuple[str, ...]]:
        cell = work.cell
        asked = questions_of(cell.data, cell.folder, cell.seed or 0)
        with applied(work.model, *work.opened.deltas):
            return kind(work.model, asked.questions, cell.settings, cancelled=work.cancelled), asked.skipped

    return measured


def _readout(work: Work) -> tuple[Measured, tuple[str, ...]]:
    """Of an edit that is made for it; else of the model's adapter; else of the base alone."""
    cell, deltas = work.cell, work.opened.deltas
    if cell.measurement.edit is None:
        asked = questions_of(cell.data, cell.folder, cell.seed or 0)
    else:
        edits = edits_of(cell.data, cell.folder, cell.seed or 0)
        asked, deltas = edited_questions(edits), (*deltas, _edited(work, edits))
    settings = cast(ReadoutSettings, cell.settings)
    return measurements.read_out(work.model, deltas, asked.questions, settings, _told(work)), asked.skipped


def _edited(work: Work, edits: Edits) -> Delta:
    entry = work.cell.measurement.edit
    assert entry is not None
    settings = EditSettings(layers=entry.layers, method=entry.method)
    work.model.check_layers(entry.layers, field="edit.layers")
    statistics = _statistics(work, entry.layers, entry.method)
    with applied(work.model, *work.opened.deltas):
        return edit(work.model, edits.requests, settings, statistics, cancelled=work.cancelled).delta


def _sweep(work: Work) -> tuple[Measured, tuple[str, ...]]:
    """Edits that nobody keeps."""
    cell = work.cell
    settings = cast(SweepSettings, cell.settings)
    made = edits_of(cell.data, cell.folder, cell.seed or 0)
    edits = measurements.SweptEdits(
        requests=made.requests,
        probes=made.probes,
        references=_references(work),
        statistics=lambda layers: _statistics(work, layers, settings.method),
    )
    return measurements.sweep(work.model, work.opened.deltas, edits, settings, _told(work)), made.skipped


def _told(work: Work) -> measurements.Told:
    """A cell says nothing on its way, and hears when it is to stop."""
    return measurements.Told(stage=lambda *_: None, progress=lambda *_: None, cancelled=work.cancelled)


def _references(work: Work) -> tuple[Context, ...]:
    entry = work.cell.model
    if entry.references:
        return read_references(work.cell.folder / entry.references)
    return atlas_references(per_country=_PER_COUNTRY) if work.model.name == ATLAS else ()


def _statistics(work: Work, layers: tuple[int, ...], method: Method) -> KeyStatistics | None:
    references = _references(work)
    if method is Method.MULTEDIT or not references:  # a method that needs them says so itself
        return None
    return key_statistics(work.model, references, layers, cache=work.statistics)


_MEASURES: Mapping[str, _Measure] = {
    **{kind: _of_questions(measure) for kind, measure in OF_QUESTIONS.items()},
    "sweep": _sweep,
    "readout": _readout,
}
