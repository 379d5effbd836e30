"""ResNet-18 (torchvision's, with a 32x32 stem) and, for CPUs, ResNet-20 (He et al., 2016)."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from utils import torchvision

BasicBlock = torchvision.models.resnet.BasicBlock


def resnet18(num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 with a 3x3 stride-1 first convolution and no max-pooling.

    (B, 3, 32, 32) -> (B, num_classes); maps of 32, 16, 8, 4 pixels.
    11,173,962 parameters for 10 classes.
    """
    f = torchvision.models.resnet18(num_classes=num_classes)
    f.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    f.maxpool = nn.Identity()
    return f


class OptionAShortcut(nn.Module):
    """Option A of He et al.: every second pixel, with zeros as the new channels. No parameters.

    (B, C, H, W) -> (B, 2C, H/2, W/2). Half of the zeros go before the channels and half after, as
    in CIFAR repositories; He et al. do not say.
    """

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))


def resnet20(num_classes: int) -> nn.Module:
    """ResNet-20 for CIFAR (He et al., Sec. 4.2), with option-A shortcuts.

    (B, 3, 32, 32) -> (B, num_classes); three stages of three basic blocks with 16, 32, 64 channels
    and maps of 32, 16, 8 pixels. 269,722 parameters for 10 classes.
    """

    def stage(inplanes: int, planes: int, stride: int) -> nn.Sequential:
        shortcut = OptionAShortcut() if stride == 2 else None
        first = BasicBlock(inplanes, planes, stride, downsample=shortcut)
        return nn.Sequential(first, BasicBlock(planes, planes), BasicBlock(planes, planes))

    layers = OrderedDict(
        conv1=nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(16),
        relu=nn.ReLU(inplace=True),
        layer1=stage(16, 16, stride=1),
        layer2=stage(16, 32, stride=2),
        layer3=stage(32, 64, stride=2),
        avgpool=nn.AdaptiveAvgPool2d((1, 1)),
        flatten=nn.Flatten(),
        fc=nn.Linear(64, num_classes),
    )
    return nn.Sequential(layers)
