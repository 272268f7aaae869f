"""The trace and the extreme eigenpairs of a symmetric operator that has a diagonal and a seed."""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float
from torch import Tensor

from fxsparse.curvature.eigs import Spectrum, lanczos, lobpcg
from fxsparse.curvature.operator_protocol import SymmetricOperator
from fxsparse.curvature.trace import TraceEstimate, TraceMethod, estimate_trace
from fxsparse.errors import ConfigError
from fxsparse.sparsity.random import generator as keyed_generator


class SpectralOperator(SymmetricOperator):
    """What products and the diagonal tell of the spectrum.

    Attributes:
        seed: Seed of all draws.
    """

    seed: int

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(P, P)."""

    @abc.abstractmethod
    def diag(
        self,
        method: str = "exact",
        samples: int = 1,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, " P"]:
        """The diagonal."""

    def trace(
        self,
        method: TraceMethod | str = TraceMethod.EXACT,
        m: int = 30,
        generator: torch.Generator | None = None,
    ) -> TraceEstimate:
        """The trace of G_S; see `estimate_trace`. "exact" sums the exact diagonal.

        Raises:
            ConfigError: an unknown method, or too few products.
        """
        chosen = TraceMethod.of(method)
        if chosen is TraceMethod.EXACT:
            return TraceEstimate(float(self.diag().double().sum()), 0.0, 0, chosen)
        source = generator or keyed_generator(self.seed, 0, 0, "trace")
        return estimate_trace(self, chosen, m, source)

    def eigs(
        self,
        k: int = 1,
        which: str = "LA",
        iters: int | None = None,
        tol: float = 1e-6,
        *,
        method: str = "lanczos",
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Spectrum:
        """Extreme eigenpairs of G_S on its support; see `lanczos` and `lobpcg`.

        Raises:
            ConfigError: an unknown method or end of the spectrum, or k outside 1..|S|.
        """
        source = generator or keyed_generator(self.seed, 0, 0, "eigs")
        if method == "lanczos":
            return lanczos(self, k, which, iters, tol, source, start)
        if method == "lobpcg":
            return lobpcg(self, k, which, iters, tol, source)
        raise ConfigError(f"`method` (={method!r}) must be lanczos or lobpcg")
