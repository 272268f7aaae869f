"""What do whole networks gain, and what do the peers make of the same networks?

Run: python benchmarks/whole_nets.py [FOLDER] [--nets cnn bert vit] [--batch 1 16] [--seconds 10]
     [--steps make speed table]
A small convolutional net and two encoders of random weights (latency does not depend on them; the masks are by
magnitude). Files are made by `export_onnx` and kept in FOLDER: dense, SharedSupport(64) at 90 %, half of the channels
(the net of convolutions), each as float and 8-bit. Peers in the same run: onnxruntime's own static and dynamic 8
bits, OpenVINO float and 8-bit (NNCF) of the dense net; PyTorch with unstructured zeros of 90 % in its linear layers
as CSR; Torch-Pruning at the MACs of the halved net and of the SharedSupport one. Latency is the 10 % quantile of
the processor time of calls in turns, one process, one thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from lowered_speed import encoder, small_cnn
from torch import nn

import fxsparse
from fxsparse.exporters import Int8, Target, Verification
from fxsparse.graph import count
from fxsparse.planning.prune_budgets import ChannelBudget
from fxsparse.planning.prune_channels import plan_channels
from fxsparse.planning.prune_choose import Scope

QUICK = Verification(batch_sizes=(1, 2), draws=1)


@dataclass(frozen=True)
class Net:
    """A network, the shape of a sample, and the weights that stay dense."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    exclude: tuple[str, ...] = ()
    channels: bool = False


NETS: Mapping[str, Net] = {
    "cnn": Net("small CNN, 32x32 images", small_cnn, (3, 32, 32), ("0.weight", "22.weight"), channels=True),
    "bert": Net("BERT-shaped encoder, 4 blocks of 768, 128 tokens", lambda: encoder(768, 12, 4), (128, 768)),
    "vit": Net("ViT-shaped encoder, 4 blocks of 768, 197 tokens", lambda: encoder(768, 12, 4), (197, 768)),
}


def fresh(net: Net) -> nn.Module:
    """The same random weights at each call."""
    torch.manual_seed(0)
    return net.make().eval()


def halved(net: Net) -> nn.Module:
    """Half of the channels of every layer gone."""
    x = torch.zeros(1, *net.shape)
    return plan_channels(fresh(net), (x,), budget=ChannelBudget(0.5), scope=Scope.LOCAL, round_to=8).apply()


def shared(net: Net) -> nn.Module:
    """SharedSupport(64) at 90 %."""
    x = torch.zeros(1, *net.shape)
    return fxsparse.transform(
        fresh(net), (x,), sparsity=0.9, pattern=fxsparse.SharedSupport(64), exclude=list(net.exclude) or None
    )


def by_peer(net: Net, goal: int) -> nn.Module | None:
    """Torch-Pruning, the same share of every layer, down to so many MACs; None where it is not installed."""
    peer = peers.optional("torch_pruning")
    if peer is None:
        return None
    x, small = torch.zeros(1, *net.shape), copy.deepcopy(fresh(net))
    head = [module for module in small.modules() if isinstance(module, nn.Linear)][-1]
    pruner = peer.pruner.BasePruner(
        small, x, importance=peer.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.95, iterative_steps=200,
        ignored_layers=[head],
    )  # fmt: skip
    while (count(small, (x,)).macs_dense or 0) > goal:
        pruner.step()
    return small


def make(folder: Path, net: Net) -> None:
    """The files of a network that are not there yet."""
    data = [torch.randn(4, *net.shape) for _ in range(2)]
    kinds: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: fresh(net),
        "SharedSupport(64) 90 %": lambda: shared(net),
    }
    if net.channels:
        kinds["half the channels"] = lambda: halved(net)
    for row, build in kinds.items():
        for label, target in ((row, Target.STOCK), (f"{row}, int8", Target.INT8)):
            if (file := folder / f"{label}.onnx").exists():
                continue
            extra: dict[str, Any] = {"calibration": [(x,) for x in data], "int8": Int8(max_error=1.0)}
            report = fxsparse.export_onnx(
                build(), file, (data[0][:2],), target=target, verify=QUICK, latency=False,
                **(extra if target is Target.INT8 else {}),
            )  # fmt: skip
            print(f"{label}: {report.variant}, {report.agreement or report.verification}", flush=True)
    dense = folder / "dense.onnx"
    if not (file := folder / "onnxruntime static QDQ.onnx").exists():
        peers.quantize_static(dense, file, [x.numpy() for x in data])
    if not (file := folder / "onnxruntime dynamic int8.onnx").exists():
        peers.quantize_dynamic(dense, file)
    peers.openvino_int8(dense, [x.numpy() for x in data])
    if net.channels:
        pruned(folder, net)


