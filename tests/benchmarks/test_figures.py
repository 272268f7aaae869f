"""The parts of the benchmarks of accuracy and speed that have a right answer."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.graph import count

HERE = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """A benchmark by name, with its folder on the path as when it is run."""
    monkeypatch.syspath_prepend(str(HERE))
    return lambda name: importlib.import_module(name)


@pytest.fixture
def arms(load) -> ModuleType:
    return load("fashion_arms")


def macs(model: nn.Module, x: torch.Tensor) -> int:
    found = count(model, (x,)).macs_dense
    assert found is not None
    return found


def test_the_pruned_nets_cost_what_they_are_said_to(arms: ModuleType) -> None:
    torch.manual_seed(0)
    base = arms.wide_conv_net().eval()
    half = arms.halved(base)
    assert [m.weight.shape[0] for m in half.modules() if isinstance(m, nn.Conv2d)] == [32, 64, 128]
    dense = fxsparse.transform(
        base, (arms.X,), sparsity=0.9, pattern=fxsparse.SharedSupport(64), exclude=["0.weight", "13.weight"]
    )
    goal = count(dense, (arms.X,)).macs_effective
    assert goal is not None
    cheap = macs(arms.as_cheap(base), arms.X)
    assert 0.8 * goal < cheap <= 1.1 * goal


def test_an_arm_that_is_trained_comes_back_from_its_file(arms: ModuleType, tmp_path: Path) -> None:
    samples = fxsparse.training.loop.Samples(torch.randn(16, 1, 28, 28), torch.arange(16) % 10)
    splits = type("Parts", (), {"train": samples})()
    trained = arms.arm_net(tmp_path, splits, "shared", 3, 1)
    again = arms.arm_net(tmp_path, None, "shared", 3, 1)
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(again(x), trained(x), rtol=1e-5, atol=1e-5)
    found = fxsparse.masks(again)
    assert set(found) == {"4.weight", "8.weight"}
    for mask in found.values():
        assert mask.float().mean() < 0.12
        assert all(bool((rows == rows[:1]).all()) for rows in mask.split(64))  # one support a group


def test_every_arm_starts_from_the_dense_net_of_its_seed(arms: ModuleType, tmp_path: Path) -> None:
    samples = fxsparse.training.loop.Samples(torch.randn(16, 1, 28, 28), torch.arange(16) % 10)
    splits = type("Parts", (), {"train": samples})()
    base = arms.base_net(tmp_path, splits, 3, 1)
    for name in ("dense", "unstructured"):
        built = arms.ARMS[name].build(base)
        torch.testing.assert_close(built.eval()(arms.X + 1), base.eval()(arms.X + 1))


def test_times_are_milliseconds_of_warm_calls(load) -> None:
    peers = load("peers")
    slow, fast = torch.randn(400, 400), torch.randn(4, 4)
    found = peers.low_times({"slow": lambda: slow @ slow @ slow, "fast": lambda: fast @ fast}, 0.05)
    assert set(found) == {"slow", "fast"}
    assert 0 < found["fast"] < found["slow"] < 1e3


def test_a_csr_twin_computes_the_same_and_leaves_the_model(load) -> None:
    peers = load("peers")
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR")  # torch says once that it is in beta
        twin = peers.csr_twin(model)
    assert twin[0].weight.layout is torch.sparse_csr and model[0].weight.layout is torch.strided
    x = torch.randn(3, 8)
    torch.testing.assert_close(twin(x), model(x))
    assert peers.csr_twin(nn.Sequential(nn.Conv2d(1, 2, 3))) is None


def test_eight_bits_of_onnxruntime_are_close(load, tmp_path: Path) -> None:
    peers = load("peers")
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(64, 16)
    source = tmp_path / "dense.onnx"
    fxsparse.export_onnx(model, source, (x[:2],), latency=False, verify=False)
    wanted = peers.infer(source)(x.numpy())
    peers.quantize_static(source, tmp_path / "static.onnx", [x.numpy()])
    peers.quantize_dynamic(source, tmp_path / "dynamic.onnx")
    for name in ("static", "dynamic"):
        found = peers.infer(tmp_path / f"{name}.onnx")(x.numpy())
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert 0 < error < 0.05  # 8-bit, not float
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.onnx", "dynamic.onnx", "static.onnx"]


def test_the_table_has_means_and_ratios(load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = load("accuracy_and_speed")
    (tmp_path / "accuracy.json").write_text(
        json.dumps({"0": {"dense": 0.9, "dense, int8": 0.85}, "1": {"dense": 0.92, "dense, int8": 0.87}})
    )
    speed = {"conditions": "here", "ms": {"1": {"dense": 2.0, "dense, int8": 0.5}}}
    (tmp_path / "speed.json").write_text(json.dumps(speed))
    bench.table(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "| dense | 91.00 ± 1.41 |  | 2.000 (1.0x) |"
    assert lines[-1] == "| dense, int8 | 86.00 ± 1.41 |  | 0.500 (4.0x) |"
