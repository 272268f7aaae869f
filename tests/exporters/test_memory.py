"""An export holds nothing of the model afterwards, and needs no float64 copy of it in between."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from fxsparse.exporters import Verification, export_onnx, reference
from fxsparse.exporters.inputs import read_inputs
from fxsparse.passes import compact_widen

QUICK = Verification(batch_sizes=(1, 2), draws=2)
X = (torch.randn(3, 8),)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def test_nothing_is_held_after_an_export(tmp_path: Path) -> None:
    """onnxscript's rewrite rules keep the last graph that they have seen, and it kept all weights."""
    model = net()
    export_onnx(model, tmp_path / "m.onnx", X, verify=QUICK, latency=False)
    gc.collect()
    held = [each for each in gc.get_objects() if str(type(each).__module__).startswith("onnx_ir")]
    assert not [tensor for tensor in held if isinstance(tensor, onnx_ir.TensorProtocol) and tensor.nbytes > 100]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Rounds(nn.Module):
    """Rounds to the precision that a parameter says it has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).to(self.b.weight.dtype))


@pytest.mark.parametrize("make", [net, lambda: Rounds().eval()], ids=["streamed", "asks for a dtype"])
def test_the_reference_of_a_large_model_is_the_same(make, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    model = make()
    inputs = read_inputs(model, X)
    whole = reference.reference(model, inputs, QUICK)
    casts: list[torch.dtype] = []
    double = nn.Module.double
    monkeypatch.setattr(nn.Module, "double", lambda self: casts.append(torch.float64) or double(self))
    monkeypatch.setattr(compact_widen, "LARGE_MODEL", 0)
    monkeypatch.setattr(compact_widen, "LARGE_PARAMETER", 0)
    streamed = reference.reference(model, inputs, QUICK)
    assert streamed.dtype == whole.dtype == "float64" and bool(casts) == isinstance(model, Rounds)
    for a, b in zip(streamed.cases, whole.cases, strict=True):
        for found, expected in zip(a.exact, b.exact, strict=True):
            assert found.dtype == expected.dtype and (abs(found - expected) <= 1e-15 * abs(expected).max()).all()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
