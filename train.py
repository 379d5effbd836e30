"""Algorithm 1: train one network by one method.

    python train.py --method magnma --arch densenet121    # the paper's recipe on CIFAR-10
    python train.py --method magnma --lambda2 0 --tag noise    # only the noise regulariser
    python train.py --method magnma --resume              # continue an interrupted run
    python train.py --dataset path/to/mine.npz            # your own images (see data.py)
    python train.py --dataset digits --arch resnet20 --epochs 3 --batch-size 64 --device cpu
    torchrun --nproc-per-node 2 train.py --method augmix  # one run on two GPUs

Writes runs/<dataset>/<arch>/<method>[-<tag>]/seed<k>/: config.json; log.csv, one row per epoch;
best.pt, the tested epoch with the best clean test accuracy (the paper's selection); last.pt, from
which --resume continues.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from shlex import quote
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import utils
from augment import preprocess
from data import BUILT_IN, Dataset, data_sha256, dataset_name, load_dataset
from evaluate import predict
from losses import METHODS
from models import ARCHS, build_model, recompute
from utils import UserError, seed

LARGE = ("densenet121", "densenet121_k32", "inceptionv3")  # recomputed by default, to fit 16 GB
# MAGNMA's settings that identify a column of the tables: never departures from the paper
COLUMN = ("lambda1", "lambda2", "sigma_max", "beta")
SHARED = ("arch", "method", "epochs", "batch_size", "lr", "weight_decay", "eval_every", "subset",
          "joint")  # fmt: skip
LOG = ("epoch", "lr", "train_loss", "train_accuracy", "test_accuracy",
       "seconds", "images_per_second", "peak_memory_mib")  # fmt: skip


@dataclass
class Run:
    """What the functions below share."""

    args: argparse.Namespace
    dataset: Dataset
    device: torch.device
    dtype: torch.dtype | None  # of autocast
    rank: int  # this process of `world`
    world: int
    f: nn.Module
    sgd: torch.optim.SGD
    scaler: torch.amp.GradScaler
    config: dict  # config.json
    log: list[dict]  # log.csv, one entry per finished epoch
    saved: float = -math.inf  # when last.pt was written, time.monotonic()


# Algorithm 1


def train(run: Run) -> None:
    """Algorithm 1: train f_theta from epoch len(run.log) to T.

    Process `rank` of `world` takes its share of each batch. Unlike on one device, batch norm sees
    only this process's share, and random draws differ.
    """
    args, dataset, f, sgd, scaler = run.args, run.dataset, run.f, run.sgd, run.scaler
    T, B, method, hparams = args.epochs, args.batch_size, METHODS[args.method], vars(args)
    X = dataset.train_images[: args.subset].to(run.device)
    Y = dataset.train_labels[: args.subset].to(run.device)

    for t in range(len(run.log), T):  # for t = 0 to T-1 do
        start = time.monotonic()
        sgd.param_groups[0]["lr"] = eta_t = learning_rate(args.lr, t, T)
        seed(args.seed, t)  # the same in every process
        X_t = preprocess(X, dataset.hflip)  # Sec. 4
        order = torch.randperm(len(X))[: len(X) // B * B].to(run.device)
        seed(args.seed, t, run.rank)
        totals = torch.zeros(2, dtype=torch.float64, device=run.device)  # sums: loss, correct
        f.train()
        for batch in progress(run, order.split(B)):  # for each batch (x, y) ~ D do
            share = batch[run.rank :: run.world]
            x, y = X_t[share].float() / 255, Y[share]
            with utils.autocast(run.device, run.dtype):
                loss, logits = method(f, x, y, hparams)  # L_T, its mean over the batch
            scaler.scale(loss / run.world).backward()
            add_up_gradients(f, run.world)
            scaler.step(sgd)  # theta = theta - eta_t 1/|B| sum_i grad L_T(x_i, y_i)
            scaler.update()
            sgd.zero_grad()
            correct = (logits.detach().argmax(dim=1) == y).sum()
            totals += torch.stack([loss.detach() * len(share), correct])  # stays on the device
        finish_epoch(run, eta_t, totals, len(order), start)


def progress(run: Run, batches: tuple[Tensor, ...]) -> Iterable[Tensor]:
    """The batches of an epoch, with a progress bar if the first process has a terminal."""
    name = f"epoch {len(run.log) + 1}/{run.args.epochs}"
    return tqdm(batches, name, leave=False, unit="batch", disable=None if run.rank == 0 else True)


def learning_rate(lr: float, t: int, epochs: int) -> float:
    """eta_t: divided by 10 every ceil(epochs / 3) epochs (Sec. 4: every 50 of 150)."""
    return lr * 0.1 ** (t // math.ceil(epochs / 3))


def add_up_gradients(f: nn.Module, world: int) -> None:
    """Replace each gradient by its sum over the processes, in one all_reduce."""
    if world == 1:
        return
    gradients = [p.grad for p in f.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))


def finish_epoch(run: Run, eta_t: float, totals: Tensor, images: int, start: float) -> None:
    """Check the loss, test, log, save. Raises UserError if the loss is not finite."""
    if run.world > 1:
        dist.all_reduce(totals)
        for buffer in run.f.buffers():  # batch norm's, as the first process saves them
            dist.broadcast(buffer, 0)
    train_loss, train_accuracy = totals[0].item() / images, 100 * totals[1].item() / images
    seconds = time.monotonic() - start
    epoch, epochs = len(run.log) + 1, run.args.epochs
    if not math.isfinite(train_loss):
        raise UserError(
            f"the training loss of epoch {epoch} is {train_loss}. Start another run (--tag) with a"
            f" smaller --lr or --amp off; {run.args.out} keeps its last checkpoint"
        )
    tested = epoch in (1, epochs) or epoch % run.args.eval_every == 0
    test_accuracy = 100 * accuracy(run) if tested and run.rank == 0 else None
    gpu = run.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(run.device) / 2**20 if gpu else None
    row = epoch, eta_t, train_loss, train_accuracy, test_accuracy
    row = (*row, seconds, images / seconds, memory)
    run.log.append(dict(zip(LOG, row, strict=True)))
    if run.rank != 0:
        return
    if tested or time.monotonic() - run.saved > 60:  # on a GPU an epoch can be shorter than saving
        save(run)
    if tested or not sys.stderr.isatty():
        test = f"  test {test_accuracy:.2f}%" if tested else ""
        tqdm.write(
            f"epoch {epoch}/{epochs}  lr {eta_t:g}  loss {train_loss:.4f}"
            f"  train {train_accuracy:.2f}%{test}  {seconds:.1f} s"
        )


def accuracy(run: Run) -> float:
    """Clean test accuracy in [0, 1], which selects best.pt. RSE's ensemble is not applied here."""
    _, prediction = predict(run.f, run.dataset.test_images, dtype=run.dtype)
    return (prediction == run.dataset.test_labels).double().mean().item()


