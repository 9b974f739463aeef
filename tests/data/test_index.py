import zlib

import jax
import numpy as np
import pytest

from ssl_jax.data.index import (
    Index,
    _indices_of_epoch,
    example_keys,
    permutation,
    stream_key,
    view_keys,
    views_stream,
)


def test_epoch_repeats_no_sample_and_drops_less_than_a_batch():
    index = Index(num_examples=103, batch_size=10, seed=1)
    for epoch in range(3):
        steps = range(epoch * 10, (epoch + 1) * 10)
        seen = np.concatenate([index.ids(step) for step in steps])
        assert len(np.unique(seen)) == len(seen) == 100
        assert seen.min() >= 0 and seen.max() < 103


def test_epochs_drop_different_samples():
    left_out = [set(range(103)) - set(permutation(1, e, 103)[:100].tolist()) for e in range(3)]
    assert left_out[0] != left_out[1] != left_out[2]


def test_epoch_sees_all_samples_if_the_batch_size_divides_them():
    index = Index(num_examples=100, batch_size=10, seed=1)
    assert sorted(np.concatenate([index.ids(s) for s in range(10)])) == list(range(100))


def test_permutation_depends_only_on_seed_and_epoch():
    assert not np.array_equal(permutation(0, 0, 50), permutation(1, 0, 50))
    assert not np.array_equal(permutation(0, 0, 50), permutation(0, 1, 50))
    # Recorded: the order must be the same on every machine and in every version.
    assert permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    far = Index(1000, 7, seed=3).ids(12345)
    _indices_of_epoch.cache_clear()
    assert np.array_equal(Index(1000, 7, seed=3).ids(12345), far)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_shares_partition_the_global_batch(processes):
    index = Index(num_examples=64, batch_size=16, seed=0)
    rows = np.random.default_rng(0).permutation(16).reshape(processes, -1)
    shares = [index.local_ids(3, share) for share in rows]
    for share, held in zip(shares, rows, strict=True):
        assert np.array_equal(share, index.ids(3)[held])
    assert sorted(np.concatenate(shares)) == sorted(index.ids(3))


def test_process_caches_only_its_share_of_an_epoch():
    index = Index(num_examples=1_000, batch_size=16, seed=0)
    kept = index.local_ids(3, np.array([2, 5], np.int32))
    assert kept.base.shape == (62, 2) and kept.base.base is None  # 62 steps


def test_permutations_are_uniform():
    # Where id 0 ends up over 2,000 epochs of 10: chi-square, 9 degrees of freedom, p = 1e-4.
    at = [permutation(0, e, 10).tolist().index(0) for e in range(2000)]
    counts = np.bincount(at, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 33.7


def test_keys_differ_by_stream_step_and_id():
    key = jax.random.key(0)
    keys = [
        stream_key(key, "views", 0),
        stream_key(key, "views", 1),
        stream_key(key, "forward", 0),
        *example_keys(stream_key(key, "views", 0), np.arange(3)),
    ]
    data = {tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}
    assert len(data) == len(keys)


def test_example_key_is_independent_of_the_position_in_the_batch():
    key = jax.random.key(1)
    single = example_keys(key, np.array([7]))[0]
    in_batch = example_keys(key, np.array([3, 9, 7]))[2]
    assert np.array_equal(jax.random.key_data(single), jax.random.key_data(in_batch))


def test_view_key_is_folded_from_stream_step_id_and_number():
    expected = jax.random.key(1)
    for data in (zlib.crc32(b"views"), 5, 7, 2):
        expected = jax.random.fold_in(expected, data)
    of_view = view_keys(views_stream(jax.random.key(1), 5), np.array([3, 7]), 2)[1]
    assert np.array_equal(jax.random.key_data(of_view), jax.random.key_data(expected))
