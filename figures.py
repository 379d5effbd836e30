"""Figures 1-8 of the paper, accuracy by severity, reliability and training curves, as PNG files.

    python figures.py runs                                     # into figures/
    python figures.py runs --dataset digits --arch resnet20    # smaller runs in their place
    python figures.py --source paper --out published           # as published; needs no runs

Figures 1 and 4 show a photograph and what augment.py and corruptions.py make of it. Colours are
Okabe and Ito's, which colour-blind people can tell apart; hatches and markers are for greyscale
print.
"""

import csv
import itertools
import os
import sys
import textwrap
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"  # a notebook's terminal names a backend that may not be installed

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

import augment
import tables
import utils
from corruptions import corrupt
from data import CORRUPTIONS, dataset_name
from tables import MAGNMA, MIX, NINE, NOISE, SETTINGS, Cell, Group, Place, evaluations, label
from utils import UserError

STYLES = {  # the tables' columns: colour, hatch, marker
    "standard": ("#999999", "", "o"), "at": ("#F0E442", "//", "v"),
    "trades": ("#E69F00", "\\\\", "^"), "rse": ("#CC79A7", "..", "<"), "gn": ("#56B4E9", "xx", ">"),
    "augmix": ("#0072B2", "//", "s"), NOISE: ("#009E73", "||", "P"), MIX: ("#000000", "", "X"),
    MAGNMA: ("#D55E00", "", "D"), MIX + NINE: ("#882255", "..", "p"),
    MAGNMA + NINE: ("#332288", "--", "d"),
}  # fmt: skip
OTHERS = [  # the user's own methods
    ("C4", "", "*"), ("C3", "++", "h"), ("C5", "", "8"), ("C8", "oo", "H"), ("C2", "", "d"),
]  # fmt: skip
# where all would be too many: these, and the user's own methods
FEW = ("standard", "augmix", MAGNMA, MAGNMA + NINE)
METRICS = {"clean": ("#FFFFFF", "//", "o"), "mca": ("#0072B2", "", "s")}
CATEGORIES = {  # as the benchmark's authors sort them
    "noise": ("impulse_noise", "shot_noise", "speckle_noise"),
    "blur": ("defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("brightness", "fog", "frost", "snow", "spatter"),
    "digital": ("contrast", "elastic_transform", "jpeg_compression", "pixelate", "saturate"),
}
LOOK = {
    "font.size": 8, "axes.titlesize": 9, "mathtext.fontset": "cm", "hatch.linewidth": 0.4,
    "axes.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.3, "grid.color": "#CCCCCC",
    "lines.linewidth": 1, "legend.frameon": False, "legend.columnspacing": 1,
    "legend.handletextpad": 0.4, "legend.handlelength": 1.5,
}  # fmt: skip
MARKER = {"markersize": 4, "markeredgecolor": "black", "markeredgewidth": 0.4}
N, SIGMA_MAX, BETA = 5, 0.2, 1.0  # of Figure 1, as in the paper
NOISE_SEED, MIX_SEED = 21755, 14922  # chosen so that weak and strong noise and all of A appear
SEVERITY = 5  # of Figure 4

Cells = dict[str, Cell]  # metric -> mean and deviation over seeds, percent
Styles = dict[str, tuple[str, str, str]]


# The numbers to draw


def published_numbers() -> dict[Place, Cells]:
    """The numbers of the paper's Tables 1-4."""
    numbers: dict[Place, Cells] = {}
    for (*place, metric), cell in tables.published("1234").items():
        numbers.setdefault(tuple(place), {})[metric] = cell
    return numbers


def groups_to_draw(groups: list[Group]) -> dict[Place, Group]:
    """The runs that tables.py shows for each data set, network and column, named if not drawn."""
    drawn = {}
    for place, (shown, *others) in tables.closest_to_paper(groups, "best").items():
        name, column = ", ".join(map(label, place)), place[2]
        if not evaluations(shown, "best"):
            print(f"{name}: not drawn, best.pt was not evaluated")
        elif column.removesuffix(NINE) in SETTINGS and column not in STYLES:
            print(f"{name}: not drawn, this is a row of Table 5 only")
        else:
            drawn[place] = shown
            for other in others:
                different = tables.describe_differences([shown, other])
                print(f"{name}, further runs (drawn | not drawn): {different}")
    return drawn


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of log.csv, NaN in empty cells. Raises UserError if it cannot be read."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        names = ("epoch", "train_loss", "test_accuracy")
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error!r}), its curve is left out") from None


