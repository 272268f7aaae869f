"""Generated models: compaction computes the same.

`FXSPARSE_EXAMPLES=5000` runs thousands (see tests/generated.py).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxsparse.nn import masks, set_masks
from fxsparse.planning import plan
from fxsparse.planning.compaction import compact, compaction_report
from fxsparse.testing import EVERYTHING, Ingredient, Program, programs, random_program
from tests.generated import assert_same_outputs, buffers_of, call, evaluated, examples, loss

QUIET = EVERYTHING - {Ingredient.STATE}
"""Models that repeat themselves in eval mode."""


def killed(program: Program, seed: int, share: float) -> nn.Module:
    """The sparse model with outputs of some weights dead, their biases too for every other one."""
    model = program.model()
    sparse = plan(model, program.inputs()).apply()
    generator = torch.Generator().manual_seed(seed)
    chosen = {}
    for name, mask in masks(sparse).items():
        alive = torch.rand(mask.shape[:1], generator=generator) >= share
        if not alive.all():
            chosen[name] = alive.view(-1, *[1] * (mask.ndim - 1)).expand(mask.shape).contiguous()
            bias = dict(sparse.named_parameters()).get(name.removesuffix("weight") + "bias")
            if name.endswith("weight") and bias is not None and bias.shape == alive.shape and len(chosen) % 2:
                bias.data.mul_(alive)
    set_masks(sparse, chosen)
    return sparse


@examples(30)
@given(programs(ingredients=QUIET), st.integers(0, 99), st.sampled_from((0.5, 0.25, 0.75)))
def test_a_compact_model_computes_the_same(program: Program, seed: int, share: float) -> None:
    assert_compacts(program, seed, share)


@pytest.mark.parametrize("seed", [0, 201, 420, 508, 775, 892, 1074])
def test_models_that_did_not(seed: int) -> None:
    assert_compacts(random_program(seed, ingredients=QUIET), seed, (0.5, 0.25, 0.75)[seed % 3 if seed > 1000 else 0])


def assert_compacts(program: Program, seed: int, share: float) -> None:
    sparse = killed(program, seed, share)
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    small = compact(sparse, program.inputs())
    report = compaction_report(small)
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in sparse.named_parameters()]
    assert masks(small).keys() == masks(sparse).keys()
    assert all(mask.shape == small.get_parameter(name).shape for name, mask in masks(small).items())
    sizes = sum(p.numel() for p in sparse.parameters()), sum(p.numel() for p in small.parameters())
    assert report.parameters == sizes and sizes[1] <= sizes[0] and (sizes[1] < sizes[0]) == bool(report.rows)
    for inputs in (program.inputs(), program.inputs(program.batch + 3, program.seed + 1)):
        assert_same_outputs(evaluated(small, inputs), evaluated(sparse, inputs), 1e-10)
    for name, buffer in buffers_of(small).items():
        assert buffer.ndim == sparse.get_buffer(name).ndim
    small.train()
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=0.01)
    loss(call(small, program.inputs())).backward()
    optimizer.step()
    for name, mask in masks(small).items():
        assert not small.get_parameter(name).detach()[~mask].any(), name


def test_most_plain_models_lose_their_dead_channels() -> None:
    removed = 0
    for seed in range(12):
        program = random_program(seed, ingredients=(Ingredient.MERGE,), required=Ingredient.MERGE, convolutional=False)
        small = compact(killed(program, seed, 0.5), program.inputs())
        removed += bool(compaction_report(small).rows)
    assert removed >= 8
