"""What this program costs on this machine: one JSON and one table, each number beside another of the same run.

    python benchmark.py                      # under 9 minutes; results/benchmark-cpu.json or benchmark-cuda.json
    python benchmark.py --short              # the essential part, in 3 minutes
    python benchmark.py --data data          # CIFAR-10's images where they are there; the rates are the same without

What is compared is timed in turns, round after round, so that whatever else the machine does falls on all of it;
reported are medians over rounds, and of ratios the median of the rounds' ratios. What was not measured reads "not run".

Training is train.train_step itself. "Passes" are images that the network sends forward: every copy, every step of an
attack. `hours` in the JSON, of a run of 150 epochs with its tests and its evaluation, are what `run_all.sh list` adds.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

import device as hardware
import runs
import speed
from data import load_dataset
from measure import forward_flops, memory_estimate
from speed import ESSENTIAL, TEST_IMAGES, VARIANTS

ARCHS = ("resnet18", "densenet121", "inceptionv3")
# How many runs a table has of each kind for one seed: {(dataset, arch, variant): runs}
TABLES = {
    "tables 1 and 2": {(d, a, v): 1 for d in ("cifar10", "cifar100") for a in ARCHS for v in ESSENTIAL},
    "table 3": {("cifar10", "resnet18", v): 1 for v in VARIANTS},
    "table 4": {("cifar100", "resnet18", v): 1 for v in VARIANTS},
    "table 5": {("cifar10", "resnet18", v): k for v, k in (("magnma_noise", 7), ("magnma_mix", 5), ("magnma", 9))},
}
SEEDS, EPOCHS, TRAIN_IMAGES, TEST_SETS = 3, 150, 50_000, 91  # 18 corruptions x 5 severities, and clean
V100_BYTES = 15 * 2**30  # of its 16 GB, what a process can have


# Memory, hours


def memory() -> list[dict]:
    """Estimated peak memory of a step of MAGNMA n = 5 with 128 images, and the --accumulate that 16 GB need."""
    rows, passes = [], VARIANTS["magnma"][1]
    for arch in ARCHS:
        per_pass, fixed = memory_estimate(arch)
        peak = {k: fixed + per_pass * passes * -(-128 // k) for k in (1, 2, 4, 8, 16, 32)}
        fits = next((k for k, size in peak.items() if size <= V100_BYTES), 32)
        rows.append({
            "memory, estimated": arch, "MiB/pass": per_pass / 2**20, "GiB, MAGNMA n = 5, 128 images": peak[1] / 2**30,
            "--accumulate for 16 GB": fits, "GiB with it": peak[fits] / 2**30,
        })  # fmt: skip
    return rows


def estimated_hours(timed: dict[tuple[str, str], float], predictions: float) -> dict[str, float]:
    """{"dataset/arch/variant": hours of a run} from images a second of training, {(arch, variant): rate}.

    With a test after each epoch and the evaluation of two checkpoints, at `predictions` images a second on ResNet-18.
    What was not timed follows from MAGNMA on ResNet-18 by the numbers of passes and of a pass' operations.
    """
    size = {arch: forward_flops(arch) / forward_flops("resnet18") for arch in ARCHS}
    passes = {variant: count for variant, (_, count) in VARIANTS.items()}
    hours = {}
    for dataset, arch, variant in sorted({key for table in TABLES.values() for key in table}):
        follows = timed["resnet18", "magnma"] * passes["magnma"] / passes[variant] / size[arch]
        tests = (EPOCHS + 2 * TEST_SETS) * TEST_IMAGES * (10 if variant == "rse" else 1)
        seconds = EPOCHS * TRAIN_IMAGES / timed.get((arch, variant), follows) + tests * size[arch] / predictions
        hours[f"{dataset}/{arch}/{variant}"] = round(seconds / 3600, 3)
    return hours


def hours_of_tables(hours: dict[str, float]) -> dict[str, float]:
    """Hours of each table's runs, all seeds, and of all runs, where those that tables share count once."""
    sums = {name: {f"{d}/{a}/{v}": k for (d, a, v), k in table.items()} for name, table in TABLES.items()}
    sums["all 144 runs"] = {key: max(table.get(key, 0) for table in sums.values()) for key in hours}
    return {name: round(SEEDS * sum(k * hours[key] for key, k in table.items()), 2) for name, table in sums.items()}


