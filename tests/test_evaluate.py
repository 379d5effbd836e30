"""Calibration against plain loops, the 18 x 5 loop on known predictions, the script's results."""

import copy
import functools
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN, refused
from torch import nn

import evaluate
import utils
from data import CORRUPTIONS, Dataset, load_dataset
from evaluate import rms_calibration_error
from models import build_model

N = 12  # images of `noise`


# RMS calibration error


def plain_error(confidence, correct, n_bins=16):
    total = 0.0
    for k in range(n_bins):
        low, high = k / n_bins, (k + 1) / n_bins
        inside = [i for i, c in enumerate(confidence) if low < c <= high or c == k == 0]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            gap = accuracy - sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * gap**2
    return math.sqrt(total)


def predictions(n):
    """Confidences, half of them on the edges of bins, and outcomes."""
    rng = np.random.default_rng(n)
    confidence = np.where(rng.random(n) < 0.5, rng.integers(1, 17, n) / 16, rng.random(n))
    return confidence, rng.random(n) < confidence**2


@pytest.mark.parametrize("n", [1, 2, 99, 3000])
def test_calibration_against_a_plain_loop(n):
    confidence, correct = predictions(n)
    for bins in (1, 10, 16):
        expected = plain_error(confidence, correct, bins)
        error = rms_calibration_error(torch.tensor(confidence), correct, bins)
        assert error == pytest.approx(expected, abs=1e-12)
    assert rms_calibration_error([0.0, 0.05], [1, 0]) == pytest.approx(0.475)  # 0: the first bin


def test_calibration_against_torchmetrics():
    """Its bins hold their lower edge; mirrored, p -> 1 - p, their upper one. (No p is 0 here.)"""
    from torchmetrics.functional.classification import binary_calibration_error

    confidence, correct = predictions(4000)
    mirrored = torch.tensor(1 - confidence), torch.tensor(1 - correct.astype(int))
    expected = binary_calibration_error(*mirrored, n_bins=16, norm="l2").item()
    assert rms_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "sizes"), [(1, [1]), (199, [199]), (200, [100, 100]), (399, [100, 100, 199])]
)
def test_adaptive_calibration_is_groups_of_100_the_remainder_joined_to_the_last(n, sizes):
    confidence, correct = predictions(n)
    ties = np.random.default_rng(n).random(n) * 1e-9  # broken
    confidence = np.where(confidence < 1 - 1e-6, confidence + ties, confidence - ties)
    rows, total = np.argsort(confidence), 0.0
    for size in sizes:
        total += size / n * (correct[rows[:size]].mean() - confidence[rows[:size]].mean()) ** 2
        rows = rows[size:]
    error = rms_calibration_error(confidence, correct, 3, adaptive=True)
    assert error == pytest.approx(math.sqrt(total), abs=1e-12)


