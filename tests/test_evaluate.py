"""Calibration against plain loops and torchmetrics; the 18 x 5 loop on predictions known beforehand; the script."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
import train
import utils
from data import CORRUPTIONS, load_dataset
from evaluate import rms_calibration_error

# RMS calibration error


def plain_error(confidence, correct, n_bins=16):
    total = 0.0
    for k in range(n_bins):
        inside = [i for i, c in enumerate(confidence) if k / n_bins < c <= (k + 1) / n_bins or (k == 0 and c == 0)]
        if inside:
            gap = sum(correct[i] for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
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
        assert rms_calibration_error(torch.tensor(confidence), correct, bins) == pytest.approx(expected, abs=1e-12)
    assert rms_calibration_error(confidence, correct) == rms_calibration_error(confidence, correct, 16)


def test_calibration_against_torchmetrics():
    """Its bins hold their lower edge; mirrored, p -> 1 - p, their upper one as ours. (A p of 0 never comes.)"""
    from torchmetrics.functional.classification import binary_calibration_error

    confidence, correct = predictions(4000)
    mirrored = torch.tensor(1 - confidence), torch.tensor(1 - correct.astype(int))
    theirs = binary_calibration_error(*mirrored, n_bins=16, norm="l2").item()
    assert rms_calibration_error(confidence, correct) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(("n", "sizes"), [(1, [1]), (199, [199]), (200, [100, 100]), (399, [100, 100, 199])])
def test_adaptive_calibration_is_groups_of_100_and_the_remainder_joined_to_the_last(n, sizes):
    confidence, correct = predictions(n)
    confidence = confidence + np.random.default_rng(n).random(n) * 1e-9 * (confidence < 1 - 1e-6)
    rows, total = np.argsort(confidence, kind="stable"), 0.0
    for size in sizes:
        total += size / n * (correct[rows[:size]].mean() - confidence[rows[:size]].mean()) ** 2
        rows = rows[size:]
    assert rms_calibration_error(confidence, correct, 3, adaptive=True) == pytest.approx(math.sqrt(total), abs=1e-12)


def test_calibration_refuses():
    for bad in (([], []), ([0.5], [1, 0]), ([math.nan], [1]), ([1.1], [1]), ([-0.1], [1]), ([0.5], [2])):
        with pytest.raises(ValueError, match=r"calibration needs|not a number"):
            rms_calibration_error(*bad)


# The folder that is evaluated

N = 12


class Small(nn.Module):
    """Stands in for ResNet-20, to be quick."""

    def __init__(self, arch, num_classes):
        super().__init__()
        self.conv1, self.bn1, self.fc = nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.bn1(self.conv1(x))).mean((2, 3)))


def write_corrupted(root, labels, *further):
    """A folder mine-C of random images, with the 18 and `further` corruptions."""
    (root / "mine-C").mkdir(exist_ok=True)
    for k, name in enumerate((*CORRUPTIONS, *further)):
        images = np.random.default_rng(k).integers(0, 256, (5 * len(labels), 32, 32, 3), np.uint8)
        np.save(root / "mine-C" / f"{name}.npy", images)
    np.save(root / "mine-C" / "labels.npy", np.tile(labels, 5))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with mine.npz, mine-C and a run of two epochs."""
    with pytest.MonkeyPatch.context() as patch:
        for script in (train, evaluate):
            patch.setattr(script, "build_model", Small)
        place, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
        train_images, test_images = (rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for n in (16, N))
        labels = {"train_labels": np.arange(16) % 4, "test_labels": np.arange(N) % 4}
        np.savez(place / "mine.npz", train_images=train_images, test_images=test_images, source="a test", **labels)
        write_corrupted(place, labels["test_labels"])
        flags = f"--dataset {place}/mine.npz --arch resnet20 --method standard --batch-size 8 --lr 0.05 --epochs 2"
        train.main([*flags.split(), "--eval-every", "1", "--device", "cpu", "--out", str(place / "run")])
        yield place


@pytest.fixture
def mine(place):
    """Its data set: twelve test images, four classes."""
    return load_dataset(str(place / "mine.npz"), "")


# The 18 x 5 loop on known predictions: the first pixels of an image are the logits that this network gives for it


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(8.0))

    def forward(self, x):
        return self.scale * x[:, 0, 0, :4]


def expected(images, labels):
    """(confidence, correct) of Reader for uint8 (N, 32, 32, 3), in plain numpy."""
    logits = 8.0 * images[:, 0, :4, 0].astype(np.float64) / 255
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p.max(1), p.argmax(1) == np.asarray(labels)


FIFTEEN = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
           "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate",
           "jpeg_compression")  # fmt: skip


