import pytest
from google.protobuf.message import Message
from ledgers import BASE, Clock, Edit, new_version
from sqlalchemy import text

from errata.server.errors import BaseChangedError, LedgerError, NotFoundError, VersionInUseError
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, JobRow, JobState, ModelRow, PublishState, TaskKind
from errata.v1 import evaluation_pb2, history_pb2


def queue(ledger: Ledger, kind: JobKind = JobKind.EDIT, version: int = 0) -> JobRow:
    return ledger.create_job(kind, "atlas", version=version, request=b"request", request_id=None, actor="ada")


def numbers(ledger: Ledger) -> list[int]:
    return [version.number for version in ledger.versions("atlas", None, 100)]


def test_a_model_begins_with_its_base_as_version_0(ledger: Ledger, clock: Clock) -> None:
    ledger.ensure_model("atlas")
    [base] = ledger.versions("atlas", None, 10)
    assert (base.number, base.parent, base.edit, base.base_sha256, base.delta_sha256) == (0, None, None, BASE, "")
    assert (base.publish_state, base.aliases, base.created_by) == (PublishState.NONE, (), "server")
    assert base.create_time == clock.now


def test_a_model_is_described_once_it_was_loaded(ledger: Ledger) -> None:
    ledger.ensure_model("mars")
    assert ledger.model("mars") == ModelRow(name="mars", base_sha256="", architecture="", layers=0)
    ledger.describe_model("mars", base_sha256="m" * 64, architecture="LlamaForCausalLM", layers=4)
    ledger.ensure_model("mars")
    described = ModelRow(name="mars", base_sha256="m" * 64, architecture="LlamaForCausalLM", layers=4)
    assert ledger.model("mars") == described
    assert ledger.version("mars", 0).base_sha256 == "m" * 64


def test_models_come_by_name_page_by_page(ledger: Ledger) -> None:
    for name in ("venus", "mars", "earth"):
        ledger.ensure_model(name)
    assert [model.name for model in ledger.models(None, 2)] == ["atlas", "earth"]
    assert [model.name for model in ledger.models("earth", 2)] == ["mars", "venus"]
    assert ledger.models("venus", 2) == []


def test_an_unknown_model_is_not_found(ledger: Ledger) -> None:
    for call in (
        lambda: ledger.model("mars"),
        lambda: ledger.versions("mars", None, 10),
        lambda: ledger.version("mars", 0),
        lambda: ledger.resolve("mars"),
        lambda: ledger.aliases("mars"),
        lambda: ledger.delete_version("mars", 1, actor="ada", publish=True),
    ):
        with pytest.raises(NotFoundError) as refused:
            call()
        assert refused.value.said_reason == "MODEL_NOT_FOUND"


def test_a_checkpoint_may_change_only_while_nothing_was_made_for_it(ledger: Ledger, edit: Edit) -> None:
    ledger.describe_model("atlas", base_sha256="c" * 64, architecture="A", layers=6)
    ledger.describe_model("atlas", base_sha256=BASE, architecture="A", layers=6)
    edit()
    ledger.describe_model("atlas", base_sha256=BASE, architecture="A", layers=6)
    with pytest.raises(BaseChangedError, match="c" * 64):
        ledger.describe_model("atlas", base_sha256="c" * 64, architecture="A", layers=6)
    assert ledger.model("atlas").base_sha256 == BASE
    ledger.delete_version("atlas", 1, actor="ada", publish=True)
    ledger.describe_model("atlas", base_sha256="c" * 64, architecture="A", layers=6)


def test_an_edit_ends_with_its_version(ledger: Ledger, clock: Clock) -> None:
    job = queue(ledger)
    ledger.claim([JobKind.EDIT])
    clock.forward(3)
    made = ledger.commit_edit(job.id, new_version(), result=b"result", publish=True)
    ended = ledger.job(JobKind.EDIT, "atlas", job.id)
    assert (ended.state, ended.made, ended.result, ended.end_time) == (JobState.SUCCEEDED, 1, b"result", clock.now)
    assert made == ledger.version("atlas", 1)
    assert (made.number, made.parent, made.edit, made.created_by, made.create_time) == (1, 0, job.id, "ada", clock.now)
    new = new_version()
    assert (made.layers, made.facts, made.scores, made.delta_bytes) == (
        new.layers,
        new.facts,
        new.scores,
        new.delta_bytes,
    )
    assert made.publish_state is PublishState.PENDING


