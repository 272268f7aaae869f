"""Generated models: every pass alone, with its contract.

`FXSPARSE_EXAMPLES=5000` runs thousands (see tests/generated.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from torch import nn

from fxsparse.graph import provenance
from fxsparse.nn import Guard, MaskSpec, Route, masked_weights, masks
from fxsparse.passes import (
    EXACT,
    PASSES,
    Close,
    FoldMasks,
    InsertMasks,
    MaskParameters,
    Pass,
    SwapModules,
    graphs_of,
)
from fxsparse.planning import finalize
from tests.generated import (
    Planned,
    assert_close,
    assert_same_function,
    assert_same_outputs,
    evaluated,
    examples,
    masked_at_parameters,
    planned,
    trained,
)


def _of_route(drawn: Planned, route: Route) -> dict[str, MaskSpec]:
    return {
        name: dataclasses.replace(spec, guard=Guard.FORWARD)
        for weight in drawn.plan.masked
        for name, spec in weight.specs.items()
        if spec.route is route
    }


def _at_parameters(drawn: Planned) -> dict[str, MaskSpec]:
    """Any weight can be masked at the parameter, whatever route the plan found."""
    return {
        name: MaskSpec(spec.pattern, spec.layout, Route.PARAMETER, Guard.GRADIENT)
        for weight in drawn.plan.masked
        for name, spec in weight.specs.items()
        if spec.route in (Route.MODULE, Route.MASK_NODE, Route.PARAMETER)
    }


Made = tuple[nn.Module, Pass]
ALONE: Mapping[type[Pass], Callable[[Planned], Made]] = {
    SwapModules: lambda drawn: (drawn.plan.captured, SwapModules(_of_route(drawn, Route.MODULE))),
    InsertMasks: lambda drawn: (drawn.plan.captured, InsertMasks(_of_route(drawn, Route.MASK_NODE))),
    MaskParameters: lambda drawn: (drawn.plan.captured, MaskParameters(_at_parameters(drawn))),
    FoldMasks: lambda drawn: (drawn.plan.apply(), FoldMasks()),
}
"""How a pass is run on its own; one that is not listed is taken from the plan, or run on the sparse model."""


def alone(kind: type[Pass], drawn: Planned) -> Made:
    """A module and a pass of this kind for it."""
    if kind in ALONE:
        return ALONE[kind](drawn)
    for each in drawn.plan.pipeline().passes:
        if type(each) is kind:
            return drawn.plan.captured, each
    return drawn.plan.apply(), kind()


def check_alone(kind: type[Pass], drawn: Planned) -> None:
    """Run the pass with its contract, and compare what it made once more, slowly."""
    module, each = alone(kind, drawn)
    before, nodes = _written(module), _nodes(module)
    result = each(module, drawn.inputs)
    assert _written(module) == before
    assert result.module is not module
    assert result.modified == bool(result.records) or not each.targets
    assert {record.target for record in result.records} >= set(each.targets)
    born = [node for node in _nodes(result.module) if node.name not in {node.name for node in nodes}]
    assert all(provenance.read(node) is not None for node in born)
    for inputs in (drawn.inputs, drawn.other_inputs()):
        if each.equivalence is EXACT:
            assert_same_function(result.module, module, inputs)
        elif isinstance(each.equivalence, Close):
            for a, b in zip(evaluated(result.module, inputs), evaluated(module, inputs), strict=True):
                torch.testing.assert_close(a, b, rtol=each.equivalence.rtol, atol=each.equivalence.atol)
    if each.idempotent:
        assert not each(result.module, drawn.inputs).modified


def _nodes(module: nn.Module) -> list[torch.fx.Node]:
    return [node for found in graphs_of(module).values() for node in found.graph.nodes]


def _written(module: nn.Module) -> tuple[object, ...]:
    return (
        [(path, type(each).__name__, each.training) for path, each in module.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad) for name, p in module.named_parameters(remove_duplicate=False)],
        [(name, id(b)) for name, b in module.named_buffers(remove_duplicate=False)],
        [(name, value.detach().numpy().tobytes()) for name, value in module.state_dict().items()],
        [(path, found.code) for path, found in graphs_of(module).items()],
    )


@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.__name__)
@examples(15)
@given(drawn=planned())
def test_a_pass_alone_keeps_its_contract(kind: type[Pass], drawn: Planned) -> None:
    check_alone(kind, drawn)


@examples(25)
@given(planned())
def test_masks_of_every_route_are_as_good_at_the_parameter(drawn: Planned) -> None:
    """All weights masked at the parameter, on the captured model: the same numbers as the planned routes."""
    by_parameter = MaskParameters(_at_parameters(drawn))(drawn.plan.captured).module
    sparse = drawn.plan.apply()
    held = {name: mask for name, mask in masks(sparse).items() if name in masks(by_parameter)}
    if len(held) < len(masks(sparse)):
        return
    twin = type(drawn)(drawn.program, drawn.model, drawn.inputs, drawn.plan).program.model()
    for weight in masked_weights(by_parameter).values():
        assert weight.spec.route is Route.PARAMETER
        twin.get_parameter(weight.name).data.mul_(held[weight.name])
    found, expected = trained(sparse, drawn.inputs), trained(twin, drawn.inputs)
    for a, b in zip(found.outputs, expected.outputs, strict=True):
        assert_close({"": a}, {"": b})
    for name, gradient in found.gradients.items():
        mask = held.get(name)
        assert_close(
            {name: gradient},
            {name: expected.gradients[name] if mask is None else torch.where(mask, expected.gradients[name], 0)},
        )


@examples(25)
@given(planned())
def test_folding_is_masking(drawn: Planned) -> None:
    sparse = drawn.plan.apply()
    dense = finalize(sparse)
    if masks(dense):  # a mask of a computed weight that no fold can express
        return
    assert list(dense.state_dict()) == list(drawn.model.state_dict())
    assert {type(m).__name__ for m in dense.modules()} == {type(m).__name__ for m in drawn.model.modules()}
    for inputs in (drawn.inputs, drawn.other_inputs()):
        assert_same_function(dense, sparse, inputs)
        found, expected = trained(dense, inputs), trained(sparse, inputs)
        assert_same_outputs(found.outputs, expected.outputs)
        for name, gradient in expected.gradients.items() if masked_at_parameters(sparse) else ():
            mask = masks(sparse).get(name)
            alive = found.gradients[name] if mask is None else torch.where(mask, found.gradients[name], 0)
            assert_close({name: alive}, {name: gradient})
