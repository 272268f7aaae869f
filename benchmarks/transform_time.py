"""How long does `transform` take, against one recorder run and one plain symbolic trace of the same model?

Run: python benchmarks/transform_time.py [--repeats 5] [--threads 1] [--zoo PATH --only GLOB [GLOB ...]]
Columns, medians in milliseconds of CPU time of this process:
  recorder        `fxsparse.graph.record`: one eager run on the example inputs
  symbolic_trace  `torch.fx.symbolic_trace`; "refused" where it raises (the time until then still counts)
  transform       `fxsparse.transform` at sparsity 0, with its comparison on the example inputs
  ratio           transform / (recorder + symbolic_trace)
The last line sums up: the median ratio; how many ratios are above 3, and how many of those belong to a transform of
more than a quarter of a second; the slowest transform; all transforms together. Models are in eval mode.
PATH is a directory with a zoo.json whose entries have `name`, `ctor` (Python that leaves `m`) and `inputs` (Python that
leaves `args` and `kwargs`; `torch` and the batch size `B` in scope).
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxsparse
from fxsparse.graph import record
from fxsparse.models import lenet_300_100, small_conv_net

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def plain_resnet(blocks: int, width: int) -> nn.Module:
    """A stem and `blocks` times convolution, norm and activation."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for _ in range(blocks):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def encoder(layers: int, width: int) -> nn.Module:
    """A transformer encoder."""
    layer = nn.TransformerEncoderLayer(width, 4, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


BUILT_IN: dict[str, Callable[[], Case]] = {
    "LeNet-300-100, batch 2": lambda: (lenet_300_100(784, 10), (torch.randn(2, 784),), {}),
    "small conv net, 16x16": lambda: (small_conv_net(3, 10, 16), (torch.randn(2, 3, 16, 16),), {}),
    "50 convolutions, 64 wide": lambda: (plain_resnet(50, 64), (torch.randn(2, 3, 32, 32),), {}),
    "linear 4096 x 4": lambda: (nn.Sequential(*[nn.Linear(4096, 4096) for _ in range(4)]), (torch.ones(2, 4096),), {}),
    "transformer encoder, 6 layers": lambda: (encoder(6, 128), (torch.randn(2, 32, 128),), {}),
    "LSTM": lambda: (nn.LSTM(64, 128, 2), (torch.randn(16, 2, 64),), {}),
}


def cases(zoo: Path | None, only: list[str]) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Name and maker of every model to measure."""
    if zoo is None:
        yield from BUILT_IN.items()
        return
    sys.path.insert(0, str(zoo))
    for entry in json.loads((zoo / "zoo.json").read_text())["entries"]:
        if any(fnmatch.fnmatch(entry["name"], glob) for glob in only):
            yield entry["name"], lambda entry=entry: made(entry)  # type: ignore[misc]  # bound at once


def made(entry: dict[str, str]) -> Case:
    """The model and the inputs of an entry, from fixed seeds."""
    model: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(entry["ctor"], model)
    inputs: dict[str, Any] = {"torch": torch, "B": 2}
    torch.manual_seed(1)
    exec(entry["inputs"], inputs)
    return model["m"], inputs["args"], inputs.get("kwargs", {})


def median(action: Callable[[], object], repeats: int) -> tuple[float, bool]:
    """Milliseconds that `action` takes, and whether it went through; once to warm up."""
    times, fine = [], True
    for _ in range(repeats + 1):
        gc.collect()
        start = time.process_time()
        try:
            action()
        except Exception:
            fine = False
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times[1:]), fine


def row(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], repeats: int
) -> tuple[str, tuple[float, float] | None]:
    """The cells of one model; the ratio and the milliseconds of its transform, None where it failed."""
    recorder, _ = median(lambda: record(model, args, kwargs), repeats)
    trace, traced = median(lambda: torch.fx.symbolic_trace(model), repeats)
    transform, fine = median(lambda: fxsparse.transform(model, (args, kwargs)), repeats)
    shown = f"{trace:.1f}" if traced else f"refused ({trace:.1f})"
    result = f"{transform:>10.1f} {transform / (recorder + trace):>6.2f}" if fine else "    failed"
    return f"{recorder:>9.1f} {shown:>16} {result}", (transform / (recorder + trace), transform) if fine else None


def summary(found: list[tuple[float, float]]) -> str:
    """All models in one line."""
    ratios, times = zip(*found, strict=True)
    above = [(ratio, time) for ratio, time in found if ratio > 3]
    long = sum(time > 250 for _, time in above)
    share = f"{len(found)} models: median ratio {statistics.median(ratios):.2f}; above 3: {len(above)}"
    return f"{share}, of which over 250 ms: {long}; slowest {max(times):.0f} ms; all together {sum(times) / 1e3:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--only", nargs="+", default=["*"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"CPU time in ms, medians of {options.repeats}, {options.threads} thread(s)")
    print(f"{'model':<34} {'recorder':>9} {'symbolic_trace':>16} {'transform':>10} {'ratio':>6}")
    found = []
    for name, make in cases(options.zoo, options.only):
        try:
            model, args, kwargs = make()
        except Exception as error:
            print(f"{name:<34} cannot be made: {type(error).__name__}: {error}")
            continue
        cells, told = row(model.eval(), args, kwargs, options.repeats)
        found += [told] if told is not None else []
        print(f"{name:<34} {cells}", flush=True)
    print(summary(found))


if __name__ == "__main__":
    main()
