"""corruptions.py against per-image loops written from the benchmark's definition, and the folder that it writes."""

import colorsys
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from PIL import Image

import corruptions
import data
from corruptions import corrupt, uniform

ppf = scipy.stats.norm.ppf


@functools.cache
def pictures():
    """uint8 (9, 32, 32, 3): smooth ones, noise, and flat black, white and grey."""
    rng = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(rng.normal(size=(5, 32, 32, 3)), (0, 3, 3, 0), mode="wrap")
    flat = [np.full((32, 32, 3), level, np.uint8) for level in (0, 255, 100)]
    return np.stack([*to_bytes(0.5 + 1.5 * smooth), rng.integers(0, 256, (32, 32, 3), np.uint8), *flat])


# The definition, for one image: x float (32, 32, 3) in [0, 1], its constants, its uniform draws -> unclipped float


def to_bytes(y):
    return (np.clip(y, 0, 1) * 255).astype(np.uint8)


def smoothed(x, sigma, truncate=4, mode="nearest"):
    k = np.arange(-int(truncate * sigma + 0.5), int(truncate * sigma + 0.5) + 1)
    weights = np.exp(-(k**2) / (2 * max(sigma, 1e-9) ** 2))
    for axis in (0, 1):
        x = scipy.ndimage.correlate1d(x, weights / weights.sum(), axis, mode=mode)
    return x


def moved(image, radius, sigma, angle):
    """Motion blur of a uint8 (32, 32, C) image, rounded to uint8 as ImageMagick does; in [0, 1]."""
    weights, total = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(2 * radius + 1)], 0
    for i, weight in enumerate(weights):
        right, down = (math.ceil(i * f(math.radians(angle)) - 0.5) for f in (math.cos, math.sin))
        rows, columns = np.clip(np.arange(32) + down, 0, 31), np.clip(np.arange(32) + right, 0, 31)
        total = total + weight / sum(weights) * image[rows][:, columns].astype(float)
    return np.floor(total + 0.5) / 255


def zoomed(image, factor):
    crop = math.ceil(32 / factor)
    top = (32 - crop) // 2
    image = scipy.ndimage.zoom(image[top : top + crop, top : top + crop], (factor, factor, 1)[: image.ndim], order=1)
    trim = (len(image) - 32) // 2
    return image[trim : trim + 32, trim : trim + 32]


def hsv(x, change):
    return np.array([[colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in row] for row in x])


def glass_blur(x, c, u):
    sigma, d, passes = c
    y, jumps = to_bytes(smoothed(x, sigma)), iter(np.floor(u * 2 * d).astype(int) - d)
    for _, h, w in itertools.product(range(passes), range(32 - d, d, -1), range(32 - d, d, -1)):
        dy, dx = next(jumps), next(jumps)
        y[h, w] = y[h + dy, w + dx]
    return smoothed(y / 255, sigma)


def defocus_blur(x, c, u):
    disk = np.array([[float(i * i + j * j <= c[0] ** 2) for j in range(-8, 9)] for i in range(-8, 9)])
    small = np.array([math.exp(-(i**2) / (2 * c[1] ** 2)) for i in (-1, 0, 1)])
    kernel = scipy.ndimage.convolve(disk / disk.sum(), np.outer(small, small) / small.sum() ** 2, mode="constant")
    return np.stack([scipy.ndimage.correlate(x[..., k], kernel, mode="mirror") for k in range(3)], axis=-1)


def snow(x, c, u):
    layer = zoomed(ppf(u[1:], c[0], c[1]).reshape(32, 32), c[2])
    layer = moved(to_bytes(np.where(layer < c[3], 0, layer)), c[4], c[5], angle=-135 + 90 * u[0])[..., None]
    gray = 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]
    return c[6] * x + (1 - c[6]) * np.maximum(x, 1.5 * gray + 0.5) + layer + np.rot90(layer, 2)


def frost(x, c, u):
    folder = Path(importlib.metadata.distribution("imagecorruptions").locate_file("imagecorruptions")) / "frost"
    path = next(folder.glob(f"frost{1 + math.floor(5 * u[0])}.*"))
    photograph = cv2.resize(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), None, fx=0.2, fy=0.2)
    top, left = (math.floor(v * (size - 32)) for v, size in zip(u[1:], photograph.shape, strict=False))
    return c[0] * x + c[1] * photograph[top : top + 32, left : left + 32] / 255