def footer(groups: dict[Place, Group]) -> str:
    """What was run: one line for all columns that share data, corruptions, network and seeds."""
    lines: dict[str, list[str]] = {}
    for (dataset, arch, column), group in groups.items():
        shared, run = group.shared, next(iter(group.seeds.values()))
        tested = run["evaluation"]["test_images"]
        seeds = ", ".join(map(str, sorted(evaluations(group, "best"))))
        line = (
            f"{label(dataset)} ({run['ran']['data_source']}, {tested} test images),"
            f" {shared['corruption_source']} corruptions, {label(arch)},"
            f" {shared['train_images']} training images, {shared['epochs']} epochs, seeds {seeds}"
        )
        n = f" (n = {shared.get('n')})" if shared["method"] == "magnma" else ""
        lines.setdefault(line, []).append(label(column) + n)
    return "\n".join(f"{line}: {'; '.join(columns)}" for line, columns in lines.items())


def columns_of(keys: dict[Place, object]) -> Styles:
    """The columns in the tables' order, the user's own after them, each with its style."""
    found = {column for _, _, column in keys}
    others = zip(sorted(found - set(STYLES)), itertools.cycle(OTHERS), strict=False)
    return {column: style for column, style in STYLES.items() if column in found} | dict(others)


def pick(values: dict, datasets: list[str], arches: list[str], few: bool = False) -> dict:
    """The values of these data sets and networks, ordered; few: without other baselines."""
    columns = columns_of(values)
    if few:
        columns = [column for column in columns if column in FEW or column not in STYLES]
    keys = itertools.product(datasets, arches, columns)
    return {key: values[key] for key in keys if key in values}


# Figures of numbers


def by_network(numbers: dict[Place, Cells], metric: str, ylabel: str) -> Figure:
    """Figure 2 (metric mca) or 3 (corrupt_rmse): bars by network, a panel for each data set."""
    panels = {}
    for dataset in dict.fromkeys(dataset for dataset, _, _ in numbers):
        here = {key: cells[metric] for key, cells in numbers.items() if key[0] == dataset}
        arches = list(dict.fromkeys(arch for _, arch, _ in here))
        series = {c: [here.get((dataset, a, c)) for a in arches] for c in columns_of(here)}
        panels[f"{label(dataset)}-C"] = arches, series
    return bars(panels, columns_of(numbers), ylabel, 3.2)


def by_method(numbers: dict[Place, Cells]) -> Figure:
    """Figure 5 or 6: clean accuracy and mCA of each method, on one data set and network."""
    (dataset, arch, _), columns = next(iter(numbers)), list(columns_of(numbers))
    series = {
        metric: [numbers[dataset, arch, column][metric] for column in columns] for metric in METRICS
    }
    title = f"{label(dataset)} and {label(dataset)}-C, {label(arch)}"
    return bars({title: (columns, series)}, METRICS, "accuracy (%)", max(3.5, 0.75 * len(columns)))


