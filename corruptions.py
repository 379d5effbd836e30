"""The 19 corruptions of CIFAR-C at five severities (Fig. 4); as a script, a CIFAR-C folder.

    python corruptions.py --dataset cifar10 --data data              # makes data/CIFAR-10-C
    python corruptions.py --dataset cifar10 --data data --download   # official, 2.9 GB
    python corruptions.py --dataset path/to/mine.npz --data data     # makes data/mine-C

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), with their constants for 32x32 images.

Each corruption is a function of (x, c, draw): a batch x, uint8 (N, 32, 32, 3) RGB; the constants c
of one severity; and draw(k), which gives k uniform numbers in [0, 1) per image, float64 (N, k), the
same at each call. It returns floats with 1 for white, which `corrupt` clips and truncates to uint8,
or finished uint8 images. The images of a batch do not affect each other. To add a corruption, write
such a function and its entry in SEVERITIES; the script then adds it to a folder made here.
"""

import functools
import gc
import importlib.metadata
import io
import itertools
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import cv2
import joblib
import numpy as np
import PIL
import scipy
from PIL import Image
from scipy import sparse
from scipy.ndimage import gaussian_filter
from scipy.special import ndtri, pdtr
from tqdm import tqdm

# joblib's workers import this file: data and utils, which import torch, are imported inside the
# functions that use them.

SIDE = 32
PIXELS = SIDE * SIDE
CHUNK = 250  # images at a time: some megabytes, near the processor's cache
OFFICIAL = {  # url, md5
    "cifar10": (
        "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar?download=1",
        "56bf5dcef84df0e2308c6dcbcbbd8499",
    ),
    "cifar100": (
        "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar?download=1",
        "11f0ed0f1191edbf9fa23466ae6021d3",
    ),
}


# The corruptions


def gaussian_noise(x: np.ndarray, c: float, draw: Callable) -> np.ndarray:
    """x + N(0, c)"""
    return x / 255 + c * normal(draw(3 * PIXELS)).reshape(x.shape)


@functools.cache
def poisson_table(c: float) -> np.ndarray:
    """The distribution function of Poisson(c k / 255) at 0, 1, ..., one row per grey level k."""
    counts = np.arange(int(c + 10 * c**0.5) + 20)
    return pdtr(counts, c * np.arange(256)[:, None] / 255)


def shot_noise(x: np.ndarray, c: float, draw: Callable) -> np.ndarray:
    """Poisson(c x) / c"""
    table = poisson_table(c)
    # Adding k to row k makes one ascending table; searching it for k + u inverts the distribution.
    ascending = (table + np.arange(256)[:, None]).ravel()
    values = x.reshape(len(x), -1) + draw(3 * PIXELS)
    place = ascending.searchsorted(values, side="right").reshape(x.shape)
    return (place - x.astype(int) * table.shape[1]) / c


def impulse_noise(x: np.ndarray, c: float, draw: Callable) -> np.ndarray:
    """Salt and pepper: each value (a channel of a pixel) becomes 0 or 1 with probability c / 2."""
    u = draw(3 * PIXELS).reshape(x.shape)
    return np.where(u < c, np.where(u < c / 2, 0, 255), x).astype(np.uint8)


def speckle_noise(x: np.ndarray, c: float, draw: Callable) -> np.ndarray:
    """x + x N(0, c)"""
    return x / 255 * (1 + c * normal(draw(3 * PIXELS)).reshape(x.shape))


def gaussian_blur(x: np.ndarray, c: float, draw: Callable) -> np.ndarray:
    """Gaussian filter of sigma c."""
    return blur(x / 255, c)


