"""Figures 1-8 of the paper, reliability diagrams and training curves, as PNG files.

    python figures.py runs/                                     # what the runs below runs/ give, into figures/
    python figures.py runs/ --dataset digits --arch resnet20    # smaller runs in the place of CIFAR-10, ResNet-18
    python figures.py --source paper --out published/           # Figures 2, 3, 5-8 from the published numbers

Figures 1 and 4 need no run: they show a digit, and what augment.py and corruptions.py make of it. Colours are Okabe
and Ito's, which colour-blind people can tell apart; hatches and markers are for print in grey.
"""

import itertools
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import augment
import tables
import utils
from corruptions import corrupt
from data import CORRUPTIONS, load_dataset
from evaluate import Group, group_runs, read_results
from tables import MAGNMA, MIX, NOISE, SETTINGS, Cell, Place, cells_of, choose, evaluations, label

METHODS = {  # the paper's columns: colour, hatch, marker
    "standard": ("#999999", "", "o"), "at": ("#F0E442", "//", "v"), "trades": ("#E69F00", "\\\\", "^"),
    "rse": ("#CC79A7", "..", "<"), "gn": ("#56B4E9", "xx", ">"), "augmix": ("#0072B2", "//", "s"),
    NOISE: ("#009E73", "||", "P"), MIX: ("#000000", "", "X"), MAGNMA: ("#D55E00", "", "D"),
}  # fmt: skip
OTHERS = [("C4", "", "p"), ("C3", "--", "h"), ("C5", "", "*"), ("C8", "++", "d"), ("C2", "", "8"), ("C9", "oo", "H")]
METRICS = {"clean": ("#FFFFFF", "//", "o"), "mca": ("#0072B2", "", "s")}
CATEGORIES = {  # as the benchmark's authors sort them
    "noise": ("impulse_noise", "shot_noise", "speckle_noise"),
    "blur": ("defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("brightness", "fog", "frost", "snow", "spatter"),
    "digital": ("contrast", "elastic_transform", "jpeg_compression", "pixelate", "saturate"),
}
LOOK = {
    "font.size": 8, "axes.titlesize": 9, "mathtext.fontset": "cm", "hatch.linewidth": 0.4,
    "axes.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.linewidth": 0.3, "grid.color": "#CCCCCC", "lines.linewidth": 1, "legend.frameon": False,
    "legend.columnspacing": 1, "legend.handletextpad": 0.4, "legend.handlelength": 1.5,
}  # fmt: skip
MARKER = {"markersize": 4, "markeredgecolor": "black", "markeredgewidth": 0.4}
N, SIGMA_MAX, BETA = 5, 0.2, 1.0  # of Figure 1, as in the paper
DIGIT, NOISE_SEED, MIX_SEED = 974, 21755, 14922  # such that much is seen: weak to strong noise, all of A
SEVERITY = 5  # of Figure 4

Cells = dict[str, Cell]  # metric -> mean and deviation over seeds, percent
Styles = dict[str, tuple[str, str, str]]


def papers_numbers() -> dict[Place, Cells]:
    """The numbers of the paper's Tables 1-4."""
    numbers: dict[Place, Cells] = {}
    for (*place, metric), cell in tables.published("1234").items():
        numbers.setdefault(tuple(place), {})[metric] = cell
    return numbers


def runs_to_draw(groups: list[Group]) -> dict[Place, Group]:
    """For each data set, network and column the runs that tables.py shows. What is not drawn is named."""
    drawn = {}
    for place, (shown, *others) in choose(groups, "best").items():
        name = ", ".join(map(label, place))
        if not evaluations(shown, "best"):
            print(f"{name}: not drawn, since best.pt was not evaluated")
        elif place[2] in SETTINGS and place[2] not in METHODS:
            print(f"{name}: not drawn, since it is of Table 5 alone")
        else:
            drawn[place] = shown
            for other in others:
                print(f"{name} was also run with (drawn | not drawn) {tables.telling([shown, other])}")
    return drawn


def footer(groups: dict[Place, Group]) -> str:
    """What was really run: a line for all columns that share data, corruptions, network, epochs and seeds."""
    lines: dict[str, list[str]] = {}
    for (dataset, arch, column), g in groups.items():
        s, h = g.shared, g.shared["hparams"]
        data, how = f"{label(dataset)} ({s['data_source']}, {s['test_images']} test images)", "trained elsewhere"
        if s["method"]:
            seeds = ", ".join(map(str, evaluations(g, "best")))
            how = f"{s['train_images']} training images, {h.get('epochs')} epochs, seeds {seeds}"
        line = f"{data}, {s['corruption_source']} corruptions, {label(arch)}, {how}"
        n = f" (n = {h.get('n')})" if s["method"] == "magnma" else ""
        lines.setdefault(line, []).append(label(column) + n)
    return "\n".join(f"{line}: {', '.join(columns)}" for line, columns in lines.items())


def columns_of(keys: dict[Place, object]) -> Styles:
    """The columns in the paper's order, then others by name, each with its colour, hatch and marker."""
    there = {column for _, _, column in keys}
    others = zip(sorted(there - set(METHODS)), itertools.cycle(OTHERS), strict=False)
    return {column: style for column, style in METHODS.items() if column in there} | dict(others)


def by_network(numbers: dict[Place, Cells], metric: str, ylabel: str) -> Figure:
    """Figure 2 (metric mca) or 3 (corrupt_rmse): bars by network, a panel for each data set."""
    panels, columns = {}, columns_of(numbers)
    for dataset in dict.fromkeys(dataset for dataset, _, _ in numbers):
        here = {key: cells[metric] for key, cells in numbers.items() if key[0] == dataset}
        arches = list(dict.fromkeys(arch for _, arch, _ in here))
        series = {c: [here.get((dataset, a, c)) for a in arches] for c in columns_of(here)}
        panels[f"{label(dataset)}-C"] = arches, series
    return bars(panels, columns, ylabel, 3.2)


def by_method(numbers: dict[Place, Cells]) -> Figure:
    """Figure 5 or 6: clean accuracy and mCA of each method, on one data set and network."""
    (dataset, arch, _), columns = next(iter(numbers)), list(columns_of(numbers))
    series = {metric: [numbers[dataset, arch, column][metric] for column in columns] for metric in METRICS}
    title = f"{label(dataset)} and {label(dataset)}-C, {label(arch)}"
    return bars({title: (columns, series)}, METRICS, "accuracy (%)", max(3.5, 0.75 * len(columns)))


def bars(panels: dict[str, tuple], styles: Styles, ylabel: str, width: float) -> Figure:
    """Grouped bars from zero. Panels, `width` inches or more: groups, and {key: (mean, deviation) or None a group}."""
    width = max(width, *(0.27 * len(groups) * len(series) for groups, series in panels.values()))
    figure = Figure(figsize=(max(4.8, 0.6 + width * len(panels)), 2.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, (groups, series)) in zip(axes, panels.items(), strict=True):
        step = 0.84 / len(series)
        for i, (key, cells) in enumerate(series.items()):
            there = [(k + (i - (len(series) - 1) / 2) * step, *cell) for k, cell in enumerate(cells) if cell]
            x, means, deviations = np.array(there, dtype=float).T  # no deviation: nan, and no error bar
            ax.bar(x, means, step, color=styles[key][0], hatch=styles[key][1], edgecolor="black", linewidth=0.5,
                   label=label(key), yerr=deviations, error_kw={"elinewidth": 0.7, "capsize": 1.5})  # fmt: skip
            for at, mean, top in zip(x, means, means + np.nan_to_num(deviations), strict=True):
                ax.annotate(f"{mean:.1f}", (at, top), (0, 1.5), textcoords="offset points", ha="center", fontsize=6)
        ax.set_xticks(range(len(groups)), [label(group).replace(" ", "\n") for group in groups])
        ax.tick_params(axis="x", length=0)
        ax.grid(visible=False, axis="x")
        ax.margins(y=0.1)
        ax.set(title=title, ylabel=ylabel, ylim=(0, None))
    return figure


def profile(numbers: dict[Place, Cells]) -> Figure:
    """Figure 7 or 8: accuracy by corruption and each category's mean, on one data set and network."""
    (dataset, arch, _), columns = next(iter(numbers)), columns_of(numbers)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True, width_ratios=[len(group) + 1 for group in CATEGORIES.values()])
    for ax, (category, group) in zip(axes, CATEGORIES.items(), strict=True):
        for i, (column, (colour, _, marker)) in enumerate(columns.items()):
            means = [numbers[dataset, arch, column][name][0] for name in group]
            x = np.arange(len(group) + 1) + (i - (len(columns) - 1) / 2) * 0.76 / max(len(columns), 4)  # side by side
            ax.plot(x, [*means, np.mean(means)], marker, color=colour, label=label(column), **MARKER)
        ax.axvspan(len(group) - 0.5, len(group) + 0.6, color="#EEEEEE", zorder=0)
        names = [*map(label, group), "mean"]
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        ax.set(xlim=(-0.6, len(group) + 0.6), title=category)
    axes[0].set_ylabel(f"{label(dataset)}-C, {label(arch)}\naccuracy (%)")
    return figure


def reliability(groups: dict[Place, Group]) -> Figure:
    """Accuracy over mean confidence in each calibration bin, and the share of predictions in it, all seeds together."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    for (ax, share), kind in zip(figure.subplots(2, 2, height_ratios=[3, 1]).T, ("clean", "corrupt"), strict=True):
        ax.plot([0, 1], [0, 1], ":", color="black")
        for (dataset, arch, column), group in groups.items():
            bins = np.sum([e["reliability"][kind] for e in evaluations(group, "best").values()], axis=0)
            count, confidence, correct = bins[bins[:, 0] > 0].T
            colour, _, marker = columns_of(groups)[column]
            ax.plot(confidence / count, correct / count, f"{marker}-", color=colour, label=label(column), **MARKER)
            share.plot(confidence / count, 100 * count / count.sum(), f"{marker}-", color=colour, **MARKER)
            ax.set_title(f"{label(dataset)}{'-C' * (kind == 'corrupt')}, {label(arch)}")
        ax.set(xlim=(0, 1.02), ylim=(0, 1.02), ylabel="accuracy")
        share.set(xlim=(0, 1.02), yscale="log", ylim=(0.005, 150), xlabel="confidence", ylabel="predictions (%)")
        share.set_yticks((0.01, 1, 100), ("0.01", "1", "100"))
    return figure


def training(groups: dict[Place, Group]) -> Figure:
    """Training loss, and clean test accuracy where tested, by epoch: a line a run, on one data set and network."""
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    for ax, metric in zip(figure.subplots(1, 2), ("train_loss", "test_accuracy"), strict=True):
        for (dataset, arch, column), group in groups.items():
            colour, _, marker = columns_of(groups)[column]
            for log in (run["log"] for run in group.seeds.values()):
                there, style = ~np.isnan(log[metric]), f"{marker}-" if metric == "test_accuracy" else "-"
                ax.plot(log["epoch"][there], log[metric][there], style, color=colour, label=label(column), markersize=3)
            ax.set_title(f"{label(dataset)}, {label(arch)}")
        ax.set(xlabel="epoch", ylabel="training loss" if metric == "train_loss" else "test accuracy (%)")
        ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def picture(ax: Axes, image: np.ndarray, title: str, below: bool = False) -> None:
    """An image (32, 32, 3), its title above or below."""
    ax.imshow(image)
    ax.set_title(title, fontsize=7.5, **({"y": 0, "pad": -3, "va": "top"} if below else {}))
    ax.set_axis_off()


def branches(u8: Tensor) -> Figure:
    """Figure 1: an image, uint8 (1, 3, 32, 32), and N noisy and N mixed copies of it, as Algorithm 1 makes them.

    augment's own functions make the copies; what they drew is drawn once more from the same seed.
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
    noise = rf"$x + \delta,\ \ \delta \sim N(0, \sigma^2 I),\ \ \sigma \sim U(0, {SIGMA_MAX:g})$"
    mixture = rf"$w\,x + (1 - w)\,T_a(x),\ \ a \sim U(A),\ \ w \sim \mathrm{{Beta}}({BETA:g}, {BETA:g})$"
    top, bottom = right.subfigures(2, 1, hspace=0.03, height_ratios=(1, 1.08))
    for part, face, edge, words, images, titles in (
        (top, "#FDF0E6", "#D55E00", f"{N} noisy copies  {noise}", noisy, [rf"$\sigma$ = {s:.2f}" for s in sigma]),
        (bottom, "#E8F2F9", "#0072B2", f"{N} mixed copies  {mixture}", mixed, mixes),
    ):
        part.set_facecolor(face)
        part.suptitle(words, color=edge, fontsize=10)
        for ax, image, title in zip(part.subplots(1, N), images, titles, strict=True):
            picture(ax, image.clamp(0, 1).permute(1, 2, 0).numpy(), title, below=True)
    return figure


def gallery(u8: Tensor) -> Figure:
    """Figure 4: an image, uint8 (1, 3, 32, 32), and beside it its corruptions; frost where its photographs are."""
    pictures = {"clean": u8.permute(0, 2, 3, 1).numpy()}
    for name in CORRUPTIONS:
        try:
            pictures[name] = corrupt(pictures["clean"], name, SEVERITY, seed=0)
        except ValueError as error:
            print(f"figure4 is without {name}: {error}")
    figure = Figure(figsize=(8, 3.7), layout="constrained")
    grid = figure.add_gridspec(3, 8)
    places = [grid[:, :2], *(grid[row, column] for row in range(3) for column in range(2, 8))]
    for place, (name, images) in zip(places, pictures.items(), strict=False):
        picture(figure.add_subplot(place), images[0], label(name))
    return figure


def save(figure: Figure, path: Path, note: str) -> None:
    """Write a figure; one with labels has its legend above and the note below."""
    entries = {text: line for ax in figure.axes for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries:
        width = figure.get_figwidth()
        columns = int(width / (0.34 + 0.062 * max(map(len, entries))))
        figure.legend(entries.values(), entries, loc="outside upper center", ncols=min(len(entries), max(1, columns)))
        lines = [part for line in note.split("\n") for part in textwrap.wrap(line, int(21 * width))]
        figure.supxlabel("\n".join(lines), fontsize=6, color="#555555")
    with utils.atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=200)
    print(path)


def main(argv: list[str] | None = None) -> int:
    """Draw what can be drawn. Exit code 1 where a results.json was left out, damaged or of an older form."""
    parser = utils.Parser(description="Figures 1-8, reliability diagrams and training curves, as PNG files.")
    flag = parser.add_argument
    flag("runs", nargs="?", help="the folder of the runs; by default runs")
    flag("--source", choices=("runs", "paper"), default="runs", help="our runs' numbers, or the published ones")
    flag("--dataset", default="cifar10", help="the data set in CIFAR-10's place")
    flag("--arch", default="resnet18", help="the network in ResNet-18's place")
    flag("--out", default="figures", help="the folder of the figures")
    flag("--pdf", action="store_true", help="PDF files too")
    args = parser.parse_args(argv)
    ours = args.source == "runs"
    if args.runs and not ours:
        raise ValueError("--source paper takes no folder of runs")

    runs, problems = read_results(args.runs or "runs") if ours else ({}, [])
    for path, run in runs.items():
        if (log := path.with_name("log.csv")).exists():
            run["log"] = np.genfromtxt(log, delimiter=",", names=True, ndmin=1)
    groups = runs_to_draw(group_runs(runs))
    logged = {key: group for key, group in groups.items() if all("log" in run for run in group.seeds.values())}
    numbers = {place: cells_of(g, "best") for place, g in groups.items()} if ours else papers_numbers()

    def pick(values: dict, sets: list[str], arches: list[str], few: bool = False) -> dict:
        """Those on these data sets and networks, in order; few: Standard, AugMix, MAGNMA, methods of the user's own."""
        columns = [c for c in columns_of(values) if not few or c not in METHODS or c in ("standard", "augmix", MAGNMA)]
        return {key: values[key] for key in itertools.product(sets, arches, columns) if key in values}

    sets = list(dict.fromkeys([Path(args.dataset).name.removesuffix(".npz"), "cifar100"]))
    arches = [args.arch, "densenet121", "inceptionv3"]
    digit, three = load_dataset("digits", "").train_images[[DIGIT]], pick(numbers, sets, arches, few=True)
    plan = {"figure1": (branches, digit), "figure4": (gallery, digit), "figure2": (by_network, three, "mca", "mCA (%)"),
            "figure3": (by_network, three, "corrupt_rmse", "RMS calibration error (%)")}  # fmt: skip
    for k, dataset in enumerate(sets):
        plan[f"figure{5 + k}"] = by_method, pick(numbers, [dataset], arches[:1])
        plan[f"figure{7 + k}"] = profile, pick(numbers, [dataset], arches[:1])
        plan[f"reliability_{dataset}"] = reliability, pick(groups, [dataset], arches[:1], few=True)
        plan[f"training_{dataset}"] = training, pick(logged, [dataset], arches[:1])
    for name, (draw, data, *rest) in sorted(plan.items()):
        if len(data) == 0:
            why = "no runs for it; --dataset and --arch name others" if ours else "nothing published for it"
            print(f"{name} is not drawn: {why}")
            continue
        ran = footer({key: groups[key] for key in data if key in groups})
        note = ran if ours else f"Published numbers: {tables.PAPER['source']}"
        for suffix in ("png", "pdf") if args.pdf else ("png",):
            with matplotlib.rc_context(LOOK):
                save(draw(data, *rest), Path(args.out, f"{name}.{suffix}"), note)
    for problem in problems:
        print(f"figures.py: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
