"""CIFAR-10, CIFAR-100, digits or the user's own images, and their corrupted test sets (Sec. 4).

    load_dataset("cifar10", "data")            # torchvision downloads, verifies and reads it
    load_dataset("digits", "data")             # scikit-learn's digits, nothing to download
    load_dataset("path/to/mine.npz", "data")   # your own images

A corrupted test set is a folder in the form of the official archives: <corruption>.npy, uint8
(5N, 32, 32, 3), the N test images at severity 1, then at severity 2, ... 5; and labels.npy, (5N,).
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import UserError, read_json, torchvision

BUILT_IN = {  # name: folder of its corrupted test set
    "cifar10": "CIFAR-10-C",
    "cifar100": "CIFAR-100-C",
    "digits": "DIGITS-C",
}
CORRUPTIONS = (  # the paper's M = 18, the rows of Table 3
    "brightness", "contrast", "defocus_blur", "elastic_transform", "fog", "frost", "gaussian_blur",
    "glass_blur", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "saturate",
    "shot_noise", "snow", "spatter", "speckle_noise", "zoom_blur",
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
    hflip: bool  # whether a mirrored image keeps its class
    source: str  # official, embedded, or `source` of the .npz file
    flag: str = ""  # the value of --dataset: a name or a path


def dataset_name(flag: str) -> str:
    """The data set's name for a value of --dataset: a file's is its stem."""
    return Path(flag).stem if flag.lower().endswith(".npz") else flag


def load_dataset(name: str, root: str | Path, *, need_train: bool = True) -> Dataset:
    """Load `cifar10`, `cifar100`, `digits` or an `.npz` file; `root` is the folder of CIFAR.

    Without need_train an `.npz` file may lack the training arrays; they are empty then.
    Raises UserError for an unknown name, a failed download, or a file in the wrong format.
    """
    if dataset_name(name) != name:
        return _load_npz(Path(name), need_train)
    if name == "digits":
        return _load_digits()
    if name in BUILT_IN:
        return _load_cifar(name, Path(root))
    raise UserError(
        f"--dataset {name}: unknown data set. Use {', '.join(BUILT_IN)} or the path of an .npz file"
    )


def _load_cifar(name: str, root: Path) -> Dataset:
    cifar = getattr(torchvision.datasets, name.upper())
    folder = root / cifar.base_folder
    # --data that names the set itself must not download a second copy.
    check_root(folder, cifar.train_list[0][0])
    check_root(corrupted_folder(name, root), "labels.npy")
    try:
        train, test = (cifar(root, train=train, download=True) for train in (True, False))
    except Exception as error:  # network, archive and pickles can raise nearly anything
        raise UserError(
            f"{name} not found (or incomplete) in {folder}, and downloading {cifar.url} failed"
            f" ({error}). Unpack that archive into {root}, or name another folder with --data"
        ) from error
    tensors = {
        "train_images": _channels_first(train.data),
        "train_labels": torch.tensor(train.targets),
        "test_images": _channels_first(test.data),
        "test_labels": torch.tensor(test.targets),
    }
    return Dataset(name, **tensors, classes=train.classes, hflip=True, source="official", flag=name)


def _channels_first(images: np.ndarray) -> Tensor:
    """(N, 32, 32, 3) -> (N, 3, 32, 32)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _load_digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8x8: levels 0-16 scaled to 0-255, bilinear to 32x32, RGB.

    1,437 training and 360 test images, with the same share of each class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    train, test, train_labels, test_labels = map(
        torch.from_numpy,
        train_test_split(images.numpy(), targets, test_size=360, stratify=targets, random_state=0),
    )
    parts = (train, train_labels, test, test_labels)
    return Dataset("digits", *parts, list("0123456789"), False, "embedded", "digits")


