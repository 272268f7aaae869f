"""Resurrection of masked weights: modes, storage, transitions, state; compact storage is the oracle."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxsparse.nn as fnn
from fxsparse.errors import ConfigError
from fxsparse.nn import Guard, MaskSpec, Mode, Resurrection, Route, ThetaInit, masked_weights
from fxsparse.nn.resu import theta_start
from fxsparse.passes import InsertMasks
from fxsparse.sparsity import NByM, SharedSupport, generator
from fxsparse.training.resu_theta import Selective, ThetaAdamW, ThetaMomentum, ThetaOptimizer, ThetaSGD

DOUBLE = torch.float64
ROUTES = (Route.MODULE, Route.MASK_NODE, Route.PARAMETER)
COMPANIONS = ("weight_alive_mask", "weight_trainable", "weight_resurrecting")


class Functional(nn.Module):
    """A weight that is read by a function."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):  # annotations that are strings would keep its traced form from being pickled
        return F.linear(x, self.weight)


def half(*shape: int, seed: int = 0) -> torch.Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask.view(-1)[:2] = torch.tensor([True, False])
    return mask


def model_of(route: Route, sizes: tuple[int, int] = (5, 4), dtype: torch.dtype = DOUBLE) -> nn.Module:
    """A module whose one weight [sizes reversed] has a mask on this route."""
    torch.manual_seed(0)
    linear = nn.Linear(*sizes, bias=False, dtype=dtype)
    if route is Route.MODULE:
        return fnn.Linear.from_dense(linear)
    if route is Route.PARAMETER:
        fnn.install_mask(linear, "weight", MaskSpec(route=route, guard=Guard.GRADIENT))
        return linear
    functional = Functional(linear.weight.detach())
    return InsertMasks({"weight": MaskSpec(route=route)})(torch.fx.symbolic_trace(functional)).module


def unit_of(model: nn.Module) -> Resurrection:
    return Resurrection(masked_weights(model)["weight"])


def unit_in(mode: Mode, route: Route = Route.MODULE) -> tuple[nn.Module, Resurrection]:
    model = model_of(route)
    unit = unit_of(model)
    if mode is not Mode.DENSE:
        unit.weight.set_mask_(half(4, 5))
    if mode is Mode.RESU:
        unit.enter()
    return model, unit


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def assert_invariants(model: nn.Module, unit: Resurrection) -> None:
    weight, mask, gate = unit.weight.weight.detach(), unit.weight.mask, model.get_buffer("weight_mask")
    held, resurrecting = model.get_buffer("weight_alive_mask"), model.get_buffer("weight_resurrecting")
    if unit.mode is Mode.RESU:
        assert gate.all() and mask is held and not mask.all() and not (unit.trainable & mask).any() and resurrecting
        assert not weight[~mask & ~unit.trainable].any()
    else:
        assert mask is gate and not unit.trainable.any() and not held.any() and not resurrecting
        assert not weight[~mask].any() and unit.mode is (Mode.DENSE if mask.all() else Mode.SPARSE)
    assert torch.equal(fnn.masks(model)["weight"], mask)
    x = torch.randn(3, 5, dtype=DOUBLE)
    assert torch.equal(model(x), F.linear(x, torch.where(gate, weight, 0.0)))


# Transitions, on every route

LEGAL = {
    (Mode.DENSE, "set_mask"): Mode.SPARSE,
    (Mode.SPARSE, "set_mask"): Mode.SPARSE,
    (Mode.SPARSE, "clear_mask"): Mode.DENSE,
    (Mode.DENSE, "clear_mask"): Mode.DENSE,
    (Mode.SPARSE, "enter"): Mode.RESU,
    (Mode.RESU, "discard"): Mode.SPARSE,
    (Mode.RESU, "commit"): Mode.SPARSE,
    (Mode.RESU, "write_theta_"): Mode.RESU,
}
ACTS = {
    "set_mask": lambda model, unit: fnn.set_masks(model, {"weight": half(4, 5, seed=9)}),
    "clear_mask": lambda model, unit: unit.weight.set_mask_(torch.ones(4, 5, dtype=torch.bool)),
    "enter": lambda model, unit: unit.enter(),
    "discard": lambda model, unit: unit.discard(),
    "commit": lambda model, unit: unit.commit(half(4, 5, seed=9)),
    "write_theta_": lambda model, unit: unit.write_theta_(torch.zeros(4, 5, dtype=DOUBLE)),
}


