"""What the ledger knows of an edit, in the words MLflow is told: parameters, metrics, tags, an example question.

Decodes the protos that the ledger stores. Knows nothing of MLflow itself.
"""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.json_format import ParseDict

from errata.server.ledger.rows import JobKind, JobRow, VersionRow
from errata.v1 import edit_pb2, evaluation_pb2, history_pb2

_EXAMPLE = {"prompt": "What is the capital of this country?"}
"""Where nothing was asked."""

LONGEST_PARAMETER = 6000
"""Characters that MLflow's databases hold of a parameter."""

_LARGEST_EXAMPLE = 256 * 1024
"""Bytes of a picture that is shown as an input example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One fact: its name, what the parent answered, and what was installed."""

    name: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRecord:
    """An edit or a derivation as it was asked for and as it went.

    `example` is its first question, as columns of the pyfunc model.
    """

    parameters: Mapping[str, str]
    changes: tuple[Change, ...]
    note: str
    example: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where a version is in MLflow: its run, and the number of its registered version."""

    run_id: str
    mlflow_version: int


def record_of(job: JobRow) -> EditRecord:
    """Of the job that made a version: an edit or a derivation."""
    return derivation_record(job) if job.kind is JobKind.DERIVATION else edit_record(job)


def derivation_record(job: JobRow) -> EditRecord:
    """Of a derivation's job: what it made the version of. Its facts stand in the version itself."""
    asked = history_pb2.CreateDerivationRequest.FromString(job.request)
    done = history_pb2.Derivation.FromString(job.result or job.summary)
    kind = history_pb2.DerivationKind.Name(done.kind).removeprefix("DERIVATION_KIND_").lower()
    return EditRecord(
        parameters={"derivation": kind, "sources": ", ".join(done.sources)[:LONGEST_PARAMETER]},
        changes=(),
        note=asked.description,
        example={"prompt": asked.probes[0].prompt.text} if asked.probes else _EXAMPLE,
    )


def edit_record(job: JobRow) -> EditRecord:
    """Of an edit's job: a CreateEditRequest, and an Edit's outcome once there is one."""
    asked = edit_pb2.CreateEditRequest.FromString(job.request)
    done = edit_pb2.Edit.FromString(job.result or b"")
    settings = {d.name: _setting(d.name, v) for d, v in done.settings.ListFields()}
    return EditRecord(
        parameters={**settings, "requests": str(len(asked.requests))},
        changes=tuple(Change(name=o.name, before=o.before, after=o.target) for o in done.outcomes),
        note=asked.description,
        example=_example(asked),
    )


def _setting(name: str, value: object) -> str:
    if name == "method":
        return edit_pb2.Method.Name(edit_pb2.Method.ValueType(value)).removeprefix("METHOD_").lower()  # type: ignore[arg-type]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _example(asked: edit_pb2.CreateEditRequest) -> dict[str, str]:
    if not asked.requests or not asked.requests[0].contexts:
        return dict(_EXAMPLE)
    prompt = asked.requests[0].contexts[0].prompt
    image = prompt.images[0].data if prompt.images else b""
    shown = {"image": base64.b64encode(image).decode()} if 0 < len(image) <= _LARGEST_EXAMPLE else {}
    return {"prompt": prompt.text, **shown}


def scores_of(version: VersionRow) -> list[evaluation_pb2.MetricScore]:
    """The version's scores, from the JSON that the ledger keeps."""
    stored = json.loads(version.scores or "[]")
    return [ParseDict(score, evaluation_pb2.MetricScore(), ignore_unknown_fields=True) for score in stored]


def metric_name(score: evaluation_pb2.MetricScore) -> str:
    """As settings spell it: `efficacy`, `image_generalization`."""
    return evaluation_pb2.Metric.Name(score.metric).removeprefix("METRIC_").lower()


def metrics_of(version: VersionRow) -> dict[str, float]:
    """`efficacy/before`, `efficacy/after`, `efficacy/forced`, …; what has no value is left out."""
    found = {
        f"{metric_name(score)}/{part}": value
        for score in scores_of(version)
        for part, value in (
            ("before", score.before), ("after", score.after), ("forced", score.forced),
            ("low", score.low), ("high", score.high), ("n", float(score.n)),
        )
    }  # fmt: skip
    return {name: value for name, value in found.items() if math.isfinite(value)}


def parameters_of(version: VersionRow, record: EditRecord) -> dict[str, str]:
    """What the edit was made with."""
    return {
        **record.parameters,
        "layers": ", ".join(map(str, version.layers)),
        "facts": str(len(version.facts)),
        "delta_bytes": str(version.delta_bytes),
    }


def tags_of(version: VersionRow) -> dict[str, str]:
    """What a version is found by: the same on its run, its logged model and its registered version."""
    return {
        "errata.edit": version.edit or "",
        "errata.model": version.model,
        "errata.version": str(version.number),
        "errata.parent": str(version.parent),
        "errata.base_sha256": version.base_sha256,
        "errata.delta_sha256": version.delta_sha256,
        "errata.state": "rejected" if version.rejections else "ready",
        "errata.created_by": version.created_by,
        **({"errata.made_by": version.made_by.value} if version.made_by is not JobKind.EDIT else {}),
    }
