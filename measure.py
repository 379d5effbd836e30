"""Measuring for benchmark.py: repeats in turn, ratios, profiles, operations counted, memory estimated."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import device as hardware
from models import build_model

GRAY = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # a mean and deviation to normalise with; speed does not depend on them


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    functions: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each function, called in turn for three rounds, and for more until `seconds` have passed.

    A first round warms up (and compiles), and is not counted.
    """
    began, taken = time.monotonic(), {name: [] for name in functions}
    for function in functions.values():
        function()
    while min(map(len, taken.values())) < 3 or time.monotonic() - began < seconds:
        for name, function in functions.items():
            taken[name].append(seconds_of(function, device))
    return taken


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done what `function` gives it."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def ratio(slow: list[float] | None, fast: list[float] | None) -> float | None:
    """How many times as fast `fast` was, the median over rounds; None where one was not run."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True)) if slow and fast else None


def rate(count: float, taken: list[float] | None) -> float | None:
    """`count` a second, by the median; None where it was not run."""
    return count / statistics.median(taken) if taken else None


def times(count: int, function: Callable[[], object]) -> Callable[[], object]:
    """`function` called `count` times, so that the device is kept busy."""
    return lambda: [function() for _ in range(count)]


def on_one_core(function: Callable[[], object]) -> Callable[[], object]:
    """`function` on one thread of the CPU."""

    def call() -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(before)

    return call


def profile(function: Callable[[], object], device: torch.device) -> str:
    """What `function` spends its time on: "gather 31%, copy_ 20%, ..." of the device's time."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as profiler:
        function()
        wait(device)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = sorted(((getattr(e, key), e.key) for e in profiler.key_averages()), reverse=True)
    total = sum(t for t, _ in spent) or 1
    return ", ".join(f"{name.removeprefix('aten::')[:40]} {100 * t / total:.0f}%" for t, name in spent[:5])


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of large matrix products, the best of some: what the device can do."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.rand(size, size, device=device).to(dtype)
    return 2 * size**3 / min(interleaved({"product": lambda: a @ a}, device, 3)["product"])


class FlopCounter(TorchDispatchMode):
    """Adds up torch.utils.flop_counter's formulas. Its FlopCounterMode also tells modules apart, which fails in PGD:
    autograd.grad with respect to a module's input."""

    flops = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products that `function` runs."""
    with FlopCounter() as counter:
        function()
    return counter.flops


def forward_flops(arch: str) -> int:
    """Floating-point operations of one image forward, counted without computing them."""
    with torch.device("meta"):
        model, x = build_model(arch, 10, *GRAY).eval(), torch.empty(1, 3, 32, 32)
        return count_flops(lambda: model(x))


def saved_bytes(model: torch.nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass in half precision keeps for the backward pass."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), hardware.autocast(x.device, torch.bfloat16):
        loss = F.cross_entropy(model(x).float(), torch.zeros(len(x), dtype=torch.long))
    del loss
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def memory_estimate(arch: str) -> tuple[float, float]:
    """(bytes per image, bytes whatever the batch) of a training step in half precision on a GPU: an estimate.

    What the forward pass keeps, from two small batches on the CPU, and 10% for gradients on the way; parameters,
    gradients and momentum, and half a GiB for CUDA and cuDNN.
    """
    model = build_model(arch, 10, *GRAY).to(memory_format=torch.channels_last)
    x = torch.rand(4, 3, 32, 32)
    two, four = saved_bytes(model, x[:2]), saved_bytes(model, x)
    state = 3 * 4 * sum(p.numel() for p in model.parameters())
    return 1.1 * (four - two) / 2, max(0.0, 2 * two - four) + state + 2**29
