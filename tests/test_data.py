"""data.py: data sets against scikit-learn, Pillow and hand-written files; every documented error; random damage."""

import hashlib
import pickle
import random
import resource
import shutil
import socket
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from test_unpickle import Runs, python2_batch

import data
import runs
from data import corruption_source, load_corrupted, load_dataset, verify_corrupted
from device import import_torchvision

torchvision = import_torchvision()
CLASSES = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


# CIFAR


def write_cifar(root: Path, name: str = "cifar10", n: int = 2, python2: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """An official folder with n random images a batch; returns images (N, 3, 32, 32) and labels, test batch last."""
    cifar, rng = CLASSES[name], np.random.default_rng(0)
    folder = root / cifar.base_folder
    folder.mkdir(parents=True)
    count = len(cifar.train_list) + 1
    images = rng.integers(0, 256, (count, n, 3072), np.uint8)
    labels = rng.integers(0, data.NUM_CLASSES[name], (count, n))
    label_key = "labels" if name == "cifar10" else "fine_labels"
    for (file, _), batch_images, batch_labels in zip(cifar.train_list + cifar.test_list, images, labels, strict=True):
        batch = {"data": batch_images, label_key: batch_labels.tolist(), "coarse_labels": [0] * n}
        old = python2_batch(batch_images, batch_labels.tolist(), label_key)
        (folder / file).write_bytes(old if python2 else pickle.dumps(batch, 4))
    names = [f"class {i}" for i in range(data.NUM_CLASSES[name])]
    (folder / cifar.meta["filename"]).write_bytes(pickle.dumps({cifar.meta["key"]: names}, 2))
    return images.reshape(-1, 3, 32, 32), labels.ravel()


@pytest.mark.parametrize("python2", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_batches_are_read_in_their_order(tmp_path: Path, name: str, python2: bool) -> None:
    images, labels = write_cifar(tmp_path, name, n=3, python2=python2)
    dataset = load_dataset(name, str(tmp_path))
    assert dataset.name == name
    assert np.array_equal(torch.cat([dataset.train_images, dataset.test_images]), images)
    assert np.array_equal(torch.cat([dataset.train_labels, dataset.test_labels]), labels)
    assert len(dataset.test_images) == 3
    assert dataset.train_images.dtype == dataset.test_images.dtype == torch.uint8
    assert dataset.train_labels.dtype == dataset.test_labels.dtype == torch.int64
    assert dataset.classes == [f"class {i}" for i in range(data.NUM_CLASSES[name])]
    assert dataset.hflip
    assert dataset.source == "unofficial copy"
    dataset.train_images[0] = 0  # writable memory


@pytest.mark.cifar
def test_the_real_images_have_cifars_published_statistics(real_cifar: Path) -> None:
    dataset = load_dataset("cifar10", real_cifar)
    assert dataset.train_images.shape == (50000, 3, 32, 32)
    assert dataset.test_images.shape == (10000, 3, 32, 32)
    assert torch.bincount(dataset.train_labels).tolist() == [5000] * 10
    assert torch.bincount(dataset.test_labels).tolist() == [1000] * 10
    assert dataset.train_labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert dataset.classes[6] == "frog"
    levels = dataset.train_images.float() / 255
    assert levels.mean((0, 2, 3)).numpy() == pytest.approx(dataset.mean, abs=2e-3)
    assert levels.std((0, 2, 3)).numpy() == pytest.approx(dataset.std, abs=4e-3)


def test_official_needs_every_md5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path)
    folder, cifar = tmp_path / "cifar-10-batches-py", CLASSES["cifar10"]

    def md5(file: str) -> str:
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    monkeypatch.setattr(cifar, "train_list", [[file, md5(file)] for file, _ in cifar.train_list])
    monkeypatch.setattr(cifar, "test_list", [[file, md5(file)] for file, _ in cifar.test_list])
    assert load_dataset("cifar10", tmp_path).source == "unofficial copy"
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5("batches.meta")})
    assert load_dataset("cifar10", tmp_path).source == "official"
    batch = bytearray((folder / "test_batch").read_bytes())
    batch[batch.index(b"labels") - 500] ^= 1  # a pixel
    (folder / "test_batch").write_bytes(batch)
    assert load_dataset("cifar10", tmp_path).source == "unofficial copy"


@pytest.mark.parametrize("missing", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"cifar-10-batches-py lacks the file {missing}; add it, or delete"):
        load_dataset("cifar10", tmp_path)


