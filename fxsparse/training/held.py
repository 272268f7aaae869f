"""The parameters that a handle drives, and whether they are still the model's and the optimizer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight
from fxsparse.training.distributed import unwrap

_MEND = "detach() the handle and attach again with an optimizer of the parameters that the model has now"


@dataclass(frozen=True, eq=False)
class Held:
    """Masked parameters by name, and the modules that hold them by path, as they were when a method was attached."""

    weights: Mapping[str, MaskedWeight]
    parameters: Mapping[str, nn.Parameter]
    places: Mapping[str, nn.Module]

    @staticmethod
    def of(model: nn.Module, weights: Mapping[str, MaskedWeight]) -> Held:
        """What the model holds now."""
        inner = unwrap(model)
        paths = {name.rpartition(".")[0] for name in weights}
        return Held(
            weights,
            {name: masked.weight for name, masked in weights.items()},
            {path: inner.get_submodule(path) for path in sorted(paths)},
        )

    def check(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Raise ConfigError where model or optimizer hold other parameters, or the latter another storage's state."""
        inner = unwrap(model)
        for path, module in self.places.items():
            if _submodule(inner, path) is not module:
                names = ", ".join(f"`{name}`" for name in self.weights if name.rpartition(".")[0] == path)
                raise ConfigError(f"the module `{path}` with {names} was replaced after attach; {_MEND}")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.parameters.items():
            module, attribute = self.weights[name].owners[0]
            if module._parameters.get(attribute) is not parameter:
                raise ConfigError(f"the parameter `{name}` was replaced after attach; {_MEND}")
            if id(parameter) not in held:
                raise ConfigError(f"`optimizer` (={type(optimizer).__name__}) holds `{name}` no more; {_MEND}")
            if self.weights[name].packed:
                _check_state(name, parameter, optimizer)


def _check_state(name: str, parameter: nn.Parameter, optimizer: Optimizer) -> None:
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
            raise ConfigError(
                f"the optimizer's `{key}` of `{name}` (={tuple(value.shape)}) is not stored as the weight is "
                f"(={tuple(parameter.shape)}, alive entries only): load a state of dense storage before `store_alive`"
            )


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
