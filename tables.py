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

PAPER = utils.read_json(Path(__file__).resolve().parent / "paper" / "tables.json")
SETS, NETWORKS = ("cifar10", "cifar100"), ("resnet18", "densenet121", "inceptionv3")  # the paper's
BASELINES = ("standard", "at", "trades", "rse", "gn", "augmix")
NOISE, MIX, MAGNMA = "magnma 0.2 0 0.2 1", "magnma 0 5 0.2 1", "magnma 0.2 0.3 0.2 1"  # lambda1 lambda2 sigma_max beta
SETTINGS = [row.split("/")[2] for row in PAPER["tables"]["5"]]  # MAGNMA's columns; these three are among them
SUMMARY = ("clean", "mca", "clean_rmse", "corrupt_rmse")
NEVER_RUN = "—"
ANOTHER = "not shown, its seed is there already"

# The paper's recipe as NOTES.md reads it, of all runs and of a method
RECIPE = {
    "data_source": "official", "corruption_source": "official", "amp": "off", "evaluation_amp": "off", "epochs": 150,
    "batch_size": 512, "lr": 0.1, "weight_decay": 5e-4, "eval_every": 5, "subset": None, "limit": None, "joint": False,
}  # fmt: skip
PGD = {"epsilon": 8 / 255, "pgd_steps": 7, "pgd_step_size": 2.5 * (8 / 255) / 7}
OWN = {
    "at": PGD, "trades": PGD | {"trades_lambda": 3}, "rse": {"rse_sigma": 0.1, "rse_samples": 10},
    "gn": {"sigma_max": 0.2}, "augmix": {"jsd_lambda": 12}, "magnma": {"n": 5},
}  # fmt: skip

Place = tuple[str, str, str]  # data set, network, column
Key = tuple[str, str, str, str]  # data set, network, column, metric


class Cell(NamedTuple):
    """A number in percent; its deviation over seeds is the population's (divided by n), None for one seed."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.deviation is None else f"±{self.deviation:.2f}")


def label(key: str) -> str:
    """The paper's name of a data set, network, column or metric, or the key itself."""
    return PAPER["names"].get(key, key)


def published(numbers: str) -> dict[Key, Cell]:
    """The cells of the paper's Tables `numbers`, row by row."""
    cells = {}
    for number in numbers:
        for row, entries in PAPER["tables"][number].items():
            dataset, arch, name = row.split("/")
            for entry, cell in entries.items():
                column, metric = (name, entry) if number == "5" else (entry, name)
                cells[dataset, arch, column, metric] = Cell(*cell)
    return cells


# A group of runs: its numbers, and what was really run


def evaluations(group: Group, checkpoint: str) -> dict[int | None, dict]:
    """Each seed's evaluation of best.pt or last.pt. Weights trained elsewhere have one, which stands for both."""
    found = {seed: run.get("foreign") or run.get(checkpoint) for seed, run in group.seeds.items()}
    return {seed: evaluation for seed, evaluation in found.items() if evaluation}


def cells_of(group: Group, checkpoint: str) -> dict[str, Cell]:
    """Metric -> cell: each corruption's accuracy over its severities, and SUMMARY's."""
    values: dict[str, list[float]] = {}
    for e in evaluations(group, checkpoint).values():
        metrics = {name: statistics.fmean(c["accuracy"] for c in cells) for name, cells in e["corruptions"].items()}
        metrics |= {"clean": e["clean"]["accuracy"], "clean_rmse": e["clean"]["rms_calibration_error"]}
        metrics |= {"mca": e["mca"], "corrupt_rmse": e["corrupt_rms_calibration_error"]}
        for metric, value in metrics.items():
            values.setdefault(metric, []).append(value)
    return {m: Cell(statistics.fmean(v), statistics.pstdev(v) if len(v) > 1 else None) for m, v in values.items()}


def method_of(group: Group) -> str:
    """method[-tag], as in the run's folder; of weights trained elsewhere their file's name."""
    theirs = Path(str(group.shared["hparams"].get("checkpoint"))).name
    return "-".join(filter(None, (group.shared["method"] or theirs, group.shared["tag"])))


def place_of(group: Group) -> Place:
    """Data set, network and column: a baseline's name, one of SETTINGS, or the user's own method[-tag]."""
    shared, column = group.shared, method_of(group)
    if shared["method"] in BASELINES:
        column = shared["method"]
    if shared["method"] == "magnma":
        setting = [shared["hparams"].get(name) for name in ("lambda1", "lambda2", "sigma_max", "beta")]
        column = next((s for s in SETTINGS if [float(number) for number in s.split()[1:]] == setting), column)
    return shared["dataset"], shared["arch"], column


