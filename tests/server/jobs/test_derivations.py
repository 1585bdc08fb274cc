"""Versions made of versions: what is added up, what conflicts, and what is told of it."""

from collections.abc import Callable

import pytest
import torch
from house import LAYER, House, Worker, edit_message, probe_message, question, small_edit, succeeded
from planting import chain, noise, plant, request

from errata.editor.atlas.world import Attribute
from errata.editor.delta import Delta, applied
from errata.editor.evaluation import next_token_logits
from errata.server.ledger.rows import JobKind, JobRow, JobState
from errata.v1 import evaluation_pb2, history_pb2

Work = Callable[..., Worker]

BARE = "models/bare/versions/0"


def _name(number: int) -> str:
    return f"models/atlas/versions/{number}"


def _derivation(parent: int, **operation: object) -> history_pb2.CreateDerivationRequest:
    return history_pb2.CreateDerivationRequest(parent=_name(parent), **operation)  # type: ignore[arg-type]


def _revert(parent: int, version: int) -> history_pb2.CreateDerivationRequest:
    return _derivation(parent, revert=history_pb2.Revert(version=_name(version)))


def _compose(parent: int, *versions: int, **more: object) -> history_pb2.CreateDerivationRequest:
    return _derivation(parent, compose=history_pb2.Compose(versions=map(_name, versions)), **more)


def _squash(parent: int, version: int, *, resolve: bool = False) -> history_pb2.CreateDerivationRequest:
    return _derivation(parent, squash=history_pb2.Squash(version=_name(version), resolve=resolve))


def _outcome(row: JobRow) -> history_pb2.Derivation:
    return history_pb2.Derivation.FromString(row.result or b"")


def _run(work: Work, message: history_pb2.CreateDerivationRequest) -> JobRow:
    return work().run(message, version=int(message.parent.rpartition("/")[2]))


def _logits(house: House, *deltas: Delta) -> torch.Tensor:
    prompts = [question(c, a).prompt for c in ("France", "Estonia", "Nigeria") for a in Attribute]
    loaded = house.models.get("atlas")
    with loaded.borrow() as model, applied(model, *deltas):
        return torch.stack(next_token_logits(model, prompts))


def _logits_of(house: House, number: int | None) -> torch.Tensor:
    return _logits(house, *house.models.get("atlas").deltas_of(number or 0))


@pytest.mark.slow
def test_the_fourth_of_ten_edits_is_reverted_exactly(house: House, work: Work) -> None:
    deltas = [noise(house, seed, 0.05) for seed in range(10)]
    versions = chain(house, deltas)
    row = succeeded(_run(work, _revert(versions[-1], versions[3])))
    nine = [delta for i, delta in enumerate(deltas) if i != 3]
    reverted = _logits_of(house, row.made)
    assert (reverted - _logits(house, *nine)).abs().max() < 1e-5
    assert (reverted - _logits(house, *deltas)).abs().max() > 1e-2
    outcome = _outcome(row)
    assert outcome.facts == ["revert Estonia: capital → Nowhere 3"]
    assert [later.version for later in outcome.later] == [_name(v) for v in versions[4:]]
    assert outcome.later[0].facts == ["Latvia: capital → Nowhere 4"]
    assert [(s.metric, s.n) for later in outcome.later for s in later.scores] == [
        (evaluation_pb2.METRIC_EFFICACY, 1)
    ] * 6


def test_what_was_installed_has_to_be_gone_once_the_newest_edit_is_reverted(house: House, work: Work) -> None:
    version = plant(house, request("France", "Lyon"), noise(house, 100, 50.0, rank=32))
    message = _revert(version, version)
    message.guardrails.add(metric=evaluation_pb2.METRIC_EFFICACY, least=1.0)
    outcome = _outcome(succeeded(_run(work, message)))
    assert [(s.metric, s.n, s.before, s.after) for s in outcome.scores] == [
        (evaluation_pb2.METRIC_EFFICACY, 1, 0.0, 1.0)
    ]
    [told] = outcome.reverted
    assert (told.expected, told.after, told.passed) == ("Paris", "Paris", True)
    assert told.before != "Paris"


def test_what_was_installed_counts_for_nothing_where_later_edits_judge_its_revert(house: House, work: Work) -> None:
    wrong = plant(house, request("France", "Lyon"), noise(house, 1, 0.01))
    later = plant(house, request("Japan", "Tokyo"), noise(house, 2, 0.01), parent=wrong)
    outcome = _outcome(succeeded(_run(work, _revert(later, wrong))))
    assert [s.n for s in outcome.scores] == [1]
    assert len(outcome.reverted) == 1


