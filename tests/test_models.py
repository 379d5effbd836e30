"""models/: sizes, torchvision's networks with another stem, torch's initialisation, other people's state dicts."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import models
from utils import import_torchvision

torchvision = import_torchvision()

PARAMETERS = {  # for 10 classes
    "resnet18": 11_173_962,
    "densenet121": 1_000_618,
    "densenet121_k32": 6_956_298,
    "inceptionv3": 21_806_058,
    "resnet20": 269_722,
}
MAPS = {
    "resnet18": {"layer1": 32, "layer2": 16, "layer3": 8, "layer4": 4},
    "densenet121": {f"features.denseblock{block}": size for block, size in enumerate((32, 16, 8, 4), start=1)},
    "densenet121_k32": {"features.conv0": 32, "features.norm5": 4},
    "inceptionv3": {"Conv2d_2b_3x3": 32, "Conv2d_4a_3x3": 30, "Mixed_5d": 30, "Mixed_6a": 14, "Mixed_7c": 6},
    "resnet20": {"layer1": 32, "layer2": 16, "layer3": 8},
}


@functools.cache
def built(arch: str) -> nn.Module:
    """Shared among tests that only look at it. Batch norm has the statistics of images, so that logits stay small."""
    torch.manual_seed(0)
    f = models.build_model(arch, 10)
    for module in f.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        f.train()(images(4))
    return f.eval()


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def twin(arch: str) -> nn.Module:
    """torchvision's class as published, its stem changed by hand."""
    vision, conv = torchvision.models, nn.Conv2d
    if arch == "resnet18":
        f = vision.ResNet(vision.resnet.BasicBlock, [2, 2, 2, 2], num_classes=10)
        f.conv1, f.maxpool = conv(3, 64, 3, 1, 1, bias=False), nn.Sequential()
    elif arch.startswith("densenet121"):
        growth = 32 if arch.endswith("k32") else 12
        f = vision.DenseNet(growth, (6, 12, 24, 16), 2 * growth, num_classes=10)
        f.features.conv0 = conv(3, 2 * growth, 3, 1, 1, bias=False)
        f.features.norm0 = f.features.relu0 = f.features.pool0 = nn.Sequential()
    else:
        f, block = vision.inception_v3(num_classes=10, init_weights=False), vision.inception.BasicConv2d
        f.Conv2d_1a_3x3 = block(3, 32, kernel_size=3, padding=1)
        f.Conv2d_2a_3x3 = block(32, 32, kernel_size=3, padding=1)
        f.maxpool1, f.maxpool2, f.AuxLogits, f.aux_logits = nn.Sequential(), nn.Sequential(), None, False
    return f.eval()


@pytest.mark.parametrize("arch", PARAMETERS)
def test_sizes_are_those_stated_and_the_first_layer_sees_the_pixels_themselves(arch):
    f, x, seen, inputs = copy.deepcopy(built(arch)), images(2), {}, []
    assert arch in models.ARCHS
    assert sum(p.numel() for p in f.parameters()) == PARAMETERS[arch]
    for name in MAPS[arch]:
        f.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: tuple(output.shape[2:])})
        )
    first = next(module for module in f.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        assert f(x).shape == (2, 10)
    assert seen == {name: (size, size) for name, size in MAPS[arch].items()}
    assert torch.equal(inputs[0], x)


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "densenet121_k32", "inceptionv3"])
def test_torchvisions_class_with_its_stem_changed_by_hand_has_the_same_names_and_logits(arch):
    f, theirs, x = built(arch), twin(arch), images(2)
    theirs.load_state_dict(f.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), f(x), rtol=1e-4, atol=1e-4)


