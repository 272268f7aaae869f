"""Run by test_other_device.py with `--device elsewhere`: what tests make is there, with the numbers of the CPU."""

from typing import Any

import numpy as np
import torch
from torch import nn

import fxsparse
from tests.device import LIBRARY

MADE = torch.ones(2)


def by_the_library(code: str) -> Any:
    """What a line would make in a file of the library."""
    found: dict[str, Any] = {"torch": torch}
    exec(compile(f"made = {code}", f"{LIBRARY}line.py", "exec"), found)
    return found["made"]


def test_what_tests_make() -> None:
    made = [MADE, torch.zeros(2), torch.tensor([1.0]), torch.arange(3), torch.randn(2), torch.from_numpy(np.ones(2))]
    made += [nn.Linear(2, 2).weight, fxsparse.nn.Linear(2, 2).weight_mask, torch.rand_like(MADE)]
    assert [each.device.type for each in made] == ["elsewhere"] * len(made)
    there = torch.zeros(2, device="cpu")
    assert there.device.type == torch.as_tensor(there).device.type == "cpu"
    assert torch.zeros(2, requires_grad=True).is_leaf and torch.randn(2, requires_grad=True).is_leaf


def test_numbers_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    found = [torch.randn(3), nn.Linear(2, 2).weight, torch.empty(2).uniform_(), torch.randperm(9)]
    torch.manual_seed(0)
    code = "torch.randn(3), torch.nn.Linear(2, 2).weight, torch.empty(2).uniform_(), torch.randperm(9)"
    expected = by_the_library(code)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_what_the_library_makes_stays_where_it_puts_it() -> None:
    assert by_the_library("torch.zeros(2)").device.type == "cpu"
    assert by_the_library("torch.randn(2, generator=torch.Generator())").device.type == "cpu"
    model = fxsparse.transform(nn.Linear(4, 4), (torch.randn(1, 4),), sparsity=0.5)
    assert {each.device.type for each in fxsparse.masks(model).values()} == {"elsewhere"}


def test_oracles_of_the_cpu_are_compared() -> None:
    here, there = torch.ones(3), torch.ones(3, device="cpu")
    torch.testing.assert_close(here, there)
    assert torch.equal(here, there) and (here.numpy() == 1).all() and bool((here + there == 2).all())
    with torch.autocast("cpu", torch.bfloat16):
        assert (here[None] @ there[:, None].to("elsewhere")).dtype is torch.bfloat16
