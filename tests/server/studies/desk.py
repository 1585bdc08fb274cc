"""A small study's folder: a tiny LLaVA, a few pictures, results; run in a thread of this process."""

import warnings
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import yaml

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns of its own code when it is imported
    from errata.server.studies.whole import Report, run_study

from mlflow import MlflowClient  # isort: skip
from mlflow.entities import Run

from errata.server.studies.plan import planned

ENTRY = {
    "study": "tiny",
    "models": {"one": {"source": "model"}},
    "data": {"flags": {"path": "flags"}},
    "measurements": {"lens": {"kind": "lens"}, "flows": {"kind": "attention", "settings": {"overlays": 1}}},
}
"""A study of two cells."""


LENS, FLOWS = "lens · one · flags", "flows · one · flags"
"""Its cells."""


def threads(jobs: int, stop: Path) -> Executor:
    return ThreadPoolExecutor(jobs)


@dataclass
class Desk:
    """A folder with a model, a data set and a study's file, and another for results."""

    root: Path
    results: Path | None = None
    told: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.root / "study.yaml"

    @property
    def out(self) -> Path:
        return self.results or self.root / "out"

    def write(self, study: object = ENTRY, **changes: object) -> Path:
        given = {**study, **changes} if isinstance(study, dict) else study
        self.file.write_text(given if isinstance(given, str) else yaml.safe_dump(given, sort_keys=False))
        return self.file

    def run(self) -> Report:
        return run_study(self.file, self.out, told=self.told.append, pool=threads)

    def finished(self) -> dict[str, bool]:
        return {cell.label: finished for cell, finished in planned(self.file, self.out)}

    def page(self) -> str:
        return (self.out / "index.html").read_text()

    def runs(self) -> list[Run]:
        """Of the study's experiment."""
        experiment = self.mlflow.get_experiment_by_name("errata/studies/tiny")
        assert experiment is not None
        return list(self.mlflow.search_runs([experiment.experiment_id]))

    @property
    def mlflow(self) -> MlflowClient:
        return MlflowClient(tracking_uri=f"sqlite:///{self.out.absolute()}/mlflow.sqlite")
