"""What of a training run is saved after each epoch, and how it is read back: to resume bit for bit, or to evaluate.

train.py makes one Saver a run; evaluate.py loads its networks here, those of others included. The files: last.pt
(everything), best.pt (the selected network), log.csv and timing.csv (a row per epoch), and what of an evaluation
under way is kept.
"""

import csv
import io
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import device as hardware
import runs
from data import CORRUPTED_FOLDERS, Dataset
from models import ARCHS, build_model, match_state_dict

# flags that do not define a run: a resumed run may give others
MAY_DIFFER = ("data", "out", "device", "amp", "compile", "resume", "overwrite", "max_minutes")
# how far a run has come: whole epochs, steps of the next one and what they add up to, the best epoch, the CSV rows
PROGRESS = {"epoch": int, "step": int, "loss_sum": float, "correct": float, "seconds": float, "best_epoch": int,
            "best_accuracy": float, "log": list, "timing": list}  # fmt: skip


class Saver:
    """What of a run is saved, and how: last.pt holds all that the next step depends on, the CSV rows included.

    last.pt is written first and the other files follow from it, so that a run killed at any moment resumes from it.
    """

    def __init__(
        self,
        config: dict,
        folder: Path,
        dataset: Dataset,
        device: torch.device,
        f_theta: nn.Module,
        theta: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
        amp: str,
    ):
        self.config, self.folder, self.device = config, folder, device
        self.f_theta, self.theta, self.scaler = f_theta, theta, scaler
        self.about = {
            "config": {key: value for key, value in config.items() if key not in MAY_DIFFER},
            "data_source": dataset.source,
            "train_images": len(dataset.train_images[: config["subset"]]),
            "amp": amp,
            "device": hardware.describe(device),
            "versions": runs.versions(),
            "commit": runs.commit(),
        }

    def last(self, done: dict) -> None:
        """Write last.pt."""
        content = self.about | {
            "model": runs.plain_state_dict(self.f_theta.state_dict()),
            "optimizer": self.theta.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "done": done,
            "epoch": done["epoch"],
            "rng": rng_state(self.device),
        }
        runs.save_checkpoint(self.folder / "last.pt", content)

    def epoch(self, done: dict) -> None:
        """Write last.pt, then what follows from it: best.pt if this epoch is the best, log.csv, timing.csv."""
        self.last(done)
        self.follow(done)

    def follow(self, done: dict) -> None:
        """Write best.pt, if the last whole epoch is the best, and the CSV files."""
        if done["best_epoch"] == done["epoch"] > 0 and done["step"] == 0:
            model = runs.plain_state_dict(self.f_theta.state_dict())
            runs.save_checkpoint(self.folder / "best.pt", self.about | {"model": model, "epoch": done["epoch"]})
        write_csv(self.folder / "log.csv", "epoch,lr,train_loss,train_accuracy,test_accuracy", done["log"])
        write_csv(self.folder / "timing.csv", "epoch,seconds,images_per_second,peak_memory_mib", done["timing"])

    def restore(self, follow: bool = True) -> dict:
        """Load last.pt into the network, the optimiser and the random states; return the progress.

        Raises ValueError naming the flag that differs, or what the checkpoint lacks.
        """
        path = self.folder / "last.pt"
        saved = load_own(path)
        for key, value in self.about["config"].items():
            if (theirs := saved["config"].get(key)) != value:
                flag = "--" + key.replace("_", "-")
                raise ValueError(f"{flag} was {_short(theirs)} in the run of {path} and is {value} now;"
                                 f" give the run's own {flag}, or another --out")  # fmt: skip
        if (theirs := saved.get("data_source")) != self.about["data_source"]:
            raise ValueError(f"the data of {path} were '{_short(theirs)}', now '{self.about['data_source']}'; give the"
                             " run's own --data, or another --out")  # fmt: skip
        try:
            done = saved["done"]
            if {key: type(value) for key, value in done.items()} != PROGRESS:
                raise TypeError("its progress is of another form")
            if any([row[0] for row in done[rows]] != list(range(1, done["epoch"] + 1)) for rows in ("log", "timing")):
                raise TypeError("it does not have a row for each epoch")
            self.f_theta.load_state_dict(saved["model"])
            self.theta.load_state_dict(saved["optimizer"])
            if self.scaler and saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
            set_rng_state(saved["rng"], self.device)
        except Exception as error:  # what is of another form can make torch raise nearly anything
            raise ValueError(f"{path} does not fit this run ({_short(error)}); --overwrite starts again") from error
        if follow:
            self.follow(done)  # where the run was killed between last.pt and these
        return done


def write_csv(path: Path, header: str, rows: list[list]) -> None:
    """Write all rows at once, atomically: there is never a double or a half row."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header.split(","), *rows])
    with runs.atomic_write(path) as file:
        file.write(text.getvalue().encode())


def train_seconds(folder: Path) -> float:
    """The sum of the seconds in a run's timing.csv; 0 where there is none. Raises ValueError where it is damaged."""
    path = folder / "timing.csv"
    if not path.is_file():
        return 0.0
    try:
        with open(path, newline="") as rows:
            seconds = sum(float(row["seconds"]) for row in csv.DictReader(rows))
    except (ValueError, TypeError, KeyError, csv.Error):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{path} is damaged; train.py --resume writes it anew, deleting it leaves its seconds out")
    return seconds