def test_a_rejected_version_is_kept_for_study(ledger: Ledger) -> None:
    job = queue(ledger)
    made = ledger.commit_edit(job.id, new_version(("specificity 0.70 < 0.90",)), result=b"", publish=True)
    assert made.rejections == ("specificity 0.70 < 0.90",)
    assert ledger.job(JobKind.EDIT, "atlas", job.id).state is JobState.REJECTED
    assert ledger.version("atlas", 1) == made


def test_committing_an_edit_again_returns_the_version_it_made(ledger: Ledger) -> None:
    job = queue(ledger)
    first = ledger.commit_edit(job.id, new_version(), result=b"one", publish=True)
    assert ledger.commit_edit(job.id, new_version(("no",)), result=b"two", publish=True) == first
    assert numbers(ledger) == [1, 0]
    assert len(ledger.tasks_due(first.create_time, 10)) == 1
    assert ledger.job(JobKind.EDIT, "atlas", job.id).result == b"one"


def test_an_edit_that_has_ended_makes_no_version(ledger: Ledger) -> None:
    job = queue(ledger)
    ledger.request_cancel(JobKind.EDIT, "atlas", job.id, "ada")
    with pytest.raises(LedgerError, match="CANCELLED"):
        ledger.commit_edit(job.id, new_version(), result=b"", publish=True)
    assert numbers(ledger) == [0]


def test_only_an_edit_makes_a_version(ledger: Ledger) -> None:
    trace = queue(ledger, JobKind.TRACE)
    with pytest.raises(ValueError, match="is no edit"):
        ledger.commit_edit(trace.id, new_version(), result=b"", publish=True)
    with pytest.raises(NotFoundError):
        ledger.commit_edit("0" * 32, new_version(), result=b"", publish=True)


def test_an_edit_of_a_checkpoint_that_was_exchanged_meanwhile_is_refused(ledger: Ledger) -> None:
    job = queue(ledger)
    ledger.describe_model("atlas", base_sha256="c" * 64, architecture="A", layers=6)
    with pytest.raises(BaseChangedError, match="ask for it again"):
        ledger.commit_edit(job.id, new_version(), result=b"", publish=True)
    assert numbers(ledger) == [0]


def test_a_commit_that_fails_half_way_leaves_nothing_behind(ledger: Ledger, clock: Clock) -> None:
    job = queue(ledger)
    ledger.claim([JobKind.EDIT])
    before = ledger.job(JobKind.EDIT, "atlas", job.id)
    # The audit is what a commit writes last.
    with ledger._engine.begin() as connection:
        connection.execute(text("ALTER TABLE errata_audit RENAME TO elsewhere"))
    with pytest.raises(Exception, match="errata_audit"):
        ledger.commit_edit(job.id, new_version(), result=b"result", publish=True)
    assert ledger.job(JobKind.EDIT, "atlas", job.id) == before
    assert numbers(ledger) == [0]
    assert ledger.tasks_due(clock.now, 10) == []
    with ledger._engine.begin() as connection:
        connection.execute(text("ALTER TABLE elsewhere RENAME TO errata_audit"))
    assert ledger.commit_edit(job.id, new_version(), result=b"result", publish=True).number == 1


def test_a_version_without_mlflow_is_never_to_be_published(ledger: Ledger, edit: Edit, clock: Clock) -> None:
    assert edit(publish=False).publish_state is PublishState.NONE
    assert ledger.unpublished() == []
    assert ledger.tasks_due(clock.now, 10) == []