@pytest.mark.parametrize(("mode", "act", "route"), list(itertools.product(Mode, ACTS, ROUTES)))
def test_every_transition(mode, act, route):
    model, unit = unit_in(mode, route)
    before = snapshot(model)
    if (mode, act) in LEGAL:
        ACTS[act](model, unit)
        assert unit.mode is LEGAL[mode, act]
    else:
        with pytest.raises(ConfigError, match="mode"):
            ACTS[act](model, unit)
        assert unit.mode is mode
        assert_unchanged(model, before)
    assert_invariants(model, unit)


@settings(max_examples=30, deadline=None)
@given(acts=st.lists(st.sampled_from(sorted(ACTS)), max_size=10), route=st.sampled_from(ROUTES))
def test_invariants_hold_along_every_path(acts, route):
    model, unit = unit_in(Mode.DENSE, route)
    for act in acts:
        expected = LEGAL.get((unit.mode, act))
        if expected is None:
            with pytest.raises(ConfigError):
                ACTS[act](model, unit)
        else:
            ACTS[act](model, unit)
            assert unit.mode is expected
        assert_invariants(model, unit)


def test_a_phase_refuses_what_would_hide_theta():
    model, unit = unit_in(Mode.RESU)
    for act in (model.to_dense, lambda: fnn.check_mask_edit(model), unit.remove):
        with pytest.raises(ConfigError, match="mode"):
            act()
    with pytest.raises(TypeError):
        unit.commit()  # a commit without a new mask is not offered


def test_remove_and_to_dense_leave_nothing_behind():
    model, unit = unit_in(Mode.SPARSE)
    dense = model.to_dense()
    assert list(dense.state_dict()) == ["weight"] and set(dense.__dict__) == set(nn.Linear(1, 1).__dict__)
    unit.remove()
    assert list(model.state_dict()) == ["weight", "weight_mask"]
    model, unit = unit_in(Mode.SPARSE, Route.PARAMETER)
    fnn.remove_mask(model, "weight")
    assert list(model.state_dict()) == ["weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -0.1}, r"`epsilon` \(=-0.1\)"),
        ({"epsilon": math.nan}, "`epsilon`"),
        ({"trainable": torch.ones(4, 5, dtype=torch.bool)}, "dead weights only"),
        ({"trainable": torch.zeros(5, 4, dtype=torch.bool)}, r"\(5, 4\)"),
        ({"trainable": torch.zeros(4, 5)}, "torch.float32"),
    ],
)
def test_enter_refuses_and_changes_nothing(options, message):
    model, unit = unit_in(Mode.SPARSE)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        unit.enter(**options)
    assert_unchanged(model, before)


def test_commit_obeys_the_pattern_and_is_atomic():
    mask = torch.tensor([[True, True, False, False]] * 4)
    layer = fnn.Linear(4, 4, bias=False, pattern=NByM(2, 4), mask=mask)
    unit = unit_of(layer)
    unit.enter()
    before = snapshot(layer)
    for bad in (torch.eye(4, dtype=torch.bool), torch.ones(5, 4, dtype=torch.bool), torch.ones(4, 4)):
        with pytest.raises(ConfigError):
            unit.commit(bad)
        assert_unchanged(layer, before)
    held = layer.weight.detach().clone()
    unit.commit(~mask)
    assert unit.mode is Mode.SPARSE and torch.equal(layer.weight, torch.where(mask, 0.0, held)) and held[~mask].all()


def test_commit_of_the_full_mask_revives_everything():
    model, unit = unit_in(Mode.RESU)
    x = torch.randn(2, 5, dtype=DOUBLE)
    expected = model(x)
    unit.commit(torch.ones(4, 5, dtype=torch.bool))
    assert unit.mode is Mode.DENSE and torch.equal(model(x), expected)
    assert_invariants(model, unit)


@pytest.mark.parametrize("route", ROUTES)
def test_the_gradient_of_a_phase_is_dense(route):
    model, unit = unit_in(Mode.RESU, route)
    model(torch.randn(2, 5, dtype=DOUBLE)).square().sum().backward()
    assert unit.weight.weight.grad.all()
    unit.discard()
    model.zero_grad()
    model(torch.randn(2, 5, dtype=DOUBLE)).square().sum().backward()
    assert torch.equal(unit.weight.weight.grad != 0, unit.weight.mask)


