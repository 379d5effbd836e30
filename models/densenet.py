"""DenseNet-121: torchvision's, with a 32x32 stem."""

from torch import nn

from utils import import_torchvision

torchvision = import_torchvision()


def densenet121(num_classes: int, growth_rate: int = 12) -> nn.Module:
    """torchvision's DenseNet-121 whose first 3x3 convolution leads straight into the first dense block.

    (B, 3, 32, 32) -> (B, num_classes); maps of 32, 16, 8, 4 pixels. The authors' growth rate, 12, and twice as many
    first channels: 1,000,618 parameters for 10 classes.
    """
    model = torchvision.models.DenseNet(growth_rate, num_init_features=2 * growth_rate, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(3, 2 * growth_rate, kernel_size=3, padding=1, bias=False)
    del model.features.norm0, model.features.relu0, model.features.pool0
    return model


def densenet121_k32(num_classes: int) -> nn.Module:
    """The cited paper's growth rate, 32: 6,956,298 parameters for 10 classes."""
    return densenet121(num_classes, growth_rate=32)