def test_versions_come_from_the_newest_to_the_base_page_by_page(ledger: Ledger, edit: Edit) -> None:
    for _ in range(4):
        edit()
    pages = [ledger.versions("atlas", before, 3) for before in (None, 2, 0)]
    assert [[version.number for version in page] for page in pages] == [[4, 3, 2], [1, 0], []]


def test_a_lineage_goes_from_the_version_to_the_base(ledger: Ledger, edit: Edit) -> None:
    for parent in (0, 1, 1, 3):
        edit(parent)
    assert [version.number for version in ledger.lineage("atlas", 4)] == [4, 3, 1, 0]
    assert [version.number for version in ledger.lineage("atlas", 2)] == [2, 1, 0]
    assert [version.number for version in ledger.lineage("atlas", 0)] == [0]
    with pytest.raises(NotFoundError):
        ledger.lineage("atlas", 5)


def test_models_keep_their_versions_apart(ledger: Ledger, edit: Edit) -> None:
    edit(edit().number)
    ledger.ensure_model("mars")
    job = ledger.create_job(JobKind.EDIT, "mars", version=0, request=b"", request_id=None, actor="ada")
    assert ledger.commit_edit(job.id, new_version(), result=b"", publish=True).number == 1
    assert [(v.model, v.number) for v in ledger.lineage("mars", 1)] == [("mars", 1), ("mars", 0)]


def test_a_version_is_meant_by_number_alias_or_neither(ledger: Ledger, edit: Edit) -> None:
    edit(), edit()
    assert ledger.resolve("atlas", 1).number == 1
    assert ledger.resolve("atlas").number == 0
    assert ledger.resolve("atlas", alias="champion").number == 0
    for alias, number in (("champion", 1), ("candidate", 2)):
        ledger.promote("atlas", number, alias, etag=None, override_reason=None, actor="ada", publish=True)
    assert ledger.resolve("atlas").number == 1
    assert ledger.resolve("atlas", alias="champion").aliases == ("champion",)
    assert ledger.resolve("atlas", None, "candidate").number == 2
    with pytest.raises(NotFoundError) as refused:
        ledger.resolve("atlas", alias="best")
    assert refused.value.said_reason == "ALIAS_NOT_FOUND"
    with pytest.raises(NotFoundError) as refused:
        ledger.resolve("atlas", 3)
    assert refused.value.said_reason == "VERSION_NOT_FOUND"


def test_a_deleted_version_is_gone_and_its_number_is_not_used_again(ledger: Ledger, edit: Edit) -> None:
    edit(), edit()
    was = ledger.version("atlas", 2)
    assert ledger.delete_version("atlas", 2, actor="bob", publish=True) == was
    for call in (
        lambda: ledger.version("atlas", 2),
        lambda: ledger.resolve("atlas", 2),
        lambda: ledger.lineage("atlas", 2),
        lambda: ledger.promote("atlas", 2, "a", etag=None, override_reason=None, actor="ada", publish=True),
        lambda: ledger.delete_version("atlas", 2, actor="bob", publish=True),
        lambda: queue(ledger, version=2),
    ):
        with pytest.raises(NotFoundError):
            call()
    assert numbers(ledger) == [1, 0]
    assert edit().number == 3
    assert numbers(ledger) == [3, 1, 0]


def test_a_deletion_is_in_the_audit(ledger: Ledger, edit: Edit) -> None:
    edit()
    ledger.delete_version("atlas", 1, actor="bob", publish=True)
    entry = ledger.audit("atlas", None, 1)[0]
    assert (entry.action, entry.actor, entry.resource) == ("version.delete", "bob", "models/atlas/versions/1")


def test_the_base_is_never_deleted(ledger: Ledger) -> None:
    with pytest.raises(VersionInUseError, match="base"):
        ledger.delete_version("atlas", 0, actor="ada", publish=True)
    assert numbers(ledger) == [0]


