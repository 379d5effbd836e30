"""The list of all runs, and Tables 1-5 of the paper: our numbers beside the published ones.

    python tables.py runs                                    # one row per run, averaged over seeds
    python tables.py runs --table 3                          # ours, the paper's, the difference
    python tables.py runs --table 3 --dataset digits --arch resnet20    # smaller runs in its layout
    python tables.py runs --csv > runs.csv                   # every accuracy and calibration error

Reads every results.json below the folder. A damaged one is named and left out, and the exit code
is 1. The published numbers are in paper/tables.json. Everything is in percent; deviations over
seeds are the population's (divided by n).
"""

import argparse
import csv
import json
import os
import statistics
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

import utils
from data import CORRUPTIONS, dataset_name
from utils import UserError

PAPER = utils.read_json(Path(__file__).resolve().parent / "paper" / "tables.json")
SETS = ("cifar10", "cifar100")
NETWORKS = ("resnet18", "densenet121", "inceptionv3")
BASELINES = ("standard", "at", "trades", "rse", "gn", "augmix")
# MAGNMA's columns and the rows of Table 5: magnma lambda1 lambda2 sigma_max beta
SETTINGS = [row.split("/")[2] for row in PAPER["tables"]["5"]]
LAMBDAS = ("lambda1", "lambda2", "sigma_max", "beta")  # the four numbers in SETTINGS
NOISE, MIX, MAGNMA = "magnma 0.2 0 0.2 1", "magnma 0 5 0.2 1", "magnma 0.2 0.3 0.2 1"
NINE = " augmix"  # ends a column's name if the mixed copies draw from AugMix's nine operations
SUMMARY = ("clean", "mca", "clean_rmse", "corrupt_rmse")
SCORES = ("accuracy", "rms_calibration_error", "rms_calibration_error_adaptive")
NOT_RUN = "—"

NEEDED = {  # what is read from results.json besides its numbers
    "": ("departures", "seed", "tag"),
    "recipe": ("dataset", "arch", "method", "epochs", "amp", "train_images"),
    "ran": ("data_source",),
    "evaluation": ("corruption_source", "test_sha256", "test_images", "amp", "limit"),
}

Place = tuple[str, str, str]  # data set, network, column
Key = tuple[str, str, str, str]  # data set, network, column, metric


class Cell(NamedTuple):
    """A number in percent, and its deviation over seeds (None for one seed)."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f"±{self.deviation:.2f}")


class Group(NamedTuple):
    """Runs that are averaged: they differ in their seed only."""

    shared: dict  # their recipe, tag, and how they were evaluated
    seeds: dict[int, dict]  # the results.json of each seed
    repeated: list[Path]  # results of further runs with one of these seeds


def label(key: str) -> str:
    """The paper's name of a data set, network, column or metric; the key itself if it has none."""
    return PAPER["names"].get(key, key)


def published(numbers: str) -> dict[Key, Cell]:
    """All cells of the paper's Tables `numbers`, e.g. "12", row by row."""
    cells = {}
    for number in numbers:
        for row, entries in PAPER["tables"][number].items():
            dataset, arch, name = row.split("/")
            for entry, cell in entries.items():
                column, metric = (name, entry) if number == "5" else (entry, name)
                cells[dataset, arch, column, metric] = Cell(*cell)
    return cells


# Reading results


def read_results(root: str | Path) -> tuple[dict[Path, dict], list[str]]:
    """Every valid results.json below `root` by its path, and one line for each that is left out.

    Raises UserError if there is none.
    """
    walk = os.walk(root, followlinks=True)  # folders may be links to another disk
    paths = sorted(
        Path(folder, "results.json") for folder, _, files in walk if "results.json" in files
    )
    if not paths:
        raise UserError(f"no results.json below {root}. Train with train.py, then run evaluate.py")
    sound, problems = {}, []
    for path in paths:
        try:
            content = utils.read_json(path)
            check(content)
            sound[path] = content
        except UserError as error:
            problems.append(f"{path} is left out: {error}")
    return sound, problems


