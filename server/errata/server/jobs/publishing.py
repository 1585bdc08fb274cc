"""How a job's delta becomes a version: what stands on the disk first, then one transaction, then whoever is told."""

import logging
from collections.abc import Callable, Mapping, Sequence

from errata.editor.delta import Delta
from errata.editor.evaluation import Score
from errata.server.conversion import scores_json
from errata.server.jobs.faults import Fault
from errata.server.jobs.running import RunningJob
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import NewVersion, VersionRow
from errata.server.models import LoadedModel
from errata.server.store import ArtifactStore, DeltaStore

_log = logging.getLogger(__name__)


class Publisher:
    """Makes versions. `outbox_notify` wakes whoever tells MLflow; None where nobody does."""

    def __init__(
        self,
        ledger: Ledger,
        deltas: DeltaStore,
        artifacts: ArtifactStore,
        outbox_notify: Callable[[], None] | None,
        fault: Fault,
    ) -> None:
        self._ledger, self._deltas, self._artifacts = ledger, deltas, artifacts
        self._outbox_notify, self._fault = outbox_notify, fault

    def __call__(
        self,
        job: RunningJob,
        loaded: LoadedModel,
        delta: Delta,
        files: Mapping[str, bytes],
        *,
        facts: Sequence[str],
        scores: Sequence[Score],
        rejections: tuple[str, ...],
        result: bytes,
        summary: bytes,
        alias: str,
    ) -> VersionRow:
        """Ends the job with its version: SUCCEEDED, with `alias` on it if not "", or REJECTED with `rejections`.

        Raises what stops it before.
        """
        job.check(now=True)
        # From here on it is not stopped, so that a cancelled job leaves nothing on the disk.
        stored = self._deltas.put(delta, loaded.base)
        self._artifacts.write(job.row.id, files)
        self._fault("stored")
        new = NewVersion(
            base_sha256=loaded.base.base_sha256,
            delta_sha256=stored.sha256,
            delta_bytes=stored.nbytes,
            layers=tuple(delta.layers),
            facts=tuple(facts),
            scores=scores_json(scores),
            rejections=rejections,
            alias=alias,
        )
        publish = self._outbox_notify is not None
        version = self._ledger.commit_edit(job.row.id, new, result=result, publish=publish, summary=summary)
        self._fault("committed")
        self._announce(loaded, delta, version)
        return version

    def _announce(self, loaded: LoadedModel, delta: Delta, version: VersionRow) -> None:
        """The version exists; what fails from here on does not fail the job."""
        try:
            # Once more: until now, deleting the last version of an equal delta could remove the one they share.
            self._deltas.put(delta, loaded.base)
            loaded.deltas_of(version.number)
        except Exception:
            _log.exception("version %d of %s could not be read back", version.number, version.model)
        if self._outbox_notify:
            self._outbox_notify()
