"""The parameters that a handle drives, and whether they are still the model's and the optimizer's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import ConfigError
from fxsparse.nn import MaskedWeight
from fxsparse.sparsity import SharedSupport
from fxsparse.training.distributed import Wrapper, unwrap

_MEND = "detach() the handle and attach again with an optimizer of the parameters that the model has now"


@dataclass(frozen=True, eq=False)
class Held:
    """Masked parameters by name, and the modules that hold them by path, as they were when a method was attached."""

    weights: Mapping[str, MaskedWeight]
    parameters: Mapping[str, nn.Parameter]
    places: Mapping[str, nn.Module]
    wrapper: Wrapper

    @staticmethod
    def of(model: nn.Module, weights: Mapping[str, MaskedWeight]) -> Held:
        """What the model holds now."""
        inner = unwrap(model)
        paths = {name.rpartition(".")[0] for name in weights}
        return Held(
            weights,
            {name: masked.weight for name, masked in weights.items()},
            {path: inner.get_submodule(path) for path in sorted(paths)},
            Wrapper(model),
        )

    def check(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Raise ConfigError where model or optimizer hold other parameters, or the latter another storage's state."""
        if self.wrapper.joins():
            raise ConfigError(
                "the model runs in torch.distributed.algorithms.Join, and ranks that have joined take no part in mask "
                "updates; leave Join out and give every rank as many batches, as DistributedSampler does"
            )
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
            _check_state(self.weights[name], parameter, optimizer)


def _check_state(weight: MaskedWeight, parameter: nn.Parameter, optimizer: Optimizer) -> None:
    pattern, packed = weight.spec.pattern, weight.packed
    if not isinstance(pattern, SharedSupport):
        return
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape == parameter.shape:
            continue
        told = f"the optimizer's `{key}` of `{weight.name}` (={tuple(value.shape)}) is not stored as the weight is"
        if packed:
            raise ConfigError(
                f"{told} (={tuple(parameter.shape)}, alive entries only): load a state of dense storage before "
                "`store_alive`"
            )
        rows, group = parameter.shape[0], min(pattern.group, parameter.shape[0])
        if value.ndim > 2 and tuple(value.shape[:2]) == (-(-rows // group), group):
            raise ConfigError(
                f"{told} (={tuple(parameter.shape)}) but alive entries only: load such a state after `store_alive`, "
                "and call `restore_dense` then"
            )


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
