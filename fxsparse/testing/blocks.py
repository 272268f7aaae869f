"""Building blocks of generated models: each kind of weight use that a transform must understand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FunctionalLinear(nn.Module):
    """F.linear on a parameter of its own, (out, in)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.shift = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in) -> (batch, out)."""
        return F.linear(x, self.kernel, self.shift)


class Matmul(nn.Module):
    """x @ W with W of (in, out), as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in) -> (batch, out)."""
        return x @ self.kernel


class Einsum(nn.Module):
    """A contraction in letters, W of (out, in)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in) -> (batch, out)."""
        return torch.einsum("bi,oi->bo", x, self.kernel)


class TiedTranspose(nn.Module):
    """An encoder and a decoder on one parameter; the decoder reads it outside its module."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.encode = nn.Linear(features, hidden)
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        return F.linear(torch.tanh(self.encode(x)), self.encode.weight.t(), self.shift)


class TiedModules(nn.Module):
    """Two Linear modules that share one parameter."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, features)
        self.second = nn.Linear(features, features)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features) -> the same."""
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result


class Reused(nn.Module):
    """One module called twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Shape as the input."""
        result: Tensor = self.body(torch.tanh(self.body(x)))
        return result


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Shape as the input."""
        added: Tensor = self.body(x)
        return x + added


class Concat(nn.Module):
    """Several bodies on one input, their outputs joined along axis 1."""

    def __init__(self, bodies: Sequence[nn.Module]) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features, ...) -> (batch, sum of features, ...)."""
        return torch.cat([body(x) for body in self.bodies], 1)


class Branching(nn.Module):
    """Control flow on values, which no tracer takes: one of two bodies, by the sign of the input's mean."""

    def __init__(self, positive: nn.Module, negative: nn.Module) -> None:
        super().__init__()
        self.positive = positive
        self.negative = negative

    def forward(self, x: Tensor) -> Tensor:
        """Shape of the bodies' outputs."""
        chosen = self.positive if x.mean() > 0 else self.negative
        result: Tensor = chosen(x)
        return result


class PythonLinear(nn.Module):
    """A functional weight inside control flow: it can only be masked at the parameter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in) -> (batch, out)."""
        scale = 2.0 if bool(x.sum() > 0) else 0.5
        return scale * F.linear(x, self.kernel)


class FunctionalConv(nn.Module):
    """F.conv2d on a parameter of its own, 3x3, same size."""

    def __init__(self, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outputs, inputs // groups, 3, 3) / (9 * inputs) ** 0.5)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height, width)."""
        return F.conv2d(x, self.kernel, padding=1, groups=self.groups)


class Pooled(nn.Module):
    """A convolutional body, a mean over space, and a linear head."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)."""
        result: Tensor = self.head(self.body(x).mean((2, 3)))
        return result
