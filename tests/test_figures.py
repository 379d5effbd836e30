"""figures.py: the bars and lines are the numbers, Figure 1 shows what augment made, what has no data is left out."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_tables import evaluation, put

import augment
import corruptions
import figures
import utils
from data import CORRUPTIONS, load_dataset
from evaluate import check_results
from figures import MAGNMA, METHODS


def write_run(root, accuracy, method="standard", tag="", seed=0, n=5, lambda1=0.2, lambda2=0.3):
    """A run of digits, ResNet-20: corruption k has the accuracy + k, so mCA is accuracy + 8.5; results.json's path."""
    bins = [[0.0, 0.0, 0.0]] * 14 + [[40.0, 36.0, 30.0], [120.0, 118.0, 90.0 + seed]]
    sets = {name: accuracy + k for k, name in enumerate(CORRUPTIONS)}
    best = evaluation(accuracy + 20, corrupt_rmse=5.0 + seed, **sets)
    best["reliability"] = {"clean": bins, "corrupt": bins}
    more = {"dataset": "digits", "arch": "resnet20", "tag": tag, "seed": seed, "data_source": "embedded",
            "corruption_source": "generated", "train_images": 1437, "test_images": 360}  # fmt: skip
    path = put(root, method, best, more, epochs=2, n=n, lambda1=lambda1, lambda2=lambda2)
    check_results(utils.read_json(path))
    path.with_name("log.csv").write_text("epoch,train_loss,test_accuracy\n1,2.5,\n2,1.5,60\n")
    return path


def draw(monkeypatch, *argv):
    """main's figures by name; nothing is written."""
    kept = {}
    monkeypatch.setattr(figures, "save", lambda figure, path, note: kept.update({path.stem: figure, "note": note}))
    assert figures.main(list(argv)) == 0
    return kept


def heights(ax):
    return [patch.get_height() for patch in ax.patches]


def test_published_numbers_are_the_bars_and_markers(monkeypatch):
    kept, paper = draw(monkeypatch, "--source", "paper"), figures.papers_numbers()
    assert paper["cifar10", "resnet18", "augmix"]["mca"] == (89.70, 0.40)
    assert sorted(kept) == [*(f"figure{k}" for k in range(1, 9)), "note"]
    networks, columns = ("resnet18", "densenet121", "inceptionv3"), ("standard", "augmix", MAGNMA)
    for k, d in enumerate(("cifar10", "cifar100")):
        for name, metric in (("figure2", "mca"), ("figure3", "corrupt_rmse")):
            ax = kept[name].axes[k]
            assert heights(ax) == [paper[d, network, c][metric][0] for c in columns for network in networks]
            assert ax.get_ylim()[0] == 0
        assert heights(kept[f"figure{5 + k}"].axes[0]) == [
            paper[d, "resnet18", c][m][0] for m in ("clean", "mca") for c in METHODS]  # fmt: skip
        for ax, group in zip(kept[f"figure{7 + k}"].axes, figures.CATEGORIES.values(), strict=True):
            means = np.array([[paper[d, "resnet18", c][name][0] for name in group] for c in METHODS])
            assert np.allclose([line.get_ydata() for line in ax.lines], np.column_stack([means, means.mean(1)]))
    assert sorted(name for group in figures.CATEGORIES.values() for name in group) == sorted(CORRUPTIONS)
    some = ("cifar10 resnet18 standard", "cifar10 densenet121 augmix", "cifar100 resnet18 augmix")
    axes = figures.by_network({tuple(key.split()): paper[*key.split()] for key in some}, "mca", "").axes
    assert list(map(heights, axes)) == [[77.83, 88.91], [64.73]]


