"""Weights that are computed from parameters: the weight that is used is exactly zero at dead entries."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations as P
from torch.nn.utils import parametrize

from fxsparse.errors import ConfigError, PassError
from fxsparse.graph.derivations import mask_place
from fxsparse.nn import DenseGradients, Guard, MaskSpec, Route, alive_gains, masks, set_masks
from fxsparse.passes import FoldMasks, MaskEffective
from fxsparse.planning import finalize, plan, transform
from fxsparse.sparsity import Channel, Layout, SharedSupport
from tests.weight_cases import EFFECTIVE, Standardised, StandardisedSame, WeightCase, gradients, train

pytestmark = pytest.mark.filterwarnings("ignore")
every = pytest.mark.parametrize("case", EFFECTIVE, ids=lambda case: case.name)


class Weights:
    """Notes the weight that every linear and convolution function takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        for name in ("linear", "conv2d"):
            self._watch(monkeypatch, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        if name == "linear":
            original: Callable[..., Tensor] = F.linear
            monkeypatch.setattr(nn.Linear, "forward", lambda m, x: self._note(original, x, m.weight, m.bias))
        else:
            forward = nn.Conv2d._conv_forward
            monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda m, x, w, b: self._note_conv(forward, m, x, w, b))

    def _note(self, function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        self.seen.append(weight.detach())
        return function(x, weight, bias)

    def _note_conv(
        self, forward: Callable[..., Tensor], m: nn.Module, x: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        self.seen.append(weight.detach())
        return forward(m, x, weight, bias)


@pytest.mark.parametrize("case", EFFECTIVE[:4], ids=lambda case: case.name)
def test_what_the_layers_use_is_zero_exactly_where_dead(case: WeightCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.8)
    for step in range(2):
        with monkeypatch.context() as patch:
            weights = Weights(patch)
            sparse(*inputs)
        assert len(weights.seen) == 3
        for weight, mask in zip(weights.seen, masks(sparse).values(), strict=True):
            assert torch.equal(weight == 0, ~mask)
        if step == 0:
            train(sparse, inputs, "adamw", 2)


def standardised_oracle(layer: Standardised, x: Tensor, mask: Tensor) -> Tensor:
    """Kernel by kernel: subtract the mean, divide by the deviation, scale, mask, convolve."""
    kernels = []
    for kernel, gain in zip(layer.weight, layer.gain.flatten(), strict=True):
        mean = kernel.sum() / kernel.numel()
        variance = ((kernel - mean) ** 2).sum() / kernel.numel()
        kernels.append((kernel - mean) / torch.sqrt(variance + 1e-6) * gain * 0.5)
    return F.conv2d(x, torch.stack(kernels) * mask, layer.bias)


@pytest.mark.parametrize("kind", [Standardised, StandardisedSame])
def test_standardised_kernels_are_masked_behind_the_standardisation(kind: type[Standardised]) -> None:
    model, x = nn.Sequential(kind(3, 4, 3), nn.Tanh(), kind(4, 2, 3)).double(), torch.randn(2, 3, 8, 8).double()
    sparse = transform(model, (x,), sparsity=0.7)
    assert {weight.route for weight in plan(model, (x,)).masked} == {Route.EFFECTIVE}
    train(sparse, (x,), "sgd", 2)
    first, second = (sparse.get_submodule(path) for path in ("0", "2"))
    found = masks(sparse)

    def oracle() -> Tensor:
        hidden = torch.tanh(standardised_oracle(first, x, found["0.weight"]))
        return standardised_oracle(second, hidden, found["2.weight"])

    torch.testing.assert_close(sparse(x), oracle(), rtol=1e-10, atol=1e-11)
    mine = gradients(sparse, (x,))
    sparse.zero_grad()
    output = oracle()
    (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).reshape(output.shape)).sum().backward()
    for name, gradient in mine.items():
        expected = sparse.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
        if name in found:
            assert not gradient[~found[name]].any() and bool(gradient[found[name]].any())


def test_gains_are_left_alone_and_can_be_asked_for() -> None:
    model, x = nn.Sequential(Standardised(3, 4, 3)), torch.randn(1, 3, 5, 5)
    decided = plan(model, (x,), sparsity=0.5)
    gain = next(weight for weight in decided.weights if weight.name == "0.gain")
    assert gain.route is None and "only scales or shifts what `batch_norm` computes" in gain.reason
    sparse = transform(model, (x,), sparsity=0.5, include="0.gain")
    train(sparse, (x,), "adamw")
    assert torch.equal(sparse.get_parameter("0.gain") == 0, ~masks(sparse)["0.gain"])


# --- weight norm: slices that die ------------------------------------------------------------------------------------


def weight_norms() -> list[Callable[[nn.Module], nn.Module]]:
    return [
        P.weight_norm,
        nn.utils.weight_norm,
        lambda m: P.weight_norm(m, dim=1),
        lambda m: P.weight_norm(m, dim=None),
    ]


@pytest.mark.parametrize("norm", weight_norms(), ids=["new", "old", "columns", "whole"])
def test_slices_without_alive_entries_are_zero_and_have_finite_gradients(norm: Callable[..., nn.Module]) -> None:
    model, x = nn.Sequential(norm(nn.Linear(4, 3)), nn.Linear(3, 2)).double(), torch.randn(5, 4).double()
    sparse = transform(model, (x,))
    name = next(name for name in masks(sparse) if name.startswith("0."))
    mask = torch.tensor([[True, True, False, False], [False] * 4, [True, False, True, False]])  # row 1, column 3
    set_masks(sparse, {name: mask})
    for whole in (mask, torch.zeros_like(mask)):
        set_masks(sparse, {name: whole})
        for optimizer in ("adamw", "sgd"):
            train(sparse, (x,), optimizer)
            assert all(bool(torch.isfinite(p.grad).all()) for p in sparse.parameters())
        sparse(x)
        assert torch.equal(sparse[0].weight == 0, ~whole)
        with torch.no_grad():
            expected, dense = sparse(x), finalize(sparse)
            torch.testing.assert_close(dense(x), expected, rtol=1e-13, atol=1e-13)
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(dense, (x,)).values())
    assert not any("mask" in key for key in dense.state_dict())


