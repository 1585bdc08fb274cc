"""The example in `examples/ci` fits the command line and the files it names."""

import shlex
from pathlib import Path

import pytest
import yaml

from errata.client.check.format import load_checks
from errata.client.cli import main

ROOT = Path(__file__).parents[3]
JOBS = yaml.safe_load((ROOT / "examples/ci/workflow.yml").read_text(encoding="utf-8"))["jobs"]
COMMANDS = [
    step["run"] for job in JOBS.values() for step in job["steps"] if step.get("run", "").startswith("errata check")
]


def test_the_checks_guard_the_corrections_and_much_else() -> None:
    checks = load_checks(ROOT / "examples/ci/atlas.errata.yaml")
    assert len(checks.probes) >= 20
    assert sum("errata" in probe.tags for probe in checks.probes) == 10
    assert sum(probe.unchanged for probe in checks.probes) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_the_workflows_commands_are_ones_that_there_are(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    assert program == "errata"
    assert (ROOT / arguments[1]).is_file()
    # Options are read before help is given, so one that there is not is refused.
    assert main([*arguments, "--help"]) == 0
    assert main([*arguments, "--no-such-option", "--help"]) == 2
