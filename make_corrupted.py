"""CIFAR-C folders: writes one with corruptions.py, or fetches the official one. `python corruptions.py` runs this main.

A folder (data/CIFAR-10-C, CIFAR-100-C, DIGITS-C) holds <corruption>.npy, uint8 (5 N, 32, 32, 3), the N test images in
their order at severity 1, then at 2, ... 5; labels.npy, uint8 (5 N,); and one record: generated.json (seed, versions,
sources, SHA-256 of each file) or official.json (written only after the official archive's md5 matched). Files appear
whole, by a rename, and a file's hash is in the record before the file is there.
"""

import hashlib
import importlib.metadata
import io
import itertools
import multiprocessing
import os
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import PIL
import scipy

import corruptions

# Every worker process imports this file, so what needs torch (data, download, runs) is imported where it is used.

SEVERITIES = range(1, 6)
FILES = (*(f"{name}.npy" for name in corruptions.FUNCTIONS), "labels.npy")
ZENODO = "https://zenodo.org/records/{}?download=1"
OFFICIAL = {  # url, bytes, md5
    "cifar10": (ZENODO.format("2535967/files/CIFAR-10-C.tar"), 2_918_471_680, "56bf5dcef84df0e2308c6dcbcbbd8499"),
    "cifar100": (ZENODO.format("3555552/files/CIFAR-100-C.tar"), 2_918_473_216, "11f0ed0f1191edbf9fa23466ae6021d3"),
}


# Making a set


def generate(
    folder: str | Path, images: np.ndarray, labels: np.ndarray, names: Iterable[str], *,
    seed: int, facts: dict[str, str], workers: int = 1, overwrite: bool = False,
) -> None:  # fmt: skip
    """Write `folder` from the clean test images, uint8 (N, 32, 32, 3), and labels (N,): a file for each of `names`.

    The bytes depend on images, labels and seed alone, not on `workers`. A file that is there with the hash recorded
    for it is kept, so the same call continues one that was killed. `facts` go into the record. Raises ValueError when
    the folder is in use or belongs to another seed, other images or another program (unless `overwrite`), or frost's
    photographs are missing; OSError on a full disk; runs.Stopped after SIGINT or SIGTERM.
    """
    import runs

    folder, names = Path(folder), list(names)
    clean = hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    record = {**facts, "seed": seed, "images": len(images), "clean_sha256": clean, "versions": versions()}
    if "frost" in names:
        corruptions.frost_photographs()
        package = corruptions.FROST_PACKAGE
        record["frost"] = f"photographs of {package} {importlib.metadata.version(package)}"
    with runs.lock(folder), runs.StopRequest() as stop:
        if overwrite:
            clear(folder)
        for file in (*FILES, "generated.json"):
            for leftover in folder.glob(f".{file}.*.tmp"):  # of a killed process
                leftover.unlink()
        record["files"] = whole_files(folder, record, names)
        todo = [name for name in names if f"{name}.npy" not in record["files"]]
        if "labels.npy" not in record["files"]:
            publish(folder, "labels.npy", np.tile(labels.astype(np.uint8), len(SEVERITIES)), record)
        for name, corrupted in corrupted_arrays(images, todo, seed, workers, stop.pending):
            publish(folder, f"{name}.npy", corrupted, record)
        if stop.pending():
            raise stop.stopped("finished files are kept, the same command goes on")


