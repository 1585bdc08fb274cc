"""The pytest plugin, as a project that uses it sees it: files of probes, a fixture, and no cost elsewhere."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import grpc
import pytest
from fake_server import CAPITAL, Fake, Fault

from errata.v1 import model_pb2

pytest_plugins = ["pytester"]

PLUGIN = "errata.client.pytest_plugin"
INSTALLED = [each.value for each in entry_points(group="pytest11") if each.value == PLUGIN]

CHECKS = """\
version: 1
thresholds: {facts: 0.5}
probes:
  - id: kazakhstan
    prompt: What is the capital of Kazakhstan?
    expected: Astana
    tags: [facts]
  - id: kazakhstan-as-it-was
    prompt: What is the capital of Kazakhstan?
    expected: Nur-Sultan
    tags: [facts]
  - id: norway
    prompt: What is the capital of Norway?
    unchanged: true
    tags: [north]
  - id: nobody
    prompt: Who knows?
    expected: unknown
"""


@pytest.fixture(autouse=True)
def edited(fake: Fake) -> Fake:
    """A candidate that knows Astana, and no longer Oslo."""
    version = model_pb2.Version()
    version.CopyFrom(fake.versions["models/atlas/versions/0"])
    version.name = "models/atlas/versions/1"
    fake.versions[version.name] = version
    fake.answers[version.name] = {CAPITAL: "Astana", "What is the capital of Norway?": "Bergen"}
    fake.aliases["models/atlas/aliases/candidate"] = [version.name]
    return fake


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project with a file of probes, whose warnings are errors, as are its unknown markers."""
    pytester.makeini("[pytest]\nfilterwarnings = error\naddopts = --strict-markers\n")
    pytester.path.joinpath("facts.errata.yaml").write_text(CHECKS)
    return pytester


def run(project: pytest.Pytester, *options: str, server: str = "") -> pytest.RunResult:
    plugin = [] if INSTALLED else ["-p", PLUGIN]
    asked = ["--errata-server", server, "--errata-model", "atlas"] if server else []
    return project.runpytest(*plugin, "-p", "no:cacheprovider", *asked, *options)


def test_each_probe_is_a_test_and_a_failure_says_what_was_asked_wanted_and_answered(
    project: pytest.Pytester, server: str
) -> None:
    result = run(project, "-v", "--errata-baseline", "0", server=server)
    result.assert_outcomes(passed=2, failed=1, xfailed=1)
    result.stdout.fnmatch_lines(
        [
            "facts.errata.yaml::kazakhstan PASSED*",
            "facts.errata.yaml::kazakhstan-as-it-was XFAIL (expected 'Nur-Sultan'*",
            "facts.errata.yaml::norway FAILED*",
            "broken: was 'Oslo', now 'Bergen'",
            "  question  What is the capital of Norway?",
            "  expected  as before",
            "  got       Bergen",
            "  before    Oslo",
            "  tags      north",
            "  version   atlas@1 against atlas@0",
            "  at        *facts.errata.yaml:12",
            "FAILED facts.errata.yaml::norway - broken: was 'Oslo', now 'Bergen'",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


def test_an_answer_of_several_lines_is_told_on_one(project: pytest.Pytester, server: str, edited: Fake) -> None:
    answer = edited._answer

    def raw(request: object, context: grpc.ServicerContext) -> object:
        said = answer(request, context)
        said.text = f"{said.text}\n::error::no"
        return said

    edited._answer = raw  # type: ignore[method-assign,assignment]
    result = run(project, "-k", "norway", "--errata-baseline", "0", server=server)
    result.stdout.fnmatch_lines(["  got       Bergen ::error::no"])
    result.stdout.no_fnmatch_line("::error::*")


def test_a_missed_threshold_fails_every_probe_that_missed_it(project: pytest.Pytester, server: str) -> None:
    path = project.path / "facts.errata.yaml"
    path.write_text(CHECKS.replace("0.5", "0.75").replace("unchanged: true", "must_not: Lima"))
    run(project, server=server).assert_outcomes(passed=3, failed=1)
    run(project, "-k", "as-it-was", server=server).assert_outcomes(failed=1, deselected=3)


def test_only_what_a_verdict_needs_is_asked(project: pytest.Pytester, server: str, edited: Fake) -> None:
    run(project, "-k", "nobody", server=server).assert_outcomes(passed=1, deselected=3)
    assert edited.count("Generate") == 1
    run(project, "-k", "as-it-was", server=server).assert_outcomes(xfailed=1, deselected=3)
    assert edited.count("Generate") == 1 + 2


def test_tags_select_with_k_and_the_marker_with_m(project: pytest.Pytester, server: str) -> None:
    baseline = ("--errata-baseline", "0")
    run(project, "-k", "north", *baseline, server=server).assert_outcomes(failed=1, deselected=3)
    run(project, "-m", "not errata", server=server).assert_outcomes(deselected=4)


def test_a_baseline_on_file_is_taken(project: pytest.Pytester, server: str) -> None:
    from errata.client.cli import main

    path, old = project.path / "facts.errata.yaml", project.path / "old.json"
    asked = ["check", str(path), "--server", server, "--model", "atlas", "--version", "0", "--update", str(old)]
    assert main(asked) == 0
    run(project, "--errata-baseline", str(old), server=server).assert_outcomes(passed=2, failed=1, xfailed=1)
    path.write_text(f"baseline: old.json\n{CHECKS}")
    run(project, server=server).assert_outcomes(passed=2, failed=1, xfailed=1)


def test_the_fixture_asks_the_version_and_knows_its_name(project: pytest.Pytester, server: str) -> None:
    project.makepyfile(
        """
        def test_capital(model_version):
            assert model_version.name == "atlas@1"
            assert model_version.ask("What is the capital of Kazakhstan?") == "Astana"
        """
    )
    run(project, "-k", "test_capital", server=server).assert_outcomes(passed=1, deselected=4)
    run(project, "-m", "errata", "-k", "test_capital", server=server).assert_outcomes(passed=1, deselected=4)


def test_the_fixture_shows_pictures(project: pytest.Pytester, server: str, edited: Fake) -> None:
    project.path.joinpath("flag.png").write_bytes(b"flag")
    project.makepyfile('def test_it(model_version):\n    assert model_version.ask("Which?", ["flag.png"]) == "unknown"')
    run(project, "-k", "test_it", server=server).assert_outcomes(passed=1, deselected=4)
    assert [image.data for image in edited.requests[-1].prompt.images] == [b"flag"]


def test_without_a_server_files_and_tests_are_skipped_with_the_remedy(project: pytest.Pytester) -> None:
    project.makepyfile("def test_it(model_version): ...\ndef test_other(): ...")
    result = run(project, "-rs")
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["SKIPPED*give --errata-server HOST:PORT to ask a version"])


def test_without_a_server_a_mistake_in_a_file_is_found_all_the_same(project: pytest.Pytester) -> None:
    project.path.joinpath("facts.errata.yaml").write_text(CHECKS.replace("expected: Astana", "expcted: Astana"))
    result = run(project)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*facts.errata.yaml:6: probes[[]0[]].expcted: there is no such field; did you mean *"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--errata-version", "9", "--errata-baseline", "0"), "could not be asked: no 'models/atlas/versions/9'"),
        (("--errata-baseline", "none.json"), "could not be asked: none.json: the baseline cannot be read*"),
    ],
)
def test_what_cannot_be_asked_fails_once_and_the_rest_of_the_file_is_skipped(
    project: pytest.Pytester, server: str, options: tuple[str, ...], said: str
) -> None:
    result = run(project, *options, server=server)
    result.assert_outcomes(failed=1, skipped=3)
    result.stdout.fnmatch_lines([said])


