"""What a study's file says: models, data, measurements, seeds. docs/studies.md shows one.

Reading finds everything that is wrong before it complains, with file, line and field; nothing is loaded or run.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from errata.editor.checkpoints import ATLAS
from errata.editor.errors import InvalidInputError
from errata.editor.methods import Method
from errata.server.conversion.measuring import SETTINGS, SWEEP
from errata.server.studies.source import Place, StudyError, read_source, said, unknown

READOUT = "readout"
"""The kind that can read what an edit wrote."""

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
_Text = Annotated[str, Field(pattern=r"\S", max_length=1_000)]
_Many = Annotated[int, Field(ge=1, le=100_000)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]

AtlasData = Literal["single", "textual", "multi", "hard", "errata", "counterfactual"]
"""Atlas's own questions: about a picture, in words, with both, about pictures seen badly; and its outdated facts."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelEntry(_Entry):
    """A model: a base, with an adapter's folder on it or not; or a version that MLflow has.

    `references` is a JSONL file of contexts whose keys an edit leaves alone; Atlas has its own.
    """

    source: _Text = ATLAS
    adapter: _Text | None = None
    version: Annotated[str, Field(pattern=r"^models:/[^/@]+/[0-9]+$")] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["none", "bnb-8bit", "bnb-4bit", "bnb-4bit-fp4"] = "none"
    references: _Text | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.version and self.model_fields_set & {"source", "adapter", "dtype", "quantization"}:
            raise ValueError("a version brings its base and its adapter; give version alone, or source and adapter")
        return self


class DataEntry(_Entry):
    """Questions: Atlas's own, those of a file, or several sets together.

    `path` is a data set of our format, a CSV of VQA-Constraints (with its folder `images`, and `answers`), or JSON
    like Known 1000. `n` of them are drawn by the seed; None: all.
    """

    atlas: AtlasData | None = None
    path: _Text | None = None
    join: tuple[_Name, ...] = ()
    n: _Many | None = None
    images: _Text | None = None
    answers: _Text | None = None
    substitute: _Text | None = None
    chat: bool = True

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, given: object) -> object:
        return _tupled(given, "join")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(map(bool, (self.atlas, self.path, self.join))) != 1:
            raise ValueError("give one of atlas, path and join")
        if self.atlas and self.n is None:
            raise ValueError("Atlas makes as many questions as it is asked for; give n")
        of_csv = self.model_fields_set & {"images", "answers", "substitute", "chat"}
        is_csv = (self.path or "").lower().endswith(".csv")
        if of_csv and not is_csv:
            raise ValueError(f"{', '.join(sorted(of_csv))}: for a CSV of VQA-Constraints only")
        if is_csv and not self.images:
            raise ValueError("a CSV of VQA-Constraints holds no images; give their folder as images")
        if self.join and self.n:
            raise ValueError("sets that are joined have their own n each")
        return self


class EditEntry(_Entry):
    """An edit that a read-out makes of its questions, to their answers, and reads. Layers count from 0."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    method: Annotated[Method, Field(strict=False)] = Method.MEMIT

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, given: object) -> object:
        return _tupled(given, "layers")


class MeasurementEntry(_Entry):
    """A measurement with its settings; by default on every model, set of data and seed."""

    kind: str
    settings: Mapping[str, object] = {}
    models: tuple[_Name, ...] = ()
    data: tuple[_Name, ...] = ()
    seeds: tuple[_Seed, ...] = ()
    edit: EditEntry | None = None

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, given: object) -> object:
        return _tupled(given, "models", "data", "seeds")


class Study(_Entry):
    """A whole study."""

    study: _Name
    description: Annotated[str, Field(max_length=5_000)] = ""
    models: Mapping[_Name, ModelEntry] = Field(default={ATLAS: ModelEntry()}, min_length=1)
    data: Mapping[_Name, DataEntry] = Field(min_length=1)
    measurements: Mapping[_Name, MeasurementEntry] = Field(min_length=1)
    seeds: tuple[_Seed, ...] = Field(default=(0,), min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, given: object) -> object:
        return _tupled(given, "seeds")

    def parts(self, data: str) -> tuple[DataEntry, ...]:
        """The sets that a set of data is made of: itself, or those that it joins."""
        entry = self.data[data]
        return tuple(self.data[each] for each in entry.join) or (entry,)


def read_study(path: Path) -> Study:
    """Reads a study. Raises StudyError with every problem of the file."""
    source = read_source(path)
    wrong: list[tuple[Place, str]] = []
    try:
        study: Study | None = Study.model_validate(source.data)
    except ValidationError as error:
        wrong = [(_place(e["loc"]), said(e, _known(e["loc"]))) for e in error.errors()]
        study = _sound(source.data, [place for place, _ in wrong])
    if study is not None:
        wrong += [*_faults(study, source.data), *_missing_files(study, path.parent)]
    if study is None or wrong:
        problems = [source.problem(place, message) for place, message in wrong]
        raise StudyError(sorted(problems, key=lambda each: each.line))
    return study


def settings_of(entry: MeasurementEntry, seed: int) -> object:
    """A kind's settings, the defaults filled in; its seed, where it has one that is not given, is the study's.

    Raises InvalidInputError for a value out of bounds, ValidationError for one of another type.
    """
    kind = cast(type[object], SETTINGS[entry.kind])
    given = dict(entry.settings)
    if seeded(entry):
        given["seed"] = seed
    return TypeAdapter(kind).validate_python(given)


def seeded(entry: MeasurementEntry) -> bool:
    """Whether a measurement takes the study's seed."""
    return "seed" in _settings_fields(entry.kind) and "seed" not in entry.settings


