"""Data sets against hand-written files, scikit-learn and Pillow; corrupted sets; refused input."""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from PIL import Image

import data
from data import check_corrupted, corruption_source, load_corrupted, load_dataset
from utils import torchvision

N = 7
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (8, 32, 32, 3), np.uint8)
ARRAYS = {"train_images": IMAGES, "train_labels": np.arange(8) % 4}
ARRAYS |= {"test_images": IMAGES[:N], "test_labels": np.arange(N) % 4}


def save(path, **changes):
    """Write an .npz of ARRAYS with `changes` (None: left out) and return its path as text."""
    arrays = {key: value for key, value in (ARRAYS | changes).items() if value is not None}
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_read_in_its_order_and_written_nowhere(tmp_path, monkeypatch, name, key):
    cifar, share = getattr(torchvision.datasets, name.upper()), tmp_path / "share"
    (share / cifar.base_folder).mkdir(parents=True)
    images, labels, names = [], [], [f"class {k}" for k in range(10)]

    def write(file, content):
        """The md5 of the pickle written."""
        path = share / cifar.base_folder / file
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(cifar, part):
            images.append(RNG.integers(0, 256, (3, 3072), np.uint8))
            labels.append(RNG.integers(0, 10, 3).tolist())
            sums.append([file, write(file, {"data": images[-1], key: labels[-1]})])
        monkeypatch.setattr(cifar, part, sums)
    md5 = write(cifar.meta["filename"], {cifar.meta["key"]: names})
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5})
    monkeypatch.setattr("os.makedirs", None)  # a share that cannot be written
    (tmp_path / "data").symlink_to(share)
    dataset = load_dataset(name, tmp_path / "data")
    assert dataset.test_images.shape == (3, 3, 32, 32)
    for parts, expected, dtype in (
        ((dataset.train_images, dataset.test_images), images, torch.uint8),
        ((dataset.train_labels, dataset.test_labels), labels, torch.int64),
    ):
        assert parts[0].dtype == parts[1].dtype == dtype
        assert np.array_equal(torch.cat(parts).ravel(), np.ravel(expected))
    about = (dataset.name, dataset.classes, dataset.hflip, dataset.source)
    assert about == (name, names, True, "official")


