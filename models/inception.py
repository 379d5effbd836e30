"""Inception-V3: torchvision's, with a 32x32 stem and no auxiliary head."""

from torch import nn

from utils import torchvision


def inceptionv3(num_classes: int) -> nn.Module:
    """torchvision's Inception-V3, changed as in the authors' other public code (NOTES.md).

    (B, 3, 32, 32) -> (B, num_classes); maps of 30, 14, 6 pixels. The stem has no strides and no
    pools, and only its last convolution is unpadded. In the three InceptionA blocks the convolution
    after the pool is 3x3. Batch norm's eps is 1e-5. Dropout 0.5 stays.
    22,133,738 parameters for 10 classes.
    """
    f = torchvision.models.Inception3(num_classes, aux_logits=False, init_weights=False)
    f.Conv2d_1a_3x3.conv.stride = (1, 1)
    f.Conv2d_1a_3x3.conv.padding = f.Conv2d_2a_3x3.conv.padding = (1, 1)
    f.maxpool1 = f.maxpool2 = nn.Identity()
    for block in (f.Mixed_5b, f.Mixed_5c, f.Mixed_5d):
        conv = block.branch_pool.conv
        block.branch_pool.conv = nn.Conv2d(
            conv.in_channels, conv.out_channels, kernel_size=3, padding=1, bias=False
        )
    for module in f.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    return f
