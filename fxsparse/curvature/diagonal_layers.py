"""Squares of per-sample rows from what reaches each layer: its inputs and its output gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxsparse.curvature.fisher_scope import collecting_scope
from fxsparse.curvature.fisher_squares import Squares
from fxsparse.curvature.groups import ELEMENT, element
from fxsparse.curvature.operator_data import Batch
from fxsparse.curvature.operator_engine import Engine
from fxsparse.curvature.operator_forward import Tensors
from fxsparse.curvature.taps import Taps, Unstable
from fxsparse.curvature.taps_pass import TapPass
from fxsparse.nn import Route, masked_weights


class LayerSquares:
    """Taps of an engine's model, examined on its first batch: which parameters they cover, and their squares.

    Args:
        engine: Whose parameters are wanted; one without opened masks.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._taps: Taps | None = None
        self._made: TapPass | None = None
        self._able = True

    @classmethod
    def of(cls, engine: Engine) -> LayerSquares | None:
        """The taps of an engine; None where opened masks stand behind computations that taps do not see through."""
        opened = engine.space.opened
        specs = [weight.spec for weight in masked_weights(engine.model).values()] if opened else []
        return None if any(spec.route is Route.EFFECTIVE for spec in specs) else cls(engine)

    def forward(self, batch: Batch) -> Tensor | None:
        """The outputs of the batch, whose taps are ready for `add`; None where they cannot be had."""
        self._made = None
        if not self._able:
            return None
        try:
            with collecting_scope(self.engine.model):
                if self._taps is None:
                    own = {name: self.engine.parameter(name) for name in self.engine.space.shapes}
                    self._taps = Taps(self.engine.model, own, self.engine.output)
                    self._taps.examine(batch.read)
                self._made = self._taps.run(batch.read.sharing(self._taps.shared))
        except Unstable:
            self._able = False  # the model goes another way on other inputs
            return None
        return self._made.z.detach()

    def add(self, columns: Sequence[Tensor], sums: Tensors) -> frozenset[str]:
        """Add the squares of all columns over the batch; the names of the parameters of which this is done."""
        if self._made is None or self._taps is None:
            return frozenset()
        made, self._made = self._made, None
        shapes = self.engine.space.shapes
        covered = frozenset(name for name in shapes if name not in made.refused)
        groupings = {name: (element(tuple(shape)),) for name, shape in shapes.items() if name in covered}
        squares = Squares(made.samples, groupings, {}, dense=bool(self.engine.space.opened), separate=False)
        with collecting_scope(self.engine.model):
            for number, column in enumerate(columns):
                squares.backward(made, column, 1.0, keep=number + 1 < len(columns))
            squares.close()
        for name in covered:
            found = squares.values.get((name, ELEMENT))
            if found is not None:
                sums[name] += found.sum(0).view(shapes[name])
        return covered