def _settings_fields(kind: str) -> list[str]:
    return [f.name for f in fields(SETTINGS[kind])]  # type: ignore[arg-type]  # every settings type is a dataclass


def _sound(given: object, wrong: Sequence[Place]) -> Study | None:
    """The study without the entries that are wrong, to find what else is; None where nothing can be made of it."""
    if not isinstance(given, dict):
        return None
    left = {key: dict(part) if isinstance(part, dict) else part for key, part in given.items()}
    for first, *rest in filter(None, wrong):
        part = left.get(first)
        if first in _MAPPINGS and rest and isinstance(part, dict):
            part.pop(rest[0], None)
        else:
            left.pop(first, None)
    try:
        return Study.model_validate(left)
    except ValidationError:
        return None


def _faults(study: Study, given: object) -> Iterator[tuple[Place, str]]:
    """What is wrong between entries. `given` is the file's data, whose names may be of entries that are wrong."""
    assert isinstance(given, dict)
    named = {field: _names(given.get(field), getattr(study, field)) for field in ("models", "data")}
    for name, data in study.data.items():
        for i, other in enumerate(data.join):
            if other not in named["data"]:
                yield ("data", name, "join", i), unknown(other, named["data"], "data")
            elif other in study.data and study.data[other].join:
                yield ("data", name, "join", i), f"{other!r} joins others itself; name those"
    for name, entry in study.measurements.items():
        yield from ((("measurements", name, *place), message) for place, message in _entry_faults(entry, named))


def _names(given: object, sound: Mapping[str, object]) -> list[str]:
    return [str(name) for name in (given if isinstance(given, dict) else sound)]


def _entry_faults(entry: MeasurementEntry, named: Mapping[str, Collection[str]]) -> Iterator[tuple[Place, str]]:
    for field, there in named.items():
        for i, name in enumerate(getattr(entry, field)):
            if name not in there:
                yield (field, i), unknown(name, there, field.removesuffix("s"))
    if entry.kind not in SETTINGS:
        yield ("kind",), unknown(entry.kind, SETTINGS, "measurement")
        return
    if entry.edit and entry.kind != READOUT:
        yield ("edit",), f"only a {READOUT} edits first and reads that; {SWEEP} has the edit's settings among its own"
    yield from ((("settings", *place), message) for place, message in _settings_faults(entry))


def _settings_faults(entry: MeasurementEntry) -> Iterator[tuple[Place, str]]:
    known = _settings_fields(entry.kind)
    if extra := [name for name in entry.settings if name not in known]:
        yield from (((name,), unknown(name, known, "setting")) for name in extra)
        return
    try:
        settings_of(entry, 0)
    except InvalidInputError as error:
        yield (error.field.removeprefix("settings."),), error.args[0]
    except ValidationError as error:
        yield from ((e["loc"], said(e, known)) for e in error.errors())


def _missing_files(study: Study, folder: Path) -> Iterator[tuple[Place, str]]:
    named: list[tuple[Place, str]] = []
    for name, model in study.models.items():
        named += [
            (("models", name, field), path) for field in ("adapter", "references") if (path := getattr(model, field))
        ]
    for name, data in study.data.items():
        named += [
            (("data", name, field), path) for field in ("path", "images", "answers") if (path := getattr(data, field))
        ]
    for place, path in named:
        if not (folder / path).exists():
            yield place, f"there is no {path!r} beside the study's file; check the path"


def _tupled(given: object, *names: str) -> object:
    """Lists of these fields as tuples, which strict models take; a text alone as one."""
    if not isinstance(given, dict):
        return given
    return {
        key: tuple(value)
        if key in names and isinstance(value, list)
        else (value,)
        if key in names and isinstance(value, str)
        else value
        for key, value in given.items()
    }


_MAPPINGS: Mapping[str, type[BaseModel]] = {"models": ModelEntry, "data": DataEntry, "measurements": MeasurementEntry}


def _place(loc: Place) -> Place:
    """Without pydantic's own mark of a mapping's key."""
    return [step for step in loc if step != "[key]"]


def _known(loc: Place) -> list[str]:
    """The fields that there are where a part stands."""
    if len(loc) == 1:
        return list(Study.model_fields)
    entry = _MAPPINGS.get(str(loc[0]), Study)
    if len(loc) > 3 and loc[2] == "edit":
        entry = EditEntry
    return list(entry.model_fields)
