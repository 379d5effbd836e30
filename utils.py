"""What all scripts share: torchvision, device, precision, seeds, files, errors, provenance."""

import argparse
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, NoReturn

import numpy
import scipy
import torch

try:
    import torchvision
except RuntimeError as error:
    # PyPI's torchvision is built for CUDA torch. Beside a CPU build of torch its import fails,
    # because the operators nms and qnms were never declared. Declare them only then: beside a
    # matching torchvision (every GPU user's) a second declaration aborts the process.
    if "operator torchvision::nms does not exist" not in str(error):
        raise
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    operators = torch.library.Library("torchvision", "DEF")  # must live as long as its operators
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401 - the other modules import it from here


class UserError(ValueError):
    """A mistake that the user can fix: `run_main` prints it as one line, without a traceback."""


AMP = ("auto", "bf16", "fp16", "off")  # of --amp
AMP_HELP = "mixed precision; auto: bf16 on GPUs that have it, fp16 on older ones, off on a CPU"

# Device, precision, optimiser, seeds


def pick_device(name: str = "auto") -> torch.device:
    """The device for `--device`: `auto` (a GPU if there is one, else the CPU), `cpu`, `cuda[:<k>]`.

    Under torchrun `auto` and `cuda` are this process's GPU. Raises UserError for an unknown name, a
    GPU that does not exist, and one that this torch has no kernels for.
    """
    if name == "cpu":
        return torch.device("cpu")
    # Let the allocator grow its blocks: less fragmentation. Read when CUDA starts.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if name == "auto":
        return pick_device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise UserError(f"--device {name}: unknown device. Use auto, cpu, cuda or cuda:<index>")
    index = int(name[5:] or os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here. Try --device cpu"
        )
    device = torch.device("cuda", index)
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add(1).item()
    except torch.OutOfMemoryError:
        raise  # run_main reports it
    except RuntimeError as error:
        raise UserError(
            f"--device {name}: torch {torch.__version__} does not run on this GPU"
            f" ({str(error)[:120]}). `bash setup.sh cu126` installs the build for older cards"
        ) from None
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # `--amp off` means float32
    return device


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for `--amp auto | bf16 | fp16 | off`; None is float32 throughout.

    `auto`: bf16 on GPUs of compute capability 8 and up, fp16 on older ones, None on a CPU.
    Raises UserError for fp16 on a CPU, which takes hundreds of times longer there.
    """
    if amp == "auto" and device.type == "cpu":
        return None
    if amp == "auto":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 is for GPUs. On a CPU use --amp off, or bf16")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def amp_name(dtype: torch.dtype | None) -> str:
    """The name that --amp has for a dtype: bf16, fp16 or off."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[dtype]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Mixed precision for the network; does nothing for dtype None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def optimiser(f: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum 0.9 (Sec. 4).

    On a GPU one fused kernel, which skips an overflowed step without a sync with the host.
    """
    fused = next(f.parameters()).is_cuda
    sgd = torch.optim.SGD(
        f.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=fused
    )
    if fused:  # fused SGD leaves momentum uninitialised if AMP skips the first step
        for p in f.parameters():
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def seed(*key: object) -> None:
    """Seed torch's global generators from a hash of `key`, e.g. (seed, epoch, rank)."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


# Files


def make_folder(folder: str | Path) -> None:
    """Create a folder if it does not exist. Raises UserError unless files can be written to it."""
    probe = Path(folder, f".{os.getpid()}.tmp")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = "it is a file" if probe.parent.is_file() else error.strerror
        raise UserError(f"cannot write to {folder}: {why}. Choose another --out") from None


def check_out(path: Path) -> None:
    """Raise UserError unless the file of --out can be written. Call it before the work."""
    if path.exists() and not path.is_file():
        raise UserError(f"--out {path} is not a file. Name the file to write")
    make_folder(path.parent)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Write to a temporary file; rename it to `path` on success.

    Raises UserError naming the file if it cannot be written (full disk, no permission); `path` is
    then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # it was renamed or never created
            temporary.unlink()


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> dict:
    """Read a JSON object. Raises UserError if the file is missing, unreadable or damaged."""
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def save_checkpoint(path: str | Path, content: dict) -> None:
    """torch.save, atomically."""
    buffer = io.BytesIO()  # torch.save straight to a full disk raises a RuntimeError
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict:
    """torch.load of tensors and plain values only (weights_only), on the CPU.

    Raises UserError naming the file if it is missing, unreadable, damaged, or holds other objects.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # damaged bytes make torch, zipfile and pickle raise nearly anything
        message = f"{path} is damaged or not a checkpoint of train.py ({str(error)[:80]})"
        raise UserError(message) from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} is not a checkpoint of train.py: it holds a {kind}")
    return content


# The command line


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show a flag's default, unless it is empty or the help gives it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        empty = action.default is None or action.default is False or action.default == ""
        given = empty or "default" in action.help
        return action.help if given else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help, a usage line of one line, and no abbreviated flags."""

    def __init__(self, **options: object):
        super().__init__(formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        usage = f"usage: {self.prog} [flags]; --help lists them"
        self.exit(2, f"{usage}\n{self.prog}: error: {message}\n")


def number(kind: type, low: float = -math.inf, above: float = -math.inf) -> Callable[[str], float]:
    """An argparse type: a finite int or float that is at least `low` and greater than `above`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value < math.inf or value <= above:  # NaN fails
            wanted = f"above {above:g}" if above > -math.inf else f"at least {low:g}"
            wanted = f"finite and {wanted}" if kind is float else wanted
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {wanted}")
        return value

    parse.__name__ = kind.__name__  # argparse names it if kind(text) fails
    return parse


def run_main(main: Callable[[], int | None]) -> int:
    """Run a script's main and return its exit code.

    UserError and a full GPU: one line on stderr, and 2. Ctrl-C: 130. A closed pipe (`| head`): 0.
    Other errors propagate with their traceback.
    """
    script = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # ? for ± on an ASCII terminal; in a log file each line appears at once, and in order
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python flushes both when it exits
            os.dup2(nowhere, stream.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130  # the shells' convention: 128 + SIGINT
    except torch.OutOfMemoryError:
        full = "the GPU's memory is full. nvidia-smi shows what else uses it"
        print(f"{script}: {full}", file=sys.stderr)
    except UserError as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


# Provenance


def provenance(device: torch.device) -> dict[str, object]:
    """What a result depends on besides its flags: "device", "versions" of packages, "commit"."""
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain string: weights_only refuses torch's own type
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "cuda": torch.version.cuda or "none",
    }
    return {"device": describe(device), "versions": versions, "commit": commit()}


def describe(device: torch.device) -> str:
    """The card's name, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of this repository, `+changes` after it if tracked files differ, or `unknown`."""
    here = Path(__file__).resolve().parent
    words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    only_here = os.environ | {"GIT_CEILING_DIRECTORIES": str(here.parent)}  # no repository above
    try:
        return subprocess.check_output(
            words, cwd=here, env=only_here, stderr=subprocess.DEVNULL, text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
