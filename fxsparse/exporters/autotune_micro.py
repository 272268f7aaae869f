"""One layer of a model alone, with the input that it sees there: what the autotuner measures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import ExportError
from fxsparse.exporters.inputs import first_line
from fxsparse.exporters.program import quiet
from fxsparse.graph import isolated_clone, preserved_rng

_INPUT = "x"


@dataclass(frozen=True, eq=False)
class Micro:
    """A layer alone.

    Attributes:
        module: the layer, with zeros at dead weights.
        example: what it sees in the model on the example inputs.
        key: equal for layers that need be measured once.
    """

    module: nn.Module
    example: Tensor
    key: tuple[Any, ...]

    def export(self, module: nn.Module) -> bytes:
        """`module`, a form of this layer, as a serialised ONNX model of fixed shapes with the input "x".

        Raises:
            ExportError: torch cannot export it.
        """
        buffer = io.BytesIO()
        try:
            with quiet(), preserved_rng(), torch.no_grad():
                program: Any = torch.onnx.export(
                    module.eval(),
                    (self.example,),
                    dynamo=True,
                    verbose=False,
                    external_data=False,
                    input_names=[_INPUT],
                )
                program.save(buffer)
        except Exception as error:  # torch and onnxscript raise whatever they meet
            raise ExportError(f"a layer alone cannot be exported ({first_line(error)})") from error
        return buffer.getvalue()


def seen_inputs(model: nn.Module, run: Callable[[nn.Module], object], names: Sequence[str]) -> dict[str, Tensor]:
    """Weight's name -> the first input of the module that holds it, on one run of a copy of `model`."""
    private = isolated_clone(model)
    found: dict[str, Tensor] = {}
    for name in names:
        owner = _owner(private, name)
        if owner is not None:
            owner.register_forward_pre_hook(_keeper(found, name))
    with torch.no_grad(), preserved_rng():
        run(private)
    return found


def micro_of(model: nn.Module, name: str, given: Tensor) -> Micro | None:
    """The module that holds a weight, alone; None where the weight is not of a plain layer."""
    owner = _owner(model, name)
    if owner is None:
        return None
    weight = owner.weight
    assert isinstance(weight, Tensor)
    settings = owner.extra_repr()
    key = (type(owner).__name__, settings, tuple(weight.shape), tuple(given.shape), str(given.dtype))
    return Micro(isolated_clone(owner).eval(), given.contiguous(), key)


def arrays_of(example: Tensor) -> Mapping[str, Any]:
    """The feed of a micro-model."""
    return {_INPUT: example.numpy()}


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    path, _, attribute = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return None
    plain = isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return owner if plain and attribute == "weight" else None


def _keeper(found: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def keep(_: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            found.setdefault(name, args[0].detach().clone())

    return keep
