"""plan and transform: routes of every case, options, refusals, reports."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.errors import CaptureError, ConfigError, DataError, PassError
from fxsparse.nn import Guard, Route, SparseModule, masks, set_masks
from fxsparse.planning import finalize, plan, sparsity_report, transform
from fxsparse.sparsity import (
    ERK,
    Block,
    Channel,
    Global,
    Layout,
    NByM,
    SharedSupport,
    Uniform,
    Unstructured,
    keep_count,
)
from fxsparse.testing import blocks
from tests.cases import CASES, SEEDS, Case, KeptInList, TiedLanguageModel

BY_NAME = {case.name: case for case in CASES}


def run(model: nn.Module, inputs: object) -> list[Tensor]:
    args, kwargs = inputs if isinstance(inputs[-1], dict) else (inputs, {})
    output = model(*args, **kwargs)
    if isinstance(output, dict):
        output = tuple(output.values())
    return list(output) if isinstance(output, tuple) else [output]


def gradients(model: nn.Module, inputs: object) -> dict[str, Tensor]:
    model.zero_grad()
    sum(
        (output * torch.linspace(-1, 2, output.numel()).reshape(output.shape)).sum() for output in run(model, inputs)
    ).backward()
    return {name: p.grad.to_dense().clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_routes(case: Case) -> None:
    model, inputs = case()
    decided = plan(model, inputs)
    found = {
        w.name: w.route.value + ("+" if w.guard is Guard.GRADIENT and w.route is not Route.PARAMETER else "")
        for w in decided.masked
    }
    assert found == case.routes
    assert set(masks(decided.apply())) == set(case.routes)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_at_sparsity_zero_nothing_changes(case: Case, seed: int) -> None:
    model, inputs = case(seed)
    kept = copy.deepcopy(model.state_dict())
    sparse = transform(model, inputs)
    for training in (False, True):
        model.train(training), sparse.train(training)
        torch.manual_seed(3)
        expected = run(model, inputs)
        torch.manual_seed(3)
        assert all(torch.equal(a, b) for a, b in zip(expected, run(sparse, inputs), strict=True))
        torch.manual_seed(3)
        old = gradients(model, inputs)
        torch.manual_seed(3)
        new = gradients(sparse, inputs)
        assert old.keys() == new.keys()
        for name in old:
            torch.testing.assert_close(new[name], old[name], rtol=1e-13, atol=1e-13)
    names = [name for name in sparse.state_dict() if not name.endswith("_mask")]
    assert names == list(model.state_dict())
    assert [name for name, _ in sparse.named_parameters()] == [name for name, _ in model.named_parameters()]
    model.load_state_dict(kept)  # batch norm moved on in train mode
    assert all(p is not q for p, q in zip(model.parameters(), sparse.parameters(), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sparse_at_half_equals_the_model_with_zeros_written_in(case: Case) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.5)
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks(sparse).items():
            weight = oracle.get_parameter(name)
            assert int(mask.sum()) == keep_count(weight.numel(), 0.5)
            order = weight.abs().flatten().argsort(descending=True, stable=True)[: int(mask.sum())]
            assert set(order.tolist()) == set(mask.flatten().nonzero().flatten().tolist())
            weight.mul_(mask)
            assert torch.equal(sparse.get_parameter(name) == 0, ~mask)
    oracle.eval(), sparse.eval()
    assert all(torch.equal(a, b) for a, b in zip(run(oracle, inputs), run(sparse, inputs), strict=True))
    old, new = gradients(oracle, inputs), gradients(sparse, inputs)
    for name, gradient in new.items():
        expected = old[name] * masks(sparse)[name] if name in masks(sparse) else old[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_finalize_gives_plain_modules_with_the_same_function(case: Case) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.5).eval()
    dense = finalize(sparse)
    assert not masks(dense) and masks(sparse)
    assert list(dense.state_dict()) == list(model.state_dict())
    assert not any(isinstance(module, SparseModule) for module in dense.modules())
    assert all(torch.equal(a, b) for a, b in zip(run(sparse, inputs), run(dense, inputs), strict=True))
    assert all(p is not q for p, q in zip(dense.parameters(), sparse.parameters(), strict=True))
    free = gradients(dense, inputs)
    assert all(not p._post_accumulate_grad_hooks for p in dense.parameters())
    for name, mask in masks(sparse).items():
        assert (free[name][~mask] != 0).any() or int(mask.sum()) == mask.numel(), name
    parameters = list(sparse.parameters())
    shared = finalize(sparse, inplace=True)
    assert all(p is q for p, q in zip(shared.parameters(), parameters, strict=True))
    for name, gradient in gradients(shared, inputs).items():
        assert torch.equal(gradient, free[name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_example_inputs(case: Case) -> None:
    model, inputs = case()
    sparse = transform(model)
    assert set(masks(sparse)) <= set(case.routes)
    model.eval(), sparse.eval()
    assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), run(sparse, inputs), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_copies_and_pickles_keep_masks(case: Case) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.5).eval()
    for twin in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert all(torch.equal(a, b) for a, b in zip(run(sparse, inputs), run(twin, inputs), strict=True))
        for name, gradient in gradients(twin, inputs).items():
            if name in masks(twin):
                assert not gradient[~masks(twin)[name]].any(), name
        assert str(sparsity_report(twin)) == str(sparsity_report(sparse))


def test_inplace_reuses_parameters_and_an_optimizer_goes_on() -> None:
    model, inputs = BY_NAME["convnet"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    sparse = transform(model, inputs, sparsity=0.5, inplace=True)
    assert all(p is q for p, q in zip(model.parameters(), sparse.parameters(), strict=True))
    for _ in range(3):
        gradients(sparse, inputs)
        optimizer.step()
    for name, mask in masks(sparse).items():
        assert torch.equal(sparse.get_parameter(name) == 0, ~mask)


def test_the_planned_model_is_not_touched() -> None:
    for case in CASES:
        model, inputs = case()
        before = copy.deepcopy(model.state_dict())
        types = [type(module) for module in model.modules()]
        flags = [(p.requires_grad, p._post_accumulate_grad_hooks) for p in model.parameters()]
        state = torch.get_rng_state()
        transform(model, inputs, sparsity=0.5)
        assert torch.equal(state, torch.get_rng_state())
        assert types == [type(module) for module in model.modules()]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert flags == [(p.requires_grad, p._post_accumulate_grad_hooks) for p in model.parameters()], case.name


def test_a_plan_can_be_applied_twice_and_leaves_no_trace_between() -> None:
    model, inputs = BY_NAME["mixed"]()
    decided = plan(model, inputs, sparsity=0.5)
    first = decided.apply()
    set_masks(first, {name: torch.zeros_like(mask) for name, mask in masks(first).items()})
    second = decided.apply()
    assert all(mask.any() for mask in masks(second).values())


def test_printing_a_plan_tells_every_weight() -> None:
    model, inputs = BY_NAME["tied embedding"]()
    text = str(plan(model, inputs, sparsity=0.5, include=["head", "body"]))
    assert "embed.weight" in text and "module*" in text and "2 of 2 weights masked" in text
    text = str(plan(*BY_NAME["mixed"](), exclude="inner.*"))
    assert "left out by include or exclude" in text and "`gate` stays Python" in text


def test_printing_a_plan_sums_up() -> None:
    """How much of the model the masks hold, and one line for all modules that stay Python for the same reason."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if bool(x.sum() > 1e9) else self.inner(x) + 1

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(12, 4)
            self.parts = nn.ModuleList(Asks() for _ in range(4))

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for part in self.parts:
                x = part(x)
            return x

    printed = str(plan(Model(), (torch.tensor([[1, 2]]),)))
    assert "they hold 57% of all weight elements" in printed  # 4 * 16 of 4 * 16 + 48
    lines = [line for line in printed.splitlines() if "stay Python" in line]
    assert len(lines) == 1 and "`the model`, `parts.0` and 3 more stay Python" in lines[0], printed


