"""Foreseeing wrong answers (methods.md §3; Basu et al. 2024, §5): by attention contributions and by confidence.

Two kinds of scores, both higher where the answer should be likelier right: what the constraint's tokens contribute to
the last token of the prompt, as the mean over a window of middle layers; and the model's confidence, p of the answer it
generated, whole or of its first token alone (a text that is no chat runs on after its answer: there the first token
tells more). How well a score tells wrong from right answers is its AUROC: the probability that a wrong answer scores
lower than a right one, a tie counting half.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from errata.editor.errors import CancelledError, InvalidInputError, check_numbers
from errata.editor.measurements.contributions import contributions, output_factors
from errata.editor.measurements.findings import Findings, Line, LinePlot, Number, Table, described
from errata.editor.measurements.flows import Ends, ends, flow_of
from errata.editor.measurements.intervals import INTERVAL, bounded, interval, line
from errata.editor.measurements.positions import Pair
from errata.editor.measurements.questions import Cancelled, Progress, Question, asked, gives
from errata.editor.measurements.roc import GRID, Draws, auroc, roc, stratified
from errata.editor.model import Answer, EditableModel, Encoded, by_length, same_answer

_SHOWN = 10


class Predictor(StrEnum):
    """What a wrong answer is foreseen by."""

    CONTRIBUTION = "attention contribution"
    CONFIDENCE = "confidence, p(answer)"
    FIRST = "confidence, p(first token)"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureSettings:
    """What the predictors are made from.

    `flow` is whose contribution counts, `source->target` as in `AttentionSettings`; `first_layer` and `last_layer`
    bound the layers where it counts, both included; None: the middle third. `abstentions` are answers by which the
    model itself says that it does not know: there is no failure to foresee, so such questions are left out.
    `max_new_tokens` bounds an answer and `batch_size` the questions in one pass, both ≥ 1. The bootstrap makes `draws`,
    ≥ 1, of the wrong and of the right answers separately, from `seed`.
    """

    flow: str = "constraint->last"
    first_layer: int | None = None
    last_layer: int | None = None
    abstentions: tuple[str, ...] = ()
    max_new_tokens: int = 16
    batch_size: int = 16
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"max_new_tokens": 1, "batch_size": 1, "draws": 1, "seed": 0, "first_layer": 0, "last_layer": 0}
        check_numbers(self, at_least=least, above={})
        self.parsed()

    def parsed(self) -> Pair:
        """The flow. Raises InvalidInputError where it names no two groups."""
        return flow_of(self.flow, field="flow")

    def window(self, model: EditableModel) -> range:
        """The layers whose contributions count. Raises LayerError, and InvalidInputError for a window of none."""
        layers = len(model.layers)
        first = layers // 3 if self.first_layer is None else self.first_layer
        last = layers - layers // 3 - 1 if self.last_layer is None else self.last_layer
        model.check_layers((first,), "first_layer")
        model.check_layers((last,), "last_layer")
        if first > last:
            raise InvalidInputError(f"layers {first} to {last} are none; give the lower one first", field="first_layer")
        return range(first, last + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureResult:
    """The scores of every question and whether its answer was right.

    `contributions` are norms in the residual stream, summed over heads and the flow's sources; `window` the layers
    that count.
    """

    settings: FailureSettings
    window: range
    questions: tuple[str, ...]
    expected: tuple[str, ...]
    answers: tuple[str, ...]
    right: Bool[NDArray[np.bool_], " questions"]
    contributions: Float[NDArray[np.float64], "questions layers"]
    confidence: Float[NDArray[np.float64], " questions"]
    first: Float[NDArray[np.float64], " questions"]
    skipped: tuple[str, ...]

    def scores(self, predictor: Predictor) -> Float[NDArray[np.float64], " questions"]:
        """A predictor's score of each question; the lower, the likelier wrong."""
        match predictor:
            case Predictor.CONTRIBUTION:
                mean: NDArray[np.float64] = self.contributions[:, self.window.start : self.window.stop].mean(1)
                return mean
            case Predictor.CONFIDENCE:
                return self.confidence
            case Predictor.FIRST:
                return self.first

    def auroc(self, predictor: Predictor) -> float:
        """How well it tells wrong from right answers, 0 … 1; 0.5 is chance."""
        return float(auroc(self.scores(predictor), self.right)[0])

    def findings(self) -> Findings:
        """AUROCs, ROC curves, contributions of right and wrong answers by layer; 95 % bootstrap intervals."""
        return Findings(
            kind="failure",
            title="Failure prediction",
            settings={
                **described(self.settings),
                "first_layer": str(self.window.start),
                "last_layer": str(self.window.stop - 1),
            },
            n=len(self.questions),
            numbers=tuple(_numbers(self)),
            plots=(_roc_plot(self), _layers_plot(self), _auroc_plot(self)),
            tables=(_surest_wrong(self),),
            skipped=self.skipped,
        )


