"""run_all.sh's list against the published tables, how it works through the list, and setup.sh.

PYTHON, nvidia-smi and other programs are stubs that note how they were called; nothing is trained.
"""

import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT

from tables import published
from train import parse_args

TOOLS = ["awk", "bash", "cat", "cksum", "cp", "cut", "date", "dirname", "grep", "mkdir", "nproc",
         "realpath", "rm", "sed", "sleep", "tail", "touch", "tr", "wc", "xargs"]  # fmt: skip
METHODS = ("standard", "augmix", "magnma")
CPU = {"DEVICE": "cpu"}
# Notes GPU, threads, start, end, words of each call. FAIL and KILL name a method, BROKEN a script.
PYTHON = r"""
start=$(date +%s.%N)
case "$*" in
  "train.py --help") [[ ! ${BARE:-} ]] || { echo "No module named 'torch'" >&2; exit 1; }; exit ;;
  *"--method ${KILL:-no} "*) kill -9 $$ ;;
  *"--method ${FAIL:-no} "*) echo "Epoch 1"; echo "train.py: out of luck" >&2; exit 2 ;;
  train.py*) [[ ! ${HANG:-} ]] || { echo "hang $$" >>"$CALLS"; exec sleep 600; } ;;
  evaluate.py*) touch "$2/results.json" ;;
  tables.py*) echo "a table" ;;
esac
[[ $1 != train.py || ! ${MEET:-} ]] || {  # wait until a second one trains, 20 s at most
  echo >>"$CALLS.met"
  for _ in {1..1000}; do (($(wc -l <"$CALLS.met") < 2)) || break; sleep 0.02; done
}
echo "${CUDA_VISIBLE_DEVICES-} ${OMP_NUM_THREADS-} $start $(date +%s.%N) $*" >>"$CALLS"
[[ $1 != "${BROKEN:-no}" ]] || { echo "$1: broken" >&2; exit 1; }
"""


