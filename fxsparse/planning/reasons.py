"""Whether a parameter is sparsified by default, whether it can be masked at all, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from fxsparse.graph.derivations import PRODUCTS
from fxsparse.nn import mask_name
from fxsparse.passes.places import split_name
from fxsparse.planning.derived import Derivation, Role
from fxsparse.planning.layouts import ATTENTION, LAYERS, module_layout
from fxsparse.planning.usage import Usage, common_layout
from fxsparse.sparsity import Layout

ASK = "name it with `include` to mask it"

_NOT_BY_DEFAULT: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("an embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("a recurrent weight", (nn.RNNBase, nn.RNNCellBase)),
    ("a bilinear weight", (nn.Bilinear,)),
)
_LOOKS_UP = frozenset({"getitem", "index_select"})


@dataclass(frozen=True)
class Found:
    """What is known about a parameter.

    Attributes:
        parameter: The parameter.
        places: The modules that use it as their tensor of this name; for a parametrized weight the module whose tensor
            is computed, not the list that holds the parameter.
        usages: Its uses.
        recorded: Whether a run told them.
        derived: How the weight is computed that products use.
    """

    parameter: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]
    usages: tuple[Usage, ...]
    recorded: bool
    derived: Derivation

    @property
    def products(self) -> list[Usage]:
        """The uses as a weight of a product."""
        return [usage for usage in self.usages if usage.op in PRODUCTS and usage.weight]


def as_used(
    model: nn.Module, owners: Mapping[str, tuple[nn.Module, str]], derived: Derivation
) -> tuple[tuple[nn.Module, str], ...]:
    """The places of a parameter, or the one of the tensor that is computed from it."""
    if derived.holder is None:
        return tuple(owners.values())
    path, tensor = derived.holder
    return ((model.get_submodule(path), tensor),)


def layout_of_weight(found: Found) -> Layout | None:
    """Its output and input axes; None where neither its owner nor its uses tell them."""
    if found.derived.role is Role.PART:
        return None
    layouts = [module_layout(module, attribute) for module, attribute in found.places]
    known = next((layout for layout in layouts if layout is not None), None)
    return known if known is not None else common_layout(found.products)


def refusal(found: Found, owners: Mapping[str, tuple[nn.Module, str]]) -> str | None:
    """Why it cannot be masked at all, and the mend; None when it can."""
    parameter = found.parameter
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return f"its dtype is {parameter.dtype}; prune before quantising"
    kind: type[Any] = type(parameter)
    if is_traceable_wrapper_subclass_type(kind):
        return f"it is a {kind.__name__}; transform the model before it is distributed or quantised"
    if parameter.layout is not torch.strided:
        return f"its layout is {parameter.layout}; store it dense (`weight.to_dense()`), the mask makes it sparse"
    if parameter.numel() == 0:
        return "it has no elements; leave it out"
    if _overlaps(parameter):
        return "several of its entries share one place in memory (expanded); give it its own by `.contiguous()`"
    for name, (module, attribute) in owners.items():
        if isinstance(module, torch.jit.ScriptModule):
            return f"its module `{split_name(name)[0]}` is scripted; give the module from before torch.jit.script"
        if hasattr(module, mask_name(attribute)):
            return f"its module has an attribute `{mask_name(attribute)}` already; rename that attribute"
    if found.derived.role is Role.LOST:
        return (
            f"{found.derived.by} may make other values of its zeros before it is used, in code where no mask can go "
            "behind it; compute the weight in a module of its own that holds the parameter, or leave it dense"
        )
    return None


def _overlaps(parameter: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True))


def by_default(found: Found) -> tuple[bool, bool, str]:
    """Whether the parameter is sparsified unless asked otherwise, whether where nothing else is, and why."""
    if found.parameter.ndim < 2:
        return False, False, f"fewer than 2 axes; {ASK}"
    if found.derived.role is Role.PART:
        return False, False, f"it only scales or shifts what {found.derived.by} computes; {ASK}"
    default, fallback, reason = _by_use(found)
    if default and found.derived.role is Role.EFFECTIVE and found.derived.holder and not found.derived.keeps:
        return False, True, f"a mask would break what {found.derived.by} promises; {ASK}"
    return default, fallback, reason


def _by_use(found: Found) -> tuple[bool, bool, str]:
    products, recorded = found.products, found.recorded
    for module, attribute in found.places:
        if isinstance(module, LAYERS) and attribute == "weight":
            known = _torch_class(module) or found.derived.holder is not None
            if not known and not products:
                if recorded:
                    continue
                return False, False, f"{type(module).__name__} may compute something of its own; give `example_inputs`"
            layout = module_layout(module, attribute)
            if layout is not None and _depthwise(found.parameter, layout):
                return False, True, f"a depthwise convolution; {ASK}"
            return True, False, f"weight of {_name(module)}"
        if isinstance(module, nn.MultiheadAttention) and attribute in ATTENTION:
            return True, False, "attention projection"
    for kind, types in _NOT_BY_DEFAULT:
        if any(isinstance(module, types) for module, _ in found.places):
            return False, True, f"{kind}; {ASK}"
    if products:
        return _by_product(found)
    if not recorded and not found.usages:
        return False, False, f"its uses are not known; give `example_inputs`, or {ASK}"
    kinds = ", ".join(dict.fromkeys(usage.op for usage in found.usages)) or "no operation of the example run"
    return False, False, f"used by {kinds}; {ASK}"


def _by_product(found: Found) -> tuple[bool, bool, str]:
    products = found.products
    layout = common_layout(products)
    if layout is not None and _depthwise(found.parameter, layout):
        return False, True, f"a depthwise convolution; {ASK}"
    if found.parameter.ndim == 2 and all(_LOOKS_UP & set(usage.derived) and not usage.layout for usage in products):
        return False, False, f"a table whose rows are looked up before {products[0].op}; {ASK}"
    return True, False, f"weight of {products[0].op}"


def _torch_class(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _name(module: nn.Module) -> str:
    """The class; the one from before the parametrization."""
    kind = type(module)
    return (kind.__mro__[1] if nn.utils.parametrize.is_parametrized(module) else kind).__name__


def _depthwise(parameter: nn.Parameter, layout: Layout) -> bool:
    """Whether every output channel of a grouped convolution reads a single input channel."""
    groups = layout.groups
    inputs = parameter.shape[layout.in_axis] // (groups if layout.in_axis < layout.out_axis else 1)
    return groups > 1 and inputs == 1
