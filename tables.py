"""What was run; Tables 1-5 from it, beside the published numbers; what the paper's text claims.

    python tables.py runs/                                               # every run found; --csv for a spreadsheet
    python tables.py runs/ --table 3                                     # ours, the paper's, the difference
    python tables.py runs/ --table 3 --dataset digits --arch resnet20    # smaller runs in the paper's layout
    python tables.py runs/ --claims                                      # from the paper's tables, and from our runs

Reads every results.json below the folder; one that is damaged or of an older form is named and left out, and the exit
code is then 1. The published numbers are those of paper/tables.json. All in percent.
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

import utils
from data import CORRUPTIONS
from evaluate import Group, group_runs, read_results
from losses import METHODS

SETS, NETWORKS = ("cifar10", "cifar100"), ("resnet18", "densenet121", "inceptionv3")  # the paper's
BASELINES = ("standard", "at", "trades", "rse", "gn", "augmix")
NOISE, MIX, MAGNMA = "magnma 0.2 0 0.2 1", "magnma 0 5 0.2 1", "magnma 0.2 0.3 0.2 1"  # lambda1 lambda2 sigma_max beta
SUMMARY = ("clean", "mca", "clean_rmse", "corrupt_rmse")
NEVER_RUN = "—"
SLACK = 1.0  # points that our gain may fall short of a stated one: some three deviations of Table 3's mCA

# The paper's recipe as NOTES.md reads it: of all runs; of a method (MAGNMA's other hyperparameters make its column)
ORIGIN = {"data_source": "official", "corruption_source": "official", "amp": "off", "evaluation_amp": "off"}
ALL = {"epochs": 150, "batch_size": 512, "lr": 0.1, "weight_decay": 5e-4, "subset": None, "limit": None, "joint": False}
PGD = {"epsilon": 8 / 255, "pgd_steps": 7, "pgd_step_size": 2.5 * (8 / 255) / 7}
OWN = {
    "at": PGD, "trades": PGD | {"trades_lambda": 3}, "rse": {"rse_sigma": 0.1, "rse_samples": 10},
    "gn": {"sigma_max": 0.2}, "augmix": {"jsd_lambda": 12}, "magnma": {"n": 5},
}  # fmt: skip

Key = tuple[str, str, str, str]  # data set, network, column, metric
Place = tuple[str, str, str]  # data set, network, column


class Cell(NamedTuple):
    """A number in percent; its deviation is the population's (divided by n), None for one seed."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f"±{self.deviation:.2f}")


class Names(dict):
    """A dict that gives back a key which it does not hold."""

    def __missing__(self, key: str) -> str:
        return key


# A group of runs: its numbers, and what was really run


def cells_of(group: Group, checkpoint: str) -> tuple[list[int], dict[str, Cell]]:
    """(seeds, metric -> cell): SUMMARY's, and each corruption's accuracy over severities; of best.pt or last.pt.

    Weights that were trained elsewhere have one evaluation, which stands for both.
    """
    found = {seed: content.get("foreign") or content.get(checkpoint) for seed, content in group.seeds.items()}
    values: dict[str, list[float]] = {}
    for e in filter(None, found.values()):
        metrics = {name: statistics.fmean(c["accuracy"] for c in cells) for name, cells in e["corruptions"].items()}
        metrics |= {"clean": e["clean"]["accuracy"], "clean_rmse": e["clean"]["rms_calibration_error"]}
        metrics |= {"mca": e["mca"], "corrupt_rmse": e["corrupt_rms_calibration_error"]}
        for metric, value in metrics.items():
            values.setdefault(metric, []).append(value)
    cells = {m: Cell(statistics.fmean(v), statistics.pstdev(v) if len(v) > 1 else None) for m, v in values.items()}
    return sorted((seed for seed in found if found[seed]), key=str), cells


def method_of(group: Group) -> str:
    """method[-tag], as in the run's folder."""
    return "-".join(filter(None, (group.shared["method"] or "foreign", group.shared["tag"])))