def check(content: dict) -> None:
    """Raise UserError unless `content` is what evaluate.py writes, with numbers that agree."""
    try:
        for part, keys in NEEDED.items():
            if lost := {*keys} - (content[part] if part else content).keys():
                raise KeyError(*lost)
        entries = [content[which] for which in ("best", "last") if content[which] is not None]
        if not entries:
            raise UserError("it holds no evaluation")
        for e in entries:
            sets = {name: e["corruptions"][name] for name in CORRUPTIONS} | e["corruptions"]
            cells = [e["clean"], *(cell for cells in sets.values() for cell in cells)]
            values = [cell[score] for cell in cells for score in SCORES]
            values += [e["mca"], *(e[f"corrupt_{score}"] for score in SCORES[1:])]
            if not all(0 <= value <= 100 for value in values):  # NaN fails
                raise UserError("one of its numbers is not a percentage")
            if any(len(cells) != 5 for cells in sets.values()):
                raise UserError("a corruption does not have 5 severities")
            mca = statistics.fmean(c["accuracy"] for name in CORRUPTIONS for c in sets[name])
            if not abs(mca - e["mca"]) < 0.01:
                raise UserError(
                    f"its mCA is {e['mca']}, but its 90 accuracies have the mean {mca:.2f}"
                )
            if lost := {"epoch", "reliability"} - e.keys():
                raise KeyError(*lost)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"it was not written by this version of evaluate.py ({error!r}). Run it again"
        ) from None


def group_runs(runs: dict[Path, dict]) -> list[Group]:
    """Group runs by recipe, tag, corruption source, test images, evaluation precision and limit."""
    groups: dict[str, Group] = {}
    for path, run in runs.items():
        evaluation = run["evaluation"]
        shared = run["recipe"] | {"tag": run["tag"], "evaluation_amp": evaluation["amp"]}
        shared |= {key: evaluation[key] for key in ("corruption_source", "test_sha256", "limit")}
        group = groups.setdefault(json.dumps(shared, sort_keys=True), Group(shared, {}, []))
        if run["seed"] in group.seeds:
            group.repeated.append(path)
        else:
            group.seeds[run["seed"]] = run
    return list(groups.values())


# One group: its numbers, its column, how it departs from the paper


def evaluations(group: Group, checkpoint: str) -> dict[int, dict]:
    """The evaluation of best.pt or last.pt by seed, where there is one."""
    return {seed: run[checkpoint] for seed, run in group.seeds.items() if run[checkpoint]}


def cells_of(group: Group, checkpoint: str) -> dict[str, Cell]:
    """Metric -> cell: SUMMARY, and each corruption's accuracy averaged over its severities."""
    values: dict[str, list[float]] = {}
    for e in evaluations(group, checkpoint).values():
        metrics = {"clean": e["clean"]["accuracy"], "mca": e["mca"]}
        metrics["clean_rmse"] = e["clean"]["rms_calibration_error"]
        metrics["corrupt_rmse"] = e["corrupt_rms_calibration_error"]
        for name, cells in e["corruptions"].items():
            metrics[name] = statistics.fmean(cell["accuracy"] for cell in cells)
        for metric, value in metrics.items():
            values.setdefault(metric, []).append(value)
    deviation = {
        metric: statistics.pstdev(v) if len(v) > 1 else None for metric, v in values.items()
    }
    return {metric: Cell(statistics.fmean(v), deviation[metric]) for metric, v in values.items()}


def method_of(shared: dict) -> str:
    """method[-tag], as in the run's folder."""
    return "-".join(filter(None, (shared["method"], shared["tag"])))


def column_of(group: Group) -> str:
    """A baseline's name, one of SETTINGS (+ NINE for AugMix's operations), or method[-tag]."""
    shared = group.shared
    if shared["method"] in BASELINES:
        return shared["method"]
    if shared["method"] == "magnma":
        setting = [shared.get(name) for name in LAMBDAS]
        for name in SETTINGS:
            if [float(number) for number in name.split()[1:]] == setting:
                mixes_nine = setting[1] > 0 and shared.get("operations") == "augmix"
                return name + NINE if mixes_nine else name
    return method_of(shared)


def departures(group: Group) -> list[str]:
    """How these runs depart from the paper, in words or as train.py's flags."""
    shared, run = group.shared, next(iter(group.seeds.values()))
    found, said = dict(run["departures"]), []
    if run["ran"]["data_source"] != "official":
        said.append(f"data: {run['ran']['data_source']}")
    if shared["corruption_source"] != "official":
        said.append(f"{shared['corruption_source']} corruptions")
    if shared["train_images"] != 50000 and "subset" not in found:
        said.append(f"{shared['train_images']} training images")
    # a MAGNMA of no table: its column's name does not show them
    if shared["method"] == "magnma" and column_of(group) == method_of(shared):
        found |= {name: shared[name] for name in LAMBDAS}
    for name, value in found.items():
        flag = "--" + name.replace("_", "-")
        said.append(flag if value is True else f"{flag} {value}")
    if shared["evaluation_amp"] != "off":
        said.append(f"evaluated in {shared['evaluation_amp']}")
    if shared["limit"]:
        said.append(f"evaluated on the first {shared['limit']} test images")
    return said


