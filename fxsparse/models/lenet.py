"""LeNet-300-100 and LeNet-5 (LeCun, Bottou, Bengio & Haffner, Proc. IEEE 86(11), 1998)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fxsparse.errors import ConfigError


class LeNet300100(nn.Module):
    """Two hidden layers of 300 and 100 units: the fully connected network of the lottery-ticket paper.

    Weights start from a Gaussian Glorot distribution and biases from zero, as in Frankle & Carbin (ICLR 2019,
    arXiv:1803.03635, appendix C). Inputs of any shape are flattened, so images need no reshaping.

    Args:
        in_features: input values per sample (784 for 28x28 images, 64 for 8x8).
        classes: number of logits.
    """

    def __init__(self, in_features: int = 64, classes: int = 10) -> None:
        super().__init__()
        check_positive(in_features=in_features, classes=classes)
        self.fc1 = nn.Linear(in_features, 300)
        self.fc2 = nn.Linear(300, 100)
        self.output = nn.Linear(100, classes)
        for layer in (self.fc1, self.fc2, self.output):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits of a batch; every sample holds `in_features` values."""
        x = torch.flatten(x, 1)
        x = functional.relu(self.fc1(x))
        x = functional.relu(self.fc2(x))
        logits: Tensor = self.output(x)
        return logits


class LeNet5(nn.Module):
    """Two 5x5 convolutions with max pooling, then 120-84-`classes`: the modern form of LeNet-5 with ReLU.

    Args:
        in_channels: channels of the image.
        classes: number of logits.
        image_size: height and width in pixels, at least 16 (32 gives the 61,706 parameters of the original layout).
    """

    def __init__(self, in_channels: int = 1, classes: int = 10, image_size: int = 32) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, classes=classes)
        if image_size < 16:
            raise ConfigError(f"`image_size` (={image_size}) must be at least 16: two 5x5 convolutions need the room")
        side = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.output = nn.Linear(84, classes)

    def forward(self, x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of a batch of images."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        x = functional.relu(self.fc1(x))
        x = functional.relu(self.fc2(x))
        logits: Tensor = self.output(x)
        return logits


def lenet_300_100(in_features: int = 64, classes: int = 10) -> LeNet300100:
    """A fresh LeNet-300-100; draws from torch's global generator like any module.

    >>> sum(p.numel() for p in lenet_300_100(784).parameters())
    266610
    """
    return LeNet300100(in_features, classes)


def lenet_5(in_channels: int = 1, classes: int = 10, image_size: int = 32) -> LeNet5:
    """A fresh LeNet-5 (6-16-120-84).

    >>> sum(p.numel() for p in lenet_5().parameters())
    61706
    """
    return LeNet5(in_channels, classes, image_size)


def check_positive(**sizes: int) -> None:
    """Raise ConfigError for the first size below 1, by its name."""
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"`{name}` (={value}) must be at least 1")