# The report


def shown(value: object) -> str:
    """A cell: "not run" for None, three digits or more for numbers."""
    if value is None:
        return "not run"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def as_table(rows: list[dict]) -> str:
    """Rows as aligned columns, their keys on top; under them where the time goes, where a target was missed."""
    keys = [key for key in rows[0] if key != "time goes to"]
    cells = [[key.strip() for key in keys]] + [[shown(row.get(key)) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
             for line in cells]  # fmt: skip
    lines += [f"  {row[keys[0]]}: time goes to {row['time goes to']}" for row in rows if "time goes to" in row]
    return "\n".join(lines)


def to_four_digits(content: object) -> object:
    """`content` with its floats rounded to four digits, for the JSON."""
    if isinstance(content, dict):
        return {key.strip(): to_four_digits(value) for key, value in content.items()}
    if isinstance(content, list):
        return [to_four_digits(value) for value in content]
    return float(f"{content:.4g}") if isinstance(content, float) else content


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises ValueError naming the flag."""
    parser = runs.Parser(description="Speed of augmentation, training, corruptions and evaluation, as ratios.")
    parser.add_argument("--short", action="store_true", help="the essential part, in 3 minutes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    parser.add_argument("--data", default="data", help="folder of the data sets; without CIFAR-10 there, random images")
    parser.add_argument("--out", help="file for the results; by default results/benchmark-<cpu or cuda>.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    began, load, short = time.monotonic(), os.getloadavg()[0], args.short
    device = hardware.pick_device(args.device)
    hardware.set_fast_math(device)
    dtype = hardware.amp_dtype("auto", device)
    reason = "on GPUs only" if device.type == "cpu" else hardware.compiler_missing(device)
    images, labels = torch.randint(0, 256, (1024, 3, 32, 32), dtype=torch.uint8), torch.arange(1024) % 10
    if real := (Path(args.data) / "cifar-10-batches-py").is_dir():
        images = load_dataset("cifar10", args.data).train_images[:1024]
    seconds = 140 if short else 420  # of timing; preparing comes on top
    end = began + (150 if short else 480)

    tables = {"augmentation": speed.augmentation(images, device, short, 0.2 * seconds)}
    tables["training"], products = speed.training(images, labels, device, dtype, reason is None, short, 0.45 * seconds)
    tables["corruption"] = speed.corruption(images, short, 0.04 * seconds)
    tables["evaluation"] = speed.evaluation(images, device, dtype, 0.04 * seconds)
    timed = {("resnet18", r["training resnet18"]): r["CPU images/s"] or r["GPU images/s"] for r in tables["training"]}
    if not short:
        tables["memory"] = memory()
        needed = {row["memory, estimated"]: row for row in tables["memory"]}
        tables["large networks"] = speed.large_networks(images, labels, device, dtype, needed, end)
        tables |= speed.growth(images, labels, device, dtype, 0.2 * seconds, end)
        timed |= {(row["training, eager"], row["method"]): row["images/s"] for row in tables["large networks"]}
    hours = estimated_hours(timed, tables["evaluation"][0]["ours"])

    report = {
        "device": hardware.describe(device), "cores": os.cpu_count(), "load_average_before": load,
        "images": "CIFAR-10" if real else "random", "mixed precision": str(dtype).removeprefix("torch."),
        "compile": reason or "yes", "short": short, "versions": runs.versions(), "commit": runs.commit(),
        "wall_seconds": time.monotonic() - began, "matrix products": products, **tables,
        "timed": [f"{arch}/{variant}" for arch, variant in timed],
    }  # fmt: skip
    tables_hours = hours_of_tables(hours)
    out = Path(args.out or f"results/benchmark-{device.type}.json")
    runs.write_json(out, to_four_digits(report) | {"hours": hours, "hours_of_tables": tables_hours})
    print(f"{report['device']}, load {load:.1f} before, torch {torch.__version__}: {out}")
    print(", ".join(f"{name} {value:.3g}" for name, value in products.items()), "of matrix products\n")
    for rows in filter(None, tables.values()):
        print(as_table(rows) + "\n")
    print("hours on this device: " + ", ".join(f"{name} {value:,.1f}" for name, value in tables_hours.items()))
    return 0


if __name__ == "__main__":
    sys.exit(runs.run_main(main))
