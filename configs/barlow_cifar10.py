"""Barlow Twins on CIFAR-10; the variant is the setting: `lightly`, `solo` or `cpu`.

Paper: Zbontar et al., 2021, arXiv:2103.03230; the official code has no CIFAR command. Published:
kNN 84.2 % (lightly, 200 epochs, batch 128; 81.9 at batch 512), 92.1 % online linear (solo-learn).
Cost: 3.4 GFLOP per view. Data: `recipes.cifar10_config`. Deviation: computed in bfloat16.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import cpu_cifar10_config, lightly_cifar10_config, solo_cifar10_config


def lightly() -> ConfigDict:
    """Lightly's benchmark, with BYOL's views."""
    config = lightly_cifar10_config(saturation=0.2, solarize=0.2)
    config.method = "barlow"
    config.barlow.update(hidden=2048, out=2048, layers=2, out_bias=True, redundancy_weight=0.005)
    return config


def solo() -> ConfigDict:
    """solo-learn's script; solarizes the second view with probability 0.2."""
    config = solo_cifar10_config(jitter=(0.4, 0.4, 0.2, 0.1), blur=0.0, solarize=0.2)
    config.method = "barlow"
    config.barlow.update(hidden=2048, out=2048, hidden_bias=True, out_bias=True, loss_scale=0.1)
    config.optim.update(lr=0.3, weight_decay=1e-4)
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.method = "barlow"
    config.barlow.update(hidden=512, out=512)
    config.optim.update(name="adamw", lr=1e-3, lr_scaling="none", weight_decay=0.05)
    return config


def get_config(variant: str = "lightly") -> ConfigDict:
    """Returns the config."""
    return {"lightly": lightly, "solo": solo, "cpu": cpu}[variant]()
