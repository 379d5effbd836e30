"""CIFAR-10, CIFAR-100, digits or images of the user's own, and their corrupted test sets (Sec. 4, data sets).

    load_dataset("cifar10", "data")            # read, verified and, where missing, downloaded by torchvision
    load_dataset("digits", "data")             # scikit-learn's, nothing to download
    load_dataset("path/to/mine.npz", "data")   # train_images, train_labels, test_images, test_labels

A corrupted test set is a folder in the form of the official archives: <corruption>.npy, uint8 (5N, 32, 32, 3), the N
test images at severity 1, then at 2, ... 5, and labels.npy, (5N,).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import import_torchvision, read_json

BUILT_IN = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C", "digits": "DIGITS-C"}  # and their corrupted folders
CORRUPTIONS = (  # the paper's M = 18, the rows of Table 3
    "brightness", "contrast", "defocus_blur", "elastic_transform", "fog", "frost", "gaussian_blur", "glass_blur",
    "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "saturate", "shot_noise", "snow", "spatter",
    "speckle_noise", "zoom_blur",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory: images uint8 (N, 3, 32, 32), labels int64 (N,)."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    hflip: bool  # does a mirrored image keep its class
    source: str  # official, embedded, or what the .npz says of itself


def load_dataset(name: str, root: str | Path) -> Dataset:
    """Load `cifar10`, `cifar100`, `digits` or an `.npz` file; `root` is the folder of CIFAR.

    Raises ValueError for an unknown name or a file of another form, OSError for one that cannot be had.
    """
    if name.endswith(".npz"):
        return _load_npz(Path(name))
    if name == "digits":
        return _load_digits()
    if name in BUILT_IN:
        return _load_cifar(name, Path(root))
    raise ValueError(f"unknown data set {name!r}; use one of {', '.join(BUILT_IN)}, or the path of an .npz file")


def _load_cifar(name: str, root: Path) -> Dataset:
    datasets = import_torchvision().datasets
    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = (cifar(root, train=train, download=True) for train in (True, False))
    except Exception as error:  # the network, the archive and the pickles can raise nearly anything
        raise OSError(f"no whole {name} in {root / cifar.base_folder}, and {cifar.url} cannot be had ("
                      f"{error}); unpack that archive into {root}, or take --dataset digits") from error  # fmt: skip
    parts = (_tensor(train.data), torch.tensor(train.targets), _tensor(test.data), torch.tensor(test.targets))
    return Dataset(name, *parts, train.classes, True, "official")


def _tensor(images: np.ndarray) -> Tensor:
    """(N, 32, 32, 3) -> (N, 3, 32, 32)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _load_digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8x8: levels 0-16 scaled to 0-255, bilinear to 32x32, grey as RGB.

    1,437 train and 360 test images, every class in proportion.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    split = train_test_split(images.numpy(), targets, test_size=360, stratify=targets, random_state=0)
    train, test, train_labels, test_labels = map(torch.from_numpy, split)
    return Dataset("digits", train, train_labels, test, test_labels, list("0123456789"), False, "embedded")


def _load_npz(path: Path) -> Dataset:
    """An .npz of the user's: train_images, test_images uint8 (N, 32, 32, 3), train_labels, test_labels (N,) from 0.

    Optional: `classes` (C,) names, `hflip` (default true), `source`, a text that results and tables show.
    """
    if path.stem in BUILT_IN or f"{path.stem}-C" in BUILT_IN.values():
        raise ValueError(f"--dataset {path}: {path.stem} is a data set's name here; rename the file")
    if not path.is_file():
        raise ValueError(f"--dataset {path}: there is no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        pairs = [(part, arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test")]
    except Exception as error:  # damaged bytes can make zipfile and numpy raise nearly anything
        raise ValueError(f"{path} is damaged, or lacks one of the plain arrays train_images, train_labels, test_images"
                         f" and test_labels ({error})") from None  # fmt: skip
    parts = []
    for part, images, labels in pairs:
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) == 0:
            raise ValueError(f"{path}: {part}_images is {images.dtype} {images.shape}, not uint8 (N, 32, 32, 3)")
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or labels.min() < 0:
            raise ValueError(f"{path}: {part}_labels is {labels.dtype} {labels.shape}, not {len(images)} integers >= 0")
        parts += [_tensor(images), torch.from_numpy(labels.astype(np.int64))]
    count = 1 + int(max(parts[1].max(), parts[3].max()))
    names, hflip = arrays.get("classes", np.arange(count)), arrays.get("hflip", np.array(True))
    if names.ndim != 1 or hflip.shape != () or hflip.dtype != bool:
        raise ValueError(f"{path}: classes must be a list of names, and hflip True or False")
    classes = [str(name) for name in names]
    if len(classes) < count:
        raise ValueError(f"{path} names {len(classes)} classes, but its labels go up to {count - 1}")
    return Dataset(path.stem, *parts, classes, bool(hflip), str(arrays.get("source", path.name)))