def _load_npz(path: Path, need_train: bool) -> Dataset:
    """train_images, test_images uint8 (N, 32, 32, 3); train_labels, test_labels (N,) from 0.

    Optional: `classes` (C,) names, `hflip` (default true), `source`, a text that tables show.
    """
    stems = [*BUILT_IN, *(folder.removesuffix("-C") for folder in BUILT_IN.values())]
    if path.stem.lower() in (stem.lower() for stem in stems):
        raise UserError(f"--dataset {path}: {path.stem} is a built-in data set. Rename the file")
    try:
        with np.load(path) as file:
            keys = list(file)
            parts = ("train", "test") if need_train or "train_images" in keys else ("test",)
            needed = [f"{part}_{what}" for part in parts for what in ("images", "labels")]
            read = [key for key in (*needed, "classes", "hflip", "source") if key in keys]
            arrays = {key: file[key] for key in read}
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot read {path}: {why}. Name the file with --dataset") from None
    except Exception as error:  # damaged bytes can make zipfile and numpy raise nearly anything
        reason = str(error)[:80]
        raise UserError(f"{path} is damaged, or not an .npz of plain arrays ({reason})") from None
    if missing := [key for key in needed if key not in keys]:
        raise UserError(
            f"{path} lacks {', '.join(missing)}. It holds {', '.join(keys) or 'nothing'}."
            " Save the arrays under the missing names"
        )
    tensors = {
        "train_images": torch.empty(0, 3, 32, 32, dtype=torch.uint8),
        "train_labels": torch.empty(0, dtype=torch.int64),
    }
    for part in parts:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) == 0:
            form = f"{part}_images is {images.dtype} {images.shape}, not uint8 (N, 32, 32, 3)"
            raise UserError(f"{path}: {form}. Save RGB levels from 0 to 255, channels last")
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or labels.min() < 0:
            form = f"{part}_labels is {labels.dtype} {labels.shape}, not {len(images)} integers"
            raise UserError(f"{path}: {form} from 0. Save one class number for each image")
        tensors[f"{part}_images"] = _channels_first(images)
        tensors[f"{part}_labels"] = torch.from_numpy(labels.astype(np.int64))
    count = 1 + max(int(tensors[f"{part}_labels"].max()) for part in parts)
    names = arrays.get("classes", np.arange(count))
    hflip = arrays.get("hflip", np.array(True))
    if names.ndim != 1 or hflip.shape != () or hflip.dtype != bool:
        raise UserError(f"{path}: classes must be a list of names, and hflip True or False")
    if len(names) < count:
        raise UserError(f"{path} names {len(names)} classes, but its labels go up to {count - 1}")
    if need_train and len(names) < 2:
        raise UserError(f"{path} has one class. Save images of two or more")
    absent = np.setdiff1d(np.arange(len(names)), tensors["train_labels"])
    if need_train and len(absent):
        name = f" ({names[absent[0]]})" if "classes" in arrays else ""
        raise UserError(
            f"{path}: class {absent[0]}{name} has no training image. Number the classes"
            " 0, 1, 2, ... without gaps, in train_labels and in test_labels"
        )
    return Dataset(
        path.stem,
        **tensors,
        classes=[str(name) for name in names],
        hflip=bool(hflip),
        source=str(arrays.get("source", path.name)),
        flag=str(path),
    )


def data_sha256(dataset: Dataset) -> str:
    """The hash of all images, labels and hflip: which data a run's recipe means."""
    digest = hashlib.sha256(repr(dataset.hflip).encode())
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        tensor = getattr(dataset, name)
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def images_sha256(images: Tensor) -> str:
    """The hash of uint8 (N, 3, 32, 32) in the order of the official files, (N, 32, 32, 3)."""
    return hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy()).hexdigest()


# Corrupted test sets


def corrupted_folder(name: str, root: str | Path) -> Path:
    """The folder of a data set's corrupted test images, which need not exist."""
    return Path(root) / BUILT_IN.get(name, f"{name}-C")


def missing_files(folder: Path) -> list[str]:
    """What the folder lacks of the 18 corruptions, the labels and, if made here, gaussian_noise."""
    made_here = (folder / "generated.json").is_file()
    stems = [*CORRUPTIONS, "labels"] + ["gaussian_noise"] * made_here
    return [f"{stem}.npy" for stem in stems if not (folder / f"{stem}.npy").is_file()]


def corruption_source(name: str, root: str | Path) -> str:
    """`official` beside an official.json, `generated` beside a generated.json, or `unverified`."""
    folder = corrupted_folder(name, root)
    for source in ("official", "generated"):
        if (folder / f"{source}.json").is_file():
            return source
    return "unverified"


