"""What is refused before an operator is used: options, and data or models that do not repeat themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from fxsparse.curvature.fisher_types import CoupledSamples
from fxsparse.curvature.operator_blame import caller_of
from fxsparse.curvature.operator_space import ParameterSpace
from fxsparse.errors import ConfigError, DataError
from fxsparse.graph.scopes import seeded
from fxsparse.nn.sharded import is_sharded
from fxsparse.sparsity.random import generator

_OTHER = 0x5BD1E995  # added to the caller's seed, for the second product


def check_options(chunk: int | None, damping: float, unit: str, draws: int) -> None:
    """Raise ConfigError for an option out of range."""
    if chunk is not None:
        check_count("chunk", chunk)
    if not damping >= 0:
        raise ConfigError(f"`damping` (={damping}) must be at least 0")
    if unit not in ("sample", "token"):
        raise ConfigError(f"`unit` (={unit!r}) must be sample or token")
    check_count("draws", draws)


def check_count(name: str, value: Any) -> None:
    """Raise ConfigError for what is no integer of at least 1."""
    if not isinstance(value, Integral) or value < 1:
        raise ConfigError(f"`{name}` (={value!r}) must be an integer of at least 1")


def check_whole(model: nn.Module) -> None:
    """Raise ConfigError for a model whose parameters are spread over ranks."""
    for path, module in model.named_modules():
        if type(module).__module__ == "torch.distributed.fsdp.fully_sharded_data_parallel":
            raise ConfigError(f"`{path or 'model'}` (={type(module).__name__}) is sharded: {_GATHER}")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ConfigError(f"`{name}` (=DTensor) is sharded: {_GATHER}")


_GATHER = (
    "load `torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True))` into a model of its own, which is not sharded; FisherCollector takes sharded ones as they "
    "are"
)


def check_frequencies(model: nn.Module, space: ParameterSpace) -> None:
    """Raise CoupledSamples where a chosen embedding divides its gradient by how often the batch has a row."""
    chosen = {name: parameter for name, parameter in model.named_parameters() if name in space.shapes}
    ids = {id(parameter) for parameter in chosen.values()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
            if id(module.weight) in ids:
                raise CoupledSamples(_frequencies(path, module))


class NoFrequencies(TorchFunctionMode):
    """The same of functions, while a model runs: of weights that are differentiated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        names = _LOOKUPS.get(func)
        given = dict(zip(names, args, strict=False)) | kwargs if names else {}
        if given.get("scale_grad_by_freq") and is_tracked(given["weight"]):
            path, module = caller_of(self.model)
            raise CoupledSamples(_frequencies(path, module))
        return func(*args, **kwargs)


def is_tracked(value: Tensor) -> bool:
    """Whether a derivative with respect to it is being taken."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
    return wrapped or value.requires_grad or forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]  # torch


_FUNCTION = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
_LOOKUPS: dict[Any, tuple[str, ...]] = {
    F.embedding: _FUNCTION,
    F.embedding_bag: ("input", "weight", "offsets", *_FUNCTION[3:]),
    torch.embedding: ("weight", "indices", "padding_idx", "scale_grad_by_freq"),
    torch.embedding_bag: ("weight", "indices", "offsets", "scale_grad_by_freq"),
}


def _frequencies(path: str, module: nn.Module) -> str:
    return (
        f"`{path or 'model'}` ({type(module).__name__}, scale_grad_by_freq=True) divides the gradients of its rows by "
        "how often they occur in the batch, so that they are no derivatives, and no sample has its own; set it to "
        "False, or leave its weight out of `params`"
    )


def check_repeats(product: Callable[[Tensor], tuple[Tensor, int]], space: ParameterSpace, seed: int) -> None:
    """Raise DataError where two products with one vector, or their units M, differ, or are not finite.

    The second runs from another state of the global generators, so that data or a model that draw from them differ; the
    caller's state is as before afterwards. Samples in another order differ by rounding, which the tolerance allows.
    """
    source = generator(seed, 0, 0, "determinism")
    v = torch.randn(space.size, generator=source, dtype=torch.float64).to(dtype=space.dtype, device=space.device)
    first, m = product(v)
    with seeded((torch.initial_seed() + _OTHER) % 2**32):
        second, again = product(v)
    scale = float(first.abs().max())
    if not math.isfinite(scale):
        raise DataError(
            "a product with the curvature has values that are NaN or infinite: look for NaN or huge values in the "
            "data, the weights and the model's outputs, or give check=False"
        )
    worst = float((first - second).abs().max())
    tolerance = 1e-9 if space.dtype is torch.float64 else max(1e-3, 8 * torch.finfo(space.dtype).eps)
    if m != again or not worst <= tolerance * max(scale, torch.finfo(space.dtype).tiny):
        raise DataError(
            f"two products with one vector differ by {worst:.3g} of {scale:.3g} (M = {m}, {again}): the data "
            "change between passes (shuffling, augmentation), or the model draws random numbers; mend that, or give "
            "check=False"
        )


def check_vector(v: Any) -> None:
    """Raise ConfigError for what is no tensor or array of real numbers with an axis."""
    if not isinstance(v, Tensor | np.ndarray) or v.ndim < 1:
        shown = tuple(v.shape) if isinstance(v, Tensor | np.ndarray) else type(v).__name__
        raise ConfigError(f"`v` (={shown}) must be a torch tensor, a numpy array, or tensors by parameter name")
    real = not v.is_complex() if isinstance(v, Tensor) else v.dtype.kind in "biuf"
    if not real:
        raise ConfigError(f"`v` (={v.dtype}) must hold real numbers")
