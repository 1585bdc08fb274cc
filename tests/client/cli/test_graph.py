"""The tree of versions beside `errata log`."""

from dataclasses import dataclass

from errata.client.cli.graph import ASCII, UNICODE, Strokes, rows


@dataclass(frozen=True)
class Node:
    name: str
    parent: str


def drawn(strokes: Strokes, *pairs: str, rejected: str = "") -> list[str]:
    """Lines for pairs "child parent", the newest first."""
    nodes = [Node(*(pair.split(" ") if " " in pair else (pair, ""))) for pair in pairs]
    lines = []
    for row in rows(nodes, strokes, frozenset(rejected)):  # type: ignore[arg-type]
        lines += [row.closing] if row.closing else []
        lines += [f"{row.first} {row.version.name}"]
    return lines


def test_a_chain_is_one_column() -> None:
    assert drawn(UNICODE, "2 1", "1 0", "0") == ["● 2", "● 1", "● 0"]


def test_two_children_of_one_parent_branch_and_meet_again() -> None:
    assert drawn(UNICODE, "3 1", "2 1", "1 0", "0") == ["● 3", "│ ● 2", "├─╯", "● 1", "● 0"]


def test_three_children_meet_in_one_line() -> None:
    assert drawn(UNICODE, "3 0", "2 0", "1 0", "0") == ["● 3", "│ ● 2", "│ │ ● 1", "├─┴─╯", "● 0"]


def test_a_branch_that_goes_on_is_crossed() -> None:
    assert drawn(UNICODE, "5 2", "4 1", "3 2", "2 1", "1") == [
        "● 5",
        "│ ● 4",
        "│ │ ● 3",
        "├─┼─╯",
        "● │ 2",
        "├─╯",
        "● 1",
    ]


def test_a_rejected_version_is_hollow_and_plain_letters_do_as_well() -> None:
    assert drawn(ASCII, "2 0", "1 0", "0", rejected="2") == ["x 2", "| * 1", "|_/", "* 0"]