def load_corrupted(name: str, root: str | Path, corruption: str) -> Tensor:
    """One corruption of a test set, uint8 (5, N, 3, 32, 32), memory-mapped.

    Raises UserError for a missing or damaged file, or one in the wrong format.
    """
    path = corrupted_folder(name, root) / f"{corruption}.npy"
    images = _map(path)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) % 5:
        raise UserError(f"{path} is {images.dtype} {images.shape}, not uint8 (5N, 32, 32, 3)")
    return torch.from_numpy(images).reshape(5, -1, 32, 32, 3).permute(0, 1, 4, 2, 3)


def _map(path: Path) -> np.ndarray:
    try:
        # c: copy-on-write, since torch wants a writable array
        return np.lib.format.open_memmap(path, mode="c")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # damaged bytes can make numpy raise nearly anything
        raise UserError(f"{path} is damaged ({str(error)[:80]})") from None


def check_corrupted(dataset: Dataset, root: str | Path) -> list[str]:
    """The corruptions to evaluate: the 18, then the folder's further arrays in sorted order.

    Raises UserError unless the set is complete and was made from this test set. Compares the
    labels, and the hash of the clean images if generated.json has it.
    """
    folder, count = corrupted_folder(dataset.name, root), len(dataset.test_images)
    check_root(folder, "labels.npy")
    how = _how_to_get(dataset, Path(root))
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist. {how}")
    if missing := missing_files(folder):
        raise UserError(f"{folder} lacks {', '.join(missing)}. {how}")
    labels = np.resize(_map(folder / "labels.npy"), 5 * count)  # one block of N will do
    if not np.array_equal(labels, np.tile(dataset.test_labels.numpy(), 5)):
        wrong = f"{folder} is of another test set than {dataset.name}'s: the labels differ"
        raise UserError(f"{wrong}. {move_away(folder)}")
    record = folder / "generated.json"
    if record.is_file():
        made_from = read_json(record).get("clean_sha256")
        if made_from not in (None, images_sha256(dataset.test_images)):
            raise UserError(f"{folder} was made from other test images. {move_away(folder)}")
    stems = {path.stem for path in folder.glob("[!.]*.npy")}  # macOS leaves ._fog.npy on shares
    names = [*CORRUPTIONS, *sorted(stems - {*CORRUPTIONS, "labels"})]
    for name in names:
        path = folder / f"{name}.npy"
        try:
            held = load_corrupted(dataset.name, root, name).shape[1]
            if held != count:
                raise UserError(f"{path} holds {held} images per severity, not {count}")
        except UserError as error:
            remedy = f"Move it out of the folder: `mv {quote(str(path))} {quote(str(root))}`"
            raise UserError(f"{error}. {remedy}") from None
    return names


def move_away(folder: Path) -> str:
    """What to do with a corrupted set that is not the expected one."""
    command = f"mv {quote(str(folder))} {quote(f'{folder}.old')}"
    return f"Move it away (`{command}`), or name another folder with --data"


def _how_to_get(dataset: Dataset, root: Path) -> str:
    """What to do about a missing or incomplete corrupted set."""
    folder = corrupted_folder(dataset.name, root)
    flags = f"--dataset {quote(dataset.flag or dataset.name)} --data {quote(str(root))}"
    command = f"python corruptions.py {flags}"
    official = dataset.name in ("cifar10", "cifar100")
    if corruption_source(dataset.name, root) == "generated":
        return f"`{command}` makes what is missing"
    if any(folder.glob("*.npy")):  # never complete another's set with ours
        missing = f"`{command} --download` fetches what is missing (2.9 GB)"
        return missing if official else move_away(folder)
    fetch = f"`{command} --download` fetches the official set (2.9 GB), or " if official else ""
    return f"{fetch}`{command}` makes one here"


def check_root(folder: Path, file: str) -> None:
    """Raise UserError if --data names `folder` itself, which holds `file`, not the one around."""
    root = Path(os.path.abspath(folder.parent))  # unresolved: the folder may be a link
    if root.name == folder.name and (root / file).is_file() and not folder.is_dir():
        raise UserError(
            f"--data {folder.parent} must name the folder that contains {folder.name}, not that"
            f" folder itself. Use --data {quote(str(root.parent))}"
        )
