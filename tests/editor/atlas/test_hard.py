"""Atlas's hard questions as a data set: the one that is shipped is the one that the command writes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from errata.editor.atlas.hard import hard_questions, write
from errata.editor.datasets.validate import validate

SHIPPED = Path(__file__).parents[3] / "examples" / "hard"


def test_the_shipped_data_set_is_what_the_command_writes(tmp_path: Path) -> None:
    made = write(tmp_path / "hard", hard_questions(48))
    lines = [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()]
    shipped = (SHIPPED / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == [json.loads(line) for line in shipped]
    assert all(line["answer"] for line in lines)
    for line in lines:
        (name,) = line["images"]
        ours, theirs = (np.asarray(Image.open(root / name), dtype=float) for root in (made.parent, SHIPPED))
        assert np.abs(ours - theirs).mean() < 2  # of 255: encoders of JPEG differ a little


def test_the_shipped_data_set_is_whole() -> None:
    found = validate(SHIPPED)
    assert found.complete
    assert found.counts["questions"] == 48
