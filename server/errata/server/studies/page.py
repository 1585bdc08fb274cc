"""The page of a study: every finished cell with figures, captions and what was left out; and what was not measured."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import ChoiceLoader, PackageLoader
from markupsafe import Markup

from errata.editor.measurements.drawing import environment
from errata.editor.report.wording import counted
from errata.server.studies.format import Study
from errata.server.studies.plan import Cell
from errata.server.studies.results import SECTION, Place

NOT_RUN = "it has not been run"


def write_page(study: Study, cells: Sequence[Cell], failed: dict[str, str], place: Place) -> None:
    """Writes the page whole or not at all. `failed` are reasons by the cells' ids."""
    ordered = sorted(cells, key=lambda cell: list(study.measurements).index(cell.measurement_name))
    finished = [cell for cell in ordered if place.has(cell.id)]
    own = environment()
    own.loader = ChoiceLoader([PackageLoader("errata.server.studies", "."), *filter(None, [own.loader])])
    template = own.get_template("study.html.j2")
    parts = template.generate(
        study=study,
        cells=len(cells),
        done=len(finished),
        failures=[(cell.label, failed.get(cell.id, NOT_RUN)) for cell in ordered if cell not in finished],
        contents=finished,
        sections=_sections(finished, place),
        counted=counted,
    )
    _write(place.page, parts)


def _sections(cells: Sequence[Cell], place: Place) -> Iterator[Markup]:
    """The stored parts, one at a time: a page may hold hundreds of figures. They were escaped when they were made."""
    for cell in cells:
        yield Markup((place.cells / cell.id / SECTION).read_text(encoding="utf-8"))


def _write(page: Path, parts: Iterator[str]) -> None:
    beside = page.with_name(f".{page.name}.partial")
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(page)