def facts(group: Group) -> dict[str, object]:
    """All that the runs share, hyperparameters among it."""
    shared = dict(group.shared)
    return shared.pop("hparams") | shared | {"limit": next(iter(group.seeds.values()))["limit"]}


def departures(group: Group) -> list[str]:
    """What departs from the paper's recipe, in words."""
    found, said = facts(group), []
    for name, value in (RECIPE | OWN.get(group.shared["method"], {})).items():
        if found.get(name, value) not in (value, None):  # None: unknown, of weights trained elsewhere
            said.append(f"{name} {found[name]}" + (f" (paper: {value})" if value else ""))
    return said


def telling(groups: list[Group]) -> str:
    """The facts in which groups differ, with each one's value in their order; the tag only where nothing else does."""
    found = [facts(group) for group in groups]
    names = [n for n in dict.fromkeys(n for f in found for n in f) if len({json.dumps(f.get(n)) for f in found}) > 1]
    names = [name for name in names if name != "tag"] or names
    return ", ".join(f"{name} {' | '.join(str(f.get(name)) for f in found)}" for name in names)


def choose(groups: list[Group], checkpoint: str) -> dict[Place, list[Group]]:
    """The groups of each place, first the one to show: evaluated, nearest to the paper's recipe, of most seeds."""

    def rank(group: Group) -> tuple[bool, int, int]:
        seeds = len(evaluations(group, checkpoint))
        return seeds == 0, len(departures(group)), -seeds

    places: dict[Place, list[Group]] = {}
    for group in sorted(groups, key=rank):
        places.setdefault(place_of(group), []).append(group)
    return places


# The list of all runs


def show_list(groups: list[Group], checkpoint: str, style: str) -> None:
    """Print a row for each group, and notes; as csv, deviations have columns of their own and notes go to stderr."""
    about = ["data set", "network", "method", "seeds", "epochs", "precision", "images", "corruptions"]
    rows, same_place = [], {}
    for group in groups:
        shared, cells = group.shared, cells_of(group, checkpoint)
        run = [shared["dataset"], shared["arch"], method_of(group)]
        same_place.setdefault(" ".join(run), []).append(group)
        seeds = " ".join(str(seed) for seed in evaluations(group, checkpoint) if seed is not None) or NEVER_RUN
        precision = "/".join(dict.fromkeys(str(shared[name] or NEVER_RUN) for name in ("amp", "evaluation_amp")))
        images = f"{shared['train_images'] or NEVER_RUN}/{shared['test_images']}"
        row = [*run, seeds, str(shared["hparams"].get("epochs", "")), precision, images, shared["corruption_source"]]
        for metric in SUMMARY:
            row += cells.get(metric, ("", "")) if style == "csv" else [str(cells.get(metric, NEVER_RUN))]
        rows.append(row)
    rows.sort(key=lambda row: row[: len(about)])
    notes = [f"rows of {whom} differ in {telling(same)}" for whom, same in same_place.items() if len(same) > 1]
    notes += [f"{ANOTHER}: {path}" for group in groups for path in group.left_out]
    if style == "csv":
        header = [*about, *(part for metric in SUMMARY for part in (metric, f"{metric}_deviation"))]
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
        sys.stderr.writelines(f"tables.py: {note}\n" for note in notes)
    else:
        notes.insert(0, f"mean ± population deviation over seeds of {checkpoint}.pt, in percent; training/test images")
        print(render(style, "Runs", [*about, *SUMMARY], rows, notes, left=len(about)))


# The paper's layout