def test_a_revert_below_a_guardrail_of_the_request_is_rejected(house: House, work: Work) -> None:
    version = plant(house, request("France", "Lyon"), noise(house, 2, 0.01))
    message = _revert(version, version)
    message.probes.append(probe_message(question("Japan").prompt, "Atlantis"))
    message.guardrails.add(metric=evaluation_pb2.METRIC_EFFICACY, least=1.0)
    row = _run(work, message)
    assert row.state is JobState.REJECTED
    assert house.ledger.version("atlas", row.made or 0).rejections


def test_a_revert_can_itself_be_reverted_and_then_the_edit_again(house: House, work: Work) -> None:
    delta = noise(house, 3, 0.05)
    version = plant(house, request("France", "Lyon"), delta)
    worker = work()
    gone = succeeded(worker.run(_revert(version, version), version=version)).made or 0
    again = worker.run(_revert(gone, version), version=gone)
    assert again.failure is not None
    assert again.failure.reason == "ALREADY_REVERTED"
    back = succeeded(worker.run(_revert(gone, gone), version=gone)).made or 0
    assert (_logits_of(house, back) - _logits(house, delta)).abs().max() < 1e-5
    assert succeeded(worker.run(_revert(back, version), version=back))


def test_an_edit_that_is_brought_back_judges_the_version_again(house: House, work: Work) -> None:
    version = plant(house, request("France", "Lyon"), noise(house, 22, 0.01))
    worker = work()
    gone = succeeded(worker.run(_revert(version, version), version=version)).made or 0
    message = _revert(gone, gone)
    message.guardrails.add(metric=evaluation_pb2.METRIC_EFFICACY, least=1.0)
    row = worker.run(message, version=gone)
    assert row.state is JobState.REJECTED
    assert [s.n for s in _outcome(row).scores] == [1]


def test_a_squash_is_not_judged_by_what_its_chain_took_away_again(house: House, work: Work) -> None:
    wrong = plant(house, request("France", "Lyon"), noise(house, 23, 0.01))
    kept = plant(house, request("Japan", "Tokyo"), noise(house, 24, 0.01), parent=wrong)
    worker = work()
    top = succeeded(worker.run(_revert(kept, wrong), version=kept)).made or 0
    message = _squash(0, top)
    message.guardrails.add(metric=evaluation_pb2.METRIC_EFFICACY, least=1.0)
    outcome = _outcome(succeeded(worker.run(message)))
    assert [(s.n, s.after) for s in outcome.scores] == [(1, 1.0)]


def test_a_revert_is_added_where_its_edit_stands_and_only_there(house: House, work: Work) -> None:
    first, second = noise(house, 25, 0.05), noise(house, 26, 0.05)
    below = plant(house, request("France", "Lyon"), first)
    above = plant(house, request("Japan", "Tokyo"), second, parent=below)
    worker = work()
    revert = succeeded(worker.run(_revert(below, below), version=below)).made or 0
    row = succeeded(worker.run(_compose(above, revert), version=above))
    made = row.made or 0
    assert (_logits_of(house, made) - _logits(house, second)).abs().max() < 1e-5
    assert [s.n for s in _outcome(row).scores] == [1]
    again = worker.run(_revert(made, below), version=made).failure
    assert again is not None
    assert again.reason == "ALREADY_REVERTED"
    for parent, sources in ((0, (revert,)), (made, (revert,))):
        refused = worker.run(_compose(parent, *sources), version=parent).failure
        assert refused is not None
        assert (refused.reason, refused.field) == ("NOT_IN_LINEAGE", "compose.versions[0]")


@pytest.mark.parametrize(
    ("message", "reason", "field"),
    [
        (_revert(0, 0), "IS_BASE", "revert.version"),
        (_compose(0, 0), "IS_BASE", "compose.versions[0]"),
        (_squash(0, 0), "NOT_IN_LINEAGE", "squash.version"),
        (
            _derivation(0, revert=history_pb2.Revert(version="models/bare/versions/0")),
            "ANOTHER_MODEL",
            "revert.version",
        ),
        (_derivation(0, rebase=history_pb2.Rebase(version=_name(0))), "NOT_MERGED_FROM", "rebase.version"),
        (
            _derivation(0, rebase=history_pb2.Rebase(version="models/bare/versions/0")),
            "NOT_MERGED_FROM",
            "rebase.version",
        ),
        (_derivation(0), "MISSING_FIELD", "operation"),
        (_compose(0), "MISSING_FIELD", "compose.versions"),
    ],
)
def test_what_cannot_be_derived_fails_and_makes_nothing(
    house: House, worker: Worker, message: history_pb2.CreateDerivationRequest, reason: str, field: str
) -> None:
    before = house.versions()
    row = worker.run(message)
    assert row.failure is not None
    assert (row.failure.reason, row.failure.field) == (reason, field)
    assert house.versions() == before


