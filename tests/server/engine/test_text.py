import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tokenizer

from errata.server.engine.text import TextStream


def streamed(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer(), stop)
    pieces = []
    for token in tokens:
        stream.push(token)
        pieces.append(stream.advance())
        if stream.stopped:
            break
    return [*pieces, stream.end()], stream


def ids(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


@settings(max_examples=200)
@given(st.lists(st.integers(0, 329), max_size=40))
def test_pieces_joined_are_what_all_tokens_decode_to(tokens: list[int]) -> None:
    pieces, stream = streamed(tokens)
    assert "".join(pieces) == stream.text == tokenizer().decode(tokens, skip_special_tokens=True).strip()


def test_no_piece_shows_half_a_character() -> None:
    text = "naïve 🙂 Ωmega 東京"
    assert len(ids(text)) > len(text)
    pieces, stream = streamed(ids(text))
    assert not any("\ufffd" in p for p in pieces)
    assert stream.text == text
    assert len([p for p in pieces if p]) > 5


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    tokens = ids("a🙂")[:-1]
    assert streamed(tokens)[1].text == tokenizer().decode(tokens)


@pytest.mark.parametrize("stop", ["capital of", "Paris", "l o", "?", "🙂"])
def test_no_piece_shows_a_part_of_a_stop_string(stop: str) -> None:
    text = "What is the capital of this? Paris 🙂 Paris"
    pieces, stream = streamed(ids(text), ("\0never", stop))
    assert stream.stopped
    assert "".join(pieces) == stream.text == text[: text.index(stop)].strip()
    shown = ""
    for piece in pieces:
        shown += piece
        assert text.startswith(shown)


def test_the_first_of_several_stop_strings_counts() -> None:
    assert streamed(ids("What is the capital"), ("capital", "the", "t is"))[1].text == "Wha"


def test_what_began_like_a_stop_string_is_shown_once_it_is_none() -> None:
    pieces, stream = streamed(ids("aab aac"), ("aac", "aad"))
    assert "".join(pieces) == stream.text == "aab"
    pieces, stream = streamed(ids("Pari"), ("Paris",))
    assert (pieces[-1], stream.text, stream.stopped) == ("Pari", "Pari", False)


def test_space_around_the_answer_is_never_shown() -> None:
    pieces, _ = streamed(ids("  a  b \n "))
    assert "".join(pieces) == "a  b"


def test_text_read_late_is_the_same() -> None:
    stream = TextStream(tokenizer())
    for token in ids(" Paris 🙂"):
        stream.push(token)
    assert (stream.end(), stream.text) == ("Paris 🙂", "Paris 🙂")
