"""Messages advise what works: each test follows the advice and expects success."""

import re

import pytest
from tiny import method_config

from ssl_jax.config import apply_overrides
from ssl_jax.errors import UserError
from ssl_jax.train.setup import Setup


def configured(method, *overrides):
    config = method_config(method)
    config.data.num_classes = 0
    return apply_overrides(config, overrides)


@pytest.mark.parametrize(
    ("method", "wrong", "advised", "override"),
    [
        ("simclr", ("batch_size=4000",), r"--config\.(batch_size=\d+),", "{}"),
        ("simclr", ("batch_size=161",), r"such as (\d+)\.", "batch_size={}"),
        ("simclr", ("microbatch=12",), r"Use a divisor, or (0)", "microbatch={}"),
        ("simclr", ("microbatch=4",), r"such as (\d+)\.", "microbatch={}"),
        ("simclr", ("model.bn_group_size=3",), r"or (0) for all", "model.bn_group_size={}"),
        (
            "simclr",
            ("model.bn_group_size=1", "model.bn_splits=6"),
            r"such as (\d+)\.",
            "model.bn_splits={}",
        ),
        (
            "simclr",
            ("model.bn_splits=4", "batch_size=64"),
            r"Set config\.(\S+=1),",
            "{}",
        ),
        (
            "moco",
            ("moco.symmetric=True", "moco.shared_queue=True"),
            r"such as (\d+)\.",
            "moco.queue={}",
        ),
        ("simclr", ("data.num_classes=3",), r"Set it to (\d+),", "data.num_classes={}"),
        ("simclr", ("method=simcl",), r"Did you mean '(\w+)'", "method={}"),
        ("simclr", ("optim.warmup=3",), r"Did you mean '(\w+)'", "optim.{}=3"),
        ("simclr", ("wandb=False",), r"--config\.(wandb=) for none", "{}"),
        ("simclr", ("steps=0", "epochs=0"), r"(Set) one of them", "epochs=1"),
        ("moco", ("moco.queue=100",), r"such as (\d+)\.", "moco.queue={}"),
        ("moco", ("views.view1.count=2",), r"name (two) with count 1", "views.view1.count=1"),
        ("swav", ("swav.queue=100",), r"it must be (0) or", "swav.queue={}"),
    ],
)
def test_advice_about_the_config_is_accepted(method, wrong, advised, override):
    with pytest.raises(UserError) as caught:
        Setup(configured(method, *wrong))
    (value,) = re.findall(advised, str(caught.value))
    Setup(configured(method, *wrong[:-1], override.format(value)))


def test_swav_with_one_crop_is_refused_and_its_advice_is_accepted():
    """Its loss would be NaN, which would be blamed on the learning rate."""
    config = method_config("swav")
    config.data.num_classes = 0
    with config.unlocked():
        config.views = {"large": config.views.a_large}
    with pytest.raises(UserError, match="config.views has one crop, but SwAV predicts") as caught:
        apply_overrides(config, [])
    (advice,) = re.findall(r"--config\.(views\.\S+=2),", str(caught.value))
    Setup(apply_overrides(config, [advice]))
