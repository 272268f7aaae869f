"""Compensated pruning of models: inputs of every kind of layer, errors of real outputs, state left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.curvature.compensate import Compensation, compensate
from fxsparse.curvature.compensate_grams import InputGrams
from fxsparse.curvature.compensate_layer import Solver
from fxsparse.curvature.compensate_solve import restricted_least_squares
from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    Linear,
    MaskSpec,
    install_mask,
    masked_weights,
    masks,
)
from fxsparse.nn.masked import row_order_of
from fxsparse.planning import transform
from fxsparse.sparsity import (
    Block,
    Channel,
    ConstantFanIn,
    Custom,
    Global,
    NByM,
    SharedSupport,
    Unstructured,
)

TIGHT = {"rtol": 1e-10, "atol": 1e-9}


def collected(model: nn.Module, *batches: Tensor) -> InputGrams:
    found = InputGrams(masked_weights(model))
    with torch.no_grad(), found:
        for batch in batches:
            model(batch)
    return found


def products(outputs: Tensor) -> Tensor:
    """[samples, channels, *positions] -> inner products of the channels."""
    flat = outputs.double().movedim(1, 0).flatten(1)
    return flat @ flat.T


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([1, 2, 3]),
    st.sampled_from([(4, 8, 1), (4, 8, 2), (6, 6, 6), (1, 3, 1)]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([0, 1, 2, "same"]),
    st.integers(1, 2),
    st.sampled_from(["zeros", "circular", "reflect"]),
    st.integers(0, 1000),
)
def test_convolutions_by_their_outputs(axes, channels, kernel, stride, padding, dilation, mode, seed) -> None:
    """H_jk is the product of the outputs of the kernels e_j and e_k: torch's own convolution is the oracle."""
    ins, outs, groups = channels
    stride = 1 if padding == "same" else stride
    kind = (Conv1d, Conv2d, Conv3d)[axes - 1]
    module = kind(ins, outs, kernel, stride, padding, dilation, groups, padding_mode=mode).double()
    x = torch.randn(3, ins, *(6, 5, 7)[:axes], generator=torch.Generator().manual_seed(seed)).double()
    gram = collected(module, x[:1], x[1:]).gram("weight")
    width = ins // groups * kernel**axes
    assert len(gram.matrices) == groups and gram.matrices.shape[1:] == (width, width)
    assert torch.equal(gram.of_row, torch.arange(outs) // (outs // groups))
    wide = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
        ins, groups * width, kernel, stride, padding, dilation, groups, False, mode
    )
    wide.double()
    with torch.no_grad():
        wide.weight.copy_(torch.eye(width).reshape(width, *wide.weight.shape[1:]).repeat(groups, *[1] * (axes + 1)))
        answers = wide(x)
    for group, matrix in enumerate(gram.matrices):
        torch.testing.assert_close(matrix, products(answers[:, group * width : (group + 1) * width]), **TIGHT)
    assert gram.samples == (answers.shape[0] * answers[0, 0].numel(),) * groups


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([ConvTranspose1d, ConvTranspose2d]),
    st.sampled_from([(4, 6, 1), (4, 6, 2), (3, 3, 3)]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 2),
    st.integers(0, 1000),
)
def test_transposed_convolutions_by_their_outputs(kind, channels, kernel, stride, padding, dilation, seed) -> None:
    ins, outs, groups = channels
    padding = min(padding, dilation * (kernel - 1))
    extra = min(1, max(stride, dilation) - 1)
    axes = 1 if kind is ConvTranspose1d else 2
    module = kind(ins, outs, kernel, stride, padding, extra, groups, dilation=dilation).double()
    x = torch.randn(2, ins, *(4, 5)[:axes], generator=torch.Generator().manual_seed(seed)).double()
    gram = collected(module, x).gram("weight")
    width = ins // groups * kernel**axes
    basis = torch.eye(width, dtype=torch.float64).reshape(width, ins // groups, *[kernel] * axes).transpose(0, 1)
    call = F.conv_transpose1d if axes == 1 else F.conv_transpose2d
    answers = call(x, basis.repeat(groups, *[1] * (axes + 1)), None, stride, padding, extra, groups, dilation)
    for group in range(groups):
        matrix = gram.matrices[gram.of_row.reshape(groups, -1)[group, 0]]
        torch.testing.assert_close(matrix, products(answers[:, group * width : (group + 1) * width]), **TIGHT)


def test_chunks_of_patches_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Conv2d(3, 4, 3, padding=1).double(), torch.randn(5, 3, 6, 6).double()
    whole = collected(module, x).gram("weight")
    monkeypatch.setattr("fxsparse.curvature.compensate_grams._CHUNK", 100)
    parts = collected(module, x).gram("weight")
    torch.testing.assert_close(parts.matrices, whole.matrices, **TIGHT)
    assert parts.samples == whole.samples == (180,)


def test_linear_layers_of_any_rank_and_every_use() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Linear(5, 5).double()

        def forward(self, x: Tensor) -> Tensor:
            self.seen = [x.detach(), self.inner(x).relu().detach()]
            return self.inner(self.seen[1])

    for shape in ((7, 5), (2, 3, 5), (5,)):
        model = Twice()
        gram = collected(model, torch.randn(shape).double()).gram("inner.weight")
        flat = torch.cat([x.reshape(-1, 5) for x in model.seen])
        torch.testing.assert_close(gram.matrices, (flat.T @ flat)[None], **TIGHT)
        assert gram.samples == (len(flat),)


def test_the_projections_of_attention_have_a_class_each() -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double()
    install_mask(layer, "in_proj_weight", MaskSpec())
    q, k, v = (torch.randn(2, n, 4).double() for n in (3, 5, 5))
    found = InputGrams(masked_weights(layer))
    with torch.no_grad(), found:
        layer(q, k, v)
    gram = found.gram("in_proj_weight")
    assert gram.of_row.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for matrix, x in zip(gram.matrices, (q, k, v), strict=True):
        torch.testing.assert_close(matrix, products(x.movedim(2, 1)), **TIGHT)


class Functional(nn.Module):
    """Uses its weight as `use` says."""

    def __init__(self, use) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(4, 6).double()), use
        install_mask(self, "weight")

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.weight, x)


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: x @ w.T,
        lambda w, x: (w @ x.T).T,
        lambda w, x: torch.cat([F.linear(x, w[:2]), F.linear(x, w[2:])], 1),
        lambda w, x: torch.bmm(x[None].expand(1, -1, -1), w.T[None])[0],
        lambda w, x: x[:, [5, 4, 3, 2, 1, 0]] @ w.T[[5, 4, 3, 2, 1, 0]],
        lambda w, x: torch.stack([torch.mv(w, each) for each in x]),
    ],
)
def test_functional_uses_or_a_refusal(use) -> None:
    model, x = Functional(use), torch.randn(9, 6).double()
    found = collected(model, x)
    try:
        gram = found.gram("weight")
    except ConfigError as error:  # an operation that is not followed is named, never guessed
        assert "index" in str(error)
        return
    for row in range(4):
        torch.testing.assert_close(gram.matrices[gram.of_row[row]], x.T @ x, **TIGHT)
    assert set(gram.samples) == {9}


