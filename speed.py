"""What benchmark.py times: augmentation, corruptions, evaluation, training, and how its cost grows.

Each function returns rows of one table, dictionaries from column to value; None stands for what was not run.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import corruptions
import device as hardware
import runs
import train
import usual
from augment import apply_preprocessing, augmix, gaussian_noise, mixed_augmentation, preprocess
from draws import Draws
from evaluate import predict
from losses import METHODS, forward
from measure import (
    GRAY,
    count_flops,
    interleaved,
    matrix_product_rate,
    on_one_core,
    profile,
    rate,
    ratio,
    seconds_of,
    times,
)
from models import build_model

# The runs whose costs differ, by the names that run_all.sh gives them: their flags of train.py, and passes per image.
VARIANTS = {
    "standard": ("--method standard", 1),
    "magnma": ("--method magnma", 11),
    "augmix": ("--method augmix", 3),
    "magnma_noise": ("--method magnma --lambda2 0", 6),
    "magnma_mix": ("--method magnma --lambda1 0 --lambda2 5", 6),
    "at": ("--method at", 8),
    "trades": ("--method trades", 10),
    "rse": ("--method rse", 1),
    "gn": ("--method gn", 1),
}
ESSENTIAL = ("standard", "magnma", "augmix")
TARGET_PASSES = {"standard": 40_000, "magnma": 60_000}  # a second on an H100
TARGET_AUGMENTATION = 5  # percent of a step on a GPU, at most
TEST_IMAGES = 10_000
CPU = torch.device("cpu")


# Augmentation, corruptions and evaluation, against one image at a time


def augmented(kind: str, images: Tensor, n: int) -> Tensor:
    """What a step makes of a batch: preprocessing; with n noisy and n mixed copies; with two of AugMix."""
    draws = Draws.seeded(0, images.device)
    x = preprocess(images, True, draws).float() / 255
    if kind == "augmix":
        return torch.cat([x, augmix(x.repeat(2, 1, 1, 1), draws)])
    if kind == "magnma":
        copies = x.repeat(n, 1, 1, 1)
        return torch.cat([x, gaussian_noise(copies, 0.2, draws), mixed_augmentation(copies, 1.0, draws)])
    return x


def augmentation(images: Tensor, device: torch.device, short: bool, seconds: float) -> list[dict]:
    """Images a second of preprocessing, MAGNMA n = 5 and AugMix's triple, ours and the usual pipeline's."""
    cores, n, rows = os.cpu_count() or 1, 5, []
    batch, epoch = images[:128], images.repeat(-(-256 * cores // len(images)), 1, 1, 1)[: 256 * cores]
    pictures, on_device = [image.permute(1, 2, 0).numpy() for image in epoch], batch.to(device)
    for kind, name, target in (
        ("preprocessing", "preprocessing", None),
        ("magnma", f"and MAGNMA n = {n}", 5),
        ("augmix", "and AugMix's triple", 10),
    ):
        count = {"usual": 32, "ours": 128}
        functions = {
            "usual": on_one_core(partial(usual.batch, pictures[:32], kind, usual.preprocessing(True), n)),
            "ours": on_one_core(partial(augmented, kind, batch, n)),
        }
        if device.type == "cuda" or not short:
            count |= {"usual, all cores": len(epoch), "ours, all cores": len(epoch)}
            functions["usual, all cores"] = partial(list, usual.loader(pictures, kind, True, n, cores))
            functions["ours, all cores"] = lambda kind=kind: [augmented(kind, x, n) for x in epoch.split(128)]
        if device.type == "cuda":
            count["GPU"], functions["GPU"] = 1280, times(10, partial(augmented, kind, on_device, n))
        taken = interleaved(functions, device, seconds / 3)
        each = {key: [t / count[key] for t in ts] for key, ts in taken.items()}
        row = {
            "augmentation, images/s": name,
            "usual, 1 process": rate(1, each["usual"]),
            "ours, 1 core": rate(1, each["ours"]),
            "ratio": ratio(each["usual"], each["ours"]),
            "target": "" if target is None else target,
            f"usual, {cores} workers": rate(1, each.get("usual, all cores")),
            f"ours, {cores} cores": rate(1, each.get("ours, all cores")),
            "ratio, all cores": ratio(each.get("usual, all cores"), each.get("ours, all cores")),
            "ours, GPU": rate(1, each.get("GPU")),
            "ratio, GPU": ratio(each.get("usual, all cores"), each.get("GPU")),
        }
        if target and row["ratio"] < target:
            row["time goes to"] = profile(functions["ours"], CPU)
        rows.append(row)
    return rows


def corruption(images: Tensor, short: bool, seconds: float) -> list[dict]:
    """Images a second of corruptions at severity 3, ours and usual.py's loop over images, both on one core."""
    x, rows = images[:250].permute(0, 2, 3, 1).contiguous().numpy(), []
    names = list(usual.CORRUPTIONS)[: 2 if short else None]
    for name in names:
        functions = {"usual": partial(usual.corrupt, x[:25], name), "ours": partial(corruptions.corrupt, x, name, 3, 0)}
        taken = interleaved(functions, CPU, seconds / len(names))
        row = {"corruption, images/s": name, "loop over images": rate(25, taken["usual"])}
        row |= {"ours": rate(len(x), taken["ours"])}
        rows.append(row | {"ratio": len(x) / 25 * ratio(taken["usual"], taken["ours"])})
    return rows


