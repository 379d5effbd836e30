"""unpickle.py: it reads what pickle reads of CIFAR's batches, and does nothing that a tampered one asks for."""

import os
import pickle
import random
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest

import unpickle
from unpickle import read_pickle


def python2_batch(images: np.ndarray, labels: list[int], label_key: str = "labels") -> bytes:
    """A batch as Python 2's cPickle wrote it: protocol 2, byte strings, numpy.core names. images uint8 (n, 3072)."""

    def string(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text

    def integer(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
    dtype = b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01" + integer(len(images)) + integer(3072) + b"\x86" + dtype + b"\x89" + string(images.tobytes())
    names = b"".join(string(b"tabby_s_%06d.png" % i) for i in range(len(labels)))
    return b"".join([
        b"\x80\x02}q\x01(",
        string(b"batch_label") + string(b"training batch 1 of 5"),
        string(label_key.encode()) + b"]q\x02(" + b"".join(map(integer, labels)) + b"e",
        string(b"data") + array + state + b"tb",
        string(b"filenames") + b"](" + names + b"eu.",
    ])  # fmt: skip


def some_batch(n: int = 3) -> dict:
    """A batch of n random images."""
    rng = np.random.default_rng(n)
    images, labels = rng.integers(0, 256, (n, 3072), np.uint8), rng.integers(0, 10, n).tolist()
    return {"data": images, "labels": labels, "batch_label": "test", "filenames": [f"{i}.png" for i in range(n)]}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_pickle_wrote(tmp_path: Path, protocol: int) -> None:
    file = tmp_path / "batch"
    batch = some_batch()
    file.write_bytes(pickle.dumps(batch, protocol))
    assert same(read_pickle(file), batch)
    file.write_bytes(pickle.dumps({key.encode(): value for key, value in batch.items()}, protocol))
    assert same(read_pickle(file), batch)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reads_a_python_2_batch_as_pickle_does(tmp_path: Path) -> None:
    file = tmp_path / "batch"
    batch = some_batch(300)
    file.write_bytes(python2_batch(batch["data"], batch["labels"]))
    read = read_pickle(file)
    assert same(read, pickle.loads(file.read_bytes(), encoding="latin1"))
    assert np.array_equal(read["data"], batch["data"])
    assert read["labels"] == batch["labels"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reads_both_names_of_numpy_and_integer_arrays_and_shared_ones(tmp_path: Path) -> None:
    file = tmp_path / "batch"
    batch = some_batch() | {"labels": np.arange(3)}
    batch["again"] = batch["labels"]
    raw = pickle.dumps(batch, 2)
    assert b"numpy._core.multiarray" in raw
    for content in (raw, raw.replace(b"numpy._core", b"numpy.core")):
        file.write_bytes(content)
        assert same(read_pickle(file), batch)
        assert read_pickle(file)["labels"].dtype == np.int64


class Runs:
    """Pickles as a call of `function`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, f"{os.name}.mkdir"), (eval, "eval"), (np.load, "numpy.load"), (getattr, "getattr")],
)
def test_a_batch_that_would_run_code_is_refused_by_name(
    tmp_path: Path, protocol: int, function: object, name: str
) -> None:
    file, trap = tmp_path / "data_batch_1", tmp_path / "trap"
    file.write_bytes(pickle.dumps(some_batch() | {"extra": Runs(function, str(trap))}, protocol))
    with pytest.raises(ValueError, match=rf"data_batch_1 .*{name}.*tampered.*restore") as caught:
        read_pickle(file)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


def test_the_admitted_globals_cannot_be_called_otherwise_than_batches_do(tmp_path: Path) -> None:
    file = tmp_path / "batch"
    calls = [
        Runs(np.dtype, "O"), Runs(np.dtype, "V9"), Runs(np.dtype, [("a", "u1")]), Runs(np.ndarray, (2, 2)),
        Runs(pickle.dumps, 1), np.array([object()]), np.array([1.5]), np.zeros((2, 2), ">i4"), np.float64(1),
    ]  # fmt: skip
    for call in calls:
        file.write_bytes(pickle.dumps({"data": call}, 2))
        with pytest.raises(ValueError, match="not a sound CIFAR batch"):
            read_pickle(file)


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts)


LONG = b"X" + struct.pack("<I", 10**6) + b"x" * 10**6
SOUND = ""
BOMBS = {
    "memo index": (opcodes(b"}r\xf0\xff\xff\xff."), SOUND),  # pickle makes a table of that length
    "frame": (opcodes(b"\x95" + struct.pack("<Q", 2**40) + b"}."), SOUND),
    "nesting": (opcodes(b"}U\x01a", b"]" * 10_000, b"a" * 9_999, b"s."), SOUND),
    "bytes of 2**62": (opcodes(b"\x8e" + struct.pack("<Q", 2**62) + b"abc."), "claims to be longer"),
    "bytes of 4 GB": (opcodes(b"\x8e" + struct.pack("<Q", 2**32) + b"abc."), "claims to be longer"),
    "bytearray of 8 GB": (opcodes(b"\x96" + struct.pack("<Q", 2**33) + b"abc."), "claims to be longer"),
    "one text encoded often": (
        opcodes(LONG, b"q\x00(", b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 5000, b"t."),
        "encodes one text again and again",
    ),
    "key decoded often": (opcodes(b"B", LONG[1:], b"q\x00(", b"}h\x00Ns" * 5000, b"t."), "a tuple, not a dict"),
    "tuple as key": (opcodes(b"}", b")", b"\x85q\x00h\x00\x86" * 60, b"Ns."), "key that is no string"),
    "tuples as a global's name": (opcodes(b")", b"q\x00h\x00\x86" * 60, b"q\x00h\x00\x93."), "a proper name"),
    "array of impossible shape": (
        opcodes(
            b"}U\x04datacnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01\x8a\x05",
            b"\x00\x00\x00\x00\x01\x8a\x05\x00\x00\x00\x00\x01\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x89U\x00tbs.",
        ),
        "array of 0 bytes does not fit the shape",
    ),
    "many opcodes": (opcodes(b"N" * 600_000, b"}."), "more opcodes than any batch"),
    "line without an end": (opcodes(b"c" + b"a" * 2**20), "no newline"),
    "long line": (opcodes(b"S" + b"\xff" * 2**20 + b"\n."), "no newline"),
    "empty": (b"", "exhausted"),
    "only a stop": (b".", "stack runs empty"),
    "only a mark": (b"(.", "stack runs empty"),
    "too few for a tuple": (opcodes(b"}N\x87."), "stack runs empty"),
    "below a mark": (opcodes(b"}NN(\x87t."), "stack runs empty"),
    "a list": (opcodes(b"]."), "a list, not a dict"),
    "items of a tuple": (opcodes(b"}NN(\x85\x85u."), "no dict"),
    "odd items": (opcodes(b"}(U\x01au."), "no dict"),
    "append to a dict": (opcodes(b"}Na."), "no list"),
    "more after the end": (opcodes(b"}.x"), "goes on after its end"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_neither_time_nor_memory(tmp_path: Path, bomb: str) -> None:
    file = tmp_path / "batch"
    content, message = BOMBS[bomb]
    file.write_bytes(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if message == SOUND:
        read_pickle(file)
    else:
        with pytest.raises(ValueError, match=rf"batch is not a sound CIFAR batch \(.*{message}.*\); restore it"):
            read_pickle(file)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KB


def test_a_file_larger_than_any_batch_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "batch"
    with open(file, "wb") as sparse:
        sparse.truncate(unpickle.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="batch has 170,000,001 bytes, more than any CIFAR batch"):
        read_pickle(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_pickle(tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("protocol", ["python 2", 2, 4, 5])
def test_random_damage_raises_only_documented_errors(tmp_path: Path, protocol: int | str) -> None:
    file, rng, batch = tmp_path / "batch", random.Random(0), some_batch(1)
    whole = python2_batch(batch["data"], [7]) if protocol == "python 2" else pickle.dumps(batch, protocol)
    pixels = whole.index(batch["data"].tobytes()[-9:]) if protocol != 2 else len(whole) // 2
    structure = [i for i in range(len(whole)) if not pixels - 2900 < i < pixels - 100]
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5])):
            damaged[rng.choice(structure)] = rng.choice([rng.randrange(256), *b"(.0]}ectbuRhqrXUTBC\x8e\x96"])
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        file.write_bytes(damaged)
        message = ""
        try:
            assert isinstance(read_pickle(file), dict)
        except ValueError as error:
            message = str(error)
            refused += 1
        assert not message or (str(file) in message and "\n" not in message and len(message) < 400)
    assert refused > 60
