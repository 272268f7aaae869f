"""`torch.compile`: one graph for the whole training, whatever the method reads and changes, and the masks of eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.nn import masks
from fxsparse.sparsity import MaskSet, SharedSupport
from fxsparse.training import ACDC, GMP, MEST, RESU, SET, SNFS, Method, RigL, SRigL, attach

STEPS = 18
METHODS = {
    "rigl": RigL(sparsity=0.8, every=3, end=15),
    "rigl, the step kept": RigL(sparsity=0.8, every=3, end=15, replaces_step=False),
    "rigl, shared support": RigL(sparsity=0.8, every=3, end=15, pattern=SharedSupport(8)),
    "set": SET(sparsity=0.8, every=3),
    "gmp": GMP(sparsity=0.8),
    "mest": MEST(sparsity=0.8),
    "snfs": SNFS(sparsity=0.8, every=3),
    "srigl": SRigL(sparsity=0.8, every=3),
    "acdc": ACDC(sparsity=0.8),
    "resu": RESU(sparsity=0.8, cycles=1),
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 16, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (32,), generator=generator)


def trained(method: Method, compile_it: Any = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).double()
    sparse = fxsparse.transform(dense, (batch(0)[0],))
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    handle = attach(sparse, optimizer, method, total_steps=STEPS)
    model = sparse if compile_it is None else compile_it(sparse)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return sparse, handle


@pytest.mark.parametrize("name", METHODS)
def test_one_graph_and_the_masks_of_eager(name: str) -> None:
    torch._dynamo.reset()
    graphs: list[object] = []

    def whole(model: nn.Module) -> Any:
        def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
            graphs.append(graph)
            return graph.forward

        return torch.compile(model, backend=backend, fullgraph=True)

    compiled, handle = trained(METHODS[name], whole)
    eager, expected = trained(METHODS[name])
    assert len(graphs) == 1
    assert MaskSet(masks(compiled)).digest() == MaskSet(masks(eager)).digest()
    found, wanted = ([(row.step, row.dropped, row.grown) for row in each.report()] for each in (handle, expected))
    assert found == wanted and (name in ("mest", "acdc", "resu") or sum(row[1] for row in wanted) > 0)
    for own, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_compiled_backward_graphs_do_not_recompile() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    eager, _ = trained(METHODS["rigl"])
    compiled, _ = trained(METHODS["rigl"], lambda model: torch.compile(model, backend="aot_eager", fullgraph=True))
    assert counters["stats"]["unique_graphs"] == 1 and counters["aot_autograd"]["total"] == 1
    assert not counters["graph_break"]
    assert MaskSet(masks(compiled)).digest() == MaskSet(masks(eager)).digest()


GROWING = GMP(sparsity=0.9, initial_sparsity=0.25, every=1, pattern=SharedSupport(8))


@pytest.mark.parametrize(("mode", "graphs"), [(fxsparse.FastMode.SPARSE, 1), (fxsparse.FastMode.AUTO, 2)])
def test_supports_that_shrink_compile_nothing_anew(mode: fxsparse.FastMode, graphs: int) -> None:
    """AUTO takes the sparse product once half of a weight is dead: another graph, once."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def fast(model: nn.Module) -> nn.Module:
        fxsparse.accelerate(model, mode=mode)
        return model

    eager, _ = trained(GROWING, lambda model: fast(model) if mode is fxsparse.FastMode.SPARSE else model)
    compiled, handle = trained(GROWING, lambda model: torch.compile(fast(model), backend="aot_eager", fullgraph=True))
    assert counters["stats"]["unique_graphs"] == counters["aot_autograd"]["total"] == graphs
    assert handle.updates > 8 and all(0.85 < float((~mask).double().mean()) < 0.95 for mask in masks(compiled).values())
    assert MaskSet(masks(compiled)).digest() == MaskSet(masks(eager)).digest()
    for own, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, in its compiler
@pytest.mark.parametrize("storage", ["masked", "alive"])
def test_a_compiled_optimizer_step_leaves_the_hooks_alone(storage: str) -> None:
    torch._dynamo.reset()
    counters, graphs = torch._dynamo.utils.counters, []
    counters.clear()
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).double()
    model = fxsparse.transform(dense, (batch(0)[0],), pattern=SharedSupport(8))
    runs = []
    for each in (model, copy.deepcopy(model)):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.01)
        handle = attach(each, optimizer, RigL(sparsity=0.8, every=3), total_steps=40)
        if storage == "alive":
            fxsparse.store_alive(handle)
        runs.append((each, optimizer, handle))
    compiled = torch.compile(lambda: runs[0][1].step(), backend="eager")
    for step in range(12):
        for take, (each, optimizer, _) in zip((compiled, runs[1][1].step), runs, strict=True):
            optimizer.zero_grad()
            x, y = batch(step)
            nn.functional.cross_entropy(each(x), y % 8).backward()
            take()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1] > 0 and [handle.updates for _, _, handle in runs] == [4, 4]
    for own, other in zip(runs[0][0].state_dict().values(), runs[1][0].state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)  # its bias correction is in float32
    torch._dynamo.reset()
