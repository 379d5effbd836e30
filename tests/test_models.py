"""The networks: sizes, torchvision's weights and names, normalisation inside, other people's state dicts."""

import copy
import functools
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from device import import_torchvision

torchvision = import_torchvision()

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
PARAMETERS = {
    "resnet18": (11_173_962, 11_220_132),
    "densenet121": (6_956_426, 7_048_676),
    "inceptionv3": (21_806_058, 21_990_468),
    "resnet20": (269_722, 275_572),
}


def build(arch: str, num_classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return models.build_model(arch, num_classes, MEAN, STD)


def images(count: int, **options: object) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(**options)


def settle(model: nn.Module) -> nn.Module:
    """Give batch norm the statistics of one batch, so that an untrained network's logits stay small in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images(4))
    return model.eval()


@functools.cache
def settled(arch: str) -> nn.Module:
    """The settled network of `build(arch)`, shared among tests that only look at it."""
    return settle(build(arch))


def torchvision_twin(arch: str) -> nn.Module:
    """torchvision's class as published, its stem swapped by hand; no normalisation."""
    if arch == "resnet18":
        twin = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=10)
        twin.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        twin.maxpool = nn.Sequential()
    elif arch == "densenet121":
        twin = torchvision.models.DenseNet(32, (6, 12, 24, 16), 64, num_classes=10)
        twin.features.conv0 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        twin.features.pool0 = nn.Sequential()
    else:
        twin = torchvision.models.inception_v3(num_classes=10, init_weights=False)
        block = torchvision.models.inception.BasicConv2d
        twin.Conv2d_1a_3x3 = block(3, 32, kernel_size=3, padding=1)
        twin.Conv2d_2a_3x3 = block(32, 32, kernel_size=3, padding=1)
        twin.Conv2d_4a_3x3 = block(80, 192, kernel_size=3, padding=1)
        twin.maxpool1 = twin.maxpool2 = nn.Sequential()
        twin.AuxLogits, twin.aux_logits = None, False
    return twin


@pytest.mark.parametrize("arch", models.ARCHS)
def test_parameter_counts_are_those_stated(arch):
    counts = tuple(sum(p.numel() for p in build(arch, classes).parameters()) for classes in (10, 100))
    assert counts == PARAMETERS[arch]
    doc = models.BUILDERS[arch].__doc__
    assert all(f"{count:,}" in doc for count in counts)


@pytest.mark.parametrize("arch", models.ARCHS)
def test_two_images_give_finite_logits_and_gradients_in_train_and_eval_mode(arch):
    model = build(arch, 7)
    for mode in (True, False):
        model.train(mode).zero_grad()
        logits = model(images(2))
        assert logits.shape == (2, 7)
        F.cross_entropy(logits, torch.tensor([0, 6])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("arch", models.ARCHS)
def test_eval_mode_is_deterministic_and_blind_to_the_batch(arch):
    model = settled(arch)
    with torch.no_grad():
        logits = model(images(4))
        assert torch.equal(model(images(4)), logits)
        torch.testing.assert_close(model(images(4)[2:]), logits[2:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", models.ARCHS)
def test_normalisation_inside_equals_normalising_by_hand(arch):
    model = settled(arch)
    plain = models.build_model(arch, 10, (0, 0, 0), (1, 1, 1)).eval()
    plain.load_state_dict(model.state_dict())
    x = images(2)
    normalised = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(normalised), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(x), plain(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("arch", models.ARCHS)
def test_normalisation_is_no_part_of_the_state_dict(arch):
    model = build(arch)
    names = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    assert names == {"mean", "std"}


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "inceptionv3"])
def test_state_dict_keys_are_those_of_torchvisions_own_network(arch):
    builder = {"inceptionv3": "inception_v3"}.get(arch, arch)
    options = {"init_weights": False} if arch == "inceptionv3" else {}
    published = getattr(torchvision.models, builder)(**options).state_dict()
    published = {key: value.shape for key, value in published.items() if not key.startswith("AuxLogits.")}
    ours = {key: value.shape for key, value in build(arch, 1000).state_dict().items()}
    assert list(ours) == list(published)
    stem = {"resnet18": {"conv1.weight"}, "densenet121": {"features.conv0.weight"}, "inceptionv3": set()}[arch]
    assert {key for key in ours if ours[key] != published[key]} == stem


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "inceptionv3"])
def test_torchvisions_class_with_its_stem_swapped_by_hand_gives_the_same_logits(arch):
    model = settled(arch)
    twin = torchvision_twin(arch).eval()
    twin.load_state_dict(model.state_dict())
    x = images(2)
    with torch.no_grad():
        torch.testing.assert_close(twin((x - model.mean) / model.std), model(x), rtol=1e-4, atol=1e-4)


