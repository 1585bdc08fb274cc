"""The closed form at LLaVA-1.5-7B's sizes, m = 11,008 and d = 4,096, in float64: MEMIT's metric, one C₀.

Against the formula as MEMIT's code solves it: one linear system of m unknowns, ΔW = R Kᵀ (w·C₀ + KKᵀ)⁻¹. The residual
that is told is that of these normal equations, ‖ΔW (w·C₀ + KKᵀ) P − R KᵀP‖ / ‖R KᵀP‖ for random P; ΔW is solved in
float64 and stored in float32.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from measure import Case, Numbers, Way
from torch import Tensor

from errata.editor.solver import InverseCovariance, solve_edit

WEIGHT = 150.0
"""Of C₀ against a request, as `EditSettings.preservation`."""

PROBES = 16
"""Random keys at which ΔW is compared: it is itself too large to be handed around."""


def cases(quick: bool) -> Iterator[Case]:
    """Rising numbers of keys."""
    m, d = (96, 32) if quick else (11008, 4096)
    random = torch.Generator().manual_seed(0)
    seen = torch.randn(m, 1024, generator=random, dtype=torch.float64)
    covariance = seen @ seen.T / seen.shape[1] + 0.1 * torch.eye(m, dtype=torch.float64)
    for n in (1, 10, 200) if quick else (1, 100, 1000, 10_000):
        yield case(covariance, d, n, random)


def case(covariance: Tensor, d: int, n: int, random: torch.Generator) -> Case:
    """So many keys, one a request."""
    m = len(covariance)
    keys = torch.randn(m, n, generator=random, dtype=torch.float64)
    residuals = torch.randn(d, n, generator=random, dtype=torch.float64)
    probes = torch.randn(m, PROBES, generator=random, dtype=torch.float64)
    metric = InverseCovariance(covariance, weight=WEIGHT)
    weighted = metric.inverse()
    seen = residuals @ (keys.T @ probes)
    both = torch.cat([probes, weighted @ probes + keys @ (keys.T @ probes)], 1)

    def residual(ours: Numbers) -> dict[str, float]:
        left = torch.from_numpy(ours[:, PROBES:]) - seen
        return {"residual of the normal equations": float(left.norm() / seen.norm())}

    return Case(
        name=f"solve, {n:,} key{'s' * (n > 1)}",
        about=f"MEMIT, m = {m:,}, d = {d:,}, float64; C₀ alone is {covariance.nbytes / 1e9:.2f} GB",
        ways=[
            Way(name="Errata", run=partial(_ours, metric, keys, residuals, both)),
            Way(
                name="one m × m system",
                run=partial(_one_system, weighted, keys, residuals, probes),
                of_ours=lambda ours: ours[:, :PROBES],
            ),
        ],
        rounds=3 if n <= 1000 else 1,
        figures_of=residual,
    )


def _ours(metric: InverseCovariance, keys: Tensor, residuals: Tensor, probes: Tensor) -> Numbers:
    low = solve_edit(keys, residuals, metric, 1.0)
    return np.asarray(low.b.double() @ (low.a.double() @ probes))


def _one_system(weighted: Tensor, keys: Tensor, residuals: Tensor, probes: Tensor) -> Numbers:
    adjusted = torch.linalg.solve(weighted + keys @ keys.T, keys)
    return np.asarray(residuals @ (adjusted.T @ probes))
