"""Causal traces: which layers and tokens carry a fact."""

from pathlib import Path
from typing import Annotated

import typer

from errata.client.cli import heatmap
from errata.client.cli.asking import Asked, Images, Raw
from errata.client.cli.output import facts, line
from errata.client.cli.plain import short
from errata.client.cli.problems import UsageError
from errata.client.cli.session import Session
from errata.client.inputs import Prompt, TracedQuestion, TraceOptions
from errata.client.results import CausalTrace


def trace(
    session: Session,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The question; or give --file.")] = None,
    constraint: Annotated[str | None, typer.Option(metavar="TEXT", help="The words that name the subject.")] = None,
    substitute: Annotated[str | None, typer.Option(metavar="WORD", help="Corrupts the constraint; or else")] = None,
    other_image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="another picture corrupts.")] = None,
    image: Images = None,
    answer: Annotated[str | None, typer.Option(metavar="TEXT", help="Followed; default: the version's own.")] = None,
    raw: Raw = False,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="Many, averaged: examples/questions.yaml.")] = None,
    version: Asked = None,
    component: Annotated[list[str] | None, typer.Option(metavar="NAME", help="mlp, attention, layer.")] = None,
    window: Annotated[int | None, typer.Option(metavar="N", help="Layers restored together; default 1.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture as a page.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as a PNG (needs Pillow).")] = None,
) -> None:
    """Trace which layers and tokens carry a fact, and draw it."""
    _check_pictures(html, png)
    options: TraceOptions = {}
    if component:
        options["components"] = component
    if window is not None:
        options["window"] = window
    if file is not None:
        _alone(prompt, constraint, substitute, other_image, image, answer, raw)
        from errata.client.cli import files  # pydantic takes a moment to import

        questions = files.questions(file)
    else:
        if prompt is None or constraint is None:
            raise UsageError("give a PROMPT and its --constraint, or questions by --file")
        if (substitute is None) == (not other_image):
            raise UsageError("give what corrupts the constraint: --substitute WORD or --other-image FILE, one of them")
        asked = Prompt(prompt, image or (), raw=raw)
        others = other_image or ()
        questions = [TracedQuestion(asked, constraint, substitute=substitute, other_images=others, answer=answer)]
    operation = session.client.trace(session.version(version), questions, **options)
    show_trace(session, session.followed(operation, "tracing"), html, png)


def show_trace(session: Session, found: CausalTrace, html: Path | None = None, png: Path | None = None) -> None:
    """Draws a trace, into files as well where they are named."""
    result = found.result
    assert result is not None
    shown = heatmap.picture(found)
    if html is not None:
        html.write_text(heatmap.page(shown), encoding="utf-8")
    if png is not None:
        heatmap.save_png(shown, png)
    for path in filter(None, (html, png)):
        session.output.note(f"written to {path}")
    console = session.output.console
    layers = ", ".join(map(str, result.auto_layers)) or f"none: {result.auto_refusal}"
    session.output.show(
        found,
        heatmap.drawn(shown, console.width, colour=console.is_terminal and not console.no_color),
        line(""),
        facts([("layers to edit", layers), ("version", short(found.version)), ("trace", found.name)]),
    )


def _check_pictures(html: Path | None, png: Path | None) -> None:
    """What would otherwise come out only after the trace. Raises UsageError, MissingExtraError."""
    for file in filter(None, (html, png)):
        if not file.parent.is_dir():
            raise UsageError(f"there is no folder {str(file.parent)!r} for {file.name!r}; make it first")
    if png is not None:
        heatmap.require_pillow()


def _alone(*given: object) -> None:
    if any(given):
        raise UsageError("--file has the questions; leave the other ones out")
