"""A thousand edits in the short form, on a tiny world: that it runs, resumes and tells what it should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def ran(tmp_path: Path) -> str:
    command = [sys.executable, "benchmarks/long_sequence.py", "--quick", "--folder", str(tmp_path / "almanac")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=FOLDER.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_short_form_measures_every_method_and_keeps_what_was_measured(tmp_path: Path) -> None:
    ran(tmp_path)
    path = tmp_path / "sequence-quick.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["quick"]
    kinds = {(c["method"], c["held"], c["batch"]) for c in found["cells"].values()}
    sequences = {("multedit", 0, 0)} | {(m, held, 0) for m in ("memit", "alphaedit") for held in (0, 256)}
    assert kinds == sequences | {(m, 0, 10) for m in ("multedit", "memit", "alphaedit")}
    for cell in found["cells"].values():
        last = cell["along"][-1]
        assert last["edits"] == 3
        assert 0 < last["rank"] <= last["sum of ranks"]
        assert last["norm"] > 0
        assert not last["failed"]
    assert (tmp_path / "sequence-quick.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "sequence-quick.svg").read_text(encoding="utf-8")
    assert "sequence-held-256-seed-1: {" not in ran(tmp_path)  # no cell is measured again
    assert json.loads(path.read_text(encoding="utf-8")) == found
