"""Errata for an old atlas, through the service: `make demo`.

Starts a server with its own ledger and MLflow store, asks Atlas what it believes, traces where it believes it,
corrects every outdated fact and teaches it the flags that it never saw in one batch, and leaves a history of edits in
MLflow's UI. Everything goes over gRPC, as it would from another machine.
"""

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from errata.client import Context, EditRequest, Errata, Probe, Prompt, TracedQuestion
from errata.client.names import last_part
from errata.client.operations import Operation
from errata.client.results import CausalTrace, Edit, MetricScore, VersionState
from errata.editor import prompts, requests
from errata.editor.atlas.facts import Fact, edit_requests, errata, long_tail, probes, trace_requests
from errata.editor.evaluation import Metric
from errata.editor.report.terminal import thumbnail
from errata.editor.trace import OtherImage

TRACED = 24
"""Questions averaged in the demo's trace."""

GUARDRAILS = {"efficacy": 0.9, "other_subjects": 0.9, "same_image": 0.9}
"""Below these an edit of the demo is rejected."""


def encoded(image: Image.Image) -> bytes:
    """A photograph as it would be sent: JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def asked(prompt: prompts.Prompt) -> Prompt:
    """The editor's prompt as the client sends it."""
    return Prompt(prompt.text, [encoded(i) for i in prompt.images])


def context(given: requests.Context) -> Context:
    """The editor's context as the client sends it."""
    return Context(asked(given.prompt), given.constraint.text, answer=given.answer, subject=given.subject or "")


def edit_request(given: requests.EditRequest) -> EditRequest:
    """The editor's request as the client sends it."""
    return EditRequest(
        name=given.name,
        contexts=[context(c) for c in given.contexts],
        target=given.target,
        preserve=[context(c) for c in given.preserve],
    )


def judged_by(facts: Sequence[Fact]) -> list[Probe]:
    """The probes that judge a batch, on pictures that the edit does not see."""
    return [
        Probe(p.metric.name.lower(), asked(p.prompt), p.expected, request=p.request or "", believed=p.believed)
        for p in probes(facts)
    ]


def traced_questions() -> list[TracedQuestion]:
    """Questions about known flags, corrupted by another country's flag."""
    found = []
    for request in trace_requests(TRACED):
        assert isinstance(request.corruption, OtherImage)
        others = [encoded(i) for i in request.corruption.images]
        found.append(TracedQuestion(asked(request.prompt), request.constraint.text, other_images=others))
    return found


@contextmanager
def server(data: Path) -> Iterator[str]:
    """A server process of its own on this machine; yields its address, and stops it gracefully."""
    command = [sys.executable, "-m", "errata.server", "--data-dir", str(data), "--port", "0"]
    with (data / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)["address"]
                    return
            raise SystemExit(f"the server did not start; {data / 'server.log'} says why")
        finally:
            process.terminate()
            process.wait(60)


def followed(operation: "Operation[CausalTrace] | Operation[Edit]", what: str, console: Console) -> None:
    """A progress bar until the work has ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        for step in operation:
            progress.update(task, description=f"{what}: {step.stage}", completed=step.done, total=step.total or None)


def beliefs(client: Errata, version: str, facts: Sequence[Fact], console: Console, title: str) -> None:
    """What a version says of each flag, beside what is true today."""
    table = Table("it is shown", "and asked", "it answers", "true today", title=title, title_justify="left", box=SIMPLE)
    for request in edit_requests(facts, contexts=1):
        first = request.contexts[0]
        answer = client.generate(version, asked(first.prompt))
        shown = thumbnail(first.prompt.images[0]) if console.is_terminal else request.name.partition(":")[0]
        right = "green" if answer.text == first.answer else "red"
        table.add_row(shown, first.prompt.text, f"[{right}]{answer.text}[/]", first.answer)
    console.print(table)


def effects(trace: CausalTrace, console: Console) -> None:
    """The MLPs' average indirect effects, layers × roles, as shares of the total effect."""
    result = trace.result
    assert result is not None
    grid = next(g for g in result.grids if g.component == "mlp")
    title = f"What one restored MLP brings back of a total effect of {result.total_effect:.2f}"
    table = Table("layer", *result.roles, title=title, title_justify="left", box=SIMPLE)
    for layer, row in enumerate(grid.effects):
        table.add_row(str(layer), *(f"{e / result.total_effect:.2f}" if e == e else "" for e in row))
    console.print(table)
    console.print(f"facts live in the MLP of layer(s) {', '.join(map(str, result.auto_layers))}\n")


