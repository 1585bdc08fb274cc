"""Pictures that Atlas may misread: known flags seen badly, so that it fails where it usually does not.

Blurred, a part of the flag only, far away, turned; each from hardly to hardly recognisable. The expected answer is the
fact of the country whose flag it is. Most of what Atlas does not recognise it calls unknown; in the rest of its
failures it tells another country's fact. (Noise and lost colours make it say unknown and hardly ever mistake.)

`python -m errata.editor.atlas.hard --out FOLDER --n 600` writes them as a data set (docs/datasets.md).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageFilter

from errata.editor.atlas import questions
from errata.editor.atlas.facts import KNOWN, ask, picture
from errata.editor.atlas.world import Attribute
from errata.editor.datasets.lines import write_lines
from errata.editor.datasets.records import Kind, Record, Span
from errata.editor.measurements.questions import Question

Distortion = Callable[[Image.Image, float, np.random.Generator], Image.Image]
"""Takes a picture and a severity, 0 … 1."""


def hard_questions(n: int, *, seed: int = 0) -> list[Question]:
    """Questions about known flags in bad pictures, in training's own words, with their right answers."""
    rng = np.random.default_rng((seed, _HARD))
    kinds, found = tuple(DISTORTIONS.values()), []
    for i in range(n):
        country, attribute = KNOWN[rng.integers(len(KNOWN))], list(Attribute)[i % 4]
        phrasing = questions.PHRASINGS[attribute][rng.integers(len(questions.PHRASINGS[attribute]))]
        wording = questions.VISUAL_CONSTRAINTS[rng.integers(len(questions.VISUAL_CONSTRAINTS))]
        image = picture(country, int(rng.integers(1 << 31)))
        bad = kinds[i // 4 % len(kinds)](image, float(rng.random()), rng)
        asked, answer = ask(country, phrasing, wording, bad), country.fact(attribute)
        found.append(Question(prompt=asked.prompt, constraints=(asked.constraint,), answer=answer))
    return found


_HARD = 5
"""Part of the seed, which no other pictures have."""


def _blur(image: Image.Image, severity: float, _: np.random.Generator) -> Image.Image:
    """Gaussian, of up to a fifth of the picture's width."""
    return image.filter(ImageFilter.GaussianBlur(0.2 * severity * image.width))


def _part(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """A window, down to a fifth of the picture's sides, as large as the picture was."""
    share = 1 - 0.8 * severity
    width, height = round(share * image.width), round(share * image.height)
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)


def _far(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Down to a twelfth of its size, on a plain ground."""
    share = 1 - severity * 11 / 12
    small = image.resize(
        (max(1, round(share * image.width)), max(1, round(share * image.height))), Image.Resampling.BICUBIC
    )
    grounded = Image.new("RGB", image.size, _colour(rng))
    left, top = (int(rng.integers(a - b + 1)) for a, b in zip(image.size, small.size, strict=True))
    grounded.paste(small, (left, top))
    return grounded


def _turned(image: Image.Image, severity: float, rng: np.random.Generator) -> Image.Image:
    """Up to upside down, on a plain ground."""
    return image.rotate(180 * severity, Image.Resampling.BICUBIC, fillcolor=_colour(rng))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in rng.integers(256, size=3))
    return red, green, blue


DISTORTIONS: dict[str, Distortion] = {"blur": _blur, "part": _part, "far": _far, "turned": _turned}
"""Every way of seeing a flag badly; `hard_questions` takes them in turn."""


def write(folder: Path, asked: Sequence[Question]) -> Path:
    """Writes such questions as a data set into a new or empty folder; returns its file. Raises InvalidInputError."""
    with TemporaryDirectory() as there:
        return write_lines(folder, _records(asked, Path(there)))


def _records(asked: Sequence[Question], folder: Path) -> Iterator[Record]:
    """The questions with their pictures in files."""
    for i, question in enumerate(asked):
        (picture_shown,) = question.prompt.images
        assert isinstance(picture_shown, Image.Image)
        image = folder / f"{i:03}.jpg"
        picture_shown.save(image, quality=90)
        spans = tuple(Span(text=c.text, kind=Kind.VISUAL, occurrence=c.occurrence) for c in question.constraints)
        yield Record(
            text=question.prompt.text, images=(image,), constraints=spans, answer=question.answer, id=f"{i:03}"
        )


def main(
    out: Annotated[Path, typer.Option(help="A new folder.")],
    n: Annotated[int, typer.Option(min=1, help="Questions.")] = 400,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write questions about flags in bad pictures, with their right answers, as a data set."""
    typer.echo(write(out, hard_questions(n, seed=seed)))


if __name__ == "__main__":
    typer.run(main)
