"""What fxsparse does, run on the CPU and on the simulated device: the same results, on the device of the model.

Run by test_other_device.py, in a process of its own: torch's private backend takes a name once.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

import fxsparse
from fxsparse import curvature
from fxsparse.lottery import IMP, find_tickets
from fxsparse.passes.lower_modules import gathered
from fxsparse.passes.lower_support import find_support
from fxsparse.training import METHODS
from fxsparse.training.loop import Samples, Task, fit, start

sys.path.insert(0, str(Path(__file__).parent))
import device_elsewhere

Found = dict[str, Any]
PATTERNS = (
    fxsparse.Unstructured(),
    fxsparse.NByM(1, 2),
    fxsparse.Block(2, 2),
    fxsparse.Channel(0),
    fxsparse.ConstantFanIn(),
    fxsparse.SharedSupport(4),
)
HOST = ("importance", "eigenvalues")  # results that are on the CPU wherever the model is
SHARED = fxsparse.SharedSupport(8)


def net(device: str) -> nn.Module:
    """Convolutions, a norm and linear layers in float64, the same numbers on any device."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8),
    )  # fmt: skip
    return model.double().to(device)


def batches(device: str, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(6, 2, 4, 4, generator=draw).double(), torch.randint(8, (6,), generator=draw)) for _ in range(count)
    ]
    return [(x.to(device), y.to(device)) for x, y in made]


def example(device: str) -> tuple[Tensor]:
    return (batches(device)[0][0],)


def masked(device: str, pattern: Any = None, density: float = 0.5, **options: Any) -> nn.Module:
    return fxsparse.transform(
        net(device), example(device), sparsity=1 - density, pattern=pattern or fxsparse.Unstructured(), **options
    )


def state(model: nn.Module) -> Found:
    return {"state": {name: value.detach().clone() for name, value in model.state_dict().items()}}


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 8) -> list[Tensor]:
    losses, device = [], str(next(model.parameters()).device)
    data = batches(device)
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    return [loss.detach() for loss in losses]


def transformed(device: str, pattern: Any) -> Found:
    model = masked(device, pattern)
    output = model(*example(device))
    report = str(fxsparse.sparsity_report(model))
    folded = fxsparse.finalize(model)
    return {
        "masks": dict(fxsparse.masks(model)),
        "output": output,
        "report": report,
        "folded": folded(*example(device)),
    }