def test_stages_of_a_plan_can_be_printed() -> None:
    decided = plan(*BY_NAME["mixed"]())
    stages = decided.stages()
    names = ["captured", "swap_modules", "insert_masks", "mask_effective", "mask_parameters", "fold_masks"]
    assert [stage.name for stage in stages.stages] == names
    assert [stage.name for stage in decided.stages("insert_masks").stages] == names[:3]
    assert "masked_weight" in str(stages.stage("insert_masks")) and "masked_weight" not in str(
        stages.stage("swap_modules")
    )
    assert "inner.kernel: 1 mask node, Unstructured()" in str(stages.stage("insert_masks"))


# --- selection -------------------------------------------------------------------------------------------------------


def masked_names(*args: object, **kwargs: object) -> set[str]:
    return {weight.name for weight in plan(*args, **kwargs).masked}


def test_include_and_exclude_take_names_paths_globs_types_and_predicates() -> None:
    model, inputs = BY_NAME["convnet"]()
    assert masked_names(model, inputs, include="stem.weight") == {"stem.weight"}
    assert masked_names(model, inputs, include="stem") == {"stem.weight"}
    assert masked_names(model, inputs, include=["*"]) == {
        f"{name}.weight" for name in ("stem", "depthwise", "grouped", "up", "head")
    }
    assert masked_names(model, inputs, include=nn.Conv2d) == {"stem.weight", "depthwise.weight", "grouped.weight"}
    assert masked_names(model, inputs, include=lambda n, p, m: p.numel() == 12) == {"head.weight"}
    assert masked_names(model, inputs, exclude=[nn.Linear, "gr*"]) == {"stem.weight", "up.weight"}
    assert masked_names(model, inputs, include="head.bias") == {"head.bias"}
    assert masked_names(model, inputs, include=nn.Conv2d, exclude="depthwise") == {"stem.weight", "grouped.weight"}


