"""Work in the background: waiting, progress, broken streams, cancelling."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from fake_server import CAPITAL, Fake, Fault, serving

from errata.client import (
    AsyncErrata,
    CancelledError,
    Context,
    DeadlineExceededError,
    EditRequest,
    Errata,
    ErrataError,
    IllConditionedError,
    InternalError,
    NotFoundError,
    Progress,
    State,
)

NONSENSE = EditRequest(name="nonsense", contexts=[Context(CAPITAL, "Kazakhstan")], target="nonsense")
PROGRESS = [
    Progress(stage="queued", done=0, total=0),
    Progress(stage="values", done=1, total=2),
    Progress(stage="values", done=2, total=2),
]


def test_progress_is_told_step_by_step_and_then_the_result_is_there(
    client: Errata, fake: Fake, astana: EditRequest
) -> None:
    operation = client.edit("atlas", [astana])
    assert (operation.state, operation.done) == (State.PENDING, False)
    assert list(operation) == PROGRESS
    assert operation.done
    assert operation.result() is operation.latest
    assert fake.count("WatchEdit") == 1


def test_asyncio_progress_is_told_step_by_step(server: str, astana: EditRequest) -> None:
    async def follow() -> list[Progress]:
        async with AsyncErrata(server) as client:
            operation = await client.edit("atlas", [astana])
            return [progress async for progress in operation]

    assert asyncio.run(follow()) == PROGRESS


def test_refresh_asks_where_it_stands_now(client: Errata, astana: EditRequest) -> None:
    operation = client.edit("atlas", [astana])
    assert operation.refresh().job.state is State.RUNNING
    assert operation.state is State.RUNNING


def test_an_operation_is_followed_from_another_client_by_its_name(
    client: Errata, server: str, astana: EditRequest
) -> None:
    name = client.edit("atlas", [astana]).name
    with Errata(server) as other:
        assert other.operation(other.get_edit(name)).result().version == "models/atlas/versions/1"


def test_a_failed_edit_raises_its_reason_and_names_the_request_at_fault(client: Errata) -> None:
    operation = client.edit("atlas", [NONSENSE])
    with pytest.raises(IllConditionedError) as caught:
        operation.result()
    assert (caught.value.field, caught.value.message, caught.value.code) == ("requests[0].target", "two targets", None)
    assert operation.latest.job.error is not None


def test_a_cancelled_operation_raises_when_its_result_is_asked_for(client: Errata, astana: EditRequest) -> None:
    operation = client.edit("atlas", [astana])
    assert operation.cancel().job.state is State.CANCELLED
    with pytest.raises(CancelledError, match="models/atlas/edits/0000 was cancelled; nothing was changed"):
        operation.result()


def test_cancelling_from_another_thread_ends_the_wait(client: Errata, fake: Fake, astana: EditRequest) -> None:
    fake.gate.clear()
    operation = client.edit("atlas", [astana])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(operation.result)
        assert fake.waiting.wait(30)
        client.operation(operation.latest).cancel()
        fake.gate.set()
        with pytest.raises(CancelledError):
            waiting.result(30)


def test_a_result_that_takes_too_long_raises_and_leaves_the_work_alone(
    client: Errata, fake: Fake, astana: EditRequest
) -> None:
    fake.gate.clear()
    operation = client.edit("atlas", [astana])
    with pytest.raises(TimeoutError, match=r"edits/0000 has not ended after 0\.2 s; it goes on"):
        operation.result(timeout=0.2)
    fake.gate.set()
    assert operation.result(timeout=30).job.state is State.SUCCEEDED


def test_an_asyncio_result_that_takes_too_long_raises(server: str, fake: Fake, astana: EditRequest) -> None:
    fake.gate.clear()

    async def wait() -> None:
        async with AsyncErrata(server) as client:
            await (await client.edit("atlas", [astana])).result(timeout=0.2)

    with pytest.raises(DeadlineExceededError):
        asyncio.run(wait())


def test_a_broken_stream_is_opened_again_and_no_progress_is_told_twice(
    client: Errata, fake: Fake, astana: EditRequest
) -> None:
    fake.break_streams_after[:] = [1, 1, 1]
    assert list(client.edit("atlas", [astana])) == PROGRESS
    assert fake.count("WatchEdit") == 4


def test_a_broken_stream_is_opened_again_in_asyncio(server: str, fake: Fake, astana: EditRequest) -> None:
    fake.break_streams_after[:] = [1, 2]

    async def version() -> str:
        async with AsyncErrata(server) as client:
            return (await (await client.edit("atlas", [astana])).result()).version

    assert asyncio.run(version()) == "models/atlas/versions/1"
    assert fake.count("WatchEdit") == 3


def test_a_watch_survives_the_servers_restart(fake: Fake, astana: EditRequest) -> None:
    fake.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        with serving(fake) as address:
            client = Errata(address)
            waiting = pool.submit(client.edit("atlas", [astana]).result)
            assert fake.waiting.wait(30)
        with client, serving(fake, address):
            assert waiting.result(60).version == "models/atlas/versions/1"
    assert fake.count("WatchEdit") >= 2


def test_a_fault_of_the_server_while_watching_is_raised_at_once(
    client: Errata, fake: Fake, astana: EditRequest
) -> None:
    fake.fail_next("WatchEdit", Fault(code=grpc.StatusCode.INTERNAL, reason="INTERNAL", message="WatchEdit failed"))
    with pytest.raises(InternalError, match="WatchEdit failed"):
        client.edit("atlas", [astana]).result()
    assert fake.count("WatchEdit") == 1


def test_work_that_does_not_exist_is_not_watched_twice(client: Errata, fake: Fake, astana: EditRequest) -> None:
    operation = client.edit("atlas", [astana])
    fake.work.clear()
    with pytest.raises(NotFoundError) as caught:
        operation.result()
    assert caught.value.reason == "EDIT_NOT_FOUND"
    assert fake.count("WatchEdit") == 1


def test_leaving_the_progress_early_ends_the_call_and_not_the_work(
    client: Errata, fake: Fake, astana: EditRequest
) -> None:
    fake.gate.clear()
    operation = client.edit("atlas", [astana])
    for _ in operation:
        break
    assert not operation.done
    assert list(operation)[-1] == PROGRESS[-1]
    assert operation.result().job.state is State.SUCCEEDED


def test_the_same_request_id_gives_the_first_edit_and_another_body_is_refused(
    client: Errata, fake: Fake, astana: EditRequest
) -> None:
    first = client.edit("atlas", [astana], request_id="mine")
    assert client.edit("atlas", [astana], request_id="mine").name == first.name
    with pytest.raises(ErrataError) as caught:
        client.edit("atlas", [NONSENSE], request_id="mine")
    assert caught.value.reason == "REQUEST_ID_REUSED"


def test_every_edit_has_a_request_id_of_its_own(client: Errata, fake: Fake, astana: EditRequest) -> None:
    assert client.edit("atlas", [astana]).name != client.edit("atlas", [astana]).name
    ids = [request.request_id for request in fake.requests]
    assert all(len(each) == 36 for each in ids)
    assert len(set(ids)) == 2


def test_threads_share_one_client(client: Errata, astana: EditRequest) -> None:
    start = threading.Barrier(4)

    def edit() -> str:
        start.wait(30)
        return client.edit("atlas", [astana]).result().name

    with ThreadPoolExecutor(4) as pool:
        assert len({future.result(60) for future in [pool.submit(edit) for _ in range(4)]}) == 4
