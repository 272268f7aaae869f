"""ONNX export, checked in onnxruntime."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

import fxsparse
from fxsparse.zoo.measure import forward, outputs_difference
from fxsparse.zoo.probe import probe, run, tensors_only
from fxsparse.zoo.subject import NotApplicableError, Sheet, Subject, first_line

BOUND = 2e-3
"""Relative difference from PyTorch up to which an exported file counts as equal."""

_IMPLEMENTATIONS = (("set_attn_implementation", "eager"), ("set_experts_implementation", "batched_mm"))


def onnx(subject: Subject, sheet: Sheet) -> None:
    """`export_onnx` of the sparse model, verified; where it refuses, whether torch can export the original at all."""
    path = Path(subject.scratch) / "sparse.onnx"
    try:
        _export_sparse(subject.sparse, path, subject, sheet)
        return
    except Exception as error:
        refusal = first_line(error)
    with _switched(subject):
        original = subject.build().eval()
        _switch(original)
        taken, reason = probe(original, subject.inputs(), Path(subject.scratch), subject.tolerance(BOUND))
        if not taken:
            raise NotApplicableError(f"the original does not export either ({reason}); fxsparse said: {refusal}")
        sheet.numbers["original_exporter"] = taken
        try:
            sparse = fxsparse.transform(original, subject.inputs(), sparsity=subject.sparsity)
            _export_sparse(sparse, path, subject, sheet)
        except Exception as error:
            sheet.check(False, f"{first_line(error)} (the original exports: {taken}); without switches: {refusal}")
        else:
            sheet.remarks.append(f"after switching the model's implementation; without: {refusal}")


def _export_sparse(model: nn.Module, path: Path, subject: Subject, sheet: Sheet) -> None:
    report = fxsparse.export_onnx(model.eval(), path, subject.inputs(), latency=False)
    sheet.numbers["onnx_difference"] = report.worst_relative
    sheet.numbers["onnx_batch"] = report.batch
    sheet.numbers["onnx_opset"] = report.opset
    expected = forward(model, subject.inputs())
    found = run(path, subject.inputs())
    if found is None:
        return
    gap = outputs_difference(tensors_only(expected), found)
    sheet.within("onnx_example_difference", gap, subject.tolerance(BOUND), "outputs in onnxruntime on the example")


def _switch(model: nn.Module) -> None:
    """Ask a model for its plainest implementation, where it offers the choice."""
    for name, value in _IMPLEMENTATIONS:
        method = getattr(model, name, None)
        if callable(method):
            with contextlib.suppress(Exception):  # offered, but not for this model
                method(value)
    config: Any = getattr(model, "config", None)
    if getattr(config, "use_cache", None):
        with contextlib.suppress(Exception):
            config.use_cache = False


@contextlib.contextmanager
def _switched(subject: Subject) -> Iterator[None]:
    """Ask libraries for unfused attention while a model is built, where they offer the choice."""
    setters = {
        id(setter): setter
        for module in list(sys.modules.values())
        if callable(setter := getattr(module, "__dict__", {}).get("set_fused_attn"))
    }
    try:
        for setter in setters.values():
            setter(False)
        yield
    finally:
        for setter in setters.values():
            setter(True)