def place_of(group: Group) -> Place:
    """Data set, network and column: a baseline's name, `magnma` and its numbers, or the method[-tag] of the user's."""
    shared, column = group.shared, method_of(group)
    if shared["method"] in BASELINES:
        column = shared["method"]
    if shared["method"] == "magnma":
        with suppress(KeyError, TypeError, ValueError, OverflowError):  # other people's files may lack them
            column = "magnma {lambda1:g} {lambda2:g} {sigma_max:g} {beta:g}".format(**shared["hparams"])
    return shared["dataset"], shared["arch"], column


def facts(group: Group) -> dict[str, object]:
    """All that the runs share, hyperparameters among it; `joint` only where the method knows it."""
    found = group.shared["hparams"] | group.shared | {"limit": next(iter(group.seeds.values()))["limit"]}
    unused = () if "joint" in getattr(METHODS.get(group.shared["method"]), "hparams", ()) else ("joint",)
    return {name: value for name, value in found.items() if name not in ("hparams", *unused)}


def departures(group: Group) -> dict[str, str]:
    """What departs from the paper's recipe, in words."""
    found, wanted = facts(group), ORIGIN | ALL | OWN.get(group.shared["method"], {})
    return {name: f"{name} {found[name]}" + (f" (paper: {value})" if value else "")
            for name, value in wanted.items() if name in found and found[name] != value}  # fmt: skip


def telling(groups: list[Group]) -> str:
    """What tells groups apart, each one's value in their order."""
    found = [facts(group) for group in groups]
    names = [n for n in dict.fromkeys(n for f in found for n in f) if len({json.dumps(f.get(n)) for f in found}) > 1]
    names = [name for name in names if name != "tag"] or names
    return ", ".join(f"{name} {' | '.join(str(f.get(name)) for f in found)}" for name in names)


def choose(groups: list[Group], checkpoint: str) -> dict[Place, list[Group]]:
    """The groups of each place, first the one to show: nearest to the paper's recipe, not joint, most seeds."""
    places: dict[Place, list[Group]] = {}
    for group in groups:
        seeds, away = len(cells_of(group, checkpoint)[0]), departures(group)
        places.setdefault(place_of(group), []).append((seeds == 0, len(away), "joint" in away, -seeds, group))
    return {place: [rank[-1] for rank in sorted(ranks, key=lambda rank: rank[:-1])] for place, ranks in places.items()}


def as_notes(said: list[tuple[str, str]], groups: list[Group]) -> list[str]:
    """A line for each text of the pairs (text, the group that it is about), and for each run left out of the groups."""
    about: dict[str, list[str]] = {}
    for text, whom in said:
        about.setdefault(text, []).append(whom)
    notes = [f"{text}: {'all' if len(whom) == len(groups) else ', '.join(whom)}" for text, whom in about.items()]
    return notes + [f"not shown, its seed is there already: {path}" for group in groups for path in group.left_out]


def show_list(groups: list[Group], checkpoint: str, style: str) -> None:
    """Print a row for each group, and notes; as csv, deviations have columns of their own and notes go to stderr."""
    header = ["data set", "network", "method", "seeds", "epochs", "precision", "corruptions"]
    header += [part for name in SUMMARY for part in (name, f"{name}_deviation")[: 1 + (style == "csv")]]
    rows, said, alike = [], [], {}
    for group in groups:
        shared, (seeds, cells) = group.shared, cells_of(group, checkpoint)
        row = [shared["dataset"], shared["arch"], method_of(group), " ".join(map(str, seeds)) or NEVER_RUN]
        precision = dict.fromkeys(str(shared[name]) for name in ("amp", "evaluation_amp"))
        row += [str(shared["hparams"].get("epochs", "")), "/".join(precision)]
        numbers = [str(cells.get(metric, NEVER_RUN)) for metric in SUMMARY]
        parts = [part for number in numbers for part in number.partition("±")[::2]] if style == "csv" else numbers
        rows.append([*row, shared["corruption_source"], *parts])
        whom, away = " ".join(row[:3]), departures(group)
        alike.setdefault(whom, []).append(group)
        said += [(away[name], whom) for name in ("subset", "limit", "joint") if name in away]
    notes = as_notes(said, groups)
    notes += [f"rows of {whom} differ in {telling(same)}" for whom, same in alike.items() if len(same) > 1]
    if style == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *sorted(rows)])
        sys.stderr.writelines(f"tables.py: {note}\n" for note in notes)
    else:
        notes.insert(0, f"mean ± population deviation over seeds of {checkpoint}.pt, in percent")
        print(render(style, "Runs", header, sorted(rows), notes, left=7))


