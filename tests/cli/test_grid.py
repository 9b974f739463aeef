import argparse
from pathlib import Path

import pytest

from ssl_jax.cli.grid import make_settings, parse_axis
from ssl_jax.errors import UserError

DIGITS = str(Path(__file__).parents[2] / "configs" / "simclr_digits.py")


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("optim.lr=0.1,0.3", ("optim.lr", ["0.1", "0.3"])),
        ("config.seed=0", ("seed", ["0"])),
        ("--config.seed = 0, 1", ("seed", ["0", "1"])),
        ("eval.labels_per_class=(1, 5),(10,)", ("eval.labels_per_class", ["(1, 5)", "(10,)"])),
    ],
)
def test_axis_is_split_at_commas_outside_of_brackets(text, axis):
    assert parse_axis(text) == axis


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim.lr", "is not KEY=VALUE,VALUE"),
        ("=1,2", "is not KEY=VALUE,VALUE"),
        ("seed=", "'seed=' has no value, for config.seed"),
        ("seed=1,,2", "'seed=1,,2' has an empty value, .* for config.seed"),
        ("seed=1,", "has an empty value, where a comma is too many, for config.seed"),
        ("seed=1, 2,1", "has the value 1 twice"),
    ],
)
def test_malformed_axis_is_refused(text, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        parse_axis(text)


def test_settings_are_the_product_and_the_last_key_changes_fastest():
    grid = [("optim.lr", ["0.1", "1"]), ("seed", ["0", "3"])]
    settings = make_settings(DIGITS, ["batch_size=128"], grid)
    names = ["lr_0.1_seed_0", "lr_0.1_seed_3", "lr_1_seed_0", "lr_1_seed_3"]
    assert [setting.name for setting in settings] == names
    assert settings[1].overrides == ("batch_size=128", "optim.lr=0.1", "seed=3")
    for setting, lr, seed in zip(settings, (0.1, 0.1, 1.0, 1.0), (0, 3, 0, 3), strict=True):
        config = setting.config
        assert (config.optim.lr, config.seed, config.batch_size) == (lr, seed, 128)


def test_names_of_folders_have_the_whole_key_where_its_end_is_ambiguous_and_no_slashes():
    grid = [("views.view1.gray", ["0.1"]), ("views.view2.gray", ["0.2"]), ("wandb", ["a/b c"])]
    (setting,) = make_settings(DIGITS, [], grid)
    assert setting.name == "views.view1.gray_0.1_views.view2.gray_0.2_wandb_a-b-c-904d1d86"


def test_names_of_folders_differ_where_values_do():
    values = ["a/b", "ab", "a-b", "a b", "-a-b", "..", ".", "/", "é", "日本", "a.", "a", "A"]
    values += [".5", "5", "0.5", "1e-3", "1e3", "-1", "1", "+1"]
    names = [setting.name for setting in make_settings(DIGITS, [], [("wandb", values)])]
    assert len(set(names)) == len(values)
    assert not any("/" in name or name.startswith((".", "-")) for name in names)
    assert names[-8:-4] == ["wandb_.5", "wandb_5", "wandb_0.5", "wandb_1e-3"]


def test_long_names_of_folders_are_shortened_and_still_differ():
    values = ["x" * 300, "x" * 299 + "y", "日" * 200]
    first = make_settings(DIGITS, [], [("wandb", values)])
    names = [setting.name for setting in first]
    assert [name[:8] for name in names] == ["wandb_xx", "wandb_xx", "wandb_日日"]
    assert len(set(names)) == 3 and all(len(name.encode()) <= 128 for name in names)
    (again,) = make_settings(DIGITS, [], [("wandb", values[1:2])])  # in any grid
    assert again.name == names[1]


@pytest.mark.parametrize(
    ("overrides", "grid", "words"),
    [
        ([], [("optim.lrr", ["1"])], "no key 'lrr'"),
        ([], [("batch_size", ["256", "x"])], "batch_size takes an integer"),
        (["seed=1"], [("seed", ["0"])], "set by --config.seed and by --grid. Remove one"),
        ([], [("seed", ["0"]), ("seed", ["1"])], "has config.seed twice"),
        ([], [("optim.lr", [".5", "0.5"])], "optim.lr=.5 and optim.lr=0.5 are the same setting"),
        (
            [],
            [("wandb", ["a", "a_split_b"]), ("data.split", ["b_split_c", "c"])],
            "the same folder, wandb_a_split_b_split_c",
        ),
        ([], [("seed", ["0"] * 200), ("wandb", ["a"] * 51)], "has 10,200 combinations, more than"),
    ],
)
def test_invalid_grid_is_refused_before_anything_runs(overrides, grid, words):
    with pytest.raises(UserError, match=words):
        make_settings(DIGITS, overrides, grid)