def glass_blur(x: np.ndarray, c: tuple[float, int, int], draw: Callable) -> np.ndarray:
    """Blur, let each pixel in turn take the value of one near it, blur; c = (sigma, d, passes).

    The published code means to swap the two pixels but only copies; so does this.
    """
    sigma, d, passes = c
    inside = range(SIDE - d, d, -1)
    visits = list(itertools.product(inside, inside)) * passes
    jumps = (draw(2 * len(visits)) * (2 * d)).astype(int) - d  # (dy, dx) in {-d..d-1}
    jumps = jumps.reshape(len(x), len(visits), 2)
    n = np.arange(len(x))
    pixels = to_uint8(blur(x / 255, sigma)).reshape(len(x), PIXELS, 3).transpose(1, 0, 2).copy()
    sources = (jumps @ [SIDE, 1]).T + [[SIDE * h + w] for h, w in visits]  # (visits, N)
    for (h, w), source in zip(visits, sources, strict=True):
        pixels[SIDE * h + w] = pixels[source, n]
    return blur(pixels.transpose(1, 0, 2).reshape(x.shape) / 255, sigma)


def defocus_blur(x: np.ndarray, c: tuple[float, float], draw: Callable) -> np.ndarray:
    """Correlate with a disk smoothed by a 3x3 Gaussian, border reflect-101: c = (radius, sigma)."""
    radius, sigma = c
    grid = np.arange(-8, 9)
    disk = (grid**2 + grid[:, None] ** 2 <= radius**2).astype(np.float64)
    disk = cv2.GaussianBlur(disk / disk.sum(), (3, 3), sigma)[6:11, 6:11]  # zero outside
    return np.stack(
        [cv2.filter2D(image, -1, disk, borderType=cv2.BORDER_REFLECT_101) for image in x / 255]
    )


def motion_blur(x: np.ndarray, c: tuple[int, float], draw: Callable) -> np.ndarray:
    """ImageMagick's motion blur at an angle uniform in (-45, 45) degrees: c = (radius, sigma)."""
    return motion(x, *c, degrees=90 * draw(1)[:, 0] - 45)


def zoom_blur(x: np.ndarray, c: float, draw: Callable) -> np.ndarray:
    """The mean of the image and of its zooms by 1, 1.01, ..., c."""
    # round-off decides whether c itself is included, as in the published code
    factors = np.arange(1, c, 0.01).tolist()
    mean = sum(map(zoom_matrix, factors), start=sparse.eye_array(PIXELS, format="csr")) / (
        len(factors) + 1
    )
    return apply_matrix(mean, x / 255)


def snow(x: np.ndarray, c: tuple[float, ...], draw: Callable) -> np.ndarray:
    """Flakes smeared by motion, twice (upright and upside down), over a whitened image.

    c = (mean, deviation, zoom, threshold, radius, sigma, share of the image kept).
    """
    u = draw(PIXELS + 1)
    layer = (c[0] + c[1] * normal(u[:, 1:])).reshape(-1, SIDE, SIDE, 1)
    layer = apply_matrix(zoom_matrix(c[2]), layer)
    layer = (
        motion(to_uint8(np.where(layer < c[3], 0, layer)), c[4], c[5], degrees=90 * u[:, 0] - 135)
        / 255
    )
    y = x / 255
    gray = (y * [0.299, 0.587, 0.114]).sum(axis=-1, keepdims=True)
    return c[6] * y + (1 - c[6]) * np.maximum(y, 1.5 * gray + 0.5) + layer + layer[:, ::-1, ::-1]


def frost(x: np.ndarray, c: tuple[float, float], draw: Callable) -> np.ndarray:
    """c0 x + c1 f with f a random 32x32 crop of one of five photographs of frost."""
    photographs = frost_photographs()
    f = np.empty_like(x)
    for n, (which, down, right) in enumerate(draw(3)):
        photograph = photographs[int(5 * which)]
        top, left = (
            int(down * (photograph.shape[0] - SIDE)),
            int(right * (photograph.shape[1] - SIDE)),
        )
        f[n] = photograph[top : top + SIDE, left : left + SIDE]
    return np.clip(c[0] * x + c[1] * f, 0, 255).astype(np.uint8)


