"""The tables of SRigL, MEST, SNFS, ITOP and AC/DC, through `attach` where they are exchanges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn import Linear, MaskSpec, Route, install_mask, masked_weight, masks, set_masks
from fxsparse.sparsity import (
    ConstantFanIn,
    DropKind,
    Global,
    Magnitude,
    NByM,
    SharedSupport,
    Target,
    Uniform,
    Unstructured,
)
from fxsparse.sparsity.erk import share_out
from fxsparse.training import ACDC, ITOP, MEST, SET, SNFS, Growth, Initial, RigL, SRigL, Static, WeightState, attach
from fxsparse.training.budgets import Move, moves
from fxsparse.training.records import Coverage


class Holder(nn.Module):
    """Weights with the dense gradients that the test chooses."""

    def __init__(self, pattern, *pairs: tuple[Tensor, Tensor], alive: list[Tensor] | None = None) -> None:
        super().__init__()
        self.weights, self.gradients = nn.ModuleList(), [gradient for _, gradient in pairs]
        for i, (weight, _) in enumerate(pairs):
            holder = nn.Module()
            holder.weight = nn.Parameter(weight.clone())
            mask = weight != 0 if alive is None else alive[i]
            install_mask(holder, "weight", MaskSpec(pattern, route=Route.MASK_NODE), mask)
            self.weights.append(holder)

    def forward(self) -> Tensor:
        return sum(
            (masked_weight(h.weight, h.weight_mask) * g).sum()
            for h, g in zip(self.weights, self.gradients, strict=True)
        )


def run(model: nn.Module, method, steps: int = 1, optimizer=None, total: int | None = None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach(model, optimizer, method, total)
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return handle


def alive(mask: Tensor) -> set[int]:
    return set(mask.reshape(-1).nonzero().flatten().tolist())


DTYPES = [torch.float32, torch.float64, torch.bfloat16]
A = (
    [[9, 8, 0, 0], [0, 5, 4, 0], [1, 0, 0, 2]],
    [[2, 2, 2, 6], [14, 2, 13, 12], [2, 4, 1, 2]],
    0.5,
    [[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]],
)
B = (
    [[9, 2, 0, 5], [6, 7, 1, 0], [0, 0, 0, 0]],
    [[1, 1, 3, 1], [1, 1, 1, 2], [9, 8, 1, 0]],
    0.2,
    [[1, 0, 0, 1], [1, 1, 0, 0], [1, 1, 0, 0]],
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("weight", "gradient", "alpha", "expected"), [A, B], ids="ab")
def test_srigl(weight, gradient, alpha, expected, dtype):
    w, g = torch.tensor(weight, dtype=dtype), torch.tensor(gradient, dtype=dtype)
    other = torch.ones(2, 2, dtype=dtype)  # the last weight of a model is never ablated
    model = Holder(ConstantFanIn(), (w, g), (other, other))
    method = SRigL(alpha=alpha, every=1, end=9, gamma=0.5, decay=DropKind.CONSTANT, initial=Initial.KEEP)
    run(model, method)
    mask = model.weights[0].weight_mask
    assert mask.int().tolist() == expected
    assert torch.equal(model.weights[0].weight.detach(), torch.where(mask, w, 0))


def test_srigl_an_ablated_row_keeps_nothing_however_large():
    w = torch.tensor([[9.0, 8, 0, 0], [0, 5, 4, 0], [10, 0, 0, 1]])
    g = torch.tensor([[0.0, 0, 6, 0], [7, 0, 0, 8], [0, 1, 1, 0]])
    other = torch.ones(2, 2)
    model = Holder(ConstantFanIn(), (w, g), (other, other))
    run(model, SRigL(alpha=0.5, every=1, end=9, gamma=1.0, decay=DropKind.CONSTANT, initial=Initial.KEEP))
    # salient: 10, 9, 8 and the gradients 8, 7, 6: rows have 3, 2 and 1, so the third goes with its 10; then k' = 3
    assert model.weights[0].weight_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]


def test_srigl_never_ablates_where_it_is_told_not_to():
    w, g, alpha, expected = A
    pair = (torch.tensor(w).double(), torch.tensor(g).double())
    kwargs = {"alpha": alpha, "every": 1, "end": 9, "gamma": 0.5, "decay": DropKind.CONSTANT, "initial": Initial.KEEP}
    last, named, without = (
        Holder(ConstantFanIn(), pair),
        Holder(ConstantFanIn(), pair, pair),
        Holder(ConstantFanIn(), pair, pair),
    )
    run(last, SRigL(**kwargs))
    run(named, SRigL(**kwargs, keep_rows=("weights.0.weight",)))
    run(without, SRigL(**kwargs, ablation=False))
    for model in (last, named, without):
        mask = model.weights[0].weight_mask
        assert mask.sum(1).tolist() == [2, 2, 2] and mask.int().tolist() != expected
    plain = Holder(ConstantFanIn(), pair)  # without ablation it is RigL's exchange
    run(plain, RigL(**{k: v for k, v in kwargs.items() if k != "gamma"}))
    assert torch.equal(plain.weights[0].weight_mask, without.weights[0].weight_mask)


def test_srigl_keeps_enough_rows_for_the_budget():
    # every salient weight is in row 0, but K = 6 needs two rows of 4
    w = torch.tensor([[9.0, 8, 7, 6], [0, 0.1, 0.1, 0], [0, 0, 0, 0]])
    state = WeightState("w", 0, 1, 1, 0, w, w != 0, ConstantFanIn(), gradient=torch.zeros(3, 4), target=Target(0.5, 6))
    timed = SRigL(alpha=0.2, every=1, end=9, gamma=1.0, decay=DropKind.CONSTANT)
    assert timed.exchanged(state).sum(1).tolist() == [3, 3, 0]


def test_srigl_refuses_what_it_is_not_about():
    model = Holder(SharedSupport(2), (torch.ones(4, 4), torch.ones(4, 4)))
    with pytest.raises(ConfigError, match="SRigL needs as many weights in each row"):
        run(model, SRigL(0.5, pattern=SharedSupport(2), end=5))
    with pytest.raises(ConfigError, match="no fixed budget"):
        SRigL(0.5, distribution=Global())
    two_four = Holder(Unstructured(), (torch.arange(1.0, 17).reshape(2, 8), torch.ones(2, 8)))
    handle = run(two_four, SRigL(0.5, pattern=NByM(2, 4), distribution=Uniform(), every=1, end=5, alpha=0.5), 3)
    assert handle.updates == 3
    NByM(2, 4).check(two_four.weights[0].weight_mask)


W10 = torch.tensor([5.0, -2, 0, 4, 0, 1, 0, 0, -3, 0])
G10 = torch.tensor([0.0, 5, 9, 0, 1, 1, 2, 3, 1, 9])
ALIVE10 = [torch.tensor([1, 1, 0, 1, 0, 1, 0, 0, 1, 0]).bool()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gradient", "kept"), [(0.0, {0, 3, 8}), (1.0, {0, 1, 3})])
def test_mest_em(gradient, kept, seed, dtype):
    model = Holder(Unstructured(), (W10.to(dtype), G10.to(dtype)), alive=ALIVE10)
    method = MEST(0.5, distribution=Uniform(), every=1, p=(0.2, 0.0), boundaries=(50,), gradient=gradient, seed=seed)
    run(model, method)
    found = alive(model.weights[0].weight_mask)
    assert kept <= found and len(found) == 5


@pytest.mark.parametrize("seed", range(4))
def test_mest_em_and_s(seed):
    model = Holder(Unstructured(), (W10, G10), alive=ALIVE10)
    method = MEST(0.5, distribution=Uniform(), every=1, p=(0.2, 0.0), boundaries=(50,), soft=True, seed=seed)
    run(model, method)
    found = alive(model.weights[0].weight_mask)
    assert alive(ALIVE10[0]) < found and len(found) == 7


@pytest.mark.parametrize(
    ("soft", "p", "pruned", "between"),
    [
        (False, (0.02, 0.01, 0.0), (80, 90, 100), (100, 100, 100)),
        (True, (0.05, 0.025, 0.0), (100, 100, 100), (150, 125, 100)),
    ],
)
def test_mest_schedule(soft, p, pruned, between):
    # 160 epochs of one step, an event every 5, boundaries at 90 and 120
    generator = torch.Generator().manual_seed(0)
    model = Holder(Unstructured(), (torch.randn(1000, generator=generator), torch.zeros(1000)))
    method = MEST(0.9, distribution=Uniform(), every=5, p=p, soft=soft, initial=Static().initial)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first = torch.zeros(1000, dtype=torch.bool)
    first[torch.randperm(1000, generator=generator)[:100]] = True
    set_masks(model, {"weights.0.weight": first})
    handle = attach(model, optimizer, method, 160)
    assert handle.method.boundaries == (90, 120)
    for step in range(1, 161):
        model().backward()
        before = model.weights[0].weight_mask.clone()
        optimizer.step()
        phase = (step >= 90) + (step >= 120)
        mask = model.weights[0].weight_mask
        if step % 5 == 0 and step < 160:
            assert int(mask.sum()) == between[phase], step
            stayed = int((mask & before).sum())  # dropped ones may be regrown, so at least those that were kept
            assert stayed >= min(pruned[phase], int(before.sum()))
        else:
            assert torch.equal(mask, before)
    assert int(mask.sum()) == 100


def test_mest_refuses_what_it_cannot():
    with pytest.raises(ConfigError, match="must end in 0"):
        MEST(p=(0.1, 0.05), boundaries=(5,))
    with pytest.raises(ConfigError, match="one fewer"):
        MEST(p=(0.1, 0.0), boundaries=(5, 9))
    with pytest.raises(ConfigError, match="`total_steps`"):
        MEST().timed(None)
    with pytest.raises(ConfigError, match="more alive between events"):
        run(Holder(NByM(2, 4), (torch.ones(4, 8), torch.ones(4, 8))), MEST(0.5, soft=True, boundaries=(5, 9)))


def test_mest_ends_its_soft_bound_at_the_last_boundary_even_off_the_grid():
    model = Holder(Unstructured(), (torch.ones(100), torch.zeros(100)))
    run(model, MEST(0.5, distribution=Uniform(), every=7, p=(0.1, 0.0), boundaries=(10,), soft=True), 10)
    assert int(model.weights[0].weight_mask.sum()) == 50


@pytest.mark.parametrize("seed", range(3))
def test_mest_drops_in_each_group_only_what_is_beyond_its_soft_bound(seed):
    weight = 1 + torch.arange(80.0).reshape(4, 20)
    model = Holder(SharedSupport(2), (weight, torch.zeros(4, 20)))
    method = MEST(
        0.5, distribution=Uniform(), every=1, p=(0.2, 0.0), boundaries=(50,), soft=True, initial=Magnitude(), seed=seed
    )
    handle = run(model, method, 0)
    first = model.weights[0].weight_mask.clone()
    assert first.sum(1).tolist() == [10] * 4
    for _ in range(5):  # ten of each group have weights, the four beyond are new and 0
        model().backward()
        handle.optimizer.step()
        mask = model.weights[0].weight_mask
        assert mask.sum(1).tolist() == [14] * 4 and bool(mask[first].all())


def test_budgets_are_shared_out_exactly():
    assert share_out((0.5, 0.3, 0.2), 10, (3, 10, 10)) == [3, 4, 3]
    assert share_out((1.0, 0.0), 5, (2, 9)) == [2, 3]
    assert share_out((0.0, 0.0), 5, (9, 9)) == [3, 2]
    with pytest.raises(ConfigError, match="`total`"):
        share_out((0.5, 0.5), 5, (2, 2))


def test_moves_leave_the_last_weight_and_limit_nearly_dense_ones():
    def state(alive: int, size: int) -> WeightState:
        return WeightState(str(size), 0, 1, 1, 0, torch.ones(size), torch.arange(size) < alive, Unstructured())

    one = moves([state(1, 10), state(8, 20)], [1.0, 1.0], 1.0)
    assert one == {"10": Move(0, 1 + 4), "20": Move(7, 1 + 3)}  # n(1, 1) = 1 would empty the first
    poor = moves([state(9, 10), state(9, 20)], [1.0, 3.0], 0.5)  # sparsity .1, but a share below 1/2
    assert poor == {"10": Move(4, 5 + 2), "20": Move(4, 5 + 6)}
    rich = moves([state(9, 10), state(9, 20)], [3.0, 1.0], 0.5)  # f = .1: n(.1, 9) = 0
    assert rich == {"10": Move(0, 9 + 1), "20": Move(4, 5 + 3)}


def smooth_pair(scale: tuple[float, float]) -> Holder:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(40, generator=generator).double(), s * torch.randn(40, generator=generator).double())
        for s in scale
    ]
    chosen = [torch.arange(40) % 2 == 0 for _ in pairs]
    return Holder(Unstructured(), *pairs, alive=chosen)


def test_snfs_moves_budgets_to_the_larger_momentum():
    model = smooth_pair((1.0, 3.0))
    handle = run(model, SNFS(0.5, every=1, end=10, alpha=0.4, decay=DropKind.CONSTANT, initial=Initial.KEEP))
    counts = [int(h.weight_mask.sum()) for h in model.weights]
    assert sum(counts) == 40 and counts[1] > 20 > counts[0]
    # n(.4, 20) = 8 leave each weight; 16 come back by the mean |m| of what is alive, m = .1 G after one step
    means = [float(g[::2].abs().mean()) for g in model.gradients]
    expected = share_out([m / sum(means) for m in means], 16, (28, 28))
    assert [c - 12 for c in counts] == expected
    assert [row.alive for row in handle.report().rows] == counts
    fixed = smooth_pair((1.0, 3.0))
    run(fixed, SNFS(0.5, every=1, end=10, alpha=0.4, decay=DropKind.CONSTANT, initial=Initial.KEEP, redistribute=False))
    assert [int(h.weight_mask.sum()) for h in fixed.weights] == [20, 20]


def test_snfs_nearly_dense_weights_drop_less():
    ones = torch.ones(100).double()
    chosen = [torch.arange(100) < 88, torch.arange(100) < 50]  # sparsity .12 and .5
    model = Holder(Unstructured(), (ones, 6 * ones), (ones, 4 * ones), alive=chosen)
    method = SNFS(0.5, every=1, end=10, alpha=0.5, decay=DropKind.CONSTANT, initial=Initial.KEEP)
    handle = run(model, method)
    # f = min(.5, .12) in the first, whose share .6 exceeds 1/2: 10 leave it and 25 the second; 35 are shared as 21, 14
    assert [int(h.weight_mask.sum()) for h in model.weights] == [99, 39]
    assert sum(row.alive for row in handle.report().rows) == 138


@pytest.mark.parametrize(
    ("make", "momentum"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.9), "momentum_buffer"),
        (lambda p: torch.optim.SGD(p, lr=0.0, momentum=0.8, dampening=0.5), "momentum_buffer"),
        (lambda p: torch.optim.Adam(p, lr=0.0), "exp_avg"),
        (lambda p: torch.optim.RMSprop(p, lr=0.0), None),
    ],
)
def test_snfs_smooths_as_the_optimizer_does(make, momentum):
    model = smooth_pair((1.0, 3.0))
    optimizer = make(model.parameters())
    handle = attach(model, optimizer, SNFS(0.5, every=50, end=100, initial=Initial.KEEP))
    generator = torch.Generator().manual_seed(3)
    seen = []
    for _ in range(4):
        model.gradients = [torch.randn(40, generator=generator).double() for _ in range(2)]
        seen.append(model.gradients[0])
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    m, held = handle._memory["weights.0.weight"]["m"], model.weights[0]
    if momentum is None:
        expected = torch.zeros(40).double()
        for g in seen:
            expected = 0.9 * expected + 0.1 * g
        torch.testing.assert_close(m, expected)
    else:
        own = optimizer.state[held.weight][momentum]
        torch.testing.assert_close(m[held.weight_mask], own[held.weight_mask])
        assert bool((own[~held.weight_mask] == 0).all()) and bool((m[~held.weight_mask] != 0).all())
    if momentum == "exp_avg":
        v = handle._memory["weights.0.weight"]["v"]
        torch.testing.assert_close(v[held.weight_mask], optimizer.state[held.weight]["exp_avg_sq"][held.weight_mask])


def test_snfs_grows_by_the_ratio_of_adam():
    m, v = torch.tensor([1.0, -4.0, 2.0, 0.0]), torch.tensor([0.25, 64.0, 1.0, 1.0])
    plain = WeightState("w", 0, 1, 1, 0, torch.ones(4), torch.ones(4) > 0, Unstructured(), memory={"m": m})
    adam = WeightState("w", 0, 1, 1, 0, torch.ones(4), torch.ones(4) > 0, Unstructured(), memory={"m": m, "v": v})
    assert SNFS().grow_scores(plain).tolist() == [[1, 4, 2, 0]]
    torch.testing.assert_close(SNFS().grow_scores(adam), torch.tensor([[2, 0.5, 2, 0]]), rtol=1e-6, atol=0)


def test_snfs_refuses_patterns_whose_units_cannot_move():
    with pytest.raises(ConfigError, match="redistribute=False"):
        run(Holder(SharedSupport(2), (torch.ones(4, 4), torch.ones(4, 4))), SNFS(0.5, end=5))


def test_itop_rate():
    coverage = Coverage()
    for members in ({0, 1, 2, 3}, {0, 1, 4, 5}, {0, 1, 4, 6}):
        mask = torch.zeros(8, dtype=torch.bool)
        mask[list(members)] = True
        coverage.see({"w": mask, "dense": torch.ones(100, dtype=torch.bool)})
    (row,) = coverage.rows()
    assert (row.name, row.explored, row.numel) == ("w", 7, 8)


def test_a_weight_that_began_dense_has_explored_all_of_itself():
    coverage, sparse = Coverage(), torch.arange(8) < 4
    coverage.see({"pruned": torch.ones(8, dtype=torch.bool), "sparse": sparse})
    coverage.see({"pruned": sparse, "sparse": sparse})
    assert {row.name: row.explored for row in coverage.rows()} == {"pruned": 8, "sparse": 4}


def test_report_tells_the_rate_and_leaves_out_dense_weights():
    torch.manual_seed(0)
    model = nn.Sequential(Linear(10, 10, bias=False), Linear(10, 10, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = attach(model, optimizer, SET(0.8, distribution=Uniform(), every=1, alpha=0.5))
    union, rates = masks(model)["0.weight"].clone(), [handle.report().explored]
    assert rates == [0.2] and "R_s" in str(handle.report())
    other = masks(model)["1.weight"].clone()
    for _ in range(6):
        model(torch.randn(4, 10)).sum().backward()
        optimizer.step()
        union |= masks(model)["0.weight"]
        other |= masks(model)["1.weight"]
        rates.append(handle.report().explored)
    assert rates == sorted(rates) and rates[-1] > 0.2
    assert rates[-1] == (int(union.sum()) + int(other.sum())) / 200
    dense = nn.Sequential(Linear(10, 10, bias=False))
    assert attach(dense, torch.optim.SGD(dense.parameters(), lr=0.1), Static(0.0)).report().explored == 1.0


@pytest.mark.parametrize("growth", list(Growth))
def test_itop_growth(growth):
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(60, generator=generator), torch.randn(60, generator=generator)
    model = Holder(Unstructured(), (weight, gradient))
    handle = run(
        model, ITOP(0.8, distribution=Uniform(), every=1, growth=growth, alpha=0.5, initial=Static().initial), 0
    )
    first = model.weights[0].weight_mask.clone()
    run_on = handle.optimizer
    for step in range(1, 9):
        explored = handle.report().weights
        before = model.weights[0].weight_mask.clone()
        run_on.zero_grad()
        model().backward()
        run_on.step()
        mask = model.weights[0].weight_mask
        assert int(mask.sum()) == int(first.sum()), step
        if growth is Growth.UNSEEN and explored and explored[0].numel - explored[0].explored >= 6:
            assert handle.report().weights[0].explored == explored[0].explored + 6  # all six that grow are new
        if growth is Growth.GRADIENT:
            new = mask & ~before
            dead = ~mask & ~before
            assert not bool(new.any()) or float(gradient[new].abs().min()) >= float(gradient[dead].abs().max())


def test_acdc_phases():
    torch.manual_seed(0)
    model = nn.Sequential(Linear(10, 12, bias=False), nn.Tanh(), Linear(12, 4, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    handle = attach(model, optimizer, ACDC(0.75, every=3, start=2), 20)
    assert handle.method.end == 15
    sizes, numel = [], 168
    for step in range(1, 21):
        optimizer.zero_grad()
        model(torch.randn(8, 10)).square().sum().backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters() if not n.endswith("mask")}
        were = {n: m.clone() for n, m in masks(model).items()}
        optimizer.step()
        now = sum(int(mask.sum()) for mask in masks(model).values())
        sizes.append(now)
        for name, mask in masks(model).items():
            revived = mask & ~were[name]
            weight = dict(model.named_parameters())[name]
            assert bool((weight[revived] == 0).all()) and before[name].shape == weight.shape
            assert bool((optimizer.state[weight]["exp_avg"][revived] == 0).all())
        if step in (2, 8, 14):  # a compressed phase begins: one ranking over both weights
            flat = torch.cat([p.detach().flatten().abs() for p in model.parameters()])
            kept = torch.cat([m.flatten() for m in masks(model).values()])
            assert float(flat[kept].min()) > 0 and int(kept.sum()) == 42
    dense, compressed = numel, 42
    assert sizes == [dense] + [compressed] * 3 + [dense] * 3 + [compressed] * 3 + [dense] * 3 + [compressed] * 7
    assert [row.step for row in handle.report().updates()] == [2, 5, 8, 11, 14]
    assert handle.report().explored == 1.0


def test_acdc_says_what_it_needs():
    with pytest.raises(ConfigError, match="`total_steps`"):
        ACDC(0.5).timed(None)
    with pytest.raises(ConfigError, match="first phase is dense"):
        ACDC(0.5, start=0).timed(100)
    with pytest.raises(ConfigError, match="must be 0 or 1 - n/m"):
        run(Holder(NByM(2, 4), (torch.ones(4, 8), torch.ones(4, 8))), ACDC(0.75, pattern=NByM(2, 4)), total=9)
    # the gradient is not asked for
    assert not ACDC().needs_gradient and not MEST().needs_gradient and MEST(gradient=0.5).needs_gradient
    assert SNFS().needs_gradient and not ITOP().needs_gradient and ITOP(growth=Growth.GRADIENT).needs_gradient
