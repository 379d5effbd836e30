"""DenseNet-121: torchvision's, with a 32x32 stem."""

from torch import nn

from utils import torchvision


def densenet121(num_classes: int, growth_rate: int = 12) -> nn.Module:
    """torchvision's DenseNet-121 with a 3x3 stride-1 stem, straight into the first dense block.

    (B, 3, 32, 32) -> (B, num_classes); maps of 32, 16, 8, 4 pixels. The growth rate is the authors'
    12, with twice as many channels in the stem: 1,000,618 parameters for 10 classes.
    """
    stem = 2 * growth_rate
    f = torchvision.models.DenseNet(growth_rate, num_init_features=stem, num_classes=num_classes)
    f.features.conv0 = nn.Conv2d(3, stem, kernel_size=3, padding=1, bias=False)
    del f.features.norm0, f.features.relu0, f.features.pool0
    return f


def densenet121_k32(num_classes: int) -> nn.Module:
    """The DenseNet paper's growth rate, 32: 6,956,298 parameters for 10 classes."""
    return densenet121(num_classes, growth_rate=32)
