"""MACs, FLOPs and parameters against published tables; networks live on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.errors import CaptureError, ConfigError
from fxsparse.graph import count, micronet_flops, record, rigl_training_flops
from tests.graph import networks
from tests.graph.networks import on_meta

# build, input, parameters, prunable, MACs, of which in convolutions
TABLE: tuple[tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int, int], ...] = (
    (networks.lenet_300_100, (1, 1, 28, 28), 266_610, 266_200, 266_200, 0),
    (networks.lenet_5, (1, 1, 32, 32), 61_706, 61_470, 416_520, 357_600),
    (networks.lenet_5_caffe, (1, 1, 28, 28), 431_080, 430_500, 2_293_000, 1_888_000),
    (networks.lenet_128, (1, 3, 128, 128), 1_627_961, 1_627_734, 16_617_684, 14_992_800),
    (lambda: networks.conv_n(1), (1, 3, 32, 32), 4_301_642, 4_300_992, 43_780_608, 39_518_208),
    (lambda: networks.conv_n(2), (1, 3, 32, 32), 2_425_930, 2_425_024, 98_306_560, 96_141_312),
    (lambda: networks.conv_n(3), (1, 3, 32, 32), 2_262_602, 2_261_184, 153_881_088, 152_764_416),
    (networks.vgg_16, (1, 3, 224, 224), 138_357_544, 138_344_128, 15_470_264_320, 15_346_630_656),
    (networks.vgg_16_head, (1, 3, 128, 128), 16_845_121, 14_710_464 + 2_130_048, 5_013_274_752, 5_011_144_704),
    (networks.vgg_16_bn_cifar, (1, 3, 32, 32), 14_728_266, 14_715_584, 313_201_664, 313_196_544),
    (networks.resnet_18, (1, 3, 224, 224), 11_689_512, 11_678_912, 1_814_073_344, 1_813_561_344),
    (networks.resnet_50, (1, 3, 224, 224), 25_557_032, 25_502_912, 4_089_184_256, 4_087_136_256),
    (networks.resnet_20_cifar, (1, 3, 32, 32), 272_474, 270_896, 40_813_184, 40_812_544),
)
NAMES = (
    "lenet300 lenet5 lenet5caffe lenet128 conv2 conv4 conv6 vgg16 vgg16head vgg16bn resnet18 resnet50 resnet20".split()
)


def image(shape: tuple[int, ...]) -> tuple[Tensor]:
    return (torch.empty(shape, device="meta"),)


@pytest.mark.parametrize(("build", "shape", "parameters", "prunable", "macs", "conv"), TABLE, ids=NAMES)
def test_golden_table(
    build: Callable[[], nn.Module], shape: tuple[int, ...], parameters: int, prunable: int, macs: int, conv: int
) -> None:
    counted = count(on_meta(build), image(shape), strict=True)
    assert counted.parameters == counted.trainable == counted.alive == parameters
    assert counted.prunable == prunable
    assert counted.macs_dense == counted.macs_effective == macs
    assert sum(row.macs_dense for row in counted.rows if row.kind.startswith("conv")) == conv
    assert counted.flops() == 2 * macs
    assert counted.parameters == counted.prunable + counted.biases + counted.norm


def test_shares_within_networks() -> None:
    lenet = count(on_meta(networks.lenet_128), image((1, 3, 128, 128)))
    dense_1 = lenet.rows[2]
    assert round(100 * dense_1.params / lenet.prunable, 1) == 99.2
    assert round(100 * dense_1.macs_dense / lenet.macs_dense, 1) == 9.7
    vgg = count(on_meta(networks.vgg_16_head), image((1, 3, 128, 128)))
    assert sum(row.params for row in vgg.rows if row.kind == "linear") == 2_130_048
    total, cumulative = 0, []
    for row in vgg.rows[:13]:
        total += row.macs_dense
        cumulative.append(round(100 * total / vgg.macs_dense, 2))
    golden = [0.56, 12.61, 18.64, 30.68, 36.71, 48.76, 60.80, 66.83, 78.87, 90.92, 93.93, 96.95, 99.96]
    assert cumulative == golden
    pca = count(on_meta(nn.Linear, 128 * 128 * 3, 200), image((1, 128 * 128 * 3)))
    assert pca.macs_dense == 9_830_400
    assert round(100 * pca.macs_dense / vgg.macs_dense, 3) == 0.196


def erk(sizes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """The ERK fixed point, real-valued, written independently of the library."""
    numel = {name: math.prod(shape) for name, shape in sizes.items()}
    dead = {name: math.floor((1 - density) * n + 1e-6) for name, n in numel.items()}
    power = {name: sum(shape) / numel[name] for name, shape in sizes.items()}
    dense: set[str] = set()
    while True:
        free = [name for name in sizes if name not in dense]
        budget = sum(numel[n] - dead[n] for n in free) - sum(dead[n] for n in dense)
        epsilon = budget / sum(power[n] * numel[n] for n in free)
        worst = max(power[n] for n in free)
        if epsilon * worst <= 1:
            return {name: 1.0 if name in dense else epsilon * power[name] for name in sizes}
        dense |= {n for n in free if power[n] == worst}


@pytest.fixture(scope="module")
def resnet_50() -> tuple[nn.Module, object]:
    model = on_meta(networks.resnet_50)
    return model, record(model.eval(), image((1, 3, 224, 224)))


def resnet_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize(
    ("density", "flops", "ratio", "clamped"),
    [
        (1.0, 8_189_482_496, 1.0, None),
        (0.25, 3.903734e9, 0.476677, 16),
        (0.2, 3_395_291_627, 0.414592, 8),
        (0.1, 1_988_961_490, 0.242868, 1),
        (0.05, 1_006_217_259, 0.122867, 0),
        (0.01, 2.101481e8, 0.025661, 0),
    ],
)
def test_resnet_50_flops_erk(resnet_50, density: float, flops: float, ratio: float, clamped: int | None) -> None:
    model, recording = resnet_50
    shapes = resnet_shapes(model)
    assert len(shapes) == 54
    densities = dict.fromkeys(shapes, 1.0) if density == 1 else erk(shapes, density)
    found = micronet_flops(recording, densities)
    tolerance = 1 if isinstance(flops, int) else 5e-7 * flops
    assert abs(found - flops) <= tolerance
    assert abs(found / 8_189_482_496 - ratio) <= 5e-7
    if clamped is not None:
        assert sum(value == 1.0 for value in densities.values()) == clamped


@pytest.mark.parametrize(("density", "ratio"), [(0.2, 0.224142), (0.1, 0.127160), (0.05, 0.078669)])
def test_resnet_50_flops_uniform_with_dense_first_convolution(resnet_50, density: float, ratio: float) -> None:
    model, recording = resnet_50
    densities = {name: 1.0 if name == "conv1.weight" else density for name in resnet_shapes(model)}
    assert abs(micronet_flops(recording, densities) / micronet_flops(recording) - ratio) <= 5e-7


def test_flop_convention_is_not_two_macs(resnet_50) -> None:
    assert micronet_flops(resnet_50[1]) == 2 * 4_089_184_256 + 11_113_984


@pytest.mark.parametrize(("density", "golden"), [(0.2, 0.4165), (0.1, 0.2454)])
def test_rigl_training_cost(resnet_50, density: float, golden: float) -> None:
    model, recording = resnet_50
    dense = micronet_flops(recording)
    sparse = micronet_flops(recording, erk(resnet_shapes(model), density))
    assert round(rigl_training_flops(sparse, dense, 100) / (3 * dense), 4) == golden


def test_flops_refuse_bad_input(resnet_50) -> None:
    with pytest.raises(ConfigError, match=r"`nowhere`, which is no weight"):
        micronet_flops(resnet_50[1], {"nowhere": 0.5})
    with pytest.raises(ConfigError, match=r"\(=1.5\) must lie in"):
        micronet_flops(resnet_50[1], {"fc.weight": 1.5})
    with pytest.raises(ConfigError, match=r"`every` \(=0\)"):
        rigl_training_flops(1, 2, 0)


def test_effective_macs_are_alive_times_positions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    mask = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
    mask.view(-1)[:7] = True
    head = torch.rand(5, 144, generator=torch.Generator().manual_seed(0)) < 0.3
    counted = count(model, (torch.zeros(1, 2, 6, 6),), masks={"0.weight": mask, "3.weight": head})
    assert [row.macs_effective for row in counted.rows] == [7 * 36, int(head.sum())]
    assert [row.alive for row in counted.rows] == [7, int(head.sum())]
    assert counted.alive == 7 + int(head.sum()) + 4 + 5
    assert counted.rows[0].density == 7 / 72
    assert counted.flops(effective=True) == 2 * (7 * 36 + int(head.sum()))
    assert counted.flops(include_bias_flops=True) == 2 * counted.macs_dense + 4 * 36 + 5
    rows, alive = [4, 5], [7, int(head.sum())]
    assert counted.bytes.dense == 4 * counted.parameters
    assert counted.bytes.packed == sum(4 * a for a in alive) + 72 // 8 + 720 // 8 + 4 * 9
    assert counted.bytes.csr == sum(8 * a + 4 * (r + 1) for a, r in zip(alive, rows, strict=True)) + 4 * 9
    assert "a dense kernel does not run faster" in str(counted)


def test_samples_make_counts_per_sample() -> None:
    model = nn.Linear(3, 4)
    assert count(model, (torch.zeros(6, 3),)).macs_dense == 72
    assert count(model, (torch.zeros(6, 3),), samples=6).macs_dense == 12
    with pytest.raises(ConfigError, match=r"`samples` \(=7\)"):
        count(model, (torch.zeros(6, 3),), samples=7)


def test_transposed_and_grouped_convolutions() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.Conv1d(6, 6, 3, groups=3))
    transposed = count(model[0], (torch.zeros(1, 4, 5, 7),))
    assert transposed.macs_dense == 5 * 7 * model[0].weight.numel()
    grouped = count(model[1], (torch.zeros(1, 6, 9),))
    assert grouped.macs_dense == 7 * 6 * 2 * 3


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))
        self.heads = nn.Parameter(torch.randn(2, 4, 3))
        self.pair = nn.Parameter(torch.randn(5, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w.t()
        z = torch.einsum("bnd,hde->bhne", x, self.heads)
        scores = z @ z.transpose(-1, -2)
        return y.sum() + scores.sum() + F.bilinear(x, z[:, 0].contiguous(), self.pair).sum()


def test_products_of_parameters_and_of_activations() -> None:
    counted = count(Products(), (torch.randn(1, 7, 4),), strict=True)
    assert {row.name: row.macs_dense for row in counted.rows} == {"w": 7 * 24, "heads": 7 * 24, "pair": 7 * 60}
    assert counted.macs_activations == 2 * 7 * 7 * 3 + 7 * 5 * 3


def test_attention_and_recurrent_layers() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 5, 8)
    counted = count(attention, (x, x, x), strict=True)
    assert counted.macs_dense == 5 * 4 * 64
    assert counted.macs_activations == 2 * 5 * 5 * 8
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    weights = sum(p.numel() for p in lstm.parameters() if p.ndim > 1)
    assert count(lstm, (torch.randn(6, 1, 3),), strict=True).macs_dense == 6 * weights
    cell = nn.GRUCell(3, 4)
    assert count(cell, (torch.randn(1, 3),), strict=True).macs_dense == 12 * 3 + 12 * 4


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.w)


def test_what_cannot_be_counted_is_said() -> None:
    counted = count(Odd(), (torch.randn(2, 4),))
    assert counted.uncounted == ("`w` in cdist of `the model`",)
    assert "not counted: `w` in cdist" in str(counted)
    with pytest.raises(CaptureError, match="`w` in cdist"):
        count(Odd(), (torch.randn(2, 4),), strict=True)


def test_masks_are_checked() -> None:
    model = nn.Linear(3, 4)
    with pytest.raises(ConfigError, match=r"`masks` names `nope`"):
        count(model, (torch.zeros(1, 3),), masks={"nope": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ConfigError, match=r"mask of `weight` \(=\(4,\)"):
        count(model, (torch.zeros(1, 3),), masks={"weight": torch.ones(4, dtype=torch.bool)})


def test_counting_leaves_mode_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counted = count(model, (torch.randn(1, 3),))  # one sample: would raise in train mode
    assert counted.norm == 6 and counted.buffers == 7
    assert model.training and model[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