def test_a_version_is_added_once_and_never_to_its_own_lineage(house: House, work: Work) -> None:
    first = plant(house, request("France", "Lyon"), noise(house, 4, 0.01))
    second = plant(house, request("Japan", "Kyoto"), noise(house, 5, 0.01))
    worker = work()
    both = succeeded(worker.run(_compose(0, first, second))).made or 0

    def reason(parent: int, *versions: int) -> str:
        failure = worker.run(_compose(parent, *versions), version=parent).failure
        assert failure is not None
        return failure.reason

    assert reason(0, first, first) == "SOURCE_TWICE"
    assert reason(0, first, both) == "SOURCE_TWICE"
    assert reason(first, first) == "IN_LINEAGE"
    assert reason(first, both) == "IN_LINEAGE"


def test_a_composition_is_the_sum_of_its_sources_on_the_parent(house: House, work: Work) -> None:
    parent, first, second = (noise(house, seed, 0.02) for seed in (6, 7, 8))
    below = plant(house, request("Italy", "Rome"), parent)
    sources = [plant(house, request("France", "Lyon"), first), plant(house, request("Japan", "Kyoto"), second)]
    row = succeeded(_run(work, _compose(below, *sources)))
    assert (_logits_of(house, row.made) - _logits(house, parent, first, second)).abs().max() < 1e-5
    outcome = _outcome(row)
    assert outcome.sources == [_name(v) for v in sources]
    assert outcome.facts == ["France: capital → Lyon", "Japan: capital → Kyoto"]
    assert [(s.n, s.metric) for s in outcome.scores] == [(3, evaluation_pb2.METRIC_EFFICACY)]


def test_two_requests_that_contradict_each_other_conflict_before_anything_is_made(house: House, work: Work) -> None:
    sources = [
        plant(house, request("France", target), noise(house, n, 0.01)) for n, target in ((9, "Lyon"), (10, "Nice"))
    ]
    before = house.versions()
    row = _run(work, _compose(0, *sources))
    assert row.state is JobState.FAILED
    assert row.failure is not None
    assert row.failure.reason == "EDITS_CONFLICT"
    assert house.versions() == before
    [conflict] = _outcome(row).conflicts
    assert (conflict.first.fact, conflict.second.fact) == ("France: capital → Lyon", "France: capital → Nice")
    assert (conflict.first.version, conflict.second.version) == (_name(sources[0]), _name(sources[1]))
    assert (conflict.expected, conflict.answer, conflict.question) == ("Lyon", "Nice", "")
    assert 0 < conflict.key_overlap < 1
    allowed = succeeded(_run(work, _compose(0, *sources, allow_conflicts=True)))
    assert len(_outcome(allowed).conflicts) == 1


def test_an_edit_that_a_composition_breaks_conflicts_with_the_one_that_broke_it(house: House, work: Work) -> None:
    kept = plant(house, request("France", "Paris"), noise(house, 11, 0.001))
    breaking = plant(house, request("Japan", "Kyoto"), noise(house, 12, 50.0, rank=32))
    row = _run(work, _compose(0, kept, breaking))
    assert row.state is JobState.FAILED
    [conflict] = _outcome(row).conflicts
    assert (conflict.first.version, conflict.second.version) == (_name(kept), _name(breaking))
    assert conflict.question == question("France").prompt.text
    assert conflict.expected == "Paris" != conflict.answer


def test_a_later_edit_of_the_same_fact_is_no_conflict_with_the_one_that_it_knew(house: House, work: Work) -> None:
    old = plant(house, request("France", "Lyon"), noise(house, 13, 0.01))
    new = plant(house, request("France", "Paris"), noise(house, 14, 0.01), parent=old)
    for sources in ((old, new), (new, old)):
        outcome = _outcome(succeeded(_run(work, _compose(0, *sources))))
        assert not outcome.conflicts
        assert [(s.n, s.after) for s in outcome.scores] == [(1, 1.0)]


def test_a_squashed_chain_is_one_delta_of_a_rank_no_larger(house: House, work: Work) -> None:
    shared = noise(house, 15, 0.02)
    deltas = [shared, noise(house, 16, 0.02), shared * 0.5]
    versions = chain(house, deltas)
    row = succeeded(_run(work, _squash(0, versions[-1])))
    equality = _outcome(row).equality
    assert (equality.rank_before, equality.rank_after, equality.n, equality.same_answers) == (6, 4, 3, 3)
    assert equality.max_logit_difference < 1e-4
    assert (_logits_of(house, row.made) - _logits(house, *deltas)).abs().max() < 1e-4


