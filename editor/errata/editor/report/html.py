"""An edit as one self-contained HTML page: nothing is loaded from elsewhere and no script runs.

What models and callers say is escaped by the template; figures and pictures are data URIs. The same report gives the
same bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from errata.editor.evaluation import Evaluation
from errata.editor.methods import RIDGES, EditResult
from errata.editor.report import wording
from errata.editor.report.figures import aie_heatmap, aie_lines, loss_curves, trace_heatmap
from errata.editor.report.pictures import Pictures, data_uri
from errata.editor.report.sections import fact_cards, probe_groups, score_rows
from errata.editor.report.style import png
from errata.editor.trace import AveragedTrace, CausalTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything a page tells about one edit.

    `example` is one trace to show beside the average. `pictures` are by request name; where one is missing, the
    picture of the request's first efficacy probe stands in. `base_bytes` and `adapter_bytes` are sizes as stored.
    """

    title: str
    created: datetime
    model: str
    base_sha256: str
    base_bytes: int
    trace: AveragedTrace | None = None
    example: CausalTrace | None = None
    result: EditResult
    evaluation: Evaluation
    pictures: Mapping[str, Image.Image] = field(default_factory=dict, repr=False)
    adapter_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plate:
    """A figure, its text for those who do not see it, and its caption."""

    uri: str
    alt: str
    caption: str


def write_report(path: Path, report: Report) -> Path:
    """Writes the page and returns its path. Missing folders are made; a page already there is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(render_report(report).encode())
    return partial.replace(path)


def render_report(report: Report) -> str:
    """The page itself."""
    environment = Environment(
        loader=PackageLoader("errata.editor.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"moment": _moment, "percent": wording.percent, "loss": wording.loss, "plain": wording.plain}
    pictures = Pictures()
    # Facts first: where pictures run out, it is the probes' that are left out.
    facts = fact_cards(report.result, report.evaluation, report.pictures, pictures)
    groups = probe_groups(report.evaluation, pictures)
    return environment.get_template("report.html.j2").render(
        report=report,
        delta_sha256=report.result.delta.sha256,
        sizes=_sizes(report),
        settings=_settings(report.result),
        scores=score_rows(report.evaluation),
        plates=_plates(report),
        losses=_plate(
            loss_curves(report.result, caption=False),
            "Loss of each value, step by step",
            f"Target loss of each request in nats, step by step. {wording.loss_caption(report.result)}; a value "
            "converges when its loss, and the KL on the prompts it must preserve, are both below the line.",
        ),
        facts=facts,
        groups=groups,
        pictures=pictures.uris,
    )


def _moment(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M %Z}".strip()


def _sizes(report: Report) -> dict[str, str | float]:
    share = report.adapter_bytes / report.base_bytes if report.base_bytes else 0.0
    return {
        "adapter": wording.size(report.adapter_bytes),
        "base": wording.size(report.base_bytes),
        "share": wording.percent(share) if share >= 0.01 else f"{100 * share:.2g} %",
        "width": max(0.4, min(100.0, 100 * share)),
    }


def _settings(result: EditResult) -> dict[str, str]:
    """Name and value of everything that shaped the edit."""
    s, v = result.settings, result.settings.values
    ridge = f"{RIDGES[s.method]:g} (the method's own)" if s.ridge is None else f"{s.ridge:g}"
    return {
        "method": s.method.value,
        "layers": ", ".join(map(str, s.layers)),
        "ranks": ", ".join(f"{r} at layer {i}" for i, r in result.delta.ranks.items()) or "no change",
        "norm of ΔW": f"{result.delta.norm():.4g}",
        "keys": s.keys.value,
        "ridge λ": ridge,
        "preservation": f"{s.preservation:g}",
        "null energy": f"{s.null_energy:g}",
        "value steps": f"at most {v.steps}, learning rate {v.learning_rate:g}",
        "value clamp": f"{v.clamp:g} · ‖v₀‖, decay {v.decay:g}",
        "KL weight": f"{v.kl_weight:g}",
        "stop at loss": f"{v.stop_loss:g} nats",
    }


def _plates(report: Report) -> list[_Plate]:
    """The figures of the traces there are."""
    plates = []
    if report.trace is not None:
        said = wording.averaged_caption(report.trace)
        plates += [
            _plate(
                aie_heatmap(report.trace, caption=False),
                "Heatmap of average indirect effects, layers by token roles",
                f"How much of the answer's probability comes back when a site is restored, by the token's role: "
                f"{said}. Blank: no question has the role.",
            ),
            _plate(
                aie_lines(report.trace, caption=False),
                "Average indirect effect of each layer at the constraint's last token",
                f"The same at the constraint's last token, where edits are made: {said}. "
                "Bars: standard error of the mean.",
            ),
        ]
    if report.example is not None:
        question = wording.plain(report.example.question)
        plates.append(
            _plate(
                trace_heatmap(report.example, caption=False),
                "Heatmap of indirect effects of one question, layers by tokens",
                f"One question, “{question}”, answered {wording.plain(report.example.answer)}: "
                f"{wording.trace_caption(report.example)}. Bold with *: the constraint.",
            )
        )
    return plates


def _plate(figure: Figure, alt: str, caption: str) -> _Plate:
    return _Plate(uri=data_uri(png(figure), "png"), alt=alt, caption=caption)
