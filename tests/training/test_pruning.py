"""Pruning at initialisation and of trained models: golden scores, exact counts, a model that is left as it was."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import (
    Conv2d,
    Guard,
    Linear,
    MaskSpec,
    Route,
    install_mask,
    mask_spec,
    masked_weights,
    masks,
    set_masks,
)
from fxsparse.sparsity import (
    ERK,
    Block,
    Channel,
    ConstantFanIn,
    Global,
    Gradient,
    Magnitude,
    NByM,
    Random,
    SharedSupport,
    Taylor,
    Uniform,
    Unstructured,
    Wanda,
    keep_count,
    top_k,
)
from fxsparse.training import (
    PRUNINGS,
    SNIP,
    GraSP,
    Initial,
    OneShot,
    Regroup,
    RigL,
    Static,
    SynFlow,
    WeightState,
    attach,
    prune,
)
from fxsparse.training.calibration import Calibration

W = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]], dtype=torch.float64)
X = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
T = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
WHOLE = [(X, T)]
PARTS = [(X[:1], T[:1]), (X[1:], T[1:])]


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(1).mean()


def fixture(guard: Guard = Guard.FORWARD) -> nn.Module:
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64) if guard is Guard.GRADIENT else None
    if model is None:
        model = Linear(3, 2, bias=False, dtype=torch.float64)
    else:
        install_mask(model, "weight", MaskSpec(route=Route.PARAMETER, guard=Guard.GRADIENT))
    with torch.no_grad():
        model.weight.copy_(W)
    return model


def scored(model: nn.Module, method, batches, loss=half_squares) -> dict[str, Tensor]:
    weights = masked_weights(model)
    states = [
        WeightState(name, i, 0, 0, 0, each.weight.detach(), each.mask, Unstructured())
        for i, (name, each) in enumerate(weights.items())
    ]
    with Calibration(model, weights, batches, loss) as calibration:
        return dict(method.scores(calibration, states))


@pytest.mark.parametrize("guard", list(Guard))
@pytest.mark.parametrize("batches", [WHOLE, PARTS], ids=["one batch", "two batches"])
def test_golden_scores(batches, guard):
    model = fixture(guard)
    snip = scored(model, SNIP(0.5), batches)["weight"]
    torch.testing.assert_close(
        7.125 * snip, torch.tensor([[0.5, 2.5, 1.125], [0, 0.5, 2.5]]).double(), rtol=1e-14, atol=0
    )
    grasp = scored(model, GraSP(0.5, temperature=1.0), batches)["weight"]
    assert grasp.tolist() == [[2.5, 3.5, 3.375], [0, 1.5, 7.5]]
    wanda = scored(model, OneShot(0.5, saliency=Wanda()), batches)["weight"]
    torch.testing.assert_close(wanda, torch.tensor([[1, 2, 5**0.5 / 2], [0, 1, 5**0.5]], dtype=torch.float64))
    taylor = scored(model, OneShot(0.5, saliency=Taylor()), batches)["weight"]
    assert taylor.tolist() == [[0.5, 2.5, 1.125], [0, 0.5, 2.5]]


def test_unequal_batches_are_weighted_by_their_samples():
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(7, 3, generator=generator).double(), torch.randn(7, 2, generator=generator).double()
    parts = [(x[:1], t[:1]), (x[1:3], t[1:3]), (x[3:], t[3:])]
    for method in (SNIP(0.5), GraSP(0.5, temperature=1.0), OneShot(0.5, saliency=Gradient())):
        one, many = scored(fixture(), method, [(x, t)]), scored(fixture(), method, parts)
        torch.testing.assert_close(one["weight"], many["weight"], rtol=1e-12, atol=1e-12)
        mean_of_means = scored(fixture(), method, [(x[:1], t[:1])] * 4 + parts[1:])  # the trap is seen to differ
        assert not torch.allclose(one["weight"], mean_of_means["weight"])


def test_grasp_divides_logits_by_its_temperature():
    x, t = X.repeat(2, 1), torch.tensor([0, 1, 1, 0])
    hot = scored(fixture(), GraSP(0.5), [(x, t)], nn.functional.cross_entropy)
    same = scored(
        fixture(),
        GraSP(0.5, temperature=1.0),
        [(x, t)],
        lambda outputs, y: nn.functional.cross_entropy(outputs / 200, y),
    )
    cold = scored(fixture(), GraSP(0.5, temperature=1.0), [(x, t)], nn.functional.cross_entropy)
    torch.testing.assert_close(hot["weight"], same["weight"], rtol=1e-12, atol=0)
    assert not torch.allclose(hot["weight"] / hot["weight"].abs().max(), cold["weight"] / cold["weight"].abs().max())


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Linear(3, 2, bias=False), Linear(2, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(W)
            self.second.weight.copy_(torch.tensor([[3.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_golden_synflow():
    found = scored(TwoLayers(), SynFlow(0.9), [(X.float(), T)])
    assert found["first.weight"].tolist() == [[3, 6, 1.5], [0, 1, 1]]
    assert found["second.weight"].tolist() == [[10.5, 2]]
    ladder = SynFlow(0.9, rounds=5).densities()
    assert ladder == pytest.approx((0.630957, 0.398107, 0.251189, 0.158489, 0.1), abs=5e-7)


def test_synflow_keeps_layers_alive_where_one_round_cuts_them_off():
    torch.manual_seed(0)
    model = nn.Sequential(
        Linear(20, 200), nn.ReLU(), Linear(200, 4), nn.ReLU(), Linear(4, 200), nn.ReLU(), Linear(200, 2)
    )
    iterative, single = copy.deepcopy(model), copy.deepcopy(model)
    prune(iterative, SynFlow(0.98, distribution=Global(), rounds=100), [torch.ones(1, 20)])
    prune(single, SynFlow(0.98, distribution=Global(), rounds=1), [torch.ones(1, 20)])
    alive = [[int(mask.sum()) for mask in masks(each).values()] for each in (iterative, single)]
    assert alive[0] != alive[1] and min(alive[0]) > min(alive[1])
    assert sum(alive[0]) == sum(alive[1]) == keep_count(4000 + 800 + 800 + 400, 0.98)


def test_synflow_of_a_deep_model_stays_within_float64():
    model = nn.Sequential(*(Linear(16, 16, bias=False) for _ in range(40)))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(100 * (1 + torch.arange(256.0).reshape(16, 16) / 256))  # 1600^40 is no float32
    found = prune(model, SynFlow(0.5, rounds=2, distribution=Uniform()), [torch.zeros(1, 16)])
    assert all(int(mask.sum()) == 128 for mask in found.values())
    scores = scored(nn.Sequential(*list(model)[:2]), SynFlow(0.5), [torch.zeros(1, 16)])
    assert {each.dtype for each in scores.values()} == {torch.float64}


def test_synflow_reads_running_means_absolute_and_variances_as_they_are():
    model = nn.Sequential(Linear(2, 2, bias=False), nn.BatchNorm1d(2), Linear(2, 1, bias=False)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1], [2, 1]]))
        model[2].weight.copy_(torch.tensor([[1.0, -1]]))
        model[1].running_mean.copy_(torch.tensor([-3.0, 1]))
        model[1].running_var.copy_(torch.tensor([4.0, 1]))
    found = scored(model, SynFlow(0.5), [torch.zeros(1, 2).double()])
    scale = 1 / torch.sqrt(torch.tensor([4.0, 1]).double() + 1e-5)
    hidden = (torch.tensor([2.0, 3.0]).double() - torch.tensor([3.0, 1]).double()) * scale
    torch.testing.assert_close(found["2.weight"], hidden.abs()[None])
    torch.testing.assert_close(found["0.weight"], torch.tensor([[1.0, 1], [2, 1]]).double() * scale[:, None])


class Net(nn.Module):
    """Convolution, batch norm, dropout, a frozen weight."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv, self.norm = Conv2d(1, 8, 3), nn.BatchNorm2d(8)
            self.drop, self.hidden, self.out = nn.Dropout(0.5), Linear(128, 16), Linear(16, 4)
        self.hidden.weight.requires_grad_(False)
        self.drop.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.hidden(torch.relu(self.norm(self.conv(x))).flatten(1)).relu()))


