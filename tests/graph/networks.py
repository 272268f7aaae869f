"""The networks of the golden tables; built on the meta device by their tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def lenet_300_100() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5() -> nn.Module:  # 1x32x32
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def lenet_5_caffe() -> nn.Module:  # 1x28x28
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def lenet_128() -> nn.Module:  # 3x128x128, one output
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(13456, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 1)),
    )


def conv_n(stages: int) -> nn.Module:  # Conv-2, Conv-4, Conv-6 for stages 1, 2, 3; 3x32x32
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 128, 256)[:stages]:
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    flat = channels * (32 >> stages) ** 2
    layers += [nn.Flatten(), nn.Linear(flat, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers)


VGG_16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg_16_features(norm: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG_16:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, int(width), 3, padding=1), *([nn.BatchNorm2d(int(width))] if norm else [])]
        layers.append(nn.ReLU())
        channels = int(width)
    return layers


def vgg_16() -> nn.Module:
    head = (nn.Linear(25088, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))
    return nn.Sequential(*vgg_16_features(), nn.Flatten(), *head)


def vgg_16_head() -> nn.Module:  # 3x128x128
    head = (nn.Linear(8192, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 1))
    return nn.Sequential(*vgg_16_features(), nn.Flatten(), *head)


def vgg_16_bn_cifar() -> nn.Module:
    return nn.Sequential(*vgg_16_features(norm=True), nn.Flatten(), nn.Linear(512, 10))


class Block(nn.Module):
    """A residual block: basic (two 3x3) or bottleneck (1x1, 3x3 with the stride, 1x1)."""

    def __init__(self, channels: int, width: int, out: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        if bottleneck:
            self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            self.conv3: nn.Module = nn.Conv2d(width, out, 1, bias=False)
            self.bn3: nn.Module = nn.BatchNorm2d(out)
        else:
            self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.conv3, self.bn3 = nn.Identity(), nn.Identity()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.bn2(self.conv2(y))))
        return self.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-18 and ResNet-50 (v1.5: stride in the 3x3) for 224x224."""

    def __init__(self, depths: tuple[int, ...], bottleneck: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.pool = nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        channels, grow = 64, 4 if bottleneck else 1
        for stage, depth in enumerate(depths):
            width = 64 << stage
            blocks = []
            for i in range(depth):
                stride = 2 if stage and i == 0 else 1
                blocks.append(Block(channels, width, width * grow, stride, bottleneck))
                channels = width * grow
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.head(x))


def resnet_18() -> nn.Module:
    return ResNet((2, 2, 2, 2), bottleneck=False)


def resnet_50() -> nn.Module:
    return ResNet((3, 4, 6, 3), bottleneck=True)


def resnet_20_cifar() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for stage in range(3):
        for i in range(3):
            layers.append(Block(channels, 16 << stage, 16 << stage, 2 if stage and i == 0 else 1, bottleneck=False))
            channels = 16 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def on_meta(build: object, *args: object) -> nn.Module:
    with torch.device("meta"):
        return build(*args)  # type: ignore[operator]
