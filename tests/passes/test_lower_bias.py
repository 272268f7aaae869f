"""A bias that is computed with the product instead of added: where it is, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.exporters import Int8, Target, export_onnx
from fxsparse.passes.lower_shared_support import Form, lower_shared_support
from tests.passes.lower_cases import assert_equal, calls, sparse, wish

CONV = wish(Form.GATHER_CONV)


def lowered(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    masked = sparse(model.double().eval(), (x,))
    result = lower_shared_support(masked, (x,), choose=CONV, **options)
    assert any(form is not Form.DENSE for form in result.forms.values()), [str(r) for r in result.records]
    for other in (x, torch.randn(5, *x.shape[1:], dtype=x.dtype)):
        assert_equal(result.model, masked, other)
    return result.model


def padded(model: nn.Module) -> int:
    """How many channels of ones a lowered model adds."""
    return calls(model)["constant_pad_nd"]


def bias_arguments(model: nn.Module) -> list[bool]:
    """For each convolution whether it has a bias of its own."""
    graph = model.graph  # type: ignore[union-attr]
    return [len(node.args) > 2 and node.args[2] is not None for node in graph.nodes if "conv" in str(node.target)]


IMAGE = torch.randn(2, 16, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LINE = torch.randn(2, 16, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

INSIDE: dict[str, tuple[nn.Module, Tensor]] = {
    "wide": (nn.Conv2d(16, 32, 1), IMAGE),
    "wider, rows that fill a group": (nn.Conv2d(16, 52, 1), IMAGE),
    "with strides": (nn.Conv2d(16, 48, 1, stride=2), IMAGE),
    "named padding": (nn.Conv2d(16, 48, 1, padding="valid"), IMAGE),
    "in groups": (nn.Conv2d(16, 32, 1, groups=2), IMAGE),
    "of a line": (nn.Conv1d(16, 40, 1), LINE),
}
BESIDE: dict[str, tuple[nn.Module, Tensor]] = {
    "narrow": (nn.Conv2d(16, 24, 1), IMAGE),
    "with offsets": (nn.Conv2d(16, 32, 3), IMAGE),
    "with offsets along one axis": (nn.Conv2d(16, 32, (1, 3)), IMAGE),
    "with padding": (nn.Conv2d(16, 32, 1, padding=1), IMAGE),
    "with padding along one axis": (nn.Conv2d(16, 32, 1, padding=(0, 2)), IMAGE),
    "linear": (nn.Linear(16, 64), torch.randn(2, 9, 16, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_wide_convolution_of_single_pixels_computes_its_bias(name: str) -> None:
    torch.manual_seed(0)
    model, x = INSIDE[name]
    nn.init.normal_(model.bias)  # type: ignore[arg-type]
    made = lowered(model, x)
    assert padded(made) == 1 and not any(bias_arguments(made))
    plain = lowered(model, x, bias_inside=False)
    assert padded(plain) == 0 and all(bias_arguments(plain))


@pytest.mark.parametrize("name", BESIDE)
def test_other_layers_add_it(name: str) -> None:
    torch.manual_seed(0)
    model, x = BESIDE[name]
    nn.init.normal_(model.bias)  # type: ignore[arg-type]
    made = lowered(model, x)
    assert padded(made) == 0 and all(bias_arguments(made))


def test_without_a_bias_there_are_no_ones() -> None:
    torch.manual_seed(0)
    assert padded(lowered(nn.Conv2d(16, 32, 1, bias=False), IMAGE)) == 0


def test_layers_that_read_the_same_value_share_the_ones() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * torch.relu(self.b(x))

    torch.manual_seed(0)
    made = lowered(Twins(), IMAGE)
    assert padded(made) == 1 and bias_arguments(made) == [False, False]


def test_a_layer_called_twice_keeps_one_weight_and_one_bias() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(16, 32, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.a(x.flip(2) * 2)

    torch.manual_seed(0)
    made = lowered(Twice(), IMAGE)
    assert padded(made) == 2 and len(list(made.parameters())) == 2


def test_the_ones_follow_channels_that_lie_elsewhere() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Sigmoid(), nn.Conv2d(16, 48, 1)).double().eval()
    pattern = fxsparse.SharedSupport(8)
    for layer in (model[0], model[2]):
        order = torch.randperm(layer.weight.shape[0])  # rows of a group are apart: the channels between are permuted
        layer.weight.data *= pattern.mask(torch.rand(layer.weight.shape[:2]), 0.75, row_order=order)[..., None, None]
        nn.init.normal_(layer.bias)
    result = lower_shared_support(model, (IMAGE,), choose=CONV)
    assert set(result.forms.values()) == {Form.GATHER_CONV}
    # the first layer adds its bias; its permuted result is not put in order before the ones are added to it
    assert bias_arguments(result.model) == [True, False] and calls(result.model)["index_select"] == 3
    assert_equal(result.model, model, IMAGE)


def test_a_file_computes_it_and_an_8_bit_file_adds_it(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 256, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 4))
    x = torch.randn(4, 64, 14, 14)
    masked = fxsparse.transform(model, (x,), include="0", sparsity=0.9, pattern=fxsparse.SharedSupport(64)).eval()
    import onnx

    report = export_onnx(masked, tmp_path / "a.onnx", (x,), lower=True, latency=False)
    kinds = [node.op_type for node in onnx.load(report.path).graph.node]
    assert "Pad" in kinds and report.forms[0].form.startswith("gather")
    small = export_onnx(
        masked, tmp_path / "b.onnx", (x,), lower=True, latency=False, target=Target.INT8, calibration=[(x,)],
        int8=Int8(),
    )  # fmt: skip
    assert "Pad" not in [node.op_type for node in onnx.load(small.path).graph.node]


class Tied(nn.Module):
    """One weight, used with each of several biases, None for none."""

    def __init__(self, *biases: Tensor | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 1, bias=False)
        self.count = len(biases)
        for i, bias in enumerate(biases):
            self.register_parameter(f"b{i}", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        parts = [nn.functional.conv2d(x, weight, getattr(self, f"b{i}")) for i in range(self.count)]
        return torch.stack(parts)


@pytest.mark.parametrize("with_bias", [(True, True), (True, False), (False, True)])
def test_one_weight_with_several_biases(with_bias: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    model = Tied(*(torch.randn(32, dtype=torch.float64) if each else None for each in with_bias)).double().eval()
    keep = fxsparse.SharedSupport(8).mask(torch.rand(32, 16), 0.75)
    model.conv.weight.data *= keep[..., None, None]
    result = lower_shared_support(model, (IMAGE,), choose=CONV)
    assert result.forms["conv.weight"] is Form.GATHER_CONV
    assert padded(result.model) == 1 and not any(bias_arguments(result.model))
    assert_equal(result.model, model, IMAGE)
