"""The versions an engine holds: their factors on the model's device, least recently used out first."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from errata.editor.delta import Delta
from errata.editor.mixed import VersionFactors, version_factors
from errata.editor.model import EditableModel


class LoadedVersions:
    """Loads, keeps and forgets versions. Thread-safe.

    `deltas_of(version)` gives the deltas of its lineage; none for version 0. Above `max_bytes` the versions that
    were not asked for longest are forgotten; the one asked for last always stays. A row in flight keeps its own.
    """

    def __init__(
        self, model: EditableModel, deltas_of: Callable[[int], Sequence[Delta]], max_bytes: int = 2**30
    ) -> None:
        self._model, self._deltas_of, self._max_bytes = model, deltas_of, max_bytes
        self._lock = threading.Lock()
        self._found: OrderedDict[int, VersionFactors] = OrderedDict()
        self._bytes = 0

    def get(self, version: int) -> VersionFactors:
        """The factors of a version, loaded if need be; raises whatever `deltas_of` raises."""
        with self._lock:
            if found := self._found.get(version):
                self._found.move_to_end(version)
                return found
        loaded = version_factors(self._model, self._deltas_of(version))
        with self._lock:
            self._forget(version)
            self._found[version] = loaded
            self._bytes += loaded.nbytes
            while self._bytes > self._max_bytes and len(self._found) > 1:
                self._forget(next(iter(self._found)))
        return loaded

    def evict(self, version: int) -> None:
        """Forgets a version, loaded or not."""
        with self._lock:
            self._forget(version)

    @property
    def loaded(self) -> tuple[int, ...]:
        """Their numbers, the one asked for last at the end."""
        with self._lock:
            return tuple(self._found)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors held."""
        return self._bytes

    def _forget(self, version: int) -> None:
        if found := self._found.pop(version, None):
            self._bytes -= found.nbytes
