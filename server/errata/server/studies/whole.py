"""A study from its file to its page and its experiment: read, planned, measured, shown, published."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL

from errata.editor.errors import ErrataError
from errata.server.studies.format import Study, read_study
from errata.server.studies.page import write_page
from errata.server.studies.plan import Cell, plan
from errata.server.studies.publishing import experiment_name, publish
from errata.server.studies.results import Place
from errata.server.studies.running import Measure, Outcome, Pool, processes, run

from mlflow.exceptions import MlflowException  # isort: skip  # after the registry's package, which quiets it

_log = logging.getLogger(__name__)


NOWHERE = "none"
"""In place of a tracking URI: nothing is published. The server's setting `mlflow_uri` says it so, too."""


class PublishingError(ErrataError):
    """MLflow did not take what was measured; nothing of that is lost."""

    reason = "NOT_PUBLISHED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run of a study did. `failed` are reasons by the cells' labels; `earlier` cells were there already.

    Where nothing is published `mlflow` is NOWHERE, and `experiment` and `run_id` are empty.
    """

    page: Path
    experiment: str
    mlflow: str
    run_id: str
    measured: int
    earlier: int
    failed: dict[str, str]

    def as_json(self) -> str:
        """For a program that started it."""
        said = {"page": str(self.page), "experiment": self.experiment, "mlflow": self.mlflow, "run_id": self.run_id}
        counts = {"measured": self.measured, "earlier": self.earlier, "failed": self.failed}
        return json.dumps({**said, **counts}, ensure_ascii=False)


def run_study(
    file: Path,
    out: Path,
    *,
    jobs: int = 1,
    mlflow: str | None = None,
    told: Callable[[str], None] = lambda _line: None,
    pool: Pool = processes,
    measured: Measure | None = None,
) -> Report:
    """Runs what is missing of a study, writes its page and publishes it. One at a time in a folder.

    `mlflow` is a tracking URI, or NOWHERE; None: a database in `out`. `told` is called with a line for people now and
    then. `measured` is what measures the cells; None: `jobs` workers of `pool`.
    Raises StudyError for a file with faults, PublishingError, ErrataError for models or data that cannot be read, and
    KeyboardInterrupt: the page is written then, and nothing is published.
    """
    study, place = read_study(file), Place(out=out)
    cells = plan(study, file.parent.absolute())  # other processes start in other folders
    missing = [cell for cell in cells if not place.has(cell.id)]
    told(f"{len(cells)} cells, {len(cells) - len(missing)} of them finished before")
    failed: dict[str, str] = {}

    def ended(cell: Cell, outcome: Outcome) -> None:
        if outcome.failed:
            failed[cell.id] = outcome.failed
        if outcome.trace:
            _log.error("%s failed\n%s", cell.label, outcome.trace)
        told(f"{cell.label}: {outcome.failed or f'{outcome.seconds:.1f} s'}")

    out.mkdir(parents=True, exist_ok=True)
    uri = mlflow or _database(out)
    try:
        if measured is None:
            run(missing, place, ended, jobs=jobs, pool=pool)
        elif missing:
            measured(missing, place, ended)
    finally:
        write_page(study, cells, failed, place)
    return Report(
        page=place.page,
        experiment="" if uri == NOWHERE else experiment_name(study),
        mlflow=uri,
        run_id="" if uri == NOWHERE else _published(study, file, cells, place, uri),
        measured=len(missing) - len(failed),
        earlier=len(cells) - len(missing),
        failed={cell.label: failed[cell.id] for cell in cells if cell.id in failed},
    )


def _published(study: Study, file: Path, cells: tuple[Cell, ...], place: Place, uri: str) -> str:
    try:
        return publish(study, file, cells, place, uri)
    except (MlflowException, OSError) as error:
        said = " ".join(str(error).split())
        raise PublishingError(
            f"the results are in {str(place.out)!r}, but MLflow cannot take them: {said}; run the study again"
        ) from error


def _database(out: Path) -> str:
    return URL.create("sqlite", database=str(out.absolute() / "mlflow.sqlite")).render_as_string()
