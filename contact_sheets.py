"""Contact sheets: 20 images under every augmentation and under every corruption at every severity, to be looked at.

    python contact_sheets.py --dataset digits --out results/figures      # augmentations.png, corruptions.png
    python contact_sheets.py --dataset cifar10 --out sheets              # to look at; CIFAR's images are not committed

Beside Sec. 3 (a), (b), Fig. 1 (augmentations) and Fig. 4 (corruptions). A row is one setting, a column one image.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import augment
import runs
from corruptions import corrupt
from data import ALL_CORRUPTIONS, DATASETS, load_dataset

COUNT, SIDE, LABEL = 20, 32, 190  # images in a row, pixels of an image, pixels for the row's name


def augmentations(images: Tensor, hflip: bool) -> dict[str, Tensor]:
    """Row name -> images uint8 (N, 3, 32, 32): every augmentation, the operations by level."""
    x, count = images.float() / 255, len(images)

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    rows = {"clean": images, "preprocess": augment.preprocess(images, hflip, draws())}
    for sigma in (0.05, 0.1, 0.2):
        rows[f"noise, sigma {sigma}"] = augment.to_levels(x + sigma * torch.randn(x.shape, generator=draws()))
    rows["gaussian_noise, sigma_max 0.2"] = augment.to_levels(augment.gaussian_noise(x, 0.2, draws()))
    for a, name in enumerate(augment.OPERATIONS):
        levels = (0,) if name in ("autocontrast", "equalize") else (1, 3, 5, 7, 10) if a < augment.A_SIZE else (3, -3)
        for u in levels:  # autocontrast and equalize have none
            operated = augment.operate(images, torch.full((count,), a), torch.full((count,), float(u)))
            rows[f"{name}, level {u}" if u else name] = operated
    rows["mixed_augmentation, beta 1"] = augment.to_levels(augment.mixed_augmentation(x, 1.0, draws()))
    rows["augmix"] = augment.to_levels(augment.augmix(x, draws()))
    return rows


def corruptions(images: Tensor) -> dict[str, Tensor]:
    """Row name -> images uint8 (N, 3, 32, 32), for 19 corruptions at five severities."""
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    rows = {"clean": images}
    for name in ALL_CORRUPTIONS:
        for severity in range(1, 6):
            corrupted = torch.from_numpy(corrupt(pixels, name, severity, seed=0))
            rows[f"{name} {severity}"] = corrupted.permute(0, 3, 1, 2)
    return rows


def sheet(rows: dict[str, Tensor]) -> Image.Image:
    """One picture of all rows, with their names on the left."""
    page = Image.new("RGB", (LABEL + COUNT * SIDE, len(rows) * SIDE), "white")
    text = ImageDraw.Draw(page)
    for k, (name, images) in enumerate(rows.items()):
        strip = np.concatenate(list(images.permute(0, 2, 3, 1).numpy()), axis=1)
        page.paste(Image.fromarray(strip), (LABEL, k * SIDE))
        text.text((4, k * SIDE + SIDE // 3), name, fill="black")
    return page


def main(argv: list[str] | None = None) -> int:
    parser = runs.Parser(description="Contact sheets of every augmentation and corruption.")
    parser.add_argument("--dataset", choices=DATASETS, default="digits", help="whose test images")
    parser.add_argument("--data", default="data", help="folder of the data sets")
    parser.add_argument("--out", default="results/figures", help="folder for augmentations.png and corruptions.png")
    args = parser.parse_args(argv)
    dataset = load_dataset(args.dataset, args.data)
    images = dataset.test_images[:COUNT]
    for name, rows in (("augmentations", augmentations(images, dataset.hflip)), ("corruptions", corruptions(images))):
        path = Path(args.out) / f"{name}.png"
        with runs.atomic_write(path) as file:
            sheet(rows).save(file, format="png")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