def bars(panels: dict[str, tuple], styles: Styles, ylabel: str, width: float) -> Figure:
    """Grouped bars from zero, with deviations. A panel, at least `width` inches wide, is
    (names of its groups, {key of a series: a cell or None for each group})."""
    width = max(width, *(0.27 * len(groups) * len(series) for groups, series in panels.values()))
    figure = Figure(figsize=(max(4.8, 0.6 + width * len(panels)), 2.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, (groups, series)) in zip(axes, panels.items(), strict=True):
        step = 0.84 / len(series)
        for i, (key, cells) in enumerate(series.items()):
            offset = (i - (len(series) - 1) / 2) * step
            found = [(k + offset, *cell) for k, cell in enumerate(cells) if cell]
            x, means, deviations = np.array(found, dtype=float).T  # NaN: no deviation, no error bar
            look = {"color": styles[key][0], "hatch": styles[key][1], "edgecolor": "black"}
            error = {"yerr": deviations, "error_kw": {"elinewidth": 0.7, "capsize": 1.5}}
            ax.bar(x, means, step, label=label(key), linewidth=0.5, **look, **error)
            for at, mean, top in zip(x, means, means + np.nan_to_num(deviations), strict=True):
                place = {"xytext": (0, 1.5), "textcoords": "offset points", "ha": "center"}
                ax.annotate(f"{mean:.1f}", (at, top), fontsize=6, **place)
        ax.set_xticks(range(len(groups)), [label(group).replace(" ", "\n") for group in groups])
        ax.tick_params(axis="x", length=0)
        ax.grid(visible=False, axis="x")
        ax.margins(y=0.1)
        ax.set(title=title, ylabel=ylabel)
    return figure


def by_corruption(numbers: dict[Place, Cells]) -> Figure:
    """Figure 7 or 8: accuracy by corruption and each category's mean, on one data set, network."""
    (dataset, arch, _), columns = next(iter(numbers)), columns_of(numbers)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    widths = [len(group) + 1 for group in CATEGORIES.values()]
    axes = figure.subplots(1, 4, sharey=True, width_ratios=widths)
    for ax, (category, group) in zip(axes, CATEGORIES.items(), strict=True):
        for i, (column, (colour, _, marker)) in enumerate(columns.items()):
            means = [numbers[dataset, arch, column][name].mean for name in group]
            offset = (i - (len(columns) - 1) / 2) * 0.76 / max(len(columns), 4)  # side by side
            x = np.arange(len(group) + 1) + offset
            look = {"color": colour, "label": label(column), **MARKER}
            ax.plot(x, [*means, np.mean(means)], marker, **look)
        ax.axvspan(len(group) - 0.5, len(group) + 0.6, color="#EEEEEE", zorder=0)
        names = [*map(label, group), "mean"]
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        ax.set(xlim=(-0.6, len(group) + 0.6), title=category)
    axes[0].set_ylabel(f"{label(dataset)}-C, {label(arch)}\naccuracy (%)")
    return figure


def by_severity(groups: dict[Place, Group]) -> Figure:
    """Accuracy by severity (0: clean), with a band of one deviation over seeds: the mean over all
    corruptions, and over those of each category."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    panels = {"all 18": CORRUPTIONS} | CATEGORIES
    for ax, (title, names) in zip(figure.subplots(1, 5, sharey=True), panels.items(), strict=True):
        for (_, _, column), group in groups.items():
            curves = []
            for e in evaluations(group, "best").values():
                cells = [[cell["accuracy"] for cell in e["corruptions"][name]] for name in names]
                curves.append([e["clean"]["accuracy"], *np.mean(cells, axis=0)])
            colour, _, marker = columns_of(groups)[column]
            y, deviation = np.mean(curves, axis=0), np.std(curves, axis=0)
            ax.plot(y, f"{marker}-", color=colour, label=label(column), **MARKER)
            band = y - deviation, y + deviation
            ax.fill_between(range(len(y)), *band, color=colour, alpha=0.2, linewidth=0)
        ax.set_xticks(range(6))
        ax.set(title=title, xlabel="severity")
    dataset, arch, _ = next(iter(groups))
    figure.axes[0].set_ylabel(f"{label(dataset)}-C, {label(arch)}\naccuracy (%)")
    return figure


def reliability(groups: dict[Place, Group]) -> Figure:
    """Accuracy by mean confidence of each calibration bin, and the bin's share, over all seeds."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    columns = figure.subplots(2, 2, height_ratios=[3, 1]).T
    for (ax, share), kind in zip(columns, ("clean", "corrupt"), strict=True):
        ax.plot([0, 1], [0, 1], ":", color="black")
        for (dataset, arch, column), group in groups.items():
            found = [e["reliability"][kind] for e in evaluations(group, "best").values()]
            bins = np.sum(found, axis=0)
            count, confidence, correct = bins[bins[:, 0] > 0].T
            colour, _, marker = columns_of(groups)[column]
            look = {"color": colour, "label": label(column), **MARKER}
            ax.plot(confidence / count, correct / count, f"{marker}-", **look)
            share.plot(confidence / count, 100 * count / count.sum(), f"{marker}-", **look)
            ax.set_title(f"{label(dataset)}{'-C' * (kind == 'corrupt')}, {label(arch)}")
        ax.set(xlim=(0, 1.02), ylim=(0, 1.02), ylabel="accuracy")
        share.set(xlim=(0, 1.02), yscale="log", ylim=(0.001, 200), xlabel="confidence")
        share.set_ylabel("predictions (%)")
        share.set_yticks((0.01, 1, 100), ("0.01", "1", "100"))
    return figure


def training(groups: dict[Place, Group]) -> Figure:
    """Training loss and clean test accuracy by epoch: a line for each run that has a log."""
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    names = {
        "train_loss": "training loss\n(each method's own criterion)",
        "test_accuracy": "clean test accuracy (%)",
    }
    for ax, (metric, name) in zip(figure.subplots(1, 2), names.items(), strict=True):
        for (dataset, arch, column), group in groups.items():
            colour, _, marker = columns_of(groups)[column]
            style = f"{marker}-" if metric == "test_accuracy" else "-"
            for log in (run["log"] for run in group.seeds.values() if "log" in run):
                known = ~np.isnan(log[metric])
                look = {"color": colour, "label": label(column), "markersize": 3}
                ax.plot(log["epoch"][known], log[metric][known], style, **look)
            ax.set_title(f"{label(dataset)}, {label(arch)}")
        ax.set(xlabel="epoch", ylabel=name)
        ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


# Figures of images


def photograph() -> Tensor:
    """scikit-learn's colour photograph of a flower, cropped and scaled, uint8 (1, 3, 32, 32)."""
    image = Image.fromarray(load_sample_image("flower.jpg")).crop((156, 66, 456, 366))
    pixels = np.array(image.resize((32, 32), Image.Resampling.BOX))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def picture(ax: Axes, image: np.ndarray, title: str, below: bool = False) -> None:
    """An image (32, 32, 3) with its title above or below."""
    ax.imshow(image)
    ax.set_title(title, fontsize=7.5, **({"y": 0, "pad": -3, "va": "top"} if below else {}))
    ax.set_axis_off()


def branches(u8: Tensor) -> Figure:
    """Figure 1: an image, uint8 (1, 3, 32, 32), with N noisy and N mixed copies (Algorithm 1).

    augment's own functions make the copies; what they drew is drawn again from the same seed.
    """
    x = u8.expand(N, -1, -1, -1) / 255
    utils.seed(NOISE_SEED)
    noisy = augment.gaussian_noise(x, SIGMA_MAX)
    utils.seed(NOISE_SEED)
    sigma = SIGMA_MAX * torch.rand(N, 1, 1, 1).flatten()
    utils.seed(MIX_SEED)
    mixed = augment.mixed_augmentation(x, BETA)
    utils.seed(MIX_SEED)
    mixes = []
    for a, v, w in zip(*augment.draw_mixed(N, BETA), strict=True):
        name = augment.A[a]
        level = f"level {v:.1f}" if name in ("posterize", "solarize") else "no level"
        mixes.append(f"{name}\n{level}, $w$ = {w:.2f}")

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 4), wspace=0.02)
    picture(left.subplots(), x[0].permute(1, 2, 0).numpy(), "clean image $x$", below=True)
    top, bottom = right.subfigures(2, 1, hspace=0.03, height_ratios=(1, 1.08))
    top.set_facecolor("#FDF0E6")
    noise = rf"$x + \delta,\ \ \delta \sim N(0, \sigma^2 I),\ \ \sigma \sim U(0, {SIGMA_MAX:g})$"
    top.suptitle(f"{N} noisy copies  {noise}", color="#D55E00", fontsize=10)
    bottom.set_facecolor("#E8F2F9")
    draws = rf"a \sim U(A),\ \ w \sim \mathrm{{Beta}}({BETA:g}, {BETA:g})"
    mixture = rf"$w\,x + (1 - w)\,T_a(x),\ \ {draws}$"
    bottom.suptitle(f"{N} mixed copies  {mixture}", color="#0072B2", fontsize=10)
    noises = [rf"$\sigma$ = {s:.2f}" for s in sigma]
    for part, copies, titles in ((top, noisy, noises), (bottom, mixed, mixes)):
        images = copies.clamp(0, 1).permute(0, 2, 3, 1).numpy()
        for ax, image, title in zip(part.subplots(1, N), images, titles, strict=True):
            picture(ax, image, title, below=True)
    return figure


