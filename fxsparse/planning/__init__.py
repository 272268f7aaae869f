"""Sparse models from dense ones: the plan of every weight's route, carrying it out, and going back."""

from __future__ import annotations

from fxsparse.planning.compaction import CompactionReport as CompactionReport
from fxsparse.planning.compaction import compact as compact
from fxsparse.planning.compaction import compaction_report as compaction_report
from fxsparse.planning.planner import Plan as Plan
from fxsparse.planning.planner import plan as plan
from fxsparse.planning.prune_budgets import ChannelBudget as ChannelBudget
from fxsparse.planning.prune_budgets import LatencyBudget as LatencyBudget
from fxsparse.planning.prune_budgets import MacBudget as MacBudget
from fxsparse.planning.prune_budgets import ParameterBudget as ParameterBudget
from fxsparse.planning.prune_channels import plan_channels as plan_channels
from fxsparse.planning.prune_plan import ChannelPlan as ChannelPlan
from fxsparse.planning.select import Selector as Selector
from fxsparse.planning.sparsify import SparsityReport as SparsityReport
from fxsparse.planning.sparsify import finalize as finalize
from fxsparse.planning.sparsify import sparsity_report as sparsity_report
from fxsparse.planning.sparsify import transform as transform
from fxsparse.planning.weight_plan import WeightPlan as WeightPlan
