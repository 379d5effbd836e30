"""What all scripts need: torchvision, device, precision, optimiser, seeds, whole files, one-line errors, provenance."""

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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import IO, NoReturn

import numpy
import scipy
import torch


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not fit the installed torch.

    PyPI's torchvision is built for CUDA torch; beside a CPU build its import fails because the operators `nms` and
    `qnms` were never declared. Only then are the two declared (nothing here calls them): beside a matching torchvision
    a second declaration would abort the process.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision._operator_declarations = library  # a Library withdraws its operators when it is collected
    return torchvision


# Device, precision, optimiser, seeds


def pick_device(name: str = "auto") -> torch.device:
    """The device for `--device`: `auto` (this process' GPU, else the CPU), `cpu`, `cuda` or `cuda:<index>`.

    Raises ValueError for an unknown name, and for a GPU that is not there or that this torch has no kernels for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:<index>")
    index = int(name[5:] or os.environ.get("LOCAL_RANK", 0))
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; try --device cpu")
    device = torch.device("cuda", index)
    try:
        torch.cuda.set_device(device)
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        raise ValueError(f"--device {name}: torch {torch.__version__} does not run on this GPU ({str(error)[:120]});"
                         " the README names a build for V100s") from None  # fmt: skip
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # `--amp off` means float32
    return device


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for `--amp auto | bf16 | fp16 | off`; None is float32 throughout.

    `auto`: bf16 on GPUs that compute in it (compute capability 8 and up), fp16 on older ones, None on a CPU.
    """
    if amp == "auto":
        if device.type == "cpu":
            return None
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def amp_name(dtype: torch.dtype | None) -> str:
    """The name that --amp has for a dtype: bf16, fp16 or off."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[dtype]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Mixed precision for the network.

    Without autocast's cache: before torch 2.11 a weight first cast under no_grad, as TRADES does, lost its gradient.
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def optimiser(f: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.SGD:
    """SGD as in Sec. 4. On a GPU in one fused kernel, which skips a step that overflowed without asking the host."""
    fused = next(f.parameters()).is_cuda
    sgd = torch.optim.SGD(f.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=fused)
    if fused:  # it leaves momentum uninitialised where the first step is skipped
        for p in f.parameters():
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def seed(*key: object) -> None:
    """Seed torch's global generators from a hash of `key`, e.g. (seed, epoch, rank)."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


# Files


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes `path`'s place only when the block ends without an error.

    Raises OSError naming the file when it cannot be written (a full disk); `path` is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # root would replace /dev/null
            raise OSError("it is no regular file")
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}; what was there before is kept") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> dict:
    """Read a JSON object. Raises FileNotFoundError, or ValueError naming the file where it is damaged."""
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it or write it anew") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; delete it or write it anew")
    return content


def save_checkpoint(path: str | Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()  # torch.save straight to a disk that fills raises a RuntimeError
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict:
    """torch.load of tensors and plain values alone (weights_only), on the CPU.

    Raises FileNotFoundError, or ValueError naming the file when it is damaged, holds other objects, or no dict.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}; train first, or name another file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can make torch, zipfile and pickle raise nearly anything
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise ValueError(f"{path} holds more than tensors, which is not read for safety; where it was made, save"
                             " the state dict alone: torch.save(model.state_dict(), file)") from None  # fmt: skip
        raise ValueError(f"{path} is damaged, or no checkpoint of torch's; delete it or name another") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors; name another file")
    return content


# The command line


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults, where there are any and the text does not give them itself."""

    def _get_help_string(self, action: argparse.Action) -> str:
        given = action.default is None or action.default is False or "default" in action.help
        return action.help if given else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with its errors as ValueError of one line, and the defaults in the help."""

    def __init__(self, **options: object):
        super().__init__(formatter_class=Help, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help shows the flags")


def number(kind: type, low: float = -math.inf, above: float = -math.inf) -> Callable:
    """An argparse type: a finite int or float, at least `low` and greater than `above`."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not low <= value < math.inf or value <= above:  # NaN fails
            wanted = f"above {above:g}" if above > -math.inf else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {wanted}")
        return value

    parse.__name__ = kind.__name__  # which argparse names where kind(text) raises
    return parse


def run_main(main: Callable[[], int | None]) -> int:
    """Run a script's main; the user's mistakes (ValueError, OSError) become one line on stderr and exit code 2.

    `python -X dev` shows where they were raised."""
    script = Path(sys.argv[0]).name
    try:
        return main() or 0
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        return 130  # as shells have it: 128 + SIGINT
    except torch.OutOfMemoryError:
        print(f"{script}: the GPU's memory is full; --recompute or a smaller --batch-size needs less", file=sys.stderr)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


# Provenance


def provenance(device: torch.device) -> dict[str, object]:
    """What a result depends on besides its flags: "device" in words, "versions" of packages, "commit" of this code."""
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain string: weights_only refuses torch's own type
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "cuda": torch.version.cuda or "none",
    }
    return {"device": describe(device), "versions": versions, "commit": commit()}


def describe(device: torch.device) -> str:
    """The card's name, or the processor's and its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The commit of this code, `+changes` after it when tracked files differ; `unknown` outside a git checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
