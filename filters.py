"""What corruptions.py is made of: Gaussian and motion blur, zoom, bilinear look-up, plasma noise.

All work on batches of 32x32 images, (N, 32, 32, ...), and what becomes of an image does not depend on the others in its
batch, to the last bit: so there is no dense matrix product, whose round-off may change with N.
"""

import functools

import numpy as np
import scipy.sparse
from scipy.ndimage import gaussian_filter
from scipy.special import ndtri

SIDE = 32
PIXELS = SIDE * SIDE


def to_uint8(y: np.ndarray) -> np.ndarray:
    """Clip floats to [0, 1], scale by 255 and truncate (not round), as the published sets were written."""
    return (np.clip(y, 0, 1) * 255).astype(np.uint8)


def normal(u: np.ndarray) -> np.ndarray:
    """Standard normal numbers from uniform ones in [0, 1), one for one, by the inverse of the distribution function."""
    return ndtri(np.maximum(u, 2.0**-54))


def blur(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (N, 32, 32, ...) along both image axes; nearest border, truncated at 4 sigma."""
    return gaussian_filter(x, (0, sigma, sigma) + (0,) * (x.ndim - 3), mode="nearest", truncate=4)


def motion(x: np.ndarray, radius: int, sigma: float, degrees: np.ndarray) -> np.ndarray:
    """ImageMagick's motion blur of uint8 (N, 32, 32, C) at angles (N,), rounded to uint8 as ImageMagick does.

    2 radius + 1 taps of weight exp(-i^2 / (2 sigma^2)), one-sided: tap i reads the pixel displaced by
    (ceil(i cos a - 1/2) columns, ceil(i sin a - 1/2) rows), clamped to the image.
    """
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).astype(np.float32)
    a = np.deg2rad(degrees)[:, None]
    margin = 2 * radius
    columns = np.ceil(taps * np.cos(a) - 0.5).astype(int) + margin
    rows = np.ceil(taps * np.sin(a) - 0.5).astype(int) + margin
    padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)), "edge").astype(np.float32)
    y = np.zeros(x.shape, np.float32)
    for n in range(len(x)):
        for weight, row, column in zip(weights, rows[n], columns[n], strict=True):
            y[n] += weight * padded[n, row : row + SIDE, column : column + SIDE]
    return np.rint(y).astype(np.uint8)


@functools.cache
def zoom_matrix(factor: float) -> scipy.sparse.csr_array:
    """The centre crop to ceil(32 / factor) pixels and linear zoom back, (1024, 1024) on flattened images.

    As scipy.ndimage.zoom(order=1): round(crop * factor) places from the crop's first pixel to its last, trimmed to 32.
    """
    crop = int(np.ceil(SIDE / factor))
    size = round(crop * factor)
    place = (np.arange(SIDE) + (size - SIDE) // 2) * (crop - 1) / (size - 1)
    low = np.minimum(place.astype(int), crop - 2)
    first = (SIDE - crop) // 2 + low
    along = np.zeros((SIDE, SIDE))
    along[np.arange(SIDE), first] = 1 - (place - low)
    along[np.arange(SIDE), first + 1] = place - low
    return scipy.sparse.csr_array(scipy.sparse.kron(along, along))


@functools.cache
def mean_zoom_matrix(factors: tuple[float, ...]) -> scipy.sparse.csr_array:
    """The mean of the image itself and of its zooms by each factor, (1024, 1024) on flattened images."""
    return sum(map(zoom_matrix, factors), start=scipy.sparse.eye_array(PIXELS, format="csr")) / (len(factors) + 1)


def apply_matrix(matrix: scipy.sparse.csr_array, x: np.ndarray) -> np.ndarray:
    """Apply a (1024, 1024) matrix to each image and channel of (N, 32, 32, C)."""
    columns = x.reshape(len(x), PIXELS, -1).transpose(1, 0, 2)
    return (matrix @ columns.reshape(PIXELS, -1)).reshape(columns.shape).transpose(1, 0, 2).reshape(x.shape)


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
        across, down = corners + np.roll(corners, -1, axis=2), corners + np.roll(corners, -1, axis=1)
        centres[:] = (across + np.roll(across, -1, axis=1)) / 4 + noise[:, 0]
        p[:, ::step, half::step] = (across + centres + np.roll(centres, 1, axis=1)) / 4 + noise[:, 1]
        p[:, half::step, ::step] = (down + centres + np.roll(centres, 1, axis=2)) / 4 + noise[:, 2]
        wibble /= decay
    p -= p.min(axis=(1, 2), keepdims=True)
    return p / p.max(axis=(1, 2), keepdims=True)
