"""Everything Errata's editor raises on purpose.

    ErrataError
    ├── InvalidInputError            what the caller gave cannot be used; `field` names it
    │   ├── ConstraintNotFoundError      the constraint does not occur in the prompt
    │   ├── PromptError                  empty prompt, wrong number of images
    │   ├── TargetError                  empty or untokenizable target
    │   ├── NoOpEditError                the model already answers the target
    │   ├── ImageError                   unreadable, truncated or oversized image
    │   ├── LayerError                   no such layer
    │   ├── ConflictingRequestsError     one key, two targets
    │   ├── RankTooLargeError            more than a serving engine takes
    │   └── MemoryLimitError             not even one row fits in memory
    ├── ModelError                   the checkpoint cannot be used
    │   ├── UnknownFamilyError           no adapter for this architecture
    │   ├── UnsafeCheckpointError        weights that are not safetensors
    │   └── NonFiniteWeightsError        NaN or infinity in the weights
    ├── DeltaError                   the delta cannot be used
    │   ├── WrongBaseError               made for another base model
    │   ├── CorruptDeltaError            unreadable or altered adapter folder
    │   └── UnsupportedAdapterError      an adapter that does more than a delta can
    ├── CorruptionFailedError        the causal trace's corruption does not corrupt
    ├── NoCausalSiteError            nothing at the constraint carries the fact
    ├── IllConditionedError          the closed form has no reliable solution
    └── CancelledError               the caller asked to stop

Each class has one `reason`, in UPPER_SNAKE, that stays the same across releases: services map it to a status code
and clients back to the class.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class ErrataError(Exception):
    """Base of all errors raised on purpose."""

    reason: ClassVar[str] = "ERRATA"


class InvalidInputError(ErrataError):
    """What the caller gave cannot be used. `field` names it, in dotted form (`requests[2].constraint`)."""

    reason = "INVALID_INPUT"

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field

    def within(self, parent: str) -> "InvalidInputError":
        """The same error as seen from a larger input of which `parent` is the part at fault."""
        self.field = f"{parent}.{self.field}"
        return self

    def __str__(self) -> str:
        return f"{self.field}: {super().__str__()}"


class ConstraintNotFoundError(InvalidInputError):
    """The constraint does not occur in the prompt, or not as often as the occurrence asked for."""

    reason = "CONSTRAINT_NOT_FOUND"


class PromptError(InvalidInputError):
    """The prompt is empty, or its images do not fit it."""

    reason = "INVALID_PROMPT"


class TargetError(InvalidInputError):
    """The target is empty or has no tokens."""

    reason = "INVALID_TARGET"


class NoOpEditError(InvalidInputError):
    """The model already answers the target: there is nothing to edit."""

    reason = "NO_OP_EDIT"


class ImageError(InvalidInputError):
    """The image cannot be read, is truncated, or is larger than allowed."""

    reason = "INVALID_IMAGE"


class LayerError(InvalidInputError):
    """The model has no such layer."""

    reason = "LAYER_OUT_OF_RANGE"


class ConflictingRequestsError(InvalidInputError):
    """Two requests of a batch have the same key and different targets."""

    reason = "CONFLICTING_REQUESTS"


class RankTooLargeError(InvalidInputError):
    """The version's rank is above all that vLLM takes."""

    reason = "RANK_TOO_LARGE"


class MemoryLimitError(InvalidInputError):
    """Not even one row fits in memory."""

    reason = "MEMORY_LIMIT"


class ModelError(ErrataError):
    """The checkpoint cannot be used."""

    reason = "MODEL"


class UnknownFamilyError(ModelError):
    """No adapter knows this architecture."""

    reason = "UNKNOWN_MODEL_FAMILY"


class UnsafeCheckpointError(ModelError):
    """The checkpoint's weights are pickled; only safetensors are loaded."""

    reason = "UNSAFE_CHECKPOINT"


class NonFiniteWeightsError(ModelError):
    """The checkpoint's weights hold NaN or infinity."""

    reason = "NON_FINITE_WEIGHTS"


class DeltaError(ErrataError):
    """The delta cannot be used."""

    reason = "DELTA"


class WrongBaseError(DeltaError):
    """The delta was made for another base model."""

    reason = "WRONG_BASE"


class CorruptDeltaError(DeltaError):
    """The adapter folder cannot be read or was altered."""

    reason = "CORRUPT_DELTA"


class UnsupportedAdapterError(DeltaError):
    """The adapter does more than add a low-rank ΔW to down-projections. `setting` is what says so."""

    reason = "UNSUPPORTED_ADAPTER"

    def __init__(self, message: str, *, setting: str) -> None:
        super().__init__(f"{setting}: {message}")
        self.setting = setting


class CorruptionFailedError(ErrataError):
    """The corruption does not corrupt: the answer stays about as likely, so a causal trace would mean nothing."""

    reason = "CORRUPTION_FAILED"


class NoCausalSiteError(ErrataError):
    """No MLP at the constraint carries a real share of the total effect."""

    reason = "NO_CAUSAL_SITE"


class IllConditionedError(ErrataError):
    """The closed form's normal matrix is not positive definite in float64."""

    reason = "ILL_CONDITIONED"


class CancelledError(ErrataError):
    """The caller asked to stop; nothing was changed."""

    reason = "CANCELLED"


def check_numbers(settings: "DataclassInstance", *, at_least: Mapping[str, float], above: Mapping[str, float]) -> None:
    """Raises InvalidInputError unless each named setting is a finite number within its bound, and a whole one where its
    field is an int; None passes.
    """
    whole = {f.name for f in fields(settings) if f.type in (int, int | None)}
    for bounds, inclusive in ((at_least, True), (above, False)):
        for name, bound in bounds.items():
            value = getattr(settings, name)
            if value is None:
                continue
            kind = Integral if name in whole else Real
            # True is no 1: whoever gives it means another setting.
            if isinstance(value, bool) or not isinstance(value, kind):
                told = "a whole number" if name in whole else "a number"
                raise InvalidInputError(f"{name} is {value!r}; give {told}", field=name)
            size = float(value)
            if not (math.isfinite(size) and (size > bound or (inclusive and size == bound))):
                word = "at least" if inclusive else "more than"
                raise InvalidInputError(f"{name} is {value}; give {word} {bound:g}", field=name)
