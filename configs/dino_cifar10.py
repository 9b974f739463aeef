"""DINO on CIFAR-10; the variant is the setting: `lightly`, `solo` or `cpu`.

Paper: Caron et al., 2021, arXiv:2104.14294; the official code has no CIFAR command. Two crops of
32×32, no small crops. Published, of the online network: kNN 81.3 % (lightly, 200 epochs), 89.5 %
online linear (solo-learn). Cost: 4.4 GFLOP per view. Data: `recipes.cifar10_config`.
Deviation: computed in bfloat16.
"""

from ml_collections import ConfigDict

from ssl_jax.recipes import (
    cpu_cifar10_config,
    dino_views,
    lightly_cifar10_config,
    solo_cifar10_config,
)


def lightly() -> ConfigDict:
    """Lightly's benchmark; evaluates the online network, as it does."""
    config = lightly_cifar10_config()
    config.method = "dino"
    config.views = dino_views(large=32, small_crops=0)
    for view in config.views.values():
        view.blur.prob = 0.0
    config.dino.update(layers=2, head_bn=True, hidden_bias=False, prototypes=2048)
    config.dino.update(ema_decay=0.99, ema_decay_end=0.99, separate_views=True)
    config.dino.target_init = "encoder"
    config.eval.network = "online"
    return config


def solo() -> ConfigDict:
    """solo-learn's script; solarizes the second view with probability 0.2."""
    config = solo_cifar10_config(jitter=(0.4, 0.4, 0.2, 0.1), blur=0.0, solarize=0.2)
    config.method = "dino"
    config.model.head_init = "official"
    config.dino.update(prototypes=4096, teacher_temperature=0.07, ema_decay=0.9995)
    config.dino.separate_views = True
    config.optim.update(lr=0.3, weight_decay=1e-6, frozen_steps=195)
    return config


def cpu() -> ConfigDict:
    """A smaller setting: minutes on a CPU."""
    config = cpu_cifar10_config()
    config.method = "dino"
    config.dino.update(hidden=512, out=64, prototypes=1024, ema_decay=0.99, head_bn=True)
    config.optim.update(name="adamw", lr=1e-3, lr_scaling="none")
    config.optim.update(weight_decay=0.04, clip_norm_per_tensor=3.0, frozen_steps=195)
    return config


def get_config(variant: str = "lightly") -> ConfigDict:
    """Returns the config."""
    return {"lightly": lightly, "solo": solo, "cpu": cpu}[variant]()
