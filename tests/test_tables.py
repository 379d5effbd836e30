"""tables.py on made-up results: numbers computed by hand, or those that stand in the paper."""

import csv
import io
import json
import re
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from conftest import ROOT, make_evaluation, make_results, refused

import tables
from data import CORRUPTIONS
from tables import BASELINES, MAGNMA, MIX, NETWORKS, NOISE, SETTINGS

PAPER = json.loads((ROOT / "paper/tables.json").read_text())["tables"]


def put(folder: Path, **changes) -> Path:
    """Write make_results(**changes) to results.json in a new folder below `folder`; its path."""
    path = folder / f"run{len(list(folder.glob('run*'))):03}" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(make_results(**changes)))
    return path


def show(capsys, *argv) -> str:
    assert tables.main(list(map(str, argv))) == 0
    return capsys.readouterr().out


def github(capsys, *argv) -> tuple[list[list[str]], str]:
    """(the table's rows as lists of cells, all of the text)."""
    text = show(capsys, *argv, "--format", "github")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows], text


def test_the_published_numbers_are_complete_and_agree():
    cells = [cell for rows in PAPER.values() for row in rows.values() for cell in row.values()]
    assert 2 * len(cells) == 1032
    assert [len(rows) for rows in PAPER.values()] == [12, 12, 20, 20, 21]
    assert all(0 < mean < 100 and 0 < deviation < 4 for mean, deviation in cells)
    assert PAPER["1"]["cifar100/densenet121/clean_rmse"]["magnma 0.2 0.3 0.2 1"] == [5.41, 0.74]
    assert PAPER["2"]["cifar10/inceptionv3/mca"]["augmix"] == [90.52, 0.06]
    assert PAPER["3"]["cifar10/resnet18/contrast"]["trades"] == [40.70, 1.49]
    assert PAPER["4"]["cifar100/resnet18/impulse_noise"]["magnma 0 5 0.2 1"] == [68.38, 1.34]
    assert PAPER["5"]["cifar10/resnet18/magnma 0 10 0.2 1"]["corrupt_rmse"] == [3.10, 0.66]
    for table, place in (("3", "cifar10/resnet18"), ("4", "cifar100/resnet18")):
        assert list(PAPER[table]) == [f"{place}/{name}" for name in ("clean", "mca", *CORRUPTIONS)]
        for column, (mca, _) in PAPER[table][f"{place}/mca"].items():
            rows = [PAPER[table][f"{place}/{name}"][column][0] for name in CORRUPTIONS]
            assert np.mean(rows) == pytest.approx(mca, abs=0.011)  # rounding
        for metric in ("clean", "mca"):
            shown = PAPER[table][f"{place}/{metric}"].items()
            assert PAPER["2"][f"{place}/{metric}"].items() <= shown


