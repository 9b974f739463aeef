"""Pickles are data here: whatever they ask to be called isn't."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
from torch_files import legacy_file, tensor, torch_file

from ssl_jax.errors import UserError
from ssl_jax.interop.import_weights import read_weights
from ssl_jax.interop.pickled import Inert, read_pickle, read_torch


class Malicious:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch {}"),
        (eval, "open('{}', 'w')"),
        (exec, "open('{}', 'w')"),
        (open, "{}", "w"),
    ],
    ids=["system", "eval", "exec", "open"],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nothing_is_called(tmp_path, call, protocol):
    function, text, *rest = call
    mark = tmp_path / "called"
    file = tmp_path / "a.pkl"
    value = {"x": Malicious(function, text.format(mark), *rest), "y": np.arange(3)}
    file.write_bytes(pickle.dumps(value, protocol))
    found = read_pickle(file)
    assert not mark.exists()
    assert isinstance(found["x"], Inert)
    np.testing.assert_array_equal(found["y"], np.arange(3))


def test_arrays_and_containers_are_what_they_were(tmp_path):
    value = OrderedDict(
        a=np.float32([[1, 2], [3, 4]]).T, b=[np.int64(3), (1, "x", None, True)], c={"d": b"bytes"}
    )
    for protocol in (0, 2, 4):
        file = tmp_path / f"{protocol}.pkl"
        file.write_bytes(pickle.dumps(value, protocol))
        found = read_pickle(file)
        np.testing.assert_array_equal(found["a"], value["a"])
        assert found["b"][0] == 3 and found["b"][1] == (1, "x", None, True)
        assert found["c"] == {"d": b"bytes"}


# PyTorch's formats, see `torch_files`; `tests/peers` has files of PyTorch's own.

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("write", [torch_file, legacy_file])
def test_tensors_are_cut_from_their_storages(tmp_path, write):
    state = {"whole": tensor(VALUES), "column": tensor(VALUES, offset=1, size=(2,), stride=(3,))}
    found = read_torch(write(tmp_path / "a.pth", {"state_dict": state}, {"0": VALUES}))
    np.testing.assert_array_equal(found["state_dict"]["whole"], VALUES)
    np.testing.assert_array_equal(found["state_dict"]["column"], VALUES[:, 1])


@pytest.mark.parametrize("write", [torch_file, legacy_file])
@pytest.mark.parametrize(
    "part",
    [
        {"size": (3, 3), "stride": (3, 1)},
        {"offset": -1},
        {"size": (2,), "stride": (-1,)},
        {"size": (2,), "stride": (1, 1)},
        {"offset": 10**12},
    ],
    ids=str,
)
def test_tensors_reach_no_further_than_their_storages(tmp_path, write, part):
    file = write(tmp_path / "a.pth", {"x": tensor(VALUES, **part)}, {"0": VALUES})
    with pytest.raises(UserError, match="a.pth can't be read"):
        read_torch(file)


@pytest.mark.parametrize("write", [torch_file, legacy_file])
def test_a_file_cut_short_or_of_something_else_is_one_sentence(tmp_path, write):
    file = write(tmp_path / "a.pth", {"x": tensor(VALUES)}, {"0": VALUES})
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            read_weights(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(b"no pickle at all")
    with pytest.raises(UserError, match="holds no weights: give a .safetensors file"):
        read_weights(file)
    write(file, {"state_dict": {"epoch": 3}}, {})
    with pytest.raises(UserError, match="holds no weights by name"):
        read_weights(file)


def test_an_archive_whose_names_are_corrupt_is_one_sentence(tmp_path):
    file = torch_file(tmp_path / "a.pth", {"x": tensor(VALUES)}, {"0": VALUES})
    data = bytearray(file.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 9] |= 8  # the name is in UTF-8,
    data[entry + 46] = 0x89  # which this can't begin
    file.write_bytes(data)
    with pytest.raises(UserError, match="a.pth can't be read"):
        read_weights(file)


def test_a_pickle_without_byols_trees_is_told(tmp_path):
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps({"params": np.zeros(3)}))
    with pytest.raises(UserError, match="no parameters and state of BYOL's Haiku ResNet"):
        read_weights(file)


def test_an_unknown_kind_is_told_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="no kind 'mocco' of weights. Did you mean 'moco'"):
        read_weights(tmp_path, "mocco")
    with pytest.raises(UserError, match="There is no file of weights"):
        read_weights(tmp_path / "none.pth")


class Crafted:
    """A pickle written opcode by opcode."""

    def __init__(self, *parts):
        self.data = b"\x80\x02" + b"".join(parts) + b"."


def called(module, name, *arguments):
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def number(value):
    return f"I{value}\n".encode()


def text(value):
    return f"V{value}\n".encode()


HOSTILE = {
    # An array of objects, whose bytes would be taken for pointers.
    "pointers": called("numpy", "dtype", text("O8"), number(0), number(1)),
    "pointers in a dtype's state": called("numpy", "dtype", text("f8"))
    + b"("
    + number(3)
    + text("|")
    + b"NN"
    + number(-1)
    + number(-1)
    + number(63)
    + b"tb",
    "a changed factory": b"ctorch._utils\n_rebuild_tensor_v2\n}("
    + text("array")
    + number(1)
    + b"ub",
    "a changed class": called("torch._utils", "_rebuild_tensor_v2", number(1)) + b"}b",
    "an attribute of a builtin": called("builtins", "getattr", b"cos\nsystem\n", text("x")),
    "an array without numbers": called(
        "numpy.core.multiarray",
        "_reconstruct",
        b"cnumpy\nndarray\n",
        b"(" + number(0) + b"t",
        b"Vb\n",
    ),
    "deep": b"(" * 50_000 + b"t" * 50_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_crafted_gives_inert_things_or_one_sentence(tmp_path, name):
    file = tmp_path / "a.pkl"
    file.write_bytes(Crafted(HOSTILE[name]).data)
    with pytest.raises(UserError):
        read_weights(file)
    # Nothing stays changed for the next file.
    good = torch_file(tmp_path / "a.pth", {"x": tensor(VALUES)}, {"0": VALUES})
    np.testing.assert_array_equal(read_torch(good)["x"], VALUES)


def test_offsets_do_not_wrap_around(tmp_path):
    state = {"x": tensor(VALUES, offset=np.int64(2**63 - 10), size=(20,), stride=(1,))}
    with pytest.raises(UserError, match="reaches beyond its storage"):
        read_torch(torch_file(tmp_path / "a.pth", state, {"0": VALUES}))
    # Nor is a small storage spread over a huge tensor.
    state = {"x": tensor(VALUES, size=(10**6, 10**6), stride=(0, 0))}
    with pytest.raises(UserError, match="reaches beyond its storage"):
        read_torch(torch_file(tmp_path / "a.pth", state, {"0": VALUES}))


def test_shared_containers_are_read_once(tmp_path):
    value = np.float32([1.0])
    for _ in range(60):
        value = [value, value]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"x": value}))
    found = read_pickle(tmp_path / "a.pkl")["x"]
    assert found[0] is found[1]
    cyclic = []
    cyclic.append(cyclic)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(cyclic))
    found = read_pickle(tmp_path / "b.pkl")
    assert found[0] is found
    with pytest.raises(UserError, match="BYOL's Haiku ResNet"):
        read_weights(tmp_path / "b.pkl")
