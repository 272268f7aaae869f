"""Compaction compares in float64 without float64 copies of large parameters, and gives what it gives with them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import PassError
from fxsparse.passes import compact_channels, compact_verify, compact_widen
from fxsparse.passes.compact_widen import Widen, widened
from fxsparse.planning.compaction import compact, compaction_report
from tests.passes.compact_networks import CASES, Case, build


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_widen, "LARGE_MODEL", 0)
    monkeypatch.setattr(compact_widen, "LARGE_PARAMETER", 0)


@pytest.fixture
def wide_copies(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype | None]:
    """The dtypes of whole copies that compaction made."""
    made: list[torch.dtype | None] = []

    def copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        made.append(dtype)
        return compact_verify.owned_copy(model, dtype)

    monkeypatch.setattr(compact_channels, "owned_copy", copy)
    return made


def narrow(case: Case) -> tuple[nn.Module, Tensor]:
    model, x = build(case)
    return model.float(), x.float() if x.is_floating_point() else x


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_result_is_the_same_bit_for_bit(
    case: Case, monkeypatch: pytest.MonkeyPatch, wide_copies: list[torch.dtype | None]
) -> None:
    model, x = narrow(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = compact(model, (x,))
    assert torch.float64 in wide_copies or not compaction_report(whole).rows
    wide_copies.clear()
    monkeypatch.setattr(compact_widen, "LARGE_MODEL", 0)
    monkeypatch.setattr(compact_widen, "LARGE_PARAMETER", 0)
    streamed = compact(model, (x,))
    assert not wide_copies
    report = compaction_report(streamed)
    assert report.rows == compaction_report(whole).rows and not report.refused
    assert report.worst <= 1e-12
    pointers = {value.data_ptr() for value in (*model.parameters(), *model.buffers())}
    for (name, value), (other, expected) in zip(streamed.state_dict().items(), whole.state_dict().items(), strict=True):
        assert name == other and value.dtype == expected.dtype and torch.equal(value, expected)
        assert value.data_ptr() not in pointers
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class ReadsDtype(nn.Module):
    """Casts to the dtype that a parameter says it has, which is another one than operators see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).to(self.b.weight.dtype))


class Writes(nn.Module):
    """Its forward pass writes into a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.b.weight.mul_(1.0)
        return self.b(torch.tanh(self.a(x)))


class Rounds(nn.Module):
    """Rounds to the precision that a parameter says it has: no operator objects, but digits are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).to(self.b.weight.dtype).to(x.dtype))


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("kind", [ReadsDtype, Writes, Rounds])
def test_a_model_that_sees_the_difference_gets_whole_copies(
    kind: type[nn.Module], wide_copies: list[torch.dtype | None]
) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(5, 6)
    with torch.no_grad():
        model.a.weight[:3] = 0.0
    weight = model.b.weight.clone()
    small = compact(model, (x,))
    assert small.a.weight.shape == (5, 6) and torch.float64 in wide_copies
    assert torch.equal(model.b.weight, weight)
    torch.testing.assert_close(small(x), model(x))


def test_operators_read_wide_values_and_the_tensor_stays() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4, dtype=torch.float64)
    before = layer.weight.detach().clone()
    with torch.no_grad(), widened(layer, torch.float64):
        found = layer(x)
    assert found.dtype == torch.float64 and layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, before)
    expected = x @ before.double().T + layer.bias.detach().double()
    assert float((found - expected).abs().max()) <= 1e-15 * float(expected.abs().max())
    with torch.no_grad(), widened(layer, None):
        assert layer(x.float()).dtype == torch.float32


@pytest.mark.parametrize("write", [lambda w: w.mul_(2.0), lambda w: torch.add(w, 1.0, out=w)])
def test_a_write_is_refused(write) -> None:  # type: ignore[no-untyped-def]
    weight = torch.ones(2, 2)
    with pytest.raises(PassError, match="writes into a parameter"), Widen([weight], torch.float64):
        write(weight)
    assert torch.equal(weight, torch.ones(2, 2))


_PEAK = """
    import gc, re, torch
    from torch import nn
    import fxsparse

    def status(key):
        return int(re.search(rf"{key}:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

    def net(width):
        layers = [layer for _ in range(6) for layer in (nn.Linear(width, width), nn.ReLU())]
        model = nn.Sequential(*layers, nn.Linear(width, 8)).eval()
        with torch.no_grad():
            for layer in model[:-1:2]:
                layer.weight[: width // 2] = 0.0
        return model, (torch.randn(2, width),)

    torch.set_num_threads(1)
    fxsparse.compact(*net(16))
    model, x = net(1536)
    gc.collect()
    start = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    small = fxsparse.compact(model, x)
    assert small[2].weight.shape == (768, 768)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    print((status("VmHWM") - start) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read off /proc")
def test_compaction_takes_less_than_twice_the_model() -> None:
    """Of 57 MB; a float64 copy alone would be twice that. Freed memory is given back at once, to see what is held."""
    code = textwrap.dedent(_PEAK)
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert 0.2 < float(done.stdout) < 2.0
