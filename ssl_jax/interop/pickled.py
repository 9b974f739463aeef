"""Reads pickled weights without executing code from the file.

A pickle is a program that can call any function by name. Here, names resolve to a short list of
harmless array constructors, and all others to inert objects that store their arguments and do
nothing. PyTorch's files are such pickles with the tensors' data next to them.
"""

import collections
import contextlib
import io
import math
import operator
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError, first_line

_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Files of PyTorch before 1.6 start with this number, pickled.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ERRORS = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, OSError, KeyError),
    *(ValueError, TypeError, IndexError, AttributeError, MemoryError, ImportError, OverflowError),
    *(RuntimeError, NotImplementedError, zlib.error),
)


class Inert:
    """Stands for an object of a pickle: stores its arguments and state, does nothing."""

    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **options: Any) -> "Inert":
        """Stores the constructor's arguments."""
        made = super().__new__(cls)
        made.args, made.state, made.items = args, None, []
        return made

    def __init__(self, *args: Any, **options: Any) -> None:
        """Does nothing."""

    def __setstate__(self, state: Any) -> None:
        """Stores it."""
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Stores it."""
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Stores it."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """Stores them."""
        self.items.extend(values)

    def add(self, value: Any) -> None:
        """Stores it."""
        self.items.append(value)

    def __call__(self, *args: Any, **options: Any) -> "Inert":
        """Stands for a call's result, and stores the arguments."""
        return Inert(*args)

    def __hash__(self) -> int:
        """Hashes by identity."""
        return id(self)

    def parts(self) -> Iterator[Any]:
        """Yields everything that was stored."""
        yield from self.args
        yield self.state
        yield from self.items


class _Sealed(type):
    """Metaclass of classes that a pickle's BUILD can't change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(f"{cls.__name__} is read-only")


class _Factory(metaclass=_Sealed):
    """A function that a pickle may call, but not change."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a factory is read-only")

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes an array constructor")

    def __hash__(self) -> int:
        return id(self)


class _Storage:
    """A buffer in the file, of which tensors are views."""

    def __init__(self, kind: str, key: str, count: int) -> None:
        self.dtype, self.key, self.count = _DTYPES.get(kind), key, count
        self.data: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a storage")

    def take(self, data: bytes) -> None:
        if self.dtype is None:
            return  # not a dtype of weights
        self.data = np.frombuffer(data, self.dtype)


class _Tensor:
    """A tensor whose storage has not been read yet."""

    def __init__(self, storage: Any, offset: int, size: Any, stride: Any, *unused: Any) -> None:
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without a storage")
        # Python's integers don't overflow.
        self.storage, self.offset = storage, operator.index(offset)
        self.size, self.stride = _integers(size), _integers(stride)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a tensor")

    def array(self) -> np.ndarray | None:
        data = self.storage.data
        if data is None:
            return None
        if min((self.offset, *self.size, *self.stride)) < 0 or len(self.size) != len(self.stride):
            raise ValueError("a tensor with a negative size")
        if 0 in self.size:
            return np.zeros(self.size, data.dtype)
        reach = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if self.offset + reach >= len(data) or math.prod(self.size) > len(data):
            raise ValueError("a tensor that reaches beyond its storage")
        strides = tuple(step * data.itemsize for step in self.stride)
        view = np.lib.stride_tricks.as_strided(data[self.offset :], self.size, strides)
        return np.array(view)


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(operator.index(value) for value in values)


class _Dtype:
    """NumPy's dtype in a pickle: only numbers, by name."""

    def __init__(self, name: Any, *unused: Any) -> None:
        name = name.decode("latin1") if isinstance(name, bytes) else name
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[biuf]\d{1,2}|bfloat16", name):
            raise ValueError(f"arrays of dtype {name!r:.20}")
        self.dtype = np.dtype(jnp.bfloat16 if name == "bfloat16" else name)

    def __setstate__(self, state: Any) -> None:
        """Takes the byte order, the second item of a dtype's state."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder("<" if order == "<" else ">")


class _Array:
    """NumPy's array in a pickle: its length is checked, and objects are refused."""

    def __init__(self, *unused: Any) -> None:
        self.made: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        """Takes (version, shape, dtype, whether it is in Fortran order, bytes)."""
        _, shape, dtype, fortran, data = state
        self.made = _plain_array(data, dtype, shape, "F" if fortran else "C")

    def array(self) -> np.ndarray:
        if self.made is None:
            raise ValueError("an array without data")
        return self.made


def _plain_array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise ValueError("an array with an unknown dtype")
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array of objects")
    array = np.frombuffer(data, dtype.dtype).reshape(_integers(shape), order=order)
    return np.array(array)


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """An array in a pickle of protocol 5."""
    array = _Array()
    array.made = _plain_array(data, dtype, shape, "F" if order == "F" else "C")
    return array


def _scalar(dtype: Any, data: Any = b"") -> Any:
    """A NumPy scalar."""
    return _plain_array(data, dtype, (), "C")[()]


