"""The pytest plugin: files `*.errata.yaml` as tests, one a probe, and a version to ask in tests of one's own.

    pytest --errata-server localhost:50051 --errata-model atlas --errata-version candidate --errata-baseline champion

A run fails where `errata check` would, and for the same probes: one that fails within its tags' thresholds is an
expected failure. Without --errata-server the files are read all the same, so that a mistake in one shows, and then
skipped, as are tests that use the fixture `model_version`. Needs errata[cli] where there are such files.

What asks and judges is imported when a file or a test needs it; before that the plugin costs the import of the client.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from _pytest._code.code import TerminalRepr

    from errata.client import Errata
    from errata.client.check.answering import ServerAnswerer
    from errata.client.check.baseline import Baseline
    from errata.client.check.checks import Checks, Probe
    from errata.client.check.judging import Outcome

SUFFIX = ".errata.yaml"
MARKER = "errata"
FIXTURE = "model_version"
TOKEN = "ERRATA_TOKEN"
_EXTRA = ("pydantic", "pydantic_core", "yaml", "typer", "rich")
_SILENT = "give --errata-server HOST:PORT to ask a version"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("errata", "what a model believes")
    group.addoption("--errata-server", metavar="HOST:PORT", help="Ask a version on this server.")
    group.addoption("--errata-model", metavar="MODEL", help="Its model.")
    group.addoption("--errata-version", metavar="VERSION", default="candidate", help="Number or alias; candidate.")
    group.addoption("--errata-baseline", metavar="VERSION|FILE", help="What `unchanged` means.")
    group.addoption("--errata-token-env", metavar="NAME", default=TOKEN, help=f"Variable of the token; {TOKEN}.")
    group.addoption("--errata-ca", metavar="FILE", help="Encrypt, trusting these root certificates (PEM).")
    group.addoption("--errata-tls", action="store_true", help="Encrypt, trusting the system's root certificates.")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker, and refuses a server without a model."""
    config.addinivalue_line("markers", f"{MARKER}: asks a version of a model on an Errata server")
    if config.getoption("errata_server") and not config.getoption("errata_model"):
        raise pytest.UsageError("--errata-server needs --errata-model MODEL")
    config.stash[_CONNECTION] = _Connection(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Closes the connection, if there is one."""
    if connection := config.stash.get(_CONNECTION, None):
        connection.close()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks what asks a version."""
    if isinstance(item, ProbeItem) or FIXTURE in getattr(item, "fixturenames", ()):
        item.add_marker(MARKER)


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> "ChecksFile | None":
    """Takes the files of probes."""
    return ChecksFile.from_parent(parent, path=file_path) if file_path.name.endswith(SUFFIX) else None


@pytest.fixture(scope="session")
def model_version(pytestconfig: pytest.Config) -> "ModelVersion":
    """The version that --errata-version names; skips the test without --errata-server."""
    connection = pytestconfig.stash[_CONNECTION]
    if not connection.wanted:
        pytest.skip(_SILENT)
    return ModelVersion(connection.version)


class ModelVersion:
    """One version of a model, to ask."""

    def __init__(self, answerer: "ServerAnswerer") -> None:
        self._answerer = answerer

    @property
    def name(self) -> str:
        """Its name, with the number that an alias stood for: "atlas@3"."""
        return self._answerer.subject.name

    def ask(self, prompt: str, images: "Iterable[str | os.PathLike[str]]" = (), *, max_new_tokens: int = 32) -> str:
        """Its greedy answer to a question, about pictures where their paths are given. Raises ErrataError."""
        from errata.client.check.checks import Question

        shown = tuple(Path(image) for image in images)
        return self._answerer.ask(Question(prompt=prompt, images=shown, max_new_tokens=max_new_tokens))


class ChecksFile(pytest.File):
    """A file of probes."""

    def collect(self) -> Iterator["ProbeItem"]:
        """One test a probe."""
        try:
            from errata.client.check.format import load_checks
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _EXTRA:
                raise
            raise self.CollectError(f"{self.path.name} needs {error.name}; pip install 'errata[cli]'") from None
        from errata.client.check.errors import CheckError

        try:
            checks = load_checks(self.path)
        except CheckError as error:
            raise self.CollectError(str(error)) from None
        connection = self.config.stash[_CONNECTION]
        if not connection.wanted:
            pytest.skip(_SILENT, allow_module_level=True)
        asked = _Asked(checks=checks, connection=connection, session=self.session)
        for probe in checks.probes:
            yield ProbeItem.from_parent(self, name=probe.id, probe=probe, asked=asked)


class ProbeItem(pytest.Item):
    """One probe. The first of a file that runs asks all of the file's that were selected, many at once."""

    def __init__(self, *, probe: "Probe", asked: "_Asked", **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]  # pytest's own: name and parent
        self.probe = probe
        self.asked = asked
        self.extra_keyword_matches.update(probe.tags)

    def runtest(self) -> None:
        """Fails where the probe does; an expected failure where its tags' thresholds are met all the same."""
        from errata.client.check.judging import Verdict

        outcome = self.asked.outcome(self.probe.id)
        if outcome.verdict is Verdict.TOLERATED:
            pytest.xfail("; ".join(outcome.faults))
        if outcome.verdict is Verdict.FAILED:
            raise ProbeFailedError(outcome)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> "str | TerminalRepr":  # type: ignore[override]
        """What was asked, wanted and answered; no traceback for what has nothing to do with code."""
        from errata.client.errors import ErrataError

        if isinstance(excinfo.value, ProbeFailedError):
            return self._explained(excinfo.value.outcome)
        if isinstance(excinfo.value, ErrataError):
            return f"could not be asked: {excinfo.value}"
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Path, int, str]:
        """Where it stands; pytest counts lines from 0."""
        return self.path, self.probe.line - 1, self.name

    def _explained(self, outcome: "Outcome") -> str:
        from errata.client.check.output.words import question, state

        rows = [
            ("question", question(self.probe)),
            ("expected", self.probe.wanted),
            ("got", outcome.answer),
            ("before", outcome.before),
            ("tags", ", ".join(self.probe.tags)),
            ("version", self.asked.names),
            ("at", f"{self.path}:{self.probe.line}"),
        ]
        # On one line each: a line of an answer's own could be a command to the CI that reads this.
        said = [f"  {name:8}  {' '.join(value.split())}" for name, value in rows if value]
        # The first line is what pytest's summary shows.
        return "\n".join([f"{state(outcome)}: {'; '.join(outcome.faults)}", *said])


