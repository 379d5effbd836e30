"""Evaluation as in Sec. 4: clean accuracy, the 18 corruptions at 5 severities, mCA, RMS calibration error.

    python evaluate.py runs/cifar10/densenet121/magnma/seed0                       # best.pt and last.pt of a run
    python evaluate.py runs/cifar10/resnet18/augmix/seed0 --all19                  # with gaussian_noise and mCA of 15
    python evaluate.py --checkpoint theirs.pt --arch resnet18 --dataset cifar10    # a plain state dict of others

Writes results.json into the run's folder and prints the paper's Table 3 column. Corruptions already evaluated are kept
when it is interrupted; the same command goes on.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import device as hardware
import runs
from checkpoints import load_foreign, load_run, read_config, read_kept, train_seconds, write_kept
from data import (
    ALL_CORRUPTIONS,
    CORRUPTED_FOLDERS,
    CORRUPTIONS,
    Dataset,
    corruption_source,
    load_corrupted,
    load_dataset,
    verify_corrupted,
)
from models import ARCHS

SEVERITIES = (1, 2, 3, 4, 5)
NOT_HPARAMS = ("dataset", "arch", "method", "seed", "tag", "stands_for")  # these stand beside hparams in results.json
N_BINS = 15
# the fifteen corruptions over which AugMix and RobustBench report their mean
FIFTEEN = tuple(c for c in ALL_CORRUPTIONS if c not in ("gaussian_blur", "saturate", "spatter", "speckle_noise"))


def rms_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, n_bins: int = N_BINS, adaptive: bool = False
) -> float:
    """RMS calibration error in [0, 1] (Sec. 4): sqrt(sum_i |B_i|/n (accuracy of B_i - mean confidence of B_i)^2).

    confidence (n,) in [0, 1] and correct (n,) of 0/1. Bins are [k/n_bins, (k+1)/n_bins), the last one closed; adaptive:
    sorted by confidence, consecutive groups of 100, the remainder joined to the last, one group under 200 examples
    (n_bins is then ignored). Empty bins count nothing. Raises ValueError for empty, NaN or out-of-range input.
    """
    confidence = np.asarray(confidence, dtype=np.float64).ravel()
    correct = np.asarray(correct, dtype=np.float64).ravel()
    if len(confidence) == 0 or len(confidence) != len(correct):
        raise ValueError(f"calibration needs as many confidences as outcomes, not {len(confidence)} and {len(correct)}")
    if not ((confidence >= 0) & (confidence <= 1)).all():  # NaN fails both
        raise ValueError("a confidence is not a number in [0, 1]")
    if not ((correct == 0) | (correct == 1)).all():
        raise ValueError("an outcome is neither 0 nor 1")
    if adaptive:
        order = np.argsort(confidence, kind="stable")
        bins = np.empty(len(order), dtype=np.int64)
        bins[order] = np.minimum(np.arange(len(order)) // 100, max(1, len(order) // 100) - 1)
    else:
        if n_bins < 1:
            raise ValueError(f"calibration needs at least one bin, not {n_bins}")
        bins = bin_of(confidence, n_bins)
    gap = np.bincount(bins, weights=correct - confidence)  # |B_i| (accuracy - mean confidence)
    size = np.bincount(bins)
    return float(np.sqrt((gap[size > 0] ** 2 / size[size > 0]).sum() / len(confidence)))


def bin_of(confidence: np.ndarray, n_bins: int = N_BINS) -> np.ndarray:
    """The index of the bin [k/n_bins, (k+1)/n_bins) that holds each confidence; 1 falls into the last."""
    return np.searchsorted(np.arange(1, n_bins) / n_bins, confidence, side="right")


@torch.no_grad()
def predict(
    model: nn.Module,
    images: Tensor,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    noise_sigma: float = 0.0,
    samples: int = 1,
    generator_seed: int = 0,
    poll: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """(confidence float32 (N,), predicted class int64 (N,)) on the CPU, for images uint8 (N, 3, 32, 32).

    Softmax in float32 on the model's device. With noise_sigma > 0 the probabilities are the mean over `samples` draws
    of N(0, noise_sigma^2 I) on the input (RSE, below Eq. (4)), drawn from `generator_seed`. `poll` is called before
    each batch and may raise to end it. Restores the model's mode.
    """
    device = next(model.parameters()).device
    if batch_size is None:
        batch_size = 2500 if device.type == "cuda" else 250  # 250 stay in a CPU's cache
    generator = torch.Generator(device).manual_seed(generator_seed)
    training = model.training
    model.eval()
    confidence, prediction = [], []
    for batch in images.split(batch_size):
        poll()
        x = batch.to(device, non_blocking=True).float() / 255
        total = 0
        for _ in range(samples):
            noise = noise_sigma * torch.randn(x.shape, generator=generator, device=device) if noise_sigma > 0 else 0
            with hardware.autocast(device, dtype):
                logits = model(x + noise)
            total = total + F.softmax(logits.float(), dim=1)
        best = (total / samples).max(dim=1)
        confidence.append(best.values)
        prediction.append(best.indices)
    model.train(training)
    return torch.cat(confidence).clamp(max=1).cpu(), torch.cat(prediction).cpu()


def ensemble(config: dict, image_set: str) -> dict:
    """The keywords of `predict` for a run's method: RSE's 10 draws, seeded by (seed, set); nothing for the others."""
    if config.get("method") != "rse":
        return {}
    return {
        "noise_sigma": config["rse_sigma"],
        "samples": config["rse_samples"],
        "generator_seed": runs.seed_of(config["seed"], "rse", image_set),
    }


def scores(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """C of results.json, in percent: accuracy and both RMS calibration errors of one set of predictions."""
    return {
        "accuracy": 100 * float(np.mean(correct)),
        "rms_calibration_error": 100 * rms_calibration_error(confidence, correct),
        "rms_calibration_error_adaptive": 100 * rms_calibration_error(confidence, correct, adaptive=True),
    }


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[list[float]]:
    """[count, sum of confidence, number correct] of each of the 15 bins, for a reliability diagram."""
    bins = bin_of(confidence.ravel().astype(np.float64))
    columns = (np.ones(bins.size), confidence.ravel().astype(np.float64), correct.ravel().astype(np.float64))
    return np.stack([np.bincount(bins, weights=w, minlength=N_BINS) for w in columns], axis=1).tolist()


def corrupted_sets(
    dataset: Dataset, root: str, corruptions: list[str], limit: int | None
) -> Iterator[tuple[str, list[Tensor]]]:
    """(corruption, its five severities' images), each file read while the one before is evaluated.

    Raises ValueError where the labels of the corrupted set are not those of the clean test set.
    """
    labels = dataset.test_labels[:limit]

    def read(corruption: str) -> tuple[str, list[Tensor]]:
        cells = []
        for severity in SEVERITIES:
            images, cell_labels = load_corrupted(dataset.name, root, corruption, severity, limit)
            if not torch.equal(cell_labels, labels):
                raise ValueError(f"the labels of {corruption} under {root} are not those of {dataset.name}'s test set")
            cells.append(images)
        return corruption, cells

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, corruptions[0]) if corruptions else None
        for following in [*corruptions[1:], None]:
            if ahead is None:
                return
            current, ahead = ahead, reader.submit(read, following) if following else None
            yield current.result()


def evaluate(
    model: nn.Module,
    dataset: Dataset,
    root: str,
    config: dict,
    kept: Path,
    key: Callable[[str], str],
    stop: runs.StopRequest,
    *,
    dtype: torch.dtype | None = None,
    all19: bool = False,
    limit: int | None = None,
) -> dict:
    """E of results.json, without its epoch: clean, 18 (19) corruptions x 5 severities, mCA, pooled calibration error.

    `kept` is a folder for finished corruptions; one found there under the same `key(name)` is not evaluated again.
    A cell's correctness is counted against the test labels; mCA = 1/(MJ) sum_m sum_j A_mj over the 18 (Sec. 4).
    """
    labels = dataset.test_labels[:limit].numpy()

    def poll() -> None:
        if stop.pending():
            raise stop.stopped("what is evaluated is kept; the same command goes on")

    def predictions(images: list[Tensor], name: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = [predict(model, x, dtype=dtype, poll=poll, **ensemble(config, f"{name}-{severity}"))
                 for severity, x in enumerate(images, 1)]  # fmt: skip
        return np.stack([c.numpy() for c, _ in pairs]), np.stack([p.numpy() == labels for _, p in pairs])

    names = list(ALL_CORRUPTIONS if all19 else CORRUPTIONS)
    for name in names:  # are all there? before the first is evaluated
        load_corrupted(dataset.name, root, name, 1, limit=1)
    clean = predict(model, dataset.test_images[:limit], dtype=dtype, poll=poll, **ensemble(config, "clean"))
    cells = {}
    for name in names:
        if (found := read_kept(kept / f"{name}.npz", key(name), len(labels))) is not None:
            cells[name] = found
    bar = tqdm(total=5 * len(names), initial=5 * len(cells), desc="corrupted sets", unit="cell", disable=None)
    for name, images in corrupted_sets(dataset, root, [n for n in names if n not in cells], limit):
        cells[name] = predictions(images, name)
        write_kept(kept / f"{name}.npz", key(name), *cells[name])
        bar.update(5)
    bar.close()

    clean_correct = clean[1].numpy() == labels
    confidence = np.stack([cells[name][0] for name in CORRUPTIONS])  # (18, 5, N)
    correct = np.stack([cells[name][1] for name in CORRUPTIONS])
    pooled = scores(confidence, correct)
    return {
        "clean": scores(clean[0].numpy(), clean_correct),
        "corruptions": {name: [scores(c, k) for c, k in zip(*cells[name], strict=True)] for name in names},
        "mca": 100 * float(correct.mean()),
        **({"mca15": 100 * float(np.mean([cells[name][1].mean() for name in FIFTEEN]))} if all19 else {}),
        "corrupt_rms_calibration_error": pooled["rms_calibration_error"],
        "corrupt_rms_calibration_error_adaptive": pooled["rms_calibration_error_adaptive"],
        "reliability": {
            "clean": reliability(clean[0].numpy(), clean_correct),
            "corrupt": reliability(confidence, correct),
        },
    }


def print_column(title: str, results: dict, checkpoint: str) -> None:
    """Print E of `checkpoint` as the paper's Table 3 column: percent, mean over severities a row."""
    e = results[checkpoint]
    rows = [("Clean", e["clean"]["accuracy"]), ("mCA", e["mca"])]
    rows += [("mCA of 15", e["mca15"])] if "mca15" in e else []
    for name, cells in e["corruptions"].items():
        rows.append((name.replace("_", " ").title().replace("Jpeg", "JPEG"), np.mean([c["accuracy"] for c in cells])))
    rows.append(("RMS calibration error, clean", e["clean"]["rms_calibration_error"]))
    rows.append(("RMS calibration error, corrupt", e["corrupt_rms_calibration_error"]))
    limit = f", first {results['limit']} images of each set" if results["limit"] else ""
    print(f"{title}, {checkpoint}.pt (epoch {e['epoch']}), {results['corruption_source']} corruptions{limit}")
    for label, value in rows:
        print(f"  {label:<32}{value:6.2f}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises ValueError naming the flag."""
    parser = runs.Parser(description="Clean and corrupted accuracy and calibration of a run, or of others' weights.")
    add = parser.add_argument
    add("run", nargs="?", help="the run's folder, as train.py wrote it")
    add("--data", default="data", help="folder of the data sets and of CIFAR-10-C, CIFAR-100-C, DIGITS-C")
    add("--only", choices=("best", "last"), help="evaluate this checkpoint of the run alone")
    add("--all19", action="store_true", help="also gaussian_noise, and the mean over the usual 15 corruptions")
    add("--limit", type=runs.number(int, low=1), help="the first N test images of each set only")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision, as in train.py")
    add("--checkpoint", help="a plain state dict trained elsewhere, instead of a run")
    add("--arch", choices=ARCHS, help="with --checkpoint: its network")
    add("--dataset", choices=tuple(CORRUPTED_FOLDERS), default="cifar10", help="with --checkpoint: its data set")
    add("--mean", type=runs.number(float, low=0, high=1), nargs=3, help="with --checkpoint: of its normalisation")
    add("--std", type=runs.number(float, above=0), nargs=3, help="with --checkpoint: of its normalisation")
    add("--no-normalize", action="store_true", help="with --checkpoint: it takes images in [0, 1] as they are")
    add("--out", help="file for the results; by default results.json in the run, or <checkpoint>.results.json")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.checkpoint is None):
        raise ValueError("name a run's folder or --checkpoint FILE, one of the two")
    if args.checkpoint and not args.arch:
        raise ValueError("--checkpoint needs --arch, the network it belongs to")
    if args.no_normalize and (args.mean or args.std):
        raise ValueError("--no-normalize excludes --mean and --std")
    return args


def provenance(
    config: dict, saved: dict, dataset: Dataset, args: argparse.Namespace, device: torch.device
) -> dict:
    """All of results.json but its "best" and "last" and its times: which run, on what data, made with what."""
    return {
        **{key: config.get(key) for key in ("dataset", "arch", "method", "tag", "seed")},
        "hparams": {k: v for k, v in saved.get("config", {}).items() if k not in NOT_HPARAMS},
        "data_source": dataset.source,
        "corruption_source": corruption_source(dataset.name, args.data),
        "train_images": saved.get("train_images"),
        "test_images": len(dataset.test_images[: args.limit]),
        "limit": args.limit,
        "stands_for": config.get("stands_for"),
        **{key: saved.get(key) for key in ("amp", "device", "versions", "commit")},
        "evaluation": {
            "amp": hardware.amp_name(hardware.amp_dtype(args.amp, device)),
            "device": hardware.describe(device),
            "versions": runs.versions(),
            "commit": runs.commit(),
        },
    }


def refuse_to_lose(out: Path, args: argparse.Namespace) -> None:
    """Raise ValueError where the results in `out` hold more than this evaluation would put in their place."""
    try:
        old = runs.read_json(out)
        kept = {which: old[which] for which in ("best", "last", "foreign") if old.get(which)}
        more = [f"{which}.pt" for which in kept if args.only not in (None, which)]
        more += ["more images"] if args.limit and not (old["limit"] and old["limit"] <= args.limit) else []
        more += ["19 corruptions"] if not args.all19 and any("mca15" in e for e in kept.values()) else []
    except (OSError, ValueError, KeyError, TypeError):
        return  # there are none, or none that are whole
    if kept and more:
        raise ValueError(f"{out} has results of {', '.join(more)}, which these would replace; name another --out,"
                         " or delete it")  # fmt: skip


def normalisation(args: argparse.Namespace, dataset: Dataset) -> tuple[tuple, tuple]:
    """(mean, std) inside a foreign network: the flags', none, or the data set's."""
    if args.no_normalize:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return args.mean or dataset.mean, args.std or dataset.std


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = hardware.pick_device(args.device)
    hardware.set_fast_math(device)
    dtype = hardware.amp_dtype(args.amp, device)
    folder = Path(args.run or f"{args.checkpoint}.evaluation")
    if args.run and not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}; train first, or name one that train.py wrote")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint {args.checkpoint}")
    config = read_config(folder / "config.json") if args.run else {"dataset": args.dataset, "arch": args.arch}
    dataset = load_dataset(config["dataset"], args.data)
    if args.limit is not None and args.limit > len(dataset.test_images):
        raise ValueError(f"--limit {args.limit}: {dataset.name} has {len(dataset.test_images)} test images")
    out = Path(args.out or (folder / "results.json" if args.run else f"{args.checkpoint}.results.json"))
    refuse_to_lose(out, args)
    verify_corrupted(dataset.name, args.data)
    started, before = time.monotonic(), train_seconds(folder)
    computed = {} if args.checkpoint else {"best": None, "last": None}
    with runs.lock(folder), runs.StopRequest() as stop:
        for which in ("foreign",) if args.checkpoint else ("last", "best"):
            if args.only not in (None, which) and not args.checkpoint:
                continue
            if args.checkpoint:
                path = Path(args.checkpoint)
                network = normalisation(args, dataset)
                model, saved = load_foreign(path, args.arch, dataset, *network)
            else:
                network = ()  # its checkpoint says it all
                model, saved = load_run(folder, which, config, dataset)
                path = folder / f"{which}.pt"
            same = [e for e in computed.values() if e and e["epoch"] == saved["epoch"]]
            if same:  # best.pt and last.pt are of one epoch
                computed[which] = same[0]
                continue
            identity = f"{runs.sha256(path)} {args.limit} {dtype} {config['arch']} {network}"

            def key(name: str, identity: str = identity) -> str:
                file = Path(args.data) / CORRUPTED_FOLDERS[dataset.name] / f"{name}.npy"
                stat = file.stat() if file.is_file() else None  # load_corrupted says how to make it
                return f"{identity} {stat and (stat.st_size, stat.st_mtime_ns)}"

            model = model.to(device, memory_format=torch.channels_last)
            kept = folder / ".evaluation" / which
            e = evaluate(model, dataset, args.data, config, kept, key, stop,
                         dtype=dtype, all19=args.all19, limit=args.limit)  # fmt: skip
            computed[which] = {"epoch": saved["epoch"], **e}
        seconds = time.monotonic() - started
        wall = {"evaluation_seconds": round(seconds, 1), "wall_seconds": round(seconds + before, 1)}
        results = provenance(config, saved, dataset, args, device) | wall | computed
        runs.write_json(out, results)
        shutil.rmtree(folder / ".evaluation" if args.run else folder, ignore_errors=True)
    title = f"{config.get('method', args.checkpoint)}, {config['arch']}, {dataset.name} ({dataset.source})"
    print_column(title, results, next(w for w in ("best", "last", "foreign") if results.get(w)))
    return 0


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
