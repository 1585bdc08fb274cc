"""The closed form against direct dense solves (methods.md §5: the family)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from errata.editor.delta import LowRank
from errata.editor.errors import IllConditionedError
from errata.editor.solver import (
    HeldKeys,
    Identity,
    InverseCovariance,
    KeyMetric,
    NullSpace,
    eigenvectors,
    free_directions,
    solve_edit,
)

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 20), st.integers(1, 6), st.integers(0, 10_000)).filter(
    lambda shape: shape[2] <= shape[1]
)
"""m, d, n with n ≤ m, and a seed. (m, d, n are drawn as d, m, n.)"""


def problem(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """Keys m × n, residuals d × n and a well-conditioned C₀."""
    d, m, n, seed = shape
    random = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(m, n, generator=random, dtype=torch.float64))
    mix = torch.eye(n, dtype=torch.float64) + 0.3 * torch.randn(n, n, generator=random, dtype=torch.float64) / n
    residuals = torch.randn(d, n, generator=random, dtype=torch.float64)
    reference = torch.randn(m, 4 * m + 8, generator=random, dtype=torch.float64)
    return basis @ mix * 3, residuals, reference @ reference.T / reference.shape[1], random


def close(found: LowRank, expected: Tensor) -> None:
    """Equal up to the float32 of the stored factors."""
    torch.testing.assert_close(found.dense(), expected, rtol=0, atol=5e-7 * float(expected.norm()) + 1e-12)


def null_space(covariance: Tensor, energy: float) -> NullSpace:
    """AlphaEdit's metric, from C₀."""
    return NullSpace(free_directions(*eigenvectors(covariance), energy=energy))


def holding(columns: Tensor) -> HeldKeys:
    """Requests of one key each."""
    held = HeldKeys()
    for column in columns.T:
        held.add(column[:, None])
    return held


METRICS = {
    "identity": lambda c: Identity(),
    "inverse covariance": lambda c: InverseCovariance(c),
    "weighted": lambda c: InverseCovariance(c, weight=7.5),
    "null space": lambda c: null_space(c, energy=0.5),
}


@pytest.mark.parametrize("name", METRICS)
@given(shape=SHAPES, ridge=st.sampled_from([0.01, 1.0, 30.0]))
def test_every_member_of_the_family_is_the_one_equation(
    name: str, shape: tuple[int, int, int, int], ridge: float
) -> None:
    """ΔW = R (KᵀMK + λI)⁻¹ KᵀM with M written out as a matrix."""
    k, r, c, _ = problem(shape)
    metric: KeyMetric = METRICS[name](c)
    m = metric.times(torch.eye(len(c), dtype=torch.float64))
    torch.testing.assert_close(m, m.T, rtol=1e-8, atol=1e-8)
    n = k.shape[1]
    found = solve_edit(k, r, metric, ridge)
    close(found, r @ torch.linalg.inv(k.T @ m @ k + ridge * torch.eye(n, dtype=torch.float64)) @ k.T @ m)
    assert found.rank == min(n, len(r))
    assert found.a.dtype == found.b.dtype == torch.float32


@pytest.mark.parametrize(("d", "m", "n"), [(1, 6, 6), (2, 20, 14), (3, 9, 40), (2, 8, 8)])
@pytest.mark.parametrize("earlier", [0, 3])
def test_more_keys_than_the_width_are_solved_in_the_inner_width_and_to_the_same_change(
    d: int, m: int, n: int, earlier: int
) -> None:
    """RKᵀ(KKᵀ + λG)⁻¹ = R (KᵀMK + λI)⁻¹ KᵀM for M = G⁻¹, also of more keys than m."""
    random = torch.Generator().manual_seed(n)
    k, r = (torch.randn(rows, n, generator=random, dtype=torch.float64) for rows in (m, d))
    c = problem((d, m, 1, n))[2]
    metric = InverseCovariance(c, weight=7.5)
    if earlier:
        metric = metric.holding(holding(torch.randn(m, earlier, generator=random, dtype=torch.float64)), 0.5)
    found = solve_edit(k, r, metric, 0.5)
    weighted = metric.times(k)
    close(found, r @ torch.linalg.inv(k.T @ weighted + 0.5 * torch.eye(n, dtype=torch.float64)) @ weighted.T)
    assert found.rank == d


