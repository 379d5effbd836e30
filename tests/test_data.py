"""Data sets against hand-written files, scikit-learn and Pillow; corrupted sets. (Refused input: test_errors.py.)"""

import hashlib
import pickle
import resource

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import corruption_source, load_corrupted, load_dataset
from utils import import_torchvision

N = 7


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_read_in_its_order(tmp_path, monkeypatch, name, key):
    cifar, rng = getattr(import_torchvision().datasets, name.upper()), np.random.default_rng(0)
    (tmp_path / cifar.base_folder).mkdir()
    images, labels, names = [], [], [f"class {k}" for k in range(10)]

    def write(file, content):
        """The md5 of the pickle written."""
        path = tmp_path / cifar.base_folder / file
        path.write_bytes(pickle.dumps(content))
        return hashlib.md5(path.read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(cifar, part):
            images.append(rng.integers(0, 256, (3, 3072), np.uint8))
            labels.append(rng.integers(0, 10, 3).tolist())
            sums.append([file, write(file, {"data": images[-1], key: labels[-1]})])
        monkeypatch.setattr(cifar, part, sums)
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": write(cifar.meta["filename"], {cifar.meta["key"]: names})})
    dataset = load_dataset(name, tmp_path)
    assert np.array_equal(torch.cat([dataset.train_images, dataset.test_images]), np.reshape(images, (-1, 3, 32, 32)))
    assert np.array_equal(torch.cat([dataset.train_labels, dataset.test_labels]), np.ravel(labels))
    assert dataset.test_images.shape == (3, 3, 32, 32)
    assert dataset.train_images.dtype == dataset.test_images.dtype == torch.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == torch.int64
    assert (dataset.name, dataset.classes, dataset.hflip, dataset.source) == (name, names, True, "official")


@pytest.mark.cifar
@pytest.mark.parametrize("name", ["cifar10", "data/cifar10_copies.npz"])
def test_the_real_images_have_cifars_published_statistics(root, name):
    if not (root / ("data/cifar-10-batches-py" if name == "cifar10" else name)).exists():
        pytest.skip("no CIFAR-10 under data/")
    dataset = load_dataset(name if name == "cifar10" else str(root / name), root / "data")
    assert torch.bincount(dataset.train_labels).tolist() == [5000] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [1000] * 10
    assert dataset.train_labels[:5].tolist() == [6, 9, 9, 4, 1]
    means = dataset.train_images[::10].float().mean((0, 2, 3)) / 255
    assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)


def test_digits_are_scikit_learns_enlarged_as_pillow_does():
    from sklearn.datasets import load_digits

    dataset = load_dataset("digits", "nowhere")
    assert (dataset.train_images.shape, dataset.test_images.shape) == ((1437, 3, 32, 32), (360, 3, 32, 32))
    assert (dataset.hflip, dataset.source, dataset.classes) == (False, "embedded", list("0123456789"))
    pixels, targets = load_digits(return_X_y=True)
    images = torch.cat([dataset.train_images, dataset.test_images]).numpy()
    labels = torch.cat([dataset.train_labels, dataset.test_labels])
    assert (images[:, :1] == images).all()
    assert np.array_equal(np.bincount(labels), np.bincount(targets))
    assert np.ptp(np.bincount(dataset.test_labels) / np.bincount(targets)) < 0.01  # every class in proportion
    for digit, target in zip(pixels[:40], targets[:40], strict=True):
        gray = Image.fromarray((digit.reshape(8, 8) * (255 / 16)).astype(np.float32))
        gap = np.abs(images[:, 0] - np.asarray(gray.resize((32, 32), Image.Resampling.BILINEAR))).max(axis=(1, 2))
        assert gap.min() <= 0.502
        assert labels[gap.argmin()] == target


def test_an_npz_and_its_optional_keys(tmp_path):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (count, 32, 32, 3), np.uint8) for count in (5, 3))
    arrays = {"train_images": train, "train_labels": np.array([0, 1, 2, 3, 0]), "test_images": test,
              "test_labels": np.array([2, 0, 1], np.uint8)}  # fmt: skip
    np.savez(tmp_path / "mine.v2.npz", **arrays)
    dataset = load_dataset(str(tmp_path / "mine.v2.npz"), "nowhere")
    assert np.array_equal(dataset.train_images.permute(0, 2, 3, 1), train)
    assert np.array_equal(dataset.test_images.permute(0, 2, 3, 1), test)
    assert (dataset.train_labels.tolist(), dataset.test_labels.tolist()) == ([0, 1, 2, 3, 0], [2, 0, 1])
    assert (dataset.train_images.dtype, dataset.test_labels.dtype) == (torch.uint8, torch.int64)
    assert (dataset.name, dataset.source, dataset.hflip) == ("mine.v2", "mine.v2.npz", True)
    assert dataset.classes == ["0", "1", "2", "3"]
    np.savez_compressed(tmp_path / "b.npz", **arrays, classes=np.array(list("abcde")), hflip=False, source="a camera")
    dataset = load_dataset(str(tmp_path / "b.npz"), "nowhere")
    assert (dataset.classes, dataset.hflip, dataset.source) == (list("abcde"), False, "a camera")


# Corrupted test sets


def test_the_papers_corruptions_and_where_a_set_is():
    assert len(set(data.CORRUPTIONS) - {"gaussian_noise"}) == 18
    folders = {name: str(data.corrupted_folder(name, "root")) for name in ("cifar10", "cifar100", "digits", "mine")}
    assert folders == {"cifar10": "root/CIFAR-10-C", "cifar100": "root/CIFAR-100-C", "digits": "root/DIGITS-C",
                       "mine": "root/mine-C"}  # fmt: skip


def test_a_corruption_is_five_severities_and_only_what_is_used_is_read(tmp_path):
    folder, original = tmp_path / "CIFAR-10-C", np.random.default_rng(0).integers(0, 256, (5 * N, 32, 32, 3), np.uint8)
    folder.mkdir()
    np.save(folder / "snow.npy", original)
    np.save(folder / "labels.npy", np.tile(np.arange(N, dtype=np.uint8), 5))
    images = load_corrupted("cifar10", tmp_path, "snow")
    assert images.shape == (5, N, 3, 32, 32)
    for severity in range(5):
        assert np.array_equal(images[severity], original[N * severity : N * (severity + 1)].transpose(0, 3, 1, 2))
    images[0] = 0  # writable memory, but the file keeps its bytes
    assert np.array_equal(np.load(folder / "snow.npy"), original)
    with open(folder / "fog.npy", "wb") as file:  # 3 GB of zeros that take no room on the disk
        header = {"descr": "|u1", "fortran_order": False, "shape": (1_000_000, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 3072 * 1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_corrupted("cifar10", tmp_path, "fog")[4, :10].clone().shape == (10, 3, 32, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KB


def test_a_whole_set_has_the_papers_corruptions_and_one_made_here_gaussian_noise_too(tmp_path):
    for name in (*data.CORRUPTIONS, "labels"):
        assert not data.is_whole(tmp_path)
        (tmp_path / f"{name}.npy").touch()
    assert data.is_whole(tmp_path)
    (tmp_path / "generated.json").touch()
    assert not data.is_whole(tmp_path)
    (tmp_path / "gaussian_noise.npy").touch()
    assert data.is_whole(tmp_path)


def test_the_source_of_a_corrupted_set(tmp_path):
    assert corruption_source("mine", tmp_path) == "unverified"
    (tmp_path / "mine-C").mkdir()
    for source in ("generated", "official"):
        (tmp_path / "mine-C" / f"{source}.json").write_text("{}")
        assert corruption_source("mine", tmp_path) == source
