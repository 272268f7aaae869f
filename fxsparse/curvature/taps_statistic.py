"""Fisher statistics as gradients of parameters: collected during training, also under `torch.compile` and DDP.

A tap behind a layer is the identity; its backward pass returns the output gradient unchanged and the group squares,
summed over the batch, as the gradient of a parameter [groups] of zeros. Backward passes add up there as they do in any
gradient. Squares scale with the square of the loss: see `Instrumented.fisher`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxsparse.curvature.taps_conv import ConvSpec
from fxsparse.curvature.taps_formulas import ConvWeight, LinearWeight
from fxsparse.curvature.taps_layout import Layout
from fxsparse.errors import ConfigError, ExportError
from fxsparse.graph import capture
from fxsparse.nn.functional import masked_weight
from fxsparse.nn.masked import mask_name
from fxsparse.nn.slot import slots_of
from fxsparse.passes.instrument_fisher import CONTAINER, InstrumentFisher, RemoveFisher, Tap, statistics_of
from fxsparse.passes.places import split_name
from fxsparse.passes.snapshot import graphs_of


class _LinearTap(torch.autograd.Function):
    """y, and the row squares of a linear layer as the statistic's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, statistic: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, mask)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, mask = ctx.saved_tensors
        formula = LinearWeight(x, (delta.shape[-1], x.shape[-1]))
        rows = formula.rows(delta, Layout(0), x.shape[0], mask)
        return delta, None, rows.sum(0), None


class _ConvTap(torch.autograd.Function):
    """y, and the channel squares of a convolution as the statistic's gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, statistic: Tensor, mask: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(x, mask)
        ctx.options = options
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Any, ...]:
        x, mask = ctx.saved_tensors
        shape, stride, padding, dilation, groups = ctx.options
        spec = ConvSpec(len(stride), stride, padding, dilation, groups)
        rows = ConvWeight(x, shape, spec).rows(delta, Layout(0), x.shape[0], mask)
        return delta, None, rows.sum(0), None, None, None, None, None, None


def linear_tap(y: Tensor, x: Tensor, statistic: Tensor, mask: Tensor | None, fresh: bool) -> Tensor:
    """The tap behind a linear layer with samples along axis 0; `fresh` gives a copy of y, for readers in place."""
    _check_not_exporting()
    tapped: Tensor = _LinearTap.apply(y, x, statistic, mask)  # type: ignore[no-untyped-call]  # untyped in torch
    return tapped.clone() if fresh else tapped


def conv_tap(
    y: Tensor,
    x: Tensor,
    statistic: Tensor,
    mask: Tensor | None,
    fresh: bool,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The tap behind a convolution with zero padding; see `linear_tap`."""
    _check_not_exporting()
    options = shape, stride, padding, dilation, groups
    tapped: Tensor = _ConvTap.apply(y, x, statistic, mask, *options)  # type: ignore[no-untyped-call]  # untyped in torch
    return tapped.clone() if fresh else tapped


def _check_not_exporting() -> None:
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        raise ExportError("the model has Fisher taps: take them away with `Instrumented.removed` before it is exported")


