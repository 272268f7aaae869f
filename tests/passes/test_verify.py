"""verify_equal sees every kind of difference, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, PassError
from fxsparse.passes import DIFFERENT, EXACT, Close, verify_equal


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.linear(x)))


def inputs() -> tuple[Tensor, ...]:
    return (torch.linspace(-2, 3, 20).reshape(5, 4),)


def changed(edit) -> nn.Module:
    net = Net()
    with torch.no_grad():
        edit(net)
    return net


def test_equal_models_are_compared_in_both_modes_and_in_float64() -> None:
    found = verify_equal(Net(), Net(), inputs())
    assert found.compared == ("eval", "train") and found.dtype is torch.float64
    assert found.worst_output == 0.0 and found.worst_gradient == 0.0 and not found.notes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda net: net.linear.weight.view(-1)[3].mul_(1 + 1e-6), "eval mode: output 0 differs"),
        (lambda net: setattr(net.norm, "momentum", 0.2), "train mode: buffer `norm.running"),
        (lambda net: setattr(net.drop, "p", 0.4), "train mode: output 0 differs"),
        (lambda net: net.linear.weight.requires_grad_(False), r"lost their gradient: \['linear.weight'\]"),
        (lambda net: setattr(net, "norm", nn.Identity()), "eval mode"),
    ],
)
def test_a_difference_is_found_and_named(edit, message: str) -> None:
    with pytest.raises(PassError, match=message):
        verify_equal(Net(), changed(edit), inputs())


class Detached(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach() + self.linear.bias.sum() * 0


class Scaled(Net):
    """The same outputs, other gradients."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + (self.linear.weight.sum() - self.linear.weight.sum().detach())


class Wrapped(Net):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (super().forward(x),)


class Raising(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Detached, "lost their gradient"),
        (Scaled, "gradient of `linear.weight` differs"),
        (Wrapped, "built differently"),
        (Raising, r"eval mode: raises ValueError \(no\)"),
    ],
)
def test_gradients_structure_and_errors_count(kind: type[Net], message: str) -> None:
    with pytest.raises(PassError, match=message):
        verify_equal(Net(), kind(), inputs())


def test_close_allows_what_it_says_and_not_more() -> None:
    near = changed(lambda net: net.linear.bias.add_(1e-7))
    with pytest.raises(PassError):
        verify_equal(Net().eval(), near, inputs())
    found = verify_equal(Net(), near, inputs(), Close(rtol=1e-4, atol=1e-4))
    assert 0 < found.worst_output < 1e-4
    with pytest.raises(PassError):
        verify_equal(Net(), near, inputs(), Close(atol=1e-9))


def test_a_network_of_zeros_is_close_to_nothing() -> None:
    with pytest.raises(ConfigError, match="rtol"):
        Close(rtol=1.0)
    with pytest.raises(ConfigError, match="atol"):
        Close(atol=float("inf"))
    zeros = changed(lambda net: [p.zero_() for p in net.parameters()])
    with pytest.raises(PassError):
        verify_equal(Net(), zeros, inputs(), Close(rtol=0.5, atol=1e-3))


def test_different_compares_nothing_and_says_so() -> None:
    found = verify_equal(Net(), Raising(), inputs(), DIFFERENT("it prunes"))
    assert found.compared == () and found.notes == ("not compared: it prunes",)


def test_nan_equals_nan_but_not_a_number() -> None:
    broken = changed(lambda net: net.linear.bias.fill_(float("nan")))
    assert verify_equal(broken, copy.deepcopy(broken), inputs()).compared == ("eval", "train")
    with pytest.raises(PassError):
        verify_equal(Net(), broken, inputs(), Close(atol=1e9))


def test_nothing_is_touched() -> None:
    net = Net().eval()
    net.linear.weight.grad = torch.ones(4, 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    x = inputs()[0]
    kept = x.clone()
    verify_equal(net, net, (x,))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, kept)
    assert not net.training and torch.equal(net.linear.weight.grad, torch.ones(4, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.linear.weight.dtype is torch.float32


class Fickle(nn.Module):
    """Different outputs at each call, whatever the seed."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Fickle.calls += 1
        return x + Fickle.calls


def test_a_model_that_does_not_repeat_itself_is_noted() -> None:
    found = verify_equal(Fickle(), Fickle(), inputs())
    assert found.compared == () and len(found.notes) == 2 and "repeat itself" in found.notes[0]


def test_a_mode_in_which_the_model_fails_is_noted() -> None:
    found = verify_equal(Net(), Net(), (torch.randn(1, 4),))  # batch norm refuses one sample in train mode
    assert found.compared == ("eval",) and "train mode: the model itself raises ValueError" in found.notes[0]


class SinglePrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(torch.float32))


def test_a_model_bound_to_its_dtype_is_compared_in_it() -> None:
    net = SinglePrecision()
    found = verify_equal(net, copy.deepcopy(net), inputs(), EXACT)
    assert found.dtype is None and found.compared == ("eval", "train")


def test_on_the_meta_device_shapes_are_compared() -> None:
    net, x = Net().to("meta"), (torch.empty(5, 4, device="meta"),)
    assert verify_equal(net, copy.deepcopy(net), x).compared == ("eval", "train")
    with pytest.raises(PassError, match=r"output 0 is \(5, 3\)"):
        verify_equal(net, nn.Linear(4, 3, device="meta"), x)
