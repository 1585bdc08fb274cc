"""The API keeps its style, and breaks nobody: `buf` compares it with proto/baseline.binpb, the API last released.

A deliberate break, before 1.0, or a new release writes the baseline anew:
`buf build proto --exclude-source-info -o proto/baseline.binpb`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).resolve().parents[2] / "proto"
BASELINE = PROTO / "baseline.binpb"


def buf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the `buf` that the dev extra (buf-bin) puts beside the interpreter; it needs no network for this."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("buf", path=path)
    assert program, "there is no buf; install the dev extra, which brings buf-bin"
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_protos_follow_the_style_guide() -> None:
    found = buf("lint", PROTO)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_nothing_that_was_released_is_broken() -> None:
    found = buf("breaking", PROTO, "--against", BASELINE)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("string target = 3;", "string target = 33;"),
        ("string target = 3;", "bytes target = 3;"),
        ("string target = 3;", ""),
        ("METHOD_ROME = 2;", "METHOD_RANK_ONE = 2;"),
        ("rpc GetEdit(GetEditRequest) returns (GetEditResponse);", ""),
    ],
)
def test_a_break_would_be_seen(tmp_path: Path, old: str, new: str) -> None:
    changed = shutil.copytree(PROTO, tmp_path / "proto")
    edit = changed / "errata/v1/edit.proto"
    text = edit.read_text(encoding="utf-8")
    assert text.count(old) == 1
    edit.write_text(text.replace(old, new), encoding="utf-8")
    found = buf("breaking", changed, "--against", BASELINE)
    assert found.returncode != 0
    assert "edit.proto" in found.stdout