# A run's folder


def recipe_of(args: argparse.Namespace, dataset: Dataset, amp: str, processes: int) -> dict:
    """What a run is: everything that its numbers depend on, besides the seed."""
    flags, own = vars(args), [*METHODS[args.method].defaults]
    own += ["rse_samples"] if args.method == "rse" else []
    return {
        "dataset": dataset.name,
        **{name: flags[name] for name in SHARED},
        "amp": amp,
        **{name: flags[name] for name in own},
        "data_sha256": data_sha256(dataset),
        "train_images": args.subset or len(dataset.train_images),
        "classes": len(dataset.classes),
        "processes": processes,
    }


def departures_of(recipe: dict) -> dict:
    """The flags of a recipe that are unlike the paper's, with their values."""
    paper = vars(parse_args(["--method", recipe["method"]])) | {"amp": "off"}
    free = {"dataset", "arch", "method", *(COLUMN if recipe["method"] == "magnma" else ())}
    return {k: v for k, v in recipe.items() if k in paper.keys() - free and v != paper[k]}


def describe_differences(saved: dict, recipe: dict) -> str:
    """How a saved run's recipe differs from this one, e.g. `--lr 0.1, not 0.5`, or nothing."""
    words, names = [], {**saved, **recipe}
    if saved.get("method") != recipe["method"]:
        names = ["method"]  # the hyperparameters differ with it
    for name in names:
        if saved.get(name) == recipe.get(name):
            continue
        if name == "data_sha256":
            words.append("other images or labels under this name")
        else:
            counted = name in ("train_images", "classes", "processes")
            flag = name.replace("_", " ") if counted else "--" + name.replace("_", "-")
            words.append(f"{flag} {saved.get(name)}, not {recipe.get(name)}")
    return "; ".join(words)