def test_the_slips_in_the_paper_follow_from_its_own_tables():
    """Each slip that NOTES.md lists and that is about numbers, recomputed from Tables 1-5."""
    paper, table5 = tables.published("1234"), tables.published("5")
    sets = ten, hundred = "cifar10", "cifar100"

    def value(dataset, column, metric, arch="resnet18"):
        return paper[dataset, arch, column, metric].mean

    def ahead(dataset, metric, column, over, arch="resnet18"):
        return round(value(dataset, column, metric, arch) - value(dataset, over, metric, arch), 2)

    def gain(dataset, metric, over, digit=0.05):
        mean = fmean(ahead(dataset, metric, MAGNMA, over, arch) for arch in NETWORKS)
        return pytest.approx(-mean if metric.endswith("rmse") else mean, abs=digit + 1e-9)

    def leads(dataset, own, rivals):
        """In how many corruptions one of `own` is ahead of all rivals, and level with the best."""
        best = lambda group, name: max(value(dataset, c, name) for c in group)  # noqa: E731
        pairs = [(best(own, name), best(rivals, name)) for name in CORRUPTIONS]
        return sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)

    # Sec. 4: 2.81 points over AugMix on CIFAR-10-C; the other averages hold
    assert gain(ten, "corrupt_rmse", "augmix", 0.005) == 1.81
    assert gain(ten, "corrupt_rmse", "standard") == 15.4
    assert gain(hundred, "corrupt_rmse", "standard") == 16.2
    assert gain(hundred, "corrupt_rmse", "augmix", 0.005) == 4.73
    assert gain(ten, "mca", "standard") == 13.0
    assert gain(hundred, "mca", "standard") == 16.9
    # Sec. 7.4: 13.6 points on CIFAR-100
    assert ahead(hundred, "mca", MAGNMA, "standard") == 16.65

    # "the best corrupt accuracy for the majority of corruptions": (alone ahead, tied) of 18
    ablations = (NOISE, MIX)
    assert leads(ten, [MAGNMA], [*BASELINES, *ablations]) == (4, 1)
    assert leads(hundred, [MAGNMA], [*BASELINES, *ablations]) == (1, 1)
    assert leads(ten, [MAGNMA], BASELINES) == (11, 1)
    assert leads(hundred, [MAGNMA], BASELINES) == (9, 1)
    assert leads(ten, [MAGNMA, *ablations], BASELINES)[0] == 13
    assert leads(hundred, [MAGNMA, *ablations], BASELINES)[0] == 11
    assert ahead(ten, "zoom_blur", MAGNMA, "augmix") == 0  # bold misses these two
    assert ahead(hundred, "elastic_transform", MAGNMA, "augmix") == 0

    # Tables 1 and 2: "large/moderate" gains over AugMix everywhere
    places = list(product(sets, NETWORKS))
    over = {(d, arch): ahead(d, "clean_rmse", MAGNMA, "augmix", arch) for d, arch in places}
    worse = {place: points for place, points in over.items() if points > 0}
    assert worse == {(ten, "resnet18"): 0.09, (hundred, "densenet121"): 2.26}
    assert ahead(ten, "mca", MAGNMA, "augmix", "inceptionv3") == -0.03
    assert ahead(ten, "mca", MAGNMA, "augmix", "densenet121") == 0.19
    for (dataset, arch), rival in product(places, ("standard", "augmix")):  # Fig. 3's caption holds
        assert ahead(dataset, "corrupt_rmse", MAGNMA, rival, arch) < 0

    # Table 3's three MAGNMA columns, by Sec. 4's gains over Standard
    for column, points in ((NOISE, 9.3), (MIX, 11.8), (MAGNMA, 13.6)):
        assert ahead(ten, "mca", column, "standard") == pytest.approx(points, abs=0.05)

    # noise only: two values of one cell; all others that stand in two tables agree
    twice = {key: (paper[key].mean, cell.mean) for key, cell in table5.items() if key in paper}
    unlike = {key: pair for key, pair in twice.items() if pair[0] != pair[1]}
    assert unlike == {(ten, "resnet18", NOISE, "mca"): (87.14, 87.13)}

    # "noise: digital noise; mixed: blur and contrast": where the other ablation is ahead
    better = {f"{name}_noise": (NOISE, MIX) for name in ("impulse", "shot", "speckle")}
    better |= {n: (MIX, NOISE) for n in CORRUPTIONS if n == "contrast" or n.endswith("_blur")}
    behind = {(d, n): -ahead(d, n, *columns) for d, (n, columns) in product(sets, better.items())}
    assert {place: round(points, 1) for place, points in behind.items() if points > 0} == {
        (ten, "glass_blur"): 8.9, (hundred, "glass_blur"): 18.0, (hundred, "impulse_noise"): 2.4,
    }  # fmt: skip
    assert all(ahead(d, n, better[n][0], "standard") > 0 for d, n in product(sets, better))

    # Sec. 7.4: "do not change significantly": the largest spread in noise only, mix only, both
    parts: dict[tuple, list[str]] = {}
    for setting in SETTINGS:
        _, lambda1, lambda2, *_ = setting.split()
        parts.setdefault((lambda1 == "0", lambda2 == "0"), []).append(setting)
    spread = {}
    for metric in tables.SUMMARY:
        cells = [[table5[ten, "resnet18", s, metric].mean for s in part] for part in parts.values()]
        spread[metric] = max(max(means) - min(means) for means in cells)
    assert max(spread[metric] for metric in ("clean", "mca", "clean_rmse")) < 1
    assert spread["corrupt_rmse"] == pytest.approx(2.64)


def test_the_list_has_means_and_population_deviations_over_seeds(tmp_path, capsys):
    for seed, shift in enumerate((0, 1, 5)):  # mean 2; deviation by n sqrt(14/3), by n - 1 2.65
        best = make_evaluation(90 + shift, 70 + shift, 3 + shift, 5 + shift)
        last = make_evaluation(clean=50) if seed else None
        put(tmp_path, best=best, last=last, seed=seed)
    put(tmp_path, dataset="mine", arch="vgg", method="mixup", tag="ab", amp="bf16", epochs=7)
    rows, _ = github(capsys, tmp_path)
    assert rows[1] == [
        "cifar10", "resnet18", "standard", "0 1 2", "150", "off", "50000/10000", "official",
        "92.00±2.16", "72.00±2.16", "5.00±2.16", "7.00±2.16",
    ]  # fmt: skip
    want = "mine vgg mixup-ab 0 7 bf16/off 50000/10000 official 90.00 80.00 3.00 5.00"
    assert " ".join(rows[2]) == want
    last, _ = github(capsys, tmp_path, "--checkpoint", "last")
    assert (last[1][3], last[1][8], last[2][3], last[2][8]) == ("1 2", "50.00±0.00", "—", "—")
    assert "resnet18" not in show(capsys, tmp_path, "--arch", "vgg")
    latex = show(capsys, tmp_path, "--format", "latex")
    assert "\\toprule" in latex
    assert re.search(r"& standard +& 0 1 2 +& ", latex)


