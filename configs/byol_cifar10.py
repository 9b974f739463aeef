"""BYOL on CIFAR-10; the variant is the setting: `lightly`, `solo` or `cpu`.

Paper: Grill et al., 2020, arXiv:2006.07733; the official code has no CIFAR command. Published: kNN
86.8 % (lightly, 200 epochs), 92.6 % online linear (solo-learn). Cost: 4.4 GFLOP per view. Data:
`recipes.cifar10_config`. In all three, the target starts as a copy. lightly's loss is a quarter of
BYOL's (`loss_scale`), less 1. Deviation: computed in bfloat16.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import cpu_cifar10_config, lightly_cifar10_config, solo_cifar10_config


def lightly() -> ConfigDict:
    """Lightly's benchmark; solarizes the second view with probability 0.2."""
    config = lightly_cifar10_config(saturation=0.2, solarize=0.2)
    config.method = "byol"
    config.byol.update(hidden=1024, ema_decay=0.99, ema_decay_end=0.99, loss_scale=0.25)
    config.byol.update(target_init="copy", hidden_bias=False, out_bias=True)
    return config


def solo() -> ConfigDict:
    """solo-learn's script; solarizes the second view with probability 0.2."""
    config = solo_cifar10_config(jitter=(0.4, 0.4, 0.2, 0.1), blur=0.0, solarize=0.2)
    config.method = "byol"
    config.byol.update(ema_decay=0.99, target_init="copy", out_bias=True)
    config.optim.update(lr=1.0, weight_decay=1e-5)
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.method = "byol"
    config.byol.update(hidden=512, out=64, ema_decay=0.98, target_init="copy")
    config.optim.update(name="sgd", lr=0.05, weight_decay=1e-4, decay_norm_bias=True)
    return config


def get_config(variant: str = "lightly") -> ConfigDict:
    """Returns the config."""
    return {"lightly": lightly, "solo": solo, "cpu": cpu}[variant]()