def corrupted_arrays(
    images: np.ndarray, names: list[str], seed: int, workers: int, stop: Callable[[], bool]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each name in turn with its array, uint8 (5 N, 32, 32, 3), made by `workers` processes; ends early on `stop()`."""
    from tqdm import tqdm

    starts = range(0, len(images), corruptions.CHUNK)
    cells = list(itertools.product(names, SEVERITIES, starts))
    tasks = ((images[s : s + corruptions.CHUNK], name, severity, seed, s) for name, severity, s in cells)
    with (
        tqdm(total=len(names) * len(SEVERITIES) * len(images), unit="image", smoothing=0.1, disable=None) as bar,
        shared_among(min(workers, len(cells)), corruptions.corrupt, tasks) as results,
    ):
        for name in names:
            bar.set_description(name)
            corrupted = np.empty((len(SEVERITIES), *images.shape), np.uint8)
            for severity, start in itertools.product(range(len(SEVERITIES)), starts):
                try:
                    part = next(results)
                except BrokenProcessPool:
                    if not stop():
                        raise OSError("a worker process was killed (too little memory?); run it again") from None
                if stop():
                    return
                corrupted[severity, start : start + len(part)] = part
                bar.update(len(part))
            yield name, corrupted.reshape(-1, *images.shape[1:])
            if bar.disable:
                print(f"{name}: done", flush=True)


@contextmanager
def shared_among(workers: int, function: Callable, tasks: Iterable[tuple]) -> Iterator[Iterator]:
    """The results of function(*task) in the order of the tasks, worked out ahead by `workers` processes (1: this)."""
    if workers <= 1:
        cv2.setNumThreads(1)
        yield itertools.starmap(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker)
    try:
        # The workers inherit that SIGINT is blocked: Ctrl-C in a terminal reaches all, and is this process's to handle.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            results = pool.map(function, *zip(*tasks, strict=True))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield results
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """One thread for OpenCV, and no life after the parent's: a killed parent cannot tell its workers to end."""
    cv2.setNumThreads(1)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


# The folder


def publish(folder: Path, file: str, array: np.ndarray, record: dict) -> None:
    """Add the array's hash to record["files"], write the record, then the array in .npy format, both atomically."""
    import runs

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    digest = hashlib.sha256(header.getvalue())
    digest.update(array.data)
    record["files"] = dict(sorted({**record["files"], file: digest.hexdigest()}.items()))
    runs.write_json(folder / "generated.json", record)
    with runs.atomic_write(folder / file) as out:
        out.write(header.getvalue())
        out.write(array.data)


def whole_files(folder: Path, record: dict, names: list[str]) -> dict[str, str]:
    """The files of an earlier, equal call that are there whole, with their SHA-256.

    Raises ValueError when what is in the folder was made otherwise than `record` says; other versions of the libraries
    matter only where some of `names` must still be made.
    """
    import runs

    remedy = "--overwrite replaces it, --data names another place"
    if (folder / "official.json").exists():
        raise ValueError(f"{folder} holds the official set; {remedy}")
    if not (folder / "generated.json").exists():
        if any((folder / file).exists() for file in FILES):
            raise ValueError(f"{folder} holds arrays without a generated.json, so another program made them; {remedy}")
        return {}
    old = runs.read_json(folder / "generated.json")
    if old.get("clean_sha256") != record["clean_sha256"]:
        raise ValueError(f"{folder} was made from other test images; {remedy}")
    if old.get("seed") != record["seed"]:
        raise ValueError(f"{folder} was made with seed {old.get('seed')}, not {record['seed']}; {remedy}")
    whole = verified(folder, old)
    if old.get("versions") != record["versions"] and not whole.keys() >= {f"{name}.npy" for name in names}:
        raise ValueError(f"{folder} was begun with other versions of the libraries; {remedy}")
    return whole


def verified(folder: Path, record: dict) -> dict[str, str]:
    """Those of record["files"] that lie in the folder with the recorded SHA-256."""
    import runs

    files = record.get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError(f"the record in {folder} lists no files with their SHA-256; --overwrite makes the set anew")
    there = [file for file in FILES if file in files and (folder / file).is_file()]
    return {file: files[file] for file in there if runs.sha256(folder / file) == files[file]}


def clear(folder: Path) -> None:
    """Delete the arrays and records of a set, and nothing else."""
    for file in (*FILES, "generated.json", "official.json"):
        (folder / file).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """The versions of the libraries that the pixels depend on."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
    }


# The official sets


def fetch_official(folder: str | Path, url: str, size: int, md5: str, overwrite: bool = False) -> None:
    """Download the official archive and unpack it as `folder`, with an official.json; the archive is deleted then.

    Continues where an earlier call was interrupted. Raises ValueError when the folder holds something else (unless
    `overwrite`) or the archive has another md5, OSError when the network fails or the disk has too little room.
    """
    import download
    import runs

    folder = Path(folder)
    with runs.lock(folder):
        if overwrite:
            clear(folder)
        if (folder / "official.json").exists():
            if len(verified(folder, runs.read_json(folder / "official.json"))) == len(FILES):
                print(f"{folder} is complete")
                return
        elif any((folder / file).exists() for file in (*FILES, "generated.json")):
            raise ValueError(f"{folder} holds a set that is not the official one; --overwrite replaces it")
        archive, unpacked = folder.with_name(f"{folder.name}.tar"), folder / ".unpacked"
        download.fetch(url, archive, size, md5)
        shutil.rmtree(unpacked, ignore_errors=True)
        download.extract(archive, unpacked / folder.name, [f"{folder.name}/{file}" for file in FILES])
        hashes = {file: runs.sha256(unpacked / folder.name / file) for file in FILES}
        runs.write_json(folder / "official.json", {"url": url, "md5": md5, "files": hashes})
        for file in FILES:
            os.replace(unpacked / folder.name / file, folder / file)
        shutil.rmtree(unpacked)
        archive.unlink()


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, then write or fetch the set."""
    import data
    import runs

    parser = runs.Parser(description="Write a CIFAR-C folder: corrupted test images at five severities.")
    add = parser.add_argument
    add("--dataset", choices=data.DATASETS, default="cifar10", help="whose test images")
    add("--data", type=Path, default="data", help="folder of the data sets; CIFAR-10-C and so on are made in it")
    add("--seed", type=runs.number(int, low=0), default=0, help="of all random draws")
    add("--workers", type=runs.number(int, low=1), default=os.cpu_count(), help="processes; no pixel depends on it")
    add("--all19", action="store_true", help="make gaussian_noise, too, which the paper leaves out")
    add("--download", action="store_true", help="fetch the official set instead (2.9 GB; it has all 19)")
    add("--overwrite", action="store_true", help="replace a set that was made otherwise")
    args = parser.parse_args(argv)

    folder = args.data / data.CORRUPTED_FOLDERS[args.dataset]
    if args.download:
        if args.dataset not in OFFICIAL:
            raise ValueError(f"--download: there is no official corrupted set of {args.dataset}; leave the flag out")
        fetch_official(folder, *OFFICIAL[args.dataset], overwrite=args.overwrite)
        return
    clean = data.load_dataset(args.dataset, args.data)
    names = data.ALL_CORRUPTIONS if args.all19 else data.CORRUPTIONS
    images = np.ascontiguousarray(clean.test_images.numpy().transpose(0, 2, 3, 1))
    facts = {"dataset": args.dataset, "data_source": clean.source}
    generate(
        folder, images, clean.test_labels.numpy(), names,
        seed=args.seed, facts=facts, workers=args.workers, overwrite=args.overwrite,
    )  # fmt: skip
    print(f"{folder}: {len(names)} corruptions of {len(images)} images at five severities, seed {args.seed}")
