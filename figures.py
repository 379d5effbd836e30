"""Figures 2-8 of the paper and a reliability diagram, from the same numbers as the tables; reached by `tables.py`.

    python tables.py runs/ --figures figures/                   # from our runs
    python tables.py --source paper --figures figures/          # from the published numbers

PNG and PDF. Colours are those of Okabe and Ito, which colour-blind people can tell apart, and every method has a
hatch and a marker of its own besides, for print in grey. What was never run leaves a gap that says so.
"""

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import corruptions
import runs
from claims import ARCHS, BASELINES, MAGNMA, MIX, NOISE, SETS
from collect import Cell, Key
from data import CORRUPTIONS, load_dataset

METHODS = (*BASELINES, NOISE, MIX, MAGNMA)
THREE = ("standard", "augmix", MAGNMA)
CATEGORIES = {  # as the benchmark's authors sort them
    "noise": ("impulse_noise", "shot_noise", "speckle_noise"),
    "blur": ("defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("brightness", "fog", "frost", "snow", "spatter"),
    "digital": ("contrast", "elastic_transform", "jpeg_compression", "pixelate", "saturate"),
}
STYLES = {  # column or metric: colour, hatch, marker
    "standard": ("#999999", "", "o"),
    "at": ("#F0E442", "//", "v"),
    "trades": ("#E69F00", "\\\\", "^"),
    "rse": ("#CC79A7", "..", "<"),
    "gn": ("#56B4E9", "xx", ">"),
    "augmix": ("#0072B2", "//", "s"),
    NOISE: ("#009E73", "||", "P"),
    MIX: ("#000000", "", "X"),
    MAGNMA: ("#D55E00", "", "D"),
    "clean": ("#FFFFFF", "//", "o"),
    "mca": ("#0072B2", "", "s"),
}
STYLE = {"font.size": 8, "pdf.fonttype": 42, "hatch.linewidth": 0.4, "axes.linewidth": 0.6, "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "magnma"}  # fmt: skip
SEVERITY = 5  # of Figure 4; the mild ones are hard to see in print


def bars(ax: Axes, groups: list[str], series: dict[str, list[Cell | None]], names: dict[str, str]) -> None:
    """Grouped bars from zero with deviations and values; series: a key of STYLES -> a cell per group, None: not run."""
    width = 0.84 / len(series)
    top = max([cell.mean + (cell.deviation or 0) for cells in series.values() for cell in cells if cell] or [100])
    for i, (key, cells) in enumerate(series.items()):
        colour, hatch, _ = STYLES[key]
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        heights = [cell.mean if cell else 0 for cell in cells]
        errors = [cell.deviation if cell and cell.deviation else np.nan for cell in cells]  # nan: no bar
        ax.bar(x, heights, width, color=colour, hatch=hatch, edgecolor="black", linewidth=0.5, label=names[key],
               yerr=errors, error_kw={"elinewidth": 0.7, "capsize": 1.5, "capthick": 0.7})  # fmt: skip
        for at, cell, height, error in zip(x, cells, heights, errors, strict=True):
            text = f"{cell.mean:.1f}" if cell else "not run"
            ax.text(at, height + np.nan_to_num(error) + 0.015 * top, text, ha="center", va="bottom", fontsize=6,
                    rotation=0 if cell else 90, color="black" if cell else "#555555",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3})  # fmt: skip
    ax.set_xticks(np.arange(len(groups)), groups)
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, 1.12 * top)
    ax.grid(axis="y", linewidth=0.3, color="#CCCCCC")


