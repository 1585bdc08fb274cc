"""Figures for Prometheus, in a registry of their own.

Calls, ended jobs and the engines' work are counted as they happen; what is a state (queues, memory, backlog) is read
when it is scraped.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from errata.server.ledger.rows import JobRow

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_STEP_SECONDS = (0.001, 0.0025, *_SECONDS)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What is true at one moment. Values by label, `()` where there is none."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    values: dict[tuple[str, ...], float] = field(default_factory=dict)


class Metrics:
    """A server's figures. `states` is asked at every scrape, in the scraper's thread."""

    def __init__(self, states: Callable[[], Iterable[State]]) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "errata_calls", "Calls that ended, by method and gRPC code.", ("method", "code"), registry=self.registry
        )
        self._seconds = Histogram(
            "errata_call_seconds",
            "Time from a call's arrival to its end.",
            ("method",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._active = Gauge(
            "errata_calls_active", "Calls being answered, by method.", ("method",), registry=self.registry
        )
        self._jobs = Counter(
            "errata_jobs_ended", "Jobs that ended, by kind and state.", ("kind", "state"), registry=self.registry
        )
        self._tokens = Counter(
            "errata_tokens",
            "Tokens of prompts and answers, by model and kind.",
            ("model", "kind"),
            registry=self.registry,
        )
        self._engines = _engine_figures(self.registry)
        self.registry.register(_States(states))

    def began(self, method: str) -> None:
        """A call arrived."""
        self._active.labels(method).inc()

    def ended(self, method: str, code: str, seconds: float) -> None:
        """A call that `began` ended."""
        self._active.labels(method).dec()
        self._calls.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)

    def job_ended(self, job: JobRow) -> None:
        """A job ended."""
        self._jobs.labels(job.kind.value, job.state.value).inc()

    def answered(self, model: str, prompt_tokens: int, generated_tokens: int) -> None:
        """A model answered."""
        self._tokens.labels(model, "prompt").inc(prompt_tokens)
        self._tokens.labels(model, "generated").inc(generated_tokens)

    def engine(self, model: str) -> "EngineFigures":
        """What a model's engine tells of its work to."""
        return EngineFigures(self._engines, model)

    def serve(self, port: int, host: str) -> "MetricsServer":
        """Serves them over HTTP; port 0 means any free one. Raises OSError for one that is taken."""
        return MetricsServer(*start_http_server(port, host, self.registry))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engines:
    """Figures of all engines, by model."""

    first_token: Histogram
    rows: Histogram
    versions: Histogram
    step: Histogram
    tokens: Counter
    ended: Counter


def _engine_figures(registry: CollectorRegistry) -> _Engines:
    def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"errata_engine_{name}", help, ("model",), buckets=buckets, registry=registry)

    return _Engines(
        first_token=histogram("first_token_seconds", "Time from a request to its answer's first token.", _SECONDS),
        rows=histogram("step_rows", "Rows of the batch at each of its steps.", _ROWS),
        versions=histogram("step_versions", "Distinct versions in the batch at each of its steps.", _ROWS),
        step=histogram("step_seconds", "Time of one step of the batch: one token for each row.", _STEP_SECONDS),
        tokens=Counter(
            "errata_engine_tokens",
            "Tokens generated, those of answers that nobody waited for included.",
            ("model",),
            registry=registry,
        ),
        ended=Counter(
            "errata_engine_requests_ended",
            "Requests that ended, by outcome: a finish reason, scored, or an error's reason.",
            ("model", "outcome"),
            registry=registry,
        ),
    )


class EngineFigures:
    """An EngineObserver that counts. Safe from any thread."""

    def __init__(self, engines: _Engines, model: str) -> None:
        self._model, self._ended = model, engines.ended
        self._first_token, self._tokens = engines.first_token.labels(model), engines.tokens.labels(model)
        self._rows, self._versions = engines.rows.labels(model), engines.versions.labels(model)
        self._step = engines.step.labels(model)

    def first_token(self, seconds: float) -> None:
        """A generation's first token is there."""
        self._first_token.observe(seconds)

    def stepped(self, rows: int, versions: int, seconds: float) -> None:
        """The batch made a step."""
        self._rows.observe(rows)
        self._versions.observe(versions)
        self._step.observe(seconds)

    def finished(self, outcome: str, seconds: float, tokens: int) -> None:
        """A request ended."""
        self._ended.labels(self._model, outcome).inc()
        self._tokens.inc(tokens)


class MetricsServer:
    """The HTTP side, in a thread of its own."""

    def __init__(self, server: WSGIServer, thread: Thread) -> None:
        self._server, self._thread = server, thread

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _States(Collector):
    def __init__(self, states: Callable[[], Iterable[State]]) -> None:
        self._states = states

    def describe(self) -> list[Metric]:
        return []  # registering must not ask for them

    def collect(self) -> Iterator[Metric]:
        for state in self._states():
            family = GaugeMetricFamily(state.name, state.help, labels=state.labels)
            for labels, value in state.values.items():
                family.add_metric(labels, value)
            yield family