def test_runs_are_drawn_and_panels_without_data_left_out(monkeypatch, tmp_path, capsys):
    theirs = utils.read_json(write_run(tmp_path, 50))
    write_run(tmp_path, 52, seed=1)
    write_run(tmp_path, 60, "magnma")
    write_run(tmp_path, 55, "magnma", "noise", lambda2=0)
    write_run(tmp_path, 56, "magnma", "mix", lambda1=0, lambda2=5)
    write_run(tmp_path, 57, "magnma", "l1_0.1-l2_0-s_0.2-b_1", lambda1=0.1, lambda2=0)
    write_run(tmp_path, 58, "magnma", "n_1", n=1)
    write_run(tmp_path, 40, "mixup")
    theirs |= {"method": None, "seed": None, "tag": None, "foreign": theirs.pop("best"), "train_images": None,
               "hparams": {"checkpoint": "their/mixup.pt"}}  # fmt: skip
    utils.write_json(tmp_path / "mixup.pt.results.json", theirs)
    last = utils.read_json(path := write_run(tmp_path, 58, "augmix"))
    utils.write_json(path, last | {"last": last["best"], "best": None})
    kept = draw(monkeypatch, str(tmp_path), "--dataset", "digits", "--arch", "resnet20")
    assert {name for name in kept if "6" in name or "8" in name or "cifar" in name} == set()
    printed = capsys.readouterr().out
    assert "figure6 is not drawn: no runs" in printed
    assert "digits, ResNet-20, magnma 0.1 0 0.2 1: not drawn, since it is of Table 5 alone" in printed
    assert "digits, ResNet-20, MAGNMA was also run with (drawn | not drawn) n 5 | 1" in printed
    assert "digits, ResNet-20, AugMix: not drawn, since best.pt was not evaluated" in printed
    (ax,) = kept["figure2"].axes  # no panel for CIFAR-100, no group for the other networks
    assert (ax.get_title(), [text.get_text() for text in ax.get_xticklabels()]) == ("digits-C", ["ResNet-20"])
    assert ax.get_legend_handles_labels()[1] == ["Standard", "MAGNMA", "mixup", "mixup.pt"]
    assert np.allclose(heights(ax), [59.5, 68.5, 48.5, 58.5])
    assert np.allclose(ax.collections[0].get_segments()[0][:, 1], [58.5, 60.5])  # the deviation of two seeds, by n
    assert np.allclose(heights(kept["figure3"].axes[0]), [5.5, 5, 5, 5])
    assert np.allclose(heights(kept["figure5"].axes[0])[:6], [71, 75, 76, 80, 60, 70])
    axes = kept["reliability_digits"].axes
    assert np.allclose(axes[1].lines[1].get_xydata(), [[36 / 40, 30 / 40], [118 / 120, 181 / 240]])  # both seeds' bins
    assert np.allclose(axes[3].lines[0].get_ydata(), [25, 75])
    loss, test = kept["training_digits"].axes
    assert len(loss.lines) == len(test.lines) == 6
    assert loss.lines[0].get_xydata().tolist() == [[1, 2.5], [2, 1.5]]
    assert test.lines[0].get_xydata().tolist() == [[2, 60]]
    assert "generated corruptions, ResNet-20, 1437 training images, 2 epochs, seeds 0, 1: Standard\n" in kept["note"]
    assert "seeds 0: MAGNMA noise (n = 5), MAGNMA mix (n = 5), MAGNMA (n = 5), mixup" in kept["note"]


def test_figure_1_shows_what_augment_made_and_figure_4_the_corruptions(monkeypatch):
    u8 = load_dataset("digits", "").train_images[[figures.DIGIT]]
    axes, x = figures.branches(u8).axes, (u8 / 255).repeat(5, 1, 1, 1)
    utils.seed(figures.NOISE_SEED)
    sigma = 0.2 * torch.rand(5, 1, 1, 1)
    noisy = (x + sigma * torch.randn(x.shape)).clamp(0, 1)
    utils.seed(figures.MIX_SEED)
    a, v, w = augment.draw_mixed(5, 1.0)
    mixed = x + (1 - w.view(-1, 1, 1, 1)) * (augment.operate(u8.repeat(5, 1, 1, 1), a, v) / 255 - x)
    shown = np.stack([ax.images[0].get_array() for ax in axes])
    assert np.allclose(shown, torch.cat([x[:1], noisy, mixed]).permute(0, 2, 3, 1), atol=1e-6)
    assert [ax.get_title() for ax in axes[1:6]] == [f"$\\sigma$ = {s:.2f}" for s in sigma.flatten()]
    for ax, *drawn in zip(axes[6:], a, v, w, strict=True):
        name, level, weight = re.split("\n|, ", ax.get_title())
        assert (name, weight) == (augment.A[drawn[0]], f"$w$ = {drawn[2]:.2f}")
        assert level == ("no level" if name in ("autocontrast", "equalize") else f"level {drawn[1]:.1f}")
    monkeypatch.setattr(corruptions, "frost_photographs", lambda: utils.Parser().error("no photographs"))
    axes = figures.gallery(u8).axes
    assert [ax.get_title() for ax in axes] == ["Clean", *(figures.label(c) for c in CORRUPTIONS if c != "frost")]
    image = corruptions.corrupt(u8.permute(0, 2, 3, 1).numpy(), "zoom_blur", 5, seed=0)[0]
    assert np.array_equal(axes[-1].images[0].get_array(), image)


def test_files_and_errors(tmp_path, capsys):
    write_run(tmp_path / "runs", 50)
    (tmp_path / "runs/results.json").write_text("{")
    out = tmp_path / "out"
    assert figures.main([str(tmp_path / "runs"), "--dataset", "digits", "--arch", "resnet20", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "runs/results.json is left out" in printed.err  # damaged; the rest is drawn
    files = [line for line in printed.out.splitlines() if line.startswith(str(out))]
    assert len(files) == 8 == sum(np.asarray(Image.open(file).convert("L")).std() > 10 for file in files)
    for wrong in (["runs", "--source", "paper"], [str(out)]):
        with pytest.raises((ValueError, OSError)):
            figures.main(wrong)
