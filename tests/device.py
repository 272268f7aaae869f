"""The tests on another device: `pytest --device cuda` (or `elsewhere`, see tests/device_elsewhere.py).

The tests name no device, so what they make lands on the CPU. Under `OnDevice` the calls that *they* make put tensors on
the device: factories without a `device` (drawn on the CPU, so the numbers are those of the CPU's run), `numpy()`,
comparisons with a CPU oracle. Calls of the library stay as they are, so that its own wrong devices show.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._pytree import tree_map_only

from tests import device_elsewhere

TESTS = Path(__file__).parent
CONFTEST = str(TESTS / "conftest.py")
FOLDERS = ("curvature", "graph", "lottery", "models", "nn", "passes", "planning", "sparsity", "training")
CPU_ONLY = {  # the beginning of a test's name -> why it stays on the CPU
    "test_generated_onnx": "onnxruntime",
    "test_house": "source files",
    "test_other_device": "both devices already",
    "curvature/test_fisher_distributed": "processes of gloo",
    "curvature/test_fisher_ranks": "processes of gloo",
    "curvature/test_fisher_sampled.py::test_more_draws": "a generator of the CPU",
    "curvature/test_fisher_sampled.py::test_on_a_trained_network": "a generator of the CPU",
    "curvature/test_fisher_sampled.py::test_the_same_seed": "a generator of the CPU",
    "curvature/test_fisher_state.py::test_batch_means_are_never_squared": "a generator of the CPU",
    "curvature/test_percolation.py::test_sampling_probabilities": "scores that are on the CPU",
    "curvature/test_trace_eigs": "operators of its own, on the CPU",
    "curvature/test_fisher_traps.py::test_the_state_is_given_back_after_success": "asks for the CPU's autocast",
    "graph/test_edit_match_render.py::test_dead_code_keeps_what_has_an_effect": "counts nodes, ours among them",
    "graph/test_recorder.py::test_nothing_is_changed_also_when_the_model_raises": "looks for modes, finds ours",
    "graph/test_trace_errors.py::test_what_python_code_raises_on_a_symbol": "quotes the line that fails, finds ours",
    "lottery/test_canonical": "text",
    "lottery/test_config": "text",
    "lottery/test_kill": "processes",
    "lottery/test_run_directory": "files",
    "lottery/test_regroup.py::test_a_ticket_with_its_lineage": "builds on the CPU",
    "lottery/test_rewind.py::test_the_whole_state_comes_back": "the CPU's random state",
    "nn/test_layers.py::test_half_double_and_device_moves_keep_the_mask_bool": "moves to the CPU itself",
    "nn/test_select": "the CPU's own product",
    "nn/test_shared.py::test_the_gradient_memory_is_reused_but_never_shared": "what the CPU alone does",
    "nn/test_shared_triton": "says itself what needs CUDA",
    "sparsity/test_quantile.py::test_peak_memory_is_a_chunk_and_a_histogram": "the CPU's memory",
    "test_weights_holds.py::test_devices_and_dtypes_come_back": "moves to the CPU itself",
    "training/test_compiled": "the compiler's code for the CPU",
    "training/test_distributed": "processes of gloo",
    "training/test_exchange": "draws masks on the CPU, scores on the device",
    "training/test_kill": "processes",
    "training/test_loops.py::test_global_random_state_is_never_touched": "the CPU's random state",
    "training/test_methods_properties.py::test_every_combination_runs_by_the_rules[mest soft": "checks counts itself",
    "training/test_methods_properties.py::test_every_combination_runs_by_the_rules[snfs": "checks counts itself",
    "training/test_no_host_sync": "a process of its own",
    "training/test_resu_distributed": "processes of gloo",
    "training/test_sharded": "processes of gloo",
    "training/test_update_memory": "the CPU's memory",
    "training/test_upkeep.py::test_nothing_is_written_where_nobody_wrote": "what the CPU alone does",
}
SIMULATED = {  # what only the simulated device cannot do
    "test_weights_bad_input.py::test_a_model_in_data_parallel": "nn.DataParallel",
    "test_weights_bad_input.py::test_a_quantised": "quantised tensors",
    "test_weights_bad_input.py::test_distributed_models_and_parts": "gloo",
    "test_weights_bad_input.py::test_hooks_fire_once_for_each_backward_under_data_parallel": "gloo",
    "test_weights_bad_input.py::test_parameters_that_cannot_hold_a_mask_are_refused_by_name": "sparse tensors",
    "curvature/test_operator_input.py::test_embeddings_with_sparse_gradients": "sparse tensors",
    "nn/test_masked.py::test_sparse_gradients_of_embeddings": "sparse tensors",
    "planning/test_prune_again.py::test_a_model_that_draws_differently": "sparse tensors",
}
HELPERS = (
    f"{TESTS}/",
    str(TESTS.parent / "fxsparse/data/"),
    str(TESTS.parent / "fxsparse/testing/"),
    str(TESTS.parent / "fxsparse/models/"),
    "<eval_with_key>",
)
LIBRARY = str(TESTS.parent / "fxsparse/")

RANDOM = {torch.rand, torch.randn, torch.randint, torch.randperm}
LIKE = {torch.rand_like, torch.randn_like, torch.randint_like}
DRAWN = {getattr(Tensor, name) for name in ("uniform_", "normal_", "bernoulli_", "random_", "exponential_")}
DRAWN |= {nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_}
MIXED = "same device", "two devices", "different device", "type for generator", "is on cpu", "on the CPU"


def role(frame: FrameType) -> str | None:
    """Whether code of the tests, of the library, or neither runs in a frame."""
    name = frame.f_code.co_filename
    if name.startswith(HELPERS):
        return None if name in (__file__, CONFTEST) else "test"
    if not name.startswith(LIBRARY):
        return None
    made = frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), nn.Module)
    return None if made else "library"  # whoever makes a module chooses its device


def roles(func: Any = None) -> list[str]:
    """Who called, the innermost first; a mode of the library that only hands `func` on is left out."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        each = role(frame)
        if each == "library" and frame.f_code.co_name == "__torch_function__" and frame.f_locals.get("func") is func:
            if "test" not in found:
                found.clear()
        elif each is not None:
            found.append(each)
        frame = frame.f_back
    return found


