"""Evaluation (Sec. 4): clean accuracy, 18 corruptions at 5 severities, mCA, RMS calibration error.

    python evaluate.py runs/cifar10/densenet121/magnma/seed0     # best.pt and last.pt of a run
    python evaluate.py RUN --clean                               # no corrupted set needed
    python evaluate.py RUN --dataset path/to/cifar10.1.npz --clean --out cifar10.1.json

Writes results.json into the run's folder and prints the columns of the paper's Table 3. Every other
<name>.npy in the corrupted set's folder, gaussian_noise or your own, is a further row, outside mCA.

From Python, any network f from images in [0, 1] to logits:

    evaluate(f, load_dataset("cifar10", "data"), "data")["mca"]
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import utils
from augment import check_levels
from data import CORRUPTIONS, Dataset, load_corrupted, load_dataset
from losses import eval_mode
from models import build_model
from utils import UserError

N_BINS = 16
CONFIG = ("recipe", "departures", "seed", "tag", "ran")  # of config.json and checkpoints


# Calibration


def rms_calibration_error(
    confidence: np.ndarray | Tensor,
    correct: np.ndarray | Tensor,
    n_bins: int = N_BINS,
    adaptive: bool = False,
) -> float:
    """RMS calibration error in [0, 1] (Sec. 4): sqrt(sum_i |B_i|/n (accuracy - mean confidence)^2).

    confidence in [0, 1] and correct, 0 or 1, of one shape. The bins are (k/n_bins, (k+1)/n_bins];
    adaptive: sorted by confidence, groups of 100, the remainder joined to the last.
    Raises ValueError for empty, NaN or out-of-range confidences and outcomes.
    """
    confidence, correct = (
        torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().numpy()
        for values in (confidence, correct)
    )
    if confidence.size == 0 or confidence.shape != correct.shape:
        shapes = f"{confidence.shape} confidences and {correct.shape} outcomes"
        raise ValueError(f"{shapes}; expected one outcome for each, and at least one")
    confidence, correct = confidence.ravel(), correct.ravel()
    if not ((confidence >= 0) & (confidence <= 1)).all():  # NaN fails
        raise ValueError("a confidence is not a number in [0, 1]")
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError("an outcome is neither 0 nor 1")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, not {n_bins}")
    if adaptive:
        bins, rank = np.empty(len(confidence), dtype=np.int64), np.arange(len(confidence))
        groups = max(1, len(confidence) // 100)
        bins[np.argsort(confidence, kind="stable")] = np.minimum(rank // 100, groups - 1)
    else:
        bins = bin_of(confidence, n_bins)
    gap, size = np.bincount(bins, weights=correct - confidence), np.bincount(bins)
    return float(np.sqrt((gap[size > 0] ** 2 / size[size > 0]).sum() / len(confidence)))


def bin_of(confidence: np.ndarray, n_bins: int = N_BINS) -> np.ndarray:
    """The index k of each confidence's bin (k/n_bins, (k+1)/n_bins]; 0 falls into the first."""
    return np.searchsorted(np.arange(1, n_bins) / n_bins, confidence, side="left")


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[list[float]]:
    """[count, sum of confidences, number correct] of each bin, for a reliability diagram."""
    confidence = confidence.ravel().astype(np.float64)
    columns = (np.ones(confidence.size), confidence, correct.ravel().astype(np.float64))
    bins = bin_of(confidence)
    sums = [np.bincount(bins, weights=w, minlength=N_BINS) for w in columns]
    return np.stack(sums, axis=1).tolist()


