import numpy as np
import pytest
from PIL import Image
from tiny import random_source, tiny_config

from ssl_jax.config import default_config, validate
from ssl_jax.data import records
from ssl_jax.data.arrays import ArraySource
from ssl_jax.data.packed import pack
from ssl_jax.data.sources import (
    Subset,
    held_out_ids,
    labeled,
    make_sources,
    stratified_subset,
    why_not_scored,
)
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


def test_images_without_a_label_are_in_no_stratified_subset():
    labels = np.arange(120) % 4
    some = np.where(np.arange(120) % 3 == 0, labels, -1)
    ids = stratified_subset(some, 0.5)
    assert np.bincount(some[ids]).tolist() == [5, 5, 5, 5]
    assert ids.tolist() == (3 * stratified_subset(some[::3], 0.5)).tolist()


def test_labeled_leaves_out_images_without_a_label():
    whole = random_source()
    assert labeled(whole) is whole
    some = ArraySource(whole.images, np.where(np.arange(64) < 40, whole.labels, -1))
    found = labeled(some)
    assert found.num_examples == 40 and (found.labels == whole.labels[:40]).all()
    assert (found.eval_transform([0, 39]) == whole.images[[0, 39]]).all()
    none = Subset(some, np.arange(40, 64))
    assert none.labels is None and none.num_classes == 0 < Subset(some, [39, 40]).num_classes


def test_why_not_scored_names_everything_that_is_missing():
    images = random_source().images
    train, test = random_source(), random_source(seed=1)
    one, none = ArraySource(images, np.zeros(64, int), ["a"]), ArraySource(images)
    assert why_not_scored(train, test) == ""
    assert why_not_scored(train, None).startswith("There are no held-out images. Set config.data")
    both = why_not_scored(none, None)
    assert both.startswith("There are no held-out images and the training images have no labels.")
    assert "config.data.validation=0.2" in both and "one subfolder per class" in both
    assert "The training and held-out images have no labels." in why_not_scored(none, none)
    assert "The held-out images have no labels." in why_not_scored(train, none)
    assert "All training images are of one class (a)." in why_not_scored(one, one)


@pytest.mark.parametrize("kind", ["folder", "packed", "records"])
def test_either_split_may_have_no_labels(kind, tmp_path):
    if kind != "packed":
        pytest.importorskip("tensorflow")
    dirs = {name: tmp_path / name for name in ("sorted", "flat")}
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        for folder in (dirs["sorted"] / "ab"[i % 2], dirs["flat"]):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    if kind != "folder":
        write = records.convert if kind == "records" else pack
        dirs = {name: tmp_path / f"{name}.npz" for name in dirs}
        for name, path in dirs.items():
            write(str(tmp_path / name), str(path))
    config = tiny_config()
    config.data.update(name=kind, dir=str(dirs["flat"]), test_dir=str(dirs["sorted"]))
    train, test = make_sources(config)
    assert (train.labels, train.num_classes) == (None, 0) and train.class_names == ()
    assert test.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.class_names == ("a", "b")
    assert train.image_sizes([0, 5]).tolist() == [[8, 8], [8, 8]]
    config.data.update(dir=str(dirs["sorted"]), test_dir=str(dirs["flat"]))
    train, test = make_sources(config)
    assert train.num_classes == 2 and test.num_classes == 0
    assert why_not_scored(train, test).startswith("The held-out images have no labels.")


def test_splits_with_classes_in_a_different_order_are_refused(tmp_path):
    for name, classes in (("a", ["x", "y"]), ("b", ["y", "x"])):
        images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.arange(2)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels, class_names=classes)
    config = tiny_config()
    config.data.update(name="packed", dir=f"{tmp_path}/a.npz", test_dir=f"{tmp_path}/b.npz")
    with pytest.raises(UserError, match="name the same classes in a different order"):
        make_sources(config)


def test_packed_labels_beyond_the_class_names_are_refused_with_file_and_value(tmp_path):
    arrays = {"images": np.zeros((2, 8, 8, 3), np.uint8), "class_names": np.array(["x", "y"])}
    np.savez(tmp_path / "from1.npz", labels=np.array([1, 2]), **arrays)
    config = tiny_config()
    config.data.update(name="packed", dir=f"{tmp_path}/from1.npz")
    with pytest.raises(UserError, match=r"config.data.dir \(.*from1.npz\) has the label 2"):
        make_sources(config)


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
    assert subset.names([2, 0]) == ["40", "5"]
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


def test_digits_split_without_an_image_of_each_class_is_refused():
    config = default_config()
    config.data.test_fraction = 0.004
    with pytest.raises(UserError, match=r"test_fraction is 0.004, .* Use 0.01 to 0.99"):
        make_sources(config)
