"""What a caller gives, in plain Python types. The server checks it; `requests.py` puts it on the wire."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, TypeAlias, TypedDict

from errata.client.images import ImageLike
from errata.client.names import NameLike


class Metric(StrEnum):
    """What a probe measures. Wherever one is taken, its value as a string is as well."""

    EFFICACY = "efficacy"
    IMAGE_GENERALIZATION = "image_generalization"
    PHRASING_GENERALIZATION = "phrasing_generalization"
    OTHER_SUBJECTS = "other_subjects"
    SAME_IMAGE = "same_image"
    UNRELATED = "unrelated"
    PORTABILITY = "portability"
    UNKNOWN = "unknown"
    """In results only: one that this release does not know."""


class Method(StrEnum):
    """The closed form of an edit."""

    MULTEDIT = "multedit"
    ROME = "rome"
    MEMIT = "memit"
    EMMET = "emmet"
    ALPHAEDIT = "alphaedit"
    UNKNOWN = "unknown"
    """In results only: one that this release does not know, or none said."""


class Component(StrEnum):
    """What a causal trace restores: the output of a layer's MLP, of its attention, or of the whole layer."""

    MLP = "mlp"
    ATTENTION = "attention"
    LAYER = "layer"
    UNKNOWN = "unknown"
    """In results only: one that this release does not know."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, and the pictures that it is about.

    `images` is one picture, or a list of them in order; they stand before the text, or where the text holds the
    model's placeholder (`<image>`). `raw` gives the text as it stands, without the model's chat template. Where there
    is neither, plain text does for a prompt.
    """

    text: str
    images: "ImageLike | Sequence[ImageLike]" = field(default=(), repr=False)
    raw: bool = field(default=False, kw_only=True)


PromptLike: TypeAlias = str | Prompt
"""A prompt, or its text."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """The span of a prompt that names what the fact is about, copied from the prompt letter by letter.

    `occurrence` counts from 0 and is needed where the prompt says it more than once.
    """

    text: str
    occurrence: int | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """One way of asking for a fact.

    `answer` is the right answer where it is not the request's target; in a prompt to preserve, the answer that must
    stay. `subject` is what the constraint means where the prompt does not say it ("Estonia" for "this country").
    """

    prompt: PromptLike
    constraint: str | Constraint
    answer: str | None = field(default=None, kw_only=True)
    subject: str = field(default="", kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRequest:
    """Make the model answer `target`.

    `name` says what the fact is and is unique in its edit. `contexts` are ways of asking for it, the question itself
    first. `preserve` are prompts about the same thing whose answers must stay.
    """

    name: str
    contexts: Sequence[Context] = field(repr=False)
    target: str
    preserve: Sequence[Context] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Probe:
    """One question that judges.

    `expected` is the right answer after the edit; None: whatever the parent answers. `request` names the edit request
    it belongs to. With `believed` it counts only where the parent answers that.
    """

    metric: Metric | str
    prompt: PromptLike
    expected: str | None = None
    request: str = field(default="", kw_only=True)
    believed: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class TracedQuestion:
    """One question to trace, and how its constraint is made wrong. Give one of the two corruptions.

    `substitute`: each token of the constraint becomes the first token of this word. `other_images`: the same question
    about these, as many as the prompt has. `answer` is the one whose probability is followed; None: what the version
    answers.
    """

    prompt: PromptLike
    constraint: str | Constraint
    substitute: str | None = field(default=None, kw_only=True)
    other_images: "ImageLike | Sequence[ImageLike]" = field(default=(), kw_only=True, repr=False)
    answer: str | None = field(default=None, kw_only=True)


LayerChoice: TypeAlias = Literal["auto"] | Sequence[int] | NameLike
"""Layers one by one, counted from 0; a trace, or its name, whose layers to take; or "auto": trace first."""


Guardrails: TypeAlias = Mapping[Metric, float] | Mapping[str, float]
"""Least share by metric, 0-1; 0 switches a metric's guardrail off."""


class SamplingOptions(TypedDict, total=False):
    """How to generate. What is left out is the server's default."""

    max_new_tokens: int
    """1-4096; default 32."""
    temperature: float
    """0-10; default 0: greedy."""
    top_p: float
    """Nucleus, (0, 1]; default 1."""
    top_k: int
    """Only the k likeliest tokens, >= 1; default: all."""
    seed: int
    """Makes sampling repeatable; default: a random one, which the answer gives back."""
    stop: str | Sequence[str]
    """Strings that end the answer, at most 8."""


class TraceOptions(TypedDict, total=False):
    """How to trace. What is left out is the server's default."""

    components: Sequence[Component | str]
    """What to restore; default: all three."""
    window: int
    """Width of the restored window in layers, 1-64; default 1."""
    min_total_effect: float
    """Least total effect, a probability, for which a trace means anything; default 0.1."""
    request_id: str
    """The same one gives the same trace back; default: a new UUID."""


class EditOptions(TypedDict, total=False):
    """Where and how to edit, and what judges it. What is left out is the server's default."""

    layers: LayerChoice
    """Where to edit; default "auto"."""
    method: Method | str
    """The closed form; default: the one that measures best."""
    preservation: float
    """Weight of what is preserved against one request (MEMIT's λ), > 0."""
    ridge: float
    """λ of the ridge relative to the mean of KᵀMK's diagonal, >= 0."""
    steps: int
    """Most steps of the values' descent, 1-1000."""
    probes: Sequence[Probe]
    """What judges the edit, besides the requests' own first questions; at most 10000."""
    references: Sequence[Context]
    """Prompts whose keys stand for what must not change; default: the model's own."""
    guardrails: Guardrails
    """They replace the model's metric by metric."""
    description: str
    """For the record, shown in MLflow as markdown; at most 4000 characters."""
    alias: str
    """Pointed to the version if it passes its guardrails, in the moment that it is made; default: none."""
    request_id: str
    """The same one gives the same edit back; default: a new UUID."""


class EvaluationOptions(TypedDict, total=False):
    """What to compare with. What is left out is the server's default."""

    baseline: NameLike
    """The version or alias to compare with; default: the version's parent."""
    guardrails: Guardrails
    """Below one of these the evaluation ends REJECTED. Default: none."""
    request_id: str
    """The same one gives the same evaluation back; default: a new UUID."""


class DerivationOptions(TypedDict, total=False):
    """What judges a version made of versions. What is left out is the server's default."""

    probes: Sequence[Probe]
    """What judges it, besides the probes of the edits that it is made of; at most 10000."""
    guardrails: Guardrails
    """They replace the model's metric by metric."""
    allow_conflicts: bool
    """True to make the version although edits conflict; EditsConflictError otherwise."""
    description: str
    """For the record, shown in MLflow as markdown; at most 4000 characters."""
    alias: str
    """Pointed to the version if it passes its guardrails, in the moment that it is made; default: none."""
    request_id: str
    """The same one gives the same derivation back; default: a new UUID."""
    validate_only: bool
    """True to have it checked only: the operation's `latest` has no name, and what conflicts by the requests alone."""


class BisectionOptions(TypedDict, total=False):
    """How to search. What is left out is the server's default."""

    good: NameLike
    """An ancestor of the bad version that passes; default: the base."""
    request_id: str
    """The same one gives the same search back; default: a new UUID."""
    validate_only: bool
    """True to have it checked only: the operation's `latest` has no name."""
