"""Groups: each row of the table against plain loops; totals; expansion."""

from __future__ import annotations

import warnings

import pytest
import torch
from fisher_cases import Attention, Fn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.curvature import FisherCollector, Heads
from fxsparse.curvature.groups import Grouping, assigned, blocks, element, slices
from fxsparse.curvature.groups_types import Reading, groupings_of
from fxsparse.errors import ConfigError

F64 = torch.float64


def of(module: nn.Module, name: str, **options: object) -> tuple[Grouping, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return groupings_of(module, [name], **options)[name]  # type: ignore[arg-type]


def sums(grouping: Grouping, squares: Tensor) -> Tensor:
    return grouping.reduce(squares[None])[0]


def test_rows_of_linear_and_convolutions() -> None:
    for module in (nn.Linear(3, 4), nn.Conv1d(4, 6, 2, groups=2), nn.Conv2d(4, 4, 3, groups=4), nn.Conv3d(2, 3, 1)):
        (grouping,) = of(module, "weight")
        squares = torch.rand(module.weight.shape, dtype=F64)
        assert grouping.group_type == "channel"
        assert torch.allclose(sums(grouping, squares), torch.stack([row.sum() for row in squares]))
        (bias,) = of(module, "bias")
        assert bias.group_type == "element" and bias.output_shape == tuple(module.bias.shape)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_output_channels_of_transposed_convolutions(groups: int) -> None:
    module = nn.ConvTranspose2d(4, 8, 3, groups=groups)
    (grouping,) = of(module, "weight")
    squares = torch.rand(module.weight.shape, dtype=F64)
    expected = torch.zeros(8, dtype=F64)
    for i in range(4):
        for j in range(8 // groups):
            expected[(i // (4 // groups)) * (8 // groups) + j] += squares[i, j].sum()
    assert torch.allclose(sums(grouping, squares), expected)
    x = torch.randn(1, 4, 5, 5, dtype=F64)
    module = module.double()
    for channel in range(8):  # the group is what the channel depends on
        module.zero_grad()
        module(x)[0, channel].sum().backward()
        reached = module.weight.grad.abs().sum((2, 3)) > 0
        assert torch.equal(reached, grouping.index == channel)


def test_matrices_that_are_stored_transposed() -> None:
    model = Fn(lambda s, x: torch.addmm(s.b, x, s.w), w=nn.Parameter(torch.randn(6, 3)), b=nn.Parameter(torch.zeros(3)))
    collector = FisherCollector(model)
    collector.update((torch.randn(4, 6), torch.tensor([0, 1, 2, 0])))
    assert collector.get()["default|w|channel"].shape == (3,)
    assert of(model, "w", readings={"w": Reading(1)})[0].axis == 1


def test_vocabularies() -> None:
    (tokens,) = of(nn.Embedding(7, 3, padding_idx=2), "weight")
    squares = torch.rand(7, 3, dtype=F64)
    expected = squares.sum(1)
    expected[2] = 0
    assert tokens.group_type == "token" and torch.allclose(sums(tokens, squares), expected)
    assert tokens.members.tolist() == [3, 3, 0, 3, 3, 3, 3]
    (small,) = of(nn.Embedding(50_000, 1), "weight")
    assert small.group_type == "token" and small.count == 50_000
    (buckets,) = of(nn.Embedding(50_001, 2, padding_idx=50_000), "weight")
    assert buckets.group_type == "vocab_bucket" and buckets.count == 51
    assert buckets.members[0] == 2000 and buckets.members[50] == 0
    (short,) = of(nn.Embedding(50_001, 2), "weight")
    assert short.members[50] == 2 and short.members.sum() == 100_002


class TiedTables(nn.Module):
    """A table with a padding row, which another use reads too."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.table, self.head = use, nn.Embedding(5, 6, padding_idx=0), nn.Linear(6, 5, bias=False)
        self.register_buffer("scale", torch.randn(5, 6))
        if use == "module":
            self.head.weight = self.table.weight
        if use == "other table":
            self.other = nn.Embedding(5, 6)
            self.other.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids).mean(1).tanh()
        if self.use == "function":
            return nn.functional.linear(h, self.table.weight)
        if self.use == "table without padding":
            h = h + nn.functional.embedding(ids, self.table.weight).sum(1).tanh()
        if self.use == "other table":
            h = h + self.other(ids).sum(1).tanh()
        if self.use == "expression":
            h = h + (self.table.weight * self.scale).sum(0)
        if self.use == "several operands":
            h = h + torch.einsum("nd,vd,vd->nd", h, self.table.weight, self.scale)
        return self.head(h)


@pytest.mark.filterwarnings("ignore:.*is collected by per-sample gradients")
@pytest.mark.parametrize(
    "use", ["module", "function", "table without padding", "other table", "expression", "several operands", "alone"]
)
def test_a_padding_row_counts_where_another_use_reads_it(use: str) -> None:
    torch.manual_seed(0)
    model = TiedTables(use).double()
    batch = torch.tensor([[0, 1, 2], [3, 0, 0], [1, 1, 4]]), torch.tensor([0, 2, 4])
    collectors = [FisherCollector(model, groups=groups) for groups in ("auto", "element")]
    for collector in collectors:
        collector.update(batch)
    grouped = collectors[0].get()["default|table.weight|token"]
    rows = collectors[1].get()["default|table.weight|element"].sum(1)
    assert torch.allclose(grouped, rows, rtol=1e-12) and bool(rows[0] > 0) is (use != "alone")
    expanded = collectors[0].parameters()["table.weight"]
    assert torch.allclose(expanded.sum(1), rows, rtol=1e-12)


def test_large_vocabularies_are_collected_in_buckets() -> None:
    torch.manual_seed(0)
    model = Fn(lambda s, x: s.head(s.e(x).sum(1)), e=nn.Embedding(50_001, 2), head=nn.Linear(2, 3)).double()
    x = torch.tensor([[0, 999, 50_000, 0], [1000, 1, 1, 7]])
    collector = FisherCollector(model, variance=False)
    collector.update((x, torch.tensor([0, 2])))
    found = collector.get()["default|e.weight|vocab_bucket"]
    whole = FisherCollector(model, groups="element", variance=False, parameters=["e.weight"])
    whole.update((x, torch.tensor([0, 2])))
    rows = whole.get()["default|e.weight|element"].sum(1)
    assert found.shape == (51,)
    assert torch.allclose(found[0], rows[:1000].sum()) and torch.allclose(found[50], rows[50_000:].sum())
    assert float(found[1]) == pytest.approx(float(rows[1000])) and not found[2:50].any()


@pytest.mark.parametrize("heads, kv", [(4, 4), (8, 2), (4, 1)])
def test_declared_heads_of_grouped_queries(heads: int, kv: int) -> None:
    torch.manual_seed(0)
    model = Attention(heads, kv, 2).double()
    layout = Heads(heads, kv, queries=("q.weight",), keys=("k.weight", "v.weight"), outputs=("o.weight",))
    x, y = torch.randn(3, 4, 6, dtype=F64), torch.tensor([0, 1, 2])
    grouped = FisherCollector(model, heads=[layout])
    dense = FisherCollector(model, groups="element")
    grouped.update((x, y))
    dense.update((x, y))
    for name, count in (("q", heads), ("k", kv), ("v", kv)):
        rows = dense.get()[f"default|{name}.weight|element"].sum(1)
        found = grouped.get()[f"default|{name}.weight|head"]
        assert found.shape == (count,) and torch.allclose(found, rows.view(count, 2).sum(1), rtol=1e-10)
    columns = dense.get()["default|o.weight|element"].sum(0)
    assert torch.allclose(grouped.get()["default|o.weight|head"], columns.view(heads, 2).sum(1), rtol=1e-10)


def test_a_layout_that_does_not_fit_is_refused_instead_of_another_one() -> None:
    with pytest.raises(ConfigError, match="`k.weight` has 4 rows or columns, no multiple of `heads` \\(=3\\)"):
        of(Attention(4, 2, 2), "k.weight", heads=[Heads(3, 3, keys=("k.weight",))])
    with pytest.raises(ConfigError, match="no parameter of the model"):
        of(Attention(), "k.weight", heads=[Heads(3, keys=("key.weight",))])


def test_fused_projections_are_three_entries_whose_total_is_conserved() -> None:
    module = nn.MultiheadAttention(8, 2)
    ones = torch.ones(24, 8, dtype=F64)
    entries = of(module, "in_proj_weight")
    assert [each.group_type for each in entries] == ["head:q", "head:k", "head:v"]
    assert sum(float(sums(each, ones).sum()) for each in entries) == ones.numel()
    squares = torch.rand(24, 8, dtype=F64)
    for index, each in enumerate(entries):
        part = squares[8 * index : 8 * index + 8]
        assert torch.allclose(sums(each, squares), torch.stack([part[:4].sum(), part[4:].sum()]))
    assert torch.allclose(
        sum((each.expand(sums(each, squares)) for each in entries), torch.zeros(24, 8, dtype=F64)).sum(), squares.sum()
    )
    (columns,) = of(module, "out_proj.weight")
    own = torch.rand(8, 8, dtype=F64)
    assert columns.group_type == "head" and torch.allclose(sums(columns, own), own.sum(0).view(2, 4).sum(1))


def test_interleaved_and_blocked_fused_layouts() -> None:
    squares = torch.rand(16, 3, dtype=F64)  # 4 query heads, 2 key heads, head_dim 2
    model = Fn(lambda s, x: x, w=nn.Parameter(torch.zeros(16, 3)))
    q, k, v = of(model, "w", heads=[Heads(4, 2, fused=("w",), interleaved=True)])
    rows = squares.sum(1).view(8, 2).sum(1)  # one value for each block of two rows: q0 q1 k0 v0 q2 q3 k1 v1
    assert torch.allclose(sums(q, squares), rows[[0, 1, 4, 5]])
    assert torch.allclose(sums(k, squares), rows[[2, 6]]) and torch.allclose(sums(v, squares), rows[[3, 7]])
    q, k, v = of(model, "w", heads=[Heads(4, 2, fused=("w",))])
    assert torch.allclose(sums(q, squares), rows[:4])
    assert torch.allclose(sums(k, squares), rows[4:6]) and torch.allclose(sums(v, squares), rows[6:])
    wide = Fn(lambda s, x: x, w=nn.Parameter(torch.zeros(3, 16)))
    (q, k, v) = of(wide, "w", heads=[Heads(4, 2, fused=("w",), stored_transposed=True)])
    assert q.axis == 1 and torch.allclose(sums(v, squares.T), rows[6:])


@pytest.mark.parametrize("kind, gates", [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1), (nn.LSTMCell, 4), (nn.GRUCell, 3)])
def test_units_of_recurrent_layers(kind: type[nn.Module], gates: int) -> None:
    module = kind(5, 4)
    name = "weight_hh" if "Cell" in kind.__name__ else "weight_hh_l0"
    (grouping,) = of(module, name)
    squares = torch.rand(4 * gates, 4, dtype=F64)
    expected = torch.stack([sum(squares[g * 4 + u].sum() for g in range(gates)) for u in range(4)])
    assert grouping.group_type == "unit" and torch.allclose(sums(grouping, squares), expected)


def test_the_rest_is_kept_by_element_with_one_warning_for_each() -> None:
    model = Fn(lambda s, x: s.head(torch.tanh(x * s.a)), a=nn.Parameter(torch.ones(1, 6)), head=nn.Linear(6, 3))
    collector = FisherCollector(model)
    with pytest.warns(UserWarning, match="`a` \\(1, 6\\) of a Fn has axes of unknown meaning") as caught:
        collector.update((torch.randn(4, 6), torch.tensor([0, 1, 2, 0])))
    assert len(caught) == 1
    collector.update((torch.randn(4, 6), torch.tensor([0, 1, 2, 0])))
    assert collector.get()["default|a|element"].shape == (1, 6)


def test_own_groups() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def rule(name: str, parameter: Tensor, module: nn.Module) -> object:
        if name == "0.weight":
            return torch.tensor([0, 0, 1, -1])
        return {"0.bias": "element", "2.weight": blocks("half", (3, 4), 1, 2)}.get(name)

    batch = torch.randn(5, 6, dtype=F64), torch.tensor([0, 1, 2, 0, 1])
    own = FisherCollector(model, groups=rule)  # type: ignore[arg-type]
    dense = FisherCollector(model, groups="element")
    own.update(batch)
    dense.update(batch)
    rows = dense.get()["default|0.weight|element"].sum(1)
    found = own.get()
    assert torch.allclose(found["default|0.weight|custom"], torch.stack([rows[0] + rows[1], rows[2]]))
    columns = dense.get()["default|2.weight|element"].sum(0)
    assert torch.allclose(found["default|2.weight|half"], columns.view(2, 2).sum(1))
    with pytest.raises(ConfigError, match="must be int64"):
        assigned("custom", (4, 6), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="returned 3 for"):
        of(model, "0.weight", groups=lambda *_: 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.randoms(use_true_random=False))
def test_expansion_conserves_what_reduction_adds(
    rows: int, columns: int, kernel: int, which: int, random: object
) -> None:
    shape = (rows, columns, kernel)
    index = torch.tensor([random.randrange(rows) for _ in range(rows)])  # type: ignore[attr-defined]
    grouping = (
        slices("channel", shape),
        slices("channel", shape, 1),
        blocks("head", shape, 1, 2),
        assigned("custom", shape, index),
    )[which]
    values = torch.rand(grouping.count, dtype=F64)
    values[grouping.members == 0] = 0
    expanded = grouping.expand(values)
    assert expanded.shape == shape
    assert torch.allclose(sums(grouping, expanded), values, rtol=1e-14, atol=0)
    assert torch.allclose(expanded.sum(), values.sum(), rtol=1e-13)
    assert float(grouping.members.sum()) == rows * columns * kernel


def test_elements_stay_as_they_are() -> None:
    values = torch.rand(2, 3)
    assert torch.equal(element((2, 3)).expand(values.flatten()), values)
    assert torch.equal(element((2, 3)).reduce(values[None]), values.view(1, 6))


def test_masks_and_the_support() -> None:
    import fxsparse

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(4, 6, dtype=F64), torch.tensor([0, 1, 2, 0])
    for sample in (x, torch.randn(4, 2, 6, dtype=F64)):
        sparse = fxsparse.transform(model, (sample,), sparsity=0.5)
        masks = fxsparse.masks(sparse)
        effective = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        effective.load_state_dict({k: v for k, v in sparse.state_dict().items() if "mask" not in k})
        targets = y if sample.ndim == 2 else torch.randint(0, 3, (4, 2))
        reference = FisherCollector(effective, nn.CrossEntropyLoss(), groups="element")
        reference.update((sample, targets))
        for support in ("mask", "dense"):
            for groups in ("auto", "element"):
                collector = FisherCollector(sparse, nn.CrossEntropyLoss(), groups=groups, support=support)
                collector.update((sample, targets))
                for key, value in collector.get().items():
                    name = key.split("|")[1]
                    expected = reference.get()[f"default|{name}|element"]
                    if support == "mask" and name in masks:
                        expected = expected * masks[name]
                    if key.endswith("channel"):
                        expected = expected.sum(1)
                    assert torch.allclose(value, expected, rtol=1e-10, atol=1e-14), (key, support)


def test_masks_at_the_parameter() -> None:
    import fxsparse

    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 6, dtype=F64))
            self.head = nn.Linear(5, 3, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:  # Python that cannot be traced
                return self.head(x[:, :5])
            return self.head(torch.tanh(x @ self.w.T))

    x, y = torch.randn(4, 6, dtype=F64), torch.tensor([0, 1, 2, 0])
    sparse = fxsparse.transform(Odd(), (x,), sparsity=0.5)
    mask = fxsparse.masks(sparse)["w"]
    found = FisherCollector(sparse, groups="element")
    found.update((x, y))
    value = found.get()["default|w|element"]
    assert not value[~mask].any() and bool((value[mask] > 0).any())
