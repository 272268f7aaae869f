"""Why code stays Python, in plain words; and what of torch's own classes is no reason."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.graph import capture
from fxsparse.graph.guards import Untraceable
from fxsparse.graph.tracer import trace


class StandardisedConv(nn.Conv2d):
    """A layer of the user's that inherits from one of torch's, which has a `__setstate__` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class CopiesItsWay(StandardisedConv):
    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)


class Copied:
    def __deepcopy__(self, memo: dict[int, object]) -> Copied:
        return self


class CopiedConv(StandardisedConv, Copied):
    pass


def test_a_method_of_a_mixin_behind_the_module_counts() -> None:
    refusal = capture(CopiedConv(2, 3, 1), (torch.randn(2, 2, 5, 5),)).refusals[0]
    assert "overrides `__deepcopy__`" in refusal.reason


def test_how_torch_copies_its_layers_is_no_override() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(StandardisedConv(2, 3, 3, padding=1), nn.ReLU(), CopiesItsWay(3, 2, 1))
    x = torch.randn(2, 2, 5, 5)
    captured = capture(model, (x,))
    assert set(captured.graphs) == {"", "0"}
    assert [(refusal.path, "`__setstate__`" in refusal.reason) for refusal in captured.refusals] == [("2", True)]
    torch.testing.assert_close(captured.module(x), model(x), rtol=0, atol=0)
    revived = pickle.loads(pickle.dumps(captured.module))
    torch.testing.assert_close(revived(x), model(x), rtol=0, atol=0)
    assert copy.deepcopy(captured.module)[0].padding_mode == "zeros"


def _length(x: Tensor) -> Tensor:
    return x * len(x)


def _numbers(x: Tensor) -> Tensor:
    return x * float(x.shape[0])


def _counts(x: Tensor) -> Tensor:
    return sum([x for _ in range(x.shape[0])])


def _looks_up(x: Tensor) -> Tensor:
    return x * {2: 1.0, 3: 2.0, 5: 3.0}[x.shape[0]]


def _makes(x: Tensor) -> Tensor:
    return x * torch.tensor(x.shape[0])


def _assigns(x: Tensor) -> Tensor:
    x = x * 2
    x[:, 0] = 0
    return x


def _iterates(x: Tensor) -> Tensor:
    return torch.stack([row for row in x])


def _hides(x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: row * 2)(x)


def _checks(x: Tensor) -> Tensor:
    if type(x) is not Tensor:
        raise ValueError("give\n a tensor")
    return x


def _fails(x: Tensor) -> Tensor:
    if type(x) is not Tensor:
        raise RuntimeError
    return x


PLAIN_REASONS = [
    (_length, "it takes `len` of a traced value (`return x * len(x)` in `_length`)"),
    (_numbers, "it needs the number that a traced value holds (`return x * float(x.shape[0])` in `_numbers`)"),
    (_counts, "it needs the number that a traced value holds (`return sum([x for _ in range(x.shape[0])])`"),
    (_looks_up, "it looks a traced value up in a dictionary (`return x * {2: 1.0,"),
    (_makes, "it makes a new tensor out of a traced value (`return x * torch.tensor(x.shape[0])` in `_makes`)"),
    (_assigns, "it assigns to entries of a traced value in place (`x[:, 0] = 0` in `_assigns`)"),
    (_iterates, "control flow on a traced value, which is iterated or unpacked (`return torch.stack("),
    (_hides, "it hands a traced value to code that takes no such values (`return torch.func.vmap("),
    (_checks, 'its code refuses a traced value (`raise ValueError("give\\n a tensor")` in `_checks`): give'),
    (_fails, "its code raises RuntimeError on a traced value (`raise RuntimeError` in `_fails`)"),
]


class Applies(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize(("function", "reason"), PLAIN_REASONS, ids=[f.__name__ for f, _ in PLAIN_REASONS])
def test_what_python_code_raises_on_a_symbol_is_told_in_plain_words(
    function: Callable[[Tensor], Tensor], reason: str
) -> None:
    captured = capture(Applies(function), (torch.randn(3, 6),))
    refusal = captured.refusals[0]
    assert refusal.reason.startswith(reason), refusal.reason
    assert "Proxy(" not in str(refusal) and refusal.mend


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapped(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return function(*args, **kwargs)

    return wrapped


class Decorated(Applies):
    @decorated
    def forward(self, x: Tensor, scale: float = 1.0, **options: float) -> Tensor:
        return self.function(self.layer(x)) * scale


def test_a_decorated_forward_is_named_as_the_reason() -> None:
    refusal = capture(Decorated(torch.tanh), (torch.randn(3, 6),)).refusals[0]
    assert refusal.reason.startswith("a decorator hides the arguments of its `forward`")
    assert "decorator off `forward`" in refusal.mend


class NamesOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        found: OrderedDict[str, Tensor] = OrderedDict()
        found["out"] = self.layer(x)
        return found


def test_a_mapping_that_a_graph_would_turn_into_a_dict_is_refused_by_its_type() -> None:
    captured = capture(NamesOutputs(), (torch.randn(3, 6),))
    assert captured.refusals[0].reason.startswith("it makes a mapping of type OrderedDict")
    assert captured.graphs == ("layer",)
    assert type(captured.module(torch.randn(3, 6))) is OrderedDict


class TakesMask(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x if mask is None else x * mask


def test_an_argument_without_default_may_be_absent() -> None:
    assert trace(TakesMask()).graph is not None
    with pytest.raises(Untraceable, match="optional argument `mask`"):
        trace(TakesMask(), absent=("mask",))
