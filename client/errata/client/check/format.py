"""The format of a file of checks: what may stand in it, its JSON schema, and reading it with errors that name lines."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from errata.client.check.checks import Checks, Match, Probe, Question
from errata.client.check.errors import CheckError, Problem
from errata.client.source import Source, SourceError, as_list, read_source, said

Name = Annotated[str, Field(pattern=r"^\S+$", max_length=200)]
Text = Annotated[str, Field(pattern=r"\S")]
Share = Annotated[float, Field(ge=0, le=1)]


_TEXT = {"type": "string", "pattern": r"\S"}
Texts = Annotated[
    tuple[Text, ...],
    BeforeValidator(as_list),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}),
]
"""A text, or a list of several."""


_TEXTS = ("image", "expected", "must_not")


class ProbeEntry(BaseModel):
    """One question and what its answer has to be. Give at least one of expected, must_not and unchanged."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"anyOf": [{"required": [each]} for each in ("expected", "must_not", "unchanged")]},
    )

    id: Name = Field(description="Its name, without spaces; no other probe of the file has it.")
    prompt: Text = Field(description="The question.")
    image: Texts = Field(default=(), description="A picture's path, or several; relative to this file.")
    raw: StrictBool = Field(default=False, description="Ask without the model's chat template.")
    max_new_tokens: int | None = Field(default=None, ge=1, le=4096, description="Most tokens of this answer.")
    expected: Texts = Field(
        default=(), description="The right answer, or several of which one is given; in any case, a full stop aside."
    )
    match: Match | None = Field(default=None, description="exact: the answer is that. contains: it has it in it.")
    must_not: Texts = Field(default=(), description="What the answer must not say, as whole words.")
    unchanged: StrictBool = Field(default=False, description="The answer is the baseline's.")
    tags: tuple[Name, ...] = Field(default=(), description="Groups it belongs to; `thresholds` are by tag.")
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="What it counts in its tags' shares.")

    @model_validator(mode="after")
    def _expects_something(self) -> Self:
        if not (self.expected or self.must_not or self.unchanged):
            raise PydanticCustomError("no_expectation", "it expects nothing; give expected, must_not or unchanged")
        return self


class ChecksEntry(BaseModel):
    """What a version of a model must say: a file for `errata check` and `pytest --errata-server`."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="Errata checks")

    version: Literal[1] = Field(description="Of this format.")
    probes: tuple[ProbeEntry, ...] = Field(min_length=1)
    thresholds: dict[Name, Share] = Field(
        default={},
        description="Least weighted share of a tag's probes that pass, 0-1. Probes of no such tag must all pass.",
    )
    baseline: Text | None = Field(
        default=None, description="A file that `errata check --update` wrote; relative to this file."
    )
    max_new_tokens: int = Field(default=32, ge=1, le=4096, description="Most tokens of an answer.")
    match: Match = Field(
        default=Match.EXACT, description="How answers are held against expected, where a probe is silent."
    )


def schema_text() -> str:
    """The JSON schema of a file of checks, which the package holds as `checks.schema.json` for editors, too."""
    schema = {"$schema": GenerateJsonSchema.schema_dialect, **ChecksEntry.model_json_schema()}
    return json.dumps(schema, ensure_ascii=False, indent=2) + "\n"


def load_checks(path: Path) -> Checks:
    """Reads a file of checks. Raises CheckError with every problem of it: file, line, field, and what to do."""
    try:
        source = read_source(path)
    except SourceError as error:
        raise CheckError(error.problems) from None
    try:
        entry = ChecksEntry.model_validate(source.data)
    except ValidationError as error:
        raise _error(_problem(source, e) for e in _own(error.errors(include_input=False))) from None
    if problems := [*_doubled_ids(source, entry), *_missing_images(source, entry), *_unknown_tags(source, entry)]:
        raise _error(problems)
    return Checks(
        path=path,
        probes=tuple(_probe(source, entry, i) for i in range(len(entry.probes))),
        thresholds=entry.thresholds,
        baseline=path.parent / entry.baseline if entry.baseline else None,
    )


def _probe(source: Source, entry: ChecksEntry, index: int) -> Probe:
    given = entry.probes[index]
    return Probe(
        id=given.id,
        question=Question(
            prompt=given.prompt,
            images=tuple(source.path.parent / image for image in given.image),
            raw=given.raw,
            max_new_tokens=given.max_new_tokens or entry.max_new_tokens,
        ),
        expected=given.expected,
        match=given.match or entry.match,
        must_not=given.must_not,
        unchanged=given.unchanged,
        tags=tuple(dict.fromkeys(given.tags)),
        weight=given.weight,
        line=source.line(("probes", index)),
    )


def _error(problems: Iterable[Problem]) -> CheckError:
    """The error of these, in the order of the file."""
    return CheckError(sorted(problems, key=lambda each: each.line or 0))


def _own(errors: Sequence[ErrorDetails]) -> Iterator[ErrorDetails]:
    """The errors without lists that are only short of their faulty items."""
    places = [error["loc"] for error in errors]

    def holds_another(place: tuple[str | int, ...]) -> bool:
        return any(len(other) > len(place) and other[: len(place)] == place for other in places)

    return (error for error in errors if error["type"] != "too_short" or not holds_another(error["loc"]))


def _problem(source: Source, error: ErrorDetails) -> Problem:
    place = error["loc"]
    known = ProbeEntry.model_fields if "probes" in place else ChecksEntry.model_fields
    # What may be one text or a list is a tuple to pydantic: a number there is no missing list but a text unquoted.
    kind = "string_type" if error["type"] == "tuple_type" and place[-1] in _TEXTS else error["type"]
    return source.problem(place, said({**error, "type": kind}, known))


def _doubled_ids(source: Source, entry: ChecksEntry) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for i, probe in enumerate(entry.probes):
        if (other := first.setdefault(probe.id, i)) != i:
            line = source.line(("probes", other, "id"))
            message = f"the probe on line {line} has the id {probe.id!r} already; give this one another"
            yield source.problem(("probes", i, "id"), message)


def _missing_images(source: Source, entry: ChecksEntry) -> Iterator[Problem]:
    for i, probe in enumerate(entry.probes):
        for image in probe.image:
            if not (source.path.parent / image).is_file():
                message = f"there is no image {image!r} beside the file; check the path"
                yield source.problem(("probes", i, "image"), message)


def _unknown_tags(source: Source, entry: ChecksEntry) -> Iterator[Problem]:
    tags = Counter(tag for probe in entry.probes for tag in probe.tags)
    for tag in entry.thresholds:
        if tag not in tags:
            known = f"known are {', '.join(tags)}" if tags else "tag the probes that it is for"
            yield source.problem(("thresholds", tag), f"no probe has the tag {tag!r}; {known}")