def method(device: str, kind: type, **options: Any) -> Found:
    model = masked(device, density=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    made = kind(sparsity=0.5, **({"every": 2} if "every" in kind.__dataclass_fields__ else {}), **options)
    handle = fxsparse.attach(model, optimizer, made, total_steps=16)
    losses = trained(model, optimizer)
    again = masked(device, density=1.0)
    other = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    handle_again = fxsparse.attach(again, other, made, total_steps=16)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    handle_again.load_state_dict(handle.state_dict())
    later = trained(model, optimizer, 4), trained(again, other, 4)
    return {"losses": losses, "later": later, **state(model), "again": state(again)}


def pruned(device: str, how: Any) -> Found:
    model = masked(device, density=1.0)
    return {"masks": fxsparse.prune(model, how, batches(device), F.cross_entropy), **state(model)}


def shared(device: str, alive_only: bool, optimizer: Callable[..., torch.optim.Optimizer]) -> Found:
    model = masked(device, SHARED, density=1.0)
    made = optimizer(model.parameters(), lr=0.01)
    handle = fxsparse.attach(model, made, fxsparse.RigL(sparsity=0.75, every=3, pattern=SHARED), total_steps=16)
    report = fxsparse.accelerate(model, mode=fxsparse.FastMode.SPARSE)
    if alive_only:
        fxsparse.store_alive(handle)
    found: Found = {
        "losses": trained(model, made),
        "products": [row.product for row in report.layers],
        "stored": state(model),
    }
    if alive_only:
        fxsparse.restore_dense(handle)
    return {**found, **state(model)}


def low(device: str) -> Found:
    model = masked(device, SHARED, density=0.25).float()
    fxsparse.accelerate(model, mode=fxsparse.FastMode.SPARSE)
    x, y = batches(device)[0]
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        loss = F.cross_entropy(model(x.float()), y)
    loss.backward()
    return {"dtype": str(loss.dtype), "finite": [each.grad.isfinite().all() for each in model.parameters()]}


def collected(device: str, kind: fxsparse.FisherType, **options: Any) -> Found:
    model = masked(device)
    collector = fxsparse.FisherCollector(model, kind=kind, **options)
    for batch in batches(device):
        collector.update(batch)
    found = {"fisher": collector.get(), "parameters": collector.parameters(), "size": collector.effective_size()}
    if kind is fxsparse.FisherType.MC:  # each device draws numbers of its own
        return {"keys": sorted(found["fisher"]), "devices": found["parameters"].keys()}
    return {**found, "error": collector.standard_error(), "snapshot": collector.consolidate()}


def reloaded(device: str, **options: Any) -> Found:
    """A collector that is read from a file goes on where the saved one was."""
    model = masked(device)
    collector, again = (fxsparse.FisherCollector(model, **options) for _ in range(2))
    first, second, *_ = batches(device)
    collector.update(first)
    collector.consolidate()
    with tempfile.TemporaryDirectory() as folder:
        collector.save(Path(folder) / "state.safetensors")
        again.load(Path(folder) / "state.safetensors")
    found = {"loaded": again.get(), "snapshot": again.snapshot()}
    collector.update(second)
    again.update(second)
    return {**found, "saved": collector.get(), "fisher": again.get()}


def operated(device: str, kind: str) -> Found:
    model = masked(device)
    data = batches(device)
    operator = fxsparse.CurvatureOperator(model, None, "cross_entropy", data, kind, mask="on")
    v = torch.randn(operator.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(device)
    spectrum = operator.eigs(2)
    return {
        "product": operator.mv(v),
        "quadform": operator.quadform(v),
        "diagonal": operator.diag(),
        "gradient": operator.gradient(),
        "eigenvalues": spectrum.values,
        "trace": operator.trace("hutchinson", 4).value,
    }


def fisher_of(device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = masked(device)
    collector = fxsparse.FisherCollector(model, groups="element")
    for batch in batches(device):
        collector.update(batch)
    return model, collector.parameters()


def scored(device: str) -> Found:
    model, fisher = fisher_of(device)
    weights = {name: model.get_parameter(name).detach() for name in fisher}
    moved = {name: each * 0.1 for name, each in weights.items()}
    merged = curvature.fisher_weighted_merge([weights, moved], [fisher, fisher])
    ewc = curvature.EWC(10.0)
    return {
        "importance": curvature.fisher_importance(fisher),
        "masks": curvature.fisher_pruning_masks(fisher, 0.5),
        "obd": {name: curvature.obd_scores(weights[name], fisher[name]) for name in fisher},
        "damage": str(curvature.fisher_damage(fisher, moved)),
        "merged": merged,
        "scaled": curvature.scale_by_fisher(weights, fisher, absolute=1e-3),
        "compared": str(curvature.compare_task_fisher(fisher, {name: each * 2 for name, each in fisher.items()})),
        "ewc": type(ewc).__name__,
    }


def compensated(device: str) -> Found:
    model = masked(device, density=1.0)
    how = fxsparse.Compensation(min_samples=1)
    report = fxsparse.compensate(model, [x for x, _ in batches(device)], sparsity=0.5, how=how)
    return {"report": str(report), **state(model)}


def saliencies(device: str) -> Found:
    found: Found = {}
    for kind in ("Magnitude", "Wanda", "OBD", "WoodFisher"):
        model = masked(device, density=1.0)
        source = curvature.CurvatureSource(model, "cross_entropy", batches(device))
        saliency = getattr(fxsparse, kind)(*([source] if kind in ("OBD", "WoodFisher") else []))
        how = fxsparse.OneShot(0.5, saliency=saliency)
        found[kind] = {"masks": fxsparse.prune(model, how, batches(device), F.cross_entropy)}
    return found


def with_draws(device: str) -> nn.Module:
    return nn.Sequential(net(device), nn.Dropout(0.5))


def drawn(device: str) -> Found:
    """What a model draws is drawn again from the same seed, also on the device; it differs from the CPU's."""
    draws = torch if device == "cpu" else torch.get_device_module(device)
    model, inputs = with_draws(device), example(device)
    outside = draws.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a model that does not repeat itself
        model = fxsparse.transform(model, inputs, sparsity=0.5)
    untouched = torch.equal(outside, draws.get_rng_state())
    data = batches("cpu", 6)
    samples = Samples(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    build = functools.partial(with_draws, device)
    task = Task(build, samples, samples, 3, 12, functools.partial(torch.optim.SGD, lr=0.1))
    whole, stopped = start(task, 1), start(task, 1)
    fit(whole, task)
    fit(stopped, task, until=4)
    again = start(task, 1)
    again.restore(stopped.capture())
    fit(again, task)
    pairs = zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    return {
        "masks": dict(fxsparse.masks(model)),
        "untouched": untouched,
        "resumed": [torch.equal(a, b) for a, b in pairs],
    }


def ticket(device: str) -> Found:
    model = masked(device, fxsparse.SharedSupport(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fxsparse.attach(model, optimizer, fxsparse.Static(sparsity=0.5), total_steps=16)
    trained(model, optimizer, 3)
    with tempfile.TemporaryDirectory() as folder:
        made = fxsparse.save_ticket(model, Path(folder) / "ticket", optimizer=optimizer, step=3)
        applied = fxsparse.load_ticket(Path(folder) / "ticket").apply(net(device))
    return {"id": made.ticket_id, "masks": dict(fxsparse.masks(applied)), **state(applied)}


def rewound(device: str) -> Found:
    data = batches("cpu", 6)
    samples = Samples(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    task = Task(functools.partial(net, device), samples, samples, 2, 12, functools.partial(torch.optim.SGD, lr=0.1))
    with tempfile.TemporaryDirectory() as folder:
        rounds = find_tickets(task, IMP(rate="0.5", target="0.7"), Path(folder), 1)
    return {"rounds": [(each.ticket_id, each.alive, len(each.history)) for each in rounds]}


def compacted(device: str) -> Found:
    model = masked(device, fxsparse.Channel(0))
    small = fxsparse.compact(model, example(device))
    plan = fxsparse.plan_channels(net(device), example(device), budget=fxsparse.ParameterBudget(0.5))
    return {"output": small(*example(device)), "plan": str(plan), **state(small)}


def shuffled(device: str) -> nn.Module:
    """Groups of rows that stand apart, so that lowered forms have to put rows back in their places."""
    model, order = net(device), torch.Generator().manual_seed(2)
    for layer in (model[3], model[7], model[9]):
        rows, columns = layer.weight.shape[:2]
        mask = torch.arange(columns) % 4 == (torch.randperm(rows, generator=order) % 4)[:, None]
        layer.weight.data *= mask.reshape(rows, columns, *(1,) * (layer.weight.ndim - 2)).to(device)
    return model.eval()


def lowered(device: str) -> Found:
    model, inputs = shuffled(device), example(device)
    forms = fxsparse.legal_forms(model, inputs)
    found: Found = {"forms": str(forms)}
    for number, form in enumerate((fxsparse.Form.GATHER_CONV, fxsparse.Form.GATHER_MATMUL)):
        wish = {name: form if form in legal else legal[-1] for name, legal in forms.items()}
        result = fxsparse.lower_shared_support(model, inputs, choose=wish)
        found[f"output{number}"] = result.model(*inputs)
        found[f"tensors{number}"] = dict(result.model.state_dict())
    layer = model[7]
    support = find_support(layer.weight != 0)
    assert support is not None
    twin = gathered(layer, support)
    return {**found, "layer": twin(torch.ones(2, 64, dtype=torch.float64, device=device)), **state(twin)}


def exported(device: str) -> Found:
    model = masked(device, SHARED, density=0.25, exclude=["0.*"]).float().eval()
    inputs = (example(device)[0].float(),)
    with tempfile.TemporaryDirectory() as folder:
        fxsparse.export_onnx(model, Path(folder) / "model.onnx", inputs)
        size = (Path(folder) / "model.onnx").stat().st_size
    return {"size": size, **state(model)}


CASES: dict[str, Callable[[str], Found]] = {
    **{f"transform {each}": functools.partial(transformed, pattern=each) for each in PATTERNS},
    **{f"train {kind.__name__}": functools.partial(method, kind=kind) for kind in METHODS if kind is not fxsparse.RESU},
    "train RESU": functools.partial(method, kind=fxsparse.RESU, cycles=1),
    "prune SNIP": functools.partial(pruned, how=fxsparse.SNIP(0.5)),
    "prune GraSP": functools.partial(pruned, how=fxsparse.GraSP(0.5)),
    "prune SynFlow": functools.partial(pruned, how=fxsparse.SynFlow(0.5, rounds=5)),
    "shared products": functools.partial(shared, alive_only=False, optimizer=torch.optim.AdamW),
    "alive only SGD": functools.partial(
        shared, alive_only=True, optimizer=functools.partial(torch.optim.SGD, momentum=0.9)
    ),
    "alive only AdamW": functools.partial(shared, alive_only=True, optimizer=torch.optim.AdamW),
    "autocast": low,
    **{f"Fisher {kind.name}": functools.partial(collected, kind=kind) for kind in fxsparse.FisherType},
    "Fisher by element": functools.partial(collected, kind=fxsparse.FisherType.EMPIRICAL, groups="element"),
    **{f"operator {kind}": functools.partial(operated, kind=kind) for kind in ("ggn", "hessian", "fisher")},
    "Fisher from a file": reloaded,
    "decaying Fisher from a file": functools.partial(reloaded, accumulate="ema"),
    "scores": scored,
    "dropout": drawn,
    "saliencies": saliencies,
    "compensation": compensated,
    "ticket": ticket,
    "iterative magnitude pruning": rewound,
    "compact": compacted,
    "lower": lowered,
    "export": exported,
}


def compared(name: str) -> str:
    """The case on both devices; "same", or what differs."""
    expected, found = CASES[name]("cpu"), CASES[name](device_elsewhere.NAME)
    (pairs, shape), (others, other) = tree_flatten_with_path(expected), tree_flatten_with_path(found)
    if shape != other:
        return f"structure {shape} against {other}"
    for (path, a), (_, b) in zip(pairs, others, strict=True):
        if not isinstance(a, Tensor):
            if a != b:
                return f"{keystr(path)}: {a} against {b}"
            continue
        if b.device.type != device_elsewhere.NAME and not any(getattr(key, "key", None) in HOST for key in path):
            return f"{keystr(path)} is on {b.device}"
        if a.dtype != b.dtype or a.shape != b.shape or not torch.allclose(a, b.cpu(), 1e-9, 1e-12, equal_nan=True):
            return f"{keystr(path)}: {a} against {b}"
    return "same"


def main(names: list[str]) -> None:
    device_elsewhere.register()
    for name in names or list(CASES):
        try:
            print(f"{name}: {compared(name)}", flush=True)
        except Exception as error:
            traceback.print_exc()
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # torch cannot end the thread of a backend that it does not know
