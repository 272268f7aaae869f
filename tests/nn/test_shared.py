"""The fast path of shared supports against the dense product with the masked weight, in float64."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxsparse
from fxsparse.errors import ConfigError
from fxsparse.nn import Conv1d, Conv2d, Conv3d, DenseGradients, Guard, Linear, Resurrection, masked_weights, set_guard
from fxsparse.nn import shared as shared_file
from fxsparse.nn.shared import Choice, FastMode, path_of
from fxsparse.nn.shared_accelerate import accelerate, decelerate, fast_report
from fxsparse.nn.shared_index import held_index
from fxsparse.nn.shared_kernels import Kernel
from fxsparse.sparsity import Positions, SharedSupport, Unstructured

CLOSE = dict(rtol=1e-11, atol=1e-11)


def random_mask(shape: tuple[int, ...], group: int, k: int, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    mask = torch.zeros(shape, dtype=torch.bool)
    for start in range(0, shape[0], group):
        mask[start : start + group, torch.randperm(shape[1], generator=source)[:k]] = True
    return mask


def masked(kind, arguments, group: int, k: int, seed: int = 0, dtype=torch.float64, **options) -> nn.Module:
    layer = kind(*arguments, pattern=SharedSupport(group), dtype=dtype, **options)
    fxsparse.set_masks(layer, {"weight": random_mask(tuple(layer.weight.shape), group, k, seed)})
    return layer


def linear(wide=24, out=32, group=8, k=5, **options) -> Linear:
    return masked(Linear, (wide, out), group, k, **options)


def fast(layer: nn.Module, mode=FastMode.SPARSE, **options) -> nn.Module:
    twin = copy.deepcopy(layer)
    accelerate(twin, mode=mode, **options)
    return twin


def passed(model: nn.Module, x: torch.Tensor, seed: int = 3) -> list[torch.Tensor]:
    """Output, input gradient and parameter gradients of one pass."""
    given_x = x.detach().clone().requires_grad_()
    model.zero_grad()
    output = model(given_x)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype))
    return [output.detach(), given_x.grad, *(p.grad.clone() for p in model.parameters())]


def same(one: nn.Module, other: nn.Module, x: torch.Tensor, **tolerance) -> None:
    for a, b in zip(passed(one, x), passed(other, x), strict=True):
        torch.testing.assert_close(a, b, **(tolerance or CLOSE))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list:
    """The layers that took the sparse product."""
    found: list = []
    original = shared_file.SharedPath.run

    def run(self, module, *rest):
        found.append(module)
        return original(self, module, *rest)

    monkeypatch.setattr(shared_file.SharedPath, "run", run)
    return found


@given(
    batch=st.lists(st.integers(1, 4), max_size=3),
    wide=st.integers(2, 20),
    out=st.integers(1, 30),
    group=st.integers(1, 12),
    bias=st.booleans(),
    ordered=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_linear_equals_the_dense_product(batch, wide, out, group, bias, ordered, data) -> None:
    layer = linear(wide, out, group, data.draw(st.integers(1, wide - 1)), bias=bias)
    if ordered:
        weight = masked_weights(layer)["weight"]
        order = torch.randperm(out, generator=torch.Generator().manual_seed(1))
        weight.set_mask_(layer.weight_mask[order.argsort()], order)
    twin = fast(layer)
    assert path_of(twin).reason is None
    same(layer, twin, torch.randn(*batch, wide, dtype=torch.float64))


@given(
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 2, "same"]),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    axes=st.integers(1, 3),
    group=st.sampled_from([1, 4, 5]),
    bias=st.booleans(),
    single=st.booleans(),
    rows=st.booleans(),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolutions_equal_the_dense_product(
    kernel, stride, padding, dilation, mode, axes, group, bias, single, rows
) -> None:
    stride = 1 if padding == "same" else stride
    kind = (Conv1d, Conv2d, Conv3d)[axes - 1]
    moves = dict(stride=stride, padding=padding, dilation=dilation, padding_mode=mode, bias=bias)
    layer = masked(kind, (6, 8, kernel), group, 2, **moves)
    x = torch.randn(*(() if single else (2,)), 6, *(7, 6, 5)[:axes], dtype=torch.float64)
    if rows and axes == 2 and not single:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    twin = fast(layer)
    assert path_of(twin).reason is None
    same(layer, twin, x)
    if rows and axes == 2 and not single:
        assert twin(x).stride() == layer(x).stride()


def test_long_batches_go_in_parts() -> None:
    layer = linear()
    same(layer, fast(layer), torch.randn(700, 24, dtype=torch.float64))


def test_the_sparse_product_is_taken_and_no_dense_weight_is_made(taken: list) -> None:
    twin = fast(linear(64, 64, 16, 6))
    made: list[int] = []
    x = torch.randn(3, 64, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: made.append(t.numel()) or t, lambda t: t):
        output = twin(x)
    assert taken == [twin]
    assert made and max(made) < 64 * 64
    output.sum().backward()
    assert torch.equal(twin.weight.grad != 0, twin.weight_mask)


def test_masks_follow_set_masks_loads_and_writes_by_hand() -> None:
    layer = linear()
    twin = fast(layer)
    x = torch.randn(3, 24, dtype=torch.float64)
    for seed, k in ((1, 5), (2, 5), (3, 9)):
        mask = {"weight": random_mask((32, 24), 8, k, seed)}
        values = {"weight": torch.randn(32, 24, dtype=torch.float64)}
        for each in (layer, twin):
            fxsparse.set_masks(each, mask)
            each.load_state_dict({**each.state_dict(), **values})
        same(layer, twin, x)
    other = linear(seed=8)
    layer.load_state_dict(other.state_dict())
    twin.load_state_dict(other.state_dict())
    same(layer, twin, x)
    mask = random_mask((32, 24), 8, 5, 11)
    for each in (layer, twin):
        with torch.no_grad():
            each.weight_mask.copy_(mask)
    same(layer, twin, x)


def test_a_mask_that_is_full_or_broken_is_computed_densely(taken: list) -> None:
    twin = fast(linear())
    x = torch.randn(2, 24, dtype=torch.float64)
    fxsparse.set_masks(twin, {"weight": torch.ones(32, 24, dtype=torch.bool)})
    torch.testing.assert_close(twin(x), nn.functional.linear(x, twin.weight, twin.bias))
    assert not taken and path_of(twin).reason == "its mask is full"
    broken = random_mask((32, 24), 8, 5)
    broken[0, :] = True
    with torch.no_grad():
        twin.weight_mask.copy_(broken)
    torch.testing.assert_close(twin(x), nn.functional.linear(x, twin.weight * broken, twin.bias))
    assert not taken and "breaks" in path_of(twin).reason


def test_the_gradient_memory_is_reused_but_never_shared() -> None:
    layer = linear()
    twin = fast(layer)
    x = torch.randn(4, 24, dtype=torch.float64)
    passed(twin, x)
    place = twin.weight.grad.data_ptr()
    twin.zero_grad()
    twin(x).sum().backward()
    assert twin.weight.grad.data_ptr() == place
    kept = twin.weight.grad
    values = kept.clone()
    twin.zero_grad()
    twin(2 * x).sum().backward()
    assert torch.equal(kept, values) and twin.weight.grad.data_ptr() != place
    del kept
    twin.zero_grad()
    twin(x).sum().backward()
    twin.weight.grad.add_(1.0)  # noise at dead entries must not come back
    twin.zero_grad()
    twin(x).sum().backward()
    assert torch.equal(twin.weight.grad, values)


def test_several_uses_and_several_backward_passes_add_up() -> None:
    layer = linear(24, 24)
    twin = fast(layer)
    x = torch.randn(4, 24, dtype=torch.float64)
    for each in (layer, twin):
        each.zero_grad()
        for scale in (1.0, 2.0):
            each(each(scale * x)).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, **CLOSE)
    retained = twin(x).sum()
    twin.zero_grad()
    retained.backward(retain_graph=True)
    once = twin.weight.grad.clone()
    retained.backward()
    torch.testing.assert_close(twin.weight.grad, 2 * once, **CLOSE)


@pytest.mark.parametrize("collectors", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_collectors_get_the_dense_gradient(collectors: int, padding: int) -> None:
    model = nn.Sequential(masked(Conv2d, (6, 8, 3, 1, padding), 4, 2), nn.Flatten(1, 3), nn.LazyLinear(24).double())
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    model(x)
    model.append(linear(24, 30, 8, 5))
    twin = copy.deepcopy(model)
    accelerate(twin, mode=FastMode.SPARSE)
    found = []
    for each in (model, twin):
        several = [DenseGradients(fxsparse.masks(each).values()) for _ in range(collectors)]
        for one in several:
            one.start()
        for _ in range(2):
            passed(each, x)
        found.append([[one.read(mask) for mask in fxsparse.masks(each).values()] for one in several])
        for one in several:
            one.stop()
    for dense, sparse in zip(*found, strict=True):
        for a, b in zip(dense, sparse, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
            assert bool((b != 0).all())


def test_gradients_of_gradients() -> None:
    conv, pointwise, layer = masked(Conv2d, (4, 6, 2), 3, 2), masked(Conv2d, (4, 6, 1), 3, 2), linear(6, 7, 3, 2)
    for module, x in (
        (layer, torch.randn(2, 6, dtype=torch.float64)),
        (pointwise, torch.randn(2, 4, 3, 2, dtype=torch.float64)),
        (conv, torch.randn(2, 4, 3, 2, dtype=torch.float64)),
    ):
        found = []
        for each in (module, fast(module)):
            start = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(each(start).square().sum(), start, create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), (start, each.weight)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    twin = fast(layer)
    values = [torch.randn(2, 6, dtype=torch.float64, requires_grad=True)]
    assert torch.autograd.gradcheck(twin, values) and torch.autograd.gradgradcheck(twin, values)


def test_transforms_and_tracers_see_the_dense_layer(taken: list) -> None:
    layer = linear()
    twin = fast(layer)
    x = torch.randn(3, 24, dtype=torch.float64)

    def loss(params, sample):
        return torch.func.functional_call(twin, params, (sample,)).square().sum()

    params = dict(twin.named_parameters())
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    assert each["weight"].shape == (3, 32, 24) and not taken
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(twin, (x,), check_trace=False)
    exported = torch.export.export(twin, (x,))
    assert not taken
    torch.testing.assert_close(traced(x), layer(x), **CLOSE)
    torch.testing.assert_close(exported.module()(x), layer(x), **CLOSE)


def test_wrong_inputs_are_refused_by_torch_as_ever() -> None:
    twin, conv = fast(linear()), fast(masked(Conv2d, (6, 8, 3), 4, 2))
    for wide in (23, 25):
        with pytest.raises(RuntimeError):
            twin(torch.randn(2, wide, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        conv(torch.randn(2, 7, 5, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        twin(torch.randn(2, 24, dtype=torch.float32))
    assert twin(torch.randn(0, 24, dtype=torch.float64)).shape == (0, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = nn.Sequential(
        masked(Conv2d, (8, 16, 3), 8, 3, dtype=torch.float32),
        masked(Conv2d, (16, 16, 1), 8, 5, dtype=torch.float32),
        nn.Flatten(),
        linear(64, 32, 8, 9, dtype=torch.float32),
    )
    x = torch.randn(4, 8, 4, 4)
    exact = passed(model, x)
    results = []
    for each in (model, fast(model)):
        with torch.autocast("cpu", dtype):
            assert each(x).dtype is dtype
            results.append(passed(each, x))
    for exactly, a, b in zip(exact, *results, strict=True):
        assert a.dtype == b.dtype
        allowed = 4 * (a.float() - exactly).abs().max() + 1e-3
        assert (b.float() - exactly).abs().max() <= allowed


def test_low_precision_weights() -> None:
    layer = linear(64, 64, 16, 8, dtype=torch.bfloat16)
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    same(layer, fast(layer), x, rtol=0.05, atol=0.05)


def test_checkpointing() -> None:
    model = nn.Sequential(linear(24, 24), nn.ReLU(), linear(24, 24, seed=2))
    twin = fast(model)
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    for reentrant in (False, True):
        twin.zero_grad()
        checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward()
        model.zero_grad()
        model(x).square().sum().backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, **CLOSE)


def test_copies_pickles_and_checkpoints() -> None:
    layer = linear()
    twin = fast(layer)
    x = torch.randn(2, 24, dtype=torch.float64)
    assert twin.state_dict().keys() == layer.state_dict().keys()
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        fxsparse.set_masks(other, {"weight": random_mask((32, 24), 8, 5, 9)})
        plain = copy.deepcopy(other)
        decelerate(plain)
        same(plain, other, x)
        same(layer, twin, x)
    buffer = io.BytesIO()
    torch.save(twin.state_dict(), buffer)
    buffer.seek(0)
    fresh = linear(seed=5)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    same(fresh, twin, x)


def test_moving_the_module_keeps_the_path() -> None:
    layer = linear()
    twin = fast(layer).to(torch.float32).to(torch.float64)
    same(layer, twin, torch.randn(2, 24, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert path_of(twin).reason is None


def test_to_dense_and_decelerate_leave_nothing(taken: list) -> None:
    layer = linear()
    before = set(layer.__dict__), set(layer._buffers)
    accelerate(layer, mode=FastMode.SPARSE)
    x = torch.randn(2, 24, dtype=torch.float64)
    plain = layer.to_dense()
    assert type(plain) is nn.Linear and not plain._buffers and not hasattr(plain, "_fxsparse_shared")
    assert path_of(layer) is not None and layer(x) is not None and taken
    decelerate(layer)
    assert (set(layer.__dict__), set(layer._buffers)) == before
    torch.testing.assert_close(layer(x), plain(x), **CLOSE)


def test_finalize_and_transform_after_it() -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(3, 24)
    sparse = fxsparse.transform(model, (x,), sparsity=0.5, pattern=SharedSupport(8))
    accelerate(sparse, mode=FastMode.SPARSE)
    expected = sparse(x)
    final = fxsparse.finalize(sparse)
    assert not any(isinstance(each, Linear) for each in final.modules())
    torch.testing.assert_close(final(x), expected)


def test_a_resurrection_phase_is_dense(taken: list) -> None:
    layer = linear()
    twin = fast(layer)
    x = torch.randn(2, 24, dtype=torch.float64)
    unit = Resurrection(masked_weights(twin)["weight"])
    unit.enter(seed=1)
    torch.testing.assert_close(twin(x), nn.functional.linear(x, twin.weight, twin.bias))
    assert not taken and bool((twin.weight[~unit.weight.mask] != 0).any())
    unit.commit(random_mask((32, 24), 8, 5, 4))
    plain = copy.deepcopy(twin)
    decelerate(plain)
    same(plain, twin, x)
    assert taken


def test_other_readers_of_the_weight_keep_it_dense() -> None:
    twin = fast(linear())
    set_guard(twin, "weight", Guard.GRADIENT)
    path_of(twin)._seen = (None, -1, None, -1)
    assert "others read its weight" in str(fast_report(twin))


def test_reasons_are_told() -> None:
    grouped = Conv2d(8, 8, 3, groups=2, pattern=SharedSupport(2))
    single = Conv2d(8, 8, 3, pattern=SharedSupport(2, Positions.ELEMENT))
    free = Linear(8, 8, pattern=Unstructured())
    fine = masked(Conv2d, (8, 8, 1), 4, 2)
    model = nn.ModuleDict({"grouped": grouped, "single": single, "free": free, "fine": fine})
    report = accelerate(model, mode=FastMode.SPARSE)
    assert [(row.name, row.product) for row in report] == [
        ("grouped", "dense"),
        ("single", "dense"),
        ("fine", "sparse"),
    ]
    text = str(report)
    assert "groups" in text and "elements of the kernel" in text and "8x8x1x1" in text


def test_auto_measures_once_and_says_what_it_picked(monkeypatch: pytest.MonkeyPatch, taken: list) -> None:
    import fxsparse.nn.shared_choice as choice

    ratios, calls = iter([Choice(3.0, Kernel.GATHER), Choice(0.5, Kernel.GATHER)]), []
    monkeypatch.setattr(choice, "measured", lambda *given_: calls.append(given_) or next(ratios))
    first, second = linear(24, 24), linear(24, 48)
    model = nn.Sequential(first, second)
    report = accelerate(model)
    assert [row.product for row in report] == ["unmeasured", "unmeasured"]
    for _ in range(3):
        model(torch.randn(5, 24, dtype=torch.float64))
    assert len(calls) == 2 and set(taken) == {first}
    assert [(row.product, row.ratio) for row in fast_report(model)] == [("sparse", 3.0), ("dense", 0.5)]


def test_measuring_leaves_no_trace() -> None:
    layer = linear(64, 64, 16, 6)
    layer.weight.grad = torch.ones_like(layer.weight)
    seen: list = []
    layer.weight.register_hook(lambda gradient: seen.append(gradient))
    state = torch.get_rng_state()
    report = accelerate(layer, (torch.randn(8, 64, dtype=torch.float64),))
    assert report.layers[0].ratio is not None and report.layers[0].ratio > 0
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight)) and not seen
    torch.randn(8, 64, dtype=torch.float64)
    assert layer.training and not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("threshold", "product"), [(0.7, "sparse"), (0.9, "dense")])
def test_a_threshold_overrides(threshold: float, product: str, taken: list) -> None:
    layer = linear(24, 32, 8, 5)  # sparsity 0.79
    report = accelerate(layer, sparse_threshold=threshold)
    layer(torch.randn(2, 24, dtype=torch.float64))
    assert report.layers[0].product == product and bool(taken) == (product == "sparse")


def test_bad_settings_are_refused() -> None:
    layer = linear()
    with pytest.raises(ConfigError, match="`mode`"):
        accelerate(layer, mode="sparse")
    with pytest.raises(ConfigError, match="`sparse_threshold`"):
        accelerate(layer, sparse_threshold=1.5)
    with pytest.raises(ConfigError, match="`sparse_threshold`"):
        accelerate(layer, mode=FastMode.DENSE, sparse_threshold=0.5)
    with pytest.raises(ConfigError, match="SharedSupport"):
        accelerate(nn.Sequential(Linear(3, 4)))
    bare = fxsparse.transform(nn.Linear(16, 16), (torch.randn(2, 16),), pattern=SharedSupport(8))
    with pytest.raises(ConfigError, match="`weight` is read by a function"):
        accelerate(bare)
    assert path_of(layer) is None
    other = linear()
    other.weight_readers = 3
    assert "taken" in str(accelerate(other, mode=FastMode.SPARSE))


def test_dense_mode_is_bit_equal(taken: list) -> None:
    layer = linear()
    twin = fast(layer, FastMode.DENSE)
    x = torch.randn(2, 24, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(passed(layer, x), passed(twin, x), strict=True)) and not taken


def test_compiled_code_follows_masks_without_compiling_anew() -> None:
    model = nn.Sequential(linear(24, 24), nn.ReLU(), linear(24, 30, seed=2))
    twin = fast(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24, dtype=torch.float64)
    for step in range(4):
        for each in (model, twin):
            for i, out in ((0, 24), (2, 30)):
                fxsparse.set_masks(each[i], {"weight": random_mask((out, 24), 8, 5, 10 * step + i)})
        found = []
        for each, run in ((model, model), (twin, compiled)):
            each.zero_grad()
            collector = DenseGradients(fxsparse.masks(each).values())
            if step % 2:
                collector.start()
            run(x).square().sum().backward()
            collector.stop()
            found.append(
                [p.grad for p in each.parameters()] + [collector.read(m) for m in fxsparse.masks(each).values()]
            )
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, **CLOSE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_compiled_code_follows_a_module_that_was_moved_or_copied() -> None:
    layer, x = fast(linear(24, 24)), torch.randn(3, 24, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        each._apply(torch.clone)  # as `.to(device)` does
        assert all(a is b for a, b in zip(path_of(each)._traced, held_index(each), strict=True))
        fxsparse.set_masks(each, {"weight": random_mask((24, 24), 8, 5, 7)})  # written in place where k stays
        expected = nn.functional.linear(x, each.effective_weight, each.bias)
        torch.testing.assert_close(torch.compile(each, fullgraph=True, backend="aot_eager")(x), expected, **CLOSE)
    torch.testing.assert_close(compiled(x), nn.functional.linear(x, layer.effective_weight, layer.bias), **CLOSE)
    torch._dynamo.reset()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_single_precision_convolutions_in_both_formats(kernel: int, form: torch.memory_format) -> None:
    layer = masked(Conv2d, (32, 48, kernel, 1, kernel // 2), 16, 7, dtype=torch.float32).to(memory_format=form)
    x = torch.randn(3, 32, 6, 5).to(memory_format=form)
    same(layer, fast(layer), x, rtol=1e-4, atol=1e-4)
    assert fast(layer)(x).stride() == layer(x).stride()
