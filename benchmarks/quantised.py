"""Atlas in 8 and 4 bits beside float32: `python benchmarks/quantised.py`.

What it knows, whether its causal traces agree, what edits made on it are worth, and deltas carried from one base to
another. Seeds draw renderings and phrasings as in `methods.py`. `--quick` only shows that it runs.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from methods import FIRST_CLEAN_SEED, JUDGED
from rich.console import Console

from errata.editor.atlas.facts import Fact, edit_requests, errata, long_tail, probes, references, trace_requests
from errata.editor.atlas.measure import knowledge
from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.delta import Delta, applied
from errata.editor.errors import CorruptionFailedError, ErrataError
from errata.editor.evaluation import evaluate
from errata.editor.localization import choose_layers
from errata.editor.methods import EditSettings, edit
from errata.editor.model import EditableModel
from errata.editor.quantization import Quantization, memory_bytes
from errata.editor.states import Component
from errata.editor.statistics import KeyStatistics, key_statistics
from errata.editor.trace import CausalTrace, TraceRequest, average, trace

LAYERS = (1,)
Found = dict[str, Any]


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the process's CPU seconds."""
    began = time.process_time()
    return run(), time.process_time() - began


def asked_in_batches(model: EditableModel, requests: Sequence[TraceRequest]) -> Found:
    """Whether an answer depends on its neighbours: log p of each first token in a batch of its length and alone."""
    rows = [model.encode(r.prompt) for r in requests]
    groups: dict[object, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.shape, []).append(i)
    worst, changed = 0.0, 0
    with torch.inference_mode():
        for group in groups.values():
            together = model.model(**model.inputs([rows[i] for i in group])).logits[:, -1].float().log_softmax(-1)
            for i, batched in zip(group, together, strict=True):
                alone = model.model(**model.inputs([rows[i]])).logits[0, -1].float().log_softmax(-1)
                top = int(alone.argmax())
                worst = max(worst, abs(float(alone[top] - batched[top])))
                changed += int(top != int(batched.argmax()))
    return {"n": len(rows), "largest": max(map(len, groups.values())), "max_log_p": worst, "answers_changed": changed}


def traces_of(model: EditableModel, requests: Sequence[TraceRequest]) -> list[CausalTrace | None]:
    """None for a question that its corruption does not corrupt."""
    found: list[CausalTrace | None] = []
    for request in requests:
        try:
            found.append(trace(model, request))
        except CorruptionFailedError:
            found.append(None)
    return found


def agreement(ours: Sequence[CausalTrace | None], plain: Sequence[CausalTrace | None]) -> Found:
    """How far indirect effects are from the unquantised base's, over the sites of all questions traced on both."""
    pairs = [(a, b) for a, b in zip(ours, plain, strict=True) if a is not None and b is not None]
    apart = [np.abs((a.restored - a.corrupted.whole) - (b.restored - b.corrupted.whole)) for a, b in pairs]
    own, theirs = average([a for a, _ in pairs]), average([b for _, b in pairs])
    sites = np.concatenate([x.ravel() for x in apart])
    return {
        "questions": len(pairs),
        "traced_on_one_alone": sum((a is None) != (b is None) for a, b in zip(ours, plain, strict=True)),
        "sites": int(sites.size),
        "mean_effect_apart": float(sites.mean()),
        "max_effect_apart": float(sites.max()),
        "mean_of_questions_max": float(np.mean([x.max() for x in apart])),
        "max_aie_apart": float(max(np.nanmax(np.abs(own.aie(c) - theirs.aie(c))) for c in Component)),
        "total_effect": [own.total_effect, theirs.total_effect],
        "causal_layers": [_layers(own), _layers(theirs)],
        "peak_layer_agrees": float(np.mean([_peak(a) == _peak(b) for a, b in pairs])),
    }


def _layers(averaged: Any) -> list[int]:
    try:
        return list(choose_layers(averaged).layers)
    except ErrataError:
        return []


def _peak(found: CausalTrace) -> int:
    """The layer whose MLP restores most at the constraint's last token."""
    return int(np.argmax(found.indirect(Component.MLP)[:, found.constraint[-1]]))


def judged(model: EditableModel, facts: Sequence[Fact], delta: Delta, seed: int) -> Found:
    """Shares of the probes by generation; the delta is taken for one of this base."""
    asked = [p for p in probes(facts, seed=seed, others=max(6, 3 * len(facts))) if p.metric in JUDGED]
    carried = replace(delta, base_sha256=model.base_sha256)
    results = evaluate(model, asked, applied(model, carried)).results
    shares = {n: float(np.mean([r.passed for r in results if r.probe.metric is m])) for m, n in JUDGED.items()}
    return {**shares, "harmonic": len(shares) / sum(1 / s for s in shares.values()) if all(shares.values()) else 0.0}


def edited(model: EditableModel, facts: Sequence[Fact], statistics: KeyStatistics, seed: int) -> tuple[Delta, float]:
    """The batch's delta by the default method, and CPU seconds."""
    settings = EditSettings(layers=LAYERS)
    result, seconds = timed(lambda: edit(model, edit_requests(facts, seed=seed), settings, statistics))
    return result.delta, seconds


def about_base(
    model: EditableModel, requests: Sequence[TraceRequest], quick: bool, told: Callable[[str, Any], None]
) -> None:
    """What the base is without any edit: its size and speed, its batches, what it knows."""
    told("bytes", memory_bytes(model.model))
    prompts = [r.prompt for r in requests]
    model.generate(prompts[:1])
    runs = [timed(lambda: model.generate(prompts, batch_size=16))[1] for _ in range(5)]
    told("generation_seconds", float(np.median(runs)))
    told("batching", asked_in_batches(model, requests))
    known = knowledge(model, per_fact=1 if quick else 2)
    told("knowledge", {f.name: {"n": f.n, "share": f.value} for f in known})