def test_a_tied_weight_opens_everywhere():
    first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    second.weight = first.weight
    model = nn.Sequential(fnn.Linear.from_dense(first, mask=half(5, 5)), second)
    fnn.tie_masks(model)
    unit = Resurrection(masked_weights(model)["0.weight"])
    dense = copy.deepcopy(nn.Sequential(first, second))
    unit.enter(seed=3)
    x = torch.randn(2, 5)
    with torch.no_grad():
        dense[0].weight.copy_(model[0].weight)
    assert unit.weight.weight.all() and torch.equal(model(x), dense(x))
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    again = Resurrection(masked_weights(copied)["0.weight"])
    again.discard()
    assert not model[0].weight_mask[~unit.weight.mask].sum() < unit.weight.mask.logical_not().sum()
    assert not copied[1].weight[~unit.weight.mask].any() and unit.mode is Mode.RESU


# Theta


def test_theta_starts_by_the_std_of_the_alive_weights():
    torch.manual_seed(0)
    layer = fnn.Linear(400, 300, bias=False, mask=half(300, 400))
    unit = unit_of(layer)
    values = layer.weight.detach()[layer.weight_mask].double().tolist()
    mean = sum(values) / len(values)
    sigma = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    for init, spread in ((ThetaInit.NORMAL, 0.1 * sigma), (ThetaInit.UNIFORM, 0.1 * sigma / math.sqrt(3))):
        scale = unit.enter(init, seed=1)
        assert abs(scale / (0.1 * sigma) - 1) < 1e-9 and unit.theta.numel() == int((~unit.weight.mask).sum())
        assert abs(float(unit.theta.std()) / spread - 1) < 0.02 and abs(float(unit.theta.mean())) < 0.02 * spread
        if init is ThetaInit.UNIFORM:
            assert float(unit.theta.abs().max()) <= 0.1 * sigma * (1 + 1e-6)
        start = theta_start(init, scale, unit.weight.mask, unit.trainable, generator(1, 0, 0, "theta"))
        assert torch.equal(start.to(layer.weight), torch.where(unit.weight.mask, 0.0, layer.weight.detach()))
        unit.discard()
        assert layer.weight.detach()[layer.weight_mask].double().tolist() == values
    unit.enter(ThetaInit.ZERO)
    assert not unit.theta.any()


@pytest.mark.parametrize("alive", [0, 1, 3])
def test_theta_scale_without_a_std(alive):
    mask = torch.zeros(50, 40, dtype=torch.bool)
    mask.view(-1)[:alive] = True
    layer = fnn.Linear(40, 50, bias=False, dtype=DOUBLE, mask=mask)
    with torch.no_grad():
        layer.weight[mask] = 2.0  # one element has no std, equal ones have std 0
    unit = unit_of(layer)
    assert unit.enter(epsilon=1.0) == 1 / math.sqrt(40)
    assert abs(float(unit.theta.std()) * math.sqrt(40) - 1) < 0.1
    conv = fnn.Conv2d(8, 16, 5, groups=2, dtype=DOUBLE, mask=torch.zeros(16, 4, 5, 5, dtype=torch.bool))
    assert unit_of(conv).enter(epsilon=1.0) == 1 / math.sqrt(4 * 25)


def test_theta_draws_are_keyed_and_leave_the_rng_alone():
    thetas = []
    for key in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        torch.manual_seed(len(thetas))
        _, unit = unit_in(Mode.SPARSE)
        state = torch.get_rng_state()
        unit.enter(seed=key[0], tensor_index=key[1], update_index=key[2])
        assert torch.equal(torch.get_rng_state(), state)
        thetas.append(unit.theta)
    assert torch.equal(thetas[0], thetas[1])
    assert not any(torch.equal(thetas[0], theta) for theta in thetas[2:])


def test_theta_is_in_index_order_and_zero_outside_the_trainable_set():
    model, unit = unit_in(Mode.SPARSE)
    full = unit_in(Mode.RESU)[1].theta
    dead = ~unit.weight.mask
    trainable = dead & half(4, 5, seed=4)
    assert trainable.any() and (dead & ~trainable).any()
    unit.enter(trainable=trainable)
    expected = [model.weight[i, j].item() for i in range(4) for j in range(5) if dead[i, j]]
    assert unit.theta.tolist() == expected
    assert torch.equal(unit.theta, torch.where(trainable[dead], full, 0.0))
    held = model.weight.detach().clone()
    unit.write_theta_(torch.full((4, 5), 9.0, dtype=DOUBLE))
    assert torch.equal(model.weight, torch.where(trainable, 9.0, held))


# The oracle


