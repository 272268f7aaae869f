from __future__ import annotations

import io
import warnings
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fxsparse.passes.lower_shared_support import Form, lower_shared_support
from tests.passes.lower_cases import NETWORKS, sparse, wish


def exported(model: nn.Module, example: Tensor) -> bytes:
    """As ONNX with a dynamic batch."""
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        program = torch.onnx.export(
            model, (example,), dynamo=True, verbose=False, external_data=False, dynamic_shapes=({0: "batch"},)
        )
    assert program is not None
    program.save(buffer)
    return buffer.getvalue()


# The nodes of each file, all of them stock operators, in any order.
MLP = {"Gather": 3, "Relu": 1, "Gelu": 1}
CASES: dict[tuple[str, Form], dict[str, int]] = {
    ("mlp", Form.GATHER_CONV): {**MLP, "Conv": 3, "Transpose": 2, "Unsqueeze": 1, "Squeeze": 1},
    ("mlp", Form.GATHER_MATMUL): {**MLP, "MatMul": 3, "Transpose": 2, "Reshape": 6, "Add": 3},
    ("fused attention", Form.GATHER_CONV): {
        "LayerNormalization": 2, "Transpose": 6, "Gather": 7, "Conv": 4, "Reshape": 2, "MatMul": 2, "Mul": 1,
        "Softmax": 1, "Add": 2, "Gelu": 1,
    },
    ("conv net", Form.GATHER_CONV): {  # torch folds the norms into the convolutions
        "Gather": 5, "Conv": 5, "Relu": 3, "MaxPool": 1, "ReduceMean": 1, "Reshape": 1,
        "Transpose": 2, "Unsqueeze": 1, "Squeeze": 1, "Slice": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "form"), CASES)
def test_the_file_has_stock_operators_and_computes_the_same(name: str, form: Form) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    x = torch.randn(2, *shape)
    masked = sparse(make(), (x,))
    file = exported(lower_shared_support(masked, (x,), choose=wish(form)).model, x)
    nodes = onnx.load_from_string(file).graph.node
    assert {node.domain for node in nodes} <= {""}
    found = Counter(node.op_type for node in nodes)
    assert found == CASES[name, form]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        given = torch.randn(batch, *shape)
        (made,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(made, masked(given).numpy(), rtol=1e-4, atol=1e-5)
    stored = {tensor.name: tensor.dims for tensor in onnx.load_from_string(file).graph.initializer}
    numbers = sum(int(np.prod(dims)) for tensor, dims in stored.items() if tensor.endswith("blocks"))
    alive = sum(int((p != 0).sum()) for n, p in masked.named_parameters() if p.ndim > 1)
    dense = sum(p.numel() for p in masked.parameters() if p.ndim > 1)
    assert alive * 0.5 <= numbers < 0.7 * dense
