"""What a file says: edit requests, probes, questions to trace; in YAML, or in JSONL, one entry a line.

An error names the file, the line and the field. Images are named relative to the file. Nothing here asks the server,
and nothing is sent of a file of which any part is wrong.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from errata.client.check.checks import Checks, Match
from errata.client.check.errors import CheckError
from errata.client.check.format import load_checks
from errata.client.cli.records import entry_of
from errata.client.details import FieldViolation
from errata.client.errors import InvalidInputError
from errata.client.inputs import Constraint, Context, EditOptions, EditRequest, Probe, Prompt, TracedQuestion
from errata.client.measurements import Box, Corruption, MeasuredQuestion, OtherImages
from errata.client.source import Place, SourceError, as_list, dotted, read_source, said

E = TypeVar("E", bound="_Entry")


class FileError(InvalidInputError):
    """A file cannot be read, or says something that cannot be meant. `field` is the part at fault."""

    default_reason = "INVALID_FILE"

    def __str__(self) -> str:
        return self.message  # It begins with the file and the line.


@dataclass(frozen=True, slots=True, kw_only=True)
class EditFile:
    """What an edit's file says: the requests, and the options beside them."""

    requests: Sequence[EditRequest]
    options: EditOptions


_Text = Annotated[str, Field(pattern=r"\S")]
_Images = Annotated[list[_Text], BeforeValidator(as_list)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Asked(_Entry):
    """A question, and the pictures it is about."""

    prompt: _Text
    image: _Images = []
    raw: bool = False

    def asked(self, folder: Path) -> Prompt:
        return Prompt(self.prompt, [folder / each for each in self.image], raw=self.raw)


class _ContextEntry(_Asked):
    """One way of asking for a fact."""

    constraint: _Text
    occurrence: int | None = None
    answer: _Text | None = None
    subject: _Text | None = None

    def context(self, folder: Path) -> Context:
        constraint = Constraint(self.constraint, self.occurrence)
        return Context(self.asked(folder), constraint, answer=self.answer, subject=self.subject or "")


class _RequestEntry(_Entry):
    """One fact: its question stands beside the target, or several do in `contexts`."""

    name: _Text | None = None
    target: _Text
    prompt: _Text | None = None
    image: _Images = []
    raw: bool = False
    constraint: _Text | None = None
    occurrence: int | None = None
    subject: _Text | None = None
    contexts: list[_ContextEntry] = []
    preserve: list[_ContextEntry] = []

    @field_validator("contexts")
    @classmethod
    def _some(cls, contexts: list[_ContextEntry]) -> list[_ContextEntry]:
        if not contexts:
            raise PydanticCustomError("too_short", "empty")
        return contexts

    def request(self, folder: Path) -> EditRequest:
        contexts = [each.context(folder) for each in self.contexts] or [self._own(folder)]
        return EditRequest(
            name=self.name or self.prompt or self.contexts[0].prompt,
            contexts=contexts,
            target=self.target,
            preserve=[each.context(folder) for each in self.preserve],
        )

    def _own(self, folder: Path) -> Context:
        assert self.prompt is not None
        assert self.constraint is not None
        prompt = Prompt(self.prompt, [folder / each for each in self.image], raw=self.raw)
        return Context(prompt, Constraint(self.constraint, self.occurrence), subject=self.subject or "")


class _ProbeEntry(_Asked):
    """One question that judges."""

    metric: _Text = "efficacy"
    expected: _Text | None = None
    request: _Text | None = None
    believed: _Text | None = None

    def probe(self, folder: Path) -> Probe:
        request = self.request or ""
        return Probe(self.metric, self.asked(folder), self.expected, request=request, believed=self.believed)


class _ConstraintEntry(_Entry):
    """One of several constraints; its text alone does."""

    text: _Text
    occurrence: int | None = None
    kind: Literal["visual", "textual"] | None = None


class _CorruptionEntry(_Entry):
    """How one of them is made wrong; a substitute alone does."""

    substitute: _Text | None = None
    other_image: _Images = []

    def corruption(self, folder: Path) -> Corruption:
        return self.substitute or OtherImages([folder / each for each in self.other_image])


def _alone_as(field: str) -> BeforeValidator:
    return BeforeValidator(lambda given: {field: given} if isinstance(given, str) else given)


class _TracedEntry(_Asked):
    """One question to trace or to measure."""

    constraint: _Text | None = None
    occurrence: int | None = None
    substitute: _Text | None = None
    other_image: _Images = []
    answer: _Text | None = None
    constraints: list[Annotated[_ConstraintEntry, _alone_as("text")]] = []
    corruptions: list[Annotated[_CorruptionEntry, _alone_as("substitute")]] = []
    box: Annotated[list[float], Field(min_length=4, max_length=4)] | None = None

    def measured(self, folder: Path) -> MeasuredQuestion:
        only = [_ConstraintEntry(text=self.constraint, occurrence=self.occurrence)] if self.constraint else []
        wrong = [_CorruptionEntry(substitute=self.substitute, other_image=self.other_image)]
        return MeasuredQuestion(
            self.asked(folder),
            [Constraint(each.text, each.occurrence) for each in only or self.constraints],
            corruptions=[
                each.corruption(folder) for each in (wrong if self.substitute or self.other_image else self.corruptions)
            ],
            answer=self.answer,
            box=Box(*self.box) if self.box else None,
            kinds=tuple(each.kind for each in self.constraints if each.kind),
        )

    def question(self, folder: Path) -> TracedQuestion:
        assert self.constraint is not None
        return TracedQuestion(
            self.asked(folder),
            Constraint(self.constraint, self.occurrence),
            substitute=self.substitute,
            other_images=[folder / each for each in self.other_image],
            answer=self.answer,
        )


class _ProbesEntry(_Entry):
    probes: Annotated[list[_ProbeEntry], Field(min_length=1)]


class _TracedFile(_Entry):
    questions: Annotated[list[_TracedEntry], Field(min_length=1)]


class _MeasuredFile(_TracedFile):
    """The same for a measurement."""


class _EditEntry(_Entry):
    requests: Annotated[list[_RequestEntry], Field(min_length=1)]
    probes: list[_ProbeEntry] | None = None
    references: list[_ContextEntry] | None = None
    layers: object = None
    method: _Text | None = None
    preservation: float | None = None
    ridge: float | None = None
    steps: int | None = None
    guardrails: dict[str, float] | None = None
    description: _Text | None = None

    @field_validator("layers")
    @classmethod
    def _numbers_or_name(cls, layers: object) -> object:
        whole = isinstance(layers, list) and all(type(each) is int for each in layers)
        if not whole and not isinstance(layers, str):
            raise PydanticCustomError("layers", "give layers like [1, 2], a trace's name, or auto")
        return layers

    def options(self, folder: Path) -> EditOptions:
        named = {name: getattr(self, name) for name in _OPTIONS}
        options = cast(EditOptions, {name: value for name, value in named.items() if value is not None})
        if self.probes is not None:
            options["probes"] = [each.probe(folder) for each in self.probes]
        if self.references is not None:
            options["references"] = [each.context(folder) for each in self.references]
        return options


_OF_DATA_SET = "questions.jsonl"
"""What a data set's folder has its questions in."""
_OF_MEASUREMENTS = {"constraints", "corruptions", "box"}
_OF_A_QUESTION = {"image", "raw", "constraint", "occurrence", "subject"}
_OPTIONS = ("layers", "method", "preservation", "ridge", "steps", "guardrails", "description")

_EXAMPLES: dict[type[_Entry], str] = {
    _EditEntry: "examples/facts.yaml",
    _ProbesEntry: "examples/probes.yaml",
    _TracedFile: "examples/questions.yaml",
    _MeasuredFile: "examples/measured.yaml",
}
"""A file to begin from."""

_PARTS: dict[str, type[_Entry]] = {
    "requests": _RequestEntry,
    "probes": _ProbeEntry,
    "questions": _TracedEntry,
    "contexts": _ContextEntry,
    "preserve": _ContextEntry,
    "references": _ContextEntry,
}
"""What stands in which list."""


def edit_file(path: Path) -> EditFile:
    """The requests of a YAML or JSONL file. Raises FileError.

    A list of requests, or a mapping with `requests` and any of `probes`, `references`, `layers`, `method`,
    `preservation`, `ridge`, `steps`, `guardrails`, `description`. A request has `target`, any of `name` and
    `preserve`, and one question (`prompt`, `constraint`, any of `image`, `subject`, `occurrence`, `raw`) or a list of
    them in `contexts`.
    """
    source = _source(path)
    entry = _checked(source, "requests", _EditEntry)
    for i, request in enumerate(entry.requests):
        _one_question(source, i, request)
    requests = [each.request(path.parent) for each in entry.requests]
    return EditFile(requests=requests, options=entry.options(path.parent))


def probes(path: Path) -> list[Probe]:
    """The probes of a YAML or JSONL file: a list, or a mapping with `probes`; or a file of `errata check`.

    A probe has `prompt`, and any of `expected`, `image`, `metric` (efficacy unless given), `request`, `believed`,
    `raw`. Raises FileError.
    """
    source = _source(path)
    if isinstance(source.data, dict) and "version" in source.data:
        return _of_checks(path)
    return [each.probe(path.parent) for each in _checked(source, "probes", _ProbesEntry).probes]


def questions(path: Path) -> list[TracedQuestion]:
    """The questions to trace of a YAML or JSONL file: a list, or a mapping with `questions`. Raises FileError.

    A question has `prompt`, `constraint`, one of `substitute` and `other_image`, and any of `image`, `answer`,
    `occurrence`, `raw`.
    """
    source = _source(path)
    entries = _checked(source, "questions", _TracedFile).questions
    for i, each in enumerate(entries):
        if beside := sorted(each.model_fields_set & _OF_MEASUREMENTS):
            raise _error(source, _listed(source, i), f"{', '.join(beside)} are for errata measure; give a constraint")
        if each.constraint is None:
            raise _error(source, (*_listed(source, i), "constraint"), "it is missing; give it")
        if (each.substitute is None) == (not each.other_image):
            problem = "nothing corrupts it, or two things do; give a substitute or an other_image"
            raise _error(source, _listed(source, i), problem)
    return [each.question(path.parent) for each in entries]


def measured(path: Path) -> list[MeasuredQuestion]:
    """The questions to measure of a YAML or JSONL file: a list, or a mapping with `questions`. Raises FileError.

    A question has `prompt`; `constraint`, or several in `constraints`, each a text or a mapping of `text`,
    `occurrence` and `kind`; and any of `image`, `answer`, `box`, `raw`. What makes it wrong is a `substitute` or an
    `other_image`, or several in `corruptions`, each a text or a mapping with one of them. Data sets (docs/datasets.md),
    also by their folders, and files of known facts are read, too.
    """
    if (inside := path / _OF_DATA_SET).is_file():
        path = inside
    source = _Entries.of(_source(path))
    entries = _checked(source, "questions", _MeasuredFile).questions
    for i, each in enumerate(entries):
        if problem := _unclear(each):
            raise _error(source, _listed(source, i), problem)
    return [each.measured(path.parent) for each in entries]


def _unclear(entry: _TracedEntry) -> str:
    """What cannot be meant in a question to measure; empty where all can."""
    if (entry.constraint is None) == (not entry.constraints):
        return "it needs a constraint, or several in constraints; give one of them"
    beside = [name for name in ("occurrence", "substitute", "other_image") if name in entry.model_fields_set]
    if beside and (entry.constraints or entry.corruptions) and (entry.constraints or beside != ["occurrence"]):
        return f"{', '.join(beside)} would belong to no constraint; move it into constraints or corruptions"
    several: list[_TracedEntry | _CorruptionEntry] = [entry, *entry.corruptions]
    if any(each.substitute and each.other_image for each in several):
        return "two things corrupt it; give a substitute or an other_image"
    if any(not each.substitute and not each.other_image for each in entry.corruptions):
        return "nothing corrupts it; give each of its corruptions a substitute or an other_image"
    return ""


def _listed(source: "_Source", index: int) -> Place:
    """Where a question stands in its file."""
    return (index,) if isinstance(source.data, list) else ("questions", index)


class _Source(Protocol):
    """A file's data, and the lines of its parts."""

    @property
    def path(self) -> Path: ...
    @property
    def data(self) -> object: ...
    def line(self, place: Place) -> int: ...


@dataclass(frozen=True, slots=True)
class _Lines:
    """A JSONL file."""

    path: Path
    data: object
    numbers: Sequence[int]

    def line(self, place: Place) -> int:
        return self.numbers[int(place[0])] if place else 1


@dataclass(frozen=True, slots=True)
class _Entries:
    """A file whose lines may be of other forms (`records`)."""

    source: _Source
    data: object

    @classmethod
    def of(cls, source: _Source) -> "_Entries":
        data = source.data
        return cls(source, list(map(entry_of, data)) if isinstance(data, list) else data)

    @property
    def path(self) -> Path:
        return self.source.path

    def line(self, place: Place) -> int:
        return self.source.line(place)


def _source(path: Path) -> _Source:
    try:
        return _lines(path) if path.suffix == ".jsonl" else read_source(path)
    except SourceError as error:
        raise FileError(str(error)) from error


def _lines(path: Path) -> _Lines:
    data, numbers = [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: the file cannot be read: {error}; give JSON lines in UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                data.append(json.loads(line, object_pairs_hook=_once))
            except (ValueError, RecursionError) as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise FileError(f"{path}:{number}: this is no JSON: {why}; write one object a line") from error
            numbers.append(number)
    if not data:
        raise FileError(f"{path}: the file is empty; give at least one line")
    return _Lines(path, data, numbers)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _checked(source: _Source, listed: str, entry: type[E]) -> E:
    """The file as `entry` has it; a list alone is its part `listed`. Raises FileError."""
    bare = isinstance(source.data, list)
    try:
        found = TypeAdapter(entry).validate_python({listed: source.data} if bare else source.data)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        # As JSON and YAML have them; a list alone has no name.
        place = first["loc"][1:] if bare else first["loc"]
        whole = first["type"] == "missing" and place == (listed,)
        problem = _misnamed(source, _EXAMPLES[entry]) if whole else said(first, _known(first["loc"], entry))
        raise _error(source, place, problem) from None
    for name in _PARTS:
        _images_exist(source, () if bare else (name,), getattr(found, name, None) or ())
    return found


def _misnamed(source: _Source, example: str) -> str:
    """What to say of a file without its list of entries."""
    known = {*_PARTS, *_EditEntry.model_fields}
    others = [repr(key) for key in source.data if key not in known] if isinstance(source.data, dict) else []
    instead = f" (there is {', '.join(others)})" if others else ""
    return f"it is missing{instead}; {example} shows how it is written"


def _error(source: _Source, place: Place, problem: str) -> FileError:
    where = dotted(place)
    at = f"{where}: " if where else ""
    violations = (FieldViolation(field=where, description=problem),) if where else ()
    return FileError(f"{source.path}:{source.line(place)}: {at}{problem}", violations=violations)


def _images_exist(source: _Source, place: tuple[str | int, ...], entries: Sequence[_Entry]) -> None:
    """Raises FileError for the first image that is not there."""
    for i, entry in enumerate(entries):
        at = (*place, i)
        for name in ("image", "other_image"):
            for image in getattr(entry, name, ()):
                if not (path := source.path.parent / image).is_file():
                    problem = f"there is no image {image!r} beside the file ({path}); check the path"
                    raise _error(source, (*at, name), problem)
        for name in ("contexts", "preserve", "corruptions"):
            _images_exist(source, (*at, name), getattr(entry, name, ()))


def _one_question(source: _Source, index: int, request: _RequestEntry) -> None:
    """Raises FileError where a request has no question, or two kinds of them."""
    place: Place = (index,) if isinstance(source.data, list) else ("requests", index)
    if bool(request.contexts) == (request.prompt is not None):
        raise _error(source, place, "it needs either a prompt and its constraint, or contexts; give one of them")
    if request.prompt is not None and request.constraint is None:
        raise _error(source, place, "constraint is missing; give the words of the prompt that name the subject")
    if request.contexts and (beside := request.model_fields_set & _OF_A_QUESTION):
        problem = f"{', '.join(sorted(beside))} would belong to no question; move it into the contexts"
        raise _error(source, place, problem)


def _known(place: Place, entry: type[_Entry]) -> Sequence[str]:
    """The fields that there are where `place` is."""
    named = [step for step in place[:-1] if isinstance(step, str) and step in _PARTS]
    return list((_PARTS[named[-1]] if named else entry).model_fields)


def _of_checks(path: Path) -> list[Probe]:
    """The probes of a file of `errata check`, as far as the server can judge them. Raises FileError."""
    try:
        checks = load_checks(path)
    except CheckError as error:
        raise FileError(str(error)) from error
    return [_of_check(checks, i) for i in range(len(checks.probes))]


def _of_check(checks: Checks, index: int) -> Probe:
    given = checks.probes[index]
    if given.must_not or len(given.expected) > 1 or given.match is not Match.EXACT:
        problem = "only errata check can judge must_not, contains, or several right answers; use another probe here"
        raise FileError(f"{checks.path}:{given.line}: {given.id}: {problem}")
    prompt = Prompt(given.question.prompt, given.question.images, raw=given.question.raw)
    expected = given.expected[0] if given.expected else None
    return Probe("efficacy" if expected is not None else "unrelated", prompt, expected)