def test_a_named_bias_is_masked_and_works() -> None:
    model, inputs = BY_NAME["mlp"]()
    sparse = transform(model, inputs, include="0.bias", sparsity=0.5)
    assert int(masks(sparse)["0.bias"].sum()) == 4
    assert not gradients(sparse, inputs)["0.bias"][~masks(sparse)["0.bias"]].any()


def test_recurrent_and_embedding_weights_only_when_asked() -> None:
    model, inputs = BY_NAME["tagger"]()
    names = {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    assert masked_names(model, inputs, include="rnn") == names
    sparse = transform(model, inputs, include="rnn", sparsity=0.5)
    for name, gradient in gradients(sparse, inputs).items():
        if name in names:
            assert not gradient[~masks(sparse)[name]].any()
    plain = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)).double()
    assert masked_names(plain, (torch.tensor([1, 2]),)) == {"1.weight"}
    assert masked_names(plain, (torch.tensor([1, 2]),), include=nn.Embedding) == {"0.weight"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "head.wieght"}, r"`include` \(='head.wieght'\) names no parameter; close names: head.weight"),
        ({"exclude": "steem"}, r"`exclude` \(='steem'\) names no parameter; close names: .*stem"),
        ({"include": nn.LSTM}, r"`include` \(=LSTM\) is the type of no module"),
        ({"include": lambda n, p, m: False}, "picks no parameter"),
        ({"include": 3}, r"`include` \(=3\) must hold names or globs"),
        ({"include": [3]}, r"`include` \(=3\) must hold names or globs"),
        ({"include": int}, "must hold names or globs"),
        ({"include": []}, "picks nothing"),
        ({"exclude": "*"}, "leave no weight"),
        ({"include": "norm"}, "fewer than 2 axes need their full name"),
        ({"sparsity": 1.0}, r"`sparsity` \(=1.0\)"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"pattern": "2:4"}, r"`pattern` \(='2:4'\)"),
        ({"distribution": "erk"}, r"`distribution` \(='erk'\)"),
        ({"fisher": object()}, "not available in this version"),
        ({"pattern": NByM(2, 4), "sparsity": 0.5}, r"`stem.weight`.*exclude"),
        ({"pattern": NByM(2, 4), "sparsity": 0.3, "include": "grouped"}, "sparsity"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    model, inputs = BY_NAME["convnet"]()
    with pytest.raises(ConfigError, match=message):
        plan(model, inputs, **options)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_models_without_a_prunable_weight() -> None:
    with pytest.raises(ConfigError, match="no parameters"):
        plan(nn.ReLU())
    with pytest.raises(ConfigError, match=r"no weight that is sparsified by default \(`weight`: fewer than 2 axes"):
        plan(nn.LayerNorm(3), (torch.ones(2, 3),))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model, inputs = BY_NAME["mlp"]()
    with torch.no_grad():
        model[0].weight[0, 1] = value
    with pytest.raises(DataError, match="`0.weight` holds 1 NaN or infinite"):
        transform(model, inputs, sparsity=0.5)
    assert masked_names(model, inputs, exclude="0") == {"3.weight"}


def test_wrappers_and_foreign_objects() -> None:
    with pytest.raises(ConfigError, match=r"`model` \(=int\)"):
        plan(3)
    with pytest.raises(ConfigError, match="give `model.module`"):
        plan(nn.DataParallel(nn.Linear(2, 2)))
    with pytest.raises(CaptureError, match="scripted"):
        plan(scripted(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ConfigError, match="has 1 masks already"):
        plan(transform(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ConfigError, match="has no masks to fold"):
        finalize(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def scripted(module: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def test_compiled_models() -> None:
    class OptimizedModule(nn.Module):
        pass

    with pytest.raises(ConfigError, match="`model._orig_mod`"):
        plan(OptimizedModule())


def test_scripted_parts_are_refused_by_name() -> None:
    model = nn.Sequential(scripted(nn.Linear(4, 4)), nn.Linear(4, 2))
    x = (torch.randn(2, 4),)
    assert set(masks(transform(model, x, sparsity=0.5))) == {"1.weight"}
    with pytest.raises(ConfigError, match="`0.weight` was asked for and cannot be masked: its module `0` is scripted"):
        plan(model, x, include="0.weight")


class HyperNetwork(nn.Module):
    """A layer that runs with weights computed elsewhere, beside one that the example does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(3, 12)
        self.base = nn.Linear(4, 3, bias=False)
        self.other = nn.Linear(4, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if z.sum() > 1e6:
            return self.other(x)
        return torch.func.functional_call(self.base, {"weight": self.maker(z).view(3, 4)}, (x,))


def test_a_weight_that_its_own_module_does_not_read_is_left_alone() -> None:
    inputs = (torch.randn(2, 4), torch.randn(3))
    decided = plan(HyperNetwork(), inputs)
    assert {weight.name for weight in decided.masked} == {"maker.weight", "other.weight"}
    assert "`base` runs without reading it" in str(decided)


def test_a_taken_mask_name_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].register_buffer("weight_mask", torch.ones(4))
    with pytest.raises(ConfigError, match="attribute `weight_mask` already"):
        plan(model, include="0")


def test_lazy_parameters_are_refused() -> None:
    with pytest.raises(CaptureError, match="has no shape yet"):
        plan(nn.Sequential(nn.LazyLinear(3)))


def test_a_model_that_fails_on_its_inputs() -> None:
    with pytest.raises(CaptureError, match="fails on `example_inputs`"):
        plan(nn.Sequential(nn.Linear(3, 2)), (torch.randn(2, 5),))
    with pytest.raises(ConfigError, match="`example_inputs`"):
        plan(nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3))


def test_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 2))
    assert masks(transform(model))["0.weight"].is_meta
    assert masks(transform(model, (torch.empty(2, 3, device="meta"),)))["0.weight"].is_meta
    with pytest.raises(ConfigError, match="meta device"):
        plan(model, sparsity=0.5)


# --- patterns, layouts, distributions --------------------------------------------------------------------------------


def layouts(*args: object) -> dict[str, Layout | None]:
    return {weight.name: weight.layout for weight in plan(*args).weights}


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.randn(4, 6))
        self.turned = nn.Parameter(torch.randn(3, 6))
        self.letters = nn.Parameter(torch.randn(3, 5))
        self.batched = nn.Parameter(torch.randn(2, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.right) @ self.turned.t()
        y = torch.einsum("bi,io->bo", y, self.letters)
        return torch.bmm(torch.stack([y, y]), self.batched)


def test_layouts_follow_the_use() -> None:
    x = (torch.randn(2, 4),)
    expected = {
        "right": Layout(1, 0),
        "turned": Layout(0, 1),
        "letters": Layout(1, 0),
        "batched": Layout(2, 1, batch=(0,)),
    }
    assert layouts(Products(), x) == expected
    assert layouts(Products())["right"] == Layout(1, 0)
    model, inputs = BY_NAME["functional conv"]()
    assert layouts(model, inputs)["body.kernel"] == Layout.conv(2)
    model, inputs = BY_NAME["convnet"]()
    assert layouts(model, inputs)["up.weight"] == Layout.conv_transpose(1)
    assert layouts(*BY_NAME["einsum attention"]())["query"] == Layout(2, 1, batch=(0,))


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(2, 8))
        self.out = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.flat.view(4, 4)), self.out)


def test_a_pattern_that_needs_a_layout_is_refused_without_one() -> None:
    model, inputs = Viewed(), (torch.randn(2, 4),)
    with pytest.raises(ConfigError, match="`flat`.*do not tell"):
        plan(model, inputs, pattern=SharedSupport(2))
    assert masked_names(model, inputs, pattern=SharedSupport(2), include="out") == {"out"}


@pytest.mark.parametrize("pattern", [Unstructured(), NByM(2, 4), Block(2, 2), Channel(0), SharedSupport(2)])
def test_patterns_hold_after_a_transform(pattern: object) -> None:
    model, inputs = BY_NAME["mlp"]()
    options = {"exclude": "0"} if isinstance(pattern, NByM) else {}
    sparse = transform(model, inputs, sparsity=0.5, pattern=pattern, **options)
    for row in sparsity_report(sparse).masked:
        pattern.check(masks(sparse)[row.name])
        assert row.pattern == str(pattern)


def test_distributions_reach_their_budget() -> None:
    model, inputs = BY_NAME["convnet"]()
    total = sum(weight.numel for weight in plan(model, inputs).masked)
    for distribution in (Uniform(), ERK(), Global()):
        sparse = transform(model, inputs, sparsity=0.8, distribution=distribution)
        alive = sum(int(mask.sum()) for mask in masks(sparse).values())
        assert abs(alive - 0.2 * total) <= len(masks(sparse)), distribution
    scores = torch.cat([model.get_parameter(name).detach().abs().flatten() for name in masks(sparse)])
    threshold = scores.sort(descending=True).values[keep_count(total, 0.8) - 1]
    for name, mask in masks(sparse).items():
        assert torch.equal(mask, model.get_parameter(name).detach().abs() >= threshold), name


# --- traps -----------------------------------------------------------------------------------------------------------


def test_a_custom_backward_survives() -> None:
    model, inputs = BY_NAME["straight through"]()
    expected = gradients(model, inputs)["first.weight"]
    assert expected.abs().sum() > 0
    torch.testing.assert_close(gradients(transform(model, inputs), inputs)["first.weight"], expected, rtol=0, atol=0)


def test_tied_weights_have_one_parameter_and_one_mask() -> None:
    model, inputs = BY_NAME["tied embedding"]()
    sparse = transform(model, inputs, sparsity=0.5)
    assert sparse.head.weight is sparse.embed.weight
    assert sparse.head.weight_mask is sparse.embed.weight_mask
    assert set(masks(sparse)) == {"embed.weight", "body.weight"}
    optimizer = torch.optim.Adam(sparse.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        gradients(sparse, inputs)
        optimizer.step()
    assert torch.equal(sparse.embed.weight == 0, ~masks(sparse)["embed.weight"])
    dense = finalize(sparse)
    assert dense.head.weight is dense.embed.weight


def test_layers_kept_in_a_plain_list_are_swapped_there_too() -> None:
    model, inputs = BY_NAME["kept in list"]()
    sparse = transform(model, inputs, sparsity=0.5)
    kept = sparse.order if isinstance(sparse.order, list) else []
    assert all(isinstance(layer, SparseModule) for layer in kept)
    assert type(model) is KeptInList and not any(isinstance(layer, SparseModule) for layer in model.order)


def test_keyword_calls_keep_working() -> None:
    model, _ = BY_NAME["tied embedding"]()
    tokens = torch.tensor([[1, 2]])
    sparse = transform(model, (tokens,))
    assert torch.equal(sparse(tokens=tokens), model(tokens=tokens))
    assert isinstance(model, TiedLanguageModel)


def test_dense_checkpoints_load_and_masks_stay() -> None:
    model, inputs = BY_NAME["convnet"]()
    sparse = transform(model, inputs, sparsity=0.5)
    before = {name: mask.clone() for name, mask in masks(sparse).items()}
    other, _ = BY_NAME["convnet"](seed=5)
    sparse.load_state_dict(other.state_dict())
    for name, mask in masks(sparse).items():
        assert torch.equal(mask, before[name])
        assert torch.equal(sparse.get_parameter(name), torch.where(mask, other.get_parameter(name), 0.0))


def test_fold_writes_zeros_into_a_new_parameter_where_the_invariant_was_broken() -> None:
    model, inputs = BY_NAME["mlp"]()
    sparse = transform(model, inputs, sparsity=0.5).eval()
    with torch.no_grad():
        sparse.get_submodule("0").weight.fill_(1.0)
    dense = finalize(sparse, inplace=True)
    assert (sparse.get_submodule("0").weight == 1).all()
    assert torch.equal(dense.get_parameter("0.weight"), masks(sparse)["0.weight"].double())
    assert dense.get_parameter("3.weight") is sparse.get_parameter("3.weight")
    assert torch.equal(run(dense, inputs)[0], run(sparse, inputs)[0])


def test_fold_refuses_values_that_readers_see_at_dead_entries() -> None:
    model, inputs = BY_NAME["straight through"]()
    sparse = transform(model, inputs, sparsity=0.5)
    with torch.no_grad():
        sparse.kernel.fill_(1.0)
    with pytest.raises(PassError, match="fold_masks: `kernel` has values at dead entries"):
        finalize(sparse)
    set_masks(sparse, masks(sparse))
    assert torch.equal(finalize(sparse).kernel, masks(sparse)["kernel"].double())


def test_report() -> None:
    model, inputs = BY_NAME["convnet"]()
    report = sparsity_report(transform(model, inputs, sparsity=0.75))
    by_name = {row.name: row for row in report.rows}
    assert by_name["stem.weight"].alive == 18 and by_name["stem.weight"].density == 0.25
    assert by_name["depthwise.weight"].route == "-" and "depthwise" in by_name["depthwise.weight"].reason
    assert report.sparsity == pytest.approx(0.75) and len(report.masked) == 4
    assert "4 masked weights" in str(report) and "stem.weight" in str(report)
    assert sparsity_report(model).density == 1.0


def test_blocks_of_the_generator_cover_every_route() -> None:
    routes = {
        weight.route
        for build in (
            lambda: blocks.PythonLinear(4, 4),
            lambda: blocks.Matmul(4, 4),
            lambda: blocks.Reused(nn.Linear(4, 4)),
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        )
        for weight in plan(build().double(), (torch.ones(2, 4).double(),)).masked
    }
    assert routes == set(Route)