@pytest.mark.parametrize("limit", [None, 7])
def test_mca_and_pooled_errors_are_those_of_a_plain_loop(tmp_path, mine, limit):
    write_corrupted(tmp_path, mine.test_labels, "gaussian_noise", "of_my_own")
    e = evaluate.evaluate(Reader(), mine, str(tmp_path), {}, None, limit)
    labels, cells, pooled = mine.test_labels[:limit], {}, ([], [])
    for name in (*CORRUPTIONS, "gaussian_noise", "of_my_own"):
        file = np.load(tmp_path / "mine-C" / f"{name}.npy")
        for severity in range(5):
            confidence, correct = expected(file[N * severity :][:N][:limit], labels)
            cells[name, severity] = 100 * correct.mean()
            assert e["corruptions"][name][severity]["accuracy"] == pytest.approx(cells[name, severity])
            error = 100 * plain_error(confidence, correct)
            assert e["corruptions"][name][severity]["rms_calibration_error"] == pytest.approx(error, abs=1e-4)
            if name in CORRUPTIONS:
                pooled[0].extend(confidence)
                pooled[1].extend(correct)
    assert list(e["corruptions"]) == [*CORRUPTIONS, "gaussian_noise", "of_my_own"]
    assert e["mca"] == pytest.approx(np.mean([cells[name, s] for name in CORRUPTIONS for s in range(5)]))
    assert e["mca15"] == pytest.approx(np.mean([cells[name, s] for name in FIFTEEN for s in range(5)]))
    assert e["corrupt_rms_calibration_error"] == pytest.approx(100 * plain_error(*pooled), abs=1e-4)
    adaptive = rms_calibration_error(*map(np.array, pooled), adaptive=True)
    assert e["corrupt_rms_calibration_error_adaptive"] == pytest.approx(100 * adaptive, abs=1e-4)
    clean = expected(mine.test_images.permute(0, 2, 3, 1).numpy()[:limit], labels)
    assert e["clean"]["accuracy"] == pytest.approx(100 * clean[1].mean())
    for kind, (confidence, correct) in {"clean": clean, "corrupt": pooled}.items():
        count, conf, hits = np.transpose(e["reliability"][kind])
        assert (count.sum(), hits.sum()) == (len(correct), sum(correct))
        error = math.sqrt(((hits - conf)[count > 0] ** 2 / count[count > 0]).sum() / len(correct))
        assert error == pytest.approx(plain_error(confidence, correct), abs=1e-6)


def test_rse_averages_probabilities_over_draws_that_depend_on_seed_and_set(place, mine):
    config = {"method": "rse", "rse_sigma": 0.3, "rse_samples": 3, "seed": 1}
    e = evaluate.evaluate(Reader(), mine, str(place), config, None, None)
    fog = torch.tensor(np.load(place / "mine-C" / "fog.npy")[N : 2 * N]).permute(0, 3, 1, 2)
    cases = ((("clean",), mine.test_images, e["clean"]), (("fog", 2), fog, e["corruptions"]["fog"][1]))
    for key, images, ours in cases:
        utils.seed(1, *key)
        x = images / 255
        p = torch.stack([Reader()(x + 0.3 * torch.randn_like(x)).softmax(1) for _ in range(3)]).mean(0)
        correct = (p.argmax(1) == mine.test_labels).numpy()
        assert ours["accuracy"] == pytest.approx(100 * correct.mean())
        error = 100 * plain_error(p.amax(1).tolist(), correct)
        assert ours["rms_calibration_error"] == pytest.approx(error, abs=1e-3)


def test_predict_is_the_same_for_many_images_as_for_few():
    images = torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8)  # three pieces
    p = Reader()(images / 255).softmax(1).detach()
    for how in ({}, {"noise_sigma": 1e-9, "samples": 2}):
        confidence, prediction = evaluate.predict(Reader(), images, **how)
        torch.testing.assert_close(confidence, p.amax(1))
        assert torch.equal(prediction, p.argmax(1))


def test_predict_is_in_eval_mode_and_leaves_the_mode_as_it_was(mine):
    f = nn.Sequential(Reader(), nn.Dropout(0.5)).train()
    assert torch.equal(evaluate.predict(f, mine.test_images)[1], Reader()(mine.test_images / 255).argmax(1))
    assert f.training


# The script


def run_evaluate(place, *flags):
    evaluate.main([*map(str, flags), "--data", str(place), "--device", "cpu", "--out", str(place / "results.json")])
    return utils.read_json(place / "results.json")


