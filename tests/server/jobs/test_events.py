import asyncio
from collections.abc import Awaitable, Callable
from threading import Thread

from errata.server.jobs.events import JobEvents

SECONDS = 30


def _run(test: Callable[[JobEvents], Awaitable[None]]) -> JobEvents:
    events = JobEvents()
    asyncio.run(asyncio.wait_for(test(events), SECONDS))
    return events


def test_a_watcher_is_woken_at_once_so_that_it_reads_what_it_may_have_missed() -> None:
    async def watch(events: JobEvents) -> None:
        async with events.subscribe("a") as wakes:
            await anext(wakes)

    _run(watch)


def test_a_change_in_another_thread_wakes_every_watcher_of_the_job() -> None:
    async def watch(events: JobEvents) -> None:
        async with events.subscribe("a") as one, events.subscribe("a") as two:
            await anext(one)
            await anext(two)
            thread = Thread(target=events.changed, args=("a",))
            thread.start()
            await anext(one)
            await anext(two)
            thread.join()

    _run(watch)


def test_another_jobs_change_wakes_nobody() -> None:
    async def watch(events: JobEvents) -> None:
        async with events.subscribe("a") as wakes, events.subscribe("b") as others:
            await anext(wakes)
            await anext(others)
            waiting = asyncio.ensure_future(anext(wakes))
            events.changed("b")
            await anext(others)
            assert not waiting.done()
            events.changed("a")
            await waiting

    _run(watch)


def test_changes_in_quick_succession_are_one_wake_up() -> None:
    async def watch(events: JobEvents) -> None:
        async with events.subscribe("a") as wakes, events.subscribe("b") as others:
            await anext(wakes)
            await anext(others)
            for _ in range(10):
                events.changed("a")
            await anext(wakes)
            waiting = asyncio.ensure_future(anext(wakes))
            events.changed("b")
            await anext(others)
            assert not waiting.done()
            waiting.cancel()

    _run(watch)


def test_nothing_is_kept_of_those_who_left() -> None:
    async def watch(events: JobEvents) -> None:
        async with events.subscribe("a"), events.subscribe("a"):
            assert events.watched == 1

    assert _run(watch).watched == 0


def test_a_change_after_the_loop_was_closed_is_nobodys() -> None:
    events = JobEvents()
    loop = asyncio.new_event_loop()
    subscription = events.subscribe("a")
    loop.run_until_complete(subscription.__aenter__())
    loop.close()
    events.changed("a")
    assert events.watched == 1
