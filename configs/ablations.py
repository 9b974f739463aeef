"""Ablations of the methods' parts: `ablations.py:NAME`, with a name from ABLATIONS.

Papers: SimCLR sections 3 to 5 (arXiv:2002.05709), MoCo section 3.3 (1911.05722), BYOL section 5
(2006.07733), SimSiam section 4 (2011.10566), on scikit-learn's digits; crops and colors on
CIFAR-10. Results: docs/ablations.md. Cost: one to two minutes on two CPU cores for a run on digits
(80 epochs), 4 for a run on CIFAR-10 (2 epochs), which needs --config.data.dir=PATH and
--config.data.test_dir=PATH. The variants `*-bn-per-device` are for 8 devices.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import load_config
from ssl_jax.errors import require_choice

_HERE = Path(__file__).parent
_DIGITS = {"epochs": 80.0, "eval.knn_every_epochs": 20.0, "checkpoint.every_epochs": 0.0}
_VIEWS = ("views.view1", "views.view2")
_NO_CROP = {f"{view}.crop.sampler": "none" for view in _VIEWS}
_NO_COLOR = {f"{view}.{key}": 0.0 for view in _VIEWS for key in ("jitter.prob", "gray")}
# On CIFAR-10 the last evaluation takes longer than training: kNN and the online probe suffice.
_BRIEF = {"epochs": 2.0, "eval.at_end": False, "eval.knn_every_epochs": 0.0}
# BatchNorm over 32 images per device on 8 devices, asymmetric loss: MoCo as published.
_LOCAL = {"model.bn_group_size": 1, "moco.symmetric": False}
# BYOL as the official code starts it, in the 400 steps of batch 256 that the other methods have.
_BYOL = {"batch_size": 256, "log_every": 20, "byol.target_init": "independent"}
_BYOL |= {"byol.ema_decay": 0.98, "optim.name": "sgd", "optim.lr": 0.05}
_BYOL |= {"optim.lr_scaling": "linear", "optim.weight_decay": 1e-4, "optim.decay_norm_bias": True}
# LARS learns faster than the config's SGD in so few epochs.
_SIMSIAM = {"optim.name": "lars", "optim.lr": 2.0, "optim.weight_decay": 1e-6}
_SIMSIAM |= {"optim.decay_norm_bias": False}

# Group -> name -> (base config, changed keys).
ABLATIONS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "augmentation": {
        "crop-and-color": ("simclr_cifar10:cpu", _BRIEF),
        "crop": ("simclr_cifar10:cpu", _BRIEF | _NO_COLOR),
        "color": ("simclr_cifar10:cpu", _BRIEF | _NO_CROP),
        "flip-only": ("simclr_cifar10:cpu", _BRIEF | _NO_CROP | _NO_COLOR),
    },
    "head": {
        "head-none": ("simclr_digits", {"simclr.layers": 0}),
        "head-linear": ("simclr_digits", {"simclr.layers": 1}),
        "head-mlp2": ("simclr_digits", {}),
        "head-mlp3": ("simclr_digits", {"simclr.layers": 3}),
    },
    "temperature": {
        f"temperature-{t:g}": ("simclr_digits", {"simclr.temperature": t})
        for t in (0.05, 0.1, 0.5, 1.0)
    },
    "batch": {f"batch-{b}": ("simclr_digits", {"batch_size": b}) for b in (64, 128, 512)},
    "ema-decay": {
        f"ema-decay-{m:g}": ("byol_digits", _BYOL | {"byol.ema_decay": m, "byol.ema_decay_end": m})
        for m in (0.0, 0.9, 0.98, 0.999, 1.0)
    },
    "heads-without-bn": {
        "byol": ("byol_digits", _BYOL),
        "byol-heads-without-bn": ("byol_digits", _BYOL | {"byol.head_bn": False}),
    },
    "stop-gradient": {
        "stop-gradient": ("simsiam_digits", _SIMSIAM),
        "no-stop-gradient": ("simsiam_digits", _SIMSIAM | {"simsiam.stop_gradient": False}),
    },
    "shuffle": {
        "shuffle-and-bn-per-device": ("moco_digits", _LOCAL),
        "no-shuffle-and-bn-per-device": ("moco_digits", _LOCAL | {"moco.shuffle": False}),
    },
}


def get_config(variant: str = "head-mlp2") -> ConfigDict:
    """Returns the config."""
    ablations = {name: each for group in ABLATIONS.values() for name, each in group.items()}
    require_choice("The variant of ablations.py", variant, ablations)
    base, changes = ablations[variant]
    file, _, setting = base.partition(":")
    config = load_config(f"{_HERE / file}.py" + (f":{setting}" if setting else ""))
    if file.endswith("_digits"):
        changes = _DIGITS | changes
    config.update_from_flattened_dict(changes)
    return config