def test_results_have_their_form(place, capsys):
    results = run_evaluate(place, place / "run", "--only", "last", "--limit", 3, "--amp", "bf16")
    wanted = {"dataset": "mine", "arch": "resnet20", "method": "standard", "tag": "", "seed": 0, "limit": 3,
              "data_source": "a test", "corruption_source": "unverified", "train_images": 16, "test_images": 3,
              "amp": "off", "best": None}  # fmt: skip
    assert {key: results[key] for key in wanted} == wanted
    flags = vars(train.parse_args([])).keys() - {"dataset", "arch", "method", "seed", "tag", "amp"}
    assert results["hparams"].keys() == flags | {"processes"}
    assert results["evaluation"]["amp"] == "bf16"  # the run's own is off
    assert results["last"] != run_evaluate(place, place / "run", "--only", "last", "--limit", 3)["last"]
    assert results.keys() > results["evaluation"].keys() > {"device", "versions", "commit"}
    evaluate.check_results(results)
    assert "mca15" not in results["last"]  # there is no gaussian_noise
    shown = capsys.readouterr().out
    assert "standard resnet20, last.pt (epoch 2), on mine (a test), unverified corruptions, first 3 images" in shown
    e = results["last"]
    corrupt, adaptive = e["corrupt_rms_calibration_error"], e["corrupt_rms_calibration_error_adaptive"]
    for words, value in (("mCA", e["mca"]), ("RMS calibration error, corrupt", corrupt),
                         ("RMS calibration error, adaptive, corrupt", adaptive)):  # fmt: skip
        assert f"{words:<41}{value:6.2f}\n" in shown


def test_each_checkpoint_is_evaluated_with_its_own_weights(place):
    run = shutil.copytree(place / "run", place / "own")
    last = utils.load_checkpoint(run / "last.pt")
    one_class = last["model"] | {"fc.weight": torch.zeros(4, 8), "fc.bias": torch.tensor([0.0, 9, 0, 0])}
    utils.save_checkpoint(run / "best.pt", last | {"epoch": 1, "model": one_class})
    results = run_evaluate(place, run)
    assert (results["best"]["clean"]["accuracy"], results["best"]["mca"]) == (25, 25)
    confidence = 100 / (1 + 3 * math.exp(-9))
    assert results["best"]["corrupt_rms_calibration_error"] == pytest.approx(confidence - 25, abs=1e-4)
    f = Small("", 4)
    f.load_state_dict(last["model"])
    images = torch.tensor(np.load(place / "mine-C" / "snow.npy")[4 * N :]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        p = f.eval()(images).softmax(1)
    cell = results["last"]["corruptions"]["snow"][4]
    correct = (p.argmax(1) == torch.arange(N) % 4).tolist()
    assert cell["accuracy"] == pytest.approx(100 * np.mean(correct))
    assert cell["rms_calibration_error"] == pytest.approx(100 * plain_error(p.amax(1).tolist(), correct), abs=1e-3)


def test_a_part_of_an_evaluation_replaces_none(place):
    run = shutil.copytree(place / "run", place / "part")
    (run / "results.json").write_text("{}")
    for part in (["--only", "best"], ["--limit", "2"]):
        with pytest.raises(ValueError, match=r"results\.json is there already"):
            evaluate.main([str(run), "--data", str(place), "--device", "cpu", *part])
    assert (run / "results.json").read_text() == "{}"


@pytest.mark.parametrize(("amp", "trained", "used"), [("auto", "off", "off"), ("auto", "bf16", "fp16"),
                                                      ("bf16", "off", "bf16")])  # fmt: skip
def test_precision_is_by_default_the_devices_where_the_run_was_not_float32(place, monkeypatch, amp, trained, used):
    run = shutil.copytree(place / "run", place / f"amp-{amp}-{trained}")
    for name in ("best", "last"):
        saved = utils.load_checkpoint(run / f"{name}.pt")
        utils.save_checkpoint(run / f"{name}.pt", saved | {"config": saved["config"] | {"amp": trained}})
    dtypes = {"auto": torch.float16, "bf16": torch.bfloat16, "off": None}  # of an older GPU
    monkeypatch.setattr(utils, "amp_dtype", lambda amp, device: dtypes[amp])
    results = run_evaluate(place, run, "--only", "last", "--limit", 1, "--amp", amp)
    assert results["evaluation"]["amp"] == used


def test_best_and_last_of_one_epoch_are_evaluated_once(place, monkeypatch):
    calls, real = [], evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *arguments: calls.append(1) or real(*arguments))
    run = shutil.copytree(place / "run", place / "copy")
    for epoch, times in ((2, 1), (1, 3)):
        utils.save_checkpoint(run / "best.pt", utils.load_checkpoint(run / "last.pt") | {"epoch": epoch})
        results = run_evaluate(place, run, "--limit", 1)
        assert (len(calls), results["best"]["epoch"], results["last"]["epoch"]) == (times, epoch, 2)


