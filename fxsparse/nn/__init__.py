"""Modules with a mask inside, and masks beside the parameters of any module."""

from __future__ import annotations

from fxsparse.nn.conv import Conv1d as Conv1d
from fxsparse.nn.conv import Conv2d as Conv2d
from fxsparse.nn.conv import Conv3d as Conv3d
from fxsparse.nn.conv import ConvTranspose1d as ConvTranspose1d
from fxsparse.nn.conv import ConvTranspose2d as ConvTranspose2d
from fxsparse.nn.conv import ConvTranspose3d as ConvTranspose3d
from fxsparse.nn.effective import alive_gains as alive_gains
from fxsparse.nn.effective import fold_effective as fold_effective
from fxsparse.nn.effective import mask_effective as mask_effective
from fxsparse.nn.effective import unmask_effective as unmask_effective
from fxsparse.nn.effective import weight_norm_hook as weight_norm_hook
from fxsparse.nn.functional import DenseGradients as DenseGradients
from fxsparse.nn.functional import Product as Product
from fxsparse.nn.functional import masked_weight as masked_weight
from fxsparse.nn.linear import Linear as Linear
from fxsparse.nn.masked import check_mask_edit as check_mask_edit
from fxsparse.nn.masked import install_mask as install_mask
from fxsparse.nn.masked import mask_name as mask_name
from fxsparse.nn.masked import mask_spec as mask_spec
from fxsparse.nn.masked import remove_mask as remove_mask
from fxsparse.nn.masked import set_guard as set_guard
from fxsparse.nn.model import MaskedWeight as MaskedWeight
from fxsparse.nn.model import masked_weights as masked_weights
from fxsparse.nn.model import masks as masks
from fxsparse.nn.model import set_masks as set_masks
from fxsparse.nn.model import tie_masks as tie_masks
from fxsparse.nn.resu import Resurrection as Resurrection
from fxsparse.nn.resu import ThetaInit as ThetaInit
from fxsparse.nn.resu_state import Mode as Mode
from fxsparse.nn.shared import FastMode as FastMode
from fxsparse.nn.shared_accelerate import FastLayer as FastLayer
from fxsparse.nn.shared_accelerate import FastReport as FastReport
from fxsparse.nn.shared_accelerate import accelerate as accelerate
from fxsparse.nn.shared_accelerate import decelerate as decelerate
from fxsparse.nn.shared_accelerate import fast_report as fast_report
from fxsparse.nn.sparse_module import SparseModule as SparseModule
from fxsparse.nn.sparse_module import layout_of as layout_of
from fxsparse.nn.spec import Guard as Guard
from fxsparse.nn.spec import MaskSpec as MaskSpec
from fxsparse.nn.spec import Route as Route
from fxsparse.nn.swap import SPARSE_TYPES as SPARSE_TYPES
