"""Data sets against hand-written files, scikit-learn and Pillow; corrupted sets; every documented error."""

import hashlib
import pickle
import resource

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import check_labels, corruption_source, load_corrupted, load_dataset
from utils import import_torchvision

N = 7


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_read_verified_and_in_its_order(tmp_path, monkeypatch, name, key):
    datasets = import_torchvision().datasets
    cifar, rng = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name], np.random.default_rng(0)
    folder, images, labels = tmp_path / cifar.base_folder, [], []
    folder.mkdir()

    def write(file, content):
        (folder / file).write_bytes(pickle.dumps(content, 2))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(cifar, part):
            images.append(rng.integers(0, 256, (3, 3072), np.uint8))
            labels.append(rng.integers(0, 10, 3).tolist())
            sums.append([file, write(file, {"data": images[-1], key: labels[-1], "coarse_labels": [0] * 3})])
        monkeypatch.setattr(cifar, part, sums)
    names = [f"class {k}" for k in range(10)]
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": write(cifar.meta["filename"], {cifar.meta["key"]: names})})
    dataset = load_dataset(name, tmp_path)
    assert np.array_equal(torch.cat([dataset.train_images, dataset.test_images]), np.reshape(images, (-1, 3, 32, 32)))
    assert np.array_equal(torch.cat([dataset.train_labels, dataset.test_labels]), np.ravel(labels))
    assert dataset.test_images.shape == (3, 3, 32, 32)
    assert dataset.train_images.dtype == dataset.test_images.dtype == torch.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == torch.int64
    assert (dataset.name, dataset.classes, dataset.hflip, dataset.source) == (name, names, True, "official")

    def offline(*_, **__):
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(datasets.utils, "download_url", offline)
    write(cifar.train_list[0][0], {"data": images[0] ^ 1, key: labels[0]})  # a changed file is downloaded anew
    with pytest.raises(OSError) as caught:
        load_dataset(name, tmp_path)
    for part in (str(folder), cifar.url, "(Name or service not known)", "--data", "--dataset digits"):
        assert part in str(caught.value)


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
    images, labels = (torch.cat([getattr(dataset, f"{part}_{kind}") for part in ("train", "test")])
                      for kind in ("images", "labels"))  # fmt: skip
    assert (images[:, :1] == images).all()
    assert np.array_equal(np.bincount(labels), np.bincount(targets))
    assert np.ptp(np.bincount(dataset.test_labels) / np.bincount(targets)) < 0.01  # every class in proportion
    ours = {image[0].numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for digit, target in zip(pixels[:40], targets, strict=False):
        gray = Image.fromarray((digit.reshape(8, 8) * (255 / 16)).astype(np.float32))
        large = np.asarray(gray.resize((32, 32), Image.Resampling.BILINEAR)).astype(np.float64)
        near = np.abs(images[:, 0].numpy() - large).max(axis=(1, 2)).argmin()
        assert np.abs(images[near, 0].numpy() - large).max() <= 0.502
        assert ours[images[near, 0].numpy().tobytes()] == target


# An .npz of the user's


def arrays(**changes):
    rng = np.random.default_rng(0)
    content = {"train_images": rng.integers(0, 256, (5, 32, 32, 3), np.uint8), "train_labels": np.arange(5) % 4,
               "test_images": rng.integers(0, 256, (3, 32, 32, 3), np.uint8), "test_labels": np.array([2, 0, 1])}
    return {key: value for key, value in (content | changes).items() if value is not None}  # fmt: skip


def test_an_npz_and_its_optional_keys(tmp_path):
    np.savez(tmp_path / "mine.v2.npz", **arrays())
    dataset = load_dataset(str(tmp_path / "mine.v2.npz"), "nowhere")
    assert np.array_equal(dataset.train_images.permute(0, 2, 3, 1), arrays()["train_images"])
    assert np.array_equal(dataset.test_images.permute(0, 2, 3, 1), arrays()["test_images"])
    assert (dataset.train_labels.tolist(), dataset.test_labels.tolist()) == ([0, 1, 2, 3, 0], [2, 0, 1])
    assert (dataset.train_images.dtype, dataset.train_labels.dtype) == (torch.uint8, torch.int64)
    assert (dataset.name, dataset.source, dataset.hflip) == ("mine.v2", "mine.v2.npz", True)
    assert dataset.classes == ["0", "1", "2", "3"]
    names = np.array(["a", "b", "c", "d", "e"])
    np.savez_compressed(tmp_path / "b.npz", **arrays(classes=names, hflip=False, source="a camera"))
    dataset = load_dataset(str(tmp_path / "b.npz"), "nowhere")
    assert (dataset.classes, dataset.hflip, dataset.source) == (list("abcde"), False, "a camera")


IMAGES, LABELS = arrays()["train_images"], arrays()["train_labels"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"test_labels": None}, "lacks the array 'test_labels'; it holds train_images"),
     ({"train_images": IMAGES / 255}, "train_images is float64"),
     ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, r"train_images is uint8 \(5, 3, 32, 32\), not uint8 \(N, 32"),
     ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "test_images is uint8 .0,"),
     ({"train_labels": LABELS * 1.0}, "train_labels is float64 .*not 5 integers"),
     ({"train_labels": LABELS[:4]}, "train_labels is int64 .4,., not 5"),
     ({"train_labels": LABELS - 1}, "integers >= 0"),
     ({"classes": np.array(["a", "b", "c"])}, "names 3 classes, but its labels go up to 3"),
     ({"source": np.array([None])}, "damaged, or no .npz of plain arrays")],
)  # fmt: skip
def test_an_npz_of_another_form_is_refused(tmp_path, changes, message):
    np.savez(tmp_path / "mine.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=rf"mine\.npz.*{message}"):
        load_dataset(str(tmp_path / "mine.npz"), "nowhere")


# Corrupted test sets


@pytest.fixture
def folder(tmp_path):
    """A CIFAR-10-C of N images, snow alone."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "snow.npy", np.random.default_rng(0).integers(0, 256, (5 * N, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(N, dtype=np.uint8), 5))
    return folder


def test_the_papers_corruptions_and_where_a_set_is():
    assert len(set(data.CORRUPTIONS)) == 18
    assert list(data.CORRUPTIONS) == sorted(data.CORRUPTIONS)
    assert "gaussian_noise" not in data.CORRUPTIONS
    folders = {name: str(data.corrupted_folder(name, "root")) for name in ("cifar10", "cifar100", "digits", "mine")}
    assert folders == {"cifar10": "root/CIFAR-10-C", "cifar100": "root/CIFAR-100-C", "digits": "root/DIGITS-C",
                       "mine": "root/mine-C"}  # fmt: skip


def test_a_corruption_is_five_severities_and_only_what_is_used_is_read(folder):
    images, original = load_corrupted("cifar10", folder.parent, "snow"), np.load(folder / "snow.npy")
    assert images.shape == (5, N, 3, 32, 32)
    for severity in range(5):
        assert np.array_equal(images[severity], original[N * severity : N * (severity + 1)].transpose(0, 3, 1, 2))
    images[0] = 0  # writable memory, but the file keeps its bytes
    assert np.array_equal(np.load(folder / "snow.npy"), original)
    check_labels("cifar10", folder.parent, torch.arange(N))
    with open(folder / "fog.npy", "wb") as file:  # 3 GB of zeros that take no room on the disk
        header = {"descr": "|u1", "fortran_order": False, "shape": (1_000_000, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 3072 * 1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_corrupted("cifar10", folder.parent, "fog")[4, :10].clone().shape == (10, 3, 32, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KB


ZEROS = np.zeros((5 * N, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("array", [ZEROS * 1.0, ZEROS.transpose(0, 3, 1, 2).copy(), ZEROS[:34], ZEROS[:0],
                                   ZEROS.ravel(), np.uint8(3), ZEROS.astype(object)])  # fmt: skip
def test_an_array_of_another_form_is_refused(folder, array):
    np.save(folder / "snow.npy", array)
    with pytest.raises(ValueError, match=r"snow\.npy is (damaged|.*not uint8 \(5N, 32, 32, 3\)).*make it anew"):
        load_corrupted("cifar10", folder.parent, "snow")


def test_a_missing_set_names_the_command_and_other_labels_are_refused(folder):
    with pytest.raises(FileNotFoundError, match=r"no .*fog\.npy; make it with `python \S+ --dataset cifar10"):
        load_corrupted("cifar10", folder.parent, "fog")
    for other in (torch.arange(N) + 1, torch.arange(N - 1), torch.arange(N).flip(0)):
        with pytest.raises(ValueError, match="its labels are not those of cifar10's test set"):
            check_labels("cifar10", folder.parent, other)
    np.savez(folder / "labels.npz", a=1)
    (folder / "labels.npz").rename(folder / "labels.npy")
    with pytest.raises(ValueError, match=r"labels\.npy is damaged"):
        check_labels("cifar10", folder.parent, torch.arange(N))


def test_the_source_of_a_corrupted_set(folder):
    assert corruption_source("cifar10", folder.parent) == "unverified"
    (folder / "generated.json").write_text("{}")
    assert corruption_source("cifar10", folder.parent) == "generated"
    (folder / "official.json").write_text("{}")
    assert corruption_source("cifar10", folder.parent) == "official"
