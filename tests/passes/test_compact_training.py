"""A compacted model trains on: with its optimizer's state, its schedulers, and equal to the masked model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fxsparse
from fxsparse.errors import ConfigError
from fxsparse.planning.compaction import compact

DEAD = (1, 3, 4)
ALIVE = [0, 2, 5, 6, 7]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.02),
    "adamw amsgrad": partial(torch.optim.AdamW, lr=0.02, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "adadelta": partial(torch.optim.Adadelta, lr=0.5),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
    "nadam": partial(torch.optim.NAdam, lr=0.02),
}


class Free(nn.Module):
    """No bias in the layer that loses channels, and relu(0) = 0: a dead channel stays zero whatever is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def sparse_model() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x, y = Free().double(), torch.randn(16, 5).double(), torch.randn(16, 3).double()
    sparse = fxsparse.transform(model, (x,), include="first")
    mask = torch.ones(8, 5, dtype=torch.bool)
    mask[list(DEAD)] = False
    fxsparse.set_masks(sparse, {"first.weight": mask})
    return sparse, x, y


def step(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


def assert_same_training(old: nn.Module, new: nn.Module) -> None:
    kept = {"first.weight": (ALIVE, slice(None)), "second.weight": (slice(None), ALIVE), "second.bias": (slice(None),)}
    for name, index in kept.items():
        expected, found = old.get_parameter(name)[index], new.get_parameter(name)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_it_would_with_the_masked_model(name: str) -> None:
    sparse, x, y = sparse_model()
    optimizer = OPTIMIZERS[name](sparse.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    for _ in range(4):
        step(sparse, optimizer, x, y)
        scheduler.step()
    twin = copy.deepcopy(sparse)
    twin_optimizer = type(optimizer)(twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small = compact(sparse, (x,), optimizer=optimizer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in small.parameters()}
    assert all(any(held is p for p in small.parameters()) for held in optimizer.state)
    assert scheduler.optimizer is optimizer
    for _ in range(10):
        step(twin, twin_optimizer, x, y)
        step(small, optimizer, x, y)
        scheduler.step()
        twin_optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
    assert_same_training(twin, small)


def test_a_matrix_optimizer_follows() -> None:
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        pytest.skip("this torch has no Muon")
    sparse, x, y = sparse_model()
    optimizer = muon([p for p in sparse.parameters() if p.ndim == 2], lr=0.01)
    step(sparse, optimizer, x, y)
    old = optimizer.state[sparse.get_parameter("second.weight")]["momentum_buffer"].clone()
    small = compact(sparse, (x,), optimizer=optimizer)
    assert torch.equal(optimizer.state[small.get_parameter("second.weight")]["momentum_buffer"], old[:, ALIVE])
    step(small, optimizer, x, y)


def test_a_factored_second_moment_follows() -> None:
    sparse, x, y = sparse_model()
    optimizer = torch.optim.Adafactor(sparse.parameters(), lr=0.01)
    step(sparse, optimizer, x, y)
    row, column = (
        optimizer.state[sparse.get_parameter("second.weight")][key].clone() for key in ("row_var", "col_var")
    )
    small = compact(sparse, (x,), optimizer=optimizer)
    state = optimizer.state[small.get_parameter("second.weight")]
    assert torch.equal(state["row_var"], row) and torch.equal(state["col_var"], column[:, ALIVE])
    step(small, optimizer, x, y)


def test_parameters_of_other_modules_stay_in_the_optimizer() -> None:
    sparse, x, _ = sparse_model()
    other = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([{"params": list(sparse.parameters()), "lr": 0.1}, {"params": [other], "lr": 0.2}])
    compact(sparse, (x,), optimizer=optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    assert optimizer.param_groups[1]["params"][0] is other


class Odd(torch.optim.SGD):
    """Keeps a state of a shape of its own."""


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda model: torch.optim.LBFGS(model.parameters()), "LBFGS"),
        (lambda model: torch.optim.SGD([nn.Parameter(torch.zeros(2))]), "holds no parameter of the model"),
        (lambda model: model, "must be a torch.optim.Optimizer"),
    ],
)
def test_optimizers_that_do_not_fit(make: Callable[[nn.Module], object], says: str) -> None:
    sparse, x, _ = sparse_model()
    with pytest.raises(ConfigError, match=says):
        compact(sparse, (x,), optimizer=make(sparse))  # type: ignore[arg-type]  # the wrong one is the test


def test_a_state_of_another_shape_is_refused_and_nothing_has_changed() -> None:
    sparse, x, y = sparse_model()
    optimizer = Odd(sparse.parameters(), lr=0.1, momentum=0.9)
    step(sparse, optimizer, x, y)
    optimizer.state[sparse.get_parameter("first.weight")]["sketch"] = torch.zeros(7)
    with pytest.raises(ConfigError, match=r"`sketch` \(=\(7,\)\) of Odd for `first.weight`"):
        compact(sparse, (x,), optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in sparse.parameters()}
    step(sparse, optimizer, x, y)


def test_a_frozen_parameter_stays_frozen() -> None:
    sparse, x, _ = sparse_model()
    sparse.get_parameter("second.weight").requires_grad_(False)
    small = compact(sparse, (x,))
    assert not small.get_parameter("second.weight").requires_grad and small.get_parameter("first.weight").requires_grad
