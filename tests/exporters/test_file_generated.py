"""`optimize_file` on files of generated models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

from fxsparse.errors import ExportError
from fxsparse.exporters import export_onnx, optimize_file
from fxsparse.exporters.file_report import FileReport
from fxsparse.testing import Program
from tests.generated import anything, examples

PLAIN: dict[str, Any] = {"compact": False, "lower": False}


def sparse(program: Program) -> nn.Module:
    """The program's model with dead rows in its matrices."""
    generator, model = torch.Generator().manual_seed(0), program.model().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.shape[0] > 1:
                parameter[torch.rand(parameter.shape[0], generator=generator) < 0.4] = 0
    return model


@examples(4)
@given(program=anything())
def test_generated_models_compute_the_same(program: Program, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("generated")
    report = optimized(program, folder)
    if report is not None:
        assert report.verification is not None
    shutil.rmtree(folder)


def optimized(program: Program, folder: Path) -> FileReport | None:
    """The report, or None where torch cannot export the model or onnxruntime cannot run it."""
    try:
        inputs = replace(program, dtype=torch.float32).inputs()
        source = export_onnx(sparse(program), folder / "a.onnx", inputs, latency=False, verify=False, **PLAIN)
    except ExportError:
        return None
    return optimize_file(source.path, folder / "b.onnx", latency=False)
