"""models/: sizes, names, ResNet-20's paper, torch's initialisation, other people's state dicts."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import models
from utils import import_torchvision

vision = import_torchvision().models

SIZES = {  # parameters for 10 classes; side of the maps
    "resnet18": (11_173_962, {"layer1": 32, "layer2": 16, "layer3": 8, "layer4": 4}),
    "densenet121": (1_000_618, {f"features.denseblock{k}": 64 // 2**k for k in (1, 2, 3, 4)}),
    "densenet121_k32": (6_956_298, {f"features.denseblock{k}": 64 // 2**k for k in (1, 2, 3, 4)}),
    "inceptionv3": (21_806_058, {"Conv2d_2b_3x3": 32, "Conv2d_4a_3x3": 30, "Mixed_5d": 30, "Mixed_6a": 14,
                                 "Mixed_7c": 6}),
    "resnet20": (269_722, {"layer1": 32, "layer2": 16, "layer3": 8}),
}  # fmt: skip


@functools.cache
def built(arch: str) -> nn.Module:
    """Shared by all tests. It stays in train mode, where batch norm keeps the activations of a new network large."""
    torch.manual_seed(0)
    return models.build_model(arch, 10)


def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", SIZES)
def test_sizes_are_those_stated_and_the_first_layer_sees_the_pixels_themselves(arch):
    f, x, (parameters, maps), seen, inputs = copy.deepcopy(built(arch)), images(), SIZES[arch], {}, []
    assert sum(p.numel() for p in f.parameters()) == parameters
    for name in maps:
        hook = functools.partial(lambda name, _module, _inputs, output: seen.update({name: output.shape[2:]}), name)
        f.get_submodule(name).register_forward_hook(hook)
    first = next(module for module in f.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    assert f(x).shape == (4, 10)
    assert seen == {name: (side, side) for name, side in maps.items()}
    assert torch.equal(inputs[0], x)


@pytest.mark.parametrize(
    ("arch", "published", "removed"),
    [
        ("resnet18", vision.resnet18, ()),
        ("densenet121", vision.densenet121, "features.norm0"),
        ("inceptionv3", functools.partial(vision.inception_v3, init_weights=False), "AuxLogits"),
    ],
)
def test_key_names_are_torchvisions(arch, published, removed):
    with torch.device("meta"):
        theirs = published().state_dict()
    assert list(built(arch).state_dict()) == [name for name in theirs if not name.startswith(removed)]


def test_the_first_convolution_of_densenet_leads_straight_into_the_first_dense_block():
    assert [name for name, _ in built("densenet121").features.named_children()][:2] == ["conv0", "denseblock1"]


def test_resnet20_equals_a_loop_written_from_its_paper():
    """He et al. (2016), Sec. 4.2: 3x3 convolutions, {16, 32, 64} filters, 3 blocks each, parameter-free shortcuts."""
    f = built("resnet20")
    state = dict(f.named_parameters())

    def convolve(h: Tensor, conv: str, bn: str, stride: int) -> Tensor:
        h = F.conv2d(h, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, correction=0)
        weight, bias = (state[f"{bn}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        return (h - mean) / (var + 1e-5).sqrt() * weight + bias

    h = convolve(images(), "conv1", "bn1", 1).relu()
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
    torch.testing.assert_close(f(images()), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", SIZES)
def test_every_layer_starts_as_torch_starts_it(arch):
    """Uniform within 1 / sqrt(inputs of a unit); torchvision's own ways (normal, zero bias) are far from it."""
    for name, module in built(arch).named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            some = module.weight.detach().flatten()[:2000]
            assert stats.kstest(some, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-5, name
        if isinstance(module, nn.Linear):
            assert (module.bias.abs() > 0).all()
            assert module.bias.abs().max() <= bound


def test_build_model_names_what_is_wrong_and_follows_the_seed():
    with pytest.raises(ValueError, match="unknown arch 'resnet1': use one of resnet18, densenet121, "):
        models.build_model("resnet1", 10)
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
    renamed = {key: key.replace("downsample", "shortcut").replace("fc.", "linear.") for key in state}
    for names in (renamed, {key: key for key in state}):
        matched = models.match_state_dict(f, {prefix + names[key]: value for key, value in state.items()})
        assert matched.keys() == state.keys()
        assert all(matched[key] is state[key] for key in state)
    without = {renamed[key]: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert models.match_state_dict(f, without).keys() == state.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.weight": torch.zeros(100, 64)}, r"fc\.weight has shape \(100, 64\), not \(10, 64\)$"),
        ({"fc.bias": torch.full((10,), float("nan"))}, r"fc\.bias holds values that are not finite$"),
        ({"conv1.weight": None}, r"conv1\.weight is missing$"),
        ({"features.weight": torch.zeros(1)}, r"features\.weight is unknown$"),
        ({"module.fc.bias": torch.zeros(10)}, r"module\.fc\.bias is there twice$"),
        ({"epoch": 3}, "epoch is no tensor$"),
        (dict.fromkeys("abcdef", 0), r".*; and 2 more$"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_named_in_one_line(changes, message):
    f = built("resnet20")
    state = {name: value for name, value in (f.state_dict() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=rf"^the checkpoint does not fit this network: {message}"):
        models.match_state_dict(f, state)