def test_positions_in_another_order_are_put_back() -> None:
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 2).double())
            install_mask(self, "weight")

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.transpose(1, 2).contiguous().view(4, 6))

    x = torch.randn(9, 6).double()
    own = x.reshape(9, 2, 3).transpose(1, 2).flatten(1)
    torch.testing.assert_close(collected(Moved(), x).gram("weight").matrices, (own.T @ own)[None], **TIGHT)


@pytest.mark.parametrize(
    "use",
    [
        lambda w, x: x[:, :3] @ w[:, :3].T + x[:, 3:] @ w[:, 3:].T,  # parts of a row
        lambda w, x: x[:, :4] @ w,  # transposed: rows are inputs
        lambda w, x: (x @ w.T) + w.sum(),
        lambda w, x: x @ (2 * w).T,
        lambda w, x: x,
        lambda w, x: x @ w[:2].T,  # rows that nothing uses
    ],
)
def test_inputs_that_are_not_known_are_refused_by_name(use) -> None:
    model, x = Functional(use), torch.randn(9, 6).double()
    before = model.weight.detach().clone()
    with pytest.raises(ConfigError, match="the inputs of `weight` are not known"):
        compensate(model, [x], sparsity=0.5)
    assert torch.equal(model.weight, before) and bool(masks(model)["weight"].all())


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def data(count: int = 96, seed: int = 1) -> Tensor:
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    return 0.3 * torch.randn(count, 12, generator=torch.Generator().manual_seed(seed)) @ mix


