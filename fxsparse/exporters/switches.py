"""What a model offers to make itself exportable, found by its attributes and set on a private copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_METHODS = (("set_attn_implementation", "eager"), ("set_experts_implementation", "batched_mm"))
_ATTRIBUTES = ("fused_attn",)

EXPLICIT_ATTENTION = "scaled_dot_product_attention written out"


def without_cache(model: nn.Module) -> tuple[str, ...]:
    """Set `use_cache` of every configuration in `model` to False; the names of what was set.

    A model that returns its cache has outputs that are no tensors.
    """
    return tuple(f"{path}.use_cache = False" for path, config in _configs(model) if _uncached(config))


def plain_forms(model: nn.Module) -> tuple[str, ...]:
    """Choose the plain form of every fused operation that `model` can switch; the names of what was set.

    The values stay equal up to rounding; the caller verifies that.
    """
    done = []
    for module in model.modules():
        done += [f"{method}({value!r})" for method, value in _METHODS if _called(module, method, value)]
        for name in _ATTRIBUTES:
            if getattr(module, name, None) is True:
                setattr(module, name, False)
                done.append(f"{name} = False")
    return tuple(dict.fromkeys(done))


def _called(module: nn.Module, method: str, value: str) -> bool:
    call: Callable[[str], Any] | None = getattr(module, method, None)
    if not callable(call):
        return False
    try:
        call(value)
    except Exception:  # a module that has the method but not this form stays as it is
        return False
    return True


def _at(path: str) -> str:
    return f"{path}." if path else ""


def _configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name in ("config", "generation_config"):
            config = module.__dict__.get(name)
            yield from _nested(f"{_at(path)}{name}", config, seen)


def _nested(path: str, config: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if config is None or id(config) in seen or not hasattr(config, "__dict__"):
        return
    seen.add(id(config))
    yield path, config
    for name, value in vars(config).items():
        if name.endswith("_config") or name in ("encoder", "decoder"):
            yield from _nested(f"{path}.{name}", value, seen)


def _uncached(config: Any) -> bool:
    if getattr(config, "use_cache", None) is not True:
        return False
    config.use_cache = False
    return True


class ExplicitAttention(TorchFunctionMode):
    """Writes every scaled dot-product attention out as products and a softmax, for any number of axes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Intercept one torch function."""
        if func is F.scaled_dot_product_attention:
            return explicit_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale q k^T + bias) v, as torch.nn.functional.scaled_dot_product_attention defines it.

    Args:
        query: [..., L, E].
        key: [..., S, E].
        value: [..., S, V].
        attn_mask: [..., L, S]; booleans (True = attend) or a bias.
        dropout_p: chance that a weight is dropped.
        is_causal: position i attends to positions up to i.
        scale: factor of the scores; None for 1/sqrt(E).
        enable_gqa: the heads (axis -3) of key and value are repeated to those of the query.

    Returns:
        [..., L, V].
    """
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1)
    if is_causal or attn_mask is not None:  # a row that attends to nothing gives zeros
        weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
    return F.dropout(weights, dropout_p, training=dropout_p > 0) @ value
