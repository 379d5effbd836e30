"""figures.py: its bars and lines are the numbers, Figures 1 and 4 show what our code made."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_evaluation, make_results, refused
from PIL import Image

import augment
import corruptions
import figures
import utils
from data import CORRUPTIONS
from figures import MAGNMA, NINE, STYLES

SMALL = ("--dataset", "digits", "--arch", "resnet20")


def put(folder: Path, accuracy: float, method="standard", tag="", seed=0, **recipe) -> Path:
    """A run of digits, ResNet-20, in which corruption k has the accuracy + k, so that its mCA is
    accuracy + 8.5; the path of its results.json."""
    sets = {name: accuracy + k for k, name in enumerate(CORRUPTIONS)}
    best = make_evaluation(accuracy + 20, corrupt_rmse=5.0 + seed, **sets)
    best["reliability"]["corrupt"][-1] = [120, 118, 90 + seed]
    recipe |= {"dataset": "digits", "arch": "resnet20", "train_images": 1437, "epochs": 2}
    recipe |= {"data_source": "embedded", "corruption_source": "generated", "test_images": 360}
    results = make_results(method=method, tag=tag, seed=seed, best=best, **recipe)
    path = folder / f"{method}-{tag}" / f"seed{seed}" / "results.json"
    utils.write_json(path, results)
    path.with_name("log.csv").write_text("epoch,train_loss,test_accuracy\n1,2.5,\n2,1.5,60\n")
    return path


def draw(monkeypatch, *argv) -> dict:
    """main's figures and notes by name; only an empty folder is written."""
    kept = {}
    monkeypatch.setattr(figures, "save", lambda f, path, note: kept.update({path.stem: (f, note)}))
    assert figures.main([*argv]) == 0
    return kept


def heights(ax) -> list[float]:
    return [patch.get_height() for patch in ax.patches]


def fails(*_):
    raise utils.UserError("no photograph")


def test_published_numbers_are_the_bars_and_markers(monkeypatch, tmp_path):
    kept = draw(monkeypatch, "--source", "paper", "--out", str(tmp_path))
    paper = figures.published_numbers()
    assert paper["cifar10", "resnet18", "augmix"]["mca"] == (89.70, 0.40)
    assert sorted(kept) == [f"figure{k}" for k in range(1, 9)]
    networks = ("resnet18", "densenet121", "inceptionv3")
    columns = [column for column in STYLES if not column.endswith(NINE)]
    for k, d in enumerate(("cifar10", "cifar100")):
        for name, metric in (("figure2", "mca"), ("figure3", "corrupt_rmse")):
            ax = kept[name][0].axes[k]
            few = ("standard", "augmix", MAGNMA)
            assert heights(ax) == [paper[d, n, c][metric].mean for c in few for n in networks]
            assert ax.get_ylim()[0] == 0
        cells = [paper[d, "resnet18", c] for c in columns]
        want = [cell[metric].mean for metric in ("clean", "mca") for cell in cells]
        assert heights(kept[f"figure{5 + k}"][0].axes[0]) == want
        axes = kept[f"figure{7 + k}"][0].axes
        for ax, group in zip(axes, figures.CATEGORIES.values(), strict=True):
            means = [[cell[name].mean for name in group] for cell in cells]
            want = np.column_stack([means, np.mean(means, axis=1)])
            assert np.allclose([line.get_ydata() for line in ax.lines], want)
    assert "lower is better" in kept["figure3"][0].axes[0].get_ylabel()
    in_categories = [name for group in figures.CATEGORIES.values() for name in group]
    assert sorted(in_categories) == sorted(CORRUPTIONS)
    some = ("cifar10 resnet18 standard", "cifar10 densenet121 augmix", "cifar100 resnet18 augmix")
    some = {(*key.split(),): paper[*key.split()] for key in some}
    axes = figures.by_network(some, "mca", "").axes
    assert list(map(heights, axes)) == [[77.83, 88.91], [64.73]]


