"""Models, versions and aliases over the wire."""

import json

import grpc
import pytest
from hosting import BASE, Hosted, edit_message, refused

from errata.v1 import evaluation_pb2, model_pb2

ATLAS = "models/atlas"


def test_a_model_says_what_it_is_and_what_it_takes(hosted: Hosted) -> None:
    loaded = hosted.server.models.get("atlas")
    model = hosted.call.models.GetModel(model_pb2.GetModelRequest(name=ATLAS)).model
    assert model.name == ATLAS
    assert model.base_sha256 == loaded.base.base_sha256
    assert (model.architecture, model.layers) == ("LlavaForConditionalGeneration", 6)
    assert (model.dtype, model.device, model.loaded) == ("float32", "cpu", True)
    assert model.memory_bytes == loaded.memory_bytes > 0
    assert [m.name for m in hosted.call.models.ListModels(model_pb2.ListModelsRequest()).models] == [ATLAS]


@pytest.mark.slow
def test_versions_are_listed_page_by_page_the_newest_first(hosted: Hosted) -> None:
    made = [hosted.version("Estonia"), hosted.version("Latvia")]
    names, token = [], ""
    while True:
        page = hosted.call.models.ListVersions(
            model_pb2.ListVersionsRequest(parent=ATLAS, page_size=1, page_token=token)
        )
        names += [v.name for v in page.versions]
        token = page.next_page_token
        if not token:
            break
    assert names[:2] == made[::-1]
    assert names[-1] == BASE
    assert len(names) == len(set(names))


def test_a_version_tells_its_edit_its_parents_and_its_scores(hosted: Hosted) -> None:
    first = hosted.version("Estonia")
    second = hosted.version("Latvia", parent=first)
    version = hosted.call.models.GetVersion(model_pb2.GetVersionRequest(name=second)).version
    assert version.parent == first
    assert version.edit.startswith("models/atlas/edits/")
    assert version.state == model_pb2.VERSION_STATE_READY
    assert version.publish_state == model_pb2.PUBLISH_STATE_NONE
    assert version.delta_bytes > 0
    assert len(version.delta_sha256) == 64
    assert list(version.layers) == [1]
    assert version.scores[0].after == 1.0
    lineage = hosted.call.models.GetLineage(model_pb2.GetLineageRequest(name=second)).versions
    assert [v.name for v in lineage] == [second, first, BASE]


def test_an_alias_is_promoted_and_rolled_back_with_its_etag(hosted: Hosted) -> None:
    version = hosted.version("Estonia")
    promote = model_pb2.PromoteRequest(version=BASE, alias="stable")
    first = hosted.call.models.Promote(promote).alias
    moved = hosted.call.models.Promote(model_pb2.PromoteRequest(version=version, alias="stable", etag=first.etag)).alias
    assert (moved.name, moved.version) == ("models/atlas/aliases/stable", version)
    late = refused(
        lambda: hosted.call.models.Promote(model_pb2.PromoteRequest(version=BASE, alias="stable", etag=first.etag))
    )
    assert (late.code, late.reason, late.field) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH", "etag")
    back = hosted.call.models.Rollback(model_pb2.RollbackRequest(name=moved.name, etag=moved.etag)).alias
    assert back.version == BASE
    none = refused(lambda: hosted.call.models.Rollback(model_pb2.RollbackRequest(name=moved.name)))
    assert (none.code, none.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOTHING_TO_ROLL_BACK")


def test_a_promotion_that_only_validates_moves_nothing(hosted: Hosted) -> None:
    hosted.call.models.Promote(model_pb2.PromoteRequest(version=BASE, alias="dry"))
    version = hosted.version("Estonia")
    checked = hosted.call.models.Promote(model_pb2.PromoteRequest(version=version, alias="dry", validate_only=True))
    assert checked.alias.version == version
    assert (
        hosted.call.models.GetVersion(model_pb2.GetVersionRequest(name="models/atlas/aliases/dry")).version.name == BASE
    )


def test_a_deleted_version_is_gone_with_its_files(hosted: Hosted) -> None:
    version = hosted.call.models.GetVersion(model_pb2.GetVersionRequest(name=hosted.version("Lithuania"))).version
    folder = hosted.server.stores.deltas.folder(version.delta_sha256)
    assert folder.is_dir()
    hosted.call.models.DeleteVersion(model_pb2.DeleteVersionRequest(name=version.name))
    gone = refused(lambda: hosted.call.models.GetVersion(model_pb2.GetVersionRequest(name=version.name)))
    assert (gone.code, gone.reason) == (grpc.StatusCode.NOT_FOUND, "VERSION_NOT_FOUND")
    assert not folder.exists()


def test_a_version_that_is_needed_cannot_be_deleted(hosted: Hosted) -> None:
    first = hosted.version("Estonia")
    hosted.version("Latvia", parent=first)
    kept = refused(lambda: hosted.call.models.DeleteVersion(model_pb2.DeleteVersionRequest(name=first)))
    assert (kept.code, kept.reason, kept.field) == (grpc.StatusCode.FAILED_PRECONDITION, "VERSION_IN_USE", "name")
    base = refused(lambda: hosted.call.models.DeleteVersion(model_pb2.DeleteVersionRequest(name=BASE)))
    assert base.reason == "VERSION_IN_USE"


def test_the_audit_says_who_did_what(hosted: Hosted) -> None:
    version = hosted.version("Estonia")
    hosted.call.models.Promote(model_pb2.PromoteRequest(version=version, alias="audited"))
    page = hosted.call.models.ListAuditEntries(model_pb2.ListAuditEntriesRequest(parent=ATLAS, page_size=2))
    last = page.entries[0]
    assert (last.actor, last.action, last.resource) == ("anonymous", "alias.promote", "models/atlas/aliases/audited")
    assert json.loads(last.details_json)["version"] == int(version.rpartition("/")[2])
    assert page.next_page_token
    more = hosted.call.models.ListAuditEntries(
        model_pb2.ListAuditEntriesRequest(parent=ATLAS, page_size=2, page_token=page.next_page_token)
    )
    assert more.entries[0].time.ToDatetime() <= page.entries[-1].time.ToDatetime()


def test_a_rejected_version_is_promoted_only_with_a_reason_which_the_audit_keeps(hosted: Hosted) -> None:
    request = edit_message("Estonia", steps=1)
    request.guardrails.add(metric=evaluation_pb2.METRIC_EFFICACY, least=1.0)
    request.requests[0].target = "Ouagadougou Zanzibar Vaduz"
    edit = hosted.edit(request)
    version = hosted.call.models.GetVersion(model_pb2.GetVersionRequest(name=edit.version)).version
    assert version.state == model_pb2.VERSION_STATE_REJECTED
    assert list(version.rejections) == list(edit.rejections) != []
    promote = model_pb2.PromoteRequest(version=edit.version, alias="risky")
    denied = refused(lambda: hosted.call.models.Promote(promote))
    assert (denied.code, denied.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VERSION_REJECTED")
    promote.override_guardrails = True
    unsaid = refused(lambda: hosted.call.models.Promote(promote))
    assert (unsaid.code, unsaid.field) == (grpc.StatusCode.INVALID_ARGUMENT, "override_reason")
    promote.override_reason = "for a study"
    assert hosted.call.models.Promote(promote).alias.version == edit.version
    entries = hosted.call.models.ListAuditEntries(model_pb2.ListAuditEntriesRequest(parent=ATLAS, page_size=1)).entries
    assert entries[0].action == "alias.promote.override"
    assert json.loads(entries[0].details_json)["reason"] == "for a study"
