"""Sparse models from dense ones, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxsparse.errors import ConfigError, PassError
from fxsparse.graph import isolated_clone, specialisation
from fxsparse.graph.scopes import collector_paused
from fxsparse.graph.taps import without_taps
from fxsparse.nn import MaskedWeight, SparseModule, mask_spec, masked_weights
from fxsparse.nn.sharded import check_whole
from fxsparse.passes import FoldMasks, Verify
from fxsparse.planning.equality import Equality, release_masks
from fxsparse.planning.planner import UNIFORM, UNSTRUCTURED, Options, decide
from fxsparse.planning.select import Selector
from fxsparse.planning.table import format_table
from fxsparse.planning.weight_plan import RECORD, ROUTES, WeightPlan
from fxsparse.sparsity import Distribution, Pattern


def transform(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    sparsity: float = 0.0,
    pattern: Pattern = UNSTRUCTURED,
    distribution: Distribution = UNIFORM,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    fisher: object = None,
    specialize: bool = False,
    inplace: bool = False,
    verify: Verify = Verify.QUICK,
) -> nn.Module:
    """Give a model masks: `plan(...)` followed by `apply(inplace)`.

    At sparsity 0 the result computes the same outputs, bit for bit, and the same gradients.

    Args:
        model: Any module; it stays as it was unless `inplace`. The result has none of its Fisher taps.
        example_inputs: A tuple of positional inputs, or (args, kwargs); see `plan`.
        sparsity: Dead fraction in [0, 1).
        pattern: Which masks are legal.
        distribution: How the sparsity is shared among the weights.
        include: What to mask instead of the default; see `plan`.
        exclude: What to leave out.
        fisher: Not available in this version.
        specialize: Allow one graph that only takes inputs like the example's; see `plan`.
        inplace: Reuse the model's parameters: no copy, and an optimizer of the model trains the result.
        verify: How the equality above is shown on the example inputs: `Verify.QUICK`, in the model's own dtype, or
            `Verify.FULL`, in float64 with all gradients.

    Returns:
        The sparse model, with the original parameter names.

    Raises:
        ConfigError, CaptureError, DataError: as `plan`.
        PassError: a rewrite changed what the model computes.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> sparse = transform(model, (torch.randn(3, 8),), sparsity=0.75)
    >>> print(sparsity_report(sparse))
    weight    shape  route   pattern         alive  density  reason
    0.weight  4x8    module  Unstructured()  8      0.2500   weight of Linear; its module reads it masked
    2.weight  2x4    module  Unstructured()  2      0.2500   weight of Linear; its module reads it masked
    2 masked weights: 10 of 40 elements alive, density 0.2500
    """
    if not isinstance(verify, Verify):
        raise ConfigError(f"`verify` (={verify!r}) must be Verify.QUICK or Verify.FULL")
    options = Options(sparsity, pattern, distribution, include, exclude, fisher, specialize)
    model = without_taps(model)
    with collector_paused():
        copied = not inplace and not specialize  # a specialised graph is made by the identity of the tensors
        planned, captured = decide(model, example_inputs, options, compare=False, copied=copied)
        equality = Equality(model, example_inputs, verify, captured.reference)
        try:
            return planned.carry_out(inplace, equality, consume=inplace or copied)
        except PassError:  # a graph or a pass: with graphs that were compared one by one it is the pass
            planned, _ = decide(model, example_inputs, options, known=captured)
            return planned.carry_out(inplace, equality)


def finalize(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Fold the masks of a sparse model: plain modules again, dead weights stored as zeros.

    Masks behind a computation that does not keep zeros (weight standardisation) cannot be folded and stay.

    Args:
        model: A model with masks; it stays as it was unless `inplace`. The result has none of its Fisher taps.
        inplace: The result takes over the parameters and buffers of `model`, which must not be used any more.

    Returns:
        The dense model: the original parameter names, no masks.

    Raises:
        ConfigError: the model has no masks, or is spread over ranks.
        PassError: a module is in a resurrection phase, or dead entries of a weight masked at the parameter are not
            zero.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` (={type(model).__name__}) must be a torch.nn.Module")
    if not masked_weights(model):
        raise ConfigError(f"`model` (={type(model).__name__}) has no masks to fold; transform it first")
    check_whole(model)
    model = without_taps(model)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    source = model if inplace else isolated_clone(model, copied=names)
    if isinstance(source, SparseModule):  # the root itself cannot be replaced by a pass
        return source.to_dense()
    result = FoldMasks()(source).module
    release_masks(source)
    for module in result.modules():
        module.__dict__.pop(RECORD, None)
    return result


@dataclass(frozen=True)
class WeightRow:
    """One weight of a `SparsityReport`.

    Attributes:
        name: Its first name.
        shape: Its shape.
        pattern: Which masks are legal; "-" without a mask.
        alive: Alive elements; all of them without a mask.
        route: Where the mask takes effect; "-" without one.
        reason: Why it is masked so, or not; "" when that is not known.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    alive: int
    route: str
    reason: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Alive fraction in [0, 1]."""
        return self.alive / self.numel if self.numel else 1.0


@dataclass(frozen=True)
class SparsityReport:
    """What is alive in a model; `str()` of it is a table.

    Attributes:
        rows: Every masked parameter and every other one of at least two axes, in the order of `named_parameters`.
        notes: What else to know of the model: whether its graph is specialised.
    """

    rows: tuple[WeightRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def masked(self) -> tuple[WeightRow, ...]:
        """The rows with a mask."""
        return tuple(row for row in self.rows if row.route != "-")

    @property
    def density(self) -> float:
        """Alive fraction of all masked weights together; 1 without masks."""
        total = sum(row.numel for row in self.masked)
        return sum(row.alive for row in self.masked) / total if total else 1.0

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1.0 - self.density

    def __str__(self) -> str:
        header = ("weight", "shape", "route", "pattern", "alive", "density", "reason")
        cells = [
            (r.name, "x".join(map(str, r.shape)), r.route, r.pattern, str(r.alive), f"{r.density:.4f}", r.reason)
            for r in self.rows
        ]
        alive, total = sum(row.alive for row in self.masked), sum(row.numel for row in self.masked)
        tail = f"{len(self.masked)} masked weights: {alive} of {total} elements alive, density {self.density:.4f}"
        return "\n".join([format_table(header, cells), tail, *self.notes])


def _route(weight: MaskedWeight) -> str:
    specs = [mask_spec(module, attribute) for module, attribute in weight.owners]
    return min((spec.route for spec in specs if spec is not None), key=ROUTES.index).value


def sparsity_report(model: nn.Module) -> SparsityReport:
    """What every weight of a model keeps: shape, pattern, alive elements, density, route.

    Args:
        model: A model, with masks or without.
    """
    masked = masked_weights(model)
    known: dict[str, WeightPlan] = {weight.name: weight for weight in model.__dict__.get(RECORD, ())}
    rows = []
    for name, parameter in model.named_parameters():
        reason = known[name].reason if name in known else ""
        if name in masked:
            weight = masked[name]
            alive = int(weight.mask.sum()) if not weight.mask.is_meta else weight.mask.numel()
            row = WeightRow(name, tuple(weight.shape), str(weight.spec.pattern), alive, _route(weight), reason)
        elif parameter.ndim >= 2 or name in known:
            row = WeightRow(name, tuple(parameter.shape), "-", parameter.numel(), "-", reason)
        else:
            continue
        rows.append(row)
    special = specialisation(model)
    return SparsityReport(tuple(rows), () if special is None else (special,))
