"""Files that are whole or not there, whoever writes them, however it ends."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from errata.editor.caching import digest_of, write_whole


def _write_for_ever(path: Path) -> None:
    for n in range(10**9):
        write_whole(path, {"keys": torch.full((200_000,), float(n))}, {})


def _whole(path: Path) -> bool:
    return len(load_file(path)["keys"].unique()) == 1


def test_a_writer_that_is_killed_leaves_the_last_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys.safetensors"
    for _ in range(3):
        path.unlink(missing_ok=True)
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(path,))
        writer.start()
        while not path.exists():
            assert writer.is_alive()
        writer.kill()
        writer.join()
        assert _whole(path)


def test_many_threads_write_one_file_and_whoever_reads_it_finds_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "keys.safetensors"

    def write(n: int) -> bool:
        write_whole(path, {"keys": torch.full((10_000,), float(n))}, {})
        return _whole(path)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write, range(64)))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.safetensors"
    write_whole(path, {"keys": torch.ones(3)}, {})
    with pytest.raises((ValueError, SafetensorError)):
        write_whole(path, {"keys": torch.ones(3).expand(4, 3).T}, {})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load_file(path)["keys"].equal(torch.ones(3))


def test_a_digest_knows_where_its_parts_end_and_in_which_order_they_stand() -> None:
    said = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("abc",), ("abc", "")]
    assert len({digest_of(parts) for parts in said}) == len(said)
    assert digest_of(["é", b"\xff"]) == digest_of(["é".encode(), b"\xff"])
