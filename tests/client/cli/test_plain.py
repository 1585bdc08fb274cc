"""Texts that come from elsewhere, as a terminal is given them."""

import pytest

from errata.client.cli.plain import clean


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("Astana\tand\nOslo", "Astana\tand\nOslo"),
        ("\x1b[2JAstana\x07\r\x9b", "[2JAstana"),
        ("\u202eanatsA\u2066", "anatsA"),
        ("Нұр-Сұлтан ☃ \u200fעברית", "Нұр-Сұлтан ☃ \u200fעברית"),
    ],
)
def test_a_text_can_neither_move_the_cursor_nor_turn_what_follows_round(given: str, shown: str) -> None:
    assert clean(given) == shown