def test_the_maps_shrink_as_documented():
    places = {
        "resnet18": {"layer1": 32, "layer2": 16, "layer3": 8, "layer4": 4},
        "densenet121": {f"features.denseblock{block}": size for block, size in enumerate((32, 16, 8, 4), start=1)},
        "inceptionv3": {"Mixed_5b": 32, "Mixed_6a": 15, "Mixed_7a": 7, "Mixed_7c": 7},
        "resnet20": {"layer1": 32, "layer2": 16, "layer3": 8},
    }
    for arch, sizes in places.items():
        model, seen = build(arch).eval(), {}
        for name in sizes:
            model.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name, seen=seen: seen.update({name: tuple(output.shape[2:])})
            )
        with torch.no_grad():
            model(images(1))
        assert seen == {name: (size, size) for name, size in sizes.items()}, arch


def test_resnet20_equals_a_loop_written_from_the_paper():
    """He et al. (2016), Sec. 4.2: 3x3 convolutions, {16, 32, 64} filters, 3 blocks each, parameter-free shortcuts."""
    model = settled("resnet20")
    state = model.state_dict()
    x = images(2)

    def convolve(h, conv, bn, stride):
        h = F.conv2d(h, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var, weight, bias = (
            state[f"{bn}.{name}"].view(1, -1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (h - mean) / (var + 1e-5).sqrt() * weight + bias

    h = convolve((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), "conv1", "bn1", 1).relu()
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            stride = 2 if stage > 1 and block == 0 else 1
            name = f"layer{stage}.{block}"
            residual = convolve(h, f"{name}.conv1", f"{name}.bn1", stride).relu()
            residual = convolve(residual, f"{name}.conv2", f"{name}.bn2", 1)
            if stride == 2:
                shortcut = torch.zeros_like(residual)
                shortcut[:, channels // 4 : channels // 4 * 3] = h[:, :, 0::2, 0::2]
                h = shortcut
            h = (h + residual).relu()
    logits = h.mean(dim=(2, 3)) @ state["fc.weight"].T + state["fc.bias"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", models.ARCHS)
def test_channels_last_and_float64_give_the_same_logits(arch):
    model = settled(arch)
    x = images(2)
    with torch.no_grad():
        logits = model(x)
        twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
        torch.testing.assert_close(twin(x.contiguous(memory_format=torch.channels_last)), logits, rtol=1e-3, atol=1e-3)
        doubled = copy.deepcopy(model).double()(x.double())
        assert doubled.dtype == torch.float64
        torch.testing.assert_close(doubled.float(), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", models.ARCHS)
def test_the_initialisation_follows_the_seed_and_the_documented_scale(arch):
    model, again = build(arch), build(arch).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 400:
            out_channels, in_channels, height, width = module.weight.shape
            fan = (in_channels if arch == "densenet121" else out_channels) * height * width
            expected = 0.1 if arch == "inceptionv3" else (2 / fan) ** 0.5
            tolerance = 5 * (2 * module.weight.numel()) ** -0.5  # five standard errors of a sample deviation
            assert module.weight.std().item() == pytest.approx(expected, rel=tolerance), name


def test_build_model_names_what_is_wrong():
    with pytest.raises(ValueError, match="unknown arch 'vgg': use one of resnet18, densenet121, inceptionv3, resnet20"):
        models.build_model("vgg", 10, MEAN, STD)
    with pytest.raises(ValueError, match="num_classes must be at least 2, not 1"):
        models.build_model("resnet20", 1, MEAN, STD)
    with pytest.raises(ValueError, match="mean must be three finite numbers"):
        models.build_model("resnet20", 10, (0.5,), STD)
    with pytest.raises(ValueError, match="std must be three finite numbers"):
        models.build_model("resnet20", 10, MEAN, (0.5, 0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="mean must be three finite numbers"):
        models.build_model("resnet20", 10, (0.5, float("nan"), 0.5), STD)
    for bad in (0.0, -0.2):
        with pytest.raises(ValueError, match="std must be positive"):
            models.build_model("resnet20", 10, MEAN, (0.2, bad, 0.2))


def test_the_network_passes_through_robustbenchs_clean_accuracy():
    """The calling convention of robustbench.utils.clean_accuracy(model, x, y, batch_size, device)."""

    def clean_accuracy(model, x, y, batch_size=100, device=None):
        if device is None:
            device = x.device
        correct = 0.0
        with torch.no_grad():
            for start in range(0, x.shape[0], batch_size):
                x_batch = x[start : start + batch_size].to(device)
                y_batch = y[start : start + batch_size].to(device)
                correct += (model(x_batch).max(1)[1] == y_batch).float().sum()
        return correct.item() / x.shape[0]

    model = settled("resnet20")
    x = images(23)
    with torch.no_grad():
        predicted = torch.cat([model(image[None]).argmax(1) for image in x])
    y = predicted.clone()
    y[:5] = (y[:5] + 1) % 10
    assert clean_accuracy(model, x, y, batch_size=10, device=torch.device("cpu")) == pytest.approx(18 / 23)


def foreign_names(state: dict, prefix: str = "") -> dict:
    """The names of CIFAR repositories: `shortcut` for `downsample`, `linear` for `fc`."""
    return {prefix + key.replace("downsample", "shortcut").replace("fc.", "linear."): state[key] for key in state}


@pytest.mark.parametrize("arch", ["resnet18", "resnet20"])
def test_state_dicts_of_other_repositories_are_matched(arch):
    source, model = build(arch), models.build_model(arch, 10, MEAN, STD)
    state = source.state_dict()
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        for given in (foreign_names(state, prefix), {prefix + key: value for key, value in state.items()}):
            before = list(given)
            matched = models.match_state_dict(model, given)
            assert list(given) == before
            assert matched.keys() == state.keys()
            assert all(matched[key] is state[key] for key in state)
    model.load_state_dict(matched, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("arch", ["densenet121", "inceptionv3"])
def test_torchvision_names_are_matched_for_the_other_networks(arch):
    model = build(arch)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    model.load_state_dict(models.match_state_dict(model, state), strict=True)


def test_a_network_written_like_those_of_cifar_repositories_gives_the_same_logits_after_matching():
    """Not only the names: the layer order of such a repository's ResNet-18 means the same function here."""

    class Block(nn.Module):
        def __init__(self, inside, outside, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
            self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
            project = [nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)]
            self.shortcut = nn.Sequential(*(project if stride == 2 else []))

        def forward(self, h):
            return (self.bn2(self.conv2(self.bn1(self.conv1(h)).relu())) + self.shortcut(h)).relu()

    def stage(inside, outside, stride):
        return nn.Sequential(Block(inside, outside, stride), Block(outside, outside, 1))

    torch.manual_seed(3)
    foreign = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 64, 3, 1, 1, bias=False), bn1=nn.BatchNorm2d(64), relu=nn.ReLU(),
            layer1=stage(64, 64, 1), layer2=stage(64, 128, 2), layer3=stage(128, 256, 2), layer4=stage(256, 512, 2),
            pool=nn.AvgPool2d(4), flatten=nn.Flatten(), linear=nn.Linear(512, 10),
        )
    )  # fmt: skip
    settle(foreign)
    model = models.build_model("resnet18", 10, MEAN, STD).eval()
    model.load_state_dict(models.match_state_dict(model, foreign.state_dict()))
    x = images(2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), foreign((x - model.mean) / model.std), rtol=1e-4, atol=1e-4)


def test_a_state_dict_without_batch_counts_is_accepted():
    model = build("resnet20")
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert models.match_state_dict(model, state).keys() == model.state_dict().keys()


def changed(model: nn.Module, **changes: object) -> dict:
    """The network's state dict with some entries replaced, or taken out where the new value is None."""
    state = model.state_dict() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc__weight": torch.zeros(100, 64)}, r"fc\.weight has shape \(100, 64\), not \(10, 64\)"),
        ({"fc__bias": torch.full((10,), float("nan"))}, r"fc\.bias holds values that are not finite"),
        ({"conv1__weight": None}, r"conv1\.weight is missing"),
        ({"features__weight": torch.zeros(1)}, r"features\.weight is unknown"),
        ({"linear__bias": torch.zeros(10)}, r"linear\.bias is there twice"),
        ({"epoch": 3}, "epoch is no tensor"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_named_in_one_line(changes, message):
    model = build("resnet20")
    with pytest.raises(ValueError, match=message) as caught:
        models.match_state_dict(model, changed(model, **changes))
    assert "\n" not in str(caught.value)


def test_a_state_dict_of_another_network_names_the_first_mismatches_and_counts_the_rest():
    with pytest.raises(ValueError, match=r"does not fit this network: .*; and \d+ more$") as caught:
        models.match_state_dict(build("resnet20"), build("densenet121").state_dict())
    assert str(caught.value).count("is unknown") == 4
    assert len(str(caught.value)) < 400
