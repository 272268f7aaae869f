"""A file that was changed in the smallest way does not pass the verification that it passed before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from fxsparse.errors import ExportError
from fxsparse.exporters import Verification, export_onnx
from fxsparse.exporters.inputs import read_inputs
from fxsparse.exporters.placement import Placement, check_file
from fxsparse.exporters.reference import Reference, reference
from fxsparse.exporters.runtime import open_session
from fxsparse.exporters.verify import verify
from fxsparse.nn import masked_weights
from fxsparse.planning import transform

Subject = tuple[ModelProto, Reference, list[Placement], nn.Module]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.rnn = nn.LSTM(6, 8, batch_first=True)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        y = self.rnn(y)[0]
        return self.head(y + self.mix(y, y, y, need_weights=False)[0])


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4)
    model = Net()
    for bias in (model.norm.bias, model.mix.in_proj_bias, model.mix.out_proj.bias):
        nn.init.normal_(bias)
    sparse = transform(
        model, (x,), sparsity=0.7, include=["*.weight_*", "*_weight", "conv.weight", "head.weight"]
    ).eval()
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    report = export_onnx(sparse, path, (x,), latency=False, verify=Verification(batch_sizes=(1, 3)))
    assert {layer.name for layer in report.layers} >= {"conv.weight", "rnn.weight_hh_l0", "mix.in_proj_weight"}
    assert all(layer.initializers or layer.parts for layer in report.layers), report.notes
    places = [
        Placement(layer.name, name, axes, True) for layer in report.layers for name, axes in layer.initializers.items()
    ]
    runs = reference(sparse, read_inputs(sparse, (x,)), Verification(batch_sizes=(1, 3)))
    return onnx.load(path), runs, places, sparse


def changed(proto: ModelProto, name: str, change: Callable[[Any], Any]) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    (tensor,) = [t for t in copy.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return copy


def floats(proto: ModelProto, rank: int) -> list[str]:
    """Initializers of some size that are no constants of the exporter."""
    arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    return [n for n, a in arrays.items() if a.dtype == np.float32 and a.ndim >= rank and np.count_nonzero(a) > 4]


def test_the_file_itself_passes(subject: Subject) -> None:
    proto, runs, places, sparse = subject
    assert verify(open_session(proto.SerializeToString()), runs).worst_relative < 1e-4
    check_file(proto, places, masked_weights(sparse))
    assert len(floats(proto, 1)) >= 8


def test_one_percent_on_any_initializer_fails(subject: Subject) -> None:
    proto, runs, _, _ = subject
    for name in floats(proto, 1):
        mutant = changed(proto, name, lambda a: (a * 1.01).astype(a.dtype))
        with pytest.raises(ExportError, match="differs by"):
            verify(open_session(mutant.SerializeToString()), runs)


def test_one_revived_entry_fails_in_the_values_and_in_the_zeros(subject: Subject) -> None:
    proto, runs, places, sparse = subject
    assert places

    def revive(a: Any) -> Any:
        a[tuple(np.argwhere(a == 0)[0])] = 100 * np.abs(a).max()  # queries and keys hardly matter in so small a net
        return a

    for place in places:
        mutant = changed(proto, place.initializer, revive)
        with pytest.raises(ExportError, match=rf"`{place.weight}`: 1 dead entries are not zero"):
            check_file(mutant, places, masked_weights(sparse))
        with pytest.raises(ExportError, match="differs by"):
            verify(open_session(mutant.SerializeToString()), runs)


def test_a_lost_bias_fails(subject: Subject) -> None:
    proto, runs, _, _ = subject
    names = [t.name for t in proto.graph.initializer if t.name.endswith("bias")]
    assert names
    for name in names:
        mutant = changed(proto, name, np.zeros_like)
        with pytest.raises(ExportError, match="differs by"):
            verify(open_session(mutant.SerializeToString()), runs)


def test_an_initializer_that_went_missing_fails(subject: Subject) -> None:
    proto, _, places, sparse = subject
    gone = Placement(places[0].weight, "nowhere", places[0].axes, True)
    with pytest.raises(ExportError, match="initializer `nowhere` is not in the file"):
        check_file(proto, [*places, gone], masked_weights(sparse))


def test_two_swapped_rows_fail(tmp_path: Path) -> None:
    model = nn.Linear(4, 4).eval()
    x = torch.randn(3, 4)
    export_onnx(model, tmp_path / "m.onnx", (x,), latency=False)
    runs = reference(model, read_inputs(model, (x,)), Verification(batch_sizes=(2,)))
    proto = onnx.load(tmp_path / "m.onnx")
    mutant = changed(proto, "weight", lambda a: a[[1, 0, 2, 3]])
    with pytest.raises(ExportError, match="differs by"):
        verify(open_session(mutant.SerializeToString()), runs)
