"""A file against a ticket or another file: what is checked, and that each lie is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import fxsparse
from fxsparse.errors import ExportError
from fxsparse.exporters import optimize_file, verify_file
from fxsparse.exporters.against import Status
from fxsparse.lottery import Ticket
from fxsparse.models import lenet_300_100

X = (torch.zeros(2, 64),)
PLAIN: dict[str, Any] = {"latency": False, "compact": False, "lower": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ticket, Path, Path]:
    """A ticket, its export, and another ticket of the same model."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = fxsparse.transform(lenet_300_100(), X, sparsity=0.8)
    options: dict[str, Any] = {"final": True, "factory": "fxsparse.models:lenet_300_100", "input_signature": X}
    ticket = fxsparse.save_ticket(model, folder / "a.ticket", **options)
    fxsparse.export_onnx(model, folder / "a.onnx", X, lineage=ticket.origin, **PLAIN)
    other = fxsparse.transform(lenet_300_100(), X, sparsity=0.9)
    fxsparse.save_ticket(other, folder / "b.ticket", **options)
    return ticket, folder / "a.onnx", folder / "b.ticket"


def statuses(verdict: Any) -> dict[str, Status]:
    return {check.name: check.status for check in verdict.checks}


def change(source: Path, out: Path, edit: Callable[[Any], None]) -> Path:
    model = onnx.load(source)
    edit(model)
    out.write_bytes(model.SerializeToString())
    return out


def edit_weight(model: Any, size: int, alter: Callable[[Any], None]) -> None:
    """Change the first initializer of this many entries."""
    tensor = next(t for t in model.graph.initializer if int(np.prod(t.dims)) == size)
    array = numpy_helper.to_array(tensor).copy()
    alter(array)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def test_an_export_of_the_ticket_passes_every_check(made: Any) -> None:
    ticket, path, _ = made
    verdict = verify_file(path, ticket)
    assert verdict.passed and set(statuses(verdict).values()) == {Status.PASSED}
    assert list(statuses(verdict)) == ["masks", "lineage", "densities", "zeros", "parity"]
    assert "3 of 3 masked weights found" in str(verdict) and ticket.ticket_id[:12] in str(verdict)


def test_another_ticket_fails_every_check(made: Any) -> None:
    _, path, other = made
    verdict = verify_file(path, fxsparse.load_ticket(other))
    assert not verdict.passed and set(statuses(verdict).values()) == {Status.FAILED}
    assert str(verdict).splitlines()[0].endswith("FAILED")


def test_a_revived_weight_is_found(made: Any, tmp_path: Path) -> None:
    ticket, path, _ = made

    def revive(array: Any) -> None:
        dead = np.argwhere(array == 0)[0]
        array[tuple(dead)] = 1e-12

    lie = change(path, tmp_path / "a.onnx", lambda model: edit_weight(model, 300 * 64, revive))
    verdict = verify_file(lie, ticket)
    found = statuses(verdict)
    assert found["zeros"] is Status.FAILED and found["masks"] is Status.PASSED and not verdict.passed
    assert "1 dead entries are not zero" in str(verdict)


@pytest.mark.parametrize("strip", [True, False])
def test_a_revived_weight_is_found_without_metadata_and_under_another_name(
    made: Any, tmp_path: Path, strip: bool
) -> None:
    ticket, path, _ = made

    def lie(model: Any) -> None:
        del model.metadata_props[:]
        for tensor in model.graph.initializer:
            if list(tensor.dims) == [300, 64]:
                array = numpy_helper.to_array(tensor).copy()
                if not strip:
                    array[array == 0] = 1e-9
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array.T), "other"))
        gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
        gemm.input[1] = "other"
        next(a for a in gemm.attribute if a.name == "transB").i = 0

    verdict = verify_file(change(path, tmp_path / "a.onnx", lie), ticket)
    found = statuses(verdict)
    assert found["masks"] is found["lineage"] is found["densities"] is Status.SKIPPED
    assert (found["zeros"], verdict.passed) == ((Status.PASSED, True) if strip else (Status.FAILED, False))


def test_changed_numbers_with_the_right_zeros_fail_parity(made: Any, tmp_path: Path) -> None:
    ticket, path, _ = made

    def scale(array: Any) -> None:
        array *= 1.01

    verdict = verify_file(change(path, tmp_path / "a.onnx", lambda m: edit_weight(m, 300 * 64, scale)), ticket)
    found = statuses(verdict)
    assert found["zeros"] is Status.PASSED and found["parity"] is Status.FAILED and not verdict.passed
    assert verify_file(tmp_path / "a.onnx", ticket, tolerance=0.2).passed


def metadata(model: Any, key: str, value: Any) -> None:
    entry = next(entry for entry in model.metadata_props if entry.key == f"fxsparse.{key}")
    entry.value = value if isinstance(value, str) else json.dumps(value)


@pytest.mark.parametrize("key", ["mask_digest", "lineage", "layers"])
def test_false_metadata_is_found(made: Any, tmp_path: Path, key: str) -> None:
    ticket, path, _ = made
    found = fxsparse.exporters.read_metadata(path)
    value: Any = "0" * 64
    if key == "lineage":
        value = found["lineage"] | {"ticket_id": "f" * 64}
    if key == "layers":
        value = [row | {"alive": row["alive"] + 1} for row in found["layers"]]
    lie = change(path, tmp_path / "a.onnx", lambda model: metadata(model, key, value))
    name = {"mask_digest": "masks", "lineage": "lineage", "layers": "densities"}[key]
    verdict = verify_file(lie, ticket)
    assert [n for n, status in statuses(verdict).items() if status is Status.FAILED] == [name]


