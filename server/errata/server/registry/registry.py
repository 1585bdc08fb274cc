"""MLflow as the place where versions are published: one finished run, one model and one registered version per edit.

A version is published exactly if it is registered, which is the last step; so whatever was cut off before is thrown
away and written again. Everything is found by the tag `errata.edit`, never by a name or a number. Knows nothing of the
ledger's tasks. Not thread-safe: the outbox's one thread owns it.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Param, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.entities import PagedList
from mlflow.utils.mlflow_tags import (
    MLFLOW_LOGGED_ARTIFACTS,
    MLFLOW_MODEL_VERSIONS,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
    MLFLOW_USER,
)

from errata.editor.checkpoints import ATLAS
from errata.editor.delta import Delta
from errata.editor.errors import WrongBaseError
from errata.server.errors import NotFoundError
from errata.server.ledger.rows import JobRow, VersionRow
from errata.server.registry import measurements
from errata.server.registry.description import describe
from errata.server.registry.packaging import save_pyfunc
from errata.server.registry.record import EditRecord, Published, metrics_of, parameters_of, tags_of
from errata.server.store import ArtifactStore, DeltaStore

STEPS = ("run", "files", "model", "finished", "registered")
"""Of a publication: the run exists; its files and its adapter are there; its model; it is finished; registered."""

TABLES = ("before_after.json",)
"""Artifacts that MLflow's pages show as tables: `{"columns": [...], "data": [...]}`."""

_EDIT_TAG = "errata.edit"
_PAGE = 200
_LONGEST_RUN_NAME = 100

_log = logging.getLogger(__name__)
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedBase:
    """A base model as MLflow is told of it: its name there, and what `load_model` takes to load it."""

    registered_model: str
    source: str
    dtype: str = "float32"
    quantization: str = "none"

    @property
    def portable_source(self) -> str:
        """The source as another process on this machine can use it: a folder by its whole path."""
        folder = Path(self.source)
        return str(folder.resolve()) if self.source != ATLAS and folder.is_dir() else self.source


