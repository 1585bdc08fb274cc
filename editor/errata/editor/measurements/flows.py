"""Flows: from the tokens of one or more groups to one token (methods.md §3).

The target of a group is its last token; of the constraints it is the *first* constraint's, which is the visual one
where there is one (Basu et al. 2024, §4).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from errata.editor.errors import InvalidInputError
from errata.editor.measurements.positions import Group, Pair, positions
from errata.editor.measurements.questions import Question
from errata.editor.model import EditableModel, Encoded


def flow_of(text: str, *, field: str) -> Pair:
    """The flow that `source->target` says, where a source may be several groups: `image+question->last`.

    Raises InvalidInputError for what names no groups, or more than one target.
    """
    flow = Pair.parse(text, field=field)
    if len(flow.targets) > 1:
        raise InvalidInputError(f"{text!r} flows to {len(flow.targets)} groups; give one flow for each", field=field)
    return flow


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """A flow's tokens in one row: its sources up to the target, in order, and the target. No sources: no flow."""

    sources: tuple[int, ...]
    target: int


def ends(model: EditableModel, question: Question, row: Encoded, flows: Sequence[Pair]) -> list[Ends]:
    """Each flow's tokens in `row`, which is `question` as the model is given it.

    Raises ConstraintNotFoundError for a constraint that the prompt does not hold.
    """
    found = positions(model, question, row)
    first = row.positions(*question.constraints[0].span(question.prompt.text))
    of_flows = []
    for flow in flows:
        target_group = flow.targets[0]
        candidates = first if target_group is Group.CONSTRAINT else found.groups[target_group]
        target = candidates[-1] if candidates else -1
        sources = tuple(t for t in found.of(flow.sources) if t <= target)
        of_flows.append(Ends(sources=sources, target=max(target, 0)))
    return of_flows
