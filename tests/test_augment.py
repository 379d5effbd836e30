"""augment.py against Pillow and torchvision image by image, and the distribution of each draw.

The functions draw_* repeat the draws of a call from its seed. AugMix's nine operations are Pillow's
in benchmark.usual_operation.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import stats

import augment
from augment import OPERATIONS, A, augmix, gaussian_noise, mixed_augmentation, preprocess
from benchmark import usual_operation
from data import load_dataset
from utils import torchvision

F = torchvision.transforms.functional
to_pillow, from_pillow = F.to_pil_image, F.pil_to_tensor


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sample_images() -> torch.Tensor:
    """Digits, noise, narrow and wide histograms, constant channels, two levels, one odd pixel."""
    torch.manual_seed(1)
    digits = load_dataset("digits", "data").train_images[:20].long()
    noise = torch.randint(0, 256, (20, 3, 32, 32))
    spread, centre = torch.rand(40, 3, 1, 1) * 60, torch.rand(40, 3, 1, 1) * 255
    bell = (centre + spread * torch.randn(40, 3, 32, 32)).clamp(0, 255).long()
    constant = torch.randint(0, 256, (10, 3, 1, 1)).expand(-1, -1, 32, 32)
    low, high = torch.randint(0, 256, (2, 40, 3, 1, 1))
    two = torch.where(torch.rand(40, 3, 32, 32) < torch.rand(40, 1, 1, 1), low, high)
    lone = constant.clone()
    lone[:, :, 5, 7] = 255 - lone[:, :, 5, 7]
    return torch.cat([digits, noise, bell, constant, two, lone]).to(torch.uint8)


def assert_equals_pillow(ours: torch.Tensor, images: torch.Tensor, operation) -> None:
    expected = [from_pillow(operation(to_pillow(image), i)) for i, image in enumerate(images)]
    assert ours.dtype == torch.uint8
    assert (ours != torch.stack(expected)).flatten(1).any(1).nonzero().squeeze(1).tolist() == []


def fits(values: torch.Tensor, cdf) -> bool:
    return stats.kstest(values.double().flatten(), cdf).pvalue > 0.001


def even(values: torch.Tensor, low: int, high: int) -> bool:
    """Whether the integers are uniform on low ... high."""
    counts = (values.flatten() - low).bincount(minlength=high - low + 1)
    return len(counts) == high - low + 1 and stats.chisquare(counts).pvalue > 0.001


def independent(*columns: torch.Tensor) -> bool:
    """Whether no two of the columns are correlated, to five standard errors."""
    correlations = np.corrcoef(torch.stack([column.double() for column in columns]))
    return abs(correlations - np.eye(len(columns))).max() < 5 / len(columns[0]) ** 0.5


def level_cdf(q: np.ndarray) -> np.ndarray:
    """v ~ U(0.1, u) with u ~ U{1..10}: the mean of ten uniform distributions."""
    return np.mean([stats.uniform(0.1, u - 0.1).cdf(q) for u in range(1, 11)], axis=0)


# Operations


def test_level_operations_equal_pillow_bit_for_bit():
    images = sample_images()
    bits, threshold = torch.randint(1, 9, (len(images),)), torch.randint(0, 257, (len(images),))
    large = (torch.rand(3, 3, 300, 200) ** 3 * 256).to(torch.uint8)
    for operation, pillows in (
        (augment.autocontrast, lambda x, i: ImageOps.autocontrast(x)),
        (augment.equalize, lambda x, i: ImageOps.equalize(x)),
        (lambda x: augment.posterize(x, bits), lambda x, i: ImageOps.posterize(x, int(bits[i]))),
        (
            lambda x: augment.solarize(x, threshold),
            lambda x, i: ImageOps.solarize(x, int(threshold[i])),
        ),
    ):
        assert_equals_pillow(operation(images), images, pillows)
    assert_equals_pillow(augment.equalize(large), large, lambda x, i: ImageOps.equalize(x))


def test_autocontrast_equals_pillow_whatever_the_extreme_levels():
    pairs = torch.triu_indices(256, 256, offset=1).T
    low, high = pairs[torch.randperm(len(pairs))[:1500]].view(-1, 3, 2).split(1, 2)
    levels = low + torch.arange(256) % (high - low + 1)  # every level in between
    images = levels.to(torch.uint8).view(-1, 3, 16, 16)
    assert_equals_pillow(
        augment.autocontrast(images), images, lambda x, i: ImageOps.autocontrast(x)
    )


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_follows_pillow_at_augmixs_levels(name, square):
    images = sample_images()[::5]
    images = images if square else torch.cat([images, images.flip(3)], 3)[:, :, :20]
    op = torch.full((len(images),), OPERATIONS.index(name))
    for v in (-9.99, -2.9, -0.3, 0.1, 0.7, 2.5, 7.5):
        ours = augment.apply_operations(images, op, torch.full((len(images),), v))
        expected = [from_pillow(usual_operation(to_pillow(image), name, v)) for image in images]
        distance = (ours.int() - torch.stack(expected).int()).abs()
        assert (distance <= 1).float().mean() > 0.9999
        assert (distance == 0).float().mean() > 0.99
        if name in A or name.startswith("translate"):
            assert distance.max() == 0


def test_no_bits_are_black_but_augmixs_levels_never_ask_for_that():
    images = sample_images()
    assert augment.posterize(images, torch.zeros(len(images))).max() == 0  # Pillow refuses 0 bits
    v = torch.tensor([7.4999, math.nextafter(10, 0), 10.0], dtype=torch.float64)
    white = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    op = torch.full((3,), OPERATIONS.index("posterize"))
    assert augment.apply_operations(white, op, v)[:, 0, 0, 0].tolist() == [192, 128, 128]


# Preprocessing (Sec. 4)


@pytest.mark.parametrize(("hflip", "height"), [(True, 32), (False, 32), (True, 20)])
def test_preprocess_equals_torchvision_on_pillow_images_with_the_same_draws(hflip, height):
    images = sample_images()[:, :, :height]
    torch.manual_seed(2)
    ours = preprocess(images, hflip)
    torch.manual_seed(2)
    crop, order, factors, degrees = augment.draw_preprocessing(len(images), hflip)

    def per_image(image: Image.Image, i: int) -> Image.Image:
        top, left, mirrored = crop[i].tolist()
        image = F.crop(F.pad(image, 4), top, left, height, 32)
        image = F.hflip(image) if mirrored else image
        for kind in order[i].tolist():
            adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[kind]
            image = adjust(image, float(factors[i, kind]))
        return F.rotate(image, float(degrees[i]))

    assert_equals_pillow(ours, images, per_image)


def test_preprocess_draws_as_sec_4_says():
    crop, order, factors, degrees = augment.draw_preprocessing(6000, True)
    assert even(crop[:, :2], 0, 8)
    assert even(crop[:, 2], 0, 1)
    six_orders = (order * torch.tensor([9, 3, 1])).sum(1).unique(return_inverse=True)[1]
    assert even(six_orders, 0, 5)
    assert all(fits(factor, stats.uniform(0.75, 0.5).cdf) for factor in factors.unbind(1))
    assert fits(degrees, stats.uniform(-2, 4).cdf)
    assert independent(*crop.T, order[:, 0], *factors.T, degrees)
    assert augment.draw_preprocessing(6000, False)[0][:, 2].max() == 0


# MAGNMA's perturbations


def test_gaussian_noise_has_a_uniform_sigma_per_image_and_is_not_clipped():
    x = torch.full((1500, 3, 32, 32), 0.1)
    delta = (gaussian_noise(x, 0.2) - x).flatten(1)
    sigma = delta.std(1)
    assert fits(sigma, stats.uniform(0, 0.2).cdf)
    assert fits((delta / sigma.unsqueeze(1))[::10].flatten()[::7], "norm")
    assert (delta + 0.1).min() < 0
    assert independent(*delta[:5])  # other noise for each image
    assert torch.equal(gaussian_noise(x, 0.0), x)


@pytest.mark.parametrize("operations", ["A", "augmix"])
def test_mixed_augmentation_is_its_formula_with_the_same_draws(operations):
    levels = sample_images()
    x = ((levels + 0.8 * torch.rand(levels.shape) - 0.4) / 255).clamp(0, 1)  # between levels
    torch.manual_seed(2)
    ours = mixed_augmentation(x, 0.7, operations)
    torch.manual_seed(2)
    a, v, w = augment.draw_mixed(len(x), 0.7, operations)
    off = torch.zeros(len(x), 3, 32, 32, dtype=torch.float64)
    for i in range(len(levels)):
        picture = usual_operation(to_pillow(levels[i]), OPERATIONS[a[i]], float(v[i]))
        expected = w[i] * x[i].double() + (1 - w[i]) * from_pillow(picture).double() / 255
        off[i] = (ours[i] - expected).abs()
    assert off[a < 4].max() < 1e-6
    # the geometric operations agree with Pillow on 99% of the values
    assert operations == "A" or (off[a >= 4] > 1e-6).double().mean() < 0.01


@pytest.mark.parametrize("operations", ["A", "augmix"])
def test_operation_and_level_of_mixed_augmentation(operations):
    a, v, w = augment.draw_mixed(8000, 1.0, operations)
    assert independent(a, v.abs(), w, *([v.sign()] if operations == "augmix" else []))
    assert even(a, 0, 8 if operations == "augmix" else 3)
    assert even((v > 0).long(), 0, 1) if operations == "augmix" else v.min() > 0
    assert all(fits(v.abs()[a == k], level_cdf) for k in a.unique())
    assert A == OPERATIONS[:4] == ("autocontrast", "equalize", "posterize", "solarize")
    with pytest.raises(ValueError, match="operations must be 'A' or 'augmix', not 'B'"):
        augment.draw_mixed(1, 1.0, "B")


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.5, 1.0, 3.0])
def test_weight_of_mixed_augmentation_is_beta_distributed(beta):
    _, _, w = augment.draw_mixed(4000, beta)
    assert w.isfinite().all()
    # half the mass of a small beta is near 1, where float64 has few numbers: compare below 0.5
    lower = w[w < 0.5]
    assert len(lower) / len(w) == pytest.approx(0.5, abs=0.03)
    assert fits(lower, lambda q: 2 * stats.beta(beta, beta).cdf(q))


# AugMix


def test_augmix_equals_a_pillow_loop_with_the_same_draws():
    images = sample_images()[::2]
    x = images.float() / 255
    torch.manual_seed(2)
    ours = augmix(x)
    torch.manual_seed(2)
    op, v, weights, m = augment.draw_augmix(len(images))
    far = 0
    for i in range(len(images)):
        mixture = torch.zeros(3, 32, 32, dtype=torch.float64)
        for chain in range(3):
            image = to_pillow(images[i])
            for k, level in zip(op[i, chain].tolist(), v[i, chain].tolist(), strict=True):
                if k >= 0:
                    image = usual_operation(image, OPERATIONS[k], level)
            mixture += weights[i, chain].double() * from_pillow(image).double() / 255
        expected = (1 - m[i].double()) * x[i].double() + m[i].double() * mixture
        far += int(((ours[i] - expected).abs() > 1.5 / 255).sum())
    # equalize and solarize after a geometric operation enlarge its difference of one level
    assert far < 0.01 * ours.numel()


def test_augmix_draws_its_operations_levels_and_weights_as_its_paper_says():
    op, v, weights, m = augment.draw_augmix(3000)
    active = op >= 0
    assert torch.equal(active, active.cummin(2).values)  # a chain that has ended stays ended
    assert even(active.sum(2), 1, 3)
    assert even(op[active], 0, 8)
    assert even((v > 0).long(), 0, 1)
    assert independent(*active.sum(2).T)  # chains of an image have lengths of their own,
    assert independent(*(v > 0).flatten(1).T)  # its operations signs
    level = v.abs().flatten(1)  # nine draws of an image
    assert all(fits(level[:, k], level_cdf) for k in range(9))
    # one severity for all of them: the largest of nine levels U(0.1, u), then the mean over u
    largest, severities = level.amax(1), range(1, 11)
    assert fits(
        largest, lambda q: np.mean([stats.uniform(0.1, u - 0.1).cdf(q) ** 9 for u in severities], 0)
    )
    assert not fits(largest, lambda q: level_cdf(q) ** 9)  # a severity per operation
    assert independent(largest[1:], largest[:-1])  # another severity for each image
    assert fits(m, "uniform")
    # the margins of a flat Dirichlet distribution of three weights
    assert all(fits(w, stats.beta(1, 2).cdf) for w in weights.unbind(1))
    assert fits(weights[:, 0] / (weights[:, 0] + weights[:, 1]), "uniform")
    torch.testing.assert_close(weights.sum(1), torch.ones(3000))


# All of them

FLOATS = [lambda x: gaussian_noise(x, 0.2), lambda x: mixed_augmentation(x, 1.0), augmix]


def all_functions(images: torch.Tensor, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    x = images.float() / 255
    return [preprocess(images, True), gaussian_noise(x, 0.2), mixed_augmentation(x, 0.7), augmix(x)]


def test_equal_seeds_give_equal_outputs_also_under_autocast_and_others_do_not():
    images = sample_images()[:30]
    expected = all_functions(images, 19)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = all_functions(images, 19)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    others = all_functions(images, 20)
    assert not any(torch.equal(a, b) for a, b in zip(expected, others, strict=True))


def test_chunks_change_no_result(monkeypatch):
    images = sample_images()[:50]
    expected = all_functions(images, 23)
    monkeypatch.setattr(augment, "CHUNK", 7)
    for a, b in zip(expected, all_functions(images, 23), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_keep_shape_dtype_and_range_and_inputs_are_unchanged(dtype):
    x = sample_images()[:30].to(dtype) / 255
    before, outputs = x.clone(), [function(x) for function in FLOATS]
    assert [(y.shape, y.dtype) for y in outputs] == [(x.shape, dtype)] * 3
    assert all(0 <= y.min() < y.max() <= 1 + 1e-6 for y in outputs[1:])
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", FLOATS, ids=["gaussian_noise", "mixed_augmentation", "augmix"])
def test_images_of_another_form_are_refused_with_the_expected_one(function):
    x = sample_images()[:4] / 255
    expected = r"; expected floats \(B, 3, H, W\) in \[0, 1\]"
    for wrong, words in [
        (x[0], r"torch.float32 \(3, 32, 32\)"),  # without a batch dimension
        (x[:, :1], r"torch.float32 \(4, 1, 32, 32\)"),
        (x.permute(0, 2, 3, 1), r"torch.float32 \(4, 32, 32, 3\)"),
        ((255 * x).to(torch.uint8), r"torch.uint8 \(4, 3, 32, 32\)"),
        (x * 1.01 - 0.01, "values from -0.01 to 1"),
        (x * 1.01, "values from 0 to 1.01"),
        (x.where(x > 0.5, math.nan), "values from nan to nan"),
    ]:
        with pytest.raises(ValueError, match=f"^images (are|have) {words}{expected}"):
            function(wrong)


@pytest.mark.parametrize("function", FLOATS)
def test_images_within_rounding_of_0_and_1_are_accepted_also_none_at_all_and_on_meta(function):
    x = sample_images()[:4] / 255
    meta = torch.empty(4, 3, 32, 32, dtype=torch.half, device="meta")
    for images in (x * 1.001 - 0.0005, x[:0], meta):
        assert function(images).shape == images.shape


def test_bad_levels_are_named():
    images = sample_images()[:4]
    expected = r"images are torch.float32 \(4, 3, 32, 32\); expected uint8 \(B, 3, H, W\)"
    with pytest.raises(ValueError, match=expected):
        preprocess(images.float(), True)
    with pytest.raises(
        ValueError, match=r"levels have shape \(3,\); expected one per image, \(4,\)"
    ):
        augment.posterize(images, torch.ones(3))
    with pytest.raises(ValueError):  # by torch.distributions
        mixed_augmentation(images / 255, 0.0)
