"""Batches larger than memory are split, not crashed (module `memory`)."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from errata.editor.errors import MemoryLimitError
from errata.editor.memory import Memory, _of_the_groups, free_bytes


class Allocator:
    """Runs out of memory on more rows than it holds, as an accelerator does."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.ran: list[int] = []

    def run(self, rows: Sequence[int]) -> int:
        if len(rows) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        self.ran.append(len(rows))
        return sum(rows)


@pytest.mark.parametrize(("free", "expected"), [(None, 8), (10_000, 8), (500, 4), (130, 1)])
def test_as_many_rows_run_at_once_as_are_estimated_to_fit(free: int | None, expected: int) -> None:
    assert Memory(free=lambda: free).rows(8, 100) == expected


def test_a_row_that_does_not_fit_is_refused_with_the_limit_and_what_to_do() -> None:
    with pytest.raises(MemoryLimitError, match=r"one row takes about 3\.00 GB, and 2\.00 GB are free; give a smaller"):
        Memory(free=lambda: 2_000_000_000).rows(8, 3_000_000_000)


@pytest.mark.parametrize(("holds", "most"), [(1, 1), (2, 2), (3, 3), (5, 3), (99, 6)])
def test_rows_that_run_out_of_memory_are_run_again_in_halves(holds: int, most: int) -> None:
    allocator = Allocator(holds)
    found = Memory(free=lambda: None).parts(allocator.run, list(range(13)), most=6)
    assert sum(found) == sum(range(13))
    assert sum(allocator.ran) == 13
    assert max(allocator.ran) == most


def test_what_ran_out_of_memory_once_is_not_tried_again() -> None:
    allocator = Allocator(3)
    failed: list[int] = []

    def run(rows: Sequence[int]) -> int:
        try:
            return allocator.run(rows)
        except torch.OutOfMemoryError:
            failed.append(len(rows))
            raise

    Memory(free=lambda: None).parts(run, list(range(60)), most=12)
    assert failed == [12, 6, 6]


def test_a_row_that_runs_out_of_memory_alone_is_refused() -> None:
    with pytest.raises(MemoryLimitError, match=r"one row does not fit in memory \(CUDA out of memory\); give"):
        Memory(free=lambda: None).parts(Allocator(0).run, [1, 2], most=2)


def test_what_python_itself_cannot_take_is_a_lack_of_memory_too() -> None:
    """As NumPy and C++'s `bad_alloc` say it, often without a word."""

    def run(rows: Sequence[int]) -> int:
        if len(rows) > 2:
            raise MemoryError
        return sum(rows)

    assert sum(Memory(free=lambda: None).parts(run, list(range(13)), most=6)) == sum(range(13))
    with pytest.raises(MemoryLimitError, match=r"one row does not fit in memory \(the system gives no more\)"):
        Memory(free=lambda: None).fit(run, [1, 2, 3], lambda rows: [rows])


def test_nothing_always_fits() -> None:
    assert Memory(free=lambda: 0).parts(Allocator(0).run, [], most=2, row_bytes=10) == []


def test_other_failures_are_not_taken_for_a_lack_of_memory() -> None:
    def fail(_: Sequence[int]) -> int:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Memory(free=lambda: None).parts(fail, [1, 2], most=2)


def test_what_is_free_is_known_here_and_is_less_than_all() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 1 << 50
    assert free_bytes(torch.device("meta")) is None


def _group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


SECOND = ("memory.max", "memory.current", "inactive_file")
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_a_service_is_bound_by_its_own_group_and_by_those_above_it(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/errata.slice/errata.service\n")
    _group(tmp_path / "errata.slice" / "errata.service", SECOND, "max", 100, 0)
    _group(tmp_path / "errata.slice", SECOND, "1000", 400, 50)
    assert [n for n in _of_the_groups(tmp_path, own) if n is not None] == [650]
    _group(tmp_path / "errata.slice" / "errata.service", SECOND, "300", 100, 0)
    assert [n for n in _of_the_groups(tmp_path, own) if n is not None] == [200, 650]


def test_in_a_container_the_root_is_the_group_in_either_version(tmp_path: Path) -> None:
    _group(tmp_path, SECOND, "1000", 400, 50)
    _group(tmp_path / "memory", FIRST, "2000", 400, 50)
    found = _of_the_groups(tmp_path, tmp_path / "no such file")
    assert [n for n in found if n is not None] == [650, 1650]
    own = tmp_path / "cgroup"
    own.write_text("12:memory:/docker/1\n11:cpu,cpuacct:/docker/1\n")
    _group(tmp_path / "memory" / "docker" / "1", FIRST, "700", 400, 50)
    assert [n for n in _of_the_groups(tmp_path, own) if n is not None] == [650, 350, 1650]
