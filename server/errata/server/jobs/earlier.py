"""What the edits of a version installed, so that the next edit on it can hold that."""

from collections.abc import Iterator

from errata.editor.requests import EditRequest
from errata.server.conversion import Decoder
from errata.server.jobs.lineages import Lineages
from errata.v1 import edit_pb2

_MOST_REQUESTS = 256
"""The newest of them; each costs a pass over its contexts."""

_CONTEXTS = 8
"""Contexts whose keys stand for a request's, evenly chosen from all."""


def earlier_requests(lineages: Lineages, decoder: Decoder, model: str, version: int) -> tuple[EditRequest, ...]:
    """The requests of all edits that stand in the version's lineage, the newest first, with some of their contexts."""
    found: list[EditRequest] = []
    for request in _newest_first(lineages, model, version):
        found.append(decoder.edit_request(_thinned(request), f"earlier[{len(found)}]"))
        if len(found) == _MOST_REQUESTS:
            break
    return tuple(found)


def _newest_first(lineages: Lineages, model: str, version: int) -> Iterator[edit_pb2.EditRequest]:
    for row in reversed(lineages.live(lineages.of(model, version))):
        for made in reversed(lineages.edits(model, row.number)):
            yield from made.request.requests


def _thinned(request: edit_pb2.EditRequest) -> edit_pb2.EditRequest:
    step = -(-len(request.contexts) // _CONTEXTS)
    return edit_pb2.EditRequest(name=request.name, contexts=request.contexts[::step], target=request.target)
