"""What of a training run is saved after each epoch, and how it is read back: to resume bit for bit, or to evaluate.

train.py makes one Saver a run; evaluate.py loads its networks here, those of others included. The files: last.pt
(everything), best.pt (the selected network), log.csv and timing.csv (a row per epoch).
"""

import csv
import io
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
    ):
        self.config, self.folder, self.device = config, folder, device
        self.f_theta, self.theta, self.scaler = f_theta, theta, scaler
        self.about = {
            "config": {key: value for key, value in config.items() if key not in MAY_DIFFER},
            "data_source": dataset.source,
            "train_images": len(dataset.train_images[: config["subset"]]),
            "amp": config["amp"],
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

    def restore(self) -> dict:
        """Load last.pt into the network, the optimiser and the random states; return the progress.

        Raises ValueError naming the flag that differs, or what the checkpoint lacks.
        """
        path = self.folder / "last.pt"
        saved = runs.load_checkpoint(path, need_hash=True)
        try:
            for key, value in self.about["config"].items():
                if saved["config"][key] != value:
                    flag = "--" + key.replace("_", "-")
                    raise ValueError(f"{flag} was {saved['config'][key]} in this run and is {value} now;"
                                     f" give the run's own {flag}, or another --out")  # fmt: skip
            if saved["data_source"] != self.about["data_source"]:
                raise ValueError(f"the run's data were '{saved['data_source']}', now '{self.about['data_source']}'")
            self.f_theta.load_state_dict(saved["model"])
            self.theta.load_state_dict(saved["optimizer"])
            if self.scaler and saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
            set_rng_state(saved["rng"], self.device)
            done = saved["done"]
        except (KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{path} does not fit this run ({reason}); --overwrite starts again") from error
        self.follow(done)  # where the run was killed between last.pt and these
        return done


def write_csv(path: Path, header: str, rows: list[list]) -> None:
    """Write all rows at once, atomically: there is never a double or a half row."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header.split(","), *rows])
    with runs.atomic_write(path) as file:
        file.write(text.getvalue().encode())


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


def load_run(folder: Path, which: str, config: dict, dataset: Dataset) -> tuple[nn.Module, dict]:
    """(network, checkpoint) of best.pt or last.pt, checked against the run's config.json and the data set.

    Raises FileNotFoundError or ValueError when it is missing, damaged, unfinished, or of another run.
    """
    path = folder / f"{which}.pt"
    saved = runs.load_checkpoint(path, need_hash=True)
    for key in ("arch", "dataset", "method", "seed"):
        theirs = saved["config"].get(key) if isinstance(saved.get("config"), dict) else None
        if theirs != config[key]:
            raise ValueError(f"{path} is a checkpoint of {key} {theirs}, but the run is of {config[key]}; retrain it")
    model = build_model(config["arch"], len(dataset.classes), dataset.mean, dataset.std)
    try:
        model.load_state_dict(saved["model"])
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is no checkpoint of {config['arch']} for {dataset.name} ({reason})") from error
    if which == "last" and saved["epoch"] < config["epochs"]:
        raise ValueError(f"{folder} is unfinished ({saved['epoch']} of {config['epochs']} epochs); train with --resume")
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
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model, {"epoch": None}