def fog(x: np.ndarray, c: tuple[float, float], draw: Callable) -> np.ndarray:
    """(x + c0 p) m / (m + c0): p plasma of decay c1, m the image's maximum."""
    m = x.max(axis=(1, 2, 3), keepdims=True) / 255
    return (x / 255 + c[0] * plasma(draw(PIXELS - 1), c[1])[..., None]) * m / (m + c[0])


def brightness(x: np.ndarray, c: float, draw: Callable) -> np.ndarray:
    """V + c in HSV, clipped: with H and S fixed, R, G and B grow as V does."""
    y = x / 255
    v = y.max(axis=-1, keepdims=True)
    brighter = np.minimum(v + c, 1)
    return np.where(v > 0, y * (brighter / np.maximum(v, 1 / 255)), brighter)


def contrast(x: np.ndarray, c: float, draw: Callable) -> np.ndarray:
    """(x - mean) c + mean, the mean per image and channel."""
    mean = x.sum(axis=(1, 2), keepdims=True, dtype=int) / (255 * PIXELS)
    return (x / 255 - mean) * c + mean


def saturate(x: np.ndarray, c: tuple[float, float], draw: Callable) -> np.ndarray:
    """c0 S + c1 in HSV, clipped: with H and V fixed, the distances to V grow as S does."""
    y = x / 255
    v, low = y.max(axis=-1, keepdims=True), y.min(axis=-1, keepdims=True)
    s = (v - low) / np.maximum(v, 1 / 255)
    gray = v == low  # has hue 0: red
    distance = np.where(gray, [0.0, 1.0, 1.0], (v - y) / np.where(gray, 1, v - low))
    return v * (1 - np.clip(c[0] * s + c[1], 0, 1) * distance)


def elastic_transform(x: np.ndarray, c: tuple[float, float, float], draw: Callable) -> np.ndarray:
    """A random affine warp, then smooth random displacements.

    c = (alpha, sigma, affine) in units of 32 pixels.
    """
    alpha, sigma, affine = SIDE * np.array(c)
    u = 2 * draw(6 + 2 * PIXELS) - 1
    points = np.array([[26.0, 26.0], [26.0, 6.0], [6.0, 6.0]])  # (column, row)
    moved = points + affine * u[:, :6].reshape(-1, 3, 2)
    moved = np.concatenate([moved, np.ones((len(x), 3, 1))], axis=2)
    back = np.linalg.solve(moved, points[None])  # (N, 3, 2)
    (a, d), (b, e), (c, f) = back.transpose(1, 2, 0)[..., None, None]
    column, row = np.arange(SIDE), np.arange(SIDE)[:, None]
    y = bilinear(x / 255, d * column + e * row + f, a * column + b * row + c, repeat_edge=False)
    fields = u[:, 6:].reshape(-1, 2, SIDE, SIDE)
    smooth = gaussian_filter(fields, (0, 0, sigma, sigma), mode="reflect", truncate=3)
    dx, dy = alpha * smooth.transpose(1, 0, 2, 3)
    return bilinear(y, row + dy, column + dx, repeat_edge=True)


def pixelate(x: np.ndarray, c: float, draw: Callable) -> np.ndarray:
    """Pillow's BOX resize to int(32 c) and back."""
    box = Image.Resampling.BOX
    small = [Image.fromarray(image).resize((int(SIDE * c),) * 2, box) for image in x]
    return np.stack([image.resize((SIDE, SIDE), box) for image in small])


def jpeg_compression(x: np.ndarray, c: int, draw: Callable) -> np.ndarray:
    """Pillow's JPEG at quality c."""
    y = np.empty_like(x)
    for n, image in enumerate(x):
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=c)
        y[n] = Image.open(file)
    return y


