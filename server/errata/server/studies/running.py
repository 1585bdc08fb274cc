"""The cells of a study measured in processes of their own, so that one that dies takes no other with it.

A cell is finished when its files are in the store, and not before. Ctrl-C asks the cells that are running to stop at
their next step; what is finished stays.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from time import perf_counter

import torch
from transformers.utils.logging import disable_progress_bar

from errata.editor.errors import ErrataError
from errata.server.local import UnusableError
from errata.server.store import ArtifactStore
from errata.server.studies.format import ModelEntry
from errata.server.studies.measuring import Opened, Work, measure, open_model
from errata.server.studies.plan import Cell
from errata.server.studies.results import Place, cell_files

_DIED = "its process died; it may need more memory than there is"

_GRACE = 10.0
"""Seconds that running cells have to come to their next step when they are to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a cell went. Its files are in the store unless `failed` says why not; `trace` is of what nobody foresaw."""

    failed: str = ""
    trace: str = ""
    seconds: float = 0.0


Pool = Callable[[int, Path], Executor]
"""Makes an executor of so many workers, which are to stop when there is a file at the path."""

Told = Callable[[Cell, Outcome], None]
"""Called with each cell as it ends."""

Measure = Callable[[Sequence[Cell], Place, Told], None]
"""Measures cells into their place: in processes of this machine, or elsewhere (`cluster.studies`)."""


def processes(jobs: int, stop: Path) -> Executor:
    """New processes with one thread of torch's each, which end with this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(stop,))


def run(cells: Sequence[Cell], place: Place, told: Told, *, jobs: int, pool: Pool = processes) -> None:
    """Measures cells into their place, `jobs` at once.

    When a process dies, the cells that were running are measured again, one after the other: the one that dies alone
    is the one at fault, and the others go on.
    """
    place.stop.unlink(missing_ok=True)
    waiting = deque(cells)
    while waiting:
        for suspect in _until_broken(waiting, place, told, jobs, pool):
            if _until_broken(deque([suspect]), place, told, 1, pool):
                told(suspect, Outcome(failed=_DIED))


def measure_cell(cell: Cell, place: Place) -> Outcome:
    """Measures one cell in this process, and stores what it found. Raises nothing."""
    began = perf_counter()
    try:
        opened = _opened(cell.model, cell.folder)
        work = Work(cell=cell, opened=opened, statistics=place.statistics, cancelled=place.stop.exists)
        ArtifactStore(place.cells).write(cell.id, cell_files(measure(work), cell.anchor))
    except (ErrataError, UnusableError) as error:
        return Outcome(failed=str(error), seconds=perf_counter() - began)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        return Outcome(failed=told, trace=traceback.format_exc(), seconds=perf_counter() - began)
    return Outcome(seconds=perf_counter() - began)


# Cells of one model stand together, and a model may be large: a process keeps the last one.
@lru_cache(maxsize=1)
def _opened(entry: ModelEntry, folder: Path) -> Opened:
    return open_model(entry, folder)


def _until_broken(waiting: deque[Cell], place: Place, told: Told, jobs: int, pool: Pool) -> list[Cell]:
    """Measures what is waiting; where a process dies, stops and returns the cells that were running then."""
    running: dict[Future[Outcome], Cell] = {}
    broken: list[Cell] = []
    with pool(min(jobs, len(waiting)), place.stop) as executor:
        try:
            while running or (waiting and not broken):
                while waiting and len(running) < jobs and not broken:
                    cell = waiting.popleft()
                    try:
                        running[executor.submit(measure_cell, cell, place)] = cell
                    except BrokenProcessPool:
                        broken.append(cell)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    try:
                        told(cell, future.result())
                    except BrokenProcessPool:
                        broken.append(cell)
        except BaseException:
            place.stop.touch()
            raise
    return broken


def _start(stop: Path) -> None:
    """Makes this process a worker: Ctrl-C is its parent's, and it does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    disable_progress_bar()
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel, stop), daemon=True).start()


def _end_with(parent: int, stop: Path) -> None:
    left = _GRACE
    while left > 0 and not wait_for([parent], timeout=1):
        left = left - 1 if stop.exists() else _GRACE
    os._exit(1)
