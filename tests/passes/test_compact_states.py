"""Compaction of models of unusual state: tied, frozen, finalised, half precision, masks that stay, odd weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.nn import masks, set_masks
from fxsparse.planning.compaction import compact, compaction_report
from tests.passes.compact_models import assert_equal, killed, net


class Adapter(nn.Module):
    """The rank of the update equals the outputs of the kernel, so that a factor has the shape of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.kernel, self.up, self.down = (nn.Parameter(torch.randn(s)) for s in ((3, 4), (3, 3), (3, 4)))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(self.first(x), self.kernel + self.up @ self.down)))


def test_masks_that_stay_keep_the_shape_of_their_parameters() -> None:
    torch.manual_seed(0)
    model, x = Adapter().double(), torch.randn(6, 5).double()
    sparse = killed(model, x, down=[0, 2], first__weight=[1])
    with torch.no_grad():
        sparse.first.bias[1] = 0.0
        sparse.up[:, 1] = 0.0
    small = compact(sparse, (x,))
    assert masks(small).keys() == masks(sparse).keys() >= {"down", "kernel", "first.weight"}
    for name, mask in masks(small).items():
        assert mask.shape == small.get_parameter(name).shape, name
    assert small.first.weight.shape == (3, 5) and small.kernel.shape[1] == small.down.shape[1] == 3
    assert_equal(small, sparse, x, 1e-12)
    assert compaction_report(small).macs is not None


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.kernel, self.head = nn.Linear(5, 4), nn.Parameter(torch.randn(7, 5)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(torch.relu(self.first(x)), self.kernel[1:, 1:])))


def test_slices_of_a_masked_weight_follow() -> None:
    torch.manual_seed(0)
    model, x = Sliced().double(), torch.randn(6, 5).double()
    with torch.no_grad():
        model.first.bias[[1, 2]] = -1.0
    sparse = killed(model, x, "*", first__weight=[1, 2])
    assert "kernel" in masks(sparse)
    small = compact(sparse, (x,))
    assert not compaction_report(small).refused
    assert small.first.weight.shape == (2, 5) and small.kernel.shape == (6, 2)  # the first column is read by nobody
    assert_equal(small, sparse, x, 1e-12)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.a, self.again, self.b = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), nn.Linear(8, 6)
        self.out.weight, self.again.weight = self.embed.weight, self.a.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.out(self.b(torch.relu(self.a(x)) + torch.relu(self.again(x))))


@pytest.mark.parametrize("finalised", [False, True])
def test_tied_weights_stay_tied(finalised: bool) -> None:
    torch.manual_seed(0)
    model, tokens = Tied().double(), torch.randint(9, (2, 4))
    sparse = killed(model, tokens, a__weight=[0, 5])
    small = compact(fxsparse.finalize(sparse) if finalised else sparse, (tokens,))
    assert small.out.weight is small.embed.weight and small.again.weight is small.a.weight
    assert small.a.weight.shape == (6, 6) and small.a.bias.shape == (6,) and small.b.weight.shape == (6, 6)
    assert_equal(small, sparse, tokens, 1e-12)
    assert bool(masks(small)) != finalised