# The paper's layout


def layout(number: str, paper: dict, ours: dict[Key, Cell]) -> dict[Place, dict[Key, Cell | None]]:
    """A table row by row, (data set, network, row) -> {key: the published cell}, in the paper's order.

    In Tables 3 and 4 the user's own methods and corruptions follow, as columns and rows without a published cell.
    """
    grid: dict[Place, dict[Key, Cell | None]] = {}
    for name, cells in paper["tables"][number].items():
        dataset, arch, row = name.split("/")
        keys = ((dataset, arch, *((row, entry) if number == "5" else (entry, row))) for entry in cells)
        grid[dataset, arch, row] = dict(zip(keys, (Cell(*cell) for cell in cells.values()), strict=True))
    if number in "34":
        here = [key[2:] for key in ours if key[:2] == (dataset, arch)]
        columns = [key[2] for key in grid[dataset, arch, row]]
        columns += sorted({column for column, _ in here if column not in columns and not column.startswith("magnma ")})
        further = sorted({metric for column, metric in here if column in columns and metric not in SUMMARY})
        for row in dict.fromkeys([place[2] for place in grid] + further):
            old = grid.get((dataset, arch, row), {})
            grid[dataset, arch, row] = {(dataset, arch, c, row): old.get((dataset, arch, c, row)) for c in columns}
    return grid


def table_rows(
    number: str, grid: dict[Place, dict[Key, Cell | None]], ours: dict[Key, Cell], names: Names, swap: Names
) -> tuple[list[str], list[list[str]]]:
    """(header, rows): lines ours, paper and, where ours is of the paper's data set and network, difference."""

    def label(dataset: str, arch: str, row: str) -> list[str]:
        if number in "12":
            return [names[arch], names[dataset] + ("" if row.startswith("clean") else "-C")]
        return [f"({', '.join(row.split()[1:])})" if number == "5" else names[row]]

    first = ["Network", "Test set"] if number in "12" else ["Parameters" if number == "5" else "Corruption"]
    header = [*first, "", *(names[key[3 if number == "5" else 2]] for key in next(iter(grid.values())))]
    rows = []
    for (dataset, arch, row), cells in grid.items():
        pairs = [(ours.get(key), cell) for key, cell in cells.items()]
        moved = (swap[dataset], swap[arch]) != (dataset, arch)
        below = label(dataset, arch, row) if moved and number in "12" else [""] * len(first)
        rows.append([*label(swap[dataset], swap[arch], row), "ours", *(str(a or NEVER_RUN) for a, _ in pairs)])
        if any(cells.values()):
            rows.append([*below, "paper", *(str(b or NEVER_RUN) for _, b in pairs)])
        if any(map(all, pairs)) and not moved:
            away = (f"{round(a.mean, 2) - b.mean + 0.0:+.2f}" if a and b else NEVER_RUN for a, b in pairs)
            rows.append([*below, "difference", *away])
    return header, rows


# What the text claims. A kind of claim gives what the numbers say, and whether it holds (None: they cannot say)

Finding = tuple[str, bool | None]
Versus = tuple[str, str, str, str, str]  # data set, network, metric, column, over: is the column better than the other?