def measure_failure(
    model: EditableModel,
    questions: Sequence[Question],
    settings: FailureSettings = FailureSettings(),
    *,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> FailureResult:
    """Asks every question, and scores its answer by both kinds of predictors in one further pass.

    Raises InvalidInputError for a question without an answer, and where all answers are right or all wrong;
    CancelledError.
    """
    expected = _expected(questions)
    window = settings.window(model)
    told = asked(model, questions, max_new_tokens=settings.max_new_tokens)
    kept, skipped = _kept(model, told, settings)
    right = np.array([gives(questions[i], told[i].text) for i in kept], dtype=bool)
    _check_both(right, skipped)
    cases = [_case(model, i, questions[i], told[i], settings.parsed()) for i in kept]
    carried, (confidence, first) = _scored(model, cases, settings.batch_size, progress, cancelled)
    return FailureResult(
        settings=settings,
        window=window,
        questions=tuple(questions[i].prompt.text for i in kept),
        expected=tuple(expected[i] for i in kept),
        answers=tuple(told[i].text for i in kept),
        right=right,
        contributions=carried,
        confidence=confidence,
        first=first,
        skipped=skipped,
    )


@dataclass(frozen=True, slots=True)
class _Case:
    """A question with the model's answer after it, and the tokens of the flow that is scored."""

    row: Encoded
    flow: Ends


def _case(model: EditableModel, index: int, question: Question, answer: Answer, flow: Pair) -> _Case:
    try:
        row = model.encode(question.prompt)
        found = ends(model, question, row, (flow,))[0]
    except InvalidInputError as error:
        raise error.within(f"questions[{index}]") from None
    if not found.sources:
        raise InvalidInputError(
            f"{question.prompt.text!r} has no tokens of the flow {flow.label} before its target; choose another flow",
            field=f"questions[{index}].prompt",
        )
    return _Case(_with_answer(model, row, answer), found)


def _with_answer(model: EditableModel, row: Encoded, answer: Answer) -> Encoded:
    """The row with the very tokens that were generated after it, and the end where the model came to one."""
    ids = torch.tensor([*answer.tokens, *([model.end_token_id] if answer.finished else [])], dtype=torch.long)
    return replace(row, ids=torch.cat([row.ids, ids]), spans=(*row.spans, *(None for _ in ids)))


def _scored(
    model: EditableModel,
    cases: Sequence[_Case],
    batch_size: int,
    progress: Progress | None,
    cancelled: Cancelled | None,
) -> tuple[Float[NDArray[np.float64], "questions layers"], Float[NDArray[np.float64], "2 questions"]]:
    """Of every case, what the flow carries at each layer, and p of the whole answer and of its first token."""
    carried, confidences = np.zeros((len(cases), len(model.layers))), np.zeros((2, len(cases)))
    factors, done = output_factors(model), 0
    for batch in by_length([c.row for c in cases], batch_size):
        if cancelled and cancelled():
            raise CancelledError("the prediction of failure was cancelled; nothing was changed")
        rows, targets = [cases[n].row for n in batch], [[cases[n].flow.target] for n in batch]
        for n, found in zip(batch, contributions(model, rows, targets, factors), strict=True):
            carried[n] = found.lengths[:, :, 0, list(cases[n].flow.sources)].double().sum((1, 2)).numpy()
            confidences[:, n] = found.answer.double().sum().exp(), found.answer[0].double().exp()
        done += len(batch)
        if progress:
            progress(done, len(cases))
    return carried, confidences


def _kept(model: EditableModel, told: Sequence[Answer], settings: FailureSettings) -> tuple[list[int], tuple[str, ...]]:
    """The questions whose answers are judged, and a line for each other."""
    kept, skipped = [], []
    for i, answer in enumerate(told):
        if any(same_answer(answer.text, abstention) for abstention in settings.abstentions):
            skipped.append(f"questions[{i}]: {answer.text!r} is no failure to foresee")
        elif model.image_token_id in answer.tokens:
            skipped.append(f"questions[{i}]: the answer holds an image token, so its probability cannot be read")
        else:
            kept.append(i)
    return kept, tuple(skipped)


def _check_both(right: NDArray[np.bool_], skipped: Sequence[str]) -> None:
    if right.any() and not right.all():
        return
    what = "right" if right.any() else "wrong"
    left_out = f" {len(skipped)} were left out, the first: {skipped[0]}" if skipped else ""
    raise InvalidInputError(
        f"all {len(right)} answers are {what}: foreseeing failure needs right and wrong ones; give "
        f"{'harder' if right.any() else 'easier'} questions too.{left_out}",
        field="questions",
    )


def _expected(questions: Sequence[Question]) -> tuple[str, ...]:
    for i, question in enumerate(questions):
        if not (question.answer or "").strip():
            raise InvalidInputError(
                f"{question.prompt.text!r} has no right answer to judge by; give it", field=f"questions[{i}].answer"
            )
    return tuple(q.answer for q in questions if q.answer is not None)


def _numbers(result: FailureResult) -> Iterator[Number]:
    n, draws = len(result.right), _draws(result)
    drawn = {p: auroc(result.scores(p), result.right, draws) for p in Predictor}
    for predictor in Predictor:
        yield bounded(f"AUROC: {predictor}", result.auroc(predictor), "", n, drawn[predictor])
    yield bounded(
        "AUROC: confidence minus contribution",
        result.auroc(Predictor.CONFIDENCE) - result.auroc(Predictor.CONTRIBUTION),
        "",
        n,
        drawn[Predictor.CONFIDENCE] - drawn[Predictor.CONTRIBUTION],
    )
    yield Number(name="wrong answers", value=float((~result.right).mean()), unit="share", n=n)


def _draws(result: FailureResult) -> Draws:
    return stratified(result.right, result.settings.draws, result.settings.seed)


def _roc_plot(result: FailureResult) -> LinePlot:
    draws, (wrong, right) = _draws(result), _counts(result)
    lines = []
    for predictor in Predictor:
        scores = result.scores(predictor)
        low, high = interval(roc(scores, result.right, draws))
        (values,) = roc(scores, result.right)
        lines.append(Line(label=f"{predictor} ({result.auroc(predictor):.2f})", values=values, low=low, high=high))
    return LinePlot(
        name="roc",
        title="Wrong answers foreseen",
        x_label="share of right answers flagged",
        y_label="share of wrong answers flagged",
        x=GRID,
        lines=(*lines, Line(label="chance", values=GRID)),
        caption=f"{wrong} wrong and {right} right answers; AUROC in brackets; 95 % stratified bootstrap intervals",
    )


def _counts(result: FailureResult) -> tuple[int, int]:
    """Wrong and right answers."""
    return int((~result.right).sum()), int(result.right.sum())


def _layers_plot(result: FailureResult) -> LinePlot:
    wrong, right = _counts(result)
    return LinePlot(
        name="contribution_by_answer",
        title=f"Attention contribution, {result.settings.parsed().label}",
        x_label="layer",
        y_label="contribution (norm)",
        x=np.arange(result.contributions.shape[1], dtype=np.float64),
        lines=(
            line("right answers", result.contributions[result.right]),
            line("wrong answers", result.contributions[~result.right]),
        ),
        caption=f"Norms in the residual stream, mean of {right} right and {wrong} wrong answers; {INTERVAL}; the "
        f"score is the mean over layers {result.window.start} to {result.window.stop - 1}",
    )


def _auroc_plot(result: FailureResult) -> LinePlot:
    """The contribution of each layer alone as a predictor: exploration, no layer was chosen by it."""
    draws, layers = _draws(result), result.contributions.T
    bounds = [interval(auroc(scores, result.right, draws)) for scores in layers]
    return LinePlot(
        name="auroc_by_layer",
        title=f"AUROC of each layer's contribution, {result.settings.parsed().label}",
        x_label="layer",
        y_label="AUROC",
        x=np.arange(len(layers), dtype=np.float64),
        lines=(
            Line(
                label="contribution of one layer",
                values=np.concatenate([auroc(scores, result.right) for scores in layers]),
                low=np.array([low for low, _ in bounds]),
                high=np.array([high for _, high in bounds]),
            ),
            Line(label="chance", values=np.full(len(layers), 0.5)),
        ),
        caption="95 % stratified bootstrap intervals",
    )


def _surest_wrong(result: FailureResult) -> Table:
    """What confidence alone will not find."""
    wrong = np.flatnonzero(~result.right)
    surest = wrong[np.argsort(-result.confidence[wrong], kind="stable")][:_SHOWN]
    return Table(
        name="surest_wrong",
        title="Wrong answers the model was surest of",
        columns=("question", "answered", "expected", "p(answer)"),
        rows=tuple(
            (result.questions[i], result.answers[i], result.expected[i], f"{result.confidence[i]:.3f}") for i in surest
        ),
    )
