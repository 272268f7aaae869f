"""Resurrection units: modes, storage, transitions, state; compact storage is the oracle."""

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
from fxsparse.nn import DenseGradients, Guard, MaskSpec, Mode, RESULinear, ThetaInit
from fxsparse.sparsity import NByM, SharedSupport

KINDS = tuple(fnn.RESU_TYPES.items())
IDS = [dense.__name__ for dense, _ in KINDS]


def half(*shape: int, seed: int = 0) -> torch.Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask.view(-1)[:2] = torch.tensor([True, False])
    return mask


def unit_in(mode: Mode, **kwargs: object) -> RESULinear:
    torch.manual_seed(0)
    unit = RESULinear(5, 4, dtype=torch.float64, mask=None if mask_free(mode) else half(4, 5), **kwargs)
    if mode is Mode.RESU:
        unit.enter_resu()
    return unit


def mask_free(mode: Mode) -> bool:
    return mode is Mode.DENSE


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = module.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def assert_invariants(unit: fnn.RESUModule) -> None:
    mask, forward, trainable = unit.weight_mask, unit.weight_forward_mask, unit.weight_trainable
    if unit.mode is Mode.RESU:
        assert forward.all() and not mask.all() and not (trainable & mask).any()
        assert not unit.weight[~mask & ~trainable].any()
    else:
        assert torch.equal(forward, mask) and not trainable.any()
        assert not unit.weight[~mask].any()
        assert unit.mode is Mode.SPARSE or mask.all()
    assert torch.equal(unit.effective_weight, torch.where(forward, unit.weight, 0.0))


class CompactRESU(nn.Module):
    """The oracle: theta is a tensor of its own, W_eff = M * W + Phi(theta)."""

    def __init__(self, unit: RESULinear) -> None:
        super().__init__()
        self.mask = unit.weight_mask.clone()
        self.weight = torch.where(self.mask, unit.weight.detach(), 0.0)
        self.bias = unit.bias.detach().clone()
        flat = [
            value for value, alive in zip(unit.weight.flatten().tolist(), self.mask.flatten(), strict=True) if not alive
        ]
        self.theta = nn.Parameter(torch.tensor(flat, dtype=unit.weight.dtype))

    def effective_weight(self) -> torch.Tensor:
        """Phi puts theta at the dead positions in index order."""
        positions = (~self.mask).flatten().nonzero().flatten()
        scattered = torch.zeros(self.mask.numel(), dtype=self.theta.dtype).index_put((positions,), self.theta)
        return torch.where(self.mask, self.weight, scattered.reshape(self.mask.shape))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.effective_weight(), self.bias)


# Forward


@pytest.mark.parametrize(("dense_type", "kind"), KINDS, ids=IDS)
def test_forward_in_every_mode(dense_type, kind):
    sizes = (4, 6) if dense_type is nn.Linear else (4, 6, 3)
    dense = dense_type(*sizes)
    input = torch.randn((2, 4) if dense_type is nn.Linear else (2, 4, 6, 5, 4)[: dense.weight.ndim])
    unit = kind.from_dense(dense)
    assert isinstance(unit, dense_type) and isinstance(unit, fnn.SPARSE_TYPES[dense_type])
    assert unit.mode is Mode.DENSE and torch.equal(unit(input), dense(input)) and unit.weight is dense.weight
    mask = half(*dense.weight.shape)
    unit.set_mask(mask)
    sparse = copy.deepcopy(dense)
    assert unit.mode is Mode.SPARSE and torch.equal(unit(input), sparse(input)) and torch.equal(unit.weight == 0, ~mask)
    unit.enter_resu(seed=3)
    assert unit.mode is Mode.RESU and unit.theta.all()
    assert torch.equal(unit(input), dense(input))  # the dense module reads the very same weight
    assert not torch.equal(unit(input), sparse(input))
    assert_invariants(unit)
    unit.discard()
    assert torch.equal(unit(input), sparse(input)) and unit.mode is Mode.SPARSE