def test_calibration_refuses():
    for confidence, correct, message in (
        ([], [], "at least one"), ([0.5], [1, 0], r"\(1,\) confidences and \(2,\) outcomes"),
        (np.ones((2, 3)), np.ones((3, 2)), "expected one outcome for each"),
        ([math.nan], [1], "not a number in"), ([1.1], [1], "not a number in"),
        ([-0.1], [1], "not a number in"), ([0.5], [2], "neither 0 nor 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            rms_calibration_error(confidence, correct)
    with pytest.raises(ValueError, match="n_bins must be at least 1, not 0"):
        rms_calibration_error([0.5], [1], n_bins=0)


# The 18 x 5 loop on known predictions


class Reader(nn.Module):
    """A network without parameters: an image's first pixels are its logits."""

    def forward(self, x):
        return 8.0 * x[:, 0, 0, :4]


def known(images, labels):
    """(confidence, correct) of Reader for uint8 (N, 32, 32, 3), in plain numpy."""
    logits = 8.0 * images[:, 0, :4, 0].astype(np.float64) / 255
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p.max(1), p.argmax(1) == labels


def assert_cell(cell, confidence, correct):
    assert cell["accuracy"] == pytest.approx(100 * np.mean(correct.tolist()))
    error = 100 * plain_error(confidence.tolist(), correct.tolist())
    assert cell["rms_calibration_error"] == pytest.approx(error, abs=1e-4)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """(dataset, root): random images of four classes, with the 18 corruptions and two more."""
    root = tmp_path_factory.mktemp("noise")
    labels, rng = np.arange(N) % 4, np.random.default_rng(0)
    (root / "noise-C").mkdir()
    for name in (*CORRUPTIONS, "gaussian_noise", "mine"):
        images = rng.integers(0, 256, (5 * N, 32, 32, 3), np.uint8)
        np.save(root / f"noise-C/{name}.npy", images)
    np.save(root / "noise-C/labels.npy", np.tile(labels, 5))
    test = torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8)
    y = torch.from_numpy(labels)
    return Dataset("noise", test[:0], y[:0], test, y, list("abcd"), True, "random"), root


@pytest.mark.parametrize("limit", [None, 7])
def test_mca_and_pooled_errors_are_those_of_a_plain_loop(noise, limit):
    dataset, root = noise
    e = evaluate.evaluate(Reader(), dataset, root, limit=limit, batch_size=5)
    labels, cells, pooled = dataset.test_labels[:limit].numpy(), [], ([], [])
    for name in (*CORRUPTIONS, "gaussian_noise", "mine"):
        images = np.load(root / f"noise-C/{name}.npy")
        assert len(e["corruptions"][name]) == 5
        for severity, cell in enumerate(e["corruptions"][name]):
            confidence, correct = known(images[N * severity :][:N][:limit], labels)
            assert_cell(cell, confidence, correct)
            if name in CORRUPTIONS:
                cells.append(100 * correct.mean())
                pooled[0].extend(confidence)
                pooled[1].extend(correct)
    assert list(e["corruptions"]) == [*CORRUPTIONS, "gaussian_noise", "mine"]
    assert len(cells) == 90
    assert e["mca"] == pytest.approx(sum(cells) / 90)
    assert e["corrupt_rms_calibration_error"] == pytest.approx(100 * plain_error(*pooled), abs=1e-4)
    adaptive = 100 * rms_calibration_error(*map(np.array, pooled), adaptive=True)
    assert e["corrupt_rms_calibration_error_adaptive"] == pytest.approx(adaptive, abs=1e-4)
    clean = known(dataset.test_images.permute(0, 2, 3, 1).numpy()[:limit], labels)
    assert_cell(e["clean"], *clean)
    for kind, (confidence, correct) in {"clean": clean, "corrupt": pooled}.items():
        count, total, hits = np.transpose(e["reliability"][kind])
        assert (len(count), count.sum(), hits.sum()) == (16, len(correct), sum(correct))
        filled = count > 0
        error = math.sqrt(((hits - total)[filled] ** 2 / count[filled]).sum() / len(correct))
        assert error == pytest.approx(plain_error(confidence, correct), abs=1e-6)
    only_clean = evaluate.evaluate(Reader(), dataset, "nowhere", limit=limit, clean_only=True)
    reliability = {"clean": e["reliability"]["clean"]}
    assert only_clean == {"clean": e["clean"], "reliability": reliability}


def test_rse_averages_probabilities_over_draws_that_depend_on_seed_and_set(noise):
    dataset, root = noise
    before = torch.get_rng_state()
    e = evaluate.evaluate(Reader(), dataset, root, seed=1, noise_sigma=0.3, samples=3)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's
    fog = torch.tensor(np.load(root / "noise-C/fog.npy")[N : 2 * N]).permute(0, 3, 1, 2)
    for key, images, cell in (
        (("clean",), dataset.test_images, e["clean"]),
        (("fog", 2), fog, e["corruptions"]["fog"][1]),
    ):
        utils.seed(1, *key)
        x = images / 255
        p = torch.stack([Reader()(x + 0.3 * torch.randn_like(x)).softmax(1) for _ in range(3)])
        confidence, prediction = p.mean(0).max(1)
        assert_cell(cell, confidence, prediction == dataset.test_labels)


def test_predict_is_in_eval_mode_and_restores_each_submodules_mode(noise):
    images = noise[0].test_images
    f = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), Reader()).train()
    f[0].eval()  # the user's frozen batch norm
    modes = [module.training for module in f.modules()]
    confidence, _ = evaluate.predict(f, images)
    assert [module.training for module in f.modules()] == modes == [True, False, True, True]
    torch.testing.assert_close(confidence, f.eval()(images / 255).softmax(1).amax(1).detach())


