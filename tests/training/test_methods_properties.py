"""The rules U1-U7 for every method, pattern and dtype; every method goes on bit for bit after a kill."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn import Conv2d, Linear, masked_weights, masks
from fxsparse.sparsity import (
    Block,
    Channel,
    ConstantFanIn,
    DropKind,
    Global,
    Layout,
    Magnitude,
    NByM,
    Pooling,
    SharedSupport,
    Uniform,
    Unstructured,
    fraction_count,
)
from fxsparse.training import (
    ACDC,
    GMP,
    ITOP,
    MEST,
    METHODS,
    SET,
    SNFS,
    Diversity,
    Growth,
    Regroup,
    RigL,
    SRigL,
    Static,
    WeightState,
    attach,
)
from fxsparse.training.exchange import exchange, of_weight
from fxsparse.training.regroup import new_row_order
from fxsparse.training.snapshot import Snapshot

TOTAL = 12
COMMON = {"every": 2, "alpha": 0.4}
MAKERS = {
    "static": lambda s, **k: Static(s, **k),
    "gmp": lambda s, **k: GMP(s, every=2, **k),
    "acdc": lambda s, **k: ACDC(s, every=3, start=2, **k),
    "set": lambda s, **k: SET(s, **COMMON, **k),
    "rigl": lambda s, **k: RigL(s, **COMMON, decay=DropKind.CONSTANT, **k),
    "itop": lambda s, **k: ITOP(s, **COMMON, **k),
    "itop by gradient": lambda s, **k: ITOP(s, **COMMON, growth=Growth.GRADIENT, regrow_dropped=False, **k),
    "snfs": lambda s, **k: SNFS(s, **COMMON, **k),
    "snfs in place": lambda s, **k: SNFS(s, **COMMON, redistribute=False, **k),
    "srigl": lambda s, **k: SRigL(s, **COMMON, **k),
    "mest": lambda s, **k: MEST(s, every=2, p=(0.1, 0.05, 0.0), gradient=0.1, **k),
    "mest soft": lambda s, **k: MEST(s, every=2, p=(0.1, 0.05, 0.0), soft=True, **k),
    "rigl diverse": lambda s, **k: RigL(s, **COMMON, diversity=Diversity(), **k),
    "rigl regrouped": lambda s, **k: RigL(s, **COMMON, regroup=Regroup(growth=1.0), **k),
}
PATTERNS = {
    "unstructured": (Unstructured(), 0.8),
    "2:4": (NByM(2, 4), 0.5),
    "block": (Block(2, 2), 0.75),
    "channel": (Channel(0), 0.5),
    "input channel": (Channel(1), 0.5),
    "1:4 at most": (NByM(1, 4, exact=False), 0.8),
    "fan-in": (ConstantFanIn(), 0.75),
    "shared support": (SharedSupport(4), 0.75),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
CHANGING = {"gmp", "acdc", "mest soft"}  # counts move on purpose


def build(seed: int, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            Conv2d(4, 8, 3), nn.Tanh(), nn.Flatten(), Linear(32, 8), nn.Tanh(), Linear(8, 4, bias=False)
        ).to(dtype)


def data(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 4, 4, 4, generator=generator).to(dtype), torch.randint(0, 4, (6,), generator=generator)


def train(model, optimizer, start: int, end: int, dtype: torch.dtype) -> None:
    for step in range(start, end):
        x, y = data(step, dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def made(method: str, pattern: str, seed: int):
    kind, sparsity = PATTERNS[pattern]
    return MAKERS[method](sparsity, pattern=kind, distribution=Uniform(), seed=seed)


def refused(method: str, pattern: str) -> str | None:
    """Why a combination is refused."""
    if pattern == "1:4 at most" and method not in ("static", "gmp", "acdc"):
        return "no count per group that an exchange could conserve; use exact=True"
    if method == "gmp" and pattern == "2:4":
        return "passes through other sparsities"
    if method == "snfs" and pattern != "unstructured":
        return "moves single weights"
    if method == "srigl" and pattern not in ("2:4", "fan-in"):
        return "SRigL needs as many weights"
    if method == "mest soft" and pattern == "2:4":
        return "more alive between events"
    return None


WORKS = [(m, p) for m in sorted(MAKERS) for p in sorted(PATTERNS) if refused(m, p) is None]
REFUSED = [(m, p) for m in sorted(MAKERS) for p in sorted(PATTERNS) if refused(m, p) is not None]


@pytest.mark.parametrize(("method", "pattern"), REFUSED)
def test_a_combination_that_a_definition_excludes_says_why_and_changes_nothing(method, pattern):
    model = build(0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=refused(method, pattern)):
        attach(model, optimizer, made(method, pattern, 0), TOTAL)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def checked_exchange(units, alive, drop, grow, fraction=0.0, *, dropped=None, target=None, regrow_dropped=True):
    """The exchange, and the rules on what left and what came."""
    new = exchange(units, alive, drop, grow, fraction, dropped=dropped, target=target, regrow_dropped=regrow_dropped)
    left, came = alive & ~new, new & ~alive
    assert torch.equal(new.sum(1), alive.sum(1) if target is None else target)
    rest = ~alive & ~new if units.valid is None else ~alive & ~new & units.valid
    worst, best = (
        torch.where(came, grow.double(), math.inf).amin(1),
        torch.where(rest, grow.double(), -math.inf).amax(1),
    )
    assert bool((worst >= best).all())  # nothing that stays dead would have been a better choice
    if target is None:  # only the k lowest may leave
        for part in [slice(None)] if of_weight(units) else [slice(i, i + 1) for i in range(len(alive))]:
            have = int(alive[part].sum())
            k = fraction_count(fraction, have) if dropped is None else min(dropped, have)
            gone = drop[part][left[part]]
            assert len(gone) <= k
            assert not len(gone) or float(gone.max()) <= float(drop[part][alive[part]].sort().values[k - 1])
    return new


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "pattern"), WORKS)
def test_every_combination_runs_by_the_rules(method, pattern, dtype, monkeypatch):
    for module in ("updater", "scheduled"):
        monkeypatch.setattr(f"fxsparse.training.{module}.exchange", checked_exchange)
    handle = run_by_the_rules(method, pattern, dtype, "adamw" if dtype is torch.float64 else "sgd", 0)
    assert handle.step == TOTAL and (handle.updates > 0) == (method != "static")
    assert 0 < handle.report().explored <= 1
    moved = sum(row.dropped + row.grown for row in handle.report())
    assert moved > 0 or method == "static" or (method == "mest" and "channel" in pattern)  # n(p, 4 channels) is 0


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(WORKS), st.sampled_from(DTYPES), st.sampled_from(["sgd", "adamw"]), st.integers(1, 20))
def test_rules(case, dtype, kind, seed):
    run_by_the_rules(*case, dtype, kind, seed)


def run_by_the_rules(method, pattern, dtype, kind, seed):
    model = build(seed, dtype)
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    }[kind]
    optimizer = make(model.parameters())
    handle = attach(model, optimizer, made(method, pattern, seed), TOTAL)
    first = {n: w.mask.clone() for n, w in masked_weights(model).items()}
    rate = handle.report().explored
    for step in range(TOTAL):
        before = {n: w.mask.clone() for n, w in masked_weights(model).items()}
        updates = handle.updates
        train(model, optimizer, step, step + 1, dtype)
        now = masked_weights(model)
        for name, weight in now.items():
            if handle.updates == updates:
                assert torch.equal(weight.mask, before[name])
            grown = weight.mask & ~before[name]
            if not bool(weight.mask.all()):
                weight.spec.pattern.check(weight.mask, weight.spec.layout, weight.row_order)  # U4
            assert bool((weight.weight[~weight.mask] == 0).all())  # R5
            for value in optimizer.state[weight.weight].values():
                if isinstance(value, Tensor) and value.shape == weight.weight.shape:
                    assert bool((value[~weight.mask] == 0).all())  # U7
                    assert handle.updates == updates or bool((value[grown] == 0).all())
            if handle.updates != updates:
                assert bool((weight.weight[grown] == 0).all())  # U6
            if method == "gmp":
                assert not bool(grown.any())
        alive = sum(int(w.mask.sum()) for w in now.values())
        had = sum(int(m.sum()) for m in before.values())
        if method not in CHANGING and method != "srigl" and not isinstance(PATTERNS[pattern][0], Block):
            assert alive == had  # U1
            if method != "snfs":
                assert all(int(w.mask.sum()) == int(first[n].sum()) for n, w in now.items())
        if method == "srigl":
            for name, weight in now.items():
                shortfall = int(handle._targets[name].alive) - int(weight.mask.sum())
                assert 0 <= shortfall < len(weight.mask)  # K conserved to within a row's rounding
        assert handle.report().explored >= rate
        rate = handle.report().explored
    return handle


def test_nothing_more_is_dropped_than_the_fraction_says():
    for method in ("set", "rigl", "snfs"):
        model = build(0, torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        handle = attach(model, optimizer, made(method, "unstructured", 0), TOTAL)
        for step in range(TOTAL):
            before = {n: m.clone() for n, m in masks(model).items()}
            train(model, optimizer, step, step + 1, torch.float64)
            fraction = handle.method.drop_fraction(handle.step)
            for name, mask in masks(model).items():
                assert int((before[name] & ~mask).sum()) <= fraction_count(fraction, int(before[name].sum()))


RESUMED = [m for m in sorted(MAKERS) if m != "srigl"] + ["srigl, fan-in", "set, shared support", "regroup", "global"]


@pytest.mark.parametrize("case", RESUMED)
def test_every_method_goes_on_in_the_middle_of_a_cycle(case):
    kill_and_resume(case, "adam" if case == "snfs" else "sgd", 5, False)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(RESUMED), st.sampled_from(["sgd", "adam"]), st.integers(0, TOTAL), st.booleans())
def test_killed_and_resumed(case, kind, stop, handle_first):
    kill_and_resume(case, kind, stop, handle_first)


def kill_and_resume(case, kind, stop, handle_first):
    method, _, pattern = case.partition(", ")
    if case == "regroup":
        method, pattern = "rigl regrouped", "shared support"
    if case == "global":
        method, pattern = "mest soft", "unstructured"
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, lr=0.01)}[
        kind
    ]

    def fresh(seed: int):
        model = build(seed, torch.float32)
        optimizer = make(model.parameters())
        asked = made(method, pattern or "unstructured", 3)
        if case == "global":  # what each weight is meant to keep is known from its first mask alone
            asked = replace(asked, distribution=Global(), initial=Magnitude())
        return model, optimizer, attach(model, optimizer, asked, TOTAL)

    straight = fresh(0)
    train(*straight[:2], 0, TOTAL, torch.float32)
    killed = fresh(0)
    train(*killed[:2], 0, stop, torch.float32)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in killed], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    Snapshot.of(states[2])  # run directories can hold it
    resumed = fresh(99)
    for i in [2, 0, 1] if handle_first else [0, 1, 2]:
        resumed[i].load_state_dict(states[i])
    train(*resumed[:2], stop, TOTAL, torch.float32)
    copied = copy.deepcopy(killed)
    train(*copied[:2], stop, TOTAL, torch.float32)
    for other in (resumed, copied):
        for name, value in straight[0].state_dict().items():
            assert torch.equal(value, other[0].state_dict()[name]), name
        assert straight[2].report() == other[2].report()
        mine, found = Snapshot.of(straight[2].state_dict()), Snapshot.of(other[2].state_dict())
        assert mine.values == found.values
        assert all(torch.equal(mine.tensors[key], found.tensors[key]) for key in mine.tensors)


def test_global_distributions_work_where_budgets_need_none():
    for method in ("set", "rigl", "mest", "mest soft", "itop"):
        model = build(0, torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        handle = attach(model, optimizer, MAKERS[method](0.8, distribution=Global()), TOTAL)
        before = sum(int(mask.sum()) for mask in masks(model).values())
        train(model, optimizer, 0, TOTAL, torch.float32)
        assert sum(int(mask.sum()) for mask in masks(model).values()) == before and handle.updates


def test_regrouping_keeps_the_pattern_and_counts_as_an_exchange():
    torch.manual_seed(0)
    model = nn.Sequential(Linear(30, 24, bias=False))
    with torch.no_grad():  # rows i and i + 12 agree
        for i in range(12):
            model[0].weight[[i, i + 12]] = torch.where(torch.arange(30) % 12 == i, 1.0, 0.01) + 0.001 * torch.rand(
                2, 30
            )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = GMP(0.9, pattern=SharedSupport(2), every=2, end=6, regroup=Regroup(until=2))
    handle = attach(model, optimizer, method)
    average = torch.optim.swa_utils.AveragedModel(model)
    handle.follow(average)
    orders = []
    for _ in range(6):
        model(torch.randn(4, 30)).sum().backward()
        optimizer.step()
        (found,) = masked_weights(model).values()
        orders.append(None if found.row_order is None else found.row_order.clone())
        if not bool(found.mask.all()):
            found.spec.pattern.check(found.mask, found.spec.layout, found.row_order)
    assert orders[0] is None
    pairs = {frozenset(pair.tolist()) for pair in orders[-1].split(2)}
    planted = {frozenset((i, i + 12)) for i in range(12)}
    assert len(pairs & planted) >= 10
    (follower,) = masked_weights(average.module).values()
    assert torch.equal(follower.row_order, orders[-1]) and torch.equal(follower.mask, found.mask)
    assert handle.updates == 3 and len(handle.report().rows) == 3
    assert math.isclose(handle.report().rows[-1].density, 3 / 30)


def test_what_exists_is_listed():
    assert {type(maker(0.5)) for maker in MAKERS.values()} == set(METHODS) - {
        m for m in METHODS if m.__name__ == "RESU"
    }


def test_rows_that_groups_of_a_convolution_share_are_not_regrouped():
    scores = nn.functional.one_hot(torch.tensor([0, 1, 0, 0, 1, 0]), 3).double()[:, :, None]
    straddling = SharedSupport(2).units((6, 3, 1), Layout(groups=2))  # 3 rows a group of the convolution
    assert new_row_order(straddling, scores, 1, Pooling.RMS) is None
    whole = new_row_order(SharedSupport(2).units((6, 3, 1)), scores, 1, Pooling.RMS)
    assert whole is not None
    assert {1, 4} in [set(pair.tolist()) for pair in whole.split(2)]


def test_regrouping_by_growth_reads_what_dead_weights_want():
    mask, gradient = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4)
    mask[:, 0] = True
    gradient[[0, 1, 2, 3], [1, 2, 1, 2]] = 1.0
    state = WeightState("w", 0, 1, 1, 0, mask.float(), mask, SharedSupport(2), gradient=gradient)
    assert Regroup(growth=0.0).applied(state, Magnitude()) is state  # all rows are alike
    order = Regroup(growth=4.0).applied(state, Magnitude()).row_order
    assert order is not None and [set(pair.tolist()) for pair in order.split(2)] == [{0, 2}, {1, 3}]


def test_regrouping_ends_and_leaves_dead_weights_alone():
    assert [update for update in range(1, 9) if Regroup(every=2, until=5).due(update)] == [2, 4]
    dead = WeightState("w", 0, 1, 1, 0, torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bool), SharedSupport(2))
    assert Regroup().applied(dead, Magnitude()) is dead
