"""The variance of a prediction under the Laplace approximation with a diagonal Fisher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fxsparse.curvature.arguments import check_number
from fxsparse.curvature.damage_tensors import Tensors, check_tensors, matched
from fxsparse.errors import ConfigError


@dataclass(frozen=True)
class Uncertainty:
    """A prediction's variance.

    Attributes:
        variance: grad s^T (N F + l I)^-1 grad s, at least 0.
        per_parameter: Each parameter's part of it.
    """

    variance: float
    per_parameter: Mapping[str, float]

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return math.sqrt(self.variance)


def fisher_uncertainty(fisher: Tensors, gradient: Tensors, samples: int, prior: float) -> Uncertainty:
    """The variance of a scalar output s (Immer et al., arXiv 2008.08400).

    Args:
        fisher: Mean Fisher diagonal by name; group Fishers expanded.
        gradient: The gradient of s with respect to each parameter.
        samples: N, the number of units that the posterior has seen.
        prior: l, the prior precision, positive.

    Raises:
        ConfigError: a missing or mis-shaped Fisher or gradient (nothing is left out), N below 1, or a prior that is not
            positive.
        DataError: a Fisher is negative or not finite, or a gradient is not finite.

    >>> import torch
    >>> t = lambda *values: {"w": torch.tensor(values)}
    >>> fisher_uncertainty(t(1.0, 3.0), t(1.0, 2.0), 1, 1.0).variance
    1.5
    """
    check_number(samples, "samples", 1)
    check_number(prior, "prior", 0, above=True)
    check_tensors(fisher, "fisher")
    check_tensors(gradient, "gradient")
    left = [name for name in fisher if name not in gradient]
    if left:
        raise ConfigError(f"`gradient` has no entry for `{left[0]}` of `fisher`: give it, or zeros where s ignores it")
    each = {n: float((g.square() / (samples * f + prior)).sum()) for n, f, g in matched(fisher, gradient, "gradient")}
    return Uncertainty(math.fsum(each.values()), each)
