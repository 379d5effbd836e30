"""corruptions.py against loops over single images, and the folders that it makes or downloads."""

import colorsys
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import os
import re
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
from conftest import ROOT, refused
from PIL import Image

import corruptions
import data
from corruptions import corrupt, uniform

ppf = scipy.stats.norm.ppf


@functools.cache
def pictures():
    """uint8 (9, 32, 32, 3): smooth ones, noise, and flat black, white and grey."""
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(5, 32, 32, 3))
    smooth = scipy.ndimage.gaussian_filter(smooth, (0, 3, 3, 0), mode="wrap")
    flat = [np.full((32, 32, 3), level, np.uint8) for level in (0, 255, 100)]
    noise = rng.integers(0, 256, (32, 32, 3), np.uint8)
    return np.stack([*to_bytes(0.5 + 1.5 * smooth), noise, *flat])


# The definitions, for one image: x float (32, 32, 3) in [0, 1], constants c, its uniform draws u ->
# unclipped float


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
    image = image[top : top + crop, top : top + crop]
    image = scipy.ndimage.zoom(image, (factor, factor, 1)[: image.ndim], order=1)
    trim = (len(image) - 32) // 2
    return image[trim : trim + 32, trim : trim + 32]


def hsv(x, change):
    pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*v))) for v in x.reshape(-1, 3)]
    return np.reshape(pixels, x.shape)


def glass_blur(x, c, u):
    sigma, d, passes = c
    y, jumps = to_bytes(smoothed(x, sigma)), iter(np.floor(u * 2 * d).astype(int) - d)
    for _, h, w in itertools.product(range(passes), range(32 - d, d, -1), range(32 - d, d, -1)):
        dy, dx = next(jumps), next(jumps)
        y[h, w] = y[h + dy, w + dx]
    return smoothed(y / 255, sigma)


def defocus_blur(x, c, u):
    grid = range(-8, 9)
    disk = np.array([[float(i * i + j * j <= c[0] ** 2) for j in grid] for i in grid])
    small = np.array([math.exp(-(i**2) / (2 * c[1] ** 2)) for i in (-1, 0, 1)])
    small = np.outer(small, small) / small.sum() ** 2
    kernel = scipy.ndimage.convolve(disk / disk.sum(), small, mode="constant")
    channels = [scipy.ndimage.correlate(y, kernel, mode="mirror") for y in np.moveaxis(x, 2, 0)]
    return np.stack(channels, axis=-1)