@pytest.mark.parametrize("norm", [P.weight_norm, nn.utils.weight_norm])
def test_alive_entries_keep_the_norm_g(norm: Callable[..., nn.Module]) -> None:
    model, x = nn.Sequential(norm(nn.Linear(6, 4))).double(), torch.randn(2, 6).double()
    model(x)
    before = model[0].weight.detach().norm(dim=1)
    sparse = transform(model, (x,), sparsity=0.5, pattern=SharedSupport(2))
    sparse(x)
    torch.testing.assert_close(sparse[0].weight.detach().norm(dim=1), before, rtol=1e-12, atol=0)


def test_the_old_norm_can_be_removed_after_finalize() -> None:
    model, x = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4))).double(), torch.randn(2, 6).double()
    sparse = transform(model, (x,), sparsity=0.5, pattern=Channel(0))
    expected, dense = sparse(x), finalize(sparse)
    nn.utils.remove_weight_norm(dense[0])
    torch.testing.assert_close(dense(x), expected)
    new = transform(nn.Sequential(P.weight_norm(nn.Linear(6, 4))).double(), (x,), sparsity=0.5, pattern=Channel(0))
    expected, dense = new(x), finalize(new)
    parametrize.remove_parametrizations(dense[0], "weight")
    torch.testing.assert_close(dense(x), expected)
    assert int((dense[0].weight == 0).sum()) == 12


# --- parametrizations of the user's -----------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight.abs()


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp()


