"""figures.py: what is drawn equals the numbers, gaps are labelled, nothing is cropped, every file is written."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from test_tables import BOTH, evaluation, mini_paper_runs, results, write

import corruptions
import figures
import runs
import tables
from data import CORRUPTIONS

PAPER = runs.read_json(tables.PAPER)
NAMES = PAPER["names"]
PUBLISHED = {k: cell for t in "1234" for row in tables.published(PAPER, t).values() for k, cell in row.items()}
DRAWN = {
    "2": lambda cells: figures.by_architecture(cells, NAMES, "mca", "mCA (%)"),
    "3": lambda cells: figures.by_architecture(cells, NAMES, "corrupt_rmse", "RMS calibration error (%)"),
    "5": lambda cells: figures.by_method(cells, NAMES, "cifar10"),
    "6": lambda cells: figures.by_method(cells, NAMES, "cifar100"),
    "7": lambda cells: figures.profile(cells, NAMES, "cifar10"),
    "8": lambda cells: figures.profile(cells, NAMES, "cifar100"),
}


def texts(figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def heights(ax) -> list[float]:
    return [patch.get_height() for patch in ax.patches]


@pytest.mark.parametrize(("number", "metric"), [("2", "mca"), ("3", "corrupt_rmse")])
def test_bars_by_architecture_are_the_numbers(number, metric):
    for ax, dataset in zip(DRAWN[number](PUBLISHED).axes, ("cifar10", "cifar100"), strict=True):
        wanted = [PUBLISHED[dataset, arch, column, metric].mean for column in figures.THREE for arch in figures.ARCHS]
        assert heights(ax) == wanted
        assert ax.get_ylim()[0] == 0


def test_bars_by_method_are_the_numbers():
    (ax,) = DRAWN["6"](PUBLISHED).axes
    wanted = [PUBLISHED["cifar100", "resnet18", column, m].mean for m in ("clean", "mca") for column in figures.METHODS]
    assert heights(ax) == wanted
    assert [label.get_text().replace("\n", " ") for label in ax.get_xticklabels()][-3:] == [
        "MAGNMA noise", "MAGNMA mix", "MAGNMA"]  # fmt: skip


def test_profile_shows_every_corruption_once_and_each_categorys_mean():
    assert sorted(name for group in figures.CATEGORIES.values() for name in group) == sorted(CORRUPTIONS)
    axes = DRAWN["7"](PUBLISHED).axes
    for ax, group in zip(axes, figures.CATEGORIES.values(), strict=True):
        assert len(ax.lines) == 9
        means = [PUBLISHED["cifar10", "resnet18", BOTH, name].mean for name in group]
        assert np.allclose(ax.lines[-1].get_ydata(), [*means, sum(means) / len(means)])
        assert [label.get_text() for label in ax.get_xticklabels()] == [*(NAMES[name] for name in group), "mean"]


def test_what_was_not_run_leaves_a_labelled_gap():
    some = {key: cell for key, cell in PUBLISHED.items() if key[0] == "cifar10" and key[2] != "augmix"}
    figure = DRAWN["2"](some)
    gaps = [[text.get_text() for text in ax.texts].count("not run") for ax in figure.axes]
    assert gaps == [3, 9]
    (ax,) = DRAWN["5"](some).axes
    assert [text.get_text() for text in ax.texts].count("not run") == 2
    assert "not run: AugMix" in [text.get_text() for text in texts(DRAWN["7"](some))]
    assert all(ax.texts[0].get_text() == "not run" for ax in DRAWN["8"](some).axes)
    labels = [text.get_text() for text in texts(figures.reliability({}, NAMES))]
    assert labels.count("MAGNMA: not run") == 2


def test_reliability_is_the_ratio_of_the_summed_bins():
    bins = [[0.0, 0.0, 0.0]] * 13 + [[4.0, 3.6, 3.0], [12.0, 11.8, 9.0]]
    figure = figures.reliability({("cifar10", "resnet18", "augmix"): {"clean": bins, "corrupt": bins}}, NAMES)
    line = next(line for line in figure.axes[0].lines if line.get_label() == "AugMix")
    assert np.allclose(line.get_xdata(), [3.6 / 4, 11.8 / 12])
    assert np.allclose(line.get_ydata(), [3 / 4, 9 / 12])
    share = next(ax for ax in figure.axes if ax.get_ylabel() == "predictions (%)").lines[0]
    assert np.allclose(share.get_ydata(), [25, 75])


def test_bins_are_summed_over_seeds():
    groups = tables.group_runs({Path(str(k)): results(seed=k) for k in range(3)})
    chosen, _ = tables.choose(groups)
    one = np.array(evaluation()["reliability"]["corrupt"])
    summed = tables.reliability_bins(chosen, "best")["cifar10", "resnet18", "standard"]["corrupt"]
    assert np.allclose(summed, 3 * one)


@pytest.mark.parametrize("number", sorted(DRAWN))
def test_no_text_is_cropped_and_no_tick_labels_overlap(number):
    figure = DRAWN[number](PUBLISHED)
    FigureCanvasAgg(figure).draw()
    width, height = figure.canvas.get_width_height()
    for text in texts(figure):
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()  # noqa: PT018
    for ax in figure.axes:
        labels = [label for label in ax.get_xticklabels() if label.get_rotation() == 0]
        boxes = [label.get_window_extent() for label in labels] + [text.get_window_extent() for text in ax.texts]
        pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
        assert not any(a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1 for a, b in pairs)


def test_every_method_has_a_colour_and_a_marker_of_its_own():
    styles = [figures.STYLES[column] for column in figures.METHODS]
    assert len({colour for colour, _, _ in styles}) == len({marker for _, _, marker in styles}) == 9
    assert len({figures.STYLES[column][:2] for column in figures.THREE}) == 3


def test_figure_4_holds_the_corrupted_image_and_labels_a_missing_one(monkeypatch):
    title, pictures = figures.load_picture("digits", "unused")
    assert "severity 5" in title
    assert list(pictures) == ["clean", *CORRUPTIONS]
    wanted = corruptions.corrupt(pictures["clean"][None], "contrast", 5, seed=0)[0]
    assert np.array_equal(pictures["contrast"], wanted)

    def without_photographs(images, name, severity, seed):
        if name == "frost":
            raise ValueError("frost needs photographs")
        return images

    monkeypatch.setattr(corruptions, "corrupt", without_photographs)
    title, pictures = figures.load_picture("digits", "unused")
    assert [name for name, image in pictures.items() if image is None] == ["frost"]
    figure = figures.gallery(title, pictures, NAMES)
    assert sum(len(ax.images) for ax in figure.axes) == 18
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["photographs\nmissing"]


def test_all_figures_are_written_as_png_and_pdf_from_runs(tmp_path, capsys):
    folder = mini_paper_runs(tmp_path / "runs", seeds=(0, 1), methods=["standard", "augmix"])
    assert tables.main([str(folder), "--figures", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    assert len(printed) == 16
    for path in map(Path, printed):
        start = path.read_bytes()[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else start.startswith(b"%PDF-")
        assert path.stat().st_size > 5000
    assert "matplotlib.pyplot" not in Path(figures.__file__).read_text()


@pytest.mark.parametrize("source", ["paper", "runs"])
def test_source_chooses_the_numbers_and_the_names(source, tmp_path, monkeypatch, capsys):
    seen = {}

    def note(folder, cells, bins, picture, names, footer):
        seen.update(cells=cells, bins=bins, names=names, footer=footer)
        return [folder]

    monkeypatch.setattr(figures, "draw_all", note)
    folder = write(tmp_path, results(arch="resnet20", hparams={"epochs": 10}, best=evaluation(accuracy=60.0)))
    tables.main([str(folder), "--figures", "out", "--source", source, "--arch", "resnet20"])
    if source == "paper":
        assert seen["cells"] == PUBLISHED
        assert (seen["bins"], seen["footer"], seen["names"]) == (None, "The paper's numbers.", NAMES)
    else:
        assert seen["cells"]["cifar10", "resnet18", "standard", "mca"] == (pytest.approx(60), None, 1)
        assert len(seen["cells"]) == 22
        assert seen["names"]["resnet18"] == "ResNet-20"
        assert seen["footer"] == ("Our runs, best.pt; CIFAR-10 (official), official corruptions; 1 seed; "
                                  "epochs 10 (paper: 150).")  # fmt: skip
        assert list(seen["bins"]) == [("cifar10", "resnet18", "standard")]


def test_without_matplotlib_the_message_is_one_line(monkeypatch):
    for name in [name for name in sys.modules if name == "figures" or name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="--figures needs the package matplotlib; install it: pip install matplotlib"):
        tables.main(["--source", "paper", "--figures", "out"])