def table_rows(
    number: str, ours: dict[Key, Cell], swap: dict[str, str]
) -> tuple[list[str], list[list[str]], list[Place]]:
    """(header, lines, places shown): ours, the paper's and, where ours is of its data set and network, the difference.

    In Tables 3 and 4 the user's own methods and corruptions follow, as further columns and rows.
    """
    rows = [tuple(row.split("/")) for row in PAPER["tables"][number]]  # (data set, network, row's name)
    columns = list(next(iter(PAPER["tables"][number].values())))
    if number in "34":  # of one data set and network
        here = [key[2:] for key in ours if key[:2] == rows[0][:2]]
        columns += sorted({column for column, _ in here} - {*columns, *SETTINGS})
        own = {metric for column, metric in here if column in columns} - {*CORRUPTIONS, *SUMMARY}
        rows += [(*rows[0][:2], metric) for metric in sorted(own)]

    def names(dataset: str, arch: str, name: str) -> list[str]:
        if number in "12":
            return [label(arch), label(dataset) + ("" if name.startswith("clean") else "-C")]
        return [f"({', '.join(name.split()[1:])})" if number == "5" else label(name)]

    theirs, lines, places = published(number), [], {}
    for dataset, arch, name in rows:
        keys = [(dataset, arch, *((name, c) if number == "5" else (c, name))) for c in columns]
        places |= dict.fromkeys(key[:3] for key in keys)
        pairs = [(ours.get(key), theirs.get(key)) for key in keys]
        ran = swap.get(dataset, dataset), swap.get(arch, arch)
        first = names(*ran, name)
        below = names(dataset, arch, name) if number in "12" and ran != (dataset, arch) else [""] * len(first)
        lines.append([*first, "ours", *(str(a or NEVER_RUN) for a, _ in pairs)])
        if any(b for _, b in pairs):
            lines.append([*below, "paper", *(str(b or NEVER_RUN) for _, b in pairs)])
        if ran == (dataset, arch) and any(a and b for a, b in pairs):
            away = [f"{round(a.mean, 2) - b.mean:+z.2f}" if a and b else NEVER_RUN for a, b in pairs]
            lines.append([*below, "difference", *away])
    first = ["Network", "Test set"] if number in "12" else ["Parameters" if number == "5" else "Corruption"]
    return [*first, "", *map(label, columns)], lines, list(places)


def notes_on(placed: dict[Place, list[Group]], checkpoint: str) -> list[str]:
    """What must be known beside our numbers in a table: what was really run, and what is not shown."""
    if not placed:
        return ["ours: no run of these data sets and networks yet; --dataset and --arch put others in their place"]
    about, further = {}, []
    for (dataset, arch, column), (shown, *others) in placed.items():
        several = len({place[:2] for place in placed}) > 1
        whom = label(column) + (f" ({label(arch)}, {label(dataset)})" if several else "")
        said, seeds = departures(shown), len(evaluations(shown, checkpoint))
        if shown.shared["method"] is None:
            said.append("trained elsewhere")
        elif seeds < 3:
            said.append(f"{seeds} of the paper's 3 seeds" if seeds else f"{checkpoint}.pt was not evaluated")
        for text in said:
            about.setdefault(text, []).append(whom)
        for other in others:
            numbers = " ".join(str(seed) for seed in other.seeds if seed is not None)
            further.append(f"{whom} was also run with (shown | not shown) {telling([shown, other])}"
                           + (f"; seeds {numbers}" if numbers else ""))  # fmt: skip
    notes = [f"ours: mean ± population deviation over seeds of {checkpoint}.pt"]
    notes += [f"{text}: {'all' if len(whom) == len(placed) else ', '.join(whom)}" for text, whom in about.items()]
    return notes + further + [f"{ANOTHER}: {path}" for shown, *_ in placed.values() for path in shown.left_out]


# What the text claims

SLACK = 1.0  # points that our gain may fall short of a stated one: some three deviations of Table 3's mCA
NOISES = ("impulse_noise", "shot_noise", "speckle_noise")
BLURS = ("contrast", "defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur")

