"""A comparison: several ways to the same numbers, checked to be equal, then timed side by side.

The first way of a case is Errata's. Each way runs once in a forked process of its own, whose peak of resident memory
above the loaded model is its memory, and whose numbers are compared; that is the first round. Only then are all ways
timed again, in further rounds, each beginning with another. A way too slow to run wholly does a known share of the
work, and its seconds are divided by that share; equality is then asserted on what it did. Times are CPU seconds of one
thread, so that a busy machine's other work does not count.
"""

import ctypes
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to do the work. `run` does `share` of it and returns what it found.

    `of_ours` picks the same numbers out of Errata's; `goal` is how many times faster Errata is to be, 0 for none.
    """

    name: str
    run: Callable[[], Numbers]
    share: float = 1.0
    of_ours: Callable[[Numbers], Numbers] = field(default=lambda ours: ours)
    goal: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Ways to the same numbers, Errata's first.

    `tolerance` is relative to the largest number, `rounds` the most to time. `figures` are what else is told, and
    `figures_of` what is told of Errata's numbers. Of cases that show how a cost grows, `axis` is by what and `size`
    where on it.
    """

    name: str
    about: str
    ways: Sequence[Way]
    tolerance: float = 1e-4
    rounds: int = 5
    axis: str = ""
    size: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    figures_of: Callable[[Numbers], Mapping[str, float]] = field(default=lambda ours: {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Seconds of the whole work in each round, and the peak of memory above the loaded model."""

    name: str
    seconds: list[float]
    peak_bytes: int
    share: float
    goal: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a case measured."""

    name: str
    about: str
    ways: list[Timed]
    figures: dict[str, float] = field(default_factory=dict)
    axis: str = ""
    size: int = 0

    def ratios(self, way: Timed) -> list[float]:
        """How many times faster Errata was, round by round."""
        return [theirs / ours for theirs, ours in zip(way.seconds, self.ways[0].seconds, strict=True)]


def measured(case: Case, rounds: int) -> Result:
    """Compares the ways' numbers, then times them. Raises AssertionError where numbers differ."""
    outcomes = [_alone(way.run) for way in case.ways]
    ours = outcomes[0][0]
    errors = [_difference(way.of_ours(ours), found) for way, (found, *_) in zip(case.ways, outcomes, strict=True)]
    for way, error in zip(case.ways, errors, strict=True):
        assert error <= case.tolerance, f"{case.name}: {way.name} finds other numbers, by {error:.1e} of the largest"
    seconds = [[first / way.share] for way, (*_, first) in zip(case.ways, outcomes, strict=True)]
    for n in range(1, rounds):
        order = list(range(len(case.ways)))
        for i in order[n % len(order) :] + order[: n % len(order)]:
            seconds[i].append(_seconds(case.ways[i].run) / case.ways[i].share)
    return Result(
        name=case.name,
        about=case.about,
        figures={**case.figures, **case.figures_of(ours)},
        axis=case.axis,
        size=case.size,
        ways=[
            Timed(name=w.name, seconds=s, peak_bytes=peak, share=w.share, goal=w.goal, error=e)
            for w, s, e, (_, peak, _) in zip(case.ways, seconds, errors, outcomes, strict=True)
        ],
    )


def _difference(ours: Numbers, theirs: Numbers) -> float:
    """The largest difference, relative to the largest number."""
    assert ours.shape == theirs.shape, f"{ours.shape} numbers against {theirs.shape}"
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def _seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def _alone(run: Callable[[], Numbers]) -> tuple[Numbers, int, float]:
    """What a run finds in a process of its own, by how many bytes its memory grows at the peak, and its seconds."""
    # What its parent has freed and kept would hide what a run takes.
    ctypes.CDLL(None).malloc_trim(0)

    def work() -> tuple[Numbers, int, float]:
        before, began = _peak_bytes(), time.process_time()  # of a fork: what it has of its parent
        found = run()
        return found, _peak_bytes() - before, time.process_time() - began

    return forked(work)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forked(work: Callable[[], T]) -> T:
    """What `work` returns in a forked process, which takes its memory with it. Raises RuntimeError where it fails."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(work, there))
    process.start()
    there.close()
    try:
        result: T = here.recv()
    except EOFError:
        raise RuntimeError("a forked measurement failed; its error stands above") from None
    finally:
        process.join()
    return result


def _answer(work: Callable[[], Any], there: Connection) -> None:
    there.send(work())
    there.close()


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


@contextmanager
def hooked(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While open, the module's output passes through `change`: how a plain way puts a state back."""

    def hook(_module: object, _args: object, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
