"""Page tokens are good for one list and one hour, and only as they were issued."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.server.errors import PageTokenError
from errata.server.pages import PageTokens

METHOD, PARENT = "ListEdits", "models/atlas"


class Clock:
    """A clock that stands until it is told."""

    def __init__(self) -> None:
        self.now = datetime(2026, 7, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(clock: Clock) -> PageTokens:
    return PageTokens(b"a secret", clock=clock)


@given(st.text(max_size=200), st.text(), st.text())
def test_a_token_gives_back_its_position(position: str, method: str, parent: str) -> None:
    tokens = PageTokens(b"a secret", clock=Clock())
    assert tokens.read(tokens.issue(method, parent, position), method, parent) == position


def test_the_empty_token_means_the_first_page(tokens: PageTokens) -> None:
    assert tokens.read("", METHOD, PARENT) is None


def test_a_token_is_good_for_one_hour_and_not_a_second_more(tokens: PageTokens, clock: Clock) -> None:
    token = tokens.issue(METHOD, PARENT, "17")
    clock.now += timedelta(hours=1)
    assert tokens.read(token, METHOD, PARENT) == "17"
    clock.now += timedelta(seconds=1)
    with pytest.raises(PageTokenError, match=r"expired.*begin again") as caught:
        tokens.read(token, METHOD, PARENT)
    assert (caught.value.field, caught.value.said_reason) == ("page_token", "PAGE_TOKEN_EXPIRED")


@pytest.mark.parametrize(
    ("method", "parent"), [("ListTraces", PARENT), (METHOD, "models/other"), ("ListEdit", "smodels/atlas"), ("", "")]
)
def test_another_lists_token_is_refused(tokens: PageTokens, method: str, parent: str) -> None:
    with pytest.raises(PageTokenError, match="not issued for this list"):
        tokens.read(tokens.issue(METHOD, PARENT, "17"), method, parent)


def test_another_servers_token_is_refused(tokens: PageTokens, clock: Clock) -> None:
    other = PageTokens(b"another secret", clock=clock)
    with pytest.raises(PageTokenError):
        tokens.read(other.issue(METHOD, PARENT, "17"), METHOD, PARENT)


@given(st.text(min_size=1) | st.binary(min_size=1).map(bytes.hex))
def test_what_was_never_issued_is_refused(text: str) -> None:
    with pytest.raises(PageTokenError):
        PageTokens(b"a secret", clock=Clock()).read(text, METHOD, PARENT)


@given(st.data())
def test_a_token_with_any_character_changed_is_refused(data: st.DataObject) -> None:
    tokens = PageTokens(b"a secret", clock=Clock())
    token = tokens.issue(METHOD, PARENT, "17")
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters(codec="ascii").filter(lambda c: c != token[at]))
    with pytest.raises(PageTokenError):
        tokens.read(token[:at] + other + token[at + 1 :], METHOD, PARENT)


@pytest.mark.parametrize("end", ["=", "==", "\n", " ", "A"])
def test_a_token_with_something_added_is_refused(tokens: PageTokens, end: str) -> None:
    with pytest.raises(PageTokenError):
        tokens.read(tokens.issue(METHOD, PARENT, "17") + end, METHOD, PARENT)
