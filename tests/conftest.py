"""What the tests share: a small data set with its corrupted folder and a trained, evaluated run."""

import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

RUN = Path("runs/tiny/resnet20/magnma/seed0")  # of `home`
FLAGS = [
    "--dataset",
    "data/tiny.npz",
    "--arch",
    "resnet20",
    "--batch-size",
    "32",
    "--device",
    "cpu",
]


@pytest.fixture
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/tiny.npz, data/tiny-C and runs/tiny/resnet20/magnma/seed0, evaluated.

    tiny.npz: 70 training and 20 test images of scikit-learn's digits, 10 classes, not mirrored. The
    run: MAGNMA, two epochs, n = 1. Never write into it: copy what you change.
    """
    import corruptions
    import evaluate
    import train
    from data import load_dataset

    folder = tmp_path_factory.mktemp("home")
    digits = load_dataset("digits", "")
    arrays = {"hflip": False, "source": "digits, enlarged"}
    for part, count in (("train", 70), ("test", 20)):
        images = getattr(digits, f"{part}_images")[:count].permute(0, 2, 3, 1)
        arrays[f"{part}_images"] = images.numpy()
        arrays[f"{part}_labels"] = getattr(digits, f"{part}_labels")[:count].numpy()
    (folder / "data").mkdir()
    np.savez(folder / "data/tiny.npz", **arrays)
    with contextlib.chdir(folder):
        corruptions.main(["--dataset", "data/tiny.npz", "--workers", "1"])
        train.main([*FLAGS, "--epochs", "2", "--eval-every", "1", "--n", "1"])
        evaluate.main([str(RUN), "--device", "cpu"])
    return folder


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty but for `data`, a link to that of `home`."""
    os.symlink(home / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path
