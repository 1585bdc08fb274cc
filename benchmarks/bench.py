"""Errata against plain ways to the same numbers, side by side: `python benchmarks/bench.py`.

Every way's numbers are compared before anything is timed (module `measure`). `--quick` shows only that all of it runs,
on models too small for its ratios to mean anything. What an earlier run measured of other cases is kept; `--resume`
runs only what it did not measure. `--table` prints the README's table of what is kept, and runs nothing.
"""

import json
import platform
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import claims
import mixed
import noise
import probes
import solving
import torch
import tracing
import transformers
import typer
import values
import versions
from measure import Result, forked, measured, spread
from plotting import plot_growth
from rich.console import Console
from rich.table import Table

CASES: Mapping[str, ModuleType] = {
    "tracing": tracing,
    "noise": noise,
    "values": values,
    "solving": solving,
    "versions": versions,
    "probes": probes,
}
"""The groups whose cases are measured here; beside them stand `mixed` and `growth`."""

GROUPS = (*CASES, "mixed", "growth")


def main(
    quick: Annotated[bool, typer.Option(help="Small models, one round: shows only that it runs.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Groups to run, of {', '.join(GROUPS)}; none: all.")] = None,
    rounds: Annotated[int, typer.Option(help="Times that everything is timed.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("benchmarks/results"),
    resume: Annotated[bool, typer.Option(help="Run only the cases of which nothing is kept.")] = False,
    table: Annotated[bool, typer.Option(help="Print the README's table of what is kept, and run nothing.")] = False,
) -> None:
    """Compare, print a table, and write `bench.json` and `growth.png`."""
    if unknown := set(only or ()) - set(GROUPS):
        raise typer.BadParameter(f"there is no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    if table:
        print("\n".join(claims.table(_kept(out / "bench.json"))))
        return
    # One thread: what is compared is work, not how well it is spread. A fork must not share a pool of threads.
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rounds = 1 if quick else rounds
    console, out = Console(width=140), out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    path = out / ("bench-quick.json" if quick else "bench.json")
    found: dict[str, dict[str, Any]] = {} if quick else _kept(path)
    for group in only or GROUPS:
        found[group] = found.get(group, {}) if resume else {}
        for result in _results(group, quick, rounds, found[group]):
            console.print(shown(result))
            found[group][result.name] = asdict(result)
            whole = {**_machine(), "quick": quick, "groups": found}
            path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if found.get("growth"):
        plot_growth(found["growth"], out / ("growth-quick.png" if quick else "growth.png"))
    console.print(f"figures in {path}")


def _results(group: str, quick: bool, rounds: int, kept: Collection[str]) -> Iterator[Result]:
    """Each case is measured in a process of its own, so that none inherits another's memory; none that is kept."""
    if group == "mixed":
        yield from mixed.results(quick) if not kept else ()
        return
    cases = tracing.growth if group == "growth" else CASES[group].cases
    for case in (c for c in cases(quick) if c.name not in kept):
        yield forked(partial(measured, case, min(rounds, case.rounds)))


def shown(result: Result) -> Table:
    """One case: medians with quartiles. Ratios are of times of one round, differences are of the largest number."""
    rows = Table(
        "way", "CPU seconds", "peak memory", "Errata is faster by", "goal", "numbers differ by", title=result.name
    )
    rows.caption = result.about + "".join(f"\n{name}: {value:,.4g}" for name, value in result.figures.items())
    for way in result.ways:
        ours = way is result.ways[0]
        rows.add_row(
            way.name + (f" ({way.share:.2g} of it run)" if way.share < 1 else ""),
            cell(way.seconds),
            f"{way.peak_bytes / 1e6:,.0f} MB" if way.peak_bytes else "",
            "" if ours else cell(result.ratios(way)),
            f"{way.goal:g}" if way.goal else "",
            "" if ours else f"{way.error:.0e}",
        )
    return rows


def cell(values: list[float]) -> str:
    """Median and quartiles, to three digits."""
    low, middle, high = (f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in spread(values))
    return f"{middle} ({low}–{high})"


def _kept(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run measured, so that groups can be run one by one."""
    if not path.exists():
        return {}
    groups: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["groups"]
    return groups


def _machine() -> dict[str, str]:
    """Where it was measured."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "processor": platform.machine(), "capability": capability}


if __name__ == "__main__":
    typer.run(main)
