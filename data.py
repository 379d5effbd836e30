"""CIFAR-10, CIFAR-100, digits and their corrupted test sets as uint8 tensors (Sec. 4, datasets).

No file is trusted: CIFAR's batches are pickles, and unpickle.py reads them without running them; arrays are mapped
with allow_pickle=False after a look at their header; hashes are checked where there are some. Whatever is wrong with a
file is a ValueError or FileNotFoundError of one line that names it.
"""

import http.client
import io
import math
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import download
import runs
from device import import_torchvision
from unpickle import MAX_NAME, read_pickle, remedy

DATASETS = ("cifar10", "cifar100", "digits")
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}
MEAN_STD = {  # per channel, of the training images in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
CORRUPTIONS = (  # the rows of Table 3
    "brightness", "contrast", "defocus_blur", "elastic_transform", "fog", "frost", "gaussian_blur", "glass_blur",
    "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "saturate", "shot_noise", "snow", "spatter",
    "speckle_noise", "zoom_blur",
)  # fmt: skip
ALL_CORRUPTIONS = (*CORRUPTIONS, "gaussian_noise")
CORRUPTED_FOLDERS = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C", "digits": "DIGITS-C"}

DOWNLOAD_TIMEOUT_SECONDS = 30
MAX_NPY_HEADER_BYTES = 10_000
MAX_RECORD_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory: images uint8 (N, 3, 32, 32), labels int64 (N,), mean and std per channel for [0, 1]."""

    name: str
    train_images: torch.Tensor
    test_images: torch.Tensor
    train_labels: torch.Tensor
    test_labels: torch.Tensor
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    hflip: bool  # does a mirrored image keep its class
    source: str  # official | unofficial copy | embedded


def load_dataset(name: str, root: str | Path) -> Dataset:
    """Load `cifar10` or `cifar100` from their official folder under `root` (downloaded when absent), or `digits`.

    `source` is `official` only where every file has the md5 that torchvision publishes. Raises ValueError for an
    unknown name or a damaged or tampered file, FileNotFoundError for a missing one that cannot be downloaded.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; use one of {', '.join(DATASETS)}")
    return _load_digits() if name == "digits" else _load_cifar(name, Path(root))


# CIFAR


def _load_cifar(name: str, root: Path) -> Dataset:
    torchvision = import_torchvision()
    cifar = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = root / cifar.base_folder
    md5s = dict(cifar.train_list + cifar.test_list) | {cifar.meta["filename"]: cifar.meta["md5"]}
    if not folder.exists():
        _download_cifar(name, cifar, root, list(md5s))
    for file in md5s:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} lacks the file {file}; add it, or delete the folder to download it anew")
    official = all(torchvision.datasets.utils.check_integrity(folder / file, md5) for file, md5 in md5s.items())

    label_key = "labels" if name == "cifar10" else "fine_labels"
    train, test = (
        [_read_batch(folder / file, label_key, NUM_CLASSES[name]) for file, _ in files]
        for files in (cifar.train_list, cifar.test_list)
    )
    train_images, train_labels = map(np.concatenate, zip(*train, strict=True))
    test_images, test_labels = map(np.concatenate, zip(*test, strict=True))
    mean, std = MEAN_STD[name]
    return Dataset(
        name,
        *map(torch.from_numpy, (train_images, test_images, train_labels, test_labels)),
        classes=_read_classes(folder, cifar.meta, NUM_CLASSES[name]),
        mean=mean,
        std=std,
        hflip=True,
        source="official" if official else "unofficial copy",
    )


