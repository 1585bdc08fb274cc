"""The base models in memory: one copy of the weights each, an inference engine, and a replica for every job.

A model is loaded once, at start or when it is first asked for, in one thread for all. Versions are the base with the
deltas of their lineage, read from the store when they are needed. Knows no request and no gRPC.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from functools import cached_property, reduce
from operator import add
from pathlib import Path

from errata.editor.checkpoints import load_model
from errata.editor.delta import Delta
from errata.editor.errors import ErrataError, InvalidInputError, ModelError
from errata.editor.mixed import replica
from errata.editor.model import EditableModel
from errata.editor.placement import checked_device, checked_dtype
from errata.editor.quantization import check_usable, memory_bytes
from errata.editor.report.wording import size
from errata.editor.requests import Context
from errata.editor.statistics import KeyStatistics, key_statistics
from errata.editor.trace import Progress
from errata.server.engine import Engine, EngineObserver, EngineSettings
from errata.server.engine.observer import Silent
from errata.server.errors import MalformedError, NotFoundError
from errata.server.jobs.references import references_of
from errata.server.ledger.ledger import Ledger
from errata.server.settings import ModelSettings, SettingsError
from errata.server.store import DeltaStore

_log = logging.getLogger(__name__)

_CACHED_BYTES = 256 * 2**20
"""Bytes of deltas that a model keeps in memory for its jobs."""


class LoadState(StrEnum):
    """Where a configured model stands."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class LoadedModel:
    """A base model in memory. Safe from any thread."""

    def __init__(
        self,
        name: str,
        settings: ModelSettings,
        base: EditableModel,
        ledger: Ledger,
        store: DeltaStore,
        statistics_folder: Path,
        observer: EngineObserver | None = None,
    ) -> None:
        self.name, self.settings = name, settings
        self.base = base
        self._ledger, self._statistics_folder = ledger, statistics_folder
        self._deltas = _DeltaCache(lambda sha256: store.get(sha256, base), _CACHED_BYTES)
        self._lock, self._measuring = threading.Lock(), threading.Lock()
        self._idle: list[EditableModel] = []
        served = EngineSettings(max_rows=settings.max_rows, max_queue=settings.max_queue)
        self.engine = Engine(base, self.deltas_of, served, observer=observer)

    @property
    def architecture(self) -> str:
        """The `transformers` class."""
        return type(self.base.model).__name__

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.base.layers)

    @cached_property
    def memory_bytes(self) -> int:
        """Bytes of the weights and buffers, which all replicas share."""
        return memory_bytes(self.base.model)

    @property
    def keys_folder(self) -> Path:
        """Where the keys of what was edited are kept, beside the key statistics. Whatever is missing is made anew."""
        return self._statistics_folder / "keys"

    @contextmanager
    def borrow(self) -> Iterator[EditableModel]:
        """A replica for one thread: hooks of its own, the base's weights. There are as many as were ever out at once.

        Whoever borrows one leaves no hook on it.
        """
        with self._lock:
            # A replica is made while nobody else touches the base, which answers nothing itself.
            borrowed = self._idle.pop() if self._idle else replica(self.base)
        try:
            yield borrowed
        finally:
            with self._lock:
                self._idle.append(borrowed)

    def deltas_of(self, number: int) -> tuple[Delta, ...]:
        """The deltas that make a version, the oldest first; none for the base.

        Raises NotFoundError for no such version, DeltaError for a stored delta that cannot be used.
        """
        lineage = self._ledger.lineage(self.name, number)
        return tuple(self._deltas.get(v.delta_sha256) for v in reversed(lineage) if v.delta_sha256)

    def composed(self, number: int) -> Delta | None:
        """A version's deltas as one; None for the base."""
        deltas = self.deltas_of(number)
        return reduce(add, deltas) if deltas else None

    @cached_property
    def references(self) -> tuple[Context, ...]:
        """The model's own reference contexts; none where it has none. Raises ModelError for an unusable file."""
        return references_of(self.settings)

    def statistics(
        self,
        model: EditableModel,
        layers: Sequence[int],
        references: Sequence[Context] = (),
        *,
        progress: Progress | None = None,
    ) -> KeyStatistics:
        """Key statistics of `layers` on `references`, the model's own where there are none; cached on disk.

        `model` is a borrowed replica. Raises MalformedError (REFERENCES_MISSING) where nobody gave any.
        """
        references = references or self.references
        if not references:
            raise MalformedError(
                f"the method needs reference prompts, whose keys must not change, and model {self.name!r} has none; "
                f"give the request's `references`, name a JSONL file in the server's settings "
                f"(models.{self.name}.references), or use the method MULTEDIT",
                field="references",
                reason="REFERENCES_MISSING",
            )
        with self._measuring:  # two edits would compute the same twice
            return key_statistics(model, references, layers, cache=self._statistics_folder, progress=progress)

    def evict(self, number: int) -> None:
        """Forgets a version that was deleted."""
        self.engine.evict(number)

    def close(self, drain_seconds: float) -> None:
        """Lets the engine end what it has begun."""
        self.engine.close(drain_seconds)


