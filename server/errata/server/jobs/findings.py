"""The files that a measurement leaves: figures, page, numbers, as bytes by name. Writes nothing itself."""

import csv
import io
import math

from google.protobuf.json_format import MessageToJson

from errata.editor.measurements.drawing import Plate, page, plate
from errata.editor.measurements.findings import Findings
from errata.editor.measurements.questions import Progress
from errata.server.conversion.findings import findings_message

FINDINGS, NUMBERS, PAGE = "findings.json", "numbers.csv", "page.html"


def findings_files(findings: Findings, progress: Progress) -> dict[str, bytes]:
    """Each plot as PNG and SVG, all of them on a page, the numbers as a table, and everything as JSON."""
    plates: list[Plate] = []
    for plot in findings.plots:
        plates.append(plate(findings, plot))
        progress(len(plates), len(findings.plots))
    drawn = {f"{p.name}.{suffix}": file for p in plates for suffix, file in (("png", p.png), ("svg", p.svg))}
    whole = MessageToJson(findings_message(findings), preserving_proto_field_name=True, ensure_ascii=False)
    shown = page([findings], title=findings.title, plates=[plates])
    return {**drawn, PAGE: shown.encode(), FINDINGS: whole.encode(), NUMBERS: _numbers(findings)}


def _numbers(findings: Findings) -> bytes:
    out = io.StringIO(newline="")
    table = csv.writer(out)
    table.writerow(("name", "value", "low", "high", "unit", "n"))
    for each in findings.numbers:
        values = ("" if x is None or math.isnan(x) else x for x in (each.value, each.low, each.high))
        table.writerow((each.name, *values, each.unit, each.n))
    return out.getvalue().encode()
