"""ONNX export, checked in onnxruntime."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxsparse
from fxsparse.zoo.measure import Inputs, Outputs, flatten, forward, outputs_difference
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
        probe, reason = _probe(original, subject)
        if not probe:
            raise NotApplicableError(f"the original does not export either ({reason}); fxsparse said: {refusal}")
        sheet.numbers["original_exporter"] = probe
        try:
            sparse = fxsparse.transform(original, subject.inputs(), sparsity=subject.sparsity)
            _export_sparse(sparse, path, subject, sheet)
        except Exception as error:
            sheet.check(False, f"{first_line(error)} (the original exports: {probe}); without switches: {refusal}")
        else:
            sheet.remarks.append(f"after switching the model's implementation; without: {refusal}")


def _export_sparse(model: nn.Module, path: Path, subject: Subject, sheet: Sheet) -> None:
    report = fxsparse.export_onnx(model.eval(), path, subject.inputs(), latency=False)
    sheet.numbers["onnx_difference"] = report.worst_relative
    sheet.numbers["onnx_batch"] = report.batch
    sheet.numbers["onnx_opset"] = report.opset
    expected = forward(model, subject.inputs())
    found = _run(path, subject.inputs())
    if found is None:
        return
    gap = outputs_difference(_tensors_only(expected), found)
    sheet.within("onnx_example_difference", gap, subject.tolerance(BOUND), "outputs in onnxruntime on the example")


def _probe(model: nn.Module, subject: Subject) -> tuple[str, str]:
    """Which of torch's exporters takes the original with equal outputs ("" for none), and why not."""
    reasons = []
    expected = forward(model, subject.inputs())
    for label, dynamo in (("torch.export", True), ("the legacy exporter", False)):
        path = Path(subject.scratch) / f"original-{dynamo}.onnx"
        try:
            flat = _Flat(model, subject.inputs())
            torch.onnx.export(flat, tuple(flat.example), str(path), dynamo=dynamo, verbose=False)
            found = _run(path, subject.inputs())
            gap = 0.0 if found is None else outputs_difference(_tensors_only(expected), found)
        except Exception as error:
            reasons.append(f"{label}: {first_line(error)[:150]}")
            continue
        if gap <= subject.tolerance(BOUND):
            return label, ""
        reasons.append(f"{label}: outputs differ by {gap:.2g}")
    return "", "; ".join(reasons)


class _Flat(nn.Module):
    """A model as a function from the tensors among its inputs to the tensors among its outputs."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.spec = pytree.tree_flatten(inputs)
        self.example = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(flatten(self.model(*args, **kwargs))[1])


def _run(path: Path, inputs: Inputs) -> Outputs | None:
    """Outputs of a file in onnxruntime; None where the file has dropped inputs and it is not known which."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    wanted = session.get_inputs()
    if len(wanted) != len(tensors):
        return None
    feed = {slot.name: tensor.detach().numpy() for slot, tensor in zip(wanted, tensors, strict=True)}
    return _tensors_only(Outputs("", tuple(torch.from_numpy(value) for value in session.run(None, feed))))


def _tensors_only(outputs: Outputs) -> Outputs:
    return Outputs("", outputs.tensors)


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