def spatter(x: np.ndarray, c: tuple[float, ...], draw: Callable) -> np.ndarray:
    """Drops of water or mud.

    c = (mean, deviation, sigma, threshold, strength of water or sigma of mud, 0 water or 1 mud).
    """
    liquid = blur((c[0] + c[1] * normal(draw(PIXELS))).reshape(-1, SIDE, SIDE), c[2])
    liquid[liquid < c[3]] = 0
    if c[5]:
        m = blur((liquid > c[3]).astype(np.float64), c[4])[..., None]
        m[m < 0.8] = 0
        return x / 255 * (1 - m) + m * (np.array([63, 42, 20]) / 255)
    liquid = (liquid * 255).astype(np.int64).astype(np.uint8)  # wraps above 255, as published
    m = liquid.astype(np.float64)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    for n, drops in enumerate(liquid):  # shaded by the distance to their outlines
        distance = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
        distance = cv2.equalizeHist(cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8))
        m[n] *= cv2.blur(cv2.filter2D(distance, cv2.CV_8U, emboss), (3, 3))
    m *= c[4] / np.maximum(m.max(axis=(1, 2), keepdims=True), 1)
    # Meant as B, G, R and added to R, G, B: the published slip is kept.
    turquoise = np.array([175, 238, 238]) / 255
    return x / 255 + m[..., None] * turquoise


SEVERITIES = {  # function: its constants at severity 1 to 5
    gaussian_noise: (0.04, 0.06, 0.08, 0.09, 0.10),
    shot_noise: (500, 250, 100, 75, 50),
    impulse_noise: (0.01, 0.02, 0.03, 0.05, 0.07),
    speckle_noise: (0.06, 0.1, 0.12, 0.16, 0.2),
    gaussian_blur: (0.4, 0.6, 0.7, 0.8, 1),
    glass_blur: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    defocus_blur: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    motion_blur: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    zoom_blur: (1.06, 1.11, 1.16, 1.21, 1.26),
    snow: (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    frost: ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    fog: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    brightness: (0.05, 0.1, 0.15, 0.2, 0.3),
    contrast: (0.75, 0.5, 0.4, 0.3, 0.15),
    saturate: ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    elastic_transform: (
        (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03),
    ),
    pixelate: (0.95, 0.9, 0.85, 0.75, 0.65),
    jpeg_compression: (80, 65, 58, 50, 40),
    spatter: (
        (0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1),
    ),
}  # fmt: skip


def uniform(seed: int, name: str, severity: int, first: int, count: int, k: int) -> np.ndarray:
    """k uniform numbers in [0, 1) for each image first, ..., first + count - 1; float64 (count, k).

    Philox is a function of (key, counter) that gives four numbers per count. The key comes from
    (seed, name, severity), and each image owns ceil(k / 4) counts, so its numbers do not depend on
    the other images.
    """
    key = np.random.SeedSequence([severity, *name.encode(), seed]).generate_state(2, np.uint64)
    counts = -(-k // 4)
    bits = np.random.Philox(key=key, counter=first * counts)
    return np.random.Generator(bits).random((count, 4 * counts))[:, :k]


def corrupt(
    images: np.ndarray, name: str, severity: int, seed: int = 0, first_index: int = 0
) -> np.ndarray:
    """Corrupt images as CIFAR-C does, uint8 (N, 32, 32, 3) RGB to the same.

    Image i's draws depend on (seed, name, severity, first_index + i) alone, not on the chunk or
    process. Raises ValueError for another shape or dtype, an unknown name or severity, and
    UserError for frost without its photographs.
    """
    functions = {function.__name__: function for function in SEVERITIES}
    if name not in functions:
        raise ValueError(f"unknown corruption {name!r}. Use one of {', '.join(functions)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity {severity!r} is not one of 1, 2, 3, 4, 5")
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"images must be uint8 (N, 32, 32, 3), not {images.dtype} {images.shape}")
    function, c = functions[name], SEVERITIES[functions[name]][severity - 1]
    corrupted = np.empty_like(images)
    for start in range(0, len(images), CHUNK):
        x = images[start : start + CHUNK]
        draw = functools.partial(uniform, seed, name, severity, first_index + start, len(x))
        y = function(x, c, draw)
        corrupted[start : start + CHUNK] = y if y.dtype == np.uint8 else to_uint8(y)
    return corrupted


# Building blocks


@functools.cache
def frost_photographs() -> list[np.ndarray]:
    """The five photographs of frost at a fifth of their size, uint8 (H, W, 3) RGB.

    They are data files of the package imagecorruptions, whose code is never imported.
    Raises UserError without them.
    """
    names = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
    try:
        package = importlib.metadata.distribution("imagecorruptions")
        files = [package.locate_file(f"imagecorruptions/frost/{name}") for name in names]
        images = [cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR) for file in files]
        return [cv2.resize(image, (0, 0), fx=0.2, fy=0.2)[..., ::-1] for image in images]
    except (importlib.metadata.PackageNotFoundError, OSError, cv2.error):
        from utils import UserError

        raise UserError(
            "frost needs photographs:"
            " python -m pip install --no-deps imagecorruptions==1.1.2 --force-reinstall"
        ) from None


