"""DenseNet-121: torchvision's, with a 32x32 stem."""

from torch import nn

from device import import_torchvision

torchvision = import_torchvision()


def densenet121(num_classes: int) -> nn.Module:
    """torchvision's DenseNet-121 with a 3x3 stride-1 first convolution and no pooling before the first dense block.

    (B, 3, 32, 32) -> (B, num_classes); maps of 32, 16, 8, 4 pixels.
    6,956,426 parameters for 10 classes, 7,048,676 for 100.
    """
    model = torchvision.models.densenet121(num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)  # as torchvision's
    del model.features.pool0
    return model