def test_constructor_modes_and_representation():
    assert RESULinear(3, 2).mode is Mode.DENSE
    unit = RESULinear(3, 2, False, pattern=SharedSupport(2), mask=torch.tensor([[True, False, True]] * 2))
    assert unit.mode is Mode.SPARSE and repr(unit).endswith("mode=sparse)") and "density=0.6667" in repr(unit)
    assert list(unit.state_dict()) == [
        "weight", "weight_mask", "weight_forward_mask", "weight_trainable", "_extra_state"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="Guard.FORWARD"):
        RESULinear.from_dense(nn.Linear(2, 2), MaskSpec(guard=Guard.GRADIENT))


def test_from_a_sparse_module():
    order = torch.tensor([1, 0])
    layer = fnn.Linear(3, 2, pattern=SharedSupport(1), mask=torch.tensor([[True, False, False], [False, True, False]]))
    fnn.masked_weights(layer)["weight"].set_mask_(layer.weight_mask, order)
    unit = RESULinear.from_dense(layer)
    assert unit.weight is layer.weight and unit.mode is Mode.SPARSE and unit.mask_spec == layer.mask_spec
    assert torch.equal(unit.weight_mask, layer.weight_mask) and torch.equal(unit.weight_row_order, order)
    assert not unit.weight[~unit.weight_mask].any()
    assert type(unit.to_dense()) is nn.Linear


# Transitions


LEGAL = {
    (Mode.DENSE, "set_mask"): Mode.SPARSE,
    (Mode.SPARSE, "set_mask"): Mode.SPARSE,
    (Mode.SPARSE, "clear_mask"): Mode.DENSE,
    (Mode.SPARSE, "enter_resu"): Mode.RESU,
    (Mode.RESU, "discard"): Mode.SPARSE,
    (Mode.RESU, "commit"): Mode.SPARSE,
}
ACTS = {
    "set_mask": lambda unit: unit.set_mask(half(4, 5, seed=9)),
    "set_masks": lambda unit: fnn.set_masks(unit, {"weight": half(4, 5, seed=9)}),
    "clear_mask": lambda unit: unit.clear_mask(),
    "enter_resu": lambda unit: unit.enter_resu(),
    "discard": lambda unit: unit.discard(),
    "commit": lambda unit: unit.commit(half(4, 5, seed=9)),
    "write_theta_": lambda unit: unit.write_theta_(torch.zeros(4, 5, dtype=torch.float64)),
    "theta_gradient": lambda unit: unit.theta_gradient(),
    "active_gradient": lambda unit: unit.active_gradient(),
    "to_dense": lambda unit: unit.to_dense(),
}
LEGAL |= {(mode, "set_masks"): target for (mode, act), target in LEGAL.items() if act == "set_mask"}
LEGAL |= {(Mode.RESU, act): Mode.RESU for act in ("write_theta_", "theta_gradient", "active_gradient")}
LEGAL |= {(mode, "to_dense"): mode for mode in (Mode.DENSE, Mode.SPARSE)}


@pytest.mark.parametrize(("mode", "act"), list(itertools.product(Mode, ACTS)))
def test_every_transition(mode, act):
    unit = unit_in(mode)
    before = snapshot(unit)
    if (mode, act) in LEGAL:
        ACTS[act](unit)
        assert unit.mode is LEGAL[mode, act]
        assert_invariants(unit)
    else:
        with pytest.raises(ConfigError, match=str(mode)):
            ACTS[act](unit)
        assert unit.mode is mode
        assert_unchanged(unit, before)


def test_enter_needs_a_dead_weight():
    unit = unit_in(Mode.DENSE)
    unit.set_mask(torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ConfigError, match="no dead weight"):
        unit.enter_resu()
    assert unit.mode is Mode.SPARSE


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
    unit = unit_in(Mode.SPARSE)
    before = snapshot(unit)
    with pytest.raises(ConfigError, match=message):
        unit.enter_resu(**options)
    assert_unchanged(unit, before)