PATTERNS = [Unstructured(), NByM(2, 4), ConstantFanIn(), Channel(1), Channel(0), Block(4, 4), SharedSupport(4)]


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_reported_errors_are_those_of_the_layers_outputs(pattern, sequential) -> None:
    dense = net().double()
    model, x = transform(dense, (data().double(),), pattern=pattern), data().double()
    report = compensate(model, [x[:40], (x[40:], None)], sparsity=0.5, how=Compensation(sequential=sequential))
    assert report.batches == 2 and [each.name for each in report.layers] == ["0.weight", "2.weight", "4.weight"]
    seen, now = x, x
    for each, index in zip(report.layers, (0, 2, 4), strict=True):
        weight, old = model.get_parameter(each.name).detach(), dense.get_parameter(each.name).detach()
        mask = masks(model)[each.name]
        pattern.check(mask)
        assert bool((weight[~mask] == 0).all()) and each.alive == int(mask.sum())
        assert each.density == pytest.approx(0.5, abs=0.01) and each.samples == 96
        met = now if sequential else seen
        scale = (met @ old.T).square().sum()
        assert each.after == pytest.approx(float((met @ (old - weight).T).square().sum() / scale), rel=1e-9, abs=1e-12)
        masked = torch.where(mask, old, 0.0)
        assert each.before == pytest.approx(float((met @ (old - masked).T).square().sum() / scale), rel=1e-9, abs=1e-12)
        with torch.no_grad():
            seen = dense[index : index + 2](seen)
            now = model.get_submodule(str(index))(now).tanh()
    if pattern != Channel(0):
        assert all(each.after < each.before for each in report.layers)


def test_the_outputs_of_the_whole_model_come_back() -> None:
    lost = {}
    x, fresh = data(256), data(200, seed=9)
    dense = net()
    for name in ("masked", "compensated"):
        model = transform(dense, (x,), pattern=SharedSupport(4))
        compensate(model, [x], sparsity=0.5)
        if name == "masked":
            with torch.no_grad():
                for key, mask in masks(model).items():
                    model.get_parameter(key).copy_(dense.get_parameter(key) * mask)
        lost[name] = float((model(fresh) - dense(fresh)).detach().square().mean())
    assert lost["compensated"] < 0.5 * lost["masked"]


