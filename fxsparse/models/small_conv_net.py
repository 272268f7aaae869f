"""A small residual network with batch normalisation, for images of a few pixels."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fxsparse.errors import ConfigError
from fxsparse.models.lenet import check_positive


class ResidualBlock(nn.Module):
    """x + BN(conv(ReLU(BN(conv(x))))), then ReLU (He et al., CVPR 2016, arXiv:1512.03385, figure 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h w"]:
        """Same shape as the input."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(x + self.bn2(self.conv2(y)))


class SmallConvNet(nn.Module):
    """Stem (16 channels), residual block, strided convolution (32 channels), residual block, pooling, one linear layer.

    Every part that makes pruning a real network hard is here once: normalisation, a residual sum, a stride, a flatten.

    Args:
        in_channels: channels of the image.
        classes: number of logits.
        image_size: height and width in pixels; a multiple of 4, at least 8.
    """

    def __init__(self, in_channels: int = 1, classes: int = 10, image_size: int = 8) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, classes=classes)
        if image_size < 8 or image_size % 4:
            raise ConfigError(f"`image_size` (={image_size}) must be a multiple of 4 and at least 8: resize the images")
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.block1 = ResidualBlock(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.down_bn = nn.BatchNorm2d(32)
        self.block2 = ResidualBlock(32)
        self.output = nn.Linear(32 * (image_size // 4) ** 2, classes)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of a batch of images."""
        x = self.block1(functional.relu(self.stem_bn(self.stem(x))))
        x = self.block2(functional.relu(self.down_bn(self.down(x))))
        x = functional.avg_pool2d(x, 2)
        logits: Tensor = self.output(torch.flatten(x, 1))
        return logits


def small_conv_net(in_channels: int = 1, classes: int = 10, image_size: int = 8) -> SmallConvNet:
    """A fresh small residual network; draws from torch's global generator like any module.

    >>> sum(p.numel() for p in small_conv_net().parameters())
    29370
    """
    return SmallConvNet(in_channels, classes, image_size)
