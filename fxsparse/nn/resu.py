"""Resurrection units: layers whose dead weights can be trained for a while and compete for revival."""

from __future__ import annotations

import enum
import math
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fxsparse.errors import ConfigError
from fxsparse.nn.conv import Conv1d, Conv2d, Conv3d
from fxsparse.nn.functional import masked_weight
from fxsparse.nn.linear import Linear
from fxsparse.nn.masked import check_mask, row_order_name, row_order_of, zero_dead_
from fxsparse.nn.model import MaskedWeight
from fxsparse.nn.resu_state import FORWARD_MASK, TRAINABLE, Mode, complete_state, pack_mode, unpack_mode
from fxsparse.nn.sparse_module import WEIGHT, SparseModule
from fxsparse.nn.spec import Guard, MaskSpec
from fxsparse.sparsity import generator


class ThetaInit(enum.Enum):
    """How theta starts; sigma is the standard deviation of the alive weights."""

    NORMAL = "normal"
    """N(0, (epsilon sigma)^2)."""
    UNIFORM = "uniform"
    """U(-epsilon sigma, epsilon sigma)."""
    ZERO = "zero"
    """Zeros: the loss does not jump, but a unit whose inputs and outputs are all dead stays dead."""


class RESUModule(SparseModule):
    """A sparse module with the modes DENSE, SPARSE and RESU.

    The resurrection parameters theta stand in the dead positions of the weight itself: theta = W[~M] in index order.
    The forward is where(F, W, 0) in every mode, so neither mask contents nor mode changes recompile anything; F, the
    mask M and the trainable set T are persistent bool buffers changed in place; the mode is part of the `state_dict`.

    Transitions: DENSE -set_mask-> SPARSE -enter_resu-> RESU, RESU -discard or commit-> SPARSE, SPARSE -clear_mask->
    DENSE; a commit of the full mask leads to DENSE. In SPARSE `set_mask` changes the mask. Every other one raises
    ConfigError, and so do edits of the mask in RESU.

    In RESU `weight.grad` is the dense gradient G: `theta_gradient` and `active_gradient` are its shares. It must not
    reach an optimizer as it is.
    """

    mode: Mode
    freeze_active: bool
    weight_forward_mask: Tensor
    weight_trainable: Tensor

    @classmethod
    def from_dense(cls, module: nn.Module, spec: MaskSpec | None = None, mask: Tensor | None = None) -> Self:
        """As `SparseModule.from_dense`; the plain sparse class is taken too, with its mask.

        The mode is SPARSE where there is a mask, else DENSE.
        """
        row_order = None
        if isinstance(module, SparseModule) and module.dense_type is cls.dense_type:
            spec = module.mask_spec if spec is None else spec
            mask, row_order = module.weight_mask if mask is None else mask, row_order_of(module, WEIGHT)
            module = module.to_dense()
        unit = super().from_dense(module, spec, mask)
        if row_order is not None:
            unit.set_mask(unit.weight_mask, row_order)
        return unit

    def to_dense(self) -> nn.Module:
        """The plain torch module with the same parameter objects; refused in RESU mode."""
        dense = super().to_dense()
        for name in (FORWARD_MASK, TRAINABLE):
            del dense._buffers[name]
        for name in ("mode", "freeze_active"):
            del dense.__dict__[name]
        return dense

    def _install(self, spec: MaskSpec, mask: Tensor | None, row_order: Tensor | None = None) -> None:
        if spec.guard is not Guard.FORWARD:
            raise ConfigError(f"`guard` (={spec.guard}) must be Guard.FORWARD: dead weights of a RESU module are read")
        super()._install(spec, mask, row_order)
        self.register_buffer(FORWARD_MASK, self.weight_mask.clone())
        self.register_buffer(TRAINABLE, torch.zeros_like(self.weight_mask))
        self.mode = Mode.DENSE if mask is None else Mode.SPARSE
        self.freeze_active = True

    @property
    def effective_weight(self) -> Tensor:
        """The weight as the forward reads it: where(F, W, 0)."""
        return masked_weight(self.weight, self.weight_forward_mask, self.weight_mask)

    def extra_repr(self) -> str:
        """As the sparse module, then the mode."""
        mode = self.__dict__.get("mode")
        return super().extra_repr() + ("" if mode is None else f", mode={mode.value}")

    # Transitions

    def check_mask_edit(self) -> None:
        """Raise ConfigError in RESU mode."""
        if self.mode is Mode.RESU:
            raise ConfigError(f"`mode` (={self.mode}) forbids this: call commit or discard first")

    def mask_written_(self) -> None:
        """Follow an edit of the mask: the forward reads through it."""
        self.weight_forward_mask.copy_(self.weight_mask)
        self.mode = Mode.SPARSE

    def set_mask(self, mask: Bool[Tensor, "*shape"], row_order: Tensor | None = None) -> None:
        """DENSE or SPARSE -> SPARSE with this mask; newly dead weights become zero."""
        MaskedWeight(WEIGHT, (WEIGHT,), ((self, WEIGHT),)).set_mask_(mask, row_order)

    def clear_mask(self) -> None:
        """SPARSE -> DENSE: every weight is alive."""
        self._require(Mode.SPARSE, "clear_mask")
        self.weight_mask.fill_(True)
        self.weight_forward_mask.fill_(True)
        self.mode = Mode.DENSE

    def enter_resu(
        self,
        init: ThetaInit = ThetaInit.NORMAL,
        *,
        epsilon: float = 0.1,
        trainable: Bool[Tensor, "*shape"] | None = None,
        freeze_active: bool = True,
        seed: int = 0,
        tensor_index: int = 0,
        update_index: int = 0,
    ) -> None:
        """SPARSE -> RESU: theta is drawn at the trainable dead positions, zero stands at the others.

        Args:
            init: How theta starts.
            epsilon: Its scale relative to the standard deviation of the alive weights (1/sqrt(fan_in) without one).
            trainable: The set T, a subset of the dead positions; all of them by default.
            freeze_active: Whether alive weights get no gradient.
            seed: The user's seed.
            tensor_index: Position of this weight in the model.
            update_index: Number of this phase.

        Raises:
            ConfigError: another mode, no dead weight, a mask guarded at the parameter, a negative epsilon, or a
                trainable set that is not bool, of another shape or not dead.
        """
        self._require(Mode.SPARSE, "enter_resu")
        dead = ~self.weight_mask
        trainable = dead if trainable is None else trainable
        self._check_phase(dead, trainable, epsilon)
        source = generator(seed, tensor_index, update_index, "theta")
        draws = _draw(init, int(dead.sum()), source) * (epsilon * self._alive_std())
        with torch.no_grad():
            self.weight[dead] = draws.to(self.weight)
            self.weight.masked_fill_(dead & ~trainable, 0.0)
        self.weight_trainable.copy_(trainable)
        self.weight_forward_mask.fill_(True)
        self.freeze_active = freeze_active
        self.mode = Mode.RESU

    def discard(self) -> None:
        """RESU -> SPARSE: theta is lost, the mask stays."""
        self._require(Mode.RESU, "discard")
        self._leave(self.weight_mask.clone())

    def commit(self, mask: Bool[Tensor, "*shape"]) -> None:
        """RESU -> SPARSE with the mask that a tournament chose: losers become zero, winners keep their value.

        The full mask leads to DENSE.

        Raises:
            ConfigError: another mode, or a mask that does not fit; nothing has changed then.
        """
        self._require(Mode.RESU, "commit")
        check_mask(WEIGHT, self.weight, self.mask_spec, mask, row_order_of(self, WEIGHT))
        self._leave(mask)

    def _leave(self, mask: Tensor) -> None:
        self.weight_mask.copy_(mask)
        self.weight_forward_mask.copy_(mask)
        self.weight_trainable.fill_(False)
        self.mode = Mode.DENSE if bool(mask.all()) else Mode.SPARSE
        zero_dead_(self, WEIGHT)

    def _require(self, mode: Mode, act: str) -> None:
        if self.mode is not mode:
            raise ConfigError(f"`mode` (={self.mode}) must be {mode} for {act}")

    def _check_phase(self, dead: Tensor, trainable: Tensor, epsilon: float) -> None:
        if self.mask_spec.guard is not Guard.FORWARD:
            raise ConfigError("a weight that is read outside its module cannot enter RESU: untie it, or stay in SPARSE")
        if not bool(dead.any()):
            raise ConfigError("`mask` (=full) leaves no dead weight to resurrect: set a mask with dead weights first")
        if not epsilon >= 0:
            raise ConfigError(f"`epsilon` (={epsilon}) must be at least 0")
        if trainable.dtype is not torch.bool or trainable.shape != dead.shape or bool((trainable & ~dead).any()):
            kind = f"{trainable.dtype}, {tuple(trainable.shape)}"
            raise ConfigError(f"`trainable` (={kind}) must be bool, {tuple(dead.shape)}, and True at dead weights only")

    def _alive_std(self) -> float:
        """Unbiased standard deviation of the alive weights; 1/sqrt(fan_in) where it is undefined or zero."""
        alive = self.weight.detach()[self.weight_mask].double()
        sigma = float(alive.std()) if alive.numel() >= 2 else math.nan
        if math.isfinite(sigma) and sigma > 0:
            return sigma
        _, inputs, kernel = self.mask_spec.layout.matrix_shape(self.weight.shape)
        return 1 / math.sqrt(inputs * kernel)

    # Resurrection parameters

    @property
    def theta(self) -> Float[Tensor, " dead"]:
        """A copy of W[~M], in index order."""
        return self.weight.detach()[~self.weight_mask]

    @torch.no_grad()
    def write_theta_(self, values: Float[Tensor, "*shape"]) -> None:
        """Set theta on the trainable set: W := where(T, values, W), for values shaped like the weight."""
        self._require(Mode.RESU, "write_theta_")
        self.weight.copy_(torch.where(self.weight_trainable, values, self.weight))

    def theta_gradient(self) -> Float[Tensor, "*shape"] | None:
        """T * G, shaped like the weight, from the dense gradient in `weight.grad`; None where that is None."""
        self._require(Mode.RESU, "theta_gradient")
        return None if self.weight.grad is None else torch.where(self.weight_trainable, self.weight.grad, 0.0)

    def active_gradient(self) -> Float[Tensor, "*shape"] | None:
        """M * G, shaped like the weight; None where `freeze_active` is set or `weight.grad` is None."""
        self._require(Mode.RESU, "active_gradient")
        if self.freeze_active or self.weight.grad is None:
            return None
        return torch.where(self.weight_mask, self.weight.grad, 0.0)

    # State

    def get_extra_state(self) -> Tensor:
        """The mode and `freeze_active`, uint8 [2]."""
        return pack_mode(self.mode, self.freeze_active)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` gave."""
        self.mode, self.freeze_active = unpack_mode(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        buffers = {"weight_mask": self.weight_mask, FORWARD_MASK: self.weight_forward_mask}
        buffers[TRAINABLE] = self.weight_trainable
        try:
            complete_state(state_dict, prefix, {**buffers, "_extra_state": self.get_extra_state()}, self.mode)
            mask, row_order = state_dict[prefix + "weight_mask"], row_order_of(self, WEIGHT)
            row_order = state_dict.get(prefix + row_order_name(WEIGHT), row_order)
            check_mask(prefix + WEIGHT, self.weight, self.mask_spec, mask, row_order)
        except ConfigError as error:
            rest[-1].append(str(error))
            return
        for name, buffer in buffers.items():
            if not buffer.is_meta:
                state_dict[prefix + name] = buffer.copy_(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _draw(init: ThetaInit, count: int, source: torch.Generator) -> Tensor:
    if init is ThetaInit.NORMAL:
        return torch.randn(count, generator=source, dtype=torch.float64)
    if init is ThetaInit.UNIFORM:
        return torch.rand(count, generator=source, dtype=torch.float64) * 2 - 1
    return torch.zeros(count, dtype=torch.float64)


class RESULinear(RESUModule, Linear):
    """A linear layer with resurrection; arguments as `Linear`. The mode is SPARSE where a mask is given, else DENSE."""


class RESUConv1d(RESUModule, Conv1d):
    """A 1-d convolution with resurrection; arguments as `Conv1d`."""


class RESUConv2d(RESUModule, Conv2d):
    """A 2-d convolution with resurrection; arguments as `Conv2d`."""


class RESUConv3d(RESUModule, Conv3d):
    """A 3-d convolution with resurrection; arguments as `Conv3d`."""


RESU_TYPES: dict[type[nn.Module], type[RESUModule]] = {
    kind.dense_type: kind for kind in (RESULinear, RESUConv1d, RESUConv2d, RESUConv3d)
}
"""Exact torch class -> resurrection class."""