def fog(x, c, u):
    p, chance, wibble, step = np.zeros((32, 32)), iter(u), 100.0, 32
    while step >= 2:
        half = step // 2
        # The centres of all squares first, then the middles of their upper and then of their left sides.
        for down, right in ((half, half), (0, half), (half, 0)):
            square, diamond = itertools.product((-half, half), repeat=2), [(-half, 0), (half, 0), (0, -half), (0, half)]
            near = list(square) if down and right else diamond
            for i, j in itertools.product(range(down, 32, step), range(right, 32, step)):
                mean = sum(p[(i + a) % 32, (j + b) % 32] for a, b in near) / 4
                p[i, j] = mean + wibble * (wibble * (2 * next(chance) - 1))
        wibble, step = wibble / c[1], half
    p = (p - p.min()) / (p.max() - p.min())
    return (x + c[0] * p[..., None]) * x.max() / (x.max() + c[0])


def elastic_transform(x, c, u):
    alpha, sigma, affine = (32 * constant for constant in c)
    points = np.float32([[26, 26], [26, 6], [6, 6]])
    forward = cv2.getAffineTransform(points, points + np.float32(affine * (2 * u[:6] - 1)).reshape(3, 2))
    columns, rows = np.meshgrid(np.arange(32), np.arange(32))
    source = cv2.invertAffineTransform(forward) @ np.stack([columns.ravel(), rows.ravel(), np.ones(1024)])
    dx, dy = (alpha * smoothed(2 * part.reshape(32, 32) - 1, sigma, 3, "reflect") for part in np.split(u[6:], 2))
    look_up = functools.partial(scipy.ndimage.map_coordinates, order=1)
    warped = [look_up(x[..., k], source[::-1], mode="mirror").reshape(32, 32) for k in range(3)]
    return np.stack([look_up(y, [rows + dy, columns + dx], mode="reflect") for y in warped], axis=-1)


def pixelate(x, c, u):
    """Pillow's BOX filter: the mean of the pixels whose centres lie under each box, rows after columns, rounded."""
    small, y = int(32 * c), x * 255
    for (old, new), axis in itertools.product(((32, small), (small, 32)), (1, 0)):
        half = max(old / new, 1) / 2
        centres = [(k + 0.5) * old / new for k in range(new)]
        under = [[j for j in range(old) if centre - half <= j + 0.5 < centre + half] for centre in centres]
        y = np.stack([np.floor(np.take(y, js, axis).mean(axis) + 0.5) for js in under], axis)
    return y / 255


def jpeg_compression(x, c, u):
    Image.fromarray(to_bytes(x)).save(file := io.BytesIO(), "JPEG", quality=c)
    return np.array(Image.open(file)) / 255


def spatter(x, c, u):
    liquid = smoothed(ppf(u, c[0], c[1]).reshape(32, 32), c[2])
    liquid[liquid < c[3]] = 0
    if c[5] == 1:
        m = smoothed((liquid > c[3]).astype(float), c[4])[..., None]
        m[m < 0.8] = 0
        return x * (1 - m) + m * np.array([63, 42, 20]) / 255
    liquid = np.array([int(255 * v) % 256 for v in liquid.ravel()], np.uint8).reshape(32, 32)
    d = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    d = cv2.blur(cv2.threshold(d, 20, 20, cv2.THRESH_TRUNC)[1], (3, 3)).astype(np.uint8)
    d = cv2.equalizeHist(d).astype(int)
    d = scipy.ndimage.correlate(d, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), mode="mirror").clip(0, 255)
    m = liquid * np.rint(scipy.ndimage.uniform_filter(d.astype(float), 3, mode="mirror"))
    return x + (m / max(m.max(), 1) * c[4])[..., None] * np.array([175, 238, 238]) / 255