class Models:
    """The configured models by name.

    `changed` is called with a name and its new state, in the loading thread. `observer` makes what a model's engine
    tells of its work.
    """

    def __init__(
        self,
        configured: Mapping[str, ModelSettings],
        ledger: Ledger,
        store: DeltaStore,
        data_dir: Path,
        *,
        changed: Callable[[str, LoadState], None] = lambda _name, _state: None,
        observer: Callable[[str], EngineObserver] = lambda _name: Silent(),
    ) -> None:
        self._configured = dict(configured)
        self._ledger, self._store, self._data_dir = ledger, store, data_dir
        self._changed, self._observer = changed, observer
        self._lock = threading.Lock()
        self._futures: dict[str, Future[LoadedModel]] = {}
        # One at a time: a loader sets the process's default dtype and device while it runs.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load")

    @property
    def names(self) -> tuple[str, ...]:
        """The configured names, in order."""
        return tuple(sorted(self._configured))

    def start(self) -> None:
        """Enters every model in the ledger, and begins to load those that are to be there from the start.

        Raises SettingsError for a device, dtype or quantisation that this machine does not have.
        """
        if lines := [line for name in self.names for line in _unplaceable(name, self._configured[name])]:
            raise SettingsError("the settings cannot be used:\n" + "\n".join(f"  {line}" for line in lines))
        for name in self.names:
            self._ledger.ensure_model(name)
        for name in self.names:
            if self._configured[name].load == "start":
                self.load(name)

    def settings(self, name: str) -> ModelSettings:
        """How a model is configured. Raises NotFoundError (MODEL_NOT_FOUND)."""
        try:
            return self._configured[name]
        except KeyError:
            raise NotFoundError(
                f'there is no model "{name}"; ListModels names those there are', reason="MODEL_NOT_FOUND"
            ) from None

    def load(self, name: str) -> "Future[LoadedModel]":
        """The model, loaded now if it is not: never waits. After a failed load the next call tries again.

        Raises NotFoundError; the future raises ModelError, or BaseChangedError where the checkpoint is another one.
        """
        self.settings(name)
        with self._lock:
            future = self._futures.get(name)
            if future is None or (future.done() and (future.cancelled() or future.exception() is not None)):
                future = self._futures[name] = self._loader.submit(self._load, name)
            return future

    def get(self, name: str) -> LoadedModel:
        """The model; waits while it is loaded. Raises as `load` and its future do."""
        return self.load(name).result()

    def loaded(self, name: str) -> LoadedModel | None:
        """The model if it is in memory. Raises NotFoundError."""
        self.settings(name)
        with self._lock:
            future = self._futures.get(name)
        done = future is not None and future.done() and not future.cancelled() and future.exception() is None
        return future.result() if future is not None and done else None

    def state(self, name: str) -> LoadState:
        """Where a model stands. Raises NotFoundError."""
        self.settings(name)
        with self._lock:
            future = self._futures.get(name)
        if future is None:
            return LoadState.UNLOADED
        if not future.done():
            return LoadState.LOADING
        return LoadState.READY if self.loaded(name) else LoadState.FAILED

    def close(self, drain_seconds: float) -> None:
        """Loads nothing more and closes the engines."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        for name in self.names:
            if loaded := self.loaded(name):
                loaded.close(drain_seconds)

    def _load(self, name: str) -> LoadedModel:
        self._changed(name, LoadState.LOADING)
        try:
            loaded = self._loaded(name, self._configured[name])
        except Exception as error:
            _log.error("model %s could not be loaded: %s", name, error)
            self._changed(name, LoadState.FAILED)
            if isinstance(error, ErrataError):
                raise
            raise ModelError(f"model {name!r} could not be loaded: {type(error).__name__}: {error}") from error
        self._changed(name, LoadState.READY)
        return loaded

    def _loaded(self, name: str, settings: ModelSettings) -> LoadedModel:
        try:
            base = load_model(
                settings.source, dtype=settings.dtype, device=settings.device, quantization=settings.quantization
            )
        except InvalidInputError as error:
            # Whoever asks for the model did not give what is at fault.
            raise ModelError(f"models.{name}.{error}") from error
        import peft  # noqa: F401  (takes seconds, for which the first delta that is stored or read does not wait)

        folder = self._data_dir / "statistics" / name
        loaded = LoadedModel(name, settings, base, self._ledger, self._store, folder, self._observer(name))
        self._ledger.ensure_model(name)
        self._ledger.describe_model(
            name, base_sha256=base.base_sha256, architecture=loaded.architecture, layers=loaded.layers
        )
        loaded.engine.start()
        _log.info(
            "model %s: %s with %d layers, %s in %s on %s, quantization %s, base %s",
            name, loaded.architecture, loaded.layers, size(loaded.memory_bytes), settings.dtype, settings.device,
            settings.quantization, base.base_sha256,
        )  # fmt: skip
        return loaded


def _unplaceable(name: str, settings: ModelSettings) -> Iterator[str]:
    """A line for what of a model's settings this machine cannot do."""
    try:
        device = checked_device(settings.device)
        dtype = checked_dtype(settings.dtype, device)
        if settings.quantization != "none":
            check_usable(settings.quantization, dtype)
    except InvalidInputError as error:
        yield f"models.{name}.{error}"


class _DeltaCache:
    """Deltas by hash, the least recently used dropped first. Descendants share their ancestors' deltas."""

    def __init__(self, read: Callable[[str], Delta], most_bytes: int) -> None:
        self._read, self._most = read, most_bytes
        self._lock = threading.Lock()
        self._found: OrderedDict[str, Delta] = OrderedDict()

    def get(self, sha256: str) -> Delta:
        with self._lock:
            if found := self._found.get(sha256):
                self._found.move_to_end(sha256)
                return found
        read = self._read(sha256)
        with self._lock:
            self._found[sha256] = read
            while len(self._found) > 1 and sum(d.nbytes for d in self._found.values()) > self._most:
                self._found.popitem(last=False)
        return read
