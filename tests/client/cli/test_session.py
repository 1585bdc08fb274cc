"""What a command shows while it waits."""

import pytest

from errata.client.cli.session import counted
from errata.client.results import Progress


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [(0, 0, ("", None)), (3, 0, ("3", None)), (0, 4, ("0/4", 4)), (4, 4, ("4/4", 4)), (4, 1, ("4", None))],
)
def test_a_total_that_is_unknown_or_passed_is_not_shown(done: int, total: int, shown: tuple[str, int | None]) -> None:
    assert counted(Progress(stage="evaluate", done=done, total=total)) == shown
