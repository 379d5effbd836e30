"""Read the pickles that CIFAR's batches are, without unpickling them.

Python's own unpickler calls whatever a pickle names and allocates whatever it claims. This reader knows the opcodes
that such batches use (protocols 2 to 5, Python 2's included) and can build numbers, strings, tuples, lists, dicts and
integer arrays; of the functions that a pickle can name it knows the few in GLOBALS, and does itself what they would.
"""

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_BYTES = 170_000_000  # CIFAR-100's training batch, the largest, has 155 million
MAX_OPCODES = 2**19  # and some 200,000 opcodes
MAX_NAME = 100  # characters of a global's or class's name

GLOBALS = {
    "numpy.core.multiarray._reconstruct": "array",
    "numpy._core.multiarray._reconstruct": "array",
    "numpy._core.numeric._frombuffer": "buffer",  # protocol 5
    "numpy.core.numeric._frombuffer": "buffer",
    "numpy.dtype": "dtype",
    "numpy.ndarray": "ndarray",  # only ever an argument
    "_codecs.encode": "encode",  # protocol 2 from Python 3 writes bytes so
}
DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
TUPLES = ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")


@dataclass
class _Global:
    kind: str


@dataclass
class _Array:
    """numpy makes an empty array first and fills it later; by then others may refer to it, hence the holder."""

    value: np.ndarray | None = None


class _BoundedReads(io.BufferedReader):
    """A file that refuses to read what no batch holds before it allocates room for it."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_BYTES:
            raise ValueError("it claims to be longer than any batch")
        return super().read(size)

    def readline(self, size: int | None = -1) -> bytes:
        return super().readline(2 * MAX_NAME)


def remedy(path: Path) -> str:
    """What to do about a damaged file of a data set folder, for the end of a message."""
    return f"restore it, or delete {path.parent} to download it anew"


def read_pickle(path: str | Path) -> dict:
    """The dict in a pickle file of numbers, strings, lists and arrays (protocols 2 to 5), its keys as str.

    Python 2's strings are decoded as latin-1. Memory stays within some five times the file's size. Raises
    FileNotFoundError, or ValueError when the file is too large or damaged, or names a global that no batch needs.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than any CIFAR batch; {remedy(path)}")
    try:
        with _BoundedReads(open(path, "rb", buffering=0)) as file:
            content = _run_pickle(file)
            if file.read(1):
                raise ValueError("it goes on after its end")
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    except OSError:
        raise
    except Exception as error:  # damaged bytes can raise nearly anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"{path} is not a sound CIFAR batch ({reason}); {remedy(path)}") from error
    return {
        key.decode("latin-1") if isinstance(key, bytes) else key: value.value if isinstance(value, _Array) else value
        for key, value in content.items()
    }


def _run_pickle(file: io.BufferedReader) -> object:
    """Carry out the opcodes of a pickle on a stack of our own.

    Whatever an opcode adds to the memory stands in the file, opcode by opcode, but for the bytes that `encode` makes.
    """
    stack, marks, memo, encodable = [], [], {}, MAX_BYTES

    def encode(text: str) -> bytes:
        nonlocal encodable
        encodable -= len(text)
        if encodable < 0:
            raise ValueError("it encodes one text again and again")
        return text.encode("latin-1")

    def popped(count: int) -> list:
        if not 0 <= count <= len(stack):
            raise ValueError("its stack runs empty")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count > MAX_OPCODES:
            raise ValueError("it has more opcodes than any batch")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in LITERALS:
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case name if name in TUPLES:
                stack.append(tuple(popped(TUPLES.index(opcode.name))))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(popped(len(stack) - marks.pop())))
            case "APPEND":
                _append(stack, popped(1))
            case "APPENDS":
                _append(stack, popped(len(stack) - marks.pop()))
            case "SETITEM":
                _set_items(stack, popped(2))
            case "SETITEMS":
                _set_items(stack, popped(len(stack) - marks.pop()))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_find_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_find_global(*popped(2)))
            case "REDUCE":
                function, arguments = popped(2)
                stack.append(_reduce(function, arguments, encode))
            case "BUILD":
                (state,) = popped(1)
                _build(stack[-1], state, encode)
            case "STOP":
                (result,) = popped(1)
                return result
            case _:
                raise ValueError(f"it uses the opcode {opcode.name}, which no batch needs")
    raise ValueError("it has no end")


def _find_global(module: object, name: object) -> _Global:
    if not all(isinstance(part, str) and len(part) <= MAX_NAME for part in (module, name)):
        raise ValueError("it asks for a global without a proper name")
    name = f"{module}.{name}"
    if name not in GLOBALS:
        raise ValueError(f"it asks for the global {name!a}, which no batch needs: tampered")
    return _Global(GLOBALS[name])


def _append(stack: list, items: list) -> None:
    if not isinstance(stack[-1], list):
        raise ValueError("it appends to something that is no list")
    stack[-1].extend(items)


def _set_items(stack: list, items: list) -> None:
    if not isinstance(stack[-1], dict) or len(items) % 2:
        raise ValueError("it sets items of something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | bytes):  # the hash of nested tuples can take for ever
            raise ValueError("it has a key that is no string")
        stack[-1][key] = value


def _reduce(function: object, arguments: object, encode: Callable[[str], bytes]) -> object:
    """What `function(*arguments)` would have made: an array, a dtype or bytes."""
    match getattr(function, "kind", None), arguments:
        case "array", (_, _, _):
            return _Array()
        case "buffer", (buffer, np.dtype() as dtype, shape, "C"):
            return _Array(_to_array(buffer, dtype, shape))
        case "dtype", (str() as code, *_):
            if code not in DTYPES:
                raise ValueError(f"it has an array of type {code[:20]!a}, not of integers")
            return np.dtype(f"<{code}")
        case "encode", (str() as text, "latin1"):
            return encode(text)
    raise ValueError("it calls something in a way that no batch does")


def _build(target: object, state: object, encode: Callable[[str], bytes]) -> None:
    """What `target.__setstate__(state)` would have done, for an array; a dtype's byte order is only checked."""
    match target, state:
        case np.dtype(), (_, "<" | "|" | "=", *_):
            return
        case _Array(), (_, shape, np.dtype() as dtype, False | 0, (str() | bytes() | bytearray()) as data):
            target.value = _to_array(encode(data) if isinstance(data, str) else data, dtype, shape)
            return
    raise ValueError("it sets a state that no batch has")


def _to_array(data: bytes | bytearray, dtype: np.dtype, shape: object) -> np.ndarray:
    if not isinstance(shape, tuple) or len(shape) > 4 or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("it has an array of impossible shape")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"its array of {len(data):,} bytes does not fit the shape {str(shape)[:60]}")
    return np.frombuffer(data, dtype).reshape(shape)