def net_batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(4, 1, 6, 6, generator=generator), torch.randint(0, 4, (4,), generator=generator))
        for _ in range(count)
    ]


METHODS = [
    SNIP(0.8),
    SNIP(0.8, train=True),
    GraSP(0.8),
    GraSP(0.8, train=True),
    SynFlow(0.8, rounds=7),
    OneShot(0.8),
    OneShot(0.8, saliency=Wanda()),
    OneShot(0.8, saliency=Random(3), distribution=ERK()),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored_exactly(method, fails):
    model = Net()
    (model(net_batches()[0][0])).sum().backward()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    state, python = torch.random.get_rng_state(), random.getstate()
    loss, batches = nn.functional.cross_entropy, net_batches()
    if fails:

        def loss(outputs, targets):
            raise RuntimeError("bad loss")

        batches = [*batches, (torch.zeros(4, 2, 6, 6), torch.zeros(4))]
    if (
        fails
        and not isinstance(method, SynFlow)
        and not (isinstance(method, OneShot) and not method.saliency.needs_inputs)
    ):
        with pytest.raises(RuntimeError):
            prune(model, method, batches, loss)
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    else:
        found = prune(model, method, batches, loss)
        for name, value in model.state_dict().items():
            owner = name.removesuffix("_mask")
            if owner in found:
                expected = found[owner] if name != owner else torch.where(found[owner], before[name], 0)
                assert torch.equal(value, expected), name
            else:
                assert torch.equal(value, before[name]), name
    assert {n: p.grad for n, p in model.named_parameters() if p.grad is not None}.keys() == grads.keys()
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if p.grad is not None)
    assert flags == [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    assert torch.equal(state, torch.random.get_rng_state()) and python == random.getstate()


PATTERNS = [
    (Unstructured(), 0.75),
    (NByM(2, 4), 0.5),
    (NByM(1, 4, exact=False), 0.8),
    (Block(2, 2), 0.75),
    (Channel(0), 0.5),
    (ConstantFanIn(), 0.75),
    (SharedSupport(4), 0.75),
]


def plain_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), Linear(128, 8), nn.ReLU(), Linear(8, 4))