class Padded(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.pad(weight, (0, 2))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight[:, :-2]


def parametrized(step: nn.Module) -> nn.Module:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", step, unsafe=True)
    return nn.Sequential(layer, nn.Linear(6, 2)).double()


@pytest.mark.parametrize("step, default", [(Doubled(), True), (Symmetric(), False), (Positive(), False)])
def test_any_parametrization_that_keeps_the_shape_can_be_masked(step: nn.Module, default: bool) -> None:
    model, x = parametrized(step), torch.randn(3, 6).double()
    name = "0.parametrizations.weight.original"
    assert (name in {weight.name for weight in plan(model, (x,)).masked}) == default
    if not default:
        row = next(weight for weight in plan(model, (x,)).weights if weight.name == name)
        assert f"a mask would break what {type(step).__name__} promises" in row.reason
    sparse = transform(model, (x,), sparsity=0.5, include=name)
    train(sparse, (x,), "adamw")
    mask = masks(sparse)[name]
    assert torch.equal(sparse.get_parameter(name) == 0, ~mask)
    assert not sparse[0].weight[~mask].any() and bool(sparse[0].weight[mask].any())
    dense = finalize(sparse)
    assert set(masks(dense)) == {name}  # no values of the parameter make this weight
    assert torch.equal(dense(x), sparse(x))


def test_orthogonal_maps_are_masked_only_on_request() -> None:
    model, x = nn.Sequential(P.orthogonal(nn.Linear(5, 5)), nn.Linear(5, 2)).double(), torch.randn(3, 5).double()
    assert {weight.name for weight in plan(model, (x,)).masked} == {"1.weight"}
    name = "0.parametrizations.weight.original"
    sparse = transform(model, (x,), sparsity=0.5, include=name)
    train(sparse, (x,), "sgd")
    assert not sparse[0].weight[~masks(sparse)[name]].any()


def test_a_parametrization_that_changes_the_shape() -> None:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Padded(), unsafe=True)
    model, x = nn.Sequential(layer, nn.Linear(6, 2)).double(), torch.randn(3, 6).double()
    decided = plan(model, (x,))
    assert {weight.name for weight in decided.masked} == {"1.weight"}
    assert "only scales or shifts what Padded computes" in str(decided)


def test_a_plan_leaves_the_parametrized_model_as_it_was() -> None:
    model, x = nn.Sequential(P.spectral_norm(nn.Linear(5, 4))), torch.randn(3, 5)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan(model, (x,), sparsity=0.5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert not model[0].parametrizations.weight._forward_hooks


# --- refusals and the pass --------------------------------------------------------------------------------------------


class Centred(nn.Module):
    """The weight is computed by a parent that also calls a layer of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return self.layer(F.linear(x, self.weight - self.weight.mean(1, keepdim=True)))


class Inner(nn.Module):
    """The mend that the refusal names: a module of its own that holds the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True))


class Mended(Centred):
    def __init__(self) -> None:
        super().__init__()
        self.weight = None
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.layer(self.inner(x))


def test_where_no_mask_can_go_behind_the_weight_is_refused_by_name_and_the_mend_works() -> None:
    x = torch.randn(2, 4)
    decided = plan(Centred(), (x,))
    assert {weight.name for weight in decided.masked} == {"layer.weight"}
    with pytest.raises(ConfigError, match="`mean` may make other values of its zeros.*a module of its own"):
        plan(Centred(), (x,), include="weight")
    sparse = transform(Mended(), (x,), sparsity=0.5)
    assert set(masks(sparse)) == {"layer.weight", "inner.weight"}


def test_the_pass_checks_its_targets() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(PassError, match=r"`route` of `0.weight`"):
        MaskEffective({"0.weight": MaskSpec()})(model)
    with pytest.raises(ConfigError, match="must be Guard.GRADIENT"):
        MaskSpec(route=Route.EFFECTIVE)
    spec = MaskSpec(layout=Layout(), route=Route.EFFECTIVE, guard=Guard.GRADIENT)
    result = MaskEffective({"0.weight": spec})(model)
    assert set(masks(result.module)) == {"0.weight"} and not masks(model)
    with pytest.raises(PassError, match="has a mask already"):
        MaskEffective({"0.weight": spec})(result.module)
    assert spec.hides_gradient and MaskSpec().hides_gradient
    assert not MaskSpec(route=Route.PARAMETER, guard=Guard.GRADIENT).hides_gradient


# --- chains of operations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain, shape, place",
    [
        ("sub", (4, 4), 0),
        ("mean sub div", (7, 2), 2),
        ("sub t", (4, 4), 0),
        ("sub t", (7, 2), 0),
        ("mul sub div mul view", (7, 2), 3),
        ("mean expand_as t", (7, 2), 1),
        ("t normalize t", (4, 4), 2),
        ("t normalize", (4, 4), None),
        ("reshape batch_norm reshape_as", (4, 4, 3, 3), 2),
        ("reshape batch_norm t", (4, 4), None),
        ("transpose sub transpose", (2, 3, 4), 2),
        ("transpose sub transpose", (3, 3, 4), None),
        ("sub flip", (4, 4), None),
        ("t mul", (4, 4), None),
    ],
)
def test_where_in_a_chain_a_mask_fits(chain: str, shape: tuple[int, ...], place: int | None) -> None:
    assert mask_place(chain.split(), shape) == place


