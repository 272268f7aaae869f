"""Hypothesis strategies of weight shapes, densities and patterns."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from fxsparse.errors import ConfigError
from fxsparse.sparsity import LINEAR, Block, Channel, ConstantFanIn, Layout, NByM, Pattern, SharedSupport, Unstructured


def shapes(*, min_axes: int = 2, max_axes: int = 4, max_side: int = 9) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of weights: (out, in) or (out, in, *kernel)."""
    return st.lists(st.integers(1, max_side), min_size=min_axes, max_size=max_axes).map(tuple)


def densities() -> st.SearchStrategy[float]:
    """Alive fractions in (0, 1], the ends and awkward fractions among them."""
    awkward = st.sampled_from((1.0, 0.5, 0.1, 0.71, 1 / 3, 0.001))
    return awkward | st.floats(0.0, 1.0, exclude_min=True, allow_subnormal=False)


def sparsities() -> st.SearchStrategy[float]:
    """Dead fractions in [0, 1)."""
    return densities().map(lambda density: min(1.0 - density, 0.999999))


@st.composite
def patterns(
    draw: st.DrawFn, shape: Sequence[int] | None = None, layout: Layout = LINEAR, sparsity: float | None = None
) -> Pattern:
    """Patterns; with a shape, only those that fit it (and a sparsity, where one is given).

    Args:
        draw: Given by hypothesis.
        shape: Shape of the weight; any pattern without it.
        layout: Axes of the weight.
        sparsity: Dead fraction that the pattern must allow.
    """
    groups = draw(st.sampled_from(((1, 2), (2, 4), (1, 4), (2, 3))))
    candidates: list[Pattern] = [
        Unstructured(),
        NByM(*groups),
        Block(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        Channel(draw(st.integers(0, 1))),
        ConstantFanIn(),
        SharedSupport(draw(st.integers(1, 4))),
    ]
    if shape is not None:
        candidates = [pattern for pattern in candidates if _fits(pattern, shape, layout, sparsity)]
    return draw(st.sampled_from(candidates))


def _fits(pattern: Pattern, shape: Sequence[int], layout: Layout, sparsity: float | None) -> bool:
    try:
        units = pattern.units(shape, layout)
        if sparsity is not None:
            pattern.check_sparsity(sparsity)
            units.counts(sparsity)
    except ConfigError:
        return False
    return True
