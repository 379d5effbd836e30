"""augment.py: against Pillow and torchvision image by image with the same draws, and the distribution of each draw.

Draws made inside a function are watched where they are handed on (`operate`, `mix_chains`, the pieces of `preprocess`),
or made again with the same seed (`draw_mixed`).
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
    draw_mixed,
    equalize,
    gaussian_noise,
    mixed_augmentation,
    operate,
    posterize,
    preprocess,
    solarize,
)
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
    """Digits, noise, narrow and wide histograms, ramps, constant channels, two levels, one pixel unlike the rest."""
    torch.manual_seed(1)
    noise = torch.randint(0, 256, (20, 3, 32, 32))
    spread, centre = torch.rand(40, 3, 1, 1) * 60, torch.rand(40, 3, 1, 1) * 255
    bell = (centre + spread * torch.randn(40, 3, 32, 32)).clamp(0, 255).long()
    slope = torch.rand(20, 3, 1, 1) * 8
    ramp = (slope * torch.arange(32.0) + (8 - slope) * torch.arange(32.0).view(-1, 1)).clamp(0, 255).long()
    constant = torch.randint(0, 256, (10, 3, 1, 1)).expand(-1, -1, 32, 32)
    two = torch.where(torch.rand(40, 3, 32, 32) < torch.rand(40, 1, 1, 1), *torch.randint(0, 256, (2, 40, 3, 1, 1)))
    extremes = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 255)]).long()
    lone, single_channel = constant.clone(), bell[:10].clone()
    lone[:, :, 5, 7] = 255 - lone[:, :, 5, 7]
    single_channel[:, 1] = 77
    digits = load_dataset("digits", "data").train_images[:20].long()
    return torch.cat([digits, noise, bell, ramp, constant, two, extremes, lone, single_channel]).to(torch.uint8)


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


def pillow_operation(name: str, image: Image.Image, v: float) -> Image.Image:
    """AugMix's nine operations as its code states them, at the signed level v."""
    level = abs(v)
    if name == "posterize":
        return ImageOps.posterize(image, 4 - int(4 * level / 10))
    if name == "solarize":
        return ImageOps.solarize(image, 256 - int(256 * level / 10))
    if name in ("autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    if name == "rotate":
        return image.rotate(int(30 * v / 10), resample=Image.Resampling.BILINEAR)
    shear, pixels = 0.3 * v / 10, int(32 / 3 * v / 10)
    matrix = {
        "shear_x": (1, shear, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, pixels, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, pixels),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operate_follows_pillow_at_augmixs_levels(name):
    images = sample_images()[::5]
    for v in (-9.99, -2.9, -0.3, 0.1, 0.7, 2.5, 7.5):
        ours = operate(images, torch.full((len(images),), OPERATIONS.index(name)), torch.full((len(images),), v))
        theirs = torch.stack([from_pillow(pillow_operation(name, to_pillow(image), v)) for image in images])
        distance = (ours.int() - theirs.int()).abs()
        assert (distance <= 1).float().mean() > 0.9999
        assert (distance == 0).float().mean() > 0.99
        if name in augment.A or name.startswith("translate"):
            assert distance.max() == 0


def test_no_bits_are_black_but_augmixs_levels_never_ask_for_that():
    images = sample_images()
    assert posterize(images, torch.zeros(len(images))).max() == 0  # Pillow refuses 0 bits
    assert torch.equal(posterize(images, torch.full((len(images),), 8)), images)
    white = torch.full((3, 3, 32, 32), 255, dtype=torch.uint8)
    v = torch.tensor([7.4999, math.nextafter(10, 0), 10.0], dtype=torch.float64)
    kept = operate(white, torch.full((3,), OPERATIONS.index("posterize")), v)
    assert kept.amax((1, 2, 3)).tolist() == kept.amin((1, 2, 3)).tolist() == [192, 128, 128]


def test_operate_gives_each_image_its_own_operation():
    images = sample_images()
    op, v = torch.randint(-1, len(OPERATIONS), (len(images),)), 20 * torch.rand(len(images)) - 10
    together = operate(images, op, v)
    for i in range(len(images)):
        assert torch.equal(together[i : i + 1], operate(images[i : i + 1], op[i : i + 1], v[i : i + 1]))
    assert torch.equal(together[op == -1], images[op == -1])


# Preprocessing (Sec. 4)


def watched_preprocess(images: torch.Tensor, hflip: bool, monkeypatch) -> tuple[torch.Tensor, ...]:
    """preprocess's result, and the draws it made: corner, mirrored, order, factors, degrees."""
    seen = []

    def watch(function, watched):
        return lambda *arguments: [seen.append(arguments[watched]), function(*arguments)][1]

    with monkeypatch.context() as patch:
        patch.setattr(augment, "rotation_matrix", watch(augment.rotation_matrix, slice(0, 1)))
        patch.setattr(augment, "in_pieces", watch(augment.in_pieces, slice(2, 5)))
        result = preprocess(images, hflip)
    (degrees,), (crop, order, factors) = seen
    return result, crop[:, :2], crop[:, 2], order, factors, degrees


@pytest.mark.parametrize("hflip", [True, False])
def test_preprocess_equals_torchvision_on_pillow_images_with_the_same_draws(hflip, monkeypatch):
    images = sample_images()
    ours, corner, mirrored, order, factors, degrees = watched_preprocess(images, hflip, monkeypatch)

    def per_image(image: Image.Image, i: int) -> Image.Image:
        image = F.crop(F.pad(image, 4), *corner[i].tolist(), 32, 32)
        image = F.hflip(image) if mirrored[i] else image
        for kind in order[i].tolist():
            image = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[kind](image, float(factors[i, kind]))
        return F.rotate(image, float(degrees[i]))

    assert_same_as_pillow(ours, images, per_image)


def test_preprocess_draws_as_sec_4_says(monkeypatch):
    images = torch.zeros(6000, 3, 1, 1, dtype=torch.uint8)
    _, corner, mirrored, order, factors, degrees = watched_preprocess(images, True, monkeypatch)
    assert all(even(side, 0, 8) for side in corner.unbind(1))
    assert even(mirrored, 0, 1)
    orders = (order * torch.tensor([9, 3, 1])).sum(1).unique(return_counts=True)[1]
    assert len(orders) == 6
    assert stats.chisquare(orders).pvalue > 0.001
    assert all(fits(factor, stats.uniform(0.75, 0.5).cdf) for factor in factors.unbind(1))
    assert fits(degrees, stats.uniform(-2, 4).cdf)
    assert independent(*corner.T, mirrored, order[:, 0], *factors.T, degrees)
    assert watched_preprocess(images, False, monkeypatch)[2].max() == 0


# MAGNMA's perturbations


def test_gaussian_noise_has_a_uniform_sigma_per_image_and_is_not_clipped():
    x = torch.full((1500, 3, 32, 32), 0.1)
    delta = (gaussian_noise(x, 0.2) - x).flatten(1)
    sigma = delta.std(1)
    assert fits(sigma, stats.uniform(0, 0.2).cdf)
    assert fits((delta / sigma.unsqueeze(1))[::10].flatten()[::7], "norm")
    assert (delta + 0.1).min() < 0
    assert torch.equal(gaussian_noise(x, 0.0), x)


def test_mixed_augmentation_is_its_formula_with_the_same_draws():
    levels = sample_images()
    x = ((levels + 0.8 * torch.rand(levels.shape) - 0.4) / 255).clamp(0, 1)  # between levels
    torch.manual_seed(2)
    ours = mixed_augmentation(x, 0.7)
    torch.manual_seed(2)
    a, v, w = draw_mixed(len(x), 0.7)
    for i in range(len(levels)):
        name = ("autocontrast", "equalize", "posterize", "solarize")[a[i]]  # the set A of Sec. 3 (b)
        transformed = from_pillow(pillow_operation(name, to_pillow(levels[i]), float(v[i])))
        expected = w[i] * x[i].double() + (1 - w[i]) * transformed.double() / 255
        torch.testing.assert_close(ours[i].double(), expected, atol=1e-6, rtol=0)


def test_operation_and_level_of_mixed_augmentation():
    a, v, w = draw_mixed(8000, 1.0)
    assert independent(a, v, w)
    assert augment.A == OPERATIONS[:4] == ("autocontrast", "equalize", "posterize", "solarize")
    assert even(a, 0, 3)
    assert all(fits(v[a == k], level_cdf) for k in range(4))
    assert not fits(torch.randint(1, 11, (8000,)), level_cdf)  # v = u is another distribution


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.5, 1.0, 3.0])
def test_weight_of_mixed_augmentation_is_beta_distributed(beta):
    _, _, w = draw_mixed(4000, beta)
    assert w.isfinite().all()
    lower = w[w < 0.5]  # few numbers of float64 are next to 1, where half the mass of a small beta lies
    assert len(lower) / len(w) == pytest.approx(0.5, abs=0.03)
    assert fits(lower, lambda q: 2 * stats.beta(beta, beta).cdf(q))


