"""Flat inputs: names, constants, the batch axis, and random inputs of the example's kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxsparse.exporters.inputs import Inputs, read_inputs


class Any2(nn.Module):
    def forward(self, x: Tensor, *rest: Any, scale: float = 1.0, extra: Any = None, **more: Any) -> Tensor:
        total = x * scale + sum(r.sum() for r in rest if isinstance(r, Tensor))
        return total + (extra["k.k"][0].sum() if extra else 0) + sum(v.sum() for v in more.values())


def test_names_follow_the_signature_and_the_nesting() -> None:
    x = torch.randn(3, 2)
    inputs = read_inputs(
        Any2(), ((x, torch.zeros(1), torch.ones(2)), {"extra": {"k.k": [x, None]}, "scale": 2.5, "late": x.clone()})
    )
    assert inputs.names == ("x", "rest_0", "rest_1", "extra_k_k_0", "late")
    assert inputs.constants == ("`scale` (=2.5)",)
    assert inputs.batched == {0, 3, 4} and inputs.batch == 3 and inputs.reason == ""
    args, kwargs = inputs.build([t + 1 for t in inputs.tensors])
    assert torch.equal(args[0], x + 1) and len(args) == 3 and kwargs["scale"] == 2.5
    assert kwargs["extra"]["k.k"][1] is None and torch.equal(kwargs["extra"]["k.k"][0], x + 1)


def test_colliding_names_are_made_unique() -> None:
    class Two(nn.Module):
        def forward(self, a: dict[str, Tensor], a_b: Tensor) -> Tensor:
            return a["b"] + a_b

    assert read_inputs(Two(), ({"b": torch.ones(2)}, torch.ones(2))).names == ("a_b", "a_b_1")


class Table(nn.Module):
    """The second input has as many rows as the example's batch, and must keep them."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x @ table.reshape(4, 4)


def test_an_input_that_cannot_follow_the_batch_stays() -> None:
    inputs = read_inputs(Table(), (torch.randn(4, 4), torch.randn(4, 4)))
    assert inputs.batched == {0}
    assert [tuple(t.shape) for t in inputs.resized(7)] == [(7, 4), (4, 4)]


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3)


def test_a_fixed_batch_has_a_reason() -> None:
    inputs = read_inputs(Fixed(), (torch.randn(2, 3),))
    assert not inputs.batched and inputs.batch == 1
    assert "fails at batch size 3" in inputs.reason and "[2, 3]" in inputs.reason
    scalar = read_inputs(nn.Identity(), (torch.tensor(1.0),))
    assert scalar.reason == "no input has an axis"


def of(*tensors: Tensor) -> Inputs:
    return read_inputs(Any2(), tensors)


def draw(example: Tensor, size: int = 400, width: float = 1.0) -> Tensor:
    return of(example).draw(size, torch.Generator().manual_seed(0), width)[0]


def test_rows_repeat_the_example_in_order() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    (found,) = of(x).resized(5)
    assert torch.equal(found, x[[0, 1, 2, 0, 1]])


@pytest.mark.parametrize("width", [1.0, 4.0])
def test_floats_have_the_examples_mean_and_deviation(width: float) -> None:
    example = torch.randn(50, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1
    found = draw(example, 400, width)
    assert found.shape == (400, 20) and found.dtype == torch.float64
    assert float(found.mean()) == pytest.approx(float(example.mean()), abs=0.1 * width)
    assert float(found.std()) == pytest.approx(width * float(example.std()), rel=0.05)


def test_floats_of_one_sign_keep_it_and_constants_become_random() -> None:
    positive = draw(torch.rand(5, 4) + 0.5)
    assert float(positive.min()) >= 0.5 and float(positive.max()) <= 1.5
    ones = draw(torch.ones(5, 4))
    assert float(ones.min()) >= 0 and float(ones.max()) <= 2 and ones.unique().numel() > 1000
    zeros = draw(torch.zeros(5, 4))
    assert float(zeros.min()) < -1 and float(zeros.max()) > 1


def test_integers_and_booleans_stay_among_the_examples_values() -> None:
    tokens = torch.tensor([[3, 9], [5, 3]])
    assert set(draw(tokens).unique().tolist()) == {3, 5, 9}
    found = of(torch.randn(2, 3), torch.tensor([True, True])).draw(9, torch.Generator().manual_seed(0))[1]
    assert found.dtype == torch.bool and bool(found.all())


def test_draws_are_seeded_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    assert torch.equal(
        draw(torch.randn(3, 3, generator=torch.Generator().manual_seed(2))),
        draw(torch.randn(3, 3, generator=torch.Generator().manual_seed(2))),
    )
    assert torch.equal(before, torch.get_rng_state())