def markdown(bases: Found) -> str:
    """The tables of docs/quantised.md: bases, and edits as means ± standard deviations over seeds."""
    plain = bases[Quantization.NONE.value]
    lines = ["| base | MiB | generation | trace | unseen renderings | and phrasings | batch and alone |"]
    lines.append("|" + "---|" * 7)
    for name, found in bases.items():
        knows = [found["knowledge"][k]["share"] for k in ("unseen renderings", "unseen renderings and phrasings")]
        ratios = (
            found["generation_seconds"] / plain["generation_seconds"],
            found["trace"]["seconds"] / plain["trace"]["seconds"],
        )
        cells = [f"{found['bytes'] / 2**20:.1f}", *(f"{r:.1f}" for r in ratios), *(f"{k:.3f}" for k in knows)]
        lines.append(f"| {name} | {' | '.join(cells)} | {found['batching']['max_log_p']:.4f} |")
    lines += ["", "| base | questions | mean | mean of the largest | largest | AIE | causal layers | same peak |"]
    lines.append("|" + "---|" * 8)
    for name, found in bases.items():
        t = found["trace"]
        apart = (t["mean_effect_apart"], t["mean_of_questions_max"], t["max_effect_apart"], t["max_aie_apart"])
        numbers = " | ".join(f"{a:.4f}" for a in apart)
        layers = ", ".join(map(str, t["causal_layers"][0]))
        lines.append(f"| {name} | {t['questions']} | {numbers} | {layers} | {t['peak_layer_agrees']:.2f} |")
    lines += ["", f"| delta made and judged on | seeds | {' | '.join(JUDGED.values())} | harmonic mean |"]
    lines.append("|" + "---|" * (len(JUDGED) + 3))
    for name, found in bases.items():
        parts = (
            ("edit", f"{name}"),
            ("delta of float32", f"none, on {name}"),
            ("delta on float32", f"{name}, on none"),
        )
        for part, said in parts:
            seeds = [found[key] for key in found if key.startswith(f"{part}, seed")]
            if seeds:
                cells = [_spread([s[n] for s in seeds]) for n in (*JUDGED.values(), "harmonic")]
                lines.append(f"| {said} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values):.3f}"


def _kept(path: Path, about: Found) -> Found:
    """The figures of an earlier run of the same size, so that quantisations can be measured one by one."""
    if path.exists():
        earlier: Found = json.loads(path.read_text(encoding="utf-8"))
        if {name: earlier.get(name) for name in about} == about:
            return earlier
    return {**about, "bases": {}}


def main(
    seeds: Annotated[int, typer.Option(help="Seeds of edits; 0: no edits.")] = 2,
    first_seed: Annotated[int, typer.Option(help="The first of them.")] = FIRST_CLEAN_SEED,
    questions: Annotated[int, typer.Option(help="Questions traced and asked of the base; 0: none.")] = 60,
    tail: Annotated[int, typer.Option(help="Facts of flags that Atlas never saw, edited beside all errata.")] = 16,
    only: Annotated[list[Quantization] | None, typer.Option(help="Quantisations to measure; none: all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the figures as JSON.")] = Path("benchmarks/results"),
    quick: Annotated[bool, typer.Option(help="One seed, two facts, few questions: shows only that it runs.")] = False,
) -> None:
    """Compare Atlas as it is loaded by each quantisation with Atlas in float32. What was measured before is kept."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=140)
    facts = (errata()[0], long_tail()[0]) if quick else (*errata(), *long_tail()[:tail])
    seeds, questions = (1, 4) if quick else (seeds, questions)
    drawn = range(first_seed, first_seed + seeds)
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("quantised-quick.json" if quick else "quantised.json")
    about: Found = {"layers": list(LAYERS), "facts": len(facts), "questions": questions, "threads": 1}
    whole = _kept(path, about)
    requests = trace_requests(questions)
    plain: list[CausalTrace | None] = []
    unquantised = load_model(ATLAS)
    deltas: dict[int, Delta] = {}

    def told(name: str, part: str, found: Any) -> None:
        if only and name not in only:
            return  # only what others are compared with
        whole["bases"].setdefault(name, {})[part] = found
        console.print(f"{name}, {part}: {found}")
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")

    for quantization in [q for q in Quantization if not only or q in (Quantization.NONE, *only)]:
        name, needed = quantization.value, not only or quantization in only
        model = load_model(ATLAS, quantization=quantization)
        if requests:
            traces, seconds = timed(lambda m=model: traces_of(m, requests))
            plain = plain or traces
            told(name, "trace", {**agreement(traces, plain), "seconds": seconds})
        if needed and requests:
            about_base(model, requests, quick, lambda part, found, n=name: told(n, part, found))
        if not drawn:
            continue
        statistics = key_statistics(model, references(per_country=2 if quick else 16), LAYERS)
        for seed in drawn:
            delta, seconds = edited(model, facts, statistics, seed)
            deltas.setdefault(seed, delta)
            if needed:
                told(name, f"edit, seed {seed}", {**judged(model, facts, delta, seed), "seconds": seconds})
            if quantization is not Quantization.NONE:
                told(name, f"delta of float32, seed {seed}", judged(model, facts, deltas[seed], seed))
                told(name, f"delta on float32, seed {seed}", judged(unquantised, facts, delta, seed))
    if all("knowledge" in found for found in whole["bases"].values()) and Quantization.NONE.value in whole["bases"]:
        print(markdown(whole["bases"]))
    console.print(f"figures in {path}")


if __name__ == "__main__":
    typer.run(main)
