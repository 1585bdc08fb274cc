"""Versions mixed in one batch, as `serving.py` measures them in a process of its own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import Result, Timed


def results(quick: bool) -> Iterator[Result]:
    """A batch of each number of versions against the base alone and PEFT's adapters; times are decoding steps."""
    script = Path(__file__).with_name("serving.py")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--cpu-time", "--out", folder, *(["--quick"] if quick else ["--rounds", "2"])]
        ran = subprocess.run([sys.executable, str(script), *options], check=False, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"serving.py failed:\n{ran.stdout}{ran.stderr}")
        found = json.loads(next(Path(folder).glob("*.json")).read_text(encoding="utf-8"))
    seconds: dict[str, list[float]] = found["step_seconds"]
    for name in (n for n in seconds if n.endswith("mixed")):
        others = [n for n in seconds if not n.endswith("mixed")]
        yield Result(
            name=f"generation, {name}",
            about=f"a decoding step of {found['rows']} rows, {found['parameters'] / 1e6:.0f} M parameters, rank "
            f"{found['rank']} at {found['edited']} layers",
            ways=[
                Timed(
                    name="Errata" if n == name else n,
                    seconds=seconds[n],
                    peak_bytes=0,
                    share=1.0,
                    goal=0.9 if n == "base alone" else 0.0,
                    error=0.0,
                )
                for n in (name, *others)
            ],
        )
