"""The causal trace by noise: Gaussian noise on the constraint's embeddings, averaged over draws (Meng et al. 2022, §2).

For text models, and for textual constraints in any model; images do not answer to noise (methods.md §2).

The clean run is recorded once, all draws are rows of one more. The restored runs of a token start there and at their
window's lowest layer; those of all draws, layers and components share batches of up to `max_rows` rows, and those of
one draw its prefix.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from errata.editor.errors import InvalidInputError, check_numbers
from errata.editor.measurements.effects import at_role, check_components, layer_plot, role_grids
from errata.editor.measurements.findings import Findings, Grid, HeatMap, described
from errata.editor.measurements.intervals import extreme, line, number
from errata.editor.measurements.questions import (
    Cancelled,
    Kept,
    Progress,
    Question,
    answered,
    of_one_constraint,
    trace_each,
)
from errata.editor.model import EditableModel
from errata.editor.recording import Recording, record
from errata.editor.report.wording import COMPONENTS, counted
from errata.editor.restoring import Probabilities, Restoration, Restorer, window_of
from errata.editor.states import Component, changed_output
from errata.editor.suffix import Suffix
from errata.editor.trace import AveragedTrace, CausalTrace, CleanRun, average

_PLACES = {"constraint last": "constraint's last token", "last": "prompt's last token"}
"""Where effects are shown by layer, by the token's role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSettings:
    """How noise corrupts, what is restored and how much of it at once.

    `noise` is in standard deviations of the embeddings of all questions' constraint tokens, > 0; `draws` ≥ 1 of it are
    averaged, drawn from `seed` anew for each question. `window` is in layers, ≥ 1, centred on the layer it is reported
    under. `min_total_effect` is the least total effect, a probability, of a question that counts. `grids` ≥ 0 questions
    have their own figure. `max_rows` ≥ 1 bounds the batch, and with it memory.
    """

    noise: float = 3.0
    draws: int = 10
    seed: int = 0
    components: tuple[Component, ...] = (Component.MLP, Component.ATTENTION, Component.LAYER)
    window: int = 1
    min_total_effect: float = 0.1
    grids: int = 4
    max_rows: int = 256

    def __post_init__(self) -> None:
        least = {"draws": 1, "window": 1, "grids": 0, "max_rows": 1, "seed": 0, "min_total_effect": -1}
        check_numbers(self, at_least=least, above={"noise": 0})
        check_components(self.components)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseTrace:
    """One question: its effects averaged over the draws, and those of each draw.

    `corrupted` is p(whole answer) of each draw, `restored` the same with each site restored.
    """

    index: int
    averaged: CausalTrace
    corrupted: Float[NDArray[np.float64], " draws"]
    restored: Float[NDArray[np.float64], "draws components layers tokens"]

    def spread(self, component: Component) -> Float[NDArray[np.float64], "layers tokens"]:
        """Standard deviation over draws of the indirect effect; NaN for one draw."""
        effects = self.restored[:, self.averaged.components.index(component)] - self.corrupted[:, None, None]
        spread: NDArray[np.float64] = effects.std(0, ddof=1) if len(effects) > 1 else np.full(effects.shape[1:], np.nan)
        return spread


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseResult:
    """The traces of all questions that count. `deviation` is the embeddings' standard deviation."""

    settings: NoiseSettings
    deviation: float
    traces: tuple[NoiseTrace, ...]
    skipped: tuple[str, ...]

    @property
    def average(self) -> AveragedTrace:
        """Average indirect effects by role of the token."""
        return average([t.averaged for t in self.traces])

    def findings(self) -> Findings:
        """Effects by layer and by role of the token with 95 % intervals, and grids of the first questions."""
        averaged = self.average
        plots = []
        numbers = [number("total effect", np.array([t.averaged.total_effect for t in self.traces]))]
        for role, place in _PLACES.items():
            by_layer = {COMPONENTS[c]: at_role(averaged, c, role) for c in averaged.components}
            n = len(by_layer[COMPONENTS[averaged.components[0]]])
            if n:
                for name, samples in by_layer.items():
                    told = f"{name} at the {place}"
                    numbers += extreme(
                        samples, "probability", value=f"{told}: largest AIE", layer=f"{told}: layer of the largest AIE"
                    )
                lines = [line(name, samples) for name, samples in by_layer.items()]
                name, caption = f"aie_{role.replace(' ', '_')}", f"n = {counted(n, 'question')}"
                plots.append(layer_plot(name, f"Restored at the {place}", lines, unit="probability", caption=caption))
        own = tuple(_grid(t, i) for i, t in enumerate(self.traces[: self.settings.grids]))
        return Findings(
            kind="noise",
            title=f"Causal trace by noise of {self.settings.noise:g} standard deviations, "
            + counted(self.settings.draws, "draw"),
            settings={**described(self.settings), "standard deviation of the embeddings": f"{self.deviation:.4g}"},
            n=len(self.traces),
            numbers=tuple(numbers),
            plots=(*plots, role_grids("aie_roles", averaged), *own),
            skipped=self.skipped,
        )