def zoom_blur(x, c, u):
    factors = np.arange(1, c, 0.01)  # its round-off is the published one
    assert len(factors) in (7, 12, 16, 21, 26)
    return (x + sum(zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def snow(x, c, u):
    layer = zoomed(ppf(u[1:], c[0], c[1]).reshape(32, 32, 1), c[2])
    layer = moved(to_bytes(np.where(layer < c[3], 0, layer)), c[4], c[5], angle=-135 + 90 * u[0])
    grey = 0.299 * x[..., :1] + 0.587 * x[..., 1:2] + 0.114 * x[..., 2:]
    return c[6] * x + (1 - c[6]) * np.maximum(x, 1.5 * grey + 0.5) + layer + np.rot90(layer, 2)


def frost(x, c, u):
    package = importlib.metadata.distribution("imagecorruptions")
    folder = Path(package.locate_file("imagecorruptions")) / "frost"
    path = next(folder.glob(f"frost{1 + math.floor(5 * u[0])}.*"))
    photograph = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    photograph = cv2.resize(photograph, None, fx=0.2, fy=0.2)
    height, width, _ = photograph.shape
    top, left = math.floor(u[1] * (height - 32)), math.floor(u[2] * (width - 32))
    return c[0] * x + c[1] * photograph[top : top + 32, left : left + 32] / 255


def fog(x, c, u):
    p, chance, wibble, step = np.zeros((32, 32)), iter(u), 100.0, 32
    while step >= 2:
        half = step // 2
        square = list(itertools.product((-half, half), repeat=2))
        diamond = [(-half, 0), (half, 0), (0, -half), (0, half)]
        # The centres of all squares, then the middles of their upper, then of their left sides.
        for down, right, near in ((half, half, square), (0, half, diamond), (half, 0, diamond)):
            for i, j in itertools.product(range(down, 32, step), range(right, 32, step)):
                mean = sum(p[(i + a) % 32, (j + b) % 32] for a, b in near) / 4
                p[i, j] = mean + wibble * (wibble * (2 * next(chance) - 1))
        wibble, step = wibble / c[1], half
    p = (p - p.min()) / (p.max() - p.min())
    return (x + c[0] * p[..., None]) * x.max() / (x.max() + c[0])


def elastic_transform(x, c, u):
    alpha, sigma, affine = (32 * constant for constant in c)
    points = np.float32([[26, 26], [26, 6], [6, 6]])
    shifts = np.float32(affine * (2 * u[:6] - 1)).reshape(3, 2)
    backward = cv2.invertAffineTransform(cv2.getAffineTransform(points, points + shifts))
    columns, rows = np.meshgrid(np.arange(32), np.arange(32))
    source = backward @ np.stack([columns.ravel(), rows.ravel(), np.ones(1024)])
    fields = 2 * u[6:].reshape(2, 32, 32) - 1
    dx, dy = (alpha * smoothed(field, sigma, 3, "reflect") for field in fields)
    look_up = functools.partial(scipy.ndimage.map_coordinates, order=1)
    warped = [look_up(x[..., k], source[::-1], mode="mirror").reshape(32, 32) for k in range(3)]
    places = [rows + dy, columns + dx]
    return np.stack([look_up(y, places, mode="reflect") for y in warped], axis=-1)


def pixelate(x, c, u):
    """Pillow's BOX: the mean of the pixels with centres in a box, rows after columns, rounded."""
    small, y = int(32 * c), x * 255
    for (old, new), axis in itertools.product(((32, small), (small, 32)), (1, 0)):
        half = max(old / new, 1) / 2
        centres = [(k + 0.5) * old / new for k in range(new)]
        under = [[j for j in range(old) if x0 - half <= j + 0.5 < x0 + half] for x0 in centres]
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
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    d = scipy.ndimage.correlate(d, emboss, mode="mirror").clip(0, 255)
    m = liquid * np.rint(scipy.ndimage.uniform_filter(d.astype(float), 3, mode="mirror"))
    return x + (m / max(m.max(), 1) * c[4])[..., None] * np.array([175, 238, 238]) / 255


SHORT = {
    "gaussian_noise": lambda x, c, u: x + ppf(u, scale=c).reshape(x.shape),
    "shot_noise": lambda x, c, u: scipy.stats.poisson.ppf(u.reshape(x.shape), x * c) / c,
    "impulse_noise": lambda x, c, u: np.select([u < c / 2, u < c], [0, 1], x.ravel()).reshape(
        x.shape
    ),
    "speckle_noise": lambda x, c, u: x + x * ppf(u, scale=c).reshape(x.shape),
    "gaussian_blur": lambda x, c, u: smoothed(x, c),
    "motion_blur": lambda x, c, u: moved(to_bytes(x), *c, angle=-45 + 90 * u[0]),
    "brightness": lambda x, c, u: hsv(x, lambda h, s, v: (h, s, min(v + c, 1))),
    "saturate": lambda x, c, u: hsv(x, lambda h, s, v: (h, min(s * c[0] + c[1], 1), v)),
    "contrast": lambda x, c, u: (x - x.mean((0, 1))) * c + x.mean((0, 1)),
}


DEFINITIONS = {  # (uniform draws of an image, the published constants, typed again)
    "gaussian_noise": (3072, [0.04, 0.06, 0.08, 0.09, 0.10]),
    "shot_noise": (3072, [500, 250, 100, 75, 50]),
    "impulse_noise": (3072, [0.01, 0.02, 0.03, 0.05, 0.07]),
    "speckle_noise": (3072, [0.06, 0.1, 0.12, 0.16, 0.2]),
    "gaussian_blur": (0, [0.4, 0.6, 0.7, 0.8, 1]),
    "glass_blur": (None, [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)]),
    "defocus_blur": (0, [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)]),
    "motion_blur": (1, [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)]),
    "zoom_blur": (0, [1.06, 1.11, 1.16, 1.21, 1.26]),
    "snow": (1025, [
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9), (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)]),
    "frost": (3, [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)]),
    "fog": (1023, [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)]),
    "brightness": (0, [0.05, 0.1, 0.15, 0.2, 0.3]),
    "contrast": (0, [0.75, 0.5, 0.4, 0.3, 0.15]),
    "saturate": (0, [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)]),
    "elastic_transform": (2054, [
        (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)]),
    "pixelate": (0, [0.95, 0.9, 0.85, 0.75, 0.65]),
    "jpeg_compression": (0, [80, 65, 58, 50, 40]),
    "spatter": (1024, [
        (0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
        (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFINITIONS)
def test_equals_its_definition_image_by_image(name, monkeypatch):
    loop, (draws, constants) = SHORT.get(name) or globals()[name], DEFINITIONS[name]
    differences = []
    for severity, c in enumerate(constants, 1):
        count = 2 * c[2] * (32 - 2 * c[1]) ** 2 if name == "glass_blur" else draws
        u = uniform(7, name, severity, 3, 9, count)
        loops = [to_bytes(loop(x / 255, c, v)) for x, v in zip(pictures(), u, strict=True)]
        got = corrupt(pictures(), name, severity, 7, first_index=3)
        differences.append(np.abs(got.astype(int) - np.stack(loops)).reshape(9, -1))
        assert ((differences[-1] <= 1).mean(axis=1) >= 0.99).all(), severity
        # To the last bit an image does not depend on those corrupted with it.
        with monkeypatch.context() as patch:
            patch.setattr(corruptions, "CHUNK", 4)
            assert (got == corrupt(pictures(), name, severity, 7, first_index=3)).all()
    # No bias hides within the one level. (On the three flat images round-off decides.)
    assert np.mean(np.array(differences)[:, :6]) < 0.05


def test_draws_are_uniform_and_differ_by_seed_name_severity_and_image():
    u = uniform(0, "fog", 1, 0, 100, 1023)
    assert u.shape == (100, 1023)
    assert 0 <= u.min() < u.max() < 1
    assert scipy.stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    keys = ((1, "fog", 1), (0, "snow", 1), (0, "fog", 2))
    others = [uniform(*key, 0, 100, 1023) for key in keys]
    for other in (*others, np.roll(u, 1, axis=0), np.roll(u, 1, axis=1)):
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 0.02


def test_bad_arguments_are_refused():
    x = pictures()
    for arguments, message in (
        ((x, "rain", 1), "unknown corruption 'rain'. Use one of gaussian_noise, .*spatter"),
        ((x, "fog", 0), "severity 0 is not one of 1, 2, 3, 4, 5"),
        ((x / 255, "fog", 1), "must be uint8 .N, 32, 32, 3., not float64 .9, 32, 32, 3."),
        ((x.transpose(0, 3, 1, 2), "fog", 1), "must be uint8 .*, not uint8 .9, 3, 32, 32."),
    ):
        with pytest.raises(ValueError, match=message):
            corrupt(*arguments)


@pytest.mark.parametrize("fault", ["no package", "no files", "a damaged file"])
def test_without_frosts_photographs_one_line_names_the_package(tmp_path, monkeypatch, fault):
    installed = importlib.metadata.distribution("imagecorruptions")

    class Package:
        def __init__(self, name):
            if fault == "no package":
                raise importlib.metadata.PackageNotFoundError(name)

        def locate_file(self, path):
            return tmp_path / path

    if fault == "a damaged file":
        folder = tmp_path / "imagecorruptions/frost"
        shutil.copytree(installed.locate_file("imagecorruptions/frost"), folder)
        (folder / "frost4.jpg").write_bytes(b"damaged")
    corruptions.frost_photographs.cache_clear()
    monkeypatch.setattr(importlib.metadata, "distribution", Package)
    message = refused(corruptions.main, write_npz(tmp_path / "mine.npz", 1))
    assert "pip install --no-deps imagecorruptions==1.1.2" in message
    assert not (tmp_path / "mine-C").exists()  # found out first


# The folder


def write_npz(path, count):
    """Write `count` test images; returns the flags that make their corrupted set beside them."""
    images = np.resize(pictures(), (count, 32, 32, 3))
    np.savez(path, test_images=images, test_labels=np.arange(count) % 9, source="made up")
    flags = ["--dataset", str(path), "--seed", "3", "--data", str(path.parent)]
    return [*flags, "--workers", "2"]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_complete(folder):
    """`mine-C` has every image of the mine.npz beside it, corrupted, as data.py reads it."""
    images, root = np.load(folder.parent / "mine.npz")["test_images"], folder.parent
    for name, severity in itertools.product(DEFINITIONS, range(1, 6)):
        got = data.load_corrupted("mine", root, name)[severity - 1].permute(0, 2, 3, 1)
        assert np.array_equal(got, corrupt(images, name, severity, 3))
    clean = data.load_dataset(str(root / "mine.npz"), root, need_train=False)
    assert data.check_corrupted(clean, root) == [*data.CORRUPTIONS, "gaussian_noise"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder `mine-C` of 12 images in chunks of 5."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corruptions, "CHUNK", 5)
        corruptions.main(write_npz(root / "mine.npz", 12))
    return root / "mine-C"


def test_a_folder_has_the_official_form_and_a_record(made):
    files = {*(f"{name}.npy" for name in DEFINITIONS), "labels.npy", "generated.json"}
    assert content(made).keys() >= files
    assert np.load(made / "labels.npy").dtype == np.uint8
    assert_complete(made)
    record = json.loads((made / "generated.json").read_text())
    assert set(record.pop("versions")) == {"numpy", "scipy", "opencv", "pillow"}
    sha256 = hashlib.sha256(np.resize(pictures(), (12, 32, 32, 3)).tobytes()).hexdigest()
    expected = {"dataset": "mine", "source": "made up", "seed": 3, "clean_sha256": sha256}
    assert record == expected


def test_files_that_exist_are_kept_where_the_record_fits(made, tmp_path, capsys):
    flags, folder = write_npz(tmp_path / "mine.npz", 12), tmp_path / "mine-C"
    shutil.copytree(made, folder)
    record, made_at = folder / "generated.json", (folder / "snow.npy").stat().st_mtime_ns

    def refuses(message, *more):
        before = content(folder)
        line = refused(corruptions.main, [*flags, *more])
        assert re.search(f"mine-C{message}.*`mv {folder} {folder}.old`", line)
        assert content(folder) == before

    refuses(" was made with seed 3, not 4", "--seed", "4")
    write_npz(tmp_path / "mine.npz", 11)
    refuses(" was made from other test images")
    write_npz(tmp_path / "mine.npz", 12)
    record.write_text(record.read_text().replace(f'"{np.__version__}"', '"1.0"'))
    corruptions.main(flags)  # nothing is to be made
    (folder / "fog.npy").unlink()
    refuses(" was made with versions {'numpy': '1.0', .*}, not {.*}")
    record.unlink()
    refuses(" lacks fog.npy")
    shutil.copy(made / "generated.json", record)
    capsys.readouterr()
    corruptions.main([*flags, "--workers", "1"])
    kept = len(corruptions.SEVERITIES) - 1
    assert capsys.readouterr().out.splitlines() == [
        "fog: done",
        f"{folder}: 1 corruptions of 12 images made, {kept} kept",
        f"{folder}: complete, generated",
    ]
    assert (folder / "snow.npy").stat().st_mtime_ns == made_at
    assert content(folder) == content(made)


def test_a_corruption_of_ones_own_is_made_by_the_workers(made, tmp_path):
    """As README and corruptions.py say: a function, and its entry in SEVERITIES."""
    flags = write_npz(tmp_path / "mine.npz", 12)
    shutil.copytree(made, tmp_path / "mine-C")
    before, after = (ROOT / "corruptions.py").read_text().split("SEVERITIES = {")
    own = "def darkness(x, c, draw):\n    return c * x / 255\n\n\n"
    entry = "SEVERITIES = {darkness: (0.9, 0.8, 0.7, 0.6, 0.5),"
    (tmp_path / "corruptions.py").write_text(before + own + entry + after)
    command = [sys.executable, "corruptions.py", *flags]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    images = np.load(tmp_path / "mine.npz")["test_images"]
    got = np.load(tmp_path / "mine-C" / "darkness.npy")
    assert np.array_equal(got[-12:], np.floor(0.5 * (images / 255) * 255))
    assert len(content(made)) + 1 == len(content(tmp_path / "mine-C"))


def test_workers_import_neither_torch_nor_the_modules_that_need_it():
    code = "import sys, corruptions; assert not {'torch', 'utils', 'data'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def worker_of(pid):
    """The process id of one of joblib's workers."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(c) for c in children if "LokyProcess" in Path(f"/proc/{c}/cmdline").read_text())


def test_interrupted_then_a_worker_killed_then_resumed(tmp_path):
    flags, folder = write_npz(tmp_path / "mine.npz", 100), tmp_path / "mine-C"
    options = {"cwd": ROOT, "start_new_session": True, "stderr": subprocess.PIPE, "text": True}
    for files, code, line in (  # labels.npy is the first file
        (4, 130, "corruptions.py: interrupted\n"),
        (7, 2, "corruptions.py: a worker process was killed (too little mem"),
    ):
        process = subprocess.Popen([sys.executable, "corruptions.py", *flags], **options)
        deadline = time.monotonic() + 60
        while len(list(folder.glob("*.npy"))) < files:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if code == 130:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: all processes
        else:
            os.kill(worker_of(process.pid), signal.SIGKILL)
        error = process.communicate(timeout=60)[1]  # returns when all its processes have ended
        assert process.returncode == code, error
        assert error.startswith(line)
        assert "Traceback" not in error
    assert len(list(folder.glob("*.npy"))) < 20
    corruptions.main(flags)
    assert_complete(folder)


# The official set


@pytest.fixture
def official(made, tmp_path, monkeypatch):
    """CIFAR-10 of 12 images, and data/CIFAR-10-C.tar in the working directory."""
    clean = data.load_dataset(str(made.parent / "mine.npz"), "", need_train=False)
    clean = dataclasses.replace(clean, name="cifar10", flag="cifar10")
    monkeypatch.setattr(data, "load_dataset", lambda name, root, **options: clean)
    monkeypatch.chdir(tmp_path)
    archive = Path("data/CIFAR-10-C.tar")
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for path in sorted(made.glob("*.npy")):
            tar.add(path, f"CIFAR-10-C/{path.name}")
    url, md5 = "http://127.0.0.1:9/official.tar", hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(corruptions.OFFICIAL, "cifar10", (url, md5))  # nothing answers there
    return archive


@pytest.mark.parametrize("linked", [False, True])  # to an empty folder on another disk
def test_the_official_set_is_unpacked_and_kept(official, made, capsys, linked):
    if linked:
        Path("disk").mkdir()
        Path("data/CIFAR-10-C").symlink_to(Path("disk").resolve())
    for flags in (["--download"], ["--download"], []):  # the second time it exists
        corruptions.main(flags)
        assert capsys.readouterr().out.endswith("data/CIFAR-10-C: complete, official\n")
    folder = Path("data/CIFAR-10-C")
    assert list(folder.parent.iterdir()) == [folder]
    files, (url, md5) = content(folder), corruptions.OFFICIAL["cifar10"]
    assert json.loads(files.pop("official.json")) == {"url": url, "md5": md5}
    assert files == {path.name: path.read_bytes() for path in made.glob("*.npy")}


@pytest.mark.parametrize("source", ["official", "generated", "unverified"])
def test_a_complete_set_is_kept_and_an_incomplete_one_is_completed(official, made, capsys, source):
    folder = Path("data/CIFAR-10-C")
    shutil.copytree(made, folder)
    (folder / "generated.json").unlink()
    if source != "unverified":
        (folder / f"{source}.json").write_text("{}")
    corruptions.main(["--download"])
    assert capsys.readouterr().out == f"{folder}: complete, {source}\n"
    assert official.exists()
    (folder / "snow.npy").unlink()
    (folder / "fog.npy").write_bytes(b"")  # is not replaced
    before, download = content(folder), functools.partial(refused, corruptions.main, ["--download"])
    if source == "generated":
        assert re.search("C lacks snow.npy. `python .*` makes what is missing", download())
        assert content(folder) == before
        return
    advice = "lacks snow.npy. `python .*--data data --download` f"
    assert re.search(advice, refused(corruptions.main, []))
    assert re.search("fog.npy is damaged .* Move it out of the folder: `mv ", download())
    assert content(folder) == before | {"snow.npy": (made / "snow.npy").read_bytes()}
    assert sorted(folder.parent.iterdir()) == [folder]


def test_a_failed_download_is_one_line(official, monkeypatch, capsys):
    url, _ = corruptions.OFFICIAL["cifar10"]
    monkeypatch.setitem(corruptions.OFFICIAL, "cifar10", (url, "0" * 32))
    message = f"downloading {url} failed .*refused.* to {official} "
    assert re.search(message, refused(corruptions.main, ["--download"]))
    assert list(official.parent.iterdir()) == [official]
    with pytest.raises(SystemExit):
        corruptions.main(["--download", "--dataset", "digits"])
    assert "--download: digits has no official corrupted set; omit" in capsys.readouterr().err
