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
FLAGS = "--dataset data/tiny.npz --arch resnet20 --batch-size 32 --device cpu --epochs 2 --n 1"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/tiny.npz, data/tiny-C and runs/tiny/resnet20/magnma/seed0, evaluated.

    tiny.npz: 70 training and 20 test images of scikit-learn's digits, not mirrored; nines count as
    eights, so that a network of 10 classes is not the run's. The run: MAGNMA, two epochs, n = 1.
    Never write into it: copy what you change.
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
        arrays[f"{part}_labels"] = getattr(digits, f"{part}_labels")[:count].clip(max=8).numpy()
    (folder / "data").mkdir()
    np.savez(folder / "data/tiny.npz", **arrays)
    with contextlib.chdir(folder):
        corruptions.main(["--dataset", "data/tiny.npz", "--workers", "1"])
        train.main([*FLAGS.split(), "--eval-every", "1"])
        evaluate.main([str(RUN), "--device", "cpu"])
    return folder


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty but for `data`, a link to that of `home`."""
    os.symlink(home / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(function, *args, **options) -> str:
    """The message of the UserError that function(*args, **options) ends with."""
    from utils import UserError

    try:
        function(*args, **options)
    except UserError as error:  # pytest.raises would keep what the function has open
        return str(error)
    raise AssertionError("not refused")


# Results that no run gave, for tables.py and figures.py

PAPER = {
    "epochs": 150, "batch_size": 512, "lr": 0.1, "weight_decay": 5e-4, "eval_every": 5,
    "subset": None, "joint": False, "amp": "off",
}  # fmt: skip
SETTING = {"lambda1": 0.2, "lambda2": 0.3, "sigma_max": 0.2, "beta": 1.0}


def make_evaluation(clean=90.0, accuracy=80.0, clean_rmse=3.0, corrupt_rmse=5.0, **corruptions):
    """An entry of results.json. The five severities of a corruption have the mean `accuracy`, or
    the value given by the corruption's name."""
    from data import CORRUPTIONS

    def cell(value: float, rmse: float = 4.0) -> dict:
        adaptive = {"rms_calibration_error_adaptive": 99.0}
        return {"accuracy": value, "rms_calibration_error": rmse} | adaptive

    means = dict.fromkeys(CORRUPTIONS, accuracy) | corruptions
    bins = [[0.0, 0.0, 0.0]] * 14 + [[40.0, 36.0, 30.0], [120.0, 118.0, 90.0]]
    return {
        "epoch": 7,
        "clean": cell(clean, clean_rmse),
        "corruptions": {n: [cell(m + d) for d in (2, 1.5, 0.5, -1, -3)] for n, m in means.items()},
        "mca": sum(means[name] for name in CORRUPTIONS) / 18,
        "corrupt_rms_calibration_error": corrupt_rmse,
        "corrupt_rms_calibration_error_adaptive": 99.0,
        "reliability": {"clean": bins, "corrupt": bins},
    }


def make_results(**changes: object) -> dict:
    """results.json of the paper's recipe for Standard on CIFAR-10, ResNet-18, evaluated once.

    `changes` replace its keys: best, last, seed, tag, departures, data_source, those of evaluation
    (evaluation_amp for its amp), and all others in the recipe.
    """
    recipe = {"dataset": "cifar10", "arch": "resnet18", "method": "standard", **PAPER}
    own = SETTING | {"n": 5, "operations": "A"} if changes.get("method") == "magnma" else {}
    paper = PAPER | own
    recipe |= own | {
        "data_sha256": "d" * 64, "train_images": 50000, "classes": 10, "processes": 1,
    }  # fmt: skip
    evaluation = {"corruption_source": "official", "test_sha256": "e" * 64, "test_images": 10000}
    evaluation |= {"amp": changes.pop("evaluation_amp", "off"), "limit": None}
    evaluation |= {key: changes.pop(key) for key in evaluation.keys() - {"amp"} & changes.keys()}
    top = {"seed": 0, "tag": "", "best": make_evaluation(), "last": None}
    top |= {key: changes.pop(key) for key in top.keys() & changes.keys()}
    top["ran"] = {"data_source": changes.pop("data_source", "official")}
    departures = changes.pop("departures", None)
    recipe |= changes
    if departures is None:
        named = [key for key in paper if key not in SETTING]
        departures = {key: recipe[key] for key in named if recipe[key] != paper[key]}
    return {"recipe": recipe, "departures": departures, "evaluation": evaluation, **top}
