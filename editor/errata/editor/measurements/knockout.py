"""Attention knockout: where in the depth one group of positions tells another what the answer needs
(Zhang et al. 2025, §3; methods.md §4).

In a window of layers the targets may not attend to the sources: those attention logits are −∞. What the answer loses
by it is what went that way. A position always keeps itself, also where a group is hidden from itself or two groups
overlap: without anything to attend to its state would be NaN.

A run that is blocked from layer ℓ on for targets from token t on equals the clean one below ℓ and before t, so it
starts there: it takes the clean run's keys and values, joins a batch at the lowest layer of its window and climbs with
the runs of other windows and pairs. Those whose only target is the last position climb apart, one position wide. The
numbers are those of masks on the full model, to 1e-5 in float32.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from errata.editor.errors import CancelledError, InvalidInputError, check_numbers
from errata.editor.measurements.findings import Findings, LinePlot, Number
from errata.editor.measurements.intervals import INTERVAL, extreme, line
from errata.editor.measurements.positions import Pair, positions
from errata.editor.measurements.questions import Cancelled, Progress, Question, answered
from errata.editor.model import EditableModel, Encoded
from errata.editor.recording import Recording, record
from errata.editor.report.wording import counted
from errata.editor.restoring import AnswerReader, Probabilities, window_of
from errata.editor.suffix import Suffix

_SHARE = 9 / 32
"""The papers' window of 9 layers as a share of their 32-layer models' depth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnockoutSettings:
    """What is hidden from what, in how many layers at once.

    `pairs` are written `source->target`, at least one and none twice, in groups of `positions.Group`: image, box,
    outside, constraint, question, last; several are joined by `+`. `window` is in layers, centred on the layer it is
    reported under (an even one reaches one layer further down than up) and cut at the model's ends; 0: 9/32 of the
    model's depth, at least 1. `max_rows`, ≥ 1, bounds the batch, and with it memory.
    """

    pairs: tuple[str, ...] = (
        "image->question",
        "image->constraint",
        "image->last",
        "constraint->question",
        "constraint->last",
        "question->last",
    )
    window: int = 0
    max_rows: int = 256

    def __post_init__(self) -> None:
        if not self.pairs or len({Pair.parse(p) for p in self.pairs}) < len(self.pairs):
            raise InvalidInputError("give at least one pair, such as image->last, and none twice", field="pairs")
        check_numbers(self, at_least={"window": 0, "max_rows": 1}, above={})

    def layers(self, depth: int) -> int:
        """The window in a model of `depth` layers."""
        return self.window or max(1, round(depth * _SHARE))


@dataclass(frozen=True, slots=True, kw_only=True)
class KnockoutResult:
    """The probabilities of every question's answer, clean and blocked.

    `blocked` is p(whole answer) and `blocked_first` p(first token) with the window centred on each layer; NaN where a
    pair is left out of a question. `window` is in layers. `skipped` has a line for each question that is left out and
    one for each pair and reason, with its questions.
    """

    pairs: tuple[str, ...]
    window: int
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    clean: Float[NDArray[np.float64], " questions"]
    clean_first: Float[NDArray[np.float64], " questions"]
    blocked: Float[NDArray[np.float64], "questions pairs layers"]
    blocked_first: Float[NDArray[np.float64], "questions pairs layers"]
    settings: KnockoutSettings
    skipped: tuple[str, ...]

    def change(self) -> Float[NDArray[np.float64], "questions pairs layers"]:
        """(p(blocked) − p(clean)) / p(clean) of the whole answer, in percent (Zhang et al. 2025, §3)."""
        clean = self.clean[:, None, None]
        change: NDArray[np.float64] = 100 * (self.blocked - clean) / clean
        return change

    def of(self, pair: str) -> Float[NDArray[np.float64], "questions layers"]:
        """The change of one pair in the questions that have both its groups, in percent."""
        change = self.change()[:, self.pairs.index(pair)]
        return change[~np.isnan(change).all(1)]

    def findings(self) -> Findings:
        """One plot of all pairs over the layers; for each the largest fall and the layer it is at."""
        measured = {pair: self.of(pair) for pair in self.pairs if len(self.of(pair))}
        s = self.settings
        return Findings(
            kind="knockout",
            title="Attention knockout",
            settings={"pairs": ", ".join(s.pairs), "window": str(self.window), "max_rows": str(s.max_rows)},
            n=len(self.questions),
            numbers=tuple(n for pair, change in measured.items() for n in _falls(pair, change)),
            plots=(self._plot(measured),),
            skipped=self.skipped,
        )

    def _plot(self, measured: Mapping[str, Float[NDArray[np.float64], "questions layers"]]) -> LinePlot:
        n = len(self.questions)
        own = (f"{len(c)} of {Pair.parse(p).label}" for p, c in measured.items() if len(c) < n)
        fewer = f" ({', '.join(own)})" if any(len(c) < n for c in measured.values()) else ""
        return LinePlot(
            name="knockout",
            title="Attention knockout",
            x_label="layer at the middle of the window",
            y_label="change of p(answer), %",
            x=np.arange(self.blocked.shape[-1], dtype=np.float64),
            lines=tuple(line(Pair.parse(p).label, c) for p, c in measured.items()),
            caption=(
                "Relative change of the whole answer's probability where the positions after the arrow may not attend "
                f"to those before it in {counted(self.window, 'layer')}: mean, n = {counted(n, 'question')}{fewer}; "
                f"{INTERVAL}"
            ),
        )