class Look:
    """Means by key, and the places looked at; KeyError for what was not run.

    `smaller`: those of our runs that are not as large as the paper's; None where the numbers are the paper's.
    """

    def __init__(self, cells: dict[Key, Cell], smaller: set[Place] | None):
        self.cells, self.smaller, self.used = cells, smaller, set()

    def __call__(self, *key: str) -> float:
        mean = self.cells[key].mean
        self.used.add(key[:3])
        return mean

    def gain(self, dataset: str, arch: str, metric: str, column: str, over: str) -> float:
        """By how many points `column` is better than `over`: accuracy gained, calibration error lost."""
        points = self(dataset, arch, column, metric) - self(dataset, arch, over, metric)
        return -points if metric.endswith("rmse") else points


def improvement(look: Look, pairs: list[Versus], stated: str) -> Finding:
    """A stated mean gain. The paper's own rounds to it, ours may fall short by SLACK; smaller runs tell its sign."""
    mean = statistics.fmean(look.gain(*pair) for pair in pairs)
    if look.smaller is None:
        return f"{mean:.2f}", abs(mean - float(stated)) <= 0.5 * 10.0 ** -len(stated.split(".")[1]) + 1e-9
    return f"{mean:.2f}", mean >= float(stated) - SLACK or (None if look.smaller & look.used and mean > 0 else False)


def ahead(look: Look, pairs: list[Versus], least: float | None = 0, may_fail: int = 0) -> Finding:
    """All gains but `may_fail` are above 0, or at least `least` (None: minus the larger deviation); small ones told.

    Where some were not run, it can fail already but not hold.
    """
    won, seen, told = 0, 0, []
    for dataset, arch, metric, column, over in pairs:
        with suppress(KeyError):
            gain = look.gain(dataset, arch, metric, column, over)
            a, b = (look.cells[dataset, arch, name, metric] for name in (column, over))
            if least is None and None in (a.deviation, b.deviation):
                return "one seed has no deviation", None
            bar = -max(a.deviation, b.deviation) if least is None else least
            good = gain >= bar - 1e-9 if bar else gain > 0
            won, seen = won + good, seen + 1
            if not good or (least is not None and gain < bar + 0.5):
                told.append(f"{dataset} {arch} {metric} {a.mean:.2f} - {b.mean:.2f} = {a.mean - b.mean + 0.0:+.2f}")
    if not seen:
        raise KeyError
    said = f"{won} of {seen}" + f" ({len(pairs)} wanted)" * (seen < len(pairs))
    return "; ".join([said, *told]), False if seen - won > may_fail else None if seen < len(pairs) else True


def majority(look: Look, dataset: str, own: tuple[str, ...], rivals: tuple[str, ...]) -> Finding:
    """One of `own` alone has the best accuracy, at two decimals, in more than half of the 18 corruptions."""
    first = tied = 0
    for name in CORRUPTIONS:
        a, b = (max(round(look(dataset, "resnet18", c, name), 2) for c in columns) for columns in (own, rivals))
        first, tied = first + (a > b), tied + (a == b)
    return f"alone in {first} of 18, tied in {tied}", first > 9


def insensitive(look: Look, columns: list[str], metric: str) -> Finding:
    """The metric spreads by a point at most within each group of Table 5: noise only, mix only, both."""
    groups: dict[tuple, list[float]] = {}
    for column in columns:
        zeros = tuple(float(number) == 0 for number in column.split()[1:3])
        groups.setdefault(zeros, []).append(look("cifar10", "resnet18", column, metric))
    spreads = [max(values) - min(values) for values in groups.values()]
    return "; ".join(f"{spread:.2f}" for spread in spreads), max(spreads) <= 1


