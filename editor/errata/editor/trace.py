"""MultiModalCausalTrace: which layers and tokens carry a fact (Basu et al., NeurIPS 2024, §4; Meng et al. 2022).

Three kinds of runs of one question: clean; corrupted, where the constraint is a wrong one; restored, which is the
corrupted run with the clean outputs of a window of layers put back at one token. A site's indirect effect is
p(restored) − p(corrupted).

The sweep computes exactly what restoring each site on the full model would, at a fraction of the work. For a token
t, every restored run equals the corrupted one before t and below its window, so the runs of t start there: they
share the corrupted run's keys and values, and ride in one batch that grows as it climbs the layers (`restoring`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from errata.editor.errors import CorruptionFailedError, InvalidInputError, PromptError
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt
from errata.editor.recording import Recording, record
from errata.editor.restoring import AnswerReader, Probabilities, Restoration, Restorer, window_of
from errata.editor.states import Component
from errata.editor.suffix import Suffix

__all__ = [
    "ROLES",
    "AveragedTrace",
    "CausalTrace",
    "CleanRun",
    "CorruptedRun",
    "Corruption",
    "OtherImage",
    "Probabilities",
    "Progress",
    "Substitution",
    "TraceRequest",
    "TraceSettings",
    "average",
    "corrupted_row",
    "nan_mean",
    "trace",
    "window_of",
]

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
    effect, a probability, for which a trace means anything. `max_rows` bounds the batch; memory may bound it further.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CorruptedRun:
    """A corrupted run of a question.

    `tokens` are those of its corrupted constraints, `first` the first traced one whose states differ from the clean
    run's.
    """

    recording: Recording
    probabilities: Probabilities
    tokens: tuple[int, ...]
    first: int


class CleanRun:
    """The clean run of one question, recorded once, against which any corruption and any window is traced.

    `spans` are the tokens of each constraint; what is kept starts at the first of them, `start`.
    Raises ConstraintNotFoundError, and PromptError or TargetError for what cannot be encoded.
    """

    def __init__(
        self,
        model: EditableModel,
        prompt: Prompt,
        constraints: Sequence[Constraint],
        answer: str | None,
        components: Sequence[Component],
    ) -> None:
        self._model, self._prompt = model, prompt
        self.components = tuple(components)
        self.answer = answer if answer is not None else model.generate([prompt])[0].text
        self.row = model.encode(prompt, self.answer)
        self.spans = tuple(self.row.positions(*c.span(prompt.text)) for c in constraints)
        self.start = min(s.start for s in self.spans)
        self.recording = self._recorded(self.row, self.components)
        self.reader = AnswerReader(model, self.row)
        self.probabilities = self.reader.recorded(self.recording)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens whose states are restored, from the first constraint's first one to the prompt's last one."""
        ids = self.row.ids[self.start : self.row.prompt_length].tolist()
        return tuple(str(self._model.tokenizer.decode([i])) for i in ids)

    def corrupt(self, corruptions: Sequence[Corruption | None], *, min_total_effect: float) -> CorruptedRun:
        """The same question with its constraints made wrong, each as given; None: it stays as it is.

        Raises PromptError where the corrupted prompt would not align with the clean one, CorruptionFailedError where
        the answer stays about as likely.
        """
        spoilt = [(s, c) for s, c in zip(self.spans, corruptions, strict=True) if c is not None]
        recording = self._recorded(corrupted_row(self._model, self._prompt, self.row, spoilt), ())
        probabilities = self.reader.recorded(recording)
        self.check(probabilities, min_total_effect)
        # An image stands before all that is traced, or among it.
        before = any(isinstance(c, OtherImage) for _, c in spoilt)
        return CorruptedRun(
            recording=recording,
            probabilities=probabilities,
            tokens=tuple(sorted(t for span, _ in spoilt for t in span)),
            first=self.start if before else max(self.start, recording.begin_of(min(s.start for s, _ in spoilt))),
        )

    def trace(
        self,
        corrupted: CorruptedRun,
        windows: Sequence[int],
        *,
        max_rows: int,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
        memory: Memory | None = None,
    ) -> tuple[CausalTrace, ...]:
        """One trace for each window, all in one climb of batches of `max_rows`, or of what `memory` holds.

        Raises CancelledError, and MemoryLimitError where not even one row fits.
        """
        restore = Restorer(
            clean=self.recording, reader=self.reader, max_rows=max_rows, cancelled=cancelled, memory=memory
        )
        restored, restored_first = self._sweep(corrupted, windows, restore, progress)
        return tuple(
            CausalTrace(
                question=self._prompt.text,
                answer=self.answer,
                tokens=self.tokens,
                constraint=tuple(t - self.start for t in corrupted.tokens),
                window=window,
                components=self.components,
                clean=self.probabilities,
                corrupted=corrupted.probabilities,
                restored=restored[w],
                restored_first=restored_first[w],
            )
            for w, window in enumerate(windows)
        )

    def together(
        self, corrupted: CorruptedRun, tokens: Sequence[int], window: int, *, max_rows: int
    ) -> Float[NDArray[np.float64], "components layers"]:
        """p(whole answer) after restoring a window of layers at all of `tokens` at once."""
        layers, start = len(self._model.layers), min(tokens)
        sites = [
            [
                Restoration(
                    component=c, layers=window_of(layer, window, layers), tokens=tuple(t - start for t in tokens)
                )
                for layer in range(layers)
            ]
            for c in self.components
        ]
        restore = Restorer(clean=self.recording, reader=self.reader, max_rows=max_rows)
        suffix = Suffix(self._model, [corrupted.recording], [start])
        with suffix, torch.no_grad():
            found = restore(suffix, start, chain.from_iterable(sites), layers)
        return np.array([[found[run][0].whole for run in of_component] for of_component in sites])

    def check(self, corrupted: Probabilities, least: float) -> None:
        """Raises CorruptionFailedError where the total effect on the whole answer is below `least`."""
        clean, effect = self.probabilities.whole, self.probabilities.whole - corrupted.whole
        if effect < least:
            raise CorruptionFailedError(
                f"the corruption does not corrupt: p({self.answer!r}) is {clean:.3f} clean and "
                f"{corrupted.whole:.3f} corrupted (total effect {effect:.3f}, needed {least}); choose another "
                "substitute or image, or an answer the model believes"
            )

    def _recorded(self, row: Encoded, components: Sequence[Component]) -> Recording:
        # The answer's last token predicts nothing that is asked for.
        return record(self._model, [row.replaced(row.ids[:-1])], [self.start], components=components)[0]

    def _sweep(
        self,
        corrupted: CorruptedRun,
        windows: Sequence[int],
        restore: Restorer,
        progress: Progress | None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """p(whole answer) and p(first token), windows × components × layers × tokens, restored token by token.

        What stands before the first corrupted token is clean already: restoring it changes nothing.
        """
        layers, first, last = len(self._model.layers), corrupted.first, self.row.prompt_length
        shape = (len(windows), len(self.components), layers, last - self.start)
        whole, early = np.full(shape, corrupted.probabilities.whole), np.full(shape, corrupted.probabilities.first)
        sites = {
            (w, c, layer): Restoration(component=component, layers=window_of(layer, window, layers))
            for w, window in enumerate(windows)
            for c, component in enumerate(self.components)
            for layer in range(layers)
        }
        for t in range(first, last):
            suffix = Suffix(self._model, [corrupted.recording], [t])
            with suffix, torch.no_grad():
                found = restore(suffix, t, sites.values(), layers)
            for site, run in sites.items():
                restored = found[run][0]
                whole[*site, t - self.start], early[*site, t - self.start] = restored.whole, restored.first
            if progress:
                progress(t - first + 1, last - first)
        return whole, early


def trace(
    model: EditableModel,
    request: TraceRequest,
    settings: TraceSettings = TraceSettings(),
    *,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    memory: Memory | None = None,
) -> CausalTrace:
    """Traces one question. `memory` says what a batch may take; None: what the model's device has.

    Raises ConstraintNotFoundError, PromptError where a corrupted prompt would not align with the clean one,
    CorruptionFailedError where the corruption leaves the answer about as likely, MemoryLimitError, CancelledError.
    """
    clean = CleanRun(model, request.prompt, (request.constraint,), request.answer, settings.components)
    corrupted = clean.corrupt((request.corruption,), min_total_effect=settings.min_total_effect)
    traces = clean.trace(
        corrupted,
        (settings.window,),
        max_rows=settings.max_rows,
        progress=progress,
        cancelled=cancelled,
        memory=memory,
    )
    return traces[0]


def corrupted_row(
    model: EditableModel, prompt: Prompt, clean: Encoded, corruptions: Sequence[tuple[range, Corruption]]
) -> Encoded:
    """The clean row with the constraints at the given tokens made wrong, as long as before.

    Raises PromptError where it would not be.
    """
    row = clean
    for tokens, corruption in corruptions:
        match corruption:
            case Substitution(word=word):
                row = row.replaced(_substituted(model, row, tokens, word))
            case OtherImage(images=images):
                row = replace(row, vision=_of_other_images(model, prompt, clean, images).vision)
    return row


def _substituted(model: EditableModel, row: Encoded, tokens: range, word: str) -> Tensor:
    if not word.strip():
        raise PromptError("the substitute is empty; give a wrong constraint", field="corruption.word")
    ids = row.ids.clone()
    # As the word would stand in a sentence: with the space before it.
    ids[tokens.start : tokens.stop] = model.tokenizer(" " + word.strip(), add_special_tokens=False)["input_ids"][0]
    return ids


def _of_other_images(model: EditableModel, prompt: Prompt, clean: Encoded, images: tuple[Image.Image, ...]) -> Encoded:
    if not prompt.images:
        raise PromptError("the prompt has no image to exchange; corrupt by substitution", field="corruption")
    other = model.encode(Prompt(text=prompt.text, images=images, chat=prompt.chat))
    if other.prompt_length != clean.prompt_length:
        raise PromptError(
            f"the other image makes the prompt {other.prompt_length} tokens long instead of {clean.prompt_length}; "
            "give one of the same size",
            field="corruption.images",
        )
    return other


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
        return nan_mean(self.samples(component))

    def spread(self, component: Component) -> NDArray[np.float64]:
        """The standard error of that mean; NaN where fewer than two questions have the role."""
        samples = self.samples(component)
        n = (~np.isnan(samples)).sum(0)
        variance = nan_mean((samples - self.aie(component)) ** 2)
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


def nan_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean along the first axis of what is not NaN; NaN where nothing is."""
    n = (~np.isnan(values)).sum(0)
    mean: NDArray[np.float64] = np.where(n > 0, np.nansum(values, 0) / np.maximum(n, 1), np.nan)
    return mean