def program(path, text):
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the shell scripts in a folder with a space; bin/ is all of PATH, without a GPU."""
    folder = tmp_path / "the project"
    for name in ("run_all.sh", "setup.sh", "requirements.txt", "paper/runs.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "bin").mkdir()
    (folder / "a venv").mkdir()
    for tool in TOOLS:
        (folder / "bin" / tool).symlink_to(shutil.which(tool))
    program(folder / "a venv/python", PYTHON)
    return folder


def variables(project, changes) -> dict[str, str]:
    python, calls = str(project / "a venv/python"), str(project / "calls")
    return {"PATH": str(project / "bin"), "PYTHON": python, "CALLS": calls, **changes}


def bash(project, *words, **changes) -> subprocess.CompletedProcess:
    """Run `bash run_all.sh WORDS` (or `bash FILE WORDS`) with environment variables."""
    if not words or not words[0].endswith(".sh"):
        words = ("run_all.sh", *words)
    options = {"env": variables(project, changes), "cwd": project.parent, "timeout": 60}
    command = ["bash", project / words[0], *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, **options)


def calls(project, script="") -> list[list[str]]:
    """[GPU, threads, start, end, script, arguments ...] of the calls noted since the last look."""
    path = project / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [words for words in (line.split(" ") for line in lines) if script in (*words[4:5], "")]


def called(project) -> list[list[str]]:
    """[script, arguments ...] of these calls."""
    return [words[4:] for words in calls(project)]


def value(words, flag) -> str:
    return words[words.index(flag) + 1]


def commands(project, *part: str, **changes: str) -> list[list[str]]:
    """The words of each line that `list` prints."""
    done = bash(project, "list", *part, **changes)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines()]


def run_of(words) -> tuple[str, str, str]:
    """(data set, network, column of paper/tables.json) of a command."""
    args = parse_args(words[2 : words.index("&&")])
    column = args.method
    if args.method == "magnma":
        column += f" {args.lambda1:g} {args.lambda2:g} {args.sigma_max:g} {args.beta:g}"
    return args.dataset, args.arch, column


# The list


def test_all_is_each_published_run_once_with_each_seed(project):
    lines, folders = commands(project), set()
    for seed in range(3):  # the outer loop
        part = lines[48 * seed : 48 * seed + 48]
        assert {value(words, "--seed") for words in part} == {str(seed)}
        assert {run_of(words) for words in part} == {key[:3] for key in published("12345")}
        assert [run_of(words)[:2] for words in part[:3]] == [("cifar10", "resnet18")] * 3
        assert [value(words, "--method") for words in part[:3]] == [*METHODS]
    own = {"--dataset", "--arch", "--method", "--tag", "--seed", "--device", "--out", "--resume"}
    for words in lines:
        flags = words[2 : words.index("&&")]
        used = {flag for flag in flags if flag[:2] == "--"}
        assert used <= own | {"--lambda1", "--lambda2", "--sigma-max"}  # else the paper's values
        args = parse_args(flags)
        name = f"{args.method}-{args.tag}" if args.tag else args.method
        assert args.out == f"runs/{args.dataset}/{args.arch}/{name}/seed{args.seed}"
        folders.add(args.out)
    assert len(lines) == len(folders) == 144


def test_each_table_has_its_runs_and_no_others(project):
    for table in "12345":
        runs = [run_of(words) for words in commands(project, f"table{table}", SEEDS="0")]
        assert sorted(runs) == sorted({key[:3] for key in published(table)})


def test_nine_is_a_part_of_its_own(project):
    lines, columns = commands(project, "nine"), ("magnma 0.2 0.3 0.2 1", "magnma 0 5 0.2 1")
    wanted = itertools.product(("cifar10", "cifar100"), ["resnet18"], columns)
    assert sorted(map(run_of, lines)) == sorted([*wanted] * 3)  # three seeds
    assert all(value(words, "--operations") == "augmix" for words in lines)
    assert len({value(words, "--out") for words in lines}) == 12
    assert bash(project, "nine", SEEDS="0", **CPU).returncode == 0
    assert [words[5:] for words in calls(project, "tables.py")] == [
        ["runs", "--table", table] for table in "34"
    ]


def test_settings_reach_the_commands(project):
    settings = {"SEEDS": "7 3", "ROOT": "a b/r;*", "PYTHON": "c d/python", "DEVICE": "cpu"}
    lines = commands(project, "headline", **settings, FLAGS="--epochs 1 --n 2")
    assert [value(words, "--seed") for words in lines] == list("777333")
    folder = "a b/r;*/cifar10/resnet18/standard/seed7"
    python = f"{project.parent}/c d/python"  # seen from the caller's folder
    assert " ".join(lines[0]) == (
        f"{python} train.py --dataset cifar10 --arch resnet18 --method standard --seed 7"
        f" --device cpu --epochs 1 --n 2 --out {folder} --resume && {{ [ -e {folder}/results.json ]"
        f" || {python} evaluate.py {folder} --device cpu; }}"
    )


def test_list_needs_neither_packages_nor_gpu_and_one_line_of_it_is_a_job(project):
    def pipe(command):
        command = f"bash run_all.sh list table3 | {command}"
        subprocess.run(["bash", "-c", command], cwd=project, env=variables(project, {}), check=True)
        return called(project)

    done = bash(project, "list", "table3", PYTHON="", GPUS="8")  # setup.sh would find no python3
    assert done.stdout.count(".venv/bin/python train.py") == 27
    assert pipe("sed 1q") == []  # a closed pipe ends it
    folder = "runs/cifar10/resnet18/trades/seed0"
    (project / folder).mkdir(parents=True)  # as train.py does
    for scripts in (["train.py", "evaluate.py"], ["train.py"]):  # results.json exists then
        made = pipe("sed -n 5p | bash")
        assert [words[0] for words in made] == scripts
        assert all(folder in words for words in made)


# Mistakes


VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ("table 3", {}, "unknown part 'table'"),
        ("table3 table4", {}, "too many words: 'table3 table4'"),
        ("test table3", {}, "too many words: 'table3'"),
        ("table3", {"SEEDS": "0-2"}, "SEEDS takes numbers"),
        ("table3", {"GPUS": "0"}, "GPUS takes a number"),
        ("table3", {"DEVICE": "gpu"}, "DEVICE is cuda or cpu"),
        ("list", {"FLAGS": "--n 1"}, "Choose another folder than runs"),
        ("table3", {"FLAGS": "--n 1", "ROOT": "x/../runs/"}, "Choose another folder than runs"),
        ("table3", {"FLAGS": "--seed=1", "ROOT": "x"}, "run_all.sh sets this flag itself"),
        ("table3", {"FLAGS": "--data /d", "ROOT": "x"}, "FLAGS cannot have --data"),
        ("table3", {}, "no NVIDIA GPU found. DEVICE=cpu"),
        ("table3", {VISIBLE: "NoDevFiles"}, "no NVIDIA GPU found. DEVICE=cpu"),
        ("table3", {VISIBLE: "4,5", "GPUS": "3"}, "GPUS=3 is more than the 2"),
        ("table3", CPU | {"BARE": "1"}, "lacks packages of requirements.txt (No module"),
        ("table3", CPU | {"PYTHON": "/nowhere/python"}, "lacks packages of require"),
        ("table3", CPU | {"ROOT": "run_all.sh/x"}, "cannot write to ROOT=run_all.sh/x"),
    ],
)
def test_mistakes_are_named_before_the_first_run(project, words, settings, message):
    done = bash(project, *words.split(), **settings)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert calls(project, "train.py") == []


def test_another_xargs_is_refused(project):
    program(project / "bin/xargs", 'echo "xargs: illegal option -- -" >&2; exit 1')  # macOS
    done = bash(project, "table3", DEVICE="cpu")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "bash 4 and GNU xargs are needed" in done.stderr


@pytest.mark.parametrize("shown", ["0", "NVIDIA-SMI has failed because 1\n2 reasons"])
def test_more_gpus_than_nvidia_smi_lists_are_refused(project, shown):
    program(project / "bin/nvidia-smi", f'echo "{shown}"')
    done = bash(project, "headline", SEEDS="0", GPUS="2")
    assert done.returncode == 2
    assert "GPUS=2 is more than the 1 that" in done.stderr
    assert calls(project, "train.py") == []


# The runs


def test_failed_and_killed_runs_are_named_after_the_tables_and_repeated(project):
    settings, folder = CPU | {"SEEDS": "0", "ROOT": "a b"}, "a b/cifar10/resnet18"
    done = bash(project, "headline", **settings, FAIL="standard", KILL="augmix")
    assert (done.returncode, done.stderr) == (1, "")
    start, *lines = done.stdout.splitlines()
    assert start.startswith("run_all.sh: 3 runs, 1 at a time")
    failed, killed = lines.pop(-2), lines.pop(-1)
    assert lines == [
        f"[1/3] {folder}/standard/seed0: failed", f"[2/3] {folder}/augmix/seed0: failed",
        f"[3/3] {folder}/magnma/seed0: finished", "a table", "a table",
    ]  # fmt: skip
    log = f"(log: {folder}/standard/seed0/output.log)"
    assert failed == f"failed: {folder}/standard/seed0: train.py: out of luck {log}"
    assert killed.startswith(f"failed: {folder}/augmix/seed0: ")
    assert "Killed" in killed
    made = called(project)
    assert made[0] == ["corruptions.py", "--dataset", "cifar10", "--download"]
    assert [words[0] for words in made[1:3]] == ["train.py", "evaluate.py"]
    assert made[3:] == [["tables.py", "a", "b", "--table", table] for table in "12"]
    done = bash(project, "headline", **settings)
    assert done.returncode == 0
    assert "failed" not in done.stdout
    again = [words[0] for words in called(project)[1:-2]]
    assert again == [*["train.py", "evaluate.py"] * 2, "train.py"]  # MAGNMA has its results


def test_a_run_whose_folder_cannot_be_made_does_not_stop_the_others(project):
    folder = project / "runs/cifar10/resnet18"
    folder.mkdir(parents=True)
    (folder / "standard").touch()
    done = bash(project, "headline", SEEDS="0", **CPU)
    assert done.returncode == 1
    assert "[3/3] runs/cifar10/resnet18/magnma/seed0: finished" in done.stdout
    assert "\nfailed: runs/cifar10/resnet18/standard/seed0: " in done.stdout


@pytest.mark.parametrize(("visible", "used"), [("5,GPU-3,9", {"5", "GPU-3"}), (None, {"0", "1"})])
def test_runs_in_parallel_have_a_gpu_each(project, visible, used):
    program(project / "bin/nvidia-smi", 'echo "0\n1"')
    settings = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    assert bash(project, "headline", SEEDS="0", GPUS="2", MEET="1", **settings).returncode == 0
    trained = calls(project, "train.py")
    assert {words[0] for words in trained} == used
    spans = sorted((float(start), float(end), gpu) for gpu, _, start, end, *_ in trained)
    assert spans[1][0] < spans[0][1]  # the first two overlap
    for gpu in used:
        own = [span for span in spans if span[2] == gpu]
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(own))


def test_runs_on_a_cpu_share_its_cores(project):
    program(project / "bin/nproc", "echo 8")
    for gpus, threads in (("1", "8"), ("3", "2"), ("9", "1")):
        done = bash(project, "headline", SEEDS="0", GPUS=gpus, ROOT=f"runs{gpus}", **CPU)
        assert done.returncode == 0
        assert {words[1] for words in calls(project, "train.py")} == {threads}


def test_data_alone_and_data_that_cannot_be_downloaded(project):
    script, names = "corruptions.py", ("cifar10", "cifar100")
    wanted = [[script, "--dataset", name, "--download"] for name in names]
    assert bash(project, "data").returncode == 0  # without a GPU
    assert called(project) == wanted
    done = bash(project, "table3", DEVICE="cpu", BROKEN="corruptions.py")
    assert (done.returncode, done.stderr) == (1, "corruptions.py: broken\n")
    assert called(project) == wanted[:1]


@pytest.mark.parametrize("broken", ["", "figures.py"])
def test_the_demo_prints_its_table_before_the_figure(project, broken):
    done = bash(project, "demo", BROKEN=broken)
    lines = done.stdout.splitlines()
    assert lines[4] == "a table"
    figure = ["Clean and corrupted accuracy: runs-demo/figures/figure5.png"]
    assert (done.returncode, lines[5:]) == ((1, []) if broken else (0, figure))
    assert done.stderr == ("figures.py: broken\n" if broken else "")
    first, *made, tables, figures = called(project)
    assert first == ["corruptions.py", "--dataset", "digits"]
    assert [*tables, *figures[:2]] == ["tables.py", "runs-demo", "figures.py", "runs-demo"]
    folders = {words[1] for words in made if words[0] == "evaluate.py"}
    assert folders == {f"runs-demo/digits/resnet20/{method}/seed0" for method in METHODS}
    assert all({"--epochs", "cpu"} <= {*words} for words in made if words[0] == "train.py")


def running(stat: Path) -> bool:
    """Whether the process of /proc/<pid>/stat runs."""
    try:
        return ") Z " not in stat.read_text()
    except OSError:  # it has ended, perhaps while it was read
        return False


@pytest.mark.parametrize("stop", ["Ctrl-C", "kill"])
def test_ctrl_c_and_the_printed_kill_end_all_trainings(project, stop):
    settings = variables(project, CPU | {"GPUS": "2", "HANG": "1"})
    options = {"env": settings, "stdout": subprocess.PIPE, "text": True}
    options["start_new_session"] = True  # with a process group, as from a terminal
    job = subprocess.Popen(["bash", project / "run_all.sh", "headline"], **options)
    noted, deadline, text = project / "calls", time.monotonic() + 60, ""
    while text.count("hang") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        text = noted.read_text() if noted.exists() else ""
    if stop == "kill":
        command = re.search(r"kill -- -\d+", job.stdout.readline())[0]
        subprocess.run(["bash", "-c", command], check=True)
    else:
        os.killpg(job.pid, signal.SIGINT)  # what a terminal sends
    output, _ = job.communicate(timeout=20)
    assert job.returncode == (-signal.SIGTERM if stop == "kill" else -signal.SIGINT)
    assert "a table" not in output
    processes = [Path(f"/proc/{pid}/stat") for pid in re.findall(r"hang (\d+)", text)]
    assert len(processes) == 2
    while any(map(running, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# test, setup.sh


@pytest.mark.parametrize("broken", ["", "ruff", "shellcheck", "-m"])
def test_every_failure_shows_in_the_exit_code_of_test(project, broken):
    stub = 'echo "- - - - ${0##*/} $*" >>"$CALLS"; [[ ${0##*/} != "$BROKEN" ]]'
    for name in ("ruff", "shellcheck"):
        program(project / "a venv" / name, stub)  # beside PYTHON, where pip puts them
    assert bash(project, "test", BROKEN=broken).returncode == (1 if broken else 0)
    *checks, tests = calls(project)
    assert [" ".join(words[4:]) for words in checks] == [
        "ruff check .", "ruff format --check .", "shellcheck run_all.sh setup.sh .ci/run",
    ]  # fmt: skip
    assert [tests[1], *tests[4:]] == ["1", "-m", "pytest", "-n", "2", "--dist", "loadfile"]


def test_tests_run_without_ruff_and_shellcheck(project):
    done = bash(project, "test")
    assert (done.returncode, done.stderr, len(called(project))) == (0, "", 1)
    words = re.findall(r"left out: ([a-z-]+)", done.stdout)
    assert words == ["ruff", "ruff", "shellcheck"]


SETUP = {
    "python3": """case "$*" in
      --version) echo "Python ${VERSION:-3.11.9}" ;;
      "-m venv .venv" | "-m venv --clear .venv") [[ $* != *clear* ]] || rm -r .venv
        mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/pip
        echo "VIRTUAL_ENV=\"$PWD/.venv\"" >.venv/bin/activate ;;
      *"pip install"*) [[ ! ${OFFLINE:-} ]] || { echo "ERROR: no network" >&2; exit 1; }
        echo "${@:6}" >>pips; [[ $* != *" -r "* ]] || cat "${@: -1}" >>pips ;;
    esac""",
    # GPU: what it prints; without a comma, as of old drivers, compute_cap is unknown
    "nvidia-smi": """[[ ${GPU:-} && ($GPU == *,* || $1 != *compute_cap*) ]] && echo -e "$GPU" """,
}


@pytest.fixture
def fresh(project) -> Path:
    """A project on a machine with a Python, but without a virtual environment."""
    for name, text in SETUP.items():
        program(project / "bin" / name, text)
    return project


@pytest.mark.parametrize(
    ("gpu", "words", "build"),  # build None: refused
    [
        ("", [], ""), ("", ["cu126"], "cu126"), ("No devices were found", [], ""),
        ("580.65.06, 7.5", [], ""), ("595.10, 12.0", [], ""), ("595.10, 9.0", ["cu126"], "cu126"),
        ("580.65.06, 8.0\\n580.65.06, 7.0", [], "cu126"),  # one of two is a V100
        ("570.86, 9.0", [], "cu126"), ("525.60.13, 7.0", [], "cu126"), ("570.86, 10.0", [], None),
        ("579.99, 8.0\\n579.99, 12.0", ["cu126"], None), ("524.9, 8.0", [], None),
        ("470.199.02", [], None),
    ],
)  # fmt: skip
def test_setup_installs_the_build_for_driver_and_gpu(fresh, gpu, words, build):
    done = bash(fresh, "setup.sh", *words, GPU=gpu)
    if build is None:
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith("setup.sh: the NVIDIA driver is too old: ")
        assert not (fresh / ".venv").exists()
        return
    assert done.returncode == 0
    first, *packages, last = (fresh / "pips").read_text().splitlines()
    index = "--extra-index-url https://download.pytorch.org/whl/cu126 -r"
    assert first.startswith(index if build else "-r requirements.txt")
    pinned = (fresh / "requirements.txt").read_text()
    if build:
        pinned = re.sub("(torch==.*|torchvision==.*)", rf"\1+{build}", pinned)
    assert packages == pinned.splitlines()
    assert last == "--no-deps imagecorruptions==1.1.2"


def test_an_installed_environment_needs_no_network(fresh):
    assert bash(fresh, "setup.sh", OFFLINE="1").returncode == 2
    assert not (fresh / ".venv/installed").exists()  # the stamp is written last
    assert bash(fresh, "setup.sh", "cu126").returncode == 0
    for words, gpu in (([], ""), ([], "580.1, 8.0"), ([], "580.1, 7.0"), (["cu126"], "")):
        done = bash(fresh, "setup.sh", *words, GPU=gpu, OFFLINE="1")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with open(fresh / "requirements.txt", "a") as file:
        file.write("six==1\n")
    assert bash(fresh, "setup.sh", OFFLINE="1").returncode == 2
    assert bash(fresh, "setup.sh").returncode == 0
    assert "six==1" in (fresh / "pips").read_text()
    done = bash(fresh, "setup.sh", GPU="580.1, 7.0", OFFLINE="1")  # now another build is needed
    assert (done.returncode, done.stderr.count("\n")) == (2, 2)  # pip's line and one of setup.sh


def test_an_environment_that_was_moved_or_lost_its_python_is_made_again(fresh):
    assert bash(fresh, "setup.sh").returncode == 0
    (fresh / ".venv/bin/torchrun").write_text(f"#!{fresh}/.venv/bin/python")
    moved = fresh.rename(fresh.parent / "moved")
    assert bash(moved, "setup.sh").returncode == 0
    assert not (moved / ".venv/bin/torchrun").exists()
    assert f"{moved}/.venv" in (moved / ".venv/bin/activate").read_text()
    (moved / ".venv/bin/python").unlink()
    (moved / ".venv/bin/torchrun").touch()
    assert bash(moved, "setup.sh").returncode == 0
    assert (moved / ".venv/bin/python").exists()
    assert (moved / ".venv/bin/torchrun").exists()  # and other packages are kept


def test_setup_names_the_python_it_needs_and_finds_another(fresh):
    done = bash(fresh, "setup.sh", VERSION="3.9.18")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("setup.sh: Python 3.11 or newer not found as python3.")
    program(fresh / "bin/python3.12", SETUP["python3"].replace("${VERSION:-3.11.9}", "3.12.1"))
    assert bash(fresh, "setup.sh", VERSION="3.9.18").returncode == 0
    done = bash(fresh, "setup.sh", "cu128")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_an_empty_python_is_set_up_first(fresh):
    assert bash(fresh, "data", "table3", PYTHON="").returncode == 0
    assert (fresh / ".venv/installed").exists()
