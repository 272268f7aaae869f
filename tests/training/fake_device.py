"""Whole training steps on tensors of a device that is not here, whose values nobody can ask for.

Run by test_no_host_sync.py, in a process of its own: a device's name cannot be taken back. The tensors are fake:
shapes and types without values, on a device that torch knows by name alone. What would make the host wait for a real
device (`bool(tensor)`, `item()`, `nonzero()`) raises.
"""

import contextlib
import os
import sys
import traceback

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fxsparse
from fxsparse.nn import shared
from fxsparse.nn.masked import bind_guard
from fxsparse.nn.slot import slots_of
from fxsparse.sparsity import Pattern
from fxsparse.training.alive_only import store_alive
from fxsparse.training.held import Held
from fxsparse.training.updater import Method
from fxsparse.training.upkeep import Upkeep

RIGL, STATIC = fxsparse.RigL(sparsity=0.75, every=50), fxsparse.Static(sparsity=0.75)
CASES = {
    # pattern, alive-only, method, fast mode
    "unstructured static": (fxsparse.Unstructured(), False, STATIC, None),
    "unstructured rigl": (fxsparse.Unstructured(), False, RIGL, None),
    "unstructured set": (fxsparse.Unstructured(), False, fxsparse.SET(sparsity=0.75, every=50), None),
    "unstructured mest": (fxsparse.Unstructured(), False, fxsparse.MEST(sparsity=0.75, every=50), None),
    "fan-in srigl": (fxsparse.ConstantFanIn(), False, fxsparse.SRigL(sparsity=0.75, every=50), None),
    "1:4 static": (fxsparse.NByM(1, 4), False, STATIC, None),
    "shared dense": (fxsparse.SharedSupport(8), False, STATIC, fxsparse.FastMode.DENSE),
    "shared sparse": (
        fxsparse.SharedSupport(8),
        False,
        fxsparse.RigL(sparsity=0.75, every=50),
        fxsparse.FastMode.SPARSE,
    ),
    "shared uneven": (fxsparse.SharedSupport(12), False, STATIC, fxsparse.FastMode.SPARSE),
    "alive only": (fxsparse.SharedSupport(8), True, STATIC, fxsparse.FastMode.SPARSE),
    "gmp": (fxsparse.SharedSupport(8), False, fxsparse.GMP(sparsity=0.75), fxsparse.FastMode.SPARSE),
}


def moved(model: nn.Module, optimizer: torch.optim.Optimizer, handle: fxsparse.Handle) -> None:
    """Put fake tensors in the place of all that the model holds, as `model.to(device)` puts real ones."""
    new: dict[torch.Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device="nowhere")
                module._parameters[name] = new[parameter] = nn.Parameter(made)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="nowhere")
        for attribute in slots_of(module):
            bind = shared.path_of(module)
            if bind is not None and not bind.packed:
                order, mask = module._buffers.get(shared.ROW_ORDER), module._buffers[shared.MASK]
                bind._seen = (mask, mask._version, order, shared._version(order))
            bind_guard(module, attribute)
    for group in optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]
    optimizer.state.clear()
    handle._held, handle._upkeep = Held.of(model, handle.masked), Upkeep(optimizer)


def steps(pattern: Pattern, alive_only: bool, method: Method, mode: fxsparse.FastMode | None) -> None:
    """Four ordinary steps; the masks are made before, where values are known."""
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Unflatten(1, (1, 32)), nn.Conv1d(1, 8, 1), nn.Flatten())
    model.append(nn.Linear(256, 40))
    sparse = fxsparse.transform(model, (torch.randn(2, 24),), pattern=pattern, exclude=["*3*"])
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    handle = fxsparse.attach(sparse, optimizer, method, total_steps=1000)
    if mode is not None:
        fxsparse.accelerate(sparse, mode=mode)
    if alive_only:
        store_alive(handle)
    with FakeTensorMode():
        moved(sparse, optimizer, handle)
        x = torch.empty(5, 24, device="nowhere")
        for _ in range(4):
            optimizer.zero_grad()
            sparse(x).square().mean().backward()
            optimizer.step()
        assert handle.step == 4 and handle.updates == 0
        assert all(parameter.grad.device.type == "nowhere" for parameter in sparse.parameters())
        with contextlib.suppress(DataDependentOutputException):
            bool(x.any())
            raise AssertionError("values can be asked for, so nothing was shown")


def main() -> None:
    _setup_privateuseone_for_python_backend("nowhere")
    shared._recorded = lambda input: False  # fake tensors are no recorder here
    for name, case in CASES.items():
        try:
            steps(*case)
        except DataDependentOutputException as error:
            place = [
                f"{each.name} ({each.filename}:{each.lineno})" for each in traceback.extract_tb(error.__traceback__)
            ]
            print(f"{name}: waits in {[each for each in place if 'fxsparse' in each][-1]}")
        else:
            print(f"{name}: never waits")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # C++ threads torn down by the interpreter's exit are not what is tested
