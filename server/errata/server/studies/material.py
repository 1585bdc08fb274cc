"""A cell's questions and edits: Atlas's own, or those of files; `n` of them drawn by the seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from errata.editor.atlas.facts import Fact, counterfactual, edit_requests, errata, probes
from errata.editor.atlas.hard import hard_questions
from errata.editor.atlas.measured import multi_questions, single_questions, textual_questions
from errata.editor.datasets.loading import load
from errata.editor.errors import InvalidInputError
from errata.editor.evaluation import Probe
from errata.editor.measurements.known import read_known
from errata.editor.measurements.questions import Question
from errata.editor.requests import Context, EditRequest
from errata.server.jobs.edits import own_probes
from errata.server.studies.format import DataEntry
from errata.server.studies.plan import is_known, records_of

T = TypeVar("T")

_CONTEXTS = 32
"""Renderings and phrasings of one of Atlas's edits: what twice as many add is small."""

_PROBES = 2
"""Of each kind for one of Atlas's facts, and twice as many other countries and unrelated questions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """Questions, and a line for each that was left out before anything was asked."""

    questions: tuple[Question, ...]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """Edits to make, and the probes that judge them."""

    requests: tuple[EditRequest, ...]
    probes: tuple[Probe, ...]
    skipped: tuple[str, ...] = ()


def questions_of(data: Sequence[DataEntry], folder: Path, seed: int) -> Questions:
    """The questions of all sets, in their order. Raises InvalidInputError and its kinds."""
    found = [_questions(entry, folder, seed) for entry in data]
    return Questions(
        questions=tuple(q for each in found for q in each.questions),
        skipped=tuple(line for each in found for line in each.skipped),
    )


def edits_of(data: Sequence[DataEntry], folder: Path, seed: int) -> Edits:
    """The edits of all sets: Atlas's facts, or each question to its answer.

    Raises InvalidInputError where there is none.
    """
    found = [_atlas(entry, seed) if entry.atlas in _FACTS else _edits(entry, folder, seed) for entry in data]
    return Edits(
        requests=tuple(r for each in found for r in each.requests),
        probes=tuple(p for each in found for p in each.probes),
        skipped=tuple(line for each in found for line in each.skipped),
    )


def edited_questions(edits: Edits) -> Questions:
    """The first question of each edit, whose answer is the target."""
    firsts = [(r, r.contexts[0]) for r in edits.requests]
    return Questions(
        questions=tuple(
            Question(prompt=c.prompt, constraints=(c.constraint,), answer=c.answer or r.target) for r, c in firsts
        ),
        skipped=edits.skipped,
    )


def _questions(entry: DataEntry, folder: Path, seed: int) -> Questions:
    match entry.atlas, entry.n:
        case "errata" | "counterfactual", _:
            return edited_questions(_atlas(entry, seed))
        case str(kind), int(n):
            made = {"single": single_questions, "textual": textual_questions, "multi": multi_questions}
            asked = made[kind](n, seed) if kind in made else hard_questions(n, seed=seed)
            return Questions(questions=tuple(asked))
    assert entry.path is not None
    if is_known(entry):
        known = read_known(folder / entry.path)
        return Questions(questions=tuple(_drawn(known, entry.n, seed)))
    found = records_of(entry, folder)
    # Drawn before images are opened; what cannot be asked is made up for by the next ones.
    records = _drawn(found.records, None if entry.n is None else len(found.records), seed)
    loaded = load(records, limit=entry.n, skipped=found.skipped)
    return Questions(questions=loaded.questions, skipped=loaded.skipped)


def _edits(entry: DataEntry, folder: Path, seed: int) -> Edits:
    asked = _questions(entry, folder, seed)
    told = [(i, q, q.answer) for i, q in enumerate(asked.questions)]
    requests = tuple(
        EditRequest(
            name=f"{i}: {q.prompt.text}"[:200],
            target=answer,
            contexts=(Context(prompt=q.prompt, constraint=q.constraints[0], answer=answer),),
        )
        for i, q, answer in told
        if answer is not None
    )
    if not requests:
        raise InvalidInputError("no question has an answer to edit it to; give answers", field="data")
    unanswered = [f"questions[{i}]: {q.prompt.text!r} has no answer to edit it to" for i, q, a in told if a is None]
    return Edits(requests=requests, probes=own_probes(requests), skipped=(*asked.skipped, *unanswered))


def _atlas(entry: DataEntry, seed: int) -> Edits:
    """Atlas's outdated facts, or facts changed to what is not true: each an edit of its own, with probes of its own."""
    assert entry.atlas is not None
    requests, judged = [], list[Probe]()
    for fact in _FACTS[entry.atlas](entry.n, seed):
        (request,) = edit_requests([fact], contexts=_CONTEXTS, seed=seed)
        requests.append(request)
        own = probes([fact], seed=seed, per_fact=_PROBES, others=2 * _PROBES)
        judged += [replace(probe, request=request.name) for probe in own]
    return Edits(requests=tuple(requests), probes=tuple(judged))


def _counterfactual(n: int | None, seed: int) -> Sequence[Fact]:
    assert n is not None
    return counterfactual(n, seed=seed)


_FACTS: Mapping[str, Callable[[int | None, int], Sequence[Fact]]] = {
    "errata": lambda n, seed: _drawn(errata(), n, seed),
    "counterfactual": _counterfactual,
}
"""Atlas's facts to edit."""


def _drawn(given: Sequence[T], n: int | None, seed: int) -> Sequence[T]:
    """`n` of them, drawn without replacement; all of them, as they stand, where it is None."""
    if n is None:
        return given
    return [given[i] for i in np.random.default_rng(seed).permutation(len(given))[:n]]
