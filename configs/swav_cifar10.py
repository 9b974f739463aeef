"""SwAV on CIFAR-10; the variant is the setting: `lightly`, `solo` or `cpu`.

Paper: Caron et al., 2020, arXiv:2006.09882; the official code has no CIFAR command. Two crops of
32×32, no small crops. Published: kNN 84.2 % (lightly, 200 epochs), 89.2 % online linear
(solo-learn). Cost: 3.3 GFLOP per view. Data: `recipes.cifar10_config`. Deviation: computed in
bfloat16.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import cpu_cifar10_config, lightly_cifar10_config, solo_cifar10_config


def lightly() -> ConfigDict:
    """Lightly's benchmark."""
    config = lightly_cifar10_config(smallest=0.14)
    config.method = "swav"
    config.swav.update(prototypes=512, hidden=512)
    config.swav.update(hidden_bias=False, prototype_bias=True, separate_views=True)
    config.optim.update(name="adam", lr=2e-3, weight_decay=1e-6)
    return config


def solo() -> ConfigDict:
    """solo-learn's script."""
    config = solo_cifar10_config(jitter=(0.8, 0.8, 0.8, 0.2))
    config.method = "swav"
    # Used from epoch 50, when its 15 batches are there; an epoch has 195.
    config.swav.update(queue=3840, queue_from_epoch=50 - 15 / 195)
    config.swav.update(prototype_norm="weight_norm", separate_views=True)
    config.optim.update(lr=0.6, weight_decay=1e-6, frozen_steps=2 * 195)
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.method = "swav"
    config.swav.update(prototypes=512, hidden=512, epsilon=0.03)
    config.optim.frozen_steps = 100
    return config


def get_config(variant: str = "lightly") -> ConfigDict:
    """Returns the config."""
    return {"lightly": lightly, "solo": solo, "cpu": cpu}[variant]()
