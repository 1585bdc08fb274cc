"""What the engine is asked and what it answers. Knows nothing about models, threads or the wire."""

from dataclasses import dataclass
from enum import StrEnum
from math import expm1

from errata.editor.errors import InvalidInputError
from errata.editor.prompts import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn: by temperature, then among the `top_k` likeliest, then within the nucleus `top_p`.

    `temperature` 0 is greedy. `seed`, up to 2⁶⁴ − 1, repeats an answer whatever else is in the batch; None takes a
    random one, which the answer gives back. Raises InvalidInputError for values out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise InvalidInputError(f"{self.temperature} is not within 0 … 10", field="sampling.temperature")
        if not 0 < self.top_p <= 1:
            raise InvalidInputError(f"{self.top_p} is not above 0 and at most 1", field="sampling.top_p")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidInputError(f"{self.top_k} is not at least 1", field="sampling.top_k")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise InvalidInputError(f"{self.seed} is not within 0 … 2⁶⁴ − 1", field="sampling.seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Answer `prompt` as `version`, 0 for the base. Greedy where `sampling` is None.

    The answer ends at the model's end token, before the first of the `stop` strings, or after `max_new_tokens`.
    Raises InvalidInputError for no tokens or an empty stop string.
    """

    version: int
    prompt: Prompt
    max_new_tokens: int = 32
    sampling: Sampling | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidInputError(f"{self.max_new_tokens} is not at least 1", field="max_new_tokens")
        if not all(self.stop):
            raise InvalidInputError("a stop string is empty; drop it", field="stop")


class FinishReason(StrEnum):
    """Why an answer ended: by the model itself, at its length, or before a stop string."""

    END = "end"
    LENGTH = "length"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """An answer.

    `text` has no space around it and holds no stop string. `prompt_tokens` include those of images. What was
    generated includes the end token and the tokens of a stop string: `generated_tokens` of them, and
    `log_probability`, in nats, of them all under the version's own distribution, before temperature, top_k and top_p.
    `seed` is None where the answer was greedy.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    log_probability: float
    seed: int | None

    @property
    def risk(self) -> float:
        """1 − p(answer): how likely it is wrong, as far as confidence tells (Basu et al. 2024, §5)."""
        return -expm1(self.log_probability)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How likely does `version` find each of the candidates as the answer to `prompt`?

    Raises InvalidInputError where there is no candidate or a blank one.
    """

    version: int
    prompt: Prompt
    candidates: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.candidates:
            raise InvalidInputError("no candidate given", field="candidates")
        for i, candidate in enumerate(self.candidates):
            if not candidate.strip():
                raise InvalidInputError("the candidate is blank; give an answer", field=f"candidates[{i}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """log p, in nats, of one answer with the end token after it, and how many tokens that is."""

    candidate: str
    log_probability: float
    tokens: int