# where it stands, over how many networks the mean is, metric, column, its rival, points stated on CIFAR-10, CIFAR-100
STATED = (
    ("Sec. 4", 1, "mca", MAGNMA, "standard", "13.6", "16.7"),
    ("Sec. 7.4", 1, "mca", MAGNMA, "standard", None, "13.6"),
    ("Sec. 4", 1, "mca", "augmix", "standard", "11.9", None),
    ("Sec. 4", 1, "mca", NOISE, "standard", "9.3", "10.8"),
    ("Sec. 4", 1, "mca", MIX, "standard", "11.8", "14.0"),
    ("Sec. 4", 3, "mca", MAGNMA, "standard", "13.0", "16.9"),
    ("Sec. 4", 3, "corrupt_rmse", MAGNMA, "standard", "15.4", "16.2"),
    ("Sec. 4", 3, "corrupt_rmse", MAGNMA, "augmix", "2.81", "4.73"),
)
# where it stands, claim, columns of which one leads, their rivals
BEST = (
    ("Sec. 4", "MAGNMA best for most corruptions", (MAGNMA,), (*BASELINES, NOISE, MIX)),
    ("Sec. 4", "the same, its ablations left out", (MAGNMA,), BASELINES),
    ("Sec. 4", "the same, its ablations counted as MAGNMA", (MAGNMA, NOISE, MIX), BASELINES),
)
# where it stands, claim, number of networks, metrics, column, its rivals, least lead in points, failures allowed
AHEAD = (
    ("Fig. 5, 6", "MAGNMA's mCA above every baseline's", 1, ["mca"], MAGNMA, BASELINES, 0, 0),
    ("Sec. 4", "MAGNMA's mCA above either ablation's", 1, ["mca"], MAGNMA, (NOISE, MIX), 0, 0),
    ("Sec. 4", "MAGNMA keeps clean accuracy, to a point", 1, ["clean"], MAGNMA, ["standard"], -1, 0),
    ("Sec. 4", "AT and TRADES lose more than a point of it", 1, ["clean"], "standard", ["at", "trades"], 1, 0),
    ("Sec. 4", "noise only improves on Standard on noise", 1, NOISES, NOISE, ["standard"], 0, 0),
    ("Sec. 4", "mix only improves on Standard on blur and contrast", 1, BLURS, MIX, ["standard"], 0, 0),
    ("Sec. 4", "noise only leads mix only on noise", 1, NOISES, NOISE, [MIX], 0, 0),
    ("Sec. 4", "mix only leads noise only on blur and contrast", 1, BLURS, MIX, [NOISE], 0, 0),
    ("Fig. 2", "largest mCA, but for one at most", 3, ["mca"], MAGNMA, ["standard", "augmix"], 0, 1),
    ("Fig. 3", "smallest Corrupt RMSE", 3, ["corrupt_rmse"], MAGNMA, ["standard", "augmix"], 0, 0),
    ("Table 1", "RMSE below Standard's", 3, ["clean_rmse", "corrupt_rmse"], MAGNMA, ["standard"], 0, 0),
    ("Table 1", "RMSE below AugMix's", 3, ["clean_rmse", "corrupt_rmse"], MAGNMA, ["augmix"], 0, 0),
    ("Table 2", "mCA above AugMix's by 0.5 (a moderate gain)", 3, ["mca"], MAGNMA, ["augmix"], 0.5, 0),
)

Cells = dict[Key, Cell]
Finding = tuple[str, str]  # what the numbers say; holds, in part, does not hold or cannot say


def gain(cells: Cells, dataset: str, arch: str, metric: str, column: str, over: str) -> float:
    """By how many points `column` is better than `over`: accuracy gained, calibration error lost.

    Raises KeyError for what was not run, as all below do.
    """
    points = cells[dataset, arch, column, metric].mean - cells[dataset, arch, over, metric].mean
    return -points if metric.endswith("rmse") else points


def stated_gain(
    dataset: str, networks: int, metric: str, column: str, over: str, stated: str, exact: bool, cells: Cells
) -> Finding:
    """The mean gain rounds to the stated one (exact), or falls short of it by SLACK at most; in part: is above 0."""
    mean = statistics.fmean(gain(cells, dataset, arch, metric, column, over) for arch in NETWORKS[:networks])
    if exact:
        half = 0.5 * 10.0 ** -len(stated.split(".")[1])
        return f"{mean:.2f}", "holds" if abs(mean - float(stated)) <= half + 1e-9 else "does not hold"
    return f"{mean:.2f}", "holds" if mean >= float(stated) - SLACK else "in part" if mean > 0 else "does not hold"


def leads_most(dataset: str, own: tuple[str, ...], rivals: tuple[str, ...], cells: Cells) -> Finding:
    """One of `own` alone has the best accuracy, at two decimals, in more than half of the 18 corruptions."""
    alone = tied = 0
    for name in CORRUPTIONS:
        means = {column: round(cells[dataset, "resnet18", column, name].mean, 2) for column in (*own, *rivals)}
        lead = max(means[column] for column in own) - max(means[column] for column in rivals)
        alone, tied = alone + (lead > 0), tied + (lead == 0)
    return f"alone in {alone} of 18, tied in {tied}", "holds" if alone > 9 else "does not hold"