def describe_differences(groups: list[Group]) -> str:
    """What the groups do not share, with their values in order; the tag if nothing else differs."""
    values: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for group in groups for name in group.shared):
        values[name] = [str(group.shared.get(name)) for group in groups]
        if name.endswith("sha256"):
            values[name] = [value[:8] for value in values[name]]
    differ = {name: found for name, found in values.items() if len(set(found)) > 1}
    differ = {name: found for name, found in differ.items() if name != "tag"} or differ
    return ", ".join(f"{name} {' | '.join(found)}" for name, found in differ.items())


def closest_to_paper(groups: list[Group], checkpoint: str) -> dict[Place, list[Group]]:
    """The groups of each place, the one to show first: evaluated, fewest departures, most seeds."""

    def rank(group: Group) -> tuple[bool, int, int]:
        seeds = len(evaluations(group, checkpoint))
        # every run on a GPU departs in its precisions: they do not count
        precisions = sum(group.shared[key] != "off" for key in ("amp", "evaluation_amp"))
        return seeds == 0, len(departures(group)) - precisions, -seeds

    places: dict[Place, list[Group]] = {}
    for group in sorted(groups, key=rank):
        place = group.shared["dataset"], group.shared["arch"], column_of(group)
        places.setdefault(place, []).append(group)
    return places


# The list of all runs, and every number


def print_list(groups: list[Group], checkpoint: str, style: str) -> None:
    """Print one row per group, and notes below the table."""
    about = ["data set", "network", "method", "seeds", "epochs", "precision", "images"]
    about += ["corruptions"]
    rows, same_name = [], {}
    for group in groups:
        shared, cells = group.shared, cells_of(group, checkpoint)
        name = [shared["dataset"], shared["arch"], method_of(shared)]
        same_name.setdefault(" ".join(name), []).append(group)
        seeds = " ".join(map(str, sorted(evaluations(group, checkpoint)))) or NOT_RUN
        precision = "/".join(dict.fromkeys((shared["amp"], shared["evaluation_amp"])))
        tested = next(iter(group.seeds.values()))["evaluation"]["test_images"]
        images = f"{shared['train_images']}/{tested}"
        row = [*name, seeds, str(shared["epochs"]), precision, images, shared["corruption_source"]]
        rows.append([*row, *(str(cells.get(metric, NOT_RUN)) for metric in SUMMARY)])
    notes = [f"mean ± deviation over seeds of {checkpoint}.pt, in percent; images: training/test"]
    for name, same in same_name.items():
        if len(same) > 1:
            notes.append(f"the rows of {name} differ in {describe_differences(same)}")
    notes += repeated_notes(groups)
    header = [*about, *map(label, SUMMARY)]
    rows.sort(key=lambda row: row[:3])  # rows of one name stay in the order of their note
    print(render(style, "Runs", header, rows, notes, left=len(about)))


def repeated_notes(groups: list[Group]) -> list[str]:
    """One line for each results.json that repeats a seed of a group."""
    paths = [path for group in groups for path in group.repeated]
    return [f"not shown (another run has this seed): {path}" for path in paths]


def print_csv(runs: dict[Path, dict]) -> None:
    """Tidy CSV: one row for each run, checkpoint, corruption and severity (`clean`: 0)."""
    writer = None
    for path, run in runs.items():
        recipe, evaluation = run["recipe"], run["evaluation"]
        about = {key: recipe[key] for key in ("dataset", "arch", "method")}
        about |= {"tag": run["tag"], "seed": run["seed"], "run": path.parent}
        about |= {key: evaluation[key] for key in ("corruption_source", "test_images")}
        for which in ("best", "last"):
            if not run[which]:
                continue
            sets = {"clean": [run[which]["clean"]]} | run[which]["corruptions"]
            for name, cells in sets.items():
                for severity, cell in enumerate(cells, start=int(name != "clean")):
                    row = about | {"checkpoint": which, "epoch": run[which]["epoch"]}
                    row |= {"corruption": name, "severity": severity}
                    row |= {score: cell[score] for score in SCORES}
                    if writer is None:
                        writer = csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
                        writer.writeheader()
                    writer.writerow(row)


