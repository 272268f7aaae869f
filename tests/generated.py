"""What the tests over generated models share: how many, how they are run, and slow oracles.

`FXSPARSE_EXAMPLES=5000 python -m pytest tests/test_generated_transform.py` runs 5000 examples of each property, other
ones each time; without it a test runs its own small number, the same ones each time. `FXSPARSE_SHRINK=1` shrinks the
model of a failure, which takes minutes; models are small without that, and print as scripts.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.errors import ConfigError
from fxsparse.graph import fresh_inputs, split_inputs
from fxsparse.nn import Route, masked_weights, masks
from fxsparse.planning import Plan, plan
from fxsparse.sparsity import Block, Channel, ConstantFanIn, NByM, Pattern, SharedSupport, Unstructured
from fxsparse.testing import EVERYTHING, Program, programs

BY_HAND = os.environ.get("FXSPARSE_EXAMPLES")
PHASES = (Phase.explicit, Phase.generate, *([Phase.shrink] if os.environ.get("FXSPARSE_SHRINK") else []))
SEED = 11


def examples(count: int) -> settings:
    """Settings of a property with this many examples in continuous integration."""
    return settings(
        max_examples=int(BY_HAND or count),
        derandomize=BY_HAND is None,
        database=None,
        deadline=None,
        phases=PHASES,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


def anything() -> st.SearchStrategy[Program]:
    """Programs of all ingredients."""
    return programs(ingredients=EVERYTHING)


@dataclass
class Run:
    """What one run shows."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def call(model: nn.Module, inputs: Any, parameters: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """Outputs as a flat list, from copies of the inputs; with other parameters where they are given."""
    args, kwargs = fresh_inputs(*split_inputs(inputs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if parameters is None:
            made = model(*args, **kwargs)
        else:
            made = torch.func.functional_call(model, dict(parameters), args, kwargs)
    return [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor)]


def loss(outputs: list[Tensor]) -> Tensor:
    """A sum that treats every entry differently."""
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        if output.requires_grad:
            total = (
                total + (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)).sum()
            )
    return total


def evaluated(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Outputs in eval mode, without gradients."""
    with torch.no_grad():
        return [output.detach() for output in call(copy.deepcopy(model).eval(), inputs)]


def trained(model: nn.Module, inputs: Any, training: bool = True) -> Run:
    """Outputs, gradients and buffers of one forward and backward pass of a copy."""
    twin = copy.deepcopy(model).train(training)
    outputs = call(twin, inputs)
    loss(outputs).backward()
    gradients = {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}
    return Run([output.detach() for output in outputs], gradients, buffers_of(twin))


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are no masks."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype is not torch.bool}


def with_dead_zeroed(model: nn.Module, sparse: nn.Module) -> nn.Module:
    """A copy of the dense model with zeros where the sparse one is masked."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks(sparse).items():
            twin.get_parameter(name).mul_(mask)
    return twin


def multiplied(model: nn.Module, sparse: nn.Module, inputs: Any, training: bool = True) -> Run:
    """The oracle: the dense model, called with `weight * mask` in place of each masked weight."""
    twin = copy.deepcopy(model).train(training)
    leaves = dict(twin.named_parameters())  # functional_call does not restore modules that have two names
    named = {name: leaves[name] * mask for name, mask in masks(sparse).items()}
    outputs = call(twin, inputs, named)
    loss(outputs).backward()
    gradients = {name: p.grad.clone() for name, p in leaves.items() if p.grad is not None}
    return Run([output.detach() for output in outputs], gradients, buffers_of(twin))


def assert_same_outputs(found: list[Tensor], expected: list[Tensor], relative: float = 0.0) -> None:
    """Bit for bit, the sign of zero apart; or within `relative` of the largest entry.

    torch multiplies a non-contiguous input by a weight in another order where the weight does not require a gradient,
    so without gradients even equal functions may differ in the last place.
    """
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is b.dtype and a.shape == b.shape
        if relative and a.is_floating_point():
            assert_close({"output": a}, {"output": b}, relative)
        else:
            assert torch.equal(a, b), float((a - b).abs().max())


def assert_same_function(found: nn.Module, expected: nn.Module, inputs: Any) -> None:
    """The same outputs in eval mode: bit for bit with gradients, to rounding without."""
    first, second = trained(found, inputs, training=False), trained(expected, inputs, training=False)
    assert_same_outputs(first.outputs, second.outputs)
    assert_same_outputs(evaluated(found, inputs), evaluated(expected, inputs), 1e-12)


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float = 1e-9) -> None:
    """Each tensor within `relative` of its largest entry."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) if value.numel() else 0.0
        difference = (found[name] - value).abs().max() if value.numel() else 0.0
        assert float(difference) <= relative * (scale + 1e-3), (name, float(difference), scale)


def assert_dead_are_zero(model: nn.Module) -> None:
    """zeros == ~mask: generated weights are never exactly zero."""
    for name, mask in masks(model).items():
        assert torch.equal(model.get_parameter(name).detach() == 0, ~mask), name


PATTERNS: tuple[Pattern, ...] = (
    Unstructured(),
    Channel(0),
    Block(2, 2),
    NByM(2, 4),
    NByM(1, 2),
    ConstantFanIn(),
    SharedSupport(2),
    Channel(1),
    Block(1, 3),
    SharedSupport(1),
)
SPARSITIES = (0.5, 0.8, 0.25, 0.0, 0.9, 0.6)


@dataclass(frozen=True, eq=False)
class Planned:
    """A program, its model and inputs, and a plan for it."""

    program: Program
    model: nn.Module
    inputs: Any
    plan: Plan

    def other_inputs(self) -> Any:
        """Other values, of another batch size."""
        return self.program.inputs(self.program.batch + 3, self.program.seed + 1)

    def __repr__(self) -> str:
        patterns = sorted({str(weight.pattern) for weight in self.plan.masked})
        call = f"plan(model, inputs, sparsity={self.plan.sparsity}, pattern={', '.join(patterns)})"
        return f"{self.program}{call}\n{self.plan}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"\n{self}")


@st.composite
def planned(draw: st.DrawFn, from_programs: st.SearchStrategy[Program] | None = None) -> Planned:
    """A program, and a plan of a random sparsity with a pattern that fits all weights of its model."""
    program = draw(anything() if from_programs is None else from_programs)
    return plan_for(program, draw(st.sampled_from(PATTERNS)), draw(st.sampled_from(SPARSITIES)))


def plan_for(program: Program, pattern: Pattern, sparsity: float) -> Planned:
    """The plan with this pattern, without structure where the pattern does not fit all weights."""
    model, inputs = program.model(), program.inputs()
    if isinstance(pattern, NByM):
        sparsity = 1 - pattern.n / pattern.m
    try:
        decided = plan(model, inputs, sparsity=sparsity, pattern=pattern)
    except ConfigError:
        decided = plan(model, inputs, sparsity=sparsity)
    return Planned(program, model, inputs, decided)


def masked_at_parameters(sparse: nn.Module) -> bool:
    """Whether all masks are of parameters, none of a weight that is computed from them."""
    return all(weight.spec.route is not Route.EFFECTIVE for weight in masked_weights(sparse).values())
