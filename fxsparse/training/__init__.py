"""Sparse training: mask values over time, driven by the optimizer's steps."""

from __future__ import annotations

from fxsparse.training.attach import attach as attach
from fxsparse.training.exchange import exchange as exchange
from fxsparse.training.gmp import GMP as GMP
from fxsparse.training.grown import GrownValue as GrownValue
from fxsparse.training.grown import MeanUniform as MeanUniform
from fxsparse.training.grown import NegativeGradient as NegativeGradient
from fxsparse.training.grown import Normal as Normal
from fxsparse.training.grown import Zero as Zero
from fxsparse.training.handle import Handle as Handle
from fxsparse.training.records import UpdateRecord as UpdateRecord
from fxsparse.training.records import UpdateReport as UpdateReport
from fxsparse.training.rigl import RigL as RigL
from fxsparse.training.set import SET as SET
from fxsparse.training.state import WeightState as WeightState
from fxsparse.training.static import Static as Static
from fxsparse.training.updater import Initial as Initial
from fxsparse.training.updater import Method as Method

METHODS = (Static, GMP, SET, RigL)
