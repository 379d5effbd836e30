"""benchmark.py and what it measures with: ratios, counts, estimates, the usual pipeline, the report."""

import collections
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import corruptions
import measure
import runs
import speed
import train
import usual
from models import build_model

CPU = torch.device("cpu")


class Counting(nn.Module):
    """A network that counts the images it sends forward, one batch norm and one layer."""

    def __init__(self):
        super().__init__()
        self.bn, self.fc, self.images = nn.BatchNorm2d(3), nn.Linear(3 * 64, 10), 0

    def forward(self, x):
        self.images += len(x)
        return self.fc(nn.functional.avg_pool2d(self.bn(x), 4).flatten(1))


@pytest.fixture
def images():
    return torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# Timing


def test_functions_are_called_in_turn_and_the_first_round_is_not_counted():
    calls = []
    taken = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, 0)
    assert calls == ["a", "b"] * 4
    assert {name: len(ts) for name, ts in taken.items()} == {"a": 3, "b": 3}


def test_ratios_are_medians_of_rounds_and_missing_times_stay_missing():
    assert measure.ratio([2.0, 30.0, 8.0], [1.0, 3.0, 2.0]) == 4.0
    assert measure.rate(10, [1.0, 2.0, 90.0]) == 5.0
    assert measure.ratio(None, [1.0]) is measure.ratio([1.0], None) is measure.rate(3, None) is None


def test_one_core_is_one_thread_and_the_number_before_is_restored():
    torch.set_num_threads(2)
    try:
        assert measure.on_one_core(torch.get_num_threads)() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_profile_names_what_takes_the_time():
    a = torch.rand(300, 300)
    assert re.match(r"a?d?d?mm \d\d\d?%", measure.profile(lambda: a @ a, CPU))


# Counts and estimates


def macs_by_hand(arch):
    """Multiply-accumulates of one image forward, from the shapes of every convolution and linear layer."""
    model, macs = build_model(arch, 10, *measure.GRAY).eval(), []

    def count(layer, _, out):
        macs.append(out[0].numel() * layer.weight[0].numel())

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    model(torch.zeros(1, 3, 32, 32))
    return sum(macs)


def test_operations_of_a_pass_are_twice_the_multiply_accumulates():
    assert measure.forward_flops("resnet18") == 2 * macs_by_hand("resnet18") == pytest.approx(2 * 0.555e9, rel=2e-3)
    assert measure.forward_flops("densenet121") == pytest.approx(2 * 0.888e9, rel=2e-3)


def test_operations_are_those_that_torch_counts():
    model = build_model("resnet20", 10, *measure.GRAY)

    def step():
        model(torch.rand(2, 3, 32, 32)).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    assert measure.count_flops(step) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("variant", "forwards"),  # a backward pass costs twice a forward one for the weights and the input, once for one
    [("standard", 3), ("magnma", 33), ("augmix", 9), ("rse", 3), ("gn", 3), ("at", 7 * 2 + 3), ("trades", 7 * 2 + 7)],
)
def test_operations_of_a_step_of_every_method(monkeypatch, images, variant, forwards):
    monkeypatch.setattr(speed, "build_model", lambda *_: build_model("resnet20", 10, *measure.GRAY))
    flags, passes = speed.VARIANTS[variant]
    step, _ = speed.stepper("resnet20", vars(train.parse_args(flags.split())), passes, images[:2], torch.arange(2))
    assert measure.count_flops(step) / 2 == pytest.approx(forwards * measure.forward_flops("resnet20"), rel=0.02)


def test_kept_bytes_are_those_that_a_backward_pass_needs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 1024, 10))
    x = torch.rand(4, 3, 32, 32)
    a_image = (measure.saved_bytes(model, x) - measure.saved_bytes(model, x[:2])) / 2
    by_hand = 2 * 3 * 1024 + 2 * 8 * 1024  # the inputs of both layers in half precision
    assert by_hand <= a_image <= by_hand + 100  # and the log-probabilities and the target


