"""Writes PyTorch's file formats without PyTorch."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict


class _Storage:
    def __init__(self, identity):
        self.identity = identity


class _Rebuild:
    """Pickles as a call of torch's function, which is not installed."""

    def __init__(self, storage, offset, size, stride):
        self.arguments = (storage, offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return _rebuild_tensor_v2, self.arguments


def _rebuild_tensor_v2(*args):
    raise AssertionError("only its name is pickled")


class FloatStorage:
    pass


_rebuild_tensor_v2.__module__ = "torch._utils"
FloatStorage.__module__ = "torch"


def _dumps(value):
    class Pickler(pickle._Pickler):  # Python's own, as C's looks up every global
        def persistent_id(self, each):
            return each.identity if isinstance(each, _Storage) else None

        def save_global(self, value, name=None):
            self.write(f"c{value.__module__}\n{value.__name__}\n".encode())

        dispatch = dict(pickle._Pickler.dispatch)
        dispatch[type(_rebuild_tensor_v2)] = save_global
        dispatch[type] = save_global

    out = io.BytesIO()
    Pickler(out, 2).dump(value)
    return out.getvalue()


def tensor(values, key="0", count=None, offset=0, size=None, stride=None):
    """A stand-in for a tensor in a state dict, a view of the storage with that key."""
    identity = ("storage", FloatStorage, key, "cpu", count or values.size)
    size = values.shape if size is None else size
    stride = tuple(s // 4 for s in values.strides) if stride is None else stride
    return _Rebuild(_Storage(identity), offset, size, stride)


def torch_file(path, state, storages):
    """Writes an archive like `torch.save`; storages are arrays by key."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", _dumps(state))
        archive.writestr("net/byteorder", b"little")
        for key, values in storages.items():
            archive.writestr(f"net/data/{key}", values.tobytes())
    return path


def legacy_file(path, state, storages):
    """Writes the format before PyTorch 1.6."""
    parts = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [_dumps(state), pickle.dumps(list(storages), 2)]
    for values in storages.values():
        parts += [struct.pack("<q", values.size), values.tobytes()]
    path.write_bytes(b"".join(parts))
    return path
