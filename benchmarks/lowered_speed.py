"""How much faster is a lowered SharedSupport model than its dense twin in stock onnxruntime, and than its peers?

Run: python benchmarks/lowered_speed.py [--only stack conv encoder cnn] [--sparsity 0.9] [--seconds 6] [--peers]
All of one table runs in one process and one thread, in turns; a time is the 10 % quantile of the processor times of its
runs (on a busy machine the clock would also count the others' turns, and more of them for a long run), and a ratio is
the dense model's time over the variant's. Outputs are bound to memory that is allocated before. Masks are by magnitude
on random weights: speed does not depend on the values. Each lowered model is compared with the masked one in float64
first. Peers: torch CSR weights, onnxruntime dense int8 (static QDQ), OpenVINO fp32 and int8 of the dense model (from
its own package, left out where that is missing).
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime
import torch
from peers import bound
from torch import Tensor, nn
from torch.nn import functional as F

import fxsparse
from fxsparse.passes.lower_shared_support import Form, lower_shared_support

Run = Callable[[], object]


class Block(nn.Module):
    """An encoder block with pre-norm attention and a feed-forward part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def split(self, x: Tensor) -> Tensor:
        """Into heads."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Both branches."""
        y = self.norm1(x)
        y = F.scaled_dot_product_attention(self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y)))
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def stack() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.ReLU())))


def encoder(width: int, heads: int, blocks: int) -> nn.Module:
    return nn.Sequential(*(Block(width, heads) for _ in range(blocks)), nn.LayerNorm(width))