class OnDevice(DeviceContext):
    """Puts what tests make on `device`; to the library it is what `torch.set_default_device` enters."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.on = False

    __enter__, __exit__ = TorchFunctionMode.__enter__, TorchFunctionMode.__exit__

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.on:
            return func(*args, **kwargs)
        if func in _device_constructors() or func in LIKE:
            return self.made(func, args, kwargs)
        if func in DRAWN and roles(func)[:1] == ["test"]:
            tensor, *args = args or [kwargs.pop("tensor")]
            with torch.no_grad():
                return tensor.copy_(func(torch.empty_like(tensor, device="cpu"), *args, **kwargs))
        if func in (Tensor.numpy, Tensor.__array__) and roles(func)[:1] == ["test"]:
            return func(args[0].cpu(), *args[1:], **kwargs)
        if getattr(func, "__name__", "") == "_pack_padded_sequence":
            args = (args[0], args[1].cpu(), *args[2:])  # lengths stay on the CPU, wherever the values are
        try:
            return func(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            if not any(each in str(error) for each in MIXED) or "library" in roles(func):
                raise
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(self.device), (args, kwargs))
            return func(*args, **kwargs)

    def made(self, func: Any, args: Any, kwargs: Any) -> Any:
        taken = func in (torch.as_tensor, torch.asarray) and isinstance(args[0], Tensor)
        if taken or kwargs.get("device") is not None or kwargs.get("out") is not None or roles(func)[:1] != ["test"]:
            return func(*args, **kwargs)
        if func in LIKE:
            return func(args[0], *args[1:], **{**kwargs, "device": "cpu"}).to(args[0].device)
        if func in RANDOM:
            needs = kwargs.pop("requires_grad", False)
            made = func(*args, **kwargs).to(self.device)
            return made.requires_grad_(True) if needs else made
        return func(*args, **{**kwargs, "device": self.device})


def on_cpu(check: Callable[..., None]) -> Callable[..., None]:
    """Compare values wherever they are; types, shapes and values still have to agree."""

    @functools.wraps(check)
    def checked(actual: Any, expected: Any, *args: Any, **kwargs: Any) -> None:
        check(*tree_map_only(Tensor, Tensor.cpu, (actual, expected)), *args, **kwargs)

    return checked


def moved(make: Callable[..., Tensor], mode: OnDevice) -> Callable[..., Tensor]:
    """What modes do not see: a tensor on the memory of an array of a test."""

    @functools.wraps(make)
    def made(array: Any) -> Tensor:
        found = make(array)
        return found.to(mode.device) if mode.on and roles()[:1] == ["test"] else found

    return made


def on_kind(start: Callable[..., None], kind: str) -> Callable[..., None]:
    """Autocast that a test asks for on the CPU is meant for where its tensors are."""

    @functools.wraps(start)
    def started(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        start(self, kind if device_type == "cpu" and roles()[:1] == ["test"] else device_type, *args, **kwargs)

    return started


def left_out(name: str, simulated: bool = False) -> str | None:
    """Why a test (its name from tests/ on) or a file of tests stays on the CPU, or None."""
    folder, inside, _ = name.partition("/")
    if name.startswith("../") or (inside and folder not in FOLDERS):
        return "about files, processes or onnxruntime"
    known = {**CPU_ONLY, **SIMULATED} if simulated else CPU_ONLY
    return next((reason for start, reason in known.items() if name.startswith(start)), None)


def place(path: Path) -> str:
    """A file's name from tests/ on."""
    return Path(os.path.relpath(path, TESTS)).as_posix()


def usable(device: str) -> None:
    """Raise UsageError where the device is not here; make it where it is the simulated one."""
    kind = device.partition(":")[0]
    if kind == device_elsewhere.NAME:
        if reason := device_elsewhere.missing():
            raise pytest.UsageError(f"--device {device}: {reason}")
        device_elsewhere.register()
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise pytest.UsageError(f"--device {device}: torch cannot use it here ({error})") from error


class Plugin:
    """What `--device` adds to a run of pytest."""

    def __init__(self, name: str) -> None:
        self.mode = OnDevice(name)
        self.mode.__enter__()
        torch.from_numpy = moved(torch.from_numpy, self.mode)
        torch.testing.assert_close = on_cpu(torch.testing.assert_close)
        torch.autocast.__init__ = on_kind(torch.autocast.__init__, self.mode.device.type)

    def pytest_report_header(self) -> str:
        return f"device: {self.mode.device}"

    def left_out(self, item: pytest.Item) -> str | None:
        name = place(item.path) + "::" + item.nodeid.partition("::")[2]
        return left_out(name, self.mode.device.type == device_elsewhere.NAME)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Any:
        self.mode.on = collector.path.is_file() and left_out(place(collector.path)) is None
        try:
            return (yield)
        finally:
            self.mode.on = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.mode.on = self.left_out(item) is None
        try:
            return (yield)
        finally:
            self.mode.on = False

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if (reason := self.left_out(item)) is not None:
            pytest.skip(f"stays on the CPU: {reason}")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.status = exitstatus

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        self.mode.__exit__(None, None, None)
        if self.mode.device.type == device_elsewhere.NAME:
            sys.stdout.flush()
            os._exit(self.status)  # torch cannot end the thread of a backend that it does not know
