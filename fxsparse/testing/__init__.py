"""Hypothesis strategies: models with inputs, patterns, shapes, densities. Importing this imports hypothesis."""

from __future__ import annotations

from fxsparse.testing.ingredients import EVERYTHING as EVERYTHING
from fxsparse.testing.ingredients import PLAIN as PLAIN
from fxsparse.testing.ingredients import TRACEABLE as TRACEABLE
from fxsparse.testing.ingredients import Ingredient as Ingredient
from fxsparse.testing.models import models as models
from fxsparse.testing.models import programs as programs
from fxsparse.testing.models import random_program as random_program
from fxsparse.testing.program import Program as Program
from fxsparse.testing.program import fill_ as fill_
from fxsparse.testing.scope import Sizes as Sizes
from fxsparse.testing.values import densities as densities
from fxsparse.testing.values import patterns as patterns
from fxsparse.testing.values import shapes as shapes
from fxsparse.testing.values import sparsities as sparsities
