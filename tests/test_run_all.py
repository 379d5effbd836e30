"""run_all.sh and run_list.py: the list of 144 runs, and how it is worked through.

The commands of the list are mostly stood in for by small scripts that write what train.py and evaluate.py would; a
dozen runs of --scale quick are real, and some of them are killed on their way and end as if undisturbed.
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest

import run_list
import runs
from collect import check_results
from corruptions import FUNCTIONS
from data import CORRUPTIONS
from evaluate import parse_args as parse_evaluate
from train import parse_args as parse_train

ROOT = Path(__file__).resolve().parent.parent
DOZEN = ("1", "2", "7", "8", "9", "11", "13", "15", "4", "5", "6", "10")

FAKE_TRAIN = """
import json, os, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1:], sys.argv[2:]))
folder = pathlib.Path(flags["--out"])
folder.mkdir(parents=True, exist_ok=True)
gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "-"
with open("calls", "a") as calls:
    calls.write(f"train {folder} {gpu} {time.monotonic()} {'--resume' in sys.argv}\\n")
plan = pathlib.Path("plan.json")
act = json.loads(plan.read_text()).get(str(folder), "train") if plan.exists() else "train"
if act == "fail":
    sys.exit("train.py: out of luck")
if act == "stop":
    # the parent is told to stop, as by the user; it tells this program
    signal.signal(signal.SIGTERM, lambda *_: (print("train.py: saved"), sys.exit(143)))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
(folder / "config.json").write_text('{"epochs": 2}')
(folder / "log.csv").write_text("epoch,lr\\n1,0.1\\n" + "2,0.1\\n" * (act != "pause"))
time.sleep(0.05)
"""

FAKE_EVALUATE = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
last = {"mca": 50}
(folder / "results.json").write_text(json.dumps({"best": None if "--only" in sys.argv else last, "last": last}))
gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "-"
with open("calls", "a") as calls:
    calls.write(f"evaluate {folder} {gpu} {time.monotonic()} -\\n")
"""

FAKE_CORRUPTIONS = """
import pathlib, sys
with open("calls", "a") as calls:
    calls.write("corruptions " + " ".join(sys.argv[1:]) + "\\n")
"""


