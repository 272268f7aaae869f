"""What other packages offer of curvature, as steps to be timed: curvlinops, BackPACK, nngeometry, ASDL.

Install: pip install curvlinops-for-pytorch backpack-for-pytorch nngeometry asdfghjkl
Each step is tried once; what a package refuses is printed and left out. None of them is checked here for being right.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

Step = Callable[[], object]
Maker = Callable[[nn.Module, Tensor, Tensor], Step]


def curvlinops_product(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """G v."""
    from curvlinops import GGNLinearOperator

    parameters = dict(model.named_parameters())
    v = torch.randn(sum(p.numel() for p in parameters.values()))
    try:
        operator = GGNLinearOperator(
            model, nn.CrossEntropyLoss(), list(parameters.values()), [(x, y)], check_deterministic=False
        )
    except Exception:  # newer versions take the parameters by name
        operator = GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(x, y)], check_deterministic=False)

    def step() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return operator @ v

    return step


def nngeometry_product(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """F v."""
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatImplicit
    from nngeometry.object.vector import PVector

    matrix = FIM(model, _loader(x, y), PMatImplicit)
    v = PVector.from_model(model)
    return lambda: matrix.mv(v)


def nngeometry_exact(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """The exact diagonal."""
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    return lambda: FIM(model, _loader(x, y), PMatDiag).get_diag()


def _loader(x: Tensor, y: Tensor) -> Any:
    return DataLoader(TensorDataset(x, y), batch_size=len(x))


def _asdl(kind: str) -> Maker:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        import asdl

        config = asdl.FisherConfig(
            fisher_type=kind, fisher_shapes=[asdl.SHAPE_DIAG], loss_type=asdl.LOSS_CROSS_ENTROPY, data_size=len(x)
        )
        maker = asdl.get_fisher_maker(model, config)

        def step() -> None:
            outputs = maker.setup_model_call(model, x)
            if kind == asdl.FISHER_EMP:
                maker.setup_loss_call(nn.functional.cross_entropy, outputs, y, reduction="sum")
            else:
                maker.setup_logits_repr(outputs)
            maker.forward_and_backward()

        return step

    return make


def _backpack(extension: str, **options: Any) -> Maker:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        from backpack import backpack, extend, extensions

        own, loss = extend(model), extend(nn.CrossEntropyLoss())
        kind = getattr(extensions, extension)

        def step() -> None:
            own.zero_grad(set_to_none=True)
            with backpack(kind(**options)):
                loss(own(x), y).backward()

        return step

    return make


PRODUCTS: dict[str, tuple[str, Maker]] = {
    "curvlinops GGN-vp": ("curvlinops", curvlinops_product),
    "nngeometry Fisher-vp": ("nngeometry", nngeometry_product),
}
DIAGONALS: dict[str, tuple[str, Maker]] = {
    "BackPACK exact diagonal": ("backpack", _backpack("DiagGGNExact")),
    "BackPACK MC diagonal": ("backpack", _backpack("DiagGGNMC", mc_samples=1)),
    "BackPACK squares": ("backpack", _backpack("SumGradSquared")),
    "nngeometry exact diagonal": ("nngeometry", nngeometry_exact),
    "ASDL exact diagonal": ("asdl", _asdl("fisher_exact")),
    "ASDL MC diagonal": ("asdl", _asdl("fisher_mc")),
    "ASDL squares": ("asdl", _asdl("fisher_emp")),
}


def steps(
    makers: dict[str, tuple[str, Maker]], make_model: Callable[[], nn.Module], x: Tensor, y: Tensor
) -> dict[str, Step]:
    """The steps of the packages that are installed and take the model, each with a model of its own."""
    found: dict[str, Step] = {}
    model = make_model()
    warnings.simplefilter("ignore")
    for name, (package, make) in makers.items():
        try:
            importlib.import_module(package)
        except ImportError:
            print(f"{name}: {package} is not installed")
            continue
        try:
            step = make(copy.deepcopy(model), x, y)
            step()
            found[name] = step
        except Exception as error:  # whatever they raise
            print(f"{name}: {type(error).__name__} ({str(error).strip().splitlines()[0][:90] if str(error) else ''})")
    return found