def ahead(
    dataset: str, networks: int, metrics: tuple[str, ...], column: str, rivals: tuple[str, ...], least: float,
    may_fail: int, cells: Cells,
) -> Finding:  # fmt: skip
    """`column` is better than all rivals by more than `least` points, in all metrics on all networks, but `may_fail`.

    Those that fail are named. Where some were not run, it can already fail but not hold.
    """
    wanted, gains = list(product(NETWORKS[:networks], metrics, rivals)), {}
    for arch, metric, over in wanted:
        with suppress(KeyError):
            gains[arch, metric, over] = gain(cells, dataset, arch, metric, column, over)
    if not gains:
        raise KeyError
    failed = [f"{label(metric)} over {label(over)} {points:+.2f}" + (f" ({label(arch)})" if networks > 1 else "")
              for (arch, metric, over), points in gains.items() if points <= least]  # fmt: skip
    said = "; ".join([f"{len(gains) - len(failed)} of {len(gains)}", *failed])
    if len(failed) > may_fail:
        return said, "does not hold"
    missing = len(wanted) - len(gains)
    return (f"{said}; {missing} not run", "cannot say") if missing else (said, "holds")


def within_deviation(dataset: str, cells: Cells) -> Finding:
    """Where AugMix is ahead of MAGNMA on a corruption, it is so by no more than the larger deviation of the two."""
    beyond = []
    for name in CORRUPTIONS:
        theirs, ours = (cells[dataset, "resnet18", column, name] for column in ("augmix", MAGNMA))
        if theirs.deviation is None or ours.deviation is None:
            return "one seed has no deviation", "cannot say"
        lead = theirs.mean - ours.mean
        if lead > max(theirs.deviation, ours.deviation) + 1e-9:
            beyond.append(f"{label(name)} {lead:+.2f}")
    return "; ".join([f"{18 - len(beyond)} of 18", *beyond]), "does not hold" if beyond else "holds"


def insensitive(metric: str, cells: Cells) -> Finding:
    """The metric spreads by a point at most within each group of Table 5: noise only, mix only, both."""
    groups: dict[tuple[bool, bool], list[float]] = {}
    for setting in SETTINGS:
        _, lambda1, lambda2, *_ = setting.split()
        mean = cells["cifar10", "resnet18", setting, metric].mean
        groups.setdefault((lambda1 == "0", lambda2 == "0"), []).append(mean)
    spreads = [max(values) - min(values) for values in groups.values()]
    return "; ".join(f"{s:.2f}" for s in spreads), "holds" if max(spreads) <= 1 else "does not hold"


def claims(exact: bool) -> list[tuple[str, str, Callable[[Cells], Finding]]]:
    """(where it stands in the paper, the claim in words, its check); exact where the numbers are the paper's own."""
    found = []
    for k, dataset in enumerate(SETS):
        of = f"{label(dataset)}: "
        for where, networks, metric, column, over, *points in STATED:
            words = f"{label(metric)} of {label(column)} better than {label(over)}'s by {points[k]}"
            words += ", mean of 3 networks" if networks == 3 else ""
            check = partial(stated_gain, dataset, networks, metric, column, over, points[k], exact)
            found += [(where, of + words, check)] if points[k] else []
        found += [(where, of + words, partial(leads_most, dataset, *how)) for where, words, *how in BEST]
        found.append(("Sec. 4", of + "AugMix ahead within the deviation only", partial(within_deviation, dataset)))
        found += [(where, of + words, partial(ahead, dataset, *how)) for where, words, *how in AHEAD]
    for metric in SUMMARY:
        words = f"Table 5: {label(metric)} does not change significantly (spread: noise; mix; both)"
        found.append(("Sec. 7.4", words, partial(insensitive, metric)))
    return found


def claim_rows(ours: Cells) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of --claims: the claim, what the paper's own tables say, what our runs say."""
    theirs, table5, rows = published("1234"), published("5"), []
    for (where, words, check), (_, _, check_ours) in zip(claims(exact=True), claims(exact=False), strict=True):
        row = [where, words, *check(table5 if "Table 5" in words else theirs)]
        try:
            said, verdict = check_ours(ours)
        except KeyError:
            said, verdict = "not all run", "cannot say"
        rows.append([*row, said, {"holds": "supports", "does not hold": "contradicts"}.get(verdict, verdict)])
    slips = [f"{label(key[2])} {label(key[3])} {theirs[key].mean:.2f} and {cell.mean:.2f}"
             for key, cell in table5.items() if key in theirs and theirs[key] != cell]  # fmt: skip
    agree = ["Tables", "1, 3 and 5 agree on the same runs", "; ".join(slips), "does not hold" if slips else "holds"]
    return ["Where", "Claim", "The paper's tables", "Verdict", "Our runs", "Verdict"], [*rows, [*agree, NEVER_RUN, ""]]