def test_given_masks_get_the_exact_solution() -> None:
    dense, x = net().double(), data().double()
    model = transform(dense, (x,))
    wanted = {"2.weight": torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) < 0.4}
    with torch.no_grad():
        met = dense[:2](x)
    report = compensate(model, [x], masks=wanted, how=Compensation(damping=0.02))
    expected = restricted_least_squares(dense[2].weight, met.T @ met, wanted["2.weight"], damping=0.02)
    torch.testing.assert_close(model.get_parameter("2.weight").detach(), expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(masks(model)["2.weight"], wanted["2.weight"]) and bool(masks(model)["0.weight"].all())
    assert [each.solver for each in report.layers] == [Solver.EXACT]
    torch.testing.assert_close(model.get_parameter("0.weight"), dense[0].weight, rtol=0, atol=0)


def test_permuted_groups_lose_less_and_their_order_is_kept() -> None:
    torch.manual_seed(3)
    layer, x = nn.Linear(24, 16), torch.randn(128, 24)
    with torch.no_grad():  # rows of two kinds, interleaved
        layer.weight[::2, :12] *= 0.01
        layer.weight[1::2, 12:] *= 0.01
    errors = []
    for permute in (False, True):
        model = transform(nn.Sequential(layer), (x,), pattern=SharedSupport(8))
        report = compensate(model, [x], sparsity=0.5, how=Compensation(permute=permute))
        errors.append(report.layers[0].after)
        order = row_order_of(model.get_submodule("0"), "weight")
        SharedSupport(8).check(masks(model)["0.weight"], row_order=order)
    assert order is not None and sorted(order[:8].tolist()) in ([*range(0, 16, 2)], [*range(1, 16, 2)])
    assert errors[1] < 1e-3 < errors[0]
    model = transform(nn.Sequential(layer), (x,), pattern=SharedSupport(8))
    again = compensate(model, [x], masks={"0.weight": masks(model)["0.weight"]}).layers[0]
    assert again.after == 0.0 and again.density == 1.0


def test_given_shared_supports_bring_their_row_order() -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    scores = torch.rand(16, 16, generator=torch.Generator().manual_seed(3))
    mask = SharedSupport(4).mask(scores, 0.5, row_order=order)
    x = data()
    model = transform(net(), (x,), pattern=SharedSupport(4))
    compensate(model, [x], masks={"2.weight": mask})
    assert torch.equal(masks(model)["2.weight"], mask)
    with pytest.raises(ConfigError, match="2.weight"):
        compensate(transform(net(), (x,), pattern=SharedSupport(4)), [x], masks={"2.weight": scores > 0.5})


def test_distributions_and_names() -> None:
    x = data()
    model = transform(net(), (x,))
    compensate(model, [x], sparsity=0.5, distribution=Custom({"0.weight": 0.25, "2.weight": 0.75}))
    density = {name: float(mask.double().mean()) for name, mask in masks(model).items()}
    assert density == {"0.weight": 0.75, "2.weight": 0.25, "4.weight": 0.5}
    model = transform(net(), (x,))
    compensate(model, [x], sparsity=0.5, distribution=Global())
    alive = sum(int(mask.sum()) for mask in masks(model).values())
    assert alive == (12 * 16 + 16 * 16 + 16 * 4) // 2
    assert len({float(mask.double().mean()) for mask in masks(model).values()}) > 1
    model = transform(net(), (x,))
    compensate(model, [x], sparsity=0.5, names=["4.weight"])
    assert [name for name, mask in masks(model).items() if not bool(mask.all())] == ["4.weight"]


def test_a_sparse_model_may_change_its_support() -> None:
    """Dead weights count as zeros: a row takes over positions of its new group where that helps."""
    x = data(200)
    model = transform(net(), (x,))
    compensate(model, [x], sparsity=0.6)
    outputs, before = model(x).detach(), {name: mask.clone() for name, mask in masks(model).items()}
    report = compensate(model, [x], sparsity=0.5, pattern=SharedSupport(4))
    for name, mask in masks(model).items():
        SharedSupport(4).check(mask)
        revived = mask & ~before[name]
        assert bool(revived.any()) and bool((model.get_parameter(name)[revived] != 0).any())
    assert all(each.after < each.before for each in report.layers)
    assert float((model(x) - outputs).detach().square().mean()) < float(outputs.square().mean())


def test_everything_else_stays_as_it_was() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    x = data()
    model = transform(Noisy(), (x,))
    model.train()
    model.get_submodule("body.1").eval()
    model.get_parameter("body.3.bias").requires_grad_(False)
    model.get_parameter("body.0.weight").requires_grad_(False)
    model(x).sum().backward()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    flags = {n: m.training for n, m in model.named_modules()}
    needs = {n: p.requires_grad for n, p in model.named_parameters()}
    rest = {
        n: t.clone() for n, t in model.state_dict().items() if "body.0.weight" not in n and "body.3.weight" not in n
    }
    random = torch.get_rng_state()
    compensate(model, [x], sparsity=0.5)
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert {n: p.requires_grad for n, p in model.named_parameters()} == needs
    for name, tensor in rest.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


def test_two_runs_are_equal_and_batches_do_not_matter() -> None:
    x, found = data(128), []
    for batches in ([x], [x], [x[:50], x[50:51], x[51:]]):
        model = transform(net(), (x,), pattern=SharedSupport(4))
        compensate(model, batches, sparsity=0.5)
        found.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[2][key], rtol=1e-4, atol=1e-5)


