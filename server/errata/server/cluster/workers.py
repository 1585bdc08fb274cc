"""Workers: processes of a cluster that each hold something costly, a model mostly, and take one shard after another.

A worker that dies is replaced, and its shard is given to another one, once: what kills two workers is at fault itself.
Every shard ends exactly once, with its result, its own error, or WorkerLostError. Imports no model.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ActorDiedError, RayActorError
from ray.util import ActorPool

from errata.editor.errors import ErrataError, InvalidInputError
from errata.server.cluster.errors import ClusterError, Fault, WorkerLostError

M = TypeVar("M")
S = TypeVar("S")
R = TypeVar("R")

_TRIES = 2
"""Workers that a shard may cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """How many workers, and what each has to itself: cores, of which Ray tells torch, and GPUs, also parts of one."""

    workers: int
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("cpus", 1), ("gpus", 0)):
            if (value := getattr(self, name)) < least:
                raise InvalidInputError(f"{name} is {value}; give at least {least}", field=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Generic[R]):
    """How a shard ended: its place in the sequence, and its result or what went wrong."""

    shard: int
    outcome: R | ErrataError


class Worker(Generic[M]):
    """What runs in a worker's process. Errors raised on purpose are handed back, so that their worker lives on."""

    def __init__(self, opened: Callable[[], M]) -> None:
        self._held: M | Fault = _tried(opened)

    def fault(self) -> Fault | None:
        """Why it cannot work; waits until that is known."""
        return self._held if isinstance(self._held, Fault) else None

    def work(self, task: Callable[[M, S], R], shard: int, given: S) -> tuple[int, R | Fault]:
        """One shard, with its place."""
        held = self._held
        return shard, held if isinstance(held, Fault) else _tried(lambda: task(held, given))


class Workers(Generic[M]):
    """So many workers, each with what `opened` gives; as a `with`, inside `connected`, for one thread.

    `opened` and tasks travel by cloudpickle. `told` is called with a line for people where a worker died, and where the
    cluster has too little room: they wait for it. Raises the error that `opened` raised in any of them,
    WorkerLostError where one died of it.
    """

    def __init__(
        self,
        opened: Callable[[], M],
        settings: WorkerSettings,
        *,
        told: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self._opened, self._settings, self._told = opened, settings, told
        # Ray's handles are typed by the class they are made from, which is generic here.
        self._actors: dict[str, Any] = {}
        self._retried = 0

    def __enter__(self) -> "Workers[M]":
        self._tell_of_room()
        made = [self._start() for _ in range(self._settings.workers)]
        try:
            for fault in ray.get([actor.fault.remote() for actor in made]):
                if fault is not None:
                    raise fault.error
        except BaseException as error:
            self.__exit__()
            if isinstance(error, RayActorError):
                raise WorkerLostError(f"a worker died while it opened its model: {_line(error)}") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    def __len__(self) -> int:
        return self._settings.workers

    @property
    def retried(self) -> int:
        """Shards that were given to a second worker so far."""
        return self._retried

    def map(self, task: Callable[[M, S], R], shards: Sequence[S]) -> Iterator[Ended[R]]:
        """Each shard's end, as they come. `task` runs in a worker, with what that holds and the shard."""
        shared = ray.put(task)  # once for all shards: a task may bring deltas along
        pool: Any = ActorPool(list(self._actors.values()))
        waiting, at = deque((shard, 1) for shard in range(len(shards))), dict[str, tuple[int, int]]()

        def begin(actor: Any, attempt: tuple[int, int]) -> Any:
            at[_id(actor)] = attempt
            return actor.work.remote(shared, attempt[0], shards[attempt[0]])

        while waiting or pool.has_next():
            # No more than there are idle workers: what the pool queues itself would go to one that has just died.
            while waiting and pool.has_free():
                pool.submit(begin, waiting.popleft())
            try:
                shard, found = pool.get_next_unordered()
            except RayActorError as error:
                shard, tries = at.pop(self._replace(error, pool))
                why = f"shard {shard}: its worker died ({_line(error)})"
                if tries == _TRIES:
                    yield Ended(shard=shard, outcome=WorkerLostError(f"{why}, as did the one before; try it alone"))
                    continue
                self._retried += 1
                self._told(f"{why}; another one takes it")
                waiting.append((shard, tries + 1))
            else:
                yield Ended(shard=shard, outcome=found.error if isinstance(found, Fault) else found)

    def _tell_of_room(self) -> None:
        """Ray waits for nodes that may never come, and says nothing."""
        settings, there = self._settings, ray.cluster_resources()
        for name, each in (("CPU", settings.cpus), ("GPU", settings.gpus)):
            if (needed := each * settings.workers) > (has := there.get(name, 0.0)):
                self._told(
                    f"{settings.workers} workers need {needed:g} {name}s, and the cluster has {has:g}; they wait"
                )

    def _replace(self, error: RayActorError, pool: Any) -> str:
        """Puts a new worker into the pool for one that is gone; that one's id."""
        if not isinstance(error, ActorDiedError):  # cut off, perhaps alive: the pool has it back as its last one
            ray.kill(pool.pop_idle())
        gone = str(error.actor_id)
        del self._actors[gone]
        pool.push(self._start())
        return gone

    def _start(self) -> Any:
        settings = self._settings
        made = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus)(Worker)
        actor: Any = made.remote(self._opened)
        self._actors[_id(actor)] = actor
        return actor


def shared_folder(folder: Path) -> Path:
    """What workers open that write into a folder. Raises ClusterError where it is not there."""
    if not folder.is_dir():
        raise ClusterError(f"{str(folder)!r} is not there on {gethostname()!r}; give a folder that all nodes share")
    return folder


def _tried(made: Callable[[], R]) -> R | Fault:
    try:
        return made()
    except ErrataError as error:
        return Fault.of(error)


def _id(actor: Any) -> str:
    return str(actor._ray_actor_id.hex())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
