"""The choice of fused kernels without a device, their logic by Triton's interpreter, and the real thing on CUDA."""

import copy
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxsparse
from fxsparse.errors import ConfigError
from fxsparse.nn import Linear, shared_choice, shared_kernels
from fxsparse.nn import shared as shared_file
from fxsparse.nn import shared_triton as fused
from fxsparse.nn.shared import Choice, FastMode, path_of
from fxsparse.nn.shared_accelerate import accelerate, fast_report
from fxsparse.nn.shared_kernels import Kernel
from fxsparse.sparsity import SharedSupport
from fxsparse.training.alive_only import store_alive

HERE = Path(__file__).resolve().parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
NO_TRITON = "triton is not installed: pip install triton (torch for CUDA brings it)"
NO_CUDA = "no CUDA device"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def masked(wide: int = 24, out: int = 32, group: int = 8, k: int = 5, seed: int = 0, **options) -> Linear:
    layer = Linear(wide, out, pattern=SharedSupport(group), **options)
    mask = torch.zeros(out, wide, dtype=torch.bool)
    for start in range(0, out, group):
        mask[start : start + group, torch.randperm(wide, generator=torch.Generator().manual_seed(seed + start))[:k]] = 1
    fxsparse.set_masks(layer, {"weight": mask})
    return layer


def products(layer: nn.Module) -> list[tuple[str, float | None]]:
    return [(row.product, row.ratio) for row in fast_report(layer)]


# when kernels run