def test_runs_are_drawn_and_panels_without_data_left_out(monkeypatch, tmp_path, capsys):
    runs = tmp_path / "runs"
    put(runs, 50)
    put(runs, 52, seed=1)
    put(runs, 40, "mixup")
    for accuracy, tag, changes in (
        (60, "", {}), (61, "nine", {"operations": "augmix"}), (55, "noise", {"lambda2": 0.0}),
        (56, "mix", {"lambda1": 0.0, "lambda2": 5.0}), (58, "n_1", {"n": 1}),
        (57, "l1_0.1", {"lambda1": 0.1, "lambda2": 0.0}),
    ):  # fmt: skip
        put(runs, accuracy, "magnma", tag, **changes)
    last = utils.read_json(path := put(runs, 58, "augmix"))
    utils.write_json(path, last | {"last": last["best"], "best": None})
    kept = draw(monkeypatch, str(runs), *SMALL, "--out", str(tmp_path / "out"))
    assert not [name for name in kept if "6" in name or "8" in name or "cifar" in name]
    printed = capsys.readouterr().out
    assert "figure6 is not drawn: no such runs" in printed
    assert "digits, ResNet-20, magnma 0.1 0 0.2 1: not drawn, this is a row of Table 5" in printed
    assert "digits, ResNet-20, MAGNMA, further runs (drawn | not drawn): n 5 | 1" in printed
    assert "digits, ResNet-20, AugMix: not drawn, best.pt was not evaluated" in printed
    (ax,) = kept["figure2"][0].axes  # neither CIFAR-100 nor the other networks
    assert ax.get_title() == "digits-C"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["ResNet-20"]
    names = ["Standard", "MAGNMA", "MAGNMA, nine", "mixup"]
    assert ax.get_legend_handles_labels()[1] == names
    assert np.allclose(heights(ax), [59.5, 68.5, 69.5, 48.5])
    deviation = ax.collections[0].get_segments()[0][:, 1]
    assert np.allclose(deviation, [58.5, 60.5])  # of two seeds, divided by n
    assert np.allclose(heights(kept["figure3"][0].axes[0]), [5.5, 5, 5, 5])
    assert np.allclose(heights(kept["figure5"][0].axes[0])[:6], [71, 75, 76, 80, 81, 60])
    everything, noise = kept["severity_digits"][0].axes[:2]
    assert np.allclose(everything.lines[0].get_ydata(), [71, 61.5, 61, 60, 58.5, 56.5])
    index = np.mean([k for k, name in enumerate(CORRUPTIONS) if name.endswith("_noise")])
    assert np.allclose(noise.lines[1].get_ydata()[1:], 60 + index + np.array([2, 1.5, 0.5, -1, -3]))
    axes = kept["reliability_digits"][0].axes
    assert np.allclose(axes[1].lines[1].get_xydata(), [[36 / 40, 30 / 40], [118 / 120, 181 / 240]])
    assert np.allclose(axes[3].lines[0].get_ydata(), [25, 75])
    loss, test = kept["training_digits"][0].axes
    assert "each method's own criterion" in loss.get_ylabel()
    assert len(loss.lines) == len(test.lines) == 7
    assert loss.lines[0].get_xydata().tolist() == [[1, 2.5], [2, 1.5]]
    assert test.lines[0].get_xydata().tolist() == [[2, 60]]
    note = kept["training_digits"][1]
    ran = "digits (embedded, 360 test images), generated corruptions, ResNet-20"
    assert f"{ran}, 1437 training images, 2 epochs, seeds 0, 1: Standard\n" in note
    assert "seeds 0: MAGNMA noise (n = 5); MAGNMA mix (n = 5); MAGNMA (n = 5); MAGNMA, nine" in note