def test_a_finalised_model_is_compacted_by_its_zeros() -> None:
    model, x = net()
    sparse = killed(model, x, **{"0__weight": [1, 4], "2__weight": [0, 5]})
    with_masks, without = compact(sparse, (x,)), compact(fxsparse.finalize(sparse), (x,))
    assert {name: p.shape for name, p in without.named_parameters()} == {
        name: p.shape for name, p in with_masks.named_parameters()
    }
    assert without[0].weight.shape == (4, 5) and without[4].weight.shape == (3, 5)
    assert masks(with_masks) and not masks(without)
    for name, parameter in without.named_parameters():
        assert torch.equal(parameter, with_masks.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folds_with_one_rounding(dtype: torch.dtype) -> None:
    model, x = net()
    model, x = model.to(dtype), x.to(dtype)
    small = compact(model, (x,))
    assert {p.dtype for p in small.parameters()} == {dtype} and small[2].weight.shape == (5, 4)
    weight, bias = model[2].weight.detach().double(), model[2].bias.detach().double()
    folded = bias + weight[:, [1, 4]] @ model[0].bias.detach().double().relu()[[1, 4]]
    assert torch.equal(small[2].bias.detach(), folded.to(dtype)[[1, 2, 3, 4, 6]])
    assert "equal in float64" in str(compaction_report(small))


@pytest.mark.parametrize("training", [True, False])
def test_each_module_keeps_its_mode_and_frozen_parameters_stay_frozen(training: bool) -> None:
    model, x = net()
    sparse = killed(model, x, **{"0__weight": [1, 4]}).train(training)
    sparse.get_submodule("2").train(not training)
    for parameter in (sparse.get_parameter("0.weight"), sparse.get_parameter("4.bias")):
        parameter.requires_grad_(False)
    before = {name: module.training for name, module in sparse.named_modules()}
    small = compact(sparse, (x,))
    assert {name: module.training for name, module in sparse.named_modules()} == before
    assert {name: module.training for name, module in small.named_modules()} == before
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    assert frozen == {"0.weight", "4.bias"} and small[0].weight.shape == (4, 5)


def test_a_row_that_an_unstructured_mask_leaves_dead_goes() -> None:
    model, x = net()
    sparse = fxsparse.transform(model, (x,), include="0", sparsity=0.0)
    mask = torch.rand(6, 5) < 0.6
    mask[[1, 4]], mask[[0, 2, 3, 5], 0] = False, True
    set_masks(sparse, {"0.weight": mask})
    small = compact(sparse, (x,))
    assert small[0].weight.shape == (4, 5) and torch.equal(masks(small)["0.weight"], mask[[0, 2, 3, 5]])
    assert_equal(small, sparse, x)


class Measured(nn.Module):
    """A weight divided by a product of itself with vectors: a column that reads a dead channel counts there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4))
        self.register_buffer("left", torch.randn(3))
        self.register_buffer("right", torch.tensor([0.4, -0.7, 0.0, 1.1]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(
            torch.relu(self.first(x)), self.weight / torch.dot(self.left, torch.mv(self.weight, self.right))
        )


def test_what_meets_in_a_product_of_vectors_stays() -> None:
    torch.manual_seed(0)
    model, x = Measured().double(), torch.randn(6, 5).double()
    with torch.no_grad():
        for parameter in model.first.parameters():
            parameter[[1, 2]] = 0.0
    small = compact(model, (x,))
    assert not compaction_report(small).refused
    assert small.first.weight.shape == (3, 5) and torch.equal(small.right, model.right[[0, 1, 3]])
    assert_equal(small, model, x, 1e-12)


class Infinite(nn.Module):
    """A column of infinite weights that a dead channel must not meet: 0 times infinity is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.nan_to_num(torch.tanh(self.second(torch.relu(self.first(x)))), nan=0.25))


def test_infinite_weights_neither_fold_nor_spoil_folds() -> None:
    torch.manual_seed(0)
    model, x = Infinite().double(), torch.randn(6, 5).double()
    with torch.no_grad():
        model.first.weight[[1, 2]] = 0.0
        model.first.bias[[1, 2]] = torch.tensor([0.0, 0.5], dtype=torch.float64)
        model.first.bias[0] = 9.0  # alive, and positive
        model.second.weight[0, 1] = model.second.weight[1, 0] = torch.inf
    small = compact(model, (x,))
    assert not compaction_report(small).refused
    assert small.first.weight.shape == (3, 5) and small.second.weight.shape == (3, 3)
    assert_equal(small, model, x, 1e-12)


class WrittenProduct(nn.Module):
    """A product whose result is written in place afterwards still reads all its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x)))
        y[:, 0] = y[:, 2] * 2.0
        return self.head(y)


def test_a_product_that_is_written_in_place_keeps_what_it_reads() -> None:
    torch.manual_seed(0)
    model, x = WrittenProduct().double(), torch.randn(6, 5).double()
    sparse = killed(model, x, first__weight=[0, 3])
    small = compact(sparse, (x,))
    assert not compaction_report(small).refused
    assert small.first.weight.shape == (4, 5) and small.second.weight.shape == (4, 4)
    assert_equal(small, sparse, x, 1e-12)
