"""The networks of Sec. 4 for 32x32 images, with the normalisation of their input inside.

    model = models.build_model("resnet18", 10, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262))
    logits = model(x)  # x in [0, 1], (B, 3, 32, 32)

Each file beside this one makes one torchvision network fit 32x32 pixels. The state-dict keys are torchvision's own:
the mean and deviation are buffers outside the state dict, applied by a hook before `forward`, so that the same
network drops into RobustBench or an attack library as it is.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.densenet import densenet121
from models.inception import inceptionv3
from models.resnet import resnet18, resnet20

BUILDERS = {"resnet18": resnet18, "densenet121": densenet121, "inceptionv3": inceptionv3, "resnet20": resnet20}
ARCHS = tuple(BUILDERS)


def build_model(arch: str, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """A freshly initialised network (torch's global generator): (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes).

    `arch` is one of ARCHS; `mean` and `std` are the three channels' statistics of the training images in [0, 1].
    Raises ValueError for an unknown arch, fewer than 2 classes, and a mean or std that is not three finite numbers,
    or a std that is not positive.
    """
    if arch not in BUILDERS:
        raise ValueError(f"unknown arch '{arch}': use one of {', '.join(ARCHS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, not {num_classes}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name} must be three finite numbers, one a channel, not {list(values)}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, not {list(std)}")
    model = BUILDERS[arch](num_classes)
    for name, values in (("mean", mean), ("std", std)):
        model.register_buffer(name, torch.tensor([float(value) for value in values]).view(1, 3, 1, 1), persistent=False)
    model.register_forward_pre_hook(_normalize)
    return model


def _normalize(model: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """The hook of `build_model`: (x - mean) / std per channel."""
    (x,) = inputs
    return (x - model.mean) / model.std


def match_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the key names of `model`, ready for `load_state_dict(strict=True)`; neither argument is changed.

    Accepts the model's own names (torchvision's) and those common in CIFAR repositories (`layer2.0.shortcut.0` for
    `layer2.0.downsample.0`, `linear` for `fc`), with any prefix of `module.` and `_orig_mod.`. The count
    `num_batches_tracked`, which old files lack and nothing here reads, may be missing.
    Raises ValueError with the first mismatches in one line: missing or unknown names, other shapes, values that are
    not finite, entries that are not tensors.
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