# The paper's layout


def table_rows(
    number: str, ours: dict[Key, Cell], swap: dict[str, str]
) -> tuple[list[str], list[list[str]], list[Place]]:
    """(header, lines, places): ours, the paper's, and the difference if `swap` leaves the place.

    Tables 3 and 4 get further columns (AugMix's nine operations, the user's own methods) and rows
    (further corruptions), Table 5 further rows (AugMix's nine operations).
    """
    rows = [tuple(row.split("/")) for row in PAPER["tables"][number]]  # data set, network, name
    columns = list(next(iter(PAPER["tables"][number].values())))
    place = rows[0][:2]  # the only one of Tables 3, 4 and 5
    here = dict.fromkeys(key[2:] for key in ours if key[:2] == place)
    found = dict.fromkeys(column for column, _ in here)
    if number == "5":
        rows += [(*place, setting + NINE) for setting in SETTINGS if setting + NINE in found]
    if number in "34":
        columns += [column for column in (MIX + NINE, MAGNMA + NINE) if column in found]
        of_table_5 = {name for setting in SETTINGS for name in (setting, setting + NINE)}
        columns += sorted(found.keys() - of_table_5 - {*columns})
        further = {metric for column, metric in here if column in columns}
        rows += [(*place, metric) for metric in sorted(further - {*CORRUPTIONS, *SUMMARY})]

    paper, lines, places = published(number), [], {}
    for dataset, arch, name in rows:
        keys = [(dataset, arch, *((name, c) if number == "5" else (c, name))) for c in columns]
        places |= dict.fromkeys(key[:3] for key in keys)
        pairs = [(ours.get(key), paper.get(key)) for key in keys]
        ran = swap.get(dataset, dataset), swap.get(arch, arch)
        first = row_head(number, *ran, name)
        below = [""] * len(first)
        lines.append([*first, "ours", *(str(a or NOT_RUN) for a, _ in pairs)])
        if number in "12" and ran != (dataset, arch):
            below = row_head(number, dataset, arch, name)
        if any(b for _, b in pairs):
            lines.append([*below, "paper", *(str(b or NOT_RUN) for _, b in pairs)])
        if ran == (dataset, arch) and any(a and b for a, b in pairs):
            away = [f"{round(a.mean, 2) - b.mean:+z.2f}" if a and b else NOT_RUN for a, b in pairs]
            lines.append([*below, "difference", *away])
    head = {"1": ["Network", "Test set"], "2": ["Network", "Test set"], "5": ["Parameters"]}
    return [*head.get(number, ["Corruption"]), "", *map(label, columns)], lines, list(places)


def row_head(number: str, dataset: str, arch: str, name: str) -> list[str]:
    """A row's first cells: network and test set, or parameters, or the corruption."""
    if number in "12":
        return [label(arch), label(dataset) + ("" if name.startswith("clean") else "-C")]
    if number == "5":
        setting = f"({', '.join(name.removesuffix(NINE).split()[1:])})"
        return [setting + ", nine" if name.endswith(NINE) else setting]
    return [label(name)]


def table_notes(placed: dict[Place, list[Group]], checkpoint: str) -> list[str]:
    """How the runs of which columns depart from the paper, and which runs are not shown."""
    if not placed:
        return ["no runs of these data sets and networks. Name others with --dataset and --arch"]
    columns_of, further = {}, []
    several = len({place[:2] for place in placed}) > 1
    for (dataset, arch, column), (shown, *others) in placed.items():
        whom = label(column) + (f" ({label(arch)}, {label(dataset)})" if several else "")
        said, seeds = departures(shown), len(evaluations(shown, checkpoint))
        if seeds < 3:
            said.append(f"{seeds} of 3 seeds" if seeds else f"{checkpoint}.pt not evaluated")
        if checkpoint == "best" and len(evaluations(shown, "last")) < seeds:
            said.append("last.pt not evaluated")
        for text in said:
            columns_of.setdefault(text, []).append(whom)
        for other in others:
            different = describe_differences([shown, other])
            seeds = " ".join(map(str, sorted(other.seeds)))
            further.append(f"{whom}, further runs (shown | not shown): {different}; seeds {seeds}")
    texts_of: dict[str, list[str]] = {}
    for text, whom in columns_of.items():
        who = "all" if len(whom) == len(placed) else "; ".join(whom)
        texts_of.setdefault(who, []).append(text)
    notes = [f"ours: mean ± deviation over seeds of {checkpoint}.pt"]
    notes += [f"{who}: {'; '.join(texts)}" for who, texts in texts_of.items()]
    return notes + further + repeated_notes([shown for shown, *_ in placed.values()])


