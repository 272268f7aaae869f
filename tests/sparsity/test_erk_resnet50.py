"""The published ERK numbers of ResNet-50 (arXiv 1911.11134), from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from fxsparse.sparsity import ERK, Uniform, WeightSpec, keep_count


class Layer(NamedTuple):
    weight: WeightSpec
    outputs: int  # values of the layer's output for one sample


def resnet50() -> list[Layer]:
    layers = [Layer(WeightSpec("conv1", (64, 3, 7, 7)), 64 * 112 * 112)]
    inputs, size = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            before = size
            if stage > 1 and block == 0:
                size //= 2  # the stride is in the 3x3 convolution
            rows = [("conv1", width, inputs, 1, before), ("conv2", width, width, 3, size)]
            rows.append(("conv3", 4 * width, width, 1, size))
            if block == 0:
                rows.append(("downsample", 4 * width, inputs, 1, size))
            for name, out, cin, k, side in rows:
                spec = WeightSpec(f"layer{stage}.{block}.{name}", (out, cin, k, k))
                layers.append(Layer(spec, out * side * side))
            inputs = 4 * width
    return [*layers, Layer(WeightSpec("fc", (1000, 2048)), 1000)]


LAYERS = resnet50()
WEIGHTS = [layer.weight for layer in LAYERS]


def flops(densities: list[float]) -> float:
    """The counter of MicroNet as RigL uses it: O (2 v d + 1) for a convolution, 2 v d O for the linear layer."""
    total = 0.0
    for layer, density in zip(LAYERS, densities, strict=True):
        v = layer.weight.numel // layer.weight.shape[0]
        total += layer.outputs * (2 * v * density + (1 if len(layer.weight.shape) == 4 else 0))
    return total


def test_the_network() -> None:
    assert len(LAYERS) == 54 and sum(w.numel for w in WEIGHTS) == 25_502_912
    assert flops([1.0] * 54) == 8_189_482_496 == 2 * 4_089_184_256 + 11_113_984


@pytest.mark.parametrize(
    ("density", "expected_flops", "ratio", "epsilon", "clamped", "alive"),
    [
        (0.25, 3.903734e9, 0.476677, 127.431675, 16, 6_375_728),
        (0.2, 3_395_291_627, 0.414592, 99.561667, 8, 5_100_607),
        (0.1, 1_988_961_490, 0.242868, 48.786611, 1, 2_550_318),
        (0.05, 1_006_217_259, 0.122867, 24.372126, 0, 1_275_174),
        (0.01, 2.101481e8, 0.025661, 4.874754, 0, 255_052),
    ],
)
def test_golden_erk(
    density: float, expected_flops: float, ratio: float, epsilon: float, clamped: int, alive: int
) -> None:
    solution = ERK().solve(WEIGHTS, 1 - density)
    assert solution.epsilon == pytest.approx(epsilon, abs=5.1e-7)
    assert len(solution.dense) == clamped
    assert sum(solution.alive) == alive == sum(keep_count(w.numel, 1 - density) for w in WEIGHTS)
    found = flops(list(solution.densities))
    tolerance = 1e-6 * 0.5 if density in (0.25, 0.01) else 0.5 / expected_flops * 1.01
    assert found == pytest.approx(expected_flops, rel=tolerance)
    assert found / 8_189_482_496 == pytest.approx(ratio, abs=5.1e-7)
    targets = ERK().targets(WEIGHTS, 1 - density)
    assert [targets[w.name].alive for w in WEIGHTS] == list(solution.alive)


def test_golden_densities() -> None:
    named = {
        density: dict(zip((w.name for w in WEIGHTS), ERK().solve(WEIGHTS, 1 - density).densities, strict=True))
        for density in (0.2, 0.1, 0.05)
    }
    assert named[0.2]["conv1"] == pytest.approx(0.857195, abs=5.1e-7)
    assert named[0.2]["layer4.2.conv3"] == pytest.approx(0.243260, abs=5.1e-7)
    assert named[0.2]["fc"] == pytest.approx(0.148176, abs=5.1e-7)
    assert named[0.1]["conv1"] == pytest.approx(0.420038, abs=5.1e-7)
    assert named[0.1]["layer1.0.downsample"] == pytest.approx(0.958819, abs=5.1e-7)
    assert named[0.1]["fc"] == pytest.approx(0.072608, abs=5.1e-7)
    assert named[0.05]["conv1"] == pytest.approx(0.209837, abs=5.1e-7)
    assert named[0.05]["layer1.0.conv1"] == pytest.approx(0.773529, abs=5.1e-7)
    assert named[0.05]["fc"] == pytest.approx(0.036273, abs=5.1e-7)


def test_golden_clamped_layers() -> None:
    def dense(density: float) -> set[str]:
        return {WEIGHTS[i].name for i in ERK().solve(WEIGHTS, 1 - density).dense}

    small = {w.name for w in WEIGHTS if w.name.startswith("layer1") and w.shape[2:] == (1, 1)}
    assert dense(0.2) == small | {"layer2.0.conv1"} and len(small) == 7
    assert dense(0.1) == {"layer1.0.conv1"}
    second = {w.name for w in WEIGHTS if w.name.startswith("layer2") and w.shape[2:] == (1, 1)}
    assert dense(0.25) == {"conv1"} | small | (second - {"layer2.0.downsample"})


@pytest.mark.parametrize(("density", "ratio"), [(0.2, 0.224142), (0.1, 0.127160), (0.05, 0.078669)])
def test_golden_uniform_with_the_first_convolution_dense(density: float, ratio: float) -> None:
    targets = Uniform(dense_first=True).targets(WEIGHTS, 1 - density)
    densities = [1 - targets[w.name].sparsity for w in WEIGHTS]
    assert densities[0] == 1 and densities[1:] == pytest.approx([density] * 53)
    assert flops(densities) / 8_189_482_496 == pytest.approx(ratio, abs=5.1e-7)