def _unchanged(model: nn.Module, error: type[Exception], match: str, *args, **kwargs) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patterns = {name: masked.spec.pattern for name, masked in masked_weights(model).items()}
    with pytest.raises(error, match=match):
        compensate(model, *args, **kwargs)
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert {name: masked.spec.pattern for name, masked in masked_weights(model).items()} == patterns


def test_bad_calibration_is_refused_and_nothing_changes() -> None:
    x = data()
    model = transform(net(), (x,))
    compensate(model, [x], sparsity=0.3)
    bad = x.clone()
    bad[3, 2] = torch.nan
    _unchanged(model, DataError, "`calibration`", [], sparsity=0.5)
    _unchanged(model, DataError, "inputs of `0.weight` hold NaN or Inf \\(=1 values\\)", [x, bad], sparsity=0.5)
    _unchanged(model, DataError, "`0.weight`: `samples` \\(=5\\) .* 6 weights", [x[:5]], sparsity=0.5)
    with torch.no_grad():
        model.get_parameter("2.bias")[0] = torch.inf  # seen by the third weight, after the first two were solved
    model.get_submodule("3").forward = lambda v: v
    _unchanged(model, DataError, "`4.weight` hold NaN or Inf", [x], sparsity=0.5)
    model = transform(net(), (x,))
    compensate(model, [x[:5]], sparsity=0.5, how=Compensation(min_samples=1))
    assert int(masks(model)["0.weight"].sum()) == 96


def test_bad_requests_are_refused_and_nothing_changes() -> None:
    x = data()
    model = transform(net(), (x,))
    _unchanged(model, ConfigError, "either `sparsity`", [x])
    _unchanged(model, ConfigError, "either `sparsity`", [x], sparsity=0.5, masks={})
    _unchanged(model, ConfigError, "`nope` is not a masked parameter", [x], sparsity=0.5, names=["nope"])
    _unchanged(model, ConfigError, "`names`", [x], masks={})
    _unchanged(model, ConfigError, "`masks` lack `2.weight`", [x], masks={}, names=["2.weight"])
    _unchanged(model, ConfigError, "0.weight", [x], masks={"0.weight": torch.ones(3, 3, dtype=torch.bool)})
    _unchanged(model, ConfigError, "bool", [x], masks={"0.weight": torch.ones(16, 12)})
    _unchanged(model, ConfigError, "`sparsity`", [x], sparsity=1.5)
    _unchanged(model, ConfigError, "0 or 1 - n/m", [x], sparsity=0.6, pattern=NByM(2, 4))
    with pytest.raises(ConfigError, match="no masks"):
        compensate(net(), [x], sparsity=0.5)
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = torch.nan
    with pytest.raises(DataError, match="`0.weight` holds NaN"):
        compensate(model, [x], sparsity=0.5)
    for wrong in ({"damping": -1.0}, {"block": 0}, {"rounds": 0}, {"min_samples": 0}, {"solver": "exact"}):
        with pytest.raises(ConfigError):
            Compensation(**wrong)