def print_table(number: str, args: argparse.Namespace, places: dict[Place, list[Group]]) -> None:
    """Print Table `number`, the runs of --dataset and --arch in the place of the paper's."""
    swap = {"cifar100" if number == "4" else "cifar10": args.dataset, "resnet18": args.arch}
    swap = {paper: ours for paper, ours in swap.items() if ours not in (None, paper)}
    placed = {}
    for dataset, arch in product(SETS, NETWORKS):
        ran = swap.get(dataset, dataset), swap.get(arch, arch)
        for place, groups in places.items():
            if place[:2] == ran:
                placed[dataset, arch, place[2]] = groups
    cells = {
        (*place, metric): cell
        for place, groups in placed.items()
        for metric, cell in cells_of(groups[0], args.checkpoint).items()
    }
    header, lines, shown = table_rows(number, cells, swap)
    placed = {place: placed[place] for place in shown if place in placed}
    moved = [f"{label(ours)} in place of {label(paper)}" for paper, ours in swap.items()]
    title = PAPER["titles"][number] + (f"; ours: {', '.join(moved)}" if moved else "")
    notes = table_notes(placed, args.checkpoint)
    print(render(args.format, title, header, lines, notes, left=header.index("") + 1))


# The command line


def render(
    style: str, title: str, header: list[str], rows: list[list[str]], notes: list[str], left: int
) -> str:
    """A table with title and notes: text, github or latex. The first `left` columns align left."""
    tablefmt = {"text": "simple", "github": "github", "latex": "latex_booktabs"}[style]
    colalign = ["left"] * left + ["right"] * (len(header) - left)
    body = tabulate(rows, header, tablefmt, disable_numparse=True, colalign=colalign)
    above, before = {"text": ("", "  "), "github": ("### ", "- "), "latex": ("% ", "% ")}[style]
    return "\n".join([above + title, "", body, "", *(before + note for note in notes), ""])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, `dataset` as the name that a run has."""
    parser = utils.Parser(description="A list of all runs, and the paper's tables from them.")
    flag = parser.add_argument
    flag("runs", nargs="?", default="runs", help="read every results.json below this folder")
    flag(
        "--table",
        choices=(*PAPER["tables"], "all"),
        help="a table of the paper: our numbers beside the published ones",
    )
    flag("--dataset", help="shown in place of CIFAR-10 (Table 4: CIFAR-100); the list has only it")
    flag("--arch", help="shown in place of ResNet-18; the list has only it")
    flag("--checkpoint", choices=("best", "last"), default="best", help="the paper reports best")
    flag(
        "--format", choices=("text", "github", "latex"), default="text", help="latex uses booktabs"
    )
    flag("--csv", action="store_true", help="every number of both checkpoints, one per row")
    args = parser.parse_args(argv)
    if args.csv and args.table:
        parser.error("--csv and --table cannot be combined")
    args.dataset = args.dataset and dataset_name(args.dataset)
    return args


def main(argv: list[str] | None = None) -> int:
    """Print what the flags ask for. Exit code 1 if a results.json was left out."""
    args = parse_args(argv)
    runs, problems = read_results(args.runs)
    wanted = {"dataset": args.dataset, "arch": args.arch}
    wanted = {key: name for key, name in wanted.items() if name}
    listed = {path: run for path, run in runs.items() if wanted.items() <= run["recipe"].items()}
    if runs and not listed:
        found = sorted({" ".join(run["recipe"][key] for key in wanted) for run in runs.values()})
        raise UserError(f"no run of {' '.join(wanted.values())}. There are {', '.join(found)}")
    if args.table:
        places = closest_to_paper(group_runs(runs), args.checkpoint)
        for number in PAPER["tables"] if args.table == "all" else [args.table]:
            print_table(number, args, places)
    elif args.csv:
        print_csv(listed)
    elif listed:
        print_list(group_runs(listed), args.checkpoint, args.format)
    for problem in problems:
        print(f"tables.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
