"""The picture of a causal trace: where there is little room, and where it cannot be written."""

from pathlib import Path

import pytest
from commandline import Run
from rich.console import Console

from errata.client.cli.heatmap import Panel, Picture, drawn


@pytest.mark.parametrize("width", [40, 80])
def test_every_layer_of_a_deep_model_is_seen_on_a_narrow_terminal(width: int) -> None:
    panel = Panel(component="MLP", rows=("a token with a long name",), shares=((1.0,) * 32,))
    console = Console(width=width)
    with console.capture() as captured:
        console.print(drawn(Picture(title="", caption="", panels=(panel,)), width, colour=False))
    [row] = [line for line in captured.get().splitlines() if "█" in line]
    assert row.count("█") % 32 == 0
    assert len(row) <= width


def test_a_picture_that_could_not_be_written_is_refused_before_the_server_is_asked(run: Run, tmp_path: Path) -> None:
    asked = ("--server", "localhost:1", "trace", "Capital of Norway?", "--constraint", "Norway", "--substitute", "Peru")
    ran = run(*asked, "--html", tmp_path / "none" / "trace.html")
    assert (ran.code, ran.err) == (2, f"errata: there is no folder '{tmp_path}/none' for 'trace.html'; make it first\n")
