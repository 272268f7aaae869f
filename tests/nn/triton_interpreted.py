"""The Triton kernels by Triton's interpreter, against float64 loops; run by test_shared_triton.py."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxsparse
from fxsparse.nn import DenseGradients, Linear, masked_weights
from fxsparse.nn import shared as shared_file
from fxsparse.nn import shared_triton as fused
from fxsparse.nn.shared import FastMode, path_of
from fxsparse.nn.shared_accelerate import accelerate, fast_report
from fxsparse.nn.shared_index import index_of
from fxsparse.nn.shared_product import Index, Rows
from fxsparse.sparsity import SharedSupport
from fxsparse.training.alive_only import store_alive

SMALL = {"BLOCK_B": 16, "BLOCK_K": 16, "BLOCK_F": 16}
LARGE = {"BLOCK_B": 64, "BLOCK_K": 128, "BLOCK_F": 16}
MIXED = {"BLOCK_B": 32, "BLOCK_K": 16, "BLOCK_F": 64}
# relative to the largest entry: the rounding of one value of the type, the accumulation is float32
CLOSE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Index]


def case(tokens: int, width: int, groups: int, group: int, k: int, dtype: torch.dtype, seed: int = 0) -> Case:
    """Input, values, bias, gradient of the output, positions and index."""
    source = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source).to(dtype)

    picks = [torch.randperm(width, generator=source)[:k].sort().values for _ in range(groups)]
    positions = torch.stack(picks)
    index = index_of(positions, width, Rows(groups * group, groups, group, True), None)
    x, values, bias = drawn(tokens, width), drawn(groups, group, k), drawn(groups * group)
    return x, values, bias, drawn(tokens, groups * group), positions, index


def oracle(x, values, bias, gradient, positions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, input gradient and gradient of the values in float64, entry by entry of the supports."""
    groups, group, k = values.shape
    x, values, gradient = x.double(), values.double(), gradient.double()
    output = torch.zeros(len(x), groups * group, dtype=torch.float64) + (0.0 if bias is None else bias.double())
    of_input, of_values = torch.zeros_like(x), torch.zeros_like(values)
    for g, j in itertools.product(range(groups), range(k)):
        rows, f = slice(g * group, (g + 1) * group), int(positions[g, j])
        output[:, rows] += x[:, f, None] * values[g, :, j]
        of_input[:, f] += gradient[:, rows] @ values[g, :, j]
        of_values[g, :, j] = gradient[:, rows].t() @ x[:, f]
    return output, of_input, of_values


def triple(index: Index) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return index.columns, index.readers, index.starts


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    if found.numel():
        worst = float((found.double() - expected).abs().max())
        assert worst <= CLOSE[found.dtype] * max(float(expected.abs().max()), 1.0), worst


def check(made: Case, tile, bias: bool = True) -> None:
    x, values, added, gradient, positions, index = made
    expected = oracle(x, values, added if bias else None, gradient, positions)
    output = fused.linear_forward(x, values, index.columns, added if bias else None, tile)
    found = fused.linear_backward(gradient, x, values, triple(index), (True, True), tile)
    for a, b in zip((output, *found), expected, strict=True):
        assert a.dtype is x.dtype and a.is_contiguous()
        close(a, b)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("tile", [None, SMALL, MIXED])
def test_sizes_that_are_multiples_of_nothing(tile, dtype) -> None:
    check(case(37, 50, 3, 20, 19, dtype), tile)


@pytest.mark.parametrize("tile", [None, SMALL])
@pytest.mark.parametrize(
    ("tokens", "width", "groups", "group", "k"),
    [
        (32, 48, 2, 16, 16),  # whole blocks
        (1, 24, 4, 8, 5),  # one token
        (19, 40, 3, 1, 7),  # rows by themselves
        (5, 9, 1, 3, 1),  # one position
        (17, 33, 5, 33, 32),  # all but one position
    ],
)
def test_ragged_shapes(tokens, width, groups, group, k, tile) -> None:
    check(case(tokens, width, groups, group, k, torch.float32), tile)


def test_groups_wider_than_a_block_of_rows() -> None:
    check(case(18, 40, 2, 150, 21, torch.float32), SMALL)


@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 40),
    groups=st.integers(1, 5),
    group=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=20, deadline=None)
def test_any_shape(tokens, width, groups, group, bias, seed, data) -> None:
    k = data.draw(st.integers(1, width))
    check(case(tokens, width, groups, group, k, torch.float32, seed), SMALL, bias)