@pytest.mark.cifar
@pytest.mark.parametrize("name", ["cifar10", "data/cifar10_copies.npz"])
def test_the_real_images_have_cifars_published_statistics(name):
    if not (ROOT / ("data/cifar-10-batches-py" if name == "cifar10" else name)).exists():
        pytest.skip("no CIFAR-10 under data/")
    dataset = load_dataset(name if name == "cifar10" else str(ROOT / name), ROOT / "data")
    assert torch.bincount(dataset.train_labels).tolist() == [5000] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [1000] * 10
    assert dataset.train_labels[:5].tolist() == [6, 9, 9, 4, 1]
    means = dataset.train_images[::10].float().mean((0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)


def test_digits_are_scikit_learns_enlarged_as_pillow_does():
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits", "nowhere")
    about = (dataset.hflip, dataset.source, dataset.classes)
    assert about == (False, "embedded", list("0123456789"))
    pixels, targets = load_digits(return_X_y=True)
    images = torch.cat([dataset.train_images, dataset.test_images]).numpy()
    labels = torch.cat([dataset.train_labels, dataset.test_labels])
    assert (len(dataset.test_images), images.shape) == (360, (1797, 3, 32, 32))
    assert (images[:, :1] == images).all()
    assert np.array_equal(np.bincount(labels), np.bincount(targets))
    assert np.ptp(np.bincount(dataset.test_labels) / np.bincount(targets)) < 0.01  # stratified
    for digit, target in zip(pixels[:40], targets[:40], strict=True):
        grey = Image.fromarray((digit.reshape(8, 8) * (255 / 16)).astype(np.float32))
        large = np.asarray(grey.resize((32, 32), Image.Resampling.BILINEAR))
        gap = np.abs(images[:, 0] - large).max(axis=(1, 2))
        assert gap.min() <= 0.502
        assert labels[gap.argmin()] == target


def test_an_npz_and_its_optional_keys(tmp_path):
    dataset = load_dataset(save(tmp_path / "mine.v2.npz"), "nowhere")
    for name, array in ARRAYS.items():
        read = getattr(dataset, name)
        assert np.array_equal(read if read.dim() == 1 else read.permute(0, 2, 3, 1), array)
        assert read.dtype == (torch.int64 if read.dim() == 1 else torch.uint8)
    assert (dataset.name, dataset.source, dataset.hflip) == ("mine.v2", "mine.v2.npz", True)
    assert dataset.classes == ["0", "1", "2", "3"]
    (tmp_path / "mine.v2.npz").rename(tmp_path / "MINE.NPZ")
    assert load_dataset(str(tmp_path / "MINE.NPZ"), "nowhere").name == "MINE"
    path = save(tmp_path / "b.npz", classes=list("abcd"), hflip=False, source="a camera")
    dataset = load_dataset(path, "nowhere")
    assert (dataset.classes, dataset.hflip, dataset.source) == (list("abcd"), False, "a camera")


def test_a_test_set_alone_is_enough_where_only_evaluation_is_asked_for(tmp_path):
    changes = {"train_images": None, "train_labels": None, "test_labels": np.full(N, 3)}
    path = save(tmp_path / "test.npz", **changes)
    message = refused(load_dataset, path, "")
    assert "lacks train_images, train_labels. It holds test_images, test_labels" in message
    dataset = load_dataset(path, "", need_train=False)
    assert (len(dataset.train_images), len(dataset.train_labels)) == (0, 0)
    assert (len(dataset.test_images), len(dataset.classes)) == (N, 4)


def test_data_sha256_changes_with_each_image_label_and_hflip_alone(tmp_path):
    def sha256(name="mine", **changes):
        return data.data_sha256(load_dataset(save(tmp_path / f"{name}.npz", **changes), ""))

    assert sha256() == sha256("other", source="elsewhere", classes=list("abcd"))
    assert sha256() == sha256(train_labels=ARRAYS["train_labels"].astype(np.uint8))
    changed = [{}, {"hflip": False}, *({key: value.copy()} for key, value in ARRAYS.items())]
    for change in changed[2:]:
        next(iter(change.values()))[-1] ^= 1
    assert len({sha256(**changes) for changes in changed}) == 6


REFUSED = {
    "mine.npz: class 0 has no training image": {"train_labels": np.arange(8) % 4 + 1},
    "class 2 has no training image": {"train_labels": [0, 1, 3, 4, 0, 1, 3, 4]},
    "class 4 has no training image": {"test_labels": np.arange(N)[::-1] // 6 * 6},
    "class 4 (frog) has no training image": {"classes": ["car", "dog", "cat", "cow", "frog"]},
    "lacks train_labels, test_images. It holds train_images, test_labels, y_train. ": {
        "train_labels": None, "test_images": None, "y_train": 0,
    },
    "test_images is uint8 (0, 32, 32, 3), not uint8 (N, 32, 32, 3)": {"test_images": IMAGES[:0]},
    "float32 (1, 1, 2), not uint8 (N, 32, 32, 3). Save RGB levels": {
        "train_images": np.float32([[[-2.0, 2.5]]]),
    },
    "train_labels is int64 (8,), not 8 integers from 0": {"train_labels": np.arange(8) - 1},
    "train_labels is int64 (7,), not 8 integers": {"train_labels": np.arange(7)},
    "test_labels is float64 (7,), not 7 integers": {"test_labels": np.arange(N) / 1},
    "classes must be a list of names, and hflip True or False": {"classes": "abcd"},
    "and hflip True or False": {"hflip": "no"},
    "mine.npz has one class. Save images of two or more": {
        "train_labels": [0] * 8, "test_labels": [0] * N,
    },
    "names 2 classes, but its labels go up to 3": {"classes": ["a", "b"]},
    "is damaged, or not an .npz of plain arrays": {"source": np.array([None])},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_an_npz_that_is_not_what_it_seems_is_refused(tmp_path, message):
    assert message in refused(load_dataset, save(tmp_path / "mine.npz", **REFUSED[message]), "")


def test_a_file_or_name_that_is_no_data_set_is_refused(tmp_path):
    path = save(tmp_path / "mine.npz")
    (tmp_path / "mine.npz").write_bytes((tmp_path / "mine.npz").read_bytes()[:5000])
    for name, message in {
        path: f"{path} is damaged, or not an .npz",
        str(tmp_path / "none.npz"): "none.npz: No such file",
        "CIFAR-10.npz": "CIFAR-10 is a built-in data set. Rename the file",
        "Digits.npz": "Digits is a built-in data set. Rename the file",
        "mnist": "unknown data set. Use cifar10, cifar100, digits or the path of an .npz",
    }.items():
        assert message in refused(load_dataset, name, "")


def test_a_failed_download_is_one_line_that_names_the_archive(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", offline)
    place = tmp_path / "cifar-10-batches-py"
    message = refused(load_dataset, "cifar10", tmp_path)
    assert f"cifar10 not found (or incomplete) in {place}, and downloading https://" in message
    assert f"(Name or service not known). Unpack that archive into {tmp_path}, or" in message
    (tmp_path / "file").touch()
    assert "not found" in refused(load_dataset, "cifar10", tmp_path / "file")
    place.mkdir()
    for file, _ in torchvision.datasets.CIFAR10.train_list:
        (place / file).touch()
    assert f"Use --data {tmp_path}" in refused(load_dataset, "cifar10", place)


# Corrupted test sets


def make_set(folder, count=N):
    """A corrupted set of `count` images, and the data set that it is of."""
    folder.mkdir(parents=True)
    for name in data.CORRUPTIONS:
        np.save(folder / f"{name}.npy", np.zeros((5 * count, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(count) % 4, 5))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Data set `mine`, and `data/mine-C` in the working directory."""
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "data/mine-C")
    return load_dataset(save("data/mine.npz"), "data")


def follow(message):
    """Type the command of the message."""
    (command,) = re.findall("`(mv .*?)`", message)
    subprocess.run(command, shell=True, check=True)


def test_the_papers_corruptions_and_where_a_set_is():
    assert len(set(data.CORRUPTIONS) - {"gaussian_noise"}) == 18
    folders = [str(data.corrupted_folder(name, "root")) for name in (*data.BUILT_IN, "mine")]
    assert folders == ["root/CIFAR-10-C", "root/CIFAR-100-C", "root/DIGITS-C", "root/mine-C"]


def test_a_corruption_is_five_severities_and_only_what_is_used_is_read(tmp_path):
    folder, original = tmp_path / "mine-C", RNG.integers(0, 256, (5 * N, 32, 32, 3), np.uint8)
    folder.mkdir()
    np.save(folder / "snow.npy", original)
    images = load_corrupted("mine", tmp_path, "snow")
    assert np.array_equal(images, original.reshape(5, N, 32, 32, 3).transpose(0, 1, 4, 2, 3))
    images[0] = 0  # writable memory, but the file keeps its bytes
    assert np.array_equal(np.load(folder / "snow.npy"), original)
    with open(folder / "fog.npy", "wb") as file:  # 3 GB of zeros that take no room on the disk
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 3072 * 10**6)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_corrupted("mine", tmp_path, "fog")[4, :10].clone().shape == (10, 3, 32, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KB


def test_a_complete_set_and_its_source(mine):
    folder = data.corrupted_folder("mine", "data")
    for name in (*data.CORRUPTIONS, "labels"):
        (folder / f"{name}.npy").rename("away")
        assert data.missing_files(folder) == [f"{name}.npy"]
        assert f"data/mine-C lacks {name}.npy. " in refused(check_corrupted, mine, "data")
        shutil.move("away", folder / f"{name}.npy")
    assert not data.missing_files(folder)
    assert corruption_source("mine", "data") == "unverified"
    (folder / "generated.json").write_text("{}")
    assert data.missing_files(folder) == ["gaussian_noise.npy"]
    assert corruption_source("mine", "data") == "generated"
    (folder / "official.json").touch()
    assert corruption_source("mine", "data") == "official"


def test_further_arrays_are_evaluated_and_dot_files_skipped(mine):
    for name in ("rain", "gaussian_noise"):
        shutil.copy("data/mine-C/fog.npy", f"data/mine-C/{name}.npy")
    Path("data/mine-C/._fog.npy").write_text("of macOS")
    assert check_corrupted(mine, "data") == [*data.CORRUPTIONS, "gaussian_noise", "rain"]


def test_a_stray_array_is_to_be_moved_out(mine):
    np.save("data/mine-C/my features.npy", np.zeros(3))
    message = refused(check_corrupted, mine, "data")
    assert "my features.npy is float64 (3,), not uint8 (5N, 32, 32, 3). Move it out" in message
    follow(message)
    assert check_corrupted(mine, "data") == [*data.CORRUPTIONS]


@pytest.mark.parametrize(
    ("snow", "message"),
    [
        (np.zeros((5 * N, 32, 32), np.uint8), "snow.npy is uint8 (35, 32, 32), not uint8 (5N, 32"),
        (np.zeros((5 * N, 32, 32, 3)), "snow.npy is float64 (35, 32, 32, 3), not uint8"),
        (np.zeros((34, 32, 32, 3), np.uint8), "snow.npy is uint8 (34, 32, 32, 3), not uint8"),
        (np.zeros((15, 32, 32, 3), np.uint8), "snow.npy holds 3 images per severity, not 7"),
        (None, "snow.npy is damaged ("),
    ],
)
def test_an_array_of_another_form_is_refused(mine, snow, message):
    if snow is None:
        os.truncate("data/mine-C/snow.npy", 5000)
    else:
        np.save("data/mine-C/snow.npy", snow)
    refusal = refused(check_corrupted, mine, "data")
    assert f"data/mine-C/{message}" in refusal
    assert "Move it out of the folder: `mv " in refusal


def test_labels_of_another_type_or_as_one_block_will_do(mine):
    five = np.tile(ARRAYS["test_labels"], 5)
    for labels in (five / 1, five[:, None], ARRAYS["test_labels"]):
        np.save("data/mine-C/labels.npy", labels)
        check_corrupted(mine, "data")


def test_a_set_of_other_labels_or_images_is_to_be_moved_away(mine):
    np.save("data/mine-C/labels.npy", np.repeat(ARRAYS["test_labels"], 5))
    message = refused(check_corrupted, mine, "data")
    assert "data/mine-C is of another test set than mine's: the labels differ. Move it" in message
    np.save("data/mine-C/labels.npy", np.tile(ARRAYS["test_labels"], 5))
    shutil.copy("data/mine-C/fog.npy", "data/mine-C/gaussian_noise.npy")
    sha256 = hashlib.sha256(ARRAYS["test_images"].tobytes()).hexdigest()
    Path("data/mine-C/generated.json").write_text(json.dumps({"clean_sha256": sha256}))
    assert "gaussian_noise" in check_corrupted(mine, "data")
    other = load_dataset(save("data/mine.npz", test_images=IMAGES[1:]), "data")
    message = refused(check_corrupted, other, "data")
    assert "data/mine-C was made from other test images. Move it away" in message
    follow(message)
    assert refused(check_corrupted, other, "data") == (
        "data/mine-C does not exist."
        " `python corruptions.py --dataset data/mine.npz --data data` makes one here"
    )


def test_a_root_that_is_the_set_itself_is_named(mine):
    Path("link").mkdir()
    Path("link/mine-C").symlink_to(Path("data/mine-C").rename("disk").resolve())
    message = refused(check_corrupted, mine, "link/mine-C")
    assert message.endswith(f"not that folder itself. Use --data {Path('link').resolve()}")
    np.save("data/labels.npy", np.arange(3))  # the user's own
    assert "makes one here" in refused(check_corrupted, mine, "data")


def test_a_missing_official_set_can_be_downloaded_or_made(tmp_path):
    """tests/test_corruptions.py has the advice for a folder that lacks files."""
    dataset = dataclasses.replace(load_dataset("digits", ""), name="cifar10", flag="cifar10")
    command = f"`python corruptions.py --dataset cifar10 --data {tmp_path}"
    message = refused(check_corrupted, dataset, tmp_path)
    assert (
        f"{command} --download` fetches the official set (2.9 GB), or {command}` makes one"
        in message
    )
