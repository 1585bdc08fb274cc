"""Measurements in MLflow: each a finished run of its model's experiment, found by the tag `errata.measurement`.

Its metrics are the numbers, its parameters the settings, its artifacts the figures, the page and the tables. A run that
was cut off is thrown away and written again, so that a measurement has one finished run in the end.
"""

import math
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE, MLFLOW_USER

from errata.server.ledger.rows import JobRow
from errata.server.registry.description import LIMIT, markdown
from errata.server.registry.record import LONGEST_PARAMETER
from errata.v1 import measurement_pb2

TAG = "errata.measurement"

_FOREIGN = re.compile(r"[^\w.\- ]+", re.ASCII)
"""What MLflow takes in no name."""

_ARROW = re.compile("->|→")

_LONGEST_NAME = 240


def publish(client: MlflowClient, experiment: str, job: JobRow, folder: Path | None) -> str:
    """Publishes a measurement that succeeded, or finds its run; returns the run's id. `folder` has its files."""
    finished = None
    for run in client.search_runs([experiment], f"tags.`{TAG}` = '{job.id}'"):
        if finished is None and run.info.status == "FINISHED":
            finished = str(run.info.run_id)
        else:
            client.delete_run(run.info.run_id)
    return finished or _written(client, experiment, job, folder)


def _written(client: MlflowClient, experiment: str, job: JobRow, folder: Path | None) -> str:
    done = measurement_pb2.Measurement.FromString(job.summary)
    done.MergeFromString(job.result or b"")
    name = f"{done.kind} · version {job.version}"
    run = client.create_run(experiment, _milliseconds(job.start_time), _tags(job, done), name)
    run_id = str(run.info.run_id)
    client.log_batch(
        run_id, metrics=list(metrics(done.findings, _milliseconds(job.end_time))), params=list(parameters(done))
    )
    if folder is not None:
        client.log_artifacts(run_id, str(folder))
    client.set_terminated(run_id, "FINISHED", _milliseconds(job.end_time))
    return run_id


def _tags(job: JobRow, done: measurement_pb2.Measurement) -> dict[str, str]:
    return {
        TAG: job.id,
        "errata.kind": done.kind,
        "errata.model": job.model,
        "errata.version": str(job.version),
        "errata.created_by": job.created_by,
        MLFLOW_USER: job.created_by,
        MLFLOW_RUN_NOTE: note(done.findings),
    }


def parameters(done: measurement_pb2.Measurement) -> Iterator[Param]:
    """The kind, the settings, and how many questions there were."""
    yield Param("kind", done.kind)
    yield Param("questions", str(done.questions))
    yield Param("left out", str(len(done.findings.skipped)))
    for setting in done.findings.settings:
        yield Param(_name(setting.name), setting.value[:LONGEST_PARAMETER])


def metrics(findings: measurement_pb2.Findings, time: int) -> Iterator[Metric]:
    """`total effect`, `total effect/low`, `…/high`, `…/n`; what has no value is left out. `time` is in ms."""
    for number in findings.numbers:
        name = _name(number.name)
        bounds = {f"{name}/{end}": getattr(number, end) for end in ("low", "high") if number.HasField(end)}
        for key, value in {name: number.value, **bounds, f"{name}/n": float(number.n)}.items():
            if math.isfinite(value):
                yield Metric(key, value, time, 0)


def note(findings: measurement_pb2.Findings) -> str:
    """For MLflow's page of the run: the numbers, and what was left out."""
    columns = ("| number | value | 95 % interval | unit | n |", "|---|---|---|---|---|")
    head = [f"**{markdown(findings.title)}**, n = {findings.n}", "", *columns]
    lines = [*head, *map(_row, findings.numbers), "", *(f"- left out: {markdown(line)}" for line in findings.skipped)]
    while len("\n".join(lines)) > LIMIT:
        lines.pop()
    return "\n".join(lines)


def _row(number: measurement_pb2.MeasuredNumber) -> str:
    bounds = f"{number.low:.4g} – {number.high:.4g}" if number.HasField("low") and number.HasField("high") else ""
    said = (markdown(number.name), f"**{number.value:.4g}**", bounds, markdown(number.unit), str(number.n))
    return f"| {' | '.join(said)} |"


def _name(told: str) -> str:
    return " ".join(_FOREIGN.sub(" ", _ARROW.sub(" to ", told)).split())[:_LONGEST_NAME]


def _milliseconds(time: datetime | None) -> int:
    return int(time.timestamp() * 1000) if time else 0