def by_architecture(cells: dict[Key, Cell], names: dict[str, str], metric: str, label: str) -> Figure:
    """Figure 2 (metric mca) or 3 (corrupt_rmse): Standard, AugMix and MAGNMA, a panel for each data set."""
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    for ax, dataset in zip(figure.subplots(1, 2), SETS, strict=True):
        series = {column: [cells.get((dataset, arch, column, metric)) for arch in ARCHS] for column in THREE}
        bars(ax, [names[arch] for arch in ARCHS], series, names)
        ax.set_title(f"{names[dataset]}-C", fontsize=9)
        ax.set_ylabel(label)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def by_method(cells: dict[Key, Cell], names: dict[str, str], dataset: str) -> Figure:
    """Figure 5 (CIFAR-10) or 6 (CIFAR-100): clean accuracy and mCA of nine methods on ResNet-18."""
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    ax = figure.subplots()
    series = {m: [cells.get((dataset, "resnet18", column, m)) for column in METHODS] for m in ("clean", "mca")}
    bars(ax, [names[column].replace(" ", "\n") for column in METHODS], series, names)
    ax.set_title(f"{names[dataset]} and {names[dataset]}-C, {names['resnet18']}", fontsize=9)
    ax.set_ylabel("accuracy (%)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def profile(cells: dict[Key, Cell], names: dict[str, str], dataset: str) -> Figure:
    """Figure 7 (CIFAR-10-C) or 8 (CIFAR-100-C): accuracy by corruption, by category, and each category's mean."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True, width_ratios=[len(group) + 1 for group in CATEGORIES.values()])
    shown = [column for column in METHODS if (dataset, "resnet18", column, "mca") in cells]
    step = 0.76 / max(len(shown), 4)  # markers of a corruption stand side by side
    for ax, (category, group) in zip(axes, CATEGORIES.items(), strict=True):
        for i, column in enumerate(shown):
            means = [cells[dataset, "resnet18", column, name].mean for name in group]
            x = np.arange(len(group) + 1) + (i - (len(shown) - 1) / 2) * step
            (colour, _, marker), (size, above) = STYLES[column], (5, 2) if column in THREE else (3.5, 3)
            ax.plot(x, [*means, np.mean(means)], marker, color=colour, markeredgecolor="black", markeredgewidth=0.4,
                    markersize=size, zorder=above, label=names[column])  # fmt: skip
        if not ax.lines:
            ax.text(0.5, 0.5, "not run", ha="center", va="center", transform=ax.transAxes, color="#555555")
        ax.axvspan(len(group) - 0.5, len(group) + 0.6, color="#EEEEEE", zorder=0)
        ax.set_xlim(-0.6, len(group) + 0.6)
        ax.set_xticks(range(len(group) + 1), [*(names[name] for name in group), "mean"], rotation=60, ha="right",
                      rotation_mode="anchor")  # fmt: skip
        ax.set_title(category, fontsize=9)
        ax.grid(linewidth=0.3, color="#CCCCCC")
    axes[0].set_ylabel(f"{names[dataset]}-C, {names['resnet18']}\naccuracy (%)")
    if not shown:
        axes[0].set_ylim(0, 100)
    else:
        missing = [names[column] for column in METHODS if column not in shown]
        title = f"not run: {', '.join(missing)}" if missing else None
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=9, frameon=False,
                      fontsize=7, handletextpad=0.1, columnspacing=0.8, title=title, title_fontsize=7)  # fmt: skip
    return figure


def reliability(bins: dict[tuple, dict[str, list[list[float]]]], names: dict[str, str]) -> Figure:
    """Accuracy over mean confidence in 15 equal-width bins, and how many predictions each holds; clean and corrupt."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, height_ratios=[3, 1])
    for (ax, share), kind in zip(axes.T, ("clean", "corrupt"), strict=True):
        ax.plot([0, 1], [0, 1], ":", color="black", linewidth=0.8)
        for column in THREE:
            if ("cifar10", "resnet18", column) not in bins:
                ax.plot([], [], " ", label=f"{names[column]}: not run")
                continue
            count, confidence, correct = np.array(bins["cifar10", "resnet18", column][kind]).T
            colour, _, marker = STYLES[column]
            full = count > 0
            looks = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1, "markeredgecolor": "black",
                     "markeredgewidth": 0.4}  # fmt: skip
            ax.plot(confidence[full] / count[full], correct[full] / count[full], label=names[column], **looks)
            share.plot((np.arange(15) + 0.5)[full] / 15, 100 * count[full] / count.sum(), **looks)
        ax.set_title(f"{names['cifar10']}{'' if kind == 'clean' else '-C'}, {names['resnet18']}", fontsize=9)
        ax.legend(frameon=False, fontsize=7, loc="upper left")
        ax.set_xlim(0, 1.02)
        ax.set_ylim(0, 1.02)
        share.set_yscale("log")
        share.set_ylim(0.005, 150)
        share.set_xlabel("confidence")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("predictions (%)")
    return figure


def load_picture(dataset: str, root: str) -> tuple[str, dict[str, np.ndarray | None]]:
    """(title, image uint8 (32, 32, 3) by name: `clean` and the 18 corruptions) of the first test image; Figure 4.

    A corruption that cannot be made here (frost without its photographs) is None.
    """
    loaded = load_dataset(dataset, root)
    image = loaded.test_images[:1].permute(0, 2, 3, 1).contiguous().numpy()
    pictures: dict[str, np.ndarray | None] = {"clean": image[0]}
    for name in CORRUPTIONS:
        try:
            pictures[name] = corruptions.corrupt(image, name, SEVERITY, seed=0)[0]
        except ValueError:
            pictures[name] = None
    kind = loaded.classes[loaded.test_labels[0]]
    return f"The first test image of {dataset} (class {kind}) and its corruptions at severity {SEVERITY}", pictures


def gallery(title: str, pictures: dict[str, np.ndarray | None], names: dict[str, str]) -> Figure:
    """Figure 4: a test image and its 18 corruptions."""
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(2, 10).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, (name, image) in zip(axes, pictures.items(), strict=False):
        ax.set_title(names[name].replace(" ", "\n"), fontsize=7)
        if image is None:
            ax.text(0.5, 0.5, "photographs\nmissing", ha="center", va="center", fontsize=6)
        else:
            ax.imshow(image, interpolation="nearest")
    return figure


def draw_all(
    folder: Path,
    cells: dict[Key, Cell],
    bins: dict[tuple, dict[str, list[list[float]]]] | None,
    picture: tuple[str, dict[str, np.ndarray | None]],
    names: dict[str, str],
    source: str,
) -> list[Path]:
    """Draw every figure into `folder` as PNG and PDF, with `source` below each; the paths written.

    `bins` holds the reliability diagram's 15 bins by (dataset, arch, column); None: no such figure.
    """
    draw: dict[str, Callable[[], Figure]] = {
        "figure2_mca": lambda: by_architecture(cells, names, "mca", "mCA (%)"),
        "figure3_calibration": lambda: by_architecture(cells, names, "corrupt_rmse", "RMS calibration error (%)"),
        "figure4_corruptions": lambda: gallery(*picture, names),
        "figure5_methods_cifar10": lambda: by_method(cells, names, "cifar10"),
        "figure6_methods_cifar100": lambda: by_method(cells, names, "cifar100"),
        "figure7_profile_cifar10": lambda: profile(cells, names, "cifar10"),
        "figure8_profile_cifar100": lambda: profile(cells, names, "cifar100"),
    }
    if bins is not None:
        draw["reliability"] = lambda: reliability(bins, names)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, make in draw.items():
            figure = make()
            if name != "figure4_corruptions":
                figure.supxlabel("\n".join(textwrap.wrap(source, 150)), fontsize=6, color="#555555")
            for suffix, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
                path = folder / f"{name}.{suffix}"
                with runs.atomic_write(path) as file:
                    figure.savefig(file, format=suffix, dpi=200, metadata=metadata)
                written.append(path)
    return written