def _download_cifar(name: str, cifar: type, root: Path, files: list[str]) -> None:
    """Fetch CIFAR's archive with torchvision (md5 checked) and unpack its `files` into their folder under `root`."""
    folder, timeout = root / cifar.base_folder, socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)  # torchvision sets none, and would wait for ever
        import_torchvision().datasets.utils.download_url(cifar.url, root, cifar.filename, cifar.tgz_md5)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise FileNotFoundError(
            f"no {name}: {folder} does not exist and {cifar.url} cannot be downloaded ({reason}); unpack that archive "
            f"into {root}, name another folder with --data, or use --dataset digits"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    download.extract(root / cifar.filename, folder, [f"{cifar.base_folder}/{file}" for file in files])


def _read_batch(path: Path, label_key: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,) of one batch file, n >= 1."""
    batch = read_pickle(path)
    images, labels = batch.get("data"), batch.get(label_key)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise ValueError(f"{path} holds no uint8 array `data` of shape (n, 3072); {remedy(path)}")
    if isinstance(labels, np.ndarray):
        labels = labels.ravel().tolist()
    if not isinstance(labels, list) or any(type(y) is not int or not 0 <= y < num_classes for y in labels):
        raise ValueError(f"{path} holds no list `{label_key}` of integers 0 to {num_classes - 1}; {remedy(path)}")
    if not 1 <= len(labels) == len(images):
        raise ValueError(f"{path} holds {len(images)} images and {len(labels)} labels; {remedy(path)}")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _read_classes(folder: Path, meta: dict[str, str], num_classes: int) -> list[str]:
    path = folder / meta["filename"]
    names = read_pickle(path).get(meta["key"])
    if not isinstance(names, list) or len(names) != num_classes or not all(map(_is_name, names)):
        raise ValueError(f"{path} holds no list `{meta['key']}` of {num_classes} names; {remedy(path)}")
    return [name.decode("latin-1") if isinstance(name, bytes) else name for name in names]


def _is_name(name: object) -> bool:
    return isinstance(name, str | bytes) and len(name) <= MAX_NAME


# Digits


def _load_digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8x8: levels 0-16 scaled to 0-255, bilinear to 32x32, grey as RGB.

    1,437 train and 360 test images, split with every class in proportion (train_test_split, random_state 0).
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise FileNotFoundError("the digits come with scikit-learn, which is missing: pip install it") from error
    pixels, targets = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images, labels = large.round().to(torch.uint8).expand(-1, 3, -1, -1), torch.from_numpy(targets).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=targets, random_state=0)
    levels = images[train].double() / 255
    mean, std = levels.mean((0, 2, 3)).tolist(), levels.std((0, 2, 3), correction=0).tolist()
    return Dataset(
        "digits",
        *(images[train].contiguous(), images[test].contiguous(), labels[train], labels[test]),
        classes=[str(digit) for digit in range(10)],
        mean=tuple(mean),
        std=tuple(std),
        hflip=False,
        source="embedded",
    )


# Corrupted test sets, in the file format of the official archives


def load_corrupted(
    name: str, root: str | Path, corruption: str, severity: int, limit: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) of one cell, severity 1 to 5; `limit` takes the first ones.

    <root>/<CIFAR-10-C>/<corruption>.npy holds uint8 (5N, 32, 32, 3), severity by severity, and labels.npy (5N,) the N
    labels five times over. The file is mapped: only the cell's bytes are read, but for the hash of a set that has
    hashes, which is checked when the file is first met. Raises ValueError for an unknown name, corruption or severity
    and for files that do not fit this format or each other, FileNotFoundError for missing ones.
    """
    folder = _corrupted_folder(name, root)
    if corruption not in ALL_CORRUPTIONS:
        raise ValueError(f"unknown corruption {corruption!r}; use one of {', '.join(ALL_CORRUPTIONS)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity {severity!r}: use 1 to 5")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: at least one image is needed")
    paths = [folder / f"{corruption}.npy", folder / "labels.npy"]
    _verify(name, root, [path.name for path in paths])
    images, labels = (_map_npy(path, _how_to_make(name, root)) for path in paths)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) % 5:
        problem = f"{paths[0]} is {images.dtype} of shape {images.shape}, not uint8 (5 N, 32, 32, 3)"
        raise ValueError(f"{problem}; delete it, then {_how_to_make(name, root)}")
    count = len(images) // 5
    if labels.shape != (5 * count,):
        problem = f"{paths[1]} has shape {labels.shape}, but {paths[0].name} holds {5 * count} images"
        raise ValueError(f"{problem}; delete {folder}, then {_how_to_make(name, root)}")
    if (labels.reshape(5, count) != labels[:count]).any() or labels.min() < 0 or labels.max() >= NUM_CLASSES[name]:
        problem = f"{paths[1]} does not hold labels from 0 to {NUM_CLASSES[name] - 1}, the same for each severity"
        raise ValueError(f"{problem}; delete {folder}, then {_how_to_make(name, root)}")
    first = (int(severity) - 1) * count
    cell = slice(first, first + min(count, limit or count))
    pixels = np.ascontiguousarray(images[cell].transpose(0, 3, 1, 2))
    return torch.from_numpy(pixels), torch.from_numpy(labels[cell].astype(np.int64))


