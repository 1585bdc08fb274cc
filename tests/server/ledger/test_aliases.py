import json
from dataclasses import replace

import pytest
from ledgers import Clock, Edit, new_version

from errata.server.errors import EtagMismatchError, NotFoundError, NothingToRollBackError, RejectedVersionError
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import AliasRow, JobKind, TaskKind, VersionRow


def promote(
    ledger: Ledger,
    number: int,
    alias: str = "champion",
    *,
    etag: str | None = None,
    reason: str | None = None,
    publish: bool = True,
    validate_only: bool = False,
) -> AliasRow:
    return ledger.promote(
        "atlas",
        number,
        alias,
        etag=etag,
        override_reason=reason,
        actor="ada",
        publish=publish,
        validate_only=validate_only,
    )


def rollback(ledger: Ledger, alias: str = "champion", etag: str | None = None) -> int:
    return ledger.rollback("atlas", alias, etag=etag, actor="bob", publish=True).version


@pytest.fixture
def four(edit: Edit) -> None:
    """Versions 1 to 4, each built on the base."""
    for _ in range(4):
        edit()


def changes(ledger: Ledger) -> list[str]:
    return [entry.action for entry in ledger.audit("atlas", None, 100) if entry.action.startswith("alias.")]


@pytest.mark.usefixtures("four")
def test_an_alias_names_what_it_was_promoted_to(ledger: Ledger) -> None:
    assert ledger.aliases("atlas") == []
    champion, candidate = promote(ledger, 1), promote(ledger, 2, "candidate")
    assert ledger.alias("atlas", "champion") == champion
    assert ledger.aliases("atlas") == [candidate, champion]
    assert [version.aliases for version in ledger.versions("atlas", 3, 2)] == [("candidate",), ("champion",)]
    moved = promote(ledger, 2)
    assert ledger.version("atlas", 2).aliases == ("candidate", "champion")
    assert ledger.version("atlas", 1).aliases == ()
    assert moved.etag != champion.etag


def test_an_alias_that_nobody_set_is_not_found(ledger: Ledger) -> None:
    for alias in ("champion", "candidate"):
        with pytest.raises(NotFoundError) as refused:
            ledger.alias("atlas", alias)
        assert refused.value.said_reason == "ALIAS_NOT_FOUND"
    with pytest.raises(NotFoundError):
        rollback(ledger, "candidate")


@pytest.mark.usefixtures("four")
def test_a_promotion_is_in_the_audit_with_who_and_what(ledger: Ledger, clock: Clock) -> None:
    promote(ledger, 1)
    clock.forward(60)
    promote(ledger, 2)
    entry = ledger.audit("atlas", None, 1)[0]
    assert (entry.actor, entry.action, entry.resource) == ("ada", "alias.promote", "models/atlas/aliases/champion")
    assert entry.time == clock.now
    assert json.loads(entry.details) == {"version": 2, "previous": 1}


@pytest.mark.usefixtures("four")
def test_an_etag_lets_an_alias_move_only_from_where_it_was_seen(ledger: Ledger) -> None:
    seen = promote(ledger, 1)
    promote(ledger, 2, etag=seen.etag)
    with pytest.raises(EtagMismatchError, match="names version 2"):
        promote(ledger, 3, etag=seen.etag)
    with pytest.raises(EtagMismatchError):
        rollback(ledger, etag=seen.etag)
    with pytest.raises(EtagMismatchError, match="does not exist"):
        promote(ledger, 3, "candidate", etag=seen.etag)
    assert ledger.alias("atlas", "champion").version == 2
    assert len(changes(ledger)) == 2


@pytest.mark.usefixtures("four")
def test_an_etag_of_long_ago_does_not_fit_again_when_the_alias_comes_back(ledger: Ledger) -> None:
    seen = promote(ledger, 1)
    promote(ledger, 2)
    back = promote(ledger, 1)
    assert back.etag != seen.etag
    with pytest.raises(EtagMismatchError):
        promote(ledger, 3, etag=seen.etag)


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize("etag", [None, ""])
def test_without_an_etag_an_alias_moves_from_anywhere(ledger: Ledger, etag: str | None) -> None:
    promote(ledger, 1)
    assert promote(ledger, 2, etag=etag).version == 2


