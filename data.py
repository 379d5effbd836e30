"""CIFAR-10, CIFAR-100, digits or the user's own images, and their corrupted test sets (Sec. 4).

    load_dataset("cifar10", "data")            # downloaded where missing, read and verified by torchvision
    load_dataset("digits", "data")             # scikit-learn's digits, nothing to download
    load_dataset("path/to/mine.npz", "data")   # your own images

A corrupted test set is a folder in the form of the official archives: <corruption>.npy, uint8 (5N, 32, 32, 3), the N
test images at severity 1, then at severity 2, ... 5; and labels.npy, (5N,).
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import UserError, read_json, torchvision

BUILT_IN = {
    "cifar10": "CIFAR-10-C",
    "cifar100": "CIFAR-100-C",
    "digits": "DIGITS-C",
}  # name: corrupted folder
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
    source: str  # official, embedded, or the .npz file's own words
    flag: str = ""  # what --dataset was: a name or a path


def load_dataset(name: str, root: str | Path, *, need_train: bool = True) -> Dataset:
    """Load `cifar10`, `cifar100`, `digits` or an `.npz` file; `root` is the folder that has (or gets) CIFAR.

    Without need_train an `.npz` file may lack the training arrays; they are empty then.
    Raises UserError for an unknown name, a failed download, or a file of another form.
    """
    if name.lower().endswith(".npz"):
        return _load_npz(Path(name), need_train)
    if name == "digits":
        return _load_digits()
    if name in BUILT_IN:
        return _load_cifar(name, Path(root))
    raise UserError(
        f"--dataset {name}: unknown data set. Use {', '.join(BUILT_IN)} or the path of an .npz file"
    )


def _load_cifar(name: str, root: Path) -> Dataset:
    cifar = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[
        name
    ]
    folder = root / cifar.base_folder
    if not folder.is_dir():  # else a second copy would be downloaded
        check_place(corrupted_folder(name, root), _files(CORRUPTIONS))
    check_place(folder, [file for file, _ in cifar.train_list + cifar.test_list])
    try:
        train, test = (cifar(root, train=train, download=True) for train in (True, False))
    except Exception as error:  # network, archive and pickles can raise nearly anything
        raise UserError(
            f"{name} not found (or incomplete) in {folder}, and downloading {cifar.url} failed ({error})."
            f" Unpack that archive into {root}, or name another folder with --data"
        ) from error
    images = [_channels_first(part.data) for part in (train, test)]
    labels = [torch.tensor(part.targets) for part in (train, test)]
    parts = (images[0], labels[0], images[1], labels[1])
    return Dataset(name, *parts, train.classes, True, "official", name)


def _channels_first(images: np.ndarray) -> Tensor:
    """(N, 32, 32, 3) -> (N, 3, 32, 32)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _load_digits() -> Dataset:
    """scikit-learn's 1,797 digits of 8x8: levels 0-16 scaled to 0-255, bilinear to 32x32, grey as RGB.

    1,437 training and 360 test images, with the same share of each class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    split = train_test_split(
        images.numpy(), targets, test_size=360, stratify=targets, random_state=0
    )
    train, test, train_labels, test_labels = map(torch.from_numpy, split)
    parts = (train, train_labels, test, test_labels)
    return Dataset("digits", *parts, list("0123456789"), False, "embedded", "digits")


def _load_npz(path: Path, need_train: bool) -> Dataset:
    """train_images, test_images uint8 (N, 32, 32, 3); train_labels, test_labels (N,), classes counted from 0.

    Optional: `classes` (C,) names, `hflip` (default true), `source`, a text that results and tables show.
    """
    reserved = [*BUILT_IN, *(folder.removesuffix("-C") for folder in BUILT_IN.values())]
    if path.stem.lower() in (name.lower() for name in reserved):
        raise UserError(
            f"--dataset {path}: {path.stem} is the name of a built-in data set. Rename the file"
        )
    try:
        with np.load(path) as file:
            keys = list(file)
            optional = {key: file[key] for key in ("classes", "hflip", "source") if key in keys}
            parts = ("train", "test") if need_train or "train_images" in keys else ("test",)
            needed = [f"{part}_{what}" for part in parts for what in ("images", "labels")]
            arrays = {key: file[key] for key in needed if key in keys}
    except OSError as error:
        raise UserError(f"--dataset {path}: {error.strerror or error}") from None
    except Exception as error:  # damaged bytes can make zipfile and numpy raise nearly anything
        raise UserError(
            f"{path} is damaged, or not an .npz file of plain arrays ({str(error)[:80]})"
        ) from None
    if missing := [key for key in needed if key not in arrays]:
        raise UserError(
            f"{path} lacks {', '.join(missing)}. It holds {', '.join(keys) or 'nothing'}:"
            " save these arrays under the names that are missing"
        )
    tensors = {
        "train_images": torch.empty(0, 3, 32, 32, dtype=torch.uint8),
        "train_labels": torch.empty(0, dtype=torch.int64),
    }
    for part in parts:
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) == 0:
            raise UserError(
                f"{path}: {part}_images is {images.dtype} {images.shape}, not uint8 (N, 32, 32, 3)."
                f" {_how_to_convert(images)}"
            )
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),) or labels.min() < 0:
            raise UserError(
                f"{path}: {part}_labels is {labels.dtype} {labels.shape}, not {len(images)} integers"
                " from 0. Save the number of each image's class, as one row of integers"
            )
        tensors[f"{part}_images"] = _channels_first(images)
        tensors[f"{part}_labels"] = torch.from_numpy(labels.astype(np.int64))
    count = 1 + max(int(tensors[f"{part}_labels"].max()) for part in parts)
    names = optional.get("classes", np.arange(count))
    hflip = optional.get("hflip", np.array(True))
    if names.ndim != 1 or hflip.shape != () or hflip.dtype != bool:
        raise UserError(f"{path}: classes must be a list of names, and hflip True or False")
    classes = [str(name) for name in names]
    if len(classes) < count:
        raise UserError(f"{path} names {len(classes)} classes, but its labels go up to {count - 1}")
    absent = sorted(set(range(len(classes))) - set(tensors["train_labels"].tolist()))
    if need_train and absent:
        label = "" if "classes" not in optional else f" ({classes[absent[0]]})"
        raise UserError(
            f"{path}: class {absent[0]}{label} has no training image. Number the classes 0, 1, 2, ..."
            " without gaps, the same way in train_labels and test_labels"
        )
    source = str(optional.get("source", path.name))
    return Dataset(
        path.stem, **tensors, classes=classes, hflip=bool(hflip), source=source, flag=str(path)
    )


def _how_to_convert(images: np.ndarray) -> str:
    """NumPy and Pillow code that turns `images` into uint8 (N, 32, 32, 3), where their form is a known one."""
    if images.dtype.kind not in "uif" or images.size == 0:
        return "Save at least one image, as pixels"
    steps, low, high = [], images.min(), images.max()
    if not (low >= 0 and high <= 255):  # NaN too
        return f"Scale its values, now from {low:g} to {high:g}, to 0, ..., 255 first"
    if images.dtype.kind == "f" and high <= 1:
        steps.append("(255 * images).round().astype(np.uint8)")
    elif images.dtype != np.uint8:
        steps.append("images.round().astype(np.uint8)")
    shape = images.shape[1:]
    if shape == (3072,):  # the rows of CIFAR's own files
        steps.append("images.reshape(-1, 3, 32, 32)")
        shape = (3, 32, 32)
    if len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
        steps.append("images.transpose(0, 2, 3, 1)")
        shape = (*shape[1:], shape[0])
    if len(shape) == 2:
        steps.append("images[..., None]")
        shape = (*shape, 1)
    if len(shape) != 3 or shape[2] not in (1, 3, 4):
        return "Save RGB images"
    if shape[2] == 1:
        steps.append("images.repeat(3, axis=3)")
    if shape[2] == 4:
        steps.append("images[..., :3]")
    if shape[:2] != (32, 32):
        steps.append("np.stack([Image.fromarray(image).resize((32, 32)) for image in images])")
    return "Convert it: " + "; ".join(f"images = {step}" for step in steps)


def data_sha256(dataset: Dataset) -> str:
    """The hash of all images and labels and of hflip, which names the data in a run's recipe."""
    digest = hashlib.sha256(repr(dataset.hflip).encode())
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        tensor = getattr(dataset, part)
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def images_sha256(images: Tensor) -> str:
    """The hash of images, uint8 (N, 3, 32, 32), in the order of the official files, (N, 32, 32, 3)."""
    return hashlib.sha256(images.permute(0, 2, 3, 1).contiguous().numpy()).hexdigest()