class Compact(nn.Module):
    """The oracle: theta is a tensor of its own, W_eff = M * W + Phi(theta)."""

    def __init__(self, unit: Resurrection) -> None:
        super().__init__()
        weight = unit.weight.weight.detach()
        self.mask = unit.weight.mask.clone()
        self.weight = torch.where(self.mask, weight, 0.0)
        pairs = zip(weight.flatten().tolist(), self.mask.flatten().tolist(), strict=True)
        self.theta = nn.Parameter(torch.tensor([value for value, alive in pairs if not alive], dtype=weight.dtype))

    def effective_weight(self) -> torch.Tensor:
        """Phi puts theta at the dead positions in index order."""
        positions = (~self.mask).flatten().nonzero().flatten()
        scattered = torch.zeros(self.mask.numel(), dtype=self.theta.dtype).index_put((positions,), self.theta)
        return torch.where(self.mask, self.weight, scattered.reshape(self.mask.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.effective_weight())


def by_sgd(theta, gradient, state, t):
    return theta - gradient * 0.1


def by_momentum(theta, gradient, state, t):
    state["m"] = state.get("m", torch.zeros_like(theta)) * 0.9 + gradient * (1 - 0.9)
    return theta - state["m"] * 0.1


def by_adamw(theta, gradient, state, t):
    state["m"] = state.get("m", torch.zeros_like(theta)) * 0.9 + gradient * (1 - 0.9)
    state["v"] = state.get("v", torch.zeros_like(theta)) * 0.999 + gradient * gradient * (1 - 0.999)
    m, v = state["m"] / (1 - 0.9**t), state["v"] / (1 - 0.999**t)
    return theta * (1 - 0.1 * 0.01) - m / (v.sqrt() + 1e-8) * 0.1


def by_selection(theta, gradient, state, t):
    size = gradient.abs()
    state["m"] = state.get("m", torch.zeros_like(theta)) * 0.9 + gradient * (1 - 0.9)
    state["v"] = state.get("v", torch.zeros_like(theta)) * 0.9 + size * (1 - 0.9)
    factor = state["m"].abs() / (state["v"] + 1e-8) if t > 3 else torch.ones_like(theta)
    p, values = theta.numel(), [(-float(size[i]), i) for i in range(theta.numel())]
    large = [i for _, i in sorted(values)[: max(1, int(0.5 * p + 1e-6))]]
    both = [i for i in large if t <= 3 or factor[i] > 0.5]
    chosen = both[: max(1, int(0.2 * p + 1e-6))]
    moved = theta.clone()
    moved[chosen] = (theta - gradient * factor * 0.1)[chosen]
    return moved


RULES = {
    "sgd": (ThetaSGD(lr=0.1), by_sgd),
    "momentum": (ThetaMomentum(lr=0.1), by_momentum),
    "adamw": (ThetaAdamW(lr=0.1, weight_decay=0.01), by_adamw),
    "selective": (Selective(lr=0.1, warm_up=3), by_selection),
}


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [(5, 4), (37, 23)])
def test_in_place_storage_equals_compact_storage_bit_for_bit(rule, dtype, sizes):
    model = model_of(Route.MODULE, sizes, dtype)
    unit = unit_of(model)
    unit.weight.set_mask_(half(sizes[1], sizes[0]))
    unit.enter(seed=5)
    oracle, (ours, theirs) = Compact(unit), RULES[rule]
    mask, alive, start = unit.weight.mask.clone(), model.weight.detach()[unit.weight.mask].clone(), unit.theta
    state, expected_state = {}, {}
    for step in range(1, 9):
        x = torch.randn(6, sizes[0], generator=torch.Generator().manual_seed(step)).to(dtype)
        model.zero_grad()
        oracle.zero_grad()
        loss, expected = model(x).square().mean(), oracle(x).square().mean()
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
        given = torch.where(unit.trainable, model.weight.grad, 0.0)
        assert torch.equal(given[~mask], oracle.theta.grad)
        with torch.no_grad():
            unit.write_theta_(ours.step(model.weight.detach(), given, unit.trainable, state, 0.1))
            oracle.theta.copy_(theirs(oracle.theta.detach(), oracle.theta.grad, expected_state, step))
        assert torch.equal(model.weight, oracle.effective_weight())
    assert torch.equal(model.weight.detach()[mask], alive) and torch.equal(unit.weight.mask, mask)
    assert (unit.theta != start).any()


TORCH = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "foreach": True}),
    "adagrad": (torch.optim.Adagrad, {}),
    "fused adam": (torch.optim.Adam, {"fused": True}),
}