def to_uint8(y: np.ndarray) -> np.ndarray:
    """Clip floats to [0, 1], scale by 255 and truncate (not round), as published."""
    return (np.clip(y, 0, 1) * 255).astype(np.uint8)


def normal(u: np.ndarray) -> np.ndarray:
    """Standard normal numbers from uniform ones in [0, 1), by the inverse distribution function."""
    return ndtri(np.maximum(u, 2.0**-54))


def blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (N, 32, 32, ...); nearest border, truncated at 4 sigma."""
    return gaussian_filter(x, (0, sigma, sigma) + (0,) * (x.ndim - 3), mode="nearest", truncate=4)


def motion(x: np.ndarray, radius: int, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """ImageMagick's motion blur of uint8 (N, 32, 32, C) at angles (N,), rounded to uint8.

    2 radius + 1 taps of weight exp(-i^2 / (2 sigma^2)), one-sided: tap i reads the pixel displaced
    by (ceil(i cos a - 1/2) columns, ceil(i sin a - 1/2) rows), clamped to the image.
    """
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    a = np.deg2rad(degrees)[:, None]
    margin = 2 * radius
    columns = np.ceil(taps * np.cos(a) - 0.5).astype(int) + margin
    rows = np.ceil(taps * np.sin(a) - 0.5).astype(int) + margin
    border = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    padded = np.pad(x, border, "edge").astype(np.float32)
    y = np.zeros(x.shape, np.float32)
    for n in range(len(x)):
        for weight, row, column in zip(weights, rows[n], columns[n], strict=True):
            y[n] += weight * padded[n, row : row + SIDE, column : column + SIDE]
    return np.rint(y).astype(np.uint8)


@functools.cache
def zoom_matrix(factor: float) -> sparse.csr_array:
    """Centre crop to ceil(32 / factor) pixels and linear zoom back, (1024, 1024).

    As scipy.ndimage.zoom(order=1): round(crop * factor) places from the crop's first pixel to its
    last, trimmed to 32.
    """
    crop = int(np.ceil(SIDE / factor))
    size = round(crop * factor)
    place = (np.arange(SIDE) + (size - SIDE) // 2) * (crop - 1) / (size - 1)
    low = np.minimum(place.astype(int), crop - 2)
    first = (SIDE - crop) // 2 + low
    along = np.zeros((SIDE, SIDE))
    along[np.arange(SIDE), first] = 1 - (place - low)
    along[np.arange(SIDE), first + 1] = place - low
    return sparse.csr_array(sparse.kron(along, along))


def apply_matrix(matrix: sparse.csr_array, x: np.ndarray) -> np.ndarray:
    """Apply a (1024, 1024) matrix to each image and channel of (N, 32, 32, C)."""
    columns = x.transpose(1, 2, 3, 0)  # the pixels first
    return (matrix @ columns.reshape(PIXELS, -1)).reshape(columns.shape).transpose(3, 0, 1, 2)


def bilinear(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, repeat_edge: bool) -> np.ndarray:
    """Read (N, 32, 32, C) at real-valued places (N, 32, 32), mirrored at the border.

    The edge pixel is repeated by the mirror (scipy's `reflect`) or not (OpenCV's reflect-101).
    """
    period, top = (2 * SIDE, 2 * SIDE - 1) if repeat_edge else (2 * SIDE - 2, 2 * SIDE - 2)
    row, column = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - row)[..., None], (columns - column)[..., None]
    flat = x.reshape(-1, x.shape[-1])
    image = np.arange(len(x))[:, None, None] * PIXELS

    def read(i, j):
        i, j = i % period, j % period
        return flat[image + np.minimum(i, top - i) * SIDE + np.minimum(j, top - j)]

    upper = (1 - right) * read(row, column) + right * read(row, column + 1)
    lower = (1 - right) * read(row + 1, column) + right * read(row + 1, column + 1)
    return (1 - down) * upper + down * lower


def plasma(u: np.ndarray, decay: float) -> np.ndarray:
    """Diamond-square noise on a 32x32 torus from u (N, 1023), (N, 32, 32) in [0, 1].

    Every new point is the mean of its four neighbours plus wibble * U(-wibble, wibble).
    """
    p = np.zeros((len(u), SIDE, SIDE))
    wibble = 100.0
    for step in (32, 16, 8, 4, 2):
        half, cells = step // 2, SIDE // step
        noise, u = np.split(u, [3 * cells**2], axis=1)
        noise = wibble * wibble * (2 * noise.reshape(-1, 3, cells, cells) - 1)
        corners, centres = p[:, ::step, ::step], p[:, half::step, half::step]
        across = corners + np.roll(corners, -1, axis=2)
        down = corners + np.roll(corners, -1, axis=1)
        centres[:] = (across + np.roll(across, -1, axis=1)) / 4 + noise[:, 0]
        right = (across + centres + np.roll(centres, 1, axis=1)) / 4 + noise[:, 1]
        below = (down + centres + np.roll(centres, 1, axis=2)) / 4 + noise[:, 2]
        p[:, ::step, half::step], p[:, half::step, ::step] = right, below
        wibble /= decay
    p -= p.min(axis=(1, 2), keepdims=True)
    return p / p.max(axis=(1, 2), keepdims=True)


# A CIFAR-C folder


def generate(
    folder: Path, images: np.ndarray, labels: np.ndarray, record: dict, workers: int
) -> int:
    """Write the corruptions that `folder` lacks; returns how many were made.

    images uint8 (N, 32, 32, 3) and labels int (N,) are the clean test set. `record` becomes
    generated.json. Raises UserError if the folder's own has another seed, other clean images or,
    where files are still to be made, other versions; if a file cannot be written; and if frost has
    no photographs.
    """
    import data
    from utils import UserError, atomic_write, read_json, write_json

    names = [f.__name__ for f in SEVERITIES if not (folder / f"{f.__name__}.npy").is_file()]
    if "frost" in names:
        frost_photographs()  # fail now, not after minutes
    if (folder / "generated.json").is_file():
        made_with = read_json(folder / "generated.json")
        for key in ("seed", "clean_sha256", "versions") if names else ("seed", "clean_sha256"):
            if made_with.get(key) == record[key]:
                continue
            made = f"with {key} {made_with.get(key)}, not {record[key]}"
            if key == "clean_sha256":
                made = "from other test images"
            raise UserError(f"{folder} was made {made}. {data.move_away(folder)}")
    else:
        write_json(folder / "generated.json", record)
    if not (folder / "labels.npy").is_file():
        smallest = np.min_scalar_type(labels.max())  # uint8, as in the official sets
        with atomic_write(folder / "labels.npy") as file:
            np.save(file, np.tile(labels.astype(smallest), 5))
    starts = range(0, len(images), CHUNK)
    count = 5 * len(images)
    try:
        with (
            joblib.Parallel(
                workers, batch_size=1, max_nbytes=None, initializer=start_worker
            ) as parallel,
            tqdm(total=count * len(names), unit="image", unit_scale=True, disable=None) as bar,
        ):
            for name in names:
                corrupted = parallel(
                    joblib.delayed(corrupt)(images[i : i + CHUNK], name, k, record["seed"], i)
                    for k, i in itertools.product(range(1, 6), starts)
                )
                with atomic_write(folder / f"{name}.npy") as file:
                    np.save(file, np.concatenate(corrupted))
                bar.update(count)
                tqdm.write(f"{name}: done")
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed (too little memory?). The same command resumes;"
            " with a smaller --workers it needs less memory"
        ) from None
    return len(names)


def start_worker() -> None:
    """Called once in each of joblib's workers."""
    # Ctrl-C in a terminal reaches all processes: the parent reacts, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # joblib collects garbage every second; leaving out what is imported saves a tenth of the time
    gc.freeze()