def rng_state(device: torch.device) -> dict:
    """Every random state: Python's, numpy's, torch's and the device's, as plain lists and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict, device: torch.device) -> None:
    """Undo rng_state; a run may go on another device, whose own state is then left as the seed set it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)


def read_config(path: Path) -> dict:
    """A run's config.json with the keys that evaluation needs. Raises FileNotFoundError or ValueError naming it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no run folder: it has no config.json; name one that train.py wrote")
    config = runs.read_json(path)
    kinds = {"dataset": str, "arch": str, "method": str, "seed": int, "epochs": int}
    wrong = [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]
    if wrong or config["dataset"] not in CORRUPTED_FOLDERS or config["arch"] not in ARCHS:
        raise ValueError(f"{path} is no run's configuration (see {', '.join(wrong) or 'dataset, arch'}); train again")
    return config


def load_own(path: Path) -> dict:
    """The content of a checkpoint of train.py. Raises FileNotFoundError, or ValueError where it is no such thing."""
    saved = runs.load_checkpoint(path, need_hash=True)
    try:
        states = ("model", "optimizer", "scaler", "done", "rng")
        about = {key: value for key, value in saved.items() if key not in states}
        json.dumps(about, allow_nan=False)  # it goes into results.json
        if type(saved["epoch"]) is not int or not isinstance(saved["config"], dict):
            raise TypeError("epoch or config is of another type")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no checkpoint of train.py ({_short(error)}); delete it and train again") from error
    return saved


def _short(value: object, characters: int = 120) -> str:
    """What a file or an error says, for a message of one line."""
    return ascii(" ".join(str(value).split())[:characters])[1:-1]


def load_run(folder: Path, which: str, config: dict, dataset: Dataset) -> tuple[nn.Module, dict]:
    """(network, checkpoint) of best.pt or last.pt, checked against the run's config.json and the data set.

    Raises FileNotFoundError or ValueError when it is missing, damaged, unfinished, or of another run.
    """
    path = folder / f"{which}.pt"
    saved = load_own(path)
    for key, theirs in saved["config"].items():
        if key != "epochs" and theirs != config.get(key):
            theirs, ours = _short(theirs), _short(config.get(key))
            raise ValueError(f"{path} is a checkpoint of {_short(key)} {theirs}, but config.json says {ours}; retrain")
    model = build_model(config["arch"], len(dataset.classes), dataset.mean, dataset.std)
    try:
        model.load_state_dict(saved["model"])
        if not all(torch.isfinite(value).all() for value in model.state_dict().values()):
            raise ValueError("its weights are not finite")
    except Exception as error:  # what is of another form can make torch raise nearly anything
        raise ValueError(
            f"{path} is no checkpoint of {config['arch']} for {dataset.name} ({_short(error)}); train again"
        ) from error
    done = saved["epoch"] if which == "last" else load_own(folder / "last.pt")["epoch"]
    if done < config["epochs"]:
        raise ValueError(f"{folder} is unfinished ({done} of {config['epochs']} epochs); train with --resume")
    return model, saved


def load_foreign(
    path: Path, arch: str, dataset: Dataset, mean: Sequence[float], std: Sequence[float]
) -> tuple[nn.Module, dict]:
    """(network, {"epoch": None}) with the weights of a plain state dict, or of one under a usual key of a dict.

    Raises ValueError naming the file and the first keys that do not fit.
    """
    state = runs.load_checkpoint(path)
    for key in ("model", "state_dict", "net", "model_state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    model = build_model(arch, len(dataset.classes), mean, std)
    try:
        model.load_state_dict(match_state_dict(model, state))
    except Exception as error:  # what is of another form can make torch raise nearly anything
        raise ValueError(f"{path}: {_short(error, 400)}") from error
    return model, {"epoch": None}


def write_kept(path: Path, key: str, confidence: np.ndarray, correct: np.ndarray) -> None:
    """Keep one corruption's predictions (5, N), atomically."""
    with runs.atomic_write(path) as file:
        np.savez(file, key=np.array(key), confidence=confidence, correct=correct)


def read_kept(path: Path, key: str, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What write_kept wrote of `count` images under the same key; None where there is nothing or it is damaged.

    It is evaluated anew then.
    """
    try:
        data = path.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            if sum(member.file_size for member in arrays.zip.infolist()) > len(data) or str(arrays["key"]) != key:
                return None
            confidence, correct = arrays["confidence"], arrays["correct"]
        types, shapes = (confidence.dtype, correct.dtype), {confidence.shape, correct.shape}
        if types == (np.float32, bool) and shapes == {(5, count)} and ((confidence >= 0) & (confidence <= 1)).all():
            return confidence, correct
    except Exception:  # damaged bytes can make zipfile and numpy raise nearly anything
        return None
    return None
