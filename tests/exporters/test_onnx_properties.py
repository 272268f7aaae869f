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

from fxsparse.errors import ConfigError, ExportError
from fxsparse.exporters import Verification, export_onnx, read_metadata
from fxsparse.exporters.inputs import read_inputs
from fxsparse.graph import isolated_clone
from fxsparse.graph.inputs import tensors_of
from fxsparse.nn import masks
from fxsparse.planning import transform
from fxsparse.testing import EVERYTHING, TRACEABLE, Ingredient, models


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(ingredients=TRACEABLE - {Ingredient.STATE}), st.sampled_from([0.0, 0.3, 0.8]))
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
            kept = stored[initializer]
            assert not kept[(~mask.permute(axes)).reshape(kept.shape).numpy()].any()
        for initializer in row["parts"]:
            assert initializer in stored


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(models(ingredients=EVERYTHING, dtype=torch.float32))
def test_any_generated_model_is_exported_rightly_or_refused(tmp_path: Path, drawn: tuple[nn.Module, object]) -> None:
    """The file is run at the example, and on its rows in reverse, against the model; a refusal leaves no file."""
    model, example = drawn
    path = tmp_path / "m.onnx"
    path.unlink(missing_ok=True)
    try:
        sparse = transform(model, example, sparsity=0.5).eval()
    except ConfigError:
        return
    try:
        export_onnx(sparse, path, example, latency=False, verify=Verification(batch_sizes=(1, 4), draws=3))
    except ExportError as error:
        assert not path.exists() and "\n" not in str(error)
        return
    session = onnxruntime.InferenceSession(str(path))
    names = {value.name for value in session.get_inputs()}
    inputs = read_inputs(isolated_clone(sparse), example)
    for tensors in (inputs.tensors, [t.flip(0) if i in inputs.batched else t for i, t in enumerate(inputs.tensors)]):
        feed = {n: t.numpy() for n, t in zip(inputs.names, tensors, strict=True) if n in names}
        args, kwargs = inputs.build([t.clone() for t in tensors])
        with torch.no_grad():
            expected = [t.numpy() for t in tensors_of(isolated_clone(sparse)(*args, **kwargs))]
        for found, y in zip(session.run(None, feed), expected, strict=True):
            assert found.shape == y.shape
            assert np.abs(found.astype(float) - y).max(initial=0) <= 1e-3 * max(np.abs(y).max(initial=0), 1e-6)
