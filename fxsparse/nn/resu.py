"""Resurrection: a masked weight whose dead entries are trained for a while and compete for revival."""

from __future__ import annotations

import enum
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fxsparse.errors import ConfigError
from fxsparse.nn.masked import check_mask, mask_of, mask_written, zero_dead_
from fxsparse.nn.model import MaskedWeight
from fxsparse.nn.resu_state import ALIVE, COMPANIONS, RESURRECTING, TRAINABLE, Mode, has_companions, read_phase
from fxsparse.nn.sharded import part, part_like
from fxsparse.nn.slot import slots_of
from fxsparse.sparsity import generator


class ThetaInit(enum.Enum):
    """How theta starts; sigma is the standard deviation of the alive weights."""

    NORMAL = "normal"
    """N(0, (epsilon sigma)^2)."""
    UNIFORM = "uniform"
    """U(-epsilon sigma, epsilon sigma)."""
    ZERO = "zero"
    """Zeros: the loss does not jump, but a unit whose inputs and outputs are all dead stays dead."""


class Resurrection:
    """The modes DENSE, SPARSE and RESU of one masked weight, whatever the route of its mask.

    The resurrection parameters theta stand in the dead positions of the weight itself: theta = W[~M] in index order.
    The buffer `<attribute>_mask` is what the weight's readers see it through, in every mode: where(F, W, 0). A phase
    opens it, F = all True, and holds M in the companion `<attribute>_alive_mask`; the trainable set T is another one.
    All are bool buffers changed in place, so neither masks nor modes recompile anything, and all of them are part of
    the module's `state_dict`. In a phase the gradient that reaches the weight is the dense one.

    Transitions: SPARSE -enter-> RESU, RESU -discard or commit-> SPARSE; a commit of the full mask leads to DENSE.
    Every other one raises ConfigError, and so do edits of the mask, folding and export in RESU.

    Args:
        weight: The weight; its owners get the companions, unless they have them.
    """

    def __init__(self, weight: MaskedWeight) -> None:
        self.weight = weight
        first, name = weight.owners[0]
        if not has_companions(slots_of(first)[name], name):
            self._install()

    def _install(self) -> None:
        mask = mask_of(*self.weight.owners[0])
        made = (torch.zeros_like(mask), torch.zeros_like(mask), torch.zeros((), dtype=torch.bool, device=mask.device))
        for module, attribute in self.weight.owners:
            names = tuple(attribute + ending for ending in COMPANIONS)
            taken = [name for name in names if hasattr(module, name)]
            if taken:
                raise ConfigError(f"`{taken[0]}` of {type(module).__name__} is taken; rename that attribute")
        for module, attribute in self.weight.owners:
            for ending, buffer in zip(COMPANIONS, made, strict=True):
                module.register_buffer(attribute + ending, buffer)
            slot = slots_of(module)[attribute]
            slot.companions = (*slot.companions, *(attribute + ending for ending in COMPANIONS))

    def remove(self) -> None:
        """Take the companions off; the mask stays.

        Raises:
            ConfigError: the weight is in RESU mode.
        """
        if self.mode is Mode.RESU:
            self._refuse("remove")
        for module, attribute in self.weight.owners:
            names = [attribute + ending for ending in COMPANIONS]
            for name in names:
                delattr(module, name)
            slot = slots_of(module)[attribute]
            slot.companions = tuple(name for name in slot.companions if name not in names)

    @property
    def mode(self) -> Mode:
        """What the weight's readers see."""
        module, attribute = self.weight.owners[0]
        if slots_of(module)[attribute].open:
            return Mode.RESU
        return Mode.DENSE if bool(mask_of(module, attribute).all()) else Mode.SPARSE

    @property
    def trainable(self) -> Bool[Tensor, "*shape"]:
        """T: the dead positions whose theta is trained; all False outside RESU mode. A live buffer."""
        return self._buffer(TRAINABLE)

    @property
    def theta(self) -> Float[Tensor, " dead"]:
        """A copy of W[~M], in index order."""
        return self.weight.dense(self.weight.weight.detach())[~self.weight.mask]

    def follow_buffers(self) -> None:
        """Set the mode to what the buffers say, after something else than `load_state_dict` wrote them."""
        for module, attribute in self.weight.owners:
            read_phase(module, attribute, slots_of(module)[attribute])
            mask_written(module)

    def scale(self) -> float:
        """Unbiased standard deviation sigma of the alive weights; 1/sqrt(fan_in) where it is undefined or zero."""
        alive = self.weight.dense(self.weight.weight.detach())[self.weight.mask]
        sigma = (
            float(alive.to(torch.promote_types(alive.dtype, torch.float64)).std()) if alive.numel() >= 2 else math.nan
        )
        if math.isfinite(sigma) and sigma > 0:
            return sigma
        shape = self.weight.weight.shape
        if len(shape) < 2:
            return 1 / math.sqrt(max(shape.numel(), 1))
        _, inputs, kernel = self.weight.spec.layout.matrix_shape(shape)
        return 1 / math.sqrt(inputs * kernel)

    def enter(
        self,
        init: ThetaInit = ThetaInit.NORMAL,
        *,
        epsilon: float = 0.1,
        trainable: Bool[Tensor, "*shape"] | None = None,
        seed: int = 0,
        tensor_index: int = 0,
        update_index: int = 0,
    ) -> float:
        """SPARSE -> RESU: theta is drawn at the trainable dead positions, zero stands at the others.

        Args:
            init: How theta starts.
            epsilon: Its scale relative to the standard deviation of the alive weights (1/sqrt(fan_in) without one).
            trainable: The set T, a subset of the dead positions; all of them by default.
            seed: The user's seed.
            tensor_index: Position of this weight in the model.
            update_index: Number of this phase.

        Returns:
            epsilon times that standard deviation, from which `theta_start` repeats the draw.

        Raises:
            ConfigError: another mode (a full mask is DENSE: there is nothing to resurrect), a negative epsilon, or a
                trainable set that is not bool, of another shape or not dead. Nothing has changed then.
        """
        if self.mode is not Mode.SPARSE:
            self._refuse("enter")
        mask = self.weight.mask
        trainable = ~mask if trainable is None else trainable
        if not epsilon >= 0:
            raise ConfigError(f"`epsilon` (={epsilon}) must be at least 0")
        if trainable.dtype is not torch.bool or trainable.shape != mask.shape or bool((trainable & mask).any()):
            kind = f"{trainable.dtype}, {tuple(trainable.shape)}"
            raise ConfigError(f"`trainable` (={kind}) must be bool, {tuple(mask.shape)}, and True at dead weights only")
        scale = epsilon * self.scale()
        start = theta_start(init, scale, mask, trainable, generator(seed, tensor_index, update_index, "theta"))
        present = self.weight.dense(self.weight.weight.detach())
        self.weight.write_(torch.where(mask, present, start.to(present)))
        held = mask.clone()
        for module, attribute in self.weight.owners:
            slots_of(module)[attribute].open = True
            mask_of(module, attribute).fill_(True)
            mask_written(module)
        self._write(ALIVE, held)
        self._write(TRAINABLE, trainable)
        self._write(RESURRECTING, torch.ones((), dtype=torch.bool))
        return scale

    def discard(self) -> None:
        """RESU -> SPARSE: theta is lost, the mask stays.

        Raises:
            ConfigError: another mode.
        """
        if self.mode is not Mode.RESU:
            self._refuse("discard")
        self._leave(self.weight.mask.clone())

    def commit(self, mask: Bool[Tensor, "*shape"]) -> None:
        """RESU -> SPARSE with the mask that a tournament chose: losers become zero, winners keep their value.

        The full mask leads to DENSE.

        Raises:
            ConfigError: another mode, or a mask that does not fit; nothing has changed then.
        """
        if self.mode is not Mode.RESU:
            self._refuse("commit")
        check_mask(self.weight.name, self.weight.weight, self.weight.spec, mask, self.weight.row_order)
        self._leave(mask)

    def _leave(self, mask: Tensor) -> None:
        for module, attribute in self.weight.owners:
            slots_of(module)[attribute].open = False
            mask_of(module, attribute).copy_(mask)
        for ending in COMPANIONS:
            self._write(ending, torch.zeros((), dtype=torch.bool))
        for module, attribute in self.weight.owners:
            mask_written(module)
            zero_dead_(module, attribute)

    @torch.no_grad()
    def write_theta_(self, values: Float[Tensor, "*shape"]) -> None:
        """Set theta on the trainable set: W := where(T, values, W), for values shaped like the weight.

        Raises:
            ConfigError: another mode than RESU.
        """
        if self.mode is not Mode.RESU:
            self._refuse("write_theta_")
        own = part(self.weight.weight)
        trainable, chosen = (part_like(each, self.weight.weight) for each in (self.trainable, values))
        own.copy_(torch.where(trainable, chosen, own))

    def _buffer(self, ending: str) -> Tensor:
        module, attribute = self.weight.owners[0]
        buffer = module._buffers[attribute + ending]
        assert buffer is not None
        return buffer

    def _write(self, ending: str, values: Tensor) -> None:
        for module, attribute in self.weight.owners:
            buffer = module._buffers[attribute + ending]
            assert buffer is not None
            buffer.copy_(values)

    def _refuse(self, act: str) -> None:
        wanted = Mode.SPARSE if act == "enter" else "another mode" if act == "remove" else Mode.RESU
        raise ConfigError(f"`mode` (={self.mode}) of `{self.weight.name}` must be {wanted} for {act}")


def theta_start(
    init: ThetaInit,
    scale: float,
    mask: Bool[Tensor, "*shape"],
    trainable: Bool[Tensor, "*shape"],
    source: torch.Generator,
) -> Float[Tensor, "*shape"]:
    """The first theta, float64, the shape of the mask: one draw per dead position in index order, zero outside T."""
    dead = ~mask
    count = int(dead.sum())
    if init is ThetaInit.NORMAL:
        draws = torch.randn(count, generator=source, dtype=torch.float64, device="cpu")
    elif init is ThetaInit.UNIFORM:
        draws = torch.rand(count, generator=source, dtype=torch.float64, device="cpu") * 2 - 1
    else:
        draws = torch.zeros(count, dtype=torch.float64, device="cpu")
    start = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    start[dead] = (draws * scale).to(start.device)
    return torch.where(trainable, start, 0.0)
