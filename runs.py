"""Run folders: paths, atomic writes, checkpoints with a hash of their own, locks, the one-line user error.

A run lives in runs/<dataset>/<arch>/<method>[-<tag>]/seed<k>/ and holds config.json, log.csv, timing.csv, last.pt,
best.pt and results.json. Whatever is written here is written to a temporary file, flushed to the disk and renamed:
at any instant there is one whole file of each name.
"""

import argparse
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import torch

MAX_JSON_BYTES = 16 * 2**20
MAX_CHECKPOINT_BYTES = 2**29  # the largest of these networks with its optimiser has 200 million
MAX_PICKLE_BYTES = 2**22  # and their names and shapes 200 thousand
OF_TENSORS = (
    r"collections OrderedDict|torch (\w+Storage|Size|device|[a-z]+\d+)"
    r"|torch._utils _rebuild_(tensor_v2|parameter)"
)
MAX_INT = 2**31 - 1


class Stopped(Exception):
    """The run was told to stop (signal or time limit) after saving; carries the exit code and the line to print."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def run_main(main: Callable[[], int | None]) -> int:
    """Run a script's main; turn its errors into one line on stderr and exit code 2.

    ValueError and OSError carry messages fit for the user (DESIGN: functions below main raise those); `Stopped` carries
    its own exit code. Anything else is a bug and keeps its traceback.
    """
    script = Path(sys.argv[0]).name
    try:
        return main() or 0
    except Stopped as stop:
        print(f"{script}: {stop}", file=sys.stderr)
        return stop.exit_code
    except torch.OutOfMemoryError:
        less = "--accumulate 2 (or more) needs less" if script == "train.py" else "is another process on it?"
        print(f"{script}: the GPU's memory is full; {less}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        print(f"{script}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line, as ValueError, and defaults shown in the help."""

    def __init__(self, **options: object):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help shows the flags")


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> Callable:
    """An argparse type: a finite int or float within [low, high] and greater than `above`; ints fit in 32 bits."""
    high = min(high, MAX_INT) if kind is int else high

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None
        if not -math.inf < value < math.inf or not low <= value <= high or value <= above:
            wanted = f"above {above:g}" if above > -math.inf else f"at least {low:g}"
            wanted += f" and at most {high}" if high < math.inf and (value > high or high != MAX_INT) else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {wanted}")
        return value

    return parse


class StopRequest:
    """Notes SIGINT, SIGTERM and a time limit, for loops that stop between two steps. A context manager.

    A second SIGINT acts at once, as if this were not here. SIGTERM may well come twice, from a queue that ends every
    process of a job and from run_all.sh that passes it on; both ask for the same.
    """

    def __init__(self, minutes: float | None = None):
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.signal = 0

    def __enter__(self) -> "StopRequest":
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.signal = self.signal or number
        if number == signal.SIGINT:
            signal.signal(number, self.before[number])

    def pending(self) -> bool:
        """Has a signal come, or the time passed?"""
        return bool(self.signal) or (self.deadline is not None and time.monotonic() > self.deadline)

    def stopped(self, how_to_go_on: str) -> Stopped:
        """The exception that ends the run: code 130 or 143 after a signal, 0 ("paused") after the time limit."""
        if self.signal:
            return Stopped(f"stopped by {signal.Signals(self.signal).name}; {how_to_go_on}", 128 + self.signal)
        return Stopped(f"paused after --max-minutes; {how_to_go_on}", 0)


def seed_of(*key: object) -> int:
    """A 32-bit seed that depends on `key` alone, e.g. (seed, "step", epoch, step): draws need no state to resume."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


# Files


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place only when the block ends without an error.

    Raises OSError with a message naming the file when the disk is full or not writable; `path` is then as before.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.fchmod(handle, 0o644)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was there before is kept") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented JSON, atomically."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def read_json(path: str | Path, limit_bytes: int = MAX_JSON_BYTES) -> dict:
    """Read a JSON object. Raises FileNotFoundError, or ValueError naming the file when it is too large or damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size > limit_bytes:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than the {limit_bytes} such a file may have")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({str(error)[:80]}); delete it or write it anew") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object; delete it or write it anew")
    return content


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process. Raises ValueError if another holds it; a dead process leaves no lock behind.

    The temporary files of one that was killed while writing are removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is in use by another process; wait for it or choose another folder") from None
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield  # the kernel drops the lock when the file closes, whatever ends the process


# Checkpoints


def save_checkpoint(path: str | Path, content: dict) -> None:
    """Save with torch.save, atomically, with a SHA-256 of all members inside the file as the member `sha256`.

    `torch.load(path, weights_only=True)` reads it like any other checkpoint.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        prefix = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{prefix}/sha256", _digest_of_members(archive))
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: str | Path, need_hash: bool = False) -> dict:
    """Read a checkpoint on the CPU after checking its structure, each member's CRC, and the SHA-256 where it has one.

    torch reads nothing before all of that held and its pickle names nothing but tensors, and then with
    weights_only=True. Raises FileNotFoundError, or ValueError when the file is damaged, is no torch checkpoint, wants
    to run code, holds no dict, or lacks a hash although `need_hash`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; train first, or name another file")
    if path.stat().st_size > MAX_CHECKPOINT_BYTES:
        raise ValueError(f"{path} is larger than any checkpoint of this program; name another")
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):
                raise ValueError("its members are compressed")
            if sum(m.file_size for m in members) > len(data):
                raise ValueError("its members claim more bytes than the file has")
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
            digests = [m.filename for m in members if m.filename.endswith("/sha256")]
            if digests and archive.read(digests[0]) != _digest_of_members(archive).encode():
                raise ValueError("its SHA-256 does not match its content")
            if need_hash and not digests:
                raise ValueError("it holds no SHA-256, so this program did not write it")
            for name in archive.namelist():
                if name.lower().endswith("data.pkl"):
                    _check_pickle(archive.read(name))
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make zipfile and torch raise nearly anything
        reason = ascii(" ".join(str(error).split())[:120])[1:-1]
        if isinstance(error, pickle.UnpicklingError):  # torch's own advice is to trust the file
            reason = "its data.pkl is damaged"
        raise ValueError(f"{path} is not a whole torch checkpoint ({reason}); delete it or name another") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint's dict; name another file")
    return content


def _check_pickle(data: bytes) -> None:
    """ValueError where data.pkl names more than tensors: weights_only would admit, and allocate, bytearray(2**33)."""
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"its data.pkl has more than {MAX_PICKLE_BYTES} bytes")
    for opcode, name, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL" and not re.fullmatch(OF_TENSORS, name):
            raise ValueError(f"it holds {name[:60]!a}, but only tensors are read: save the state_dict() alone")


def _digest_of_members(archive: zipfile.ZipFile) -> str:
    digest = hashlib.sha256()
    for name in sorted(n for n in archive.namelist() if not n.endswith("/sha256")):
        data = archive.read(name)
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def plain_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State-dict keys without the `_orig_mod.` of torch.compile and the `module.` of DistributedDataParallel."""
    return {key.replace("_orig_mod.", "").removeprefix("module."): value for key, value in state.items()}


# Paths and provenance


def run_folder(root: str | Path, dataset: str, arch: str, method: str, tag: str, seed: int) -> Path:
    """<root>/<dataset>/<arch>/<method>[-<tag>]/seed<k>"""
    return Path(root) / dataset / arch / (f"{method}-{tag}" if tag else method) / f"seed{seed}"


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    import scipy

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "cuda": torch.version.cuda or "none",
    }


def commit() -> str:
    """The commit of this code, with `+changes` when the working tree differs; `unknown` outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        head, changes = (
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changes else "")