def comparable(placed: dict[Place, list[Group]]) -> tuple[dict[Place, list[Group]], list[str]]:
    """The places whose runs were made and evaluated as MAGNMA's (else the first there); a line for each other place."""
    kept, notes, first = {}, [], {}
    for place, groups in sorted(placed.items(), key=lambda item: item[0][2] != MAGNMA):
        found = facts(groups[0])
        wanted = first.setdefault(place[:2], found)
        both = found.keys() & wanted.keys()
        away = [name for name in (*RECIPE, "train_images", "processes") if name in both and found[name] != wanted[name]]
        if away:
            notes.append(f"not compared, since run otherwise ({', '.join(away)}): {', '.join(map(label, place))}")
        else:
            kept[place] = groups
    return kept, notes


# The command line


def render(style: str, title: str, header: list[str], rows: list[list[str]], notes: list[str], left: int) -> str:
    """A table with its title and notes as text, github or latex; the first `left` columns are left-aligned."""
    width = 40 if left == len(header) and style == "text" else None  # prose is broken into lines
    body = tabulate(rows, header, tablefmt="simple" if style == "text" else style, disable_numparse=True,
                    colalign=["left"] * left + ["right"] * (len(header) - left), maxcolwidths=width)  # fmt: skip
    above, before = {"text": ("", "  "), "github": ("### ", "- "), "latex": ("% ", "% ")}[style]
    return "\n".join([above + title, "", body, "", *(before + note for note in notes), ""])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises ValueError naming the flag that is wrong."""
    parser = utils.Parser(description="A list of all runs; the paper's tables from them; what its text claims.")
    flag = parser.add_argument
    flag("runs", nargs="?", help="the folder below which every results.json is read; by default runs")
    flag("--table", choices=(*PAPER["tables"], "all"), help="in the paper's layout, beside its numbers")
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


def show(number: str | None, args: argparse.Namespace, places: dict[Place, list[Group]]) -> None:
    """Print Table `number`, or the claims (None)."""
    swap = {"cifar100" if number == "4" else "cifar10": args.dataset, "resnet18": args.arch}
    swap = {theirs: ours for theirs, ours in swap.items() if ours not in (None, theirs)}
    placed, notes = {}, []
    for dataset, arch in product(SETS, NETWORKS):
        ran = swap.get(dataset, dataset), swap.get(arch, arch)
        placed |= {(dataset, arch, place[2]): groups for place, groups in places.items() if place[:2] == ran}
    if number is None:
        placed, notes = comparable(placed)
    cells = {}
    for place, groups in placed.items():
        cells |= {(*place, metric): cell for metric, cell in cells_of(groups[0], args.checkpoint).items()}
    if number:
        title = PAPER["titles"][number]
        header, rows, shown = table_rows(number, cells, swap)
        placed = {place: placed[place] for place in shown if place in placed}
        left = header.index("") + 1
    else:
        title = "What the paper's text claims"
        header, rows = claim_rows(cells)
        left = len(header)
    moved = ", ".join(f"{label(ours)} in the place of {label(theirs)}" for theirs, ours in swap.items())
    title += f"; ours: {moved}" if moved else ""
    print(render(args.format, title, header, rows, notes_on(placed, args.checkpoint) + notes, left))


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        found, problems = read_results(args.runs or "runs")
    except FileNotFoundError:
        if args.runs or not args.claims:
            raise
        found, problems = {}, []  # the paper's own tables need no run
    groups = listed = group_runs(found)
    for flag, name in (("dataset", args.dataset), ("arch", args.arch)):
        there = sorted({group.shared[flag] for group in groups})
        if name and name not in there:
            raise ValueError(f"--{flag} {name}: no such run; there are runs of {', '.join(there) or 'none'}")
        listed = [group for group in listed if name in (None, group.shared[flag])]
    if found and not listed:
        raise ValueError(f"no run is of both --dataset {args.dataset} and --arch {args.arch}")
    numbers = list(PAPER["tables"]) if args.table == "all" else [args.table] if args.table else []
    for number in numbers + [None] * args.claims:
        show(number, args, choose(groups, args.checkpoint))
    if listed and not numbers and not args.claims:
        show_list(listed, args.checkpoint, "csv" if args.csv else args.format)
    for problem in problems:
        print(f"tables.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