def test_the_memory_table_grows_with_the_network_and_accumulation_makes_it_fit(monkeypatch):
    gib = 2**30
    estimates = {"resnet18": (0.001 * gib, gib), "densenet121": (0.02 * gib, gib), "inceptionv3": (0.03 * gib, gib)}
    monkeypatch.setattr(benchmark, "memory_estimate", estimates.get)
    rows = benchmark.memory()
    assert [row["--accumulate for 16 GB"] for row in rows] == [1, 4, 4]
    assert rows[1]["GiB, MAGNMA n = 5, 128 images"] == pytest.approx(1 + 0.02 * 11 * 128)
    assert rows[1]["GiB with it"] == pytest.approx(1 + 0.02 * 11 * 32)


@pytest.mark.parametrize("variant", speed.VARIANTS)
def test_a_step_sends_the_stated_number_of_passes_forward(variant, monkeypatch, images):
    model = Counting()
    monkeypatch.setattr(speed, "build_model", lambda *_: model)
    passes, labels = speed.VARIANTS[variant][1], torch.arange(4) % 10
    step, network_only = speed.stepper("resnet18", speed.config_of(variant), passes, images[:4], labels)
    step()
    assert model.images == 4 * passes
    network_only()
    assert model.images == 2 * 4 * passes


# Hours


def test_the_runs_are_those_of_run_all(root):
    listed = subprocess.run(["bash", "run_all.sh", "list"], cwd=root, capture_output=True, text=True, check=True,
                            env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}).stdout  # fmt: skip
    named = {tuple(speed.config_of(v)[k] for k in ("method", "lambda1", "lambda2")): v for v in speed.VARIANTS}
    runs_of_all = collections.Counter()
    for line in listed.splitlines():
        if "train.py" in line:
            flags = shlex.split(line.split("train.py ")[1].split(" && ")[0])
            config = vars(train.parse_args(flags))
            key = tuple(config[k] for k in ("method", "lambda1", "lambda2"))
            if key not in named:  # Table 5's other rows cost what the paper's do
                key = (key[0], 0.2 if key[1] else 0.0, {(0, 1): 5.0, (1, 0): 0.0, (1, 1): 0.3}[key[1] > 0, key[2] > 0])
            runs_of_all[f"{config['dataset']}/{config['arch']}/{named[key]}"] += 1
    assert sum(runs_of_all.values()) == 144
    for key, count in runs_of_all.items():
        only = dict.fromkeys(runs_of_all, 0.0) | {key: 1.0}
        assert benchmark.hours_of_tables(only)["all 144 runs"] == count


def test_hours_of_tables_count_shared_runs_once_in_all():
    keys = {"/".join(key) for table in benchmark.TABLES.values() for key in table}
    sums = benchmark.hours_of_tables(dict.fromkeys(keys, 1.0))
    assert sums == {"tables 1 and 2": 54, "table 3": 27, "table 4": 27, "table 5": 63, "all 144 runs": 144}


def test_hours_follow_from_rates_by_passes_and_operations(monkeypatch):
    monkeypatch.setattr(benchmark, "forward_flops", {"resnet18": 1.0, "densenet121": 2.0, "inceptionv3": 6.0}.get)
    timed = {("resnet18", "magnma"): 100.0, ("resnet18", "standard"): 1000.0, ("densenet121", "augmix"): 50.0}
    hours = benchmark.estimated_hours(timed, 1e4)
    tests = (150 + 182) * 10_000 / 1e4
    expected = {
        "cifar10/resnet18/standard": 7.5e6 / 1000 + tests,
        "cifar100/resnet18/magnma": 7.5e6 / 100 + tests,
        "cifar10/resnet18/rse": 7.5e6 / 1100 + 10 * tests,
        "cifar10/densenet121/augmix": 7.5e6 / 50 + 2 * tests,
        "cifar10/inceptionv3/magnma": 7.5e6 / 100 * 6 + 6 * tests,
    }
    assert {key: hours[key] for key in expected} == pytest.approx({k: s / 3600 for k, s in expected.items()}, abs=6e-4)
    assert len(hours) == 2 * 9 + 2 * 2 * 3


# The usual pipeline does the same work


