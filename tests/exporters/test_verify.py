"""The comparison itself: what it lets through and what it stops, against a session that lies on purpose."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ExportError
from fxsparse.exporters.inputs import read_inputs
from fxsparse.exporters.verify import Parity, Verification, verify


class Session:
    """Answers like onnxruntime, with a model of its own."""

    def __init__(self, answer: Callable[[Any], list[Any]], inputs: list[str], outputs: list[str]) -> None:
        self.answer = answer
        self.inputs, self.outputs = inputs, outputs

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.inputs]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.outputs]

    def run(self, _: None, feed: dict[str, Any]) -> list[Any]:
        return self.answer(*feed.values())


def check(
    model: nn.Module, answer: Callable[[Any], list[Any]], x: Tensor, options: Verification | None = None
) -> Parity:
    name = next(iter(read_inputs(model, (x,)).names))
    return verify(Session(answer, [name], ["y"]), model, read_inputs(model, (x,)), options or Verification())


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def test_an_exact_answer_passes_and_is_counted() -> None:
    found = check(Double(), lambda x: [2 * x], X, Verification(batch_sizes=(4, 1), draws=3))
    assert (found.worst_absolute, found.worst_relative, found.batch_sizes, found.samples) == (0.0, 0.0, (1, 4), 15)
    assert found.reference == "float64"


@pytest.mark.parametrize("wrong", [1e-5, -1e-3, 1.0, np.nan, np.inf])
def test_one_wrong_entry_in_the_last_run_fails(wrong: float) -> None:
    calls = []

    def answer(x: Any) -> list[Any]:
        calls.append(len(x))
        y = 2 * x
        if len(calls) == 8:
            y[-1, -1] += wrong * np.abs(y).max()
        return [y]

    with pytest.raises(ExportError, match="output `y` differs by .* at batch size 5"):
        check(Double(), answer, X, Verification(batch_sizes=(2, 5), draws=4))


def test_zeros_do_not_pass_for_small_outputs() -> None:
    class Tiny(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1e-20

    with pytest.raises(ExportError, match=r"differs .* 1 of its largest value"):
        check(Tiny(), lambda x: [np.zeros_like(x)], X)


def test_rounding_of_float32_passes_and_ten_times_more_does_not() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 1e4).cumsum(1) - (x * 1e4).sum(1, keepdim=True) + x

    def answer(x: Any) -> list[Any]:
        wide = x.astype(np.float64)
        exact = (wide * 1e4).cumsum(1) - (wide * 1e4).sum(1, keepdims=True) + wide
        return [exact.astype(np.float32)]

    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    found = check(Sums(), answer, x)
    assert 0 < found.float32_error and found.worst_relative <= found.allowed <= 1e-3
    with pytest.raises(ExportError, match="differs"):
        check(Sums(), lambda x: [answer(x)[0] * np.float32(1 + 20 * found.allowed)], x)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: [2 * x[:, :3]], r"`y` is float32 \(1, 3\) in onnxruntime and float32 \(1, 4\)"),
        (lambda x: [(2 * x).astype(np.float64)], r"`y` is float64 .* and float32"),
    ],
)
def test_another_shape_or_dtype_fails(answer: Callable[[Any], list[Any]], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check(Double(), answer, X)


def test_whole_numbers_must_be_equal() -> None:
    class Best(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    assert check(Best(), lambda x: [x.argmax(1)], X).worst_absolute == 0.0

    def off(x: Any) -> list[Any]:
        y = x.argmax(1)
        y[0] = (y[0] + 1) % 4
        return [y]

    with pytest.raises(ExportError, match=r"`y` \(int64\) differs in 1 of 1 entries"):
        check(Best(), off, X)


def test_infinities_must_stand_at_the_same_places() -> None:
    class Guarded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, -torch.inf)

    assert check(Guarded(), lambda x: [np.where(x > 0, x, -np.inf)], X).worst_absolute == 0.0
    with pytest.raises(ExportError, match="differs"):
        check(Guarded(), lambda x: [np.where(x > 0, x, np.inf)], X)
    with pytest.raises(ExportError, match="differs"):
        check(Guarded(), lambda x: [np.where(x > 0.1, x, -np.inf)], X)


def test_an_overflow_of_float32_must_happen_alike() -> None:
    class Exponential(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 200).exp()

    def answer(x: Any) -> list[Any]:
        with np.errstate(over="ignore"):
            return [torch.from_numpy(x * 200).exp().numpy()]

    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    assert check(Exponential(), answer, x).worst_relative < 1e-4
    with pytest.raises(ExportError, match="differs"):
        check(Exponential(), lambda x: [np.nan_to_num(answer(x)[0], posinf=3e38)], x)


def test_an_error_of_the_runtime_names_the_shapes() -> None:
    def broken(x: Any) -> list[Any]:
        raise RuntimeError("reshape: 12 into 5")

    with pytest.raises(ExportError, match=r"stops on inputs x \(1, 4\) \(RuntimeError: reshape: 12 into 5\)"):
        check(Double(), broken, X)


def test_a_forward_that_names_its_dtype_is_compared_in_it() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor) -> Tensor:
            return x.float() @ self.weight

    found = check(Named(), lambda x: [x @ np.eye(4, dtype=np.float32)], X)
    assert found.reference == "same-precision" and "same-precision PyTorch" in str(found)
