"""The logit lens: the answer's probability read at each layer's last position, with the final norm and the head
(Zhang et al. 2025, §5; methods.md §4).

Read after the last layer it is the model's own probability. One pass of the prompts gives every layer.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from errata.editor.errors import CancelledError, InvalidInputError, check_numbers
from errata.editor.measurements.findings import Findings, LinePlot, Number, Table
from errata.editor.measurements.intervals import INTERVAL, bootstrap_means, bounded, line
from errata.editor.measurements.questions import Cancelled, Progress, Question, answered
from errata.editor.model import EditableModel, Encoded, by_length
from errata.editor.recording import record
from errata.editor.report.wording import counted
from errata.editor.states import Component, logits_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LensSettings:
    """How much is read at once. `max_rows`, ≥ 1, is the most questions in one batch, and bounds memory."""

    max_rows: int = 64

    def __post_init__(self) -> None:
        check_numbers(self, at_least={"max_rows": 1}, above={})


@dataclass(frozen=True, slots=True, kw_only=True)
class LensResult:
    """What each layer's output says at the prompt's last position.

    `answer` is the probability of the answer's first token, `top` that of the likeliest token, which `tokens` names;
    `first` says whether that is the answer's.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    answer: Float[NDArray[np.float64], "questions layers"]
    top: Float[NDArray[np.float64], "questions layers"]
    first: Bool[NDArray[np.bool_], "questions layers"]
    tokens: tuple[tuple[str, ...], ...]
    settings: LensSettings
    skipped: tuple[str, ...]

    def findings(self) -> Findings:
        """Plots of the probabilities and of the share of questions whose answer leads; the tokens that lead most."""
        n, layers = self.answer.shape
        over = f"mean, n = {counted(n, 'question')}; {INTERVAL}"
        shares = 100 * self.first.astype(np.float64)
        axis, x = "layer", np.arange(layers, dtype=np.float64)
        return Findings(
            kind="lens",
            title="Logit lens",
            settings={"max_rows": str(self.settings.max_rows)},
            n=n,
            numbers=(self._leads(shares),),
            plots=(
                LinePlot(
                    name="probability",
                    title="The answer at each layer's last position",
                    x_label=axis,
                    y_label="probability",
                    x=x,
                    lines=(line("answer", self.answer), line("likeliest token", self.top)),
                    caption=f"p(answer's first token) and p(likeliest token) by final norm and head: {over}",
                ),
                LinePlot(
                    name="leads",
                    title="Questions whose answer leads at a layer's last position",
                    x_label=axis,
                    y_label="questions, %",
                    x=x,
                    lines=(line("answer leads", shares),),
                    caption=f"Whether the likeliest token is the answer's first: {over}",
                ),
            ),
            tables=(self._leaders(),),
            skipped=self.skipped,
        )

    def _leads(self, shares: Float[NDArray[np.float64], "questions layers"]) -> Number:
        """From which layer on the answer leads in at least half of the questions, to the last."""
        value, draws = float(_half(shares.mean(0)[None])[0]), _half(bootstrap_means(shares))
        return bounded("the answer leads in half of the questions from", value, "layer", len(shares), draws)

    def _leaders(self) -> Table:
        rows = []
        for layer, tokens in enumerate(zip(*self.tokens, strict=True)):
            common = Counter(tokens).most_common(3)
            rows.append((str(layer), ", ".join(f"{token!r} ({100 * k / len(tokens):.0f} %)" for token, k in common)))
        title = "Likeliest tokens at each layer's last position (share of questions)"
        return Table(name="leaders", title=title, columns=("layer", "tokens"), rows=tuple(rows))


def _half(shares: Float[NDArray[np.float64], "draws layers"]) -> Float[NDArray[np.float64], " draws"]:
    """The layer from which on a share is at least 50 %; the number of layers where the last one's is less."""
    below = shares < 50
    layers: NDArray[np.float64] = np.where(below.any(1), shares.shape[1] - below[:, ::-1].argmax(1), 0).astype(float)
    return layers


def measure_lens(
    model: EditableModel,
    questions: Sequence[Question],
    settings: LensSettings = LensSettings(),
    *,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> LensResult:
    """Reads the answer at every layer, for each question that the model answers as it says.

    Raises InvalidInputError where no question is left to measure, CancelledError.
    """
    kept, skipped = answered(model, questions)
    rows = [_row(model, i, question, answer) for i, question, answer in kept]
    shape = (len(rows), len(model.layers))
    answer, top, token = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.int64)
    done = 0
    for batch in by_length(rows, settings.max_rows):
        if cancelled and cancelled():
            raise CancelledError("the logit lens was cancelled; nothing was changed")
        answer[batch], top[batch], token[batch] = _read(model, [rows[i] for i in batch])
        done += len(batch)
        if progress:
            progress(done, len(rows))
    firsts = np.array([int(row.answer[0]) for row in rows])
    return LensResult(
        questions=tuple(q.prompt.text for _, q, _ in kept),
        answers=tuple(a for _, _, a in kept),
        answer=answer,
        top=top,
        first=token == firsts[:, None],
        tokens=tuple(tuple(str(model.tokenizer.decode([t])) for t in by_layer) for by_layer in token.tolist()),
        settings=settings,
        skipped=tuple(skipped),
    )


def _row(model: EditableModel, index: int, question: Question, answer: str) -> Encoded:
    try:
        return model.encode(question.prompt, answer)
    except InvalidInputError as error:
        raise error.within(f"questions[{index}]") from None


def _read(
    model: EditableModel, rows: Sequence[Encoded]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """p(answer's first token), p(likeliest token) and that token, questions × layers, of rows of one length."""
    ends = [row.prompt_length - 1 for row in rows]
    recordings = record(model, rows, ends, components=(Component.LAYER,), resumable=False, batch_size=len(rows))
    firsts = torch.stack([row.answer[0] for row in rows]).to(model.device)
    answer = np.zeros((len(rows), len(model.layers)))
    top, token = np.zeros_like(answer), np.zeros_like(answer, dtype=np.int64)
    with torch.no_grad():
        # One layer at a time: the vocabulary is wide.
        for layer in range(len(model.layers)):
            hidden = torch.stack([r.outputs[Component.LAYER][layer, 0] for r in recordings])
            p = logits_of(model, hidden).double().softmax(-1)
            best = p.max(-1)
            answer[:, layer] = p.gather(-1, firsts[:, None])[:, 0].cpu()
            top[:, layer], token[:, layer] = best.values.cpu(), best.indices.cpu()
    return answer, top, token
