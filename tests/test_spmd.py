"""The device mesh: divisibility, placement, and maps by shard_map and pmap."""

import jax
import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.spmd import AXIS, Spmd, device_groups, make_spmd, microbatches


def test_batch_that_devices_do_not_divide_is_refused():
    with pytest.raises(UserError, match="batch_size is 30, which 8 devices .*such as 24"):
        make_spmd("shard_map", batch_size=30)
    with pytest.raises(UserError, match="such as 8"):
        make_spmd("shard_map", batch_size=3)
    with pytest.raises(UserError, match="such as 2147483640"):
        make_spmd("shard_map", batch_size=2147483647)


@pytest.mark.parametrize(("batch_size", "devices"), [(96, 8), (96, 1), (97, 1), (1, 1), (144, 6)])
def test_microbatches_divide_the_batch_evenly_over_the_devices(batch_size, devices):
    for most in (0, 7, batch_size // 2, batch_size):
        expected = [n for n in range(1, most + 1) if batch_size % n == 0 and n % devices == 0]
        assert microbatches(batch_size, devices, most) == expected


def test_pmap_in_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"config.spmd is 'pmap'.* there are 2\. Use 'shard_map'"):
        make_spmd("pmap", batch_size=32)


def test_local_indices_are_those_of_the_process_devices():
    spmd = make_spmd()
    assert spmd.local_indices(16).tolist() == list(range(16))

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    class Elsewhere:
        # In a mesh in torus order, a process's devices need not be adjacent.
        devices = np.array([Device(p) for p in (0, 1, 1, 0)])
        size = 4

    assert Spmd(Elsewhere()).local_indices(8).tolist() == [0, 1, 6, 7]


def test_device_groups_are_consecutive_and_divide_the_devices():
    assert device_groups(8, 0) is None
    assert device_groups(8, 8) is None
    assert device_groups(4, 2) == ((0, 1), (2, 3))
    assert device_groups(2, 1) == ((0,), (1,))
    with pytest.raises(UserError, match="bn_group_size is 3, which does not divide 8 devices"):
        device_groups(8, 3)


@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_shard_map_and_pmap_give_the_same_results(mode):
    spmd = make_spmd(mode)

    def per_device(state, batch):
        assert batch["x"].shape == (2, 3)
        total = jax.lax.psum(batch["x"].sum(), AXIS)
        return state + total, batch["x"] * 2

    mapped = spmd.map(per_device, ("replicated", "sharded"), ("replicated", "sharded"), donate=(0,))
    x = np.arange(48.0, dtype=np.float32).reshape(16, 3)
    state = spmd.replicate(np.ones(2, np.float32))
    new, doubled = mapped(state, spmd.place_batch({"x": x}))
    np.testing.assert_allclose(new, 1 + x.sum())
    np.testing.assert_allclose(doubled, 2 * x)
    assert state.is_deleted()
    only = spmd.map(lambda batch: batch + 1, ("sharded",), "sharded")
    np.testing.assert_allclose(only(spmd.place_batch(x)), x + 1)


def test_replicated_arrays_are_copies():
    spmd = make_spmd("shard_map", jax.devices()[:1])
    source = np.zeros(4, np.float32)
    placed = spmd.replicate({"a": source})["a"]
    source += 1
    np.testing.assert_array_equal(placed, 0)


def test_batch_is_placed_in_the_order_of_the_devices():
    spmd = make_spmd()
    placed = spmd.place_batch(np.arange(16))
    by_device = {s.device: np.asarray(s.data) for s in placed.addressable_shards}
    for position, device in enumerate(spmd.mesh.devices.flat):
        assert by_device[device].tolist() == [2 * position, 2 * position + 1]