def plain_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(6, 4, 6, 6, generator=generator), torch.randint(0, 4, (6,), generator=generator)) for _ in range(2)
    ]


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=str)
@pytest.mark.parametrize("kind", [SNIP, GraSP, SynFlow, OneShot, lambda s, **k: OneShot(s, saliency=Wanda(), **k)])
def test_every_pattern(kind, pattern, sparsity):
    distribution = Uniform() if isinstance(pattern, NByM | ConstantFanIn) else Global()
    method = kind(sparsity, pattern=pattern, distribution=distribution)
    if isinstance(method, SynFlow):
        if pattern == NByM(2, 4):
            with pytest.raises(ConfigError, match="must be 0 or 1 - n/m"):
                prune(plain_net(), method, plain_batches())
        method = SynFlow(
            sparsity, pattern=pattern, distribution=distribution, rounds=1 if isinstance(pattern, NByM) else 5
        )
    model = plain_net()
    found = prune(model, method, plain_batches(), nn.functional.cross_entropy)
    for name, masked in masked_weights(model).items():
        assert masked.spec.pattern == pattern and torch.equal(masked.mask, found[name])
        if not bool(masked.mask.all()):
            pattern.check(masked.mask, masked.spec.layout, masked.row_order)
        assert bool((masked.weight[~masked.mask] == 0).all())
    alive, numel = (sum(getattr(mask, count)() for mask in found.values()) for count in ("sum", "numel"))
    if isinstance(pattern, Unstructured) and not isinstance(method, OneShot):
        assert int(alive) == keep_count(numel, sparsity)
    elif not isinstance(pattern, Block | Channel):
        assert abs(1 - float(alive) / numel - sparsity) < 0.1


def test_wanda_per_row_and_per_tensor():
    model, batches = plain_net(), plain_batches()
    weights = {name: each.weight.detach().clone() for name, each in masked_weights(model).items()}
    scores = scored(model, OneShot(0.5, saliency=Wanda()), batches)
    rows = prune(copy.deepcopy(model), OneShot(0.5, saliency=Wanda()), batches)
    tensors = prune(copy.deepcopy(model), OneShot(0.5, saliency=Wanda(), per_row=False), batches)
    for name, weight in weights.items():
        width = weight[0].numel()
        assert (rows[name].flatten(1).sum(1) == keep_count(width, 0.5)).all()
        for row, score in zip(rows[name].flatten(1), scores[name].flatten(1), strict=True):
            assert torch.equal(row, top_k(score, keep_count(width, 0.5)))
        assert torch.equal(tensors[name], top_k(scores[name], keep_count(weight.numel(), 0.5)))
    assert any(not torch.equal(rows[name], tensors[name]) for name in rows)


