"""The results of our runs: every results.json below a folder, checked, grouped and brought into the paper's terms.

A number's key is (dataset, arch, column, metric): a column is a method's name or, for MAGNMA, `magnma lambda1 lambda2
sigma_max beta`; a metric is clean, mca, a corruption, clean_rmse or corrupt_rmse (RMS calibration errors with 15
equal-width bins). All in percent. Only runs that differ by nothing but their seed are averaged.
"""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import runs
from data import ALL_CORRUPTIONS, CORRUPTIONS, DATASETS
from losses import HPARAMS, METHODS
from models import ARCHS

Key = tuple[str, str, str, str]
KNOWN = {
    "dataset": DATASETS,
    "arch": tuple(ARCHS),
    "method": tuple(METHODS),
    "data_source": ("official", "unofficial copy", "embedded"),
    "corruption_source": ("official", "generated", "unverified"),
}
COUNTS = ("train_images", "test_images")
# What train.py records beside the training itself
NOT_TRAINING = ("dataset", "arch", "method", "seed", "tag", "data", "out", "device", "amp", "compile", "resume",
                "overwrite", "max_minutes", "stands_for")  # fmt: skip
# Sec. 4 where it speaks, else the README's table of decisions; "" holds for every method
PGD = {"epsilon": 8 / 255, "pgd_steps": 7, "pgd_step_size": 2.5 * 8 / 255 / 7}
RECIPE = {
    "": {"epochs": 150, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "accumulate": 1},
    "standard": {},
    "at": PGD,
    "trades": PGD | {"trades_lambda": 6},
    "rse": {"rse_sigma": 0.1, "rse_samples": 10},
    "gn": {"sigma_max": 0.2},
    "augmix": {"jsd_lambda": 12},
    "magnma": {"n": 5},  # its other four hyperparameters make the column
}


# Reading


def is_number(value: object, high: float = 1e300) -> bool:
    """Is it an int or float (no bool, no NaN) from 0 to `high`?"""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high


def _require(good: bool, entry: str, value: object, wanted: str) -> None:
    if not good:
        raise ValueError(f"{entry} is {repr(value)[:40]}, not {wanted} (an older form?); evaluate the run again")


def check_results(content: dict) -> None:
    """Check the content of a results.json: names, types, 18 or 19 corruptions x 5 severities, percentages, the mCA.

    "best" or "last" may be null where only the other was evaluated. Raises ValueError naming the first entry that is
    missing, of another type, not finite or out of range.
    """
    for name, known in KNOWN.items():
        _require(content.get(name) in known, name, content.get(name), f"one of {', '.join(known)}")
    for name in (*COUNTS, "seed"):
        good = type(content.get(name)) is int and content[name] >= 0
        _require(good, name, content.get(name), "a whole number")
    _require(isinstance(content.get("hparams"), dict), "hparams", content.get("hparams"), "an object")
    for name in HPARAMS["magnma"] if content["method"] == "magnma" else ():  # they make the column
        value = content["hparams"].get(name)
        _require(is_number(value), f"hparams.{name}", value, "a number")
    limit, stands_for = content.get("limit"), content.get("stands_for")
    _require(limit is None or (type(limit) is int and limit > 0), "limit", limit, "null or a number of images")
    places = [None, *(f"{dataset}/{arch}" for dataset in KNOWN["dataset"] for arch in KNOWN["arch"])]
    _require(stands_for in places, "stands_for", stands_for, "null or dataset/arch")
    kept = {name: content[name] for name in ("best", "last") if name in content}
    _require(len(kept) == 2, '"best" and "last"', list(kept), "both there")
    _require(any(e is not None for e in kept.values()), '"best" and "last"', None, "an evaluation")
    for name, evaluation in kept.items():
        if evaluation is not None:
            _check_evaluation(evaluation, name)


