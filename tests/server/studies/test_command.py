"""The command, in processes of its own: killed at any moment it leaves no process behind, and goes on later."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from desk import ENTRY, FLOWS, LENS, Desk
from typer.testing import CliRunner

from errata.client.cli import main
from errata.client.cli.local import _study_status
from errata.server.studies.command import studies
from errata.server.studies.plan import UnreadableError, planned

_SECONDS = 120


def command(desk: Desk, *arguments: str) -> "subprocess.Popen[str]":
    called = [sys.executable, "-m", "errata.server", "study", *arguments, str(desk.file), "--out", str(desk.out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        called, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ends(pidfd: int) -> bool:
    """Whether a process ends in time."""
    return bool(select.select([pidfd], [], [], _SECONDS)[0])


def stopped(desk: Desk, stop: Callable[[int], None]) -> tuple[int, str]:
    """Runs the study with two processes, stops it when its first cell is finished; its exit code and last words."""
    running = command(desk, "run", "--jobs", "2")
    assert running.stderr is not None
    for line in running.stderr:
        if " · " in line:
            break
    workers = [os.pidfd_open(pid) for pid in children(running.pid)]
    stop(running.pid)
    _, said = running.communicate(timeout=_SECONDS)
    assert len(workers) >= 2
    assert all(map(ends, workers))
    return running.returncode, said


@pytest.mark.slow
def test_a_study_that_is_killed_or_interrupted_goes_on_where_it_was(desk: Desk) -> None:
    data = {str(n): {"path": "flags", "n": n} for n in (1, 2)}
    desk.write(ENTRY, data=data, seeds=[0, 1])
    code, _ = stopped(desk, lambda pid: os.kill(pid, signal.SIGKILL))
    assert code == -signal.SIGKILL
    killed = desk.finished()
    assert 1 <= sum(killed.values()) < len(killed) == 8
    code, said = stopped(desk, lambda pid: os.killpg(pid, signal.SIGINT))
    assert code == 130
    assert "the same command goes on" in said
    interrupted = desk.finished()
    assert sum(killed.values()) < sum(interrupted.values())
    last = CliRunner().invoke(studies, ["run", str(desk.file), "--out", str(desk.out)])
    report = json.loads(last.stdout)
    assert (last.exit_code, report["failed"]) == (0, {})
    assert report["earlier"] == sum(interrupted.values())
    assert report["earlier"] + report["measured"] == 8
    assert len(desk.runs()) == 9


def test_as_json_faults_and_plans_are_one_document_each(desk: Desk) -> None:
    asked = ["plan", str(desk.file), "--out", str(desk.out), "--json"]
    planned = CliRunner().invoke(studies, asked)
    assert planned.exit_code == 0
    assert json.loads(planned.stdout) == {"cells": [{"cell": cell, "finished": False} for cell in (LENS, FLOWS)]}
    desk.write({**ENTRY, "measurement": {}})
    refused = CliRunner().invoke(studies, asked)
    assert refused.exit_code == 1
    error = json.loads(refused.stdout)["error"]
    assert error["reason"] == "INVALID_STUDY"
    assert error["message"] in refused.stderr


def test_a_study_that_cannot_be_run_as_it_is_asked_for_leaves_no_folder(desk: Desk) -> None:
    out = desk.root / "new"
    asked = ["run", str(desk.file), "--out", str(out), "--json"]
    refused = CliRunner().invoke(studies, [*asked, "--gpus", "1"])
    assert refused.exit_code == 1
    assert "--gpus is for --cluster" in json.loads(refused.stdout)["error"]["message"]
    desk.write({**ENTRY, "measurement": {}})
    assert CliRunner().invoke(studies, asked).exit_code == 1
    assert not out.exists()


def test_cells_know_their_folder_from_everywhere(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [cell for cell, _ in planned(desk.file, desk.out)]
    monkeypatch.chdir(desk.root)
    here = [cell for cell, _ in planned(Path(desk.file.name), desk.out)]
    assert [cell.folder for cell in here] == [desk.root] * 2
    assert [cell.id for cell in here] == [cell.id for cell in before]


def test_a_models_folder_that_is_missing_is_the_studys_fault(desk: Desk) -> None:
    desk.write(ENTRY, models={"one": {"source": str(desk.root / "gone")}})
    with pytest.raises(UnreadableError, match=r"models\.one: "):
        planned(desk.file, desk.out)


def test_the_clients_command_ends_with_two_where_nothing_was_run(desk: Desk) -> None:
    assert main(["study", "run", str(desk.file), "--out", str(desk.out), "--gpus", "1"]) == 2
    assert [_study_status(status, failed=False) for status in (1, 2, 130)] == [2, 2, 130]


@pytest.mark.slow
def test_the_clients_command_ends_with_one_where_cells_failed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    desk.write(ENTRY, measurements={"windows": {"kind": "windows"}})  # its questions say nothing that corrupts them
    asked = ["study", "run", str(desk.file), "--out", str(desk.out)]
    assert main(asked) == 1
    assert list(desk.finished().values()) == [False]


@pytest.mark.slow
def test_a_file_with_faults_ends_with_where_they_are(desk: Desk) -> None:
    desk.write({**ENTRY, "measurement": {}})
    ran = command(desk, "plan")
    _, said = ran.communicate(timeout=_SECONDS)
    assert ran.returncode == 1
    assert said.splitlines()[-1].startswith("study.yaml:")
    assert "did you mean 'measurements'?" in said
