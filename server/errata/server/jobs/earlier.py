"""What the edits of a version installed, so that the next edit on it can hold that."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from errata.editor.requests import EditRequest
from errata.server.conversion import Decoder
from errata.server.jobs.lineages import Lineages
from errata.v1 import edit_pb2

MOST_REQUESTS = 256
"""The newest of them are held; each costs a pass over its contexts."""

_CONTEXTS = 8
"""Contexts whose keys stand for a request's, evenly chosen from all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """The requests of all edits that stand in a version's lineage, the newest first, with some of their contexts.

    `whole` is False where there are more, of which what they installed is not held (docs/adr/0008).
    """

    requests: tuple[EditRequest, ...] = ()
    whole: bool = True


def earlier_requests(
    lineages: Lineages, decoder: Decoder, model: str, version: int, *, most: int = MOST_REQUESTS
) -> Earlier:
    """What the next edit on the version has to hold, at most so many requests."""
    newest = _newest_first(lineages, model, version)
    requests = tuple(
        decoder.edit_request(_thinned(request), f"earlier[{i}]") for i, request in enumerate(islice(newest, most))
    )
    return Earlier(requests=requests, whole=next(newest, None) is None)


def _newest_first(lineages: Lineages, model: str, version: int) -> Iterator[edit_pb2.EditRequest]:
    for row in reversed(lineages.live(lineages.of(model, version))):
        for made in reversed(lineages.edits(model, row.number)):
            yield from made.request.requests


def _thinned(request: edit_pb2.EditRequest) -> edit_pb2.EditRequest:
    step = -(-len(request.contexts) // _CONTEXTS)
    return edit_pb2.EditRequest(name=request.name, contexts=request.contexts[::step], target=request.target)
