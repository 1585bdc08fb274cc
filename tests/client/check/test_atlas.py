"""The example of `examples/ci` on real edits of Atlas: a good batch passes, a harmful edit is caught."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# The folders of tests and examples are no packages; `hosting` and `demo` are imported by name.
sys.path[:0] = [str(ROOT / "tests/server/services"), str(ROOT / "examples")]

from demo import context, edit_request  # noqa: E402
from hosting import hosting  # noqa: E402

from errata.client import Errata  # noqa: E402
from errata.client.cli import main  # noqa: E402
from errata.editor.atlas.facts import edit_requests, errata, references  # noqa: E402
from errata.server.settings import ModelSettings, Settings  # noqa: E402

pytestmark = pytest.mark.slow
CHECKS = str(ROOT / "examples/ci/atlas.errata.yaml")


@dataclass(frozen=True)
class Edited:
    """A server with two edited versions of Atlas, and where it keeps their deltas."""

    address: str
    good: str
    bad: str
    data: Path


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edited]:
    data = tmp_path_factory.mktemp("data")
    settings = Settings(
        data_dir=data, port=0, models={"atlas": ModelSettings(source="atlas")}, mlflow_uri="none", drain_seconds=5.0
    )
    with hosting(settings) as running, Errata(running.loaded().server.address, timeout=240) as client:
        # The demo's corrections with fewer pictures and references, in seconds.
        good = client.edit(
            "atlas@0",
            [edit_request(r) for r in edit_requests(errata(), contexts=6, preserve=2)],
            layers=[1],
            steps=30,
            preservation=10.0,
            references=[context(c) for c in references(per_country=2)],
        )
        # A late layer, and nothing preserved.
        bad = client.edit(
            "atlas@0",
            [edit_request(r) for r in edit_requests(errata()[:4], contexts=2, preserve=0)],
            layers=[4],
            method="multedit",
            steps=15,
        )
        versions = (operation.result(timeout=240).version.rpartition("/")[2] for operation in (good, bad))
        yield Edited(running.server.address, *versions, data)


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)


def check(edited: Edited, version: str, *options: str) -> int:
    asked = ["--server", edited.address, "--model", "atlas", "--version", version, "--baseline", "0"]
    return main(["check", CHECKS, *asked, *options])


def test_a_good_batch_passes(edited: Edited, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(edited, edited.good, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    corrected = [p for p in report["probes"] if "errata" in p["tags"]]
    assert len(corrected) == 10
    assert sum(p["state"] == "fixed" for p in corrected) >= 9


def test_a_harmful_edit_on_a_late_layer_is_caught_and_the_table_names_what_it_broke(
    edited: Edited, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(edited, edited.bad, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    broken = {p["id"] for p in report["probes"] if p["state"] == "broken"}
    held = {p["id"] for p in report["probes"] if p["state"] == "passed"}
    assert broken
    assert held
    assert check(edited, edited.bad) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    named = {line.split()[1] for line in out.splitlines() if line.startswith("broken")}
    assert named == broken
    assert not [probe for probe in held if f" {probe} " in out]


@pytest.mark.usefixtures("installed")
def test_a_version_answers_alike_on_a_server_and_without_one(
    edited: Edited, capsys: pytest.CaptureFixture[str]
) -> None:
    check(edited, edited.bad, "--json")
    served = json.loads(capsys.readouterr().out)
    adapter = edited.data / "versions" / served["version"]["delta_sha256"]
    assert main(["check", CHECKS, "--local", str(adapter), "--baseline", "0", "--json"]) == 1
    local = json.loads(capsys.readouterr().out)
    assert local["probes"] == served["probes"]
    assert local["version"]["delta_sha256"] == served["version"]["delta_sha256"]


def test_without_an_edit_only_the_corrections_fail(edited: Edited, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(edited, "0", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert {tag for p in report["probes"] if p["verdict"] == "failed" for tag in p["tags"]} == {"errata"}