DEFINITIONS = {  # name: (uniform draws an image, the loop, the published constants, typed a second time)
    "gaussian_noise": (3072, lambda x, c, u: x + ppf(u, scale=c).reshape(x.shape), [0.04, 0.06, 0.08, 0.09, 0.10]),
    "shot_noise": (
        3072, lambda x, c, u: scipy.stats.poisson.ppf(u.reshape(x.shape), x * c) / c, [500, 250, 100, 75, 50]),
    "impulse_noise": (
        3072, lambda x, c, u: np.select([(v := u.reshape(x.shape)) < c / 2, v < c], [0, 1], x),
        [0.01, 0.02, 0.03, 0.05, 0.07]),
    "speckle_noise": (3072, lambda x, c, u: x + x * ppf(u, scale=c).reshape(x.shape), [0.06, 0.1, 0.12, 0.16, 0.2]),
    "gaussian_blur": (0, lambda x, c, u: smoothed(x, c), [0.4, 0.6, 0.7, 0.8, 1]),
    "glass_blur": (None, glass_blur, [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)]),
    "defocus_blur": (0, defocus_blur, [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)]),
    "motion_blur": (
        1, lambda x, c, u: moved(to_bytes(x), *c, angle=-45 + 90 * u[0]),
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)]),
    "zoom_blur": (  # np.arange's round-off is the published one: 7, 12, 16, 21, 26 factors
        0, lambda x, c, u: (x + sum(zoomed(x, factor) for factor in c)) / (len(c) + 1),
        [np.arange(1, end, 0.01) for end in (1.06, 1.11, 1.16, 1.21, 1.26)]),
    "snow": (1025, snow, [
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)]),
    "frost": (3, frost, [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)]),
    "fog": (1023, fog, [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)]),
    "brightness": (0, lambda x, c, u: hsv(x, lambda h, s, v: (h, s, min(v + c, 1))), [0.05, 0.1, 0.15, 0.2, 0.3]),
    "contrast": (
        0, lambda x, c, u: np.stack([(y - y.mean()) * c + y.mean() for y in np.moveaxis(x, 2, 0)], axis=-1),
        [0.75, 0.5, 0.4, 0.3, 0.15]),
    "saturate": (
        0, lambda x, c, u: hsv(x, lambda h, s, v: (h, min(s * c[0] + c[1], 1), v)),
        [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)]),
    "elastic_transform": (2054, elastic_transform, [
        (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)]),
    "pixelate": (0, pixelate, [0.95, 0.9, 0.85, 0.75, 0.65]),
    "jpeg_compression": (0, jpeg_compression, [80, 65, 58, 50, 40]),
    "spatter": (1024, spatter, [
        (0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFINITIONS)
def test_equals_its_definition_image_by_image(name, monkeypatch):
    draws, loop, constants = DEFINITIONS[name]
    differences = []
    for severity, c in enumerate(constants, 1):
        u = uniform(7, name, severity, 3, 9, 2 * c[2] * (32 - 2 * c[1]) ** 2 if name == "glass_blur" else draws)
        expected = np.stack([to_bytes(loop(x / 255, c, v)) for x, v in zip(pictures(), u, strict=True)])
        got = corrupt(pictures(), name, severity, 7, first_index=3)
        differences.append(np.abs(got.astype(int) - expected).reshape(9, -1))
        assert ((differences[-1] <= 1).mean(axis=1) >= 0.99).all(), severity
        # To the last bit an image does not depend on those corrupted with it.
        with monkeypatch.context() as patch:
            patch.setattr(corruptions, "CHUNK", 4)
            assert (got == corrupt(pictures(), name, severity, 7, first_index=3)).all()
    # No bias hides within the one level; on the three flat images round-off decides what the truncation gives.
    assert np.mean(np.array(differences)[:, :6]) < 0.05


def test_all_19_have_five_severities():
    assert {*data.CORRUPTIONS, "gaussian_noise"} == {*DEFINITIONS} <= {f.__name__ for f in corruptions.SEVERITIES}
    assert {len(constants) for constants in corruptions.SEVERITIES.values()} == {5}


def test_draws_are_uniform_and_differ_by_seed_name_severity_and_image():
    u = uniform(0, "fog", 1, 0, 100, 1023)
    assert u.shape == (100, 1023)
    assert 0 <= u.min() < u.max() < 1
    assert scipy.stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    others = [uniform(*key, 0, 100, 1023) for key in ((1, "fog", 1), (0, "snow", 1), (0, "fog", 2))]
    for other in (*others, np.roll(u, 1, axis=0), np.roll(u, 1, axis=1)):
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 0.02


def test_bad_arguments_are_refused():
    for images, name, severity, message in [
        (pictures(), "rain", 1, "unknown corruption 'rain'; choose from gaussian_noise, .*spatter"),
        (pictures(), "fog", 0, "severity 0 is not one of 1, 2, 3, 4, 5"),
        (pictures() / 255, "fog", 1, "images must be uint8 .N, 32, 32, 3., not float64 .9, 32, 32, 3."),
        (pictures().transpose(0, 3, 1, 2), "fog", 1, "images must be uint8 .*, not uint8 .9, 3, 32, 32."),
    ]:
        with pytest.raises(ValueError, match=message):
            corrupt(images, name, severity, seed=0)


def test_a_corruption_of_ones_own_joins(monkeypatch):
    def flat(x, c, draw):
        return np.full_like(x, c) + (draw(1) < 0.5)[..., None, None]

    monkeypatch.setitem(corruptions.SEVERITIES, flat, (10, 20, 30, 40, 50))
    assert set(corrupt(pictures(), "flat", 4, seed=0).ravel()) == {40, 41}


def test_missing_frost_photographs_are_told(monkeypatch):
    corruptions.frost_photographs.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"frost needs .*: python -m pip install --no-deps imagecorruptions==1\.1\.2$"):
        corrupt(pictures(), "frost", 1, seed=0)


# The folder


def write_npz(path, count):
    """A data set of `count` test images; returns the flags that make its corrupted folder beside it."""
    images = np.resize(pictures(), (count, 32, 32, 3))
    train = {"train_images": images[:1], "train_labels": [0]}
    np.savez(path, **train, test_images=images, test_labels=np.arange(count) % 9, source="made up")
    return ["--dataset", str(path), "--seed", "3", "--data", str(path.parent), "--workers", "2"]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_whole(folder):
    """`mine-C` has every image of the mine.npz beside it, corrupted, in the form that data.py reads."""
    images, root = np.load(folder.parent / "mine.npz")["test_images"], folder.parent
    for name, severity in itertools.product(DEFINITIONS, range(1, 6)):
        got = data.load_corrupted("mine", root, name)[severity - 1].permute(0, 2, 3, 1)
        assert np.array_equal(got, corrupt(images, name, severity, 3))
    data.check_folder(data.load_dataset(str(root / "mine.npz"), root), root)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder `mine-C` of 12 images in chunks of 5."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corruptions, "CHUNK", 5)
        corruptions.main(write_npz(root / "mine.npz", 12))
    return root / "mine-C"


def test_a_folder_has_the_official_form_and_a_record(made):
    assert set(content(made)) >= {*(f"{name}.npy" for name in DEFINITIONS), "labels.npy", "generated.json"}
    snow, labels = np.load(made / "snow.npy"), np.load(made / "labels.npy")
    assert (snow.dtype, snow.shape, labels.dtype) == (np.uint8, (60, 32, 32, 3), np.uint8)
    assert_whole(made)
    record = json.loads((made / "generated.json").read_text())
    assert set(record.pop("versions")) == {"numpy", "scipy", "opencv", "pillow"}
    sha256 = hashlib.sha256(np.resize(pictures(), (12, 32, 32, 3)).tobytes()).hexdigest()
    assert record == {"dataset": "mine", "source": "made up", "seed": 3, "clean_sha256": sha256}


def test_files_that_are_there_are_kept_where_the_record_fits(made, tmp_path, capsys):
    flags, folder = write_npz(tmp_path / "mine.npz", 12), tmp_path / "mine-C"
    shutil.copytree(made, folder)
    record, made_at = folder / "generated.json", (folder / "snow.npy").stat().st_mtime_ns

    def refused(message, *more):
        before = content(folder)
        with pytest.raises(ValueError, match=f"mine-C{message}; .*or name another.* with --data$"):
            corruptions.main([*flags, *more])
        assert content(folder) == before

    refused(" was made with seed 3, not 4", "--seed", "4")
    write_npz(tmp_path / "mine.npz", 11)
    refused(" was made from other images")
    write_npz(tmp_path / "mine.npz", 12)
    record.write_text(record.read_text().replace(f'"{np.__version__}"', '"1.0"'))
    corruptions.main(flags)  # nothing is to be made
    (folder / "fog.npy").unlink()
    refused(" was made with versions {'numpy': '1.0', .*}, not {.*}")
    record.unlink()
    refused(" holds the official set, or another that was not made here")
    shutil.copy(made / "generated.json", record)
    capsys.readouterr()
    corruptions.main([*flags, "--workers", "1"])
    kept = len(corruptions.SEVERITIES) - 1
    line = f"{folder}: 1 corruptions of 12 images made with seed 3, {kept} kept"
    assert capsys.readouterr().out.splitlines() == ["fog: done", line]
    assert (folder / "snow.npy").stat().st_mtime_ns == made_at
    assert content(folder) == content(made)


def test_workers_import_neither_torch_nor_the_modules_that_need_it(root):
    code = "import sys, corruptions; print({'torch', 'utils', 'data'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("set()\n", "")


def test_interrupted_then_killed_then_resumed_is_whole(root, tmp_path):
    flags, folder = write_npz(tmp_path / "mine.npz", 100), tmp_path / "mine-C"
    # Ctrl-C in a terminal reaches the whole group, here while the workers start; SIGKILL reaches the parent alone, and
    # its workers must end by themselves.
    for send, number, files, pause in [(os.killpg, signal.SIGINT, 1, 0.5), (os.kill, signal.SIGKILL, 8, 0)]:
        command = [sys.executable, "corruptions.py", *flags]
        process = subprocess.Popen(command, cwd=root, start_new_session=True, stderr=subprocess.PIPE, text=True)
        while len(list(folder.glob("*.npy"))) < files:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(pause)
        send(process.pid, number)
        errors = process.communicate(timeout=20)[1]  # returns when every process that writes there has ended
        if number == signal.SIGINT:
            assert (process.returncode, errors) == (130, "corruptions.py: interrupted\n")
    assert len(list(folder.glob("*.npy"))) < 20
    corruptions.main(flags)
    assert_whole(folder)


def test_the_official_set_is_unpacked_whole(tmp_path, monkeypatch, capsys):
    flags, folder = ["--download", "--data", str(tmp_path / "data")], tmp_path / "data" / "CIFAR-10-C"
    url, archive = "http://127.0.0.1:9/official.tar", Path(f"{folder}.tar")  # nothing answers there
    archive.parent.mkdir()
    names = {f"{name}.npy" for name in (*data.CORRUPTIONS, "labels")}
    (tmp_path / "fog.npy").write_bytes(b"fog")
    with tarfile.open(archive, "w") as tar:
        for name in names:
            tar.add(tmp_path / "fog.npy", f"CIFAR-10-C/{name}")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(corruptions.OFFICIAL, "cifar10", (url, "0" * 32))
    with pytest.raises(OSError, match=f"{url} cannot be had .*refused.*; try again, put that file at {archive}"):
        corruptions.main(flags)
    assert not folder.exists()
    monkeypatch.setitem(corruptions.OFFICIAL, "cifar10", (url, md5))
    for _ in range(2):  # the second time it is there
        corruptions.main(flags)
        assert capsys.readouterr().out.endswith(f"{folder}: the official set\n")
    assert list(folder.parent.iterdir()) == [folder]
    assert set(content(folder)) == names | {"official.json"}
    assert json.loads((folder / "official.json").read_text()) == {"url": url, "md5": md5}
    for missing in ("snow.npy", "official.json"):
        (folder / missing).rename(tmp_path / missing)
        with pytest.raises(ValueError, match=r"CIFAR-10-C is there, and not known .* whole official set; delete"):
            corruptions.main(flags)
        (tmp_path / missing).rename(folder / missing)
    with pytest.raises(ValueError, match="--download: there is no official corrupted set of digits"):
        corruptions.main([*flags, "--dataset", "digits"])
