"""Base models, versions and aliases: what there is, and what is served by which name."""

from asyncio import to_thread
from collections.abc import Callable, Sequence

from errata.server.conversion import alias_message, audit_message, model_message, promotion, version_message
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import AliasRow, AuditRow, VersionRow
from errata.server.models import Models
from errata.server.names import alias_of, model_of, version_of, version_ref
from errata.server.security import OVERRIDE_ROLE
from errata.server.services.calls import Context, Pager, caller
from errata.server.store import ArtifactStore, DeltaStore
from errata.v1 import model_pb2, model_pb2_grpc


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """`publish` wakes whoever tells MLflow; None where there is no MLflow."""

    def __init__(
        self,
        ledger: Ledger,
        models: Models,
        deltas: DeltaStore,
        artifacts: ArtifactStore,
        pager: Pager,
        publish: Callable[[], None] | None,
    ) -> None:
        self._ledger, self._models, self._pager = ledger, models, pager
        self._deltas, self._artifacts, self._publish = deltas, artifacts, publish

    async def ListModels(  # noqa: N802
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        """The configured models that the caller may see, by name."""
        names, token = self._pager.page("ListModels", "", request, self._names, str)
        models = [await to_thread(self._model, name) for name in names]
        return model_pb2.ListModelsResponse(models=models, next_page_token=token)

    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        """One configured model."""
        return model_pb2.GetModelResponse(model=await to_thread(self._model, model_of(request.name, "name")))

    async def ListVersions(  # noqa: N802
        self, request: model_pb2.ListVersionsRequest, context: Context
    ) -> model_pb2.ListVersionsResponse:
        """A model's versions, the newest first."""
        model = model_of(request.parent, "parent")

        def fetch(after: str | None, limit: int) -> list[VersionRow]:
            return self._ledger.versions(model, None if after is None else int(after), limit)

        rows, token = await to_thread(
            self._pager.page, "ListVersions", model, request, fetch, lambda row: str(row.number)
        )
        return model_pb2.ListVersionsResponse(versions=map(version_message, rows), next_page_token=token)

    async def GetVersion(  # noqa: N802
        self, request: model_pb2.GetVersionRequest, context: Context
    ) -> model_pb2.GetVersionResponse:
        """One version, by number or alias."""
        row = await to_thread(self._resolved, request.name)
        return model_pb2.GetVersionResponse(version=version_message(row))

    async def GetLineage(  # noqa: N802
        self, request: model_pb2.GetLineageRequest, context: Context
    ) -> model_pb2.GetLineageResponse:
        """A version and its ancestors."""
        row = await to_thread(self._resolved, request.name)
        rows = await to_thread(self._ledger.lineage, row.model, row.number)
        return model_pb2.GetLineageResponse(versions=map(version_message, rows))

    async def Promote(  # noqa: N802
        self, request: model_pb2.PromoteRequest, context: Context
    ) -> model_pb2.PromoteResponse:
        """Points an alias to a version."""
        row = await to_thread(self._promoted, request)
        if not request.validate_only:
            self._tell()
        return model_pb2.PromoteResponse(alias=alias_message(row))

    async def Rollback(  # noqa: N802
        self, request: model_pb2.RollbackRequest, context: Context
    ) -> model_pb2.RollbackResponse:
        """Points an alias back."""
        model, alias = alias_of(request.name, "name")
        row = await to_thread(
            self._ledger.rollback,
            model,
            alias,
            etag=request.etag or None,
            actor=caller().name,
            publish=self._publish is not None,
        )
        self._tell()
        return model_pb2.RollbackResponse(alias=alias_message(row))

    async def DeleteVersion(  # noqa: N802
        self, request: model_pb2.DeleteVersionRequest, context: Context
    ) -> model_pb2.DeleteVersionResponse:
        """Removes a version, and its files where no other version shares them."""
        model, number = version_of(request.name, "name")
        await to_thread(self._delete, model, number)
        self._tell()
        return model_pb2.DeleteVersionResponse()

    async def ListAuditEntries(  # noqa: N802
        self, request: model_pb2.ListAuditEntriesRequest, context: Context
    ) -> model_pb2.ListAuditEntriesResponse:
        """What was changed by whom, the newest first."""
        model = model_of(request.parent, "parent")

        def fetch(after: str | None, limit: int) -> list[AuditRow]:
            self._ledger.model(model)
            return self._ledger.audit(model, None if after is None else int(after), limit)

        rows, token = await to_thread(
            self._pager.page, "ListAuditEntries", model, request, fetch, lambda row: str(row.id)
        )
        return model_pb2.ListAuditEntriesResponse(entries=map(audit_message, rows), next_page_token=token)

    def _names(self, after: str | None, limit: int) -> Sequence[str]:
        seen = (name for name in self._models.names if name > (after or "") and caller().may_read(name))
        return list(seen)[:limit]

    def _model(self, name: str) -> model_pb2.Model:
        settings, loaded = self._models.settings(name), self._models.loaded(name)
        return model_message(
            self._ledger.model(name),
            self._ledger.aliases(name),
            dtype=settings.dtype if settings.quantization == "none" else f"{settings.dtype}, {settings.quantization}",
            device=settings.device,
            loaded=loaded is not None,
            memory_bytes=loaded.memory_bytes if loaded else 0,
            versions_memory_bytes=loaded.engine.versions_memory_bytes if loaded else 0,
        )

    def _resolved(self, name: str) -> VersionRow:
        ref = version_ref(name, "name")
        return self._ledger.resolve(ref.model, ref.number, ref.alias)

    def _promoted(self, request: model_pb2.PromoteRequest) -> AliasRow:
        asked = promotion(request)
        if asked.override_reason:
            caller().require(OVERRIDE_ROLE, asked.model)
        return self._ledger.promote(
            asked.model,
            asked.number,
            asked.alias,
            etag=asked.etag,
            override_reason=asked.override_reason,
            actor=caller().name,
            publish=self._publish is not None,
            validate_only=asked.validate_only,
        )

    def _delete(self, model: str, number: int) -> None:
        row = self._ledger.delete_version(model, number, actor=caller().name, publish=self._publish is not None)
        if loaded := self._models.loaded(model):
            loaded.evict(number)
        if not self._ledger.holds_delta(row.delta_sha256):
            self._deltas.remove(row.delta_sha256)
        if row.edit:
            self._artifacts.remove(row.edit)

    def _tell(self) -> None:
        if self._publish:
            self._publish()