@pytest.mark.parametrize("ridge", [0.5, 1e-3])
def test_residuals_and_statistics_that_are_no_good_are_refused_of_many_keys_too(ridge: float) -> None:
    random = torch.Generator().manual_seed(0)
    k, r = (torch.randn(rows, 30, generator=random, dtype=torch.float64) for rows in (8, 2))
    with pytest.raises(IllConditionedError, match="NaN or infinity"):
        solve_edit(k, r * torch.inf, InverseCovariance(torch.eye(8)), ridge)
    with pytest.raises(IllConditionedError, match="not positive definite"):
        solve_edit(k, r, InverseCovariance(-1e6 * torch.eye(8)), ridge)


@given(shape=SHAPES)
def test_without_ridge_the_residuals_are_installed_exactly(shape: tuple[int, int, int, int]) -> None:
    """The equality constraint ΔW K = R of ROME (eq. 2) for n = 1, of EMMET (eq. 12) for more."""
    k, r, c, _ = problem(shape)
    for metric in (Identity(), InverseCovariance(c)):
        torch.testing.assert_close(solve_edit(k, r, metric, 0.0).dense() @ k, r, rtol=0, atol=1e-5 * float(r.norm()))


@given(shape=SHAPES)
def test_rome_is_its_published_formula(shape: tuple[int, int, int, int]) -> None:
    """Meng et al. 2022, eq. 2: ΔW = Λ (C₀⁻¹ k)ᵀ with Λ = (v − W₀k) / ((C₀⁻¹k)ᵀ k)."""
    d, m, _, seed = shape
    k, r, c, _ = problem((d, m, 1, seed))
    direction = torch.linalg.solve(c, k)
    close(solve_edit(k, r, InverseCovariance(c, jitter=0.0), 0.0), r @ direction.T / (direction.T @ k))


@given(shape=SHAPES)
def test_of_all_exact_edits_emmet_disturbs_the_reference_keys_least(shape: tuple[int, int, int, int]) -> None:
    """tr(ΔW C₀ ΔWᵀ) = E‖ΔW k‖² grows with any change that keeps ΔW K = R (Gupta et al. 2024)."""
    k, r, c, random = problem(shape)
    delta = solve_edit(k, r, InverseCovariance(c, jitter=0.0), 0.0).dense()
    away = torch.randn(delta.shape, generator=random, dtype=torch.float64)
    away = away - away @ k @ torch.linalg.pinv(k)
    disturbed = torch.trace((delta + away) @ c @ (delta + away).T)
    assert torch.trace(delta @ c @ delta.T) <= disturbed + 1e-4 * disturbed.abs()


@given(shape=SHAPES, ridge=st.sampled_from([0.01, 1.0, 10.0]))
def test_multedit_is_ridge_regression_towards_the_old_weight(shape: tuple[int, int, int, int], ridge: float) -> None:
    """W* = argmin ‖WK − V‖² + λ‖W − W₀‖² as one dense least-squares problem (methods.md §5)."""
    k, r, _, random = problem(shape)
    w = torch.randn(r.shape[0], k.shape[0], generator=random, dtype=torch.float64)
    v = r + w @ k
    tall = torch.cat([k.T, ridge**0.5 * torch.eye(len(k), dtype=torch.float64)])
    best = torch.linalg.lstsq(tall, torch.cat([v.T, ridge**0.5 * w.T])).solution.T
    close(solve_edit(k, v - w @ k, Identity(), ridge), best - w)


@given(shape=SHAPES, weight=st.sampled_from([0.5, 1.0, 100.0]))
def test_memit_is_its_published_formula(shape: tuple[int, int, int, int], weight: float) -> None:
    """Meng et al. 2023, eq. 14: ΔW = R Kᵀ (λ′C₀ + K Kᵀ)⁻¹."""
    k, r, c, _ = problem(shape)
    close(
        solve_edit(k, r, InverseCovariance(c, weight=weight, jitter=0.0), 1.0),
        r @ k.T @ torch.linalg.inv(weight * c + k @ k.T),
    )


@given(shape=SHAPES)
def test_jitter_adds_its_share_of_the_mean_eigenvalue(shape: tuple[int, int, int, int]) -> None:
    k, _, c, _ = problem(shape)
    jittered = c + 0.3 * torch.linalg.eigvalsh(c).mean() * torch.eye(len(c), dtype=torch.float64)
    torch.testing.assert_close(InverseCovariance(c, jitter=0.3).times(k), torch.linalg.solve(jittered, k))


