"""Pickles are read as data: nothing in them is called."""

import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from pickles import EXPENSIVE, HOSTILE, Crafted
from torch_files import legacy_file, tensor, torch_file

from ssl_jax.errors import UserError
from ssl_jax.interop import pickled
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
def test_functions_in_a_pickle_are_never_called(tmp_path, call, protocol):
    function, text, *rest = call
    mark = tmp_path / "called"
    file = tmp_path / "a.pkl"
    value = {"x": Malicious(function, text.format(mark), *rest), "y": np.arange(3)}
    file.write_bytes(pickle.dumps(value, protocol))
    found = read_pickle(file)
    assert not mark.exists()
    assert isinstance(found["x"], Inert)
    np.testing.assert_array_equal(found["y"], np.arange(3))


def test_arrays_and_containers_round_trip(tmp_path):
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


# Files in PyTorch's formats, by `torch_files`; `tests/peers` reads files written by PyTorch.

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("write", [torch_file, legacy_file])
def test_tensors_are_views_of_their_storage(tmp_path, write):
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
def test_tensors_beyond_their_storage_are_refused(tmp_path, write, part):
    file = write(tmp_path / "a.pth", {"x": tensor(VALUES, **part)}, {"0": VALUES})
    with pytest.raises(UserError, match="Cannot read .*a.pth"):
        read_torch(file)


@pytest.mark.parametrize("write", [torch_file, legacy_file])
def test_truncated_or_unrelated_files_are_one_line_errors(tmp_path, write):
    file = write(tmp_path / "a.pth", {"x": tensor(VALUES)}, {"0": VALUES})
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            read_weights(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(b"no pickle at all")
    with pytest.raises(UserError, match="contains no weights: give a .safetensors file"):
        read_weights(file)
    write(file, {"state_dict": {"epoch": 3}}, {})
    with pytest.raises(UserError, match="contains no named weights"):
        read_weights(file)


def test_archive_with_corrupt_names_is_refused(tmp_path):
    file = torch_file(tmp_path / "a.pth", {"x": tensor(VALUES)}, {"0": VALUES})
    data = bytearray(file.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 9] |= 8  # marks the name as UTF-8,
    data[entry + 46] = 0x89  # which can't start with this byte
    file.write_bytes(data)
    with pytest.raises(UserError, match="Cannot read .*a.pth"):
        read_weights(file)


def test_pickle_without_byol_parameters_is_refused(tmp_path):
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps({"params": np.zeros(3)}))
    with pytest.raises(UserError, match="no parameters and state of BYOL's Haiku ResNet"):
        read_weights(file)


def test_unknown_kind_suggests_the_closest_one(tmp_path):
    with pytest.raises(UserError, match="Unknown kind of weights 'mocco'. Did you mean 'moco'"):
        read_weights(tmp_path, "mocco")
    with pytest.raises(UserError, match="is not a file of weights"):
        read_weights(tmp_path / "none.pth")


@pytest.mark.parametrize("name", EXPENSIVE)
def test_small_pickles_of_huge_objects_are_refused_without_building_them(tmp_path, name):
    file = tmp_path / "a.pkl"
    file.write_bytes(Crafted(EXPENSIVE[name]).data)
    if name in ("a huge memo index", "many uses of the same bytes"):  # the others are slow to trace
        tracemalloc.start()
    try:
        with pytest.raises(UserError, match="Cannot read .*a.pkl|no parameters and state of BYOL"):
            read_weights(file)
        assert tracemalloc.get_traced_memory()[1] < 1e8
    finally:
        tracemalloc.stop()


def test_containers_count_toward_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(pickled, "_CONSTANT", 2**16)
    (tmp_path / "a.pkl").write_bytes(Crafted(b"]" * 10_000).data)
    with pytest.raises(UserError, match="its objects take many times the file's size"):
        read_pickle(tmp_path / "a.pkl")


def test_tensors_that_share_a_storage_are_limited_by_the_files_size(tmp_path):
    values = np.zeros(200_000, np.float32)
    state = {str(i): tensor(values) for i in range(4)}  # tied weights
    found = read_torch(torch_file(tmp_path / "a.pth", state, {"0": values}))
    assert [array.nbytes for array in found.values()] == [values.nbytes] * 4
    state = {str(i): tensor(values) for i in range(1000)}
    with pytest.raises(UserError, match="its objects take many times the file's size"):
        read_torch(torch_file(tmp_path / "a.pth", state, {"0": values}))


def test_compressed_archives_are_refused(tmp_path):
    file, values = tmp_path / "a.pth", np.zeros(10**6, np.float32)
    torch_file(file, {"x": tensor(values)}, {"0": values})
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert file.stat().st_size < 10_000
    with pytest.raises(UserError, match="its archive is compressed"):
        read_torch(file)


@pytest.mark.parametrize("name", HOSTILE)
def test_crafted_pickles_are_refused_and_change_nothing_for_the_next_file(tmp_path, name):
    file = tmp_path / "a.pkl"
    file.write_bytes(Crafted(HOSTILE[name]).data)
    with pytest.raises(UserError):
        read_weights(file)
    # The next file is read as usual.
    good = torch_file(tmp_path / "a.pth", {"x": tensor(VALUES)}, {"0": VALUES})
    np.testing.assert_array_equal(read_torch(good)["x"], VALUES)


def test_huge_offsets_and_sizes_do_not_overflow(tmp_path):
    state = {"x": tensor(VALUES, offset=np.int64(2**63 - 10), size=(20,), stride=(1,))}
    with pytest.raises(UserError, match="reaches beyond its storage"):
        read_torch(torch_file(tmp_path / "a.pth", state, {"0": VALUES}))
    # Zero strides would spread a small storage over a huge tensor.
    state = {"x": tensor(VALUES, size=(10**6, 10**6), stride=(0, 0))}
    with pytest.raises(UserError, match="reaches beyond its storage"):
        read_torch(torch_file(tmp_path / "a.pth", state, {"0": VALUES}))


def test_shared_and_cyclic_containers_keep_their_identity(tmp_path):
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
