"""Workers: processes of a cluster that each hold something costly, a model mostly, and take one shard after another.

A worker that dies is replaced, and its shard is given to another one, once: what kills two workers is at fault itself.
Every shard ends exactly once, with its result, its own error, WorkFailedError or WorkerLostError. Imports no model.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from errata.editor.errors import ErrataError, InvalidInputError, check_numbers
from errata.server.cluster.errors import ClusterError, Fault, WorkerLostError, WorkFailedError

_log = logging.getLogger(__name__)

M = TypeVar("M")
S = TypeVar("S")
R = TypeVar("R")

LOST = (RayActorError, OutOfMemoryError, NodeDiedError, ActorUnschedulableError)
"""What Ray raises where the process that had a call is gone. That its memory monitor ended it is no RayActorError."""

_TRIES = 2
"""Workers that a shard may cost."""

_LEAST_GPU = 0.0001
"""The part of a GPU that Ray counts in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How many workers, and what each has to itself: cores, of which Ray tells torch, and GPUs, also parts of one."""

    workers: int
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, at_least={"workers": 1, "cpus": 1, "gpus": 0}, above={})
        if fault := fault_of_gpus(self.gpus):
            raise InvalidInputError(fault, field="gpus")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Generic[R]):
    """How a shard ended: its place in the sequence, and its result or what went wrong."""

    shard: int
    outcome: R | ErrataError


class Worker(Generic[M]):
    """What runs in a worker's process. Errors are handed back, so that their worker lives on.

    `hide_gpus`: Ray leaves all of them visible to a process without a share of one. A runtime environment would hide
    them, too, but takes a new process in place of one that Ray has ready.
    """

    def __init__(self, *, hide_gpus: bool = False) -> None:
        if hide_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA reads it once, maybe as soon as torch is imported
        self._held: M | Fault = Fault.of(WorkFailedError("nothing was opened"))

    def open(self, opened: Callable[[], M]) -> Fault | None:
        """Opens what it holds. Why it cannot work; None: it can."""
        self._held = _tried("what it needs could not be opened", opened)
        return self._held if isinstance(self._held, Fault) else None

    def work(self, task: Callable[[M, S], R], shard: int, given: S) -> R | Fault:
        """One shard."""
        held = self._held
        return held if isinstance(held, Fault) else _tried(f"shard {shard}", lambda: task(held, given))


class Workers(Generic[M]):
    """So many workers, each with what `opened` gives; as a `with`, inside `connected`, for one thread.

    Opens with the first of them that can work; the others join as they have opened, so that of two runs that share a
    cluster neither holds workers that wait for the other's. `opened` and tasks travel by cloudpickle. `told` is called
    with a line for people where a worker died or could not be opened, and where the cluster has too little room. Where
    none can work it raises the error that `opened` raised in the last, WorkerLostError where that died of it.

    Shards are given out by `ray.wait`, not Ray's ActorPool: that knows a dead worker only by the id that its error
    carries, which most of LOST do not, and would give shards to a replacement before that has opened anything.
    """

    def __init__(
        self,
        opened: Callable[[], M],
        settings: WorkerSettings,
        *,
        told: Callable[[str], None] = _log.warning,
    ) -> None:
        self._opened, self._settings, self._told = opened, settings, told
        # Ray's handles are typed by the class they are made from, which is generic here.
        self._ready: list[Any] = []
        self._opening: dict[Any, Any] = {}
        """Workers of which nothing is known yet, by what will say why they cannot work."""
        self._retried = 0

    def __enter__(self) -> "Workers[M]":
        self._tell_of_room()
        try:
            for _ in range(self._settings.workers):
                self._start()
            while not self._ready:
                self._joined(_first(self._opening))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for actor in [*self._ready, *self._opening.values()]:
            ray.kill(actor)
        self._ready.clear()
        self._opening.clear()

    def __len__(self) -> int:
        """Fewer than there were where a replacement could not be opened."""
        return len(self._ready) + len(self._opening)

    @property
    def retried(self) -> int:
        """Shards that were given to a second worker so far."""
        return self._retried

    def map(self, task: Callable[[M, S], R], shards: Sequence[S]) -> Iterator[Ended[R]]:
        """Each shard's end, as they come. `task` runs in a worker, with what that holds and the shard.

        Raises why the last replacement could not be opened, where no worker is left.
        """
        shared = ray.put(task)  # once for all shards: a task may bring deltas along
        if shards and not len(self):
            raise WorkerLostError("all workers are gone, and none could be replaced; open new ones")
        waiting, idle = deque((shard, 1) for shard in range(len(shards))), deque(self._ready)
        busy = dict[Any, tuple[Any, tuple[int, int]]]()
        while waiting or busy:
            while waiting and idle:
                actor, attempt = idle.popleft(), waiting.popleft()
                busy[actor.work.remote(shared, attempt[0], shards[attempt[0]])] = actor, attempt
            future = _first([*busy, *self._opening])
            if future in self._opening:
                idle.extend(self._joined(future))
                continue
            actor, (shard, tries) = busy.pop(future)
            try:
                found = ray.get(future)
            except LOST as error:
                if lost := self._lost(actor, shard, tries, error):
                    yield Ended(shard=shard, outcome=lost)
                else:
                    waiting.append((shard, tries + 1))
                continue
            except RayError as error:  # the task, or what it found, cannot be sent
                found = Fault.of(WorkFailedError(f"shard {shard}: {_line(error)}"))
            idle.append(actor)
            yield Ended(shard=shard, outcome=found.error if isinstance(found, Fault) else found)

    def _tell_of_room(self) -> None:
        """Ray waits for nodes that may never come, and says nothing."""
        if lacking := lacking_for(self._settings, self._settings.workers):
            self._told(f"{lacking}; those without room wait for it")

    def _lost(self, actor: Any, shard: int, tries: int, error: Exception) -> WorkerLostError | None:
        """Replaces a worker that is gone. None: another one takes its shard."""
        ray.kill(actor)  # cut off, it may be alive
        self._ready.remove(actor)
        self._start()
        why = f"shard {shard}: its worker died ({_line(error)})"
        if tries == _TRIES:
            return WorkerLostError(f"{why}, as did the one before; try it alone")
        self._retried += 1
        self._told(f"{why}; another one takes it")
        return None

    def _joined(self, future: Any) -> list[Any]:
        """One that has opened, if it can work. Raises why it cannot, where no other worker is left."""
        if error := self._has_opened(future):
            if not len(self):
                raise error
            self._told(f"a worker could not be opened ({_line(error)}); {len(self)} go on")
            return []
        return self._ready[-1:]

    def _has_opened(self, future: Any) -> ErrataError | None:
        """Takes in a worker that has opened what it needs; or drops it, and says why it cannot work."""
        actor = self._opening.pop(future)
        try:
            fault: Fault | None = ray.get(future)
        except RayError as error:
            ray.kill(actor)
            return WorkerLostError(f"a worker died while it opened what it needs: {_line(error)}")
        if fault is None:
            self._ready.append(actor)
            return None
        ray.kill(actor)
        return fault.error

    def _start(self) -> None:
        settings = self._settings
        made = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus)(Worker)
        actor: Any = made.remote(hide_gpus=not settings.gpus)
        self._opening[actor.open.remote(self._opened)] = actor


def lacking_for(settings: WorkerSettings, workers: int) -> str:
    """What the cluster would lack for so many workers if nobody else used it; empty: nothing."""
    there = ray.cluster_resources()
    for name, each in (("CPU", settings.cpus), ("GPU", settings.gpus)):
        if (needed := each * workers) > (has := there.get(name, 0.0)):
            counted = "1 worker needs" if workers == 1 else f"{workers} workers need"
            return f"{counted} {needed:g} {name}, and the cluster has {has:g}"
    return ""


def shared_folder(folder: Path) -> Path:
    """What workers open that write into a folder. Raises ClusterError where it is not there."""
    if not folder.is_dir():
        raise ClusterError(f"{str(folder)!r} is not there on {gethostname()!r}; give a folder that all nodes share")
    return folder


def fault_of_gpus(gpus: float) -> str:
    """Why Ray cannot place a process with so many GPUs; empty where it can. It would wait without a word, or raise."""
    if gpus > 1 and gpus % 1:
        return f"gpus is {gpus:g}; give a part of one, or whole ones"
    if 0 < gpus < _LEAST_GPU:
        return f"gpus is {gpus:g}; give 0, or at least {_LEAST_GPU:g}"
    return ""


def _tried(what: str, made: Callable[[], R]) -> R | Fault:
    try:
        return made()
    except ErrataError as error:
        return Fault.of(error)
    except Exception as error:
        _log.exception("%s", what)
        said = f"{what}: {type(error).__name__}: {_line(error)}; the worker's log has the rest"
        return Fault.of(WorkFailedError(said))


def _first(futures: Iterable[Any]) -> Any:
    """One that has ended; waits for it."""
    return ray.wait(list(futures))[0][0]


def _line(error: Exception) -> str:
    said = error.cause if isinstance(error, RayTaskError) else error  # its own text is a traceback
    return " ".join(str(said).split())[:300]