class Turned(nn.Module):
    """Standardised, used both ways round; square, so that a mask the wrong way round raises nothing."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(F.linear(x, weight), weight.t())


@pytest.mark.parametrize("rows", [4, 7])
def test_a_mask_stands_before_the_weight_is_turned(rows: int) -> None:
    model, x = Turned(rows).double(), torch.randn(3, 4).double()
    sparse = transform(model, (x,), sparsity=0.5)
    mask = masks(sparse)["weight"]
    weight = sparse.weight.detach()
    weight = torch.where(mask, weight - weight.mean(1, keepdim=True), 0.0)
    torch.testing.assert_close(sparse(x), x @ weight.T @ weight, rtol=1e-12, atol=1e-12)


class TurnedInPython(Turned):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


def test_a_turned_weight_that_python_computes_is_refused() -> None:
    with pytest.raises(ConfigError, match="`mean` may make other values of its zeros"):
        plan(TurnedInPython(4), (torch.randn(3, 4),), include="weight")


class LowRank(nn.Module):
    """The product of two parameters; one of them is also read transposed."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(rank, 2)), nn.Parameter(torch.randn(7, rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.up @ self.down), self.up.t())


@pytest.mark.parametrize("rank", [2, 3])  # with 2 the product has the shape of `up`
def test_factors_of_a_product_are_weights_of_it(rank: int) -> None:
    model, x = LowRank(rank).double(), torch.randn(3, 2).double()
    sparse = transform(model, (x,), sparsity=0.5)
    assert set(masks(sparse)) == {"down", "up"}
    up, down = (torch.where(masks(sparse)[name], model.get_parameter(name), 0.0) for name in ("up", "down"))
    torch.testing.assert_close(sparse(x), x @ (up @ down).T @ up, rtol=1e-12, atol=1e-12)


class LearnedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries, self.q = nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.q(self.queries).t()


class LowRankUpdate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.a, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((6, 8), (6, 2), (2, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.a @ self.b)


def test_a_layer_of_learned_inputs_is_a_layer() -> None:
    decided = plan(LearnedQueries(), (torch.randn(3, 8),))
    assert {weight.name: weight.route for weight in decided.masked} == {"q.weight": Route.MODULE}
    assert not any(weight.refused for weight in decided.weights)


def test_a_weight_with_a_low_rank_update() -> None:
    model, x = LowRankUpdate().double(), torch.randn(3, 8).double()
    sparse = transform(model, (x,), sparsity=0.5)
    found = masks(sparse)
    assert set(found) == {"weight", "a", "b"}
    w, a, b = (torch.where(found[name], model.get_parameter(name), 0.0) for name in ("weight", "a", "b"))
    expected = x @ torch.where(found["weight"], w + a @ b, 0.0).T
    torch.testing.assert_close(sparse(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("norm", [P.weight_norm, nn.utils.weight_norm])
def test_folding_a_weight_norm_with_dead_slices_keeps_its_contract(
    norm: Callable[..., nn.Module], dim: int | None
) -> None:
    model, x = nn.Sequential(norm(nn.Linear(8, 7), dim=dim)).double(), torch.randn(3, 8).double()
    sparse = transform(model, (x,))
    ((name, mask),) = masks(sparse).items()
    mask = torch.rand(mask.shape) < 0.7
    mask[2], mask[:, 3] = False, False
    if dim is None:
        mask[:] = False
    set_masks(sparse, {name: mask})
    result = FoldMasks()(sparse, (x,))  # compares gradients
    assert torch.equal(result.module(x), sparse(x)) and set(result.verification.compared) == {"eval", "train"}
    (gain,) = alive_gains(sparse).values()
    axes = {0: (1,), 1: (0,), None: (0, 1)}[dim]
    assert torch.equal(gain.flatten(), mask.any(axes).flatten()) and alive_gains(result.module) == {}


# --- what must hold ---------------------------------------------------------------------------------------------------


@every
def test_copies_and_pickles_are_independent(case: WeightCase) -> None:
    if not case.copies:
        pytest.skip("torch's old norms keep a computed weight, which deepcopy refuses")
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.6).eval()
    twins = [copy.deepcopy(sparse)]
    if case.name.startswith("standardised"):  # torch pickles no parametrized module
        twins.append(pickle.loads(pickle.dumps(sparse)))
    for twin in twins:
        assert torch.equal(twin(*inputs), sparse(*inputs))
        set_masks(twin, {name: ~mask for name, mask in masks(twin).items()})
        assert not torch.equal(twin(*inputs), sparse(*inputs))
        train(twin, inputs, "adamw")
        for name, mask in masks(twin).items():
            assert torch.equal(mask, ~masks(sparse)[name])
            assert not twin.get_parameter(name)[~mask].any()


@every
def test_dense_gradients_reach_the_collector(case: WeightCase) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.8)
    with DenseGradients() as collector:
        sparse(*inputs).square().sum().backward()
    for mask in masks(sparse).values():
        gradient = collector.read(mask)
        assert gradient is not None and bool(gradient[~mask].any())


@every
def test_a_compiled_result_is_one_graph(case: WeightCase) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.7).eval()
    torch._dynamo.reset()
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), sparse(*inputs), rtol=1e-12, atol=1e-12)
    fewer = {
        name: mask & (torch.arange(mask.numel()).reshape(mask.shape) % 3 > 0) for name, mask in masks(sparse).items()
    }
    set_masks(sparse, fewer)  # in place: no new graph
    torch.testing.assert_close(compiled(*inputs), sparse(*inputs), rtol=1e-12, atol=1e-12)


