"""The figure of how a trace's cost grows, from the figures as they are stored."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure


def plot_growth(found: Mapping[str, Any], path: Path) -> None:
    """CPU seconds of each way by layers, by tokens of the image and by traced tokens, all on logarithmic axes."""
    axes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in found.values():
        axes[result["axis"]].append(result)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for plot, (axis, results) in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes.items(), strict=True):
        for n, way in enumerate(results[0]["ways"]):
            plot.plot(
                [r["size"] for r in results],
                [median(r["ways"][n]["seconds"]) for r in results],
                "o-",
                label=way["name"],
            )
        plot.set(xscale="log", yscale="log", xlabel=axis, ylabel="CPU seconds of a trace")
        ticks = [r["size"] for r in results]
        plot.set_xticks(ticks, [f"{t:,}" for t in ticks])
        plot.minorticks_off()
        plot.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)