def gallery(u8: Tensor) -> Figure:
    """Figure 4: an image, uint8 (1, 3, 32, 32), and its corruptions; frost if it is installed."""
    pictures = {"clean": u8.permute(0, 2, 3, 1).numpy()}
    for name in CORRUPTIONS:
        try:
            pictures[name] = corrupt(pictures["clean"], name, SEVERITY, seed=0)
        except UserError as error:
            print(f"figure4 is without {name}: {error}", file=sys.stderr)
    figure = Figure(figsize=(8, 3.9), layout="constrained")
    grid = figure.add_gridspec(3, 8)
    places = [grid[:, :2], *(grid[row, column] for row in range(3) for column in range(2, 8))]
    for place, (name, images) in zip(places, pictures.items(), strict=False):
        picture(figure.add_subplot(place), images[0], label(name))
    figure.suptitle(f"corruptions at severity {SEVERITY}", fontsize=10)
    return figure


# The command line


def save(figure: Figure, path: Path, note: str) -> None:
    """Write a figure. One with labels has its legend above and the note below."""
    entries = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        width = figure.get_figwidth()
        fitting = int(width / (0.34 + 0.062 * max(map(len, entries))))
        columns = min(len(entries), max(1, fitting))
        figure.legend(entries.values(), entries, loc="outside upper center", ncols=columns)
        lines = [part for line in note.split("\n") for part in textwrap.wrap(line, int(21 * width))]
        figure.supxlabel("\n".join(lines), fontsize=6, color="#555555")
    with utils.atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=200)
    print(path)


