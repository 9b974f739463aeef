"""MoCo v3 on CIFAR-10; the variant is the setting: `solo` or `cpu`.

Paper: Chen, Xie & He, 2021, arXiv:2104.02057; the official code has no CIFAR command, and lightly
no MoCo v3. Published: 93.1 % online linear (solo-learn). Cost: 4.4 GFLOP per view. Data:
`recipes.cifar10_config`. Deviation: computed in bfloat16.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import cpu_cifar10_config, solo_cifar10_config


def solo() -> ConfigDict:
    """solo-learn's script; solarizes the second view with probability 0.2."""
    config = solo_cifar10_config(jitter=(0.4, 0.4, 0.2, 0.1), blur=0.0, solarize=0.2)
    config.method = "mocov3"
    config.mocov3.temperature = 0.2
    config.optim.update(lr=0.3, weight_decay=1e-6)
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.method = "mocov3"
    config.mocov3.update(hidden=512, out=64, temperature=0.2)
    config.optim.update(name="sgd", lr=0.2, weight_decay=1e-4, decay_norm_bias=True)
    return config


def get_config(variant: str = "solo") -> ConfigDict:
    """Returns the config."""
    return {"solo": solo, "cpu": cpu}[variant]()
