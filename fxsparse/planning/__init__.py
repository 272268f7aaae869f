"""Sparse models from dense ones: the plan of every weight's route, carrying it out, and going back."""

from __future__ import annotations

from fxsparse.planning.planner import Plan as Plan
from fxsparse.planning.planner import WeightPlan as WeightPlan
from fxsparse.planning.planner import plan as plan
from fxsparse.planning.select import Selector as Selector
from fxsparse.planning.sparsify import SparsityReport as SparsityReport
from fxsparse.planning.sparsify import finalize as finalize
from fxsparse.planning.sparsify import sparsity_report as sparsity_report
from fxsparse.planning.sparsify import transform as transform