class Registry:
    """Publishes versions. Every method may be repeated after any failure, and then ends as if it had run once.

    `artifact_root` is where artifacts go when `tracking_uri` is a database; None leaves that to MLflow's server.
    `on_step` is called with each of `STEPS`. MLflow is first reached by the first call, not when this is made. Methods
    raise MlflowException, or whatever keeps MLflow from being reached.
    """

    def __init__(
        self,
        tracking_uri: str,
        *,
        bases: Mapping[str, PublishedBase],
        deltas: DeltaStore,
        artifacts: ArtifactStore,
        artifact_root: Path | None = None,
        registry_uri: str | None = None,
        on_step: Callable[[str], None] = lambda _step: None,
    ) -> None:
        self._uri, self._registry_uri = tracking_uri, registry_uri or tracking_uri
        self._bases, self._deltas, self._artifacts = bases, deltas, artifacts
        self._artifact_root, self._on_step = artifact_root, on_step

    @cached_property
    def _client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self._uri, registry_uri=self._registry_uri)

    def publish(self, version: VersionRow, lineage: Sequence[VersionRow], record: EditRecord) -> Published:
        """Publishes a version, or returns where it is. `lineage` is the version, its ancestors and the base.

        Raises NotFoundError for a model that is not configured or a delta that is not stored, and WrongBaseError for
        a delta of another base than the version's.
        """
        if found := self.find(version):
            return found
        experiment = self._experiment(version.model)
        if (run_id := self._finished_run(experiment, version)) is None:
            run_id = self._write_run(experiment, version, lineage, record)
        published = self._register(run_id, version, record)
        self._on_step("registered")
        return published

    def publish_measurement(self, job: JobRow) -> str:
        """Publishes a measurement, or finds where it is; returns its run. Without its files where they are gone."""
        try:
            folder = self._artifacts.folder(job.id)
        except NotFoundError:
            _log.warning("a measurement's files are gone; it is published without them", extra={"measurement": job.id})
            folder = None
        return measurements.publish(self._client, self._experiment(job.model), job, folder)

    def find(self, version: VersionRow) -> Published | None:
        """Where the version is registered. If it is more than once, the first stays and the others are removed."""
        if not (found := self._versions(version.model, version.edit or "")):
            return None
        for doubled in found[1:]:
            _log.warning("a version is registered twice; the later one is removed", extra=_said(version))
            self._client.delete_model_version(doubled.name, doubled.version)
        return _published(found[0])

    def registered(self, model: str) -> dict[str, Published]:
        """All of a model's registered versions, by their edits."""
        found = self._search_versions(f"name = '{self._name(model)}'")
        return {v.tags[_EDIT_TAG]: _published(v) for v in reversed(found) if _EDIT_TAG in v.tags}

    def set_alias(self, version: VersionRow, alias: str) -> None:
        """Points an alias to a version; takes it away where the version is not registered (any more)."""
        if found := self.find(version):
            name = self._name(version.model)
            self._client.set_registered_model_alias(name, alias, str(found.mlflow_version))
        else:
            _log.warning("an alias names a version that MLflow has lost", extra={**_said(version), "alias": alias})
            self.delete_alias(version.model, alias)

    def delete_alias(self, model: str, alias: str) -> None:
        """Takes an alias away, if it is there."""
        with _passing("RESOURCE_DOES_NOT_EXIST"):
            self._client.delete_registered_model_alias(self._name(model), alias)

    def delete_version(self, model: str, edit: str) -> None:
        """Removes the registered versions of an edit, and marks its runs and models as deleted (`mlflow gc`)."""
        for version in self._versions(model, edit):
            with _passing("RESOURCE_DOES_NOT_EXIST"):
                self._client.delete_model_version(version.name, version.version)
        experiment = self._client.get_experiment_by_name(_experiment_name(model))
        if experiment is not None:
            for run in self._runs(experiment.experiment_id, edit):
                self._discard(run)

    def _write_run(
        self, experiment: str, version: VersionRow, lineage: Sequence[VersionRow], record: EditRecord
    ) -> str:
        run_id = self._create_run(experiment, version, lineage, record)
        self._on_step("run")
        self._log_files(run_id, version)
        self._on_step("files")
        model = self._log_model(experiment, run_id, version, lineage, record)
        self._on_step("model")
        self._log_metrics(run_id, model, version)
        self._client.set_terminated(run_id, "FINISHED")
        self._on_step("finished")
        return run_id

    def _create_run(
        self, experiment: str, version: VersionRow, lineage: Sequence[VersionRow], record: EditRecord
    ) -> str:
        tags = {
            **tags_of(version),
            MLFLOW_RUN_NOTE: describe(version, record),
            MLFLOW_USER: version.created_by,
            **self._parent_tag(version, lineage),
        }
        started = int(version.create_time.timestamp() * 1000)
        run = self._client.create_run(experiment, start_time=started, tags=tags, run_name=_run_name(version))
        params = [Param(k, v) for k, v in parameters_of(version, record).items()]
        self._client.log_batch(run.info.run_id, params=params)
        return str(run.info.run_id)

    def _parent_tag(self, version: VersionRow, lineage: Sequence[VersionRow]) -> dict[str, str]:
        parent = next((row for row in lineage if row.number == version.parent), None)
        if parent is None or parent.edit is None:  # the base has no run
            return {}
        found = parent.mlflow_run_id or getattr(self.find(parent), "run_id", "")
        return {MLFLOW_PARENT_RUN_ID: found} if found else {}

    def _log_files(self, run_id: str, version: VersionRow) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            # Written again rather than copied: the hash does not cover the configuration that PEFT reads.
            self._deltas.get(version.delta_sha256).save(Path(scratch, "delta"))
            self._client.log_artifacts(run_id, str(Path(scratch, "delta")), "delta")
        try:
            folder = self._artifacts.folder(version.edit or "")
        except NotFoundError:
            _log.warning("an edit's files are gone; it is published without them", extra=_said(version))
            return
        self._client.log_artifacts(run_id, str(folder))
        if tables := [{"path": name, "type": "table"} for name in TABLES if (folder / name).is_file()]:
            self._client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps(tables))

    def _log_model(
        self, experiment: str, run_id: str, version: VersionRow, lineage: Sequence[VersionRow], record: EditRecord
    ) -> LoggedModel:
        config = self._config(version)
        composed = self._composed(version, lineage)
        logged = self._client.create_logged_model(
            experiment, name=f"version-{version.number}", source_run_id=run_id, tags=tags_of(version), params=config
        )
        model = Model(
            artifact_path=logged.artifact_location, model_uuid=logged.model_id, run_id=run_id, model_id=logged.model_id
        )
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "model")
            save_pyfunc(folder, model, composed, config, record.example, Path(scratch))
            self._client.log_model_artifacts(logged.model_id, str(folder))
        self._client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        return logged

    def _config(self, version: VersionRow) -> dict[str, str]:
        base = self._base(version.model)
        return {
            "source": base.portable_source,
            "base_sha256": version.base_sha256,
            "dtype": base.dtype,
            "quantization": base.quantization,
        }

    def _composed(self, version: VersionRow, lineage: Sequence[VersionRow]) -> Delta:
        """The whole lineage as one delta, at its smallest rank."""
        deltas = [self._deltas.get(row.delta_sha256) for row in reversed(lineage) if row.delta_sha256]
        for delta in deltas:
            if delta.base_sha256 != version.base_sha256:
                raise WrongBaseError(
                    f"version {version.number} of {version.model!r} is of the base {version.base_sha256[:12]}…, but a "
                    f"delta of its lineage of {delta.base_sha256[:12]}…; restore the deltas' folder from a backup"
                )
        return reduce(add, deltas).compressed()

    def _log_metrics(self, run_id: str, model: LoggedModel, version: VersionRow) -> None:
        time = int(version.create_time.timestamp() * 1000)
        metrics = [Metric(k, v, time, 0, model_id=model.model_id) for k, v in metrics_of(version).items()]
        self._client.log_batch(run_id, metrics=metrics)

    def _register(self, run_id: str, version: VersionRow, record: EditRecord) -> Published:
        name = self._ensure_registered_model(version)
        model = self._client.get_logged_model(self._outputs(self._client.get_run(run_id))[0])
        # A database resolves `models:/` by the process's own tracking URI, which is left alone here.
        remote = urlsplit(self._registry_uri).scheme in ("http", "https")
        registered = self._client.create_model_version(
            name,
            f"models:/{model.model_id}" if remote else model.artifact_location,
            run_id,
            tags=tags_of(version),
            description=describe(version, record),
            model_id=model.model_id,
            await_creation_for=0,
        )
        shown = json.dumps([{"name": name, "version": int(registered.version)}])
        self._client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: shown})
        return self.find(version) or _published(registered)

    def _ensure_registered_model(self, version: VersionRow) -> str:
        base = self._base(version.model)
        tags = {"errata.model": version.model, "errata.base_sha256": version.base_sha256}
        with _passing("RESOURCE_ALREADY_EXISTS"):
            self._client.create_registered_model(
                base.registered_model, tags, f"Corrections of `{base.source}` by Errata, one version for each edit."
            )
        return base.registered_model

    def _finished_run(self, experiment: str, version: VersionRow) -> str | None:
        """The edit's finished run. What was cut off half-way, and what is there twice, is thrown away."""
        finished = None
        for run in self._runs(experiment, version.edit or ""):
            if finished is None and run.info.status == "FINISHED" and self._outputs(run):
                finished = str(run.info.run_id)
            else:
                _log.info("a run that was cut off is thrown away", extra={**_said(version), "run_id": run.info.run_id})
                self._discard(run)
        return finished

    def _discard(self, run: Run) -> None:
        """Marks a run and the models logged by it as deleted."""
        where = f"source_run_id = '{run.info.run_id}'"
        for model in self._client.search_logged_models([run.info.experiment_id], filter_string=where):
            self._client.delete_logged_model(model.model_id)
        self._client.delete_run(run.info.run_id)

    def _outputs(self, run: Run) -> list[str]:
        return [output.model_id for output in (run.outputs.model_outputs if run.outputs else ())]

    def _experiment(self, model: str) -> str:
        name = _experiment_name(model)
        found = self._client.get_experiment_by_name(name)
        if found is None:
            location = (self._artifact_root / model).resolve().as_uri() if self._artifact_root else None
            return str(self._client.create_experiment(name, artifact_location=location))
        if found.lifecycle_stage != "active":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _runs(self, experiment: str, edit: str) -> list[Run]:
        return list(self._client.search_runs([experiment], f"tags.`{_EDIT_TAG}` = '{edit}'"))

    def _versions(self, model: str, edit: str) -> list[ModelVersion]:
        """The registered versions of an edit, the first first."""
        return self._search_versions(f"name = '{self._name(model)}' and tags.`{_EDIT_TAG}` = '{edit}'")

    def _search_versions(self, where: str) -> list[ModelVersion]:
        found = _all(lambda token: self._client.search_model_versions(where, max_results=_PAGE, page_token=token))
        return sorted(found, key=lambda v: int(v.version))

    def _name(self, model: str) -> str:
        base = self._bases.get(model)
        return base.registered_model if base else model

    def _base(self, model: str) -> PublishedBase:
        if model not in self._bases:
            raise NotFoundError(
                f"the model {model!r} is not configured any more, so its versions cannot be published; add it to the "
                "server's settings",
                reason="MODEL_NOT_FOUND",
            )
        return self._bases[model]


@contextmanager
def _passing(code: str) -> Iterator[None]:
    """Lets MLflow's refusals with one error code pass."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != code:
            raise


def _all(page: Callable[[str | None], PagedList[_Found]]) -> Iterator[_Found]:
    token = None
    while True:
        found = page(token)
        yield from found
        if not (token := found.token):
            return


def _published(version: ModelVersion) -> Published:
    return Published(run_id=str(version.run_id or ""), mlflow_version=int(version.version))


def _experiment_name(model: str) -> str:
    return f"errata/{model}"


def _run_name(version: VersionRow) -> str:
    more = f" (and {len(version.facts) - 1} more)" if len(version.facts) > 1 else ""
    fact = version.facts[0] if version.facts else version.edit or ""
    return f"{version.number} · {fact}"[: _LONGEST_RUN_NAME - len(more)] + more


def _said(version: VersionRow) -> dict[str, object]:
    """A version as a log record's fields."""
    return {"model": version.model, "version": version.number, "edit": version.edit}