@pytest.mark.parametrize(
    ("error", "match", "calibration", "options"),
    [
        (DataError, r"`calibration` \(=Tensor \(96, 12\)\)", data(), {}),
        (DataError, r"`calibration` \(=None\)", None, {}),
        (DataError, r"`calibration` \(=3\)", 3, {}),
        (DataError, r"`calibration` \(=\{", {"input": data()}, {}),
        (DataError, r"`calibration` \(='x'\)", "x", {}),
        (DataError, r"`calibration` \(=Tensor \(96, 5\), batch 1\).*shapes", [data(), data()[:, :5]], {}),
        (DataError, r"`calibration` \(=None, batch 0\)", [None], {}),
        (DataError, r"`calibration` \(=tuple of , batch 0\)", [()], {}),
        (DataError, r"`calibration` \(=.*batch 0\)", [{"nope": data()}], {}),
        (ConfigError, r"`how` \(='x'\)", [data()], {"how": "x"}),
        (ConfigError, r"`how` \(=<class", [data()], {"how": Compensation}),
        (ConfigError, r"`pattern` \(='x'\)", [data()], {"pattern": "x"}),
        (ConfigError, r"`pattern` \(=<class", [data()], {"pattern": Unstructured}),
        (ConfigError, r"`distribution` \(='x'\)", [data()], {"distribution": "x"}),
        (ConfigError, r"`distribution` \(=None\)", [data()], {"distribution": None}),
        (ConfigError, r"`names` \(='0.weight'\)", [data()], {"names": "0.weight"}),
        (ConfigError, r"`names` \(=3\)", [data()], {"names": 3}),
        (ConfigError, r"`names` \(=list of 3\)", [data()], {"names": [3]}),
        (ConfigError, r"`sparsity` \(='x'\)", [data()], {"sparsity": "x"}),
        (ConfigError, r"`sparsity` \(=nan\)", [data()], {"sparsity": float("nan")}),
        (ConfigError, r"`sparsity` \(=True\)", [data()], {"sparsity": True}),
        (ConfigError, r"`masks` \(=list", [data()], {"masks": ["0.weight"], "sparsity": None}),
        (ConfigError, "mask of `0.weight`", [data()], {"masks": {"0.weight": 3}, "sparsity": None}),
        (
            ConfigError,
            "mask of `0.weight`",
            [data()],
            {"masks": {"0.weight": 3}, "sparsity": None, "pattern": SharedSupport(4)},
        ),
    ],
)
def test_arguments_are_refused_by_name_and_nothing_changes(error, match, calibration, options) -> None:
    _unchanged(transform(net(), (data(),)), error, match, calibration, **{"sparsity": 0.5, **options})


def test_a_late_failure_puts_solved_weights_back() -> None:
    model, calls = transform(net(), (data(),)), []

    def late(module: nn.Module, inputs: object) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("late")

    model.register_forward_pre_hook(late)
    _unchanged(model, DataError, r"`calibration` \(=Tensor \(96, 12\), batch 1\).*late", [data()] * 2, sparsity=0.5)


def test_no_model_and_options_of_other_types() -> None:
    with pytest.raises(ConfigError, match=r"`model` \(='x'\)"):
        compensate("x", [data()], sparsity=0.5)
    for name, values in {
        "damping": ("a", float("nan"), float("inf"), True, None),
        "sequential": ("x", 1),
        "permute": ("x", None),
        "block": (2.5, True, "a"),
        "rounds": (2.5, "a"),
        "min_samples": (2.5, "a", True),
        "solver": (3,),
    }.items():
        for value in values:
            with pytest.raises(ConfigError, match=f"`{name}` \\(="):
                Compensation(**{name: value})


def test_convolutional_networks() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(16, 3, 8, 8)
    for pattern in (SharedSupport(4), Channel(1), Unstructured(), NByM(1, 2)):
        model = transform(dense, (x,), pattern=pattern, exclude="0")
        report = compensate(model, [x], sparsity=0.5)
        assert [each.name for each in report.layers] == ["2.weight", "4.weight"]
        assert all(each.after < each.before for each in report.layers)
        for name, masked in masked_weights(model).items():
            pattern.check(masks(model)[name], masked.spec.layout)


def test_the_report_is_a_table() -> None:
    x = data()
    lines = str(compensate(transform(net(), (x,)), [x], sparsity=0.5)).splitlines()
    assert lines[0].split()[:3] == ["weight", "shape", "pattern"] and len(lines) == 4
    assert lines[1].startswith("0.weight  16x12  Unstructured()  0.5000   96")
