"""From a batch to the moments of its group squares: which cotangents are sent back, in which pieces."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.collector_blocks import merged, moments_of
from fxsparse.curvature.collector_moments import Moments
from fxsparse.curvature.fisher_batch import FisherBatch
from fxsparse.curvature.fisher_squares import Entry, Squares
from fxsparse.curvature.fisher_types import FisherType, UncoveredParameter
from fxsparse.curvature.groups import Grouping
from fxsparse.curvature.groups_types import GroupRule, Heads, groupings_of
from fxsparse.curvature.losses import CallableLoss, OutputLoss
from fxsparse.curvature.taps import Taps, Unstable
from fxsparse.curvature.taps_fallback import PerSample
from fxsparse.curvature.taps_formulas import LinearWeight, Summed
from fxsparse.curvature.taps_mode import site_of
from fxsparse.curvature.taps_pass import Part, TapPass
from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import masked_weights

_BUDGET = 1 << 25
_PLANS = 8
TOKEN_METHODS = ("exact", "signs", "expand")


@dataclass(frozen=True)
class Recipe:
    """What is collected.

    Attributes:
        loss: the loss.
        kind: which Fisher.
        per_token: whether the unit is a position instead of a sample.
        token_method: how positions are told apart, where they must be: one backward pass each ("exact"), random signs
            ("signs", types with a Hessian only) or layer by layer ("expand").
        samples: draws of the sampled types.
        dense: whether dead entries of masked weights count.
        separate: whether the squares of each sample are kept apart.
        chunk: samples of one forward pass; None chooses by memory.
    """

    loss: OutputLoss
    kind: FisherType
    per_token: bool
    token_method: str
    samples: int
    dense: bool
    separate: bool
    chunk: int | None

    def check_loss(self, z: Tensor, y: Any) -> None:
        """Raise UnsupportedLoss where the loss has no curvature of this kind."""
        if self.kind in (FisherType.EXACT, FisherType.MC, FisherType.SKETCH):
            self.loss.check_natural(z, y)

    def cotangents(
        self, z: Tensor, y: Any, valid: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, float]]:
        """What is sent back through the model, like z, each with the weight of its squares."""
        loss, axis = self.loss, self.loss.axis(z, y if isinstance(y, Tensor) else None)
        counted = valid.unsqueeze(axis).to(z.dtype)
        if self.kind is FisherType.EMPIRICAL:
            gradient = loss.gradient(z, y) * counted
            if self.per_token and self.token_method == "exact":
                yield from ((each, 1.0) for each in _by_position(gradient, axis))
            else:
                yield gradient, 1.0
        elif self.kind is FisherType.MC:
            for _ in range(self.samples):
                yield loss.draw_gradient(z, y, generator) * counted, 1.0 / self.samples
        elif self.kind is FisherType.SKETCH:
            for _ in range(self.samples):
                yield loss.root_product(z, y, _signs(z, generator)) * counted, 1.0 / self.samples
        elif self.token_method == "signs" and z.ndim > 2:
            for _ in range(self.samples):
                signs = _signs(counted, generator)
                for column in range(loss.columns(z, y)):
                    yield loss.root_column(z, y, column) * counted * signs, 1.0 / self.samples
        else:
            for column in range(loss.columns(z, y)):
                whole = loss.root_column(z, y, column) * counted
                yield from ((each, 1.0) for each in _by_position(whole, axis))


def _by_position(cotangent: Tensor, axis: int) -> Iterator[Tensor]:
    """The cotangent at each position alone; positions where it is zero for every sample are left out."""
    if cotangent.ndim <= 2:
        yield cotangent
        return
    moved = cotangent.movedim(axis, -1)
    flat = moved.reshape(moved.shape[0], -1, moved.shape[-1])
    for position in range(flat.shape[1]):
        if bool((flat[:, position] != 0).any()):
            alone = torch.zeros_like(flat)
            alone[:, position] = flat[:, position]
            yield alone.view(moved.shape).movedim(-1, axis)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * drawn - 1).to(like.dtype)


@dataclass(frozen=True, eq=False)
class _Plan:
    taps: Taps
    slow: PerSample


@dataclass(frozen=True, eq=False)
class Collected:
    """What a batch gave.

    Attributes:
        moments: by entry, all of them.
        mass: M, the units that count.
        present: the entries that a gradient reached.
    """

    moments: dict[Entry, Moments]
    mass: float
    present: frozenset[Entry]

    def check_finite(self) -> None:
        """Raise DataError where a sum of squares is NaN or infinite."""
        totals = {entry: each.total for entry, each in self.moments.items() if each.total is not None}
        if not totals or bool(torch.stack([total.sum() for total in totals.values()]).isfinite().all()):
            return
        for (name, _), total in totals.items():
            if not bool(total.isfinite().all()):
                raise DataError(
                    f"`{name}` has squared gradients in this batch that are NaN or infinite; nothing was added: look "
                    "for NaN or huge values in its inputs, its targets and the weights"
                )


class Engine:
    """Collects batch after batch; the first one is examined.

    Args:
        model: the model, unwrapped.
        parameters: by first name, those that are wanted.
        output: takes the outputs z out of what the model returns.
        groups: see `groupings_of`.
        heads: see `groupings_of`.
        recipe: what is collected.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        output: Callable[[Any], Tensor],
        groups: str | GroupRule,
        heads: Iterable[Heads],
        recipe: Recipe,
    ) -> None:
        self.model, self.parameters, self.output, self.recipe = model, dict(parameters), output, recipe
        self._groups, self._heads = groups, tuple(heads)
        self.groupings: dict[str, tuple[Grouping, ...]] = {}
        self.slow: dict[str, str] = {}
        self._plans: list[_Plan] = []

    def collect(self, batch: FisherBatch, generator: torch.Generator) -> Collected:
        """The moments of a batch."""
        found: dict[Entry, Moments] = {}
        mass, present = 0.0, set()
        if not self._plans:
            self._examined(batch)
        masks = self._masks()
        for piece in batch.pieces(self._chunk(batch)):
            squares = Squares(piece.samples, self.groupings, masks, self.recipe.dense, self.recipe.separate)
            valid = self._one(piece, squares, generator)
            masses = valid.flatten(1).sum(1).double() if self.recipe.per_token else None
            units = float(masses.sum()) if masses is not None else float(piece.samples)
            mass += units
            if not units:
                continue
            present |= set(squares.values)
            values = self._with_absent(squares.values, piece.samples)
            found = merged(found, self._moments(values, piece.samples, masses, units))
        return Collected(found, mass, frozenset(present))

    @contextlib.contextmanager
    def undone(self, generator: torch.Generator) -> Iterator[None]:
        """What a batch taught and drew is forgotten after an exception."""
        before, drawn = (list(self._plans), dict(self.slow), self.groupings), generator.get_state()
        try:
            yield
        except BaseException:
            self._plans, self.slow, self.groupings = before
            generator.set_state(drawn)
            raise

    def _with_absent(self, values: Mapping[Entry, Tensor], samples: int) -> dict[Entry, Tensor]:
        """With zeros for what no gradient reached."""
        entries = {(name, each.group_type): each for name, groupings in self.groupings.items() for each in groupings}
        return {
            entry: values[entry] if entry in values else self._zeros(entry[0], grouping, samples)
            for entry, grouping in entries.items()
        }

    def _zeros(self, name: str, grouping: Grouping, samples: int) -> Tensor:
        rows = samples if self.recipe.separate or not grouping.is_element else 1
        return self.parameters[name].new_zeros((rows, grouping.size))

    def _moments(
        self, values: Mapping[Entry, Tensor], samples: int, masses: Tensor | None, units: float
    ) -> dict[Entry, Moments]:
        if not self.recipe.separate:
            return {entry: Moments.of_sum(each.sum(0), samples, units) for entry, each in values.items()}
        return moments_of(values, masses)

    def _examined(self, batch: FisherBatch) -> _Plan:
        """Taps for a batch like this one, and per-sample gradients for what they do not cover."""
        taps = Taps(self.model, self.parameters, self.output)
        taps.examine(batch)
        plan = _Plan(taps, self._per_sample(taps, taps.refused))
        self._plans = [plan, *self._plans][:_PLANS]
        if not self.groupings:
            self.groupings = groupings_of(self.model, self.parameters, self._groups, self._heads, taps.readings)
        self._note_slow(taps.refused)
        return plan

    def _per_sample(self, taps: Taps, names: Iterable[str]) -> PerSample:
        slow = PerSample(self.model, {name: self.parameters[name] for name in names}, self.output)
        few, cotangent, references = taps.evidence
        try:
            slow.examine(few, cotangent, {name: references[name] for name in slow.parameters})
        except UncoveredParameter as error:
            for name in slow.parameters:
                if not all(bool(each.isfinite().all()) for each in references[name]):
                    raise DataError(
                        f"`{name}` has gradients in this batch that are NaN or infinite; nothing was added: look for "
                        "NaN or huge values in its inputs, its targets and the weights"
                    ) from error
            raise
        return slow

    def known(self) -> dict[str, tuple[Grouping, ...]]:
        """The groupings; before the first batch, those that the module types tell."""
        if self.groupings:
            return self.groupings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a batch will tell more
            return groupings_of(self.model, self.parameters, self._groups, self._heads)

    def described(self) -> dict[str, str]:
        """What states of other collectors must have in common with this one's."""
        groups = self._groups if isinstance(self._groups, str) else "rule"
        return {"loss": _described(self.recipe.loss), "groups": groups, "heads": repr(self._heads)}

    def grouping(self, entry: Entry) -> Grouping:
        """The grouping of an entry; before the first batch, the one that the module type tells."""
        for grouping in self.known().get(entry[0], ()):
            if grouping.group_type == entry[1]:
                return grouping
        raise ConfigError(f"`{entry[0]}` has no groups of type {entry[1]!r} here: build the collector alike")

    def _note_slow(self, refused: Mapping[str, str]) -> None:
        """Warn, once for each, of parameters without taps; refuse what cannot be had without them."""
        new = {name: reason for name, reason in refused.items() if name not in self.slow}
        self.slow.update(new)
        if new and self.recipe.token_method == "expand":
            name, reason = next(iter(new.items()))
            raise UncoveredParameter(f"`{name}` has no taps ({reason}): take `token_method` (='exact')")
        masked = sorted(set(masked_weights(self.model)) & set(new))
        if masked and self.recipe.dense:
            raise UncoveredParameter(
                f"`{masked[0]}` has no taps ({new[masked[0]]}): its Fisher is that of `support` (='mask')"
            )
        for name, reason in new.items():
            warnings.warn(f"`{name}` is collected by per-sample gradients, which is slow: {reason}", stacklevel=8)

    def _run(self, piece: FisherBatch) -> tuple[TapPass | None, Tensor, PerSample]:
        """A forward pass under the first plan that fits, its outputs, and what is to be done without taps."""
        for plan in self._plans:
            try:
                made = plan.taps.run(piece)
            except Unstable:
                continue
            self._plans = [plan, *(other for other in self._plans if other is not plan)]
            return made, made.z.detach(), plan.slow
        plan = self._examined(piece)
        try:
            made = plan.taps.run(piece)
            return made, made.z.detach(), plan.slow
        except Unstable:
            self._note_slow(dict.fromkeys(self.parameters, "what the model does depends on the values of the batch"))
            args, kwargs = piece.fresh()
            with torch.no_grad():
                z = self.output(self.model(*args, **kwargs))
            return None, z, self._per_sample(plan.taps, self.parameters)

    def _one(self, piece: FisherBatch, squares: Squares, generator: torch.Generator) -> Tensor:
        made, z, slow = self._run(piece)
        y, valid = piece.aligned(self.recipe.loss, z)
        if not bool(valid.any()):
            return valid
        self.recipe.check_loss(z, y)
        if made is not None and self._close_last(made, y, valid, squares) and not slow.parameters:
            return valid
        expand = self.recipe.token_method == "expand"
        try:
            self._send(made, slow, piece, self.recipe.cotangents(z, y, valid, generator), squares, expand)
        except RuntimeError as error:
            if bool(z.isfinite().all()):
                raise
            raise DataError(
                "outputs of the model are NaN or infinite in this batch; nothing was added: look for NaN or huge "
                "values in its inputs and the weights"
            ) from error
        return valid

    def _send(
        self,
        made: TapPass | None,
        slow: PerSample,
        piece: FisherBatch,
        cotangents: Iterator[tuple[Tensor, float]],
        squares: Squares,
        expand: bool,
    ) -> None:
        ahead = next(cotangents, None)
        while ahead is not None:
            cotangent, weight = ahead
            ahead = next(cotangents, None)
            if made is not None:
                squares.backward(made, cotangent, weight, keep=ahead is not None, expand=expand)
            if slow.parameters:
                for first, _, found in slow.chunks(piece, [cotangent]):
                    for name, g in found[0].items():
                        squares.per_sample(name, g, weight, first)
        squares.close()

    def _close_last(self, made: TapPass, y: Any, valid: Tensor, squares: Squares) -> bool:
        """The last linear layer in closed form, H_oo |a|^2; whether nothing else is left to do."""
        site = site_of(made.z)
        if self.recipe.kind not in (FisherType.EXACT, FisherType.GGN) or site is None:
            return False
        loss, z = self.recipe.loss, made.z.detach()
        layout = made.layouts.get(site.number)
        names = [operand.source.direct for operand in site.operands]
        linear = all(isinstance(operand.formula, (LinearWeight, Summed)) for operand in site.operands)
        targets = y if isinstance(y, Tensor) else None
        if not linear or layout is None or loss.axis(z, targets) != z.ndim - 1 or not set(names) <= made.single:
            return False
        root = (loss.hessian_diagonal(z, y) * valid[..., None].to(z.dtype)).sqrt()
        for operand in site.operands:
            formula = operand.formula.expanded()
            assert formula is not None and operand.source.direct is not None
            squares.single(
                made, operand.source.direct, Part(type(operand)(operand.source, formula), site, layout, root), 1.0
            )
        made.closed = frozenset({site.number})
        return len(made.mode.sites) == 1 or set(made.mode.aliases) <= set(names)

    def _masks(self) -> dict[str, Tensor]:
        """The masks by which gradients are multiplied."""
        if self.recipe.dense:
            return {}
        found = {name: weight.mask for name, weight in masked_weights(self.model).items() if name in self.parameters}
        return {name: mask for name, mask in found.items() if not bool(mask.all())}

    def _chunk(self, batch: FisherBatch) -> int:
        if self.recipe.chunk is not None:
            return self.recipe.chunk
        stored = sum(
            grouping.size
            for entries in self.groupings.values()
            for grouping in entries
            if self.recipe.separate or not grouping.is_element
        )
        return max(1, min(batch.samples, _BUDGET // max(stored, 1)))


def _described(loss: OutputLoss) -> str:
    """The loss in words that are the same in another process."""
    if isinstance(loss, CallableLoss):
        own = loss.function
        return repr(own) if isinstance(own, nn.Module) else str(getattr(own, "__name__", type(own).__name__))
    options = {name: getattr(loss, name) for name in getattr(loss, "__dataclass_fields__", {})}
    told = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in options.items()}
    return f"{type(loss).__name__}({', '.join(f'{name}={value!r}' for name, value in told.items())})"


def check_recipe(recipe: Recipe) -> None:
    """Raise ConfigError for options that exclude each other."""
    if recipe.token_method not in TOKEN_METHODS:
        raise ConfigError(
            f"`token_method` (={recipe.token_method!r}) must be one of {', '.join(map(repr, TOKEN_METHODS))}"
        )
    if recipe.token_method == "expand" and (recipe.kind is not FisherType.EMPIRICAL or not recipe.per_token):
        raise ConfigError("`token_method` (='expand') needs `kind` (='empirical') and `unit` (='token')")
    if recipe.token_method == "signs" and recipe.kind not in (FisherType.EXACT, FisherType.GGN):
        raise ConfigError("`token_method` (='signs') needs `kind` (='true') or 'ggn'")
    for name, value in (("samples", recipe.samples), ("chunk", recipe.chunk)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"`{name}` (={value!r}) must be an integer of at least 1")
