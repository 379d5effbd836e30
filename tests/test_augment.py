"""augment.py and draws.py: against Pillow and torchvision image by image, with the same draws; their distributions."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats

import augment
from augment import (
    OPERATIONS,
    affine,
    augmix,
    autocontrast,
    equalize,
    gaussian_noise,
    mixed_augmentation,
    operate,
    posterize,
    preprocess,
    solarize,
)
from device import import_torchvision
from draws import Draws, as_draws

F = import_torchvision().transforms.functional


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pillow(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def sample_images() -> torch.Tensor:
    """Noise, narrow and wide histograms, smooth ramps, constant channels, two levels, one pixel unlike the rest."""
    g = seeded(0)
    noise = torch.randint(0, 256, (20, 3, 32, 32), generator=g)
    spread, centre = torch.rand(60, 3, 1, 1, generator=g) * 60, torch.rand(60, 3, 1, 1, generator=g) * 255
    bell = (centre + spread * torch.randn(60, 3, 32, 32, generator=g)).clamp(0, 255).long()
    slope = torch.rand(20, 3, 1, 1, generator=g) * 8
    ramp = (slope * torch.arange(32.0) + (8 - slope) * torch.arange(32.0).view(-1, 1)).clamp(0, 255).long()
    constant = torch.randint(0, 256, (10, 3, 1, 1), generator=g).expand(-1, -1, 32, 32)
    levels = torch.randint(0, 256, (2, 60, 3, 1, 1), generator=g)
    two = torch.where(torch.rand(60, 3, 32, 32, generator=g) < torch.rand(60, 1, 1, 1, generator=g), *levels)
    extremes = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 255)]).long()
    lone = constant.clone()
    lone[:, :, 5, 7] = 255 - lone[:, :, 5, 7]
    single_channel = bell[:10].clone()
    single_channel[:, 1] = 77
    return torch.cat([noise, bell, ramp, constant, two, extremes, lone, single_channel]).to(torch.uint8)


def real_images(folder) -> torch.Tensor:
    with open(folder / "cifar-10-batches-py" / "test_batch", "rb") as file:
        batch = pickle.load(file, encoding="latin1")
    return torch.from_numpy(np.array(batch["data"][:300])).view(-1, 3, 32, 32)


def assert_same_as_pillow(ours: torch.Tensor, images: torch.Tensor, operation) -> None:
    theirs = torch.stack([from_pillow(operation(to_pillow(image), i)) for i, image in enumerate(images)])
    wrong = (ours != theirs).flatten(1).any(1).nonzero().squeeze(1).tolist()
    assert ours.dtype == torch.uint8
    assert wrong == []


def check_level_operations(images: torch.Tensor) -> None:
    bits = torch.randint(1, 9, (len(images),), generator=seeded(1))
    threshold = torch.randint(0, 257, (len(images),), generator=seeded(2))
    assert_same_as_pillow(autocontrast(images), images, lambda image, i: ImageOps.autocontrast(image))
    assert_same_as_pillow(equalize(images), images, lambda image, i: ImageOps.equalize(image))
    assert_same_as_pillow(posterize(images, bits), images, lambda image, i: ImageOps.posterize(image, int(bits[i])))
    assert_same_as_pillow(
        solarize(images, threshold), images, lambda image, i: ImageOps.solarize(image, int(threshold[i]))
    )


# Operations


def test_level_operations_equal_pillow_bit_for_bit():
    check_level_operations(sample_images())


@pytest.mark.cifar
def test_level_operations_equal_pillow_bit_for_bit_on_real_images(real_cifar):
    check_level_operations(real_images(real_cifar))


def test_autocontrast_equals_pillow_whatever_the_extreme_levels():
    lo, hi = torch.triu_indices(256, 256, offset=1)
    pairs = torch.nn.functional.pad(torch.stack([lo, hi], 1), (0, 0, 0, -len(lo) % 3)).view(-1, 3, 2)
    lo, hi = pairs[:, :, :1], pairs[:, :, 1:]
    images = (lo + torch.arange(256) % (hi - lo + 1)).to(torch.uint8).view(-1, 3, 16, 16)  # every level in between
    images = images[torch.randperm(len(images), generator=seeded(3))[:800]]  # that is 2,400 of the 32,640 pairs
    assert_same_as_pillow(autocontrast(images), images, lambda image, i: ImageOps.autocontrast(image))


def test_extreme_levels_of_posterize_and_solarize():
    images = sample_images()
    ones = torch.ones(len(images), dtype=torch.int64)
    assert posterize(images, 0 * ones).max() == 0  # Pillow refuses 0 bits
    assert torch.equal(posterize(images, 8 * ones), images)
    assert torch.equal(solarize(images, 256 * ones), images)
    assert torch.equal(solarize(images, 0 * ones), 255 - images)


def pillow_geometry(name: str, image: Image.Image, v: float) -> Image.Image:
    """AugMix's geometric operations as its paper's code states them, at the signed level v."""
    shear, pixels = 0.3 * v / 10, int(32 / 3 * v / 10)
    if name == "rotate":
        return image.rotate(int(30 * v / 10), resample=Image.Resampling.BILINEAR)
    matrix = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, pixels, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, pixels),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


@pytest.mark.parametrize("name", OPERATIONS[4:])
def test_geometry_follows_pillow(name):
    images = sample_images()[::4]
    for v in (-10.0, -2.9, -0.3, 0.0, 0.7, 1.9, 3.0):
        count = len(images)
        ours = operate(images, torch.full((count,), OPERATIONS.index(name)), torch.full((count,), v))
        theirs = torch.stack([from_pillow(pillow_geometry(name, to_pillow(image), v)) for image in images])
        distance = (ours.int() - theirs.int()).abs()
        assert (distance <= 1).float().mean() > 0.9999
        assert (distance == 0).float().mean() > 0.99
        if name.startswith("translate") or v == 0:
            assert distance.max() == 0


def test_affine_follows_pillow_for_any_matrix_per_image():
    images = sample_images()[:80]
    g = seeded(4)
    identity = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=torch.float64)
    spread = torch.tensor([0.4, 0.4, 8, 0.4, 0.4, 8], dtype=torch.float64)
    matrix = identity + spread * (2 * torch.rand(80, 6, generator=g, dtype=torch.float64) - 1)
    matrix[0] = torch.tensor([1, 0, -0.5, 0, 1, 0.5])  # positions exactly on the image's border
    theirs = torch.stack(
        [
            from_pillow(image.transform((32, 32), Image.Transform.AFFINE, row, resample=Image.Resampling.BILINEAR))
            for image, row in zip(map(to_pillow, images), matrix.tolist(), strict=True)
        ]
    )
    distance = (affine(images, matrix).int() - theirs.int()).abs()
    assert distance[0].max() <= 1
    assert (distance <= 1).float().mean() > 0.999
    assert (distance == 0).float().mean() > 0.99


def test_operate_gives_each_image_its_own_operation():
    images = sample_images()
    g = seeded(5)
    op = torch.randint(-1, len(OPERATIONS), (len(images),), generator=g)
    v = 6 * torch.rand(len(images), generator=g) - 3
    together = operate(images, op, v)
    for i in range(len(images)):
        assert torch.equal(together[i : i + 1], operate(images[i : i + 1], op[i : i + 1], v[i : i + 1]))
    assert torch.equal(together[op == -1], images[op == -1])


# Preprocessing


@pytest.mark.parametrize("hflip", [True, False])
def test_preprocess_equals_torchvision_on_pillow_images_with_the_same_draws(hflip):
    images = sample_images()
    count = len(images)
    ours = preprocess(images, hflip, seeded(6))
    crop, order, factors, _ = augment.draw_preprocessing(as_draws(seeded(6), images), count, 32, hflip)
    draws = as_draws(seeded(6), images)  # again, up to the angle, which draw_preprocessing makes a matrix of
    draws.integers((count, 2), 0, 9)
    if hflip:
        draws.integers((count, 1), 0, 2)
    draws.integers((count,), 0, 6)
    degrees = draws.uniform((count,), -2, 2, host=True)

    def per_image(image: Image.Image, i: int) -> Image.Image:
        top, left, mirrored = crop[i].tolist()
        image = F.crop(F.pad(image, 4), top, left, 32, 32)
        image = F.hflip(image) if mirrored else image
        for kind in order[i].tolist():
            image = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[kind](image, float(factors[i, kind]))
        return F.rotate(image, float(degrees[i]))

    assert_same_as_pillow(ours, images, per_image)


def test_preprocessing_draws_are_those_of_sec_4():
    count = 6000
    crop, order, factors, matrix = augment.draw_preprocessing(Draws(seeded(7), seeded(8)), count, 32, True)
    for corner in crop[:, :2].unbind(1):
        assert stats.chisquare(corner.bincount(minlength=9)).pvalue > 0.001
    assert stats.chisquare(crop[:, 2].bincount(minlength=2)).pvalue > 0.001
    orders = (order * torch.tensor([9, 3, 1])).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 6
    assert stats.chisquare(orders).pvalue > 0.001
    for factor in factors.unbind(1):
        assert stats.kstest(factor, stats.uniform(0.75, 0.5).cdf).pvalue > 0.001
    degrees = torch.rad2deg(torch.atan2(matrix[:, 3].double(), matrix[:, 0].double()))
    assert stats.kstest(degrees, stats.uniform(-2, 4).cdf).pvalue > 0.001
    crop, *_ = augment.draw_preprocessing(Draws(seeded(7), seeded(8)), count, 32, False)
    assert crop[:, 2].max() == 0


# MAGNMA's perturbations


def test_gaussian_noise_has_a_uniform_sigma_per_image_and_is_not_clipped():
    x = torch.full((1500, 3, 32, 32), 0.1)
    delta = (gaussian_noise(x, 0.2, seeded(9)) - x).flatten(1)
    sigma = delta.std(1)
    assert stats.kstest(sigma, stats.uniform(0, 0.2).cdf).pvalue > 0.001
    standard = (delta / sigma.unsqueeze(1))[::10].flatten()
    assert stats.kstest(standard[::7], "norm").pvalue > 0.001
    assert (delta + 0.1).min() < 0
    assert torch.equal(gaussian_noise(x, 0.0), x)


def test_mixed_augmentation_is_its_formula_with_the_same_draws():
    levels = sample_images()
    count = len(levels)
    x = ((levels + 0.8 * torch.rand(levels.shape, generator=seeded(10)) - 0.4) / 255).clamp(0, 1)  # between levels
    ours = mixed_augmentation(x, 0.7, seeded(11))
    draws = as_draws(seeded(11), x)
    a, u = draws.integers((count,), 0, 4), draws.integers((count,), 1, 11)
    w = draws.beta((count, 1, 1, 1), 0.7).double()
    for i in range(count):
        image, k = to_pillow(levels[i]), int(u[i])
        bits = 4 - math.floor(4 * k / 10)
        transformed = from_pillow(
            [
                lambda image: ImageOps.autocontrast(image),
                lambda image: ImageOps.equalize(image),
                lambda image, bits=bits: ImageOps.posterize(image, bits) if bits else Image.new("RGB", (32, 32)),
                lambda image, k=k: ImageOps.solarize(image, 256 - math.floor(256 * k / 10)),
            ][a[i]](image)
        )
        expected = w[i] * x[i].double() + (1 - w[i]) * transformed.double() / 255
        torch.testing.assert_close(ours[i].double(), expected, atol=1e-6, rtol=0)


def test_operation_and_level_of_mixed_augmentation_are_uniform(monkeypatch):
    seen = {}

    def spy(images, op, v):
        seen.update(op=op, v=v)
        return images

    monkeypatch.setattr(augment, "operate", spy)
    mixed_augmentation(torch.zeros(8000, 3, 1, 1), 1.0, seeded(12))
    pairs = torch.bincount(seen["op"] * 11 + seen["v"], minlength=44).view(4, 11)
    assert pairs[:, 0].sum() == 0
    assert stats.chisquare(pairs[:, 1:].flatten()).pvalue > 0.001


@pytest.mark.parametrize("beta", [0.05, 0.5, 1.0, 3.0])
def test_weight_of_mixed_augmentation_is_beta_distributed(beta, monkeypatch):
    monkeypatch.setattr(augment, "operate", lambda images, op, v: torch.zeros_like(images))
    w = mixed_augmentation(torch.ones(4000, 3, 1, 1), beta, seeded(13))[:, 0, 0, 0]
    lower = w[w < 0.5]  # float32 has few numbers next to 1, where half the mass of a small beta lies
    assert len(lower) / len(w) == pytest.approx(0.5, abs=0.03)
    assert stats.kstest(lower, lambda q: 2 * stats.beta(beta, beta).cdf(q)).pvalue > 0.001


def test_beta_of_a_tiny_parameter_stays_a_number():
    w = Draws(seeded(14), seeded(14)).beta((4000,), 1e-3)
    assert w.isfinite().all()
    assert (w < 0.01).float().mean() == pytest.approx(0.5, abs=0.05)  # all mass at 0 and 1, half each


# AugMix


def test_augmix_equals_a_pillow_loop_with_the_same_draws():
    images = sample_images()[::2]
    count, x = len(images), images.float() / 255
    ours = augmix(x, seeded(15))
    draws = as_draws(seeded(15), x)
    length = draws.integers((count, 3, 1), 1, 4)
    op = draws.integers((count, 3, 3), 0, 9)
    v = draws.uniform((count, 3, 3), 0.1, 3, host=True).double()
    sign = 2 * draws.integers((count, 3, 3), 0, 2) - 1
    weights, m = draws.dirichlet((count, 3)).double(), draws.uniform((count,)).double()

    def operation(image: Image.Image, name: str, level: float, direction: int) -> Image.Image:
        if name == "posterize":
            return ImageOps.posterize(image, 4 - int(4 * level / 10))
        if name == "solarize":
            return ImageOps.solarize(image, 256 - int(256 * level / 10))
        if name in ("autocontrast", "equalize"):
            return getattr(ImageOps, name)(image)
        return pillow_geometry(name, image, direction * level)

    far = 0
    for i in range(count):
        mixture = torch.zeros(3, 32, 32, dtype=torch.float64)
        for chain in range(3):
            image = to_pillow(images[i])
            for step in range(int(length[i, chain])):
                name = OPERATIONS[op[i, chain, step]]
                image = operation(image, name, float(v[i, chain, step]), int(sign[i, chain, step]))
            mixture += weights[i, chain] * from_pillow(image).double() / 255
        expected = (1 - m[i]) * x[i].double() + m[i] * mixture
        far += int(((ours[i] - expected).abs() > 1.5 / 255).sum())
    assert far < 0.01 * ours.numel()  # a level off before equalize or solarize is more levels off after it


def test_augmix_draws_are_those_of_its_paper(monkeypatch):
    steps = []

    def spy(images, op, v):
        steps.append((op, v))
        return images

    monkeypatch.setattr(augment, "operate", spy)
    augmix(torch.zeros(3000, 3, 1, 1), seeded(16))
    op, v = (torch.stack(values) for values in zip(*steps, strict=True))  # (3 steps, 9000 chains)
    active = op >= 0
    assert torch.equal(active, active.cummin(0).values)  # a chain that has ended stays ended
    assert stats.chisquare(active.sum(0).bincount(minlength=4)[1:]).pvalue > 0.001
    assert stats.chisquare(op[active].bincount(minlength=9)).pvalue > 0.001
    assert stats.kstest(v.abs().flatten(), stats.uniform(0.1, 2.9).cdf).pvalue > 0.001
    assert stats.chisquare((v > 0).flatten().long().bincount()).pvalue > 0.001


def test_augmix_weights_are_dirichlet_and_beta(monkeypatch):
    def number_of_chain(images, op, v):  # 0, 100, 200 for the three chains of each image
        return torch.zeros_like(images) + torch.tensor([0, 100, 200]).repeat_interleave(3000).view(-1, 1, 1, 1).byte()

    monkeypatch.setattr(augment, "operate", number_of_chain)
    out = augmix(torch.zeros(3000, 3, 1, 1), seeded(17), depth=1)[:, 0, 0, 0] * 255 / 100
    draws = as_draws(seeded(17), out)
    shape = (3000, 3, 1)
    draws.integers(shape, 1, 2)  # length, operation, level and sign, which come first
    draws.integers(shape, 0, 9)
    draws.uniform(shape, host=True)
    draws.integers(shape, 0, 2)
    weights, m = draws.dirichlet((3000, 3)), draws.uniform((3000,))
    torch.testing.assert_close(out, m * (weights[:, 1] + 2 * weights[:, 2]), atol=1e-5, rtol=0)
    assert stats.kstest(m, "uniform").pvalue > 0.001
    for w in weights.unbind(1):  # each weight of a flat Dirichlet of three is Beta(1, 2)
        assert stats.kstest(w, stats.beta(1, 2).cdf).pvalue > 0.001
    torch.testing.assert_close(weights.sum(1), torch.ones(3000))


# Draws


def all_functions(images: torch.Tensor, generator) -> list[torch.Tensor]:
    """One output of each random function, MAGNMA's with n = 2 copies as losses.py calls them."""
    x = images.float() / 255
    return [
        preprocess(images, True, generator).unsqueeze(0),
        gaussian_noise(x.repeat(2, 1, 1, 1), 0.2, generator).unflatten(0, (2, -1)),
        mixed_augmentation(x.repeat(2, 1, 1, 1), 0.7, generator).unflatten(0, (2, -1)),
        augmix(x.repeat(2, 1, 1, 1), generator).unflatten(0, (2, -1)),
    ]