def test_weights_of_others(place):
    ours = run_evaluate(place, place / "run", "--only", "last", "--limit", 3)["last"]
    state = torch.load(place / "run" / "last.pt", weights_only=True)["model"]
    foreign = {f"module.{k.replace('fc', 'linear')}": v for k, v in state.items() if "num_batches" not in k}
    torch.save({"net": foreign, "acc": 90.0}, place / "theirs.pt")
    flags = ["--checkpoint", place / "theirs.pt", "--arch", "resnet20", "--dataset", place / "mine.npz", "--limit", 3]
    results = run_evaluate(place, *flags)
    assert results["foreign"] == ours | {"epoch": None}
    assert "best" not in results
    assert results["hparams"] == {"checkpoint": str(place / "theirs.pt"), "mean": None, "std": None}
    evaluate.check_results(results)
    # f of (x - m) / s is f with other weights of x: here those of the first layer, and its bias within batch norm
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.25, 2.0]).view(3, 1, 1)
    first = state["conv1.weight"]
    shift = (first * mean).sum((1, 2, 3))
    theirs = state | {"conv1.weight": first * std, "bn1.running_mean": state["bn1.running_mean"] - shift}
    torch.save(theirs, place / "theirs.pt")
    other = run_evaluate(place, *flags, "--mean", 0.1, 0.2, 0.3, "--std", 0.5, 0.25, 2)
    assert len(evaluate.group_runs({1: results, 2: other})) == 2
    assert other["foreign"]["mca"] == ours["mca"]
    error = ours["clean"]["rms_calibration_error"]
    assert other["foreign"]["clean"]["rms_calibration_error"] == pytest.approx(error)


# Results read back


@pytest.fixture(scope="module")
def whole(place):
    return run_evaluate(place, place / "run", "--only", "last", "--limit", 2)


def changed(whole, path, value):
    """A copy of the results with another value at `path`, keys with dots between; None removes it."""
    results = inner = copy.deepcopy(whole)
    *outer, key = path.split(".")
    for name in outer:
        inner = inner[name]
    inner.pop(key, None)
    if value is not None:
        inner[key] = value
    return results


def test_damaged_and_older_results_are_named_and_skipped(whole, tmp_path):
    fog, mca = whole["last"]["corruptions"]["fog"], whole["last"]["mca"]
    changes = [("amp", None), ("last", None), ("seed", [1]), ("evaluation", "x"), ("last.corruptions.fog", None),
               ("last.corruptions.fog", fog[:4]), ("last.clean.accuracy", 101), ("last.clean.accuracy", "much"),
               ("last.corrupt_rms_calibration_error", float("nan")), ("last.mca", mca + 1),
               ("last.reliability.clean", [[0, 0, 0]] * 15)]  # fmt: skip
    bad = ["{", "[]", "3", *(json.dumps(changed(whole, *change)) for change in changes)]
    paths = [tmp_path / f"{number:02}" / "results.json" for number in range(len(bad) + 1)]
    for path, text in zip(paths, [*bad, json.dumps(whole)], strict=True):
        path.parent.mkdir()
        path.write_text(text)
    sound, problems = evaluate.read_results(tmp_path)
    assert sound == {paths[-1]: whole}
    assert [line.split(" is left out: ")[0] for line in problems] == [str(path) for path in paths[:-1]]
    assert "\n" not in "".join(problems)
    with pytest.raises(FileNotFoundError, match=r"no results\.json below"):
        evaluate.read_results(tmp_path / "nowhere")


def test_runs_that_differ_in_more_than_the_seed_are_never_averaged(whole):
    same = [("seed", 1), ("seed", 2), ("hparams.out", "elsewhere"), ("hparams.device", "cuda"),
            ("hparams.recompute", True), ("hparams.n", 1), ("hparams.joint", True),  # which Standard does not take
            ("wall_seconds", 5), ("commit", "x"), ("device", "another")]  # fmt: skip
    other = [("hparams.lr", 0.7), ("hparams.epochs", 3),
             ("hparams.of_my_own", 3), ("dataset", "x"), ("arch", "x"), ("method", "mine"), ("tag", "x"),
             ("data_source", "official"), ("corruption_source", "official"), ("train_images", 15), ("test_images", 3),
             ("amp", "bf16"), ("evaluation.amp", "fp16")]  # fmt: skip
    runs = {k: changed(whole, *change) for k, change in enumerate([*same, *other])}
    first, *rest = evaluate.group_runs(runs)
    assert {seed: content["seed"] for seed, content in first.seeds.items()} == {0: 0, 1: 1, 2: 2}
    assert first.left_out == list(range(3, len(same)))  # the same seed twice: named
    assert len(rest) == len(other)
    assert all(len(group.seeds) == 1 and not group.left_out for group in rest)