def test_resnet20_equals_a_loop_written_from_its_paper():
    """He et al. (2016), Sec. 4.2: 3x3 convolutions, {16, 32, 64} filters, 3 blocks each, parameter-free shortcuts."""
    f, x = built("resnet20"), images(2)
    state = f.state_dict()

    def convolve(h: Tensor, conv: str, bn: str, stride: int) -> Tensor:
        h = F.conv2d(h, state[f"{conv}.weight"], stride=stride, padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        mean, var, weight, bias = (state[f"{bn}.{name}"].view(1, -1, 1, 1) for name in names)
        return (h - mean) / (var + 1e-5).sqrt() * weight + bias

    h = convolve(x, "conv1", "bn1", 1).relu()
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            stride, name = 2 if stage > 1 and block == 0 else 1, f"layer{stage}.{block}"
            residual = convolve(h, f"{name}.conv1", f"{name}.bn1", stride).relu()
            residual = convolve(residual, f"{name}.conv2", f"{name}.bn2", 1)
            if stride == 2:
                shortcut = torch.zeros_like(residual)
                shortcut[:, channels // 4 : channels // 4 * 3] = h[:, :, 0::2, 0::2]
                h = shortcut
            h = (h + residual).relu()
    logits = h.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(f(x), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", PARAMETERS)
def test_every_layer_starts_as_a_new_one_of_torchs_does(arch):
    """Two samples of the same distribution; torchvision's own ways (normal, zero bias) are far from it."""
    f = built(arch)  # has not been trained
    for name, module in f.named_modules():
        if isinstance(module, nn.Conv2d):
            new = nn.Conv2d(module.in_channels, module.out_channels, module.kernel_size)
        elif isinstance(module, nn.Linear):
            new = nn.Linear(module.in_features, module.out_features)
            assert (module.bias.abs() > 0).all()
            assert module.bias.abs().max() <= module.in_features**-0.5
        else:
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()
                assert (module.bias == 0).all()
            continue
        ours, theirs = (layer.weight.detach().flatten()[:2000] for layer in (module, new))
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-5, name


def test_build_model_names_what_is_wrong_and_follows_the_seed():
    with pytest.raises(ValueError, match="unknown arch 'vgg': use one of resnet18, densenet121, "):
        models.build_model("vgg", 10)
    with pytest.raises(ValueError, match="num_classes must be at least 2, not 1"):
        models.build_model("resnet20", 1)
    torch.manual_seed(0)
    again, other = models.build_model("resnet20", 10), models.build_model("resnet20", 10)
    assert torch.equal(again.conv1.weight, built("resnet20").conv1.weight)
    assert not torch.equal(other.conv1.weight, again.conv1.weight)


@pytest.mark.parametrize("arch", ["resnet18", "densenet121"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_state_dicts_of_other_repositories_are_matched(arch, prefix):
    f = built(arch)
    state = f.state_dict()
    theirs = {prefix + key.replace("downsample", "shortcut").replace("fc.", "linear."): state[key] for key in state}
    for given in (theirs, {prefix + key: value for key, value in state.items()}):
        before = list(given)
        matched = models.match_state_dict(f, given)
        assert list(given) == before
        assert matched.keys() == state.keys()
        assert all(matched[key] is state[key] for key in state)
    without = {key: value for key, value in theirs.items() if not key.endswith("num_batches_tracked")}
    assert models.match_state_dict(f, without).keys() == state.keys()


def test_a_state_dict_that_does_not_fit_is_named_in_one_line():
    f = built("resnet20")
    for changes, message in (
        ({"fc.weight": torch.zeros(100, 64)}, r"fc\.weight has shape \(100, 64\), not \(10, 64\)$"),
        ({"fc.bias": torch.full((10,), float("nan"))}, r"fc\.bias holds values that are not finite$"),
        ({"conv1.weight": None}, r"conv1\.weight is missing$"),
        ({"features.weight": torch.zeros(1)}, r"features\.weight is unknown$"),
        ({"epoch": 3}, "epoch is no tensor$"),
    ):
        state = {name: value for name, value in (f.state_dict() | changes).items() if value is not None}
        with pytest.raises(ValueError, match=rf"^the checkpoint does not fit this network: {message}"):
            models.match_state_dict(f, state)
    with pytest.raises(ValueError, match=r"^the checkpoint does not fit .*; and \d+ more$") as caught:
        models.match_state_dict(f, built("densenet121").state_dict())
    assert len(str(caught.value)) < 400