# Corrupted test sets


def corrupted_folder(name: str, root: str | Path) -> Path:
    """The folder of a data set's corrupted test images, which need not be there."""
    return Path(root) / BUILT_IN.get(name, f"{name}-C")


def is_whole(folder: Path) -> bool:
    """Are the paper's corruptions and the labels all there, and in a folder that was made here gaussian_noise too?"""
    names = [*CORRUPTIONS, "labels"] + ["gaussian_noise"] * (folder / "generated.json").is_file()
    return all((folder / f"{name}.npy").is_file() for name in names)


def load_corrupted(name: str, root: str | Path, corruption: str) -> Tensor:
    """One corruption of data set `name`, uint8 (5, N, 3, 32, 32), memory-mapped: what is not used is not read.

    Raises FileNotFoundError for a missing file, ValueError for one of another form.
    """
    images = _map(name, root, corruption)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) % 5:
        path = corrupted_folder(name, root) / f"{corruption}.npy"
        raise ValueError(f"{path} is {images.dtype} {images.shape}, not uint8 (5N, 32, 32, 3); make it anew")
    return torch.from_numpy(images).view(5, len(images) // 5, 32, 32, 3).permute(0, 1, 4, 2, 3)


def check_folder(dataset: Dataset, root: str | Path) -> None:
    """Raise ValueError unless the corrupted set is of this test set: its labels, five times, and the images' hash.

    A set made here has the hash in its generated.json; of others the labels alone are checked.
    """
    name, folder = dataset.name, corrupted_folder(dataset.name, root)
    labels, record = _map(name, root, "labels"), folder / "generated.json"
    same_labels = labels.dtype.kind in "iu" and np.array_equal(labels, np.tile(dataset.test_labels.numpy(), 5))
    made = read_json(record) if record.is_file() else {}
    same_images = "clean_sha256" not in made or made["clean_sha256"] == sha256(dataset.test_images)
    if not (same_labels and same_images):
        what = "images" if same_labels else "labels"
        raise ValueError(f"{folder} was made of other {what} than those of {name}'s test set; delete that folder, or"
                         " name another with --data")  # fmt: skip


def sha256(images: Tensor) -> str:
    """Of the bytes of images, uint8 (N, 3, 32, 32), in the order of the official files, (N, 32, 32, 3)."""
    return hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes()).hexdigest()


def corruption_source(name: str, root: str | Path) -> str:
    """`official` beside an official.json, `generated` beside a generated.json, else `unverified`."""
    folder = corrupted_folder(name, root)
    return next((s for s in ("official", "generated") if (folder / f"{s}.json").is_file()), "unverified")


def _map(name: str, root: str | Path, stem: str) -> np.ndarray:
    path = corrupted_folder(name, root) / f"{stem}.npy"
    if not path.is_file():
        dataset = name if name in BUILT_IN else f"PATH/{name}.npz"
        raise FileNotFoundError(f"no {path}; make it with `python corruptions.py --dataset {dataset} --data {root}`")
    try:
        return np.lib.format.open_memmap(path, mode="c")  # c: a private view, which torch may take as writable
    except Exception as error:  # damaged bytes can make numpy raise nearly anything
        raise ValueError(f"{path} is damaged ({str(error)[:80]}); delete it and make it anew") from None
