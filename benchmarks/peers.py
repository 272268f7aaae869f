"""What the benchmarks compare with: onnxruntime's own 8 bits, OpenVINO, torch's CSR; and how they take the time.

Not a benchmark by itself. OpenVINO and NNCF are left out where they cannot be imported (pip install openvino nncf).
Everything runs on one thread.
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

Run = Callable[[], object]
Infer = Callable[[np.ndarray], np.ndarray]
_TURN_S = 0.02


def optional(name: str) -> Any:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def conditions() -> str:
    """The machine and the versions, in a line."""
    found = [f"onnxruntime {onnxruntime.__version__}", f"torch {torch.__version__}"]
    for name in ("openvino", "nncf", "torch_pruning"):
        module = optional(name)
        found.append(f"{name} {module.__version__.split('-')[0]}" if module else f"no {name}")
    cpu = _processor()
    return f"{cpu}, one thread, load average {os.getloadavg()[0]:.1f}; " + ", ".join(found)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = next((line for line in lines if line.startswith("flags")), "")
    kind = "VNNI" if "avx512_vnni" in flags else "AVX-512" if "avx512f" in flags else "no AVX-512"
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} ({kind})"


def quantize_static(source: Path, target: Path, batches: Sequence[np.ndarray]) -> None:
    """Static QDQ by onnxruntime as its documentation advises: preprocessed, 8-bit weights by output channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.rows = iter([{name: each} for each in batches])

        def get_next(self) -> Any:
            """The next feed, or None."""
            return next(self.rows, None)

    prepared = target.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        name = onnxruntime.InferenceSession(str(prepared), providers=["CPUExecutionProvider"]).get_inputs()[0].name
        quantize_static(
            str(prepared), str(target), Reader(name), quant_format=QuantFormat.QDQ, per_channel=True,
            weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        )  # fmt: skip
    prepared.unlink()


def quantize_dynamic(source: Path, target: Path) -> None:
    """Dynamic quantisation by onnxruntime of everything that it takes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        proto = onnx.load(prepared)
        proto.graph.ClearField("value_info")  # the quantizer transposes weights, and would find their old shapes
        onnx.save(proto, prepared)
        quantize_dynamic(str(prepared), str(target), weight_type=QuantType.QUInt8, per_channel=True)
    prepared.unlink()


class _quiet:  # noqa: N801  # reads as a statement
    """No log lines of the quantizers."""

    def __enter__(self) -> None:
        self.before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self.before)


def session(file: Path) -> onnxruntime.InferenceSession:
    """One thread, all optimisations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def infer(file: Path) -> Infer:
    """Run onnxruntime, first input to first output."""
    opened = session(file)
    name = opened.get_inputs()[0].name
    return lambda x: np.asarray(opened.run(None, {name: x})[0])


def bound(opened: onnxruntime.InferenceSession, x: np.ndarray) -> Run:
    """A run with its input and output in memory that stays."""
    name, output = opened.get_inputs()[0].name, opened.get_outputs()[0].name
    made = np.empty_like(opened.run(None, {name: x})[0])
    binding = opened.io_binding()
    binding.bind_cpu_input(name, x)
    binding.bind_output(output, "cpu", 0, made.dtype, made.shape, made.ctypes.data)
    kept = (x, made)
    return lambda: (opened.run_with_iobinding(binding), kept)


def openvino_model(file: Path) -> Any:
    """A float model as OpenVINO reads it; None without OpenVINO."""
    openvino = optional("openvino")
    return None if openvino is None else openvino.Core().read_model(str(file))


def openvino_int8(file: Path, batches: Sequence[np.ndarray]) -> Any:
    """The model quantised by NNCF's post-training quantisation, kept beside the file; None without it."""
    nncf, openvino = optional("nncf"), optional("openvino")
    if nncf is None or openvino is None:
        return None
    if not (kept := file.with_suffix(".nncf.xml")).exists():
        nncf.set_log_level(logging.ERROR)
        rows = [row[None] for batch in batches for row in batch]
        model = nncf.quantize(openvino.Core().read_model(str(file)), nncf.Dataset(rows), subset_size=len(rows))
        openvino.save_model(model, str(kept), compress_to_fp16=False)
    return openvino.Core().read_model(str(kept))


def openvino_request(model: Any) -> Any:
    """One thread, float32 arithmetic unless the model is 8-bit."""
    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", settings).create_infer_request()


def openvino_run(request: Any, x: np.ndarray) -> Run:
    """A run without copies."""
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)


def openvino_infer(request: Any) -> Infer:
    """First input to first output."""
    return lambda x: np.array(request.infer([x])[0])


def csr_twin(model: nn.Module) -> nn.Module | None:
    """A copy with the weights of its linear layers in CSR; None where it has none."""
    twin = copy.deepcopy(model)
    found = [module for module in twin.modules() if isinstance(module, nn.Linear)]
    for module in found:
        module.weight = nn.Parameter(module.weight.detach().to_sparse_csr(), requires_grad=False)
    return twin if found else None


def torch_run(model: nn.Module, x: Tensor) -> Run:
    """A call without gradients."""

    def run() -> object:
        with torch.no_grad():
            return model(x)

    return run


def low_times(runs: Mapping[str, Run], seconds: float) -> dict[str, float]:
    """Milliseconds of each: the 10 % quantile of the processor time of calls in turns of some 20 ms.

    The clock would also count the others' turns on a busy machine. A turn is more than one call, the first of which is
    left out, because a model that ran just before has its weights in the cache, and the others' not.
    """
    times: dict[str, list[float]] = {key: [] for key in runs}
    lengths = {}
    for key, run in runs.items():
        run()
        lengths[key] = int(min(50, max(3, _TURN_S // min(_once(run) for _ in range(3)))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 6:
        for key, run in runs.items():
            times[key] += [_once(run) for _ in range(lengths[key])][1:]
    return {key: 1e3 * float(np.quantile(value, 0.1)) for key, value in times.items()}


def _once(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
