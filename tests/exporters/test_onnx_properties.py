"""Generated models: the exported file computes what PyTorch computes, and keeps the zeros."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

from fxsparse.exporters import export_onnx, read_metadata
from fxsparse.nn import masks
from fxsparse.planning import transform
from fxsparse.testing import models


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(traceable=True), st.sampled_from([0.0, 0.3, 0.8]))
def test_generated_models_equal_pytorch(
    tmp_path: Path, drawn: tuple[nn.Module, tuple[Tensor, ...]], sparsity: float
) -> None:
    model, inputs = drawn[0].float(), tuple(x.float() for x in drawn[1])
    sparse = transform(model, inputs, sparsity=sparsity)
    path = tmp_path / "m.onnx"
    report = export_onnx(sparse, path, inputs, latency=False)
    assert report.batch == "dynamic", report.notes
    x = torch.randn(7, *inputs[0].shape[1:], dtype=inputs[0].dtype)
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = copy.deepcopy(sparse).eval().double()(x.double()).numpy()
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() <= 1e-4 * scale
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    for row in read_metadata(path)["layers"]:
        mask = masks(sparse)[row["name"]]
        for initializer, axes in row["initializers"].items():
            assert not stored[initializer][(~mask.permute(axes)).numpy()].any()
