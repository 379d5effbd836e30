"""Works through the list of run_all.sh: the data first, then every run trained and evaluated, several at a time.

    bash run_all.sh table3 --gpus 0,1      # makes the list and calls this; there is no need to call it by hand

Each line of standard input is a run: its number, data set, folder, the command for train.py, the one for evaluate.py,
separated by tabs. A run whose results.json is whole is skipped, an interrupted one resumes, a failed one does not stop
the rest. SIGINT and SIGTERM are passed on to the commands, which save and end.
"""

import contextlib
import csv
import ctypes
import fcntl
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import runs
from data import CORRUPTED_FOLDERS, DATASETS, corruption_source, load_dataset

DATA = "data"
PR_SET_PDEATHSIG = 1  # of Linux' prctl


class Run(NamedTuple):
    """A line of the list."""

    number: int
    dataset: str  # whose images it needs
    folder: Path
    train: list[str]  # train.py and its flags
    evaluate: list[str]


class Job(NamedTuple):
    """A command of a run under way."""

    run: Run
    gpu: str
    started: float  # time.monotonic() when the run began
    evaluating: bool


def read_list(lines: list[str]) -> list[Run]:
    """The runs of the list. Raises ValueError for a line that is no run."""
    found = []
    for line in lines:
        fields = line.rstrip("\n").split("\t")
        if len(fields) != 5 or not fields[0].isdigit() or fields[1] not in DATASETS:
            raise ValueError(f"not a line of run_all.sh's list: {line[:80]!r}; call bash run_all.sh instead")
        number, dataset, folder, train, evaluate = fields
        found.append(Run(int(number), dataset, Path(folder), train.split(" "), evaluate.split(" ")))
    return found


def log_of(run: Run, root: Path) -> Path:
    """Where a run's commands write: <root>/logs/<dataset>-<arch>-<method>-seed<k>.log"""
    return root / "logs" / ("-".join(run.folder.relative_to(root).parts) + ".log")


def is_whole(run: Run) -> bool:
    """Is there a results.json that parses and holds the evaluations that the run's evaluate command makes?"""
    limit = int(run.evaluate[run.evaluate.index("--limit") + 1]) if "--limit" in run.evaluate else None
    wanted = [kept for kept in ("best", "last") if "--only" not in run.evaluate or kept in run.evaluate]
    try:
        results = runs.read_json(run.folder / "results.json")
    except (OSError, ValueError):
        return False
    return results.get("limit") == limit and all(isinstance(results.get(kept), dict) for kept in wanted)


def is_trained(run: Run) -> bool:
    """Is the last epoch logged? train.py ends with exit code 0, too, when it pauses after --max-minutes."""
    try:
        with open(run.folder / "log.csv", newline="") as rows:
            return sum(1 for _ in csv.DictReader(rows)) >= runs.read_json(run.folder / "config.json")["epochs"]
    except (OSError, ValueError, KeyError):  # it paused within its first epoch
        return False


# Child processes


class Children:
    """The commands under way. SIGINT and SIGTERM are passed on to them, and the last of these is noted in `signal`."""

    def __init__(self) -> None:
        self.pids: set[int] = set()
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _: object) -> None:
        self.signal = number
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def start(self, function: Callable[[], int | None], log: Path | None = None, gpu: str = "") -> int:
        """Call `function` in a child process, its output appended to `log`; the child's process id."""
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            _be_child(function, log, gpu)
        self.pids.add(pid)
        if self.signal:
            self._pass_on(self.signal, None)
        return pid

    def wait(self) -> tuple[int, int]:
        """(process id, exit code) of the next child that ends; the code is negative if a signal killed it."""
        while (wait := os.wait())[0] not in self.pids:
            pass  # run_all.sh, which became this process, may have left children of its own
        pid, status = wait
        self.pids.remove(pid)
        return pid, os.waitstatus_to_exitcode(status)


def _be_child(function: Callable[[], int | None], log: Path | None, gpu: str) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()  # Ctrl-C in a terminal reaches the parent alone, which passes it on once
        with contextlib.suppress(AttributeError):  # killed with its parent, so that no run is left behind (Linux)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if log:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
        if gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        code = runs.run_main(function)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def execute(command: list[str]) -> NoReturn:
    """Become `python <command>`."""
    os.execv(sys.executable, [sys.executable, *command])