def test_a_row_with_too_few_alive_weights_keeps_them():
    model, few = Linear(6, 3, bias=False), torch.ones(3, 6, dtype=torch.bool)
    few[1, 1:] = False
    set_masks(model, {"weight": few})
    found = prune(model, OneShot(0.5, saliency=Wanda()), [torch.ones(2, 6)])["weight"]
    assert found.sum(1).tolist() == [3, 1, 3] and not bool((found & ~few).any())


@pytest.mark.parametrize(
    "method", [SNIP(0.9), GraSP(0.9), SynFlow(0.9, rounds=4), OneShot(0.9), OneShot(0.9, saliency=Wanda())]
)
def test_dead_weights_stay_dead(method):
    model = plain_net()
    first = prune(model, OneShot(0.5, saliency=Random(1)))
    second = prune(model, method, plain_batches(), nn.functional.cross_entropy)
    for name in first:
        assert not bool((second[name] & ~first[name]).any()), name
    assert sum(int(m.sum()) for m in second.values()) < sum(int(m.sum()) for m in first.values())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0.0, 0.3, 0.9, 0.99, 0.999]), st.integers(0, 3))
def test_counts_are_exact_for_signed_scores(sparsity, seed):
    model = Net(seed)
    found = prune(model, GraSP(sparsity), net_batches(1), nn.functional.cross_entropy)
    numel = sum(mask.numel() for mask in found.values())
    assert sum(int(mask.sum()) for mask in found.values()) == keep_count(numel, sparsity)
    assert all(bool(mask.any()) for mask in found.values())


def test_dead_weights_take_no_share_of_a_signed_ranking():
    model = plain_net()
    prune(model, OneShot(0.3, saliency=Random(1)))
    numel = sum(mask.numel() for mask in masks(model).values())
    scores = scored(model, GraSP(0.35), plain_batches(), nn.functional.cross_entropy)  # half of them are below 0
    alive = torch.cat([mask.flatten() for mask in masks(model).values()])
    ranked = torch.cat([each.flatten() for each in scores.values()])
    found = prune(model, GraSP(0.35), plain_batches(), nn.functional.cross_entropy)
    assert sum(int(mask.sum()) for mask in found.values()) == keep_count(numel, 0.35)
    kept = torch.cat([mask.flatten() for mask in found.values()])
    assert torch.equal(kept, top_k(ranked, keep_count(numel, 0.35), alive))