def test_shares_together_make_the_draws_of_the_whole_batch():
    images = sample_images()[:50]
    cpu = torch.device("cpu")
    whole = all_functions(images, Draws.seeded(18, cpu))
    bounds = [(0, 20), (20, 43), (43, 50)]
    shares = [all_functions(images[a:b], Draws.seeded(18, cpu, start=a, count=b - a, total=50)) for a, b in bounds]
    for k, expected in enumerate(whole):
        assert torch.equal(torch.cat([share[k] for share in shares], 1), expected)


def test_equal_seeds_give_equal_outputs_and_others_do_not():
    images = sample_images()[:30]
    for a, b, c in zip(*(all_functions(images, seeded(seed)) for seed in (19, 19, 20)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    torch.manual_seed(21)
    first = all_functions(images, None)
    torch.manual_seed(21)
    assert all(torch.equal(a, b) for a, b in zip(first, all_functions(images, None), strict=True))


def test_copies_and_images_of_a_batch_are_drawn_independently():
    images = sample_images()[:1].expand(40, -1, -1, -1)
    for output in all_functions(images, seeded(22)):
        assert len(output.flatten(0, 1).flatten(1).float().unique(dim=0)) > 0.8 * output.shape[0] * output.shape[1]


def test_pieces_for_the_cache_change_no_result(monkeypatch):
    images = sample_images()[:50]
    whole = all_functions(images, seeded(23))
    monkeypatch.setattr(augment, "CHUNK", 7)
    for a, b in zip(whole, all_functions(images, seeded(23)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_outputs_keep_shape_dtype_and_range_and_inputs_stay_as_they_were():
    images = sample_images()[:30]
    x = (images.float() / 255).requires_grad_()
    before = x.detach().clone()
    noisy, mixed, mixture = gaussian_noise(x, 0.2), mixed_augmentation(x, 1), augmix(x)
    for output in (noisy, mixed, mixture):
        assert output.shape == x.shape
        assert output.dtype == torch.float32
        assert not output.requires_grad
    assert min(mixed.min(), mixture.min()) >= 0
    assert max(mixed.max(), mixture.max()) <= 1 + 1e-6
    assert torch.equal(x, before)
    assert gaussian_noise(x.double(), 0.2).dtype == mixed_augmentation(x.double(), 1).dtype == torch.float64
    assert augmix(x.double()).dtype == torch.float64


def test_autocast_changes_nothing():
    images = sample_images()[:30]
    expected = all_functions(images, seeded(24))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = all_functions(images, seeded(24))
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))


def test_nothing_waits_for_the_device_or_mixes_it_with_the_host():
    """Meta tensors have no values to wait for, and refuse to meet a CPU tensor: as a GPU would, at any place."""
    images = torch.empty(128, 3, 32, 32, dtype=torch.uint8, device="meta")
    for output in all_functions(images, Draws(host=seeded(25))):
        assert output.device.type == "meta"


@pytest.mark.slow
def test_inner_functions_compile_and_agree():
    images = sample_images()[:16]
    x, w = images.float() / 255, torch.rand(16, 1, 1, 1, generator=seeded(26))
    op = torch.arange(16) % 3 + 4
    matrix = augment._augmix_matrix(op, torch.linspace(-3, 3, 16, dtype=torch.float64), 32)
    cases = [
        (augment.apply_preprocessing, *augment.draw_preprocessing(Draws(seeded(27), seeded(27)), 16, 32, True)),
        (autocontrast,),
        (equalize,),
        (posterize, torch.arange(16) % 9),
        (solarize, torch.arange(16) * 17),
        (affine, matrix),
    ]
    for function, *arguments in cases:
        compiled = torch.compile(function, fullgraph=True)(images, *arguments)
        distance = (compiled.int() - function(images, *arguments).int()).abs()
        assert (distance <= 1).all()  # a fused multiplication and addition may round otherwise
        assert (distance == 0).float().mean() > 0.99
    torch.testing.assert_close(torch.compile(augment.mix, fullgraph=True)(x, w, images), augment.mix(x, w, images))
    torch.testing.assert_close(torch.compile(augmix)(x, seeded(28)), augmix(x, seeded(28)), atol=1e-6, rtol=0)
    whole = torch.compile(preprocess)(images, True, seeded(28))
    assert ((whole.int() - preprocess(images, True, seeded(28)).int()).abs() <= 1).all()


# Errors


def test_bad_input_is_named():
    images = sample_images()[:4]
    x = images.float() / 255
    cases = [
        (lambda: equalize(x), "images are torch.float32 (4, 3, 32, 32); expected uint8 (B, 3, H, W)"),
        (lambda: autocontrast(images[0]), "images are torch.uint8 (3, 32, 32); expected uint8 (B, 3, H, W)"),
        (lambda: preprocess(x, True), "images are torch.float32"),
        (lambda: affine(x, torch.zeros(4, 6)), "images are torch.float32"),
        (lambda: posterize(images, torch.ones(3)), "levels have shape (3,); expected one per image, (4,)"),
        (lambda: solarize(images, torch.tensor(3)), "levels have shape (); expected one per image, (4,)"),
        (lambda: gaussian_noise(x, -0.1), "sigma_max -0.1: must be zero or more"),
        (lambda: gaussian_noise(x, math.nan), "sigma_max nan: must be zero or more"),
        (lambda: mixed_augmentation(x, 0), "beta 0: must be above zero"),
        (lambda: mixed_augmentation(x, math.nan), "beta nan: must be above zero"),
        (lambda: Draws(start=3, count=3, total=5), "3 images from 3 on are no share of a batch of 5"),
        (lambda: Draws(total=5), "None images from 0 on are no share of a batch of 5"),
        (
            lambda: gaussian_noise(x, 1, Draws(count=3, total=5)),
            "4 images to draw for",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