def scores(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Accuracy and both RMS calibration errors of a set of predictions, in percent."""
    return {
        "accuracy": 100 * float(np.mean(correct)),
        "rms_calibration_error": 100 * rms_calibration_error(confidence, correct),
        "rms_calibration_error_adaptive": 100
        * rms_calibration_error(confidence, correct, adaptive=True),
    }


# Prediction


def device_of(f: nn.Module) -> torch.device:
    """The device of f's parameters and buffers; the CPU if it has none."""
    tensors = itertools.chain(f.parameters(), f.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@torch.no_grad()
def predict(
    f: nn.Module,
    images_u8: Tensor,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int | None = None,
    noise_sigma: float = 0.0,
    samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """(confidence float32 (N,), predicted class int64 (N,)) on the CPU, for uint8 (N, 3, 32, 32).

    Switches f to eval mode and back; runs on f's device, under autocast with `dtype`; softmax in
    float32. With noise_sigma the probabilities are the mean over `samples` draws of
    N(0, noise_sigma^2 I) on the input (RSE, below Eq. (4)).
    """
    check_levels(images_u8)
    device = device_of(f)
    size = batch_size or (2500 if device.type == "cuda" else 250)  # 250 fit a CPU's cache
    best = []
    with eval_mode(f):
        for batch in images_u8.split(size):
            x, p = batch.to(device).float() / 255, 0.0
            for _ in range(samples):
                noise = noise_sigma * torch.randn_like(x) if noise_sigma > 0 else 0.0
                with utils.autocast(device, dtype):
                    logits = f(x + noise)
                p = p + F.softmax(logits.float(), dim=1) / samples
            best.append(p.max(dim=1))
    confidence = torch.cat([b.values for b in best]).clamp(max=1)  # a mean can exceed 1 by rounding
    return confidence.cpu(), torch.cat([b.indices for b in best]).cpu()


def evaluate(
    f: nn.Module,
    dataset: Dataset,
    root: str | Path,
    *,
    dtype: torch.dtype | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    clean_only: bool = False,
    seed: int = 0,
    noise_sigma: float = 0.0,
    samples: int = 1,
) -> dict:
    """Test a network from images in [0, 1] to logits, clean and corrupted. Numbers in percent.

    root: the folder that holds CIFAR-10-C, DIGITS-C etc. limit: only the first N images per set.
    seed: of all draws, RSE's or f's own; noise_sigma, samples: as in `predict`. The result's keys:

        clean          accuracy, rms_calibration_error, rms_calibration_error_adaptive
        corruptions    {name: these three for each of 5 severities}
        mca            1/(MJ) sum_m sum_j A_mj over the paper's M = 18 corruptions, J = 5 severities
        corrupt_rms_calibration_error, corrupt_rms_calibration_error_adaptive
                       of the predictions on these 90 sets together
        reliability    {clean, corrupt}: [count, sum of confidences, number correct] of 16 bins

    clean_only: `clean` and its reliability alone; needs no corrupted set. Raises UserError if the
    corrupted set is incomplete or belongs to other images, or if f's output is NaN.
    """
    labels = dataset.test_labels[:limit]
    device = device_of(f)
    gpus = [device] if device.type == "cuda" else []

    def run(images: Tensor, *key: object) -> tuple[np.ndarray, np.ndarray]:
        with torch.random.fork_rng(gpus):  # keeps the caller's generators (CPU, f's GPU)
            utils.seed(seed, *key)
            confidence, prediction = predict(
                f,
                images[:limit],
                dtype=dtype,
                batch_size=batch_size,
                noise_sigma=noise_sigma,
                samples=samples,
            )
        if confidence.isnan().any():
            raise UserError(f"the network's output is NaN on {' '.join(map(str, key))}")
        return confidence.numpy(), (prediction == labels).numpy()

    # fail now, not after minutes of work
    names = [] if clean_only else data.check_corrupted(dataset, root)
    clean = run(dataset.test_images, "clean")
    result = {"clean": scores(*clean), "reliability": {"clean": reliability(*clean)}}
    if clean_only:
        return result
    confidence, correct = ({name: [] for name in names} for _ in range(2))
    with tqdm(total=5 * len(names), desc="corrupted sets", unit="set", disable=None) as bar:
        for name in names:
            for severity, images in enumerate(load_corrupted(dataset.name, root, name), 1):
                c, k = run(images, name, severity)
                confidence[name].append(c)
                correct[name].append(k)
                bar.update()
    pooled = [np.array([sets[name] for name in CORRUPTIONS]) for sets in (confidence, correct)]
    errors = scores(*pooled)  # of (18, 5, N) predictions
    return {
        "clean": result["clean"],
        "corruptions": {name: list(map(scores, confidence[name], correct[name])) for name in names},
        "mca": errors["accuracy"],
        "corrupt_rms_calibration_error": errors["rms_calibration_error"],
        "corrupt_rms_calibration_error_adaptive": errors["rms_calibration_error_adaptive"],
        "reliability": result["reliability"] | {"corrupt": reliability(*pooled)},
    }


# A run's checkpoints


def load_run(folder: Path) -> dict[str, dict | None]:
    """{"best": ..., "last": ...}, the checkpoints of a finished run; None for a lost one.

    Raises UserError for a folder that is not a run's, a damaged checkpoint, and an unfinished run.
    """
    saved = dict.fromkeys(("best", "last"))
    for which in saved:
        path = folder / f"{which}.pt"
        if path.exists():
            saved[which] = utils.load_checkpoint(path)
            if not {*CONFIG, "epoch", "model"} <= saved[which].keys():
                raise UserError(f"{path} was not written by this version of train.py. Train again")
    if not any(saved.values()):
        what = "Name a run's folder; if it is one, train it with --resume"
        raise UserError(f"{folder} has no best.pt and no last.pt. {what}")
    if saved["last"] and saved["last"]["epoch"] < saved["last"]["recipe"]["epochs"]:
        done, epochs = saved["last"]["epoch"], saved["last"]["recipe"]["epochs"]
        raise UserError(f"{folder} is unfinished ({done} of {epochs} epochs). Train with --resume")
    return saved


def network_of(checkpoint: dict, device: torch.device) -> nn.Module:
    """The network that a checkpoint of train.py holds. UserError if models/ has changed."""
    recipe = checkpoint["recipe"]
    try:
        f = build_model(recipe["arch"], recipe["classes"])
        f.load_state_dict(checkpoint["model"])
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"this code's {recipe['arch']} is not the run's ({str(error)[:80]})."
            f" Use the code of its commit, {checkpoint['ran']['commit']}"
        ) from None
    return f.to(device, memory_format=torch.channels_last)


# The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Wrong flags end the program with a line and exit code 2."""
    parser = utils.Parser(description="Clean and corrupted accuracy and calibration of a run.")
    flag = parser.add_argument
    flag("run", help="a run's folder, written by train.py")
    flag("--dataset", help="another test set (as in train.py), or the new place of the run's .npz")
    flag("--data", default="data", help="folder of the data sets and their corrupted sets")
    flag("--only", choices=("best", "last"), help="only this checkpoint")
    flag("--clean", action="store_true", help="only the clean test set")
    flag("--limit", type=utils.number(int, low=1), help="only the first N images of each set")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    flag(
        "--amp",
        choices=utils.AMP,
        default="auto",
        help=f"{utils.AMP_HELP}; off for runs trained in float32",
    )
    flag("--out", help="the file to write; by default results.json in the run's folder")
    return parser.parse_args(argv)


def load_test_set(args: argparse.Namespace, run: dict) -> tuple[Dataset, bool]:
    """The test set to evaluate on, and whether it is the run's own. Raises UserError if unfit."""
    dataset = load_dataset(args.dataset or run["ran"]["dataset"], args.data, need_train=False)
    own = data.data_sha256(dataset) == run["recipe"]["data_sha256"]
    if not own and not args.dataset:
        raise UserError(
            f"{run['ran']['dataset']} does not hold the images that {args.run} was trained on."
            " Name their file with --dataset"
        )
    classes, trained = len(dataset.classes), run["recipe"]["classes"]
    if classes != trained:
        raise UserError(
            f"{dataset.name} has {classes} classes, not the run's {trained}."
            " If its images are of fewer classes, save the names of all as `classes` in the file"
        )
    images = len(dataset.test_images)
    if args.limit is not None and args.limit > images:
        raise UserError(f"--limit {args.limit}: {dataset.name} has {images} test images")
    return dataset, own


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder, device = Path(args.run), utils.pick_device(args.device)
    saved = load_run(folder)
    wanted = [w for w in saved if saved[w] and args.only in (None, w)]
    if not wanted:
        raise UserError(f"--only {args.only}: {folder} has no {args.only}.pt. Leave --only out")
    for which in [which for which in saved if not saved[which]]:
        print(f"{folder} has no {which}.pt; evaluating the other only", file=sys.stderr)
    run = saved[wanted[0]]
    recipe = run["recipe"]

    dataset, own = load_test_set(args, run)
    out = args.out and Path(args.out)
    if own and not args.clean and not args.limit and not args.out:
        out = folder / "results.json"
        if len(wanted) < 2 and out.exists():
            out = None  # never replace results of both checkpoints by those of one
    if out and out.name == "results.json" and not own:
        shown = f"tables.py would show these numbers as {recipe['dataset']}'s"
        raise UserError(f"--out {out}: {shown}. Choose another name")
    if out:
        utils.check_out(out)
    provenance = utils.provenance(device)  # now: the code may change while this runs

    in_float32 = args.amp == "auto" and recipe["amp"] == "off"
    dtype = None if in_float32 else utils.amp_dtype(args.amp, device)
    ensemble = {}
    if recipe["method"] == "rse":
        ensemble = {"noise_sigma": recipe["rse_sigma"], "samples": recipe["rse_samples"]}
    entries = dict.fromkeys(saved)
    for which in wanted:
        other = entries["best"]
        if other and other["epoch"] == saved[which]["epoch"]:  # the best epoch was the last
            entries[which] = other
            continue
        entries[which] = {"epoch": saved[which]["epoch"]} | evaluate(
            network_of(saved[which], device),
            dataset,
            args.data,
            dtype=dtype,
            limit=args.limit,
            clean_only=args.clean,
            seed=run["seed"],
            **ensemble,
        )
    source = None if args.clean else data.corruption_source(dataset.name, args.data)
    results = {
        **{key: run[key] for key in CONFIG},
        "evaluation": {
            "corruption_source": source,
            "test_sha256": data.images_sha256(dataset.test_images),
            "test_images": args.limit or len(dataset.test_images),
            "amp": utils.amp_name(dtype),
            "limit": args.limit,
            **provenance,
        },
        **entries,
    }
    if out:
        utils.write_json(out, results)
    print_columns(results, dataset)
    print(f"written to {out}" if out else "not saved; --out FILE saves it")


def print_columns(results: dict, dataset: Dataset) -> None:
    """Print the evaluated checkpoints as columns of the paper's Table 3, in percent."""
    columns = {which: results[which] for which in ("best", "last") if results[which]}
    recipe, evaluation = results["recipe"], results["evaluation"]
    print(
        f"{recipe['method']} {recipe['arch']}, trained on {recipe['dataset']}, tested on"
        f" {evaluation['test_images']} images of {dataset.name} ({dataset.source}),"
        f" {evaluation['corruption_source'] or 'no'} corruptions"
    )
    heads = [f"{which}.pt, epoch {e['epoch']}" for which, e in columns.items()]
    print(f"{'':<41}" + "".join(f"{head:>20}" for head in heads))

    def row(label: str, values: list[float]) -> None:
        print(f"{label:<41}" + "".join(f"{value:20.2f}" for value in values))

    entries = list(columns.values())
    row("clean accuracy", [e["clean"]["accuracy"] for e in entries])
    if "mca" in entries[0]:
        row("mCA", [e["mca"] for e in entries])
        for name in entries[0]["corruptions"]:
            cells = [e["corruptions"][name] for e in entries]
            row(name.replace("_", " "), [np.mean([c["accuracy"] for c in five]) for five in cells])
    for suffix, kind in (("", ""), ("_adaptive", ", adaptive")):
        error = f"rms_calibration_error{suffix}"
        row(f"RMS calibration error{kind}, clean", [e["clean"][error] for e in entries])
        if "mca" in entries[0]:
            row(f"RMS calibration error{kind}, corrupt", [e[f"corrupt_{error}"] for e in entries])


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