@pytest.mark.parametrize(("kind", "count"), [("clean", 1), ("preprocessing", 1), ("magnma", 7), ("augmix", 3)])
def test_the_usual_pipeline_makes_as_many_copies_in_the_same_range(kind, count, images):
    pictures = [image.permute(1, 2, 0).numpy() for image in images[:6]]
    torch.manual_seed(0)
    made = usual.batch(pictures, kind, usual.preprocessing(True), 3)
    assert made.shape == (6, count, 3, 32, 32)
    assert made.dtype == torch.float32
    others = made[:, [0, *range(4, 7)]] if kind == "magnma" else made  # noise is not clipped
    assert others.min() >= 0
    assert others.max() <= 1 + 1e-6
    if kind == "clean":
        assert torch.equal(made[:, 0], images[:6].float() / 255)
    elif kind != "preprocessing":
        assert len(speed.augmented(kind, images[:6], 3)) == 6 * count
        assert all((made[:, k] != made[:, 0]).any() for k in range(1, count))


@pytest.mark.parametrize("name", usual.CORRUPTIONS)
def test_the_loop_over_images_makes_the_same_corruption(name, images):
    x = images[:40].float().reshape(40, 3, 8, 4, 8, 4).mean((3, 5), keepdim=True) + torch.zeros(1, 1, 1, 4, 1, 4)
    x = x.reshape(40, 3, 32, 32).byte().permute(0, 2, 3, 1).contiguous().numpy()  # blocks, so that blurs show
    ours, loop = corruptions.corrupt(x, name, 3, 0).astype(float), usual.corrupt(x, name).astype(float)
    if name in ("zoom_blur", "contrast"):  # which draw nothing
        assert np.abs(ours - loop).max() <= 1
    else:
        assert ours.mean() == pytest.approx(loop.mean(), abs=0.3)
        assert (ours - x).std() == pytest.approx((loop - x).std(), rel=0.05)


# The report


def test_a_table_says_not_run_and_where_the_time_goes():
    rows = [
        {"what": "a", "rate": 1234.5, "GPU": None, "time goes to": "gather 90%"},
        {"what": "bcd", "rate": 0.5, "GPU": 7},
    ]
    assert benchmark.as_table(rows).splitlines() == [
        "what   rate      GPU",
        "a     1,234  not run",
        "bcd     0.5        7",
        "  a: time goes to gather 90%",
    ]  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
    """Sections that measure next to nothing."""
    for name in ("augmentation", "corruption"):
        monkeypatch.setattr(speed, name, lambda *_: [{"what": "x", "ratio": 2.123456}])
    monkeypatch.setattr(speed, "evaluation", lambda *_: [{"what": "resnet18", "ours": 1e5}])
    row = {"CPU images/s": 1e3, "GPU images/s": None}
    trained = [{"training resnet18": variant, **row} for variant in speed.ESSENTIAL]
    monkeypatch.setattr(speed, "training", lambda *_: (trained, {"bfloat16 TFLOP/s": 1.5}))


def test_the_report_has_the_hours_that_run_all_reads(tmp_path, quick, capsys):
    out = tmp_path / "benchmark.json"
    assert benchmark.main(["--short", "--device", "cpu", "--data", str(tmp_path), "--out", str(out)]) == 0
    report = runs.read_json(out)
    assert report["short"] is True
    assert report["images"] == "random"
    assert report["augmentation"] == [{"what": "x", "ratio": 2.123}]
    assert report["timed"] == [f"resnet18/{variant}" for variant in speed.ESSENTIAL]
    line = re.compile(r'^ *"[a-z0-9]+/[a-z0-9]+/[a-z_]+": *[0-9.]+,?$', re.MULTILINE)
    assert len(line.findall(out.read_text())) == len(report["hours"]) == 30
    shown = capsys.readouterr().out
    assert "not run" in shown
    assert "all 144 runs" in shown


def test_bad_flags_are_named():
    with pytest.raises(ValueError, match="--fast"):
        benchmark.parse_args(["--fast"])
    with pytest.raises(ValueError, match="--device tpu"):
        benchmark.main(["--device", "tpu"])


@pytest.mark.slow
def test_the_short_benchmark_runs_within_three_minutes(tmp_path):
    out = tmp_path / "benchmark.json"
    assert benchmark.main(["--short", "--device", "cpu", "--out", str(out)]) == 0
    assert runs.read_json(out)["wall_seconds"] < 180
