"""The main job on a small real data set: tickets found, exported, verified and compared in two or three minutes."""

from __future__ import annotations

from fxsparse.demo.run import run_demo as run_demo
from fxsparse.demo.settings import NETWORKS as NETWORKS
from fxsparse.demo.settings import DemoNetwork as DemoNetwork
from fxsparse.demo.settings import DemoSettings as DemoSettings
