"""fxsparse: make neural networks sparse, and cash the sparsity in.

The face of the library: every public name, re-exported explicitly. What is more than an error is imported on first use,
so that ``import fxsparse`` costs little beyond ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fxsparse.errors import CaptureError as CaptureError
from fxsparse.errors import ConfigError as ConfigError
from fxsparse.errors import DataError as DataError
from fxsparse.errors import ExportError as ExportError
from fxsparse.errors import FxSparseError as FxSparseError
from fxsparse.errors import PassError as PassError
from fxsparse.errors import TicketError as TicketError

if TYPE_CHECKING:
    from fxsparse import curvature as curvature
    from fxsparse import exporters as exporters
    from fxsparse import graph as graph
    from fxsparse import lottery as lottery
    from fxsparse import nn as nn
    from fxsparse import passes as passes
    from fxsparse import planning as planning
    from fxsparse import sparsity as sparsity
    from fxsparse import testing as testing
    from fxsparse import training as training
    from fxsparse.curvature import OBD as OBD
    from fxsparse.curvature import Compensation as Compensation
    from fxsparse.curvature import CompensationReport as CompensationReport
    from fxsparse.curvature import CurvatureOperator as CurvatureOperator
    from fxsparse.curvature import FisherCollector as FisherCollector
    from fxsparse.curvature import FisherType as FisherType
    from fxsparse.curvature import WoodFisher as WoodFisher
    from fxsparse.curvature import compensate as compensate
    from fxsparse.exporters import Dynamic as Dynamic
    from fxsparse.exporters import ExportReport as ExportReport
    from fxsparse.exporters import Int8 as Int8
    from fxsparse.exporters import Optimize as Optimize
    from fxsparse.exporters import Target as Target
    from fxsparse.exporters import bench_files as bench_files
    from fxsparse.exporters import export_onnx as export_onnx
    from fxsparse.exporters import optimize_file as optimize_file
    from fxsparse.exporters import verify_file as verify_file
    from fxsparse.lottery import RegroupReport as RegroupReport
    from fxsparse.lottery import Ticket as Ticket
    from fxsparse.lottery import load_ticket as load_ticket
    from fxsparse.lottery import regroup as regroup
    from fxsparse.lottery import regroup_ticket as regroup_ticket
    from fxsparse.lottery import save_ticket as save_ticket
    from fxsparse.nn import FastMode as FastMode
    from fxsparse.nn import accelerate as accelerate
    from fxsparse.nn import decelerate as decelerate
    from fxsparse.nn import fast_report as fast_report
    from fxsparse.nn import masks as masks
    from fxsparse.nn import set_masks as set_masks
    from fxsparse.passes import Form as Form
    from fxsparse.passes import LoweringResult as LoweringResult
    from fxsparse.passes import Verify as Verify
    from fxsparse.passes import legal_forms as legal_forms
    from fxsparse.passes import lower_shared_support as lower_shared_support
    from fxsparse.planning import ChannelBudget as ChannelBudget
    from fxsparse.planning import ChannelPlan as ChannelPlan
    from fxsparse.planning import CompactionReport as CompactionReport
    from fxsparse.planning import LatencyBudget as LatencyBudget
    from fxsparse.planning import MacBudget as MacBudget
    from fxsparse.planning import ParameterBudget as ParameterBudget
    from fxsparse.planning import Plan as Plan
    from fxsparse.planning import compact as compact
    from fxsparse.planning import compaction_report as compaction_report
    from fxsparse.planning import finalize as finalize
    from fxsparse.planning import plan as plan
    from fxsparse.planning import plan_channels as plan_channels
    from fxsparse.planning import sparsity_report as sparsity_report
    from fxsparse.planning import transform as transform
    from fxsparse.sparsity import ERK as ERK
    from fxsparse.sparsity import Block as Block
    from fxsparse.sparsity import Channel as Channel
    from fxsparse.sparsity import ConstantFanIn as ConstantFanIn
    from fxsparse.sparsity import Custom as Custom
    from fxsparse.sparsity import Global as Global
    from fxsparse.sparsity import Magnitude as Magnitude
    from fxsparse.sparsity import NByM as NByM
    from fxsparse.sparsity import SharedSupport as SharedSupport
    from fxsparse.sparsity import Uniform as Uniform
    from fxsparse.sparsity import Unstructured as Unstructured
    from fxsparse.sparsity import Wanda as Wanda
    from fxsparse.training import ACDC as ACDC
    from fxsparse.training import GMP as GMP
    from fxsparse.training import ITOP as ITOP
    from fxsparse.training import MEST as MEST
    from fxsparse.training import RESU as RESU
    from fxsparse.training import SET as SET
    from fxsparse.training import SNFS as SNFS
    from fxsparse.training import SNIP as SNIP
    from fxsparse.training import Densify as Densify
    from fxsparse.training import Diversity as Diversity
    from fxsparse.training import GraSP as GraSP
    from fxsparse.training import Handle as Handle
    from fxsparse.training import Initial as Initial
    from fxsparse.training import NonFinite as NonFinite
    from fxsparse.training import OneShot as OneShot
    from fxsparse.training import Regroup as Regroup
    from fxsparse.training import RESUTrainer as RESUTrainer
    from fxsparse.training import RigL as RigL
    from fxsparse.training import SRigL as SRigL
    from fxsparse.training import Static as Static
    from fxsparse.training import SynFlow as SynFlow
    from fxsparse.training import attach as attach
    from fxsparse.training import prune as prune
    from fxsparse.training import restore_dense as restore_dense
    from fxsparse.training import store_alive as store_alive

__version__ = "0.1.0"

_NAMES = {
    "curvature": (
        *("CurvatureOperator", "FisherCollector", "FisherType", "OBD", "WoodFisher"),
        *("Compensation", "CompensationReport", "compensate"),
    ),
    "exporters": (
        *("Dynamic", "ExportReport", "Int8", "Optimize", "Target", "export_onnx"),
        *("bench_files", "optimize_file", "verify_file"),
    ),
    "lottery": ("Ticket", "load_ticket", "save_ticket", "RegroupReport", "regroup", "regroup_ticket"),
    "nn": ("masks", "set_masks", "FastMode", "accelerate", "decelerate", "fast_report"),
    "passes": ("Verify", "Form", "LoweringResult", "legal_forms", "lower_shared_support"),
    "planning": (
        "CompactionReport",
        "compact",
        "compaction_report",
        "Plan",
        "plan",
        "transform",
        "finalize",
        "sparsity_report",
        *("ChannelBudget", "ChannelPlan", "LatencyBudget", "MacBudget", "ParameterBudget", "plan_channels"),
    ),
    "sparsity": (
        *("Unstructured", "NByM", "Block", "Channel", "ConstantFanIn", "SharedSupport"),
        *("Uniform", "ERK", "Global", "Custom"),
        *("Magnitude", "Wanda"),
    ),
    "training": (
        *("Static", "GMP", "ACDC", "SET", "RigL", "ITOP", "SNFS", "SRigL", "MEST", "RESU", "Densify", "RESUTrainer"),
        *("OneShot", "SNIP", "GraSP", "SynFlow", "prune"),
        *("Handle", "Initial", "NonFinite", "Regroup", "Diversity", "attach"),
        *("restore_dense", "store_alive"),
    ),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
_PACKAGES = (
    "curvature",
    "exporters",
    "graph",
    "lottery",
    "nn",
    "passes",
    "planning",
    "sparsity",
    "testing",
    "training",
)


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _PACKAGES:
        return importlib.import_module(f"fxsparse.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'fxsparse' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fxsparse.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})