# AugMix


def watched_augmix(x: torch.Tensor, monkeypatch, replacement=operate) -> tuple[torch.Tensor, ...]:
    """augmix's result; op and v, (count, 3 chains, 3 steps); weights (count, 3); m (count,)."""
    steps, mixing = [], []

    def watched_operate(images, op, v):
        steps.append((op, v))
        return replacement(images, op, v)

    def watched_in_pieces(function, images, *arguments):
        if function is augment.mix_chains:
            mixing.extend(arguments[:2])
        return in_pieces(function, images, *arguments)

    in_pieces = augment.in_pieces
    with monkeypatch.context() as patch:
        patch.setattr(augment, "operate", watched_operate)
        patch.setattr(augment, "in_pieces", watched_in_pieces)
        result = augmix(x)
    op, v = (torch.stack(values, 1).view(3, -1, 3).transpose(0, 1) for values in zip(*steps, strict=True))
    return result, op, v, mixing[1], mixing[0].flatten()


def test_augmix_equals_a_pillow_loop_with_the_same_draws(monkeypatch):
    images = sample_images()[::2]
    x = images.float() / 255
    ours, op, v, weights, m = watched_augmix(x, monkeypatch)
    far = 0
    for i in range(len(images)):
        mixture = torch.zeros(3, 32, 32, dtype=torch.float64)
        for chain in range(3):
            image = to_pillow(images[i])
            for k, level in zip(op[i, chain].tolist(), v[i, chain].tolist(), strict=True):
                image = pillow_operation(OPERATIONS[k], image, level) if k >= 0 else image
            mixture += weights[i, chain].double() * from_pillow(image).double() / 255
        expected = (1 - m[i].double()) * x[i].double() + m[i].double() * mixture
        far += int(((ours[i] - expected).abs() > 1.5 / 255).sum())
    assert far < 0.01 * ours.numel()  # a level off before equalize or solarize is more levels off after it


