"""What a caller asks to be edited. Knows nothing about models."""

from dataclasses import dataclass, field

from errata.editor.errors import ConstraintNotFoundError, InvalidInputError, PromptError, TargetError
from errata.editor.prompts import Constraint, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A prompt and where its constraint stands: one way of asking for a fact.

    `answer` is the right answer where it is not the request's target: another fact of the same thing, which the same
    key has to tell. Of a prompt to preserve it is the answer that must stay: what the model gets wrong there is not
    preserved; None preserves whatever it answers. `subject` says what the constraint means, where the caller knows: a
    reference prompt does not speak against an edit of its own subject.
    """

    prompt: Prompt
    constraint: Constraint
    answer: str | None = None
    subject: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRequest:
    """Make the model answer `target`.

    `contexts` are ways of asking for the one fact: the question itself first, then other renderings or phrasings,
    whose keys and values the edit takes in together. `preserve` are prompts about the same thing whose answers must
    stay: other questions about the same image. Where they name a constraint, the value is optimised to leave them.
    """

    name: str
    contexts: tuple[Context, ...] = field(repr=False)
    target: str
    preserve: tuple[Context, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.contexts:
            raise PromptError(f"request {self.name!r} has no prompt; give at least one context", field="contexts")
        if not self.target.strip():
            raise TargetError(f"request {self.name!r} has an empty target; give the answer to install", field="target")
        for part, contexts in (("contexts", self.contexts), ("preserve", self.preserve)):
            for i, context in enumerate(contexts):
                try:
                    context.constraint.span(context.prompt.text)
                except ConstraintNotFoundError as error:
                    raise error.within(f"{part}[{i}]") from None

    @property
    def subjects(self) -> frozenset[str]:
        """What the contexts' constraints mean, where that is known."""
        return frozenset(c.subject for c in self.contexts if c.subject is not None)


def check_batch(requests: tuple[EditRequest, ...]) -> None:
    """Raises InvalidInputError for a batch without requests or with one name twice."""
    if not requests:
        raise InvalidInputError("no edit request given", field="requests")
    seen: set[str] = set()
    for i, request in enumerate(requests):
        if request.name in seen:
            raise InvalidInputError(
                f"two requests are named {request.name!r}; give each its own name", field=f"requests[{i}].name"
            )
        seen.add(request.name)