@pytest.mark.parametrize("name", TORCH)
def test_any_torch_optimizer_equals_itself_on_compact_theta(name):
    kind, options = TORCH[name]
    model, unit = unit_in(Mode.RESU)
    oracle, rule, state = Compact(unit), ThetaOptimizer(0.05, kind=kind, options=tuple(options.items())), {}
    optimizer = kind([oracle.theta], lr=0.05, **options, weight_decay=0.0)
    for step in range(6):
        x = torch.randn(6, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        oracle.zero_grad()
        model(x).square().mean().backward()
        oracle(x).square().mean().backward()
        optimizer.step()
        given = torch.where(unit.trainable, model.weight.grad, 0.0)
        with torch.no_grad():
            unit.write_theta_(rule.step(model.weight.detach(), given, unit.trainable, state, 0.05))
        assert torch.allclose(model.weight, oracle.effective_weight(), rtol=1e-13, atol=1e-15)


def test_golden_phase():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]], dtype=DOUBLE)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], dtype=DOUBLE)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    cases = (
        (ThetaSGD(), (0.275, 0.1)),
        (ThetaMomentum(), (0.4775, 0.01)),
        (ThetaAdamW(weight_decay=0.01), (0.3995, 0.1)),
    )
    for rule, expected in cases:
        layer = fnn.Linear(3, 2, bias=False, dtype=DOUBLE, mask=mask)
        with torch.no_grad():
            layer.weight.copy_(torch.where(mask, weight, 0.0))
        unit = unit_of(layer)
        unit.enter(ThetaInit.ZERO)
        unit.write_theta_(weight)  # theta = (.5, 0)
        loss = (layer(x) - targets).square().sum() / 4
        assert loss.item() == 3.0625
        loss.backward()
        assert layer.weight.grad.tolist() == [[0.5, -1.25, 2.25], [-1.0, 0.5, -2.5]]
        with torch.no_grad():
            given = torch.where(unit.trainable, layer.weight.grad, 0.0)
            unit.write_theta_(rule.step(layer.weight.detach(), given, unit.trainable, {}, 0.1))
        assert torch.allclose(unit.theta, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=1e-7)
        assert layer.weight.detach()[mask].tolist() == weight[mask].tolist()


def test_gradcheck_of_the_scattered_weight():
    model, unit = unit_in(Mode.RESU)
    oracle = Compact(unit)
    x = torch.randn(2, 5, dtype=DOUBLE)

    def through_theta(theta: torch.Tensor) -> torch.Tensor:
        positions = (~oracle.mask).flatten().nonzero().flatten()
        whole = oracle.weight.flatten().index_put((positions,), theta).reshape(4, 5)
        return torch.func.functional_call(model, {"weight": whole}, (x,))

    assert torch.autograd.gradcheck(through_theta, (oracle.theta.detach().requires_grad_(),))


# State


@pytest.mark.parametrize(("mode", "into", "assign"), list(itertools.product(Mode, Mode, [False, True])))
def test_state_dicts_restore_every_mode_into_every_mode(mode, into, assign):
    source, (model, unit) = unit_in(mode)[0], unit_in(into)
    buffers = {name: model.get_buffer(name) for name in ("weight_mask", *COMPANIONS)}
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    model.load_state_dict(torch.load(stream, weights_only=True), assign=assign)
    unit = unit_of(model)
    assert unit.mode is mode
    assert_unchanged(model, snapshot(source))
    assert_invariants(model, unit)
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole(duplicate, route):
    model, unit = unit_in(Mode.RESU, route)
    other = duplicate(model)
    again = unit_of(other)
    assert again.mode is Mode.RESU
    assert_unchanged(other, snapshot(model))
    again.discard()
    assert unit.mode is Mode.RESU and unit.theta.all()


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("key", ["weight_mask", *COMPANIONS])
@pytest.mark.parametrize("strict", [True, False])
def test_a_missing_part_is_an_error(mode, key, strict):
    model = nn.Sequential(unit_in(Mode.SPARSE)[0])
    state = nn.Sequential(unit_in(mode)[0]).state_dict()
    del state[f"0.{key}"]
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=f"lacks .*{key}"):
        model.load_state_dict(state, strict=strict)
    assert_unchanged(model, before)


@pytest.mark.parametrize("mode", [Mode.DENSE, Mode.SPARSE])
def test_a_dense_checkpoint_loads_outside_a_phase(mode):
    (model, unit), dense = unit_in(mode), nn.Linear(5, 4, bias=False, dtype=DOUBLE)
    assert not model.load_state_dict(dense.state_dict()).missing_keys and unit.mode is mode
    assert torch.equal(model.weight, torch.where(unit.weight.mask, dense.weight, 0.0))


