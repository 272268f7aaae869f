"""The stages: what is held against each model, one file a stage."""

from __future__ import annotations

from fxsparse.zoo.stages.batch import batch
from fxsparse.zoo.stages.compact import compact
from fxsparse.zoo.stages.compiled import compiled
from fxsparse.zoo.stages.eager import eager as eager
from fxsparse.zoo.stages.half import half
from fxsparse.zoo.stages.onnx import onnx
from fxsparse.zoo.stages.reload import reload
from fxsparse.zoo.stages.train import train
from fxsparse.zoo.stages.transform import transform
from fxsparse.zoo.subject import StageFunction

FUNCTIONS: dict[str, StageFunction] = {
    "eager": eager,
    "transform": transform,
    "train": train,
    "reload": reload,
    "half": half,
    "batch": batch,
    "compile": compiled,
    "onnx": onnx,
    "compact": compact,
}
