"""Processes of the scripts, forked from one interpreter that has imported torch: starting one takes milliseconds.

A test that kills a run twenty times would spend its time importing torch. `Forks` starts this file once as a server,
which has run nothing in parallel and so can be forked safely. A fork's `main` is that of the script, its end too.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # that any one process may take, on a machine that is busy with other things


class Process:
    """A running script: `python <script> <flags>` but for the start-up."""

    def __init__(self, server: subprocess.Popen, pid: int, log: Path):
        self.server, self.pid, self.log, self.code = server, pid, log, None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            self.code = _ask(self.server, {"wait for": self.pid})
        return self.code

    def wait(self) -> int:
        """The exit code, when it has ended."""
        self.until(lambda: False)
        return self.code

    def until(self, condition: Callable[[], object], seconds: int = SECONDS) -> bool:
        """Wait for the condition; False when the process ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(20):
                if condition():
                    return True
                time.sleep(0.001)
            if self.poll() is not None:
                return False
        raise TimeoutError(f"nothing came of it in {seconds} s; {self.log.read_text()}")

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send the signal, SIGKILL by default, and wait for the end."""
        if self.poll() is None:
            os.kill(self.pid, number)
        return self.wait()

    def messages(self) -> list[str]:
        """The lines that it wrote to stderr."""
        return self.log.read_text().splitlines()


@contextmanager
def forks(folder: Path) -> Iterator[Callable[..., Process]]:
    """start(script, *flags, max_file_bytes=None, flush_seconds=0) -> Process; the logs go into `folder`.

    flush_seconds: how much longer each flush to the disk takes, so that a kill hits one.
    """
    server = subprocess.Popen(
        [sys.executable, Path(__file__)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    logs = iter(folder / f"{k}.log" for k in range(10**6))

    def start(script: str, *flags: object, max_file_bytes: int | None = None, flush_seconds: float = 0) -> Process:
        log = next(logs)
        order = {"argv": [script, *map(str, flags)], "log": str(log)}
        order |= {"max_file_bytes": max_file_bytes, "flush_seconds": flush_seconds}
        return Process(server, _ask(server, order), log)

    with server:  # which closes its stdin, and so ends it
        yield start


def _ask(server: subprocess.Popen, question: dict) -> int | None:
    server.stdin.write(json.dumps(question) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def serve() -> None:
    """Read questions, answer each with a line of JSON: a new process' id, or the exit code of one."""
    sys.path.insert(0, str(ROOT))
    import torch

    import data
    import evaluate
    import make_corrupted
    import runs
    import train

    torch.set_num_threads(1)
    mains = {"train.py": train.main, "evaluate.py": evaluate.main, "corruptions.py": make_corrupted.main}
    data.load_dataset("digits", "data")  # imports scikit-learn
    alive = set()
    for line in sys.stdin:
        question = json.loads(line)
        if (pid := question.get("wait for")) is not None:
            ended, status = os.waitpid(pid, os.WNOHANG)
            alive -= {ended}
            answer = os.waitstatus_to_exitcode(status) if ended else None
        elif (answer := os.fork()) == 0:
            sys.argv = question.pop("argv")
            run_fork(lambda: runs.run_main(mains[sys.argv[0]]), **question)
        else:
            alive.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def run_fork(main: Callable[[], int], log: str, max_file_bytes: int | None, flush_seconds: float) -> None:
    """Run a script's main in this fork, stderr in the log, and end as the script would."""
    code, fsync = 1, os.fsync
    os.fsync = lambda file: (fsync(file), time.sleep(flush_seconds))
    try:
        null, err = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_CREAT)
        for old, new in ((null, 0), (null, 1), (err, 2)):
            os.dup2(old, new)
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        code = main()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