def corruption_source(name: str, root: str | Path) -> str:
    """`official` where a record says that the archive's md5 matched, `generated` where corruptions.py left one, else
    `unverified`. Raises FileNotFoundError without the folder, ValueError for a damaged record."""
    path, _ = _read_record(name, _corrupted_folder(name, root))
    return path.stem if path else "unverified"


def verify_corrupted(name: str, root: str | Path) -> str:
    """Check the SHA-256 of every file there that the folder's record lists, where it has one; returns
    `corruption_source`. What was checked is noted in `.verified.json` with size, time and hash, so each file is read
    once. Raises ValueError naming a file that differs."""
    folder = _corrupted_folder(name, root)
    _, hashes = _read_record(name, folder)
    _verify(name, root, [file for file in hashes if (folder / file).is_file()])
    return corruption_source(name, root)


def _corrupted_folder(name: str, root: str | Path) -> Path:
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; use one of {', '.join(DATASETS)}")
    folder = Path(root) / CORRUPTED_FOLDERS[name]
    if not folder.is_dir():
        raise FileNotFoundError(f"no corrupted test set {folder}; {_how_to_make(name, root)}")
    return folder


def _how_to_make(name: str, root: str | Path) -> str:
    command = f"python corruptions.py --dataset {name} --data {root}"
    official = f", or fetch the official one with `{command} --download`" if name != "digits" else ""
    return f"make it with `{command}`{official}"


def _map_npy(path: Path, remedy: str) -> np.ndarray:
    """Map an integer array, after checking that the file is as long as its header says."""
    try:
        with open(path, "rb") as file:
            head = io.BytesIO(file.read(MAX_NPY_HEADER_BYTES))
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = readers[np.lib.format.read_magic(head)](head)
        if fortran or dtype.kind not in "iu" or not shape or min(shape) < 1:
            raise ValueError(f"it holds {dtype} of shape {shape}, {'Fortran' if fortran else 'C'} order")
        if (size := path.stat().st_size) != (expected := head.tell() + math.prod(shape) * dtype.itemsize):
            raise ValueError(f"it has {size:,} bytes, its header asks for {expected:,}")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file {path}; {remedy}") from error
    except OSError:
        raise
    except Exception as error:  # damaged bytes can raise nearly anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path} is not a sound array file ({reason}); delete it, then {remedy}") from error


def _read_record(name: str, folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The folder's official.json or generated.json and the SHA-256 of each file in it; (None, {}) without one."""
    for path in (folder / "official.json", folder / "generated.json"):
        if path.exists():
            record = runs.read_json(path, MAX_RECORD_BYTES)
            files = record.get("files")
            names = {f"{corruption}.npy" for corruption in ALL_CORRUPTIONS} | {"labels.npy"}
            if not isinstance(files, dict) or not files.keys() <= names or not all(map(_is_sha256, files.values())):
                raise ValueError(f"{path} does not list files and their SHA-256; delete {folder} and make it anew")
            if record.get("dataset", name) != name:
                raise ValueError(f"{path} is another data set's, not {name}'s; delete {folder} and make it anew")
            return path, files
    return None, {}


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _verify(name: str, root: str | Path, files: list[str]) -> None:
    """Compare each file with the hash in the folder's record, if it has a record and this was not done before."""
    folder = _corrupted_folder(name, root)
    record, hashes = _read_record(name, folder)
    if record is None:
        return
    marker = folder / ".verified.json"
    try:
        verified = runs.read_json(marker, MAX_RECORD_BYTES)
    except (OSError, ValueError):
        verified = {}
    known = dict(verified)
    for file in tqdm(files, desc=f"checking {folder.name}", delay=2, leave=False, disable=None):
        path = folder / file
        if file not in hashes:
            rest = " --all19" if file == "gaussian_noise.npy" else ""
            command = f"python corruptions.py --dataset {name} --data {root}{rest}"
            raise ValueError(f"{record} does not list {file}, so the set is unfinished; finish it with `{command}`")
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; {_how_to_make(name, root)}")
        entry = [path.stat().st_size, path.stat().st_mtime_ns, hashes[file]]
        if verified.get(file) != entry:
            if runs.sha256(path) != hashes[file]:
                raise ValueError(f"{path} is not the file of {record}; delete it, then {_how_to_make(name, root)}")
            verified[file] = entry
    if verified != known:
        with suppress(OSError, ValueError):  # a folder that cannot be written is checked again next time
            runs.write_json(marker, verified)
