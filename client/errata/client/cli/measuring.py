"""Measurements: the studies of the papers, over a question or a file of them."""

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.descriptor import FieldDescriptor

from errata.client.cli.asking import Asked, Images
from errata.client.cli.found import show_measurement
from errata.client.cli.problems import UsageError
from errata.client.cli.session import Session
from errata.client.findings import Measurement
from errata.client.inputs import Prompt
from errata.client.measurements import KINDS, MeasuredQuestion, MeasurementOptions, MeasurementSettings
from errata.client.measuring import fields_of

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SWEEP = "a sweep edits: give the requests by --file, as errata edit --file takes them"
_WHOLE = {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64}


def measure(
    session: Session,
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"{', '.join(KINDS)}.")],
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="One question; or give --file.")] = None,
    constraint: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Its constraint; repeat it.")] = None,
    substitute: Annotated[list[str] | None, typer.Option(metavar="WORD", help="Corrupts it; repeat it.")] = None,
    image: Images = None,
    answer: Annotated[str | None, typer.Option(metavar="TEXT", help="The right answer.")] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="examples/measured.yaml; a sweep: facts.yaml.")
    ] = None,
    version: Asked = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, like draws=5; repeat it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write figures, page and numbers there.")] = None,
) -> None:
    """Measure a version over a set of questions: numbers, tables, plots."""
    settings = settings_of(kind, set_ or ())
    if out is not None:
        _check_folder(out)
    if file is not None and any((prompt, constraint, substitute, image, answer)):
        raise UsageError("--file has the questions; leave the other ones out")
    options: MeasurementOptions = {}
    questions: Sequence[MeasuredQuestion] = ()
    if kind == "sweep":
        if prompt is not None:
            raise UsageError(_SWEEP)
        options = _requests(file)
    elif file is not None:
        from errata.client.cli import files  # pydantic takes a moment to import

        questions = files.measured(file)
    else:
        questions = [_question(prompt, constraint or (), substitute or (), image or (), answer)]
    operation = session.client.measure(session.version(version), settings, questions, **options)
    done = session.followed(operation, "measuring")
    if out is not None:
        _write(session, done, out)
    show_measurement(session.output, done)


def settings_of(kind: str, given: Sequence[str]) -> MeasurementSettings:
    """The settings of a kind as `--set` gives them: draws=5, components=mlp,layer. Raises UsageError."""
    if kind not in KINDS:
        raise UsageError.at("kind", f"nothing is measured by {kind!r}; {_meant(kind, KINDS)}")
    wire = fields_of(kind)
    values: dict[str, Any] = {}
    for each in given:
        key, equals, text = each.partition("=")
        field = f"{kind}.{key}"
        if key not in wire:
            raise UsageError.at(field, f"{field}: there is no such setting; {_meant(key, wire)}")
        if not equals:
            raise UsageError.at(field, f"{field}: it has no value; give --set {key}=VALUE")
        values[key] = _value(wire[key], text, field)
    return KINDS[kind](**values)


def _meant(name: str, known: Collection[str]) -> str:
    """What may be meant, and what there is."""
    near = get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"give one of {', '.join(known)}"


def _question(
    prompt: str | None,
    constraints: Sequence[str],
    substitutes: Sequence[str],
    images: Sequence[Path],
    answer: str | None,
) -> MeasuredQuestion:
    if prompt is None or not constraints:
        raise UsageError("give a PROMPT and its --constraint, or questions by --file")
    return MeasuredQuestion(Prompt(prompt, list(images)), constraints, corruptions=substitutes, answer=answer)


def _requests(file: Path | None) -> MeasurementOptions:
    """What a layer sweep edits, as errata edit takes it; layers and method are for --set."""
    if file is None:
        raise UsageError(_SWEEP)
    from errata.client.cli import files

    read = files.edit_file(file)
    return {
        "requests": read.requests,
        "probes": read.options.get("probes", ()),
        "references": read.options.get("references", ()),
    }


def _value(wire: FieldDescriptor, text: str, field: str) -> object:
    if wire.is_repeated:
        return [_single(wire, each.strip(), field) for each in text.split(",")]
    return _single(wire, text, field)


def _single(wire: FieldDescriptor, text: str, field: str) -> object:
    try:
        if wire.cpp_type in _WHOLE:
            return int(text)
        if wire.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
            return float(text)
        if wire.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        kind = {FieldDescriptor.CPPTYPE_BOOL: "true or false", FieldDescriptor.CPPTYPE_DOUBLE: "a number"}
        raise UsageError.at(field, f"{field}: {text!r} is not {kind.get(wire.cpp_type, 'a whole number')}") from None
    return text


def _check_folder(out: Path) -> None:
    """What would otherwise come out only after the measurement. Raises UsageError."""
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {str(out.parent)!r} for {out.name!r}; make it first")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{str(out)!r} is not an empty folder; give another")


def _write(session: Session, done: Measurement, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name in done.files:
        if not _FILE.fullmatch(name):
            raise UsageError(f"the server names a file {name[:100]!a}, which no measurement has")
        (out / name).write_bytes(session.client.measurement_file(done, name))
    session.output.note(f"{len(done.files)} files written to {out}")
