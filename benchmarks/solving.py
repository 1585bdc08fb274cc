"""The closed form at LLaVA-1.5-7B's sizes, m = 11,008 and d = 4,096, in float64: MEMIT's metric, one C₀.

Against the formula as MEMIT's code solves it: one linear system of m unknowns, ΔW = R Kᵀ (w·C₀ + KKᵀ)⁻¹.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from measure import Case, Numbers, Way
from torch import Tensor

from errata.editor.methods import EditSettings, Keys, Method, solve_layer

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
    settings = EditSettings(layers=(0,), method=Method.MEMIT, keys=Keys.EACH)
    ours = partial(_ours, covariance, keys, residuals, probes, settings)
    weighted = settings.preservation * (covariance + 1e-4 * covariance.diagonal().mean() * torch.eye(m))
    return Case(
        name=f"solve, {n:,} key{'s' * (n > 1)}",
        about=f"MEMIT, m = {m:,}, d = {d:,}, float64; C₀ alone is {covariance.nbytes / 1e9:.2f} GB",
        ways=[
            Way(name="Errata", run=ours),
            Way(name="one m × m system", run=partial(_one_system, weighted, keys, residuals, probes)),
        ],
        rounds=3 if n <= 1000 else 1,
    )


def _ours(covariance: Tensor, keys: Tensor, residuals: Tensor, probes: Tensor, settings: EditSettings) -> Numbers:
    columns = [[x[:, i : i + 1] for i in range(x.shape[1])] for x in (keys, residuals)]
    low = solve_layer(columns[0], columns[1], settings, covariance)
    return (low.b.double() @ (low.a.double() @ probes)).numpy()


def _one_system(weighted: Tensor, keys: Tensor, residuals: Tensor, probes: Tensor) -> Numbers:
    adjusted = torch.linalg.solve(weighted + keys @ keys.T, keys)
    return np.asarray(residuals @ (adjusted.T @ probes))
