"""Whether torch's own exporters take an original: judged on several inputs, as an exported sparse model is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxsparse.exporters.causes import reason_of
from fxsparse.exporters.program import quiet
from fxsparse.zoo.measure import Inputs, Outputs, flatten, forward, outputs_difference

DRAWS = 2
"""Random inputs on which the file of an original is compared with it, besides the example."""

_EXPORTERS = (("torch.export", True), ("the legacy exporter", False))


def probe(model: nn.Module, inputs: Inputs, folder: Path, bound: float) -> tuple[str, str]:
    """Which of torch's exporters takes a model with equal outputs ("" for none), and why the others do not.

    A trace holds the way that the example took, so one of a model whose outputs are empty or one number on all inputs
    shows nothing: it does not count, of a sparse model or of its original.

    Args:
        model: the model in eval mode on the CPU.
        inputs: example inputs.
        folder: where files may be written.
        bound: relative difference from PyTorch up to which outputs count as equal.
    """
    runs = [(given, forward(model, given)) for given in (inputs, *drawn(model, inputs))]
    reasons = []
    for label, dynamo in _EXPORTERS:
        path = folder / f"original-{dynamo}.onnx"
        try:
            flat = _Flat(model, inputs).eval()
            with quiet():
                torch.onnx.export(flat, tuple(flat.example), str(path), dynamo=dynamo, verbose=False)
            found = [run(path, given) for given, _ in runs]
        except Exception as error:
            reasons.append(f"{label}: {reason_of(error, model)[:200]}")
            continue
        pairs = zip((expected for _, expected in runs), found, strict=True)
        gap = max(0.0 if other is None else outputs_difference(tensors_only(one), other) for one, other in pairs)
        if not gap <= bound:
            reasons.append(f"{label}: outputs differ by {gap:.2g}")
        elif not dynamo and not _varied([expected for _, expected in runs]):
            reasons.append(f"{label}: its outputs are empty or constant on all inputs, which shows nothing of a trace")
        else:
            return label, ""
    return "", "; ".join(reasons)


def drawn(model: nn.Module, inputs: Inputs, count: int = DRAWS, seed: int = 0) -> list[Inputs]:
    """Random inputs that the model takes: the example's floats in random order, or moved by 5 %; integers as they are.

    Fewer where the model fails on them.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        for change in (_shuffled, _nudged):
            given: Inputs = pytree.tree_map(lambda leaf, change=change: change(leaf, generator), inputs)
            try:
                forward(model, given)
            except Exception:  # a random input need not be one that the model takes
                continue
            found.append(given)
            break
    return found


def _shuffled(leaf: object, generator: torch.Generator) -> object:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    order = torch.randperm(leaf.numel(), generator=generator)
    return leaf.detach().flatten()[order].reshape(leaf.shape)


def _nudged(leaf: object, generator: torch.Generator) -> object:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf.detach() * (1 + 0.05 * torch.randn(leaf.shape, generator=generator).to(leaf.dtype))


def _varied(runs: Sequence[Outputs]) -> bool:
    """Whether any output is more than one constant number over all runs."""
    columns = zip(*(outputs.tensors for outputs in runs), strict=False)
    joined = [torch.cat([tensor.flatten() for tensor in column]) for column in columns]
    return any(bool((values != values[0]).any()) for values in joined if values.numel())


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


def run(path: Path, inputs: Inputs) -> Outputs | None:
    """Outputs of a file in onnxruntime; None where the file has dropped inputs and it is not known which."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    wanted = session.get_inputs()
    if len(wanted) != len(tensors):
        return None
    feed = {slot.name: tensor.detach().numpy() for slot, tensor in zip(wanted, tensors, strict=True)}
    return tensors_only(Outputs("", tuple(torch.from_numpy(value) for value in session.run(None, feed))))


def tensors_only(outputs: Outputs) -> Outputs:
    """The same outputs without their structure, which a file does not have."""
    return Outputs("", outputs.tensors)
