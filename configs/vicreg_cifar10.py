"""VICReg on CIFAR-10; the variant is the setting: `solo` or `cpu`.

Paper: Bardes et al., 2021, arXiv:2105.04906; the official code has no CIFAR command. Published:
92.1 % online linear (solo-learn). Cost: 3.4 GFLOP per view. Data: `recipes.cifar10_config`.
Deviation: computed in bfloat16.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import cpu_cifar10_config, solo_cifar10_config


def solo() -> ConfigDict:
    """solo-learn's script, whose variance term lacks the official ½: its weight 25 is 50."""
    config = solo_cifar10_config(jitter=(0.4, 0.4, 0.2, 0.1), blur=0.0)
    config.method = "vicreg"
    for view in config.views.values():
        view.crop.area = (0.2, 1.0)
        view.solarize.prob = 0.1
    config.vicreg.update(hidden=2048, out=2048, out_bias=True, variance_weight=50.0)
    config.optim.update(lr=0.3, weight_decay=1e-4)
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.method = "vicreg"
    config.vicreg.update(hidden=512, out=512)
    config.optim.update(name="adamw", lr=1e-3, lr_scaling="none", weight_decay=0.05)
    return config


def get_config(variant: str = "solo") -> ConfigDict:
    """Returns the config."""
    return {"solo": solo, "cpu": cpu}[variant]()