def test_no_tokens() -> None:
    x, values, bias, gradient, _, index = case(0, 24, 4, 8, 5, torch.float32)
    assert fused.linear_forward(x, values, index.columns, bias).shape == (0, 32)
    of_input, of_values = fused.linear_backward(gradient, x, values, triple(index), (True, True))
    assert of_input.shape == (0, 24) and torch.equal(of_values, torch.zeros(4, 8, 5))


def test_only_what_is_needed() -> None:
    x, values, _, gradient, _, index = case(5, 24, 4, 8, 5, torch.float32)
    assert [g is None for g in fused.linear_backward(gradient, x, values, triple(index), (False, True))] == [
        True,
        False,
    ]
    assert [g is None for g in fused.linear_backward(gradient, x, values, triple(index), (True, False))] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    "form", ["every second", "every sixteenth", "offset", "columns first", "columns first, aligned", "expanded"]
)
def test_strides_of_the_input(form: str) -> None:
    x, values, bias, gradient, positions, index = case(32, 24, 4, 8, 5, torch.float32)
    given_x = {
        "every second": torch.stack([x, -x], 2).flatten(1)[:, ::2],
        "every sixteenth": x.repeat_interleave(16, 1)[:, ::16],
        "offset": torch.cat([x[:3], x])[3:],
        "columns first": x[:30].t().contiguous().t(),
        "columns first, aligned": x.t().contiguous().t(),
        "expanded": x[:1].expand(32, 24),
    }[form]
    assert form == "offset" or not given_x.is_contiguous()
    rows, bias = gradient[: len(given_x)], torch.stack([bias, -bias], 1).flatten()[::2]
    check((given_x, values, bias, rows, positions, index), SMALL)
    scalar = torch.ones(()).expand(rows.shape)  # as `sum().backward()` gives it
    check((given_x, values.transpose(0, 1).contiguous().transpose(0, 1), bias, scalar, positions, index), SMALL)


def test_an_aligned_transposed_input_is_not_copied() -> None:
    x = torch.randn(24, 32).t()
    assert fused._turned(x).data_ptr() == x.data_ptr()
    for other in (torch.randn(24, 30).t(), torch.randn(32, 24), torch.randn(24 * 32 + 1)[1:].view(24, 32).t()):
        made = fused._turned(other)
        assert made.data_ptr() != other.data_ptr() and made.stride(0) % 16 == 0
        assert torch.equal(made[:, : len(other)], other.t())


def test_what_is_not_read_does_not_matter() -> None:
    x, values, bias, gradient, positions, index = case(17, 24, 3, 5, 7, torch.float32)
    positions = positions.clamp(min=1).unique_consecutive(dim=1) if bool((positions == 0).any()) else positions
    free = sorted(set(range(24)) - set(positions.flatten().tolist()))
    for where in {0, *free}:
        if where in free:
            x[:, where] = float("nan")
    expected = oracle(torch.nan_to_num(x), values, bias, gradient, positions)[0]
    index = index_of(positions, 24, Rows(15, 3, 5, True), None)
    close(fused.linear_forward(x, values[:, :, : positions.shape[1]], index.columns, bias, SMALL), expected)


def test_padding_never_reads_position_zero() -> None:
    positions = torch.tensor([[1, 2, 3], [2, 3, 4]])
    index = index_of(positions, 6, Rows(8, 2, 4, True), None)
    x, values = torch.randn(5, 6), torch.randn(2, 4, 3)
    x[:, 0] = float("inf")
    gradient = torch.randn(5, 8)
    assert bool(fused.linear_forward(x, values, index.columns, None, SMALL).isfinite().all())
    of_input, of_values = fused.linear_backward(gradient, x, values, triple(index), (True, True), SMALL)
    assert bool(of_values.isfinite().all()) and torch.equal(of_input[:, [0, 5]], torch.zeros(5, 2))


def test_sums_are_accumulated_in_float32() -> None:
    groups, k = 2, 300
    index = index_of(torch.arange(k).repeat(groups, 1), k, Rows(groups * 16, groups, 16, True), None)
    ones = torch.ones(1, k, dtype=torch.bfloat16)  # sums in bfloat16 stop at 256
    values = torch.ones(groups, 16, k, dtype=torch.bfloat16)
    output = fused.linear_forward(ones, values, index.columns, None, LARGE)
    assert torch.equal(output, torch.full((1, groups * 16), 300.0, dtype=torch.bfloat16))
    many, few = (
        torch.ones(300, k, dtype=torch.bfloat16),
        index_of(torch.arange(3).repeat(groups, 1), k, Rows(groups * 16, groups, 16, True), None),
    )
    gradient = torch.ones(300, groups * 16, dtype=torch.bfloat16)
    assert bool((fused.weight_gradient(gradient, many, values[:, :, :3], few.columns, LARGE) == 300).all())
    wide = index_of(torch.zeros(300, 1, dtype=torch.int64), 2, Rows(300, 300, 1, True), None)
    single = torch.ones(300, 1, 1, dtype=torch.bfloat16)
    given_y = torch.ones(2, 300, dtype=torch.bfloat16)
    assert fused.input_gradient(given_y, single, triple(wide), 2, LARGE).tolist() == [[300, 0], [300, 0]]


