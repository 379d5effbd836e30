"""Evaluation: calibration against hand counts and torchmetrics, the 18 x 5 loop against a plain loop, bad input."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import checkpoints
import data
import evaluate
import runs
import train
from models import build_model

# RMS calibration error


def plain_rms_calibration_error(confidence, correct, n_bins=15):
    total = 0.0
    for k in range(n_bins):
        inside = [
            i for i, c in enumerate(confidence) if k / n_bins <= c < (k + 1) / n_bins or (k == n_bins - 1 and c == 1)
        ]
        if inside:
            gap = sum(correct[i] for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * gap**2
    return math.sqrt(total)


def test_calibration_by_hand():
    # bins 0, 7 and 14 of 15: gaps 0.05, 0.5 and -0.5
    confidence, correct = [0.05, 0.5, 0.5, 1.0, 1.0], [0, 1, 1, 1, 0]
    expected = math.sqrt(1 / 5 * 0.05**2 + 2 / 5 * 0.5**2 + 2 / 5 * 0.5**2)
    assert evaluate.rms_calibration_error(confidence, correct) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 99, 5000])
def test_calibration_against_a_plain_loop(n):
    rng = np.random.default_rng(n)
    confidence = rng.choice([0.0, 1.0, 1 / 15, 0.2, 7 / 15, *rng.random(40)], size=n)
    correct = rng.random(n) < confidence
    for bins in (1, 10, 15):
        expected = plain_rms_calibration_error(confidence, correct, bins)
        assert evaluate.rms_calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_against_torchmetrics():
    from torchmetrics.functional.classification import binary_calibration_error

    rng = np.random.default_rng(0)
    confidence = rng.random(4000)  # never exactly 1, where torchmetrics opens a sixteenth bin
    correct = (rng.random(4000) < confidence**2).astype(np.int64)
    theirs = binary_calibration_error(torch.tensor(confidence), torch.tensor(correct), n_bins=15, norm="l2")
    assert evaluate.rms_calibration_error(confidence, correct) == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize(("n", "groups"), [(1, [1]), (199, [199]), (200, [100, 100]), (250, [100, 150]),
                                           (399, [100, 100, 199])])  # fmt: skip
def test_adaptive_groups(n, groups):
    rng = np.random.default_rng(n)
    confidence, correct = rng.random(n), rng.random(n) < 0.5
    order, start, total = np.argsort(confidence), 0, 0.0
    for size in groups:
        rows = order[start : start + size]
        total += size / n * (correct[rows].mean() - confidence[rows].mean()) ** 2
        start += size
    ours = evaluate.rms_calibration_error(confidence, correct, n_bins=3, adaptive=True)
    assert ours == pytest.approx(math.sqrt(total), abs=1e-12)


def test_calibration_extremes():
    assert evaluate.rms_calibration_error([1.0] * 3, [1] * 3) == 0
    assert evaluate.rms_calibration_error([1.0] * 3, [0] * 3) == 1
    assert evaluate.rms_calibration_error([0.0], [0]) == 0
    assert evaluate.rms_calibration_error([0.0], [1]) == 1


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [([], [], "calibration needs"), ([0.5], [1, 0], "calibration needs"), ([math.nan], [1], "not a number"),
     ([1.1], [1], "not a number"), ([-0.1], [1], "not a number"), ([math.inf], [1], "not a number"),
     ([0.5], [2], "neither 0 nor 1"), ([0.5], [math.nan], "neither 0 nor 1")],
)  # fmt: skip
def test_calibration_refuses(confidence, correct, message):
    for adaptive in (False, True):
        with pytest.raises(ValueError, match=message):
            evaluate.rms_calibration_error(confidence, correct, adaptive=adaptive)
    with pytest.raises(ValueError, match="at least one bin"):
        evaluate.rms_calibration_error([0.5], [1], n_bins=0)


def test_reliability_counts_agree_with_the_error():
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(500).astype(np.float32), rng.random(500) < 0.7
    rows = evaluate.reliability(confidence, correct)
    assert sum(count for count, _, _ in rows) == 500
    error = math.sqrt(sum((hits - conf) ** 2 / count for count, conf, hits in rows if count) / 500)
    assert error == pytest.approx(evaluate.rms_calibration_error(confidence, correct))


# Prediction


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, 4)

    def forward(self, x):
        return self.fc(x.reshape(len(x), -1))


@pytest.fixture
def images():
    return torch.randint(0, 256, (23, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_predict_is_the_softmax_maximum_and_restores_the_mode(images):
    torch.manual_seed(0)
    model = Linear().train()
    confidence, prediction = evaluate.predict(model, images, batch_size=5)
    probabilities = torch.softmax(model(images / 255), dim=1)
    assert torch.allclose(confidence, probabilities.amax(1))
    assert torch.equal(prediction, probabilities.argmax(1))
    assert model.training
    assert not confidence.requires_grad


def test_rse_averages_probabilities_over_its_draws(images):
    torch.manual_seed(0)
    model, draws = Linear(), torch.Generator().manual_seed(7)
    confidence, prediction = evaluate.predict(model, images, noise_sigma=0.5, samples=10, generator_seed=7)
    noisy = [model(images / 255 + 0.5 * torch.randn(images.shape, generator=draws)).softmax(1) for _ in range(10)]
    mean = torch.stack(noisy).mean(0)
    assert torch.allclose(confidence, mean.amax(1), atol=1e-6)
    assert torch.equal(prediction, mean.argmax(1))


def test_rse_draws_depend_on_seed_and_set():
    config = {"method": "rse", "seed": 1, "rse_sigma": 0.1, "rse_samples": 10}
    sets = [(s, name) for s in (0, 1) for name in ("clean", "fog-1")]
    seeds = {evaluate.ensemble(config | {"seed": s}, name)["generator_seed"] for s, name in sets}
    assert len(seeds) == 4
    assert evaluate.ensemble(config | {"method": "gn"}, "clean") == {}


# The loop over corrupted sets and the script


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a fake DIGITS-C, and a run of two epochs on digits."""
    place = tmp_path_factory.mktemp("evaluate")
    folder = place / "data" / "DIGITS-C"
    folder.mkdir(parents=True)
    labels = data.load_dataset("digits", place / "data").test_labels.numpy()
    rng = np.random.default_rng(0)
    for name in data.ALL_CORRUPTIONS:
        np.save(folder / f"{name}.npy", rng.integers(0, 256, (5 * len(labels), 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(labels, 5))
    flags = "--dataset digits --arch resnet20 --method standard --epochs 2 --subset 64 --batch-size 32 --lr 0.05"
    train.main([*flags.split(), "--data", str(place / "data"), "--out", str(place / "run")])
    return place


def run_evaluate(place, *flags, run="run"):
    (place / run / "results.json").unlink(missing_ok=True)
    return evaluate.main([str(place / run), "--data", str(place / "data"), "--limit", "12", *flags])


def test_results_equal_a_plain_loop(workplace, capsys):
    assert run_evaluate(workplace, "--all19") == 0
    results = json.loads((workplace / "run" / "results.json").read_text())
    dataset = data.load_dataset("digits", workplace)
    saved = torch.load(workplace / "run" / "last.pt", weights_only=True)
    model = build_model("resnet20", 10, dataset.mean, dataset.std).eval()
    model.load_state_dict(saved["model"])

    per_set, all_confidence, all_correct = {}, [], []
    for name in data.ALL_CORRUPTIONS:
        arrays = np.load(workplace / "data" / "DIGITS-C" / f"{name}.npy")
        for severity in range(5):
            cell = arrays[360 * severity : 360 * severity + 12].transpose(0, 3, 1, 2)
            with torch.no_grad():
                probabilities = model(torch.tensor(cell / 255, dtype=torch.float32)).softmax(1).numpy()
            correct = probabilities.argmax(1) == dataset.test_labels[:12].numpy()
            per_set[name, severity] = 100 * correct.mean()
            if name != "gaussian_noise":
                all_confidence.extend(probabilities.max(1).clip(max=1))
                all_correct.extend(correct)
    e = results["last"]
    for (name, severity), accuracy in per_set.items():
        assert e["corruptions"][name][severity]["accuracy"] == pytest.approx(accuracy)
    assert e["mca"] == pytest.approx(np.mean([a for (n, _), a in per_set.items() if n != "gaussian_noise"]))
    fifteen = ["gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur",
               "zoom_blur",
               "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
               "jpeg_compression"]  # fmt: skip
    assert e["mca15"] == pytest.approx(np.mean([per_set[n, s] for n in fifteen for s in range(5)]))
    expected = 100 * plain_rms_calibration_error(all_confidence, all_correct)
    assert e["corrupt_rms_calibration_error"] == pytest.approx(expected, abs=0.05)
    assert results["limit"] == results["test_images"] == 12
    assert results["corruption_source"] == "unverified"
    assert results["data_source"] == "embedded"
    assert results["train_images"] == 64
    assert results["hparams"]["epochs"] == 2
    assert "first 12 images" in capsys.readouterr().out
    assert not (workplace / "run" / ".evaluation").exists()


def test_best_and_last_of_one_epoch_are_evaluated_once(workplace, monkeypatch):
    last = runs.load_checkpoint(workplace / "run" / "last.pt")
    twin = workplace / "twin"
    twin.mkdir(exist_ok=True)
    for name in ("config.json", "last.pt", "timing.csv"):
        (twin / name).write_bytes((workplace / "run" / name).read_bytes())
    runs.save_checkpoint(twin / "best.pt", {k: last[k] for k in ("model", "epoch", "config")})
    calls = []
    original = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **k: calls.append(1) or original(*a, **k))
    run_evaluate(workplace, run="twin")
    results = json.loads((twin / "results.json").read_text())
    assert calls == [1]
    assert results["best"] == results["last"]
    run_evaluate(workplace, "--only", "last", run="twin")
    assert json.loads((twin / "results.json").read_text())["best"] is None


def test_an_interrupted_evaluation_goes_on(workplace, monkeypatch):
    run_evaluate(workplace, "--only", "last")
    whole = json.loads((workplace / "run" / "results.json").read_text())
    evaluated = []
    original = evaluate.write_kept

    def keep(path, *rest):
        original(path, *rest)
        evaluated.append(path.stem)
        if len(evaluated) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "write_kept", keep)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(workplace, "--only", "last")
    damaged = next((workplace / "run" / ".evaluation" / "last").glob("*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:-30])  # is evaluated anew
    run_evaluate(workplace, "--only", "last")
    assert len(evaluated) == 18 + 1
    again = json.loads((workplace / "run" / "results.json").read_text())
    for results in (whole, again):
        results.pop("evaluation_seconds"), results.pop("wall_seconds")
    assert again == whole


def test_results_that_hold_more_are_not_replaced(workplace, tmp_path):
    run_evaluate(workplace, "--all19")
    results = workplace / "run" / "results.json"
    before = results.read_bytes()
    flags = [str(workplace / "run"), "--data", str(workplace / "data")]
    for more, message in (
        (["--limit", "12", "--all19", "--only", "last"], "has results of best.pt, which these would replace"),
        (["--limit", "11", "--all19"], "has results of more images, which"),
        (["--limit", "12"], "has results of 19 corruptions, which"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main([*flags, *more])
    assert results.read_bytes() == before
    evaluate.main([*flags, "--limit", "11", "--out", str(tmp_path / "few.json")])  # elsewhere
    evaluate.main([*flags, "--limit", "13", "--all19"])  # more
    assert json.loads(results.read_text())["limit"] == 13


def test_cells_kept_under_another_normalisation_are_made_anew(workplace, tmp_path, monkeypatch):
    state = torch.load(workplace / "run" / "best.pt", weights_only=True)["model"]
    torch.save(state, tmp_path / "theirs.pt")
    arch = json.loads((workplace / "run" / "config.json").read_text())["arch"]
    flags = ["--checkpoint", str(tmp_path / "theirs.pt"), "--arch", arch, "--dataset", "digits", "--limit", "12",
             "--data", str(workplace / "data")]  # fmt: skip
    evaluate.main([*flags, "--no-normalize"])
    whole = json.loads((tmp_path / "theirs.pt.results.json").read_text())["foreign"]
    original = evaluate.write_kept

    def keep(path, *rest):
        original(path, *rest)
        if path.stem == "fog":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_kept", keep)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main(flags)
    evaluate.main([*flags, "--no-normalize"])
    assert json.loads((tmp_path / "theirs.pt.results.json").read_text())["foreign"] == whole


def test_foreign_checkpoints(workplace, capsys):
    model = checkpoints.load_run(
        workplace / "run", "last", json.loads((workplace / "run" / "config.json").read_text()),
        data.load_dataset("digits", workplace),
    )[0]  # fmt: skip
    state = {f"module.{k.replace('fc', 'linear')}": v for k, v in model.state_dict().items()}
    torch.save({"net": state}, workplace / "theirs.pt")
    flags = ["--checkpoint", str(workplace / "theirs.pt"), "--data", str(workplace / "data"), "--limit", "12"]
    assert evaluate.main([*flags, "--arch", "resnet20", "--dataset", "digits"]) == 0
    foreign = json.loads((workplace / "theirs.pt.results.json").read_text())["foreign"]
    run_evaluate(workplace, "--only", "last")
    ours = json.loads((workplace / "run" / "results.json").read_text())["last"]
    assert foreign["mca"] == ours["mca"]
    assert foreign["clean"] == ours["clean"]
    assert evaluate.main([*flags, "--arch", "resnet20", "--dataset", "digits", "--no-normalize"]) == 0
    other = json.loads((workplace / "theirs.pt.results.json").read_text())["foreign"]
    assert other["clean"] != ours["clean"]
    with pytest.raises(ValueError, match=r"theirs\.pt"):
        evaluate.main([*flags, "--arch", "resnet18", "--dataset", "digits"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [([], "name a run's folder or --checkpoint"), (["RUN", "--limit", "0"], "--limit"),
     (["RUN", "--limit", "361"], "has 360 test images"), (["--checkpoint", "x.pt"], "needs --arch"),
     (["--checkpoint", "x.pt", "--arch", "resnet18"], "no checkpoint x.pt"), (["nowhere"], "no run folder nowhere"),
     (["RUN", "--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU"),
     (["RUN", "--device", "tpu"], "no such device")],
)  # fmt: skip
def test_bad_flags(workplace, flags, message):
    flags = [str(workplace / "run") if f == "RUN" else f for f in flags]
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.main([*flags, "--data", str(workplace / "data")])


def test_bad_runs(workplace):
    bad = workplace / "bad"
    bad.mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        run_evaluate(workplace, run="bad")
    config = json.loads((workplace / "run" / "config.json").read_text())
    runs.write_json(bad / "config.json", config)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run_evaluate(workplace, run="bad")
    (bad / "last.pt").write_bytes((workplace / "run" / "last.pt").read_bytes())
    for key, value, message in [("arch", "resnet18", "checkpoint of arch resnet20"), ("epochs", 3, "unfinished"),
                                ("dataset", "mnist", "no run's configuration")]:  # fmt: skip
        runs.write_json(bad / "config.json", config | {key: value})
        with pytest.raises(ValueError, match=message):
            run_evaluate(workplace, "--only", "last", run="bad")
    saved = runs.load_checkpoint(workplace / "run" / "last.pt")
    saved["model"]["fc.weight"] = saved["model"]["fc.weight"][:7]
    runs.save_checkpoint(bad / "last.pt", saved)
    runs.write_json(bad / "config.json", config)
    with pytest.raises(ValueError, match="no checkpoint of resnet20 for digits"):
        run_evaluate(workplace, "--only", "last", run="bad")


def test_labels_that_disagree(workplace, tmp_path):
    for file in (workplace / "data" / "DIGITS-C").iterdir():
        (tmp_path / "DIGITS-C").mkdir(exist_ok=True)
        (tmp_path / "DIGITS-C" / file.name).symlink_to(file)
    labels = np.load(tmp_path / "DIGITS-C" / "labels.npy")
    (tmp_path / "DIGITS-C" / "labels.npy").unlink()
    np.save(tmp_path / "DIGITS-C" / "labels.npy", (labels + 1) % 10)
    (workplace / "run" / "results.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="labels of brightness"):
        evaluate.main([str(workplace / "run"), "--data", str(tmp_path), "--limit", "2"])


def test_best_of_an_unfinished_run_is_refused(workplace):
    part = workplace / "part"
    part.mkdir(exist_ok=True)
    for name in ("config.json", "last.pt", "best.pt"):
        (part / name).write_bytes((workplace / "run" / name).read_bytes())
    config = json.loads((part / "config.json").read_text())
    runs.write_json(part / "config.json", config | {"epochs": 3})
    with pytest.raises(ValueError, match="unfinished"):
        run_evaluate(workplace, "--only", "best", run="part")


def test_without_corrupted_sets_the_commands_are_named(workplace, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corruptions\.py --dataset digits"):
        evaluate.main([str(workplace / "run"), "--data", str(tmp_path)])
