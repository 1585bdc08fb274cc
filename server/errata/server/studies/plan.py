"""What a study consists of: cells, each a measurement of a model on a set of data with a seed.

A cell is known by the hash of everything that its findings are made from and told with: the model's weights, the
data's content, settings with their defaults, the seed, and the names of all of them. A seed that changes nothing makes
no cell of its own.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TypeVar

from errata.editor.checkpoints import ATLAS, atlas_folder, hash_files, weight_files
from errata.editor.datasets.lines import read_lines
from errata.editor.datasets.records import Record
from errata.editor.datasets.vqa_constraints import VqaConstraints, read_vqa_constraints
from errata.editor.errors import ErrataError
from errata.server.studies.format import (
    DataEntry,
    MeasurementEntry,
    ModelEntry,
    Study,
    read_study,
    seeded,
    settings_of,
)
from errata.server.studies.results import Place

T = TypeVar("T")

_FORMAT = 1
"""Of what is hashed and of what is stored: another one is measured anew."""


class UnreadableError(ErrataError):
    """Models or data of a study cannot be read: one line for each."""

    reason = "STUDY_UNREADABLE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement of a study. `seed` is None where nothing depends on it; files are named relative to `folder`."""

    sha256: str
    folder: Path
    model_name: str
    data_name: str
    measurement_name: str
    model: ModelEntry
    data: tuple[DataEntry, ...]
    measurement: MeasurementEntry
    seed: int | None

    @property
    def id(self) -> str:
        """What it is stored and published under."""
        return self.sha256[:32]

    @property
    def anchor(self) -> str:
        """What links on the study's page name it by."""
        return f"cell-{self.id[:12]}"

    @property
    def label(self) -> str:
        """For people: `noise · atlas · words · seed 0`."""
        seed = [] if self.seed is None else [f"seed {self.seed}"]
        return " · ".join([self.measurement_name, self.model_name, self.data_name, *seed])

    @property
    def settings(self) -> object:
        """The measurement's settings, the defaults filled in."""
        return settings_of(self.measurement, self.seed or 0)


def plan(study: Study, folder: Path) -> tuple[Cell, ...]:
    """All cells, those of one model together. Reads weights and data to know them again; loads neither.

    Raises UnreadableError with what is wrong with all models and data that cannot be read.
    """
    used = [name for name in study.data if any(name in (m.data or study.data) for m in study.measurements.values())]
    models, no_models = _each(study.models, lambda name: _model_identity(study.models[name], folder))
    sets, no_data = _each(used, lambda name: [_data_identity(part, folder) for part in study.parts(name)])
    if wrong := [f"models.{told}" for told in no_models] + [f"data.{told}" for told in no_data]:
        raise UnreadableError("\n".join(wrong))
    return tuple(cell for model, known in models.items() for cell in _of_model(study, folder, model, known, sets))


def planned(file: Path, out: Path) -> list[tuple[Cell, bool]]:
    """A study's cells, and whether each is finished. Raises StudyError, and ErrataError for what cannot be read."""
    place = Place(out=out)
    return [(cell, place.has(cell.id)) for cell in plan(read_study(file), file.parent.absolute())]


def _each(names: Iterable[str], known: Callable[[str], T]) -> tuple[dict[str, T], list[str]]:
    """What is known of each by its name, and a line for each of which nothing can be known."""
    found: dict[str, T] = {}
    wrong = []
    for name in names:
        try:
            found[name] = known(name)
        except ErrataError as error:
            wrong.append(f"{name}: {error}")
    return found, wrong


def _of_model(study: Study, folder: Path, model: str, known: object, sets: dict[str, list[object]]) -> Iterator[Cell]:
    for name, entry in study.measurements.items():
        if model not in (entry.models or study.models):
            continue
        for data in entry.data or study.data:
            parts = study.parts(data)
            varied = seeded(entry) or any(part.n is not None for part in parts)
            for seed in (entry.seeds or study.seeds) if varied else (None,):
                told = {
                    "format": _FORMAT,
                    "names": [model, data, name],
                    "model": known,
                    "data": sets[data],
                    "kind": entry.kind,
                    "settings": settings_of(entry, seed or 0),
                    "edit": entry.edit.model_dump(mode="json") if entry.edit else None,
                    "seed": seed,
                }
                yield Cell(
                    sha256=hashlib.sha256(json.dumps(told, sort_keys=True, default=_plain).encode()).hexdigest(),
                    folder=folder,
                    model_name=model,
                    data_name=data,
                    measurement_name=name,
                    model=study.models[model],
                    data=parts,
                    measurement=entry,
                    seed=seed,
                )


def source_of(entry: ModelEntry, folder: Path) -> str:
    """What `load_model` takes: "atlas", a folder beside the study's file, or a hub's name."""
    beside = folder / entry.source
    return str(beside.resolve()) if entry.source != ATLAS and beside.is_dir() else entry.source


def records_of(entry: DataEntry, folder: Path) -> VqaConstraints:
    """The records of a data set on disk, and a line for each that was left out.

    Raises DatasetError for a file with faults, InvalidInputError for one that cannot be read.
    """
    assert entry.path is not None
    path = folder / entry.path
    if path.suffix.lower() != ".csv":
        return VqaConstraints(records=read_lines(path), skipped=())
    return read_vqa_constraints(
        path,
        images=folder / (entry.images or ""),
        answers=folder / entry.answers if entry.answers else None,
        substitute=entry.substitute,
        chat=entry.chat,
    )


def is_known(entry: DataEntry) -> bool:
    """Whether it is JSON like Known 1000."""
    return (entry.path or "").lower().endswith(".json")


def _model_identity(entry: ModelEntry, folder: Path) -> object:
    if entry.version:  # a number never stands for anything else
        return entry.version
    source = source_of(entry, folder)
    weights = hash_files(weight_files(str(atlas_folder()) if source == ATLAS else source))
    adapter = _hash_folder(folder / entry.adapter) if entry.adapter else None
    references = _hash(folder / entry.references) if entry.references else None
    how = [entry.dtype] if entry.quantization == "none" else [entry.dtype, entry.quantization]
    return [entry.source, weights, *how, adapter, references]


def _data_identity(entry: DataEntry, folder: Path) -> object:
    said = entry.model_dump(mode="json")
    if entry.atlas:
        return said
    files = [folder / name for name in (entry.path, entry.answers) if name]
    if not is_known(entry):
        files = [file for file in files if file.is_file()]
        found = records_of(entry, folder)
        return [said, list(map(_hash, files)), list(found.skipped), [_of_record(r) for r in found.records]]
    return [said, list(map(_hash, files))]


def _of_record(record: Record) -> list[str]:
    return [record.id, record.text, *(_hash(file) if file.is_file() else "missing" for file in record.files)]


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _hash_folder(folder: Path) -> list[str]:
    return [f"{file.name} {_hash(file)}" for file in sorted(folder.iterdir()) if file.is_file()]


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
