"""augment.py: against Pillow and torchvision image by image with the same draws, and the distribution of each draw.

The draws of a call are made again from its seed by draw_preprocessing, draw_mixed and draw_augmix. AugMix's nine
operations are Pillow's in benchmark.usual_operation.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats

import augment
from augment import (
    OPERATIONS,
    augmix,
    autocontrast,
    draw_augmix,
    draw_mixed,
    draw_preprocessing,
    equalize,
    gaussian_noise,
    mixed_augmentation,
    operate,
    posterize,
    preprocess,
    solarize,
)
from benchmark import usual_operation
from data import load_dataset
from utils import import_torchvision

F = import_torchvision().transforms.functional


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def to_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pillow(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def sample_images() -> torch.Tensor:
    """Digits, noise, narrow and wide histograms, constant channels, two levels, one pixel unlike the rest."""
    torch.manual_seed(1)
    digits = load_dataset("digits", "data").train_images[:20].long()
    noise = torch.randint(0, 256, (20, 3, 32, 32))
    spread, centre = torch.rand(40, 3, 1, 1) * 60, torch.rand(40, 3, 1, 1) * 255
    bell = (centre + spread * torch.randn(40, 3, 32, 32)).clamp(0, 255).long()
    constant = torch.randint(0, 256, (10, 3, 1, 1)).expand(-1, -1, 32, 32)
    two = torch.where(torch.rand(40, 3, 32, 32) < torch.rand(40, 1, 1, 1), *torch.randint(0, 256, (2, 40, 3, 1, 1)))
    lone = constant.clone()
    lone[:, :, 5, 7] = 255 - lone[:, :, 5, 7]
    return torch.cat([digits, noise, bell, constant, two, lone]).to(torch.uint8)


def assert_same_as_pillow(ours: torch.Tensor, images: torch.Tensor, operation) -> None:
    theirs = torch.stack([from_pillow(operation(to_pillow(image), i)) for i, image in enumerate(images)])
    assert ours.dtype == torch.uint8
    assert (ours != theirs).flatten(1).any(1).nonzero().squeeze(1).tolist() == []


def fits(values: torch.Tensor, cdf) -> bool:
    return stats.kstest(values.double().flatten(), cdf).pvalue > 0.001


def even(values: torch.Tensor, low: int, high: int) -> bool:
    """Whether the integers are uniform on low ... high."""
    counts = (values.flatten() - low).bincount(minlength=high - low + 1)
    return len(counts) == high - low + 1 and stats.chisquare(counts).pvalue > 0.001


def independent(*columns: torch.Tensor) -> bool:
    """Whether no two of the columns are correlated, to five standard errors."""
    off_diagonal = np.corrcoef(torch.stack([column.double() for column in columns])) - np.eye(len(columns))
    return abs(off_diagonal).max() < 5 / len(columns[0]) ** 0.5


def level_cdf(q: np.ndarray) -> np.ndarray:
    """v ~ U(0.1, u) with u ~ U{1..10}: the mean of ten uniform distributions."""
    return np.mean([stats.uniform(0.1, u - 0.1).cdf(q) for u in range(1, 11)], axis=0)


# Operations


def test_level_operations_equal_pillow_bit_for_bit():
    images = sample_images()
    bits, threshold = torch.randint(1, 9, (len(images),)), torch.randint(0, 257, (len(images),))
    assert_same_as_pillow(autocontrast(images), images, lambda image, i: ImageOps.autocontrast(image))
    assert_same_as_pillow(equalize(images), images, lambda image, i: ImageOps.equalize(image))
    assert_same_as_pillow(posterize(images, bits), images, lambda image, i: ImageOps.posterize(image, int(bits[i])))
    assert_same_as_pillow(
        solarize(images, threshold), images, lambda image, i: ImageOps.solarize(image, int(threshold[i]))
    )


def test_autocontrast_equals_pillow_whatever_the_extreme_levels():
    pairs = torch.triu_indices(256, 256, offset=1).T
    lo, hi = pairs[torch.randperm(len(pairs))[:1500]].view(-1, 3, 2).split(1, 2)
    images = (lo + torch.arange(256) % (hi - lo + 1)).to(torch.uint8).view(-1, 3, 16, 16)  # every level in between
    assert_same_as_pillow(autocontrast(images), images, lambda image, i: ImageOps.autocontrast(image))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operate_follows_pillow_at_augmixs_levels(name):
    images = sample_images()[::5]
    for v in (-9.99, -2.9, -0.3, 0.1, 0.7, 2.5, 7.5):
        ours = operate(images, torch.full((len(images),), OPERATIONS.index(name)), torch.full((len(images),), v))
        theirs = torch.stack([from_pillow(usual_operation(to_pillow(image), name, v)) for image in images])
        distance = (ours.int() - theirs.int()).abs()
        assert (distance <= 1).float().mean() > 0.9999
        assert (distance == 0).float().mean() > 0.99
        if name in augment.A or name.startswith("translate"):
            assert distance.max() == 0


def test_no_bits_are_black_but_augmixs_levels_never_ask_for_that():
    images = sample_images()
    assert posterize(images, torch.zeros(len(images))).max() == 0  # Pillow refuses 0 bits
    v = torch.tensor([7.4999, math.nextafter(10, 0), 10.0], dtype=torch.float64)
    white, op = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8), torch.full((3,), OPERATIONS.index("posterize"))
    assert operate(white, op, v)[:, 0, 0, 0].tolist() == [192, 128, 128]


def test_operate_gives_each_image_its_own_operation():
    images = sample_images()
    op, v = torch.randint(-1, len(OPERATIONS), (len(images),)), 20 * torch.rand(len(images)) - 10
    together = operate(images, op, v)
    for i in range(len(images)):
        assert torch.equal(together[i : i + 1], operate(images[i : i + 1], op[i : i + 1], v[i : i + 1]))
    assert torch.equal(together[op == -1], images[op == -1])


# Preprocessing (Sec. 4)


@pytest.mark.parametrize("hflip", [True, False])
def test_preprocess_equals_torchvision_on_pillow_images_with_the_same_draws(hflip):
    images = sample_images()
    torch.manual_seed(2)
    ours = preprocess(images, hflip)
    torch.manual_seed(2)
    crop, order, factors, degrees = draw_preprocessing(len(images), hflip)

    def per_image(image: Image.Image, i: int) -> Image.Image:
        top, left, mirrored = crop[i].tolist()
        image = F.crop(F.pad(image, 4), top, left, 32, 32)
        image = F.hflip(image) if mirrored else image
        for kind in order[i].tolist():
            image = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[kind](image, float(factors[i, kind]))
        return F.rotate(image, float(degrees[i]))

    assert_same_as_pillow(ours, images, per_image)


def test_preprocess_draws_as_sec_4_says():
    crop, order, factors, degrees = draw_preprocessing(6000, True)
    assert even(crop[:, :2], 0, 8)
    assert even(crop[:, 2], 0, 1)
    assert even((order * torch.tensor([9, 3, 1])).sum(1).unique(return_inverse=True)[1], 0, 5)  # the six orders
    assert all(fits(factor, stats.uniform(0.75, 0.5).cdf) for factor in factors.unbind(1))
    assert fits(degrees, stats.uniform(-2, 4).cdf)
    assert independent(*crop.T, order[:, 0], *factors.T, degrees)
    assert draw_preprocessing(6000, False)[0][:, 2].max() == 0


# MAGNMA's perturbations


def test_gaussian_noise_has_a_uniform_sigma_per_image_and_is_not_clipped():
    x = torch.full((1500, 3, 32, 32), 0.1)
    delta = (gaussian_noise(x, 0.2) - x).flatten(1)
    sigma = delta.std(1)
    assert fits(sigma, stats.uniform(0, 0.2).cdf)
    assert fits((delta / sigma.unsqueeze(1))[::10].flatten()[::7], "norm")
    assert (delta + 0.1).min() < 0
    assert independent(*delta[:5])  # noise of its own for each image
    assert torch.equal(gaussian_noise(x, 0.0), x)


@pytest.mark.parametrize("operations", ["A", "augmix"])
def test_mixed_augmentation_is_its_formula_with_the_same_draws(operations):
    levels = sample_images()
    x = ((levels + 0.8 * torch.rand(levels.shape) - 0.4) / 255).clamp(0, 1)  # between levels
    torch.manual_seed(2)
    ours = mixed_augmentation(x, 0.7, operations)
    torch.manual_seed(2)
    a, v, w = draw_mixed(len(x), 0.7, operations)
    off = torch.zeros(len(x), 3, 32, 32, dtype=torch.float64)
    for i in range(len(levels)):
        transformed = from_pillow(usual_operation(to_pillow(levels[i]), OPERATIONS[a[i]], float(v[i])))
        off[i] = (ours[i] - (w[i] * x[i].double() + (1 - w[i]) * transformed.double() / 255)).abs()
    assert off[a < 4].max() < 1e-6
    # the geometric ones agree with Pillow on 99% of the values
    assert operations == "A" or (off[a >= 4] > 1e-6).double().mean() < 0.01


def test_operation_and_level_of_mixed_augmentation():
    a, v, w = draw_mixed(8000, 1.0)
    assert independent(a, v, w)
    assert augment.A == OPERATIONS[:4] == ("autocontrast", "equalize", "posterize", "solarize")
    assert even(a, 0, 3)
    assert all(fits(v[a == k], level_cdf) for k in range(4))
    assert not fits(torch.randint(1, 11, (8000,)), level_cdf)  # v = u is another distribution


def test_operation_and_level_of_mixed_augmentation_with_the_nine_of_augmix():
    a, v, w = draw_mixed(8000, 1.0, "augmix")
    assert independent(a, v.abs(), v.sign(), w)
    assert even(a, 0, 8)
    assert even((v > 0).long(), 0, 1)
    assert all(fits(v.abs()[a == k], level_cdf) for k in range(9))
    with pytest.raises(ValueError, match="operations must be 'A' or 'augmix', not 'B'"):
        draw_mixed(1, 1.0, "B")


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.5, 1.0, 3.0])
def test_weight_of_mixed_augmentation_is_beta_distributed(beta):
    _, _, w = draw_mixed(4000, beta)
    assert w.isfinite().all()
    lower = w[w < 0.5]  # few numbers of float64 are next to 1, where half the mass of a small beta lies
    assert len(lower) / len(w) == pytest.approx(0.5, abs=0.03)
    assert fits(lower, lambda q: 2 * stats.beta(beta, beta).cdf(q))


# AugMix


def test_augmix_equals_a_pillow_loop_with_the_same_draws():
    images = sample_images()[::2]
    x = images.float() / 255
    torch.manual_seed(2)
    ours = augmix(x)
    torch.manual_seed(2)
    op, v, weights, m = draw_augmix(len(images))
    far = 0
    for i in range(len(images)):
        mixture = torch.zeros(3, 32, 32, dtype=torch.float64)
        for chain in range(3):
            image = to_pillow(images[i])
            for k, level in zip(op[i, chain].tolist(), v[i, chain].tolist(), strict=True):
                image = usual_operation(image, OPERATIONS[k], level) if k >= 0 else image
            mixture += weights[i, chain].double() * from_pillow(image).double() / 255
        expected = (1 - m[i].double()) * x[i].double() + m[i].double() * mixture
        far += int(((ours[i] - expected).abs() > 1.5 / 255).sum())
    assert far < 0.01 * ours.numel()  # a level off before equalize or solarize is more levels off after it


def test_augmix_draws_its_operations_levels_and_weights_as_its_paper_says():
    op, v, weights, m = draw_augmix(3000)
    active = op >= 0
    assert torch.equal(active, active.cummin(2).values)  # a chain that has ended stays ended
    assert even(active.sum(2), 1, 3)
    assert even(op[active], 0, 8)
    assert even((v > 0).long(), 0, 1)
    level = v.abs().flatten(1)  # nine draws of an image
    assert all(fits(level[:, k], level_cdf) for k in range(9))
    # one severity for all of them: the largest of nine levels U(0.1, u), then the mean over u
    largest = level.amax(1)
    assert fits(largest, lambda q: np.mean([stats.uniform(0.1, u - 0.1).cdf(q) ** 9 for u in range(1, 11)], axis=0))
    assert not fits(largest, lambda q: level_cdf(q) ** 9)  # a severity per operation
    assert independent(largest[1:], largest[:-1])  # another severity for each image
    assert fits(m, "uniform")
    assert all(fits(w, stats.beta(1, 2).cdf) for w in weights.unbind(1))  # the margins of a flat Dirichlet of three
    assert fits(weights[:, 0] / (weights[:, 0] + weights[:, 1]), "uniform")
    torch.testing.assert_close(weights.sum(1), torch.ones(3000))


# All of them


def all_functions(images: torch.Tensor, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    x = images.float() / 255
    return [preprocess(images, True), gaussian_noise(x, 0.2), mixed_augmentation(x, 0.7), augmix(x)]


def test_equal_seeds_give_equal_outputs_also_under_autocast_and_others_do_not():
    images = sample_images()[:30]
    expected = all_functions(images, 19)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(expected, all_functions(images, 19), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(expected, all_functions(images, 20), strict=True))


def test_pieces_for_the_cache_change_no_result(monkeypatch):
    images = sample_images()[:50]
    whole = all_functions(images, 23)
    monkeypatch.setattr(augment, "CHUNK", 7)
    for a, b in zip(whole, all_functions(images, 23), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert torch.equal(whole[0], all_functions(images, 23)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_keep_shape_dtype_and_range_and_inputs_stay_as_they_were(dtype):
    x = sample_images()[:30].to(dtype) / 255
    before = x.clone()
    noisy, mixed, mixture = gaussian_noise(x, 0.2), mixed_augmentation(x, 1), augmix(x)
    assert all(output.shape == x.shape and output.dtype == dtype for output in (noisy, mixed, mixture))
    assert min(mixed.min(), mixture.min()) >= 0
    assert max(mixed.max(), mixture.max()) <= 1 + 1e-6
    assert torch.equal(x, before)


def test_bad_input_is_named():
    images = sample_images()[:4]
    with pytest.raises(ValueError, match=r"images are torch.float32 \(4, 3, 32, 32\); expected uint8 \(B, 3, H, W\)"):
        preprocess(images.float(), True)
    with pytest.raises(ValueError, match=r"levels have shape \(3,\); expected one per image, \(4,\)"):
        posterize(images, torch.ones(3))
    with pytest.raises(ValueError):  # by torch.distributions
        mixed_augmentation(images / 255, 0.0)
