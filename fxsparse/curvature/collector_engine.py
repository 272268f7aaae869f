"""From a batch to the moments of its group squares: which cotangents are sent back, in which pieces."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.curvature.collector_blocks import Pool, merged, moments_of
from fxsparse.curvature.collector_moments import Moments
from fxsparse.curvature.collector_recipe import Recipe as Recipe
from fxsparse.curvature.collector_recipe import check_recipe as check_recipe
from fxsparse.curvature.collector_recipe import described
from fxsparse.curvature.dense_storage import check_stored_dense
from fxsparse.curvature.fisher_batch import FisherBatch
from fxsparse.curvature.fisher_squares import Entry, Squares
from fxsparse.curvature.fisher_types import FisherType, UncoveredParameter
from fxsparse.curvature.groups import Grouping
from fxsparse.curvature.groups_types import GroupRule, Heads, groupings_of
from fxsparse.curvature.losses import CallableLoss
from fxsparse.curvature.taps import Taps, Unstable
from fxsparse.curvature.taps_autograd import EXAMINED
from fxsparse.curvature.taps_fallback import PerSample
from fxsparse.curvature.taps_formulas import LinearWeight, Summed, wide
from fxsparse.curvature.taps_pass import Part, TapPass
from fxsparse.curvature.taps_site import site_of
from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import masked_weights

_BUDGET = 1 << 25
_PLANS = 8


@dataclass(frozen=True, eq=False)
class _Plan:
    """Taps, and per-sample gradients by the names of what is refused."""

    taps: Taps
    slow: dict[frozenset[str], PerSample] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Collected:
    """What a batch gave.

    Attributes:
        moments: by entry, all of them.
        mass: M, the units that count.
        present: the entries that a gradient reached.
    """

    moments: Pool[Entry]
    mass: float
    present: frozenset[Entry]

    def check_finite(self) -> None:
        """Raise DataError where a sum of squares is NaN or infinite."""
        if self.moments.is_finite():
            return
        for (name, _), each in self.moments.items():
            if each.total is not None and not bool(each.total.isfinite().all()):
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
        self._shared: dict[Any, frozenset[int]] = {}

    def collect(self, batch: FisherBatch, generator: torch.Generator) -> Collected:
        """The moments of a batch."""
        found: Pool[Entry] = Pool.of({})
        mass, present = 0.0, set()
        masks = self._masks()
        batch = self._known_inputs(batch)
        if not self._plans:
            self._examined(batch)
            batch = self._known_inputs(batch)
        for piece in batch.pieces(self._chunk(batch)):
            squares = Squares(piece.samples, self.groupings, masks, self.recipe.dense, self.recipe.separate)
            valid = self._one(piece, squares, generator)
            valid = valid.reshape(piece.samples, -1)
            counted = valid.any(1)
            samples = int(counted.sum())
            if not samples:
                continue
            masses = valid.sum(1)[counted].double() if self.recipe.per_token else None
            units = float(samples) if masses is None else float(masses.sum())
            mass += units
            present |= set(squares.values)
            values = self._with_absent(squares.values, piece.samples)
            if samples < piece.samples:  # what does not count is no zero either
                values = {entry: u[counted] if len(u) == piece.samples else u for entry, u in values.items()}
            found = merged(found, self._moments(values, samples, masses, units))
        return Collected(found, mass, frozenset(present))

    def _known_inputs(self, batch: FisherBatch) -> FisherBatch:
        """The batch, whose inputs that belonged to every sample of other batches do so here too."""
        found = batch.shared()
        if self._shared:
            found |= self._shared.get(batch.form(), frozenset())
        if found:
            self._shared = {**self._shared, batch.form(): found}
        return batch.sharing(found)

    @contextlib.contextmanager
    def undone(self, generator: torch.Generator) -> Iterator[None]:
        """What a batch taught and drew is forgotten after an exception."""
        before = list(self._plans), dict(self.slow), self.groupings, self._shared
        drawn = generator.get_state()
        try:
            yield
        except BaseException:
            self._plans, self.slow, self.groupings, self._shared = before
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
    ) -> Pool[Entry]:
        if not self.recipe.separate:
            sums = {entry: Moments.of_sum(each.sum(0), samples, units) for entry, each in values.items()}
            return Pool.of(sums)
        return moments_of(values, masses)

    def _examined(self, batch: FisherBatch) -> _Plan:
        """Taps for a batch like this one, and per-sample gradients for what they do not cover."""
        taps = Taps(self.model, self.parameters, self.output)
        taps.examine(batch)
        if taps.shared:
            self._shared = {**self._shared, batch.form(): self._shared.get(batch.form(), frozenset()) | taps.shared}
        plan = _Plan(taps)
        self._slowly(plan, taps.refused)
        self._plans = [plan, *self._plans][:_PLANS]
        if not self.groupings:
            self.groupings = groupings_of(self.model, self.parameters, self._groups, self._heads, taps.readings)
        self._note_slow(taps.refused)
        return plan

    def _slowly(self, plan: _Plan, names: Iterable[str]) -> PerSample:
        """Per-sample gradients of these parameters, made sure of on the samples that were examined."""
        key = frozenset(names)
        if key not in plan.slow:
            slow = PerSample(
                self.model, {name: self.parameters[name] for name in self.parameters if name in key}, self.output
            )
            few, cotangent, references = plan.taps.evidence
            slow.examine(few, cotangent, {name: references[name] for name in slow.parameters})
            plan.slow[key] = slow
        return plan.slow[key]

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
        return {"loss": described(self.recipe.loss), "groups": groups, "heads": repr(self._heads)}

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
            made = self._under(plan, piece)
            if made is not None:
                self._plans = [plan, *(other for other in self._plans if other is not plan)]
                return made, made.z.detach(), self._slowly(plan, made.refused)
        backwards = list(reversed(range(piece.samples)))
        for rows in (None, backwards) if piece.samples > EXAMINED else (None,):  # the first samples, then the last
            if any(plan.taps.broken for plan in self._plans):
                break
            plan = self._examined(piece if rows is None else piece.select(rows))
            made = self._under(plan, piece)
            if made is not None:
                return made, made.z.detach(), self._slowly(plan, made.refused)
        plan = self._plans[0]
        self._note_slow(dict.fromkeys(self.parameters, "what the model does depends on the values of the batch"))
        args, kwargs = piece.fresh()
        with torch.no_grad():
            z = self.output(self.model(*args, **kwargs))
        return None, z, self._slowly(plan, self.parameters)

    def _under(self, plan: _Plan, piece: FisherBatch) -> TapPass | None:
        """A forward pass with the taps of a plan; None where it goes another way."""
        try:
            made = plan.taps.run(piece)
        except Unstable:
            return None
        self._note_slow(made.refused)
        return made

    def _one(self, piece: FisherBatch, squares: Squares, generator: torch.Generator) -> Tensor:
        made, z, slow = self._run(piece)
        recipe = self.recipe.of_next() if piece.shift else self.recipe
        own, z = z.dtype, z if isinstance(recipe.loss, CallableLoss) else wide(z)
        y, valid = piece.aligned(recipe.loss, z)
        if not bool(valid.any()):
            return valid
        recipe.check_loss(z, y)
        if made is not None and self._close_last(recipe, made, z, y, valid, squares) and not slow.parameters:
            return valid
        expand = recipe.token_method == "expand"
        try:
            cotangents = ((each.to(own), weight) for each, weight in recipe.cotangents(z, y, valid, generator))
            self._send(made, slow, piece, cotangents, squares, expand)
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

    def _close_last(self, recipe: Recipe, made: TapPass, z: Tensor, y: Any, valid: Tensor, squares: Squares) -> bool:
        """The last linear layer in closed form, H_oo |a|^2; whether nothing else is left to do."""
        site = site_of(made.z)
        if recipe.kind not in (FisherType.EXACT, FisherType.GGN) or site is None:
            return False
        loss = recipe.loss
        layout = made.layouts.get(site.number)
        names = [operand.source.direct for operand in site.operands]
        linear = all(isinstance(operand.formula, (LinearWeight, Summed)) for operand in site.operands)
        targets = y if isinstance(y, Tensor) else None
        if not linear or layout is None or loss.axis(z, targets) != z.ndim - 1 or not set(names) <= made.single:
            return False
        root = (loss.hessian_diagonal(z, y) * loss.spread(valid, z, targets).to(z.dtype)).sqrt()
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
        weights = check_stored_dense(self.model, self.parameters)
        if self.recipe.dense:
            return {}
        found = {name: weight.mask for name, weight in weights.items() if name in self.parameters}
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