# Corrupted test sets


def corrupted_folder(name: str, root: str | Path) -> Path:
    """The folder of a data set's corrupted test images, which need not exist."""
    return Path(root) / BUILT_IN.get(name, f"{name}-C")


def _files(stems: Iterable[str]) -> list[str]:
    return [f"{stem}.npy" for stem in stems]


def _missing(folder: Path) -> list[str]:
    """The files that a complete corrupted set lacks; one that was made here has gaussian_noise too."""
    further = ["gaussian_noise"] if (folder / "generated.json").is_file() else []
    files = _files([*CORRUPTIONS, "labels", *further])
    return [file for file in files if not (folder / file).is_file()]


def is_complete(folder: Path) -> bool:
    """Whether the folder has all 18 corruptions and the labels, and gaussian_noise if it was made here."""
    return not _missing(folder)


def corruption_source(name: str, root: str | Path) -> str:
    """`official` beside an official.json, `generated` beside a generated.json, else `unverified`."""
    folder = corrupted_folder(name, root)
    for source in ("official", "generated"):
        if (folder / f"{source}.json").is_file():
            return source
    return "unverified"


def load_corrupted(name: str, root: str | Path, corruption: str) -> Tensor:
    """One corruption of data set `name`, uint8 (5, N, 3, 32, 32), memory-mapped: only what is used is read.

    Raises UserError for a missing or damaged file, or one of another form.
    """
    path = corrupted_folder(name, root) / f"{corruption}.npy"
    images = _map(path)
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or len(images) % 5:
        raise UserError(f"{path} is {images.dtype} {images.shape}, not uint8 (5N, 32, 32, 3)")
    return torch.from_numpy(images).reshape(5, -1, 32, 32, 3).permute(0, 1, 4, 2, 3)


