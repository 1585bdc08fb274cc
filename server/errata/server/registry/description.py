"""A version in markdown, for MLflow's pages. What callers and models said is escaped."""

import re

from errata.server.ledger.rows import VersionRow
from errata.server.names import version_name
from errata.server.registry.record import EditRecord, metric_name, scores_of

LIMIT = 5000
"""Characters that MLflow's databases hold of a description."""

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~])")
_LONGEST_CELL = 160
_LONGEST_NOTE = 1500


def describe(version: VersionRow, record: EditRecord) -> str:
    """Facts before and after, scores, who, when, parent and sizes, in at most `LIMIT` characters.

    Facts that do not fit are counted; they stand in the run's request.json.
    """
    ends = "\n\n".join(filter(None, (_rejections(version), _scores(version), _origin(version))))
    note = _cut(record.note, _LONGEST_NOTE) or _headline(version)
    room = LIMIT - len(ends) - len(note) - 4
    return "\n\n".join(filter(None, (note, _facts(version, record, room), ends)))[:LIMIT]


def _headline(version: VersionRow) -> str:
    """What MLflow's list of versions shows where nobody described the edit: it has room for one line."""
    first, more = version.facts[:1], len(version.facts) - 1
    return "".join(map(markdown, first)) + (f", and {more} more" if more > 0 else "")


def _facts(version: VersionRow, record: EditRecord, room: int) -> str:
    if record.changes:
        head = ["| fact | before | after |", "|---|---|---|"]
        rows = [f"| {markdown(c.name)} | {markdown(c.before)} | **{markdown(c.after)}** |" for c in record.changes]
    else:
        head, rows = [], [f"- {markdown(fact)}" for fact in version.facts]
    shown = list(rows)
    while shown and len("\n".join(head + shown)) + 60 > room:
        shown.pop()
    left = len(rows) - len(shown)
    return "\n".join(head + shown) + (f"\n\n… and {left} more, in `request.json`" if left else "")


def _scores(version: VersionRow) -> str:
    rows = [
        f"| {metric_name(s).replace('_', ' ')} | {s.n} | {s.before:.1%} | **{s.after:.1%}** "
        f"| {s.low:.1%} – {s.high:.1%} | {s.forced:.1%} |"
        for s in scores_of(version)
    ]
    head = ["| metric | probes | before | after | 95 % interval | teacher-forced |", "|---|---|---|---|---|---|"]
    return "\n".join(head + rows) if rows else ""


def _rejections(version: VersionRow) -> str:
    if not version.rejections:
        return ""
    lines = "\n".join(f"- {markdown(line)}" for line in version.rejections[:10])
    return f"**Rejected by its guardrails**\n{lines}"


def _origin(version: VersionRow) -> str:
    layers = ", ".join(map(str, version.layers)) or "none"
    return (
        f"`{version_name(version.model, version.number)}` on `{version_name(version.model, version.parent or 0)}`, by "
        f"{markdown(version.created_by)}, {version.create_time:%Y-%m-%d %H:%M} UTC. "
        f"Delta of {version.delta_bytes / 1024:.1f} KiB at layers {layers}, on the base `{version.base_sha256[:12]}`."
    )


def markdown(text: str) -> str:
    """A text on one line, cut, its markup escaped."""
    return _SPECIAL.sub(r"\\\1", _cut(" ".join(text.split()), _LONGEST_CELL))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
