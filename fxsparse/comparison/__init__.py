"""The fair comparison: methods, sparsities, patterns and seeds under equal steps, data order and hyper-parameters."""

from __future__ import annotations

from fxsparse.comparison.config import Config as Config
from fxsparse.comparison.config import Reference as Reference
from fxsparse.comparison.config import load_config as load_config
from fxsparse.comparison.config import parse_config as parse_config
from fxsparse.comparison.results import Arm as Arm
from fxsparse.comparison.results import summarise_cells as summarise_cells
from fxsparse.comparison.runner import run as run
