"""A study's cells measured on the workers of a cluster, in place of processes of this machine.

Cells are stored as those of local processes are, each whole or not at all, and a rerun goes on anywhere. The study's
file with what it names, and its folder of results, lie where all nodes find them under the same path.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from errata.editor.errors import ErrataError
from errata.server.cluster.connection import LOCAL, ClusterSettings, connected
from errata.server.cluster.errors import ClusterError
from errata.server.cluster.workers import Workers, WorkerSettings, lacking_for, shared_folder
from errata.server.studies.plan import Cell
from errata.server.studies.results import Place
from errata.server.studies.running import Measure, Outcome, Told, measure_cell

_log = logging.getLogger(__name__)


def on_cluster(workers: WorkerSettings, cluster: ClusterSettings | None = None) -> Measure:
    """Measures cells on so many workers, each of which keeps the model of its last cell.

    `cluster` None: the one that this process is connected to. The cell of a worker that died is measured once more,
    on another one. Raises ClusterError.
    """

    def measured(cells: Sequence[Cell], place: Place, told: Told) -> None:
        place.stop.unlink(missing_ok=True)
        connection = connected(cluster) if cluster else nullcontext()
        opened = partial(shared_folder, place.out.absolute())
        with connection:
            # No node joins a cluster that ends with this process.
            if cluster and cluster.address == LOCAL and (lacking := lacking_for(workers, 1)):
                raise ClusterError(f"{lacking}; ask for less, or give another cluster")
            few = replace(workers, workers=max(1, min(workers.workers, len(cells))))
            with Workers(opened, few, told=_log.warning) as crew:
                for ended in crew.map(_cell, cells):
                    told(cells[ended.shard], _outcome(ended.outcome))

    return measured


def _outcome(found: Outcome | ErrataError) -> Outcome:
    return Outcome(failed=str(found)) if isinstance(found, ErrataError) else found


def _cell(out: Path, cell: Cell) -> Outcome:
    disable_progress_bar()
    return measure_cell(cell, Place(out=out))
