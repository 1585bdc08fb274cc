"""MultiModalCausalTrace: which layers and tokens carry a fact (Basu et al., NeurIPS 2024, §4; Meng et al. 2022).

Three kinds of runs of one question: clean; corrupted, where the constraint is a wrong one; restored, which is the
corrupted run with the clean outputs of a window of layers put back at one token. A site's indirect effect is
p(restored) − p(corrupted).

The sweep computes exactly what restoring each site on the full model would, at a fraction of the work. For a token
t, every restored run equals the corrupted one before t and below its window, so the runs of t start there: they
share the corrupted run's keys and values, and ride in one batch that grows as it climbs the layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from errata.editor.errors import CancelledError, CorruptionFailedError, InvalidInputError, PromptError
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt
from errata.editor.states import Component, Recording, Suffix, record

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Substitution:
    """Corrupts by words: each token of the constraint becomes the first token of `word` (Basu et al., §4.1)."""

    word: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherImage:
    """Corrupts by pictures: the same question about other images."""

    images: tuple[Image.Image, ...] = field(repr=False)


Corruption = Substitution | OtherImage


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One question to trace. `answer` is the answer whose probability is followed; None: what the model says."""

    prompt: Prompt
    constraint: Constraint
    corruption: Corruption
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """What is restored and how much of it at once.

    `window` is in layers, ≥ 1, centred on the layer it is reported under. `min_total_effect` is the least total
    effect, a probability, for which a trace means anything. `max_rows` bounds the batch, and with it memory.
    """

    components: tuple[Component, ...] = (Component.MLP, Component.ATTENTION, Component.LAYER)
    window: int = 1
    min_total_effect: float = 0.1
    max_rows: int = 256

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InvalidInputError(f"window is {self.window} layers; give at least 1", field="window")
        if self.max_rows < 1:
            raise InvalidInputError(f"max_rows is {self.max_rows}; give at least 1", field="max_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probabilities:
    """Of the answer's first token, and of the whole answer including its end."""

    first: float
    whole: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalTrace:
    """The effects of every site of one question.

    `restored` is p(whole answer) and `restored_first` p(first token) after restoring each site; the last axis runs
    over `tokens`, from the constraint's first token to the last of the prompt. `constraint` are the indices of the
    constraint's tokens on that axis.
    """

    question: str
    answer: str
    tokens: tuple[str, ...]
    constraint: tuple[int, ...]
    window: int
    components: tuple[Component, ...]
    clean: Probabilities
    corrupted: Probabilities
    restored: NDArray[np.float64]
    restored_first: NDArray[np.float64]

    @property
    def total_effect(self) -> float:
        """p(clean) − p(corrupted) of the whole answer."""
        return self.clean.whole - self.corrupted.whole

    def indirect(self, component: Component) -> NDArray[np.float64]:
        """p(restored) − p(corrupted) of the whole answer, layers × tokens."""
        effects: NDArray[np.float64] = self.restored[self.components.index(component)] - self.corrupted.whole
        return effects


def trace(
    model: EditableModel,
    request: TraceRequest,
    settings: TraceSettings = TraceSettings(),
    *,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> CausalTrace:
    """Traces one question.

    Raises ConstraintNotFoundError, PromptError where a corrupted prompt would not align with the clean one,
    CorruptionFailedError where the corruption leaves the answer about as likely, CancelledError.
    """
    answer = request.answer if request.answer is not None else model.generate([request.prompt])[0].text
    clean_row = model.encode(request.prompt, answer)
    constraint = clean_row.positions(*request.constraint.span(request.prompt.text))
    corrupted_row = _corrupted(model, request, clean_row, answer, constraint)
    start = constraint.start
    # The answer's last token predicts nothing that is asked for.
    rows = [r.replaced(r.ids[:-1]) for r in (clean_row, corrupted_row)]
    clean, corrupted = (
        record(model, [r], [start], components=c)[0] for r, c in zip(rows, (settings.components, ()), strict=True)
    )
    measure = _Measure(model, clean_row)
    p_clean, p_corrupted = (measure.recorded(r) for r in (clean, corrupted))
    if p_clean.whole - p_corrupted.whole < settings.min_total_effect:
        raise CorruptionFailedError(
            f"the corruption does not corrupt: p({answer!r}) is {p_clean.whole:.3f} clean and "
            f"{p_corrupted.whole:.3f} corrupted (total effect {p_clean.whole - p_corrupted.whole:.3f}, needed "
            f"{settings.min_total_effect}); choose another substitute or image, or an answer the model believes"
        )
    last = clean_row.prompt_length
    shape = (len(settings.components), len(model.layers), last - start)
    restored, restored_first = np.zeros(shape), np.zeros(shape)
    for t in range(start, last):
        for sites, probabilities in _sweep(model, clean, corrupted, t, settings, measure, cancelled):
            for (c, layer), p in zip(sites, probabilities, strict=True):
                restored[c, layer, t - start], restored_first[c, layer, t - start] = p.whole, p.first
        if progress:
            progress(t - start + 1, last - start)
    return CausalTrace(
        question=request.prompt.text,
        answer=answer,
        tokens=tuple(str(model.tokenizer.decode([i])) for i in clean_row.ids[start:last].tolist()),
        constraint=tuple(t - start for t in constraint),
        window=settings.window,
        components=settings.components,
        clean=p_clean,
        corrupted=p_corrupted,
        restored=restored,
        restored_first=restored_first,
    )


def window_of(layer: int, window: int, layers: int) -> range:
    """The layers restored together under `layer`: `window` of them centred on it, cut at the model's ends."""
    low = layer - window // 2
    return range(max(0, low), min(layers, low + window))


class _Measure:
    """Reads the answer's probabilities from the last layer's outputs."""

    def __init__(self, model: EditableModel, row: Encoded) -> None:
        self._model, self._answer = model, row.answer.to(model.device)
        self._first = row.prompt_length - 1

    def recorded(self, recording: Recording) -> Probabilities:
        suffix = Suffix(self._model, [recording], [recording.start])
        with suffix, torch.no_grad():
            top = len(self._model.layers) - 1
            hidden = suffix.run(top, suffix.inputs(top))
            return self.of(suffix, hidden, recording.start)[0]

    def of(self, suffix: Suffix, hidden: Float[Tensor, "rows suffix d"], start: int) -> list[Probabilities]:
        """Of each row, whose first token stands at `start`."""
        at = self._first - start
        logits = suffix.logits(hidden[:, at : at + len(self._answer)])
        chosen = logits.log_softmax(-1).gather(-1, self._answer.expand(len(hidden), -1).unsqueeze(-1)).squeeze(-1)
        whole, first = chosen.double().sum(-1).exp(), chosen[:, 0].double().exp()
        return [Probabilities(first=f, whole=w) for f, w in zip(first.tolist(), whole.tolist(), strict=True)]


def _corrupted(model: EditableModel, request: TraceRequest, clean: Encoded, answer: str, constraint: range) -> Encoded:
    match request.corruption:
        case Substitution(word=word):
            if not word.strip():
                raise PromptError("the substitute is empty; give a wrong constraint", field="corruption.word")
            ids = clean.ids.clone()
            # As the word would stand in a sentence: with the space before it.
            ids[constraint.start : constraint.stop] = model.tokenizer(" " + word.strip(), add_special_tokens=False)[
                "input_ids"
            ][0]
            return clean.replaced(ids)
        case OtherImage(images=images):
            if not request.prompt.images:
                raise PromptError("the prompt has no image to exchange; corrupt by substitution", field="corruption")
            other = model.encode(Prompt(text=request.prompt.text, images=images, chat=request.prompt.chat), answer)
            if len(other.ids) != len(clean.ids):
                raise PromptError(
                    f"the other image makes the prompt {len(other.ids)} tokens long instead of {len(clean.ids)}; "
                    "give one of the same size",
                    field="corruption.images",
                )
            return other


def _sweep(
    model: EditableModel,
    clean: Recording,
    corrupted: Recording,
    token: int,
    settings: TraceSettings,
    measure: _Measure,
    cancelled: Callable[[], bool] | None,
) -> Any:
    """Restores every site of one token, in batches of at most `max_rows` rows."""
    layers = len(model.layers)
    sites = [(c, layer) for layer in range(layers) for c in range(len(settings.components))]
    suffix = Suffix(model, [corrupted], [token])
    with suffix, torch.no_grad():
        for i in range(0, len(sites), settings.max_rows):
            if cancelled and cancelled():
                raise CancelledError("the causal trace was cancelled; nothing was changed")
            batch = sites[i : i + settings.max_rows]
            hidden = _climb(suffix, clean, token, batch, settings, layers)
            yield batch, measure.of(suffix, hidden, token)


def _climb(
    suffix: Suffix,
    clean: Recording,
    token: int,
    sites: Sequence[tuple[int, int]],
    settings: TraceSettings,
    layers: int,
) -> Float[Tensor, "sites suffix d"]:
    """The last layer's outputs of the runs restored at `sites`, (component, layer) pairs in order of layer."""
    windows = [window_of(layer, settings.window, layers) for _, layer in sites]
    hidden = suffix.inputs(0)[:0]
    for layer in range(windows[0].start, layers):
        joining = sum(w.start == layer for w in windows)
        hidden = torch.cat([hidden, suffix.inputs(layer).expand(joining, -1, -1)])
        hooks = {}
        for c, component in enumerate(settings.components):
            rows = [r for r in range(len(hidden)) if sites[r][0] == c and layer in windows[r]]
            if rows:
                value = clean.outputs[component][layer, token - clean.start]
                hooks[component] = _put(rows, value)
        hidden = suffix.run(layer, hidden, hooks)
    return hidden


def _put(rows: list[int], value: Float[Tensor, " d"]) -> Callable[[Tensor], Tensor]:
    """Sets the first token of the given rows."""

    def change(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[rows, 0] = value
        return changed

    return change


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragedTrace:
    """Average indirect effects (AIE) of many questions by role of the token instead of its position.

    Roles are `constraint first`, `constraint middle`, `constraint last`, `after constraint`, `last`; several tokens
    of one role in one question count as their mean. Effects are layers × roles, of the whole answer.
    """

    traces: tuple[CausalTrace, ...]
    roles: tuple[str, ...]

    @property
    def components(self) -> tuple[Component, ...]:
        """The components that were traced."""
        return self.traces[0].components

    @property
    def window(self) -> int:
        """Layers restored at once."""
        return self.traces[0].window

    @property
    def total_effect(self) -> float:
        """Mean total effect."""
        return float(np.mean([t.total_effect for t in self.traces]))

    def samples(self, component: Component) -> NDArray[np.float64]:
        """Indirect effects, questions × layers × roles; NaN where a question has no token of the role."""
        return np.stack([_by_role(t, component, self.roles) for t in self.traces])

    def aie(self, component: Component) -> NDArray[np.float64]:
        """The mean over questions, layers × roles."""
        return _nan_mean(self.samples(component))

    def spread(self, component: Component) -> NDArray[np.float64]:
        """The standard error of that mean; NaN where fewer than two questions have the role."""
        samples = self.samples(component)
        n = (~np.isnan(samples)).sum(0)
        variance = _nan_mean((samples - self.aie(component)) ** 2)
        error: NDArray[np.float64] = np.where(n > 1, np.sqrt(variance / np.maximum(n - 1, 1)), np.nan)
        return error


ROLES = ("constraint first", "constraint middle", "constraint last", "after constraint", "last")


def average(traces: Sequence[CausalTrace]) -> AveragedTrace:
    """Averages traces of one window and the same components."""
    if not traces:
        raise InvalidInputError("no trace to average; trace at least one question", field="traces")
    if len({(t.window, t.components, t.restored.shape[1]) for t in traces}) > 1:
        raise InvalidInputError("traces of several windows, component lists or models do not average", field="traces")
    return AveragedTrace(traces=tuple(traces), roles=ROLES)


def _by_role(trace: CausalTrace, component: Component, roles: Sequence[str]) -> NDArray[np.float64]:
    effects = trace.indirect(component)
    first, last, end = trace.constraint[0], trace.constraint[-1], effects.shape[1] - 1
    tokens = {
        "constraint first": [first] if last > first else [],
        "constraint middle": list(range(first + 1, last)),
        "constraint last": [last],
        "after constraint": list(range(last + 1, end)),
        "last": [end] if end > last else [],
    }
    columns = [effects[:, tokens[r]].mean(1) if tokens[r] else np.full(len(effects), np.nan) for r in roles]
    return np.stack(columns, axis=1)


def _nan_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    n = (~np.isnan(values)).sum(0)
    mean: NDArray[np.float64] = np.where(n > 0, np.nansum(values, 0) / np.maximum(n, 1), np.nan)
    return mean