def test_predict_in_half_precision_has_its_softmax_in_float32(noise):
    torch.manual_seed(0)
    f = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))
    images = noise[0].test_images
    confidence, _ = evaluate.predict(f, images, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = f(images / 255)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(confidence, logits.float().softmax(1).amax(1))
    assert not torch.equal(confidence, evaluate.predict(f, images)[0])
    e = evaluate.evaluate(f, noise[0], "", dtype=torch.bfloat16, clean_only=True)
    pooled = sum(total for _, total, _ in e["reliability"]["clean"])
    assert pooled == pytest.approx(confidence.double().sum().item())


def test_a_mean_over_ten_certain_draws_is_not_above_1(noise):
    images = torch.zeros_like(noise[0].test_images)
    images[:, 0, 0, 0] = 255
    f = nn.Sequential(Reader(), nn.Hardshrink(6), nn.Threshold(5, -1000))
    confidence, _ = evaluate.predict(f, images, noise_sigma=0.01, samples=10)
    assert confidence.min() == confidence.max() == 1


def test_images_of_another_form_and_networks_that_fail_are_refused(noise):
    dataset, root = noise
    for wrong in (dataset.test_images / 255, dataset.test_images.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"expected uint8 \(B, 3, H, W\)"):
            evaluate.predict(Reader(), wrong)
    f = nn.Sequential(Reader(), nn.Threshold(7.9, math.nan))
    with pytest.raises(utils.UserError, match="the network's output is NaN on clean"):
        evaluate.evaluate(f, dataset, root)


# The script


@pytest.fixture
def run(home, place):
    """evaluate.py for a copy of the trained run, which has results.json."""
    shutil.copytree(home / "runs", "runs")
    return lambda *flags: evaluate.main([str(RUN), "--device", "cpu", *map(str, flags)])


@pytest.fixture
def refusal(run, monkeypatch):
    """The message with which an evaluation ends, before any prediction."""
    monkeypatch.setattr(evaluate, "predict", None)
    return functools.partial(refused, run)


@pytest.fixture
def entry(home):
    """What evaluate.evaluate returned for last.pt of the run."""
    entry = utils.read_json(home / RUN / "results.json")["last"]
    del entry["epoch"]
    return entry


@pytest.fixture
def calls(monkeypatch, entry):
    """The keyword arguments of calls of evaluate.evaluate, which is not run but returns `entry`."""
    calls = []

    def evaluated(f, dataset, root, **options):
        calls.append(options | {"dataset": dataset})
        return copy.deepcopy(entry)

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    return calls


def change(which, **changes):
    """Change a checkpoint of the run; those of its recipe by `recipe`."""
    saved = utils.load_checkpoint(RUN / f"{which}.pt")
    changes["recipe"] = saved["recipe"] | changes.get("recipe", {})
    utils.save_checkpoint(RUN / f"{which}.pt", saved | changes)


def test_results_have_their_form(run):
    results, config = (utils.read_json(RUN / f"{name}.json") for name in ("results", "config"))
    assert list(results) == [*config, "evaluation", "best", "last"]
    assert results.items() >= config.items()
    about, made = results["evaluation"], utils.read_json("data/tiny-C/generated.json")
    fixed = {"corruption_source": "generated", "test_images": 20, "amp": "off", "limit": None}
    fixed |= {"test_sha256": made["clean_sha256"]}
    assert about.items() >= fixed.items()
    assert about.keys() - fixed.keys() == {"device", "versions", "commit"}
    three = {"accuracy", "rms_calibration_error", "rms_calibration_error_adaptive"}
    for which in ("best", "last"):
        e = results[which]
        assert e["epoch"] == utils.load_checkpoint(RUN / f"{which}.pt")["epoch"]
        assert set(e) == {
            "epoch", "clean", "corruptions", "mca", "corrupt_rms_calibration_error",
            "corrupt_rms_calibration_error_adaptive", "reliability",
        }  # fmt: skip
        assert e["clean"].keys() == three
        assert list(e["corruptions"]) == [*CORRUPTIONS, "gaussian_noise"]


def test_each_checkpoint_is_evaluated_with_its_own_weights(run, entry):
    dataset = load_dataset("data/tiny.npz", "")
    last = utils.load_checkpoint(RUN / "last.pt")["model"]
    bias = torch.tensor([0.0, 9, 0, 0, 0, 0, 0, 0, 0])
    one_class = last | {"fc.weight": torch.zeros_like(last["fc.weight"]), "fc.bias": bias}
    change("best", epoch=1, model=one_class)
    change("last", epoch=2)
    run("--clean", "--out", "clean.json")
    results = utils.read_json("clean.json")
    assert results["evaluation"]["corruption_source"] is None
    confidence = torch.full((20,), 1 / (1 + 8 * math.exp(-9)))
    assert_cell(results["best"]["clean"], confidence, dataset.test_labels == 1)
    f = build_model("resnet20", 9)
    f.load_state_dict(last)
    snow = torch.from_numpy(np.load("data/tiny-C/snow.npy")[80:]).permute(0, 3, 1, 2)
    for images, cell in (
        (dataset.test_images, results["last"]["clean"]),
        (dataset.test_images, entry["clean"]),
        (snow, entry["corruptions"]["snow"][4]),
    ):
        with torch.no_grad():
            confidence, prediction = f.eval()(images / 255).softmax(1).max(1)
        assert_cell(cell, confidence, prediction == dataset.test_labels)


def test_the_columns_that_are_printed(run, calls, entry, capsys):
    change("best", epoch=1)
    change("last", epoch=2)
    run()
    lines, fog = capsys.readouterr().out.splitlines(), entry["corruptions"]["fog"]
    assert lines[1].split() == ["best.pt,", "epoch", "1", "last.pt,", "epoch", "2"]
    error = "corrupt_rms_calibration_error"
    for label, value in (
        ("clean accuracy", entry["clean"]["accuracy"]), ("mCA", entry["mca"]),
        ("fog", np.mean([cell["accuracy"] for cell in fog])),
        ("RMS calibration error, corrupt", entry[error]),
        ("RMS calibration error, adaptive, corrupt", entry[f"{error}_adaptive"]),
    ):  # fmt: skip
        assert f"{label:<41}{value:20.2f}{value:20.2f}" in lines


@pytest.mark.parametrize(
    ("flags", "existing", "written"),
    [
        ("", True, "results.json"),
        ("--only best", False, "results.json"),
        ("--only best", True, None),  # it may hold both
        ("--clean", False, None),
        ("--limit 2", False, None),
        ("--dataset new.npz", False, None),
        ("--dataset moved/tiny.npz", False, "results.json"),
        ("--limit 2 --out sub/out.json", True, "sub/out.json"),
    ],
)
def test_where_results_are_written(run, calls, capsys, flags, existing, written):
    with np.load("data/tiny.npz") as file:
        new = {f"test_{kind}": file[f"test_{kind}"][:10] for kind in ("images", "labels")}
    np.savez("new.npz", **new, classes=np.arange(9).astype(str))  # as CIFAR-10.1: no train images
    Path("moved").mkdir()
    shutil.copy("data/tiny.npz", "moved/tiny.npz")
    own, path = RUN / "results.json", written and Path(written)
    own.write_text("{}")
    if not existing:
        own.unlink()
    if written == "results.json":
        path = own
    run(*flags.split())
    limit = 2 if "--limit" in flags else None
    last_line = f"written to {path}" if written else "not saved; --out FILE saves it"
    assert capsys.readouterr().out.splitlines()[-1] == last_line
    if written:
        results = utils.read_json(path)
        assert (results["last"] is None) is ("--only best" in flags)
        about = results["evaluation"]
        assert (about["limit"], about["test_images"]) == (limit, limit or 20)
    if path != own:
        assert own.exists() is existing
        assert not existing or own.read_text() == "{}"
    expected = {"limit": limit, "clean_only": "--clean" in flags}
    assert all(call.items() >= expected.items() for call in calls)


def test_results_are_written_before_they_are_printed_to_a_closed_pipe(run, calls, monkeypatch):
    (RUN / "results.json").unlink()
    read, write = os.pipe()
    os.close(read)  # `| head -1` has ended
    with open(write, "w", buffering=1) as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert utils.run_main(run) == 0
    assert utils.read_json(RUN / "results.json")["last"]["mca"]


@pytest.mark.parametrize("lost", ["best", "last"])
def test_a_lost_checkpoint_is_named_and_the_other_evaluated(run, refusal, calls, capsys, lost):
    kept, path = {"best": "last", "last": "best"}[lost], RUN / "results.json"
    (RUN / f"{lost}.pt").unlink()
    (RUN / "config.json").unlink()  # the checkpoints have it
    before = path.read_bytes()
    for flags in ((), ("--only", kept)):
        run(*flags)
        assert capsys.readouterr().err == f"{RUN} has no {lost}.pt; evaluating the other only\n"
        assert path.read_bytes() == before  # with the lost one's results
    path.unlink()
    run()
    results = utils.read_json(path)
    assert results[lost] is None
    assert results[kept]["mca"]
    assert f"--only {lost}: {RUN} has no {lost}.pt. Leave --only out" in refusal("--only", lost)


def test_best_and_last_of_one_epoch_are_evaluated_once(run, calls):
    for epoch, times in ((2, 1), (1, 3)):  # in all
        change("best", epoch=epoch)
        run()
        results = utils.read_json(RUN / "results.json")
        assert (len(calls), results["best"]["epoch"], results["last"]["epoch"]) == (times, epoch, 2)


def test_precision_is_float32_if_training_was(run, calls, monkeypatch):
    dtypes = {"auto": torch.float16, "bf16": torch.bfloat16, "off": None}  # of an older GPU
    monkeypatch.setattr(utils, "amp_dtype", lambda amp, device: dtypes[amp])
    for amp, trained, used in (
        ("auto", "off", "off"), ("auto", "bf16", "fp16"), ("bf16", "off", "bf16"),
    ):  # fmt: skip
        change("best", recipe={"amp": trained})
        run("--amp", amp)
        assert utils.read_json(RUN / "results.json")["evaluation"]["amp"] == used
        assert utils.amp_name(calls.pop(0)["dtype"]) == used
        calls.clear()


def test_rses_ensemble_is_the_runs(run, calls):
    change("best", recipe={"method": "rse", "rse_sigma": 0.3, "rse_samples": 4}, seed=3)
    run("--only", "best")
    assert calls[0].items() >= {"noise_sigma": 0.3, "samples": 4, "seed": 3}.items()


# What is refused


def test_a_place_that_cannot_be_written_is_found_out_before_any_prediction(refusal):
    assert "cannot write to /proc/self: " in refusal("--out", "/proc/self/out.json")  # root too
    assert "--out data is not a file. Name the file to write" in refusal("--out", "data")
    (RUN / "results.json").unlink()
    (RUN / "results.json").mkdir()
    assert "results.json is not a file" in refusal()


def test_data_that_do_not_fit_the_run(refusal):
    with np.load("data/tiny.npz") as file:
        arrays = dict(file)
    np.savez("three.npz", test_images=arrays["test_images"][:3], test_labels=np.arange(3))
    message = "three has 3 classes, not the run's 9"
    assert message in refusal("--dataset", "three.npz")
    np.savez("new.npz", **arrays | {"test_images": 255 - arrays["test_images"]})
    line = refusal("--dataset", "new.npz", "--clean", "--out", "new/results.json")
    assert "tables.py would show these numbers as tiny's. Choose another name" in line
    assert "--limit 21: tiny has 20 test images" in refusal("--limit", 21)
    assert "tiny-C does not exist" in refusal("--data", "nowhere")
    os.remove("data")  # the link
    assert "cannot read data/tiny.npz: No such file or directory. Name the file with" in refusal()
    Path("data").mkdir()
    np.savez("data/tiny.npz", **arrays | {"test_images": 255 - arrays["test_images"]})
    line = refusal()
    assert f"data/tiny.npz does not hold the images that {RUN} was trained on" in line
    assert "Name their file with --dataset" in line


def test_folders_that_are_not_a_finished_run(refusal):
    last = utils.load_checkpoint(RUN / "last.pt")
    change("last", epoch=1)
    assert f"{RUN} is unfinished (1 of 2 epochs). Train with --resume" in refusal()
    for which in ("best", "last"):
        change(which, recipe=last["recipe"] | {"arch": "mine"}, epoch=2)
    assert "this code's mine is not the run's (unknown arch 'mine'" in refusal()
    for content in ({"model": last["model"]}, {k: v for k, v in last.items() if k != "ran"}):
        utils.save_checkpoint(RUN / "last.pt", content)
        assert f"{RUN}/last.pt was not written by this version of train.py" in refusal()
    for which in ("best", "last"):
        (RUN / f"{which}.pt").unlink()
    assert f"{RUN} has no best.pt and no last.pt. Name a run's folder; if" in refusal()
