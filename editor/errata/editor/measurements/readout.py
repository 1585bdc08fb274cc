"""MLP read-out of a fact: which neurons speak at the constraint, what they say, and what an edit wrote.

At a layer the MLP puts out v = W k: a sum of W's columns, each weighed by one entry of the key k, the input of the
down-projection at the constraint's last token (methods.md §5). The neurons that matter most are those of the largest
|kᵢ|·‖W[:, i]‖. What a vector promotes is read in the vocabulary: its product with the head's matrix, *without* the
final norm, the largest entries first (Geva et al. 2022, §3). A neuron's vector is kᵢ·W[:, i], so that one with a
negative key promotes what its column suppresses. The whole output v is read in the same way, and so is ΔW k, which is
exactly what an edit wrote there.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from errata.editor.delta import Delta, applied, check_base, check_fit
from errata.editor.errors import CancelledError, InvalidInputError, check_numbers
from errata.editor.measurements.findings import Findings, Grid, HeatMap, Number, Table
from errata.editor.measurements.intervals import number
from errata.editor.measurements.promoted import LayerReadout, Promoted, Reader, State
from errata.editor.measurements.questions import Cancelled, Progress, Question, asked
from errata.editor.model import EditableModel, Encoded
from errata.editor.recording import record
from errata.editor.report.wording import MISSING, counted, plain
from errata.editor.requests import Context
from errata.editor.states import Component

_OUTPUTS = ("output before", "written change", "output after")
"""v of the model as it is given, ΔW k, v of the edited model: what is read, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadoutSettings:
    """What is read.

    `layers` are read; none: the edited ones, or all where nothing is edited. `neurons`, ≥ 0, are shown of each layer
    and `tokens`, ≥ 1, of each vector. `max_new_tokens`, ≥ 1, bounds an answer.
    """

    layers: tuple[int, ...] = ()
    neurons: int = 5
    tokens: int = 8
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        check_numbers(self, at_least={"neurons": 0, "tokens": 1, "max_new_tokens": 1}, above={})
        if list(self.layers) != sorted(set(self.layers)):
            raise InvalidInputError(f"layers {self.layers} must be given once each, in rising order", field="layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class FactReadout:
    """One question: the target whose first token is followed, and what the model says before and after."""

    question: str
    target: str
    said_before: str
    said_after: str
    layers: tuple[LayerReadout, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadoutResult:
    """The read-out of every question.

    `ranks` are those of the target's first token among what v before, ΔW k and v after promote, from 1 for the most;
    NaN for ΔW k at a layer that is not edited. `shares` are ‖ΔW k‖ / ‖W k‖, 0 there. `vocabulary` is the number of
    tokens.
    """

    settings: ReadoutSettings
    layers: tuple[int, ...]
    edited: tuple[int, ...]
    facts: tuple[FactReadout, ...]
    ranks: Float[NDArray[np.float64], "questions layers before_written_after"]
    shares: Float[NDArray[np.float64], "questions layers"]
    vocabulary: int
    skipped: tuple[str, ...] = ()

    def findings(self) -> Findings:
        """The read-out as numbers of each layer, a heat map of the target's ranks, and tables of what is promoted."""
        return Findings(
            kind="readout",
            title="MLP read-out: what the layers promote at the constraint",
            settings={
                "layers": ", ".join(map(str, self.layers)),
                "edited layers": ", ".join(map(str, self.edited)) or "none",
                "neurons": str(self.settings.neurons),
                "tokens": str(self.settings.tokens),
                "vocabulary": f"{self.vocabulary} tokens, by the head without the final norm",
            },
            n=len(self.facts),
            numbers=tuple(self._numbers()),
            plots=(self._map(),),
            tables=(self._facts(), self._outputs(), self._neurons()),
            skipped=self.skipped,
        )

    def _numbers(self) -> list[Number]:
        found = []
        for n, layer in enumerate(self.layers):
            for o, what in enumerate(_OUTPUTS if layer in self.edited else _OUTPUTS[:1]):
                told = f"rank of the target in the {what} at layer {layer}, geometric mean"
                found.append(_geometric(told, "rank", self.ranks[:, n, o]))
            if layer in self.edited:
                told = f"norm of the written change over the norm of W k at layer {layer}, mean"
                found.append(number(told, self.shares[:, n], "ratio"))
        return found

    def _map(self) -> HeatMap:
        shown = _OUTPUTS if self.edited else _OUTPUTS[:1]
        return HeatMap(
            name="target_ranks",
            title="Where the target stands among what the MLP promotes",
            x_label="layer",
            y_label="question and target",
            unit="log10 of the target's rank",
            rows=tuple(f"{n}: {plain(f.target, 30)}" for n, f in enumerate(self.facts)),
            columns=tuple(map(str, self.layers)),
            grids=tuple(Grid(label=o, values=np.log10(self.ranks[:, :, n])) for n, o in enumerate(shown)),
            caption=(
                f"n = {counted(len(self.facts), 'question')}, the target's first token at the constraint's last one; "
                f"0 is the most promoted of {self.vocabulary:,} tokens"
            ),
        )

    def _facts(self) -> Table:
        rows = [
            (str(n), plain(f.question), plain(f.target), plain(f.said_before), plain(f.said_after))
            for n, f in enumerate(self.facts)
        ]
        columns = ("#", "question", "target", "said before", "said after")
        return Table(name="facts", title="The questions read", columns=columns, rows=tuple(rows))

    def _outputs(self) -> Table:
        rows = []
        for n, fact in enumerate(self.facts):
            for i, read in enumerate(fact.layers):
                share = f"{self.shares[n, i]:.2f}" if read.layer in self.edited else MISSING
                promoted = read.before, read.written, read.after if self.edited else None
                shown = [
                    f"{_list(p)} (target {r:.0f})" if p else MISSING
                    for p, r in zip(promoted, self.ranks[n, i], strict=True)
                ]
                rows.append((str(n), str(read.layer), share, *shown))
        columns = ("#", "layer", "‖ΔWk‖/‖Wk‖", "v before promotes", "ΔWk promotes", "v after promotes")
        title = "What the whole MLP promotes, and the rank of the target's first token"
        return Table(name="outputs", title=title, columns=columns, rows=tuple(rows))

    def _neurons(self) -> Table:
        rows = [
            (
                *(str(n), str(read.layer), str(u.index), f"{u.key:+.3g}", f"{u.norm:.3g}"),
                *(_list(u.before), _list(u.after) if read.layer in self.edited else MISSING),
            )
            for n, fact in enumerate(self.facts)
            for read in fact.layers
            for u in read.neurons
        ]
        columns = ("#", "layer", "neuron", "key", "‖W[:, i]‖", "promotes before", "promotes after")
        return Table(name="neurons", title="Key neurons by |kᵢ|·‖W[:, i]‖", columns=columns, rows=tuple(rows))


def measure_readout(
    model: EditableModel,
    questions: Sequence[Question],
    settings: ReadoutSettings = ReadoutSettings(),
    *,
    delta: Delta | None = None,
    progress: Progress | None = None,
    cancelled: Cancelled | None = None,
) -> ReadoutResult:
    """Reads the MLPs at each question's first constraint, in the model as it is given and with `delta` on top.

    A question's `answer` is the target; None: what the edited model says. Later layers see the edits below them, so
    that ΔW k is with the edited model's own key. Raises InvalidInputError and its kinds, WrongBaseError and DeltaError
    for a delta of another model, CancelledError. A question whose answer is empty is skipped.
    """
    edited, layers = _layers(model, settings, delta)
    sites = _sites(model, questions)
    tell = progress or (lambda *_: None)
    before, said_before = _run(model, questions, sites, layers, settings)
    with applied(model, delta) if delta else nullcontext():
        after, said_after = _run(model, questions, sites, layers, settings)
    changes = {i: delta.layers[i].dense() for i in edited} if delta else {}
    reader = Reader(model, changes, neurons=settings.neurons, tokens=settings.tokens)
    facts, ranks, shares, skipped = [], [], [], []
    for i, (question, old, new) in enumerate(zip(questions, before, after, strict=True)):
        if cancelled and cancelled():
            raise CancelledError("the read-out was cancelled; nothing was changed")
        target = question.answer if question.answer is not None else said_after[i]
        if not target.strip():
            skipped.append(f"questions[{i}]: {question.prompt.text!r} is answered with nothing; give its target")
            continue
        token = _first_token(model, question, target, i)
        facts.append(
            FactReadout(
                question=question.prompt.text,
                target=target,
                said_before=said_before[i],
                said_after=said_after[i],
                layers=tuple(reader.layer(layer, n, old, new) for n, layer in enumerate(layers)),
            )
        )
        ranks.append([reader.ranks(layer, n, old, new, token) for n, layer in enumerate(layers)])
        shares.append([reader.share(layer, n, new) for n, layer in enumerate(layers)])
        tell(i + 1, len(questions))
    if not facts:
        raise InvalidInputError(f"nothing is left to read: {'; '.join(skipped)}", field="questions")
    return ReadoutResult(
        settings=settings,
        layers=layers,
        edited=tuple(i for i in edited if i in layers),
        facts=tuple(facts),
        ranks=np.array(ranks, dtype=np.float64),
        shares=np.array(shares, dtype=np.float64),
        vocabulary=reader.vocabulary,
        skipped=tuple(skipped),
    )


def _layers(
    model: EditableModel, settings: ReadoutSettings, delta: Delta | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers that are edited, and those that are read. Raises LayerError, WrongBaseError and DeltaError."""
    edited = tuple(sorted(delta.layers)) if delta else ()
    layers = settings.layers or edited or tuple(range(len(model.layers)))
    model.check_layers(layers, field="layers")
    if delta:
        check_base(delta, model)
        check_fit(delta, model)
    return edited, layers


def _sites(model: EditableModel, questions: Sequence[Question]) -> list[tuple[Encoded, int]]:
    if not questions:
        raise InvalidInputError("no question given", field="questions")
    return [
        model.encode_at(Context(prompt=q.prompt, constraint=q.constraints[0]), field=f"questions[{i}]")
        for i, q in enumerate(questions)
    ]


def _run(
    model: EditableModel,
    questions: Sequence[Question],
    sites: Sequence[tuple[Encoded, int]],
    layers: Sequence[int],
    settings: ReadoutSettings,
) -> tuple[list[State], list[str]]:
    """What the model computes at each site, and what it says, as it stands."""
    rows, tokens = zip(*sites, strict=True)
    recorded = record(model, rows, tokens, components=(Component.MLP,), key_layers=layers, resumable=False)
    states = [
        State(
            keys=torch.stack([r.keys[layer][0] for layer in layers]).double().cpu(),
            outputs=r.outputs[Component.MLP][list(layers), 0].double().cpu(),
        )
        for r in recorded
    ]
    answers = asked(model, questions, max_new_tokens=settings.max_new_tokens)
    return states, [a.text for a in answers]


def _first_token(model: EditableModel, question: Question, target: str, index: int) -> int:
    try:
        return int(model.encode(question.prompt, target).answer[0])
    except InvalidInputError as error:
        raise error.within(f"questions[{index}]") from None


def _list(promoted: Promoted) -> str:
    """The tokens as words in a row: a space at the start of a token is a word's, not shown; a bare one is ␣."""
    return ", ".join(plain(t, 22).strip() or "␣" for t in promoted.tokens)


def _geometric(name: str, unit: str, samples: Float[NDArray[np.float64], " questions"]) -> Number:
    """The geometric mean."""
    found = number(name, np.log10(samples), unit)
    low, high = (None if bound is None else 10.0**bound for bound in (found.low, found.high))
    return replace(found, value=10.0**found.value, low=low, high=high)
