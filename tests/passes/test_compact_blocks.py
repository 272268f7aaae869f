"""For onnxruntime, 2-d convolutions keep whole blocks of channels; all else loses all that is dead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.exporters import Verification, export_onnx
from fxsparse.exporters.shrink import compact as compact_for_files
from fxsparse.planning.compaction import compact, compaction_report

QUICK = Verification(batch_sizes=(1, 2), draws=2)


class Depthwise(nn.Module):
    """1x1, depthwise, 1x1, as in mobile networks."""

    def __init__(self, width: int, out: int = 24) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.spatial = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.project = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.relu(self.spatial(torch.relu(self.norm(self.expand(x))))))


def dead(width: int, channels: int) -> nn.Module:
    torch.manual_seed(0)
    model = Depthwise(width).double().eval()
    with torch.no_grad():
        model.expand.weight[:channels] = 0.0
        model.norm.weight[:channels] = 0.0
        model.norm.bias[:channels] = 0.0
    return model


X = (torch.randn(2, 8, 5, 5, dtype=torch.float64),)


@pytest.mark.parametrize(
    ("width", "channels", "left"),
    [
        (48, 1, 48),
        (48, 15, 48),
        (48, 16, 32),
        (48, 17, 32),
        (48, 40, 16),
        (40, 1, 40),
        (40, 9, 32),
        (42, 1, 41),
        (42, 17, 25),
    ],
)
def test_whole_blocks_stay(width: int, channels: int, left: int) -> None:
    model = dead(width, channels)
    assert compact(model, X).spatial.weight.shape[0] == width - channels
    small = compact_for_files(model, X)
    assert small.expand.weight.shape[0] == small.spatial.weight.shape[0] == small.project.weight.shape[1] == left
    torch.testing.assert_close(small(*X), model(*X), rtol=1e-12, atol=1e-12)
    stay = channels - (width - left)
    said = [note for note in compaction_report(small).notes if "superfluous" in note]
    assert bool(said) == bool(stay) and all(note.startswith(f"{stay} superfluous channels stay") for note in said)


def test_what_is_no_2d_convolution_loses_everything() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 3)).double().eval()
    with torch.no_grad():
        model[0].weight[:5] = 0.0
    small = compact_for_files(model, (torch.randn(2, 8, dtype=torch.float64),))
    assert small[0].weight.shape == (43, 8) and not any("superfluous" in n for n in compaction_report(small).notes)


class Joined(nn.Module):
    """Two convolutions whose channels meet in a third: what stays in one stays in what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 32, 1), nn.Conv2d(4, 16, 1)
        self.join = nn.Conv2d(48, 32, 3, padding=1)
        self.skip = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.join(torch.cat((torch.relu(self.a(x)), torch.relu(self.b(x))), 1)))
        return self.head((y + torch.relu(self.skip(y))).mean((2, 3)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 31), st.integers(0, 15), st.integers(0, 31), st.integers(0, 3))
def test_every_convolution_of_a_net_keeps_whole_blocks(a: int, b: int, join: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Joined().double().eval(), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        for layer, rows in ((model.a, torch.randperm(32)[:a]), (model.b, torch.randperm(16)[:b])):
            layer.weight[rows] = 0.0
            layer.bias[rows] = 0.0
        rows = torch.randperm(32)[:join]
        for layer in (model.join, model.skip):
            layer.weight[rows] = 0.0
            layer.bias[rows] = 0.0
    small, most = compact_for_files(model, (x,)), compact(model, (x,))
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    for name in ("a", "b", "join", "skip"):
        for dim in (0, 1):
            before, size, least = (m.get_submodule(name).weight.shape[dim] for m in (model, small, most))
            assert least <= size <= before and (before % 16 or size % 16 == 0)
            assert before % 16 or size - least < 16 or name == "join"  # of the join, two inputs fill up


def test_a_file_is_not_cut_by_less_than_a_block(tmp_path: Path) -> None:
    model = dead(48, 1).float()
    report = export_onnx(model, tmp_path / "m.onnx", (X[0].float(),), verify=QUICK, latency=False)
    assert report.variant == "as it is" and any("1 superfluous channels stay" in note for note in report.notes)
    report = export_onnx(dead(48, 20).float(), tmp_path / "m.onnx", (X[0].float(),), verify=QUICK, latency=False)
    assert report.variant == "compacted" and any("4 superfluous channels stay" in note for note in report.notes)
