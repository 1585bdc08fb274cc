"""Which tokens attention brings the answer from, layer by layer (methods.md §3; Basu et al. 2024, §4 and §5).

The flows of the paper go from the image to the constraint's last token and from the constraint to the last token of
the prompt. What a flow carries at a layer is the sum of the contributions of the group's tokens over
all heads. A token's contribution to itself counts where it is in the group.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image

from errata.editor.errors import CancelledError, InvalidInputError, check_numbers
from errata.editor.measurements.contributions import Contributions, contributions, output_factors
from errata.editor.measurements.findings import (
    Findings,
    Grid,
    HeatMap,
    LinePlot,
    Number,
    Overlay,
    Plot,
    Table,
    described,
)
from errata.editor.measurements.flows import Ends, ends, flow_of
from errata.editor.measurements.intervals import INTERVAL, extreme, line
from errata.editor.measurements.positions import Group, Pair, grid, seen
from errata.editor.measurements.questions import Cancelled, Progress, Question, answered
from errata.editor.model import EditableModel, Encoded, by_length
from errata.editor.report.wording import counted

_UNIT = "norm"
"""In the residual stream, as the captions say."""

_SUMMED = "Norms in the residual stream, summed over"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSettings:
    """What is measured and shown.

    `flows` are `source->target`, each a group of `positions.Group`; a source may be several:
    `image+question->last`.
    `batch_size` bounds the questions in one pass, ≥ 1. `overlays` are the images shown with what their patches
    contribute and `tokens` the rows of a table, both ≥ 0.
    """

    flows: tuple[str, ...] = ("image->constraint", "constraint->last")
    batch_size: int = 16
    overlays: int = 4
    tokens: int = 10

    def __post_init__(self) -> None:
        check_numbers(self, at_least={"batch_size": 1, "overlays": 0, "tokens": 0}, above={})
        if not self.flows or len(set(self.flows)) < len(self.flows):
            raise InvalidInputError("give at least one flow, and none twice", field="flows")
        self.parsed()

    def parsed(self) -> tuple[Pair, ...]:
        """The flows. Raises InvalidInputError for one that names no two groups."""
        return tuple(flow_of(f, field="flows") for f in self.flows)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSample:
    """What one flow carries in one question, as norms in the residual stream.

    `heads` are summed over the source's tokens, `by_token` over heads; `tokens` name its columns.
    """

    tokens: tuple[str, ...]
    heads: Float[NDArray[np.float64], "layers heads"]
    by_token: Float[NDArray[np.float64], "layers tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionAttention:
    """One question's flows, by `source->target`; without those of which it has no tokens.

    `image` is what the tower sees, and `side` its patches a side; None where it has not one image of square patches.
    """

    question: str
    answer: str
    image: Image.Image | None = field(repr=False)
    side: int | None
    flows: Mapping[str, FlowSample] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionResult:
    """The flows of all questions measured."""

    settings: AttentionSettings
    questions: tuple[QuestionAttention, ...]
    skipped: tuple[str, ...]

    def samples(self, flow: str) -> list[FlowSample]:
        """One flow in every question that has it."""
        return [q.flows[flow] for q in self.questions if flow in q.flows]

    def layers(self, flow: str) -> Float[NDArray[np.float64], "questions layers"]:
        """What the flow carries at each layer, summed over heads and tokens."""
        return np.stack([s.heads.sum(1) for s in self.samples(flow)])

    def peak(self, flow: str) -> int:
        """The layer that carries most on average."""
        return int(self.layers(flow).mean(0).argmax())

    def findings(self) -> Findings:
        """Contributions by layer, head, patch and token; 95 % intervals by a bootstrap over questions."""
        flows = {f: p for f, p in zip(self.settings.flows, self.settings.parsed(), strict=True) if self.samples(f)}
        shown, unshown = _overlays(self, flows)
        plots: list[Plot] = [_by_layer(self, f, flow) for f, flow in flows.items()]
        plots += [_by_head(self, f, flow) for f, flow in flows.items()]
        plots += [p for f, flow in flows.items() if (p := _by_image_token(self, f, flow))]
        return Findings(
            kind="attention",
            title="Attention contributions",
            settings=described(self.settings),
            n=len(self.questions),
            numbers=tuple(n for f, flow in flows.items() for n in _numbers(self, f, flow)),
            plots=(*plots, *shown),
            tables=tuple(_tokens_table(self, f, flow) for f, flow in flows.items()),
            skipped=(*self.skipped, *unshown),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A question as it is run, with the tokens of each flow."""

    index: int
    question: Question
    answer: str
    row: Encoded
    flows: tuple[Ends, ...]