def pruned(folder: Path, net: Net) -> None:
    """Torch-Pruning's files."""
    x = torch.zeros(1, *net.shape)
    ticket = count(shared(net), (x,)).macs_effective
    for label, goal in (("half the channels", count(halved(net), (x,)).macs_dense), ("SharedSupport(64) 90 %", ticket)):
        file = folder / f"Torch-Pruning, MACs of {label}.onnx"
        if file.exists() or goal is None or (small := by_peer(net, goal)) is None:
            continue
        fxsparse.export_onnx(small, file, (torch.randn(2, *net.shape),), verify=QUICK, latency=False)


def speed(folder: Path, net: Net, batches: list[int], seconds: float) -> None:
    """Milliseconds of every file, and of the peers that have none."""
    sessions = {path.stem: peers.session(path) for path in sorted(folder.glob("*.onnx"))}
    dense = folder / "dense.onnx"
    models = {
        "OpenVINO fp32": peers.openvino_model(dense),
        "OpenVINO int8 (NNCF)": peers.openvino_int8(dense, [torch.randn(4, *net.shape).numpy()]),
    }
    requests = {row: peers.openvino_request(model) for row, model in models.items() if model is not None}
    sparse = scattered(net)
    times = {}
    for batch in batches:
        x = torch.randn(batch, *net.shape)
        runs = {row: peers.bound(each, x.numpy()) for row, each in sessions.items()}
        runs |= {row: peers.openvino_run(request, x.numpy()) for row, request in requests.items()}
        runs |= {row: peers.torch_run(model, x) for row, model in sparse.items()}
        times[str(batch)] = peers.low_times(runs, seconds)
    (folder / "speed.json").write_text(json.dumps({"conditions": peers.conditions(), "ms": times}, indent=1))


def scattered(net: Net) -> dict[str, nn.Module]:
    """PyTorch dense, and with 90 % unstructured zeros in CSR where linear layers carry the network."""
    dense = fresh(net)
    if net.channels:
        return {"PyTorch dense": dense}
    masked = fxsparse.finalize(fxsparse.transform(dense, (torch.zeros(1, *net.shape),), sparsity=0.9))
    csr = peers.csr_twin(masked)
    return {"PyTorch dense": dense, **({} if csr is None else {"PyTorch, CSR 90 %": csr})}


def table(folder: Path, net: Net) -> None:
    """Markdown; the fastest at the first batch size first."""
    known = json.loads((folder / "speed.json").read_text())
    times = known["ms"]
    print(f"\n{net.title}; {known['conditions']}\n")
    print(f"| file | MB | {' | '.join(f'batch {batch}, ms' for batch in times)} |")
    print("|---" * (2 + len(times)) + "|")
    first = next(iter(times.values()))
    for row in sorted(first, key=lambda each: (each != "dense", first[each])):
        path = folder / f"{row}.onnx"
        size = f"{path.stat().st_size / 1e6:.1f}" if path.exists() else ""
        cells = [f"{each[row]:.3f} ({each['dense'] / each[row]:.1f}x)" for each in times.values()]
        print(f"| {row} | {size} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results/whole_nets"))
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=10.0)
    steps = ["make", "speed", "table"]
    parser.add_argument("--steps", nargs="+", default=steps, choices=steps)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's CSR is "in beta"
    for key in options.nets:
        net, folder = NETS[key], options.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        if "make" in options.steps:
            make(folder, net)
        if "speed" in options.steps:
            speed(folder, net, options.batch, options.seconds)
        if "table" in options.steps:
            table(folder, net)


if __name__ == "__main__":
    main()
