"""A thousand edits, one after another and in one batch: `python benchmarks/long_sequence.py`.

On Almanac, which is trained first where that was not done yet (module `almanac`). A cell is one method, with or without
holding what was edited before, on one draw of facts; what it has shown is written at every checkpoint, and a whole one
is kept. Every edit of a sequence is made on the version before. All that was edited so far is judged along the way, and
apart from that the half that was edited first. Settings are chosen by `--tune`, on people who are not edited otherwise.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import almanac
import torch
import transformers
import typer
from almanac_edits import STRANGERS, Change, changes, divided, references
from almanac_measure import known, traced
from almanac_world import people
from long_sequence_figure import draw
from long_sequence_runs import (
    JUDGED,
    LAYERS,
    Bench,
    Cell,
    Made,
    Prepared,
    batch,
    compressions,
    edit_anew,
    prepared,
    scores,
    sequence,
)
from rich.console import Console

from errata.editor.checkpoints import load_model
from errata.editor.delta import empty_delta
from errata.editor.methods import EditSettings, Method
from errata.editor.statistics import key_statistics
from errata.editor.values import ValueSettings

CHECKPOINTS = (1, 10, 30, 100, 300, 1000)
BATCHES = (10, 100, 1000)
VALUES = ValueSettings(steps=40, learning_rate=0.1, decay=1.0, stop_loss=0.1, max_rows=512)

SETTINGS: Mapping[Method, EditSettings] = {
    Method.MULTEDIT: EditSettings(layers=LAYERS, method=Method.MULTEDIT, values=VALUES, ridge=0.1),
    Method.MEMIT: EditSettings(layers=LAYERS, method=Method.MEMIT, values=VALUES, preservation=500.0),
    Method.ALPHAEDIT: EditSettings(layers=LAYERS, method=Method.ALPHAEDIT, values=VALUES, null_energy=0.02, ridge=0.1),
}
"""As `--tune` chose them."""

TRIED: Mapping[Method, Sequence[Mapping[str, float]]] = {
    Method.MULTEDIT: [{"ridge": r} for r in (0.03, 0.1, 0.3, 1.0)],
    Method.MEMIT: [{"preservation": w} for w in (150.0, 500.0, 1500.0, 3000.0)],
    Method.ALPHAEDIT: [{"null_energy": e, "ridge": r} for e in (0.02, 0.1, 0.3) for r in (0.1, 0.5)],
}
"""What `--tune` tries."""


def cells(seeds: Sequence[int], held: Sequence[int], sizes: Sequence[int], *, anew: bool) -> Iterator[Cell]:
    """Sequences first, a seed after another."""
    for seed in seeds:
        for method in SETTINGS:
            for newest in held if method is not Method.MULTEDIT else (0,):
                yield Cell(method=method, held=newest, seed=seed, anew=anew)
        for size in sizes:
            for method in SETTINGS:
                yield Cell(method=method, batch=size, seed=seed)


def opened(folder: Path, console: Console, *, quick: bool) -> Bench:
    """Almanac, trained if it is not yet, and its key statistics; `quick`: a world of a few people, hardly trained."""
    everyone = people(60) if quick else people()
    weights = almanac.train(folder, console, steps=2 if quick else almanac.STEPS, number=len(everyone))
    model, world = load_model(weights.absolute()), divided(everyone)
    statistics = key_statistics(model, references(everyone, 60 if quick else STRANGERS), LAYERS)
    # Nobody who is edited is among the references, so C₀ is the same for every edit: it is put together once.
    whole = {i: statistics.covariance(i) for i in LAYERS}
    nobody = {i: torch.zeros(0, 0) for i in LAYERS}
    return Bench(
        model=model,
        statistics=replace(statistics, everywhere=whole, sites=nobody, subjects=()),
        world=world,
        made=folder / "deltas",
        checkpoints=(1, 3) if quick else CHECKPOINTS,
    )


def tuned(bench: Bench, console: Console) -> list[dict[str, Any]]:
    """Every setting on the people for that, edited in one batch; what must stay is judged on those of the trace."""
    bench = replace(bench, world=replace(bench.world, bystanders=bench.world.traced))
    facts, found = changes(bench.world.tried, seed=0), []
    for method, variants in TRIED.items():
        for variant in variants:
            settings = replace(SETTINGS[method], **variant)  # type: ignore[arg-type]
            made = Made(empty_delta(bench.model))
            edit_anew(bench, made, facts, settings, [])
            row = {"method": method.value, **variant, "edits": len(facts), **scores(bench, facts, made.delta)}
            console.print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
            found.append(row)
    return found


def markdown(found: Mapping[str, Any]) -> Iterator[str]:
    """Every cell at its last checkpoint, as a table."""
    columns = (*JUDGED.values(), "efficacy, first half", "drift", "fluency", "norm", "rank", "CPU seconds an edit")
    yield "| " + " | ".join(("method", "holds", "edits", "at once", *columns)) + " |"
    yield "|---" * (len(columns) + 4) + "|"
    for cell in found.values():
        last = cell["along"][-1]
        shown = (f"{last[c]:.3f}" if isinstance(last[c], float) else str(last[c]) for c in columns)
        held, size = cell["held"] or "", cell["batch"] or 1
        yield f"| {cell['method']} | {held} | {last['edits']} | {size} | " + " | ".join(shown) + " |"


def _write(path: Path, found: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _of_model(bench: Bench, path: Path) -> dict[str, Any]:
    """What Almanac knows and where, measured once."""
    if not path.exists():
        world = bench.world
        everyone = [*world.edited, *world.tried, *world.traced, *world.bystanders]
        _write(path, {**known(bench.model, everyone), **traced(bench.model, bench.world)})
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _measured(bench: Bench, cell: Cell, console: Console, path: Path, facts: Sequence[Prepared]) -> None:
    """Runs a cell; what it has shown so far is written at every checkpoint."""
    work, along = batch if cell.batch else sequence, list[dict[str, Any]]()
    for row in work(bench, cell, facts, SETTINGS[cell.method]):
        along.append(row)
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        console.print(f"{cell.name}: {shown}", soft_wrap=True)
        _write(path, {**asdict(cell), "complete": row["edits"] == _last(bench, cell, facts), "along": along})


def _compressed(bench: Bench, cell: Cell, facts: Sequence[Change], path: Path) -> None:
    """Writes what the cell's last delta says at lower ranks."""
    if not path.exists():
        _write(path, {**asdict(cell), "by tolerance": list(compressions(bench, cell, facts))})


