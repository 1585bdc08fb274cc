"""The comparisons of `make bench` run, in their short form, and compare the numbers before they tell a time."""

import importlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("measure")


@pytest.mark.slow
def test_the_short_form_measures_every_way_of_every_group(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/bench.py", "--quick", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=FOLDER.parent, env=_environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    whole = json.loads((tmp_path / "bench-quick.json").read_text(encoding="utf-8"))
    assert whole["quick"]
    groups = whole["groups"]
    assert set(groups) == {"tracing", "noise", "values", "solving", "versions", "probes", "mixed", "growth"}
    for result in (r for results in groups.values() for r in results.values()):
        assert len(result["ways"]) > 1
        assert all(way["seconds"] for way in result["ways"])
        assert result["name"] in ran.stdout
    assert {r["axis"] for r in groups["growth"].values()} == {"layers", "tokens of the image", "tokens traced"}
    assert (tmp_path / "growth-quick.png").read_bytes().startswith(b"\x89PNG")


def test_ways_that_find_other_numbers_are_not_timed(measure: ModuleType) -> None:
    timed: list[float] = []

    def found(last: float) -> np.ndarray:
        timed.append(last)
        return np.array([1.0, last])

    right = measure.Way(name="right", run=partial(found, 2.0))
    wrong = measure.Way(name="wrong", run=partial(found, 2.1))
    with pytest.raises(AssertionError, match="wrong finds other numbers"):
        measure.measured(measure.Case(name="sum", about="", ways=[right, wrong]), rounds=1)
    assert not timed  # the numbers were found in processes of their own


def test_what_is_told_of_the_numbers_is_told_of_erratas(measure: ModuleType) -> None:
    ways = [measure.Way(name=name, run=lambda: np.array([3.0, 4.0])) for name in ("ours", "plain")]
    case = measure.Case(name="sum", about="", ways=ways, figures={"a": 1.0}, figures_of=lambda n: {"sum": n.sum()})
    assert measure.measured(case, rounds=1).figures == {"a": 1.0, "sum": 7.0}


def test_the_tables_of_speed_are_the_figures_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    claims = importlib.import_module("claims")
    figures = json.loads((FOLDER / "results" / "bench.json").read_text(encoding="utf-8"))
    table = claims.table(figures["groups"])
    assert len(table) > 20
    assert "\n".join(table) in (FOLDER / "README.md").read_text(encoding="utf-8")
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    _, marked, rest = readme.partition("<!-- speed -->\n")
    if marked:
        assert set(rest.partition("<!-- /speed -->")[0].strip().split("\n")) <= set(table)


def test_a_way_that_does_a_share_is_compared_on_it_and_timed_for_the_whole(measure: ModuleType) -> None:
    ours = measure.Way(name="ours", run=lambda: np.arange(4.0))
    plain = measure.Way(name="plain", run=_half, share=0.5, of_ours=lambda found: found[:2])
    result = measure.measured(measure.Case(name="count", about="", ways=[ours, plain]), rounds=3)
    whole, share = result.ways[1].seconds, 0.5
    assert len(whole) == 3  # the run whose numbers are compared is one of them
    assert result.ratios(result.ways[1]) == [
        theirs / mine for theirs, mine in zip(whole, result.ways[0].seconds, strict=True)
    ]
    assert min(whole) >= 0.01 / share


def test_the_memory_of_a_way_is_what_it_takes_above_its_parent(measure: ModuleType) -> None:
    held = np.ones(25_000_000)
    result = measure.measured(
        measure.Case(
            name="memory",
            about="",
            ways=[
                measure.Way(name="none", run=lambda: held[:1]),
                measure.Way(name="100 MB", run=lambda: (held[:12_500_000] + 1)[:1] - 1),
            ],
        ),
        rounds=1,
    )
    none, much = (way.peak_bytes for way in result.ways)
    assert much - none == pytest.approx(100e6, rel=0.2)


def _half() -> np.ndarray:
    """Half of the numbers, in 10 ms of the processor's time."""
    began = time.process_time()
    while time.process_time() - began < 0.01:
        pass
    return np.arange(2.0)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
