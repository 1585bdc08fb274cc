"""Wires a whole server from its settings, starts it, and takes it down without losing anything.

`data_dir` holds all that is the server's own: ledger.sqlite, versions/ (deltas), artifacts/ (jobs' files),
statistics/ (of keys), exports/ (on their way to callers), mlflow.sqlite and mlruns/ where no other MLflow is named,
and locks: one server at a time.
"""

import asyncio
import json
import logging
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from sqlalchemy import URL

from errata.server.conversion import Decoder
from errata.server.figures import states
from errata.server.health import Health
from errata.server.images import ImagePolicy
from errata.server.interceptors import Gate
from errata.server.jobs.events import JobEvents
from errata.server.jobs.faults import VARIABLE, Fault, fault_of, no_fault
from errata.server.jobs.runner import JobRunner
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.ownership import held_folder
from errata.server.metrics import Metrics, MetricsServer, State
from errata.server.models import Models
from errata.server.pages import PageTokens
from errata.server.security import Authenticator, RateLimiter, server_credentials
from errata.server.services.calls import Pager
from errata.server.services.edits import EditService
from errata.server.services.evaluations import EvaluationService
from errata.server.services.export import ExportService
from errata.server.services.history import HistoryService
from errata.server.services.inference import InferenceService
from errata.server.services.jobs import Queue
from errata.server.services.measurements import MeasurementService
from errata.server.services.models import ModelService
from errata.server.services.traces import TraceService
from errata.server.services.watching import Watches
from errata.server.settings import Settings, SettingsError
from errata.server.store import ArtifactStore, DeltaStore
from errata.v1 import (
    edit_pb2,
    edit_pb2_grpc,
    evaluation_pb2,
    evaluation_pb2_grpc,
    export_pb2,
    export_pb2_grpc,
    history_pb2,
    history_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    measurement_pb2,
    measurement_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    trace_pb2,
    trace_pb2_grpc,
)

if TYPE_CHECKING:  # MLflow takes seconds to import, and not every server needs it
    from errata.server.registry.outbox import OutboxWriter

_log = logging.getLogger(__name__)

_OVERSIZE = 2
"""Messages up to so many times the limit are read and refused with a reason; larger ones gRPC cuts off by itself."""

_CALLS = 1000
"""Calls answered at once."""

_FAREWELL = 1.0
"""Seconds for the last answers to leave, once nothing is worked on any more."""

_OUTBOX_SECONDS = 35.0
"""Longer than one request to MLflow may take."""

_PUBLICATION = "mlflow:"
"""What a fault in a publication begins with: `mlflow:run`; see `registry.STEPS`."""

_CALL_THREADS = 64
"""Most calls that wait for the ledger, or decode what they were sent, at once."""

_SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (model_pb2, "ModelService"),
        (trace_pb2, "TraceService"),
        (edit_pb2, "EditService"),
        (evaluation_pb2, "EvaluationService"),
        (inference_pb2, "InferenceService"),
        (export_pb2, "ExportService"),
        (history_pb2, "HistoryService"),
        (measurement_pb2, "MeasurementService"),
    )
)
"""Ours by their full names; the first needs no model in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """What a server keeps. `outbox` is None where there is no MLflow."""

    ledger: Ledger
    deltas: DeltaStore
    artifacts: ArtifactStore
    outbox: "OutboxWriter | None"

    @property
    def publish(self) -> Callable[[], None] | None:
        """Wakes whoever tells MLflow; None where nobody is told."""
        return self.outbox.notify if self.outbox else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Where the process is to end itself, for tests of crashes: in an edit, in a publication."""

    edit: Fault = no_fault
    publication: Fault = no_fault


def faults_of(environment: Mapping[str, str]) -> Faults:
    """The faults that an environment asks for. Raises InvalidInputError for no stage."""
    wanted = environment.get(VARIABLE, "")
    if not wanted.startswith(_PUBLICATION):
        return Faults(edit=fault_of(environment))
    _log.warning("%s=%s: this process will end itself in the first publication that gets there", VARIABLE, wanted)

    def fault(stage: str) -> None:
        if _PUBLICATION + stage == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return Faults(publication=fault)