@every
def test_functional_calls_read_the_masks(case: WeightCase) -> None:
    if not case.copies:
        pytest.skip("torch's old norms write the weight during the call")
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.7).eval()
    values = {name: parameter.detach() for name, parameter in sparse.named_parameters()}
    out = torch.func.functional_call(sparse, values, inputs)
    torch.testing.assert_close(out, sparse(*inputs), rtol=1e-12, atol=1e-12)
    found = torch.func.grad(lambda each: torch.func.functional_call(sparse, each, inputs).square().sum())(values)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found.values())


@pytest.mark.parametrize("inplace", [False, True])
def test_an_old_spectral_norm_without_alive_entries_is_not_folded(inplace: bool) -> None:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2))
    sparse = transform(model, (torch.randn(5, 4),), sparsity=0.5)
    alive = masks(sparse)["0.weight_orig"].clone()
    set_masks(sparse, {"0.weight_orig": torch.zeros_like(alive)})
    with pytest.raises(PassError, match=r"fold_masks: `0.weight_orig` has no alive entry.*divide 0 by 0"):
        finalize(sparse, inplace=inplace)
    set_masks(sparse, {"0.weight_orig": torch.eye(3, 4, dtype=torch.bool)})
    if not inplace:
        assert set(masks(sparse)) == {"0.weight_orig", "2.weight"} and not any(masks(finalize(sparse)))


@pytest.mark.parametrize("training", [True, False])
def test_a_spectral_norm_without_alive_entries_stays_zero_when_it_is_folded(training: bool) -> None:
    model = nn.Sequential(P.spectral_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    sparse = transform(model, (x,))
    name = "0.parametrizations.weight.original"
    set_masks(sparse, {name: torch.zeros(3, 4, dtype=torch.bool)})
    folded = finalize(sparse).train(training)
    expected = model[2](model[0].bias.relu().expand(5, 3))
    torch.testing.assert_close(folded(x), expected)
    assert set(masks(folded)) == {name}
    set_masks(sparse, {name: torch.eye(3, 4, dtype=torch.bool)})
    assert not masks(finalize(sparse))


class Shaped(nn.Module):
    """The weight goes through a function of its entries that is zero at zero."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.function(self.weight))


@pytest.mark.parametrize("name", ["abs", "sign", "tanh", "relu", "sin", "square", "expm1", "erf", "round"])
def test_entrywise_functions_that_are_zero_at_zero_need_no_mask_behind(name: str) -> None:
    function, x = getattr(torch, name), torch.randn(3, 4)
    (weight,) = plan(Shaped(function), (x,)).masked
    assert weight.route is not Route.EFFECTIVE and "masked behind" not in weight.reason
    sparse = transform(Shaped(function), (x,), sparsity=0.5)
    used = function(torch.where(masks(sparse)["weight"], sparse.weight.detach(), 0.0))
    assert bool((used[~masks(sparse)["weight"]] == 0).all())
    torch.testing.assert_close(sparse(x), x @ used.T)


def test_a_weight_is_said_to_be_masked_behind_the_operation_where_its_mask_stands() -> None:
    def standardised(weight: Tensor) -> Tensor:
        return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)

    (weight,) = plan(Shaped(standardised), (torch.randn(3, 4),)).masked
    assert weight.reason.endswith("masked behind `truediv`") or weight.reason.endswith("masked behind `div`")
