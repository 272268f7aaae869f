"""What does a deployed ticket cost in accuracy, and what does it gain in speed?

Run: python benchmarks/accuracy_and_speed.py [CHECKPOINTS] [--seeds 0 1 2] [--batch 1 16 128] [--seconds 8]
     [--steps train export accuracy speed]     (all by default; each goes on where it was)
A convolutional net on Fashion-MNIST, trained by `fashion_arms.py`, becomes one file for each arm and target.
Accuracy is that of the files, run in their own runtime on the 10,000 test images: mean and standard deviation over
the seeds. Latency is the 10 % quantile of the processor time of calls in turns in one process on one thread, of the
first seed's files; ratios are the dense float file's time over the row's. 8-bit files are calibrated on 512 training
images. Peers, on the dense net where nothing else is said: onnxruntime's own static and dynamic 8 bits, OpenVINO
float and 8-bit (NNCF), Torch-Pruning at the MACs of the halved net with the same training. torch's CSR has no
convolution and is not here; see `whole_nets.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from fashion_arms import FOLDER, arm_file, arm_net, available
from torch import Tensor

import fxsparse
from fxsparse.data import Splits, idx_folder
from fxsparse.exporters import Int8, Target, Verification

QUICK = Verification(batch_sizes=(1, 3), draws=2)
FLOAT, INT8 = Target.STOCK, Target.INT8
ROWS: dict[str, tuple[str, Target]] = {
    "dense": ("dense", FLOAT),
    "dense, int8": ("dense", INT8),
    "half the channels": ("channels", FLOAT),
    "half the channels, int8": ("channels", INT8),
    "SharedSupport(64) 80 %": ("shared80", FLOAT),
    "SharedSupport(64) 80 %, int8": ("shared80", INT8),
    "SharedSupport(64) 90 %": ("shared", FLOAT),
    "SharedSupport(64) 90 %, int8": ("shared", INT8),
    "channels, MACs of SharedSupport 90 %": ("channels_as_cheap", FLOAT),
    "channels, MACs of SharedSupport 90 %, int8": ("channels_as_cheap", INT8),
    "unstructured 90 %": ("unstructured", FLOAT),
    "Torch-Pruning, MACs of half the channels": ("torch_pruning", FLOAT),
    "Torch-Pruning, MACs of SharedSupport 90 %": ("torch_pruning_as_cheap", FLOAT),
}
QDQ, DYNAMIC = "onnxruntime static QDQ", "onnxruntime dynamic int8"
PEER_QDQ = "Torch-Pruning, MACs of half the channels, onnxruntime QDQ"
OPENVINO, OPENVINO_INT8 = "OpenVINO fp32", "OpenVINO int8 (NNCF)"


def file_of(folder: Path, row: str, seed: int) -> Path:
    """Where a row's file lies."""
    return folder / "files" / f"{''.join(c if c.isalnum() else '_' for c in row)}-{seed}.onnx"


def calibration(splits: Splits) -> list[Tensor]:
    """512 training images in four batches."""
    drawn = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))[:512]
    return list(splits.train.inputs[drawn].split(128))


def export(folder: Path, splits: Splits, seed: int, epochs: int) -> None:
    """All files of a seed that are not there yet and whose arm is trained."""
    (folder / "files").mkdir(exist_ok=True)
    batches = calibration(splits)
    arrays = [batch.numpy() for batch in batches]
    for row, (arm, target) in ROWS.items():
        file = file_of(folder, row, seed)
        if file.exists() or not arm_file(folder, arm, seed, epochs).exists():
            continue
        model = arm_net(folder, None, arm, seed, epochs)
        extra: dict[str, Any] = {"calibration": [(x,) for x in batches], "int8": Int8(max_error=0.5)}
        report = fxsparse.export_onnx(
            model, file, (torch.randn(16, 1, 28, 28),), target=target, verify=QUICK, latency=False,
            **(extra if target is INT8 else {}),
        )  # fmt: skip
        print(
            f"{row}, seed {seed}: {report.variant}, {report.bytes:,} bytes, {report.agreement or report.verification}"
        )
    dense, peer = file_of(folder, "dense", seed), file_of(folder, "Torch-Pruning, MACs of half the channels", seed)
    made: dict[str, Callable[[Path], None]] = {
        QDQ: lambda file: peers.quantize_static(dense, file, arrays),
        DYNAMIC: lambda file: peers.quantize_dynamic(dense, file),
        PEER_QDQ: lambda file: peers.quantize_static(peer, file, arrays),
    }
    peers.openvino_int8(dense, arrays)
    for row, make in made.items():
        if not (file := file_of(folder, row, seed)).exists() and (row != PEER_QDQ or peer.exists()):
            make(file)


