"""AUTO layers of an edit: what is traced, and by what it is corrupted, when nobody says.

A visual constraint is corrupted by another request's or reference's pictures, a textual one by what another says in
its place. Candidates are tried until one corrupts.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from random import Random

from errata.editor.errors import CancelledError, CorruptionFailedError, InvalidInputError
from errata.editor.model import EditableModel
from errata.editor.requests import Context, EditRequest
from errata.editor.trace import (
    AveragedTrace,
    CausalTrace,
    Corruption,
    OtherImage,
    Progress,
    Substitution,
    TraceRequest,
    average,
    trace,
)

_QUESTIONS = 24
"""Most questions that are traced to choose layers: the first one of each request."""

_FEWEST = 6
"""Where there are fewer requests, further contexts of theirs make up this many questions."""

_CANDIDATES = 4
"""Corruptions that are tried for one question."""


def trace_edit(
    model: EditableModel,
    requests: Sequence[EditRequest],
    references: Sequence[Context],
    *,
    progress: Progress,
    cancelled: Callable[[], bool],
    most: int = _QUESTIONS,
) -> AveragedTrace:
    """The average over the requests' questions, at most `most` of them, as `model` answers them.

    Raises CorruptionFailedError, with every question's reason, where none could be corrupted; CancelledError.
    """
    asked = questions(requests, most)
    found: list[CausalTrace] = []
    failed: list[str] = []
    for n, (request, context) in enumerate(asked):
        candidates = islice(corruptions(context, request, requests, references, Random(n)), _CANDIDATES)
        try:
            found.append(_traced(model, context, candidates, cancelled))
        except CorruptionFailedError as error:
            failed.append(f"{request.name!r}: {error}")
        progress(n + 1, len(asked))
    if not found:
        raise CorruptionFailedError(
            "no question could be traced to choose the layers; give them explicitly or trace first. "
            + "; ".join(failed)
        )
    return average(found)


def questions(requests: Sequence[EditRequest], most: int = _QUESTIONS) -> list[tuple[EditRequest, Context]]:
    """The requests' first contexts, and the next ones in turn while these are few."""
    rounds = zip_longest(*([(r, c) for c in r.contexts] for r in requests))
    in_turn = [asked for asked in chain.from_iterable(rounds) if asked is not None]
    return in_turn[: min(max(len(requests), _FEWEST), max(most, _FEWEST))]


def _traced(
    model: EditableModel, context: Context, candidates: Iterator[Corruption], cancelled: Callable[[], bool]
) -> CausalTrace:
    reason = "no other request or reference has anything to corrupt it with"
    for corruption in candidates:
        request = TraceRequest(prompt=context.prompt, constraint=context.constraint, corruption=corruption)
        try:
            return trace(model, request, cancelled=cancelled)
        except CancelledError:
            raise
        # A picture of another size does not align, a word may mean the same: the next one may do.
        except (CorruptionFailedError, InvalidInputError) as error:
            reason = str(error)
    raise CorruptionFailedError(reason)


def corruptions(
    context: Context,
    own: EditRequest,
    requests: Sequence[EditRequest],
    references: Sequence[Context],
    random: Random,
) -> Iterator[Corruption]:
    """Pictures first where the question has any; other requests before references, each in random order."""
    others = [r.contexts[0] for r in requests if r is not own]
    others = [
        *random.sample(others, len(others)),
        *random.sample(list(references), min(len(references), 8 * _CANDIDATES)),
    ]
    others = [o for o in others if o.subject is None or o.subject != context.subject]
    images = context.prompt.images
    if images:
        pictures = [OtherImage(images=o.prompt.images) for o in others if len(o.prompt.images) == len(images)]
        # A word is left for the case that the constraint is textual and the pictures beside the point.
        yield from pictures[: _CANDIDATES - 1]
    own_words = context.constraint.text.casefold()
    words = dict.fromkeys(o.constraint.text for o in others if not o.prompt.images)
    yield from (Substitution(word=word) for word in words if word.casefold() != own_words)
