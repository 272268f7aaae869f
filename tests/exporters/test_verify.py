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
from fxsparse.exporters.reference import Verification, reference
from fxsparse.exporters.verify import Parity, verify


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
    inputs, options = read_inputs(model, (x,)), options or Verification()
    return verify(Session(answer, list(inputs.names), ["y"]), reference(model, inputs, options), options.tolerance)


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


class Sorted(nn.Module):
    """Scores that tie in a way that rounding decides, as in a detector."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = (x * 1e-9 + 1).sum(1)
        order = scores.argsort(descending=True)
        return x[order], order


def test_runs_that_rounding_decides_count_only_where_they_agree() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5)
    model, inputs = Sorted(), read_inputs(Sorted(), (x,))
    expected = reference(model, inputs, Verification(batch_sizes=(6,), draws=8))

    def same(x: Any) -> list[Any]:
        return [t.numpy() for t in model(torch.from_numpy(x))]

    found = verify(Session(same, ["x"], ["y", "order"]), expected)
    assert found.reference == "same-precision" and found.allowed == 1e-3

    def reversed_(x: Any) -> list[Any]:
        return [y[::-1].copy() for y in same(x)]

    with pytest.raises(ExportError, match=r"0 of 8 runs can be compared.*near ties"):
        verify(Session(reversed_, ["x"], ["y", "order"]), expected)


class Positive(nn.Module):
    """Output of a length that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x[x > 0]


def test_lengths_that_depend_on_values_are_compared_where_equal() -> None:
    calls = []

    def answer(x: Any) -> list[Any]:
        calls.append(1)
        y = 2 * x[x > 0]
        return [y[1:]] if len(calls) == 3 else [y]

    found = check(Positive(), answer, X, Verification(batch_sizes=(2, 3)))
    assert any("1 of 8 runs were not compared" in note for note in found.notes)
    with pytest.raises(ExportError, match="1 of 8 runs can be compared"):
        check(Positive(), lambda x: [2 * x[x > 0][1:]], X, Verification(batch_sizes=(2, 3)))
    with pytest.raises(ExportError, match="differs by"):
        check(Positive(), lambda x: [2.02 * x[x > 0]], X, Verification(batch_sizes=(2, 3)))


def test_an_output_that_never_changes_is_noted() -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x

    found = check(Zero(), lambda x: [0 * x], X)
    assert not found.varied and any("`y` is empty or one number" in note for note in found.notes)


def test_amplified_rounding_widens_the_tolerance_but_a_wrong_factor_fails() -> None:
    """A deep chain that loses digits in every step."""

    class Deep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x / x.abs().max() + 100
                x = x - 100
            return x

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

    def answer(x: Any, factor: float = 1.0) -> list[Any]:
        return [(Deep()(torch.from_numpy(x) * (1 + 1e-7)) * factor).numpy()]

    found = check(Deep(), answer, x)
    assert 3e-6 < found.float32_error < found.allowed <= 1e-3
    with pytest.raises(ExportError, match="differs by"):
        check(Deep(), lambda x: answer(x, 1.01), x)
