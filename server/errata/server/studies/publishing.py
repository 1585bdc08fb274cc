"""A study in MLflow: one experiment, one run for the study, and a finished run nested in it for each cell.

A cell's run is found by the tag `errata.cell`, its hash; so a study that is published again gets no run twice. Runs of
cells that are no longer part of the study stay, with the tag `errata.in_plan` "false".
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from google.protobuf.json_format import Parse

from errata.server.jobs.findings import FINDINGS
from errata.server.registry.description import LIMIT, markdown
from errata.server.registry.measurements import metrics, note, parameters
from errata.server.studies.format import Study
from errata.server.studies.plan import Cell
from errata.server.studies.results import SECTION, Place
from errata.v1 import measurement_pb2

from mlflow import MlflowClient  # isort: skip  # after the registry's package, which quiets it
from mlflow.entities import Metric, Param, Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

_STUDY, _CELL, _IN_PLAN = "errata.study", "errata.cell", "errata.in_plan"
_FINISHED, _FAILED = "FINISHED", "FAILED"


def experiment_name(study: Study) -> str:
    """What a study's experiment is called."""
    return f"errata/studies/{study.study}"


def publish(study: Study, file: Path, cells: Sequence[Cell], place: Place, uri: str) -> str:
    """Publishes all finished cells and the page; returns the run of the study. May be repeated after any failure.

    `cells` are all of the plan. Raises MlflowException, or whatever keeps MLflow from being reached.
    """
    client = MlflowClient(tracking_uri=uri)
    experiment = _experiment(client, experiment_name(study), place, uri)
    runs: list[Run] = _all_runs(client, experiment)
    parent = _parent(client, experiment, runs, study)
    published = {run.data.tags[_CELL]: run for run in runs if _CELL in run.data.tags and _is_whole(client, run)}
    finished = [cell for cell in cells if place.has(cell.id)]
    for cell in finished:
        if cell.sha256 not in published:
            _write(client, experiment, parent, cell, place)
    planned = {cell.sha256 for cell in cells}
    for sha256, run in published.items():
        said = str(sha256 in planned).lower()
        if run.data.tags.get(_IN_PLAN) != said:
            client.set_tag(run.info.run_id, _IN_PLAN, said)
    _end(client, parent, file, len(cells), len(finished), place)
    return parent


def _experiment(client: MlflowClient, name: str, place: Place, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        remote = urlsplit(uri).scheme in ("http", "https")
        root = None if remote else (place.out / "mlruns").resolve().as_uri()
        return str(client.create_experiment(name, artifact_location=root))
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _all_runs(client: MlflowClient, experiment: str) -> list[Run]:
    found: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment], page_token=token, order_by=["attributes.start_time ASC"])
        found += page
        if not (token := page.token):
            return found


def _parent(client: MlflowClient, experiment: str, runs: Sequence[Run], study: Study) -> str:
    found = next((run for run in runs if _STUDY in run.data.tags and _CELL not in run.data.tags), None)
    told = markdown(study.description)[:LIMIT]
    if found is None:
        made = client.create_run(experiment, run_name=study.study, tags={_STUDY: study.study, MLFLOW_RUN_NOTE: told})
        return str(made.info.run_id)
    client.set_tag(found.info.run_id, MLFLOW_RUN_NOTE, told)
    return str(found.info.run_id)


def _is_whole(client: MlflowClient, run: Run) -> bool:
    """Whether a cell's run was written to its end; throws it away where it was not."""
    if run.info.status != _FINISHED:
        client.delete_run(run.info.run_id)
    return bool(run.info.status == _FINISHED)


def _write(client: MlflowClient, experiment: str, parent: str, cell: Cell, place: Place) -> None:
    folder = (place.cells / cell.id).resolve()
    findings = Parse((folder / FINDINGS).read_bytes(), measurement_pb2.Findings())
    kind = cell.measurement.kind
    done = measurement_pb2.Measurement(kind=kind, questions=findings.n + len(findings.skipped), findings=findings)
    tags = {
        _CELL: cell.sha256,
        _IN_PLAN: "true",
        MLFLOW_PARENT_RUN_ID: parent,
        MLFLOW_RUN_NOTE: note(findings),
        "errata.kind": kind,
        "errata.model": cell.model_name,
        "errata.data": cell.data_name,
        "errata.measurement": cell.measurement_name,
    }
    run = client.create_run(experiment, run_name=cell.label, tags=tags)
    run_id, now = run.info.run_id, _now()
    client.log_batch(run_id, metrics=list(metrics(findings, now)), params=_distinct(parameters(done)))
    for file in sorted(folder.iterdir()):
        if file.name != SECTION:  # a part of the study's page, which the study's run has
            client.log_artifact(run_id, str(file))
    client.set_terminated(run_id, _FINISHED)


def _end(client: MlflowClient, parent: str, file: Path, planned: int, finished: int, place: Place) -> None:
    counts = {"cells": planned, "cells finished": finished, "cells missing": planned - finished}
    now = _now()
    client.log_batch(parent, metrics=[Metric(name, float(value), now, 0) for name, value in counts.items()])
    client.log_artifact(parent, str(place.page))
    client.log_artifact(parent, str(file))
    client.set_terminated(parent, _FINISHED if planned == finished else _FAILED)


def _distinct(given: Iterable[Param]) -> list[Param]:
    return list({each.key: each for each in given}.values())


def _now() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)
