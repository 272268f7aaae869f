"""Compaction of generated models with random dead rows and columns."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fxsparse
from fxsparse.graph import CapturedModule
from fxsparse.planning.compaction import compact, compaction_report
from fxsparse.testing import models


def random_masks(model: nn.Module, dead: float) -> dict[str, torch.Tensor]:
    """Masks in which whole rows and columns are dead."""
    result = {}
    for name, mask in fxsparse.masks(model).items():
        fresh = torch.ones_like(mask)
        for dim in range(min(2, mask.ndim)):
            gone = torch.rand(mask.shape[dim]) < dead / (1 + dim)
            gone[0] = False
            fresh &= ~gone.view([-1 if axis == dim else 1 for axis in range(mask.ndim)])
        result[name] = fresh
    return result


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(), st.integers(0, 2**16), st.sampled_from((0.3, 0.7)))
def test_generated_models_compact_exactly(drawn, seed, dead) -> None:  # type: ignore[no-untyped-def]
    model, inputs = drawn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sparse = fxsparse.transform(model, inputs)
        fxsparse.set_masks(sparse, random_masks(sparse, dead))
        for module in sparse.modules():
            if isinstance(getattr(module, "running_mean", None), torch.Tensor):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        small = compact(sparse, inputs)
    if isinstance(small, CapturedModule):  # in Python, sizes may be written where no rewrite reaches them
        assert not compaction_report(small).refused
    assert list(small.state_dict()) == list(sparse.state_dict())
    with torch.no_grad():
        expected, found = sparse.eval()(*inputs), small.eval()(*inputs)
    assert expected.shape == found.shape
    assert float((expected - found).abs().max()) <= 1e-12 * max(float(expected.abs().max()), 1e-300)
    for name, mask in fxsparse.masks(small).items():
        weight = small.get_parameter(name).detach()
        assert mask.shape == weight.shape and not weight[~mask].any()
