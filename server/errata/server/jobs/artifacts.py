"""The files that a job leaves: pages, figures, tables and JSON, as bytes by name. Writes nothing itself.

The same job gives the same bytes: its date is when it was asked for, not when it was done.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from jinja2 import Environment, PackageLoader, StrictUndefined

from errata.editor.evaluation import Evaluation, ProbeResult
from errata.editor.methods import EditResult
from errata.editor.report import Report, aie_heatmap, png, render_report, trace_heatmap
from errata.editor.report.pictures import Pictures
from errata.editor.report.wording import counted, plain
from errata.editor.requests import EditRequest
from errata.editor.trace import AveragedTrace
from errata.server.ledger.rows import JobRow
from errata.server.models import LoadedModel
from errata.server.names import version_name
from errata.v1 import history_pb2

DERIVATION = "derivation.json"
REPORT, HEATMAP, REQUEST, SCORES = "report.html", "causal_trace.png", "request.json", "scores.json"
ANSWERS_PAGE, ANSWERS_TABLE = "before_after.html", "before_after.json"
EFFECTS, EFFECTS_TABLE = "causal_trace.json", "causal_trace.csv"

_MOST_ROWS = 1000
"""Probes on one page, the failed ones first; the table beside it has them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """An edit that was solved and evaluated. `trace` is what its layers were chosen from, if they were; `notes` are
    what its report says besides.
    """

    result: EditResult
    evaluation: Evaluation
    rejections: tuple[str, ...]
    trace: AveragedTrace | None
    notes: tuple[str, ...]


def trace_files(averaged: AveragedTrace, result: Message) -> dict[str, bytes]:
    """The heatmap, the effects as a table, and the whole result as JSON."""
    return {HEATMAP: heatmap(averaged), EFFECTS_TABLE: _effects_table(averaged), EFFECTS: _json_of(result)}


def evaluation_files(evaluation: Evaluation) -> dict[str, bytes]:
    """Every probe's answers as a page with pictures and as a table, and the scores."""
    return {
        ANSWERS_PAGE: _answers_page(evaluation),
        ANSWERS_TABLE: _answers_table(evaluation.results),
        SCORES: _json(evaluation.to_json()),
    }


def edit_files(
    row: JobRow, message: Message, requests: Sequence[EditRequest], judged: Judged, loaded: LoadedModel
) -> dict[str, bytes]:
    """Those of its evaluation, the request (complete, so that it can be sent again), the report, the heatmap."""
    files = {**evaluation_files(judged.evaluation), REQUEST: _json_of(message)}
    files[REPORT] = render_report(_report(row, requests, judged, loaded)).encode()
    if judged.trace is not None:
        files[HEATMAP] = heatmap(judged.trace)
    return files


def derivation_files(
    evaluation: Evaluation, message: history_pb2.CreateDerivationRequest, outcome: history_pb2.Derivation
) -> dict[str, bytes]:
    """Those of its evaluation, the request without an adapter's bytes, and the whole outcome as JSON."""
    asked = history_pb2.CreateDerivationRequest()
    asked.CopyFrom(message)
    if asked.HasField("adapter"):
        asked.adapter.ClearField("adapter_model")
    return {**evaluation_files(evaluation), REQUEST: _json_of(asked), DERIVATION: _json_of(outcome)}


def heatmap(averaged: AveragedTrace) -> bytes:
    """A PNG: of the tokens where there is one question, of their roles where there are several."""
    return png(trace_heatmap(averaged.traces[0]) if len(averaged.traces) == 1 else aie_heatmap(averaged))


def _report(row: JobRow, requests: Sequence[EditRequest], judged: Judged, loaded: LoadedModel) -> Report:
    shown = {r.name: next((c.prompt.images[0] for c in r.contexts if c.prompt.images), None) for r in requests}
    return Report(
        title=f"{row.model}: {counted(len(requests), 'request')} edited on version {row.version}",
        created=row.create_time,
        model=row.model,
        base_sha256=loaded.base.base_sha256,
        base_bytes=loaded.memory_bytes,
        trace=judged.trace,
        example=judged.trace.traces[0] if judged.trace else None,
        result=judged.result,
        evaluation=judged.evaluation,
        pictures={name: image for name, image in shown.items() if image is not None},
        adapter_bytes=judged.result.delta.nbytes,
        notes=(f"parent: {version_name(row.model, row.version)}", *judged.notes, *judged.rejections),
    )


def _effects_table(averaged: AveragedTrace) -> bytes:
    out = io.StringIO(newline="")
    table = csv.writer(out)
    table.writerow(("component", "layer", "role", "average_indirect_effect", "standard_error"))
    for component in averaged.components:
        effects, errors = averaged.aie(component), averaged.spread(component)
        for layer in range(effects.shape[0]):
            for role, effect, error in zip(averaged.roles, effects[layer], errors[layer], strict=True):
                table.writerow((component.value, layer, role, *("" if math.isnan(x) else x for x in (effect, error))))
    return out.getvalue().encode()


def _answers_table(results: Sequence[ProbeResult]) -> bytes:
    """In the layout of MLflow's tables."""
    columns = ("metric", "request", "question", "images", "expected", "before", "after", "passed")
    data = [
        [
            r.probe.metric.value, r.probe.request, r.probe.prompt.text, len(r.probe.prompt.images), r.expected,
            r.before, r.after, r.passed,
        ]
        for r in results
    ]  # fmt: skip
    return _json({"columns": columns, "data": data})


def _answers_page(evaluation: Evaluation) -> bytes:
    pictures = Pictures()
    rows = list(_rows(sorted(evaluation.results, key=lambda r: r.passed)[:_MOST_ROWS], pictures))
    environment = Environment(
        loader=PackageLoader("errata.server.jobs", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["plain"] = plain
    page = environment.get_template("before_after.html.j2")
    return page.render(
        rows=rows, left_out=len(evaluation.results) - len(rows), scores=evaluation.scores, pictures=pictures.uris
    ).encode()


def _rows(results: Sequence[ProbeResult], pictures: Pictures) -> Iterator[tuple[ProbeResult, str | None]]:
    """Each probe and the class of its first picture."""
    for result in results:
        images = result.probe.prompt.images
        yield result, pictures.css_class(images[0]) if images else None


def _json_of(message: Message) -> bytes:
    return MessageToJson(message, preserving_proto_field_name=True, ensure_ascii=False).encode()


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
