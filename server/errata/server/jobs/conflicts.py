"""Edits that speak against each other: found by their requests, and by what a composition answers.

Edits of which one was computed on top of the other do not: the later one knew.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from errata.editor.conflicts import key_overlap
from errata.editor.delta import Delta
from errata.editor.model import same_answer
from errata.server.conversion.encode import fact_line
from errata.server.jobs.lineages import Part
from errata.server.names import version_name
from errata.v1 import common_pb2, edit_pb2, history_pb2

Key = tuple[object, ...]
"""What two contexts share that ask the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A first question of one part, with its answer by the version that knows the edit, and by the composition."""

    part: Part
    request: edit_pb2.EditRequest
    own: str
    composed: str

    @property
    def question(self) -> str:
        """The prompt's text."""
        return self.request.contexts[0].prompt.text

    @property
    def expected(self) -> str:
        """What the edit installed."""
        return first_answer(self.request)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Installed:
    """What a request of a part's edit answers to one of its contexts."""

    part: Part
    edit: str
    request: edit_pb2.EditRequest
    answer: str


def contradictions(standing: Sequence[Part], parts: Sequence[Part]) -> Iterator[history_pb2.Conflict]:
    """Pairs of requests that ask the same and install different answers; one of each pair, at least, is new."""
    found: dict[Key, list[_Installed]] = defaultdict(list)
    seen: set[tuple[str, str, str, str]] = set()
    new = {id(part) for part in parts}
    for key, one in _installed([*standing, *parts]):
        for other in found[key] if id(one.part) in new else ():
            pair = (other.edit, other.request.name, one.edit, one.request.name)
            related = _knew(one.part, other.part) or _knew(other.part, one.part)
            if related or same_answer(other.answer, one.answer) or pair in seen:
                continue
            seen.add(pair)
            yield history_pb2.Conflict(
                first=_fact(other.part, other.request),
                second=_fact(one.part, one.request),
                expected=other.answer,
                answer=one.answer,
            )
        found[key].append(one)


def superseded(parts: Sequence[Part]) -> set[tuple[str, str]]:
    """Requests, by their edit and name, whose answer an edit that knew them replaced; parts may be in any order."""
    found: dict[Key, list[_Installed]] = defaultdict(list)
    gone: set[tuple[str, str]] = set()
    for key, one in _installed(parts):
        for other in found[key]:
            if other.request is one.request or same_answer(other.answer, one.answer):
                continue
            # Within a part the later one knew.
            if _knew(one.part, other.part):
                gone.add((other.edit, other.request.name))
            elif _knew(other.part, one.part):
                gone.add((one.edit, one.request.name))
        found[key].append(one)
    return gone


def suffering(
    asked: Sequence[Asked], parts: Sequence[Part], delta_of: Callable[[Part], Delta]
) -> Iterator[history_pb2.Conflict]:
    """Questions that are answered rightly by the version that knows the edit, and not by the composition.

    Named with the other part whose delta reads most nearly what this one's reads.
    """
    for each in asked:
        if not same_answer(each.own, each.expected) or same_answer(each.composed, each.expected):
            continue
        others = [p for p in parts if p is not each.part]
        overlaps = [key_overlap(delta_of(each.part), delta_of(p)) for p in others]
        worst = max(range(len(others)), key=overlaps.__getitem__, default=None)
        if worst is not None:
            row = others[worst].row
            yield history_pb2.Conflict(
                first=_fact(each.part, each.request),
                second=history_pb2.VersionFact(version=version_name(row.model, row.number), fact="; ".join(row.facts)),
                key_overlap=overlaps[worst],
                question=each.question,
                expected=each.expected,
                answer=each.composed,
            )


def joined(
    contradicting: Sequence[history_pb2.Conflict],
    suffered: Sequence[history_pb2.Conflict],
    parts: Sequence[Part],
    delta_of: Callable[[Part], Delta],
) -> list[history_pb2.Conflict]:
    """All conflicts, each once: a question that suffers is put with the request that contradicts it."""
    by_name = {version_name(p.row.model, p.row.number): p for p in parts}
    left = {(c.first.version, c.first.fact): c for c in suffered}
    found: list[history_pb2.Conflict] = []
    for conflict in contradicting:
        pair = [conflict.first, conflict.second]
        told = [c for fact in pair if (c := left.pop((fact.version, fact.fact), None))]
        overlap = key_overlap(*(delta_of(by_name[fact.version]) for fact in pair))
        for each in told:
            each.second.CopyFrom(pair[each.first == pair[0]])
        for each in told or [conflict]:
            each.key_overlap = overlap
            found.append(each)
    return [*found, *left.values()]


def first_answer(request: edit_pb2.EditRequest) -> str:
    """What the request installs as the answer to its first question."""
    return request.contexts[0].answer or request.target


def _installed(parts: Sequence[Part]) -> Iterator[tuple[Key, _Installed]]:
    asked = ((part, made.edit, request) for part in parts for made in part.edits for request in made.request.requests)
    for part, edit, request in asked:
        for context in request.contexts:
            one = _Installed(part=part, edit=edit, request=request, answer=context.answer or request.target)
            yield from ((key, one) for key in _keys(context))


def _keys(context: common_pb2.Context) -> Iterator[Key]:
    prompt = context.prompt
    text = " ".join(prompt.text.split()).casefold()
    yield (text, prompt.raw, *(image.SerializeToString(deterministic=True) for image in prompt.images))
    if context.subject:
        yield (text, "about", context.subject.casefold())


def _knew(later: Part, earlier: Part) -> bool:
    return later.row.model == earlier.row.model and earlier.row.number in later.knows


def _fact(part: Part, request: edit_pb2.EditRequest) -> history_pb2.VersionFact:
    return history_pb2.VersionFact(version=version_name(part.row.model, part.row.number), fact=fact_line(request))