def main(argv: list[str] | None = None) -> int:
    """Draw all figures that there are numbers for. Exit code 1 if something had to be left out."""
    parser = utils.Parser(description="The paper's figures from our runs, and four more.")
    flag = parser.add_argument
    flag("runs", nargs="?", help="the folder of the runs; by default runs")
    flag("--source", choices=("runs", "paper"), default="runs", help="our numbers or the paper's")
    flag("--dataset", default="cifar10", help="the data set in place of CIFAR-10")
    flag("--arch", default="resnet18", help="the network in place of ResNet-18")
    flag("--out", default="figures", help="the folder for the figures")
    flag("--pdf", action="store_true", help="write PDF files too")
    args = parser.parse_args(argv)
    ours, out = args.source == "runs", Path(args.out)
    if args.runs and not ours:
        parser.error("--source paper takes no folder of runs")
    utils.make_folder(out)

    runs, problems = tables.read_results(args.runs or "runs") if ours else ({}, [])
    for path, run in runs.items():
        try:
            run["log"] = read_log(path.with_name("log.csv"))
        except UserError as error:
            problems.append(str(error))
    groups = groups_to_draw(tables.group_runs(runs))
    logged = {p: g for p, g in groups.items() if any("log" in run for run in g.seeds.values())}
    numbers = {place: tables.cells_of(group, "best") for place, group in groups.items()}
    if not ours:
        numbers = published_numbers()

    datasets = list(dict.fromkeys([dataset_name(args.dataset), "cifar100"]))
    arches = [args.arch]
    three = pick(numbers, datasets, [*arches, "densenet121", "inceptionv3"], few=True)
    better = "RMS calibration error (%)\n(lower is better)"
    plan = {  # name: what it shows by place (None: needs no numbers), and its function
        "figure1": (None, lambda _: branches(photograph())),
        "figure4": (None, lambda _: gallery(photograph())),
        "figure2": (three, lambda few: by_network(few, "mca", "mCA (%)")),
        "figure3": (three, lambda few: by_network(few, "corrupt_rmse", better)),
    }
    for k, dataset in enumerate(datasets):
        here = [dataset], arches
        plan[f"figure{5 + k}"] = pick(numbers, *here), by_method
        plan[f"figure{7 + k}"] = pick(numbers, *here), by_corruption
        plan[f"severity_{dataset}"] = pick(groups, *here, few=True), by_severity
        plan[f"reliability_{dataset}"] = pick(groups, *here, few=True), reliability
        plan[f"training_{dataset}"] = pick(logged, *here), training
    for name, (shown, draw) in sorted(plan.items()):
        if shown == {}:
            hint = "no such runs; --dataset and --arch choose others" if ours else "not published"
            print(f"{name} is not drawn: {hint}")
            continue
        note = footer({place: groups[place] for place in shown or {} if place in groups})
        if not ours:
            note = f"Published numbers: {tables.PAPER['source']}"
        try:
            for suffix in ("png", "pdf") if args.pdf else ("png",):
                with matplotlib.rc_context(LOOK):
                    save(draw(shown), out / f"{name}.{suffix}", note)
        except UserError as error:
            problems.append(f"{name} is not drawn: {error}")
    for problem in problems:
        print(f"figures.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
