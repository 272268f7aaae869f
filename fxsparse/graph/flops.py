"""Floating-point operations by the convention of the MicroNet counter, as RigL and SRigL publish them.

Not to be mixed with the multiply-accumulates of `fxsparse.graph.accounting`.
"""

from __future__ import annotations

from collections.abc import Mapping

from fxsparse.errors import ConfigError
from fxsparse.graph.recorder import Recording, Use


def micronet_flops(recording: Recording, densities: Mapping[str, float] | None = None) -> float:
    """FLOPs of one forward pass by the MicroNet convention.

    A convolution with O output elements that reads v = k^2 C_in / g inputs for each takes O (2 v d + 1): v d products,
    v d - 1 additions, one bias addition and one ReLU product for every convolution, whether it has them or not. A
    linear layer takes 2 |W| d per token (bias, no ReLU). Norms, pooling and residual additions are not counted.

    Args:
        recording: of a run at batch size 1.
        densities: parameter name -> density d in [0, 1], real, not rounded to counts; 1 where absent.

    Returns:
        The number of FLOPs, real-valued because the densities are.

    Raises:
        ConfigError: when a density lies outside [0, 1] or names no recorded weight.

    Source:
        Evci et al., Rigging the Lottery (arXiv 1911.11134), appendix H; google-research/micronet_challenge.
    """
    densities = densities or {}
    layers = [use for use in recording.uses if use.op.startswith("conv") or use.op == "linear"]
    layers = [use for use in layers if use.argument == "weight" and use.macs]
    known = {use.parameter for use in layers}
    for name, density in densities.items():
        if name not in known:
            raise ConfigError(f"`densities` names `{name}`, which is no weight of a convolution or linear layer")
        if not 0.0 <= density <= 1.0:
            raise ConfigError(f"`densities[{name!r}]` (={density}) must lie in [0, 1]")
    return sum(_layer_flops(use, densities.get(use.parameter, 1.0)) for use in layers)


def _layer_flops(use: Use, density: float) -> float:
    macs = use.macs or 0
    if use.op == "linear":
        return 2.0 * macs * density
    outputs = 1
    for size in use.output_shape or ():
        outputs *= size
    return 2.0 * macs * density + outputs  # O (2 v d + 1), macs = O v


def rigl_training_flops(sparse: float, dense: float, every: int) -> float:
    """Mean training FLOPs per sample and step of RigL: (3 f_S dT + 2 f_S + f_D) / (dT + 1).

    Args:
        sparse: f_S, forward FLOPs of the sparse network.
        dense: f_D, forward FLOPs of the dense network (a dense step costs 3 f_D).
        every: dT, steps between two mask updates, at least 1.

    Raises:
        ConfigError: when `every` is below 1.

    Source:
        Evci et al., Rigging the Lottery (arXiv 1911.11134), section 4.
    """
    if every < 1:
        raise ConfigError(f"`every` (={every}) must be at least 1")
    return (3 * sparse * every + 2 * sparse + dense) / (every + 1)