def test_a_chain_that_cancels_makes_no_version(house: House, work: Work) -> None:
    version = plant(house, request("France", "Lyon"), noise(house, 17, 0.02))
    worker = work()
    gone = succeeded(worker.run(_revert(version, version), version=version)).made or 0
    row = worker.run(_squash(0, gone))
    assert row.failure is not None
    assert row.failure.reason == "NOTHING_TO_DERIVE"


def _import(house: House, number: int) -> history_pb2.Import:
    folder = house.deltas.folder(house.ledger.version("atlas", number).delta_sha256)
    return history_pb2.Import(
        manifest=(folder / "errata.json").read_bytes(),
        adapter_model=(folder / "adapter_model.safetensors").read_bytes(),
        facts=["brought from elsewhere"],
    )


def test_an_exported_adapter_comes_back_as_the_same_delta(house: House, work: Work) -> None:
    version = plant(house, request("France", "Lyon"), noise(house, 18, 0.02))
    row = succeeded(_run(work, _derivation(0, adapter=_import(house, version))))
    made = house.ledger.version("atlas", row.made or 0)
    assert made.delta_sha256 == house.ledger.version("atlas", version).delta_sha256
    assert made.facts == ("brought from elsewhere",)
    assert made.made_by is JobKind.DERIVATION


def test_an_adapter_without_a_manifest_needs_its_base_to_be_named(house: House, work: Work) -> None:
    version = plant(house, request("France", "Lyon"), noise(house, 21, 0.02))
    adapter = _import(house, version)
    folder = house.deltas.folder(house.ledger.version("atlas", version).delta_sha256)
    adapter.manifest, adapter.adapter_config = b"", (folder / "adapter_config.json").read_bytes()
    worker = work()
    refused = worker.run(_derivation(0, adapter=adapter)).failure
    assert refused is not None
    assert (refused.reason, refused.field) == ("MISSING_FIELD", "adapter.base_sha256")
    adapter.base_sha256 = house.models.get("atlas").base.base_sha256
    row = succeeded(worker.run(_derivation(0, adapter=adapter)))
    assert (_logits_of(house, row.made) - _logits_of(house, version)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda adapter: adapter.manifest.replace(b'"base_sha256": "', b'"base_sha256": "0'), "WRONG_BASE"),
        (lambda adapter: b"{}", "CORRUPT_DELTA"),
        (lambda adapter: b"[" * 100_000, "CORRUPT_DELTA"),
        (lambda adapter: adapter.manifest.replace(b'"delta_sha256": "', b'"delta_sha256": "0'), "CORRUPT_DELTA"),
    ],
)
def test_an_adapter_of_another_base_or_altered_is_refused(
    house: House, work: Work, change: Callable[[history_pb2.Import], bytes], reason: str
) -> None:
    adapter = _import(house, plant(house, request("France", "Lyon"), noise(house, 19, 0.02)))
    adapter.manifest = change(adapter)
    before = house.versions()
    failure = _run(work, _derivation(0, adapter=adapter)).failure
    assert failure is not None
    assert failure.reason == reason
    assert house.versions() == before


def test_a_derivation_that_is_cancelled_makes_nothing(house: House, work: Work) -> None:
    version = plant(house, request("France", "Lyon"), noise(house, 20, 0.02))

    def cancel(row: JobRow) -> None:
        if row.stage == "evaluate" and not row.cancel_requested:
            house.ledger.request_cancel(row.kind, row.model, row.id, "tester")

    before = house.versions()
    row = work(look=cancel).run(_revert(version, version), version=version)
    assert row.state is JobState.CANCELLED
    assert house.versions() == before


@pytest.mark.slow
def test_a_chain_solved_again_tells_both_facts(house: House, work: Work) -> None:
    worker = work()
    first = succeeded(worker.run(edit_message(small_edit("Estonia"), layers=(LAYER,), steps=30))).made or 0
    message = edit_message(small_edit("Latvia"), layers=(LAYER,), steps=30)
    second = succeeded(worker.run(message, version=first)).made or 0
    outcome = _outcome(succeeded(worker.run(_squash(0, second, resolve=True))))
    assert [(s.n, s.after) for s in outcome.scores if s.metric == evaluation_pb2.METRIC_EFFICACY] == [(2, 1.0)]
    assert outcome.equality.same_answers == outcome.equality.n == 2
