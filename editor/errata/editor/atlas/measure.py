"""What Atlas knows and where: `python -m errata.editor.atlas.measure`.

Every figure by greedy generation on renderings that training never saw; beside each what it must at least (or at
most) be. Exits with 1 where one falls short.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from errata.editor.atlas import questions
from errata.editor.atlas.facts import KNOWN, LONG_TAIL, ask, errata, picture, trace_requests
from errata.editor.atlas.questions import Phrasing
from errata.editor.atlas.world import COUNTRIES, Attribute, Country
from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.errors import CorruptionFailedError
from errata.editor.model import EditableModel, same_answer
from errata.editor.prompts import Prompt
from errata.editor.report.tables import aie_tables
from errata.editor.states import Component
from errata.editor.trace import AveragedTrace, CausalTrace, TraceRequest, TraceSettings, average, trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure and its bound: at least `bound`, or at most where `at_most`."""

    name: str
    n: int
    value: float
    bound: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether the bound is kept."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def knowledge(model: EditableModel, *, per_fact: int = 2, seed: int = 0) -> list[Figure]:
    """Shares of right answers: seen and unseen phrasings, in words alone, of the long tail, of the errata."""
    rng = np.random.default_rng(seed)
    seen, wordings = questions.PHRASINGS, questions.VISUAL_CONSTRAINTS
    every = [(c, a) for c in KNOWN for a in Attribute]
    unseen_wordings = (*questions.HELD_OUT_VISUAL_CONSTRAINTS, *wordings)
    tail = [(c, a) for c in LONG_TAIL for a in Attribute]
    everywhere = [(c, a) for c in COUNTRIES for a in Attribute]
    outdated = [(f.country, f.attribute) for f in errata()]

    def share(facts: Sequence[tuple[Country, Attribute]], asked: list[Prompt]) -> float:
        answers = model.generate(asked, batch_size=256)
        right = [same_answer(x.text, c.fact(a)) for x, (c, a) in zip(answers, facts, strict=True)]
        return float(np.mean(right))

    def prompts(
        facts: Sequence[tuple[Country, Attribute]],
        phrasings: dict[Attribute, tuple[Phrasing, ...]],
        words: Sequence[str] | None,
    ) -> list[Prompt]:
        return [
            ask(
                c,
                phrasings[a][rng.integers(len(phrasings[a]))],
                str(rng.choice(words)) if words else "",
                picture(c, int(rng.integers(1 << 31))) if words else None,
            ).prompt
            for c, a in facts
        ]

    def figure(
        name: str,
        facts: Sequence[tuple[Country, Attribute]],
        bound: float,
        at_most: bool = False,
        *,
        unseen: bool = False,
        shown: bool = True,
    ) -> Figure:
        phrasings = questions.HELD_OUT_PHRASINGS if unseen else seen
        words = (unseen_wordings if unseen else wordings) if shown else None
        value = share(facts, prompts(facts, phrasings, words))
        return Figure(name=name, n=len(facts), value=value, bound=bound, at_most=at_most)

    return [
        figure("unseen renderings", every * per_fact, 0.98),
        figure("unseen renderings and phrasings", every * per_fact, 0.95, unseen=True),
        figure("in words alone", everywhere, 0.99, shown=False),
        figure("long-tail flags", tail * per_fact, 0.30, at_most=True),
        figure("outdated facts, as the atlas has them", outdated * 4, 0.98),
    ]


def traced(model: EditableModel, requests: Sequence[TraceRequest], *, window: int = 1) -> tuple[AveragedTrace, int]:
    """The averaged trace of those questions that their corruption corrupts, and how many it did not."""
    found: list[CausalTrace] = []
    failed = 0
    for request in track(requests, "tracing", transient=True):
        try:
            found.append(trace(model, request, TraceSettings(window=window)))
        except CorruptionFailedError:
            failed += 1
    return average(found), failed


def locality(averaged: AveragedTrace, name: str) -> list[Figure]:
    """Whether one MLP of the lower half restores half of the total effect, and the trace peaks at the constraint."""
    mlp = averaged.aie(Component.MLP)
    column = averaged.roles.index("constraint last")
    lower = len(mlp) // 2
    share = float(mlp[:lower, column].max() / averaged.total_effect)
    peak = np.unravel_index(np.nanargmax(mlp), mlp.shape)
    n = len(averaged.traces)
    return [
        Figure(name=f"{name}: one early MLP restores", n=n, value=share, bound=0.5),
        Figure(
            name=f"{name}: peak at the constraint",
            n=n,
            value=float(averaged.roles[int(peak[1])].startswith("constraint")),
            bound=1,
        ),
    ]


def main(
    model: Annotated[str, typer.Argument(help="`atlas`, or a folder with another training of it.")] = ATLAS,
    questions_traced: int = 60,
    seed: int = 0,
) -> None:
    """Measure what Atlas knows and where."""
    console = Console()
    atlas = load_model(model if model == ATLAS else Path(model))
    figures = knowledge(atlas, seed=seed)
    for name, substitute in (("another image", False), ("a substituted constraint", True)):
        averaged, failed = traced(atlas, trace_requests(questions_traced, substitute=substitute, seed=seed))
        figures += locality(averaged, name)
        console.print(
            f"\ncorrupted by {name}: total effect {averaged.total_effect:.3f}; "
            f"{failed} of {questions_traced} were not corrupted by it"
        )
        console.print(aie_tables(averaged))
    table = Table("figure", "n", "measured", "bound", "")
    for f in figures:
        table.add_row(
            f.name,
            str(f.n),
            f"{f.value:.3f}",
            f"{'≤' if f.at_most else '≥'} {f.bound:.2f}",
            "" if f.holds else "falls short",
        )
    console.print(table)
    raise typer.Exit(0 if all(f.holds for f in figures) else 1)


if __name__ == "__main__":
    typer.run(main)
