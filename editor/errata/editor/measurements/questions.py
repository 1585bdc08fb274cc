"""What is measured: questions with their constraints and how each is corrupted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from errata.editor.datasets.records import Kind
from errata.editor.errors import CancelledError, ConstraintNotFoundError, CorruptionFailedError, InvalidInputError
from errata.editor.model import Answer, EditableModel, same_answer
from errata.editor.prompts import Constraint, Prompt
from errata.editor.report.wording import counted
from errata.editor.trace import Corruption

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""

Cancelled = Callable[[], bool]
"""Asked between steps; True raises CancelledError."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A part of an image, as shares of its width and height from the top left: 0 ≤ left < right ≤ 1.

    Raises InvalidInputError for a box that is empty or reaches outside the image.
    """

    left: float
    top: float
    right: float
    bottom: float

    def __post_init__(self) -> None:
        if not (0 <= self.left < self.right <= 1 and 0 <= self.top < self.bottom <= 1):
            raise InvalidInputError(
                f"the box {self.left}, {self.top}, {self.right}, {self.bottom} does not lie in the image; give left, "
                "top, right and bottom as shares of its width and height, 0 to 1",
                field="box",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question to measure.

    `constraints` are its spans, in any order but for a visual one, which is the first; none overlap. `corruptions` say
    how each of them is made wrong, one a constraint, or none where the measurement corrupts nothing or by noise.
    `answer` is the right answer; None: what the model says. `box` is the part of the image that holds what is asked
    about. `kinds` say what each constraint refers to; none given: the first one to the image where there is one.
    """

    prompt: Prompt
    constraints: tuple[Constraint, ...]
    corruptions: tuple[Corruption, ...] = ()
    answer: str | None = None
    box: Box | None = None
    kinds: tuple[Kind, ...] = ()

    def __post_init__(self) -> None:
        if not self.constraints:
            raise InvalidInputError(f"{self.prompt.text!r} has no constraint; give its span", field="constraints")
        if self.corruptions and len(self.corruptions) != len(self.constraints):
            raise InvalidInputError(
                f"{len(self.corruptions)} corruption(s) for {len(self.constraints)} constraint(s); give one each",
                field="corruptions",
            )
        if self.kinds and len(self.kinds) != len(self.constraints):
            raise InvalidInputError(
                f"{len(self.kinds)} kind(s) for {len(self.constraints)} constraint(s); give one each", field="kinds"
            )
        for (i, a), (j, b) in combinations(enumerate(map(self._span, self.constraints)), 2):
            if a[0] < b[1] and b[0] < a[1]:
                raise InvalidInputError(
                    f"it overlaps constraints[{i}] in {self.prompt.text!r}; give each word to one of them",
                    field=f"constraints[{j}]",
                )

    def kind(self, constraint: int) -> Kind:
        """What a constraint refers to, by its place."""
        if self.kinds:
            return self.kinds[constraint]
        return Kind.VISUAL if constraint == 0 and self.prompt.images else Kind.TEXTUAL

    def _span(self, constraint: Constraint) -> tuple[int, int]:
        """Its characters; none where it is not there, which measurements say with the question's number."""
        try:
            return constraint.span(self.prompt.text)
        except ConstraintNotFoundError:
            return 0, 0


Kept = Sequence[tuple[int, Question, str]]
"""The questions that are measured, each with its index among those given, and its answer."""


def asked(model: EditableModel, questions: Sequence[Question], *, max_new_tokens: int = 16) -> list[Answer]:
    """What the model says to each. Raises InvalidInputError and its kinds, naming the question that cannot be asked."""
    if not questions:
        raise InvalidInputError("no question given", field="questions")
    return said_to(model, [q.prompt for q in questions], lambda i: f"questions[{i}]", max_new_tokens=max_new_tokens)


