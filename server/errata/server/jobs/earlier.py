"""What the edits of a version installed, so that the next edit on it can hold that.

Of a request only a hash and its subjects stay in memory: a thousand of them with their pictures can be gigabytes. They
are read again from the ledger, and their pictures decoded, where an edit has no keys of theirs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

from errata.editor.caching import digest_of
from errata.editor.earlier import Earlier, EarlierRequest
from errata.editor.requests import Context
from errata.server.conversion import Decoder
from errata.server.jobs.lineages import Lineages, Made
from errata.v1 import common_pb2, edit_pb2

_CONTEXTS = 8
"""Contexts whose keys stand for a request's, evenly chosen from all."""


def earlier_edits(lineages: Lineages, decoder: Decoder, model: str, version: int, folder: Path) -> Earlier:
    """The requests of all edits that stand in a version's lineage, the newest first; `folder` keeps their keys."""
    # One version's edits at a time: the requests that are asked for follow one another.
    edits = lru_cache(maxsize=1)(lineages.edits)
    found: list[EarlierRequest] = []
    for row in reversed(lineages.live(lineages.of(model, version))):
        for n, made in reversed(list(enumerate(edits(model, row.number)))):
            found += _requests(made, partial(_nth, edits, model, row.number, n), decoder)
    return Earlier(requests=tuple(found), folder=folder)


def _nth(edits: Callable[[str, int], Sequence[Made]], model: str, version: int, n: int) -> Made:
    return edits(model, version)[n]


def _requests(made: Made, again: Callable[[], Made], decoder: Decoder) -> Iterator[EarlierRequest]:
    """An edit's requests, whose contexts are those of the edit read `again`."""
    for i, request in enumerate(made.request.requests):
        yield EarlierRequest(
            name=digest_of(c.SerializeToString(deterministic=True) for c in _thinned(request)),
            subjects=frozenset(c.subject for c in request.contexts if c.subject),
            contexts=partial(_contexts, again, i, decoder),
        )


def _contexts(again: Callable[[], Made], i: int, decoder: Decoder) -> tuple[Context, ...]:
    thinned = _thinned(again().request.requests[i])
    return tuple(decoder.context(c, f"earlier.contexts[{n}]") for n, c in enumerate(thinned))


def _thinned(request: edit_pb2.EditRequest) -> list[common_pb2.Context]:
    step = -(-len(request.contexts) // _CONTEXTS)
    return list(request.contexts[::step])
