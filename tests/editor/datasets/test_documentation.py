"""docs/datasets.md does what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from sets import picture

from errata.editor.datasets.lines import FILE, LineEntry, SpanEntry, read_lines

DOCUMENT = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text(encoding="utf-8")


def test_the_line_shown_can_be_read(tmp_path: Path) -> None:
    (line,) = re.findall(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
    (tmp_path / FILE).write_text(line, encoding="utf-8")
    for name in ("Estonia", "Latvia"):
        picture(tmp_path / "images" / f"{name}.png")
    [record] = read_lines(tmp_path)
    assert [span.text for span in record.constraints] == ["this country", "Finland"]


def test_every_field_is_explained() -> None:
    explained = re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE)
    assert sorted(explained) == sorted([*LineEntry.model_fields, *SpanEntry.model_fields])


@pytest.mark.slow
def test_the_example_prints_what_its_comments_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "datasets.md", "exec"), {})
    assert printed.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", code)
    assert "data:image/png" in (tmp_path / "knockout.html").read_text(encoding="utf-8")