@pytest.mark.parametrize("mask", [torch.ones(5, 4, dtype=torch.bool), torch.ones(4, 5)])
def test_commit_refuses_and_changes_nothing(mask):
    unit = unit_in(Mode.RESU)
    before = snapshot(unit)
    with pytest.raises(ConfigError):
        unit.commit(mask)
    assert_unchanged(unit, before)
    with pytest.raises(TypeError):
        unit.commit()  # a commit without a new mask is not offered


def test_commit_obeys_the_pattern():
    mask = torch.tensor([[True, True, False, False]] * 4)
    unit = RESULinear(4, 4, pattern=NByM(2, 4), mask=mask)
    unit.enter_resu()
    with pytest.raises(ConfigError, match="NByM"):
        unit.commit(torch.eye(4, dtype=torch.bool))
    unit.commit(~mask)
    assert unit.mode is Mode.SPARSE and unit.weight[~mask].all()


def test_commit_zeroes_losers_and_keeps_winners():
    unit = unit_in(Mode.RESU)
    held, mask = unit.weight.detach().clone(), half(4, 5, seed=9)
    unit.commit(mask)
    assert torch.equal(unit.weight, torch.where(mask, held, 0.0))


def test_commit_of_the_full_mask_revives_everything():
    unit = unit_in(Mode.RESU)
    input = torch.randn(2, 5, dtype=torch.float64)
    expected = unit(input)
    unit.commit(torch.ones(4, 5, dtype=torch.bool))
    assert unit.mode is Mode.DENSE and torch.equal(unit(input), expected)
    assert_invariants(unit)


@settings(max_examples=40, deadline=None)
@given(acts=st.lists(st.sampled_from(sorted(ACTS)), max_size=12), seed=st.integers(0, 99))
def test_invariants_hold_along_every_path(acts, seed):
    unit = unit_in(Mode.DENSE)
    for index, act in enumerate(acts):
        expected = LEGAL.get((unit.mode, act))
        if expected is None:
            with pytest.raises(ConfigError):
                ACTS[act](unit)
        else:
            ACTS[act](unit)
            assert unit.mode is expected
            with torch.no_grad():  # an optimizer moved what is alive
                unit.weight.add_(0.01 * (seed + index + 1) * (unit.weight_forward_mask & (unit.weight != 0)))
        assert_invariants(unit)


# Theta


def test_theta_starts_by_the_std_of_the_alive_weights():
    torch.manual_seed(0)
    unit = RESULinear(400, 300, mask=half(300, 400))
    alive = unit.weight.detach()[unit.weight_mask].double()
    values = alive.tolist()
    mean = sum(values) / len(values)
    sigma = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    for init, spread in ((ThetaInit.NORMAL, 0.1 * sigma), (ThetaInit.UNIFORM, 0.1 * sigma / math.sqrt(3))):
        unit.enter_resu(init, seed=1)
        assert unit.theta.numel() == int((~unit.weight_mask).sum())
        assert abs(float(unit.theta.std()) / spread - 1) < 0.02 and abs(float(unit.theta.mean())) < 0.02 * spread
        if init is ThetaInit.UNIFORM:
            assert float(unit.theta.abs().max()) <= 0.1 * sigma * (1 + 1e-6)
        assert torch.equal(unit.weight.detach()[unit.weight_mask].double(), alive)
        unit.discard()
    unit.enter_resu(ThetaInit.ZERO)
    assert not unit.theta.any()


@pytest.mark.parametrize("alive", [1, 3])
def test_theta_scale_without_a_std(alive):
    mask = torch.zeros(50, 40, dtype=torch.bool)
    mask.view(-1)[:alive] = True
    unit = RESULinear(40, 50, dtype=torch.float64, mask=mask)
    with torch.no_grad():
        unit.weight[mask] = 2.0  # one element has no std, equal ones have std 0
    unit.enter_resu(epsilon=1.0)
    assert abs(float(unit.theta.std()) * math.sqrt(40) - 1) < 0.1
    convolution = fnn.RESUConv2d(
        8, 16, 5, groups=2, dtype=torch.float64, mask=torch.zeros(16, 4, 5, 5, dtype=torch.bool)
    )
    convolution.enter_resu(epsilon=1.0)
    assert abs(float(convolution.theta.std()) * math.sqrt(4 * 25) - 1) < 0.1


