"""Reference networks, small enough to train anywhere."""

from __future__ import annotations

from fxsparse.models.lenet import LeNet5 as LeNet5
from fxsparse.models.lenet import LeNet300100 as LeNet300100
from fxsparse.models.lenet import lenet_5 as lenet_5
from fxsparse.models.lenet import lenet_300_100 as lenet_300_100
from fxsparse.models.mlp import MLP as MLP
from fxsparse.models.mlp import mlp as mlp
from fxsparse.models.small_conv_net import SmallConvNet as SmallConvNet
from fxsparse.models.small_conv_net import small_conv_net as small_conv_net
