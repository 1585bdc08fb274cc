"""Edits one after another, each on the version before: `python benchmarks/sequence.py`. docs/adr/0007 has its figures.

The requests of the batch (10 errata, the pages of 16 flags), with and without holding what was edited before. All facts
are judged at the end, and apart from that those of the first half, which had the most edits after them.
"""

from dataclasses import replace
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from errata.editor.atlas.facts import edit_requests, errata, long_tail, probes, references
from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.delta import Delta, applied, empty_delta
from errata.editor.earlier import Earlier
from errata.editor.evaluation import Evaluation, Metric, Probe, evaluate
from errata.editor.methods import HOLDING, EditSettings, Method, edit
from errata.editor.model import EditableModel
from errata.editor.requests import EditRequest
from errata.editor.statistics import KeyStatistics, key_statistics

JUDGED = (Metric.EFFICACY, Metric.IMAGE_GENERALIZATION, Metric.PHRASING_GENERALIZATION, Metric.OTHER_SUBJECTS)


def edited(
    model: EditableModel, requests: list[EditRequest], settings: EditSettings, statistics: KeyStatistics, *, hold: bool
) -> Delta:
    """All requests, one after another."""
    whole, done = empty_delta(model), list[EditRequest]()
    for request in requests:
        # As the server does: eight contexts stand for a request.
        earlier = [replace(r, contexts=r.contexts[:: max(1, len(r.contexts) // 8)]) for r in done] if hold else []
        found = edit(model, [request], settings, statistics, parent=whole, earlier=Earlier.of(earlier))
        whole, done = (whole + found.delta).compressed(), [*done, request]
    return whole


def first_half(evaluation: Evaluation) -> float:
    """Efficacy of the facts that were edited first."""
    passed = [r.passed for r in evaluation.results if r.probe.metric is Metric.EFFICACY]
    return float(np.mean(passed[: len(passed) // 2]))


def main(
    seed: Annotated[int, typer.Option(help="Draws renderings and phrasings.")] = 3,
    contexts: Annotated[int, typer.Option(help="A request's contexts.")] = 32,
) -> None:
    """Compare holding earlier edits with not holding them, on Atlas."""
    model = load_model(ATLAS)
    facts, layers = (*errata(), *long_tail()), (1,)
    statistics = key_statistics(model, references(), layers)
    requests = list(edit_requests(facts, contexts=contexts, seed=seed))
    asked: list[Probe] = [p for p in probes(facts, seed=seed, per_fact=2, others=3 * len(facts)) if p.metric in JUDGED]
    table = Table("method", "holds", *(m.value for m in JUDGED), "efficacy, first half")
    for method in sorted(HOLDING, key=lambda m: m is Method.ALPHAEDIT):
        for hold in (False, True):
            settings = EditSettings(layers=layers, method=method)
            delta = edited(model, requests, settings, statistics, hold=hold)
            found = evaluate(model, asked, applied(model, delta))
            shares = [f"{found.score(m).after:.3f}" for m in JUDGED]
            table.add_row(method.value, "yes" if hold else "no", *shares, f"{first_half(found):.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
