"""How a layer sweep is made, and what it found: measures of edits by layer, beside the AIE, and their correlation."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from errata.editor.errors import InvalidInputError, check_numbers
from errata.editor.measurements.findings import Findings, Line, LinePlot, Number, Scatter, Table, described
from errata.editor.measurements.intervals import bootstrap_means, interval
from errata.editor.methods import EditSettings, Keys, Method
from errata.editor.report.wording import MISSING, counted
from errata.editor.values import ValueSettings

_SHOWN = ("efficacy", "generalization", "specificity")
"""The measures that are drawn; the table has all."""

Bounds = tuple[Float[NDArray[np.float64], " layers"], Float[NDArray[np.float64], " layers"]]
"""The lower and the upper bounds of 95 % intervals, by layer."""

_FEWEST_LAYERS = 3
"""Two points always lie on a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """How a sweep edits and judges.

    `layers` are edited one by one; none: all. `together` edits all requests of a layer as one batch, else each alone.
    `method` to `null_energy` are `EditSettings`, `steps` to `most_contexts` are `ValueSettings`, with their units.
    `max_new_tokens`, ≥ 1, bounds an answer. `at_once`, ≥ 1, is how many requests are worked on at a time, and bounds
    memory.
    """

    layers: tuple[int, ...] = ()
    together: bool = False
    method: Method = Method.MEMIT
    keys: Keys = Keys.EACH
    ridge: float | None = None
    preservation: float = 150.0
    null_energy: float = 0.02
    steps: int = 150
    learning_rate: float = 0.2
    clamp: float = 3.0
    decay: float = 1e-3
    kl_weight: float = 1.0
    stop_loss: float = 0.02
    most_contexts: int = 12
    max_new_tokens: int = 16
    at_once: int = 32

    def __post_init__(self) -> None:
        self.edit_at((0,))
        check_numbers(self, at_least={"max_new_tokens": 1, "at_once": 1}, above={})
        if list(self.layers) != sorted(set(self.layers)):
            raise InvalidInputError(f"layers {self.layers} must be given once each, in rising order", field="layers")

    def edit_at(self, layers: tuple[int, ...]) -> EditSettings:
        """The settings of an edit at these layers."""
        values = ValueSettings(
            **{f.name: getattr(self, f.name) for f in fields(ValueSettings) if hasattr(self, f.name)}
        )
        return EditSettings(
            layers=layers,
            method=self.method,
            keys=self.keys,
            values=values,
            ridge=self.ridge,
            preservation=self.preservation,
            null_energy=self.null_energy,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult:
    """What the edits at each layer achieved, and what the trace says of it.

    `shares` are shares of probes passed, one a request; NaN where a request has no probe of the measure. An edit that
    installed nothing is judged as the parent: its efficacy is 0 and it is perfectly specific. `losses` are the target
    losses in nats where the descents ended (NaN where a batch was refused), `installed` says which edits changed
    anything. `effects` are the indirect effects of each layer's MLP at the constraint's last token, one a traced
    question. `failed` has a line for each layer and reason with edits that installed nothing, `skipped` one for each
    request left out.
    """

    settings: SweepSettings
    layers: tuple[int, ...]
    requests: tuple[str, ...]
    measures: tuple[str, ...]
    shares: Float[NDArray[np.float64], "measures requests layers"]
    losses: Float[NDArray[np.float64], "requests layers"]
    installed: Bool[NDArray[np.bool_], "requests layers"]
    effects: Float[NDArray[np.float64], "traced layers"]
    total_effect: float
    window: int
    failed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def mean(self, measure: str) -> Float[NDArray[np.float64], " layers"]:
        """The mean share of a measure at each layer, over the requests that have it."""
        samples = self._of(measure)
        mean: NDArray[np.float64] = samples[~np.isnan(samples[:, 0])].mean(0)
        return mean

    def interval(self, measure: str) -> Bounds:
        """Its 95 % interval by a bootstrap over requests."""
        return interval(self._drawn(measure))

    @property
    def aie(self) -> Float[NDArray[np.float64], " layers"]:
        """The AIE of each layer's MLP at the constraint's last token."""
        mean: NDArray[np.float64] = self.effects.mean(0)
        return mean

    @property
    def aie_interval(self) -> Bounds:
        """Its 95 % interval by a bootstrap over traced questions."""
        return interval(bootstrap_means(self.effects))

    def correlation(self, measure: str, *, ranks: bool = False) -> tuple[float, float, float]:
        """Pearson's correlation over layers of a measure with the AIE, or Spearman's of their `ranks`, and the bounds
        of its 95 % interval.

        By a bootstrap over requests and, independently, over traced questions; the layers are the model's own and are
        not drawn. NaN where there are fewer than three layers, or where one of the two is the same at all of them.
        """
        value = _correlation(self.mean(measure)[None], self.aie[None], ranks=ranks)[0]
        # Both are drawn with one seed: turned round, the draws of the one do not depend on the other's.
        drawn = _correlation(self._drawn(measure), bootstrap_means(self.effects)[::-1], ranks=ranks)
        low, high = interval(drawn[~np.isnan(drawn)]) if not np.isnan(value) else (np.nan, np.nan)
        return float(value), float(low), float(high)

    def findings(self) -> Findings:
        """The sweep as numbers, a line plot by layer, a scatter plot of efficacy over AIE, and tables."""
        numbers, undefined = self._numbers()
        ridge = {"ridge": "the method's own"} if self.settings.ridge is None else {}
        return Findings(
            kind="sweep",
            title="Layer sweep: edits at each layer beside the causal trace",
            settings=described(replace(self.settings, layers=self.layers)) | ridge,
            n=len(self.requests),
            numbers=numbers,
            plots=(self._lines(), self._scatter()),
            tables=(self._table(), *_notes((*self.failed, *undefined))),
            skipped=self.skipped,
        )

    def _of(self, measure: str) -> Float[NDArray[np.float64], "requests layers"]:
        if measure not in self.measures:
            raise InvalidInputError(f"no probe measured {measure!r}; ask one that does", field="measure")
        samples: NDArray[np.float64] = self.shares[self.measures.index(measure)]
        return samples

    def _drawn(self, measure: str) -> Float[NDArray[np.float64], "draws layers"]:
        """Bootstrapped means; a request without a probe of the measure has none in any layer."""
        samples = self._of(measure)
        return bootstrap_means(samples[~np.isnan(samples[:, 0])])

    def _numbers(self) -> tuple[tuple[Number, ...], tuple[str, ...]]:
        numbers, undefined = [], []
        for measure in (m for m in _SHOWN if m in self.measures):
            for name, ranks in (("Pearson", False), ("Spearman", True)):
                value, low, high = self.correlation(measure, ranks=ranks)
                told = f"{name} correlation of {measure} with AIE over layers"
                if np.isnan(value):
                    undefined.append(f"{told}: undefined over {counted(len(self.layers), 'layer')} with these values")
                    continue
                numbers.append(Number(name=told, value=value, unit="", n=len(self.layers), low=low, high=high))
        best = int(np.argmax(self.mean("efficacy")))
        peak = int(np.argmax(self.aie))
        numbers += [
            Number(name="layer of the highest AIE", value=self.layers[peak], unit="layer", n=len(self.effects)),
            Number(name="layer of the highest efficacy", value=self.layers[best], unit="layer", n=len(self.requests)),
        ]
        return tuple(numbers), tuple(undefined)

    def _lines(self) -> LinePlot:
        shown = [m for m in _SHOWN if m in self.measures]
        lines = [Line(label=m, values=self.mean(m), low=b[0], high=b[1]) for m in shown for b in (self.interval(m),)]
        low, high = self.aie_interval
        return LinePlot(
            name="by_layer",
            title="Edits at each layer",
            x_label="edited layer",
            y_label="share of probes passed; AIE (probability)",
            x=np.array(self.layers, dtype=np.float64),
            lines=(*lines, Line(label="AIE", values=self.aie, low=low, high=high)),
            caption=self._caption(),
        )

    def _scatter(self) -> Scatter:
        return Scatter(
            name="aie_efficacy",
            title="Causality and editability",
            x_label="AIE of the layer's MLP at the constraint's last token (probability)",
            y_label="efficacy of an edit there (share)",
            x=self.aie,
            y=self.mean("efficacy"),
            labels=tuple(f"layer {i}" for i in self.layers),
            caption=self._caption(),
        )

    def _caption(self) -> str:
        how = "one batch of" if self.settings.together else "single edits,"
        return (
            f"{self.settings.method.value}, {how} n = {counted(len(self.requests), 'request')}; AIE of "
            f"n = {counted(len(self.effects), 'question')}, window of {counted(self.window, 'layer')}, total effect "
            f"{self.total_effect:.2f}; 95 % bootstrap intervals over requests and over questions"
        )

    def _table(self) -> Table:
        bounds = {m: self.interval(m) for m in self.measures}
        rows = []
        for n, layer in enumerate(self.layers):
            shares = [_cell(self.mean(m)[n], bounds[m], n) for m in self.measures]
            losses = self.losses[:, n][~np.isnan(self.losses[:, n])]
            loss = f"{np.median(losses):.2g}" if len(losses) else MISSING
            aie = _cell(self.aie[n], self.aie_interval, n)
            rows.append((str(layer), aie, *shares, loss, f"{self.installed[:, n].mean():.2f}"))
        columns = ("layer", "AIE", *self.measures, "median target loss, nats", "share installed")
        return Table(name="by_layer", title="Shares of probes passed, by generation", columns=columns, rows=tuple(rows))


def _correlation(
    x: Float[NDArray[np.float64], "draws layers"], y: Float[NDArray[np.float64], "draws layers"], *, ranks: bool
) -> Float[NDArray[np.float64], " draws"]:
    """Pearson's correlation of each pair of rows, or of their ranks; NaN where a row is constant or too short."""
    x, y = (_ranks(x), _ranks(y)) if ranks else (x, y)
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    defined = (size > 1e-12) & (x.shape[-1] >= _FEWEST_LAYERS)
    found: NDArray[np.float64] = np.divide((x * y).sum(-1), size, out=np.full(len(size), np.nan), where=defined)
    return found


def _ranks(x: Float[NDArray[np.float64], "draws layers"]) -> Float[NDArray[np.float64], "draws layers"]:
    """The ranks along each row; equal values share the mean of theirs."""
    a, b = x[..., :, None], x[..., None, :]
    ranks: NDArray[np.float64] = (a > b).sum(-1) + (a == b).sum(-1) / 2
    return ranks


def _notes(lines: Sequence[str]) -> tuple[Table, ...]:
    """A table of what else is to be known, where there is anything."""
    rows = tuple((line,) for line in lines)
    return (Table(name="notes", title="Notes", columns=("note",), rows=rows),) if rows else ()


def _cell(value: float, bounds: Bounds, layer: int) -> str:
    return f"{value:z.3f} ({bounds[0][layer]:z.3f}–{bounds[1][layer]:z.3f})"