def test_slices_and_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, values, _, gradient, positions, index = case(75, 24, 3, 5, 7, torch.float32)
    whole = fused.linear_backward(gradient, x, values, triple(index), (True, True), SMALL)
    monkeypatch.setattr(fused, "SPREAD_BYTES", 21 * 4 * 20)  # 20 tokens: slices of 16
    asked: list[int] = []
    original = fused._write_gradient_
    monkeypatch.setattr(fused, "_write_gradient_", lambda out, *rest: asked.append(len(out)) or original(out, *rest))
    monkeypatch.setattr(fused, "_parts", lambda *given_: 3)
    cut = fused.linear_backward(gradient, x, values, triple(index), (True, True), SMALL)
    assert asked == [16, 16, 16, 16, 11]
    assert torch.equal(whole[0], cut[0])  # a token's sums do not depend on the slice it is in
    expected = oracle(x, values, None, gradient, positions)
    close(cut[1], expected[2])
    low = case(75, 24, 3, 5, 7, torch.bfloat16)
    close(fused.weight_gradient(low[3], low[0], low[1], low[5].columns, SMALL), oracle(*low[:2], None, *low[3:5])[2])


def test_tiles_are_compared_unless_results_must_not_depend_on_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxsparse.nn import shared_triton_kernels as kernels

    x, values, bias, _, _, index = case(20, 24, 3, 5, 7, torch.float32)
    compared: list[dict] = []

    class Compared:
        def __getitem__(self, grid):
            programs = grid({"BLOCK_B": 16, "BLOCK_K": 16})
            return lambda **arguments: compared.append({**arguments, "programs": programs})

    monkeypatch.setattr(kernels.FORWARD, "tuned", Compared())
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    fused.linear_forward(x, values, index.columns, bias)
    assert [(one["programs"], one["bucket"]) for one in compared] == [((6,), 5)]
    torch.use_deterministic_algorithms(True)
    try:
        output = fused.linear_forward(x, values, index.columns, bias)
    finally:
        torch.use_deterministic_algorithms(False)
    first = fused.linear_forward(x, values, index.columns, bias, kernels.FORWARD.first)
    assert len(compared) == 1 and torch.equal(output, first)


