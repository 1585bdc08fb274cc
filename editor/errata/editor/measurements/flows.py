"""Flows: from the tokens of one or more groups to one token (methods.md §3).

The target of a group is its last token; of the constraints it is the *first* constraint's, which is the visual one
where there is one (Basu et al. 2024, §4).
"""

from dataclasses import dataclass

from errata.editor.errors import InvalidInputError
from errata.editor.measurements.positions import Group, positions
from errata.editor.measurements.questions import Question
from errata.editor.model import EditableModel, Encoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Where something is carried from and to."""

    source: tuple[Group, ...]
    target: Group

    @property
    def label(self) -> str:
        """As a figure says it."""
        return f"{' + '.join(self.source)} → {self.target}"

    @property
    def name(self) -> str:
        """As a file is named."""
        return "_".join((*self.source, self.target))

    @property
    def of_image(self) -> bool:
        """Whether it comes from all image tokens and no other."""
        return self.source == (Group.IMAGE,)


def flow_of(flow: str) -> Flow:
    """The flow that `source:target` says, where a source may be several groups: `image+question:last`.

    Raises InvalidInputError for what names no groups.
    """
    source, _, target = flow.partition(":")
    groups, sources = [g.value for g in Group], source.split("+")
    if not {target, *sources} <= set(groups) or len(set(sources)) < len(sources):
        raise InvalidInputError(
            f"{flow!r} is no flow; give source:target, each of {', '.join(groups)}, and several sources joined by +",
            field="flows",
        )
    return Flow(source=tuple(map(Group, sources)), target=Group(target))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """A flow's tokens in one row: its sources up to the target, in order, and the target. No sources: no flow."""

    sources: tuple[int, ...]
    target: int


def ends(model: EditableModel, question: Question, row: Encoded, flows: tuple[Flow, ...]) -> list[Ends]:
    """Each flow's tokens in `row`, which is `question` as the model is given it.

    Raises ConstraintNotFoundError for a constraint that the prompt does not hold.
    """
    found = positions(model, question, row)
    first = row.positions(*question.constraints[0].span(question.prompt.text))
    of_flows = []
    for flow in flows:
        candidates = first if flow.target is Group.CONSTRAINT else found.groups[flow.target]
        target = candidates[-1] if candidates else -1
        sources = tuple(t for t in found.of(flow.source) if t <= target)
        of_flows.append(Ends(sources=sources, target=max(target, 0)))
    return of_flows
