"""What people read: figures, terminal tables and a self-contained page of one edit. Knows only finished results."""

from errata.editor.report.figures import aie_heatmap, aie_lines, loss_curves, trace_heatmap
from errata.editor.report.html import Report, render_report, write_report
from errata.editor.report.style import png
from errata.editor.report.tables import aie_tables, answers_table, outcomes_table, scores_table

__all__ = [
    "Report",
    "aie_heatmap",
    "aie_lines",
    "aie_tables",
    "answers_table",
    "loss_curves",
    "outcomes_table",
    "png",
    "render_report",
    "scores_table",
    "trace_heatmap",
    "write_report",
]