def test_a_version_with_an_alias_is_deleted_only_once_the_alias_has_moved(ledger: Ledger, edit: Edit) -> None:
    edit(), edit()
    ledger.promote("atlas", 1, "candidate", etag=None, override_reason=None, actor="ada", publish=True)
    with pytest.raises(VersionInUseError, match='"candidate"'):
        ledger.delete_version("atlas", 1, actor="ada", publish=True)
    ledger.promote("atlas", 2, "candidate", etag=None, override_reason=None, actor="ada", publish=True)
    ledger.delete_version("atlas", 1, actor="ada", publish=True)
    assert numbers(ledger) == [2, 0]


def test_a_version_that_another_is_built_on_is_deleted_only_after_it(ledger: Ledger, edit: Edit) -> None:
    edit(), edit(1)
    with pytest.raises(VersionInUseError, match="version 2"):
        ledger.delete_version("atlas", 1, actor="ada", publish=True)
    ledger.delete_version("atlas", 2, actor="ada", publish=True)
    ledger.delete_version("atlas", 1, actor="ada", publish=True)
    assert numbers(ledger) == [0]


@pytest.mark.parametrize("kind", JobKind)
def test_a_version_that_a_job_works_on_is_deleted_only_after_its_end(ledger: Ledger, edit: Edit, kind: JobKind) -> None:
    edit()
    job = queue(ledger, kind, 1)
    with pytest.raises(VersionInUseError, match=job.id):
        ledger.delete_version("atlas", 1, actor="ada", publish=True)
    ledger.claim([kind])
    with pytest.raises(VersionInUseError, match=job.id):
        ledger.delete_version("atlas", 1, actor="ada", publish=True)
    ledger.finish(job.id, JobState.FAILED)
    ledger.delete_version("atlas", 1, actor="ada", publish=True)
    assert numbers(ledger) == [0]


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (JobKind.EVALUATION, evaluation_pb2.Evaluation(baseline="models/atlas/versions/1")),
        (JobKind.DERIVATION, history_pb2.Derivation(sources=["models/atlas/versions/2", "models/atlas/versions/1"])),
    ],
    ids=["evaluation", "derivation"],
)
def test_a_version_that_a_job_needs_besides_its_own_is_deleted_only_after_its_end(
    ledger: Ledger, edit: Edit, kind: JobKind, asked: Message
) -> None:
    edit(), edit()
    summary = asked.SerializeToString()
    job = ledger.create_job(
        kind, "atlas", version=2, request=b"", request_id=None, actor="ada", summary=summary, also=(1,)
    )
    with pytest.raises(VersionInUseError, match=job.id):
        ledger.delete_version("atlas", 1, actor="ada", publish=True)
    ledger.claim([kind])
    with pytest.raises(VersionInUseError, match=job.id):
        ledger.delete_version("atlas", 1, actor="ada", publish=True)
    ledger.finish(job.id, JobState.SUCCEEDED)
    ledger.delete_version("atlas", 1, actor="ada", publish=True)
    assert numbers(ledger) == [2, 0]


def test_deleting_a_version_drops_what_mlflow_was_still_to_be_told_of_it(
    ledger: Ledger, edit: Edit, clock: Clock
) -> None:
    made = edit()
    edit()
    ledger.delete_version("atlas", 1, actor="ada", publish=True)
    told = [(task.kind, task.version) for task in ledger.tasks_due(clock.now, 10)]
    # MLflow may have it half: the writer was perhaps at it.
    assert told == [(TaskKind.PUBLISH, 2), (TaskKind.DELETE_VERSION, 1)]
    assert made.edit is not None
    assert made.edit in ledger.tasks_due(clock.now, 10)[1].payload
    assert [version.number for version in ledger.unpublished()] == [2]


def test_a_delta_is_held_as_long_as_any_version_has_it(ledger: Ledger, edit: Edit) -> None:
    sha256 = edit().delta_sha256
    edit()
    assert ledger.holds_delta(sha256)
    ledger.delete_version("atlas", 1, actor="ada", publish=True)
    assert ledger.holds_delta(sha256)
    ledger.delete_version("atlas", 2, actor="ada", publish=True)
    assert not ledger.holds_delta(sha256)
