"""Evaluation as in Sec. 4: clean accuracy, 18 corruptions at 5 severities, mCA, RMS calibration error.

    python evaluate.py runs/cifar10/densenet121/magnma/seed0                       # best.pt and last.pt of a run
    python evaluate.py --checkpoint theirs.pt --arch resnet18 --dataset cifar10    # a plain state dict of others

Writes results.json into the run's folder and prints the paper's Table 3 column. Every other <name>.npy in the corrupted
set's folder, gaussian_noise or one of your own, becomes a further row, outside mCA.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import utils
from data import CORRUPTIONS, Dataset, check_folder, corrupted_folder, corruption_source, load_corrupted, load_dataset
from losses import of_other_methods
from models import ARCHS, build_model, match_state_dict

transforms = utils.import_torchvision().transforms

SEVERITIES = (1, 2, 3, 4, 5)
N_BINS = 16
FIFTEEN = (  # over which AugMix and RobustBench report their mean
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
# what results.json says of a run beside its hparams
NOT_HPARAMS = ("dataset", "arch", "method", "seed", "tag", "amp", "data_source", "train_images")
FORM = {"dataset": str, "arch": str, "method": str | None, "tag": str | None, "seed": int | None, "hparams": dict,
        "data_source": str, "corruption_source": str, "train_images": int | None, "test_images": int,
        "limit": int | None, "amp": str | None, "evaluation": dict}  # of results.json  # fmt: skip
WHERE_IT_RAN = ("data", "device", "compile", "recompute", "out", "resume")  # flags that do not change what is trained


# Calibration


def rms_calibration_error(
    confidence: np.ndarray | Tensor, correct: np.ndarray | Tensor, n_bins: int = N_BINS, adaptive: bool = False
) -> float:
    """RMS calibration error in [0, 1] (Sec. 4): sqrt(sum_i |B_i|/n (accuracy of B_i - mean confidence of B_i)^2).

    confidence in [0, 1] and correct of 0/1, of one shape. Bins are (k/n_bins, (k+1)/n_bins]; adaptive, n_bins apart:
    sorted by confidence, groups of 100, the remainder joined to the last. Raises ValueError for empty, NaN or
    out-of-range input.
    """
    confidence, correct = (
        torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().numpy().ravel()
        for values in (confidence, correct)
    )
    if len(confidence) == 0 or len(confidence) != len(correct):
        raise ValueError(f"calibration needs as many confidences as outcomes, not {len(confidence)} and {len(correct)}")
    if not ((confidence >= 0) & (confidence <= 1)).all() or not ((correct == 0) | (correct == 1)).all():  # NaN fails
        raise ValueError("a confidence is not a number in [0, 1], or an outcome neither 0 nor 1")
    if n_bins < 1:
        raise ValueError(f"calibration needs at least one bin, not {n_bins}")
    if adaptive:
        bins = np.empty(len(confidence), dtype=np.int64)
        groups = max(1, len(confidence) // 100)
        bins[np.argsort(confidence, kind="stable")] = np.minimum(np.arange(len(confidence)) // 100, groups - 1)
    else:
        bins = bin_of(confidence, n_bins)
    gap, size = np.bincount(bins, weights=correct - confidence), np.bincount(bins)
    return float(np.sqrt((gap[size > 0] ** 2 / size[size > 0]).sum() / len(confidence)))


def bin_of(confidence: np.ndarray, n_bins: int = N_BINS) -> np.ndarray:
    """The index k of the bin (k/n_bins, (k+1)/n_bins] that holds each confidence; 0 falls into the first."""
    return np.searchsorted(np.arange(1, n_bins) / n_bins, confidence, side="left")


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[list[float]]:
    """[count, sum of confidences, number correct] of each bin, for a reliability diagram."""
    confidence = confidence.ravel().astype(np.float64)
    columns = (np.ones(confidence.size), confidence, correct.ravel().astype(np.float64))
    return np.stack([np.bincount(bin_of(confidence), weights=w, minlength=N_BINS) for w in columns], axis=1).tolist()


def scores(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Accuracy and both RMS calibration errors of a set of predictions, in percent."""
    return {
        "accuracy": 100 * float(np.mean(correct)),
        "rms_calibration_error": 100 * rms_calibration_error(confidence, correct),
        "rms_calibration_error_adaptive": 100 * rms_calibration_error(confidence, correct, adaptive=True),
    }


