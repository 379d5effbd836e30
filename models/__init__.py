"""The networks of Sec. 4 for 32x32 images. They take pixels in [0, 1] as they are, without normalisation.

    model = models.build_model("resnet18", 10)
    logits = model(x)  # x in [0, 1], (B, 3, 32, 32)

Each file beside this one makes a torchvision network fit 32x32 pixels; state dicts have torchvision's key names.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
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
    """A new network with torch's default initialisation: (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes).

    Draws from torch's global generator. Raises ValueError for an unknown arch or fewer than 2 classes.
    """
    if arch not in BUILDERS:
        raise ValueError(f"unknown arch '{arch}': use one of {', '.join(ARCHS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, not {num_classes}")
    model = BUILDERS[arch](num_classes)
    for module in model.modules():  # torchvision's constructors initialise in ways of their own
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def match_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the key names of `model`, ready for `load_state_dict(strict=True)`; neither argument is changed.

    Understands torchvision's names, those of CIFAR repositories (`layer2.0.shortcut.0` for `layer2.0.downsample.0`,
    `linear` for `fc`), a `module.` or `_orig_mod.` before them, and files without `num_batches_tracked`.
    Raises ValueError with the first mismatches in one line.
    """
    expected = model.state_dict()
    matched, problems = {}, []
    for name, value in state.items():
        key = str(name)
        while key.startswith(("module.", "_orig_mod.")):
            key = key.split(".", 1)[1]
        if key not in expected:
            key = ".".join({"shortcut": "downsample", "linear": "fc"}.get(part, part) for part in key.split("."))
        if not isinstance(value, Tensor):
            problems.append(f"{name} is no tensor")
        elif key not in expected:
            problems.append(f"{name} is unknown")
        elif key in matched:
            problems.append(f"{name} is there twice")
        elif value.shape != expected[key].shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, not {tuple(expected[key].shape)}")
        elif not torch.isfinite(value).all():
            problems.append(f"{name} holds values that are not finite")
        matched[key] = value
    for key, value in expected.items():
        if key not in matched and key.endswith("num_batches_tracked"):
            matched[key] = value.clone()
        elif key not in matched:
            problems.append(f"{key} is missing")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the checkpoint does not fit this network: {'; '.join(problems[:4])}{more}")
    return matched


def recompute(f: nn.Module) -> None:
    """Let f keep the input of each forward pass alone, and compute the pass again in the backward pass.

    The second pass has the same batch statistics and the same dropout, and leaves the running statistics alone.
    """
    once = f.forward

    @contextmanager
    def statistics_fixed() -> Iterator[None]:
        kind = nn.modules.batchnorm._BatchNorm
        norms = [(m, m.momentum, m.num_batches_tracked) for m in f.modules() if isinstance(m, kind)]
        for m, _, _ in norms:
            m.momentum, m.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for m, momentum, count in norms:
                m.momentum, m.num_batches_tracked = momentum, count

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:  # of the first pass, and of the second
        return nullcontext(), statistics_fixed()

    f.forward = lambda x: checkpoint(once, x, use_reentrant=False, context_fn=contexts)
