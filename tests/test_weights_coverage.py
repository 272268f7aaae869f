"""Weights of every kind: masked by default or by name, exactly, through training, saving and folding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn import masks
from fxsparse.planning import finalize, plan, sparsity_report, transform
from fxsparse.planning.layouts import einsum_layout, use_layout
from fxsparse.sparsity import Block, Channel, ConstantFanIn, Layout, NByM, SharedSupport, keep_count
from tests.weight_cases import (
    PLAIN,
    WEIGHT_CASES,
    BatchedExperts,
    Experts,
    FusedProjection,
    SelfAttention,
    WeightCase,
    gradients,
    train,
    twin,
)

pytestmark = pytest.mark.filterwarnings("ignore")
every = pytest.mark.parametrize("case", WEIGHT_CASES, ids=lambda case: case.name)


@every
def test_at_sparsity_zero_nothing_changes(case: WeightCase) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, **case.options)
    assert set(masks(sparse)) == set(case.masked)
    assert all(bool(mask.all()) for mask in masks(sparse).values())
    for training in (False, True):
        reference = twin(model, case)
        reference.train(training), sparse.train(training)
        assert torch.equal(reference(*inputs), sparse(*inputs))
        old, new = gradients(reference, inputs), gradients(sparse, inputs)
        assert old.keys() == new.keys()
        for name in old:
            torch.testing.assert_close(new[name], old[name], rtol=1e-12, atol=1e-13)
        sparse.load_state_dict(model.state_dict())


@every
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zeros_are_exactly_the_dead_entries_through_training(case: WeightCase, optimizer: str) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.8, **case.options)
    before = {name: sparse.get_parameter(name).detach().clone() for name in masks(sparse)}
    train(sparse, inputs, optimizer)
    for name, mask in masks(sparse).items():
        weight = sparse.get_parameter(name)
        assert int(mask.sum()) == keep_count(mask.numel(), 0.8)
        assert torch.equal(weight == 0, ~mask), name
        assert bool((weight != before[name]).any()) and bool(torch.isfinite(weight).all()), name
    for parameter in sparse.parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_a_sparse_model_is_the_model_with_zeros_written_in(case: WeightCase) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.6, **case.options)
    with torch.no_grad():
        for name, mask in masks(sparse).items():
            model.get_parameter(name).mul_(mask)
    assert torch.equal(model(*inputs), sparse(*inputs))
    old, new = gradients(model, inputs), gradients(sparse, inputs)
    for name, gradient in new.items():
        expected = old[name] * masks(sparse)[name] if name in masks(sparse) else old[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


@every
def test_states_load_strictly_in_both_directions(case: WeightCase) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.5, **case.options)
    train(sparse, inputs, "adamw", 1)
    sparse.eval(), model.eval()
    state = copy.deepcopy(dict(sparse.state_dict()))
    assert [name for name in state if not name.endswith("_mask")] == list(model.state_dict())
    again = transform(case()[0], inputs, **case.options).eval()
    again.load_state_dict(state)
    assert all(torch.equal(masks(again)[name], mask) for name, mask in masks(sparse).items())
    assert torch.equal(again(*inputs), sparse(*inputs))
    again.load_state_dict(model.state_dict())  # without masks: they stay, and dead entries are zero again
    assert all(torch.equal(again.get_parameter(name) == 0, ~mask) for name, mask in masks(sparse).items())
    twin(model, case).load_state_dict({name: value for name, value in state.items() if not name.endswith("_mask")})


@every
def test_finalize_keeps_the_function(case: WeightCase) -> None:
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.8, **case.options).eval()
    train(sparse, inputs, "sgd", 1)
    with torch.no_grad():
        expected = sparse(*inputs)
        dense = finalize(sparse)
        torch.testing.assert_close(dense(*inputs), expected, rtol=1e-12, atol=1e-13)
        assert torch.equal(sparse(*inputs), expected)
    stays = case.name.startswith("standardised")
    assert set(masks(dense)) == (set(case.masked) if stays else set())
    if not stays:
        assert list(dense.state_dict()) == list(model.state_dict())


# --- patterns apply per expert, per projection ------------------------------------------------------------------------


def part_counts(mask: Tensor, parts: int, axis: int) -> list[int]:
    return [int(part.sum()) for part in mask.chunk(parts, axis)]


@pytest.mark.parametrize("pattern", [ConstantFanIn(), SharedSupport(3), Channel(0), Channel(1), Block(2, 2)])
def test_q_k_and_v_are_pruned_alike_and_no_group_is_of_two(pattern: object) -> None:
    model, x = SelfAttention(), torch.randn(2, 4, 8)
    sparse = transform(model, (x,), sparsity=0.5, pattern=pattern, include="*in_proj_weight")
    mask = masks(sparse)["attention.in_proj_weight"]
    assert part_counts(mask, 3, 0) == [32, 32, 32]
    magnitudes = model.attention.in_proj_weight.detach().abs()
    for part, scores in zip(mask.chunk(3), magnitudes.chunk(3), strict=True):
        assert torch.equal(part, pattern.mask(scores, 0.5))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "pattern", [ConstantFanIn(), SharedSupport(3), Channel(0), Channel(1), Block(2, 2), NByM(1, 2)]
)
@pytest.mark.parametrize("name", ["up", "down"])
def test_each_expert_is_pruned_as_if_alone(pattern: object, name: str) -> None:
    model, x = Experts(), torch.randn(5, 6)
    mask = masks(transform(model, (x,), sparsity=0.5, pattern=pattern, include=name))[name]
    for one, weight in zip(mask, model.get_parameter(name).detach(), strict=True):
        assert torch.equal(one, pattern.mask(weight.abs(), 0.5))  # type: ignore[attr-defined]


def test_layouts_of_experts_and_projections() -> None:
    found = {w.name: w.layout for w in plan(Experts(), (torch.randn(5, 6),)).weights}
    assert found["up"] == found["down"] == Layout(1, 2, batch=(0,))
    found = {w.name: w.layout for w in plan(BatchedExperts(), (torch.randn(5, 6),)).weights}
    assert found["up"] == Layout(2, 1, batch=(0,)) and found["down"] == Layout(1, 2, batch=(0,))
    assert found["mix"] == Layout(2, 1)
    (weight,) = plan(FusedProjection(), (torch.randn(2, 3, 4),)).weights
    assert weight.layout == Layout(blocks=3)


@pytest.mark.parametrize("pattern", [ConstantFanIn(), SharedSupport(3)])
def test_rows_of_a_weight_that_is_stored_the_other_way_round(pattern: object) -> None:
    case = next(case for case in PLAIN if case.name == "conv1d")
    model, inputs = case()
    sparse = transform(model, inputs, sparsity=0.5, pattern=pattern)
    for name, mask in masks(sparse).items():
        assert torch.equal(mask, pattern.mask(model.get_parameter(name).detach().abs().t(), 0.5).t())  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_gates_are_blocks(kind: type[nn.RNNBase], gates: int) -> None:
    model, x = kind(5, 6), torch.randn(3, 2, 5)
    mask = masks(transform(model, (x,), sparsity=0.5, pattern=SharedSupport(4), include="weight_hh_l0"))["weight_hh_l0"]
    for part, weight in zip(mask.chunk(gates), model.weight_hh_l0.detach().chunk(gates), strict=True):
        assert torch.equal(part, SharedSupport(4).mask(weight.abs(), 0.5))


@pytest.mark.parametrize(
    "equation, place, rank, expected",
    [
        ("bi,io->bo", 1, 2, Layout(1, 0)),
        ("bi,oi->bo", 1, 2, Layout(0, 1)),
        ("oi,bi->bo", 0, 2, Layout(0, 1)),
        ("bnd,hde->bhne", 1, 3, Layout(2, 1, batch=(0,))),
        ("ebi,eio->ebo", 1, 3, Layout(2, 1, batch=(0,))),
        ("bhne,hed->bnd", 1, 3, Layout(2, 1)),
        ("b...i,io->b...o", 1, 2, Layout(1, 0)),
        ("bi,i...->b...", 1, 2, None),
        ("bi,ii->b", 1, 2, None),
        ("bi,io", 1, 2, None),
        ("bi,bi->b", 1, 2, None),
    ],
)
def test_einsum_layouts(equation: str, place: int, rank: int, expected: Layout | None) -> None:
    assert einsum_layout(equation, place, rank) == expected


@pytest.mark.parametrize(
    "op, argument, derived, shape, seen, expected",
    [
        ("linear", "weight", (), (4, 3), (4, 3), Layout(0, 1)),
        ("linear", "weight", ("t",), (3, 4), (4, 3), Layout(1, 0)),
        ("linear", "weight", ("getitem",), (5, 4, 3), (4, 3), Layout(1, 2, batch=(0,))),
        ("linear", "weight", ("getitem", "t"), (5, 3, 4), (4, 3), Layout(2, 1, batch=(0,))),
        ("linear", "weight", ("chunk", "getitem"), (12, 3), (4, 3), Layout(0, 1, blocks=3)),
        ("linear", "weight", ("view",), (12,), (4, 3), None),
        ("bmm", "mat2", (), (5, 3, 4), (5, 3, 4), Layout(2, 1, batch=(0,))),
        ("bmm", "input", (), (5, 3, 4), (5, 3, 4), Layout(1, 2, batch=(0,))),
        ("bmm", "mat2", ("getitem",), (5, 3, 4), (9, 3, 4), Layout(2, 1, batch=(0,))),
        ("_grouped_mm", "mat_b", ("transpose",), (5, 4, 3), (5, 3, 4), Layout(1, 2, batch=(0,))),
        ("inner", "other", (), (4, 3), (4, 3), Layout(0, 1)),
        ("addmm", "mat2", (), (3, 4), (3, 4), Layout(1, 0)),
        ("mv", "vec", (), (4,), (4,), None),
        ("conv2d", "weight", (), (4, 3, 1, 1), (4, 3, 1, 1), Layout.conv(1)),
        ("conv2d", "weight", ("transpose",), (3, 4, 1, 1), (4, 3, 1, 1), None),
    ],
)
def test_layouts_of_uses(
    op: str, argument: str, derived: tuple[str, ...], shape: tuple[int, ...], seen: tuple[int, ...], expected: object
) -> None:
    assert use_layout(op, argument, derived, shape, seen) == expected


# --- fast paths, defaults, choice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
def test_the_fast_path_of_attention_reads_the_masks(nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    sparse = transform(model, ((x,), {"src_key_padding_mask": padding}), sparsity=0.5)
    oracle = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks(sparse).items():
            oracle.get_parameter(name).mul_(mask)
        for module in (oracle, sparse):
            module.eval()
        for kwargs in ({}, {"src_key_padding_mask": padding}):
            torch.testing.assert_close(sparse(x, **kwargs), oracle(x, **kwargs), rtol=1e-6, atol=1e-6)
    alone = transform(SelfAttention().eval(), (x,), sparsity=0.5)
    with torch.no_grad():
        fast = alone(x)
    torch.testing.assert_close(fast, alone(x), rtol=1e-5, atol=1e-6)  # gradients on: the slow path


class OnlyTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


@pytest.mark.parametrize(
    "model, inputs, names",
    [
        (nn.Embedding(5, 4), (torch.tensor([1]),), {"weight"}),
        (nn.LSTM(4, 3), (torch.randn(2, 4),), {"weight_ih_l0", "weight_hh_l0"}),
        (nn.Bilinear(4, 3, 2), (torch.randn(2, 4), torch.randn(2, 3)), {"weight"}),
        (nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.BatchNorm1d(4)), (torch.randn(2, 4, 5),), {"0.weight"}),
        (OnlyTable(), (torch.randn(3, 8),), {"table"}),
        (nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))), (torch.randn(2, 4),), {None}),
    ],
    ids=["embedding", "lstm", "bilinear", "depthwise", "table", "orthogonal"],
)
def test_where_nothing_is_masked_by_default_the_rest_is(
    model: nn.Module, inputs: tuple[Tensor, ...], names: set[str | None]
) -> None:
    decided = plan(model, inputs, sparsity=0.5)
    masked = {weight.name for weight in decided.masked}
    assert masked == names or (names == {None} and masked == {"0.parametrizations.weight.original"})
    assert all("no weight that is masked by default" in weight.reason for weight in decided.masked)
    assert "name it with" not in str(decided.masked)
    sparse = decided.apply()
    assert masks(sparse).keys() == masked
    assert "no weight that is masked by default" in str(sparsity_report(sparse))


def test_the_rest_stays_dense_where_something_is_masked_by_default() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    assert {weight.name for weight in plan(model, (torch.tensor([1]),)).masked} == {"1.weight"}
    with pytest.raises(ConfigError, match="leave no weight"):
        plan(model, (torch.tensor([1]),), exclude="1")


@pytest.mark.parametrize("case", WEIGHT_CASES, ids=lambda case: case.name)
def test_a_weight_is_chosen_by_name_pattern_type_and_predicate(case: WeightCase) -> None:
    model, inputs = case()
    name = case.masked[0]
    owner = model.get_submodule(name.rpartition(".")[0])
    ways = [name, lambda found, parameter, module: found == name, f"{name[:-1]}?"]
    for way in ways:
        assert name in {weight.name for weight in plan(model, inputs, include=way).masked}
    if owner is not model:
        assert name in {weight.name for weight in plan(model, inputs, include=type(owner)).masked}
    others = {weight.name for weight in plan(model, inputs, **case.options).masked} - {name}
    if others:
        decided = plan(model, inputs, exclude=name, **case.options)
        assert {weight.name for weight in decided.masked} == others
        assert next(w for w in decided.weights if w.name == name).route is None


class Index(nn.Module):
    """Rows of a table, looked up by a tensor, feed a product."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.head = nn.Parameter(torch.randn(4, 3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids] @ self.head


def test_a_table_that_is_looked_up_is_no_weight() -> None:
    assert {weight.name for weight in plan(Index(), (torch.tensor([1, 2]),)).masked} == {"head"}


class OwnState(nn.Linear):
    """A layer that saves itself in its own way, which knows nothing of masks."""

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


def test_masks_are_saved_where_a_module_saves_itself() -> None:
    model, x = nn.Sequential(OwnState(6, 5), nn.Linear(5, 2)), torch.randn(2, 6)
    sparse = transform(model, (x,), sparsity=0.5)
    assert "0.weight_mask" in sparse.state_dict()
    fresh = transform(nn.Sequential(OwnState(6, 5), nn.Linear(5, 2)), (x,), sparsity=0.5)
    fresh.load_state_dict(sparse.state_dict())
    assert all(torch.equal(mask, masks(sparse)[name]) for name, mask in masks(fresh).items())
    assert torch.equal(fresh(x), sparse(x))
    assert "0.weight_mask" not in finalize(sparse).state_dict()
