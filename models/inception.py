"""Inception-V3: torchvision's, with a 32x32 stem and no auxiliary head."""

from torch import nn

from utils import import_torchvision

torchvision = import_torchvision()


def inceptionv3(num_classes: int) -> nn.Module:
    """torchvision's Inception-V3 without the stem's strides and pools; of its stem only Conv2d_4a_3x3 is unpadded.

    (B, 3, 32, 32) -> (B, num_classes); maps of 30, 14, 6 pixels. Its dropout (0.5) stays.
    21,806,058 parameters for 10 classes.
    """
    model = torchvision.models.Inception3(num_classes, aux_logits=False, init_weights=False)
    model.Conv2d_1a_3x3.conv.stride = (1, 1)
    model.Conv2d_1a_3x3.conv.padding = model.Conv2d_2a_3x3.conv.padding = (1, 1)
    model.maxpool1 = model.maxpool2 = nn.Identity()
    return model