def lock(folder: Path) -> IO | None:
    """Lock a run's folder while the returned file is open. UserError if another process has it.

    The kernel releases the lock however the process ends. Does nothing where files have no locks.
    """
    try:
        import fcntl

        file = open(folder / "lock", "w")  # noqa: SIM115 - open until the process ends
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise UserError(
            f"{folder} is in use by another train.py. Wait for it, or stop it"
        ) from None
    except (ImportError, OSError):
        return None


def open_run(run: Run) -> None:
    """Start the run in its folder, or restore it from last.pt. Refuses another run's folder."""
    folder, last = Path(run.args.out), Path(run.args.out, "last.pt")
    if last.exists():
        saved = utils.load_checkpoint(last)
        check_same_run(saved, last, run)
        restore(saved, last, run)
    elif (folder / "config.json").exists():
        check_same_run(utils.read_json(folder / "config.json"), folder / "config.json", run)
        if (folder / "log.csv").exists():  # written after last.pt, so there was one
            raise UserError(
                f"{folder} has lost its last.pt; --resume would start again and replace best.pt."
                " If you want that, delete log.csv and results.json"
            )
    if dist.is_initialized():
        dist.barrier()  # every process has read the folder before the first one writes
    if run.rank > 0:
        return
    for leftover in folder.glob(".*.tmp"):  # left by a process killed while saving
        leftover.unlink()
    if run.log:
        write_log(folder, run.log)
    done, epochs = len(run.log), run.args.epochs
    if done < epochs:  # so that `ran` names the machine that finishes the run
        utils.write_json(folder / "config.json", run.config)
    if run.args.resume:
        state = f"continues at epoch {done + 1} of {epochs}" if done else "starts"
        if done == epochs:
            state = "is finished"
        tqdm.write(f"{folder}: {state}")


def check_same_run(saved: dict, path: Path, run: Run) -> None:
    """Raise UserError unless `saved`, read from `path`, is this run, and --resume was given."""
    try:
        before, now = ({**c["recipe"], "seed": c["seed"]} for c in (saved, run.config))
    except (KeyError, TypeError):
        raise UserError(f"{path} was not written by this train.py. Use --tag or --out") from None
    differences = describe_differences(before, now)
    if differences:
        raise UserError(
            f"the run in {run.args.out} was started with {differences}. Use the same flags and"
            " --resume to continue it, or --tag or --out to start another"
        )
    if not run.args.resume:
        raise UserError(f"{run.args.out} already holds this run. Use --resume to continue it")


def restore(saved: dict, path: Path, run: Run) -> None:
    """Load the network, the optimiser, the scaler and the log from last.pt."""
    try:
        run.f.load_state_dict(saved["model"])
        run.sgd.load_state_dict(saved["optimizer"])
        run.scaler.load_state_dict(saved["scaler"])
        run.log += saved["log"]
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged, or from other code ({str(error)[:80]}). Use --tag or --out"
        ) from None
    run.sgd.param_groups[0]["fused"] = run.device.type == "cuda"  # saved on another device


def save(run: Run) -> None:
    """Write best.pt, if the last epoch is the best of those tested, then last.pt, then log.csv.

    If killed between these writes, --resume repeats the epochs since last.pt.
    """
    folder, content = Path(run.args.out), run.config | {"epoch": len(run.log)}
    content["model"] = run.f.state_dict()
    tested = [row for row in run.log if row["test_accuracy"] is not None]
    if max(tested, key=lambda row: row["test_accuracy"]) is run.log[-1]:
        utils.save_checkpoint(folder / "best.pt", content)
    states = {"optimizer": run.sgd.state_dict(), "scaler": run.scaler.state_dict(), "log": run.log}
    utils.save_checkpoint(folder / "last.pt", content | states)
    write_log(folder, run.log)
    run.saved = time.monotonic()


def write_log(folder: Path, log: list[dict]) -> None:
    """log.csv, one row per epoch; test_accuracy is empty for epochs that were not tested."""
    rows = [LOG, *(["" if v is None else f"{v:.8g}" for v in row.values()] for row in log)]
    with utils.atomic_write(folder / "log.csv") as file:
        file.write("".join(",".join(row) + "\n" for row in rows).encode())


