"""Where the time of the traces and values goes, against the machine's matrix products: `python benchmarks/profiles.py`.

The ceiling is one large product in float32 on one thread. What a kind of operation reaches of it, and its share of the
time, say what there is still to gain.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from typing import Annotated

import noise
import torch
import tracing
import transformers
import typer
import values
from measure import Case
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "products with weights": ("aten::addmm", "aten::mm"),
    "attention and other products": ("aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    "softmax": ("aten::_softmax", "aten::_log_softmax", "aten::_log_softmax_backward_data"),
    "copies": ("aten::copy_", "aten::cat", "aten::stack", "aten::index", "aten::index_put_", "aten::_index_put_impl_"),
}
"""Operations of which one hears most; the rest is `others`: norms, activations, rotations, and Python between them."""


def main(
    only: Annotated[str, typer.Option(help="Only cases with this in their name.")] = "",
    size: Annotated[int, typer.Option(help="Rows and columns of the product that is the ceiling.")] = 2048,
) -> None:
    """Profile Errata's way of each case."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console, ceiling = Console(width=120), _ceiling(size)
    console.print(f"ceiling: {ceiling / 1e9:.0f} GFLOP/s, float32, one thread")
    console.print(_by_tokens(ceiling))
    for case in _cases():
        if only in case.name:
            console.print(_profiled(case, ceiling))


def _cases() -> Iterator[Case]:
    """Traces and values at their full size."""
    yield next(tracing.cases(quick=False))
    yield next(noise.cases(quick=False))
    descents = [f"values of {n}, {kind}, 25 steps" for kind in ("LLaVA", "text") for n in ("1 request", "16 requests")]
    yield from (c for c in values.cases(quick=False) if c.name in descents)


def _ceiling(size: int) -> float:
    """Operations a second of a square product."""
    a = torch.randn(size, size)
    seconds = []
    for _ in range(5):
        began = time.process_time()
        a @ a
        seconds.append(time.process_time() - began)
    return 2 * size**3 / median(seconds)


def _by_tokens(ceiling: float) -> Table:
    """What a product with a layer's weights reaches: of few tokens it takes as long as reading the weights does."""
    weights = [torch.randn(1365, 512) for _ in range(64)]  # more than stays in a cache
    shown = Table("tokens", "ms a product", "of the ceiling", title="products with weights of 512 × 1,365, by tokens")
    for tokens in (1, 8, 16, 32, 64, 128, 256, 512):
        x, seconds = torch.randn(tokens, 512), []
        for _ in range(7):
            began = time.process_time()
            for weight in weights:
                torch.nn.functional.linear(x, weight)
            seconds.append((time.process_time() - began) / len(weights))
        took = median(seconds)
        shown.add_row(str(tokens), f"{1e3 * took:.2f}", f"{2 * tokens * 512 * 1365 / took / ceiling:.0%}")
    return shown


def _profiled(case: Case, ceiling: float) -> Table:
    run = case.ways[0].run
    began = time.process_time()
    run()
    whole = time.process_time() - began  # without the profiler, which takes time itself
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        run()
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    of = {name: kind for kind, names in KINDS.items() for name in names}
    for event in profiler.key_averages():
        kind = of.get(event.key, "others")
        spent[kind][0] += event.self_cpu_time_total / 1e6
        spent[kind][1] += event.flops
    total = sum(seconds for seconds, _ in spent.values())
    shown = Table("operations", "share of the time", "of the ceiling", title=f"{case.name}: {whole:.1f} CPU seconds")
    for kind, (seconds, flops) in sorted(spent.items(), key=lambda item: -item[1][0]):
        reached = f"{flops / (whole * seconds / total) / ceiling:.0%}" if flops else ""
        shown.add_row(kind, f"{seconds / total:.0%}", reached)
    shown.add_row("all", "100%", f"{sum(f for _, f in spent.values()) / whole / ceiling:.0%}")
    return shown


if __name__ == "__main__":
    typer.run(main)
