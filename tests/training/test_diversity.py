"""Groups of a shared support that differ in what they read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxsparse
from fxsparse.data import digits
from fxsparse.errors import ConfigError
from fxsparse.nn import masks
from fxsparse.sparsity import SharedSupport, Uniform, Unstructured
from fxsparse.sparsity.layout import Layout
from fxsparse.training import RESU, SNIP, Diversity, OneShot, RigL, attach
from fxsparse.training.exchange import exchange

PLAIN = Diversity(relative=0.0, sole=0.0)


def test_a_position_grows_where_a_group_wants_it_more_than_others_do() -> None:
    units = SharedSupport(1).units((2, 3))
    alive = torch.zeros(2, 3, dtype=torch.bool)
    scores = torch.tensor([[9.0, 2.0, 1.0], [9.0, 1.0, 2.0]])  # both want the first most, and it is alike for both
    counts = torch.tensor([1, 1])
    assert exchange(units, alive, scores, scores, target=counts).tolist() == [[True, False, False]] * 2
    found = exchange(units, alive, scores, Diversity().grow(units, scores), target=counts)
    assert found.tolist() == [[False, True, False], [False, False, True]]
    half = Diversity(relative=0.5).grow(units, scores)
    assert torch.allclose(half, scores / torch.tensor([9.0, 1.5, 1.5]) ** 0.5)
    assert torch.equal(Diversity().grow(units, torch.zeros(2, 3)), torch.zeros(2, 3))  # nobody wants anything


def test_rounding_errors_decide_nothing() -> None:
    units = SharedSupport(1).units((3, 3))
    noise = torch.tensor([[2.0, 1e-17, 0.1 + 0.2], [1.0, 0.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    found = Diversity().grow(units, noise)
    assert found[0, 1] < 1e-9  # the only one that wants the position, by an error
    other = noise.clone()
    other[0, 2] = 0.3  # 0.1 + 0.2 summed in another order
    assert torch.equal(found, Diversity().grow(units, other)) and found[0, 2] == 3


def test_the_last_reader_of_a_position_keeps_it() -> None:
    units = SharedSupport(1).units((2, 3))
    alive = torch.tensor([[True, True, False], [True, False, False]])
    scores = torch.tensor([[3.0, 1.0, 9.0], [-2.0, 9.0, 9.0]])
    assert Diversity().drop(units, alive, scores).tolist() == [[3.0, 4.0, 9.0], [-2.0, 9.0, 9.0]]
    lonely = alive & torch.tensor([[False], [True]])  # a score below 0 rises, too
    assert Diversity(sole=1.0).drop(units, lonely, scores).tolist() == [[3.0, 1.0, 9.0], [0.0, 9.0, 9.0]]
    assert scores.tolist() == [[3.0, 1.0, 9.0], [-2.0, 9.0, 9.0]]


@pytest.mark.parametrize(
    ("layout", "shape", "group"),
    [
        (Layout(blocks=2), (8, 3), 2),  # q and k
        (Layout(2, 1, batch=(0,)), (2, 3, 4), 2),  # two experts
        (Layout(groups=2), (8, 3, 1), 2),  # a grouped convolution
    ],
    ids=["blocks", "experts", "convolution"],
)
def test_groups_are_compared_within_their_part(layout: Layout, shape: tuple[int, ...], group: int) -> None:
    units = SharedSupport(group).units(shape, layout)
    scores = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [10.0, 1.0, 1.0], [30.0, 1.0, 3.0]])
    wanted = torch.tensor([[0.5, 1.0, 1.5], [1.5, 1.0, 0.5], [0.5, 1.0, 0.5], [1.5, 1.0, 1.5]])
    assert torch.equal(Diversity().grow(units, scores), wanted)
    alive = torch.tensor([[True, False, False], [True, False, False], [True, False, True], [False, False, False]])
    moved = Diversity(sole=1.0).drop(units, alive, scores) != scores
    assert moved.nonzero().tolist() == [[2, 0], [2, 2]]


def test_what_cannot_be_compared_stays() -> None:
    scores, alive = torch.rand(1, 5), torch.ones(1, 5, dtype=torch.bool)
    for units in (SharedSupport(4).units((4, 5)), Unstructured().units((1, 5))):
        assert Diversity().grow(units, scores) is scores and Diversity().drop(units, alive, scores) is scores
    straddling = SharedSupport(2).units((6, 3, 1), Layout(groups=2))  # 3 rows a group of the convolution
    assert torch.equal(Diversity().grow(straddling, torch.ones(3, 3)), torch.ones(3, 3))
    some = SharedSupport(1).units((2, 5))
    two = torch.rand(2, 5)
    assert PLAIN.grow(some, two) is two and PLAIN.drop(some, two > 0.5, two) is two


@given(st.integers(0, 2**16), st.integers(2, 5), st.integers(1, 6))
def test_the_size_of_an_input_says_nothing(seed: int, groups: int, width: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(groups, width, generator=draw, dtype=torch.float64)
    sizes = 2.0 ** torch.randint(-6, 6, (width,), generator=draw)
    units = SharedSupport(1).units((groups, width))
    assert torch.equal(Diversity().grow(units, scores * sizes), Diversity().grow(units, scores))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def trained(diversity: Diversity | None) -> dict[str, Tensor]:
    """Masks after a short training."""
    part = digits().train
    with torch.random.fork_rng(devices=[]):
        model = fxsparse.transform(net(), (part.inputs[:1],), pattern=SharedSupport(32))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    handle = attach(model, optimizer, RigL(0.9, every=10, distribution=Uniform(), diversity=diversity), 120)
    for step in range(120):
        rows = torch.arange(step * 32, step * 32 + 32) % len(part.inputs)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(part.inputs[rows]), part.labels[rows]).backward()
        optimizer.step()
    handle.detach()
    return dict(masks(model))


def test_more_of_what_comes_in_is_read() -> None:
    plain, diverse = trained(None), trained(Diversity())
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), trained(PLAIN).values(), strict=True))
    read = [[int(mask.any(0).sum()) for mask in each.values()][:2] for each in (plain, diverse)]
    assert all(more > less for less, more in zip(*read, strict=True)), read
    assert [int(mask.sum()) for mask in plain.values()] == [int(mask.sum()) for mask in diverse.values()]


@pytest.mark.parametrize("make", [RESU, OneShot, SNIP], ids=lambda make: make.__name__)
def test_methods_that_would_not_read_it_refuse_it(make: type[RESU] | type[OneShot] | type[SNIP]) -> None:
    with pytest.raises(ConfigError, match="`diversity`.*must be None"):
        make(0.5, diversity=Diversity())


@pytest.mark.parametrize("values", [{"relative": -0.1}, {"relative": 1.5}, {"sole": -1.0}, {"sole": float("nan")}])
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(values))}`"):
        Diversity(**values)
    with pytest.raises(ConfigError, match="`diversity` .*must be a Diversity"):
        RigL(0.5, diversity=True)  # type: ignore[arg-type]
