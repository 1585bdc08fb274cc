"""Measurements: the studies of the papers, over a question or a file of them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.descriptor import FieldDescriptor
from rich.console import RenderableType

from errata.client.cli import plots
from errata.client.cli.asking import Asked, Images
from errata.client.cli.output import Output, facts, line
from errata.client.cli.plain import short
from errata.client.cli.problems import UsageError
from errata.client.cli.session import Session
from errata.client.findings import Findings, FindingsTable, MeasuredNumber, Measurement
from errata.client.inputs import Prompt
from errata.client.measurements import KINDS, MeasuredQuestion, MeasurementOptions, MeasurementSettings
from errata.client.measuring import fields_of

_MOST_ROWS, _MOST_PLOTS, _MOST_SKIPPED = 20, 4, 5
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
    """The settings of a kind as `--set` gives them: draws=5, components=mlp,layer. Raises InvalidInputError."""
    wire = fields_of(kind)
    values: dict[str, Any] = {}
    for each in given:
        key, equals, text = each.partition("=")
        if not equals or key not in wire:
            raise UsageError(f"--set {each}: give KEY=VALUE; {kind} has {', '.join(wire)}")
        values[key] = _value(wire[key], text, each)
    return KINDS[kind](**values)


def show_measurement(output: Output, done: Measurement) -> None:
    """Says what a measurement found."""
    found = done.findings
    assert found is not None
    output.show(done, *_parts(output, done, found))


def _parts(output: Output, done: Measurement, found: Findings) -> Iterator[RenderableType]:
    yield line(found.title, "bold")
    told = [("questions", f"{found.n} of {done.questions}" if done.questions else str(found.n))]
    yield facts([*told, ("version", short(done.version)), ("measurement", done.name)])
    if found.numbers:
        yield line("")
        yield output.table(("number", "value", "95 %", "n"), map(_number, found.numbers))
    for table in found.tables:
        yield line("")
        yield from _table(output, table)
    shown = [drawn for plot in found.plots if (drawn := plots.drawn(plot, output.console.width))]
    for drawn in shown[:_MOST_PLOTS]:
        yield line("")
        yield from drawn
    if left := len(found.plots) - len(shown[:_MOST_PLOTS]):
        yield line("")
        yield line(f"{left} more plots are not drawn here; --out FOLDER writes all", "dim")
    if found.skipped:
        yield line("")
        yield from (line(f"left out: {each}", "dim") for each in found.skipped[:_MOST_SKIPPED])
    if len(found.skipped) > _MOST_SKIPPED:
        yield line(f"… and {len(found.skipped) - _MOST_SKIPPED} more", "dim")


def _number(number: MeasuredNumber) -> tuple[str, str, str, str]:
    bounded = number.low is not None and number.high is not None
    interval = f"{number.low:.3g} to {number.high:.3g}" if bounded else ""
    return number.name, f"{number.value:.3g} {number.unit}".strip(), interval, str(number.n)


def _table(output: Output, table: FindingsTable) -> Iterator[RenderableType]:
    yield line(table.title, "italic")
    yield output.table(table.columns, table.rows[:_MOST_ROWS])
    if len(table.rows) > _MOST_ROWS:
        yield line(f"… and {len(table.rows) - _MOST_ROWS} more rows", "dim")


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


def _value(wire: FieldDescriptor, text: str, given: str) -> object:
    if wire.is_repeated:
        return [_single(wire, each.strip(), given) for each in text.split(",")]
    return _single(wire, text, given)


def _single(wire: FieldDescriptor, text: str, given: str) -> object:
    try:
        if wire.cpp_type in _WHOLE:
            return int(text)
        if wire.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
            return float(text)
        if wire.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        kind = {FieldDescriptor.CPPTYPE_BOOL: "true or false", FieldDescriptor.CPPTYPE_DOUBLE: "a number"}
        raise UsageError(f"--set {given}: give {kind.get(wire.cpp_type, 'a whole number')}") from None
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