def _map(path: Path) -> np.ndarray:
    try:
        # c: a private view, which torch may take as writable
        return np.lib.format.open_memmap(path, mode="c")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # damaged bytes can make numpy raise nearly anything
        raise UserError(f"{path} is damaged ({str(error)[:80]})") from None


def check_corrupted(dataset: Dataset, root: str | Path) -> list[str]:
    """The corruptions to evaluate: the paper's 18, then the folder's further arrays in sorted order.

    Raises UserError unless the set is complete and made from this test set: its labels five times, and the hash of
    its images where generated.json has one (of other sets only the labels can be compared).
    """
    folder = corrupted_folder(dataset.name, root)
    check_place(folder, _files(CORRUPTIONS))
    how = _how_to_get(dataset, Path(root))
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist. {how}")
    if missing := _missing(folder):
        raise UserError(f"{folder} lacks {', '.join(missing)}. {how}")
    _check_labels(dataset, folder)
    record = read_json(folder / "generated.json") if (folder / "generated.json").is_file() else {}
    if record.get("clean_sha256") not in (None, images_sha256(dataset.test_images)):
        raise UserError(
            f"{folder} was made from other test images than {dataset.name}'s. {_move_away(folder)}"
        )
    stems = [path.stem for path in folder.glob("*.npy") if not path.name.startswith(".")]
    further = sorted(set(stems) - {*CORRUPTIONS, "labels"})
    for name in [*CORRUPTIONS, *further]:
        path = folder / f"{name}.npy"
        remedy = f"Move it out of the folder: `mv {quote(str(path))} {quote(str(root))}`"
        if name in CORRUPTIONS:
            remedy = f"Delete it; then {how}"
        try:
            count = load_corrupted(dataset.name, root, name).shape[1]
        except UserError as error:
            raise UserError(f"{error}. {remedy}") from None
        if count != len(dataset.test_images):
            raise UserError(
                f"{path} holds {count} images per severity, not {len(dataset.test_images)}. {remedy}"
            )
    return [*CORRUPTIONS, *further]