def said_to(
    model: EditableModel, prompts: Sequence[Prompt], field: Callable[[int], str], *, max_new_tokens: int = 16
) -> list[Answer]:
    """What the model says to each; an error names the `field` of the prompt that cannot be asked."""
    try:
        return model.generate(prompts, max_new_tokens=max_new_tokens)
    except InvalidInputError:
        for i, prompt in enumerate(prompts):
            try:
                model.encode(prompt)
            except InvalidInputError as error:
                raise error.within(field(i)) from None
        raise


def answered(model: EditableModel, questions: Sequence[Question]) -> tuple[Kept, list[str]]:
    """The questions the model answers as they say, each with its index and that answer, and a line for each other.

    The papers measure questions that the model answers correctly (Basu et al. 2024, §4; Zhang et al. 2025, §3).
    Raises InvalidInputError and its kinds for a question that cannot be asked, and where none is left.
    """
    kept, skipped = [], []
    for i, (question, answer) in enumerate(zip(questions, asked(model, questions), strict=True)):
        if reason := _reason(model, question, answer):
            skipped.append(f"questions[{i}]: {question.prompt.text!r} is answered {reason}")
        else:
            kept.append((i, question, question.answer or answer.text))
    if not kept:
        raise InvalidInputError(f"no question is left to measure: {skipped[0]}", field="questions")
    return kept, skipped


def _reason(model: EditableModel, question: Question, answer: Answer) -> str:
    """Why the answer is not measured; nothing where it is."""
    if question.answer is not None:
        return "" if gives(question, answer.text) else f"{answer.text!r}, not {question.answer!r}"
    if not answer.text.strip():
        return "with nothing"
    if not answer.finished and question.prompt.chat and getattr(model.processor, "chat_template", None):
        # `encode` would put an end after it that the model never came to.
        return f"{answer.text!r}, which goes on; give the answer to measure"
    return ""


def gives(question: Question, told: str) -> bool:
    """Whether the answer is the question's. What completes a text that is no chat runs on after it."""
    answer = question.answer or ""
    if question.prompt.chat:
        return same_answer(answer, told)
    told, answer = told.strip().casefold(), answer.strip().casefold()
    return told.startswith(answer) and not told[len(answer) : len(answer) + 1].isalnum()


def check_corruptions(question: Question, field: str) -> None:
    """Raises InvalidInputError for a question that says of no constraint how it is corrupted."""
    if not question.corruptions:
        raise InvalidInputError(
            f"{question.prompt.text!r} says of no constraint how it is corrupted; give a corruption for each",
            field=f"{field}.corruptions",
        )


def of_one_constraint(kept: Kept, skipped: list[str], why: str) -> Kept:
    """Those with one constraint; the others become lines in `skipped`, with the reason.

    Raises InvalidInputError where none is left.
    """
    for i, question, _ in kept:
        if len(question.constraints) > 1:
            told = counted(len(question.constraints), "constraint")
            skipped.append(f"questions[{i}]: {question.prompt.text!r} has {told}, and {why}")
    single = [k for k in kept if len(k[1].constraints) == 1]
    if not single:
        raise InvalidInputError(f"no question is left to measure: {skipped[-1]}", field="questions")
    return single


def trace_each(
    kept: Kept,
    skipped: list[str],
    trace: Callable[[int, Question, str], T],
    *,
    progress: Progress | None,
    cancelled: Cancelled | None,
) -> list[T]:
    """The `trace` of every question, given its index and answer; one that no corruption reaches is a line in `skipped`.

    Raises CorruptionFailedError where none is left, CancelledError, InvalidInputError naming the question.
    """
    traces = []
    for done, (i, question, answer) in enumerate(kept):
        if cancelled and cancelled():
            raise CancelledError("the causal trace was cancelled; nothing was changed")
        try:
            traces.append(trace(i, question, answer))
        except CorruptionFailedError as error:
            skipped.append(f"questions[{i}]: {error}")
        except InvalidInputError as error:
            raise error.within(f"questions[{i}]") from None
        if progress:
            progress(done + 1, len(kept))
    if not traces:
        raise CorruptionFailedError(f"no question is left to average: {skipped[-1]}")
    return traces