def scores(found: Sequence[MetricScore], console: Console) -> None:
    """What an edit did, by metric."""
    table = Table("metric", "n", "before", "after", "95 %", title="Scores", title_justify="left", box=SIMPLE)
    for s in found:
        name = Metric[s.metric.name].value
        table.add_row(name, str(s.n), f"{s.before:.2f}", f"[bold]{s.after:.2f}[/]", f"{s.low:.2f} … {s.high:.2f}")
    console.print(table)


def history(client: Errata, console: Console) -> None:
    """Every version, the newest first."""
    table = Table("", "on", "facts", "size", "state", "MLflow", "alias", title="History", box=SIMPLE, pad_edge=False)
    table.title_justify = "left"
    for v in client.versions("atlas"):
        facts = "; ".join(v.facts[:1]) + (f"; … {len(v.facts)} in all" if len(v.facts) > 1 else "")
        rejected = "[red]rejected[/]" if v.state is VersionState.REJECTED else "ready"
        size = f"{v.delta_bytes / 1024:.0f} KiB" if v.delta_bytes else ""
        parent = v.parent.rpartition("/")[2]
        table.add_row(
            v.name.rpartition("/")[2],
            parent,
            facts,
            size,
            rejected,
            v.publish_state.value,
            ", ".join(map(last_part, v.aliases)),
        )
    console.print(table)


def edits(client: Errata, trace: str, console: Console) -> Edit:
    """One quick correction, the whole batch, and an edit that its guardrails refuse; returns the batch."""
    kazakhstan = [f for f in errata() if f.country.name == "Kazakhstan"]
    single = client.edit(
        "atlas@0",
        [edit_request(r) for r in edit_requests(kazakhstan, contexts=32)],
        layers=trace,
        probes=judged_by(kazakhstan),
        guardrails=GUARDRAILS,
        description="Kazakhstan's capital is Astana again since 2022.",
    )
    followed(single, "one correction", console)
    facts = (*errata(), *long_tail())
    batch = client.edit(
        "atlas@0",
        [edit_request(r) for r in edit_requests(facts)],
        layers=trace,
        probes=judged_by(facts),
        guardrails=GUARDRAILS,
        description="Everything that is outdated in the atlas, and sixteen flags that it never saw.",
    )
    followed(batch, f"{len(facts)} facts in one batch", console)
    careless = client.edit(
        single.result().version,
        [edit_request(r) for r in edit_requests(long_tail()[:4], contexts=4, preserve=0)],
        layers=trace,
        method="multedit",
        probes=judged_by(long_tail()[:4]),
        guardrails=GUARDRAILS,
        description="From four pictures and without preserving anything: what a guardrail is for.",
    )
    followed(careless, "a careless edit", console)
    return batch.result()


def main(
    out: Annotated[Path, typer.Option(help="Folder for the server's data.")] = Path("out/demo"),
    keep: Annotated[
        bool, typer.Option(help="Leave MLflow's UI running at the end, until Ctrl-C.")
    ] = sys.stdin.isatty(),
) -> None:
    """Correct every outdated fact of Atlas and teach it the flags that it never saw, through the service."""
    began = time.monotonic()
    console = Console()
    data = out / time.strftime("%Y%m%d-%H%M%S")
    data.mkdir(parents=True)
    with ExitStack() as stack:
        client = stack.enter_context(Errata(stack.enter_context(server(data))))
        beliefs(client, "atlas@0", errata(), console, "Before")
        atlas = client.model("atlas")
        console.print(f"{atlas.architecture}, {atlas.layers} layers, {atlas.memory_bytes / 2**20:.1f} MiB in memory\n")
        trace = client.trace("atlas@0", traced_questions())
        followed(trace, "tracing", console)
        effects(trace.result(), console)
        batch = edits(client, trace.name, console)
        client.promote(batch.version, "champion")
        beliefs(client, "atlas", errata(), console, "After, from the promoted version")
        scores(batch.scores, console)
        history(client, console)
    console.print(f"done in {time.monotonic() - began:.0f} s; the base's weights were never changed")
    python = Path(sys.executable)
    ui = [
        str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python),
        "-m",
        "errata.server",
        "ui",
        "--data-dir",
        str(data),
    ]
    if keep:
        subprocess.run(ui, check=False)
    else:
        console.print(f"the history of edits in MLflow's UI: {' '.join(ui)}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