def prepare(dataset: str, download: bool) -> int | None:
    """The images of a data set, then its corrupted test set: what is under data/ is used, the rest fetched or made."""
    with open(Path(DATA) / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tasks of a SLURM array start together; the first one does it
        load_dataset(dataset, DATA)
        folder = Path(DATA) / CORRUPTED_FOLDERS[dataset]
        if len(list(folder.glob("*.npy"))) >= 19:  # 18 corruptions and the labels
            return
        os.set_inheritable(lock.fileno(), True)
        command = ["corruptions.py", "--dataset", dataset, "--data", DATA]
        command += ["--download"] if download and dataset != "digits" else []
        print(f"no whole {folder}: python {' '.join(command)}", flush=True)
        execute(command)


def preloaded(scripts: dict[str, Callable[[list[str]], int | None]], command: list[str]) -> int | None:
    """Call the main of a script that is imported already, as if it had been started."""
    sys.argv = command
    return runs.run_main(partial(scripts[command[0]], command[1:]))


# The queue


def prepare_all(datasets: list[str], download: bool, children: Children) -> set[str]:
    """Prepare one data set after another; those that could not be."""
    lacking = set()
    for dataset in datasets:
        if not children.signal:
            children.start(partial(prepare, dataset, download))
            if children.wait()[1] != 0:
                lacking.add(dataset)
    return lacking


def work_through(
    todo: list[Run], root: Path, gpus: list[str], call: Callable[[list[str]], int | None], children: Children
) -> dict[int, str]:
    """Train and evaluate the runs in their order, one at a time on each of `gpus`; number -> what became of it.

    `call` runs a command in a child process. A run that was not begun, because of a signal, is not in the result.
    """
    outcomes: dict[int, str] = {}
    running: dict[int, Job] = {}
    waiting, free = iter(todo), list(gpus)
    while True:
        while free and not children.signal and (run := next(waiting, None)):
            gpu, log = free.pop(0), log_of(run, root)
            print(f"[{run.number}] {run.folder}: begins{f' on GPU {gpu}' if gpu else ''}, log in {log}", flush=True)
            pid = children.start(partial(call, run.train), log, gpu)
            running[pid] = Job(run, gpu, time.monotonic(), evaluating=False)
        if not running:
            return outcomes
        pid, code = children.wait()
        job = running.pop(pid)
        run, log = job.run, log_of(job.run, root)
        if code == 0 and not job.evaluating and not children.signal and is_trained(run):
            pid = children.start(partial(call, run.evaluate), log, job.gpu)
            running[pid] = job._replace(evaluating=True)
            continue
        free.append(job.gpu)
        stopped = children.signal or code in (130, 143) or (code == 0 and not job.evaluating)  # 0: paused
        whole = code == 0 and job.evaluating and is_whole(run)
        outcome = "finished" if whole else "unfinished" if stopped else "failed"
        outcomes[run.number] = outcome
        print(f"[{run.number}] {run.folder}: {outcome} after {time.monotonic() - job.started:.0f} s", flush=True)


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")


def summarise(todo: list[Run], root: Path, outcomes: dict[int, str], lacking: set[str]) -> bool:
    """Print the corrupted sets, each run that is not finished with its log, and the counts. Are all runs finished?"""
    print()
    for dataset in dict.fromkeys(run.dataset for run in todo):
        with contextlib.suppress(OSError, ValueError):
            print(f"{DATA}/{CORRUPTED_FOLDERS[dataset]}: {corruption_source(dataset, DATA)}")
    for run in todo:
        log = log_of(run, root)
        if run.dataset in lacking and run.number not in outcomes:
            outcomes[run.number] = "failed"
            print(f"failed: {run.folder}: no data (why is said above)")
        elif outcomes.get(run.number) in ("failed", "unfinished"):
            print(f"{outcomes[run.number]}: {run.folder}, log {log}: {last_line(log)}")
    count = Counter(outcomes.get(run.number, "not begun") for run in todo)
    print(f"{len(todo)} runs: {', '.join(f'{number} {outcome}' for outcome, number in count.items())}", flush=True)
    return all("finished" in outcome.split() for outcome in count)


def main(argv: list[str] | None = None) -> int:
    parser = runs.Parser(description="Work through the list of runs on standard input, as run_all.sh does.")
    add = parser.add_argument
    add("--root", type=Path, default="runs", help="the folder that holds the runs' folders; logs go into its logs/")
    add("--gpus", default="", help="GPUs to share the runs among, as 0,1; an empty entry is a worker without one")
    add("--download-corruptions", action="store_true", help="fetch official corrupted sets where there are none")
    add("--data-only", action="store_true", help="prepare the data alone")
    add("--preload", action="store_true", help="import torch once for all runs, not in each: for many short ones")
    add("--again", default="the same command", help="the command to name where something is left to do")
    add("then", nargs="*", help="a script and its flags, to run when all is finished")
    args = parser.parse_args(argv)
    todo = read_list(sys.stdin.readlines())
    before = {} if args.data_only else {run.number: "finished before" for run in todo if is_whole(run)}
    left = [run for run in todo if run.number not in before]
    for folder in (Path(DATA), args.root / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    call = execute
    if args.preload and left:
        import evaluate
        import train

        load_dataset("digits", DATA)  # which imports scikit-learn
        call = partial(preloaded, {"train.py": train.main, "evaluate.py": evaluate.main})

    children = Children()
    lacking = prepare_all(list(dict.fromkeys(run.dataset for run in left)), args.download_corruptions, children)
    if args.data_only:
        good = not lacking
    else:
        ready = [run for run in left if run.dataset not in lacking]
        outcomes = before | work_through(ready, args.root, args.gpus.split(","), call, children)
        good = summarise(todo, args.root, outcomes, lacking)
    if children.signal:
        raise runs.Stopped(
            f"stopped by {signal.Signals(children.signal).name}; what is done is kept, this goes on: {args.again}",
            128 + children.signal,
        )
    if good and args.then:
        children.start(partial(execute, args.then))
        return children.wait()[1]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
