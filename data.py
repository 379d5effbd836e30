"""CIFAR-10, CIFAR-100, digits and their corrupted test sets as uint8 tensors (Sec. 4, datasets).

No file is trusted: CIFAR's batches are pickles, and unpickle.py reads them without running them; arrays are mapped
with allow_pickle=False after a look at their header; hashes are checked where there are some. Whatever is wrong with a
file is a ValueError or FileNotFoundError of one line that names it.
"""

import http.client
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import download
from device import import_torchvision
from unpickle import read_pickle, remedy

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
    if isinstance(names, list):
        names = [n.decode("latin-1") if isinstance(n, bytes) else n for n in names]
    if not isinstance(names, list) or len(names) != num_classes or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{path} holds no list `{meta['key']}` of {num_classes} names; {remedy(path)}")
    return names


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
