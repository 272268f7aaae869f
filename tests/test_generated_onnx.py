"""Generated models: exported, run in onnxruntime, compared with float64 PyTorch.

`FXSPARSE_EXAMPLES=5000` runs thousands (see tests/generated.py).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from hypothesis import given
from torch import Tensor

from fxsparse.exporters import export_onnx
from fxsparse.testing import EVERYTHING, Ingredient, Sizes, programs
from tests.generated import Planned, call, examples, planned

EXPORTABLE = EVERYTHING - {Ingredient.PYTHON, Ingredient.CALLS, Ingredient.STATE}
"""A file has one graph and no state between calls; structured inputs have tests of their own."""
SMALL = Sizes(steps=4)


def single(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs in float32."""
    return tuple(x.float() if x.is_floating_point() else x for x in inputs)


def run(path: Path, inputs: tuple[Tensor, ...]) -> list[Any]:
    """Outputs of the file."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {v.name: x.numpy() for v, x in zip(session.get_inputs(), inputs, strict=True)})


def check_export(drawn: Planned) -> None:
    """Export in float32; the file computes what the sparse model computes in float64, at another batch size too."""
    exact = drawn.plan.apply().eval()
    sparse = drawn.plan.apply().float()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        report = export_onnx(sparse, path, single(drawn.inputs), latency=False)
        assert report.verification is not None
        for inputs in (drawn.inputs, drawn.other_inputs()) if report.batch == "dynamic" else (drawn.inputs,):
            with torch.no_grad():
                expected = [output.numpy() for output in call(exact, inputs)]
                rounded = [output.numpy() for output in call(sparse.eval(), single(inputs))]
            found = run(path, single(inputs))
            assert len(found) == len(expected)
            for a, b, c in zip(found, expected, rounded, strict=True):
                assert a.shape == b.shape
                own = np.abs(c - b).max()  # a norm of nearly nothing makes much of little, in PyTorch too
                assert np.abs(a - b).max() <= 2e-4 * (np.abs(b).max() + 1e-3) + 2 * own
    assert report.batch == "dynamic" or any("batch" in note for note in report.notes)


@examples(8)
@given(planned(programs(ingredients=EXPORTABLE, sizes=SMALL)))
def test_exported_files_compute_what_pytorch_computes(drawn: Planned) -> None:
    check_export(drawn)


@examples(8)
@given(planned(programs(ingredients=EXPORTABLE, sizes=SMALL, convolutional=True)))
def test_exported_image_models_compute_what_pytorch_computes(drawn: Planned) -> None:
    check_export(drawn)