def test_theta_draws_are_keyed_and_leave_the_rng_alone():
    state = torch.get_rng_state()
    thetas = []
    for key in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        torch.manual_seed(len(thetas))
        unit = unit_in(Mode.SPARSE)
        unit.enter_resu(seed=key[0], tensor_index=key[1], update_index=key[2])
        thetas.append(unit.theta)
    assert torch.equal(thetas[0], thetas[1])
    assert not any(torch.equal(thetas[0], theta) for theta in thetas[2:])
    torch.set_rng_state(state)
    unit = unit_in(Mode.SPARSE)
    state = torch.get_rng_state()
    unit.enter_resu()
    assert torch.equal(torch.get_rng_state(), state)


def test_theta_is_in_index_order_and_zero_outside_the_trainable_set():
    unit = unit_in(Mode.SPARSE)
    dead = ~unit.weight_mask
    trainable = dead & half(4, 5, seed=4)
    assert trainable.any() and (dead & ~trainable).any()
    full = unit_in(Mode.RESU).theta
    unit.enter_resu(trainable=trainable)
    expected = [unit.weight[i, j].item() for i in range(4) for j in range(5) if dead[i, j]]
    assert unit.theta.tolist() == expected
    chosen = trainable[dead]
    assert torch.equal(unit.theta, torch.where(chosen, full, 0.0))
    held = unit.weight.detach().clone()
    unit.write_theta_(torch.full((4, 5), 9.0, dtype=torch.float64))
    assert torch.equal(unit.weight, torch.where(trainable, 9.0, held))
    unit(torch.randn(2, 5, dtype=torch.float64)).square().sum().backward()
    assert torch.equal(unit.theta_gradient() != 0, trainable)


def test_gradient_shares():
    unit = unit_in(Mode.RESU)
    assert unit.theta_gradient() is None and unit.active_gradient() is None
    with DenseGradients() as gradients:
        unit(torch.randn(2, 5, dtype=torch.float64)).square().sum().backward()
    assert torch.equal(gradients.read(unit.weight_mask), unit.weight.grad) and unit.weight.grad.all()
    assert torch.equal(unit.theta_gradient(), unit.weight.grad * ~unit.weight_mask)
    assert unit.freeze_active and unit.active_gradient() is None
    unit.freeze_active = False
    assert torch.equal(unit.active_gradient(), unit.weight.grad * unit.weight_mask)
    unit.discard()
    unit.zero_grad()
    with DenseGradients() as gradients:
        unit(torch.randn(2, 5, dtype=torch.float64)).square().sum().backward()
    assert torch.equal(unit.weight.grad, gradients.read(unit.weight_mask) * unit.weight_mask)


# The oracle


