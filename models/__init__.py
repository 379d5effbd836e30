"""The networks of Sec. 4 for 32x32 images in [0, 1]. They apply no input normalisation.

    f = models.build_model("resnet18", 10)
    logits = f(x)  # x in [0, 1], (B, 3, 32, 32)

The files beside this one adapt torchvision's networks to 32x32 pixels. State dicts keep
torchvision's key names.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.densenet import densenet121, densenet121_k32
from models.inception import inceptionv3
from models.resnet import resnet18, resnet20

BUILDERS = {
    "resnet18": resnet18,
    "densenet121": densenet121,
    "densenet121_k32": densenet121_k32,
    "inceptionv3": inceptionv3,
    "resnet20": resnet20,
}
ARCHS = tuple(BUILDERS)


def build_model(arch: str, num_classes: int) -> nn.Module:
    """A new network with torch's default initialisation.

    (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes). Draws from torch's global generator.
    Raises ValueError for an unknown arch or fewer than 2 classes.
    """
    if arch not in BUILDERS:
        raise ValueError(f"unknown arch '{arch}'. Use one of {', '.join(ARCHS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, not {num_classes}")
    f = BUILDERS[arch](num_classes)
    # torchvision initialises each network in its own way
    for module in f.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return f


def recompute(f: nn.Module) -> None:
    """Make f keep only the input of each forward pass and compute the pass again during backward.

    Changes f.forward. A step takes about a third longer; loss and gradients are the same. The
    second pass uses the same batch statistics and dropout masks, and does not update batch norm's
    running statistics again.
    """
    # not a closure, in which a deep copy of f would keep this f
    f.forward = functools.partial(_forward_twice, f, f.forward)


def _forward_twice(f: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    def contexts() -> tuple:  # for the first and the second pass
        return nullcontext(), _statistics_fixed(f)

    return checkpoint(forward, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_fixed(f: nn.Module) -> Iterator[None]:
    batch_norm = nn.modules.batchnorm._BatchNorm
    norms = [m for m in f.modules() if isinstance(m, batch_norm)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum, m.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for m, (momentum, count) in zip(norms, before, strict=True):
            m.momentum, m.num_batches_tracked = momentum, count
