"""Exact compaction on small networks: shapes that must come out, and equality with the masked model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.errors import ConfigError, DataError, FxSparseError, PassError
from fxsparse.graph import CapturedModule
from fxsparse.planning.compaction import compact, compaction_report
from tests.passes.compact_networks import CASES, Attention, Case, Recurrent, Residual, build

BY_NAME = {case.name: case for case in CASES}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def masked(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with masks that are False where it is zero."""
    sparse = fxsparse.transform(model, (x,), sparsity=0.0)
    fxsparse.set_masks(sparse, {name: sparse.get_parameter(name) != 0 for name in fxsparse.masks(sparse)})
    return sparse


def assert_equal(old: nn.Module, new: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected, found = old.eval()(x), new.eval()(x)
    assert expected.shape == found.shape
    assert float((expected - found).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_dead_channels_of_a_small_network_go(case: Case) -> None:
    model, x = build(case)
    model = masked(model, x)
    before = {name: value.clone() for name, value in state(model).items()}
    small = compact(model, (x,))
    report = compaction_report(small)
    assert not report.refused
    assert {name: tuple(state(small)[name].shape) for name in case.shapes} == case.shapes
    assert_equal(model, small, x)
    assert_equal(model, small, torch.cat((x, x.flip(0) + (0 if x.dtype == torch.int64 else 1.5)))[:3])
    assert list(small.state_dict()) == list(model.state_dict())
    for name, value in state(model).items():
        assert torch.equal(value, before[name])  # the caller's model stays
        assert value.data_ptr() != state(small)[name].data_ptr()


@pytest.mark.parametrize("name", ["depthwise separable", "transformer block", "grouped queries"])
@pytest.mark.parametrize("finalised", [True, False])
def test_without_masks_zeros_tell_what_is_dead(name: str, finalised: bool) -> None:
    case = BY_NAME[name]
    model, x = build(case)
    model = fxsparse.finalize(masked(model, x)) if finalised else model
    small = compact(model, (x,))
    assert {name: tuple(state(small)[name].shape) for name in case.shapes} == case.shapes
    assert_equal(model, small, x)


@pytest.mark.parametrize("name", ["mlp", "residual", "transformer block"])
def test_masks_are_shortened_with_their_weights(name: str) -> None:
    model, x = build(BY_NAME[name])
    small = compact(masked(model, x), (x,))
    masks = fxsparse.masks(small)
    assert masks
    for weight, mask in masks.items():
        assert mask.shape == small.get_parameter(weight).shape
        assert not small.get_parameter(weight).detach()[~mask].any()
    small(x).sum().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    for weight, mask in fxsparse.masks(small).items():
        assert not (small.get_parameter(weight).detach() * ~mask).any()


def test_attributes_say_the_new_sizes() -> None:
    model, x = build(BY_NAME["depthwise separable"])
    small = compact(masked(model, x), (x,))
    assert (small.depth.in_channels, small.depth.out_channels, small.depth.groups) == (5, 5, 5)
    assert (small.expand_norm.num_features, small.project.in_channels) == (5, 5)
    assert "5, 5, kernel_size" in repr(small.depth)


def test_a_captured_graph_stays_one_and_its_views_follow() -> None:
    model, x = build(BY_NAME["transformer block"])
    small = compact(masked(model, x), (x,))
    assert isinstance(small, CapturedModule)
    assert "3, 3, floordiv" in small.code and ", 12)" in small.code  # three heads of four


class Fixed(nn.Module):
    """Python that nobody traces, with the head count as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.inner = 4, 16
        self.q, self.v, self.o = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 1e9):
            return x
        q, v = (each(x).view(*x.shape[:2], self.count, -1).transpose(1, 2) for each in (self.q, self.v))
        return self.o(F.scaled_dot_product_attention(q, q, v).transpose(1, 2).reshape(*x.shape[:2], self.inner))


def test_attributes_of_a_module_that_stays_python_follow() -> None:
    torch.manual_seed(0)
    model, x = Fixed().double().eval(), torch.randn(2, 3, 6).double()
    with torch.no_grad():
        model.v.weight[4:8] = 0.0
    small = compact(masked(model, x), (x,))
    assert (small.count, small.inner, small.q.weight.shape) == (3, 12, (12, 6))
    assert_equal(model, small, x)


def test_constants_are_folded_and_the_report_says_where() -> None:
    model, x = build(BY_NAME["mlp"])
    report = compaction_report(compact(masked(model, x), (x,)))
    assert report.parameters == (5 * 8 + 8 + 8 * 7 + 7 + 7 * 3 + 3, 5 * 5 + 5 + 5 * 6 + 6 + 6 * 3 + 3)
    assert report.macs == (2 * (40 + 56 + 21), 2 * (25 + 30 + 18))
    assert [row.removed for row in report.rows] == [3, 1]
    assert report.rows[0].folded == ("2.bias",) and report.rows[1].folded == ("4.bias",)
    text = str(report)
    assert "0.weight[0]" in text and "2.bias" in text and "barrier: output" in text and "worst difference" in text


def test_a_bias_free_convolution_folds_into_the_mean_of_its_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.Tanh(), nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)
    )
    model, x = model.double(), torch.randn(3, 2, 4, 4).double()
    with torch.no_grad():
        model[0].weight[:2] = 0.0
    small = compact(masked(model.eval(), x), (x,))
    assert small[0].weight.shape[0] == 4
    assert not torch.equal(small[3].running_mean, model[3].running_mean)
    assert_equal(model, small, x)
    assert "train mode: equal" in str(compaction_report(small))  # the batch mean takes any constant
    torch.testing.assert_close(small.train()(x), model.train()(x), rtol=1e-10, atol=1e-10)


def test_a_constant_behind_zero_padding_is_merged_never_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 3, 3, padding=1)).double()
    x = torch.randn(2, 2, 5, 5).double()
    with torch.no_grad():
        model[0].weight[:4] = 0.0
    small = compact(masked(model, x), (x,))
    assert small[0].weight.shape[0] == 3  # two alive, and one for all four constants
    assert torch.equal(small[2].bias, model[2].bias)
    assert_equal(model, small, x)


def test_one_constant_that_cannot_go_is_named() -> None:
    model, x = build(BY_NAME["depthwise separable"])
    with torch.no_grad():
        nn.init.normal_(model.depth.weight)
    report = compaction_report(compact(masked(model, x), (x,)))
    assert any("zero padding" in reason and "`depth`" in reason for reason in report.kept)


def test_train_mode_is_reported() -> None:
    model, x = build(BY_NAME["residual"])
    report = compaction_report(compact(masked(model, x), (x,)))
    assert any(note.startswith("train mode: outputs differ") for note in report.notes)


def test_a_layer_with_nothing_alive_keeps_one_channel() -> None:
    model, x = build(Case("", BY_NAME["mlp"].build, (2, 5), {"0.weight": tuple(range(8))}, {}))
    small = compact(masked(model, x), (x,))
    assert small[0].weight.shape == (1, 5)
    assert_equal(model, small, x)


def test_constants_go_into_the_bias_of_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    model, x = Recurrent().double().eval(), torch.randn(2, 3, 4).double()
    with torch.no_grad():
        model.before.weight[:2] = 0.0
    small = compact(masked(model, x), (x,))
    assert small.before.weight.shape == (4, 4) and small.rnn.input_size == 4
    assert any("rnn.bias_ih_l0" in row.folded for row in compaction_report(small).rows)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_auxiliary_heads_of_train_mode_are_shortened_too() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.extra = nn.Linear(4, 6, bias=False), nn.Linear(6, 2), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = torch.relu(self.body(x))
            return (self.head(y), self.extra(y)) if self.training else self.head(y)

    torch.manual_seed(0)
    model, x = Auxiliary().double().eval(), torch.randn(2, 4).double()
    with torch.no_grad():
        model.body.weight[:2] = 0.0
        model.head.weight[:, 5] = 0.0  # read by the other head in train mode
    small = compact(masked(model, x), (x,))
    assert small.extra.weight.shape == (3, 4) and small.head.weight.shape == (2, 4)
    for expected, found in zip(model.train()(x), small.train()(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_another_way_through_the_model_is_not_broken() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            return self.one(y) if float(x.sum()) > 0 else self.two(y)

    torch.manual_seed(0)
    model, x = Branching().double().eval(), torch.rand(2, 4).double()
    with torch.no_grad():
        model.first.weight[:2] = 0.0
    small = compact(masked(model, x), (x,))
    assert_equal(model, small, x)
    assert_equal(model, small, -x)


def test_a_wrong_solution_is_found_out_and_searched_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxsparse.passes import compact_channels

    model, x = build(BY_NAME["mlp"])
    right = compact_channels.shorten

    def wrong(module: nn.Module, kept: dict, folds: dict, merges: tuple) -> tuple[str, ...]:  # type: ignore[type-arg]
        return right(module, kept, {name: delta for name, delta in folds.items() if name != "2.bias"}, merges)

    monkeypatch.setattr(compact_channels, "shorten", wrong)
    small = compact(masked(model, x), (x,))
    report = compaction_report(small)
    assert small[0].weight.shape == (8, 5) and small[2].weight.shape == (6, 8)
    assert len(report.refused) == 1 and "0.weight[0]" in report.refused[0] and "differ" in report.refused[0]
    assert_equal(model, small, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, x = build(BY_NAME["residual"])
    sparse = masked(model.to(dtype), x.to(dtype))
    small = compact(sparse, (x.to(dtype),))
    assert small.head.weight.dtype == dtype and small.head.weight.shape == (3, 6)
    assert "equal in float64" in str(compaction_report(small))
    torch.testing.assert_close(small(x.to(dtype)), sparse(x.to(dtype)), rtol=0.1, atol=0.1)


def test_a_model_without_dead_channels_comes_back_as_it_is() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    small = compact(model, (x,))
    assert torch.equal(small(x), model(x)) and small is not model
    assert "nothing was removed" in str(compaction_report(small))


def test_compacting_twice_removes_nothing_more() -> None:
    model, x = build(BY_NAME["transformer block"])
    once = compact(masked(model, x), (x,))
    again = compact(once, (x,))
    assert not compaction_report(again).rows
    assert_equal(once, again, x)


def test_a_compacted_model_copies_saves_and_exports() -> None:
    import copy

    model, x = build(BY_NAME["grouped queries"])
    small = compact(masked(model, x), (x,))
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    assert_equal(small, twin, x)
    dense = fxsparse.finalize(small)
    assert_equal(small, dense, x)
    torch.export.export(dense, (x,))


def _nothing(model: nn.Module, x: Tensor) -> nn.Module:
    return model


def _compiled(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def _on_meta(model: nn.Module, x: Tensor) -> nn.Module:
    return model.to("meta")


def _of_nan(model: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad():
        model[0].weight[0] = 0.0  # type: ignore[index]
        model[2].bias.fill_(torch.nan)  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    ("prepare", "inputs", "error", "says"),
    [
        (_nothing, "x", ConfigError, "must be a tuple"),
        (_nothing, (torch.zeros(2, 9),), FxSparseError, "fails on `example_inputs`"),
        (_compiled, None, ConfigError, "is compiled"),
        (_on_meta, None, ConfigError, "meta device"),
        (_of_nan, None, DataError, "finite"),
        (lambda model, x: 3, None, ConfigError, "torch.nn.Module"),
    ],
)
def test_bad_input(prepare, inputs, error, says) -> None:  # type: ignore[no-untyped-def]
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3)
    with pytest.raises(error, match=says):
        compact(prepare(model, x), (x,) if inputs is None else inputs)


def test_a_model_that_does_not_repeat_itself_is_refused() -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(3, 4), nn.Linear(4, 2), [0.0]

        def __deepcopy__(self, memo: dict) -> Drifting:  # type: ignore[type-arg]
            self.calls[0] += 1.0
            twin = Drifting()
            twin.load_state_dict(self.state_dict())
            twin.double()
            twin.calls = self.calls
            return twin

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))) + self.calls[0]

    model, x = Drifting().double(), torch.randn(2, 3).double()
    with torch.no_grad():
        model.a.weight[0] = 0.0
    with pytest.raises(PassError, match="does not repeat itself"):
        compact(model, (x,))


def test_a_report_belongs_to_a_compacted_model() -> None:
    with pytest.raises(ConfigError, match="not made by `compact`"):
        compaction_report(nn.Linear(2, 2))


def test_global_state_and_modes_stay() -> None:
    model, x = build(BY_NAME["residual"])
    sparse = masked(model, x).train()
    seed, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    small = compact(sparse, (x,))
    assert torch.equal(seed, torch.get_rng_state())
    assert sparse.training and small.training and small.body_norm.training
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_padding_modes_other_than_zeros_fold() -> None:
    torch.manual_seed(0)
    second = partial(nn.Conv2d, 6, 3, 3, padding=1)
    for mode, rows in (("reflect", 4), ("zeros", 5)):
        model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Sigmoid(), second(padding_mode=mode)).double()
        x = torch.randn(2, 2, 5, 5).double()
        with torch.no_grad():
            model[0].weight[:2] = 0.0
        small = compact(masked(model, x), (x,))
        assert small[0].weight.shape[0] == rows
        assert_equal(model, small, x)


def test_a_module_called_twice_keeps_what_its_bias_cannot_take() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.a(x))) * self.c(torch.sigmoid(self.b(x)))

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(2, 4).double()
    with torch.no_grad():
        model.a.weight[0] = 0.0
        model.b.weight[0] = 0.0
    small = compact(masked(model, x), (x,))
    assert small.c.weight.shape == (2, 6)
    assert any("several readers" in reason for reason in compaction_report(small).kept)
    assert_equal(model, small, x)


def test_attention_heads_follow_at_every_width() -> None:
    for width, heads in ((8, 2), (12, 3)):
        torch.manual_seed(width)
        model, x = Attention(width, heads).double().eval(), torch.randn(2, 4, width).double()
        with torch.no_grad():
            model.qkv.weight[2 * width : 2 * width + width // heads] = 0.0
        small = compact(masked(model, x), (x,))
        assert small.qkv.weight.shape[0] == 3 * (width - width // heads)
        assert_equal(model, small, x)


def test_residual_of_zero_statistics_loses_all_dead_channels() -> None:
    torch.manual_seed(0)
    model, x = Residual().double().eval(), torch.randn(2, 3, 6, 6).double()
    with torch.no_grad():
        for conv in (model.stem, model.body):
            conv.weight[:3] = 0.0
    small = compact(masked(model, x), (x,))
    assert small.stem.weight.shape[0] == 5
    assert "train mode: equal" in str(compaction_report(small))


def test_a_whole_group_of_a_group_norm_goes() -> None:
    model, x = build(Case("", BY_NAME["group norm"].build, (2, 3, 4, 4), {}, {}))
    with torch.no_grad():
        model.out.weight[:, [0, 2, 3, 6, 7]] = 0.0  # groups 1 and 3, and half of group 0
    small = compact(masked(model, x), (x,))
    assert small.conv.weight.shape[0] == 4 and (small.norm.num_groups, small.norm.num_channels) == (2, 4)
    assert_equal(model, small, x)


class Unread(nn.Module):
    """Calls a layer whose result nobody reads: it runs all the same, so it must stay as wide as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.unread, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unread(x)
        return self.head(x)  # type: ignore[no-any-return]


def test_a_layer_that_nobody_reads_still_fits_what_it_reads() -> None:
    inputs = (torch.randn(3, 4),)
    small = fxsparse.compact(fxsparse.transform(Unread(), inputs), inputs)
    assert small.get_parameter("unread.weight").shape == (1, 4)
    assert not fxsparse.compaction_report(small).refused