def test_a_file_that_names_no_ticket(made: Any, tmp_path: Path) -> None:
    ticket, path, _ = made
    verdict = verify_file(change(path, tmp_path / "a.onnx", lambda m: metadata(m, "lineage", {})), ticket)
    assert statuses(verdict)["lineage"] is Status.SKIPPED and verdict.passed


def test_compacted_and_lowered_files_pass_by_their_numbers(made: Any, tmp_path: Path) -> None:
    ticket, path, _ = made
    torch.manual_seed(0)
    model = fxsparse.transform(
        lenet_300_100(), X, sparsity=0.9, pattern=fxsparse.SharedSupport(100), include=["fc1.weight", "fc2.weight"]
    )
    saved = fxsparse.save_ticket(model, tmp_path / "s.ticket", final=True, factory="fxsparse.models:lenet_300_100",
                                 input_signature=X)  # fmt: skip
    report = fxsparse.export_onnx(model, tmp_path / "s.onnx", X, latency=False, lineage=saved.origin)
    small = optimize_file(report.path, tmp_path / "small.onnx", latency=False, batches=(256,))
    for file in (report.path, small.path):
        verdict = verify_file(file, saved)
        assert verdict.passed and statuses(verdict)["parity"] is Status.PASSED, str(verdict)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(x)))


def test_a_model_of_ones_own_with_tied_weights_and_token_ids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = (torch.randint(0, 20, (2, 5)),)
    model = fxsparse.transform(Tied(), example, sparsity=0.5)
    ticket = fxsparse.save_ticket(model, tmp_path / "t.ticket", final=True)
    fxsparse.export_onnx(model, tmp_path / "t.onnx", example, **PLAIN)
    verdict = verify_file(tmp_path / "t.onnx", ticket)
    assert statuses(verdict)["parity"] is Status.SKIPPED and statuses(verdict)["zeros"] is Status.PASSED
    assert verdict.passed and "not one of fxsparse.models" in str(verdict)
    verdict = verify_file(tmp_path / "t.onnx", ticket, model=Tied(), example_inputs=example)
    assert statuses(verdict)["parity"] is Status.PASSED and verdict.passed
    wrong = verify_file(tmp_path / "t.onnx", ticket, model=nn.Linear(3, 4), example_inputs=(torch.zeros(2, 3),))
    assert statuses(wrong)["parity"] is Status.SKIPPED


def test_nothing_shown_is_not_passed(tmp_path: Path) -> None:
    example = (torch.randint(0, 20, (2, 5)),)
    torch.manual_seed(0)
    ticket = fxsparse.save_ticket(fxsparse.transform(Tied(), example, sparsity=0.5), tmp_path / "t.ticket", final=True)
    fxsparse.export_onnx(nn.Linear(3, 4), tmp_path / "l.onnx", (torch.zeros(2, 3),), latency=False)
    with_nothing = change(tmp_path / "l.onnx", tmp_path / "m.onnx", lambda model: model.metadata_props.pop())
    verdict = verify_file(with_nothing, ticket)
    assert not verdict.passed and "neither zeros nor numbers" in str(verdict)


def test_a_fixed_batch_is_run_at_its_size(made: Any, tmp_path: Path) -> None:
    ticket, path, _ = made

    def fix(model: Any) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 3

    verdict = verify_file(change(path, tmp_path / "a.onnx", fix), ticket)
    assert verdict.passed and "batches of 3" in str(verdict)


def test_file_against_file(made: Any, tmp_path: Path) -> None:
    _, path, _ = made
    copy = Path(shutil.copy(path, tmp_path / "copy.onnx"))
    verdict = verify_file(copy, path)
    assert verdict.passed and set(statuses(verdict).values()) == {Status.PASSED}

    def revive(array: Any) -> None:
        array[array == 0] = 1e-10

    def scale(array: Any) -> None:
        array *= 1.01

    dense = change(path, tmp_path / "b.onnx", lambda model: edit_weight(model, 300 * 64, revive))
    verdict = verify_file(dense, path)
    assert statuses(verdict)["zeros"] is Status.FAILED and statuses(verdict)["parity"] is Status.PASSED
    assert verify_file(path, dense).passed  # sparser than the other is no fault
    other = change(path, tmp_path / "c.onnx", lambda model: edit_weight(model, 300 * 64, scale))
    assert statuses(verify_file(other, path))["parity"] is Status.FAILED
    assert verify_file(other, path, tolerance=0.2).passed

    def rename(model: Any) -> None:
        model.graph.input[0].name = "renamed"
        next(node for node in model.graph.node if node.op_type == "Gemm").input[0] = "renamed"

    verdict = verify_file(change(path, tmp_path / "d.onnx", rename), path)
    assert statuses(verdict)["signature"] is Status.FAILED and statuses(verdict)["parity"] is Status.SKIPPED
    with pytest.raises(ExportError, match="there is no such file"):
        verify_file(path, tmp_path / "missing.onnx")


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_what_is_allowed_between_files_is_that_of_their_precision(tmp_path: Path, kind: Any) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 4))
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    for name, scale in (("a", 1.0), ("b", 1.001)):
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [onnx.helper.make_tensor_value_info("x", element, ["n", 8])],
            [onnx.helper.make_tensor_value_info("y", element, ["n", 4])],
            [numpy_helper.from_array((weight * scale).astype(kind), "w")],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(model, tmp_path / f"{name}.onnx")
    verdict = verify_file(tmp_path / "b.onnx", tmp_path / "a.onnx")
    assert verdict.passed is (kind is np.float16), str(verdict)
    assert not verify_file(tmp_path / "b.onnx", tmp_path / "a.onnx", tolerance=1e-4).passed
