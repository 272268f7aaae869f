"""Sparse training: mask values over time, driven by the optimizer's steps."""

from __future__ import annotations

from fxsparse.training.acdc import ACDC as ACDC
from fxsparse.training.alive_only import StorageReport as StorageReport
from fxsparse.training.alive_only import StoredWeight as StoredWeight
from fxsparse.training.alive_only import restore_dense as restore_dense
from fxsparse.training.alive_only import store_alive as store_alive
from fxsparse.training.attach import attach as attach
from fxsparse.training.attach import make_loadable as make_loadable
from fxsparse.training.densify import Densify as Densify
from fxsparse.training.diversity import Diversity as Diversity
from fxsparse.training.dsnot import DSNoT as DSNoT
from fxsparse.training.exchange import exchange as exchange
from fxsparse.training.gmp import GMP as GMP
from fxsparse.training.grasp import GraSP as GraSP
from fxsparse.training.grown import GrownValue as GrownValue
from fxsparse.training.grown import MeanUniform as MeanUniform
from fxsparse.training.grown import NegativeGradient as NegativeGradient
from fxsparse.training.grown import Normal as Normal
from fxsparse.training.grown import Zero as Zero
from fxsparse.training.handle import Handle as Handle
from fxsparse.training.input_norms import InputNorms as InputNorms
from fxsparse.training.itop import ITOP as ITOP
from fxsparse.training.itop import Growth as Growth
from fxsparse.training.mest import MEST as MEST
from fxsparse.training.one_shot import OneShot as OneShot
from fxsparse.training.pruning import Pruning as Pruning
from fxsparse.training.pruning import prune as prune
from fxsparse.training.records import UpdateRecord as UpdateRecord
from fxsparse.training.records import UpdateReport as UpdateReport
from fxsparse.training.regroup import Regroup as Regroup
from fxsparse.training.resu import RESU as RESU
from fxsparse.training.resu_handle import ResuHandle as ResuHandle
from fxsparse.training.resu_phases import Lengths as Lengths
from fxsparse.training.resu_phases import Phase as Phase
from fxsparse.training.resu_subset import AboveQuantile as AboveQuantile
from fxsparse.training.resu_subset import AllDead as AllDead
from fxsparse.training.resu_subset import CyclicDead as CyclicDead
from fxsparse.training.resu_subset import RandomDead as RandomDead
from fxsparse.training.resu_subset import Subset as Subset
from fxsparse.training.resu_subset import TopGradient as TopGradient
from fxsparse.training.resu_subset import TopSaliency as TopSaliency
from fxsparse.training.resu_theta import Selective as Selective
from fxsparse.training.resu_theta import ThetaAdamW as ThetaAdamW
from fxsparse.training.resu_theta import ThetaMomentum as ThetaMomentum
from fxsparse.training.resu_theta import ThetaOptimizer as ThetaOptimizer
from fxsparse.training.resu_theta import ThetaRule as ThetaRule
from fxsparse.training.resu_theta import ThetaSGD as ThetaSGD
from fxsparse.training.resu_tournament import ResuRecord as ResuRecord
from fxsparse.training.resu_tournament import ResuReport as ResuReport
from fxsparse.training.resu_trainer import RESUTrainer as RESUTrainer
from fxsparse.training.rigl import RigL as RigL
from fxsparse.training.set import SET as SET
from fxsparse.training.snfs import SNFS as SNFS
from fxsparse.training.snip import SNIP as SNIP
from fxsparse.training.srigl import SRigL as SRigL
from fxsparse.training.state import WeightState as WeightState
from fxsparse.training.static import Static as Static
from fxsparse.training.synflow import SynFlow as SynFlow
from fxsparse.training.updater import Initial as Initial
from fxsparse.training.updater import Method as Method
from fxsparse.training.updater import NonFinite as NonFinite

METHODS = (Static, GMP, ACDC, SET, RigL, ITOP, SNFS, SRigL, MEST, RESU)
PRUNINGS = (OneShot, SNIP, GraSP, SynFlow)