def claims(names: Names) -> list[tuple[str, Callable[[Look], Finding]]]:
    """The claims on Tables 1-4: in words, and as functions of the numbers."""
    found, rmse = [], "corrupt_rmse"
    for dataset, networks, metric, column, over, stated in (
        ("cifar10", 1, "mca", MAGNMA, "standard", "13.6"), ("cifar10", 1, "mca", "augmix", "standard", "11.9"),
        ("cifar10", 1, "mca", NOISE, "standard", "9.3"), ("cifar10", 1, "mca", MIX, "standard", "11.8"),
        ("cifar100", 1, "mca", MAGNMA, "standard", "16.7"), ("cifar100", 1, "mca", MAGNMA, "standard", "13.6"),
        ("cifar100", 1, "mca", NOISE, "standard", "10.8"), ("cifar100", 1, "mca", MIX, "standard", "14.0"),
        ("cifar10", 3, "mca", MAGNMA, "standard", "13.0"), ("cifar100", 3, "mca", MAGNMA, "standard", "16.9"),
        ("cifar10", 3, rmse, MAGNMA, "standard", "15.4"), ("cifar100", 3, rmse, MAGNMA, "standard", "16.2"),
        ("cifar10", 3, rmse, MAGNMA, "augmix", "2.81"), ("cifar100", 3, rmse, MAGNMA, "augmix", "4.73"),
    ):  # fmt: skip
        words = f"{names[metric]} of {names[column]} better than {names[over]}'s by {stated} ({names[dataset]})"
        words = ("Sec. 7.4: " if (dataset, stated) == ("cifar100", "13.6") else "Sec. 4: ") + words
        pairs = list(product([dataset], NETWORKS[:networks], [metric], [column], [over]))
        words += ", mean of 3 networks" * (networks == 3)
        found.append((words, partial(improvement, pairs=pairs, stated=stated)))
    noises = [name for name in CORRUPTIONS if name.endswith("noise")]
    blurs = [name for name in CORRUPTIONS if name.endswith(("blur", "contrast"))]
    for dataset in SETS:
        at = f" ({names[dataset]})"
        for words, own, rivals in (
            ("Sec. 4: MAGNMA best for most corruptions", (MAGNMA,), (*BASELINES, NOISE, MIX)),
            ("Sec. 4: the same, its ablations left out", (MAGNMA,), BASELINES),
            ("Sec. 4: the same, its ablations counted as MAGNMA", (MAGNMA, NOISE, MIX), BASELINES),
        ):
            found.append((words + at, partial(majority, dataset=dataset, own=own, rivals=rivals)))
        for words, least, *kinds in (
            ("Fig. 5, 6: MAGNMA's mCA above every baseline's", 0, (["mca"], MAGNMA, BASELINES)),
            ("Sec. 4: MAGNMA's mCA above either ablation's", 0, (["mca"], MAGNMA, [NOISE, MIX])),
            ("Sec. 4: AugMix ahead within the deviation only", None, (CORRUPTIONS, MAGNMA, ["augmix"])),
            ("Sec. 4: clean accuracy kept, to a point", -1, (["clean"], MAGNMA, ["standard"])),
            ("Sec. 4: AT and TRADES lose more than a point of it", 1, (["clean"], "standard", ["at", "trades"])),
            ("Sec. 4: noise only leads mix only on noise, mix only leads on blur and contrast", 0,
             (noises, NOISE, [MIX]), (blurs, MIX, [NOISE])),
            ("Sec. 4: both improve on Standard there", 0, (noises, NOISE, ["standard"]), (blurs, MIX, ["standard"])),
        ):  # fmt: skip
            pairs = [p for m, column, over in kinds for p in product([dataset], NETWORKS[:1], m, [column], over)]
            found.append((words + at, partial(ahead, pairs=pairs, least=least)))
    for words, metrics, rivals, may_fail in (
        ("Fig. 2: largest mCA for nearly all networks (one may fail)", ["mca"], ["standard", "augmix"], 1),
        ("Fig. 3: smallest calibration error on corrupted sets", [rmse], ["standard", "augmix"], 0),
        ("Table 1: calibration error below Standard's", ["clean_rmse", rmse], ["standard"], 0),
        ("Table 1: calibration error below AugMix's", ["clean_rmse", rmse], ["augmix"], 0),
        ("Table 2: mCA above AugMix's", ["mca"], ["augmix"], 0),
    ):
        pairs = list(product(SETS, NETWORKS, metrics, [MAGNMA], rivals))
        found.append((words, partial(ahead, pairs=pairs, may_fail=may_fail)))
    return found