@contextmanager
def open_ledger(settings: Settings) -> Iterator[Ledger]:
    """The ledger, its schema this release's: the embedded one is brought there, an external one must be.

    Raises LedgerError, NotMigratedError.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(ledger_url(settings))
    try:
        if settings.ledger_url is None:
            ledger.migrate()
        else:
            ledger.check_migrated()
        yield ledger
    finally:
        ledger.close()


def ledger_url(settings: Settings) -> str:
    """Where the ledger is."""
    if settings.ledger_url is not None:
        return settings.ledger_url.get_secret_value()
    database = str((settings.data_dir / "ledger.sqlite").absolute())
    return URL.create("sqlite", database=database).render_as_string()


@dataclass(frozen=True, slots=True, kw_only=True)
class MlflowPlace:
    """Where MLflow keeps what is published. `artifact_root` is None where its server decides that."""

    uri: str
    artifact_root: Path | None


def mlflow_place(settings: Settings) -> MlflowPlace | None:
    """Where versions are published; None where they are not."""
    if settings.mlflow_uri == "none":
        return None
    folder = settings.data_dir.absolute()
    own = URL.create("sqlite", database=str(folder / "mlflow.sqlite")).render_as_string()
    uri = settings.mlflow_uri or own
    # Of a database alone MLflow would put them into the working directory.
    return MlflowPlace(uri=uri, artifact_root=None if urlsplit(uri).scheme in ("http", "https") else folder / "mlruns")


class Server:
    """A whole server, from `start` to the end of `stop`; also as an `async with`. Its parts are there once it started.

    Raises SettingsError for what is taken: a port, a data folder, a ledger.
    """

    def __init__(self, settings: Settings, faults: Faults = Faults()) -> None:
        self._settings, self._faults = settings, faults
        self._exit = ExitStack()
        self._metrics_server: MetricsServer | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._port

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return _address(self._settings.host, self._port)

    @property
    def listening(self) -> str:
        """Where it listens, for programs: one line of JSON."""
        return json.dumps({"address": self.address, "port": self.port, "metrics_port": self.metrics_port})

    @property
    def metrics_port(self) -> int | None:
        """Where Prometheus finds its figures; None where they are not served."""
        return self._metrics_server.port if self._metrics_server else None

    async def __aenter__(self) -> "Server":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Opens everything and begins to serve. What it had opened is closed again where it cannot."""
        try:
            await self._start()
        except BaseException:
            self._exit.close()
            raise

    async def _start(self) -> None:
        settings = self._settings
        # Admission waits for the ledger in these threads, beside calls that fetch and decode images in them.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_CALL_THREADS, thread_name_prefix="call"))
        stores = self.stores = await asyncio.to_thread(self._open)
        self.events = JobEvents()
        self._metrics = Metrics(self._states)
        self._health = Health(
            _SERVICES[:1],
            _SERVICES[1:],
            *([n for n, model in settings.models.items() if model.load == load] for load in ("start", "lazy")),
        )
        self.models = Models(
            settings.models,
            stores.ledger,
            stores.deltas,
            settings.data_dir,
            changed=self._health.changed,
            observer=self._metrics.engine,
        )
        images = ImagePolicy.of(settings)
        self._job_decoder, self._decoder = Decoder(images), Decoder(images.within_budget())
        self._runner = self._make_runner()
        self.gate = Gate(
            Authenticator(stores.ledger.caller if settings.auth else None),
            RateLimiter(settings.requests_per_minute),
            self._metrics,
            max_message_bytes=settings.max_message_bytes,
        )
        self._watches = Watches(stores.ledger, self.events)
        self._grpc = grpc.aio.server(
            interceptors=[self.gate], options=_options(settings), maximum_concurrent_rpcs=_CALLS
        )
        self._add_services()
        await self._health.start()
        self._port = self._bind()
        await asyncio.to_thread(self._begin_work)
        await self._grpc.start()
        _log.info("listening on %s", self.address)

    async def stop(self) -> None:
        """Drains: refuses what is new, lets calls and jobs end for `drain_seconds`, and closes everything.

        Jobs that do not end in time are queued again; the next server takes them up.
        """
        _log.info("shutting down")
        self.gate.drain()
        await self._health.drain()
        seconds = self._settings.drain_seconds
        until = asyncio.get_running_loop().time() + seconds
        await asyncio.to_thread(self._runner.stop, seconds)
        self._watches.close()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self.gate.idle()
        await self._grpc.stop(_FAREWELL)
        await asyncio.to_thread(self._close)
        _log.info("shut down")

    def _open(self) -> Stores:
        settings = self._settings
        self._exit.enter_context(held_folder(settings.data_dir))
        ledger = self._exit.enter_context(open_ledger(settings))
        self._exit.enter_context(ledger.held(lost=_end_process))
        deltas, artifacts = DeltaStore(settings.data_dir / "versions"), ArtifactStore(settings.data_dir / "artifacts")
        deltas.sweep()
        artifacts.sweep()
        shutil.rmtree(_exports(settings), ignore_errors=True)
        outbox = _outbox(settings, ledger, deltas, artifacts, self._faults.publication)
        return Stores(ledger=ledger, deltas=deltas, artifacts=artifacts, outbox=outbox)

    def _make_runner(self) -> JobRunner:
        stores = self.stores
        return JobRunner(
            stores.ledger,
            self.models,
            stores.deltas,
            stores.artifacts,
            stores.publish,
            self._job_decoder,
            events=self.events,
            worker_threads=self._settings.worker_threads,
            ended=self._metrics.job_ended,
            fault=self._faults.edit,
        )

    def _add_services(self) -> None:
        stores, server = self.stores, self._grpc
        secret = self._settings.page_token_secret
        pager = Pager(PageTokens(secret.get_secret_value().encode() if secret else secrets.token_bytes(32)))
        queue = Queue(
            ledger=stores.ledger,
            models=self.models,
            pager=pager,
            watches=self._watches,
            events=self.events,
            notify=self._runner.notify,
        )
        models = ModelService(stores.ledger, self.models, stores.deltas, stores.artifacts, pager, stores.publish)
        inference = InferenceService(stores.ledger, self.models, self._decoder, self._metrics.answered)
        model_pb2_grpc.add_ModelServiceServicer_to_server(models, server)
        trace_pb2_grpc.add_TraceServiceServicer_to_server(TraceService(queue, self._decoder), server)
        edit_pb2_grpc.add_EditServiceServicer_to_server(EditService(queue, self._decoder), server)
        evaluation_pb2_grpc.add_EvaluationServiceServicer_to_server(EvaluationService(queue, self._decoder), server)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, server)
        exports = ExportService(stores.ledger, self.models, _exports(self._settings))
        export_pb2_grpc.add_ExportServiceServicer_to_server(exports, server)
        history = HistoryService(queue, self._decoder, stores.deltas)
        history_pb2_grpc.add_HistoryServiceServicer_to_server(history, server)
        measurements = MeasurementService(queue, self._decoder, stores.artifacts)
        measurement_pb2_grpc.add_MeasurementServiceServicer_to_server(measurements, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        reflection.enable_server_reflection((*_SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)

    def _bind(self) -> int:
        settings = self._settings
        address = _address(settings.host, settings.port)
        credentials = server_credentials(settings)
        try:
            if credentials is None:
                return self._grpc.add_insecure_port(address)
            return self._grpc.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise SettingsError(
                f"the server cannot listen on {address}: {error}; choose another port or host"
            ) from None

    def _begin_work(self) -> None:
        """Everything that has threads of its own."""
        settings = self._settings
        if settings.metrics_port is not None:
            try:
                # In clear and for anyone: beyond this machine only where the settings say that this is well.
                host = settings.host if settings.insecure_ok else "127.0.0.1"
                self._metrics_server = self._metrics.serve(settings.metrics_port, host)
            except OSError as error:
                raise SettingsError(f"metrics_port {settings.metrics_port} cannot be used: {error.strerror}") from None
        self._runner.recover()
        self.models.start()
        self._runner.start()
        if self.stores.outbox:
            self.stores.outbox.start()

    def _close(self) -> None:
        self.models.close(0.0)
        if self.stores.outbox and not self.stores.outbox.stop(_OUTBOX_SECONDS):
            _log.warning("MLflow did not answer in time; the rest is published after the next start")
        if self._metrics_server:
            self._metrics_server.close()
        self._exit.close()

    def _states(self) -> Iterable[State]:
        return states(self.models, self.stores.ledger)


async def serve(settings: Settings, faults: Faults, started: Callable[[Server], None]) -> None:
    """Serves until SIGTERM or SIGINT, and drains. A second signal ends the process at once."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    signals = (signal.SIGTERM, signal.SIGINT)

    def end() -> None:
        for each in signals:
            loop.remove_signal_handler(each)
        ended.set()

    for each in signals:
        loop.add_signal_handler(each, end)
    async with Server(settings, faults) as server:
        started(server)
        await ended.wait()


def _end_process() -> None:
    """Drains as at any other SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)


def _outbox(
    settings: Settings, ledger: Ledger, deltas: DeltaStore, artifacts: ArtifactStore, fault: Fault
) -> "OutboxWriter | None":
    place = mlflow_place(settings)
    if place is None:
        return None
    from errata.server.registry.outbox import OutboxWriter
    from errata.server.registry.registry import PublishedBase, Registry

    bases = {
        name: PublishedBase(
            registered_model=model.registered_model or name,
            source=model.source,
            dtype=model.dtype,
            quantization=model.quantization,
        )
        for name, model in settings.models.items()
    }
    registry = Registry(
        place.uri, bases=bases, deltas=deltas, artifacts=artifacts, artifact_root=place.artifact_root, on_step=fault
    )
    return OutboxWriter(ledger, registry)


def _exports(settings: Settings) -> Path:
    return settings.data_dir / "exports"


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", min(_OVERSIZE * settings.max_message_bytes, 2**31 - 1)),
        ("grpc.max_send_message_length", -1),
        # Otherwise a second server on the same port would silently take half of the calls.
        ("grpc.so_reuseport", 0),
        # A watch can be silent for minutes: find connections that are gone, and let clients do so.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