def _check_labels(dataset: Dataset, folder: Path) -> None:
    """Raise UserError unless labels.npy holds the test labels five times, as integers."""
    path, expected = folder / "labels.npy", np.tile(dataset.test_labels.numpy(), 5)
    labels = _map(path)
    if labels.dtype.kind in "iu" and np.array_equal(labels, expected):
        return
    form = f"{path} is {labels.dtype} {labels.shape}, not {len(expected)} integers"
    if labels.size and np.array_equal(np.resize(labels, len(expected)), expected):
        file = json.dumps(str(path))
        code = f'import numpy as np; np.save({file}, np.resize(np.load({file}), {len(expected)}).astype("int64"))'
        if labels.size == len(dataset.test_labels):
            form += f" (one block of {labels.size}, not five)"
        raise UserError(f"{form}. Convert it: `python -c {quote(code)}`")
    raise UserError(
        f"{folder} was made from another test set than {dataset.name}'s: its labels differ. {_move_away(folder)}"
    )


def _move_away(folder: Path) -> str:
    return f"Move it away, `mv {quote(str(folder))} {quote(f'{folder}.old')}`, or name another folder with --data"


def _how_to_get(dataset: Dataset, root: Path) -> str:
    """The command that makes or completes the corrupted set."""
    folder = corrupted_folder(dataset.name, root)
    command = f"python corruptions.py --dataset {quote(dataset.flag or dataset.name)} --data {quote(str(root))}"
    if corruption_source(dataset.name, root) == "generated":
        return f"`{command}` makes what is missing"
    has_official = dataset.name in ("cifar10", "cifar100")
    started = folder.is_dir() and any(folder.glob("*.npy"))
    if started and has_official:
        return f"`{command} --download` fetches what is missing (2.9 GB)"
    if started:
        return f"Get what is missing from where the set came from. Or make one here: {_move_away(folder)}; then `{command}`"
    if has_official:
        return (
            f"`{command} --download` fetches the official set (2.9 GB); `{command}` makes one here"
        )
    return f"`{command}` makes it"


def check_place(folder: Path, files: list[str]) -> None:
    """Raise UserError if `folder` has none of `files`, but most are in a folder close by.

    Close by: the name in upper or lower case, the archive unpacked a level too deep, or --data is the folder itself.
    """

    def same_name(place: Path) -> list[Path]:
        inside = place.iterdir() if place.is_dir() else []
        return sorted(p for p in inside if p.is_dir() and p.name.lower() == folder.name.lower())

    def has_most(place: Path) -> bool:
        return 2 * sum((place / file).is_file() for file in files) > len(files)

    if any((folder / file).is_file() for file in files):
        return
    beside = same_name(folder.parent)
    for found in [*beside, *(deeper for place in beside for deeper in same_name(place))]:
        if has_most(found):
            what = f"{quote(str(found))}/*" if folder.exists() else quote(str(found))
            raise UserError(
                f"{folder} has no data, but {found} has. Move it: `mv {what} {quote(str(folder))}`"
            )
    if has_most(folder.parent):
        place = folder.parent.resolve()
        move = ""
        if place.name != folder.name and not place.name.endswith(
            "-C"
        ):  # -C: maybe another data set's
            move = f"`mv {quote(str(place))} {quote(str(place.parent / folder.name))}` and "
        raise UserError(
            f"--data {folder.parent} must be the folder that contains {folder.name}, not that folder itself."
            f" Use {move}--data {quote(str(place.parent))}"
        )
