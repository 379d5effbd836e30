"""What benchmark.py compares with: the same work one image at a time, as it is usually done.

Augmentation with Pillow and torchvision's transforms in the workers of a DataLoader; corruptions in a loop over images
with numpy and scipy, as the program that made CIFAR-C is built. For measuring alone: nothing else imports this file.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter, zoom
from torch import Tensor

from device import import_torchvision

torchvision = import_torchvision()
transforms, to_tensor = torchvision.transforms, torchvision.transforms.functional.to_tensor

SIDE = 32


def preprocessing(hflip: bool) -> Callable[[Image.Image], Image.Image]:
    """Sec. 4's preprocessing as torchvision's transforms of a Pillow image."""
    steps = [transforms.RandomCrop(SIDE, padding=4), transforms.ColorJitter(0.25, 0.25, 0.25)]
    steps += [transforms.RandomRotation(2)]
    return transforms.Compose(steps[:1] + [transforms.RandomHorizontalFlip()] * hflip + steps[1:])


def operation(picture: Image.Image, index: int, v: float, rng: np.random.Generator) -> Image.Image:
    """One of augment.OPERATIONS by Pillow, at level v in (0, 10] of AugMix's scale, its direction drawn."""
    if index == 0:
        return ImageOps.autocontrast(picture)
    if index == 1:
        return ImageOps.equalize(picture)
    if index == 2:
        return ImageOps.posterize(picture, max(1, 4 - int(4 * v / 10)))  # Pillow refuses 0 bits
    if index == 3:
        return ImageOps.solarize(picture, 256 - int(256 * v / 10))
    v = v if rng.random() > 0.5 else -v
    if index == 4:
        return picture.rotate(int(30 * v / 10), resample=Image.Resampling.BILINEAR)
    shear, pixels = 0.3 * v / 10, int(SIDE / 3 * v / 10)
    matrix = ((1, shear, 0, 0, 1, 0), (1, 0, 0, shear, 1, 0), (1, 0, pixels, 0, 1, 0), (1, 0, 0, 0, 1, pixels))
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix[index - 5], Image.Resampling.BILINEAR)


def augmix(picture: Image.Image, x: Tensor, rng: np.random.Generator) -> Tensor:
    """AugMix of one image: three chains of one to three operations, mixed in float. (3, 32, 32) in [0, 1]."""
    weights, m = rng.dirichlet([1, 1, 1]), rng.beta(1, 1)
    mixed = torch.zeros_like(x)
    for weight in weights:
        chain = picture
        for _ in range(rng.integers(1, 4)):
            chain = operation(chain, rng.integers(9), rng.uniform(0.1, 3), rng)
        mixed += float(weight) * to_tensor(chain)
    return float(1 - m) * x + float(m) * mixed


def copies(array: np.ndarray, kind: str, transform: Callable, n: int) -> Tensor:
    """What a training step needs of one image (32, 32, 3): (copies, 3, 32, 32), the preprocessed image first.

    kind: "clean" as it is; "preprocessing"; that and n noisy and n mixed copies, "magnma", or two augmented, "augmix".
    """
    rng = np.random.default_rng(torch.randint(2**31, ()).item())
    picture = Image.fromarray(array)
    if kind != "clean":
        picture = transform(picture)
    x = to_tensor(picture)
    made = [x]
    if kind == "magnma":
        made += [x + 0.2 * rng.random() * torch.randn(x.shape) for _ in range(n)]
        for _ in range(n):
            w = rng.random()
            made.append(w * x + (1 - w) * to_tensor(operation(picture, rng.integers(4), rng.integers(1, 11), rng)))
    if kind == "augmix":
        made += [augmix(picture, x, rng) for _ in range(2)]
    return torch.stack(made)


def batch(arrays: list[np.ndarray], kind: str, transform: Callable, n: int) -> Tensor:
    """`copies` of each image in turn, (B, copies, 3, 32, 32)."""
    return torch.stack([copies(array, kind, transform, n) for array in arrays])


def loader(arrays: list[np.ndarray], kind: str, hflip: bool, n: int, workers: int) -> torch.utils.data.DataLoader:
    """Batches of 128 made by `workers` processes, which stay alive between epochs."""
    collate = partial(batch, kind=kind, transform=preprocessing(hflip), n=n)
    return torch.utils.data.DataLoader(arrays, 128, num_workers=workers, collate_fn=collate, persistent_workers=True)


# Corruptions of one image, uint8 (32, 32, 3), at severity 3; they give floats on the scale where 1 is white


def shot_noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(image / 255 * 100) / 100


def glass_blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    sigma, d = 0.4, 1
    y = (gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest") * 255).astype(np.uint8)
    for h in range(SIDE - d, d, -1):
        for w in range(SIDE - d, d, -1):
            dy, dx = rng.integers(-d, d, 2)
            y[h, w] = y[h + dy, w + dx]
    return gaussian_filter(y / 255, (sigma, sigma, 0), mode="nearest")


def zoom_blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x, factors = image / 255, np.arange(1, 1.16, 0.01)
    total = x.copy()
    for factor in factors:
        crop = int(np.ceil(SIDE / factor))
        top = (SIDE - crop) // 2
        large = zoom(x[top : top + crop, top : top + crop], (factor, factor, 1), order=1)
        trim = (len(large) - SIDE) // 2
        total += large[trim : trim + SIDE, trim : trim + SIDE]
    return total / (len(factors) + 1)


def contrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x = image / 255
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * 0.4 + mean


CORRUPTIONS = {function.__name__: function for function in (shot_noise, glass_blur, zoom_blur, contrast)}


def corrupt(images: np.ndarray, name: str, seed: int = 0) -> np.ndarray:
    """A corruption of each image in turn at severity 3. uint8 (N, 32, 32, 3) to the same."""
    rng = np.random.default_rng(seed)
    return np.stack([(np.clip(CORRUPTIONS[name](x, rng), 0, 1) * 255).astype(np.uint8) for x in images])
