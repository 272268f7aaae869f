"""Traces and eigenvalues of dense matrices that are seen through products only."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.curvature.eigs import lanczos, lobpcg
from fxsparse.curvature.trace import TraceMethod, estimate_trace
from fxsparse.errors import ConfigError


class Dense:
    """Counts products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.products = matrix, 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def mm(self, columns: Tensor) -> Tensor:
        self.products += columns.shape[1]
        return self.matrix @ columns


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(n: int, rank: int | None = None, seed: int = 0) -> Tensor:
    a = torch.randn(n, rank or n, generator=gen(seed), dtype=torch.float64)
    return a @ a.T if rank else a + a.T


def test_the_exact_trace_needs_every_product() -> None:
    matrix = symmetric(9)
    found = estimate_trace(Dense(matrix), "exact", 1)
    assert found.value == pytest.approx(float(matrix.trace()), abs=1e-12)
    assert (found.standard_error, found.products) == (0.0, 9)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_estimates_are_unbiased_with_honest_errors(method: str) -> None:
    matrix = symmetric(20)
    found = [estimate_trace(Dense(matrix), method, 12, gen(seed)) for seed in range(400)]
    values = torch.tensor([each.value for each in found])
    truth = float(matrix.trace())
    assert abs(float(values.mean()) - truth) < 5 * float(values.std()) / 20
    if method != "xtrace":
        assert 0.6 < torch.tensor([each.standard_error for each in found]).mean() / values.std() < 1.6
    assert all(each.products <= 12 for each in found)


def test_hutchinson_has_the_variance_of_random_signs() -> None:
    matrix = symmetric(12)
    values = torch.tensor([estimate_trace(Dense(matrix), "hutchinson", 1, gen(s)).value for s in range(3000)])
    expected = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    assert float(values.var() / expected) == pytest.approx(1.0, abs=0.12)  # Gaussians would have more
    diagonal = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    assert estimate_trace(Dense(diagonal), "hutchinson", 1).value == 15.0  # exact for diagonal matrices


@pytest.mark.parametrize(("method", "m"), [("hutch++", 15), ("xtrace", 12)])
def test_low_rank_is_exact(method: str, m: int) -> None:
    matrix = symmetric(30, rank=5)
    found = estimate_trace(Dense(matrix), method, m, gen(3))
    assert found.value == pytest.approx(float(matrix.trace()), rel=1e-12)
    assert found.standard_error == pytest.approx(0.0, abs=1e-10)
    zero = estimate_trace(Dense(torch.zeros(6, 6, dtype=torch.float64)), method, m)
    assert zero.value == 0.0


def test_better_methods_err_less_on_decaying_spectra() -> None:
    q = torch.linalg.qr(torch.randn(60, 60, generator=gen(1), dtype=torch.float64)).Q
    matrix = q @ torch.diag(torch.arange(1.0, 61.0, dtype=torch.float64) ** -2) @ q.T
    error = {
        method: float(
            torch.tensor(
                [
                    abs(estimate_trace(Dense(matrix), method, 24, gen(s)).value - float(matrix.trace()))
                    for s in range(40)
                ]
            ).mean()
        )
        for method in ("hutchinson", "hutch++", "xtrace")
    }
    assert error["xtrace"] < error["hutch++"] < 0.3 * error["hutchinson"]


def test_too_few_products_and_unknown_methods() -> None:
    for method, m in (("hutch++", 2), ("xtrace", 3), ("hutchinson", 0), ("magic", 9)):
        with pytest.raises(ConfigError):
            estimate_trace(Dense(symmetric(4)), method, m)
    assert TraceMethod.of("xtrace") is TraceMethod.XTRACE
    assert torch.tensor(estimate_trace(Dense(symmetric(4)), "hutchinson", 1).standard_error).isnan()


def test_lanczos_on_one_to_ten_is_exact() -> None:
    found = lanczos(Dense(torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))), 10, start=torch.ones(10))
    assert found.values.flip(0).tolist() == pytest.approx(list(range(1, 11)), abs=1e-12)
    assert found.iterations == 10
    assert bool(found.converged.all())


@pytest.mark.parametrize("solve", [lanczos, lobpcg])
def test_both_ends_of_an_indefinite_spectrum(solve: object) -> None:
    """The largest end alone would miss negative curvature; the k-th largest is not the smallest."""
    matrix = symmetric(25)
    truth = torch.linalg.eigvalsh(matrix)
    low = solve(Dense(matrix), 3, "SA", tol=1e-10)
    high = solve(Dense(matrix), 3, "LA", tol=1e-10)
    assert low.values.tolist() == pytest.approx(truth[:3].flip(0).tolist(), abs=1e-9)
    assert high.values.tolist() == pytest.approx(truth[-3:].flip(0).tolist(), abs=1e-9)
    assert float(low.values.min()) < 0
    for found in (low, high):
        gaps = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
        assert float(gaps.max()) < 1e-8
        assert bool(found.converged.all())
        assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(3, dtype=torch.float64), atol=1e-9)
    if solve is lanczos:
        both = lanczos(Dense(matrix), 3, "BE", tol=1e-10)
        assert both.values.tolist() == pytest.approx(truth[[-1, -2, 0]].tolist(), abs=1e-9)


def test_residuals_are_those_of_the_vectors_and_flags_are_honest() -> None:
    matrix = symmetric(60)
    few = lanczos(Dense(matrix), 4, iters=12, tol=1e-8)
    gaps = (matrix @ few.vectors - few.vectors * few.values).norm(dim=0)
    assert torch.allclose(gaps, few.residuals, atol=1e-9)
    assert not bool(few.converged.all())
    assert few.iterations == 12