@pytest.mark.usefixtures("four")
def test_a_repeated_promotion_changes_nothing(ledger: Ledger, clock: Clock) -> None:
    seen = promote(ledger, 1)
    moved = promote(ledger, 2, etag=seen.etag)
    tasks = ledger.tasks_due(clock.now, 100)
    # The answer was lost on the way, and the caller asks again as before.
    assert promote(ledger, 2, etag=seen.etag) == moved
    assert ledger.tasks_due(clock.now, 100) == tasks
    assert len(changes(ledger)) == 2
    assert rollback(ledger) == 1


def test_a_rejected_version_is_promoted_only_with_a_reason(ledger: Ledger, edit: Edit) -> None:
    edit(rejections=("specificity 0.70 < 0.90",))
    for reason in (None, ""):
        with pytest.raises(RejectedVersionError, match=r"specificity 0\.70 < 0\.90"):
            promote(ledger, 1, reason=reason)
    assert ledger.aliases("atlas") == []
    promote(ledger, 1, reason="only Kazakhstan is asked\0 about")
    entry = ledger.audit("atlas", None, 1)[0]
    assert (entry.action, entry.actor) == ("alias.promote.override", "ada")
    assert json.loads(entry.details) == {
        "version": 1,
        "previous": 0,
        "reason": "only Kazakhstan is asked\0 about",
        "rejections": ["specificity 0.70 < 0.90"],
    }


@pytest.mark.usefixtures("four")
def test_an_override_that_overrides_nothing_is_an_ordinary_promotion(ledger: Ledger) -> None:
    promote(ledger, 1, reason="to be sure")
    assert changes(ledger) == ["alias.promote"]


@pytest.mark.usefixtures("four")
def test_validating_a_promotion_checks_and_changes_nothing(ledger: Ledger, edit: Edit, clock: Clock) -> None:
    edit(rejections=("no",))
    would = promote(ledger, 1, validate_only=True)
    assert would == AliasRow(model="atlas", alias="champion", version=1, etag="")
    assert ledger.aliases("atlas") == []
    seen = promote(ledger, 1)
    tasks = ledger.tasks_due(clock.now, 100)
    assert promote(ledger, 2, validate_only=True).etag == seen.etag
    with pytest.raises(RejectedVersionError):
        promote(ledger, 5, validate_only=True)
    with pytest.raises(EtagMismatchError):
        promote(ledger, 2, etag="0", validate_only=True)
    with pytest.raises(NotFoundError):
        promote(ledger, 6, validate_only=True)
    assert ledger.alias("atlas", "champion") == seen
    assert ledger.tasks_due(clock.now, 100) == tasks


@pytest.mark.usefixtures("four")
def test_two_rollbacks_in_a_row_go_two_steps_back(ledger: Ledger) -> None:
    for number in (1, 2, 3):
        promote(ledger, number, "candidate")
    assert [rollback(ledger, "candidate"), rollback(ledger, "candidate")] == [2, 1]
    with pytest.raises(NothingToRollBackError):
        rollback(ledger, "candidate")
    assert ledger.alias("atlas", "candidate").version == 1


@pytest.mark.usefixtures("four")
def test_a_promotion_after_a_rollback_starts_from_there(ledger: Ledger) -> None:
    for number in (1, 2, 3):
        promote(ledger, number)
    rollback(ledger)
    promote(ledger, 4)
    assert [rollback(ledger), rollback(ledger), rollback(ledger)] == [2, 1, 0]


@pytest.mark.usefixtures("four")
def test_a_rollback_is_a_change_of_its_own(ledger: Ledger, clock: Clock) -> None:
    first = promote(ledger, 1)
    promote(ledger, 2)
    back = ledger.rollback("atlas", "champion", etag=None, actor="bob", publish=True)
    assert (back.version, back.etag == first.etag) == (1, False)
    entry = ledger.audit("atlas", None, 1)[0]
    assert (entry.actor, entry.action, json.loads(entry.details)) == (
        "bob",
        "alias.rollback",
        {"version": 1, "previous": 2},
    )
    told = [task.version for task in ledger.tasks_due(clock.now, 100) if task.kind is TaskKind.SET_ALIAS]
    assert told == [1, 2, 1]


