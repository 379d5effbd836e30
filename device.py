"""What the machine offers: torchvision, the device, mixed precision, compilation, torch.distributed.

Everything that depends on the hardware is asked for here, so that the other files hold the paper's
arithmetic alone. Keeps to the API of torch 2.7, which has builds for V100s.
"""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators do not fit the installed torch.

    PyPI's torchvision is built for CUDA torch; beside a CPU build its import fails because the operators
    `nms` and `qnms` were never declared. Only then are the two names declared (nothing here calls them):
    beside a matching torchvision a second declaration would abort the process.
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


def pick_device(name: str = "auto") -> torch.device:
    """The torch device for `--device`: `auto` (this rank's GPU, else the CPU), `cpu`, `cuda`, `cuda:1`.

    Raises ValueError for an unknown name, a GPU that is not there or one that this torch has no kernels for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:<index>") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:<index>")
    if device.type == "cuda":
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ValueError(f"--device {name}: torch sees {count} CUDA devices here; try --device cpu")
        if device.index is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"--device {name}: torchrun gives each process its own GPU; use --device cuda")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        try:
            torch.ones(1, device=device).add(1).item()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(
                f"--device {name}: torch {torch.__version__} does not run on this GPU ({reason}); the README names a"
                " build for V100s and older cards"
            ) from None
    return device


def set_fast_math(device: torch.device) -> None:
    """TF32 where float32 remains, and cudnn's search for the fastest convolution (CUDA only)."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for `--amp auto | bf16 | fp16 | off`; None means float32 throughout.

    `auto`: bf16 on cards with bf16 arithmetic (compute capability 8 and up), fp16 on older ones (V100), none on a CPU.
    Raises ValueError for fp16 on a CPU, where torch has no gradient scaler, and for an unknown name.
    """
    if amp == "auto":
        if device.type == "cpu":
            return None
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if amp not in ("bf16", "fp16", "off"):
        raise ValueError(f"--amp {amp}: use auto, bf16, fp16 or off")
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("--amp fp16 needs a GPU; use bf16 or off on a CPU")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def amp_name(dtype: torch.dtype | None) -> str:
    """What `--amp auto` came to, for results: bf16, fp16 or off."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "off"}[dtype]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Mixed precision for the network alone; softmax and losses are computed in float32 by the callers.

    Without autocast's cache: before torch 2.11 a weight first cast under no_grad, as TRADES does, lost its gradient.
    """
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile does not work here (no Triton, no C compiler, no Python headers), or None: it is tried."""
    try:
        torch.compile(lambda x: x * x + 1)(torch.ones(2, device=device))
    except Exception as error:  # every part of the compiler has its own
        return " ".join(str(error).split())[:160]
    return None


def compile_if(wanted: bool, function: Callable, **options: object) -> Callable:
    """`torch.compile(function, **options)` if wanted, else the function itself."""
    return torch.compile(function, **options) if wanted else function


def init_distributed(device_name: str) -> tuple[int, int]:
    """(rank, world size). Starts torch.distributed when torchrun started this process: nccl for GPUs, gloo for CPUs."""
    if "RANK" not in os.environ:
        return 0, 1
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    # the others wait while the first one downloads
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size()


def describe(device: torch.device) -> str:
    """The device in words, for results: the card's name, or the processor and its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"