def _falls(pair: str, change: Float[NDArray[np.float64], "questions layers"]) -> tuple[Number, Number]:
    """The lowest mean change, with the interval of the mean at that layer; and the layer of the lowest."""
    told = Pair.parse(pair).label
    return extreme(
        change, "%", value=f"{told}: lowest change", layer=f"{told}: layer of the lowest change", lowest=True
    )


def measure_knockout(
    model: EditableModel,
    questions: Sequence[Question],
    settings: KnockoutSettings = KnockoutSettings(),
    *,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> KnockoutResult:
    """Blocks every pair in a window around every layer, for each question that the model answers as it says.

    Raises ConstraintNotFoundError, InvalidInputError where no question or no pair is left to measure, CancelledError.
    """
    kept, skipped = answered(model, questions)
    pairs = [Pair.parse(p) for p in settings.pairs]
    left_out: dict[tuple[str, str], list[int]] = defaultdict(list)
    found = []
    for done, (i, question, answer) in enumerate(kept):
        try:
            blocks, reasons = _blocks(model, question, answer, pairs)
        except InvalidInputError as error:
            raise error.within(f"questions[{i}]") from None
        for pair, reason in reasons.items():
            left_out[settings.pairs[pair], reason].append(i)
        if blocks:
            clean, blocked = _knocked_out(model, blocks, len(pairs), settings, cancelled)
            if clean.whole:
                found.append((question.prompt.text, answer, clean, blocked))
            else:
                skipped.append(f"questions[{i}]: p({answer!r}) is too small for a number: no change is relative to it")
        if progress:
            progress(done + 1, len(kept))
    lines = (*skipped, *(_line(pair, reason, of, len(kept)) for (pair, reason), of in left_out.items()))
    if not found:
        raise InvalidInputError(f"no question is left to measure: {lines[0]}", field="questions")
    texts, answers, cleans, blockeds = zip(*found, strict=True)
    by_layer = np.stack(blockeds)
    return KnockoutResult(
        pairs=settings.pairs,
        window=settings.layers(len(model.layers)),
        questions=texts,
        answers=answers,
        clean=np.array([p.whole for p in cleans]),
        clean_first=np.array([p.first for p in cleans]),
        blocked=by_layer[..., 0],
        blocked_first=by_layer[..., 1],
        settings=settings,
        skipped=lines,
    )


def _line(pair: str, reason: str, indices: Sequence[int], of: int) -> str:
    told, listed = Pair.parse(pair).label, ", ".join(map(str, indices))
    return f"{told} left out of {len(indices)} of {counted(of, 'question')}, as {reason}: questions[{listed}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Blocks:
    """One question's row and its clean run; which positions may not attend to which, by pair and then by target."""

    row: Encoded
    clean: Recording
    pairs: Mapping[int, Mapping[int, tuple[int, ...]]]

    def starts(self) -> Mapping[int, list[int]]:
        """The pairs by where their runs start: those that change the last position alone there, the others together.

        Nothing changes before the first target.
        """
        last = self.row.prompt_length - 1
        alone = [pair for pair, targets in self.pairs.items() if min(targets) == last]
        others = [pair for pair in self.pairs if pair not in alone]
        starts = {min(t for pair in others for t in self.pairs[pair]): others} if others else {}
        return starts | ({last: alone} if alone else {})

    def mask(self, pair: int, start: int) -> Bool[Tensor, "suffix tokens"]:
        """What the pair blocks of the attention of the positions from `start` on."""
        tokens = self.clean.length
        mask = torch.zeros(tokens - start, tokens, dtype=torch.bool)
        for target, sources in self.pairs[pair].items():
            mask[target - start, list(sources)] = True
        return mask


def _blocks(
    model: EditableModel, question: Question, answer: str, pairs: Sequence[Pair]
) -> tuple[_Blocks | None, dict[int, str]]:
    """What each pair blocks, and for each pair that blocks nothing the reason; None where that is all of them."""
    row = model.encode(question.prompt, answer)
    groups = positions(model, question, row)
    reasons = {p: reason for p, pair in enumerate(pairs) if (reason := groups.empty_of(pair))}
    targets = [t for p, pair in enumerate(pairs) if p not in reasons for t in groups.of(pair.targets)]
    if not targets:
        return None, reasons
    # The answer's last token predicts nothing that is asked for.
    clean = record(model, [row.replaced(row.ids[:-1])], [min(targets)])[0]
    blocked = {p: groups.between(r, clean.begin_of) for p, r in enumerate(pairs) if p not in reasons}
    reasons |= {p: "no target stands after a source" for p, b in blocked.items() if not b}
    blocked = {p: b for p, b in blocked.items() if b}
    return (_Blocks(row=row, clean=clean, pairs=blocked) if blocked else None), reasons


def _knocked_out(
    model: EditableModel,
    blocks: _Blocks,
    pairs: int,
    settings: KnockoutSettings,
    cancelled: Cancelled | None,
) -> tuple[Probabilities, Float[NDArray[np.float64], "pairs layers 2"]]:
    """The clean probabilities, and p(whole answer) and p(first token) with each pair blocked around each layer."""
    layers, reader = len(model.layers), AnswerReader(model, blocks.row)
    found = np.full((pairs, layers, 2), np.nan)
    for start, of in blocks.starts().items():
        sites = [(pair, layer) for layer in range(layers) for pair in of]
        suffix = Suffix(model, [blocks.clean], [start])
        masks = {pair: blocks.mask(pair, suffix.begin).to(model.device) for pair in of}
        with suffix, torch.no_grad():
            for i in range(0, len(sites), settings.max_rows):
                if cancelled and cancelled():
                    raise CancelledError("the attention knockout was cancelled; nothing was changed")
                batch = sites[i : i + settings.max_rows]
                hidden = _climb(suffix, batch, masks, settings.layers(layers), layers)
                for site, p in zip(batch, reader.of(suffix, hidden, start), strict=True):
                    found[site] = p.whole, p.first
    return reader.recorded(blocks.clean), found


def _climb(
    suffix: Suffix, sites: Sequence[tuple[int, int]], masks: Mapping[int, Tensor], window: int, layers: int
) -> Float[Tensor, "sites suffix d"]:
    """The last layer's outputs of the runs blocked at `sites`, (pair, layer) in order of layer."""
    windows = [window_of(layer, window, layers) for _, layer in sites]
    nothing = torch.zeros_like(masks[sites[0][0]])
    hidden = suffix.inputs(0)[:0]
    for layer in range(windows[0].start, layers):
        joining = sum(w.start == layer for w in windows)
        hidden = torch.cat([hidden, suffix.inputs(layer).expand(joining, -1, -1)])
        running = zip(sites[: len(hidden)], windows, strict=False)
        blocked = [masks[pair] if layer in w else nothing for (pair, _), w in running]
        anything = any(layer in w for w in windows[: len(hidden)])
        hidden = suffix.run(layer, hidden, blocked=torch.stack(blocked) if anything else None)
    return hidden