def _check_evaluation(evaluation: object, kept: str) -> None:
    """Check E of results.json, the content of "best" or "last" (`kept`)."""
    _require(isinstance(evaluation, dict), kept, evaluation, "an evaluation")
    sets = evaluation.get("corruptions")
    _require(isinstance(sets, dict), f"{kept}.corruptions", sets, "an object")
    odd = [name for name in CORRUPTIONS if name not in sets] + [name for name in sets if name not in ALL_CORRUPTIONS]
    _require(not odd, f"{kept}.corruptions", odd, "(missing or unknown) the 18 or 19 corruptions")
    cells = {"clean": evaluation.get("clean")}
    for name, severities in sets.items():
        _require(isinstance(severities, list) and len(severities) == 5, f"{kept}.{name}", severities, "5 severities")
        cells |= {f"{name}[{severity}]": cell for severity, cell in enumerate(severities, 1)}
    pooled = ("mca", "corrupt_rms_calibration_error", "corrupt_rms_calibration_error_adaptive")
    percentages = {f"{kept}.{name}": evaluation.get(name) for name in pooled}
    for where, cell in cells.items():
        _require(isinstance(cell, dict), f"{kept}.{where}", cell, "an object")
        for name in ("accuracy", "rms_calibration_error", "rms_calibration_error_adaptive"):
            percentages[f"{kept}.{where}.{name}"] = cell.get(name)
    for where, value in percentages.items():
        _require(is_number(value, 100), where, value, "from 0 to 100")
    mean = statistics.fmean(cell["accuracy"] for name in CORRUPTIONS for cell in sets[name])
    good = abs(mean - evaluation["mca"]) < 0.01
    _require(good, f"{kept}.mca", evaluation["mca"], f"the mean {mean:.2f} of its 90 accuracies")
    bins = evaluation.get("reliability") or {"clean": [[0] * 3] * 15, "corrupt": [[0] * 3] * 15}
    for kind in ("clean", "corrupt"):
        table = bins.get(kind) if isinstance(bins, dict) else None
        good = isinstance(table, list) and len(table) == 15 and all(isinstance(b, list) and len(b) == 3 for b in table)
        good = good and all(is_number(x) for b in table for x in b)
        _require(good, f"{kept}.reliability.{kind}", table, "15 times [count, confidences, correct]")


def read_runs(folder: Path) -> tuple[dict[Path, dict], list[str]]:
    """(content by path of each good results.json below `folder`, one line for each that is not).

    Raises FileNotFoundError where there is no such folder, ValueError where it holds no good results.json.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}; train and evaluate first, or use --source paper")
    found, problems = {}, []
    for path in sorted(folder.glob("**/results.json")):
        try:
            content = runs.read_json(path)
            check_results(content)
            found[path] = content
        except (ValueError, OSError) as error:
            problems.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    if not found:
        why = f"; skipped {'; '.join(problems)}" if problems else ""
        raise ValueError(f"no results.json to show below {folder}; train.py, then evaluate.py write one{why}")
    return found, problems


# Grouping


class Cell(NamedTuple):
    """One number of a table, in percent."""

    mean: float
    deviation: float | None  # sample deviation; one seed has none
    seeds: int


class Group(NamedTuple):
    """Runs that differ by nothing but their seed."""

    place: tuple[str | None, str | None, str]  # dataset, arch and column of the paper's tables
    shared: dict  # what these runs have in common
    seeds: dict[int, dict]  # seed -> content of results.json
    folders: dict[int, Path]  # seed -> the run's folder


def group_runs(found: dict[Path, dict], dataset: str = "cifar10", arch: str = "resnet18") -> list[Group]:
    """Group runs by all but their seed; `dataset` and `arch` take the place of CIFAR-10 and of ResNet-18.

    A run with `stands_for` is placed where the run would be for which it stands in. Raises ValueError, naming both
    folders, where two runs of a group have the same seed.
    """
    taken = {dataset: "cifar10", arch: "resnet18"}
    groups: dict[str, Group] = {}
    for path, content in found.items():
        hparams = {name: value for name, value in content["hparams"].items() if name not in NOT_TRAINING}
        shared = {name: content.get(name) for name in (*KNOWN, *COUNTS, "limit", "stands_for")}
        shared = hparams | shared
        names = (content.get("stands_for") or f"{content['dataset']}/{content['arch']}").split("/")
        place = [taken.get(name, None if name in taken.values() else name) for name in names]
        column = content["method"]
        if column == "magnma":
            column += " {lambda1:g} {lambda2:g} {sigma_max:g} {beta:g}".format(**hparams)
        group = groups.setdefault(json.dumps(shared, sort_keys=True), Group((*place, column), shared, {}, {}))
        seed = content["seed"]
        if seed in group.seeds:
            raise ValueError(f"{group.folders[seed]} and {path.parent} hold the same run with seed {seed}; remove one")
        group.seeds[seed], group.folders[seed] = content, path.parent
    return list(groups.values())


def departures(shared: dict, method: str = "") -> list[str]:
    """How runs depart from the paper: by the method's own hyperparameters, or ("") by what all methods share."""
    found = []
    for name, wanted in RECIPE[method].items():
        value = shared.get(name)
        if value is not None and not (is_number(value) and math.isclose(value, wanted, rel_tol=1e-3)):
            found.append(f"{name} {value} (paper: {wanted:.4g})")
    if method == "" and shared.get("subset"):
        found.append(f"trained on the first {shared['subset']} images")
    if method == "" and shared["limit"]:
        found.append(f"evaluated on the first {shared['limit']} test images of each cell")
    return found