# The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, every value resolved. Wrong flags end the program with a line and exit code 2."""
    parser = utils.Parser(description="Train one network by one method (Algorithm 1 of the paper).")
    positive, not_negative = utils.number(float, above=0), utils.number(float, low=0)
    natural, count = utils.number(int, low=0), utils.number(int, low=1)

    flag = parser.add_argument_group("what").add_argument
    flag("--dataset", default="cifar10", help=f"{', '.join(BUILT_IN)}, or the path of an .npz file")
    flag("--data", default="data", help="folder of CIFAR, downloaded if missing")
    flag("--method", choices=tuple(METHODS), default="magnma", help="Eq. (1)-(6) and (12)")
    flag("--arch", choices=ARCHS, default="resnet18", help="the network")
    flag("--seed", type=natural, default=0, help="seed of the weights and all random draws")

    flag = parser.add_argument_group("training (Sec. 4)").add_argument
    flag("--epochs", type=count, default=150, help="T of Algorithm 1")
    flag("--batch-size", type=count, default=512, help="|B|, over all processes")
    flag("--lr", type=positive, default=0.1, help="divided by 10 every ceil(epochs / 3) epochs")
    flag("--weight-decay", type=not_negative, default=5e-4, help="SGD with Nesterov momentum 0.9")

    paper = {k: v for method in METHODS.values() for k, v in method.defaults.items()}
    group = parser.add_argument_group("hyperparameters of the methods, for pixels in [0, 1]")

    def own(name: str, kind: Callable, text: str, choices: tuple[str, ...] | None = None) -> None:
        default = paper[name.replace("-", "_")]
        group.add_argument(f"--{name}", type=kind, choices=choices, default=default, help=text)

    own("lambda1", not_negative, "MAGNMA: weight of the noise regulariser; 0 leaves it out")
    own("lambda2", not_negative, "MAGNMA: weight of the mixed augmentations; 0 leaves them out")
    own("sigma-max", not_negative, "MAGNMA, GN: largest noise level")
    own("beta", utils.number(float, low=0.01), "MAGNMA: w ~ Beta(beta, beta) mixes x with T_a(x)")
    own("n", count, "MAGNMA: samples of each regulariser")
    own("operations", str, "MAGNMA: the text's four for T_a, or AugMix's nine", ("A", "augmix"))
    own("epsilon", not_negative, "AT, TRADES: l_inf radius; by default 8/255")
    own("pgd-steps", natural, "AT, TRADES: steps of the attack")
    own("pgd-step-size", not_negative, "AT, TRADES: step size; by default 2.5 epsilon / steps")
    own("trades-lambda", not_negative, "TRADES: weight of the robust term")
    own("rse-sigma", not_negative, "RSE: noise level")
    own("jsd-lambda", not_negative, "AugMix: weight of the Jensen-Shannon divergence")
    group.add_argument("--rse-samples", type=count, default=10, help="RSE: draws at test time")
    group.add_argument(
        "--joint",
        action="store_true",
        help="MAGNMA, AugMix, TRADES: forward clean and perturbed copies as one batch",
    )

    flag = parser.add_argument_group("how").add_argument
    flag("--subset", type=count, help="train on the first N images")
    flag("--eval-every", type=count, default=5, help="test epoch 1, every N-th and the last")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:<index>")
    flag("--amp", choices=utils.AMP, default="auto", help=utils.AMP_HELP)
    flag("--compile", action="store_true", help="torch.compile the network")
    flag(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="repeat each forward pass in the backward pass: same result, memory of one pass, a"
        f" third more time. By default on for {', '.join(LARGE)} with the methods of --joint",
    )
    flag("--tag", default="", help="suffix of the run's folder, to tell runs of a method apart")
    flag("--out", help="by default runs/<dataset>/<arch>/<method>[-<tag>]/seed<k>")
    flag("--resume", action="store_true", help="continue the run, or start it")

    method = parser.parse_args(argv).method
    parser.set_defaults(**METHODS[method].defaults)  # another may have a flag of the same name
    args = parser.parse_args(argv)
    others = {"--" + name.replace("_", "-") for name in paper.keys() - METHODS[method].defaults}
    given = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    if unused := sorted(others & given):
        print(f"{parser.prog}: {method} does not use {', '.join(unused)}", file=sys.stderr)
    if args.pgd_step_size is None:
        args.pgd_step_size = 2.5 * args.epsilon / max(1, args.pgd_steps)
    several = forwards_copies(args.method)
    args.joint = args.joint and several
    if args.recompute and args.joint:
        parser.error("--recompute saves no memory with --joint; use one of the two")
    if args.recompute is None:
        args.recompute = args.arch in LARGE and several and not args.joint
    if not args.out:
        name = f"{args.method}-{args.tag}" if args.tag else args.method
        dataset = dataset_name(args.dataset)
        args.out = str(Path("runs", dataset, args.arch, name, f"seed{args.seed}"))
    return args


