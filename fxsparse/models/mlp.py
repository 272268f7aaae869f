"""Fully connected networks of any widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fxsparse.models.lenet import check_positive


class MLP(nn.Module):
    """Linear layers with ReLU between them; inputs of any shape are flattened.

    Args:
        in_features: input values per sample.
        hidden: widths of the hidden layers.
        classes: number of logits.
    """

    def __init__(self, in_features: int = 64, hidden: Sequence[int] = (1024, 1024, 1024), classes: int = 10) -> None:
        super().__init__()
        check_positive(in_features=in_features, classes=classes, **{f"hidden[{i}]": n for i, n in enumerate(hidden)})
        widths = [in_features, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.output = nn.Linear(widths[-1], classes)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits of a batch; every sample holds `in_features` values."""
        x = torch.flatten(x, 1)
        for layer in self.hidden:
            x = functional.relu(layer(x))
        logits: Tensor = self.output(x)
        return logits


def mlp(in_features: int = 64, hidden: Sequence[int] = (1024, 1024, 1024), classes: int = 10) -> MLP:
    """A fresh fully connected network; draws from torch's global generator like any module.

    >>> sum(p.numel() for p in mlp(64, (1024, 1024, 1024)).parameters())
    2176010
    """
    return MLP(in_features, hidden, classes)