def judge(claim: Callable[[Look], Finding], look: Look, placed: dict[Place, list[Group]]) -> tuple[str, str]:
    """(what our numbers say, supports | contradicts | cannot say); only runs made and evaluated alike are compared."""
    try:
        said, holds = claim(look)
    except KeyError:
        return "not all run", "cannot say"
    for where in {place[:2] for place in look.used}:
        found = [facts(placed[place][0]) for place in look.used if place[:2] == where]
        for name in [*ORIGIN, *ALL, "train_images", "test_images"]:
            if len({json.dumps(f[name]) for f in found if name in f}) > 1:
                return f"{said} (not run alike: {name})", "cannot say"
    return said, {True: "supports", False: "contradicts", None: "cannot say"}[holds]


def claim_rows(
    paper: dict, ours: dict[Key, Cell], placed: dict[Place, list[Group]], names: Names, swap: Names
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of --claims: the claim, what the paper's own tables say, what our runs say."""
    published = [{k: c for row in layout(n, paper, {}).values() for k, c in row.items()} for n in "12345"]
    theirs, table5 = published[0] | published[1] | published[2] | published[3], published[4]
    columns = list(dict.fromkeys(key[2] for key in table5))
    spreads = [(f"Sec. 7.4: no significant change over Table 5, {names[metric]} (spread: noise; mix; both)",
                partial(insensitive, columns=columns, metric=metric)) for metric in SUMMARY]  # fmt: skip
    smaller = {place for place, groups in placed.items() if departures(groups[0]).keys() - ORIGIN or
               (swap[place[0]], swap[place[1]]) != place[:2]}  # fmt: skip
    rows = []
    for numbers, listed in ((theirs, claims(names)), (table5, spreads)):
        for words, claim in listed:
            said, holds = claim(Look(numbers, None))
            row = [words, said, "holds" if holds else "does not hold"]
            rows.append([*row, *judge(claim, Look(ours, smaller), placed)])
    slips = [f"{names[key[2]]} {names[key[3]]} {theirs[key].mean:.2f} and {cell.mean:.2f}"
             for key, cell in table5.items() if key in theirs and theirs[key] != cell]  # fmt: skip
    row = ["Tables 1, 3 and 5 agree on the same runs", "; ".join(slips), "does not hold" if slips else "holds"]
    return ["Claim", "The paper's tables", "Verdict", "Our runs", "Verdict"], [*rows, [*row, NEVER_RUN, "cannot say"]]


# The command line


def notes_on(placed: dict[Place, list[Group]], names: Names, checkpoint: str) -> list[str]:
    """What must be known beside our numbers in a table: what was really run, and what is not shown."""
    said, further = [], []
    for (dataset, arch, column), (shown, *others) in placed.items():
        whom = names[column] + f" ({names[arch]}, {names[dataset]})" * (len({place[:2] for place in placed}) > 1)
        seeds = len(cells_of(shown, checkpoint)[0])
        said += [(text, whom) for text in departures(shown).values()]
        if seeds < 3:
            said.append((f"{seeds} of the paper's 3 seeds" if seeds else f"{checkpoint}.pt was not evaluated", whom))
        for other in others:
            numbers = " ".join(map(str, other.seeds))
            further.append(f"{whom} was also run with (shown | not shown) {telling([shown, other])}; seeds {numbers}")
    head = f"ours: mean ± population deviation over seeds of {checkpoint}.pt" if placed else "ours: no run yet"
    return [head, *as_notes(said, [groups[0] for groups in placed.values()]), *further]


def render(style: str, title: str, header: list[str], rows: list[list[str]], notes: list[str], left: int) -> str:
    """A table with its title and notes as text, github or latex; the first `left` columns are left-aligned."""
    if style == "github":
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    width = 44 if left == len(header) and style == "text" else None  # prose is broken into lines
    body = tabulate(rows, header, tablefmt="simple" if style == "text" else style, disable_numparse=True,
                    colalign=["left"] * left + ["right"] * (len(header) - left), maxcolwidths=width)  # fmt: skip
    above, before = {"text": ("", "  "), "github": ("### ", "- "), "latex": ("% ", "% ")}[style]
    return "\n".join([above + title, "", body, "", *(before + note for note in notes), ""])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises ValueError naming the flag that is wrong."""
    parser = utils.Parser(description="A list of all runs; the paper's tables from them; what its text claims.")
    flag = parser.add_argument
    flag("runs", nargs="?", help="the folder below which every results.json is read; by default runs")
    flag("--table", choices=("1", "2", "3", "4", "5", "all"), help="in the paper's layout, beside its numbers")
    flag("--claims", action="store_true", help="what the text claims, from the paper's own tables and from our runs")
    flag("--dataset", help="its runs take CIFAR-10's place (in Table 4, CIFAR-100's); in the list, its runs alone")
    flag("--arch", help="its runs take ResNet-18's place; in the list, its runs alone")
    flag("--checkpoint", choices=("best", "last"), default="best", help="which evaluation; the paper's is best")
    flag("--format", choices=("text", "github", "latex"), default="text", help="of the list, tables and claims")
    flag("--csv", action="store_true", help="the list as CSV, to stdout")
    args = parser.parse_args(argv)
    if args.csv and (args.table or args.claims):
        raise ValueError("--csv is for the list of runs, not for --table or --claims")
    args.dataset = args.dataset and Path(args.dataset).name.removesuffix(".npz")
    return args


def show(number: str | None, args: argparse.Namespace, places: dict[Place, list[Group]], paper: dict) -> None:
    """Print Table `number`, or the claims (None)."""
    names, swap = Names(paper["names"]), Names({"resnet18": args.arch} if args.arch else {})
    if args.dataset:
        swap["cifar100" if number == "4" else "cifar10"] = args.dataset
    placed = {(dataset, arch, place[2]): groups for dataset, arch in product(SETS, NETWORKS)
              for place, groups in places.items() if place[:2] == (swap[dataset], swap[arch])}  # fmt: skip
    cells = {(*place, metric): cell for place, groups in placed.items()
             for metric, cell in cells_of(groups[0], args.checkpoint)[1].items()}  # fmt: skip
    moved = [f"{names[ours]} in the place of {names[theirs]}" for theirs, ours in swap.items() if ours != theirs]
    if number:
        grid = layout(number, paper, cells)
        header, rows = table_rows(number, grid, cells, names, swap)
        shown = {key[:3] for row in grid.values() for key in row}
        placed = {place: groups for place, groups in placed.items() if place in shown}
    else:
        header, rows = claim_rows(paper, cells, placed, names, swap)
    title = paper["titles"][number] if number else "What the paper's text claims"
    title += f"; ours: {', '.join(moved)}" if moved else ""
    left = header.index("") + 1 if number else len(header)
    print(render(args.format, title, header, rows, notes_on(placed, names, args.checkpoint), left))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        found, problems = read_results(args.runs or "runs")
    except FileNotFoundError:
        if args.runs or not args.claims:
            raise
        found, problems = {}, []  # the paper's own tables need no run
    groups, paper = group_runs(found), utils.read_json(Path(__file__).with_name("paper") / "tables.json")
    listed = groups
    for flag, name in (("dataset", args.dataset), ("arch", args.arch)):
        there = sorted({group.shared[flag] for group in groups})
        if name and name not in there:
            raise ValueError(f"--{flag} {name}: no such run; there are runs of {', '.join(there) or 'none'}")
        listed = [group for group in listed if name in (None, group.shared[flag])]
    numbers = list(paper["tables"]) if args.table == "all" else [args.table] if args.table else []
    for number in numbers + [None] * args.claims:
        show(number, args, choose(groups, args.checkpoint), paper)
    if listed and not numbers and not args.claims:
        show_list(listed, args.checkpoint, "csv" if args.csv else args.format)
    for problem in problems:
        print(f"tables.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
