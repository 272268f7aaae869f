"""The public strategies draw what they promise."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.sparsity import PATTERNS, Pattern
from fxsparse.testing import densities, models, patterns, shapes, sparsities

few = settings(max_examples=30, deadline=None)


@few
@given(models())
def test_models_run_and_have_a_differentiable_weight(drawn: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
    model, inputs = drawn
    assert model.training and all(p.dtype is torch.float64 for p in model.parameters())
    output = copy.deepcopy(model)(*inputs)
    assert output.shape[0] == inputs[0].shape[0] and output.requires_grad and torch.isfinite(output).all()
    assert any(p.ndim >= 2 for p in model.parameters())


@few
@given(st.data())
def test_drawing_leaves_the_global_random_state_alone(data: st.DataObject) -> None:
    before = torch.get_rng_state()
    data.draw(models())
    assert torch.equal(before, torch.get_rng_state())


@few
@given(models(convolutional=True), models(convolutional=False))
def test_kinds_can_be_chosen(image: tuple[nn.Module, tuple[Tensor]], vector: tuple[nn.Module, tuple[Tensor]]) -> None:
    assert image[1][0].ndim == 4 and vector[1][0].ndim == 2


@few
@given(shapes(), densities(), sparsities(), st.data())
def test_values(shape: tuple[int, ...], density: float, sparsity: float, data: st.DataObject) -> None:
    assert 2 <= len(shape) <= 4 and 0 < density <= 1 and 0 <= sparsity < 1
    pattern = data.draw(patterns(shape, sparsity=sparsity))
    assert isinstance(pattern, Pattern)
    pattern.mask(torch.zeros(shape), sparsity)
    assert isinstance(data.draw(patterns()), PATTERNS)
