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
        ("eval.labels_per_class=(1, 5),(10,)", ("eval.labels_per_class", ["(1, 5)", "(10,)"])),
    ],
)
def test_axis_is_split_at_commas_outside_of_brackets(text, axis):
    assert parse_axis(text) == axis


@pytest.mark.parametrize("text", ["optim.lr", "=1,2", "seed=", "seed=1,,2", "seed=1,1"])
def test_malformed_axis_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not KEY=VALUE|has a value twice"):
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
    assert setting.name == "views.view1.gray_0.1_views.view2.gray_0.2_wandb_a-b-c"


@pytest.mark.parametrize(
    ("overrides", "grid", "words"),
    [
        ([], [("optim.lrr", ["1"])], "no key 'lrr'"),
        ([], [("batch_size", ["256", "x"])], "batch_size takes an integer"),
        (["seed=1"], [("seed", ["0"])], "set by --config.seed and by --grid. Remove one"),
        ([], [("seed", ["0"]), ("seed", ["1"])], "has config.seed twice"),
        ([], [("wandb", ["a/b", "a b"])], "the same folder, wandb_a-b"),
    ],
)
def test_invalid_grid_is_refused_before_anything_runs(overrides, grid, words):
    with pytest.raises(UserError, match=words):
        make_settings(DIGITS, overrides, grid)
