"""Reference networks: exact sizes, forward by hand, bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fxsparse.errors import ConfigError
from fxsparse.models import lenet_5, lenet_300_100, small_conv_net


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def prunable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.ndim >= 2)


@pytest.mark.parametrize(
    ("model", "parameters", "weights"),
    [
        (lenet_300_100(784), 266_610, 266_200),
        (lenet_300_100(64), 64 * 300 + 300 + 300 * 100 + 100 + 1000 + 10, 50_200),
        (lenet_5(), 61_706, 61_470),
        (small_conv_net(), 29_370, 29_072),
        (small_conv_net(3, 7, 16), 3 * 144 + 4608 + 4608 + 18432 + 288 + 32 * 16 * 7 + 7, 31_664),
    ],
)
def test_sizes(model: nn.Module, parameters: int, weights: int) -> None:
    assert count(model) == parameters
    assert prunable(model) == weights


@pytest.mark.parametrize("shape", [(5, 64), (5, 1, 8, 8), (5, 4, 16)])
def test_lenet_300_100_by_hand(shape: tuple[int, ...]) -> None:
    model = lenet_300_100().double()
    x = torch.randn(shape, dtype=torch.float64)
    flat = x.reshape(5, 64)
    hidden = torch.clamp(flat @ model.fc1.weight.T + model.fc1.bias, min=0)
    hidden = torch.clamp(hidden @ model.fc2.weight.T + model.fc2.bias, min=0)
    expected = hidden @ model.output.weight.T + model.output.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_lenet_300_100_starts_gaussian_glorot() -> None:
    model = lenet_300_100(784)
    weight = model.fc1.weight.detach()
    deviation = (2 / (784 + 300)) ** 0.5
    assert abs(float(weight.std()) / deviation - 1) < 0.02
    assert float(weight.abs().max()) > 3.5 * deviation  # a uniform Glorot stops at sqrt(3) deviations
    assert not model.fc1.bias.any()


def test_lenet_5_matches_a_sequential() -> None:
    model = lenet_5().double()
    oracle = nn.Sequential(
        model.conv1, nn.ReLU(), nn.MaxPool2d(2), model.conv2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        model.fc1, nn.ReLU(), model.fc2, nn.ReLU(), model.output,
    )  # fmt: skip
    x = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    assert torch.equal(model(x), oracle(x))


def test_small_conv_net_residual_path() -> None:
    """With the second normalisation of each block at zero, blocks are the identity on their (positive) input."""
    model = small_conv_net().double().eval()
    for block in (model.block1, model.block2):
        nn.init.zeros_(block.bn2.weight)
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    stem = functional.relu(model.stem_bn(model.stem(x)))
    down = functional.relu(model.down_bn(model.down(stem)))
    expected = model.output(functional.avg_pool2d(down, 2).flatten(1))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    for block in (model.block1, model.block2):
        nn.init.ones_(block.bn2.weight)
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lenet_300_100(0), r"`in_features` \(=0\)"),
        (lambda: lenet_300_100(64, -1), r"`classes` \(=-1\)"),
        (lambda: lenet_5(image_size=15), r"`image_size` \(=15\)"),
        (lambda: small_conv_net(image_size=10), r"`image_size` \(=10\) must be a multiple of 4"),
        (lambda: small_conv_net(image_size=4), r"`image_size` \(=4\)"),
        (lambda: small_conv_net(0), r"`in_channels` \(=0\)"),
    ],
)
def test_bad_arguments(build: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()  # type: ignore[operator]