def test_a_folder_of_runs_may_be_a_link(tmp_path, capsys):
    put(tmp_path / "disk")
    (tmp_path / "runs/cifar10").mkdir(parents=True)
    (tmp_path / "runs/cifar10/resnet18").symlink_to(tmp_path / "disk")
    assert len(github(capsys, tmp_path / "runs")[0]) == 2


def test_a_short_run_in_float32_is_not_shown_before_whole_runs_on_a_gpu(tmp_path, capsys):
    put(tmp_path, epochs=1, best=make_evaluation(clean=10))
    for seed in range(3):
        put(tmp_path, amp="bf16", evaluation_amp="bf16", seed=seed)
    rows, _ = github(capsys, tmp_path, "--table", "3")
    assert rows[1][2] == "90.00±0.00"


def test_the_rows_of_one_name_are_in_the_order_of_their_note(tmp_path, capsys):
    for seed in (0, 1):
        put(tmp_path, seed=seed)
    put(tmp_path, lr=0.05, best=make_evaluation(clean=10))
    rows, text = github(capsys, tmp_path)
    assert [row[3] for row in rows[1:]] == ["0 1", "0"]
    assert "differ in lr 0.1 | 0.05" in text


def test_unlike_runs_are_never_averaged_and_a_second_run_of_a_seed_is_named(tmp_path, capsys):
    bad = make_evaluation(clean=10)
    put(tmp_path)
    again = put(tmp_path, best=bad)
    unlike = [
        {"amp": "bf16"}, {"evaluation_amp": "fp16"}, {"data_sha256": "f" * 64}, {"tag": "my_code"},
        {"corruption_source": "generated"}, {"limit": 100}, {"test_sha256": "0" * 64}, {"lr": 0.05},
        {"processes": 2},
    ]  # fmt: skip
    for change in unlike:
        put(tmp_path, best=bad, seed=1, **change)
    put(tmp_path, seed=1, data_source="the same, elsewhere")  # averaged with the first
    rows, text = github(capsys, tmp_path)
    assert sorted(row[8] for row in rows[1:]) == ["10.00"] * len(unlike) + ["90.00±0.00"]
    assert f"another run has this seed): {again}" in text
    assert "the rows of cifar10 resnet18 standard differ in " in text
    assert "data_sha256 dddddddd | dddddddd | dddddddd | ffffffff |" in text
    rows, text = github(capsys, tmp_path, "--table", "3")  # shows the run closest to the paper's
    assert rows[1][2] == "90.00±0.00"
    assert text.count("Standard, further runs (shown | not shown): ") == len(unlike)
    put(tmp_path, method="gn", best=bad)
    for seed in (0, 1):  # as close, and more seeds
        put(tmp_path, method="gn", tag="two", best=make_evaluation(clean=20), seed=seed)
    assert github(capsys, tmp_path, "--table", "3")[0][1][6] == "20.00±0.00"