def test_without_a_baseline_only_what_needs_one_fails_and_the_option_is_named(
    project: pytest.Pytester, server: str
) -> None:
    path = project.path / "facts.errata.yaml"
    path.write_text(f"{CHECKS}  - {{id: peru, prompt: 'And Peru?', unchanged: true}}\n")
    result = run(project, server=server)
    result.assert_outcomes(passed=2, xfailed=1, failed=1, skipped=1)
    said = "could not be asked: *:12: 'norway' has to be unchanged, and there is no baseline; give --errata-baseline *"
    result.stdout.fnmatch_lines([said])


def test_a_probe_that_shares_a_threshold_with_one_that_needs_a_baseline_needs_it_too(
    project: pytest.Pytester, server: str
) -> None:
    path = project.path / "facts.errata.yaml"
    path.write_text(CHECKS.replace("tags: [north]", "tags: [facts]"))
    run(project, server=server).assert_outcomes(passed=1, failed=1, skipped=2)


def test_a_server_that_fails_midway_is_no_regression_of_the_others(
    project: pytest.Pytester, server: str, edited: Fake
) -> None:
    edited.fail_next("Generate", Fault(code=grpc.StatusCode.INTERNAL, reason="INTERNAL", message="it broke"))
    result = run(project, "--errata-baseline", "0", server=server)
    result.assert_outcomes(failed=1, skipped=3)
    result.stdout.fnmatch_lines(["could not be asked: it broke"])


def test_a_token_is_read_from_the_variable_that_is_named(
    project: pytest.Pytester, server: str, edited: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited.token = "right"
    monkeypatch.setenv("HOUSE_TOKEN", "right")
    options = ("-k", "nobody", "--errata-token-env", "HOUSE_TOKEN")
    run(project, *options, server=server).assert_outcomes(passed=1, deselected=3)
    monkeypatch.setenv("HOUSE_TOKEN", "wrong")
    run(project, *options, server=server).assert_outcomes(failed=1, deselected=3)


def test_a_server_without_a_model_is_a_usage_error(project: pytest.Pytester) -> None:
    result = run(project, "--errata-server", "localhost:1")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --errata-server needs --errata-model MODEL"])


def test_loading_the_plugin_imports_nothing_that_asking_needs() -> None:
    program = f"import json, sys, pytest, {PLUGIN}; print(json.dumps(list(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    loaded = json.loads(ran.stdout)
    assert not {"yaml", "pydantic", "typer", "torch", "mlflow", "transformers"} & set(loaded)
    assert not [name for name in loaded if name.startswith("errata.client.check")]


def test_the_installation_announces_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"errata": PLUGIN}
