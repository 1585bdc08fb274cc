"""The README's examples, run as they stand there."""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.slow


def run(code: str) -> list[str]:
    """What the code prints, line by line."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue().split("\n")[:-1]


def promised(code: str) -> list[str]:
    """What its comments say it prints."""
    return re.findall(r"print\(.*\)  # (.*)", code)


def example(heading: str) -> str:
    (code,) = re.findall(rf"## {heading}\n.*?```python\n(.*?)```", _README, re.DOTALL)
    return str(code)


def test_the_editors_example_prints_what_its_comments_say() -> None:
    code = example("Use the editor alone")
    assert promised(code)
    assert run(code) == promised(code)


def test_the_servers_example_prints_what_its_comments_say(tmp_path: Path) -> None:
    code = example("Serve it")
    assert promised(code)
    command = [sys.executable, "-m", "errata.server", "--data-dir", str(tmp_path / "data"), "--port", "0"]
    environment = {**os.environ, "ERRATA_MLFLOW_URI": "none"}  # the example asks MLflow nothing
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert server.stdout
        address = next(json.loads(line)["address"] for line in server.stdout if line.startswith("{"))
        assert run(code.replace("localhost:50051", address)) == promised(code)
    finally:
        server.terminate()
        server.communicate(timeout=120)
    assert server.returncode == 0


def test_its_tables_of_methods_are_the_figures_that_were_measured() -> None:
    folder = Path(__file__).parent.parent / "benchmarks"
    spec = importlib.util.spec_from_file_location("methods", folder / "methods.py")
    assert spec is not None
    assert spec.loader is not None
    methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(methods)
    figures = json.loads((folder / "results" / "methods.json").read_text(encoding="utf-8"))
    rows = [methods.markdown(by_seed, method) for method, by_seed in figures["batch"].items()]
    rows.append(methods.markdown(figures["single"]["memit"], "memit, a request"))
    rows.append(methods.markdown(figures["lone fact"]["memit"], "memit, a fact"))
    assert not [row for row in rows if row not in _README]