def download(folder: Path, url: str, md5: str) -> None:
    """Fetch the official archive and add the files that `folder` lacks.

    A folder without arrays gets an official.json of url and md5. Raises UserError on any failure.
    """
    from utils import UserError, torchvision, write_json

    archive, unpacked = Path(f"{folder}.tar"), Path(f"{folder}.unpacking")
    fetch = torchvision.datasets.utils.download_and_extract_archive
    try:
        fetch(url, archive.parent, unpacked, archive.name, md5, remove_finished=True)
        folder.mkdir(exist_ok=True)
        if not any(folder.glob("*.npy")):
            write_json(folder / "official.json", {"url": url, "md5": md5})
        for file in (unpacked / folder.name).iterdir():
            if not (folder / file.name).exists():
                shutil.move(file, folder)
    except Exception as error:  # network, disk and archive can raise nearly anything
        raise UserError(
            f"downloading {url} failed ({error}). Try again, or fetch it by hand to {archive}"
            " (the next try unpacks and removes it), or make a set here, without --download"
        ) from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    """Make or download a corrupted test set, or keep the one that exists."""
    import data
    from utils import Parser, number

    parser = Parser(
        description="Make a CIFAR-C folder: the test images under 19 corruptions, five severities."
    )
    add = parser.add_argument
    add(
        "--dataset", default="cifar10", help="cifar10, cifar100, digits or the path of an .npz file"
    )
    add("--data", type=Path, default=Path("data"), help="folder of the data sets")
    add("--seed", type=number(int, low=0), default=0, help="seed of all random draws")
    add(
        "--workers",
        type=number(int, low=1),
        default=joblib.cpu_count(),
        help="processes, by default one per available core; the result is the same",
    )
    add("--download", action="store_true", help="fetch the official set (2.9 GB) if none exists")
    args = parser.parse_args(argv)
    if args.download and args.dataset not in OFFICIAL:
        parser.error(f"--download: {args.dataset} has no official corrupted set; omit the flag")
    clean = data.load_dataset(args.dataset, args.data, need_train=False)
    folder = data.corrupted_folder(clean.name, args.data)
    data.check_root(folder, "labels.npy")
    made_here = data.corruption_source(clean.name, args.data) == "generated"
    if not args.download and (made_here or not any(folder.glob("*.npy"))):
        libraries = {"numpy": np, "scipy": scipy, "opencv": cv2, "pillow": PIL}
        record = {
            "dataset": clean.name,
            "source": clean.source,
            "seed": args.seed,
            "clean_sha256": data.images_sha256(clean.test_images),
            "versions": {name: library.__version__ for name, library in libraries.items()},
        }
        images = clean.test_images.permute(0, 2, 3, 1).contiguous().numpy()
        made = generate(folder, images, clean.test_labels.numpy(), record, args.workers)
        kept = len(SEVERITIES) - made
        print(f"{folder}: {made} corruptions of {len(images)} images made, {kept} kept")
    elif args.download and not made_here and data.missing_files(folder):
        download(folder, *OFFICIAL[args.dataset])
    data.check_corrupted(clean, args.data)
    print(f"{folder}: complete, {data.corruption_source(clean.name, args.data)}")


if __name__ == "__main__":
    import corruptions  # by this name the workers import `corrupt`
    from utils import run_main

    sys.exit(run_main(corruptions.main))
