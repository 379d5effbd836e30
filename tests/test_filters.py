"""filters.py against scipy.ndimage and loops."""

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

import filters

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 32, 32, 2))


def test_to_uint8_clips_and_truncates():
    y = np.array([-0.1, 0, 0.5, 0.9999, 1, 1.2])
    assert filters.to_uint8(y).tolist() == [0, 0, 127, 254, 255, 255]
    levels = np.arange(256)
    assert (filters.to_uint8(levels / 255) == levels).all()


def test_normal_is_the_inverse_distribution_function_and_finite():
    u = RNG.random(1000)
    assert np.abs(filters.normal(u) - scipy.stats.norm.ppf(u)).max() < 1e-9
    assert np.isfinite(filters.normal(np.array([0.0, 1 - 2.0**-53]))).all()


@pytest.mark.parametrize("sigma", [0.05, 0.4, 1, 2.5])
def test_blur_mixes_neither_images_nor_channels(sigma):
    got = filters.blur(IMAGES, sigma)
    for n, c in np.ndindex(3, 2):
        alone = scipy.ndimage.gaussian_filter(IMAGES[n, ..., c], sigma, mode="nearest", truncate=4)
        assert np.abs(got[n, ..., c] - alone).max() < 1e-12


@pytest.mark.parametrize("factor", [1, 1.01, 1.06, 1.13, 1.25, 1.2500000000000002, 1.75, 2.25])
def test_zoom_is_scipys_linear_zoom_of_the_centre(factor):
    crop = math.ceil(32 / factor)
    top = (32 - crop) // 2
    got = filters.apply_matrix(filters.zoom_matrix(factor), IMAGES)
    for n, c in np.ndindex(3, 2):
        zoomed = scipy.ndimage.zoom(IMAGES[n, top : top + crop, top : top + crop, c], factor, order=1)
        trim = (len(zoomed) - 32) // 2
        assert np.abs(got[n, ..., c] - zoomed[trim : trim + 32, trim : trim + 32]).max() < 1e-12


@pytest.mark.parametrize(("repeat_edge", "mode"), [(True, "reflect"), (False, "mirror")])
def test_bilinear_is_scipys_interpolation_also_far_outside(repeat_edge, mode):
    rows, columns = RNG.uniform(-90, 120, (2, 3, 32, 32))
    got = filters.bilinear(IMAGES, rows, columns, repeat_edge)
    for n, c in np.ndindex(3, 2):
        expected = scipy.ndimage.map_coordinates(IMAGES[n, ..., c], [rows[n], columns[n]], order=1, mode=mode)
        assert np.abs(got[n, ..., c] - expected).max() < 1e-9


def test_motion_reads_the_pixels_along_its_angle():
    image = np.zeros((1, 32, 32, 1), np.uint8)
    image[0, 16, 16] = 255
    for degrees, place in [(0, (16, 15)), (90, (15, 16)), (-90, (17, 16)), (180, (16, 17))]:
        smeared = filters.motion(image, 2, 1.0, np.array([degrees]))[0, ..., 0]
        weights = np.exp(-np.arange(5) ** 2 / 2) / np.exp(-np.arange(5) ** 2 / 2).sum()
        assert smeared[16, 16] == round(255 * weights[0])
        assert smeared[place] == round(255 * weights[1])
        assert smeared.astype(int).sum() == pytest.approx(255, abs=3)


def test_plasma_fills_zero_to_one_and_gets_rougher_as_its_decay_falls():
    u = RNG.random((200, 1023))
    smooth, rough = filters.plasma(u, 3), filters.plasma(u, 1.75)
    for p in (smooth, rough):
        assert (p.min(axis=(1, 2)) == 0).all()
        assert (p.max(axis=(1, 2)) == 1).all()
    assert np.abs(np.diff(rough)).mean() > 1.2 * np.abs(np.diff(smooth)).mean()