def measure_noise(
    model: EditableModel,
    questions: Sequence[Question],
    settings: NoiseSettings = NoiseSettings(),
    *,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> NoiseResult:
    """Traces the questions that the model answers as they say, each with one constraint.

    Raises InvalidInputError for a question that cannot be traced, CorruptionFailedError where none is left,
    CancelledError.
    """
    answers, skipped = answered(model, questions)
    kept = of_one_constraint(answers, skipped, "noise goes on one")
    deviation = _deviation(model, kept)
    traces = trace_each(
        kept,
        skipped,
        lambda i, question, answer: _traced(model, i, question, answer, deviation, settings, cancelled),
        progress=progress,
        cancelled=cancelled,
    )
    return NoiseResult(settings=settings, deviation=deviation, traces=tuple(traces), skipped=tuple(skipped))


def _deviation(model: EditableModel, kept: Kept) -> float:
    """The standard deviation of all entries of the questions' constraint embeddings (Meng et al. 2022, B.1)."""
    ids = []
    for i, question, _ in kept:
        try:
            row = model.encode(question.prompt)
            span = row.positions(*question.constraints[0].span(question.prompt.text))
        except InvalidInputError as error:
            raise error.within(f"questions[{i}]") from None
        ids.append(row.ids[span.start : span.stop])
    with torch.no_grad():
        return float(_embeddings(model)(torch.cat(ids).to(model.device)).double().std())


def _embeddings(model: EditableModel) -> nn.Embedding:
    return cast(nn.Embedding, model.model.get_input_embeddings())


def constraint_noise(
    settings: NoiseSettings, deviation: float, tokens: int, width: int
) -> Float[Tensor, "draws tokens d"]:
    """The noise on a constraint of so many tokens, in float32: the same for every question of as many."""
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randn(settings.draws, tokens, width, generator=generator) * (settings.noise * deviation)


def _traced(
    model: EditableModel,
    index: int,
    question: Question,
    answer: str,
    deviation: float,
    settings: NoiseSettings,
    cancelled: Cancelled | None,
) -> NoiseTrace:
    clean = CleanRun(model, question.prompt, question.constraints, answer, settings.components)
    drawn = list(_drawn(model, clean, deviation, settings))
    corrupted = [p for recordings in drawn for p in _corrupted(model, clean, recordings)]
    mean = _mean(corrupted)
    clean.check(mean, settings.min_total_effect)
    restored = [_restored(model, clean, recordings, settings, cancelled) for recordings in drawn]
    whole, first = (np.concatenate(parts) for parts in zip(*restored, strict=True))
    return NoiseTrace(
        index=index,
        corrupted=np.array([p.whole for p in corrupted]),
        restored=whole,
        averaged=CausalTrace(
            question=question.prompt.text,
            answer=answer,
            tokens=clean.tokens,
            constraint=tuple(range(len(clean.spans[0]))),
            window=settings.window,
            components=settings.components,
            clean=clean.probabilities,
            corrupted=mean,
            restored=whole.mean(0),
            restored_first=first.mean(0),
        ),
    )


def _drawn(
    model: EditableModel, clean: CleanRun, deviation: float, settings: NoiseSettings
) -> Iterator[list[Recording]]:
    """The corrupted runs, as many together as may be rows of one batch."""
    span = clean.spans[0]
    embeddings = _embeddings(model)
    noise = constraint_noise(settings, deviation, len(span), embeddings.embedding_dim)
    for draws in noise.split(settings.max_rows):
        rows = [clean.recording.row] * len(draws)
        # Where the definition puts it: what a family makes of its embeddings before the first layer is its own affair.
        with changed_output(embeddings, _added(span, draws)):
            recordings = record(model, rows, [clean.start] * len(draws), batch_size=len(draws))
        yield recordings


def _added(span: range, noise: Float[Tensor, "draws tokens d"]) -> Callable[[Tensor], Tensor]:
    """Adds its draw to each row's constraint."""

    def change(output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, span.start : span.stop] += noise.to(output)
        return changed

    return change


def _corrupted(model: EditableModel, clean: CleanRun, recordings: Sequence[Recording]) -> list[Probabilities]:
    top = len(model.layers) - 1
    with Suffix(model, recordings, [clean.start] * len(recordings)) as suffix, torch.no_grad():
        return clean.reader.of(suffix, suffix.run(top, suffix.inputs(top)), clean.start)


def _restored(
    model: EditableModel,
    clean: CleanRun,
    recordings: Sequence[Recording],
    settings: NoiseSettings,
    cancelled: Cancelled | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """p(whole answer) and p(first token), draws × components × layers × tokens, restored token by token."""
    layers, draws = len(model.layers), len(recordings)
    sites = {
        (c, layer): Restoration(component=component, layers=window_of(layer, settings.window, layers))
        for c, component in enumerate(settings.components)
        for layer in range(layers)
    }
    restore = Restorer(clean=clean.recording, reader=clean.reader, max_rows=settings.max_rows, cancelled=cancelled)
    shape = (draws, len(settings.components), layers, len(clean.tokens))
    whole, first = np.zeros(shape), np.zeros(shape)
    for token in range(len(clean.tokens)):
        start = clean.start + token
        with Suffix(model, recordings, [start] * draws) as suffix, torch.no_grad():
            found = restore(suffix, start, sites.values(), layers)
        for site, run in sites.items():
            whole[:, *site, token] = [p.whole for p in found[run]]
            first[:, *site, token] = [p.first for p in found[run]]
    return whole, first


def _mean(probabilities: Sequence[Probabilities]) -> Probabilities:
    return Probabilities(
        first=float(np.mean([p.first for p in probabilities])), whole=float(np.mean([p.whole for p in probabilities]))
    )


def _grid(found: NoiseTrace, number: int) -> HeatMap:
    """The indirect effects of one question by layer and token."""
    own = found.averaged
    spoilt = set(own.constraint)
    return HeatMap(
        name=f"question_{number}",
        title=f"{own.question} ({own.answer})",
        x_label="layer",
        y_label="token (* corrupted)",
        unit="probability",
        rows=tuple(f"{t}*" if i in spoilt else t for i, t in enumerate(own.tokens)),
        columns=tuple(str(i) for i in range(own.restored.shape[1])),
        grids=tuple(Grid(label=COMPONENTS[c], values=own.indirect(c).T) for c in own.components),
        caption=f"questions[{found.index}], n = 1 question: indirect effects, mean of "
        f"{counted(len(found.corrupted), 'draw')}; p(answer) {own.clean.whole:.3f} clean, "
        f"{own.corrupted.whole:.3f} corrupted",
    )