@pytest.mark.usefixtures("four")
def test_the_first_champion_rolls_back_to_the_base(ledger: Ledger) -> None:
    promote(ledger, 1)
    assert rollback(ledger) == 0
    assert ledger.resolve("atlas").number == 0
    with pytest.raises(NothingToRollBackError):
        rollback(ledger)


@pytest.mark.usefixtures("four")
def test_any_other_alias_has_nothing_before_its_first_version(ledger: Ledger) -> None:
    promote(ledger, 1, "candidate")
    with pytest.raises(NothingToRollBackError, match='"candidate"'):
        rollback(ledger, "candidate")


def test_a_base_promoted_to_champion_has_nothing_before_it(ledger: Ledger) -> None:
    promote(ledger, 0)
    with pytest.raises(NothingToRollBackError):
        rollback(ledger)


@pytest.mark.usefixtures("four")
def test_a_rollback_passes_over_versions_deleted_since(ledger: Ledger) -> None:
    for number in (1, 2, 3):
        promote(ledger, number, "candidate")
    ledger.delete_version("atlas", 2, actor="ada", publish=True)
    assert rollback(ledger, "candidate") == 1


@pytest.mark.usefixtures("four")
def test_a_rollback_never_ends_where_it_began(ledger: Ledger) -> None:
    for number in (4, 1, 2, 1):
        promote(ledger, number, "candidate")
    ledger.delete_version("atlas", 2, actor="ada", publish=True)
    assert rollback(ledger, "candidate") == 4


@pytest.mark.usefixtures("four")
def test_mlflow_is_told_to_drop_an_alias_that_names_what_it_does_not_have(
    ledger: Ledger, edit: Edit, clock: Clock
) -> None:
    unpublished = edit(publish=False).number
    for number in (1, 0, 2, unpublished):
        promote(ledger, number)
    tasks = [task for task in ledger.tasks_due(clock.now, 100) if task.kind is TaskKind.SET_ALIAS]
    assert [task.version for task in tasks] == [1, 0, 2, 0]
    assert {task.payload for task in tasks} == {'{"alias": "champion"}'}


@pytest.mark.usefixtures("four")
def test_without_mlflow_nobody_is_told(ledger: Ledger, clock: Clock) -> None:
    promote(ledger, 1, publish=False)
    assert all(task.kind is TaskKind.PUBLISH for task in ledger.tasks_due(clock.now, 100))


def made_with(ledger: Ledger, alias: str, rejections: tuple[str, ...] = ()) -> VersionRow:
    job = ledger.create_job(JobKind.EDIT, "atlas", version=0, request=b"", request_id=None, actor="ada")
    return ledger.commit_edit(job.id, replace(new_version(rejections), alias=alias), result=b"", publish=True)


@pytest.mark.usefixtures("four")
def test_a_version_takes_its_alias_in_the_moment_that_it_is_made(ledger: Ledger, clock: Clock) -> None:
    promote(ledger, 2, "candidate")
    version = made_with(ledger, "candidate")
    assert version.aliases == ("candidate",)
    assert ledger.alias("atlas", "candidate").version == version.number
    assert ledger.audit("atlas", None, 1)[0].actor == "ada"
    assert changes(ledger) == ["alias.promote", "alias.promote"]
    assert rollback(ledger, "candidate") == 2
    told = [task.kind for task in ledger.tasks_due(clock.now, 100) if task.version == version.number]
    assert told == [TaskKind.PUBLISH, TaskKind.SET_ALIAS]


@pytest.mark.usefixtures("four")
def test_a_rejected_version_takes_no_alias(ledger: Ledger) -> None:
    promote(ledger, 2, "candidate")
    assert made_with(ledger, "candidate", ("specificity 0.70 < 0.90",)).aliases == ()
    assert ledger.alias("atlas", "candidate").version == 2
    assert changes(ledger) == ["alias.promote"]
