"""SimCLR v2 on CIFAR-10, with the paper's memory bank; the variant is `full` or `cpu`.

Paper: Chen et al., 2020, arXiv:2006.10029, section 2. The official CIFAR command is that of
`simclr_cifar10.py`, with v2's three-layer projector; this config adds a memory bank of 8,192
projections by an EMA network. No published result on CIFAR-10. Cost: 4.4 GFLOP per view. Data:
`recipes.cifar10_config`. Deviation: computed in bfloat16.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import SIMCLR_MODEL, cifar10_config, cpu_cifar10_config, simclr_views


def full() -> ConfigDict:
    """The full-size network."""
    config = cifar10_config()
    config.batch_size = 512
    config.epochs = 1000.0
    config.count_steps = "images_plus_1"
    config.model.update(SIMCLR_MODEL)
    config.views = simclr_views(size=32, strength=0.5, blur=False)
    config.simclr.update(layers=3, temperature=0.5, loss_scale=2.0, memory_bank=8192)
    config.optim.update(lr=1.0, weight_decay=1e-4)
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.simclr.update(temperature=0.2, layers=3, memory_bank=1024, ema_decay=0.99)
    config.optim.lr = 0.5
    return config


def get_config(variant: str = "full") -> ConfigDict:
    """Returns the config."""
    return {"full": full, "cpu": cpu}[variant]()