def test_figure_1_shows_what_augment_made_and_figure_4_the_corruptions(monkeypatch, capsys):
    u8 = figures.photograph()
    assert (u8.shape, u8.dtype) == ((1, 3, 32, 32), torch.uint8)
    assert u8.float().mean((0, 2, 3))[0] > 1.2 * u8.float().mean((0, 2, 3))[2]  # an orange flower
    axes, x = figures.branches(u8).axes, (u8 / 255).repeat(5, 1, 1, 1)
    utils.seed(figures.NOISE_SEED)
    sigma = 0.2 * torch.rand(5, 1, 1, 1)
    noisy = (x + sigma * torch.randn(x.shape)).clamp(0, 1)
    utils.seed(figures.MIX_SEED)
    a, v, w = augment.draw_mixed(5, 1.0)
    transformed = augment.apply_operations(u8.repeat(5, 1, 1, 1), a, v) / 255
    mixed = x + (1 - w.view(-1, 1, 1, 1)) * (transformed - x)
    shown = np.stack([ax.images[0].get_array() for ax in axes])
    assert np.allclose(shown, torch.cat([x[:1], noisy, mixed]).permute(0, 2, 3, 1), atol=1e-6)
    assert [ax.get_title() for ax in axes[1:6]] == [f"$\\sigma$ = {s:.2f}" for s in sigma.flatten()]
    assert sigma.min() < 0.03
    assert sigma.max() > 0.17
    assert set(a.tolist()) == {0, 1, 2, 3}
    for ax, *drawn in zip(axes[6:], a, v, w, strict=True):
        name, level, weight = re.split("\n|, ", ax.get_title())
        assert (name, weight) == (augment.A[drawn[0]], f"$w$ = {drawn[2]:.2f}")
        without = name in ("autocontrast", "equalize")
        assert level == ("no level" if without else f"level {drawn[1]:.1f}")

    monkeypatch.setattr(corruptions, "frost_photographs", fails)
    gallery = figures.gallery(u8)
    assert "figure4 is without frost: no photograph" in capsys.readouterr().err
    assert gallery.get_suptitle() == "corruptions at severity 5"
    names = ["Clean", *(figures.label(name) for name in CORRUPTIONS if name != "frost")]
    assert [ax.get_title() for ax in gallery.axes] == names
    images = u8.permute(0, 2, 3, 1).numpy()
    image = corruptions.corrupt(images, "zoom_blur", 5, seed=0)[0]
    assert np.array_equal(gallery.axes[-1].images[0].get_array(), image)


def test_a_damaged_file_costs_only_its_own_part(tmp_path, capsys, monkeypatch):
    put(tmp_path / "runs", 50)
    log = put(tmp_path / "runs", 60, "gn").with_name("log.csv")
    log.write_text("epoch,train_loss\n1,x\n")
    damaged = tmp_path / "runs" / "results.json"
    damaged.write_text("{")

    monkeypatch.setattr(figures, "gallery", fails)
    out = tmp_path / "out"
    assert figures.main([str(tmp_path / "runs"), *SMALL, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"figures.py: {damaged} is left out: ")
    assert lines[1].startswith(f"figures.py: {log} cannot be read")
    assert lines[2] == "figures.py: figure4 is not drawn: no photograph"
    files = [line for line in printed.out.splitlines() if line.startswith(str(out))]
    assert len(files) == 8
    assert all(np.asarray(Image.open(file).convert("L")).std() > 10 for file in files)


def test_out_is_checked_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    line = refused(figures.main, ["nowhere", "--out", str(tmp_path / "file")])
    assert line == f"cannot write to {tmp_path}/file: it is a file. Choose another --out"
    with pytest.raises(SystemExit, match="2"):
        figures.main(["runs", "--source", "paper", "--out", str(tmp_path)])


def test_a_notebooks_backend_does_no_harm():
    start = (ROOT / "figures.py").read_text().split("\nimport numpy")[0]  # all of it takes seconds
    assert start.endswith("\nimport matplotlib")
    environment = os.environ | {"MPLBACKEND": "not_installed"}
    subprocess.run([sys.executable, "-c", start], env=environment, check=True)