def _last(bench: Bench, cell: Cell, facts: Sequence[Prepared]) -> int:
    """The edits at the last checkpoint."""
    return min(cell.batch or bench.checkpoints[-1], len(facts))


def _kept(folder: Path) -> dict[str, Any]:
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}


def _complete(path: Path) -> bool:
    return path.exists() and bool(json.loads(path.read_text(encoding="utf-8"))["complete"])


def main(
    only: Annotated[list[str] | None, typer.Option(help="Run the cells whose names begin so; none: all.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Draws of facts.")] = None,
    held: Annotated[list[int] | None, typer.Option(help="How many requests are held, a sequence each.")] = None,
    anew: Annotated[int, typer.Option(help="Edits of a sequence whose values are found anew on every version.")] = 0,
    tune: Annotated[bool, typer.Option(help="Try settings on other people instead.")] = False,
    quick: Annotated[bool, typer.Option(help="A tiny world, hardly trained: shows only that it runs.")] = False,
    folder: Annotated[Path, typer.Option(help="Where Almanac and finished cells are kept.")] = almanac.FOLDER,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("benchmarks/results"),
) -> None:
    """Edit a thousand facts by every method, and write `sequence.json`, `sequence.png` and `sequence.svg`."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=140)
    bench = opened(folder, console, quick=quick)
    if tune:
        _write(out / "sequence-tuning.json", tuned(bench, console))
        return
    seeds, sizes = seed or (1,), () if anew else BATCHES[:1] if quick else BATCHES
    if anew:
        bench = replace(bench, checkpoints=[n for n in bench.checkpoints if n <= anew])
    for cell in cells(seeds, (0, 256) if held is None else held, sizes, anew=bool(anew)):
        path = folder / "cells" / f"{cell.name}.json"
        if _complete(path) or (only and not cell.name.startswith(tuple(only))):
            continue
        chosen = changes(bench.world.edited, cell.seed)[: 3 if quick else CHECKPOINTS[-1]]
        facts = prepared(bench, chosen, VALUES, f"values-seed-{cell.seed}")
        _measured(bench, cell, console, path, facts)
        if not cell.anew:
            _compressed(bench, cell, chosen[: cell.batch or None], folder / "compressed" / f"{cell.name}.json")
    found, less = _kept(folder / "cells"), _kept(folder / "compressed")
    print(*markdown(found), sep="\n")
    stem = "sequence-quick" if quick else "sequence"
    model = {} if quick else _of_model(bench, folder / "measured.json")
    _write(out / f"{stem}.json", {"quick": quick, "model": model, "cells": found, "compressed": less})
    draw(found, out / stem)


if __name__ == "__main__":
    typer.run(main)