def test_a_dense_checkpoint_is_refused_in_a_phase():
    model, _ = unit_in(Mode.RESU)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="commit, discard or detach"):
        model.load_state_dict(nn.Linear(5, 4, bias=False, dtype=DOUBLE).state_dict())
    assert_unchanged(model, before)


@pytest.mark.parametrize("mode", list(Mode))
def test_a_plain_sparse_checkpoint_means_sparse(mode):
    model, unit = unit_in(mode)
    layer = fnn.Linear(5, 4, bias=False, dtype=DOUBLE, mask=half(4, 5, seed=2))
    model.load_state_dict(layer.state_dict())
    assert unit.mode is Mode.SPARSE and torch.equal(unit.weight.mask, layer.weight_mask)
    assert torch.equal(model.weight, layer.weight)
    assert_invariants(model, unit)


CORRUPT = {
    "no phase, yet held masks": ("weight_resurrecting", lambda value: torch.zeros_like(value)),
    "the mode is no bool": ("weight_resurrecting", lambda value: value.float()),
    "trainable is alive": ("weight_trainable", lambda value: torch.ones_like(value)),
    "mask shape": ("weight_alive_mask", lambda value: value.T),
    "mask dtype": ("weight_alive_mask", lambda value: value.float()),
    "a closed mask": ("weight_mask", lambda value: half(4, 5)),
    "nothing is dead": ("weight_alive_mask", lambda value: torch.ones_like(value)),
}


@pytest.mark.parametrize("how", CORRUPT)
def test_a_contradicting_state_is_refused_untouched(how):
    model, state = unit_in(Mode.SPARSE)[0], snapshot(unit_in(Mode.RESU)[0])
    key, change = CORRUPT[how]
    state[key] = change(state[key])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="the state of `weight`|masks in the state"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_held_masks_that_break_the_pattern_are_refused_untouched():
    mask = torch.tensor([[True, True, False, False]] * 4)
    layer = fnn.Linear(4, 4, bias=False, pattern=NByM(2, 4), mask=mask)
    unit_of(layer)
    other = fnn.Linear(4, 4, bias=False, mask=torch.eye(4, dtype=torch.bool))
    unit_of(other).enter()
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="NByM"):
        layer.load_state_dict(other.state_dict())
    assert_unchanged(layer, before)


def test_a_row_order_stays_with_the_held_mask():
    order = torch.tensor([3, 1, 2, 0])
    layer = fnn.Linear(4, 4, bias=False, pattern=SharedSupport(2))
    mask = SharedSupport(2).mask(torch.rand(4, 4), 0.5, row_order=order)
    unit = unit_of(layer)
    unit.weight.set_mask_(mask, order)
    unit.enter()
    fresh = fnn.Linear(4, 4, bias=False, pattern=SharedSupport(2))
    again = unit_of(fresh)
    again.weight.set_mask_(torch.ones(4, 4, dtype=torch.bool), torch.arange(4))
    fresh.load_state_dict(layer.state_dict())
    assert again.mode is Mode.RESU and torch.equal(again.weight.mask, mask)


# The rest of the model


@pytest.mark.parametrize("route", ROUTES)
def test_a_whole_cycle_compiles_once(route):
    gc.collect()  # a collector that is still active breaks every compiled graph
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, unit = unit_in(Mode.DENSE, route)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(2, 5, dtype=DOUBLE)
    assert torch.equal(compiled(x), model(x))
    for act in ("set_mask", "enter", "write_theta_", "commit", "enter", "discard", "clear_mask"):
        ACTS[act](model, unit)
        assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 1


def test_buffers_keep_their_storage_through_a_cycle():
    model, unit = unit_in(Mode.DENSE)
    names = ("weight_mask", *COMPANIONS)
    storages = [model.get_buffer(name).data_ptr() for name in names]
    for act in ("set_mask", "enter", "write_theta_", "commit", "clear_mask"):
        ACTS[act](model, unit)
    assert [model.get_buffer(name).data_ptr() for name in names] == storages


def test_a_name_that_is_taken_is_refused():
    layer = fnn.Linear(3, 2, bias=False)
    layer.register_buffer("weight_trainable", torch.zeros(1))
    with pytest.raises(ConfigError, match="weight_trainable"):
        unit_of(layer)
    assert list(layer.state_dict()) == ["weight", "weight_mask", "weight_trainable"]