def test_the_same_bits_every_time() -> None:
    x, values, bias, gradient, _, index = case(40, 24, 6, 5, 7, torch.float16)
    runs = [
        (
            fused.linear_forward(x, values, index.columns, bias),
            *fused.linear_backward(gradient, x, values, triple(index), (True, True)),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# whole layers


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the kernels run on the CPU, by the interpreter; which ones ran."""
    called: list[str] = []
    for name in ("linear_forward", "linear_backward"):
        original = getattr(fused, name)
        spy = lambda *given_, original=original, name=name: called.append(name) or original(*given_)  # noqa: E731
        monkeypatch.setattr(fused, name, spy)
    here = lambda device, dtype: dtype in fused.TYPES  # noqa: E731
    monkeypatch.setattr(fused, "runs", here)
    monkeypatch.setattr(shared_file, "fused_runs", here)
    return called


def masked(wide: int, out: int, group: int, k: int, seed: int = 0, ordered: bool = False, **options) -> Linear:
    source = torch.Generator().manual_seed(seed)
    layer = Linear(wide, out, pattern=SharedSupport(group), **options)
    mask = torch.zeros(out, wide, dtype=torch.bool)
    for start in range(0, out, group):
        mask[start : start + group, torch.randperm(wide, generator=source)[:k]] = True
    order = torch.randperm(out, generator=source) if ordered else None
    masked_weights(layer)["weight"].set_mask_(mask if order is None else mask[order.argsort()], order)
    return layer


def passed(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    given_x = x.detach().clone().requires_grad_()
    model.zero_grad()
    output = model(given_x)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype))
    return [output.detach(), given_x.grad, *(p.grad.clone() for p in model.parameters())]


def fast(layer: nn.Module) -> nn.Module:
    twin = copy.deepcopy(layer)
    accelerate(twin, mode=FastMode.TRITON)
    return twin


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("out", [32, 29])
def test_layers_equal_the_dense_product(out: int, ordered: bool, bias: bool, taken: list[str]) -> None:
    layer = masked(24, out, 8, 5, ordered=ordered, bias=bias)
    twin = fast(layer)
    assert [row.product for row in fast_report(twin)] == ["triton"]
    for shape in ((24,), (3, 24), (2, 3, 24)):
        x = torch.randn(shape)
        for a, b in zip(passed(twin, x), passed(layer, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert taken == ["linear_forward", "linear_backward"] * 3


def test_autocast(taken: list[str]) -> None:
    layer = masked(24, 32, 8, 5)
    x = torch.randn(6, 24)
    exact = passed(layer, x)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = passed(fast(layer), x)
        assert found[0].dtype is dtype
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)
    assert len(taken) == 4


def test_float64_and_convolutions_go_by_gathers(taken: list[str]) -> None:
    layer = masked(24, 32, 8, 5, dtype=torch.float64)
    twin = fast(layer)
    torch.testing.assert_close(twin(torch.ones(2, 24).double()), layer(torch.ones(2, 24).double()))
    conv = fxsparse.transform(
        nn.Sequential(nn.Conv2d(8, 8, 1)), (torch.randn(1, 8, 2, 2),), sparsity=0.5, pattern=SharedSupport(4)
    )
    expected = conv(torch.ones(1, 8, 2, 2))
    accelerate(conv, mode=FastMode.TRITON)
    torch.testing.assert_close(conv(torch.ones(1, 8, 2, 2)), expected)
    assert not taken and [row.product for row in fast_report(conv)] == ["sparse"]


def test_gradients_of_gradients_go_by_gathers(taken: list[str]) -> None:
    layer = masked(6, 7, 3, 2)
    x = torch.randn(2, 6)
    found = []
    for each in (layer, fast(layer)):
        start = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(each(start).square().sum(), start, create_graph=True)
        assert "linear_backward" not in taken
        found.append(torch.autograd.grad(first.square().sum(), (start, each.weight)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_collectors_get_the_dense_gradient(taken: list[str]) -> None:
    layer = masked(24, 30, 8, 5)
    found = []
    for each in (layer, fast(layer)):
        with DenseGradients(fxsparse.masks(each).values()) as collector:
            passed(each, torch.ones(3, 24))
        found.append(collector.read(each.weight_mask))
    torch.testing.assert_close(*found)
    assert taken and bool((found[1] != 0).all())


@pytest.mark.parametrize("alive_only", [False, True])
def test_training_follows_the_gathers(alive_only: bool, taken: list[str]) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
    x, y = torch.randn(64, 24), torch.randn(64, 8)
    losses, kinds = [], (FastMode.SPARSE, FastMode.TRITON)
    for mode in kinds:
        model = fxsparse.transform(plain, (x,), pattern=SharedSupport(8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        handle = fxsparse.attach(model, optimizer, fxsparse.RigL(sparsity=0.75, every=4), total_steps=20)
        accelerate(model, mode=mode)
        if alive_only:
            store_alive(handle)
            assert all(path_of(layer).packed for layer in (model[0], model[2]))
        losses.append([])
        for _ in range(12):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
        assert handle.updates > 0 and bool(taken) == (mode is FastMode.TRITON)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < 0.95 * losses[0][0]


def test_compiled_code_is_one_graph_that_calls_the_kernels(taken: list[str]) -> None:
    model = nn.Sequential(masked(24, 24, 8, 5), nn.ReLU(), masked(24, 30, 8, 5, seed=2))
    twin = fast(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24)
    for step in range(3):
        mask = {
            f"{i}.weight": fxsparse.masks(masked(24, out, 8, 5, seed=9 * step + i))["weight"]
            for i, out in ((0, 24), (2, 30))
        }
        found = []
        for each, run in ((model, model), (twin, compiled)):
            fxsparse.set_masks(each, mask)
            each.zero_grad()
            run(x).square().sum().backward()
            found.append([p.grad for p in each.parameters()])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert taken.count("linear_forward") == taken.count("linear_backward") == 6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_auto_measures_the_kernels_and_finds_them_right(taken: list[str]) -> None:
    layer = masked(24, 32, 8, 5)
    twin = copy.deepcopy(layer)
    accelerate(twin, (torch.randn(6, 24),))
    (choice,) = path_of(twin).chosen.values()
    assert choice.ratio > 0 and "linear_backward" in taken