@dataclass(eq=False)
class Instrumented:
    """A module with taps.

    Attributes:
        module: the module to train, which shares its parameters with the model.
        refused: parameters without a tap, and why.
    """

    module: nn.Module
    refused: dict[str, str]

    @property
    def statistics(self) -> dict[str, nn.Parameter]:
        """The statistics by the tapped parameter's name; keep them out of the optimizer and of gradient clipping."""
        return statistics_of(self.module)

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters of the module without the statistics, for an optimizer or for clipping."""
        own = {id(statistic) for statistic in self.statistics.values()}
        return (parameter for parameter in self.module.parameters() if id(parameter) not in own)

    def fisher(self, samples: int, *, passes: int = 1, loss_scale: float = 1.0, mean: bool = True) -> dict[str, Tensor]:
        """The empirical group Fisher per sample that has arrived since `clear`.

        With DDP, which averages gradients over ranks, nothing is to be done: each rank's statistic is divided by the
        number of ranks, as is the mean over all their samples.

        Args:
            samples: samples of one backward pass on one rank.
            passes: how many backward passes were added up.
            loss_scale: by what the loss was multiplied before (AMP); squares carry its square.
            mean: whether the loss was a mean over the samples; else a sum.
        """
        unscaled = samples**2 if mean else 1
        factor = unscaled / (samples * passes * loss_scale**2)
        return {
            name: statistic.grad * factor if statistic.grad is not None else torch.zeros_like(statistic)
            for name, statistic in self.statistics.items()
        }

    def clear(self) -> None:
        """Forget what has arrived."""
        for statistic in self.statistics.values():
            statistic.grad = None

    def removed(self) -> nn.Module:
        """The module without taps."""
        return RemoveFisher()(self.module).module


def instrument_fisher(model: nn.Module, example_inputs: Any) -> Instrumented:
    """Put a tap behind every Linear and convolution whose weight is read once, with the samples along axis 0.

    Per-sample squares need a loss that is a sum or a mean of per-sample losses, and no BatchNorm in training mode. What
    has no tap is in `refused`, with the reason; `FisherCollector` collects all of it.

    Args:
        model: any module; it is captured.
        example_inputs: as for `fxsparse.transform`.

    Raises:
        CaptureError: the model cannot be captured.
        ConfigError: there is nothing to tap.
    """
    captured = capture(model, example_inputs).module
    reads, names = _reads(captured)
    taps, refused = [], {name: "it is read outside of the graphs" for name in names.values()}
    for name, places in reads.items():
        if len(places) > 1:
            refused[name] = f"it is read {len(places)} times, whose cross terms a tap cannot see"
            continue
        found = _tap(name, *places[0])
        if isinstance(found, str):
            refused[name] = found
        else:
            taps.append(found)
            del refused[name]
    if not taps:
        raise ConfigError(f"the model has no layer to tap: {next(iter(refused.items()), 'no parameters')}")
    return Instrumented(InstrumentFisher(taps)(captured).module, refused)


_Place = tuple[str, fx.GraphModule, fx.Node, nn.Module | None]


def _reads(module: nn.Module) -> tuple[dict[str, list[_Place]], dict[int, str]]:
    """Every node that reads a parameter, by its first name: a call of a module that holds it, or a `get_attr`."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    reads: dict[str, list[_Place]] = {}
    for path, found in graphs_of(module).items():
        children = dict(found.named_modules(remove_duplicate=False))
        for node in found.graph.nodes:
            if node.op == "call_module":
                owner = children[str(node.target)]
                for parameter in owner.parameters():
                    reads.setdefault(names[id(parameter)], []).append((path, found, node, owner))
            elif node.op == "get_attr":
                place, attribute = split_name(str(node.target))
                parameter = children[place]._parameters.get(attribute) if place in children else None
                if parameter is not None:
                    reads.setdefault(names[id(parameter)], []).append((path, found, node, None))
    return reads, names


def _tap(name: str, path: str, graph: fx.GraphModule, node: fx.Node, owner: nn.Module | None) -> Tap | str:
    if owner is None:
        return _functional_tap(name, path, graph, node)
    weight = owner._parameters.get("weight")
    if not isinstance(owner, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or weight is None:
        return f"it belongs to a {type(owner).__name__}"
    if name.rpartition(".")[2] != "weight":
        return "it is no weight"
    mask = f"{node.target}.{mask_name('weight')}" if "weight" in slots_of(owner) else None
    fresh = _read_in_place(node, graph)
    if isinstance(owner, nn.Linear):
        return Tap(path, node.name, name, linear_tap, weight.shape[0], mask, (fresh,))
    if owner.padding_mode != "zeros" or isinstance(owner.padding, str):
        return f"its convolution pads by {owner.padding_mode!r}, {owner.padding!r}"
    options = tuple(weight.shape), owner.stride, tuple(owner.padding), owner.dilation, owner.groups
    return Tap(path, node.name, name, conv_tap, weight.shape[0], mask, (fresh, *options))


def _functional_tap(name: str, path: str, graph: fx.GraphModule, node: fx.Node) -> Tap | str:
    """`F.linear(x, weight)`, the weight as it is or through its mask."""
    mask = None
    if len(node.users) != 1:
        return f"it is read {len(node.users)} times, whose cross terms a tap cannot see"
    (user,) = node.users
    if user.target is masked_weight and isinstance(user.args[1], fx.Node) and len(user.users) == 1:
        mask, node = str(user.args[1].target), user
        (user,) = user.users
    if user.target is not torch.nn.functional.linear or len(user.args) < 2 or user.args[1] is not node:
        return f"`{user.name}` reads it in a way that has no tap"
    weight = graph.get_parameter(str((node.args[0] if mask else node).target))  # type: ignore[union-attr]  # a node
    return Tap(path, user.name, name, linear_tap, weight.shape[0], mask, (_read_in_place(user, graph),))


def _read_in_place(node: fx.Node, graph: fx.GraphModule) -> bool:
    for user in node.users:
        inner = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if getattr(inner, "inplace", False) or user.kwargs.get("inplace", False):
            return True
        if user.op != "call_module" and (name.endswith("_") or name in ("setitem", "iadd", "imul", "isub", "itruediv")):
            return True
    return False


__all__ = ["CONTAINER", "Instrumented", "conv_tap", "instrument_fisher", "linear_tap"]