class ProbeFailedError(Exception):
    """A probe that counts against the version."""

    def __init__(self, outcome: "Outcome") -> None:
        super().__init__("; ".join(outcome.faults))
        self.outcome = outcome


@dataclass
class _Asked:
    """The outcomes of one file's probes, asked for when the first is wanted."""

    checks: "Checks"
    connection: "_Connection"
    session: pytest.Session
    names: str = ""
    _outcomes: "dict[str, Outcome]" = field(default_factory=dict)
    _failed: set[bool] = field(default_factory=set)

    def outcome(self, probe: str) -> "Outcome":
        """A probe's outcome. Raises what kept probes from being asked once, and skips the rest of those.

        Probes that can be judged without a baseline are, where there is none for the others.
        """
        held = self._held(probe)
        if held in self._failed:
            pytest.skip("not asked: an earlier probe of this file says why")
        if probe not in self._outcomes:
            self._failed.add(held)
            self._ask({item.probe.id for item in self._selected() if self._held(item.probe.id) is held})
            self._failed.remove(held)
        return self._outcomes[probe]

    def _held(self, probe: str) -> bool:
        """Whether a verdict on a probe waits for a baseline that nobody gave."""
        needed = self.checks.judged_with({probe}).probes
        return not self.connection.has_baseline(self.checks) and any(each.unchanged for each in needed)

    def _selected(self) -> Iterator[ProbeItem]:
        return (item for item in self.session.items if isinstance(item, ProbeItem) and item.asked is self)

    def _ask(self, ids: set[str]) -> None:
        from errata.client.check.output.words import compared
        from errata.client.check.running import needs_baseline, run_checks

        checks = self.checks.judged_with(ids)
        baseline = self.connection.baseline(checks)
        if baseline is None:
            needs_baseline(checks, "--errata-baseline")
        report = run_checks(checks, self.connection.version, baseline)
        self.names = compared(report)
        self._outcomes = {outcome.probe.id: outcome for outcome in report.outcomes}


class _Connection:
    """The server of a run, connected to when it is first asked."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._open = ExitStack()

    @property
    def wanted(self) -> bool:
        """Whether a server was given."""
        return bool(self._config.getoption("errata_server"))

    @cached_property
    def version(self) -> "ServerAnswerer":
        """The version to check. Raises ErrataError."""
        return self._answerer(self._config.getoption("errata_version"))

    def has_baseline(self, checks: "Checks") -> bool:
        """Whether anything is named that the checks are held against."""
        return bool(self._config.getoption("errata_baseline") or checks.baseline)

    def baseline(self, checks: "Checks") -> "ServerAnswerer | Baseline | None":
        """What the checks are held against, if anything: what the options name, else what the file does."""
        from errata.client.check.baseline import read_baseline

        named = self._config.getoption("errata_baseline")
        if named and not named.endswith(".json"):
            return self._compared
        found = Path(named) if named else checks.baseline
        return read_baseline(found) if found else None

    def close(self) -> None:
        """Ends the connection."""
        self._open.close()

    @cached_property
    def _compared(self) -> "ServerAnswerer":
        return self._answerer(self._config.getoption("errata_baseline"))

    @cached_property
    def _client(self) -> "Errata":
        from errata.client import Errata, Tls

        given = self._config.getoption
        ca = given("errata_ca")
        tls = Tls(root_certificates=Path(ca) if ca else None) if ca or given("errata_tls") else None
        token = os.environ.get(given("errata_token_env"), "")
        return self._open.enter_context(Errata(given("errata_server"), token=token, tls=tls))

    def _answerer(self, ref: str) -> "ServerAnswerer":
        from errata.client.check.answering import ServerAnswerer, version_name

        return ServerAnswerer(self._client, version_name(self._config.getoption("errata_model"), ref))


_CONNECTION = pytest.StashKey[_Connection]()