def measure_attention(
    model: EditableModel,
    questions: Sequence[Question],
    settings: AttentionSettings = AttentionSettings(),
    *,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> AttentionResult:
    """Contributions along `settings.flows` in every question that the model answers rightly.

    Raises InvalidInputError where no question is left or none has the tokens of any flow, CancelledError.
    """
    kept, skipped = answered(model, questions)
    flows = settings.parsed()
    cases = [_case(model, i, question, answer, flows) for i, question, answer in kept]
    if not any(end.sources for c in cases for end in c.flows):
        reason = "; ".join(_left_out(cases, flows))
        raise InvalidInputError(f"no question is left to measure: {reason}", field="questions")
    factors = output_factors(model)
    found: dict[int, QuestionAttention] = {}
    for batch in by_length([c.row for c in cases], settings.batch_size):
        if cancelled and cancelled():
            raise CancelledError("the measurement of attention was cancelled; nothing was changed")
        rows, targets = [cases[n].row for n in batch], [[end.target for end in cases[n].flows] for n in batch]
        for n, carried in zip(batch, contributions(model, rows, targets, factors), strict=True):
            found[n] = _measured(model, cases[n], carried, settings.flows)
        if progress:
            progress(len(found), len(cases))
    return AttentionResult(
        settings=settings,
        questions=tuple(found[n] for n in range(len(cases))),
        skipped=(*skipped, *_left_out(cases, flows)),
    )


def _case(model: EditableModel, index: int, question: Question, answer: str, flows: tuple[Pair, ...]) -> _Case:
    try:
        row = model.encode(question.prompt)
        found = ends(model, question, row, flows)
    except InvalidInputError as error:
        raise error.within(f"questions[{index}]") from None
    return _Case(index=index, question=question, answer=answer, row=row, flows=tuple(found))


def _left_out(cases: Sequence[_Case], flows: Sequence[Pair]) -> list[str]:
    """A line for each flow that some questions have no tokens of, with these questions."""
    lines = []
    for n, flow in enumerate(flows):
        without = [f"questions[{c.index}]" for c in cases if not c.flows[n].sources]
        if without:
            lines.append(
                f"{flow.label}: {counted(len(without), 'question')} without such tokens before the target: "
                + ", ".join(without)
            )
    return lines


def _measured(model: EditableModel, case: _Case, carried: Contributions, flows: Sequence[str]) -> QuestionAttention:
    labels, side = _labels(model, case.row)
    samples = {}
    for n, (flow, end) in enumerate(zip(flows, case.flows, strict=True)):
        if end.sources:
            lengths = carried.lengths[:, :, n, list(end.sources)].double().numpy()
            samples[flow] = FlowSample(
                tokens=tuple(labels[t] for t in end.sources), heads=lengths.sum(2), by_token=lengths.sum(1)
            )
    return QuestionAttention(
        question=case.question.prompt.text,
        answer=case.answer,
        image=_shown(model, case.question.prompt.images[0]) if side else None,
        side=side,
        flows=samples,
    )


def _labels(model: EditableModel, row: Encoded) -> tuple[list[str], int | None]:
    """What to call each token, and the patches a side of the only image. Its tokens are the tower's patches in
    row-major order.
    """
    labels = [repr(str(model.tokenizer.decode([i]))) for i in row.ids.tolist()]
    for n, image in enumerate(row.images):
        rows, columns = grid(row, n) or (0, 1)
        side = rows if rows == columns else None
        of = f" of image {n}" if len(row.images) > 1 else ""
        for i, t in enumerate(image):
            labels[t] = (f"patch {i // side}, {i % side}" if side else f"image token {i}") + of
    return labels, side if len(row.images) == 1 else None


def _shown(model: EditableModel, image: Image.Image) -> Image.Image:
    """The part of the image that the tower sees, so that its patches lie where they belong."""
    left, top, right, bottom = seen(model, image.size)
    width, height = image.size
    return image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


def _of_image(flow: Pair) -> bool:
    """Whether it comes from all image tokens and no other."""
    return flow.sources == (Group.IMAGE,)


def _numbers(result: AttentionResult, flow: str, of: Pair) -> tuple[Number, Number]:
    return extreme(
        result.layers(flow),
        _UNIT,
        value=f"{of.label}: largest contribution",
        layer=f"{of.label}: layer of the largest contribution",
    )


def _by_layer(result: AttentionResult, flow: str, of: Pair) -> LinePlot:
    samples = result.layers(flow)
    return LinePlot(
        name=f"layers_{of.name}",
        title=f"Attention contribution, {of.label}",
        x_label="layer",
        y_label=f"contribution ({_UNIT})",
        x=np.arange(samples.shape[1], dtype=np.float64),
        lines=(line(of.label, samples),),
        caption=f"{_SUMMED} heads and tokens; mean, n = {counted(len(samples), 'question')}; {INTERVAL}",
    )


def _by_head(result: AttentionResult, flow: str, of: Pair) -> HeatMap:
    heads = np.mean([s.heads for s in result.samples(flow)], axis=0)
    return HeatMap(
        name=f"heads_{of.name}",
        title=f"Attention contribution by head, {of.label}",
        x_label="head",
        y_label="layer",
        unit=f"contribution ({_UNIT})",
        rows=tuple(map(str, range(heads.shape[0]))),
        columns=tuple(map(str, range(heads.shape[1]))),
        grids=(Grid(label=of.label, values=heads),),
        caption=f"{_SUMMED} tokens; mean, n = {counted(len(result.samples(flow)), 'question')}",
    )


def _by_image_token(result: AttentionResult, flow: str, of: Pair) -> LinePlot | None:
    """The image's tokens in their order, where every question has as many: is it always the same few?"""
    samples = result.samples(flow)
    if not _of_image(of) or len({s.tokens for s in samples}) > 1:
        return None
    peak = result.peak(flow)
    values = np.stack([s.by_token[peak] for s in samples])
    return LinePlot(
        name=f"image_tokens_{of.name}",
        title=f"Contribution of each image token, {of.label}",
        x_label="image token",
        y_label=f"contribution ({_UNIT})",
        x=np.arange(values.shape[1], dtype=np.float64),
        lines=(line(f"layer {peak}", values),),
        caption=f"Layer {peak}. {_SUMMED} heads; mean, n = {counted(len(samples), 'question')}; {INTERVAL}",
    )


def _overlays(result: AttentionResult, flows: Mapping[str, Pair]) -> tuple[list[Overlay], list[str]]:
    """The first questions' images with what each patch contributes, and a line for those that cannot be shown."""
    shown: list[Overlay] = []
    for f, flow in flows.items():
        if not _of_image(flow):
            continue
        peak, square = result.peak(f), [q for q in result.questions if f in q.flows and q.side]
        for n, question in enumerate(square[: result.settings.overlays]):
            assert question.image is not None
            assert question.side is not None
            patches = question.flows[f].by_token[peak].reshape(question.side, question.side)
            shown.append(
                Overlay(
                    name=f"patches_{flow.name}_{n}",
                    title=f"“{question.question}” → “{question.answer}”",
                    unit=f"contribution ({_UNIT})",
                    image=question.image,
                    patches=patches,
                    caption=f"{flow.label} in layer {peak}, n = 1 question. {_SUMMED} heads",
                )
            )
    of_image = [f for f, flow in flows.items() if _of_image(flow)]
    unsquare = sum(not q.side and any(f in q.flows for f in of_image) for q in result.questions)
    if not unsquare:
        return shown, []
    return shown, [
        f"overlays: {counted(unsquare, 'question')} without a single image of square patches; no overlay is drawn"
    ]


def _tokens_table(result: AttentionResult, flow: str, of: Pair) -> Table:
    """The tokens that carry most at the flow's peak, by what they are, over all questions that have them."""
    peak = result.peak(flow)
    of_token: dict[str, list[float]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    for sample in result.samples(flow):
        carried = sample.by_token[peak]
        for token, value in zip(sample.tokens, carried, strict=True):
            of_token[token].append(float(value))
            shares[token].append(float(value / carried.sum()) if carried.any() else 0.0)
    most = sorted(of_token, key=lambda t: -float(np.mean(of_token[t])))[: result.settings.tokens]
    return Table(
        name=f"tokens_{of.name}",
        title=f"Tokens that carry most, {of.label}, layer {peak}",
        columns=("token", f"mean contribution ({_UNIT})", "mean share of the flow", "times"),
        rows=tuple(
            (t, f"{np.mean(of_token[t]):.3f}", f"{np.mean(shares[t]):.1%}", str(len(of_token[t]))) for t in most
        ),
    )