def test_an_unknown_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'mnist'; use one of cifar10, cifar100, digits"):
        load_dataset("mnist", tmp_path)


GOOD = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 9]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((2, 3072), np.int32)}, "no uint8 array `data` of shape"),
        ({"data": np.zeros((2, 3071), np.uint8)}, "no uint8 array `data` of shape"),
        ({"data": np.zeros(6144, np.uint8)}, "no uint8 array `data` of shape"),
        ({"data": [0] * 6144}, "no uint8 array `data` of shape"),
        ({"labels": [0, 10]}, "no list `labels` of integers 0 to 9"),
        ({"labels": [0, -1]}, "no list `labels` of integers 0 to 9"),
        ({"labels": [0, "1"]}, "no list `labels` of integers 0 to 9"),
        ({"labels": None}, "no list `labels` of integers 0 to 9"),
        ({"labels": [0]}, "2 images and 1 labels"),
        ({"labels": np.array([1, 2, 3])}, "2 images and 3 labels"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "0 images and 0 labels"),
        ({"labels": Runs(eval, "1")}, "eval.*tampered"),
    ],
)
def test_a_tampered_batch_is_one_line_naming_the_file(tmp_path: Path, change: dict, message: str) -> None:
    write_cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    file.write_bytes(pickle.dumps(GOOD, 4))
    load_dataset("cifar10", tmp_path)
    file.write_bytes(pickle.dumps(GOOD | change, 4))
    with pytest.raises(ValueError, match=rf"data_batch_2 .*{message}.*; restore it, or delete .*cifar-10-batches-py"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("names", [None, ["a"] * 9, [1] * 10, ["a" * 101] * 10, {}])
def test_class_names_are_checked(tmp_path: Path, names: object) -> None:
    write_cifar(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "batches.meta"
    file.write_bytes(pickle.dumps({"label_names": [b"bytes will do"] * 10}, 4))
    assert load_dataset("cifar10", tmp_path).classes == ["bytes will do"] * 10
    file.write_bytes(pickle.dumps({"label_names": names}, 4))
    with pytest.raises(ValueError, match=r"batches.meta holds no list `label_names` of 10 names"):
        load_dataset("cifar10", tmp_path)


def test_without_network_one_line_says_what_is_missing_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object) -> None:
        assert socket.getdefaulttimeout() is not None, "would wait for ever"
        raise urllib.error.URLError("Name or service\nnot known")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", offline)
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset("cifar100", tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"{tmp_path}/cifar-100-python", "cannot be downloaded", "not known", "--data", "--dataset digits"):
        assert part in message
    assert socket.getdefaulttimeout() is None


def test_an_archive_beside_the_folder_is_checked_and_only_the_batches_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, labels = write_cifar(tmp_path / "made")
    (tmp_path / "made" / "cifar-10-batches-py" / "readme.html").write_text("not wanted")
    (tmp_path / "data").mkdir()
    base = str(tmp_path / "data" / "cifar-10-python")
    archive = Path(shutil.make_archive(base, "gztar", tmp_path / "made", "cifar-10-batches-py"))
    monkeypatch.setattr(CLASSES["cifar10"], "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    dataset = load_dataset("cifar10", tmp_path / "data")
    assert np.array_equal(torch.cat([dataset.train_labels, dataset.test_labels]), labels)
    assert not (tmp_path / "data" / "cifar-10-batches-py" / "readme.html").exists()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["cifar-10-batches-py", archive.name]


# Digits


def test_digits_are_scikit_learns_split_and_enlarged_as_pillow_does() -> None:
    dataset = load_dataset("digits", "nowhere")
    assert dataset.train_images.shape == (1437, 3, 32, 32)
    assert dataset.test_images.shape == (360, 3, 32, 32)
    pixels, targets = load_digits(return_X_y=True)
    halves = train_test_split(pixels, targets, test_size=360, random_state=0, stratify=targets)
    for images, labels, small, expected in (
        (dataset.train_images, dataset.train_labels, halves[0], halves[2]),
        (dataset.test_images, dataset.test_labels, halves[1], halves[3]),
    ):
        assert np.array_equal(labels, expected)
        assert np.ptp(np.bincount(labels, minlength=10) / np.bincount(targets)) < 0.01
        for image, digit in zip(images[:50].numpy(), small, strict=False):
            gray = Image.fromarray((digit.reshape(8, 8) * (255 / 16)).astype(np.float32), "F")
            large = np.asarray(gray.resize((32, 32), Image.Resampling.BILINEAR))
            assert np.abs(image.astype(float) - large).max() <= 0.502
    assert (dataset.test_images[:, :1] == dataset.test_images).all()
    levels = dataset.train_images.numpy() / 255
    assert dataset.mean == pytest.approx(levels.mean((0, 2, 3)))
    assert dataset.std == pytest.approx(levels.std((0, 2, 3)))
    assert (dataset.hflip, dataset.source, dataset.classes) == (False, "embedded", list("0123456789"))


# Corrupted test sets

N = 7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CIFAR-10-C of N images, fog and snow, without a record."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for seed, name in enumerate(["fog", "snow"]):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).integers(0, 256, (5 * N, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(N, dtype=np.uint8), 5))
    return folder


def write_record(folder: Path, file: str = "generated.json", **changes: object) -> None:
    """A generated.json or official.json with the hash of each array in the folder."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.npy")}
    runs.write_json(folder / file, {"seed": 0, "dataset": "cifar10", "images": N, "files": files} | changes)


def test_the_corruptions_are_table_3s() -> None:
    assert len(data.CORRUPTIONS) == len(set(data.CORRUPTIONS)) == 18
    assert list(data.CORRUPTIONS) == sorted(data.CORRUPTIONS)
    assert data.ALL_CORRUPTIONS[18:] == ("gaussian_noise",)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_a_cell_is_its_fifth_of_the_file(folder: Path, severity: int) -> None:
    images, labels = load_corrupted("cifar10", str(folder.parent), "snow", severity)
    rows = slice(N * (severity - 1), N * severity)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert np.array_equal(images, np.load(folder / "snow.npy")[rows].transpose(0, 3, 1, 2))
    assert np.array_equal(labels, np.load(folder / "labels.npy")[rows])
    images[0] = 0  # writable memory, and the file keeps its bytes
    first, first_labels = load_corrupted("cifar10", folder.parent, "snow", severity, limit=3)
    assert np.array_equal(first, np.load(folder / "snow.npy")[rows][:3].transpose(0, 3, 1, 2))
    assert len(first_labels) == 3
    assert len(load_corrupted("cifar10", folder.parent, "snow", severity, limit=99)[0]) == N


def test_a_limit_reads_that_many_images_alone(folder: Path) -> None:
    count = 1_000_000  # 3 GB of zeros that take no room on the disk
    with open(folder / "fog.npy", "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, 32, 32, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + count * 3072)
    np.save(folder / "labels.npy", np.zeros(count, np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images, _ = load_corrupted("cifar10", folder.parent, "fog", 5, limit=10)
    assert images.shape == (10, 3, 32, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist", "fog", 1), "unknown data set 'mnist'"),
        (("cifar10", "rain", 1), "unknown corruption 'rain'; use one of brightness, contrast"),
        (("cifar10", "../fog", 1), "unknown corruption '../fog'"),
        (("cifar10", "fog", 0), "severity 0: use 1 to 5"),
        (("cifar10", "fog", 6), "severity 6: use 1 to 5"),
        (("cifar10", "fog", "1"), "severity '1': use 1 to 5"),
        (("cifar10", "fog", 1, 0), "limit 0: at least one image"),
    ],
)
def test_wrong_arguments_are_refused(folder: Path, arguments: tuple, message: str) -> None:
    name, *rest = arguments
    with pytest.raises(ValueError, match=message):
        load_corrupted(name, folder.parent, *rest)


def test_an_absent_set_names_the_commands_that_make_one(tmp_path: Path) -> None:
    for function in (verify_corrupted, corruption_source, lambda *where: load_corrupted(*where, "fog", 1)):
        with pytest.raises(FileNotFoundError) as caught:
            function("cifar100", tmp_path)
        assert f"no corrupted test set {tmp_path}/CIFAR-100-C;" in str(caught.value)
        assert f"`python corruptions.py --dataset cifar100 --data {tmp_path}`" in str(caught.value)
        assert f"`python corruptions.py --dataset cifar100 --data {tmp_path} --download`" in str(caught.value)
        with pytest.raises(FileNotFoundError, match=r"DIGITS-C; make it with `python \S+ --dataset digits[^`]*`$"):
            function("digits", tmp_path)  # there is no official one to download


@pytest.mark.parametrize("missing", ["fog.npy", "labels.npy"])
def test_a_missing_array_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"no file .*CIFAR-10-C/{missing}; make it with"):
        load_corrupted("cifar10", folder.parent, "fog", 1)


ZEROS = np.zeros((5 * N, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ZEROS.astype(np.int16), r"is int16 of shape \(35, 32, 32, 3\), not uint8"),
        (ZEROS.astype(np.float32), "float32 of shape"),
        (ZEROS.transpose(0, 3, 1, 2).copy(), r"shape \(35, 3, 32, 32\), not uint8 \(5 N, 32, 32, 3\)"),
        (ZEROS[:34], r"shape \(34, 32, 32, 3\), not uint8 \(5 N"),
        (ZEROS[:30], "labels.npy has shape .35,., but fog.npy holds 30 images"),
        (ZEROS[:0], "not a sound array"),
        (ZEROS.ravel(), "not uint8"),
        (np.uint8(3), "not a sound array"),
        (np.asfortranarray(ZEROS), "Fortran order"),
        (ZEROS.astype(object), "not a sound array"),
        (np.zeros((5 * N, 32, 32, 3), "u1,u1"), "not a sound array"),
    ],
)
def test_an_array_of_another_kind_is_refused(folder: Path, array: np.ndarray, message: str) -> None:
    np.save(folder / "fog.npy", array)
    with pytest.raises(ValueError, match=rf"{message}.*; delete .*, then make it with") as caught:
        load_corrupted("cifar10", folder.parent, "fog", 1)
    assert f"{folder}/fog.npy" in str(caught.value) or f"{folder}/labels.npy" in str(caught.value)


def header(text: bytes, version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04 a zip",
        pickle.dumps(Runs(eval, "1/0")),
        header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (35, 32, 32, 3)}\n"),
        header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-35, -32, 32, 3)}\n"),
        header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (2**60,)}\n"),
        header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1152921504606846976, 32, 32, 3)}\n"),
        header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n") + pickle.dumps(Runs(eval, "1/0")),
        header(b"{'descr': '|u1'}\n"),
        header(b"__import__('os').getcwd()\n"),
        header(b"(" * 5000),
        header(b"-" * 9000 + b"1"),
        header(b" " * 60000),
        header(b"x" * 2**20, version=2),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1,)}\n", version=9) + b"1",
    ],
)
def test_a_header_that_claims_too_much_is_refused(folder: Path, content: bytes) -> None:
    for file in ("fog.npy", "labels.npy"):
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file} is not a sound array file \(.{{3,120}}\); delete it, then make"):
            load_corrupted("cifar10", folder.parent, "fog", 1)
        (folder / file).write_bytes(whole)


def test_a_cut_or_lengthened_array_is_refused(folder: Path) -> None:
    whole = (folder / "fog.npy").read_bytes()
    for content in (whole[:-1], whole + b"x"):
        (folder / "fog.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"fog.npy .*it has 107,64[79] bytes, its header asks for 107,648"):
            load_corrupted("cifar10", folder.parent, "fog", 1)


@pytest.mark.parametrize("row", [0, N, 5 * N - 1])
@pytest.mark.parametrize("label", [-1, 10, 9])
def test_labels_out_of_range_or_that_disagree_between_severities_are_refused(
    folder: Path, row: int, label: int
) -> None:
    labels = np.tile(np.arange(N), 5)
    labels[row if label == 9 else slice(row % N, None, N)] = label
    np.save(folder / "labels.npy", labels)
    with pytest.raises(ValueError, match=r"labels.npy does not hold labels from 0 to 9, the same for each severity"):
        load_corrupted("cifar10", folder.parent, "fog", 1)


# Their records


def test_the_source_is_what_the_records_say(folder: Path) -> None:
    root = folder.parent
    assert corruption_source("cifar10", root) == verify_corrupted("cifar10", root) == "unverified"
    write_record(folder)
    assert corruption_source("cifar10", root) == verify_corrupted("cifar10", root) == "generated"
    write_record(folder, "official.json", url="https://zenodo.org", md5="0" * 32)
    assert corruption_source("cifar10", root) == verify_corrupted("cifar10", root) == "official"


@pytest.mark.parametrize("record", ["generated.json", "official.json"])
@pytest.mark.parametrize("seen_before", [False, True])
def test_one_changed_pixel_is_found(folder: Path, record: str, seen_before: bool) -> None:
    write_record(folder, record)
    if seen_before:
        verify_corrupted("cifar10", folder.parent)
    content = bytearray((folder / "fog.npy").read_bytes())
    content[5000] ^= 1
    (folder / "fog.npy").write_bytes(content)
    load_corrupted("cifar10", folder.parent, "snow", 1)
    message = rf"fog.npy is not the file of .*{record}; delete it, then make it with `python corruptions.py"
    with pytest.raises(ValueError, match=message):
        load_corrupted("cifar10", folder.parent, "fog", 1)
    with pytest.raises(ValueError, match=message):
        verify_corrupted("cifar10", folder.parent)


def test_each_file_is_hashed_once_for_each_hash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, sha256 = [], runs.sha256
    monkeypatch.setattr(runs, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    write_record(folder)
    for _ in range(2):
        load_corrupted("cifar10", folder.parent, "fog", 1)
    assert sorted(hashed) == ["fog.npy", "labels.npy"]
    for _ in range(2):
        verify_corrupted("cifar10", folder.parent)
    assert sorted(hashed) == ["fog.npy", "labels.npy", "snow.npy"]
    hashes = runs.read_json(folder / "generated.json")["files"]
    write_record(folder, files=hashes | {"snow.npy": "0" * 64})
    with pytest.raises(ValueError, match=r"snow.npy is not the file of"):
        verify_corrupted("cifar10", folder.parent)
    for marker in ("[]", "no json", '{"snow.npy": NaN}'):
        (folder / ".verified.json").write_text(marker)
        hashed.clear()
        load_corrupted("cifar10", folder.parent, "fog", 1)
        assert sorted(hashed) == ["fog.npy", "labels.npy"]


def test_a_folder_that_cannot_be_written_is_checked_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(folder)

    def read_only(path: Path, _: object) -> None:
        raise OSError(f"cannot write {path}")

    monkeypatch.setattr(runs, "write_json", read_only)
    assert verify_corrupted("cifar10", folder.parent) == "generated"
    assert verify_corrupted("cifar10", folder.parent) == "generated"


def test_an_unfinished_set_serves_the_files_it_lists(folder: Path) -> None:
    write_record(folder)
    hashes = runs.read_json(folder / "generated.json")["files"]
    ahead = hashes | {"fog.npy": "0" * 64}  # the record is written before the file it tells of
    (folder / "fog.npy").unlink()
    write_record(folder, files=ahead)
    assert verify_corrupted("cifar10", folder.parent) == "generated"
    load_corrupted("cifar10", folder.parent, "snow", 1)
    with pytest.raises(FileNotFoundError, match=r"no file .*fog.npy; make it with"):
        load_corrupted("cifar10", folder.parent, "fog", 1)
    with pytest.raises(ValueError, match=r"does not list frost.npy, so the set is unfinished; finish it"):
        load_corrupted("cifar10", folder.parent, "frost", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"files": None},
        {"files": ["fog.npy"]},
        {"files": {"../fog.npy": "0" * 64}},
        {"files": {"fog.npy": "0" * 63}},
        {"files": {"fog.npy": "G" * 64}},
        {"files": {"fog.npy": 7}},
        {"dataset": "digits"},
    ],
)
def test_a_record_of_another_form_is_refused(folder: Path, change: dict) -> None:
    write_record(folder, **change)
    for function in (verify_corrupted, corruption_source, lambda *where: load_corrupted(*where, "fog", 1)):
        with pytest.raises(ValueError, match=r"generated.json .*; delete .*CIFAR-10-C and make it anew"):
            function("cifar10", folder.parent)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["fog.npy", "labels.npy", "generated.json", ".verified.json"])
def test_random_damage_raises_only_documented_errors(folder: Path, file: str) -> None:
    rng = random.Random(0)
    if file.endswith("json"):
        write_record(folder)
        verify_corrupted("cifar10", folder.parent)
    whole = (folder / file).read_bytes()
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5])):
            damaged[rng.randrange(min(len(whole), 200))] = rng.choice([rng.randrange(256), *b"0'(),:{}[]-9"])
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        (folder / file).write_bytes(damaged)
        message = ""
        try:
            images, labels = load_corrupted("cifar10", folder.parent, "fog", rng.randint(1, 5))
            assert images.shape[1:] == (3, 32, 32)
            assert len(images) == len(labels) == N
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            refused += 1
        assert not message or (str(folder) in message and "\n" not in message)
    assert refused > 60 or file == ".verified.json"