def small_cnn() -> nn.Module:
    """VGG-like, 32x32 inputs: the last five of its six convolutions are sparse."""

    def conv(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *conv(3, 64), *conv(64, 128), nn.MaxPool2d(2), *conv(128, 256), *conv(256, 256), nn.MaxPool2d(2),
        *conv(256, 512), *conv(512, 512), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


CASES: Mapping[str, tuple[str, Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "8 x 1024": ("stack", stack, (1024,), (64, 128), (1, 16, 128)),
    "conv 1x1 256->1024, 14x14": (
        "conv",
        lambda: nn.Sequential(nn.Conv2d(256, 1024, 1)),
        (256, 14, 14),
        (64, 128),
        (1, 16),
    ),
    "conv 3x3 256->256, 14x14": (
        "conv",
        lambda: nn.Sequential(nn.Conv2d(256, 256, 3, padding=1)),
        (256, 14, 14),
        (64, 128),
        (1, 16),
    ),
    "small CNN 32x32": ("cnn", small_cnn, (3, 32, 32), (64,), (1, 16)),
    "BERT-shaped, 128 tokens": ("encoder", lambda: encoder(768, 12, 4), (128, 768), (64,), (1, 16)),
    "ViT-shaped, 197 tokens": ("encoder", lambda: encoder(768, 12, 4), (197, 768), (64,), (1, 16)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=["stack", "conv", "cnn", "encoder"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--peers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # of the quantiser and of torch's exporter
    print(f"load average {os.getloadavg()[0]:.1f}; onnxruntime {onnxruntime.__version__}, torch {torch.__version__}")
    for name, (kind, make, shape, groups, batches) in CASES.items():
        if kind in options.only:
            for sparsity in options.sparsity:
                case(name, make, shape, groups, batches, sparsity, options.seconds, options.peers)


def case(
    name: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    groups: tuple[int, ...],
    batches: tuple[int, ...],
    sparsity: float,
    seconds: float,
    peers: bool,
) -> None:
    """All variants of one model at all batch sizes."""
    torch.manual_seed(0)
    model = make().eval()
    example = torch.randn(2, *shape)
    files = {"dense": export(model, example)}
    masked = model
    first = next(n for n, p in model.named_parameters() if p.ndim > 1)
    for group in groups:
        exclude = [first] if shape[0] < 16 else None  # a layer of three inputs has nothing to save
        masked = fxsparse.transform(
            model, (example,), sparsity=sparsity, pattern=fxsparse.SharedSupport(group), exclude=exclude
        ).eval()
        for label, choose in FORMS.items():
            lowered = lower_shared_support(masked, (example,), choose=choose)
            if label == "" or any(record.form is Form.GATHER_MATMUL for record in lowered.records):
                files[f"G={group}{label}"] = export(lowered.model, example)
    sessions = {key: session(value) for key, value in files.items()}
    if peers:
        sessions["dense int8"] = session(quantised(files["dense"], example))
    for batch in batches:
        x = torch.randn(batch, *shape)
        runs = {key: bound(value, x.numpy()) for key, value in sessions.items()}
        if peers:
            runs |= torch_peers(fxsparse.finalize(masked), x) | openvino_peers(files["dense"], x)
        times = interleaved(runs, seconds)
        cells = [f"{key} {times['dense'] / value:.2f}x" for key, value in times.items() if key != "dense"]
        print(
            f"{name:<26} {sparsity:.0%} batch {batch:>3}: dense {times['dense'] * 1e3:8.3f} ms; {', '.join(cells)}",
            flush=True,
        )


def _by_product(layer: Any) -> Form:
    return Form.GATHER_MATMUL if Form.GATHER_MATMUL in layer.forms else layer.forms[-1]


FORMS: Mapping[str, Any] = {"": None, " product": _by_product}


def export(model: nn.Module, example: Tensor) -> bytes:
    """As ONNX with a dynamic batch."""
    buffer = io.BytesIO()
    with torch.no_grad():
        program = torch.onnx.export(
            model, (example,), dynamo=True, verbose=False, external_data=False, dynamic_shapes=({0: "batch"},)
        )
    assert program is not None
    program.save(buffer)
    return buffer.getvalue()


def session(file: bytes) -> onnxruntime.InferenceSession:
    """One thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def quantised(file: bytes, example: Tensor) -> bytes:
    """The dense file as static QDQ int8, calibrated on random inputs."""
    import tempfile
    from pathlib import Path

    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.rows = iter([{name: torch.randn_like(example).numpy()} for _ in range(4)])

        def get_next(self) -> Any:
            """The next feed, or None."""
            return next(self.rows, None)

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
        source.write_bytes(file)
        reader = Reader(session(file).get_inputs()[0].name)
        quantize_static(
            source, target, reader, quant_format=QuantFormat.QDQ, per_channel=True,
            weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        )  # fmt: skip
        return target.read_bytes()


def torch_peers(model: nn.Module, x: Tensor) -> dict[str, Run]:
    """PyTorch dense, and with the weights of linear layers in CSR."""
    csr = fxsparse.graph.isolated_clone(model)
    found = [m for m in csr.modules() if isinstance(m, nn.Linear)]
    for module in found:
        module.weight = nn.Parameter(module.weight.detach().to_sparse_csr(), requires_grad=False)
    runs = {"torch dense": _torch_run(model, x)}
    return runs | ({"torch CSR": _torch_run(csr, x)} if found else {})


def _torch_run(model: nn.Module, x: Tensor) -> Run:
    def run() -> object:
        with torch.no_grad():
            return model(x)

    return run


def openvino_peers(file: bytes, x: Tensor) -> dict[str, Run]:
    """The dense model in OpenVINO, one thread; nothing where it is not installed."""
    try:
        import openvino
    except ImportError:
        return {}
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    files = {"OpenVINO": file, "OpenVINO int8": quantised(file, x[:2].repeat(2 // min(2, len(x)), *[1] * (x.ndim - 1)))}
    runs: dict[str, Run] = {}
    for key, value in files.items():
        request = core.compile_model(core.read_model(value), "CPU", settings).create_infer_request()
        runs[key] = lambda request=request: request.infer([x.numpy()], share_inputs=True, share_outputs=True)  # type: ignore[misc]
    return runs


def interleaved(runs: Mapping[str, Run], seconds: float) -> dict[str, float]:
    """Seconds of each: the 10 % quantile of runs in turns of some 10 ms, the first of each turn left out.

    A turn is more than one run because a model that ran just before has its weights in the cache, and the others' not.
    """
    times: dict[str, list[float]] = {key: [] for key in runs}
    lengths = {}
    for key, run in runs.items():
        run()
        lengths[key] = int(min(50, max(3, 0.01 // _once(run))))
    end = time.perf_counter() + seconds  # by the clock
    while time.perf_counter() < end or len(next(iter(times.values()))) < 6:
        for key, run in runs.items():
            times[key] += [_once(run) for _ in range(lengths[key])][1:]
    return {key: float(np.quantile(value, 0.1)) for key, value in times.items()}


def _once(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
