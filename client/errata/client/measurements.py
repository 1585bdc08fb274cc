"""What is measured: questions, and the settings of each kind. What is left out is the server's default.

The settings have the fields of the API's messages by the same names; `measuring.py` puts them on the wire.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypedDict

from errata.client.images import ImageLike
from errata.client.inputs import Component, Constraint, Context, EditRequest, Method, Probe, PromptLike


@dataclass(frozen=True, slots=True)
class OtherImages:
    """A corruption: the same question about these, as many as the prompt has."""

    images: "ImageLike | Sequence[ImageLike]" = field(repr=False)


Corruption: TypeAlias = str | OtherImages
"""How a constraint is made wrong. Text: each of its tokens becomes the first token of this word."""


@dataclass(frozen=True, slots=True)
class Box:
    """A part of an image, as shares of its width and height from the top left: 0 <= left < right <= 1."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class MeasuredQuestion:
    """One question to measure.

    `constraints` are one or several, a visual one first; `corruptions` make them wrong, one each, where the kind needs
    that. `answer` is the right answer, and what the version answers otherwise is left out; None: what it answers.
    `box` is the part of the image that holds what is asked about. `kinds` say of each constraint whether it refers to
    the image, "visual", or is "textual"; none given: the first is visual where the prompt has an image.
    """

    prompt: PromptLike
    constraints: str | Constraint | Sequence[str | Constraint]
    corruptions: Corruption | Sequence[Corruption] = field(default=(), kw_only=True)
    answer: str | None = field(default=None, kw_only=True)
    box: Box | None = field(default=None, kw_only=True)
    kinds: Sequence[str] = field(default=(), kw_only=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSettings:
    """The causal trace by noise (Meng et al. 2022), for textual constraints, one a question. Needs no corruption.

    `noise` is in standard deviations of the embeddings, by default 3, averaged over `draws` (10) from `seed`.
    `components` are restored in windows of `window` layers (1). Questions count from `min_total_effect` on, a
    probability; `grids` of them (4) have a figure of their own. `max_rows` bounds the batch, and so memory.
    """

    noise: float | None = None
    draws: int | None = None
    seed: int | None = None
    components: Sequence[Component | str] = ()
    window: int | None = None
    min_total_effect: float | None = None
    grids: int | None = None
    max_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintSettings:
    """Each constraint of a question corrupted alone, and all together (Basu et al. 2024).

    Fields as in `NoiseSettings`.
    """

    components: Sequence[Component | str] = ()
    window: int | None = None
    min_total_effect: float | None = None
    max_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSettings:
    """What windows of several widths restore, in layers; by default 1 to 10. Other fields as in `NoiseSettings`."""

    windows: Sequence[int] = ()
    components: Sequence[Component | str] = ()
    min_total_effect: float | None = None
    max_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSettings:
    """What attention carries from token to token (Basu et al. 2024). Needs no corruption.

    `flows` are "source->target", each of image, box, outside, constraint, question, last; a source may be several:
    "image+question->last". `overlays` (4) are images shown with what their patches contribute, `tokens` (10) the rows
    of the table of those that carry most. `batch_size` bounds the questions in one pass.
    """

    flows: Sequence[str] = ()
    batch_size: int | None = None
    overlays: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureSettings:
    """Predictors of wrong answers, by AUROC (Basu et al. 2024). Every question needs its right answer.

    `flow` is whose contributions predict, in the layers `first_layer` to `last_layer`, by default the middle third.
    `abstentions` are answers by which the model says that it does not know; they are left out. `max_new_tokens` bounds
    an answer, `batch_size` the questions in one pass. The bootstrap makes `draws` from `seed`.
    """

    flow: str | None = None
    first_layer: int | None = None
    last_layer: int | None = None
    abstentions: Sequence[str] = ()
    max_new_tokens: int | None = None
    batch_size: int | None = None
    draws: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KnockoutSettings:
    """How p(answer) falls where a group of positions may not attend to another (Zhang et al. 2025). No corruption.

    `pairs` are "source->target", in the groups of `AttentionSettings.flows`. `window` is in layers; by default, 0,
    9/32 of the depth. `max_rows` bounds the batch.
    """

    pairs: Sequence[str] = ()
    window: int | None = None
    max_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LensSettings:
    """What each layer's output says at the prompt's last position: the logit lens. `max_rows` bounds the batch."""

    max_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """The same edits at each layer, beside the causal trace (Basu et al. 2024). Takes `requests`, and no questions.

    `layers`: by default all. `together` edits all requests of a layer as one batch. The rest is as for an edit:
    `method`, `keys` ("each", "mean"), `ridge`, `preservation`, `null_energy`, and of the values' descent `steps`,
    `learning_rate`, `clamp`, `decay`, `kl_weight`, `stop_loss`, `most_contexts`. `at_once` bounds the requests worked
    on at a time, `max_new_tokens` an answer.
    """

    layers: Sequence[int] = ()
    together: bool | None = None
    method: Method | str | None = None
    keys: str | None = None
    ridge: float | None = None
    preservation: float | None = None
    null_energy: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    clamp: float | None = None
    decay: float | None = None
    kl_weight: float | None = None
    stop_loss: float | None = None
    most_contexts: int | None = None
    max_new_tokens: int | None = None
    at_once: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadoutSettings:
    """Which neurons of the MLPs speak at the first constraint, what they promote, and what the version's edit wrote.

    A question's `answer` is the edit's target. `layers`: by default the edited ones. `neurons` (5) are shown of each
    layer and `tokens` (8) of each vector. `max_new_tokens` bounds an answer.
    """

    layers: Sequence[int] = ()
    neurons: int | None = None
    tokens: int | None = None
    max_new_tokens: int | None = None


MeasurementSettings: TypeAlias = (
    NoiseSettings
    | ConstraintSettings
    | WindowSettings
    | AttentionSettings
    | FailureSettings
    | KnockoutSettings
    | LensSettings
    | SweepSettings
    | ReadoutSettings
)
"""What is measured, and how."""

KINDS: Mapping[str, type[MeasurementSettings]] = {
    "noise": NoiseSettings,
    "constraints": ConstraintSettings,
    "windows": WindowSettings,
    "attention": AttentionSettings,
    "failure": FailureSettings,
    "knockout": KnockoutSettings,
    "lens": LensSettings,
    "sweep": SweepSettings,
    "readout": ReadoutSettings,
}
"""Every kind by its name."""


class MeasurementOptions(TypedDict, total=False):
    """What a layer sweep takes in place of questions, and the request's id."""

    requests: Sequence[EditRequest]
    """The facts to edit at each layer, 1-200."""
    probes: Sequence[Probe]
    """What judges the edits, besides the requests' own first questions."""
    references: Sequence[Context]
    """Prompts whose keys stand for what must not change; default: the model's own."""
    request_id: str
    """The same one gives the same measurement back; default: a new UUID."""