class Rule:
    """The update rules, one rounding per operation, so that a value does not depend on its place in the tensor."""

    def __init__(self, theta: torch.Tensor, lr: float = 0.1, beta: float = 0.9, decay: float = 0.1) -> None:
        self.theta, self.lr, self.beta, self.decay = theta, lr, beta, decay
        self.first, self.second, self.steps = torch.zeros_like(theta), torch.zeros_like(theta), 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        self.theta.copy_(self.updated(self.theta, self.theta.grad))

    def updated(self, theta: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return theta - gradient * self.lr


class Momentum(Rule):
    def updated(self, theta: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        self.first = self.first * self.beta + gradient * (1 - self.beta)
        return theta - self.first * self.lr


class AdamW(Rule):
    def updated(self, theta: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        self.first = self.first * self.beta + gradient * (1 - self.beta)
        self.second = self.second * 0.999 + gradient * gradient * (1 - 0.999)
        first, second = self.first / (1 - self.beta**self.steps), self.second / (1 - 0.999**self.steps)
        return theta * (1 - self.lr * self.decay) - first / (second.sqrt() + 1e-8) * self.lr


RULES = {"sgd": Rule, "momentum": Momentum, "adamw": AdamW}
TORCH_RULES = {
    "torch sgd": lambda theta: torch.optim.SGD([theta], lr=0.1),
    "torch momentum": lambda theta: torch.optim.SGD([theta], lr=0.1, momentum=0.9, dampening=0.9),
    "torch nesterov": lambda theta: torch.optim.SGD([theta], lr=0.1, momentum=0.9, nesterov=True),
    "torch adamw": lambda theta: torch.optim.AdamW([theta], lr=0.03, weight_decay=0.1),
}
# torch's bfloat16 kernels round `a + alpha b` once in vector lanes and twice in the tail: those rules are not compared.
COMPARED = [(rule, dtype) for rule in RULES for dtype in (torch.float32, torch.float64, torch.bfloat16)]
COMPARED += [(rule, dtype) for rule in TORCH_RULES for dtype in (torch.float32, torch.float64)]


@pytest.mark.parametrize(("rule", "dtype"), COMPARED)
@pytest.mark.parametrize("sizes", [(5, 4), (37, 23)])
def test_in_place_storage_equals_compact_storage_bit_for_bit(rule, dtype, sizes):
    inputs = sizes[0]
    unit = unit_of(sizes, dtype)
    start = unit.theta
    oracle = CompactRESU(unit)
    mask, alive = unit.weight_mask.clone(), unit.weight.detach()[unit.weight_mask].clone()
    shadow = nn.Parameter(unit.weight.detach().clone())  # where the rule works; only its dead positions are taken over
    kind = {**RULES, **TORCH_RULES}[rule]
    ours, theirs = kind(shadow), kind(oracle.theta)
    for step in range(8):
        source = torch.Generator().manual_seed(step)
        input = torch.randn(6, inputs, generator=source).to(dtype)
        unit.zero_grad()
        oracle.zero_grad()
        loss, expected = unit(input).square().mean(), oracle(input).square().mean()
        assert torch.equal(loss, expected)
        loss.backward()
        expected.backward()
        assert torch.equal(unit.theta_gradient()[~mask], oracle.theta.grad)
        shadow.grad = unit.theta_gradient()
        ours.step()
        theirs.step()
        unit.write_theta_(shadow.detach())
        assert torch.equal(unit.weight, oracle.effective_weight())
        assert torch.equal(unit.theta, oracle.theta)
    assert torch.equal(unit.weight.detach()[mask], alive) and torch.equal(unit.weight_mask, mask)
    assert (unit.theta != start).any()


def unit_of(sizes: tuple[int, int], dtype: torch.dtype) -> RESULinear:
    torch.manual_seed(0)
    unit = RESULinear(*sizes, dtype=dtype, mask=half(sizes[1], sizes[0]))
    unit.enter_resu(seed=5)
    return unit


def test_golden_phase():
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    inputs = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for rule, expected in (("sgd", (0.275, 0.1)), ("momentum", (0.4775, 0.01)), ("adamw", (0.3995, 0.1))):
        unit = RESULinear(3, 2, bias=False, dtype=torch.float64, mask=mask)
        with torch.no_grad():
            unit.weight.copy_(torch.where(mask, weight, 0.0))
        unit.enter_resu(ThetaInit.ZERO)
        unit.write_theta_(weight)  # theta = (.5, 0)
        loss = (unit(inputs) - targets).square().sum() / 4
        assert loss.item() == 3.0625
        loss.backward()
        assert unit.weight.grad.tolist() == [[0.5, -1.25, 2.25], [-1.0, 0.5, -2.5]]
        shadow = nn.Parameter(unit.weight.detach().clone())
        shadow.grad = unit.theta_gradient()
        optimizer = {
            "sgd": torch.optim.SGD([shadow], lr=0.1),
            "momentum": torch.optim.SGD([shadow], lr=0.01),  # from m = 0: lr (1 - beta) g
            "adamw": torch.optim.AdamW([shadow], lr=0.1, weight_decay=0.01),
        }[rule]
        optimizer.step()
        unit.write_theta_(shadow.detach())
        assert torch.allclose(unit.theta, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
        assert unit.weight.detach()[mask].tolist() == weight[mask].tolist()
        if rule == "sgd":
            unit.commit(torch.tensor([[True, True, True], [False, True, False]]))
            assert torch.allclose(
                unit.weight, torch.tensor([[1, -2, 0.275], [0, 1, 0]], dtype=torch.float64), atol=1e-15
            )


def test_gradcheck_of_the_scattered_weight():
    unit = unit_in(Mode.RESU)
    oracle = CompactRESU(unit)
    input = torch.randn(2, 5, dtype=torch.float64)

    def through_theta(theta: torch.Tensor) -> torch.Tensor:
        positions = (~oracle.mask).flatten().nonzero().flatten()
        whole = oracle.weight.flatten().index_put((positions,), theta).reshape(4, 5)
        return torch.func.functional_call(unit, {"weight": whole}, (input,))

    assert torch.autograd.gradcheck(through_theta, (oracle.theta.detach().requires_grad_(),))


# State


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("into", list(Mode))
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_restore_every_mode_into_every_mode(mode, into, assign):
    source, unit = unit_in(mode), unit_in(into)
    source.freeze_active = False
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    unit.load_state_dict(torch.load(stream, weights_only=True), assign=assign)
    assert unit.mode is mode and not unit.freeze_active
    assert_unchanged(unit, snapshot(source))
    assert_invariants(unit)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unit: pickle.loads(pickle.dumps(unit))])
def test_copies_are_whole(duplicate):
    unit = unit_in(Mode.RESU)
    other = duplicate(unit)
    assert other.mode is Mode.RESU
    assert_unchanged(other, snapshot(unit))
    other.discard()
    assert unit.mode is Mode.RESU and unit.theta.all()


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("key", ["weight_mask", "weight_forward_mask", "weight_trainable", "_extra_state"])
@pytest.mark.parametrize("strict", [True, False])
def test_a_missing_part_is_an_error(mode, key, strict):
    unit = nn.Sequential(unit_in(Mode.SPARSE))
    state = nn.Sequential(unit_in(mode)).state_dict()
    del state[f"0.{key}"]
    before = snapshot(unit)
    with pytest.raises(RuntimeError, match=f"lacks {key}"):
        unit.load_state_dict(state, strict=strict)
    assert_unchanged(unit, before)


@pytest.mark.parametrize("mode", [Mode.DENSE, Mode.SPARSE])
def test_a_dense_checkpoint_loads_outside_a_phase(mode):
    unit, dense = unit_in(mode), nn.Linear(5, 4, dtype=torch.float64)
    result = unit.load_state_dict(dense.state_dict())
    assert not result.missing_keys and unit.mode is mode
    assert torch.equal(unit.weight, torch.where(unit.weight_mask, dense.weight, 0.0))
    assert_invariants(unit)


def test_a_dense_checkpoint_is_refused_in_a_phase():
    unit = unit_in(Mode.RESU)
    before = snapshot(unit)
    with pytest.raises(RuntimeError, match="commit or discard"):
        unit.load_state_dict(nn.Linear(5, 4, dtype=torch.float64).state_dict())
    assert_unchanged(unit, before)


@pytest.mark.parametrize("mode", list(Mode))
def test_a_plain_sparse_checkpoint_means_sparse(mode):
    unit = unit_in(mode)
    layer = fnn.Linear(5, 4, dtype=torch.float64, mask=half(4, 5, seed=2))
    unit.load_state_dict(layer.state_dict())
    assert unit.mode is Mode.SPARSE and torch.equal(unit.weight_mask, layer.weight_mask)
    assert torch.equal(unit.weight, layer.weight)
    assert_invariants(unit)


def corrupt(state: dict[str, torch.Tensor], how: str) -> None:
    if how == "mode out of range":
        state["_extra_state"][0] = 3
    elif how == "mode of another type":
        state["_extra_state"] = torch.tensor([1.0, 1.0])
    elif how == "mode contradicts masks":
        state["_extra_state"][0] = 1
    elif how == "trainable is alive":
        state["weight_trainable"].fill_(True)
    elif how == "mask shape":
        state["weight_forward_mask"] = torch.ones(5, 4, dtype=torch.bool)
    else:
        state["weight_mask"] = state["weight_mask"].float()


@pytest.mark.parametrize(
    "how",
    [
        "mode out of range",
        "mode of another type",
        "mode contradicts masks",
        "trainable is alive",
        "mask shape",
        "mask dtype",
    ],
)
def test_a_contradicting_state_is_refused_untouched(how):
    unit, state = unit_in(Mode.SPARSE), snapshot(unit_in(Mode.RESU))
    corrupt(state, how)
    before = snapshot(unit)
    with pytest.raises(RuntimeError, match="cannot be right"):
        unit.load_state_dict(state)
    assert_unchanged(unit, before)


def test_a_mask_that_breaks_the_pattern_is_refused_untouched():
    mask = torch.tensor([[True, True, False, False]] * 4)
    unit = RESULinear(4, 4, pattern=NByM(2, 4), mask=mask)
    state = RESULinear(4, 4, mask=torch.eye(4, dtype=torch.bool)).state_dict()
    before = snapshot(unit)
    with pytest.raises(RuntimeError, match="NByM"):
        unit.load_state_dict(state)
    assert_unchanged(unit, before)


def test_to_dense_leaves_nothing_behind():
    unit = unit_in(Mode.SPARSE)
    dense = unit.to_dense()
    assert type(dense) is nn.Linear and set(dense.__dict__) == set(nn.Linear(1, 1).__dict__)
    assert list(dense.state_dict()) == ["weight", "bias"]


# The rest of the model


def test_a_whole_cycle_compiles_once():
    gc.collect()  # a collector that is still active breaks every compiled graph
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    unit = RESULinear(5, 4, dtype=torch.float64)
    compiled = torch.compile(unit, backend=backend, fullgraph=True)
    input = torch.randn(2, 5, dtype=torch.float64)

    def check() -> None:
        assert torch.equal(compiled(input), unit(input))

    check()
    for act in ("set_mask", "enter_resu", "commit", "enter_resu", "discard", "clear_mask"):
        ACTS[act](unit)
        check()
    assert len(graphs) == 1


@pytest.mark.parametrize("assign", [False, True])
def test_buffers_keep_their_storage_through_a_cycle(assign):
    unit = unit_in(Mode.DENSE)
    names = ("weight_mask", "weight_forward_mask", "weight_trainable")
    buffers = [(getattr(unit, name), getattr(unit, name).data_ptr()) for name in names]
    for act in ("set_mask", "enter_resu", "write_theta_", "commit", "clear_mask"):
        ACTS[act](unit)
    unit.load_state_dict(unit_in(Mode.RESU).state_dict(), assign=assign)
    for name, (buffer, storage) in zip(names, buffers, strict=True):
        assert getattr(unit, name) is buffer and buffer.data_ptr() == storage


def test_a_weight_read_outside_cannot_enter():
    model = nn.ModuleDict({"table": nn.Embedding(4, 5), "head": nn.Linear(5, 4, bias=False)})
    model["head"].weight = model["table"].weight
    model["head"] = RESULinear.from_dense(model["head"], mask=half(4, 5))
    fnn.tie_masks(model)
    assert model["head"].mode is Mode.SPARSE and model["head"].mask_spec.guard is Guard.GRADIENT
    with pytest.raises(ConfigError, match="read outside its module"):
        model["head"].enter_resu()


def test_tying_to_another_mask_updates_the_forward():
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    model = nn.Sequential(RESULinear.from_dense(first), fnn.Linear.from_dense(second, mask=half(5, 5)))
    fnn.tie_masks(model)
    assert model[0].mode is Mode.SPARSE and torch.equal(model[0].weight_forward_mask, half(5, 5))
    assert_invariants(model[0])