def _bytes(*args: Any) -> bytes:
    """Bytes in pickles of protocols 0 to 2, which store them as text."""
    text = args[0] if args else ""
    if not isinstance(text, str):
        raise ValueError("bytes from something other than text")
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Any]:
    """The functions that a pickle may call; a fresh dict for each file, so that none is shared."""
    made: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("collections", "defaultdict"): lambda *unused: {},
        ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
        ("torch._utils", "_rebuild_tensor"): _Tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, *unused: data,
        ("torch._tensor", "_rebuild_from_type_v2"): lambda call, kind, args, state: call(*args),
        ("_codecs", "encode"): _bytes,
        ("builtins", "bytes"): _bytes,
        ("numpy", "dtype"): _Dtype,
    }
    for module in ("numpy.core", "numpy._core"):
        made[f"{module}.multiarray", "_reconstruct"] = _Array
        made[f"{module}.multiarray", "scalar"] = _scalar
        made[f"{module}.numeric", "_frombuffer"] = _from_buffer
    return {name: _Factory(function) for name, function in made.items()}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, storages: dict[str, _Storage]) -> None:
        super().__init__(file, encoding="latin1")
        self.storages, self.allowed = storages, _allowed()

    def find_class(self, module: str, name: str) -> Any:
        """Resolves a name to an allowed function, a kind of storage, or an inert class."""
        module = {"__builtin__": "builtins"}.get(module, module)
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return name
        allowed = self.allowed.get((module, name))
        if allowed is not None:
            return allowed
        if (module, name) in (("builtins", "getattr"), ("copyreg", "_reconstructor")):
            return _Factory(lambda *args: type("x", (Inert,), {}))
        return type(name.split(".")[-1] or "x", (Inert,), {})

    def persistent_load(self, identity: Any) -> Any:
        """A storage, whose data is read later."""
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            return Inert(identity)
        _, kind, key, _, count = identity[:5]
        kind = kind if isinstance(kind, str) else ""
        storage = _Storage(kind, str(key), operator.index(count))
        return self.storages.setdefault(str(key), storage)


def may_be_pickled(file: Path) -> bool:
    """Whether a file starts like a pickle, or is an archive of `torch.save`."""
    with contextlib.suppress(*_ERRORS), zipfile.ZipFile(file) as archive:
        return any(name.endswith("data.pkl") for name in archive.namelist())
    with file.open("rb") as opened:
        begins = opened.read(2)
    # Protocol 2 or later, which all supported code writes; or a truncated archive.
    return begins[:1] == b"\x80" or begins == b"PK"


def read_pickle(file: Path) -> Any:
    """Reads a pickle: arrays, containers and plain values; everything else is `Inert`.

    Raises:
      UserError: the file is not a pickle, or is corrupt.
    """
    return _reading(file, lambda opened: _arrays(_Unpickler(opened, {}).load(), {}))


def read_torch(file: Path) -> Any:
    """Reads a file of `torch.save`, with tensors as arrays.

    Args:
      file: in the zip format, or in the one before PyTorch 1.6.

    Returns:
      Dicts, lists and tuples of arrays and plain values; everything else is `Inert`.

    Raises:
      UserError: the file is not of PyTorch, or is corrupt.
    """
    read = _from_zip if zipfile.is_zipfile(file) else _from_legacy
    return _reading(file, lambda opened: _arrays(read(opened), {}))


def _reading(file: Path, read: Callable[[BinaryIO], Any]) -> Any:
    try:
        with file.open("rb") as opened:
            return read(opened)
    except _ERRORS as error:
        reason = first_line(error)[:200]
        raise UserError(f"Cannot read {file} ({reason}): download it again.") from error


def _from_zip(opened: BinaryIO) -> Any:
    storages: dict[str, _Storage] = {}
    with zipfile.ZipFile(opened) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        root = pickled.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("it is big-endian")
        found = _Unpickler(io.BytesIO(archive.read(pickled)), storages).load()
        for key, storage in storages.items():
            storage.take(archive.read(f"{root}data/{key}"))
    return found


def _from_legacy(opened: BinaryIO) -> Any:
    storages: dict[str, _Storage] = {}

    def load() -> Any:
        return _Unpickler(opened, storages).load()

    if load() != _LEGACY_MAGIC:
        raise ValueError("it is not a PyTorch file")
    load(), load()  # the protocol, the machine
    found, keys = load(), load()
    for key in keys:
        storage = storages[str(key)]
        (count,) = struct.unpack("<q", opened.read(8))
        size = storage.dtype.itemsize if storage.dtype is not None else 0
        if not size or count < 0:
            raise ValueError("a storage of an unknown dtype")
        data = opened.read(count * size)
        if len(data) != count * size:
            raise EOFError("it is truncated")
        storage.take(data)
    return found


def _arrays(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Replaces tensors and arrays by NumPy's; objects that occur several times stay shared.

    `done` has the original and its replacement, by the original's id.
    """
    if not isinstance(value, dict | list | tuple | Inert | _Tensor | _Array):
        return value
    if id(value) in done:
        return done[id(value)][1]
    made: Any
    if isinstance(value, _Tensor | _Array):
        made = value.array()
    elif isinstance(value, Inert):
        made = Inert()
        done[id(value)] = value, made  # it may contain itself
        made.args = tuple(_arrays(each, done) for each in value.args)
        made.state = _arrays(value.state, done)
        made.items = [_arrays(each, done) for each in value.items]
    elif isinstance(value, dict):
        made = {}
        done[id(value)] = value, made
        made.update({key: _arrays(each, done) for key, each in value.items()})
    else:
        made = []
        done[id(value)] = value, made
        made.extend(_arrays(each, done) for each in value)
        made = tuple(made) if isinstance(value, tuple) else made
    done[id(value)] = value, made
    return made
