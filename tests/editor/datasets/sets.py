"""Small data sets of both formats, and where the real sample is."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from errata.editor.datasets.lines import FILE

SAMPLE = Path(__file__).parents[4] / "shared" / "data" / "vqa_constraints" / "multimodal_known_sample20.csv"
KNOWN = Path(__file__).parents[4] / "shared" / "data" / "known" / "known_1000.json"
"""A sample of the real file and the known facts of Meng et al. (2022); both lie beside the repository, not in it."""

HEADER = ("", "question", "subject", "main_entity", "image_url")
ROWS = (
    ("0", "This building is located in", "Space Needle", "This building", "./A photo of Space Needle"),
    ("2", "This company is owned by", "Audible.com", "This company", "./A photo of Audible.com"),
    ("5", "This application, a product by", "MacApp", "This application,", "./A photo of MacApp"),
)


def table(path: Path, rows: Sequence[Sequence[str]] = ROWS, header: Sequence[str] = HEADER) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


THIS = {"text": "this country", "kind": "visual"}
LINE: dict[str, Any] = {
    "text": "What is the capital of this country?", "images": ["images/estonia.png"], "constraints": [THIS],
}  # fmt: skip


def picture(path: Path, colour: str = "blue") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), colour).save(path)
    return path


def written(folder: Path, *lines: dict[str, Any] | str) -> Path:
    """A data set of these lines, with the image that they name."""
    picture(folder / "images" / "estonia.png")
    file = folder / FILE
    file.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines), "utf-8")
    return file
