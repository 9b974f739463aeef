"""Reads pickled weights without executing code from the file.

A pickle is a program that can call any function by name. It is interpreted here: the names of a few
constructors of arrays and containers have a meaning, and all others become inert objects that store
their arguments. PyTorch's files are such pickles with the tensors' data next to them.

A small file can describe huge objects, by using its parts many times. The memory of the objects is
therefore counted, and limited to a multiple of the file's size.
"""

import contextlib
import io
import math
import operator
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

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
# Limit of the memory that a file's objects take, in bytes: so many times the file's size (weights
# may be tied), and a constant for small files. An opcode counts like an empty dict.
_TIMES, _CONSTANT, _OPCODE = 8, 2**26, 64

# Opcodes, by what they do to the stack.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FROM_MARK = {
    *("TUPLE", "LIST", "FROZENSET", "DICT", "SETITEMS", "APPENDS", "ADDITEMS", "POP_MARK"),
    *("OBJ", "INST"),
}


class Inert:
    """Stands for an object or a name in a pickle.

    Attributes:
      name: of the function or class, with its module; "" if unknown.
      args: of the call that made the object.
      state: that the object was given.
      items: that were added to it.
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str = "", args: tuple[Any, ...] = ()) -> None:
        """Stores name and arguments."""
        self.name, self.args = name, args
        self.state: Any = None
        self.items: list[Any] = []

    def parts(self) -> Iterator[Any]:
        """Yields everything that was stored."""
        yield from self.args
        yield self.state
        yield from self.items


# Keys of a dict: nested tuples could overflow the stack when they are hashed, and large integers
# all have the same hash.
_KEYS, _KEY_BITS = (str, bytes, int, float, type(None), Inert), 60


class _Storage:
    """A buffer in the file, of which tensors are views; None if its kind is not of weights."""

    def __init__(self, data: np.ndarray | None) -> None:
        self.data = data


class _Dtype:
    """NumPy's dtype in a pickle: only numbers, by name."""

    def __init__(self, name: Any, *unused: Any) -> None:
        name = name.decode("latin1") if isinstance(name, bytes) else name
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[biuf]\d{1,2}|bfloat16", name):
            raise ValueError("an array of something other than numbers")
        self.dtype = np.dtype(jnp.bfloat16 if name == "bfloat16" else name)

    def set_order(self, state: Any) -> None:
        """Takes the byte order, the second item of a dtype's state."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if isinstance(order, str) and order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder("<" if order == "<" else ">")


class _Stream(Protocol):
    def read(self, n: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class _Bounded:
    """A file that allocates no more for a read than it contains."""

    def __init__(self, opened: BinaryIO, size: int) -> None:
        self._opened, self._size = opened, size

    def read(self, n: int) -> bytes:
        return self._opened.read(min(n, self._size))

    def readline(self) -> bytes:
        return self._opened.readline()


class _Reader:
    """Interprets pickles."""

    def __init__(self, size: int, storage: Callable[[str, str], _Storage] | None = None) -> None:
        """Starts to count.

        Args:
          size: of the file, in bytes.
          storage: gives the storage for its kind and key; None if there are none.
        """
        self._left = _TIMES * size + _CONSTANT
        self._storage = storage
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks below each mark
        self._memo: dict[int, Any] = {}
        self._unbuilt: dict[int, np.ndarray] = {}  # arrays without data yet, by id
        self._functions: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": self._ordered,
            "collections.defaultdict": lambda *unused: {},
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *unused: data,
            "torch._tensor._rebuild_from_type_v2": lambda f, kind, args, state: self._call(f, args),
            "_codecs.encode": self._bytes,
            "builtins.bytes": self._bytes,
            "__builtin__.bytes": self._bytes,
            "numpy.dtype": _Dtype,
        }
        for module in ("numpy.core", "numpy._core"):
            self._functions[f"{module}.multiarray._reconstruct"] = self._array
            self._functions[f"{module}.multiarray.scalar"] = self._scalar
            self._functions[f"{module}.numeric._frombuffer"] = self._from_buffer

    def spend(self, count: int) -> None:
        """Counts bytes of memory.

        Raises:
          ValueError: there are too many.
        """
        self._left -= count
        if self._left < 0:
            raise ValueError("its objects take many times the file's size")

    def load(self, stream: _Stream) -> Any:
        """Reads one pickle."""
        self._stack, self._below, self._memo = [], [], {}
        for opcode, arg, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            self.spend(_OPCODE)
            name = opcode.name
            if name in _LITERALS:
                self._stack.append(arg)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self._stack.append(_EMPTY[name]())
            elif name == "MARK":
                self._below.append(self._stack)
                self._stack = []
            elif name in _FROM_MARK:
                items, self._stack = self._stack, self._below.pop()
                self._take(name, arg, items)
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[int(arg or 0)])
            elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
                self._memo[int(arg or 0)] = self._stack[-1]
            elif name == "MEMOIZE":
                self._memo[len(self._memo)] = self._stack[-1]
            elif name == "STOP":
                return self._stack.pop()
            elif name not in ("PROTO", "FRAME"):
                self._apply(name, arg)
        raise EOFError("it is truncated")

    def _take(self, name: str, arg: Any, items: list[Any]) -> None:
        """Executes an opcode that takes all items above the last mark."""
        if name == "TUPLE":
            self._stack.append(tuple(items))
        elif name in ("LIST", "FROZENSET"):  # members of a set are not hashed
            self._stack.append(items)
        elif name == "DICT":
            self._stack.append(_filled({}, items))
        elif name == "SETITEMS":
            _filled(self._stack[-1], items)
        elif name in ("APPENDS", "ADDITEMS"):
            _extend(self._stack[-1], items)
        elif name == "OBJ":
            self._stack.append(self._call(items[0], tuple(items[1:])))
        elif name == "INST":
            self._stack.append(self._call(Inert(arg.replace(" ", ".", 1)), tuple(items)))

    def _apply(self, name: str, arg: Any) -> None:
        """Executes an opcode that takes a fixed number of items."""
        stack = self._stack
        if name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(items[::-1]))
            return
        if name == "GLOBAL":
            stack.append(Inert(arg.replace(" ", ".", 1)))
            return
        if name == "PERSID":
            stack.append(self._persistent(arg))
            return
        last = stack.pop()
        if name == "DUP":
            stack += [last, last]
        elif name == "APPEND":
            _extend(stack[-1], [last])
        elif name == "SETITEM":
            key = stack.pop()
            _filled(stack[-1], [key, last])
        elif name == "STACK_GLOBAL":
            module = stack.pop()
            if not isinstance(module, str) or not isinstance(last, str):
                raise ValueError("a name that is not text")
            self.spend(len(module) + len(last))
            stack.append(Inert(f"{module}.{last}"))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self._call(stack.pop(), last))
        elif name == "NEWOBJ_EX":
            args = stack.pop()
            stack.append(self._call(stack.pop(), args))
        elif name == "BUILD":
            self._build(stack[-1], last)
        elif name == "BINPERSID":
            stack.append(self._persistent(last))
        elif name != "POP":
            raise ValueError(f"opcode {name}")

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Inert) or not isinstance(args, tuple):
            raise ValueError("a call of something other than a function")
        known = self._functions.get(function.name)
        return Inert(function.name, args) if known is None else known(*args)

    def _build(self, built: Any, state: Any) -> None:
        """Gives an object its state."""
        if isinstance(built, Inert):
            built.state = state
        elif isinstance(built, _Dtype):
            built.set_order(state)
        elif id(built) in self._unbuilt:
            _, shape, dtype, fortran, data = state
            data = _data(data)
            view = self._view(data, dtype, shape, "C")
            state = 1, view.shape, view.dtype, bool(fortran), data
            self._unbuilt.pop(id(built)).__setstate__(state)
        elif not isinstance(built, dict):  # an OrderedDict's attributes, such as torch's _metadata
            raise ValueError("a state for a number or a container")

    def _persistent(self, identity: Any) -> Any:
        """A tensor's storage."""
        if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
            return Inert(args=(identity,))
        kind, key = identity[1:3]
        if not isinstance(kind, Inert) or not isinstance(key, str | int) or self._storage is None:
            raise ValueError("a storage without a kind or a name")
        return self._storage(kind.name.rpartition(".")[2], str(key))

    def _tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, *unused: Any
    ) -> np.ndarray | None:
        """A tensor as a view of its storage; None if the storage is not of weights."""
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without a storage")
        data = storage.data
        if data is None:
            return None
        # Python's integers don't overflow.
        offset, size, stride = operator.index(offset), _integers(size), _integers(stride)
        if min((offset, *size, *stride)) < 0 or len(size) != len(stride):
            raise ValueError("a tensor with a negative size")
        if 0 in size:
            return np.zeros(size, data.dtype)
        reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = math.prod(size)
        if offset + reach >= len(data) or count > len(data):
            raise ValueError("a tensor that reaches beyond its storage")
        self.spend(count * data.itemsize)
        strides = tuple(step * data.itemsize for step in stride)
        return np.array(np.lib.stride_tricks.as_strided(data[offset:], size, strides))

    def _array(self, *unused: Any) -> np.ndarray:
        """NumPy's array; its data follow as its state."""
        array = np.zeros(0, np.uint8)
        self._unbuilt[id(array)] = array
        return array

    def _view(self, data: bytes, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        """Bytes as an array, whose length is checked."""
        if not isinstance(dtype, _Dtype):
            raise ValueError("an array with an unknown dtype")
        self.spend(len(data))
        shape = _integers(shape)
        return np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")

    def _from_buffer(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        """NumPy's array in a pickle of protocol 5."""
        return np.array(self._view(_data(data), dtype, shape, order))

    def _scalar(self, dtype: Any, data: Any = b"") -> Any:
        """A NumPy scalar."""
        return self._view(_data(data), dtype, (), "C")[()]

    def _bytes(self, *args: Any) -> bytes:
        """Bytes in pickles of protocols 0 to 2, which store them as text."""
        text = args[0] if args else ""
        if not isinstance(text, str):
            raise ValueError("bytes from something other than text")
        self.spend(len(text))
        return text.encode("latin1")

    def _ordered(self, pairs: Any = ()) -> dict[Any, Any]:
        """An OrderedDict, whose pairs old protocols store as its argument."""
        if not isinstance(pairs, list | tuple):
            raise ValueError("a dict of something other than pairs")
        self.spend(2 * len(pairs) * _OPCODE)
        return _filled({}, [part for pair in pairs for part in _pair(pair)])


def _data(data: Any) -> bytes:
    """An array's bytes, which old protocols store as text."""
    if isinstance(data, str):
        return data.encode("latin1")
    if not isinstance(data, bytes | bytearray):
        raise ValueError("an array of objects")
    return bytes(data)


def _pair(pair: Any) -> Any:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ValueError("a dict of something other than pairs")
    return pair


def _filled(container: Any, items: list[Any]) -> Any:
    """Adds keys and values, alternating."""
    if isinstance(container, Inert):
        container.items += items
        return container
    if not isinstance(container, dict) or len(items) % 2:
        raise ValueError("items of something other than a dict")
    for key in items[::2]:
        if not isinstance(key, _KEYS) or isinstance(key, int) and key.bit_length() > _KEY_BITS:
            raise ValueError(f"a dict with a key of type {type(key).__name__}")
    container.update(zip(items[::2], items[1::2], strict=True))
    return container


def _extend(container: Any, items: list[Any]) -> None:
    if isinstance(container, Inert):
        container = container.items
    if not isinstance(container, list):
        raise ValueError("members of something other than a list")
    container += items


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        raise ValueError("a shape that is not a tuple")
    return tuple(operator.index(value) for value in values)


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
      UserError: the file is not a pickle, or is corrupt, or describes huge objects.
    """
    return _reading(file, lambda opened, size: _Reader(size).load(_Bounded(opened, size)))


def read_torch(file: Path) -> Any:
    """Reads a file of `torch.save`, with tensors as arrays.

    Args:
      file: in the zip format, or in the one before PyTorch 1.6.

    Returns:
      Dicts, lists and tuples of arrays and plain values; everything else is `Inert`. Sets are
      lists.

    Raises:
      UserError: the file is not of PyTorch, or is corrupt, or describes huge objects.
    """
    return _reading(file, _from_zip if zipfile.is_zipfile(file) else _from_legacy)


def _reading(file: Path, read: Callable[[BinaryIO, int], Any]) -> Any:
    try:
        # Odd escapes in texts are warnings.
        with file.open("rb") as opened, warnings.catch_warnings(action="ignore"):
            return read(opened, file.stat().st_size)
    except _ERRORS as error:
        reason = first_line(error)[:200]
        raise UserError(
            f"Cannot read {file} ({reason}): download it again, or save only a model's state_dict."
        ) from error


def _from_zip(opened: BinaryIO, size: int) -> Any:
    storages: dict[str, _Storage] = {}
    with zipfile.ZipFile(opened) as archive:

        def member(name: str) -> bytes:
            info = archive.getinfo(name)
            stored = info.compress_type == zipfile.ZIP_STORED
            # PyTorch compresses nothing; a compressed file may be thousands of times larger.
            if not stored or not info.file_size == info.compress_size <= size:
                raise ValueError("its archive is compressed or has wrong sizes")
            reader.spend(info.file_size)
            return archive.read(info)

        def storage(kind: str, key: str) -> _Storage:
            if key not in storages:
                dtype = _DTYPES.get(kind)
                known = dtype is not None
                data = np.frombuffer(member(f"{root}data/{key}"), dtype) if known else None
                storages[key] = _Storage(data)
            return storages[key]

        reader = _Reader(size, storage)
        (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        root = pickled.removesuffix("data.pkl")
        order = f"{root}byteorder"
        if order in archive.namelist() and member(order) != b"little":
            raise ValueError("it is big-endian")
        return reader.load(io.BytesIO(member(pickled)))


def _from_legacy(opened: BinaryIO, size: int) -> Any:
    """Reads the format in which the storages follow the objects, which are read twice."""
    storages: dict[str, _Storage] = {}
    kinds: dict[str, str] = {}

    def storage(kind: str, key: str) -> _Storage:
        kinds.setdefault(key, kind)
        return storages.setdefault(key, _Storage(None))

    stream = _Bounded(opened, size)
    reader = _Reader(size, storage)
    if reader.load(stream) != _LEGACY_MAGIC:
        raise ValueError("it is not a PyTorch file")
    reader.load(stream), reader.load(stream)  # the protocol, the machine
    start = opened.tell()
    reader.load(stream)
    keys = reader.load(stream)
    if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
        raise ValueError("storages without names")
    for key in map(str, keys):
        dtype = _DTYPES.get(kinds[key])
        (count,) = struct.unpack("<q", stream.read(8))
        if dtype is None or count < 0:
            raise ValueError("a storage of an unknown dtype")
        data = stream.read(count * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise EOFError("it is truncated")
        storages[key].data = np.frombuffer(data, dtype)
    opened.seek(start)
    return _Reader(size, storage).load(stream)
