"""models/: sizes, names, ResNet-20's paper, initialisation, recomputation and its memory."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import models
from losses import magnma_loss
from utils import torchvision

vision = torchvision.models

SIZES = {  # parameters for 10 classes; side of the maps
    "resnet18": (11_173_962, {"layer1": 32, "layer2": 16, "layer3": 8, "layer4": 4}),
    "densenet121": (1_000_618, {f"features.denseblock{k}": 64 // 2**k for k in (1, 2, 3, 4)}),
    "densenet121_k32": (6_956_298, {f"features.denseblock{k}": 64 // 2**k for k in (1, 2, 3, 4)}),
    "inceptionv3": (22_133_738, {"Conv2d_2b_3x3": 32, "Conv2d_4a_3x3": 30, "Mixed_5d": 30,
                                 "Mixed_6a": 14, "Mixed_7c": 6}),
    "resnet20": (269_722, {"layer1": 32, "layer2": 16, "layer3": 8}),
}  # fmt: skip


@functools.cache
def built(arch: str) -> nn.Module:
    """In train mode: batch norm keeps a new network's activations large."""
    torch.manual_seed(0)
    return models.build_model(arch, 10)


def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", SIZES)
def test_sizes_are_those_stated_and_the_first_layer_sees_the_pixels_themselves(arch):
    f, x, (parameters, maps), seen = copy.deepcopy(built(arch)), images(), SIZES[arch], {}
    assert sum(p.numel() for p in f.parameters()) == parameters
    first = next(name for name, module in f.named_modules() if isinstance(module, nn.Conv2d))
    for name in (first, *maps):
        look = lambda _, inputs, out, name=name: seen.update({name: (inputs[0], out)})  # noqa: E731
        f.get_submodule(name).register_forward_hook(look)
    assert f(x).shape == (4, 10)
    assert {name: seen[name][1].shape[2:] for name in maps} == {k: (s, s) for k, s in maps.items()}
    assert torch.equal(seen[first][0], x)


@pytest.mark.parametrize(
    ("arch", "published", "removed"),
    [("resnet18", vision.resnet18, ()), ("densenet121", vision.densenet121, "features.norm0"),
     ("inceptionv3", functools.partial(vision.inception_v3, init_weights=False), "AuxLogits")],
)  # fmt: skip
def test_key_names_are_torchvisions(arch, published, removed):
    with torch.device("meta"):
        state = published().state_dict()
    kept = [name for name in state if not name.startswith(removed)]
    assert list(built(arch).state_dict()) == kept


def test_the_first_convolution_of_densenet_leads_straight_into_the_first_dense_block():
    names = [name for name, _ in built("densenet121").features.named_children()]
    assert names[:2] == ["conv0", "denseblock1"]


def test_inceptions_batch_norm_and_dropout():
    f = built("inceptionv3")
    assert {m.eps for m in f.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert [m.p for m in f.modules() if isinstance(m, nn.Dropout)] == [0.5]


def test_resnet20_equals_a_loop_written_from_its_paper():
    """He et al. (2016), Sec. 4.2: {16, 32, 64} filters, 3 blocks each, parameter-free shortcuts."""
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
    """Uniform within 1 / sqrt(inputs of a unit), which torchvision's initialisation is far from."""
    for name, module in built(arch).named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).logical_and(module.bias == 0).all()
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            some = module.weight.detach().flatten()[:2000]
            assert stats.kstest(some, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-5, name
        if isinstance(module, nn.Linear):
            assert 0 < module.bias.abs().min() < module.bias.abs().max() <= bound


@pytest.mark.parametrize("arch", SIZES)
def test_a_network_has_as_many_logits_as_classes(arch):
    with torch.device("meta"):
        assert models.build_model(arch, 100)(images().to("meta")).shape == (4, 100)


def test_build_model_names_what_is_wrong_and_follows_the_seed():
    with pytest.raises(ValueError, match=r"unknown arch 'resnet1'. Use one of resnet18, "):
        models.build_model("resnet1", 10)
    with pytest.raises(ValueError, match="num_classes must be at least 2, not 1"):
        models.build_model("resnet20", 1)
    torch.manual_seed(0)
    again, other = models.build_model("resnet20", 10), models.build_model("resnet20", 10)
    assert torch.equal(again.conv1.weight, built("resnet20").conv1.weight)
    assert not torch.equal(other.conv1.weight, again.conv1.weight)


# Recomputation


class Small(nn.Sequential):
    """Batch norm with a moving and with a cumulative average, a frozen one, and dropout."""

    def __init__(self):
        convolutions = [nn.Conv2d(k, 4, 3, padding=1) for k in (3, 4, 4)]
        norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4).eval()]
        layers = [m for pair in zip(convolutions, norms, strict=True) for m in pair]
        super().__init__(*layers, nn.Dropout(0.5), nn.Flatten(), nn.Linear(4096, 10))


def test_recompute_changes_neither_gradients_nor_statistics_nor_a_frozen_batch_norm():
    torch.manual_seed(0)
    plain = Small()
    recomputed = copy.deepcopy(plain)
    models.recompute(recomputed)
    for f in (plain, recomputed):
        torch.manual_seed(1)
        (f(images()) + f(1 - images())).square().sum().backward()  # two passes, as two copies
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    torch.testing.assert_close(recomputed.state_dict(), plain.state_dict(), rtol=0, atol=0)
    norms = [m for m in recomputed if isinstance(m, nn.BatchNorm2d)]
    assert [(m.training, m.momentum) for m in norms] == [(True, 0.1), (True, None), (False, 0.1)]
    assert [int(m.num_batches_tracked) for m in norms] == [2, 2, 0]
    other = copy.deepcopy(recomputed)  # e.g. an average of weights
    for p in other.parameters():
        p.data.zero_()
    assert other(images()).abs().max() == 0 < recomputed(images()).abs().max()


@pytest.mark.parametrize("arch", ["densenet121", "inceptionv3"])
def test_magnma_fits_a_v100_with_recompute_and_only_with_it(arch):
    """What a step of 512 images in half precision keeps for its backward pass, in GiB."""

    def kept(f: nn.Module) -> float:
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            magnma_loss(f, x, y)
        return sum(storage.nbytes() for storage in storages.values()) / 2**30

    with torch.device("meta"):
        f = models.build_model(arch, 10).half()
        x, y = torch.empty(512, 3, 32, 32, dtype=torch.half), torch.empty(512, dtype=torch.long)
    assert kept(f) > 30
    models.recompute(f)
    assert kept(f) < 1