def test_table_3_has_ours_the_papers_and_the_difference(tmp_path, capsys):
    magnma = partial(put, tmp_path, method="magnma")
    for seed in range(3):  # more seeds, but further from the paper's recipe
        magnma(best=make_evaluation(clean=11), seed=seed, n=2)
    magnma(best=make_evaluation(clean=12), joint=True)
    for seed, shift in enumerate((-1, 1)):
        best = make_evaluation(95 + shift, 91.5 + shift, glass_blur=80 + shift)
        magnma(best=best, seed=seed, last=make_evaluation(clean=60))
    noise = make_evaluation(clean=93.70)
    magnma(best=noise, lambda2=0.0, epochs=20, corruption_source="generated", operations="augmix")
    magnma(lambda1=0.0, lambda2=5.0, eval_every=1, amp="bf16", limit=2000)
    magnma(lambda1=0.7, tag="mine")  # of no table
    put(tmp_path, method="mixup", best=make_evaluation(my_corruption=11.0), train_images=49000)
    (header, *rows), text = github(capsys, tmp_path, "--table", "3")
    assert header[6:] == [
        "GN", "AugMix", "MAGNMA noise", "MAGNMA mix", "MAGNMA", "magnma-mine", "mixup",
    ]  # fmt: skip
    assert rows[0] == [
        "Clean", "ours", *["—"] * 6, "93.70", "90.00", "95.00±1.00", "90.00", "90.00",
    ]  # fmt: skip
    assert rows[1][6:] == [
        "91.84±0.27", "95.33±0.40", "93.70±0.34", "95.47±0.16", "95.14±0.17", "—", "—",
    ]  # fmt: skip
    assert rows[2][1:] == ["difference", *["—"] * 6, "+0.00", "-5.47", "-0.14", "—", "—"]
    assert rows[3][10] == "90.86±1.00"  # mCA: (17 * 91.5 + 80) / 18
    glass = [row[0] for row in rows].index("Glass Blur")
    assert [row[10] for row in rows[glass : glass + 3]] == ["80.00±1.00", "84.21±0.38", "-4.21"]
    assert rows[-1] == ["my_corruption", "ours", *["—"] * 10, "11.00"]
    assert len(rows) == 3 * 20 + 1
    for note in (
        "MAGNMA noise: generated corruptions; --epochs 20; --operations augmix",
        "MAGNMA mix: --eval-every 1; --amp bf16; evaluated on the first 2000 test images",
        "mixup: 49000 training images",
        "MAGNMA: 2 of 3 seeds",
        "magnma-mine: --lambda1 0.7; --lambda2 0.3; --sigma-max 0.2; --beta 1",
        "MAGNMA noise; MAGNMA mix; magnma-mine; mixup: 1 of 3 seeds; last.pt not evaluated",
        "MAGNMA, further runs (shown | not shown): n 5 | 2; seeds 0 1 2",
        "MAGNMA, further runs (shown | not shown): joint False | True; seeds 0",
    ):
        assert note in text
    rows, text = github(capsys, tmp_path, "--table", "3", "--checkpoint", "last")
    assert (rows[1][8], rows[1][10]) == ("—", "60.00±0.00")
    assert "last.pt not evaluated" in text


def test_augmixs_nine_operations_are_further_columns_and_rows(tmp_path, capsys):
    for lambda1, lambda2, clean in ((0.2, 0.3, 91), (0.0, 5.0, 92), (0.2, 5.0, 93)):
        for operations, more in (("A", 0), ("augmix", 0.5)):
            best = make_evaluation(clean=clean + more)
            setting = {"lambda1": lambda1, "lambda2": lambda2, "operations": operations}
            put(tmp_path, method="magnma", best=best, **setting)
    (header, *rows), text = github(capsys, tmp_path, "--table", "3")
    assert header[8:] == [
        "MAGNMA noise", "MAGNMA mix", "MAGNMA", "MAGNMA mix, nine", "MAGNMA, nine",
    ]  # fmt: skip
    assert rows[0][8:] == ["—", "92.00", "91.00", "92.50", "91.50"]
    assert rows[2][8:] == ["—", "-3.47", "-4.14", "—", "—"]
    assert "- MAGNMA mix, nine; MAGNMA, nine: --operations augmix\n" in text
    rows, _ = github(capsys, tmp_path, "--table", "5")
    assert [row[:3] for row in rows[-3:]] == [
        ["(0, 5, 0.2, 1), nine", "ours", "92.50"],
        ["(0.2, 0.3, 0.2, 1), nine", "ours", "91.50"],
        ["(0.2, 5, 0.2, 1), nine", "ours", "93.50"],
    ]
    assert ["(0.2, 5, 0.2, 1)", "ours", "93.00"] in [row[:3] for row in rows]