def test_where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "INSTALLED", True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert fused.runs(CUDA, dtype) and not fused.runs(CPU, dtype)
    assert not fused.runs(CUDA, torch.float64) and not fused.runs(torch.device("meta"), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not fused.runs(CUDA, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fused.runs(CUDA, torch.float32)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not fused.runs(CUDA, torch.float32)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(fused, "INSTALLED", False)
    assert not fused.runs(CUDA, torch.float32)


def test_float32_is_multiplied_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = SimpleNamespace(is_cuda=True), torch.ones(1)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        found = []
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            found.append((fused._arithmetic(there), fused._arithmetic(here)["PRECISION"]))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert [(each["PRECISION"], each["WIDE"], cpu) for each, cpu in found] == [
        ("ieee", False, "ieee"),
        ("tf32", False, "ieee"),
    ]


@pytest.mark.parametrize(
    ("tokens", "programs", "parts"),
    [(4096, 448, 1), (4096, 16, 16), (4096, 100, 2), (1024, 16, 4), (100, 1, 1), (1 << 20, 1, 264), (4096, 0, 16)],
)
def test_few_programs_share_the_tokens(tokens: int, programs: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    assert fused._parts(tokens, programs, CUDA) == parts


def test_the_spread_of_a_slice_fits_its_memory() -> None:
    for rows, dtype in (
        (26_240, torch.bfloat16),
        (26_240, torch.float32),
        (1, torch.float16),
        (1 << 28, torch.float32),
    ):
        tokens = fused._slice(rows, torch.empty(0, dtype=dtype))
        assert tokens % 16 == 0 and tokens >= 16
        assert tokens == 16 or rows * tokens * dtype.itemsize <= fused.SPREAD_BYTES
        assert rows * (tokens + 16) * dtype.itemsize > fused.SPREAD_BYTES


def test_triton_is_refused_by_name_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "INSTALLED", False)
    layer = masked()
    with pytest.raises(ConfigError, match=r"`mode` \(=FastMode.TRITON\) needs Triton"):
        accelerate(layer, mode=FastMode.TRITON)
    assert path_of(layer) is None


def test_on_the_cpu_triton_mode_takes_the_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "INSTALLED", True)
    layer = masked()
    one, other = copy.deepcopy(layer), copy.deepcopy(layer)
    accelerate(one, mode=FastMode.TRITON)
    accelerate(other, mode=FastMode.SPARSE)
    x = torch.randn(3, 24)
    assert torch.equal(one(x), other(x)) and products(one) == [("sparse", None)]


def test_importing_and_training_on_the_cpu_never_imports_triton(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise SystemExit('triton was imported')")
    code = (
        "import torch, fxsparse\n"
        "from fxsparse.nn import shared_triton\n"
        "assert shared_triton.INSTALLED\n"
        "model = fxsparse.transform(torch.nn.Sequential(torch.nn.Linear(16, 16)), (torch.ones(1, 16),),"
        " sparsity=0.5, pattern=fxsparse.SharedSupport(8))\n"
        "fxsparse.accelerate(model, (torch.ones(1, 16),))\n"
        "model(torch.ones(2, 16)).sum().backward()\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# what the dispatcher takes


class Stand:
    """Kernels and clock of a machine that is not here: gathers compute, times are as written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dense: float, gather: float, triton: float) -> None:
        self.times = {None: dense, Kernel.GATHER: gather, Kernel.TRITON: triton}
        self.calls: list[str] = []
        self.timed: list[Kernel | None] = []
        self.scale, self.error = 1.0, None
        self.last: Kernel | None = None
        run = shared_file.SharedPath.run

        def watched(path, module, input, weight, bias, kernel=Kernel.GATHER, watcher=None):
            self.last = kernel
            return run(path, module, input, weight, bias, kernel, watcher)

        monkeypatch.setattr(shared_file.SharedPath, "run", watched)
        monkeypatch.setattr(shared_file, "fused_runs", lambda device, dtype: dtype is not torch.float64)
        monkeypatch.setattr(fused, "runs", lambda device, dtype: dtype is not torch.float64)
        monkeypatch.setattr(fused, "INSTALLED", True)
        monkeypatch.setattr(fused, "linear_forward", self.forward)
        monkeypatch.setattr(fused, "linear_backward", self.backward)
        monkeypatch.setattr(shared_choice, "_time", self.time)

    def forward(self, input, values, columns, bias=None):
        self.calls.append("forward")
        if self.error is not None:
            raise self.error
        made = shared_kernels.linear_forward(input, values, columns)
        return self.scale * (made if bias is None else made + bias)

    def backward(self, gradient, input, values, index, needs):
        self.calls.append("backward")
        return shared_kernels.linear_backward(gradient, input, values, index, needs)

    def time(self, product, given, weight) -> float:
        self.last = None
        product()
        self.timed.append(self.last)
        return self.times[self.last]


@pytest.mark.parametrize(
    ("times", "product", "ratio"),
    [
        ((6.0, 3.0, 2.0), "triton", 3.0),
        ((6.0, 2.0, 3.0), "sparse", 3.0),
        ((2.0, 6.0, 4.0), "dense", 0.5),
        ((3.0, 4.0, 2.0), "triton", 1.5),
        ((3.0, 2.0, 4.0), "sparse", 1.5),
    ],
)
def test_the_fastest_is_taken(times, product, ratio, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch, *times)
    layer = masked()
    plain = copy.deepcopy(layer)
    accelerate(layer)
    x = torch.randn(3, 24)
    for _ in range(3):
        before = len(stand.calls)
        torch.testing.assert_close(layer(x), plain(x))
    layer(x).sum().backward()
    assert set(stand.timed) == {None, Kernel.GATHER, Kernel.TRITON} and len(stand.timed) == 3 * shared_choice.ROUNDS
    assert products(layer) == [(product, ratio)]
    taken = stand.calls[before:]
    assert taken == (["forward", "forward", "backward"] if product == "triton" else [])


def test_only_types_and_layers_with_kernels_measure_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch, 3.0, 2.0, 1.0)
    layer = masked(dtype=torch.float64)
    accelerate(layer, (torch.randn(3, 24, dtype=torch.float64),))
    conv = fxsparse.transform(
        nn.Sequential(nn.Conv2d(8, 8, 1)), (torch.ones(1, 8, 2, 2),), sparsity=0.5, pattern=SharedSupport(4)
    )
    accelerate(conv, (torch.randn(1, 8, 2, 2),))
    assert set(stand.timed) == {None, Kernel.GATHER} and not stand.calls
    assert products(layer) == products(conv) == [("sparse", 1.5)]
    with torch.autocast("cpu", torch.bfloat16):  # the type of the product counts, not that of the input
        layer(torch.randn(3, 24, dtype=torch.float64))
    assert Kernel.TRITON in stand.timed


def test_a_threshold_leaves_the_choice_among_sparse_products(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch, 0.5, 2.0, 1.0)
    layer, dense = masked(), masked()
    for each, threshold in ((layer, 0.5), (dense, 0.9)):
        accelerate(each, sparse_threshold=threshold)
        each(torch.randn(3, 24))
    assert products(layer) == [("triton", None)] and products(dense) == [("dense", None)]
    assert set(stand.timed) == {Kernel.GATHER, Kernel.TRITON}


@pytest.mark.parametrize(
    ("mode", "product", "timed"),
    [
        (FastMode.AUTO, "triton", True),
        (FastMode.SPARSE, "sparse", False),
        (FastMode.DENSE, "sparse", False),
        (FastMode.TRITON, "triton", False),
    ],
)
def test_alive_only_storage_never_measures_the_dense_product(mode, product, timed, monkeypatch) -> None:
    stand = Stand(monkeypatch, 0.1, 2.0, 1.0)
    model = fxsparse.transform(nn.Sequential(nn.Linear(24, 32)), (torch.ones(1, 24),), pattern=SharedSupport(8))
    handle = fxsparse.attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1), fxsparse.Static(sparsity=0.75), total_steps=5
    )
    if mode is FastMode.AUTO:
        accelerate(model, (torch.ones(3, 24),))
        assert products(model) == [("dense", 0.1)]
    accelerate(model, mode=mode)
    store_alive(handle)
    stand.timed.clear()
    model(torch.ones(3, 24)).sum().backward()
    assert products(model)[0][0] == product
    assert set(stand.timed) == ({Kernel.GATHER, Kernel.TRITON} if timed else set())
    assert ("backward" in stand.calls) == (product == "triton")


@pytest.mark.parametrize("trouble", ["raises", "wrong", "not a number"])
def test_kernels_that_fail_or_are_wrong_are_left_out_with_a_warning(trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch, 3.0, 2.0, 1.0)
    if trouble == "raises":
        stand.error = OSError("no compiler")
    else:
        stand.scale = 1.3 if trouble == "wrong" else float("nan")
    layer = masked()
    plain = copy.deepcopy(layer)
    accelerate(layer)
    x = torch.randn(3, 24)
    expected = "OSError: no compiler" if trouble == "raises" else "other results"
    with pytest.warns(RuntimeWarning, match=expected):
        torch.testing.assert_close(layer(x), plain(x))
    assert products(layer) == [("sparse", 1.5)] and Kernel.TRITON not in stand.timed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def test_no_measuring_while_a_cuda_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch, 3.0, 2.0, 1.0)
    monkeypatch.setattr(shared_file, "_captured", lambda input: True)
    layer = masked()
    accelerate(layer)
    layer(torch.randn(3, 24))
    assert not stand.timed and not stand.calls and products(layer) == [("unmeasured", None)]


def test_compiled_graphs_take_what_eager_steps_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch, 3.0, 2.0, 1.0)
    layer = masked()
    plain = copy.deepcopy(layer)
    accelerate(layer)
    x = torch.randn(3, 24)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert not stand.calls  # unmeasured: gathers
    accelerate(layer, (x,))
    stand.calls.clear()
    layer.zero_grad()
    compiled(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
    assert stand.calls == ["forward", "backward"]


def test_choices_survive_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    Stand(monkeypatch, 3.0, 2.0, 1.0)
    layer = masked()
    accelerate(layer, (torch.randn(3, 24),))
    twin = copy.deepcopy(layer)
    assert list(path_of(twin).chosen.values()) == [Choice(3.0, Kernel.TRITON)] and products(twin) == [("triton", 3.0)]


# the kernels, where Triton is


def run(file: str, tmp_path: Path, **environment: str) -> None:
    """The tests of a file in a process of their own."""
    command = [sys.executable, "-m", "pytest", str(HERE / file), "-q", "-x", "-p", "no:cacheprovider"]
    settings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=settings, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "skipped" not in done.stdout and " passed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_says_that_there_is_no_device() -> None:
    script = HERE.parent.parent / "benchmarks" / "gpu_training.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("no CUDA device"), done.stderr


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
def test_kernels_by_the_interpreter(tmp_path: Path) -> None:
    run("triton_interpreted.py", tmp_path, TRITON_INTERPRET="1")


@pytest.mark.skipif(not HAS_TRITON, reason=NO_TRITON)
def test_kernels_compile_for_devices(tmp_path: Path) -> None:
    run("triton_compiled.py", tmp_path)


@pytest.mark.skipif(not (HAS_TRITON and torch.cuda.is_available()), reason=NO_CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(4096, 1024, 1024, 64, 102), (37, 50, 60, 20, 19), (1, 512, 256, 32, 51)])
def test_layers_on_cuda_equal_the_dense_product(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, wide, out, group, k = sizes
    exact = masked(wide, out, group, k).cuda().double()
    layer = copy.deepcopy(exact).to(dtype)
    accelerate(layer, mode=FastMode.TRITON)
    assert products(layer) == [("triton", None)]
    x, gradient = torch.randn(tokens, wide, device="cuda"), torch.randn(tokens, out, device="cuda")
    found = []
    for each, kind in ((exact, torch.float64), (layer, dtype)):
        given_x = x.to(dtype).to(kind).requires_grad_()
        output = each(given_x)
        output.backward(gradient.to(dtype).to(kind))
        found.append([output.detach(), given_x.grad, each.weight.grad, each.bias.grad])
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for a, b in zip(*found, strict=True):
        assert float((a - b.double()).abs().max()) <= allowed * float(a.abs().max())


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
@pytest.mark.parametrize("mode", [FastMode.SPARSE, FastMode.AUTO])
@pytest.mark.parametrize("alive_only", [False, True])
def test_ordinary_steps_on_cuda_never_wait_for_the_device(alive_only: bool, mode: FastMode) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)).cuda()
    x = torch.randn(128, 256, device="cuda")
    sparse = fxsparse.transform(model, (x,), pattern=SharedSupport(32))
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-3)
    handle = fxsparse.attach(sparse, optimizer, fxsparse.RigL(sparsity=0.9, every=100), total_steps=1000)
    accelerate(sparse, mode=mode)
    if alive_only:
        store_alive(handle)

    def step() -> None:
        optimizer.zero_grad()
        sparse(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
