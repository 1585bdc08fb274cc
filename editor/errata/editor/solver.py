"""The closed form: one solver for the whole family, told apart by its key metric (methods of ROME, MEMIT, …).

    ΔW = R (KᵀMK + λI)⁻¹ KᵀM

K (m × n) holds the keys, R (d × n) the residuals V − W₀K, M (m × m, symmetric, positive semi-definite) is the key
metric, λ the ridge:

    MultEdit   M = I                        ridge towards W₀ (Basu et al. 2024, §5)
    ROME       M = C₀⁻¹, λ = 0, n = 1       (Meng et al., NeurIPS 2022, eq. 2)
    MEMIT      M = (w·C₀)⁻¹, λ = 1          (Meng et al., ICLR 2023, eq. 14; w weighs what is preserved)
    EMMET      M = C₀⁻¹, λ = 0, n > 1       (Gupta et al. 2024, eq. 12)
    AlphaEdit  M = P, λ > 0                 P projects on the null space of the keys to preserve (Fang et al. 2025)

Every one is exactly low-rank: B = R (KᵀMK + λI)⁻¹ is d × n, A = KᵀM is n × m. Of more keys than d the rank is d, and
where M = G⁻¹ and λ > 0 the same ΔW = RKᵀ(KKᵀ + λG)⁻¹ takes one system of m unknowns instead of n, whichever is cheaper.
Knows nothing about models, prompts or files; works in float64.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from errata.editor.delta import LowRank
from errata.editor.errors import IllConditionedError


class KeyMetric(ABC):
    """M: says how alike two keys count as being."""

    @abstractmethod
    def times(self, keys: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """MK, in float64."""

    def holding(self, earlier: "HeldKeys", ridge: float) -> "KeyMetric":
        """The metric under which, in a solve with the ridge λ, what stands at the keys `earlier` is to stay as firmly
        as the new residuals are sought.

        Raises NotImplementedError for a metric that only knows its own keys.
        """
        raise NotImplementedError(f"{type(self).__name__} holds no earlier keys")


class HeldKeys:
    """K₁, the keys of earlier edits: what is to stay. Only K₁K₁ᵀ counts: beyond m columns it is kept in their place."""

    def __init__(self) -> None:
        self.requests = 0
        """How many are held."""
        self._parts: list[Float[Tensor, "m n"]] = []
        self._products: Float[Tensor, "m m"] | None = None

    def add(self, keys: Float[Tensor, "m n"]) -> None:
        """One request's keys, a column a context."""
        self.requests += 1
        self._parts.append(shared(keys.double()))
        m = len(keys)
        # Each sum passes over all of K₁K₁ᵀ, so a few requests wait for it.
        if sum(part.shape[1] for part in self._parts) > (m if self._products is None else m // 8):
            self._sum()

    def columns(self) -> Float[Tensor, "m p"] | None:
        """K₁, in float64; None of more than m columns."""
        if self._products is None:
            self._parts = [torch.cat(self._parts, 1)]
            return self._parts[0]
        self._sum()
        return None

    def add_products(self, matrix: Float[Tensor, "m m"], scale: float) -> None:
        """Adds scale · K₁K₁ᵀ to a matrix in place."""
        columns = self.columns()
        if self._products is not None:
            matrix.add_(self._products, alpha=scale)
        elif columns is not None:
            matrix.addmm_(columns, columns.T, alpha=scale)

    def products_in(self, basis: Float[Tensor, "m f"]) -> Float[Tensor, "f f"]:
        """UᵀK₁K₁ᵀU of a basis U."""
        columns = self.columns()
        if columns is None:
            assert self._products is not None
            return basis.T @ self._products @ basis
        seen = basis.T @ columns
        return seen @ seen.T

    def _sum(self) -> None:
        """Moves the columns into K₁K₁ᵀ."""
        if self._parts:
            columns = torch.cat(self._parts, 1)
            self._parts = []
            if self._products is None:
                self._products = columns @ columns.T
            else:
                self._products.addmm_(columns, columns.T)


def shared(columns: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
    """A request's contexts share its weight: in least squares a column counts by the square of its length."""
    return columns / math.sqrt(columns.shape[1])


@dataclass(frozen=True, slots=True)
class Identity(KeyMetric):
    """M = I."""

    def times(self, keys: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return keys.double()


@dataclass(frozen=True, slots=True)
class InverseCovariance(KeyMetric):
    """M = (weight · C₀ + K₁K₁ᵀ/λ)⁻¹ with C₀ = E[kkᵀ] over reference prompts and K₁ the keys `earlier`, if any, of edits
    made before. A solve multiplies M⁻¹ by its ridge λ, so that of K₁ it sees K₁K₁ᵀ, as of the new keys.

    `jitter`, relative to C₀'s mean eigenvalue, keeps directions that the reference never uses from costing nothing.
    """

    covariance: Float[Tensor, "m m"]
    weight: float = 1.0
    jitter: float = 1e-4
    earlier: HeldKeys | None = None
    ridge: float = 1.0

    def times(self, keys: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        mean = self.covariance.diagonal().double().mean()
        factor, info = torch.linalg.cholesky_ex(self._jittered(mean))
        if info.item() or not mean > 0:
            raise IllConditionedError(
                "the key statistics C₀ are not positive definite: they come from too few reference prompts, or from a "
                "model whose MLP is dead there; give more prompts or raise `jitter`"
            )
        return torch.cholesky_solve(keys.double(), factor) / self.weight

    def holding(self, earlier: HeldKeys, ridge: float) -> "InverseCovariance":
        return replace(self, earlier=earlier, ridge=_above_zero(ridge))

    def inverse(self) -> Float[Tensor, "m m"]:
        """G = M⁻¹, in float64, in a matrix of the caller's own."""
        return self._jittered(self.covariance.diagonal().double().mean()).mul_(self.weight)

    def _jittered(self, mean: Tensor) -> Float[Tensor, "m m"]:
        """M⁻¹ / weight, in one new matrix: at LLaVA-7B's size each further one is a gigabyte."""
        c = self.covariance.to(torch.float64, copy=True)
        if self.earlier is not None:
            self.earlier.add_products(c, 1 / (self.weight * self.ridge))
        c.diagonal().add_(self.jitter * mean)
        return c


@dataclass(frozen=True, slots=True)
class NullSpace(KeyMetric):
    """M = P, the projector on the directions that the keys to preserve hardly use (`free_directions`).

    What stands at the keys `earlier`, of edits made before, is held as firmly as the new residuals are sought, against
    the ridge λ > 0 that is solved with (Fang et al. 2025, eq. 14): M = P − PK₁(λI + K₁ᵀPK₁)⁻¹K₁ᵀP. With P = UUᵀ that is
    U·λ(λI + UᵀK₁K₁ᵀU)⁻¹Uᵀ, a smaller system where there are more keys than free directions.
    """

    free: Float[Tensor, "m f"]
    earlier: HeldKeys | None = None
    ridge: float = 0.0

    def times(self, keys: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        within = self.free.T @ keys.double()
        if self.earlier is not None:
            within = _against(self.earlier, self.free, within, self.ridge)
        return self.free @ within

    def holding(self, earlier: HeldKeys, ridge: float) -> "NullSpace":
        return replace(self, earlier=earlier, ridge=_above_zero(ridge))


def _against(
    held: HeldKeys, free: Float[Tensor, "m f"], keys: Float[Tensor, "f n"], ridge: float
) -> Float[Tensor, "f n"]:
    """(I − H(λI + HᵀH)⁻¹Hᵀ)K = λ(λI + HHᵀ)⁻¹K with H = UᵀK₁, by the smaller of the two systems."""
    columns = held.columns()
    if columns is None or columns.shape[1] > free.shape[1]:
        return torch.cholesky_solve(ridge * keys, _factor(held.products_in(free), ridge))
    seen = free.T @ columns
    return keys - seen @ torch.cholesky_solve(seen.T @ keys, _factor(seen.T @ seen, ridge))


def _factor(products: Float[Tensor, "k k"], ridge: float) -> Float[Tensor, "k k"]:
    """Cholesky's factor of λI + `products`, which are overwritten."""
    products.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(products)
    if info.item() or not torch.isfinite(factor.diagonal()).all():
        raise IllConditionedError(
            f"the keys of earlier edits cannot be told apart under the ridge λ = {ridge:g}; raise the ridge"
        )
    return cast(Tensor, factor)


def _above_zero(ridge: float) -> float:
    if not ridge > 0:
        raise IllConditionedError("earlier edits are held against a ridge, which is 0; give one above 0")
    return ridge


def eigenvectors(covariance: Float[Tensor, "m m"]) -> tuple[Float[Tensor, " m"], Float[Tensor, "m m"]]:
    """C₀'s eigenvalues in rising order and their vectors as columns, in float64."""
    values, vectors = torch.linalg.eigh(covariance.double())
    return values, vectors


def free_directions(
    values: Float[Tensor, " m"], vectors: Float[Tensor, "m m"], *, energy: float
) -> Float[Tensor, "m f"]:
    """C₀'s eigenvectors of least energy: the largest are given up until the rest hold at most `energy` of its trace."""
    share = values.clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    return vectors[:, share <= energy]


def solve_edit(keys: Float[Tensor, "m n"], residuals: Float[Tensor, "d n"], metric: KeyMetric, ridge: float) -> LowRank:
    """ΔW = R (KᵀMK + λI)⁻¹ KᵀM as its two factors (module docstring), solved in float64 by Cholesky.

    `ridge` is λ, in the units of KᵀMK, ≥ 0; 0 installs the residuals exactly.
    Raises IllConditionedError if KᵀMK + λI is not safely positive definite: two requests with the same key and
    different targets, usually.
    """
    if isinstance(metric, InverseCovariance) and ridge > 0 and _many(keys.shape[0], keys.shape[1], residuals.shape[0]):
        return _solve_inverse(keys, residuals, metric, ridge)
    return solve_weighted(keys, metric.times(keys), residuals, ridge)


def _many(m: int, n: int, d: int) -> bool:
    """Whether n keys are so many that a system of m unknowns takes fewer operations than one of n."""
    by_keys = 2 * m * m * n + m * n * n + n**3 / 3 + 2 * d * n * n + 2 * d * n * m
    by_inner = 2 * m * m * n + 2 * d * n * m + 2 * m * m * d
    return n > d and by_inner < by_keys


def _solve_inverse(
    keys: Float[Tensor, "m n"], residuals: Float[Tensor, "d n"], metric: InverseCovariance, ridge: float
) -> LowRank:
    """ΔW = RKᵀ(KKᵀ + λG)⁻¹, of rank d: B is the identity."""
    k, r = keys.double(), residuals.double()
    _check_finite(r)
    system = metric.inverse().mul_(ridge).addmm_(k, k.T)
    factor, info = torch.linalg.cholesky_ex(system)
    del system
    if info.item() or not torch.isfinite(factor.diagonal()).all():
        raise IllConditionedError(
            f"KKᵀ + λG of {k.shape[1]} keys is not positive definite (λ = {ridge:g}): the key statistics come from too "
            "few reference prompts; give more, or raise `jitter`"
        )
    change = torch.cholesky_solve(k @ r.T, factor)
    return LowRank(a=change.T.float().contiguous(), b=torch.eye(len(r)))


def solve_weighted(
    keys: Float[Tensor, "m n"], weighted: Float[Tensor, "m n"], residuals: Float[Tensor, "d n"], ridge: float
) -> LowRank:
    """`solve_edit` where `weighted` = MK is known: with C₀⁻¹ or P it is most of the work."""
    k, mk, r = keys.double(), weighted.double(), residuals.double()
    normal = k.T @ mk
    normal = (normal + normal.T) / 2 + ridge * torch.eye(normal.shape[0], dtype=normal.dtype)
    factor, info = torch.linalg.cholesky_ex(normal)
    diagonal = factor.diagonal()
    # The squared ratio bounds the condition number from below; beyond 1e12 float64 keeps under four digits.
    if info.item() or not torch.isfinite(factor).all() or (diagonal.max() / diagonal.min()).square() > 1e12:
        raise IllConditionedError(
            f"KᵀMK + λI of {normal.shape[0]} keys is not positive definite (λ = {ridge:g}): two requests share a key, "
            "or there are more keys than free directions; merge the requests, raise the ridge or edit fewer at once"
        )
    _check_finite(r)
    b = torch.cholesky_solve(r.T, factor).T
    if normal.shape[0] > len(r):
        return LowRank(a=(b @ mk.T).float(), b=torch.eye(len(r)))
    # Near keys make columns of B that are huge and cancel, which float32 would not survive: give A orthonormal rows.
    rows, mix = torch.linalg.qr(mk)
    return LowRank(a=rows.T.float().contiguous(), b=(b @ mix.T).float().contiguous())


def _check_finite(residuals: Float[Tensor, "d n"]) -> None:
    if not torch.isfinite(residuals).all():
        raise IllConditionedError("the residuals hold NaN or infinity: a value's descent diverged; lower the rate")