def test_smaller_runs_in_the_papers_layout(tmp_path, capsys):
    best = make_evaluation(81.0, 71.0, 2.0, 6.0)
    put(tmp_path, method="magnma", best=best, dataset="copies", arch="resnet20", n=2, limit=500)
    for number, row, want in (
        ("1", 1, ["ResNet-20", "copies", "ours", "—", "—", "2.00"]),
        ("1", 3, ["ResNet-20", "copies-C", "ours", "—", "—", "6.00"]),
        ("2", 4, ["ResNet-18", "CIFAR-10-C", "paper", "77.83±0.11", "89.70±0.40", "91.46±0.28"]),
        ("3", 3, ["mCA", "ours", *["—"] * 8, "71.00"]),
        ("4", 3, ["mCA", "ours", *["—"] * 8, "71.00"]),
        ("5", 33, ["(0.2, 0.3, 0.2, 1)", "ours", "81.00", "71.00", "2.00", "6.00"]),
    ):
        flags = ["--table", number, "--dataset", "dir/copies.NPZ", "--arch", "resnet20"]
        rows, text = github(capsys, tmp_path, *flags)
        assert rows[row] == want
        place = "CIFAR-100" if number == "4" else "CIFAR-10"
        moved = f"copies in place of {place}, ResNet-20 in place of ResNet-18"
        assert moved in text.splitlines()[0]
        assert "difference" not in text
        assert "all: --n 2; evaluated on the first 500 test images; 1 of 3 seeds" in text
    assert show(capsys, tmp_path, "--table", "all").count("no runs of these data sets") == 5


def test_csv_has_a_row_for_each_run_checkpoint_corruption_and_severity(tmp_path, capsys):
    last = make_evaluation(clean=50.0)
    first = put(tmp_path, method="rse", limit=2000, test_images=2000, tag="x", last=last)
    put(tmp_path, seed=1, dataset="mine")
    rows = list(csv.DictReader(io.StringIO(show(capsys, tmp_path, "--csv"))))
    assert len(rows) == 3 * (1 + 18 * 5)
    assert list(rows[0].values()) == [
        "cifar10", "resnet18", "rse", "x", "0", str(first.parent), "official", "2000", "best", "7",
        "clean", "0", "90.0", "3.0", "99.0",
    ]  # fmt: skip
    shown = {(r["run"], r["checkpoint"], r["corruption"], r["severity"]): r for r in rows}
    assert len(shown) == len(rows)
    assert shown[str(first.parent), "last", "fog", "5"]["accuracy"] == "77.0"
    assert shown[str(first.parent), "last", "clean", "0"]["accuracy"] == "50.0"
    assert show(capsys, tmp_path, "--csv", "--dataset", "mine").count("\n") == 1 + 91


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: r["recipe"].pop("dataset"), "KeyError('dataset')"),
        (lambda r: r.pop("seed"), "KeyError('seed')"),
        (lambda r: r.update(best=None), "no evaluation"),
        (lambda r: r["best"].update(mca=81.0), "its mCA is 81.0, but its 90 accuracies"),
        (lambda r: r["best"]["corruptions"].pop("fog"), "KeyError('fog')"),
        (lambda r: r["best"]["corruptions"]["fog"].pop(), "does not have 5 severities"),
        (lambda r: r["best"]["clean"].update(accuracy=float("nan")), "not a percentage"),
        (lambda r: r["best"].pop("reliability"), "KeyError('reliability')"),
    ],
)
def test_a_damaged_results_json_is_named_and_left_out(tmp_path, capsys, damage, said):
    put(tmp_path)
    path = put(tmp_path, method="gn")
    damage(content := json.loads(path.read_text()))
    path.write_text(json.dumps(content))
    for flags in ([], ["--csv"], ["--table", "all"]):
        assert tables.main([str(tmp_path), *flags]) == 1
        out, err = capsys.readouterr()
        assert err.startswith(f"tables.py: {path} is left out: ")
        assert said in err
        assert "," in out or "standard" in out  # the rest is shown


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "runs")
    put(tmp_path / "runs", dataset="mine", arch="vgg")
    for argv, said in (
        ("empty", "no results.json below empty"),
        ("--arch resnet2O", "no run of resnet2O. There are resnet18, vgg"),
        ("--arch vgg --dataset cifar10", "no run of cifar10 vgg. There are cifar10 resnet18, mine"),
    ):
        assert said in refused(tables.main, argv.split())
    with pytest.raises(SystemExit, match="2"):
        tables.main(["--csv", "--table", "1"])


def test_the_committed_results_are_sound(capsys):
    rows, text = github(capsys, ROOT / "results")
    assert ["digits", "resnet20", "magnma", "0", "8", "off", "1437/360"] in [r[:7] for r in rows]
    assert "not shown" not in text


def test_what_evaluate_writes_is_read(home, capsys):
    rows, _ = github(capsys, home / "runs", "--checkpoint", "last")
    assert rows[1][:7] == ["tiny", "resnet20", "magnma", "0", "2", "off", "70/20"]
    text = show(capsys, home / "runs", "--table", "3", "--dataset", "tiny", "--arch", "resnet20")
    want = "all: data: digits, enlarged; generated corruptions; 70 training images; --epochs 2;"
    assert f"{want} --batch-size 32; --eval-every 1; --n 1; 1 of 3 seeds" in text