def evaluation(images: Tensor, device: torch.device, dtype: torch.dtype | None, seconds: float) -> list[dict]:
    """Images a second of evaluate.predict on ResNet-18, and of the usual loop over a DataLoader's batches."""
    model = network("resnet18", device).eval()
    count = TEST_IMAGES if device.type == "cuda" else 64
    x = images.repeat(-(-count // len(images)), 1, 1, 1)[:count]
    pictures = [image.permute(1, 2, 0).numpy() for image in x]
    loader = usual.loader(pictures, "clean", True, 0, os.cpu_count() or 1)

    @torch.no_grad()
    def loop() -> list[Tensor]:
        with hardware.autocast(device, dtype):
            return [F.softmax(model(batch[:, 0].to(device)).float(), dim=1).cpu() for batch in loader]

    taken = interleaved({"usual": loop, "ours": partial(predict, model, x, dtype=dtype)}, device, seconds)
    rates = {"usual": rate(count, taken["usual"]), "ours": rate(count, taken["ours"])}
    return [{"evaluation, images/s": "resnet18", **rates, "ratio": ratio(taken["usual"], taken["ours"])}]


# Training


def network(arch: str, device: torch.device) -> nn.Module:
    """A fresh network, laid out as train.py does."""
    return build_model(arch, 10, *GRAY).to(device, memory_format=torch.channels_last)


def config_of(variant: str, **changes: object) -> dict:
    """The configuration of train.py for one of VARIANTS."""
    return vars(train.parse_args(VARIANTS[variant][0].split())) | changes


def stepper(
    arch: str, config: dict, passes: int, X: Tensor, Y: Tensor, dtype: torch.dtype | None = None,
    compiled: bool = False, rank: int = 0, world: int = 1,
) -> tuple[Callable[[], None], Callable[[], None]]:  # fmt: skip
    """(a step of training on the batch X, Y as train.py makes it, the same without data and augmentation).

    The second sends as many images forward and backward; for AT and TRADES it is their loss on unprocessed images.
    """
    device, method = X.device, config["method"]
    f_theta = network(arch, device)
    run = train.parallel(f_theta, config, device, compiled, world)
    apply = hardware.compile_if(compiled and device.type == "cuda", apply_preprocessing, dynamic=False)
    theta, scaler = train.optimiser(f_theta, config, device, dtype)
    theta.param_groups[0]["lr"] = 1e-3
    x = X.float() / 255

    def step() -> None:
        train.train_step(run, X, Y, config, hflip=True, seed=0, rank=rank, world=world, dtype=dtype, scaler=scaler,
                         apply=apply)  # fmt: skip
        train.update(theta, scaler)

    def network_only() -> None:
        with hardware.autocast(device, dtype):
            if method in ("at", "trades"):
                loss, _ = METHODS[method](run, x, Y, config, Draws.seeded(0, device))
            else:
                loss = F.cross_entropy(forward(run, *[x] * passes)[0].repeat(passes, 1), Y.repeat(passes))
        (loss if scaler is None else scaler.scale(loss)).backward()
        train.update(theta, scaler)

    return step, network_only


def training(
    images: Tensor, labels: Tensor, device: torch.device, dtype: torch.dtype | None, compiled: bool, short: bool,
    seconds: float,
) -> tuple[list[dict], dict[str, float]]:  # fmt: skip
    """Each variant on ResNet-18 as train.py runs it, the last ones if time is left; and rates of matrix products."""
    gpu, rows, end = device.type == "cuda", [], time.monotonic() + seconds
    products = {t: matrix_product_rate(device, t) for t in (dtype or torch.bfloat16, torch.float32)}
    product = products[dtype or torch.float32]
    variants = ESSENTIAL if short else tuple(VARIANTS)
    for k, variant in enumerate(variants):
        if time.monotonic() > end and variant not in ESSENTIAL:
            break
        torch.compiler.reset()  # all networks count towards one limit of recompilations, after which they run eager
        config, passes = config_of(variant), VARIANTS[variant][1]
        size, repeats = (128, 10) if gpu else (max(2, 16 // passes), 1)
        X, Y = images[:size].to(device), labels[:size].to(device)
        eager, alone = stepper("resnet18", config, passes, X, Y, dtype)
        functions = {"eager": eager, "network": alone}
        if compiled:
            functions["compiled"], functions["network"] = stepper("resnet18", config, passes, X, Y, dtype, True)
        share = (end - time.monotonic()) / (len(variants) - k)
        taken = interleaved({name: times(repeats, f) for name, f in functions.items()}, device, share)
        step = "compiled" if compiled else "eager"
        speed = rate(size * repeats, taken[step])
        one, _ = stepper("resnet18", config, passes, images[:2], labels[:2])
        row = {
            "training resnet18": variant,
            "passes/image": passes,
            "CPU images/s": None if gpu else speed,
            "CPU passes/s": None if gpu else passes * speed,
            "GPU images/s": speed if gpu else None,
            "GPU passes/s": passes * speed if gpu else None,
            "target, H100": TARGET_PASSES.get(variant, ""),
            "eager": rate(passes * size * repeats, taken["eager"]) if gpu else None,
            "compiled/eager": ratio(taken["eager"], taken.get("compiled")),
            "% of matrix product": 100 * speed * count_flops(one) / 2 / product,
            "% augmentation": 100 * max(0.0, 1 - 1 / ratio(taken[step], taken["network"])),
            "target, GPU": f"<{TARGET_AUGMENTATION}",
        }
        slow = gpu and passes * speed < TARGET_PASSES.get(variant, 0)
        if gpu and (slow or row["% augmentation"] > TARGET_AUGMENTATION):
            row["time goes to"] = profile(functions[step], device)
        rows.append(row)
    return rows, {f"{str(t).removeprefix('torch.')} TFLOP/s": value / 1e12 for t, value in products.items()}


def growth(
    images: Tensor, labels: Tensor, device: torch.device, dtype: torch.dtype | None, seconds: float, end: float
) -> dict[str, list[dict]]:
    """Steps with n = 1 to 8 and batches of 64 to 1024 (eager), against n = 1 and 128; and on one and two processes.

    No part begins after `end`, in time.monotonic()'s seconds.
    """
    gpu = device.type == "cuda"
    arch, size = ("resnet18", 128) if gpu else ("resnet20", 8)

    def steps(sizes: dict[int, tuple[dict, int, int]]) -> dict[int, list[float] | None]:
        if time.monotonic() > end:
            return dict.fromkeys(sizes)
        functions = {}
        for key, (config, passes, count) in sizes.items():
            X, Y = images[:count].to(device), labels[:count].to(device)
            functions[key], _ = stepper(arch, config, passes, X, Y, dtype)
        return interleaved(functions, device, seconds / 3)

    taken = steps({n: (config_of("magnma", n=n), 1 + 2 * n, size) for n in range(1, 9)})
    by_n = [{f"MAGNMA {arch}, n": n, "passes/image": 1 + 2 * n, "images/s": rate(size, ts),
             "time, n = 1 is 1": ratio(ts, taken[1])} for n, ts in taken.items()]  # fmt: skip
    worlds = {"1": None, "2": None}
    if time.monotonic() < end and (not gpu or torch.cuda.device_count() > 1):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(one_of_two, (folder, gpu, arch), nprocs=2)
            worlds = runs.read_json(Path(folder) / "seconds.json")
    by_world = [{f"MAGNMA {arch}, n = 1, processes": int(world), "images/s": rate(64, ts),
                 "speed, 1 is 1": ratio(worlds["1"], ts)} for world, ts in worlds.items()]  # fmt: skip
    taken = steps({b: (config_of("standard"), 1, b) for b in (64, 128, 256, 512, 1024)})
    by_batch = [{f"Standard {arch}, batch": b, "images/s": rate(b, ts),
                 "time, 128 is 1": ratio(ts, taken[128])} for b, ts in taken.items()]  # fmt: skip
    return {"growth with n": by_n, "growth with the batch": by_batch, "growth with processes": by_world}


def one_of_two(rank: int, folder: str, gpu: bool, arch: str) -> None:
    """A process of the two that time steps of 64 images: the first alone with all cores or one GPU, then both."""
    device, cores = torch.device("cuda", rank) if gpu else CPU, os.cpu_count() or 1
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    X = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator).to(device)
    Y, config = torch.arange(64, device=device) % 10, config_of("magnma", n=1)
    alone, _ = stepper(arch, config, 3, X, Y)
    together, _ = stepper(arch, config, 3, X, Y, rank=rank, world=2)
    taken = {"1": [], "2": []}
    for _ in range(6):
        dist.barrier()
        if rank == 0:
            torch.set_num_threads(cores)
            taken["1"].append(seconds_of(alone, device))
        dist.barrier()
        torch.set_num_threads(max(1, cores // 2))
        taken["2"].append(seconds_of(together, device))
    if rank == 0:
        runs.write_json(Path(folder) / "seconds.json", {world: ts[1:] for world, ts in taken.items()})
    dist.barrier()
    dist.destroy_process_group()


def large_networks(
    images: Tensor, labels: Tensor, device: torch.device, dtype: torch.dtype | None, needed: dict[str, dict], end: float
) -> list[dict]:
    """Images a second of the other networks, eager; none begins after `end`. needed: benchmark.memory's rows."""
    rows, gpu = [], device.type == "cuda"
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30 if gpu else float("inf")
    for arch, method in itertools.product(("densenet121", "inceptionv3"), ESSENTIAL):
        if time.monotonic() > end:
            break
        k = 1 if needed[arch]["GiB, MAGNMA n = 5, 128 images"] < 0.9 * gib else needed[arch]["--accumulate for 16 GB"]
        config, passes, size = config_of(method, accumulate=k), VARIANTS[method][1], 128 if gpu else 2
        if gpu:
            torch.cuda.reset_peak_memory_stats(device)
        step, _ = stepper(arch, config, passes, images[:size].to(device), labels[:size].to(device), dtype)
        speed = rate(size, interleaved({"step": step}, device, 1)["step"])
        rows.append({
            "training, eager": arch, "method": method, "--accumulate": k, "images/s": speed, "passes/s": passes * speed,
            "GPU GiB": torch.cuda.max_memory_allocated(device) / 2**30 if gpu else None,
        })  # fmt: skip
    return rows
