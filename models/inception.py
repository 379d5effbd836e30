"""Inception-V3: torchvision's, with a 32x32 stem and no auxiliary head."""

from torch import nn

from device import import_torchvision

torchvision = import_torchvision()


def inceptionv3(num_classes: int) -> nn.Module:
    """torchvision's Inception-V3 without the stem's strides and pools; its 3x3 convolutions are padded.

    (B, 3, 32, 32) -> (B, num_classes); maps of 32, 15, 7 pixels, close to the 35, 17, 8 of a 299-pixel image.
    Only strides, pools and padding differ, so the weights have torchvision's shapes. Its dropout (0.5) stays.
    21,806,058 parameters for 10 classes, 21,990,468 for 100.
    """
    model = torchvision.models.Inception3(num_classes, aux_logits=False, transform_input=False, init_weights=True)
    model.Conv2d_1a_3x3.conv.stride = (1, 1)
    for block in (model.Conv2d_1a_3x3, model.Conv2d_2a_3x3, model.Conv2d_4a_3x3):
        block.conv.padding = (1, 1)
    model.maxpool1 = nn.Identity()
    model.maxpool2 = nn.Identity()
    return model
