"""Batches larger than memory are split, not crashed: how many rows fit, and what to do where not even one does.

On the CPU, where a process that takes too much is killed, rows are estimated before they run; on an accelerator a part
that runs out of memory is run again in halves as well. Knows nothing about what rows are.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from errata.editor.errors import MemoryLimitError

Row = TypeVar("Row")
Batch = TypeVar("Batch")
Found = TypeVar("Found")

_SHARE = 0.8
"""Of the free memory that an estimate may fill."""


_ADVICE = "give a smaller picture or a shorter prompt, fewer requests at once, or a device with more memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of a device. `free` says how many bytes may still be taken; None where that cannot be known."""

    free: Callable[[], int | None] = field(default=lambda: free_bytes(torch.device("cpu")))

    @classmethod
    def of(cls, device: torch.device) -> "Memory":
        """What is really there."""
        return cls(free=lambda: free_bytes(device))

    def rows(self, most: int, row_bytes: int) -> int:
        """How many rows of so many bytes each run at once, at most `most`. Raises MemoryLimitError where none fits."""
        free = self.free()
        if free is None or row_bytes <= 0:
            return most
        fitting = int(_SHARE * free // row_bytes)
        if fitting < 1:
            raise MemoryLimitError(
                f"one row takes about {_told(row_bytes)}, and {_told(free)} are free; {_ADVICE}", field="max_rows"
            )
        return min(most, fitting)

    def holds(self, n: int) -> bool:
        """Whether so many bytes fit, as far as can be known."""
        free = self.free()
        return free is None or n <= _SHARE * free

    def parts(
        self, run: Callable[[Sequence[Row]], Found], rows: Sequence[Row], *, most: int, row_bytes: int = 0
    ) -> list[Found]:
        """What `run` finds of the rows, part by part, each as large as fits; it must be repeatable on fewer rows.

        Raises MemoryLimitError where a single row does not fit.
        """
        if not rows:
            return []
        size, done, found = self.rows(most, row_bytes), 0, []
        while done < len(rows):
            batch = rows[done : done + size]
            fitted = self.fit(run, batch, _halves)
            found += [one for _, one in fitted]
            done += len(batch)
            if len(fitted) > 1:
                size = max(len(part) for part, _ in fitted)
        return found

    def fit(
        self, run: Callable[[Batch], Found], batch: Batch, halves: Callable[[Batch], Sequence[Batch]]
    ) -> list[tuple[Batch, Found]]:
        """What `run` finds of a batch, or of its halves, and so on, where it runs out of memory.

        `run` must be repeatable after a failure. Raises MemoryLimitError where what runs out has but one half.
        """
        try:
            return [(batch, run(batch))]
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            told = str(error).partition("\n")[0].partition(". ")[0] or "the system gives no more"
        parts = halves(batch)
        if len(parts) < 2:
            raise MemoryLimitError(f"one row does not fit in memory ({told}); {_ADVICE}", field="max_rows")
        # Outside of the except clause, which would keep the failed run's tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [found for part in parts for found in self.fit(run, part, halves)]


def _halves(rows: Sequence[Row]) -> Sequence[Sequence[Row]]:
    half = len(rows) // 2
    return [part for part in (rows[:half], rows[half:]) if part]


def _out_of_memory(error: Exception) -> bool:
    """Accelerators raise a class of their own, Python and NumPy another; the CPU's allocator says so in words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _told(n: int) -> str:
    return f"{n / 1e9:,.2f} GB" if n >= 1e7 else f"{n / 1e6:,.2f} MB"


def free_bytes(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device: by the system's own account, and by its control group's."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return None
    known = [n for n in (_of_the_system(), *_of_the_groups()) if n is not None]
    # A group that was given less than it has taken has nothing left, and no less than that.
    return max(0, min(known)) if known else None


def _of_the_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        names = os.sysconf_names
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in names else None


def _of_the_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int | None]:
    """What the process's control group leaves, and each above it, in either version of their files; page caches that
    can be dropped count as free. In a container the root is the group itself.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    # Of the second version's one tree, and of the first's tree for memory.
    second = next((path for number, kinds, path in lines if number == "0" and not kinds), "/")
    first = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), "/")
    for folder in _up(root, second):
        yield _left(folder / "memory.max", folder / "memory.current", "inactive_file")
    for folder in _up(root / "memory", first):
        yield _left(folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes", "total_inactive_file")


def _up(root: Path, path: str) -> Iterator[Path]:
    """The folder of a group, those above it, and the root."""
    parts = [part for part in path.split("/") if part]
    return (root.joinpath(*parts[:n]) for n in range(len(parts), -1, -1))


def _left(limit: Path, used: Path, inactive: str) -> int | None:
    try:
        stat = dict(line.split() for line in (used.parent / "memory.stat").read_text(encoding="ascii").splitlines())
        return int(limit.read_text()) - int(used.read_text()) + int(stat.get(inactive, 0))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None