def test_augmix_draws_its_operations_and_levels_as_its_paper_says(monkeypatch):
    x = torch.zeros(3000, 3, 1, 1)
    _, op, v, _, _ = watched_augmix(x, monkeypatch, lambda images, op, v: images)
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
    again = watched_augmix(x, monkeypatch, lambda images, op, v: images)[2].abs().flatten(1).amax(1)
    assert independent(largest[1:], largest[:-1], again[1:])  # another severity for each image and each call


def test_augmix_weights_are_dirichlet_and_uniform_and_mix_as_written(monkeypatch):
    def number_of_chain(images, op, v):  # 0, 100, 200 for the three chains of each image
        return torch.zeros_like(images) + torch.tensor([0, 100, 200]).repeat_interleave(3000).view(-1, 1, 1, 1).byte()

    out, _, _, weights, m = watched_augmix(torch.full((3000, 3, 1, 1), 0.2), monkeypatch, number_of_chain)
    expected = (1 - m) * 0.2 + m * (100 * weights[:, 1] + 200 * weights[:, 2]) / 255
    torch.testing.assert_close(out[:, 0, 0, 0], expected, atol=1e-6, rtol=0)
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


def test_the_images_of_a_batch_are_drawn_independently():
    for output in all_functions(sample_images()[20:21].expand(80, -1, -1, -1), 22):
        assert len(output.flatten(1).float().unique(dim=0)) > 0.8 * len(output)


def test_outputs_keep_shape_dtype_and_range_and_inputs_stay_as_they_were():
    for dtype in (torch.float32, torch.float64):
        x = sample_images()[:30].to(dtype) / 255
        before = x.clone()
        noisy, mixed, mixture = gaussian_noise(x, 0.2), mixed_augmentation(x, 1), augmix(x)
        assert all(output.shape == x.shape and output.dtype == dtype for output in (noisy, mixed, mixture))
        assert min(mixed.min(), mixture.min()) >= 0
        assert max(mixed.max(), mixture.max()) <= 1 + 1e-6
        assert torch.equal(x, before)


def test_bad_input_is_named():
    images = sample_images()[:4]
    x = images.float() / 255
    cases = [
        (lambda: equalize(x), "images are torch.float32 (4, 3, 32, 32); expected uint8 (B, 3, H, W)"),
        (lambda: autocontrast(images[0]), "images are torch.uint8 (3, 32, 32); expected uint8 (B, 3, H, W)"),
        (lambda: preprocess(x, True), "images are torch.float32"),
        (lambda: posterize(images, torch.ones(3)), "levels have shape (3,); expected one per image, (4,)"),
        (lambda: solarize(images, torch.tensor(3)), "levels have shape (); expected one per image, (4,)"),
        (lambda: gaussian_noise(x, -0.1), "sigma_max -0.1: must be zero or more"),
        (lambda: gaussian_noise(x, math.nan), "sigma_max nan: must be zero or more"),
        (lambda: mixed_augmentation(x, 0), "beta 0: must be above zero"),
        (lambda: mixed_augmentation(x, math.nan), "beta nan: must be above zero"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
