"""A prompt as the caller gives it, and where its constraint stands. Knows nothing about models or tokens."""

from dataclasses import dataclass, field

from PIL import Image

from errata.editor.errors import ConstraintNotFoundError, PromptError
from errata.editor.images import open_image


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question to a model.

    `text` is what the user says; a chat model's template is put around it unless `chat` is False. `images` stand
    before the text, or where `text` itself holds the model's image placeholder (`<image>`), once for each image. Any
    image that `open_image` takes may be given; it is decoded to RGB here.

    Raises PromptError for an empty text and ImageError for an image that cannot be used.
    """

    text: str
    images: tuple[Image.Image, ...] = field(default=(), repr=False)
    chat: bool = True

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise PromptError("the prompt is empty; give the question to ask", field="prompt.text")
        decoded = tuple(open_image(image, field=f"prompt.images[{i}]") for i, image in enumerate(self.images))
        object.__setattr__(self, "images", decoded)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """The span of a prompt that names what the fact is about (Basu et al. 2024, §3).

    `text` must be copied from the prompt letter by letter. `occurrence` counts from 0 where the prompt says it
    more than once; None means there must be only one.
    """

    text: str
    occurrence: int | None = None

    def span(self, prompt: str) -> tuple[int, int]:
        """Start and end of the constraint in `prompt`, in characters.

        Raises ConstraintNotFoundError where it does not occur, or occurs more than once and `occurrence` is None.
        """
        starts = _occurrences(self.text, prompt)
        if not starts:
            hint = self._hint(prompt)
            raise ConstraintNotFoundError(
                f"constraint {self.text!r} does not occur in the prompt {prompt!r}; {hint}", field="constraint.text"
            )
        if self.occurrence is None:
            if len(starts) > 1:
                raise ConstraintNotFoundError(
                    f"constraint {self.text!r} occurs {len(starts)} times in the prompt {prompt!r}; "
                    f"say which one: occurrence 0 … {len(starts) - 1}",
                    field="constraint.occurrence",
                )
            return starts[0], starts[0] + len(self.text)
        if not 0 <= self.occurrence < len(starts):
            raise ConstraintNotFoundError(
                f"constraint {self.text!r} has no occurrence {self.occurrence} in the prompt {prompt!r}, "
                f"which holds it {len(starts)} time(s), counted from 0",
                field="constraint.occurrence",
            )
        start = starts[self.occurrence]
        return start, start + len(self.text)

    def _hint(self, prompt: str) -> str:
        at = prompt.casefold().find(self.text.casefold()) if self.text.strip() else -1
        if at >= 0:
            return f"did you mean {prompt[at : at + len(self.text)]!r}?"
        return "copy it from the prompt"


def _occurrences(needle: str, text: str) -> list[int]:
    if not needle.strip():
        return []
    starts, at = [], text.find(needle)
    while at >= 0:
        starts.append(at)
        at = text.find(needle, at + 1)
    return starts