def test_attach_goes_on_with_the_masks():
    model = plain_net()
    found = prune(model, SNIP(0.8), plain_batches(), nn.functional.cross_entropy)
    for method in (Static(0.8), Static(initial=Initial.KEEP), RigL(0.8, end=10), SNIP(0.8)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach(model, optimizer, method).detach()
        assert all(torch.equal(mask, found[name]) for name, mask in masks(model).items())
    with pytest.raises(ConfigError, match="SNIP scores weights on data: call prune"):
        _attach(SNIP(0.8))
    magnitude = _attach(OneShot(0.8))
    assert torch.equal(masks(magnitude)["5.weight"], top_k(plain_net()[5].weight.abs(), keep_count(32, 0.8)))
    with pytest.raises(ConfigError, match="prune's"):
        _attach(OneShot(0.8, per_row=True))


def _attach(method) -> nn.Module:
    model = plain_net()
    attach(model, torch.optim.SGD(model.parameters(), lr=0.1), method)
    return model


def test_rows_are_regrouped():
    torch.manual_seed(0)
    model = Linear(40, 24, bias=False)
    with torch.no_grad():  # rows i and i + 12 want the same inputs
        for i in range(12):
            model.weight[[i, i + 12]] = torch.where(torch.arange(40) % 12 == i, 1.0, 0.01)
    grouped, natural = copy.deepcopy(model), copy.deepcopy(model)
    kept = []
    for each, regroup in ((natural, None), (grouped, Regroup())):
        prune(each, OneShot(0.9, pattern=SharedSupport(2), regroup=regroup))
        kept.append(float(each.weight.detach().square().sum()))
    assert kept[1] > 1.3 * kept[0]
    found = masked_weights(grouped)["weight"]
    found.spec.pattern.check(found.mask, found.spec.layout, found.row_order)
    assert {frozenset(pair.tolist()) for pair in found.row_order.split(2)} == {
        frozenset((i, i + 12)) for i in range(12)
    }
    again = Linear(40, 24, bias=False)
    prune(again, OneShot(0.9, pattern=SharedSupport(2)))
    again.load_state_dict(grouped.state_dict())
    assert torch.equal(masked_weights(again)["weight"].row_order, found.row_order)


def test_rows_are_regrouped_in_the_last_round_only():
    torch.manual_seed(0)
    model = nn.Sequential(Linear(40, 24, bias=False), Linear(24, 24, bias=False))
    kinds = {"pattern": SharedSupport(4), "distribution": Uniform()}
    by_hand, grouped = copy.deepcopy(model), copy.deepcopy(model)
    prune(by_hand, SynFlow(0.5, rounds=1, **kinds), [torch.ones(1, 40)])  # the density sqrt(.25) in natural groups
    prune(by_hand, SynFlow(0.75, rounds=1, regroup=Regroup(), **kinds), [torch.ones(1, 40)])
    prune(grouped, SynFlow(0.75, rounds=2, regroup=Regroup(), **kinds), [torch.ones(1, 40)])
    for name, masked in masked_weights(grouped).items():
        other = masked_weights(by_hand)[name]
        assert masked.row_order is not None and torch.equal(masked.row_order, other.row_order)
        assert torch.equal(masked.mask, other.mask)


def test_bad_input_is_refused_and_changes_nothing():
    model, loss = plain_net(), nn.functional.cross_entropy
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match="`batches` .*at least one batch"):
        prune(model, SNIP(0.5), [], loss)
    with pytest.raises(ConfigError, match="`loss` \\(=None\\)"):
        prune(model, SNIP(0.5), plain_batches())
    with pytest.raises(ConfigError, match="others are for attach"):
        prune(model, RigL(0.5))
    with pytest.raises(ConfigError, match="has no masks"):
        prune(nn.Linear(2, 2), OneShot(0.5))
    with pytest.raises(ConfigError, match="SynFlow feeds ones"):
        prune(model, SynFlow(0.5), [torch.zeros(2, 4, 6, 6, dtype=torch.int64)])
    for bad in (float("nan"), float("inf")):
        x, y = plain_batches()[0]
        with pytest.raises(DataError, match="SNIP scores of `0.weight` hold NaN or Inf"):
            prune(model, SNIP(0.5), [(x * bad, y)], loss)
    with pytest.raises(ConfigError, match="`temperature`.*divides logits"):
        _grasp_of_tuple()
    with pytest.raises(ConfigError, match="`rounds`"):
        SynFlow(0.5, rounds=0)
    with pytest.raises(ConfigError, match="`temperature`"):
        GraSP(0.5, temperature=0.0)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def _grasp_of_tuple() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), x

    prune(Pair(), GraSP(0.5), [(X.float(), T)], lambda outputs, _: outputs[0].sum())


def test_forms_of_batches():
    loss = nn.functional.cross_entropy
    x, y = plain_batches()[0]
    plain = prune(plain_net(), SNIP(0.7), [(x, y)], loss)
    for batches in (iter([(x, y)]), [((x,), y)], [({"input": x}, y)], [[x, y]]):
        found = prune(plain_net(), SNIP(0.7), batches, loss)
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    iterated = prune(plain_net(), GraSP(0.7), iter(plain_batches()), loss)  # two passes over an iterator
    listed = prune(plain_net(), GraSP(0.7), plain_batches(), loss)
    assert all(torch.equal(iterated[name], listed[name]) for name in listed)
    bare = prune(plain_net(), OneShot(0.7, saliency=Wanda()), [x])
    paired = prune(plain_net(), OneShot(0.7, saliency=Wanda()), [(x, y)])
    assert all(torch.equal(bare[name], paired[name]) for name in bare)


def test_an_own_pattern_is_kept():
    model = nn.Sequential(Linear(8, 8))
    set_masks(model, {})
    prune(model, OneShot(0.5, saliency=Magnitude(), pattern=NByM(2, 4)))
    assert mask_spec(model[0], "weight").pattern == NByM(2, 4)
    prune(model, OneShot(0.5, saliency=Magnitude()))
    assert mask_spec(model[0], "weight").pattern == NByM(2, 4)


def test_what_exists_is_listed():
    assert PRUNINGS == (OneShot, SNIP, GraSP, SynFlow)
