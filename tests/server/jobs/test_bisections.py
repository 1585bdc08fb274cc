"""The search for the version that broke a probe."""

from collections.abc import Callable

import pytest
from house import House, Worker, probe_message, question, succeeded
from planting import chain, noise

from errata.server.ledger.rows import JobRow, JobState
from errata.v1 import history_pb2

Work = Callable[..., Worker]

BROKEN = 11
"""Which of sixteen breaks the probe, counted from 1."""


@pytest.fixture(scope="module")
def versions(house: House) -> list[int]:
    """Sixteen edits, one of which makes the model forget France."""
    harm = {BROKEN - 1: noise(house, 100, 50.0, rank=32)}
    return chain(house, [harm.get(i) or noise(house, 101 + i, 1e-4) for i in range(16)])


def _name(number: int) -> str:
    return f"models/atlas/versions/{number}"


def _bisection(versions: list[int], *, expected: str | None = "Paris") -> history_pb2.CreateBisectionRequest:
    probe = probe_message(question("France").prompt, expected)
    return history_pb2.CreateBisectionRequest(bad=_name(versions[-1]), good=_name(0), probes=[probe])


def _outcome(row: JobRow) -> history_pb2.Bisection:
    return history_pb2.Bisection.FromString(row.result or b"")


@pytest.mark.parametrize(("after", "most"), [(0, 5), (BROKEN - 2, 4), (BROKEN - 1, 3)])
def test_a_bad_edit_among_sixteen_is_found_in_five_evaluations_with_those_of_the_ends(
    house: House, work: Work, versions: list[int], after: int, most: int
) -> None:
    message = _bisection(versions)
    message.good = _name(versions[after - 1] if after else 0)
    row = succeeded(work().run(message, version=versions[-1]))
    outcome = _outcome(row)
    assert outcome.first_bad == _name(versions[BROKEN - 1])
    assert list(outcome.facts) == list(house.ledger.version("atlas", versions[BROKEN - 1]).facts)
    assert len(outcome.steps) <= most
    told = {step.version: step.good for step in outcome.steps}
    assert told[_name(versions[BROKEN - 2])]  # its parent was asked, too
    assert not told[_name(versions[BROKEN - 1])]
    [failed] = next(step for step in outcome.steps if not step.good).failed
    assert failed.expected == "Paris"
    assert failed.after != "Paris"


def test_a_probe_that_expects_nothing_passes_where_the_good_version_says_the_same(
    work: Work, versions: list[int]
) -> None:
    row = succeeded(work().run(_bisection(versions, expected=None), version=versions[-1]))
    assert _outcome(row).first_bad == _name(versions[BROKEN - 1])


def test_a_search_that_a_crash_interrupted_goes_on_after_its_last_step(
    house: House, work: Work, versions: list[int]
) -> None:
    job = house.create(_bisection(versions), version=versions[-1])
    claimed = house.ledger.claim((job.kind,))
    assert claimed is not None
    # What it had found when the process was killed.
    taken = [
        history_pb2.BisectionStep(version=_name(versions[7]), good=True),
        history_pb2.BisectionStep(version=_name(versions[11]), good=False),
    ]
    house.ledger.keep(job.id, history_pb2.Bisection(steps=taken).SerializeToString())
    row = succeeded(work().end_of(job))
    outcome = _outcome(row)
    assert list(outcome.steps[:2]) == taken
    assert len(outcome.steps) == 4  # two further ones
    assert outcome.first_bad == _name(versions[BROKEN - 1])


def test_a_search_that_is_cancelled_finds_nothing(house: House, work: Work, versions: list[int]) -> None:
    def cancel(row: JobRow) -> None:
        if row.stage == "bisect" and not row.cancel_requested:
            house.ledger.request_cancel(row.kind, row.model, row.id, "tester")

    row = work(look=cancel).run(_bisection(versions), version=versions[-1])
    assert row.state is JobState.CANCELLED
    assert not _outcome(row).first_bad


@pytest.mark.parametrize(("expected", "bad", "field"), [("Lyon", -1, "good"), ("Paris", 3, "bad")])
def test_there_is_nothing_to_search_where_an_end_is_not_what_it_was_said_to_be(
    work: Work, versions: list[int], expected: str, bad: int, field: str
) -> None:
    message = _bisection(versions, expected=expected)
    message.bad = _name(versions[bad])
    failure = work().run(message, version=versions[bad]).failure
    assert failure is not None
    assert (failure.reason, failure.field) == ("NOTHING_TO_BISECT", field)
