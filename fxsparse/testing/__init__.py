"""Hypothesis strategies: models with inputs, patterns, shapes, densities. Importing this imports hypothesis."""

from __future__ import annotations

from fxsparse.testing.models import models as models
from fxsparse.testing.values import densities as densities
from fxsparse.testing.values import patterns as patterns
from fxsparse.testing.values import shapes as shapes
from fxsparse.testing.values import sparsities as sparsities