# Prediction


@torch.no_grad()
def predict(
    f: nn.Module, images_u8: Tensor, *, dtype: torch.dtype | None = None, noise_sigma: float = 0.0, samples: int = 1
) -> tuple[Tensor, Tensor]:
    """(confidence float32 (N,), predicted class int64 (N,)) on the CPU, for images uint8 (N, 3, 32, 32).

    f in eval mode, its own mode as before at the end; softmax in float32. With noise_sigma > 0 the probabilities are
    the mean over `samples` draws of N(0, noise_sigma^2 I) on the input (RSE, below Eq. (4)).
    """
    device = next(f.parameters()).device
    training = f.training
    f.eval()
    confidence, prediction = [], []
    for batch in images_u8.split(2500 if device.type == "cuda" else 250):  # 250 stay in a CPU's cache
        x = batch.to(device).float() / 255
        p = torch.zeros(())
        for _ in range(samples):
            noise = noise_sigma * torch.randn_like(x) if noise_sigma > 0 else 0.0
            with utils.autocast(device, dtype):
                logits = f(x + noise)
            p = F.softmax(logits.float(), dim=1) / samples + p
        best = p.max(dim=1)
        confidence.append(best.values)
        prediction.append(best.indices)
    f.train(training)
    return torch.cat(confidence).clamp(max=1).cpu(), torch.cat(prediction).cpu()


def evaluate(
    f: nn.Module, dataset: Dataset, root: str, config: dict, dtype: torch.dtype | None, limit: int | None
) -> dict:
    """One entry of results.json ("best", "last" or "foreign"), in percent.

    mCA = 1/(MJ) sum_m sum_j A_mj over the paper's M = 18 corruptions and J = 5 severities. The corrupt calibration
    errors are of the predictions on all 90 sets together. `limit`: the first N images of each set. Raises ValueError or
    FileNotFoundError where the corrupted set is not whole.
    """
    labels = dataset.test_labels[:limit]
    rse = config.get("method") == "rse"
    ensemble = {"noise_sigma": config["rse_sigma"], "samples": config["rse_samples"]} if rse else {}

    def run(images: Tensor, *key: object) -> tuple[np.ndarray, np.ndarray]:
        utils.seed(config.get("seed", 0), *key)  # RSE's draws
        confidence, prediction = predict(f, images[:limit], dtype=dtype, **ensemble)
        return confidence.numpy(), (prediction == labels).numpy()

    further = sorted(p.stem for p in corrupted_folder(dataset.name, root).glob("*.npy"))
    names = [*CORRUPTIONS, *(name for name in further if name not in (*CORRUPTIONS, "labels"))]
    sets = {name: load_corrupted(dataset.name, root, name) for name in names}  # all there before the first is predicted
    for name, images in sets.items():
        if images.shape[1] != len(dataset.test_images):
            raise ValueError(f"{name}.npy holds {images.shape[1]} images a severity, not {len(dataset.test_images)}")
    clean = run(dataset.test_images, "clean")
    confidence, correct = ({name: [] for name in names} for _ in range(2))
    with tqdm(total=len(names) * len(SEVERITIES), desc="corrupted sets", unit="set", disable=None) as bar:
        for name in names:
            for severity in SEVERITIES:
                c, k = run(sets[name][severity - 1], name, severity)
                confidence[name].append(c)
                correct[name].append(k)
                bar.update()
    pooled = [np.array([values[name] for name in CORRUPTIONS]) for values in (confidence, correct)]  # (18, 5, N)
    errors = scores(*pooled)
    fifteen = {"mca15": 100 * float(np.mean([correct[name] for name in FIFTEEN]))} if "gaussian_noise" in names else {}
    return {
        "clean": scores(*clean),
        "corruptions": {name: list(map(scores, confidence[name], correct[name])) for name in names},
        "mca": errors["accuracy"],
        **fifteen,
        "corrupt_rms_calibration_error": errors["rms_calibration_error"],
        "corrupt_rms_calibration_error_adaptive": errors["rms_calibration_error_adaptive"],
        "reliability": {"clean": reliability(*clean), "corrupt": reliability(*pooled)},
    }