def bash(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`bash run_all.sh <arguments>` with this Python, started from elsewhere."""
    return subprocess.run(
        ["bash", folder / "run_all.sh", *arguments], cwd="/", capture_output=True, text=True, timeout=1800,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )  # fmt: skip


def link_project(folder: Path) -> Path:
    """A new folder with links to the project's files."""
    folder.mkdir()
    for path in (*ROOT.glob("*.py"), *(ROOT / name for name in ("run_all.sh", "requirements.txt", "models", "paper"))):
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project in a folder with a space in its name, with links to its files, and no data or runs."""
    return link_project(tmp_path / "the project")


@pytest.fixture
def fakes(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project with stand-ins for the scripts that train, evaluate and corrupt, and for the images."""
    for name, text in (("train", FAKE_TRAIN), ("evaluate", FAKE_EVALUATE), ("corruptions", FAKE_CORRUPTIONS)):
        (project / f"{name}.py").unlink()
        (project / f"{name}.py").write_text(text)

    def load_dataset(name: str, root: str) -> None:
        if (project / f"no-{name}").exists():
            raise FileNotFoundError(f"no {name} here")

    monkeypatch.setattr(run_list, "load_dataset", load_dataset)
    monkeypatch.chdir(project)
    return project


def listed(*arguments: str, folder: Path = ROOT) -> list[tuple[list[str], list[str]]]:
    """The (training, evaluation) commands that `run_all.sh list` prints, without the interpreter."""
    output = bash(folder, "list", *arguments).stdout
    pairs = []
    for line in output.splitlines():
        if not line.startswith("#"):
            words = shlex.split(line, comments=True)
            middle = words.index("&&")
            assert words[0] == words[middle + 1] == sys.executable
            pairs.append((words[1:middle], words[middle + 2 :]))
    return pairs


def line(number: int, folder: str, dataset: str = "cifar10", only: str = "") -> str:
    """A line of the list as run_all.sh hands it to run_list.py."""
    commands = f"train.py --resume --out runs/{folder}", f"evaluate.py runs/{folder}{only}"
    return "\t".join((str(number), dataset, f"runs/{folder}", *commands)) + "\n"


def work(lines: list[str], *flags: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """run_list.main in this process; its exit code, an interruption's included."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "stdin", StringIO("".join(lines)))
    try:
        return run_list.main(list(flags))
    except runs.Stopped as stop:
        print(stop)
        return stop.exit_code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def calls(folder: Path) -> list[list[str]]:
    """What the stand-ins noted, a list of words a call."""
    return [entry.split() for entry in (folder / "calls").read_text().splitlines()]


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until it holds; not for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    """Its child processes that are alive, from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has ended meanwhile
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


# The list


def test_list_has_144_distinct_runs_each_in_the_folder_that_train_would_choose() -> None:
    pairs = listed()
    folders = set()
    for training, evaluation in pairs:
        assert (training[0], evaluation[0]) == ("train.py", "evaluate.py")
        args = parse_train(training[1:])
        own = runs.run_folder("runs", args.dataset, args.arch, args.method, args.tag, args.seed)
        assert args.resume
        assert args.out == parse_evaluate(evaluation[1:]).run == str(own)
        folders.add(args.out)
    assert len(pairs) == len(folders) == 144


def test_list_is_every_column_of_the_published_tables_with_three_seeds_at_the_recipe() -> None:
    wanted = set()
    for number, table in json.loads((ROOT / "paper" / "tables.json").read_text())["tables"].items():
        for row, cells in table.items():
            dataset, arch, rest = row.split("/")
            columns = [rest] if number == "5" else cells
            wanted |= {(dataset, arch, column, seed) for column in columns for seed in (0, 1, 2)}
    got, recipes = set(), set()
    for training, _ in listed():
        args = parse_train(training[1:])
        column = args.method
        if column == "magnma":
            column += f" {args.lambda1:g} {args.lambda2:g} {args.sigma_max:g} {args.beta:g}"
        got.add((args.dataset, args.arch, column, args.seed))
        recipes.add((args.epochs, args.batch_size, args.lr, args.n, args.subset, args.stands_for))
    assert got == wanted
    assert recipes == {(150, 128, 0.1, 5, None, None)}


@pytest.mark.parametrize(("table", "count"), [(1, 54), (2, 54), (3, 27), (4, 27), (5, 63)])
def test_each_table_has_its_own_runs(table: int, count: int) -> None:
    pairs = listed(f"table{table}")
    assert len(pairs) == count
    paths = {Path(evaluation[1]).parts for _, evaluation in pairs}
    if table in (3, 4):
        assert {path[1:3] for path in paths} == {("cifar10" if table == 3 else "cifar100", "resnet18")}
    if table == 5:
        assert {path[3].split("-")[0] for path in paths} == {"magnma"}


def test_quick_keeps_each_runs_path_and_says_what_it_stands_for() -> None:
    full, quick = listed(), listed("--scale", "quick")
    for (training, _), (stand_in, evaluation) in zip(full, quick, strict=True):
        real, args = parse_train(training[1:]), parse_train(stand_in[1:])
        assert args.out == real.out.replace("runs/", "runs-quick/", 1) == parse_evaluate(evaluation[1:]).run
        assert args.stands_for == f"{real.dataset}/{real.arch}"
        assert (args.dataset, args.arch, args.subset, args.epochs) == ("digits", "resnet20", 64, 1)
        same = ("method", "tag", "seed", "lambda1", "lambda2", "sigma_max", "beta", "n")
        assert [getattr(args, name) for name in same] == [getattr(real, name) for name in same]
        assert parse_evaluate(evaluation[1:]).limit == 4


def test_accumulate_splits_the_batches_of_the_large_networks_alone() -> None:
    for (training, _), (split, _) in zip(listed(), listed("--accumulate", "4"), strict=True):
        own, args = parse_train(training[1:]), parse_train(split[1:])
        assert args.accumulate == (1 if args.arch == "resnet18" else 4)
        assert vars(args) | {"accumulate": 1} == vars(own)


def test_gpus_that_were_named_are_demanded_of_every_run() -> None:
    for (training, evaluation), (named, its) in zip(listed(), listed("--gpus", "0,1"), strict=True):
        assert parse_train(named[1:]).device == parse_evaluate(its[1:]).device == "cuda"
        assert vars(parse_train(named[1:])) | {"device": "auto"} == vars(parse_train(training[1:]))
        assert parse_evaluate(evaluation[1:]).device == "auto"


def test_list_sums_measured_and_estimated_hours(project: Path) -> None:
    (project / "results").mkdir()
    hours = {"cifar10/resnet18/standard": 0.5, "cifar10/resnet18/magnma_noise": 2, "cifar10/densenet121/augmix": 3}
    timed = ["resnet18/standard", "resnet18/magnma_noise"]
    runs.write_json(
        project / "results" / "benchmark-cuda.json", {"other": {"a/b/c": 9}, "timed": timed, "hours": hours, "more": {}}
    )
    runs.write_json(project / "results" / "benchmark-cpu.json", {"timed": timed, "hours": {key: 99 for key in hours}})
    *lines, total = bash(project, "list").stdout.splitlines()
    said = [text.split(": ")[1].split(" GPU-hours, ") for text in lines]
    sums = dict.fromkeys((how for _, how in said), 0.0)
    for value, how in said:
        sums[how] += float(value)
    measured, inferred = (f"{word}, results/benchmark-cuda.json" for word in ("measured", "estimated"))
    assert sums[measured] == 3 * (0.5 + 7 * 2)  # noise only: Table 3's and six more of Table 5
    assert sums[inferred] == 3 * 3
    numbers = [float(word) for word in total.replace("#", "").split() if word.isdigit()]
    everything = sum(sums.values())
    assert numbers == pytest.approx([144, everything, sums[measured], everything - sums[measured]], abs=1.5)
    # 150 epochs of 50,000 images at 3 x 2 x 3.631e9 operations, 1.1 times, at 20 TFLOP/s
    inception = next(text.split(": ")[1].split()[0] for text in lines if "inceptionv3 --method standard" in text)
    assert float(inception) == pytest.approx(7.5e6 * 6 * 3.631e9 * 1.1 / 20e12 / 3600, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table6"], "unknown part or flag 'table6'; bash run_all.sh --help shows them"),
        (["--frobnicate"], "unknown part or flag '--frobnicate'; bash run_all.sh --help shows them"),
        (["--accumulate", "0"], "--accumulate takes a number of micro-batches, as 4; not '0'"),
        (["--only", "0"], "--only 0: the list has lines 1 to 144"),
        (["--only", "145"], "--only 145: the list has lines 1 to 144"),
        (["--only", "3,200", "--scale", "quick"], "--only 200: the list has lines 1 to 144"),
        (["--only", "two"], "--only takes lines of the list, as 3 or 1,2; not 'two'"),
        (["--only"], "--only takes lines of the list, as 3 or 1,2; not ''"),
        (["table3", "--only", "1"], "--only counts the lines of the whole list; leave table3 out"),
        (["--gpus", "a"], "--gpus takes numbers with commas between, as 0,1; not 'a'"),
        (["demo", "--gpus", "0"], "--gpus is of no use here: the demo and --scale quick run on the CPU"),
        (["--scale", "tiny"], "--scale is quick or full, not 'tiny'"),
        (["--max-minutes", "-1"], "--max-minutes takes a number above 0, not '-1'"),
        (["--max-minutes", "0.0"], "--max-minutes takes a number above 0, not '0.0'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = bash(ROOT, *arguments)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"run_all.sh: {message}\n", "")


def test_help_shows_the_parts() -> None:
    done = bash(ROOT, "--help")
    assert done.returncode == 0
    assert all(part in done.stdout for part in ("table3", "demo", "list", "--only K", "--gpus 0,1"))


def test_shellcheck_passes() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "run_all.sh", ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Setting up


def fake_python(folder: Path, version: str = "3.11", pip: int = 0) -> Path:
    """A folder for PATH with a python3 of that version whose venv is a copy of itself and whose pip ends so."""
    folder.mkdir()
    (folder / "python3").write_text(f"""#!/bin/bash
echo "python3 $*" >>calls
case "$*" in
  --version) echo "Python {version}" ;;
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  -m*pip*) exit {pip} ;;
  -c*) [[ {version} == 3.11 ]] ;;
esac
""")
    (folder / "python3").chmod(0o755)
    return folder


def run_setup(project: Path, path: Path) -> subprocess.CompletedProcess:
    return bash(project, "setup", PYTHON="", PATH=f"{path}:{os.environ['PATH']}")


def test_setup_installs_the_requirements_once_and_again_when_they_change(project: Path, tmp_path: Path) -> None:
    path = fake_python(tmp_path / "bin")
    assert run_setup(project, path).returncode == 0
    pips = [" ".join(words[1:]) for words in calls(project) if "pip" in words]
    assert [text.split("check ")[1] for text in pips] == [
        "-r requirements.txt", "--no-deps imagecorruptions==1.1.2"
    ]  # fmt: skip
    before = len(calls(project))
    assert run_setup(project, path).stdout == ""
    assert len(calls(project)) == before
    (project / "requirements.txt").unlink()
    (project / "requirements.txt").write_text("numpy\n")
    assert run_setup(project, path).returncode == 0
    assert len(calls(project)) > before


def test_setup_says_when_python_is_too_old_or_pip_fails(project: Path, tmp_path: Path) -> None:
    done = run_setup(project, fake_python(tmp_path / "old", version="3.8"))
    assert (done.returncode, done.stderr) == (
        2,
        "run_all.sh: Python 3.8 is too old; install Python 3.11 or newer, or name one: PYTHON=/path/to/python\n",
    )
    done = run_setup(project, fake_python(tmp_path / "offline", pip=1))
    assert done.returncode == 2
    assert done.stderr.startswith("run_all.sh: pip failed, its message is above; the same command tries again")
    assert not (project / ".venv" / "installed").exists()


def test_a_given_python_is_used_as_it_is(project: Path, tmp_path: Path) -> None:
    path = fake_python(tmp_path / "bin")
    done = bash(project, "setup", PYTHON=str(path / "python3"))
    assert (done.returncode, (project / "calls").exists(), (project / ".venv").exists()) == (0, False, False)
    done = bash(project, "setup", PYTHON="/no/python")
    assert (done.returncode, done.stderr) == (
        2, "run_all.sh: PYTHON=/no/python is no program; name an interpreter, or unset it\n"
    )  # fmt: skip


def test_test_hands_its_flags_to_pytest(project: Path, tmp_path: Path) -> None:
    path = fake_python(tmp_path / "bin")
    (path / "ruff").write_text("#!/bin/sh\necho ruff $* >>calls\n")
    (path / "shellcheck").write_text("#!/bin/sh\necho shellcheck $* >>calls\nexit 1\n")
    for tool in ("ruff", "shellcheck"):
        (path / tool).chmod(0o755)
    assert bash(project, "test", "-k", "losses", PYTHON=str(path / "python3")).returncode == 1
    assert calls(project)[-1] == ["shellcheck", "run_all.sh", ".ci/run"]  # it found something: no tests
    (path / "shellcheck").write_text("#!/bin/sh\n")
    assert bash(project, "test", "-k", "losses", PYTHON=str(path / "python3")).returncode == 0
    assert calls(project)[-2:] == [["ruff", "check", "--quiet", "."], ["python3", "-m", "pytest", "-k", "losses"]]


# Working through the list, with stand-ins for the scripts


def test_a_failed_run_does_not_stop_the_rest_and_is_named_with_its_log(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (fakes / "plan.json").write_text('{"runs/b/seed0": "fail"}')
    lines = [line(k, f"{name}/seed0") for k, name in enumerate("abc", 1)]
    assert work(lines, "--", "never.py", monkeypatch=monkeypatch) == 1
    output = capfd.readouterr().out
    assert "failed: runs/b/seed0, log runs/logs/b-seed0.log: train.py: out of luck" in output
    assert "3 runs: 2 finished, 1 failed" in output
    assert [words[:2] for words in calls(fakes)] == [
        ["corruptions", "--dataset"],
        ["train", "runs/a/seed0"], ["evaluate", "runs/a/seed0"],
        ["train", "runs/b/seed0"],
        ["train", "runs/c/seed0"], ["evaluate", "runs/c/seed0"],
    ]  # fmt: skip


def test_finished_runs_are_skipped_and_damaged_or_halved_results_made_anew(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    lines = [line(k, f"{name}/seed0") for k, name in enumerate("abcd", 1)]
    assert work(lines, monkeypatch=monkeypatch) == 0
    (fakes / "runs/b/seed0/results.json").write_text('{"best": {"mca"')
    (fakes / "runs/c/seed0/results.json").write_text('{"best": null, "last": {"mca": 50}}')
    (fakes / "calls").unlink()
    (fakes / "then.py").write_text("print('and then')")
    assert work(lines, "--", "then.py", monkeypatch=monkeypatch) == 0
    output = capfd.readouterr().out
    assert "4 runs: 2 finished before, 2 finished" in output
    assert output.endswith("and then\n")
    trained = [words for words in calls(fakes) if words[0] == "train"]
    assert [words[1] for words in trained] == ["runs/b/seed0", "runs/c/seed0"]
    assert {words[-1] for words in trained} == {"True"}  # with --resume
    (fakes / "calls").unlink()
    assert work(lines, monkeypatch=monkeypatch) == 0
    assert not (fakes / "calls").exists()  # nothing to do, not even for the data


def test_a_run_evaluated_with_only_last_is_whole_without_best(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    lines = [line(1, "a/seed0", only=" --only last")]
    assert work(lines, monkeypatch=monkeypatch) == work(lines, monkeypatch=monkeypatch) == 0
    assert "1 runs: 1 finished before" in capfd.readouterr().out


def test_a_run_evaluated_on_a_few_images_alone_is_not_whole(tmp_path: Path) -> None:
    e = {"best": {}, "last": {}}
    run = run_list.Run(1, "cifar10", tmp_path, ["train.py"], ["evaluate.py", str(tmp_path)])
    few = run._replace(evaluate=[*run.evaluate, "--limit", "4"])
    runs.write_json(tmp_path / "results.json", e | {"limit": 4})
    assert (run_list.is_whole(run), run_list.is_whole(few)) == (False, True)
    runs.write_json(tmp_path / "results.json", e | {"limit": None})
    assert (run_list.is_whole(run), run_list.is_whole(few)) == (True, False)


def test_a_paused_run_is_unfinished_and_not_evaluated(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (fakes / "plan.json").write_text('{"runs/a/seed0": "pause"}')
    assert work([line(1, "a/seed0"), line(2, "b/seed0")], monkeypatch=monkeypatch) == 1
    output = capfd.readouterr().out
    assert "unfinished: runs/a/seed0, log runs/logs/a-seed0.log" in output
    assert "2 runs: 1 unfinished, 1 finished" in output
    assert ["evaluate", "runs/a/seed0"] not in [words[:2] for words in calls(fakes)]


def test_a_signal_is_passed_on_and_the_end_says_how_to_go_on(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (fakes / "plan.json").write_text('{"runs/a/seed0": "stop"}')
    lines = [line(1, "a/seed0"), line(2, "b/seed0")]
    started = time.monotonic()
    assert work(lines, "--again", "bash run_all.sh table3", monkeypatch=monkeypatch) == 143
    assert time.monotonic() - started < 30
    output = capfd.readouterr().out
    assert "unfinished: runs/a/seed0, log runs/logs/a-seed0.log: train.py: saved" in output
    assert "2 runs: 1 unfinished, 1 not begun" in output
    assert output.endswith("stopped by SIGTERM; what is done is kept, this goes on: bash run_all.sh table3\n")


def test_gpus_share_one_queue_and_have_one_run_at_a_time(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(k, f"{k}/seed0") for k in range(1, 7)]
    assert work(lines, "--gpus", "3,5", monkeypatch=monkeypatch) == 0
    noted = calls(fakes)[1:]
    assert {words[2] for words in noted} == {"3", "5"}
    for gpu in ("3", "5"):
        own = [words for words in noted if words[2] == gpu]
        assert [words[0] for words in own] == ["train", "evaluate"] * (len(own) // 2)
    assert {words[1] for words in noted} == {f"runs/{k}/seed0" for k in range(1, 7)}


def test_data_that_cannot_be_had_fail_their_runs_alone(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (fakes / "no-cifar10").touch()
    lines = [line(1, "a/seed0"), line(2, "b/seed0", dataset="digits"), line(3, "c/seed0")]
    assert work(lines, monkeypatch=monkeypatch) == 1
    output, errors = capfd.readouterr()
    assert "no cifar10 here" in errors
    assert "failed: runs/a/seed0: no data (why is said above)" in output
    assert "3 runs: 2 failed, 1 finished" in output
    assert ["train", "runs/b/seed0"] in [words[:2] for words in calls(fakes)]


def test_corrupted_sets_that_are_there_are_used_and_others_made_or_fetched(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    lines = [line(1, "a/seed0"), line(2, "b/seed0", dataset="digits")]
    assert work(lines, "--data-only", "--download-corruptions", monkeypatch=monkeypatch) == 0
    assert calls(fakes) == [
        ["corruptions", "--dataset", "cifar10", "--data", "data", "--download"],
        ["corruptions", "--dataset", "digits", "--data", "data"],  # there is no official one
    ]
    (fakes / "calls").unlink()
    for name in ("CIFAR-10-C", "DIGITS-C"):
        (fakes / "data" / name).mkdir(parents=True)
        for file in (*CORRUPTIONS, "labels"):
            (fakes / "data" / name / f"{file}.npy").touch()
    assert len(FUNCTIONS) == len(CORRUPTIONS) + 1
    (fakes / "data" / "CIFAR-10-C" / "official.json").write_text('{"files": {}}')
    assert work(lines, monkeypatch=monkeypatch) == 0
    assert not any(words[0] == "corruptions" for words in calls(fakes))
    output = capfd.readouterr().out
    assert "data/CIFAR-10-C: official" in output
    assert "data/DIGITS-C: unverified" in output


def test_what_is_no_line_of_the_list_is_refused(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"not a line of run_all\.sh's list: 'hello"):
        work(["hello\n"], monkeypatch=monkeypatch)


def test_commands_die_with_their_parent() -> None:
    parent = os.fork()
    if parent == 0:
        try:
            children = run_list.Children()
            children.start(lambda: time.sleep(100))
            children.wait()
        finally:
            os._exit(1)
    until(lambda: children_of(parent))
    time.sleep(0.5)  # to have become the parent's ward
    family = children_of(parent)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until(lambda: not any(map(is_alive, family)), seconds=20)


def test_a_terminals_interrupt_reaches_the_commands_once(tmp_path: Path) -> None:
    (tmp_path / "count.py").write_text("""if True:
        import signal, time
        signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
        print("ready", flush=True)
        time.sleep(2)
    """)
    log = tmp_path / "log"
    parent = os.fork()
    if parent == 0:
        try:
            os.setsid()
            children = run_list.Children()
            children.start(lambda: run_list.execute([str(tmp_path / "count.py")]), log)
            children.wait()
        finally:
            os._exit(0)
    until(lambda: log.is_file() and "ready" in log.read_text())
    os.killpg(parent, signal.SIGINT)
    os.waitpid(parent, 0)
    assert log.read_text() == "ready\ninterrupted\n"


# Real runs


@pytest.fixture(scope="module")
def dozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after a dozen runs of --scale quick, of every method but RSE (whose ensembles take long)."""
    project = link_project(tmp_path_factory.mktemp("dozen") / "the project")
    done = bash(project, "--scale", "quick", "--only", ",".join(DOZEN))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "12 runs: 12 finished"
    (project / "output").write_text(done.stdout)
    return project


def test_a_dozen_quick_runs_leave_results_that_say_what_they_stand_for(dozen: Path) -> None:
    for training, _ in listed("--scale", "quick", "--only", ",".join(DOZEN)):
        args = parse_train(training[1:])
        results = runs.read_json(dozen / args.out / "results.json")
        check_results(results)
        got = [results[name] for name in ("method", "tag", "seed", "stands_for", "limit", "train_images")]
        assert got == [args.method, args.tag, args.seed, args.stands_for, 4, 64]
        assert results["corruption_source"] == "generated"


def test_a_run_paused_in_its_first_epoch_is_unfinished_and_goes_on(dozen: Path) -> None:
    line = ("--scale", "quick", "--only", "53")  # not among the dozen
    done = bash(dozen, *line, "--max-minutes", "0.0001")
    assert done.returncode == 1
    assert "1 runs: 1 unfinished" in done.stdout
    assert "paused after --max-minutes" in done.stdout
    done = bash(dozen, *line)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 runs: 1 finished")


def longest_seconds(dozen: Path) -> float:
    """What one of the dozen took at most, training and evaluation."""
    lines = (dozen / "output").read_text().splitlines()
    return max(float(text.split(" after ")[1].split()[0]) for text in lines if "finished after" in text)


def check_kills(dozen: Path, folder: Path, kills: int) -> None:
    """Kill the same runs at random moments, starting them anew each time: all ends as it did undisturbed.

    A child of this process stands in for run_all.sh, which becomes run_list.py by exec: it starts much faster.
    """
    project, chance = link_project(folder / "the project"), random.Random(0)
    (project / "data").symlink_to(dozen / "data")
    pairs = listed("--scale", "quick", "--only", ",".join(DOZEN[-kills:]))
    fields = ([str(k), "digits", str(Path(e[1])), " ".join(t), " ".join(e)] for k, (t, e) in enumerate(pairs, 1))
    lines = "".join("\t".join(words) + "\n" for words in fields)

    def start() -> int:
        if child := os.fork():
            return child
        try:
            os.chdir(project)
            output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdin = StringIO(lines)
            sys.stdout = sys.stderr = open("output", "a")  # noqa: SIM115
            code = runs.run_main(lambda: run_list.main(["--root", "runs-quick", "--gpus", ",", "--preload"]))
            sys.stdout.flush()
        finally:
            os._exit(code)

    for _ in range(kills):
        child = start()
        until(lambda child=child: children_of(child) or not is_alive(child))  # at work, or nothing was left to do
        time.sleep(chance.uniform(0, longest_seconds(dozen) / 2))
        family = [child, *children_of(child)]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        until(lambda family=family: not any(map(is_alive, family)))  # no run is left behind
    assert os.waitpid(start(), 0)[1] == 0, (project / "output").read_text()
    for training, _ in pairs:
        run = parse_train(training[1:]).out
        killed, undisturbed = (runs.read_json(folder / run / "results.json") for folder in (project, dozen))
        assert (killed["best"], killed["last"]) == (undisturbed["best"], undisturbed["last"])
        assert (project / run / "log.csv").read_bytes() == (dozen / run / "log.csv").read_bytes()


def test_runs_killed_at_random_moments_end_as_if_undisturbed(dozen: Path, tmp_path: Path) -> None:
    check_kills(dozen, tmp_path, kills=3)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(dozen: Path, tmp_path: Path) -> None:
    check_kills(dozen, tmp_path, kills=20)