@given(d=st.integers(1, 8), m=st.integers(4, 24), n=st.integers(1, 3), seed=st.integers(0, 1000))
def test_alphaedit_never_changes_what_preserved_keys_put_out(d: int, m: int, n: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    preserved = torch.randn(m, m - n, generator=random, dtype=torch.float64)
    k = torch.randn(m, n, generator=random, dtype=torch.float64)
    r = torch.randn(d, n, generator=random, dtype=torch.float64)
    metric = null_space(preserved @ preserved.T / (m - n), energy=1e-9)
    scale = float((k * metric.times(k)).sum(0).mean())
    found = solve_edit(k, r, metric, 1e-3 * scale)
    changed = float((found.dense() @ preserved).abs().max())
    assert changed <= 1e-5 * float(found.b.norm() * found.a.norm() * preserved.norm())
    assert float((found.dense() @ k).norm()) > 0


@given(shape=SHAPES, ridge=st.sampled_from([0.01, 1.0, 30.0]), p=st.integers(1, 40))
def test_alphaedit_with_earlier_edits_is_its_published_formula(
    shape: tuple[int, int, int, int], ridge: float, p: int
) -> None:
    """Fang et al. 2025, eq. 14, with λ for 1: ΔW = R KᵀP (K₁K₁ᵀP + KKᵀP + λI)⁻¹."""
    k, r, c, random = problem(shape)
    earlier = torch.randn(len(k), p, generator=random, dtype=torch.float64)
    projector = null_space(c, energy=0.5).times(torch.eye(len(k), dtype=torch.float64))
    dense = (earlier @ earlier.T + k @ k.T) @ projector + ridge * torch.eye(len(k), dtype=torch.float64)
    close(
        solve_edit(k, r, null_space(c, energy=0.5).holding(holding(earlier), ridge), ridge),
        r @ k.T @ projector @ torch.linalg.inv(dense),
    )


@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=30), seed=st.integers(0, 10_000))
def test_any_number_of_requests_is_held_in_no_more_than_their_keys_or_one_square_matrix(
    sizes: list[int], seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    keys, held = [torch.randn(12, n, generator=random) for n in sizes], HeldKeys()
    for k in keys:
        held.add(k)
    columns, found = held.columns(), torch.zeros(12, 12, dtype=torch.float64)
    held.add_products(found, 2.0)
    assert (columns is None) == (sum(sizes) > 12)
    assert columns is None or columns.shape == (12, sum(sizes))
    assert held.requests == len(sizes)
    # A request counts as one, whatever the number of its contexts.
    expected = sum((k.double() @ k.double().T / k.shape[1] for k in keys), torch.zeros(12, 12, dtype=torch.float64))
    torch.testing.assert_close(found, 2 * expected, rtol=1e-12, atol=1e-12)
    basis = torch.linalg.qr(torch.randn(12, 5, generator=random, dtype=torch.float64))[0]
    torch.testing.assert_close(held.products_in(basis), basis.T @ expected @ basis, rtol=1e-12, atol=1e-12)


def test_what_is_asked_of_held_keys_between_requests_changes_nothing() -> None:
    keys = torch.randn(12, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held, found = HeldKeys(), torch.zeros(12, 12, dtype=torch.float64)
    for column in keys.T:
        held.add(column[:, None])
        held.columns()
    held.add_products(found, 1.0)
    torch.testing.assert_close(found, keys @ keys.T)


def test_the_identity_holds_nothing() -> None:
    with pytest.raises(NotImplementedError, match="Identity"):
        Identity().holding(holding(torch.ones(3, 1)), 0.1)


@given(
    shape=SHAPES,
    weight=st.sampled_from([0.5, 1.0, 100.0]),
    ridge=st.sampled_from([0.3, 1.0, 7.0]),
    p=st.integers(1, 40),
)
def test_memit_holds_earlier_edits_as_firmly_as_it_seeks_new_ones_under_any_ridge(
    shape: tuple[int, int, int, int], weight: float, ridge: float, p: int
) -> None:
    """W* = argmin ‖ΔW K − R‖² + ‖ΔW K₁‖² + λw tr(ΔW C₀ ΔWᵀ)."""
    k, r, c, random = problem(shape)
    earlier = torch.randn(len(k), p, generator=random, dtype=torch.float64)
    metric = InverseCovariance(c, weight=weight, jitter=0.0).holding(holding(earlier), ridge)
    close(
        solve_edit(k, r, metric, ridge),
        r @ k.T @ torch.linalg.inv(ridge * weight * c + earlier @ earlier.T + k @ k.T),
    )


@given(shape=SHAPES, energy=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
def test_the_null_space_is_a_projector_that_holds_at_most_its_energy(
    shape: tuple[int, int, int, int], energy: float
) -> None:
    _, _, c, _ = problem(shape)
    p = null_space(c, energy=energy).times(torch.eye(len(c), dtype=torch.float64))
    torch.testing.assert_close(p @ p, p, rtol=1e-8, atol=1e-8)
    assert torch.trace(p @ c) <= (energy + 1e-9) * torch.trace(c)


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4])
def test_an_exact_edit_of_nearly_the_same_keys_survives_the_narrow_dtype_of_its_factors(apart: float) -> None:
    """Two pictures of one thing: B's columns are 1/apart² large and cancel, which float32 cannot hold."""
    k, r, _, random = problem((16, 40, 1, 3))
    other = torch.randn(40, 1, generator=random, dtype=torch.float64)
    k = torch.cat([k, k + apart * k.norm() * other / other.norm()], dim=1)
    r = torch.cat([r, torch.randn(16, 1, generator=random, dtype=torch.float64)], dim=1)
    found = solve_edit(k, r, Identity(), 0.0).dense() @ k
    assert float((found - r).norm() / r.norm()) < 1e-6 / apart


@pytest.mark.parametrize("metric", [Identity(), InverseCovariance(torch.eye(12))], ids=["identity", "covariance"])
def test_two_requests_with_one_key_are_refused_with_what_to_do(metric: KeyMetric) -> None:
    k, r, _, _ = problem((4, 12, 2, 0))
    with pytest.raises(IllConditionedError, match=r"share a key.*merge the requests, raise the ridge"):
        solve_edit(k[:, [0, 1, 0]], r[:, [0, 1, 1]], metric, 0.0)


def test_a_ridge_lets_one_key_settle_between_two_values() -> None:
    k, r, _, _ = problem((4, 12, 1, 0))
    found = solve_edit(k[:, [0, 0]], torch.cat([r, 3 * r], dim=1), Identity(), 1e-6).dense()
    torch.testing.assert_close(found @ k, 2 * r, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_a_dead_or_broken_key_is_refused(bad: float) -> None:
    with pytest.raises(IllConditionedError):
        solve_edit(torch.full((6, 1), bad), torch.ones(3, 1), Identity(), 0.0)


def test_broken_residuals_are_refused() -> None:
    with pytest.raises(IllConditionedError):
        solve_edit(torch.ones(6, 1), torch.full((3, 1), torch.nan), Identity(), 0.0)


def test_more_keys_than_directions_are_refused_without_a_ridge() -> None:
    random = torch.Generator().manual_seed(0)
    with pytest.raises(IllConditionedError, match="more keys than free directions"):
        solve_edit(torch.randn(3, 5, generator=random), torch.randn(2, 5, generator=random), Identity(), 0.0)


def test_earlier_keys_need_a_ridge() -> None:
    k, r, c, _ = problem((6, 3, 1, 0))
    twice = holding(torch.cat([k, k], 1))
    for metric in (null_space(c, energy=1.0), InverseCovariance(c)):
        with pytest.raises(IllConditionedError, match="give one above 0"):
            metric.holding(twice, 0.0)
        solve_edit(k, r, metric.holding(twice, 0.1), 0.1)


@pytest.mark.parametrize("times", [2, 40])
def test_a_ridge_too_small_for_the_earlier_keys_is_refused_with_what_to_do(times: int) -> None:
    k, _, c, _ = problem((4, 12, 1, 0))
    held = holding(1e4 * torch.cat([k] * times, 1))
    with pytest.raises(IllConditionedError, match="raise the ridge"):
        null_space(c, energy=1.0).holding(held, 1e-10).times(k)


def test_a_null_space_without_room_is_refused() -> None:
    k, r, c, _ = problem((4, 12, 1, 0))
    with pytest.raises(IllConditionedError):
        solve_edit(k, r, null_space(c, energy=0.0), 0.0)


@pytest.mark.parametrize(
    "covariance", [torch.zeros(5, 5), -torch.eye(5), torch.full((5, 5), torch.nan)], ids=["dead", "negative", "nan"]
)
def test_statistics_that_are_no_covariance_are_refused(covariance: Tensor) -> None:
    with pytest.raises(IllConditionedError, match="key statistics C₀ are not positive definite"):
        InverseCovariance(covariance).times(torch.ones(5, 1))


def test_narrow_inputs_are_solved_in_float64() -> None:
    k, r, c, _ = problem((7, 15, 4, 5))
    exact = solve_edit(k.float().double(), r.float().double(), InverseCovariance(c.double()), 0.0)
    narrow = solve_edit(k.float(), r.float(), InverseCovariance(c), 0.0)
    torch.testing.assert_close(narrow.a, exact.a, rtol=0, atol=0)
    torch.testing.assert_close(narrow.b, exact.b, rtol=0, atol=0)
