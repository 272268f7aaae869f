"""Synaptic flow: how much each weight carries from inputs to outputs, without data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor, nn

from fxsparse.nn import masked_weights
from fxsparse.training.batches import call, float_tensors, ones_like


class Flow:
    """R = the sum of the outputs of the network of |parameters| for one input of ones (arXiv 2006.05467).

    Works on a float64 copy in eval mode, with absolute parameters and running means; running variances stay as they
    are, and so does the model.

    Args:
        model: The model, with masks.
        inputs: A batch's inputs, of which only the form is read.

    Raises:
        ConfigError: inputs that cannot be ones.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.ones, self.twin = ones_like(inputs), copy.deepcopy(model).double().eval()
        with torch.no_grad():
            for parameter in self.twin.parameters():
                if parameter.is_floating_point():
                    parameter.abs_().requires_grad_(True)
            for name, buffer in self.twin.named_buffers():
                if name.rpartition(".")[2] == "running_mean":
                    buffer.abs_()

    def scores(self, masks: Mapping[str, Bool[Tensor, "*shape"]]) -> dict[str, Float64[Tensor, "*shape"]]:
        """|w dR/dw| of every masked weight under these masks, none of which revives a weight; 0 where it is dead."""
        weights = masked_weights(self.twin)
        for name, masked in weights.items():
            masked.set_mask_(masks[name])
        with torch.enable_grad():
            total = torch.stack([each.sum() for each in float_tensors(call(self.twin, self.ones))]).sum()  # R
            slopes = torch.autograd.grad(
                total, [each.weight for each in weights.values()], allow_unused=True, materialize_grads=True
            )
        return {
            name: torch.where(masked.mask, (masked.weight.detach() * slope).abs(), 0.0)
            for (name, masked), slope in zip(weights.items(), slopes, strict=True)
        }
