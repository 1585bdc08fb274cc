"""What is measured: questions with their constraints and how each is corrupted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from errata.editor.errors import InvalidInputError
from errata.editor.model import EditableModel, same_answer
from errata.editor.prompts import Constraint, Prompt
from errata.editor.trace import Corruption

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""

Cancelled = Callable[[], bool]
"""Asked between steps; True raises CancelledError."""


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

    `constraints` are its spans in any order; where it has a visual one that is the first. `corruptions` say how each
    of them is made wrong, one a constraint, or none where the measurement corrupts nothing or by noise. `answer` is
    the right answer; None: what the model says. `box` is the part of the image that holds what is asked about.
    """

    prompt: Prompt
    constraints: tuple[Constraint, ...]
    corruptions: tuple[Corruption, ...] = ()
    answer: str | None = None
    box: Box | None = None

    def __post_init__(self) -> None:
        if not self.constraints:
            raise InvalidInputError(f"{self.prompt.text!r} has no constraint; give its span", field="constraints")
        if self.corruptions and len(self.corruptions) != len(self.constraints):
            raise InvalidInputError(
                f"{len(self.corruptions)} corruption(s) for {len(self.constraints)} constraint(s); give one each",
                field="corruptions",
            )


def answered(model: EditableModel, questions: Sequence[Question]) -> tuple[list[tuple[int, Question, str]], list[str]]:
    """The questions the model answers as they say, each with its index and that answer, and a line for each other.

    The papers measure questions that the model answers correctly (Basu et al. 2024, §4; Zhang et al. 2025, §3).
    """
    told = model.generate([q.prompt for q in questions]) if questions else []
    kept, skipped = [], []
    for i, (question, answer) in enumerate(zip(questions, told, strict=True)):
        if question.answer is not None and not gives(question, answer.text):
            skipped.append(
                f"questions[{i}]: {question.prompt.text!r} is answered {answer.text!r}, not {question.answer!r}"
            )
        elif not answer.text.strip():
            skipped.append(f"questions[{i}]: {question.prompt.text!r} is answered with nothing")
        else:
            kept.append((i, question, question.answer or answer.text))
    return kept, skipped


def gives(question: Question, told: str) -> bool:
    """Whether the answer is the question's. What completes a text that is no chat runs on after it."""
    answer = question.answer or ""
    if question.prompt.chat:
        return same_answer(answer, told)
    told, answer = told.strip().casefold(), answer.strip().casefold()
    return told.startswith(answer) and not told[len(answer) : len(answer) + 1].isalnum()