def forwards_copies(method: str) -> bool:
    """Whether the method forwards several copies of a batch: --joint and recomputation apply."""
    return "joint" in METHODS[method].defaults


def start_processes(args: argparse.Namespace, device: torch.device) -> tuple[int, int]:
    """(rank, world) of this process, (0, 1) unless torchrun started it."""
    if "RANK" not in os.environ:
        return 0, 1
    if ":" in args.device:
        raise UserError(
            f"--device {args.device} is for one process. With torchrun use --device cuda"
        )
    gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if gpu else "gloo", timeout=timedelta(hours=1), device_id=device if gpu else None
    )
    return dist.get_rank(), dist.get_world_size()


def check_sizes(args: argparse.Namespace, dataset: Dataset, world: int) -> None:
    """Raise UserError unless --subset and --batch-size fit the data and the number of processes."""
    images = len(dataset.train_images)
    if args.subset is not None and args.subset > images:
        raise UserError(f"--subset {args.subset}: {dataset.name} has {images} training images")
    if args.batch_size > (args.subset or images):
        raise UserError(
            f"--batch-size {args.batch_size}: more than the {args.subset or images} images"
        )
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} is not divisible by {world} processes")


def build_run(
    args: argparse.Namespace, dataset: Dataset, device: torch.device, rank: int, world: int
) -> Run:
    """The network, optimiser and scaler of a run at its start, and its config.json."""
    dtype = utils.amp_dtype(args.amp, device)
    recipe = recipe_of(args, dataset, utils.amp_name(dtype), world)
    ran = {name: vars(args)[name] for name in ("dataset", "data", "out", "compile", "recompute")}
    config = {
        "recipe": recipe,
        "departures": departures_of(recipe),
        "seed": args.seed,
        "tag": args.tag,
        "ran": ran | {"data_source": dataset.source} | utils.provenance(device),
    }
    seed(args.seed)
    f = build_model(args.arch, len(dataset.classes)).to(device, memory_format=torch.channels_last)
    sgd = utils.optimiser(f, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    return Run(args, dataset, device, dtype, rank, world, f, sgd, scaler, config, [])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    folder, device = Path(args.out), utils.pick_device(args.device)
    rank, world = start_processes(args, device)
    if rank > 0:
        dist.barrier()  # the first process may have to download
    dataset = load_dataset(args.dataset, args.data)
    if world > 1 and rank == 0:
        dist.barrier()
    check_sizes(args, dataset, world)
    run = build_run(args, dataset, device, rank, world)
    if rank == 0:
        utils.make_folder(folder)
        locked = lock(folder)  # noqa: F841 - until the process ends
        devices = f" x {world}" if world > 1 else ""
        tqdm.write(
            f"{folder}: {args.method}, {args.arch}, {dataset.name} ({dataset.source}),"
            f" {utils.describe(device)}{devices}, precision {run.config['recipe']['amp']}"
        )
    open_run(run)
    if args.compile:
        run.f.forward = torch.compile(run.f.forward, dynamic=False)
    if args.recompute:
        recompute(run.f)
    try:
        train(run)
    except KeyboardInterrupt:
        tqdm.write(f"{folder}: continue with --resume")
        raise
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU's memory is full. {memory_advice(run)} needs less") from None
    if rank == 0:
        place = "" if args.data == "data" else f" --data {quote(args.data)}"
        tqdm.write(f"evaluate it: python evaluate.py {quote(str(folder))}{place}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def memory_advice(run: Run) -> str:
    """The flags that would make this run need less GPU memory."""
    flags = []
    if run.dtype is None:
        flags.append("--amp auto")
    if forwards_copies(run.args.method) and not run.args.recompute and not run.args.joint:
        flags.append("--recompute")
    return " or ".join([*flags, "a smaller --batch-size"])


if __name__ == "__main__":
    sys.exit(utils.run_main(main))