def test_no_shift_and_no_noise_after_a_breakdown() -> None:
    """A zero matrix has eigenvalue 0, not 1e-8; two distinct eigenvalues end the process after two steps."""
    zero = lanczos(Dense(torch.zeros(8, 8, dtype=torch.float64)), 2)
    assert zero.values.tolist() == [0.0]
    assert zero.invariant
    assert zero.iterations == 1
    two = Dense(torch.diag(torch.tensor([1.0, 1, 1, 4, 4, 4], dtype=torch.float64)))
    found = lanczos(two, 4)
    assert found.values.tolist() == pytest.approx([4.0, 1.0], abs=1e-12)
    assert found.iterations == two.products == 2


def test_orthogonality_holds_where_plain_lanczos_finds_ghosts() -> None:
    matrix = torch.diag(torch.cat([torch.linspace(0, 1, 199, dtype=torch.float64), torch.tensor([1e6]).double()]))
    found = lanczos(Dense(matrix), 5, iters=80, tol=1e-14)
    assert float(found.values[0]) == pytest.approx(1e6)
    assert float(found.values[1]) < 1.0 + 1e-6  # a ghost copy of 1e6 would stand here


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = lanczos(Dense(symmetric(10)), 2)
    estimate_trace(Dense(symmetric(10)), "xtrace", 6)
    lobpcg(Dense(symmetric(10)), 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert torch.equal(lanczos(Dense(symmetric(10)), 2).values, first.values)


def test_bad_options() -> None:
    op = Dense(symmetric(4))
    for call in (
        lambda: lanczos(op, 0),
        lambda: lanczos(op, 5),
        lambda: lanczos(op, 1, "XX"),
        lambda: lanczos(op, 1, iters=0),
        lambda: lanczos(op, 1, start=torch.zeros(4)),
        lambda: lobpcg(op, 1, "BE"),
        lambda: lobpcg(op, 9),
        lambda: lobpcg(op, 1, iters=0),
        lambda: lobpcg(op, 1, iters=-1),
        lambda: lanczos(op, 1.5),
        lambda: lanczos(op, 1, iters=2.5),
        lambda: estimate_trace(op, "hutchinson", 2.5),
    ):
        with pytest.raises(ConfigError):
            call()


def test_lobpcg_of_low_rank_stops_where_nothing_is_new() -> None:
    matrix = symmetric(12, rank=3)
    found = lobpcg(Dense(matrix), 5, tol=1e-10)
    truth = torch.linalg.eigvalsh(matrix).flip(0)[:5]
    assert found.values.tolist() == pytest.approx(truth.tolist(), abs=1e-8)


class Supported(Dense):
    """P_S A P_S with a damping on the support, as curvature operators have it."""

    def __init__(self, matrix: Tensor, support: Tensor, damping: float) -> None:
        keep = support.double()
        super().__init__(keep[:, None] * matrix * keep + torch.diag(damping * keep))
        self.space = SimpleNamespace(support=support, dtype=torch.float64, device=torch.device("cpu"))


@pytest.mark.parametrize("rank", [3, 12])
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("solve", [lanczos, lobpcg])
def test_the_small_end_is_that_of_the_support(solve: object, damping: float, rank: int) -> None:
    """Zeros outside the support are no eigenvalues, though they are smaller than a damping."""
    support = torch.rand(40, generator=gen(1)) > 0.5
    op = Supported(symmetric(40, rank=rank), support, damping)
    truth = torch.linalg.eigvalsh(op.matrix[support][:, support])
    for k in (1, 4) if solve is lobpcg else (1,):  # Lanczos sees an eigenvalue that is there several times once
        found = solve(op, k, "SA", tol=1e-8)
        scale = float(truth.abs().max())
        assert found.values.tolist() == pytest.approx(truth[: len(found.values)].flip(0).tolist(), abs=1e-6 * scale)
        assert not found.vectors[~support].any()
        assert torch.allclose(found.vectors.norm(dim=0), torch.ones(len(found.values)).double(), atol=1e-9)
        gaps = (op.matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
        assert float(gaps.max()) < 1e-6 * scale


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 14), seed=st.integers(0, 2**16), which=st.sampled_from(["LA", "SA", "BE"]))
def test_full_lanczos_is_the_dense_spectrum(n: int, seed: int, which: str) -> None:
    matrix = symmetric(n, seed=seed)
    found = lanczos(Dense(matrix), n, which, iters=n, generator=gen(seed))
    truth = torch.linalg.eigvalsh(matrix).flip(0)
    assert torch.allclose(found.values, truth, atol=1e-8 * float(truth.abs().max()))


@pytest.mark.parametrize("solve", [lanczos, lobpcg])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("rank", [30, 45])
def test_eigenvalues_of_zero_converge(solve: object, scale: float, rank: int) -> None:
    """Residuals are measured by the operator's norm: relative to an eigenvalue of zero nothing is ever small."""
    matrix = scale * symmetric(50, rank=rank)
    norm = float(torch.linalg.eigvalsh(matrix)[-1])
    found = solve(Dense(matrix), 3, "SA", tol=1e-7)
    assert bool(found.converged.all())
    assert float((matrix @ found.vectors - found.vectors * found.values).norm(dim=0).max()) <= 1.01e-7 * norm
    zeros = found.values if solve is lobpcg else found.values[-1:]  # Lanczos sees one that is there several times once
    assert float(zeros.abs().max()) <= 1e-7 * norm


def test_products_that_are_too_few_do_not_converge() -> None:
    matrix = symmetric(50, rank=30)
    for iters in (1, 3):
        found = lobpcg(Dense(matrix), 3, "SA", iters=iters, tol=1e-7)
        assert not bool(found.converged.any())
        assert float(found.values.abs().max()) > 1e-3
