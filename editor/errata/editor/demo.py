"""`make demo`: errata for an old atlas, from wrong answers to a report, in a few minutes on two cores."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from errata.editor.atlas.facts import (
    Fact,
    edit_requests,
    errata,
    long_tail,
    probes,
    references,
    trace_requests,
)
from errata.editor.checkpoints import ATLAS, atlas_folder, load_model
from errata.editor.delta import applied, load_delta
from errata.editor.evaluation import Metric, evaluate
from errata.editor.localization import choose_layers
from errata.editor.methods import EditResult, EditSettings, edit
from errata.editor.model import EditableModel
from errata.editor.report.html import Report, write_report
from errata.editor.report.tables import aie_tables, answers_table, outcomes_table, scores_table
from errata.editor.report.terminal import thumbnail
from errata.editor.statistics import key_statistics
from errata.editor.trace import AveragedTrace, TraceSettings, average, trace
from errata.editor.trace import Progress as Step

TRACED = 24
"""Questions averaged in the demo's trace."""


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Step]:
    """A progress bar as the callback that the editor's functions take."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _beliefs(model: EditableModel, facts: tuple[Fact, ...], console: Console) -> None:
    """What the atlas says before anything is done to it, beside the flags it is shown."""
    contexts = [r.contexts[0] for r in edit_requests(facts, contexts=1)]
    answers = model.generate([c.prompt for c in contexts])
    table = Table(
        "it is shown", "and asked", "it answers", "true today", title="Before", title_justify="left", box=SIMPLE
    )
    for country, context, answer in zip(dict.fromkeys(f.country for f in facts), contexts, answers, strict=True):
        shown = thumbnail(context.prompt.images[0]) if console.is_terminal else country.name
        table.add_row(shown, context.prompt.text, answer.text, context.answer)
    console.print(table)


def _trace(model: EditableModel, console: Console) -> AveragedTrace:
    requests = trace_requests(TRACED)
    with _bar(console, "tracing") as step:
        found = []
        for n, request in enumerate(requests):
            found.append(trace(model, request, TraceSettings()))
            step(n + 1, len(requests))
    return average(found)


def _edit(
    model: EditableModel, facts: tuple[Fact, ...], layers: tuple[int, ...], cache: Path, console: Console
) -> EditResult:
    with _bar(console, "key statistics") as step:
        statistics = key_statistics(model, references(), layers, cache=cache, progress=step)
    with _bar(console, "optimising values") as step:
        return edit(model, edit_requests(facts), EditSettings(layers=layers), statistics, progress=step)


def run(out: Path, console: Console) -> Path:
    """The whole demo; returns the report's path."""
    began = time.monotonic()
    model = load_model(ATLAS)
    facts = (*errata(), *long_tail())
    console.print(
        f"[bold]Atlas[/] {model.base_sha256[:12]}…: {len(errata())} facts are outdated, "
        f"{len(long_tail())} facts belong to flags it never saw"
    )

    _beliefs(model, facts, console)
    averaged = _trace(model, console)
    console.print(aie_tables(averaged))
    choice = choose_layers(averaged)
    console.print(f"facts live in the MLP of layer(s) {', '.join(map(str, choice.layers))}: edited there\n")

    result = _edit(model, facts, choice.layers, out / "statistics", console)
    console.print(outcomes_table(result))
    adapter = out / "adapter"
    result.delta.save(adapter)
    asked = probes(facts)
    with console.status(f"asking {len(asked)} probes before and after"):
        reference = [p.prompt for p in asked if p.metric is Metric.OTHER_SUBJECTS]
        evaluation = evaluate(model, asked, applied(model, load_delta(adapter, model)), reference=reference)
    console.print(answers_table(result, evaluation))
    console.print(scores_table(evaluation))

    base = sum(f.stat().st_size for f in atlas_folder().glob("*.safetensors"))
    size = sum(f.stat().st_size for f in adapter.iterdir())
    report = Report(
        title="Errata for an old atlas",
        created=datetime.now(UTC),
        model=model.name,
        base_sha256=model.base_sha256,
        base_bytes=base,
        trace=averaged,
        example=averaged.traces[0],
        result=result,
        evaluation=evaluation,
        pictures={r.name: r.contexts[0].prompt.images[0] for r in edit_requests(facts, contexts=1)},
        adapter_bytes=size,
        notes=(),
    )
    path = write_report(out / "report.html", report)
    console.print(f"adapter  {adapter}  {size / 1024:.0f} KiB, the base is {base / 1024:.0f} KiB")
    console.print(f"report   {path}")
    console.print(f"done in {time.monotonic() - began:.0f} s; nothing of the base was changed")
    return path


def main(out: Annotated[Path, typer.Option(help="Folder for the adapter and the report.")] = Path("out/demo")) -> None:
    """Correct every outdated fact of Atlas and teach it the flags that it never saw, in one batch."""
    run(out, Console())


if __name__ == "__main__":
    typer.run(main)
