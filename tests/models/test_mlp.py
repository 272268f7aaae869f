"""The fully connected network of any widths: exact sizes, forward by hand, bad arguments."""

from __future__ import annotations

import pytest
import torch

from fxsparse.errors import ConfigError
from fxsparse.models import mlp


def test_sizes_and_forward_by_hand() -> None:
    assert sum(p.numel() for p in mlp().parameters()) == 65 * 1024 + 2 * 1025 * 1024 + 1025 * 10
    model, x = mlp(12, (7, 5), 3).double(), torch.randn(4, 3, 4, dtype=torch.float64)
    first, second, last = (model.get_parameter(f"{n}.weight") for n in ("hidden.0", "hidden.1", "output"))
    expected = ((x.flatten(1) @ first.T).clamp(min=0) @ second.T).clamp(min=0) @ last.T + model.output.bias
    torch.testing.assert_close(model(x), expected)
    assert mlp(12, (), 3)(torch.randn(2, 12)).shape == (2, 3)


@pytest.mark.parametrize("wrong", [{"in_features": 0}, {"hidden": (4, 0)}, {"classes": 0}])
def test_sizes_below_one_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        mlp(**wrong)
