"""Answers as they grow."""

import asyncio

import pytest
from fake_server import CAPITAL, Fake

from errata.client import AsyncErrata, CancelledError, DeadlineExceededError, Errata, NotFoundError, UnavailableError


def test_a_stream_gives_pieces_and_then_the_whole_answer(client: Errata) -> None:
    stream = client.stream("atlas", CAPITAL)
    assert list(stream) == ["Nur", "-Sultan"]
    assert stream.result() == client.generate("atlas", CAPITAL)
    assert list(stream) == []


def test_the_whole_answer_can_be_had_without_the_pieces(client: Errata) -> None:
    assert client.stream("atlas", CAPITAL, max_new_tokens=1).result().text == "Nur"


def test_an_asyncio_stream_gives_pieces_and_then_the_whole_answer(server: str) -> None:
    async def ask() -> tuple[list[str], str]:
        async with AsyncErrata(server) as client, client.stream("atlas", CAPITAL) as stream:
            pieces = [text async for text in stream]
            return pieces, (await stream.result()).text

    assert asyncio.run(ask()) == (["Nur", "-Sultan"], "Nur-Sultan")


def test_leaving_a_stream_early_frees_its_place_on_the_server(client: Errata, fake: Fake) -> None:
    fake.gate.clear()
    with client.stream("atlas", CAPITAL) as stream:
        assert next(stream) == "Nur"
    assert fake.stream_ended.wait(30)


def test_leaving_an_asyncio_stream_early_frees_its_place_on_the_server(server: str, fake: Fake) -> None:
    fake.gate.clear()

    async def ask() -> None:
        async with AsyncErrata(server) as client:
            async with client.stream("atlas", CAPITAL) as stream:
                assert await anext(stream) == "Nur"
            assert await asyncio.to_thread(fake.stream_ended.wait, 30)
            with pytest.raises(CancelledError):
                await anext(stream)

    asyncio.run(ask())


def test_a_cancelled_stream_raises(client: Errata, fake: Fake) -> None:
    fake.gate.clear()
    stream = client.stream("atlas", CAPITAL)
    assert next(stream) == "Nur"
    stream.cancel()
    with pytest.raises(CancelledError):
        next(stream)


def test_a_stream_that_is_cut_off_does_not_look_like_an_answer(client: Errata, fake: Fake) -> None:
    fake.break_streams_after[:] = [1]
    with pytest.raises(UnavailableError, match="cut off before its end"):
        client.stream("atlas", CAPITAL).result()


def test_a_stream_ends_with_its_timeout(client: Errata, fake: Fake) -> None:
    fake.gate.clear()
    with pytest.raises(DeadlineExceededError):
        client.stream("atlas", CAPITAL, timeout=0.2).result()


def test_a_stream_of_an_unknown_version_raises_what_a_call_does(client: Errata) -> None:
    with pytest.raises(NotFoundError) as caught:
        next(client.stream("atlas@9", CAPITAL))
    assert caught.value.reason == "VERSION_NOT_FOUND"
