"""Extreme eigenpairs of symmetric operators, with residuals that say how far they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fxsparse.curvature.trace import Symmetric, is_whole
from fxsparse.errors import ConfigError

ENDS = ("LA", "SA", "BE")
"""Largest, smallest (most negative), or both ends of the spectrum (one more of the largest where k is odd)."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Ritz pairs.

    Attributes:
        values: Ritz values, descending; fewer than k where the space that was reached is smaller.
        vectors: Their unit vectors as columns, in the operator's dtype; zero outside the support.
        residuals: |G y - theta y| of each.
        converged: Which residuals are at most `tol` times the operator's norm, as far as it has been seen: the largest
            absolute Ritz value (Lanczos), the longest product with a unit vector (LOBPCG). Such a pair is an exact one
            of an operator that differs by no more than that (the normwise backward error, Higham 2002, section 7.1).
        iterations: Products.
        invariant: Whether an invariant subspace was met: the pairs are exact, others may exist outside it.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "n k"] = field(repr=False)
    residuals: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]
    iterations: int
    invariant: bool = False


def lanczos(
    operator: Symmetric,
    k: int = 1,
    which: str = "LA",
    iters: int | None = None,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Spectrum:
    """Lanczos with full reorthogonalisation, twice, in float64; no shift is added and nothing is restarted.

    It stops when the wanted residuals are small, after `iters` products, or when the next vector vanishes.

    Args:
        operator: Anything with `shape` and `mm`; where it has a `space` with a support, all vectors live there.
        k: How many eigenvalues.
        which: See `ENDS`.
        iters: Products at most; min(n, max(4 k + 40, 100)) by default.
        tol: Relative residual at which a pair counts as converged.
        generator: Source of the start vector (CPU); a fixed one by default.
        start: The start vector itself.

    Raises:
        ConfigError: k outside 1..n, an unknown `which`, fewer than one product, or a start vector of zeros.
    """
    tools = _Tools(operator, k, which, tol, generator)
    limit = min(tools.active, max(4 * k + 40, 100) if iters is None else iters)
    _check_iters(iters)
    basis = torch.zeros(limit + 1, tools.size, dtype=torch.float64)
    basis[0] = tools.start(start)
    alphas: list[float] = []
    betas: list[float] = []
    invariant = False
    while len(alphas) < limit:
        j = len(alphas)
        w = tools.times(basis[j][:, None])[:, 0]
        alphas.append(float(w @ basis[j]))
        for _ in range(2):
            w = w - basis[: j + 1].mT @ (basis[: j + 1] @ w)
        betas.append(float(w.norm()))
        values, weights = _tridiagonal(alphas, betas)
        scale = float(values.abs().max())
        if betas[-1] <= 1e-12 * max(scale, _TINY) or j + 1 == tools.active:
            invariant = True
            break
        basis[j + 1] = w / betas[-1]
        wanted = tools.wanted(values)
        errors = betas[-1] * weights[-1, wanted].abs()
        if len(values) >= 2 * k and bool((errors <= tol * scale).all()):
            break
    values, weights = _tridiagonal(alphas, betas)
    wanted = tools.wanted(values)
    beta = 0.0 if invariant else betas[-1]
    residuals = beta * weights[-1, wanted].abs()
    vectors = basis[: len(alphas)].mT @ weights[:, wanted]
    norm = max(float(values.abs().max()), _TINY)
    return tools.result(values, wanted, vectors, residuals, len(alphas), invariant, norm)


def lobpcg(
    operator: Symmetric,
    k: int = 1,
    which: str = "LA",
    iters: int | None = None,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """Eigenpairs by LOBPCG (Knyazev 2001): blocks of k products, Rayleigh-Ritz on values, residuals and last steps.

    It stops when all residuals are small, after `iters` rounds of 2 k products (200 by default), or when the residuals
    add no direction.

    Raises:
        ConfigError: as `lanczos`, or `which` is "BE".
    """
    if which == "BE":
        raise ConfigError("`which` (='BE') is for method='lanczos'; lobpcg finds one end at a time, LA or SA")
    _check_iters(iters)
    tools = _Tools(operator, k, which, tol, generator)
    x = torch.randn(tools.active, k, generator=tools.source, dtype=torch.float64)
    x = torch.linalg.qr(x).Q  # [s, k] on the support alone: outside of it G_S is zero, also with damping
    ax, steps = tools.times_within(x), x[:, :0]
    norm = _longest(ax)
    values, residuals, invariant = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64), False
    for _ in range(200 if iters is None else iters):
        ritz, turn = torch.linalg.eigh(x.mT @ ax)
        order = tools.wanted(ritz)
        values, x, ax = ritz[order], x @ turn[:, order], ax @ turn[:, order]
        gaps = ax - x * values
        residuals = gaps.norm(dim=0)
        if bool((residuals <= tol * norm).all()):
            break
        fresh = _new_directions(x, torch.cat([gaps, steps], 1))
        invariant = not fresh.shape[1]
        if invariant:
            break
        afresh = tools.times_within(fresh)
        norm = max(norm, _longest(afresh))
        whole, awhole = torch.cat([x, fresh], 1), torch.cat([ax, afresh], 1)
        ritz, turn = torch.linalg.eigh(whole.mT @ awhole)
        chosen = turn[:, tools.wanted(ritz)]
        steps = fresh @ chosen[k:]
        x, ax = whole @ chosen, awhole @ chosen
    places = torch.arange(k)
    return tools.result(values, places, tools.whole(x), residuals, tools.products, invariant, norm)


def _check_iters(iters: int | None) -> None:
    if iters is not None and (not is_whole(iters) or iters < 1):
        raise ConfigError(f"`iters` (={iters!r}) must be an integer of at least 1")


def _longest(columns: Float[Tensor, "n k"]) -> float:
    return max(float(columns.norm(dim=0).max()), _TINY)


def _new_directions(basis: Float[Tensor, "n k"], columns: Float[Tensor, "n m"]) -> Float[Tensor, "n r"]:
    """An orthonormal basis of what the columns add to an orthonormal one; each column counts alike."""
    rest: Tensor = columns / columns.norm(dim=0).clamp_min(_TINY)
    for _ in range(2):
        rest = rest - basis @ (basis.mT @ rest)
        u, s, _ = torch.linalg.svd(rest, full_matrices=False)
        rest = u[:, s > 1e-10]
    return rest


_TINY = torch.finfo(torch.float64).tiny


class _Tools:
    def __init__(self, operator: Symmetric, k: int, which: str, tol: float, generator: torch.Generator | None) -> None:
        self.operator, self.k, self.which, self.tol = operator, k, which, tol
        self.size = operator.shape[0]
        space = getattr(operator, "space", None)
        support = getattr(space, "support", None)
        self.coordinates = torch.arange(self.size)
        if support is not None:
            self.coordinates = self.coordinates[support.cpu()]
        self.dtype: torch.dtype = getattr(space, "dtype", torch.float64)
        self.device: torch.device = getattr(space, "device", torch.device("cpu"))
        self.source = torch.Generator().manual_seed(0) if generator is None else generator
        self.products = 0
        if which not in ENDS:
            raise ConfigError(f"`which` (={which!r}) must be one of {', '.join(ENDS)}")
        if not is_whole(k) or not 1 <= k <= self.active:
            raise ConfigError(f"`k` (={k!r}) must be an integer from 1 to the {self.active} coordinates of the support")

    @property
    def active(self) -> int:
        return len(self.coordinates)

    def times(self, columns: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        self.products += columns.shape[1]
        found: Tensor = self.operator.mm(columns.to(device=self.device, dtype=self.dtype))
        return found.detach().cpu().double()

    def whole(self, columns: Float[Tensor, "s k"]) -> Float[Tensor, "n k"]:
        """Columns on the support, with zeros outside."""
        found = torch.zeros(self.size, columns.shape[1], dtype=torch.float64)
        found[self.coordinates] = columns
        return found

    def times_within(self, columns: Float[Tensor, "s k"]) -> Float[Tensor, "s k"]:
        return self.times(self.whole(columns))[self.coordinates]

    def start(self, given: Tensor | None) -> Float[Tensor, " n"]:
        vector = torch.zeros(self.size, dtype=torch.float64)
        drawn = torch.randn(self.active, generator=self.source, dtype=torch.float64)
        vector[self.coordinates] = drawn if given is None else given.detach().cpu().double()[self.coordinates]
        norm = float(vector.norm())
        if not 0 < norm < torch.inf:
            raise ConfigError(f"`start` (of norm {norm}) must be a vector that is not zero on the support")
        return vector / norm

    def wanted(self, values: Float[Tensor, " m"]) -> Tensor:
        """Places of the wanted ones among ascending values, the largest value first."""
        k = min(self.k, len(values))
        places = torch.arange(len(values)).flip(0)
        if self.which == "LA":
            return places[:k]
        if self.which == "SA":
            return places[-k:]
        top = (k + 1) // 2
        return torch.cat([places[:top], places[len(values) - (k - top) :]])

    def result(
        self,
        values: Tensor,
        wanted: Tensor,
        vectors: Tensor,
        residuals: Tensor,
        iterations: int,
        invariant: bool,
        norm: float,
    ) -> Spectrum:
        moved = (vectors / vectors.norm(dim=0)).to(device=self.device, dtype=self.dtype)
        return Spectrum(values[wanted], moved, residuals, residuals <= self.tol * norm, iterations, invariant)


def _tridiagonal(alphas: list[float], betas: list[float]) -> tuple[Tensor, Tensor]:
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if len(alphas) > 1:
        off = torch.tensor(betas[: len(alphas) - 1], dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
    values, weights = torch.linalg.eigh(matrix)
    return values, weights