def openvino_models(folder: Path, splits: Splits, seed: int) -> dict[str, Any]:
    """OpenVINO's forms of the dense file, by row; nothing where it is not installed."""
    dense = file_of(folder, "dense", seed)
    models = {
        OPENVINO: peers.openvino_model(dense),
        OPENVINO_INT8: peers.openvino_int8(dense, [x.numpy() for x in calibration(splits)]),
    }
    return {row: peers.openvino_request(model) for row, model in models.items() if model is not None}


def files(folder: Path, seed: int) -> dict[str, Path]:
    """The files of a seed by row."""
    found = {row: file_of(folder, row, seed) for row in (*ROWS, QDQ, DYNAMIC, PEER_QDQ)}
    return {row: file for row, file in found.items() if file.exists()}


def accuracy(folder: Path, splits: Splits, seed: int) -> None:
    """Test accuracy of every file, kept in a JSON file."""
    kept = folder / "accuracy.json"
    known: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    runs = {row: peers.infer(path) for row, path in files(folder, seed).items()}
    runs |= {row: peers.openvino_infer(request) for row, request in openvino_models(folder, splits, seed).items()}
    mine = known.setdefault(str(seed), {})
    for row, run in runs.items():
        if row not in mine:
            mine[row] = _right(run, splits.test.inputs, splits.test.labels)
    kept.write_text(json.dumps(known, indent=1))


def _right(run: peers.Infer, inputs: Tensor, labels: Tensor) -> float:
    answers = np.concatenate([run(x.numpy()).argmax(1) for x in inputs.split(500)])
    return float((answers == labels.numpy()).mean())


def speed(folder: Path, splits: Splits, seed: int, batches: Sequence[int], seconds: float) -> None:
    """Milliseconds of every row at every batch size, kept in a JSON file."""
    opened = {row: peers.session(path) for row, path in files(folder, seed).items()}
    requests = openvino_models(folder, splits, seed)
    times: dict[str, dict[str, float]] = {}
    for batch in batches:
        x = np.ascontiguousarray(splits.test.inputs[:batch].numpy())
        runs = {row: peers.bound(each, x) for row, each in opened.items()}
        runs |= {row: peers.openvino_run(request, x) for row, request in requests.items()}
        times[str(batch)] = peers.low_times(runs, seconds)
    (folder / "speed.json").write_text(json.dumps({"conditions": peers.conditions(), "ms": times}, indent=1))


def table(folder: Path) -> None:
    """A Markdown table of what is known."""
    right = json.loads((folder / "accuracy.json").read_text())
    timed = json.loads((folder / "speed.json").read_text())
    times = timed["ms"]
    first = min(right, key=int)
    print(timed["conditions"])
    print(f"seeds {', '.join(right)}; accuracy of the files on the test images, mean and standard deviation\n")
    print(f"| file | accuracy, % | kB | {' | '.join(f'batch {batch}, ms' for batch in times)} |")
    print("|---" * (3 + len(times)) + "|")
    for row in next(iter(times.values())):
        values = [100 * each[row] for each in right.values() if row in each]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        path = file_of(folder, row, int(first))
        size = f"{path.stat().st_size / 1e3:,.0f}" if path.exists() else ""
        cells = [f"{each[row]:.3f} ({each['dense'] / each[row]:.1f}x)" for each in times.values()]
        print(f"| {row} | {statistics.fmean(values):.2f}{spread} | {size} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="?", default=Path("results/fashion_arms"))
    parser.add_argument("--data", default=FOLDER)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--seconds", type=float, default=8.0)
    steps = ["train", "export", "accuracy", "speed", "table"]
    parser.add_argument("--steps", nargs="+", default=steps, choices=steps)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = options.checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    splits = idx_folder(options.data)
    for seed in options.seeds:
        if "train" in options.steps:
            for arm in available(dict.fromkeys(arm for arm, _ in ROWS.values())):
                arm_net(folder, splits, arm, seed, options.epochs)
        if "export" in options.steps:
            export(folder, splits, seed, options.epochs)
        if "accuracy" in options.steps:
            accuracy(folder, splits, seed)
    if "speed" in options.steps:
        speed(folder, splits, options.seeds[0], options.batch, options.seconds)
    if "table" in options.steps:
        table(folder)


if __name__ == "__main__":
    main()