def setting_of(shared: dict) -> tuple:
    """What methods must have in common to be compared: all of `departures` that is not their own, data and network."""
    return (*departures(shared), *(shared[name] for name in (*KNOWN, *COUNTS) if name != "method"))


def choose(groups: list[Group]) -> tuple[dict[tuple, Group], dict[tuple, list[str]]]:
    """(the group shown at each place, a line for each group left out there).

    Real runs go before stand-ins, then those nearest to the paper's recipe and data, then those with more seeds.
    """

    def rank(group: Group) -> tuple:
        away = len(departures(group.shared) + departures(group.shared, group.shared["method"]))
        away += sum(group.shared[name] != "official" for name in ("data_source", "corruption_source"))
        return bool(group.shared["stands_for"]), away, -len(group.seeds), json.dumps(group.shared, sort_keys=True)

    chosen: dict[tuple, Group] = {}
    left_out: dict[tuple, list[str]] = {}
    for group in sorted(groups, key=rank):
        shown = chosen.setdefault(group.place, group)
        if shown is not group:
            differs = [f"{name} {value} (shown: {shown.shared.get(name)})" for name, value in group.shared.items()
                       if value != shown.shared.get(name)]  # fmt: skip
            folders = ", ".join(str(folder) for folder in group.folders.values())
            line = f"Left out, other runs fill the place: {folders}: {', '.join(differs)}."
            left_out.setdefault(group.place, []).append(line)
    return chosen, left_out


def our_numbers(chosen: dict[tuple, Group], checkpoint: str) -> dict[Key, list[float]]:
    """Every number of the shown runs, in percent, as the list of its values by seed."""
    numbers: dict[Key, list[float]] = {}
    for place, group in chosen.items():
        for _, content in sorted(group.seeds.items()):
            if (evaluation := content[checkpoint]) is None:
                continue
            values = {name: statistics.fmean(c["accuracy"] for c in evaluation["corruptions"][name])
                      for name in CORRUPTIONS}  # fmt: skip
            values |= {"clean": evaluation["clean"]["accuracy"], "mca": evaluation["mca"]}
            values |= {"clean_rmse": evaluation["clean"]["rms_calibration_error"]}
            values |= {"corrupt_rmse": evaluation["corrupt_rms_calibration_error"]}
            for metric, value in values.items():
                numbers.setdefault((*place, metric), []).append(value)
    return numbers


def reliability_bins(chosen: dict[tuple, Group], checkpoint: str) -> dict[tuple, dict[str, list[list[float]]]]:
    """place -> {"clean", "corrupt"} -> the 15 bins' [count, sum of confidence, number correct], summed over seeds."""
    found = {}
    for place, group in chosen.items():
        kept = [(run[checkpoint] or {}).get("reliability") for run in group.seeds.values()]
        if all(kept):
            found[place] = {
                kind: [[sum(column) for column in zip(*one_bin, strict=True)]
                       for one_bin in zip(*(bins[kind] for bins in kept), strict=True)]
                for kind in ("clean", "corrupt")
            }  # fmt: skip
    return found


def summarise(values: list[float]) -> Cell:
    """(mean, sample deviation with n - 1, number of seeds); one seed has no deviation."""
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))