# What is evaluated


def load_run(folder: Path) -> dict[str, dict]:
    """The checkpoints of a finished run, {"best": ..., "last": ...}.

    Raises FileNotFoundError for a run without them, ValueError where it is unfinished or they are not train.py's."""
    saved = {which: utils.load_checkpoint(folder / f"{which}.pt") for which in ("best", "last")}
    try:
        for content in saved.values():
            for key in ("epochs", *NOT_HPARAMS):
                content["config"][key]
        done, epochs, _ = saved["last"]["epoch"], saved["last"]["config"]["epochs"], saved["last"]["log"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no checkpoints of train.py ({error} is missing); train again") from None
    if done < epochs:
        raise ValueError(f"{folder} is unfinished ({done} of {epochs} epochs); train with --resume")
    return saved


def load_weights(path: Path, arch: str, num_classes: int, state: dict) -> nn.Module:
    """The network with the weights of `state`, a state dict or a dict that holds one under a usual key.

    Raises ValueError naming the file and what does not fit."""
    f = build_model(arch, num_classes)
    for key in ("model", "state_dict", "net", "model_state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    try:
        f.load_state_dict(match_state_dict(f, state))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return f


# The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises ValueError naming the flag that is wrong."""
    parser = utils.Parser(description="Clean and corrupted accuracy and calibration of a run, or of others' weights.")
    flag = parser.add_argument
    flag("run", nargs="?", help="a run's folder, as train.py wrote it")
    flag("--checkpoint", help="a plain state dict trained elsewhere, instead of a run")
    flag("--arch", choices=ARCHS, help="with --checkpoint: its network")
    flag("--dataset", help="with --checkpoint: its data set, as in train.py; by default cifar10")
    flag("--mean", type=utils.number(float), nargs=3, help="with --checkpoint: its normalisation; none by default")
    flag("--std", type=utils.number(float, above=0), nargs=3, help="with --checkpoint: its normalisation")
    flag("--data", default="data", help="the folder of the data sets and of CIFAR-10-C, CIFAR-100-C, DIGITS-C")
    flag("--only", choices=("best", "last"), help="this checkpoint of the run alone")
    flag("--limit", type=utils.number(int, low=1), help="the first N test images of each set alone")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    flag("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision, as in train.py;"
         " auto: float32 for weights trained so or elsewhere")
    flag("--out", help="the file for the results; by default results.json in the run, or <checkpoint>.results.json")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.checkpoint is None):
        raise ValueError("name a run's folder or --checkpoint FILE, one of the two")
    if args.checkpoint and not args.arch:
        raise ValueError("--checkpoint needs --arch, the network that the weights are of")
    if (args.mean is None) != (args.std is None):
        raise ValueError("--mean and --std go together")
    if args.run and (args.arch or args.dataset or args.mean):
        raise ValueError("--arch, --dataset, --mean and --std are for --checkpoint; a run's folder says them itself")
    if args.checkpoint and args.only:
        raise ValueError("--only is for a run's folder; --checkpoint is one file")
    args.dataset = args.dataset or "cifar10"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = utils.pick_device(args.device)
    start = time.monotonic()
    if args.run:
        folder = Path(args.run)
        if not (folder / "config.json").is_file():
            what = "is a file" if folder.is_file() else "has no config.json" if folder.is_dir() else "is not there"
            raise ValueError(f"{folder} is no run's folder: it {what}; name one that train.py wrote")
        saved = load_run(folder)
        config, trained = saved["last"]["config"], sum(row["seconds"] for row in saved["last"]["log"])
        paths, out = {which: folder / f"{which}.pt" for which in saved}, folder / "results.json"
    else:
        saved, trained = {"foreign": utils.load_checkpoint(args.checkpoint)}, 0.0
        config = {key: vars(args)[key] for key in ("dataset", "arch", "checkpoint", "mean", "std")}
        paths, out = {"foreign": Path(args.checkpoint)}, Path(f"{args.checkpoint}.results.json")
    single = args.amp == "auto" and config.get("amp", "off") == "off"
    dtype = utils.amp_dtype("off" if single else args.amp, device)
    dataset = load_dataset(config["dataset"], args.data)
    if args.limit is not None and args.limit > len(dataset.test_images):
        raise ValueError(f"--limit {args.limit}: {dataset.name} has {len(dataset.test_images)} test images")
    out = Path(args.out or out)
    if (args.only or args.limit) and not args.out and out.exists():
        raise ValueError(f"{out} is there already, and may hold more; delete it, or name another file with --out")
    check_folder(dataset, args.data)

    entries, by_epoch = dict.fromkeys(saved), {}
    for which, content in saved.items():
        if args.run and args.only not in (None, which):
            continue
        epoch = content["epoch"] if args.run else None
        if epoch not in by_epoch:  # best.pt and last.pt may be of one epoch
            f = load_weights(paths[which], config["arch"], len(dataset.classes), content)
            f = nn.Sequential(transforms.Normalize(args.mean, args.std), f) if args.mean else f
            f = f.to(device, memory_format=torch.channels_last)
            by_epoch[epoch] = {"epoch": epoch} | evaluate(f, dataset, args.data, config, dtype, args.limit)
        entries[which] = by_epoch[epoch]
    seconds = time.monotonic() - start
    about = saved["last"] if args.run else {}
    results = {
        "dataset": dataset.name,
        **{key: config.get(key) for key in ("arch", "method", "tag", "seed")},
        "hparams": {key: value for key, value in config.items() if key not in NOT_HPARAMS},
        "data_source": dataset.source,
        "corruption_source": corruption_source(dataset.name, args.data),
        "train_images": config.get("train_images"),
        "test_images": args.limit or len(dataset.test_images),
        "limit": args.limit,
        "amp": config.get("amp"),
        **{key: about.get(key) for key in ("device", "versions", "commit")},
        "evaluation": {"amp": utils.amp_name(dtype), **utils.provenance(device)},
        "evaluation_seconds": round(seconds, 1),
        "wall_seconds": round(seconds + trained, 1),
        **entries,
    }
    print_column(results, next(which for which in ("best", "last", "foreign") if results.get(which)))
    utils.write_json(out, results)


def print_column(results: dict, which: str) -> None:
    """Print an evaluation as the paper's Table 3 column: percent, a corruption's mean over severities a row."""
    e = results[which]
    rows = [("Clean", e["clean"]["accuracy"]), ("mCA", e["mca"])]
    rows += [("mCA of the usual 15", e["mca15"])] if "mca15" in e else []
    for name, cells in e["corruptions"].items():
        rows.append((name.replace("_", " "), np.mean([cell["accuracy"] for cell in cells])))
    for suffix, kind in (("", ""), ("_adaptive", ", adaptive")):
        rows.append((f"RMS calibration error{kind}, clean", e["clean"][f"rms_calibration_error{suffix}"]))
        rows.append((f"RMS calibration error{kind}, corrupt", e[f"corrupt_rms_calibration_error{suffix}"]))
    limit = f", first {results['limit']} images of each set" if results["limit"] else ""
    name = f"{which}.pt (epoch {e['epoch']})" if e["epoch"] else "weights trained elsewhere"
    print(f"{results['method'] or ''} {results['arch']}, {name}, on {results['dataset']} ({results['data_source']}), "
          f"{results['corruption_source']} corruptions{limit}")  # fmt: skip
    for label, value in rows:
        print(f"  {label:<41}{value:6.2f}")


# Results read back, for tables.py and figures.py


def read_results(root: str | Path) -> tuple[dict[Path, dict], list[str]]:
    """Every sound results.json below `root` by its path, and a line for each that is damaged or of an older form.

    Raises FileNotFoundError where there is no such folder, or no results.json below it.
    """
    paths = sorted(Path(root).rglob("*results.json"))  # of weights trained elsewhere it is <checkpoint>.results.json
    if not paths:
        raise FileNotFoundError(f"no results.json below {root}; train.py, then evaluate.py write one a run")
    sound, problems = {}, []
    for path in paths:
        try:
            content = utils.read_json(path)
            check_results(content)
            sound[path] = content
        except (OSError, ValueError) as error:
            problems.append(f"{path} is left out: {error}")
    return sound, problems


def check_results(content: dict) -> None:
    """Raise ValueError unless `content` has the form that this script writes, with percentages that fit each other."""
    try:
        for key, kind in FORM.items():
            if not isinstance(content[key], kind):
                raise ValueError(f"its {key} is of another type")
        entries = [content[which] for which in ("best", "last", "foreign") if content.get(which) is not None]
        if not entries:
            raise ValueError("it holds no evaluation")
        for e in entries:
            sets = {name: e["corruptions"][name] for name in CORRUPTIONS} | e["corruptions"]
            cells = [e["clean"], *(cell for cells in sets.values() for cell in cells)]
            pooled = [e[f"corrupt_rms_calibration_error{kind}"] for kind in ("", "_adaptive")]
            kinds = ("accuracy", "rms_calibration_error", "rms_calibration_error_adaptive")  # as `scores` has them
            values = [e["mca"], *pooled, *(cell[kind] for cell in cells for kind in kinds)]
            if not all(0 <= value <= 100 for value in values):  # NaN fails, and text
                raise ValueError("a number is no percentage")
            if any(len(cells) != len(SEVERITIES) for cells in sets.values()):
                raise ValueError("a corruption has not 5 severities")
            mca = np.mean([cell["accuracy"] for name in CORRUPTIONS for cell in sets[name]])
            if not abs(mca - e["mca"]) < 0.01:
                raise ValueError(f"its mCA is {e['mca']}, but its 90 accuracies have the mean {mca:.2f}")
            if any(np.shape(e["reliability"][kind]) != (N_BINS, 3) for kind in ("clean", "corrupt")):
                raise ValueError(f"its reliability diagrams have not {N_BINS} bins of 3 numbers")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is of an older or another form ({error}); evaluate the run again") from None


@dataclass(frozen=True)
class Group:
    """Runs that differ by nothing but their seed: what they share, and the content of each seed's results.json."""

    shared: dict  # dataset, arch, method, tag, hparams, data_source, corruption_source, amp, ... as in results.json
    seeds: dict[int, dict]
    left_out: list[Path]  # further runs of a seed that is there already


def group_runs(runs: dict[Path, dict]) -> list[Group]:
    """Sort runs into groups; runs of different data, precision or hyperparameters are never in one."""
    groups: dict[str, Group] = {}
    for path, content in runs.items():
        keys = ("dataset", "arch", "method", "tag", "data_source", "corruption_source", "train_images", "test_images",
                "amp")  # fmt: skip
        shared = {key: content[key] for key in keys} | {"evaluation_amp": content["evaluation"].get("amp")}
        without = {*WHERE_IT_RAN, *of_other_methods(content["method"])}
        shared["hparams"] = {k: v for k, v in content["hparams"].items() if k not in without}
        group = groups.setdefault(json.dumps(shared, sort_keys=True), Group(shared, {}, []))
        if content["seed"] in group.seeds:
            group.left_out.append(path)
        else:
            group.seeds[content["seed"]] = content
    return list(groups.values())


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
