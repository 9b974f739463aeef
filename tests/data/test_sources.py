import numpy as np
import pytest
from tiny import random_source, tiny_config

from ssl_jax.config import default_config, validate
from ssl_jax.data.sources import Subset, held_out_ids, make_sources, stratified_subset
from ssl_jax.errors import UserError


def test_stratified_subset_is_balanced_and_depends_only_on_the_seed():
    labels = np.random.default_rng(0).choice(4, size=400, p=[0.4, 0.3, 0.2, 0.1])
    ids = stratified_subset(labels, 0.1)
    assert (np.bincount(labels[ids]) == 10).all()
    assert (ids == stratified_subset(labels, 0.1)).all() and (np.diff(ids) > 0).all()
    assert set(ids) <= set(stratified_subset(labels, 0.2))
    assert set(ids) != set(stratified_subset(labels, 0.1, seed=1))
    # Too small classes are used whole, and every class has at least one image.
    assert np.bincount(labels[stratified_subset(labels, 0.6)]).min() == np.bincount(labels).min()
    assert (np.bincount(labels[stratified_subset(labels, 1e-6)]) == 1).all()


def test_held_out_ids_are_a_share_of_each_class_and_never_a_whole_class():
    labels = np.repeat([0, 1, 2, -1], [100, 21, 1, 10])
    ids = held_out_ids(labels, len(labels), 0.1)
    assert np.bincount(labels[ids] + 1).tolist() == [1, 10, 2]
    assert (np.diff(ids) > 0).all() and (ids == held_out_ids(labels, len(labels), 0.1)).all()
    assert len(held_out_ids(None, 50, 0.1)) == 5


def test_validation_images_are_disjoint_from_every_training_subset():
    config = default_config()
    config.data.validation = 0.2
    train, held = make_sources(config)
    whole, _ = make_sources(default_config())
    assert (train.num_examples, held.num_examples) == (1078, 269)
    both = np.concatenate([train.eval_transform(range(1078)), held.eval_transform(range(269))])
    assert sorted(x.tobytes() for x in both) == sorted(x.tobytes() for x in whole.images)
    config.data.update(subset=0.1, subset_seed=3)
    few, same = make_sources(config)
    assert same.fingerprint == held.fingerprint and few.num_examples == 110
    config.data.validation = 1e-9
    with pytest.raises(UserError, match="config.data.validation=1e-09 holds out none of 1347"):
        make_sources(config)


def test_subset_renumbers_the_images_of_its_source():
    source = random_source()
    subset = Subset(source, np.array([5, 9, 40]))
    assert subset.num_examples == 3 and subset.num_classes == source.num_classes
    assert (subset.labels == source.labels[[5, 9, 40]]).all()
    assert (subset.device_data()["image"] == source.images[[5, 9, 40]]).all()
    assert (subset.eval_transform([2, 0]) == source.images[[40, 5]]).all()
    (batch,) = subset.batches(iter([(0, np.array([2, 1]))]))
    assert (batch["id"] == [2, 1]).all() and (batch["label"] == source.labels[[40, 9]]).all()
    assert subset.fingerprint != Subset(source, np.array([5, 9, 41])).fingerprint


def test_subset_of_a_folder_reads_its_own_files(tmp_path):
    from images import fill

    fill(tmp_path / "images", per_class=8)
    config = tiny_config(batch_size=4)
    config.data.update(name="folder", dir=str(tmp_path / "images"), subset=0.5)
    train, _ = make_sources(config)
    whole = tiny_config(batch_size=4)
    whole.data.update(name="folder", dir=str(tmp_path / "images"))
    source, _ = make_sources(whole)
    kept = stratified_subset(source.labels, 0.5)
    assert train.num_examples == len(kept) < source.num_examples
    np.testing.assert_array_equal(
        train.eval_transform(np.arange(3)), source.eval_transform(kept[:3])
    )
    ids = np.array([3, 0, 2, 1], np.int32)
    (mine,) = train.batches(iter([(7, ids)]))
    assert (mine["id"] == ids).all() and (mine["label"] == source.labels[kept[ids]]).all()


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_subset_share_out_of_range_raises_user_error(share):
    config = tiny_config()
    config.data.subset = share
    with pytest.raises(UserError, match="config.data.subset is .* above 0 and at most 1"):
        validate(config)
