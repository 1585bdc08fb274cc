"""The README's example, run as it stands there."""

import contextlib
import io
import re
from pathlib import Path

import pytest

_README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_example_prints_what_its_comments_say() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", _README.read_text(encoding="utf-8"), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(_README), "exec"), {})
    assert printed.getvalue().split("\n")[:-1] == re.findall(r"print\(.*\)  # (.*)", code)
